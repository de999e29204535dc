"""What a recipe asks with: skills by generators or published sets, prompts of the corpus, reference answers that check looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from persea import sets, skills
from persea.check import Sample, read_texts
from persea.corpus import Broken, Prompt, in_modes, read_prompts
from persea.errors import DataError
from persea.measure import Item, Skill, Split
from persea.sections import CorpusPart, PublishedSet
from persea.sets.reading import HUB, Source

SAMPLE = 64  # reference answers of one skill and language that check lays over each other; they are short and much alike


def published(refs: Iterable[PublishedSet]) -> tuple[sets.Opened, ...]:
    """A recipe's published sets, read. Raises DataError with file and line, EnvironmentLacks where one cannot be graded here."""
    def source(s: PublishedSet) -> Source:
        return Source(s.file or f"{HUB}{s.hub}", s.answers or "", s.language, s.config, s.split)

    return tuple(sets.open_set(sets.named(s.set), source(s), s.skill) for s in refs)


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


def samples(held_out: Iterable[tuple[Skill, Sequence[Item]]], texts: Mapping[str, str], lines: int) -> tuple[Sample, ...]:
    """What check lays over each other: every skill's reference answers, by language, and the recipe's texts."""
    found = []
    for skill, items in held_out:
        answered = [i for i in items if i.reference or i.calls]  # some published questions have no right answer to look at
        for language in dict.fromkeys(i.prompt.language for i in answered):
            some = [i for i in answered if i.prompt.language == language][:SAMPLE]
            found.append(Sample(skill.name, language, tuple(i.answered for i in some), tuple(i.prompt.id for i in some)))
    return (*found, *(read_texts(language, file, lines) for language, file in texts.items()))
