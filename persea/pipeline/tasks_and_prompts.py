"""Load the questions that a recipe names: tasks, benchmarks, prompts, and samples for check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from persea.cache.answer_filter import QuestionKey, question_key
from persea.chat.messages import Conversation, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.config.schema import BenchmarkSection, CorpusSection, TaskSection, TeacherSection
from persea.data.formats import ReadReport, read_prompts
from persea.data.prompts import MalformedLine, Prompt, assign_efforts
from persea.data.tables import TableRow, iter_hub_table
from persea.data.text_files import read_documents
from persea.data.windows import MIN_WINDOW_TOKENS, TokenLimit, split_document
from persea.errors import DataError, TeacherError
from persea.evaluation.compatibility import ConversationSample, read_texts, reference_samples
from persea.evaluation.text_contest import GivenTexts
from persea.tasks import benchmarks as benchmark_tasks
from persea.tasks import generated
from persea.tasks.benchmarks.benchmark import Benchmark, BenchmarkSource, GradingOptions
from persea.tasks.benchmarks.readers import HUB_PREFIX
from persea.tasks.own_tasks import load_own_task, load_task_file
from persea.tasks.task import Split, Task, TaskItem
from persea.teachers.teacher import Teacher


@dataclass(frozen=True)
class SafetyJudge:
    """A reference model that grades answers to safety questions.

    Attributes:
        family: Model family of the judge.
        teacher_families: Teacher name -> model family: a judge of a teacher's family is refused.
        ask: Returns the judge's verdict on a grading question.
    """

    family: str
    teacher_families: Mapping[str, str]
    ask: Callable[[str], str]


def make_safety_judge(
    name: str,
    teachers: Sequence[TeacherSection],
    family_of: Callable[[str], str],
    load_teacher: Callable[[str], Teacher],
    max_new_tokens: int = 16,
) -> SafetyJudge | None:
    """Return the judge that a recipe names, or None if it names none.

    Args:
        name: Name of the judge among the recipe's teachers; "" = none.
        teachers: The recipe's teachers and reference models.
        family_of: Returns the model family of a teacher by name.
        load_teacher: Loads a teacher by name. Called when the first question is asked.
        max_new_tokens: Longest verdict, in the judge's tokens: a verdict is one word.
    """
    if not name:
        return None
    families = {t.name: t.family or family_of(t.name) for t in teachers}
    load_judge = cache(partial(load_teacher, name))  # loaded at the first question

    def ask(question: str) -> str:
        (verdict,) = replace(load_judge(), effort=ThinkingEffort.NONE).answer(
            [Prompt("judge", Conversation.from_question(question), "judge", "en")],
            max_new_tokens,
        )
        if verdict.failure_reason:  # a server's failure is no verdict
            raise TeacherError(
                verdict.failure_reason,
                where=name,
                remedy="look at the server, then run again: finished answers are kept",
            )
        return verdict.text

    return SafetyJudge(
        families[name], {t.name: families[t.name] for t in teachers if not t.reference}, ask
    )


def load_benchmarks(
    refs: Iterable[BenchmarkSection],
    judge: SafetyJudge | None = None,
    options: GradingOptions | None = None,
) -> tuple[benchmark_tasks.LoadedBenchmark, ...]:
    """Read a recipe's published benchmarks.

    Args:
        refs: The benchmarks that the recipe names.
        judge: Grades the safety benchmarks; None = their own rules do.
        options: Limits of the graders; None = the defaults.

    Raises:
        DataError: A file is broken. The message names file and line.
        MissingRequirementError: A benchmark cannot be graded on this machine.
        RefusedError: The judge is of a teacher's family.
    """
    safety = benchmark_tasks.safety

    def find(name: str) -> Benchmark:
        benchmark = benchmark_tasks.find_benchmark(name)
        if judge and benchmark in safety.BENCHMARKS:
            return safety.with_judge(benchmark, judge.ask, judge.family, judge.teacher_families)
        return benchmark

    def source(ref: BenchmarkSection) -> BenchmarkSource:
        file = ref.file or f"{HUB_PREFIX}{ref.hub}"
        return BenchmarkSource(file, ref.answers or "", ref.language, ref.config, ref.split)

    return tuple(
        benchmark_tasks.load_benchmark(find(ref.benchmark), source(ref), ref.skill, options)
        for ref in refs
    )


def load_own_tasks(
    sections: Sequence[TaskSection],
    task_files: Sequence[Path],
    judge: SafetyJudge | None,
    options: GradingOptions,
) -> tuple[benchmark_tasks.LoadedBenchmark, ...]:
    """Read a recipe's own tasks, and the Python files of the command line.

    Args:
        sections: The recipe's `tasks`.
        task_files: Python files with questions and a grader.
        judge: Grades the tasks of `metric: judge`.
        options: Limits of the graders.

    Raises:
        DataError: A file is broken. The message names file and line.
        MissingRequirementError: A package or the sandbox is missing.
        RefusedError: The judge is of a teacher's family.
    """
    skills = [section.skill for section in sections]
    if judge and any(section.metric == "judge" for section in sections):
        benchmark_tasks.safety.refuse_related_judge(judge.family, judge.teacher_families)
    return (
        *(
            load_own_task(
                section,
                section.skill if skills.count(section.skill) == 1 else f"{section.skill}-{k}",
                options,
                judge.ask if judge else None,
            )
            for k, section in enumerate(sections)
        ),
        *(load_task_file(path, options) for path in task_files),
    )


def measured_tasks(
    skill_names: Sequence[str], benchmarks: Sequence[benchmark_tasks.LoadedBenchmark]
) -> tuple[Task, ...]:
    """Return the tasks to measure: the skills of the corpus, then the benchmarks' own tasks.

    A skill is measured by the benchmarks that are assigned to it, otherwise by its generator; a
    skill with neither is not measured.
    """
    by_name = {task.name: task for task in benchmark_tasks.benchmark_tasks(benchmarks)}
    generated_names = {task.name for task in generated.GENERATED_TASKS}
    return (
        *(
            by_name.pop(name) if name in by_name else generated.find_generated_task(name)
            for name in skill_names
            if name in by_name or name in generated_names
        ),
        *by_name.values(),
    )


def load_part_prompts(
    part: CorpusSection,
    where: str,
    tasks: Sequence[Task],
    skill_names: Sequence[str],
    seed: int,
    on_malformed: Callable[[MalformedLine], None],
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Prompt]:
    """Load the prompts of one part of the corpus, and assign thinking efforts to them.

    Args:
        part: The part: a file of prompts or of texts, or a number of generated prompts.
        where: Place in the recipe, for messages.
        tasks: The run's tasks.
        skill_names: Skills that the corpus names.
        seed: Seed of generated prompts.
        on_malformed: Called with each malformed line of a part that quarantines them.
        on_note: Called with what a reader found in a file, for people.

    Raises:
        DataError: A prompt is of a skill that no part names, a task has too few questions, or more
            lines are malformed than the part allows.
    """
    num_malformed = 0

    def set_aside(line: MalformedLine) -> None:
        nonlocal num_malformed
        num_malformed += 1
        on_malformed(line)

    quarantine = set_aside if part.on_malformed == "quarantine" else None
    if part.texts is not None:
        documents = read_documents(
            Path(part.texts), part.column or "", quarantine, part.max_line_bytes
        )
        texts = [
            Prompt(location, Conversation.from_document(text), part.skill, part.language)
            for location, text in documents
        ]
        _refuse_empty(texts, part.texts, "text", num_malformed)
        return texts
    if part.file is not None or part.hub is not None:
        source: Path | Iterable[TableRow] = Path(part.file or "")
        name = part.file or ""
        if part.hub is not None:
            hub = part.hub
            name = f"{hub.name}, {hub.split}"
            source = iter_hub_table(
                hub.name, hub.split, hub.config, hub.revision, streaming=hub.streaming
            )
        found = ReadReport()
        prompts = list(
            read_prompts(
                source,
                part.skill,
                part.language,
                quarantine,
                part.max_line_bytes,
                columns=part.columns,
                learn_turns=part.learn_turns,
                report=found,
            )
        )
        for note in found.notes():
            on_note(f"{name}: {note}")
        _refuse_too_many_malformed(name, num_malformed, found.num_rows, part)
        _refuse_empty(prompts, name, "prompt", num_malformed, found.notes())
        for prompt in prompts:
            if prompt.skill not in skill_names:
                raise DataError(
                    f"prompt {prompt.id} is of skill {prompt.skill!r}, "
                    "which the corpus does not name",
                    where=name,
                    remedy=f"use one of {', '.join(skill_names)}, or add a part of that skill",
                )
        return assign_efforts(prompts, part.effort_shares)
    items = next(s for s in tasks if s.name == part.skill).items(
        Split.TRAIN, part.generate or 0, seed
    )
    if len(items) < (part.generate or 0):
        raise DataError(
            f"{part.skill} has only {len(items):,} training questions",
            where=where,
            remedy=f"ask for at most {len(items):,}",
        )
    return assign_efforts(
        (replace(i.prompt, answer=i.reference) for i in items), part.effort_shares
    )


def _refuse_empty(
    found: Sequence[Prompt], name: str, kind: str, num_malformed: int, notes: Sequence[str] = ()
) -> None:
    """Check that a source of the corpus is not empty.

    Raises:
        DataError: It holds nothing to teach.
    """
    if not found:
        reasons = [f"{num_malformed:,} rows cannot be read"] * (num_malformed > 0)
        why = "; ".join([*reasons, *notes]) or "the file is empty"
        raise DataError(
            f"no {kind} to teach: {why}",
            where=name,
            remedy="give another file, or delete this part of `corpus:`",
        )


def _refuse_too_many_malformed(
    file: str, num_malformed: int, num_rows: int, part: CorpusSection
) -> None:
    """Check the share of lines that were set aside.

    Raises:
        DataError: It is above `max_malformed_share`.
    """
    if num_malformed > part.max_malformed_share * (num_rows + num_malformed):
        raise DataError(
            f"{num_malformed:,} of {num_rows + num_malformed:,} rows cannot be read",
            where=file,
            remedy="the first is named by `on_malformed: refuse`; a larger `max_malformed_share:` "
            "allows them",
        )


def split_documents(
    prompts: Iterable[Prompt], max_tokens: Mapping[str, int], renderers: Mapping[str, ChatRenderer]
) -> list[Prompt]:
    """Split documents into windows that every model takes; prompts stay as they are.

    Args:
        prompts: Prompts and documents.
        max_tokens: Model name -> longest sequence it takes, in its tokens; 0 = any length.
        renderers: Model name -> chat renderer.

    Returns:
        The prompts in order. A window has the id of its document, @ and its first byte, unless it
        is the whole document.
    """
    limits: list[TokenLimit] = []
    windowed: list[Prompt] = []
    for prompt in prompts:
        if not prompt.conversation.is_document:
            windowed.append(prompt)
            continue
        limits = limits or [
            TokenLimit(
                renderers[name].vocabulary,
                max(MIN_WINDOW_TOKENS, most - renderers[name].document_tokens.count),
            )
            for name, most in max_tokens.items()
            if most
        ]
        windows = split_document(prompt.conversation.messages[0].text, limits)
        if len(windows) < 2:
            windowed.append(prompt)
            continue
        first_byte = 0
        for k, window in enumerate(windows, start=1):
            conversation = Conversation.from_document(window, ends=k == len(windows))
            windowed.append(
                replace(prompt, id=f"{prompt.id}@{first_byte}", conversation=conversation)
            )
            first_byte += len(window.encode())
    return windowed


def items_by_question(
    parts: Iterable[CorpusSection], tasks: Sequence[Task], prompts: Iterable[Prompt], seed: int
) -> dict[QuestionKey, TaskItem]:
    """Return question -> the item that grades its answers.

    A generated prompt has its generator's item; a prompt from a file has its own answer as
    reference and answer key.
    """
    generated_items = {
        question_key(i.prompt.conversation): i
        for part in parts
        if part.generate
        for s in tasks
        if s.name == part.skill
        for i in s.items(Split.TRAIN, part.generate, seed)
    }
    return {
        question_key(p.conversation): generated_items.get(question_key(p.conversation))
        or TaskItem(p, p.answer, answer_key=p.answer)
        for p in prompts
    }


def given_samples(
    prompts: Iterable[Prompt], are_answers_given: bool, max_texts: int = 64
) -> list[ConversationSample]:
    """Return the given answers and documents that the student learns, by skill and language.

    Args:
        prompts: The corpus.
        are_answers_given: Whether the prompts' own answers are learned.
        max_texts: Texts of one skill and language, at most; evenly spread over the corpus.
    """
    found: dict[tuple[str, str, bool], list[tuple[str, Conversation]]] = {}
    for p in prompts:
        is_document = p.conversation.is_document
        if is_document or are_answers_given:
            learned = p.conversation if is_document else p.conversation.with_answer(*p.given_parts)
            key = p.skill, p.language, is_document
            found.setdefault(key, []).append((p.id, learned))
    samples = []
    for (skill, language, _), texts in found.items():
        count = min(max_texts, len(texts))
        chosen = [texts[k * len(texts) // count] for k in range(count)]
        labels, conversations = zip(*chosen, strict=True)
        samples.append(ConversationSample(skill, language, conversations, labels))
    return samples


def texts_by_language(
    samples: Iterable[ConversationSample], renderers: Sequence[ChatRenderer]
) -> list[GivenTexts]:
    """Return the texts of samples, by skill and language, without those that a model cannot render.

    Args:
        samples: Given answers and documents.
        renderers: Chat renderers of all models.
    """
    found: dict[tuple[str, str], list[tuple[Conversation, str]]] = {}
    for sample in samples:
        for conversation, label in zip(sample.conversations, sample.labels, strict=True):
            if conversation.messages[-1].text and all(
                _can_render(renderer, conversation) for renderer in renderers
            ):
                texts = found.setdefault((sample.skill, sample.language), [])
                texts.append((conversation, label.partition("@")[0]))
    return [
        GivenTexts(skill, language, *map(tuple, zip(*texts, strict=True)))
        for (skill, language), texts in found.items()
    ]


def able_teachers(
    samples: Sequence[ConversationSample], renderers: Mapping[str, ChatRenderer]
) -> tuple[str, ...]:
    """Return the teachers that can render any of the samples: not all templates have tools."""
    return tuple(
        name
        for name, renderer in renderers.items()
        if any(_can_render(renderer, c) for sample in samples for c in sample.conversations)
    )


def grader_versions(benchmarks: Iterable[benchmark_tasks.LoadedBenchmark]) -> list[list[Any]]:
    """Return (name, version) of the graders that grade otherwise than their first version."""
    found = [one.benchmark for one in benchmarks if one.benchmark.grader_version > 1]
    return [["grader", one.name, one.grader_version] for one in found]


def _can_render(renderer: ChatRenderer, conversation: Conversation) -> bool:
    try:
        renderer.render(conversation)
    except DataError:
        return False
    return True


def make_check_samples(
    held_out: Iterable[tuple[Task, Sequence[TaskItem]]],
    texts: Mapping[str, str],
    max_lines: int,
    max_answers: int = 64,
    given: Iterable[ConversationSample] = (),
) -> tuple[ConversationSample, ...]:
    """Return the conversations that check tokenizes.

    They are what is taught: given answers and documents, the reference answers of the questions
    that teachers are asked, and the texts that the recipe names for the check.

    Args:
        held_out: Tasks whose prompts teachers answer, and their held-out items.
        texts: Language -> text file.
        max_lines: Lines of each text, at most.
        max_answers: Reference answers of one skill and language, at most. They are short and
            similar: more of them change no share by much.
        given: Given answers and documents.
    """
    return (
        *given,
        *reference_samples(held_out, max_answers),
        *(read_texts(language, file, max_lines) for language, file in texts.items()),
    )
