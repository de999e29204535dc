"""What a recipe asks with: skills by generators or published sets, prompts of the corpus, reference answers that check looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from persea.cache.answer_filter import Question, question
from persea.chat.messages import Conversation, Effort
from persea.config.schema import CorpusPart, PublishedSet, Teacher
from persea.data.prompts import Broken, Prompt, in_modes, read_prompts
from persea.errors import DataError, TeacherError
from persea.evaluation.compatibility import Sample, read_texts
from persea.tasks import benchmarks as sets
from persea.tasks import generated as skills
from persea.tasks.benchmarks.readers import HUB, Published, Source
from persea.tasks.task import Item, Skill, Split
from persea.teachers.teacher import Teacher as Speaking

WORD = 16  # tokens of a judge's one word
SAMPLE = 64  # reference answers of one skill and language that check lays over each other; they are short and much alike


@dataclass(frozen=True)
class Judge:
    """A yardstick that tells what an answer to a delicate question does. teachers: name -> family of those who teach."""

    family: str
    teachers: Mapping[str, str]
    ask: Callable[[str], str]


def judge(name: str, teachers: Sequence[Teacher], family: Callable[[str], str], load: Callable[[str], Speaking]) -> Judge | None:
    """The judge of that name among a recipe's teachers; None for none. family: of a teacher by name. It is loaded when first asked."""
    if not name:
        return None
    families = {t.name: t.family or family(t.name) for t in teachers}
    speaking = cache(partial(load, name))

    def ask(question: str) -> str:
        (said,) = replace(speaking(), effort=Effort.NONE).answer([Prompt("judge", Conversation.ask(question), "judge", "en")], WORD)
        if said.why:  # a server's failure is no judgement
            raise TeacherError(said.why, where=name, remedy="look at the server, then run again: what was heard is kept")
        return said.text

    return Judge(families[name], {t.name: families[t.name] for t in teachers if not t.yardstick}, ask)


def published(refs: Iterable[PublishedSet], by: Judge | None = None) -> tuple[sets.Opened, ...]:
    """A recipe's published sets, read; those about safety graded by a judge, where there is one.

    Raises DataError with file and line, EnvironmentLacks where one cannot be graded here, Refused for a judge of a teacher's family.
    """
    def named(name: str) -> Published:
        one = sets.named(name)
        return sets.safety.judged(one, by.ask, by.family, by.teachers) if by and one in sets.safety.SETS else one

    def source(s: PublishedSet) -> Source:
        return Source(s.file or f"{HUB}{s.hub}", s.answers or "", s.language, s.config, s.split)

    return tuple(sets.open_set(named(s.set), source(s), s.skill) for s in refs)


def measured(taught: Sequence[str], opened: Sequence[sets.Opened]) -> tuple[Skill, ...]:
    """The corpus' skills, in its order, each by published sets where there are some for it; then what else those measure."""
    by_sets = {s.name: s for s in sets.skills(opened)}
    return (*(by_sets.pop(name) if name in by_sets else skills.named(name) for name in taught), *by_sets.values())


def prompts(part: CorpusPart, where: str, known: Sequence[Skill], taught: Sequence[str], seed: int, broken: Callable[[Broken], None]) -> list[Prompt]:
    """The prompts of one part of the corpus. Raises DataError for one of a skill that no part names, or more than there are."""
    if part.file is not None:
        read = list(read_prompts(Path(part.file), part.skill, part.language, broken if part.broken == "quarantine" else None))
        for prompt in read:
            if prompt.skill not in taught:
                raise DataError(f"prompt {prompt.id} is of skill {prompt.skill!r}, which the corpus does not name", where=part.file,
                                remedy=f"one of {', '.join(taught)}; or add a part of that skill")
        return in_modes(read, part.modes)
    items = next(s for s in known if s.name == part.skill).items(Split.TEACH, part.generate or 0, seed)
    if len(items) < (part.generate or 0):
        raise DataError(f"{part.skill} has only {len(items):,} questions to teach with", where=where, remedy=f"ask for at most {len(items):,}")
    return in_modes((replace(i.prompt, answer=i.reference) for i in items), part.modes)


def known(parts: Iterable[CorpusPart], skills: Sequence[Skill], prompts: Iterable[Prompt], seed: int) -> dict[Question, Item]:
    """Question -> what a prompt's answers are graded by: a generator's own item, or a file's answer as reference and key."""
    made = {question(i.prompt.conversation): i for part in parts if part.generate for s in skills if s.name == part.skill
            for i in s.items(Split.TEACH, part.generate, seed)}
    return {question(p.conversation): made.get(question(p.conversation)) or Item(p, p.answer, key=p.answer) for p in prompts}


def samples(held_out: Iterable[tuple[Skill, Sequence[Item]]], texts: Mapping[str, str], lines: int) -> tuple[Sample, ...]:
    """What check lays over each other: every skill's reference answers, by language, and the recipe's texts."""
    found = []
    for skill, items in held_out:
        answered = [i for i in items if i.reference or i.calls]  # some published questions have no right answer to look at
        for language in dict.fromkeys(i.prompt.language for i in answered):
            some = [i for i in answered if i.prompt.language == language][:SAMPLE]
            found.append(Sample(skill.name, language, tuple(i.answered for i in some), tuple(i.prompt.id for i in some)))
    return (*found, *(read_texts(language, file, lines) for language, file in texts.items()))
