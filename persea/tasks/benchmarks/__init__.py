"""Published question sets for real models: read in place, in the form they were published in, each with a grader.

A set is named in a recipe under `evaluation.sets`; sets of one `skill` are measured together. A new set = one entry in the SETS of a
file here, one row in docs/sets.md, one test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persea.chat.messages import Message
from persea.config.schema import CorpusPart, PublishedSet
from persea.config.yaml_source import choose
from persea.errors import DataError, RecipeError
from persea.tasks.benchmarks import code, instructions, languages, reasoning, safety, tools
from persea.tasks.benchmarks.readers import Published, Source, require, split
from persea.tasks.generated import SKILLS
from persea.tasks.sandbox.sandbox import open_sandbox
from persea.tasks.task import Grade, Item, Skill, Split

SETS = (*languages.SETS, *reasoning.SETS, *code.SETS, *safety.SETS, *tools.SETS, *instructions.SETS)


@dataclass(frozen=True)
class Opened:
    """A set with its questions read. left_out: reason -> how many of its rows nobody can grade."""

    published: Published
    source: Source
    skill: str
    items: tuple[Item, ...]
    left_out: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"set": self.published.name, "skill": self.skill, "language": self.source.language or self.published.language,
                "questions": len(self.items), "left_out": dict(self.left_out)}


def named(name: str) -> Published:
    """The set of that name, or an error that lists the known ones."""
    for one in SETS:
        if one.name == name:
            return one
    raise DataError(f"unknown set {name!r}", where="evaluation.sets", remedy=f"known sets: {', '.join(s.name for s in SETS)}")


def refuse_unknown(refs: Sequence[PublishedSet], corpus: Sequence[CorpusPart], where: str) -> None:
    """Raises RecipeError, a line for each set, or else for each skill of the corpus, that nobody knows. Opens no file."""
    sets = {s.name: s for s in SETS}
    wrong = [(f"evaluation.sets.{k}.set", f"unknown set {r.set!r}", choose(r.set, list(sets))) for k, r in enumerate(refs) if r.set not in sets]
    if not wrong:
        skills = [*(s.name for s in SKILLS), *(r.skill or sets[r.set].skill or r.set for r in refs)]
        wrong = [(f"corpus.{k}.skill", f"unknown skill {part.skill!r}", choose(part.skill, skills))
                 for k, part in enumerate(corpus) if part.skill not in skills]
    told = [RecipeError(what, where=f"{where}: {key}", remedy=remedy) for key, what, remedy in wrong]
    if told:
        raise told[0] if len(told) == 1 else RecipeError("\n".join(map(str, told)))


def open_set(published: Published, source: Source, skill: str = "") -> Opened:
    """Read a set and make sure that it can be graded here.

    Raises DataError with file and line for what is broken, EnvironmentLacks (exit 7) where an extra or a sandbox is missing.
    """
    for module in published.needs:
        require(module, "eval", f"the set {published.name}")
    if published.runs:
        open_sandbox()
    if not published.language and not source.language:
        raise DataError(f"the set {published.name} does not say its language", where=source.file, remedy="add `language:`, such as vi")
    asked = published.items(source)
    return Opened(published, source, skill or published.skill or published.name, asked.items, asked.left_out)


def skills(opened: Sequence[Opened]) -> tuple[Skill, ...]:
    """One skill for each name, of all sets of that name."""
    return tuple(_skill(name, [o for o in opened if o.skill == name]) for name in dict.fromkeys(o.skill for o in opened))


def _skill(name: str, opened: Sequence[Opened]) -> Skill:
    graders = {o.published.name: o.published for o in opened}
    items = [i for o in opened for i in o.items]
    ids = [i.prompt.id for i in items]
    if len(set(ids)) < len(ids):
        raise DataError(f"two sets of {name} hold the same questions", where=", ".join(o.source.file for o in opened), remedy="name each file once")

    def grade(item: Item, said: Message) -> Grade:
        # a prompt of the corpus that teaches this skill is graded as the skill's first set grades
        return graders.get(item.prompt.id.partition("/")[0], opened[0].published).graded(item, said)

    def some(which: Split, n: int, seed: int) -> tuple[Item, ...]:
        return split(items, which, n, seed)

    return Skill(name, tuple(dict.fromkeys(i.prompt.language for i in items)), some, grade)
