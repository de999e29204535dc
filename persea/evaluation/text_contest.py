"""Choose the teachers of given texts: by the bits per byte that each model needs for them.

Teachers do not write these texts, so no question tells who teaches them best. No model was trained
on them in this run, neither the teachers nor the student's base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.chat.messages import Conversation
from persea.evaluation.gain import BITS_UNIT, Gain, GainDecision
from persea.tasks.cluster_intervals import BitsPerByte
from persea.tasks.intervals import CONFIDENCE_LEVEL


@dataclass(frozen=True)
class GivenTexts:
    """Texts of one skill and language that the student will learn.

    Attributes:
        skill: Their skill.
        language: Their language.
        conversations: Documents, or conversations with given answers.
        documents: Name of the document that each text is a part of.
    """

    skill: str
    language: str
    conversations: tuple[Conversation, ...]
    documents: tuple[str, ...]

    @property
    def num_bytes(self) -> tuple[int, ...]:
        """UTF-8 bytes of each text."""
        return tuple(len(c.messages[-1].text.encode()) for c in self.conversations)


@dataclass(frozen=True)
class TextScore:
    """A teacher's bits per byte on given texts; lower is better.

    Attributes:
        model_name: The model.
        skill: Skill of the texts.
        language: Their language.
        bits_per_byte: The value.
        low: Lower end of its interval; None for a single text.
        high: Upper end of it.
        n: Number of documents.
    """

    model_name: str
    skill: str
    language: str
    bits_per_byte: float
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)


@dataclass(frozen=True)
class TextContest:
    """The teachers of one skill's texts.

    Attributes:
        parts: Part -> ((teacher, share), ...): each language of the skill, or the skill if its
            texts are in one language.
        scores: Bits per byte of every teacher.
        worse_than: Part -> teacher -> the teacher that needs fewer bits, with confidence.
        gains: The best teacher of each part compared with the student's base.
    """

    parts: Mapping[str, tuple[tuple[str, float], ...]]
    scores: tuple[TextScore, ...]
    worse_than: Mapping[str, Mapping[str, str]]
    gains: tuple[GainDecision, ...]


def decide_text_contest(
    texts: Sequence[GivenTexts],
    bits: Mapping[str, Sequence[npt.NDArray[np.float64]]],
    teachers: Sequence[str],
    base: str | None,
    pinned: str = "",
    confidence: float = CONFIDENCE_LEVEL,
) -> TextContest:
    """Choose the teachers of one skill's texts, and compare them with the student's base.

    Teachers that are not worse than the best one with confidence share the texts. The best of K
    teachers is passed over with a probability of at most 1 - confidence (Bonferroni over K - 1).

    Args:
        texts: Texts of each language of the skill.
        bits: Model -> bits of each text, an array for each entry of `texts`.
        teachers: Teachers that were measured.
        base: Name of the student's base in `bits`; None = it was not measured.
        pinned: The teacher that the recipe chooses; "" = none.
        confidence: Confidence of the decisions.
    """
    names = [*teachers, *([base] if base else [])]
    parts: dict[str, tuple[tuple[str, float], ...]] = {}
    worse: dict[str, dict[str, str]] = {}
    scores: list[TextScore] = []
    gains: list[GainDecision] = []
    for k, one in enumerate(texts):
        part = f"{one.skill}/{one.language}" if one.language and len(texts) > 1 else one.skill
        bits_DM, bytes_D = _by_document(one, [bits[name][k] for name in names])
        found = BitsPerByte.from_groups([(bits_DM, bytes_D)])
        for m, name in enumerate(teachers):
            rate = found.rate(m, confidence)
            scores.append(
                TextScore(
                    name, one.skill, one.language, rate.value, rate.low, rate.high, len(bytes_D)
                )
            )
        best = teachers.index(pinned) if pinned else int(np.argmin(found.rates_M[: len(teachers)]))
        worse[part] = {} if pinned else _worse_teachers(found, teachers, best, confidence)
        chosen = [pinned] if pinned else [t for t in teachers if t not in worse[part]]
        parts[part] = tuple((t, 1 / len(chosen)) for t in chosen)
        if base:
            gains.append(_gain(found, part, teachers, best, len(bytes_D), bool(pinned), confidence))
    return TextContest(parts, tuple(scores), worse, tuple(gains))


def _by_document(
    texts: GivenTexts, bits: Sequence[npt.NDArray[np.float64]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sum the texts of each document: they depend on each other."""
    numbers = {name: k for k, name in enumerate(dict.fromkeys(texts.documents))}
    document_N = np.array([numbers[name] for name in texts.documents])
    bytes_D, bits_DM = np.zeros(len(numbers)), np.zeros((len(numbers), len(bits)))
    np.add.at(bytes_D, document_N, np.array(texts.num_bytes, np.float64))
    np.add.at(bits_DM, document_N, np.stack(bits, axis=1))
    return bits_DM, bytes_D


def _worse_teachers(
    found: BitsPerByte, teachers: Sequence[str], best: int, confidence: float
) -> dict[str, str]:
    """Return the teachers that need more bits than the best one, with confidence."""
    rivals = max(1, len(teachers) - 1)
    level = 1 - 2 * (1 - confidence) / rivals  # one-sided, shared among the rivals
    worse = {}
    for k, name in enumerate(teachers):
        low = found.difference(k, best, level).low
        if k != best and low is not None and low > 0:
            worse[name] = teachers[best]
    return worse


def _gain(
    found: BitsPerByte,
    part: str,
    teachers: Sequence[str],
    best: int,
    num_documents: int,
    is_pinned: bool,
    confidence: float,
) -> GainDecision:
    base = len(teachers)
    decisive = found.difference(base, best, 1 - 2 * (1 - confidence) / len(teachers))
    kind = Gain.UNDECIDED
    if decisive.low is not None and decisive.low > 0:
        kind = Gain.BETTER
    elif decisive.high is not None and decisive.high < 0:
        kind = Gain.WORSE
    shown = found.difference(base, best, confidence)
    return GainDecision(
        part,
        teachers[best],
        float(found.rates_M[best]),
        float(found.rates_M[base]),
        shown.value,
        shown.low,
        shown.high,
        num_documents,
        kind,
        BITS_UNIT,
        is_pinned,
    )
