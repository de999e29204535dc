"""Published question sets for real models: read in place, in the form they were published in, each with a grader.

A set is named in a recipe under `evaluation.benchmarks`; sets of one `skill` are measured together. A new set = one entry in the SETS of a
file here, one row in docs/sets.md, one test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persea.chat.messages import Message
from persea.config.schema import BenchmarkSection, CorpusSection
from persea.config.yaml_source import suggest_choice
from persea.errors import DataError, RecipeError
from persea.tasks.benchmarks import code, instructions, languages, reasoning, safety, tools
from persea.tasks.benchmarks.readers import Benchmark, BenchmarkSource, require_module, select_split
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.sandbox.sandbox import open_sandbox
from persea.tasks.task import Grade, Split, Task, TaskItem

BENCHMARKS = (
    *languages.BENCHMARKS,
    *reasoning.BENCHMARKS,
    *code.BENCHMARKS,
    *safety.BENCHMARKS,
    *tools.BENCHMARKS,
    *instructions.BENCHMARKS,
)


@dataclass(frozen=True)
class LoadedBenchmark:
    """A set with its questions read. left_out: reason -> how many of its rows nobody can grade."""

    benchmark: Benchmark
    source: BenchmarkSource
    skill: str
    items: tuple[TaskItem, ...]
    left_out: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "set": self.benchmark.name,
            "skill": self.skill,
            "language": self.source.language or self.benchmark.language,
            "questions": len(self.items),
            "left_out": dict(self.left_out),
        }


def find_benchmark(name: str) -> Benchmark:
    """The set of that name, or an error that lists the known ones."""
    for one in BENCHMARKS:
        if one.name == name:
            return one
    raise DataError(
        f"unknown set {name!r}",
        where="evaluation.benchmarks",
        remedy=f"known sets: {', '.join(s.name for s in BENCHMARKS)}",
    )


def reject_unknown_names(
    refs: Sequence[BenchmarkSection], corpus: Sequence[CorpusSection], where: str
) -> None:
    """Raises RecipeError, a line for each set, or else for each skill of the corpus, that nobody knows. Opens no file."""
    sets = {s.name: s for s in BENCHMARKS}
    wrong = [
        (
            f"evaluation.benchmarks.{k}.benchmark",
            f"unknown set {r.benchmark!r}",
            suggest_choice(r.benchmark, list(sets)),
        )
        for k, r in enumerate(refs)
        if r.benchmark not in sets
    ]
    if not wrong:
        skills = [
            *(s.name for s in GENERATED_TASKS),
            *(r.skill or sets[r.benchmark].skill or r.benchmark for r in refs),
        ]
        wrong = [
            (
                f"corpus.{k}.skill",
                f"unknown skill {part.skill!r}",
                suggest_choice(part.skill, skills),
            )
            for k, part in enumerate(corpus)
            if part.skill not in skills
        ]
    told = [
        RecipeError(what, where=f"{where}: {key}", remedy=remedy) for key, what, remedy in wrong
    ]
    if told:
        raise told[0] if len(told) == 1 else RecipeError("\n".join(map(str, told)))


def load_benchmark(
    benchmark: Benchmark, source: BenchmarkSource, skill: str = ""
) -> LoadedBenchmark:
    """Read a set and make sure that it can be graded here.

    Raises DataError with file and line for what is broken, EnvironmentLacks (exit 7) where an extra or a sandbox is missing.
    """
    for module in benchmark.required_modules:
        require_module(module, "eval", f"the set {benchmark.name}")
    if benchmark.runs_code:
        open_sandbox()
    if not benchmark.language and not source.language:
        raise DataError(
            f"the set {benchmark.name} does not say its language",
            where=source.file,
            remedy="add `language:`, such as vi",
        )
    asked = benchmark.load_items(source)
    return LoadedBenchmark(
        benchmark, source, skill or benchmark.skill or benchmark.name, asked.items, asked.left_out
    )


def benchmark_tasks(benchmarks: Sequence[LoadedBenchmark]) -> tuple[Task, ...]:
    """One skill for each name, of all sets of that name."""
    return tuple(
        _benchmark_task(name, [o for o in benchmarks if o.skill == name])
        for name in dict.fromkeys(o.skill for o in benchmarks)
    )


def _benchmark_task(name: str, benchmarks: Sequence[LoadedBenchmark]) -> Task:
    graders = {o.benchmark.name: o.benchmark for o in benchmarks}
    items = [i for o in benchmarks for i in o.items]
    ids = [i.prompt.id for i in items]
    if len(set(ids)) < len(ids):
        raise DataError(
            f"two sets of {name} hold the same questions",
            where=", ".join(o.source.file for o in benchmarks),
            remedy="name each file once",
        )

    def grade(item: TaskItem, said: Message) -> Grade:
        # a prompt of the corpus that teaches this skill is graded as the skill's first set grades
        return graders.get(item.prompt.id.partition("/")[0], benchmarks[0].benchmark).grade_answer(
            item, said
        )

    def some(which: Split, n: int, seed: int) -> tuple[TaskItem, ...]:
        return select_split(items, which, n, seed)

    return Task(name, tuple(dict.fromkeys(i.prompt.language for i in items)), some, grade)
