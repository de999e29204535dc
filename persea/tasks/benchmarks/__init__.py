"""Published benchmarks for real models, read in their published file formats, each with a grader.

A recipe names benchmarks under `evaluation.benchmarks`; benchmarks with one `skill` are measured
together. A new benchmark is one file with a BENCHMARKS tuple, its line in the tuple here, a row in
docs/sets.md and one test: see docs/new_task.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persea.chat.messages import Message
from persea.config.schema import BenchmarkSection, CorpusSection, GradingSection
from persea.config.yaml_source import suggest_choice
from persea.errors import DataError, RecipeError
from persea.tasks.benchmarks import (
    code,
    instructions,
    languages,
    reasoning,
    safety,
    tools,
)
from persea.tasks.benchmarks.benchmark import (
    Benchmark,
    BenchmarkSource,
    GradingOptions,
    require_module,
    select_split,
)
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.sandbox.sandbox import SandboxLimits, open_sandbox
from persea.tasks.task import Grade, Split, Task, TaskItem

if TYPE_CHECKING:
    from persea.config.recipe import Recipe

BENCHMARKS: tuple[Benchmark, ...] = (
    *languages.BENCHMARKS,
    *reasoning.BENCHMARKS,
    *code.BENCHMARKS,
    *safety.BENCHMARKS,
    *tools.BENCHMARKS,
    *instructions.BENCHMARKS,
)


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its questions.

    Attributes:
        benchmark: The benchmark.
        source: Where its questions were read.
        skill: The skill that it measures.
        items: Its questions.
        left_out: Reason -> number of rows that cannot be graded.
    """

    benchmark: Benchmark
    source: BenchmarkSource
    skill: str
    items: tuple[TaskItem, ...]
    left_out: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the entry of evaluate/sets.json."""
        return {
            "set": self.benchmark.name,
            "skill": self.skill,
            "language": self.source.language or self.benchmark.language,
            "questions": len(self.items),
            "left_out": dict(self.left_out),
        }


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        DataError: If there is none; the message lists the known names.
    """
    for one in BENCHMARKS:
        if one.name == name:
            return one
    raise DataError(
        f"unknown benchmark {name!r}",
        where="evaluation.benchmarks",
        remedy=f"known benchmarks: {', '.join(b.name for b in BENCHMARKS)}",
    )


