"""Cast: every teacher measured on every skill; who teaches what, with what share, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persea.chat import Effort
from persea.corpus import GOLDEN, in_turn
from persea.errors import Refused
from persea.measure import Item, Result, Score, Skill, grade, score
from persea.teacher import Teacher


@dataclass(frozen=True)
class Cast:
    """Who teaches what.

    parts   skill -> ((teacher, share), ...); shares sum to 1
    scores  the measurement behind it
    pinned  skills a person cast in the recipe, not the measurement
    """

    parts: Mapping[str, tuple[tuple[str, float], ...]]
    scores: tuple[Score, ...]
    pinned: tuple[str, ...] = ()

    def teacher_of(self, skill: str, number: int) -> str:
        """Who is asked the number-th prompt of a skill: shares hold in every stretch of prompts, without chance."""
        return in_turn(self.parts[skill], number, GOLDEN)

    def to_json(self) -> dict[str, Any]:
        return {"parts": {k: [list(p) for p in v] for k, v in self.parts.items()}, "pinned": list(self.pinned),
                "scores": [s.to_json() for s in self.scores]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Cast:
        return Cast({k: tuple((str(t), float(s)) for t, s in v) for k, v in value["parts"].items()},
                    tuple(Score(**(s | {"effort": Effort(s["effort"])})) for s in value["scores"]), tuple(value["pinned"]))


def ask(speaker: Teacher, skill: Skill, items: Sequence[Item], max_new_tokens: int) -> tuple[tuple[Result, ...], tuple[Score, ...]]:
    """One speaker on one skill: results, and scores over all and, where there are several, per language."""
    answers = speaker.answer([i.prompt for i in items], max_new_tokens)
    results = grade(skill, items, [(a.conversation.messages[-1], a.finish) for a in answers])
    languages = sorted({i.prompt.language for i in items})
    scores = [score(speaker.name, skill.name, results, speaker.effort)]
    if len(languages) > 1:
        scores += [score(speaker.name, skill.name, results, speaker.effort, language) for language in languages]
    return results, tuple(scores)


def cast(skills: Sequence[str], teachers: Sequence[str], scores: Sequence[Score], pinned: Mapping[str, str]) -> Cast:
    """The strongest teacher of each skill, or the one a person pinned. First come wins a tie.

    Raises Refused for a skill nobody answered once: copying the best of nothing teaches nothing.
    """
    parts = {}
    for skill in skills:
        if skill in pinned:
            parts[skill] = ((pinned[skill], 1.0),)
            continue
        ranked = sorted((s for s in scores if s.skill == skill and not s.language), key=lambda s: (-s.value, teachers.index(s.speaker)))
        if not ranked or ranked[0].value == 0:
            raise Refused(f"no teacher has a right answer on {skill} (n = {ranked[0].n if ranked else 0})", where="audition",
                          remedy=f"add a teacher who can, leave {skill} out of the corpus, or pin one with audition.pinned.{skill}")
        parts[skill] = ((ranked[0].speaker, 1.0),)
    return Cast(parts, tuple(scores), tuple(s for s in skills if s in pinned))
