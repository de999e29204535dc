"""What a recipe asks with: skills by generators or published sets, prompts of the corpus, reference answers that check looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from persea.cache.answer_filter import QuestionKey, question_key
from persea.chat.messages import Conversation, ThinkingEffort
from persea.config.schema import BenchmarkSection, CorpusSection, TeacherSection
from persea.data.formats import read_prompts
from persea.data.prompts import MalformedLine, Prompt, assign_efforts
from persea.errors import DataError, TeacherError
from persea.evaluation.compatibility import ConversationSample, read_texts
from persea.tasks import benchmarks as sets
from persea.tasks import generated as skills
from persea.tasks.benchmarks.benchmark import Benchmark, BenchmarkSource, GradingOptions
from persea.tasks.benchmarks.readers import HUB_PREFIX
from persea.tasks.task import Split, Task, TaskItem
from persea.teachers.teacher import Teacher as Speaking

JUDGE_MAX_NEW_TOKENS = 16  # tokens of a judge's one word
MAX_SAMPLE_ANSWERS = 64  # reference answers of one skill and language that check lays over each other; they are short and much alike


@dataclass(frozen=True)
class SafetyJudge:
    """A yardstick that tells what an answer to a delicate question does. teachers: name -> family of those who teach."""

    family: str
    teacher_families: Mapping[str, str]
    ask: Callable[[str], str]


def make_safety_judge(
    name: str,
    teachers: Sequence[TeacherSection],
    family_of: Callable[[str], str],
    load_teacher: Callable[[str], Speaking],
) -> SafetyJudge | None:
    """The judge of that name among a recipe's teachers; None for none. family: of a teacher by name. It is loaded when first asked."""
    if not name:
        return None
    families = {t.name: t.family or family_of(t.name) for t in teachers}
    speaking = cache(partial(load_teacher, name))

    def ask(question: str) -> str:
        (said,) = replace(speaking(), effort=ThinkingEffort.NONE).answer(
            [Prompt("judge", Conversation.from_question(question), "judge", "en")],
            JUDGE_MAX_NEW_TOKENS,
        )
        if said.failure_reason:  # a server's failure is no judgement
            raise TeacherError(
                said.failure_reason,
                where=name,
                remedy="look at the server, then run again: what was heard is kept",
            )
        return said.text

    return SafetyJudge(
        families[name], {t.name: families[t.name] for t in teachers if not t.reference}, ask
    )


def load_benchmarks(
    refs: Iterable[BenchmarkSection],
    judge: SafetyJudge | None = None,
    options: GradingOptions | None = None,
) -> tuple[sets.LoadedBenchmark, ...]:
    """A recipe's published sets, read; those about safety graded by a judge, where there is one.

    Raises DataError with file and line, EnvironmentLacks where one cannot be graded here, Refused for a judge of a teacher's family.
    """

    def named(name: str) -> Benchmark:
        one = sets.find_benchmark(name)
        return (
            sets.safety.with_judge(one, judge.ask, judge.family, judge.teacher_families)
            if judge and one in sets.safety.BENCHMARKS
            else one
        )

    def source(s: BenchmarkSection) -> BenchmarkSource:
        return BenchmarkSource(
            s.file or f"{HUB_PREFIX}{s.hub}", s.answers or "", s.language, s.config, s.split
        )

    return tuple(sets.load_benchmark(named(s.benchmark), source(s), s.skill, options) for s in refs)


def measured_tasks(
    skill_names: Sequence[str], benchmarks: Sequence[sets.LoadedBenchmark]
) -> tuple[Task, ...]:
    """The corpus' skills, in its order, each by published sets where there are some for it; then what else those measure."""
    by_sets = {s.name: s for s in sets.benchmark_tasks(benchmarks)}
    return (
        *(
            by_sets.pop(name) if name in by_sets else skills.find_generated_task(name)
            for name in skill_names
        ),
        *by_sets.values(),
    )


def load_part_prompts(
    part: CorpusSection,
    where: str,
    tasks: Sequence[Task],
    skill_names: Sequence[str],
    seed: int,
    on_malformed: Callable[[MalformedLine], None],
) -> list[Prompt]:
    """The prompts of one part of the corpus. Raises DataError for one of a skill that no part names, or more than there are."""
    if part.file is not None:
        read = list(
            read_prompts(
                Path(part.file),
                part.skill,
                part.language,
                on_malformed if part.on_malformed == "quarantine" else None,
                part.max_line_bytes,
            )
        )
        for prompt in read:
            if prompt.skill not in skill_names:
                raise DataError(
                    f"prompt {prompt.id} is of skill {prompt.skill!r}, which the corpus does not name",
                    where=part.file,
                    remedy=f"one of {', '.join(skill_names)}; or add a part of that skill",
                )
        return assign_efforts(read, part.effort_shares)
    items = next(s for s in tasks if s.name == part.skill).items(
        Split.TRAIN, part.generate or 0, seed
    )
    if len(items) < (part.generate or 0):
        raise DataError(
            f"{part.skill} has only {len(items):,} questions to teach with",
            where=where,
            remedy=f"ask for at most {len(items):,}",
        )
    return assign_efforts(
        (replace(i.prompt, answer=i.reference) for i in items), part.effort_shares
    )


def items_by_question(
    parts: Iterable[CorpusSection], tasks: Sequence[Task], prompts: Iterable[Prompt], seed: int
) -> dict[QuestionKey, TaskItem]:
    """Question -> what a prompt's answers are graded by: a generator's own item, or a file's answer as reference and key."""
    made = {
        question_key(i.prompt.conversation): i
        for part in parts
        if part.generate
        for s in tasks
        if s.name == part.skill
        for i in s.items(Split.TRAIN, part.generate, seed)
    }
    return {
        question_key(p.conversation): made.get(question_key(p.conversation))
        or TaskItem(p, p.answer, answer_key=p.answer)
        for p in prompts
    }


def make_check_samples(
    held_out: Iterable[tuple[Task, Sequence[TaskItem]]], texts: Mapping[str, str], max_lines: int
) -> tuple[ConversationSample, ...]:
    """What check lays over each other: every skill's reference answers, by language, and the recipe's texts."""
    found = []
    for skill, items in held_out:
        answered = [
            i for i in items if i.reference or i.calls
        ]  # some published questions have no right answer to look at
        for language in dict.fromkeys(i.prompt.language for i in answered):
            some = [i for i in answered if i.prompt.language == language][:MAX_SAMPLE_ANSWERS]
            found.append(
                ConversationSample(
                    skill.name,
                    language,
                    tuple(i.reference_conversation for i in some),
                    tuple(i.prompt.id for i in some),
                )
            )
    return (*found, *(read_texts(language, file, max_lines) for language, file in texts.items()))
