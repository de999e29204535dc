"""Two runs beside each other: their students on the items that both were asked, and what differs in their recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from persea.chat.messages import ThinkingEffort
from persea.config.renamed_keys import rename_in_plain_data
from persea.errors import DataError
from persea.report.run_files import GradedAnswer, read_graded_answers
from persea.tasks.intervals import paired_difference_interval, unpaired_difference_interval

RUN_COMPARISON_COLUMNS = ("skill", "language", "A", "B", "B - A", "95 %", "n", "B is")
ABSENT = "(not there)"


@dataclass(frozen=True)
class SkillDifference:
    """One skill, language ("" = all) and effort: both students' scores, and B - A with its 95 % interval.

    pairs  items that both were asked; 0 = none, and the interval is of two means over items of their own
    """

    skill: str
    language: str
    effort: ThinkingEffort
    a: float
    b: float
    a_n: int
    b_n: int
    num_pairs: int
    difference: float
    low: float
    high: float

    @property
    def outcome(self) -> str:
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not told apart"


@dataclass(frozen=True)
class RunComparison:
    """a, b: the folders; recipes: key -> its values in A and B, where they differ; alone: what only one was asked."""

    a: str
    b: str
    differences: tuple[SkillDifference, ...]
    recipe_differences: Mapping[str, tuple[Any, Any]]
    bits_per_byte: Mapping[str, tuple[float | None, float | None]]
    asked_in_one: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "places": [asdict(p) | {"b_is": p.outcome} for p in self.differences],
            "recipes": {k: list(v) for k, v in self.recipe_differences.items()},
            "bits_per_byte": {k: list(v) for k, v in self.bits_per_byte.items()},
            "alone": dict(self.asked_in_one),
        }

    def table_rows(self) -> list[tuple[str, ...]]:
        """What a person sees, a line a place, and bits per byte last."""
        several = len({p.effort for p in self.differences}) > 1
        told = [
            (
                p.skill,
                " ".join(filter(None, (p.language or "all", f"at {p.effort}" if several else ""))),
                f"{p.a:.3f}",
                f"{p.b:.3f}",
                f"{p.difference:+.3f}",
                f"{p.low:+.2f} to {p.high:+.2f}",
                str(p.num_pairs) if p.num_pairs else f"{p.a_n}, {p.b_n}",
                p.outcome,
            )
            for p in self.differences
        ]
        bits = [
            ("bits/byte", skill, *("-" if x is None else f"{x:.3f}" for x in both), "", "", "", "")
            for skill, both in self.bits_per_byte.items()
        ]
        return [*told, *bits]

    def note(self) -> str:
        """What the table cannot say."""
        apart = sorted({p.skill for p in self.differences if not p.num_pairs})
        part = sorted(
            {p.skill for p in self.differences if p.num_pairs and p.num_pairs < max(p.a_n, p.b_n)}
        )
        said = [f"paired on the items both were asked; A = {self.a}, B = {self.b}"]
        said += (
            [f"no item in common on {', '.join(apart)}: two means beside each other"]
            if apart
            else []
        )
        said += (
            [f"only some items in common on {', '.join(part)}: the difference is of those"]
            if part
            else []
        )
        said += [f"{skill}: only {which} was asked" for skill, which in self.asked_in_one.items()]
        return "; ".join(said) + ("" if self.recipe_differences else "; the recipes are the same")


def compare_runs(run_a: Path, run_b: Path) -> RunComparison:
    """Lay the students of two run folders beside each other. Raises DataError where one holds no evaluation that can be read."""
    (one, its), (other, others) = read_graded_answers(run_a), read_graded_answers(run_b)
    mine, yours = (
        [s for s in said if s.model_name == e.student] for e, said in ((one, its), (other, others))
    )
    for folder, said in ((run_a, mine), (run_b, yours)):
        if not said:
            raise DataError(
                "holds no answer of its student",
                where=str(folder / "evaluate" / "examples.jsonl"),
                remedy="evaluate again",
            )
    skills = list(dict.fromkeys(s.skill for s in (*mine, *yours)))
    bits = [e.bits_per_byte.get(e.student, {}) for e in (one, other)]
    return RunComparison(
        str(run_a),
        str(run_b),
        tuple(place for skill in skills for place in _skill_differences(skill, mine, yours)),
        _recipe_differences(_flat_recipe(run_a), _flat_recipe(run_b)),
        {
            skill: (bits[0].get(skill), bits[1].get(skill))
            for skill in dict.fromkeys((*bits[0], *bits[1]))
        },
        {
            what: which
            for which, here, there in (("A", mine, yours), ("B", yours, mine))
            for what in _only_in_first(here, there)
        },
    )


def _only_in_first(first: Sequence[GradedAnswer], second: Sequence[GradedAnswer]) -> Iterator[str]:
    """Skills that only the first of two was asked; of the others the efforts and languages that it alone was asked in."""
    skills, efforts, languages = (
        {s.skill for s in second},
        {(s.skill, s.effort) for s in second},
        {(s.skill, s.language) for s in second},
    )
    for s in first:
        if s.skill not in skills:
            yield s.skill
        else:
            yield from [f"{s.skill} at {s.effort}"] if (s.skill, s.effort) not in efforts else []
            yield from (
                [f"{s.skill} in {s.language}"] if (s.skill, s.language) not in languages else []
            )


def _skill_differences(
    skill: str, answers_a: Sequence[GradedAnswer], answers_b: Sequence[GradedAnswer]
) -> Iterator[SkillDifference]:
    for effort in ThinkingEffort:
        a, b = (
            [s for s in said if (s.skill, s.effort) == (skill, effort)]
            for said in (answers_a, answers_b)
        )
        languages = sorted({s.language for s in (*a, *b)})
        for language in ("", *(languages if len(languages) > 1 else ())):
            x, y = ([s for s in said if not language or s.language == language] for said in (a, b))
            if x and y:
                yield _skill_difference(skill, language, effort, x, y)


def _skill_difference(
    skill: str,
    language: str,
    effort: ThinkingEffort,
    answers_a: Sequence[GradedAnswer],
    answers_b: Sequence[GradedAnswer],
) -> SkillDifference:
    there = {(s.id, s.question, s.reference): s.value for s in answers_b}
    pairs = [
        (s.value, there[s.id, s.question, s.reference])
        for s in answers_a
        if (s.id, s.question, s.reference) in there
    ]
    x, y = [s.value for s in answers_a], [s.value for s in answers_b]
    told = sum(x) / len(x), sum(y) / len(y), len(x), len(y), len(pairs)
    if not pairs:
        return SkillDifference(
            skill, language, effort, *told, told[1] - told[0], *unpaired_difference_interval(y, x)
        )
    ones, others = [p for p, _ in pairs], [q for _, q in pairs]
    return SkillDifference(
        skill,
        language,
        effort,
        *told,
        (sum(others) - sum(ones)) / len(pairs),
        *paired_difference_interval(others, ones),
    )


def _flat_recipe(run_folder: Path) -> dict[str, Any]:
    """The run's recipe as plain keys: teachers.0.model and so on."""
    path = run_folder / "recipe.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return dict(_flatten(rename_in_plain_data(data), ""))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"cannot be read: {error}".splitlines()[0],
            where=str(path),
            remedy="give the folder of a run",
        ) from error


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    if not inner:
        yield path, value
    for key, below in inner:
        yield from _flatten(below, f"{path}.{key}" if path else str(key))


def _recipe_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        key: (a.get(key, ABSENT), b.get(key, ABSENT))
        for key in dict.fromkeys((*a, *b))
        if a.get(key, ABSENT) != b.get(key, ABSENT)
    }
