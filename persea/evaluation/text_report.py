"""Compare models on held-out documents: bits per byte of each, and the share of the gap closed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.evaluation.text_bits import DocumentBits, TextWindows
from persea.tasks.cluster_intervals import BitsPerByte, Interval


@dataclass(frozen=True)
class TextGroup:
    """All models on the documents of one skill and language.

    Attributes:
        skill: Skill of the documents.
        language: Their language; "" = the mean over all languages of the skill.
        documents: Number of documents.
        num_bytes: Bytes of the documents.
        bits_per_byte: Model -> bits per byte. Lower is better.
        end_bits: Model -> bits of the token that ends a document, on average; without the models
            whose tokenizer has none.
        best_teachers: The teacher with the fewest bits per byte; none if no teacher was measured.
            In a mean over languages, the best teacher of each.
        student_minus: Model -> the student's bits per byte minus the model's, on the same
            documents.
        minus_best: The student's bits per byte minus those of the best teacher of each language.
        gap_closed: Share of the gap from base to best teacher that the student closed; None if the
            best teacher is not better than the base.
        no_gap_reason: Why there is no gap to close; "" if there is one.
    """

    skill: str
    language: str
    documents: int
    num_bytes: int
    bits_per_byte: Mapping[str, Interval]
    end_bits: Mapping[str, float]
    best_teachers: tuple[str, ...]
    student_minus: Mapping[str, Interval]
    minus_best: Interval | None
    gap_closed: Interval | None
    no_gap_reason: str = ""


@dataclass(frozen=True)
class TextReport:
    """All models on all held-out documents.

    Attributes:
        student: Name of the student.
        base: Name of the model it was trained from.
        teachers: Names of the measured teachers.
        reference_models: Names of the measured models that teach nothing.
        groups: Results: the languages of a skill, then their mean if there are several.
        unmeasured: Model -> why it was not measured.
        left_out: Document id -> why no model was measured on it.
        windows: Parts that the documents were read in.
    """

    student: str
    base: str
    teachers: tuple[str, ...]
    reference_models: tuple[str, ...]
    groups: tuple[TextGroup, ...]
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    windows: int = 0

    @property
    def model_names(self) -> tuple[str, ...]:
        """Student, base, teachers, reference models; only measured ones."""
        return (self.student, self.base, *self.teachers, *self.reference_models)

    @property
    def languages(self) -> tuple[TextGroup, ...]:
        """Results of one skill in one language each; for a skill in one language that one."""
        means = {(g.skill, g.language) for g in self._means}
        return tuple(g for g in self.groups if (g.skill, g.language) not in means)

    @property
    def overall(self) -> tuple[TextGroup, ...]:
        """One result for each skill: the mean over its languages, or its only language."""
        means = {g.skill: g for g in self._means}
        return tuple(
            means.get(skill) or next(g for g in self.groups if g.skill == skill)
            for skill in dict.fromkeys(g.skill for g in self.groups)
        )

    @property
    def _means(self) -> list[TextGroup]:
        counts: dict[str, int] = {}
        for g in self.groups:
            counts[g.skill] = counts.get(g.skill, 0) + 1
        last = {g.skill: g for g in self.groups}
        return [g for skill, g in last.items() if counts[skill] > 1]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)


def compare_on_texts(
    windows: TextWindows,
    bits: Mapping[str, DocumentBits],
    student: str,
    base: str,
    teachers: Sequence[str],
    unmeasured: Mapping[str, str],
) -> TextReport:
    """Compare all models on the held-out documents.

    Args:
        windows: The documents.
        bits: Model -> its bits, student and base first.
        student: Name of the student.
        base: Name of its base.
        teachers: Names of the teachers; those that are not in `bits` were not measured.
        unmeasured: Model -> why it was not measured.
    """
    measured = tuple(t for t in teachers if t in bits)
    names = (student, base, *measured, *(n for n in bits if n not in (student, base, *measured)))
    documents = windows.documents
    groups: list[TextGroup] = []
    for skill in dict.fromkeys(d.skill for d in documents):
        members = {
            language: np.array(
                [d.skill == skill and d.language == language for d in documents], np.bool_
            )
            for language in dict.fromkeys(d.language for d in documents if d.skill == skill)
        }
        columns = [_columns(documents, bits, names, measured, m_D) for m_D in members.values()]
        for (language, member_D), column in zip(members.items(), columns, strict=True):
            groups.append(_group(skill, language, [column], [member_D], bits, names, measured))
        if len(members) > 1:
            all_members = list(members.values())
            groups.append(_group(skill, "", columns, all_members, bits, names, measured))
    return TextReport(
        student,
        base,
        measured,
        names[2 + len(measured) :],
        tuple(groups),
        dict(unmeasured),
        dict(windows.left_out),
        len(windows.windows),
    )


@dataclass(frozen=True, eq=False)
class _Columns:
    """The documents of one language: bits of each model, then of the best teacher."""

    bits_NM: npt.NDArray[np.float64]
    bytes_N: npt.NDArray[np.float64]
    best_teacher: str


def _columns(
    documents: Sequence[Any],
    bits: Mapping[str, DocumentBits],
    names: Sequence[str],
    teachers: Sequence[str],
    member_D: npt.NDArray[np.bool_],
) -> _Columns:
    bits_NM = np.stack([bits[name].content_D[member_D] for name in names], axis=1)
    bytes_N = np.array([d.num_bytes for d in documents], np.float64)[member_D]
    best = min(teachers, key=lambda t: bits[t].content_D[member_D].sum(), default="")
    if best:
        bits_NM = np.column_stack([bits_NM, bits[best].content_D[member_D]])
    return _Columns(bits_NM, bytes_N, best)


def _group(
    skill: str,
    language: str,
    columns: Sequence[_Columns],
    members: Sequence[npt.NDArray[np.bool_]],
    bits: Mapping[str, DocumentBits],
    names: Sequence[str],
    teachers: Sequence[str],
) -> TextGroup:
    found = BitsPerByte.from_groups([(c.bits_NM, c.bytes_N) for c in columns])
    best_teachers = tuple(dict.fromkeys(c.best_teacher for c in columns if c.best_teacher))
    minus = {name: found.difference(0, m) for m, name in enumerate(names) if m}
    minus_best, gap, reason = None, None, "no teacher was measured"
    if best_teachers:
        minus_best = found.difference(0, len(names))
        gap = found.gap_closed(0, 1, len(names))
        reason = "" if gap else _no_gap_reason(found, " and ".join(best_teachers), len(names))
    member_D = np.logical_or.reduce(members)
    return TextGroup(
        skill,
        language,
        int(member_D.sum()),
        int(sum(c.bytes_N.sum() for c in columns)),
        {name: found.rate(m) for m, name in enumerate(names)},
        {n: float(bits[n].end_D[member_D].mean()) for n in names if bits[n].end_D.any()},
        best_teachers,
        minus,
        minus_best,
        gap,
        reason,
    )


def _no_gap_reason(found: BitsPerByte, teacher: str, best: int) -> str:
    return (
        f"{teacher} ({found.rates_M[best]:.3f}) is not better than the base "
        f"({found.rates_M[1]:.3f})"
    )


def document_records(
    windows: TextWindows, bits: Mapping[str, DocumentBits]
) -> Iterator[dict[str, Any]]:
    """Yield a JSON line for each document: its bits under every model."""
    for k, document in enumerate(windows.documents):
        yield {
            "id": document.id,
            "skill": document.skill,
            "language": document.language,
            "bytes": document.num_bytes,
            "bits": {name: float(b.content_D[k]) for name, b in bits.items()},
            "end_bits": {name: float(b.end_D[k]) for name, b in bits.items()},
        }