def refuse_unknown_names(
    refs: Sequence[BenchmarkSection],
    corpus: Sequence[CorpusSection],
    where: str,
    has_held_out_texts: bool = False,
    own_skills: Collection[str] = (),
    settled_skills: Collection[str] = (),
) -> None:
    """Check the names of benchmarks and skills in a recipe. Opens no file.

    Args:
        refs: The recipe's `evaluation.benchmarks`.
        corpus: The recipe's `corpus`.
        where: File of the recipe, for the message.
        has_held_out_texts: Whether the recipe names `evaluation.texts`. A skill that is taught
            from texts alone may then have any name: these texts measure it, and no task.
        own_skills: Skills that the recipe's own tasks measure.
        settled_skills: Skills whose teacher needs no measurement.

    Raises:
        RecipeError: If a benchmark is unknown, or else if a skill of the corpus is; one line for
            each.
    """
    known = {b.name: b for b in BENCHMARKS}
    wrong = [
        (
            f"evaluation.benchmarks.{k}.benchmark",
            f"unknown benchmark {r.benchmark!r}",
            suggest_choice(r.benchmark, list(known)),
        )
        for k, r in enumerate(refs)
        if r.benchmark not in known
    ]
    if not wrong:
        skills = [
            *own_skills,
            *(t.name for t in GENERATED_TASKS),
            *(r.skill or known[r.benchmark].skill or r.benchmark for r in refs),
        ]
        with_prompts = {part.skill for part in corpus if part.texts is None}
        wrong = [
            (
                f"corpus.{k}.skill",
                f"unknown skill {part.skill!r}"
                if part.generate
                else f"nothing measures the skill {part.skill!r}, to choose between its teachers",
                _remedy_for_skill(part, skills),
            )
            for k, part in enumerate(corpus)
            if part.skill not in skills
            and not (has_held_out_texts and part.skill not in with_prompts)
            and not (part.skill in settled_skills and not part.generate)
        ]
    errors = [
        RecipeError(message, where=f"{where}: {key}", remedy=remedy)
        for key, message, remedy in wrong
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else RecipeError("\n".join(map(str, errors)))


def refuse_unmeasured_skills(recipe: Recipe, where: str, own_skills: Collection[str] = ()) -> None:
    """Check the names of benchmarks and skills in a recipe. Opens no file.

    Any word is a skill if a task of the recipe measures it, or if its teacher needs no measurement:
    it is pinned, or the only one.

    Args:
        recipe: The recipe.
        where: File of the recipe, for the message.
        own_skills: Skills of tasks in Python files.

    Raises:
        RecipeError: A benchmark or a skill is unknown; one line for each.
    """
    teachers = [t for t in recipe.teachers if not t.reference]
    refuse_unknown_names(
        recipe.evaluation.benchmarks,
        recipe.corpus,
        where,
        bool(recipe.evaluation.texts),
        {*own_skills, *(task.skill for task in recipe.tasks)},
        recipe.skills if len(teachers) == 1 else recipe.audition.pinned,
    )


def _remedy_for_skill(part: CorpusSection, skills: Sequence[str]) -> str:
    near = suggest_choice(part.skill, skills)
    if part.generate or near.startswith("did you mean"):
        return near
    return (
        f"add `tasks: [{{skill: {part.skill}, file: held-out.jsonl, metric: contains}}]` "
        f"(docs/howto/own_tasks.md), or pin a teacher: `audition: {{pinned: {{{part.skill}: "
        "NAME}}`"
    )


def grading_options(section: GradingSection) -> GradingOptions:
    """Return the grading options of a recipe's `evaluation.grading`."""
    return GradingOptions(
        section.max_answer_chars,
        section.min_correct_chrf,
        section.math_timeout_s,
        SandboxLimits(
            cpu_s=section.code_cpu_s,
            wall_s=section.code_wall_s,
            memory_bytes=section.code_memory_bytes,
        ),
    )


def load_benchmark(
    benchmark: Benchmark,
    source: BenchmarkSource,
    skill: str = "",
    options: GradingOptions | None = None,
) -> LoadedBenchmark:
    """Read a benchmark, after checking that it can be graded on this machine.

    Args:
        benchmark: The benchmark.
        source: Location of its questions.
        skill: The skill that it measures; "" = the benchmark's default.
        options: Grading options; those of the benchmark by default.

    Returns:
        The benchmark with its questions.

    Raises:
        DataError: If the source is broken, with file and line.
        MissingRequirementError: If an optional module or a sandbox is missing (exit 7).
    """
    if options is not None:
        benchmark = benchmark.with_options(options)
    for module in benchmark.required_modules:
        require_module(module, "eval", f"the benchmark {benchmark.name}")
    if benchmark.runs_code:
        open_sandbox(benchmark.options.sandbox)
    if not benchmark.language and not source.language:
        raise DataError(
            f"the benchmark {benchmark.name} has no language of its own",
            where=source.file,
            remedy="add `language:`, such as vi",
        )
    loaded = benchmark.load_items(source)
    return LoadedBenchmark(
        benchmark, source, skill or benchmark.skill or benchmark.name, loaded.items, loaded.left_out
    )


def benchmark_tasks(benchmarks: Sequence[LoadedBenchmark]) -> tuple[Task, ...]:
    """Return one task for each skill, made of all benchmarks of that skill.

    Raises:
        DataError: If two benchmarks of one skill hold the same questions.
    """
    return tuple(
        _benchmark_task(skill, [b for b in benchmarks if b.skill == skill])
        for skill in dict.fromkeys(b.skill for b in benchmarks)
    )


def _benchmark_task(skill: str, benchmarks: Sequence[LoadedBenchmark]) -> Task:
    by_name = {b.benchmark.name: b.benchmark for b in benchmarks}
    all_items = [i for b in benchmarks for i in b.items]
    ids = [i.prompt.id for i in all_items]
    if len(set(ids)) < len(ids):
        raise DataError(
            f"two benchmarks of {skill} hold the same questions",
            where=", ".join(b.source.file for b in benchmarks),
            remedy="name each file once",
        )

    def grade(item: TaskItem, answer: Message) -> Grade:
        # A prompt of the corpus that teaches this skill is graded like the skill's first benchmark.
        name = item.prompt.id.partition("/")[0]
        return by_name.get(name, benchmarks[0].benchmark).grade_answer(item, answer)

    def items(split: Split, n: int, seed: int) -> tuple[TaskItem, ...]:
        return select_split(all_items, split, n, seed)

    return Task(skill, tuple(dict.fromkeys(i.prompt.language for i in all_items)), items, grade)
