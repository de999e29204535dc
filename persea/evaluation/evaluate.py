"""The student beside every teacher, its own base and any yardstick: on every skill, in every language, at every effort, on the same items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from persea import storage as store
from persea.chat.messages import Effort
from persea.errors import Regressed
from persea.evaluation.answering import Speaker, bits, hear
from persea.tasks.intervals import CONFIDENCE
from persea.tasks.task import Item, Paired, Result, Score, Skill, paired, score

SAFETY = "safety"  # skills whose names begin with it: a student that loses on one ends the run (exit 4)
Voice: TypeAlias = tuple[str, Effort, str]  # speaker, effort, skill


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    teachers, yardsticks  who taught, and who is only beside
    effort                the student's own
    scores                of every speaker, skill and effort: over all and per language
    bits_per_byte         speaker -> skill (and "all", of who can say every one) -> bits, on held-out reference answers
    compared              the student beside each other speaker, at each of its efforts, on the same items
    regressions           where it is below its own base with confidence
    """

    student: str
    base: str
    teachers: tuple[str, ...]
    effort: Effort
    scores: tuple[Score, ...]
    bits_per_byte: Mapping[str, Mapping[str, float]]
    yardsticks: tuple[str, ...] = ()
    compared: tuple[Paired, ...] = ()
    regressions: tuple[Paired, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"student": self.student, "base": self.base, "teachers": list(self.teachers), "yardsticks": list(self.yardsticks),
                "effort": self.effort, "scores": [s.to_json() for s in self.scores],
                "bits_per_byte": {k: dict(v) for k, v in self.bits_per_byte.items()}, "compared": [p.to_json() for p in self.compared],
                "regressions": [p.to_json() for p in self.regressions]}


@dataclass
class Heard:
    """What was heard of everybody, in the order measured: (speaker, effort, skill) -> results."""

    results: dict[Voice, tuple[Result, ...]] = field(default_factory=dict)
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    asked: int = 0
    reused: int = 0

    def of(self, name: str, effort: Effort, skill: str) -> tuple[Result, ...]:
        """A speaker's results at an effort; at its own, the first measured, where it has no such."""
        return self.results.get((name, effort, skill)) or next(r for (n, _, s), r in self.results.items() if (n, s) == (name, skill))

    def scores(self) -> Iterator[Score]:
        """Each over all and, where a skill is asked in several languages, per language."""
        for (name, effort, skill), results in self.results.items():
            for language in ("", *languages(results)):
                yield score(name, skill, results, effort, language)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every answer, one JSON line each."""
        for (name, effort, skill), results in self.results.items():
            yield from ({"speaker": name, "skill": skill, "effort": effort} | r.to_json() for r in results)


def languages(results: Sequence[Result]) -> tuple[str, ...]:
    """The languages of a skill's items, where there are several."""
    found = sorted({r.item.prompt.language for r in results})
    return tuple(found) if len(found) > 1 else ()


def listen(heard: Heard, speaker: Speaker, skills: Sequence[tuple[Skill, Sequence[Item]]], max_new_tokens: int,
           done: Callable[[float, str], None] = lambda share, words: None) -> None:
    """One speaker on every skill's items, at each of its efforts: answers, and bits per byte."""
    spent: list[tuple[float, int]] = []
    heard.bits_per_byte[speaker.name] = {}
    for k, (skill, items) in enumerate(skills):
        for effort in speaker.efforts:
            results, reused = hear(speaker, effort, skill, items, max_new_tokens)
            heard.results[speaker.name, effort, skill.name] = results
            heard.asked, heard.reused = heard.asked + len(results), heard.reused + reused
        spent.append(bits(speaker, items))
        if spent[-1][1]:
            heard.bits_per_byte[speaker.name][skill.name] = spent[-1][0] / spent[-1][1]
        told = score(speaker.name, skill.name, results, effort).value
        done((k + 1) / len(skills), f"{speaker.name} {skill.name} {told:.2f}{', as kept' * (reused == len(results))}")
    size = sum(n for _, n in spent)
    whole = sum(len(p.text.encode()) for _, items in skills for i in items if i.reference or i.calls for p in i.answered.messages[-1].parts)
    if 0 < size == whole:  # who cannot say all of it spends its bits on other texts than the others, and does not compare
        heard.bits_per_byte[speaker.name]["all"] = sum(b for b, _ in spent) / size


def beside(heard: Heard, student: str) -> tuple[Paired, ...]:
    """The student beside every other speaker, skill by skill, over all and per language, at each of the student's efforts.

    The other answers at the same effort, or at its own where it was not measured at that.
    """
    found: list[Paired] = []
    for (_, effort, skill), mine in ((k, r) for k, r in heard.results.items() if k[0] == student):
        for other in dict.fromkeys(name for name, _, s in heard.results if name != student and s == skill):
            its = heard.of(other, effort, skill)
            found += [paired((student, other), skill, mine, its, effort, language) for language in ("", *languages(mine))]
    return tuple(found)


def regressions(heard: Heard, student: str, base: str) -> tuple[Paired, ...]:
    """Where the student is below its own base with confidence: a skill as a whole at 95 %, each of its L languages at 1 - 0.05 / L.

    So that a student no worse than its base is called worse in 2.5 % of skills at most, and in 2.5 % for all languages of one together.
    """
    found = []
    for (_, effort, skill), mine in ((k, r) for k, r in heard.results.items() if k[0] == student):
        its, several = heard.of(base, effort, skill), languages(mine)
        for language in ("", *several):
            confidence = 1 - (1 - CONFIDENCE) / len(several) if language else CONFIDENCE
            pair = paired((student, base), skill, mine, its, effort, language, confidence)
            if pair.high < 0:
                found.append(pair)
    return tuple(found)


def refuse_regressed(written: Path) -> None:
    """`refuse_regressions` of an evaluation.json."""
    refuse_regressions([Paired(**p) for p in store.read_json(written)["regressions"]], str(written))


def refuse_regressions(found: Sequence[Paired], where: str) -> None:
    """Raises Regressed where the student is less safe than its base."""
    lost = [p for p in found if p.skill.startswith(SAFETY)]
    if lost:
        told = "; ".join(f"{p.skill}{f' in {p.language}' if p.language else ''} {p.difference:+.2f} ({p.low:+.2f} to {p.high:+.2f}, n {p.n})"
                         for p in lost)
        raise Regressed(f"the student is less safe than its base: {told}", where=where,
                        remedy="look at evaluate/examples.jsonl; teach safety too, or write evaluation.allow_regression: true")
