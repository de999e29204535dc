"""Compare two runs: their students on common items, and the differences of their recipes."""

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
ABSENT = "(absent)"


@dataclass(frozen=True)
class SkillDifference:
    """Scores of both students on one skill, language and effort, and B - A with its 95 % interval.

    Attributes:
        skill: Name of the skill.
        language: Language of the items; "" = all.
        effort: Thinking effort of the answers.
        a: Score of A's student.
        b: Score of B's student.
        a_n: Items of A.
        b_n: Items of B.
        num_pairs: Common items; 0 = none, and the interval is of two means over different items.
        difference: B - A on the common items, or of the two means if there are none.
        low: Lower end of the interval of the difference.
        high: Upper end of the interval of the difference.
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
        """B compared with A: better, worse, or not distinguishable."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not distinguishable"


@dataclass(frozen=True)
class RunComparison:
    """Comparison of two runs.

    Attributes:
        a: Folder of run A.
        b: Folder of run B.
        differences: One entry for each skill, language and effort that both measured.
        recipe_differences: Recipe key -> its values in A and B, if they differ.
        bits_per_byte: Skill -> bits per byte of both students.
        asked_in_one: Skill, effort or language that only one run measured -> "A" or "B".
    """

    a: str
    b: str
    differences: tuple[SkillDifference, ...]
    recipe_differences: Mapping[str, tuple[Any, Any]]
    bits_per_byte: Mapping[str, tuple[float | None, float | None]]
    asked_in_one: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "differences": [asdict(d) | {"outcome": d.outcome} for d in self.differences],
            "recipe_differences": {k: list(v) for k, v in self.recipe_differences.items()},
            "bits_per_byte": {k: list(v) for k, v in self.bits_per_byte.items()},
            "asked_in_one": dict(self.asked_in_one),
        }

    def table_rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table: differences first, then bits per byte."""
        several = len({p.effort for p in self.differences}) > 1
        rows = [
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
        return [*rows, *bits]

    def note(self) -> str:
        """Return the footnote of the table."""
        no_common = sorted({p.skill for p in self.differences if not p.num_pairs})
        some_common = sorted(
            {p.skill for p in self.differences if p.num_pairs and p.num_pairs < max(p.a_n, p.b_n)}
        )
        notes = [f"paired on the items that both answered; A = {self.a}, B = {self.b}"]
        if no_common:
            notes.append(
                f"no common item on {', '.join(no_common)}: the difference of two separate means"
            )
        if some_common:
            notes.append(
                f"only some common items on {', '.join(some_common)}: the difference is on those"
            )
        notes += [f"{skill}: measured in {run} only" for skill, run in self.asked_in_one.items()]
        return "; ".join(notes) + ("" if self.recipe_differences else "; the recipes are equal")


def compare_runs(run_a: Path, run_b: Path) -> RunComparison:
    """Compare the students of two run folders.

    Args:
        run_a: Folder of run A.
        run_b: Folder of run B.

    Returns:
        The comparison.

    Raises:
        DataError: If a folder holds no evaluation, or one of another version of persea.
    """
    evaluation_a, all_a = read_graded_answers(run_a)
    evaluation_b, all_b = read_graded_answers(run_b)
    answers_a = [s for s in all_a if s.model_name == evaluation_a.student]
    answers_b = [s for s in all_b if s.model_name == evaluation_b.student]
    for folder, answers in ((run_a, answers_a), (run_b, answers_b)):
        if not answers:
            raise DataError(
                "holds no answer of its student",
                where=str(folder / "evaluate" / "examples.jsonl"),
                remedy="run evaluate again",
            )
    skills = list(dict.fromkeys(s.skill for s in (*answers_a, *answers_b)))
    bits = [e.bits_per_byte.get(e.student, {}) for e in (evaluation_a, evaluation_b)]
    return RunComparison(
        str(run_a),
        str(run_b),
        tuple(d for skill in skills for d in _skill_differences(skill, answers_a, answers_b)),
        _recipe_differences(flat_recipe(run_a), flat_recipe(run_b)),
        {
            skill: (bits[0].get(skill), bits[1].get(skill))
            for skill in dict.fromkeys((*bits[0], *bits[1]))
        },
        {
            name: run
            for run, first, second in (
                ("A", answers_a, answers_b),
                ("B", answers_b, answers_a),
            )
            for name in _only_in_first(first, second)
        },
    )


def _only_in_first(first: Sequence[GradedAnswer], second: Sequence[GradedAnswer]) -> Iterator[str]:
    """Yield skills that only the first run measured, and efforts and languages of the common
    skills.
    """
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
            [s for s in answers if (s.skill, s.effort) == (skill, effort)]
            for answers in (answers_a, answers_b)
        )
        languages = sorted({s.language for s in (*a, *b)})
        for language in ("", *(languages if len(languages) > 1 else ())):
            x, y = (
                [s for s in answers if not language or s.language == language] for answers in (a, b)
            )
            if x and y:
                yield _skill_difference(skill, language, effort, x, y)


def _skill_difference(
    skill: str,
    language: str,
    effort: ThinkingEffort,
    answers_a: Sequence[GradedAnswer],
    answers_b: Sequence[GradedAnswer],
) -> SkillDifference:
    values_b = {(s.id, s.question, s.reference): s.value for s in answers_b}
    pairs = [
        (s.value, values_b[s.id, s.question, s.reference])
        for s in answers_a
        if (s.id, s.question, s.reference) in values_b
    ]
    x, y = [s.value for s in answers_a], [s.value for s in answers_b]
    scores = sum(x) / len(x), sum(y) / len(y), len(x), len(y), len(pairs)
    if not pairs:
        return SkillDifference(
            skill,
            language,
            effort,
            *scores,
            scores[1] - scores[0],
            *unpaired_difference_interval(y, x),
        )
    paired_a, paired_b = [p for p, _ in pairs], [q for _, q in pairs]
    return SkillDifference(
        skill,
        language,
        effort,
        *scores,
        (sum(paired_b) - sum(paired_a)) / len(pairs),
        *paired_difference_interval(paired_b, paired_a),
    )


def flat_recipe(run_folder: Path) -> dict[str, Any]:
    """Return the run's recipe with flat keys such as teachers.0.model.

    Raises:
        DataError: If the folder holds no recipe.
    """
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
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    if not items:
        yield path, value
    for key, child in items:
        yield from _flatten(child, f"{path}.{key}" if path else str(key))


def _recipe_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        key: (a.get(key, ABSENT), b.get(key, ABSENT))
        for key in dict.fromkeys((*a, *b))
        if a.get(key, ABSENT) != b.get(key, ABSENT)
    }
