"""Two runs beside each other: their students on the items that both were asked, and what differs in their recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from persea.chat.messages import Effort
from persea.errors import DataError
from persea.report.run_files import Said, read_answers
from persea.tasks.intervals import of_difference, of_gap

COLUMNS = ("skill", "language", "A", "B", "B - A", "95 %", "n", "B is")
ABSENT = "(not there)"


@dataclass(frozen=True)
class Place:
    """One skill, language ("" = all) and effort: both students' scores, and B - A with its 95 % interval.

    pairs  items that both were asked; 0 = none, and the interval is of two means over items of their own
    """

    skill: str
    language: str
    effort: Effort
    a: float
    b: float
    a_n: int
    b_n: int
    pairs: int
    difference: float
    low: float
    high: float

    @property
    def words(self) -> str:
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not told apart"


@dataclass(frozen=True)
class Comparison:
    """a, b: the folders; recipes: key -> its values in A and B, where they differ; alone: what only one was asked."""

    a: str
    b: str
    places: tuple[Place, ...]
    recipes: Mapping[str, tuple[Any, Any]]
    bits_per_byte: Mapping[str, tuple[float | None, float | None]]
    alone: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"a": self.a, "b": self.b, "places": [asdict(p) | {"b_is": p.words} for p in self.places],
                "recipes": {k: list(v) for k, v in self.recipes.items()}, "bits_per_byte": {k: list(v) for k, v in self.bits_per_byte.items()},
                "alone": dict(self.alone)}

    def rows(self) -> list[tuple[str, ...]]:
        """What a person sees, a line a place, and bits per byte last."""
        several = len({p.effort for p in self.places}) > 1
        told = [(p.skill, " ".join(filter(None, (p.language or "all", f"at {p.effort}" if several else ""))), f"{p.a:.3f}", f"{p.b:.3f}",
                 f"{p.difference:+.3f}", f"{p.low:+.2f} to {p.high:+.2f}", str(p.pairs) if p.pairs else f"{p.a_n}, {p.b_n}", p.words)
                for p in self.places]
        bits = [("bits/byte", skill, *("-" if x is None else f"{x:.3f}" for x in both), "", "", "", "")
                for skill, both in self.bits_per_byte.items()]
        return [*told, *bits]

    def note(self) -> str:
        """What the table cannot say."""
        apart = sorted({p.skill for p in self.places if not p.pairs})
        part = sorted({p.skill for p in self.places if p.pairs and p.pairs < max(p.a_n, p.b_n)})
        said = [f"paired on the items both were asked; A = {self.a}, B = {self.b}"]
        said += [f"no item in common on {', '.join(apart)}: two means beside each other"] if apart else []
        said += [f"only some items in common on {', '.join(part)}: the difference is of those"] if part else []
        said += [f"{skill}: only {which} was asked" for skill, which in self.alone.items()]
        return "; ".join(said) + ("" if self.recipes else "; the recipes are the same")


def compare(a: Path, b: Path) -> Comparison:
    """Lay the students of two run folders beside each other. Raises DataError where one holds no evaluation that can be read."""
    (one, its), (other, others) = read_answers(a), read_answers(b)
    mine, yours = ([s for s in said if s.speaker == e.student] for e, said in ((one, its), (other, others)))
    for folder, said in ((a, mine), (b, yours)):
        if not said:
            raise DataError("holds no answer of its student", where=str(folder / "evaluate" / "examples.jsonl"), remedy="evaluate again")
    skills = list(dict.fromkeys(s.skill for s in (*mine, *yours)))
    bits = [e.bits_per_byte.get(e.student, {}) for e in (one, other)]
    return Comparison(
        str(a), str(b), tuple(place for skill in skills for place in _places(skill, mine, yours)), _differences(_recipe(a), _recipe(b)),
        {skill: (bits[0].get(skill), bits[1].get(skill)) for skill in dict.fromkeys((*bits[0], *bits[1]))},
        {what: which for which, here, there in (("A", mine, yours), ("B", yours, mine)) for what in _alone(here, there)})


def _alone(here: Sequence[Said], there: Sequence[Said]) -> Iterator[str]:
    """Skills that only the first of two was asked; of the others the efforts and languages that it alone was asked in."""
    skills, efforts, languages = {s.skill for s in there}, {(s.skill, s.effort) for s in there}, {(s.skill, s.language) for s in there}
    for s in here:
        if s.skill not in skills:
            yield s.skill
        else:
            yield from [f"{s.skill} at {s.effort}"] if (s.skill, s.effort) not in efforts else []
            yield from [f"{s.skill} in {s.language}"] if (s.skill, s.language) not in languages else []


def _places(skill: str, mine: Sequence[Said], yours: Sequence[Said]) -> Iterator[Place]:
    for effort in Effort:
        a, b = ([s for s in said if (s.skill, s.effort) == (skill, effort)] for said in (mine, yours))
        languages = sorted({s.language for s in (*a, *b)})
        for language in ("", *(languages if len(languages) > 1 else ())):
            x, y = ([s for s in said if not language or s.language == language] for said in (a, b))
            if x and y:
                yield _place(skill, language, effort, x, y)


def _place(skill: str, language: str, effort: Effort, a: Sequence[Said], b: Sequence[Said]) -> Place:
    there = {(s.id, s.question, s.reference): s.value for s in b}
    pairs = [(s.value, there[s.id, s.question, s.reference]) for s in a if (s.id, s.question, s.reference) in there]
    x, y = [s.value for s in a], [s.value for s in b]
    told = sum(x) / len(x), sum(y) / len(y), len(x), len(y), len(pairs)
    if not pairs:
        return Place(skill, language, effort, *told, told[1] - told[0], *of_gap(y, x))
    ones, others = [p for p, _ in pairs], [q for _, q in pairs]
    return Place(skill, language, effort, *told, (sum(others) - sum(ones)) / len(pairs), *of_difference(others, ones))


def _recipe(run: Path) -> dict[str, Any]:
    """The run's recipe as plain keys: teachers.0.model and so on."""
    path = run / "recipe.yaml"
    try:
        return dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8")), ""))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"cannot be read: {error}".splitlines()[0], where=str(path), remedy="give the folder of a run") from error


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner:
        yield path, value
    for key, below in inner:
        yield from _flat(below, f"{path}.{key}" if path else str(key))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in dict.fromkeys((*a, *b)) if a.get(key, ABSENT) != b.get(key, ABSENT)}
