"""Is this pairing sound? Measured on the bytes of real conversations before anything is asked or trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from persea.align import boundaries, spans
from persea.bridge import Bridge
from persea.chat import Conversation
from persea.errors import Refused
from persea.voice import Voice


@dataclass(frozen=True)
class Pairing:
    """One teacher against the student on one skill's reference answers; shares of learned student tokens, in [0, 1].

    boundary            stand where both tokenizers begin a token: taught by events
    one_to_one          of all spans, those of one student and one teacher token
    cross_entropy_only  the rest: taught by cross-entropy; boundary + cross_entropy_only = 1
    disagreement        of the common boundaries, those where the two realised tokens map to different events
    """

    teacher: str
    skill: str
    conversations: int
    tokens: int
    boundary: float
    one_to_one: float
    cross_entropy_only: float
    disagreement: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(teacher: str, voice: Voice, student: Voice, bridge: Bridge, skill: str, conversations: Sequence[Conversation]) -> Pairing:
    """Lay both renderings of each answered conversation over each other. Raises DataError where bytes cannot be located."""
    learned = common = ones = pieces = differ = 0
    for conversation in conversations:
        s, t = student.render(conversation), voice.render(conversation)
        both, ranges = boundaries(s, t), spans(s, t)
        learned += int(s.learn_T.sum())
        common += len(both.student_C)
        ones += ranges.one_to_one
        pieces += len(ranges.student_C2)
        event_s = bridge.student_event_V[s.ids_T[both.student_C]]
        event_t = bridge.teacher_event_W[t.ids_T[both.teacher_C]]
        differ += int(np.sum(event_s != event_t))
    share = common / max(1, learned)
    return Pairing(teacher, skill, len(conversations), learned, share, ones / max(1, pieces), 1 - share, differ / max(1, common))


def refuse_below(pairings: Iterable[Pairing], floor: float) -> None:
    """Raises Refused for a pairing whose boundary share lies below the floor: nothing of the teacher would arrive."""
    for p in pairings:
        if p.boundary < floor:
            raise Refused(f"only {p.boundary:.0%} of the student's tokens stand on a common boundary (floor {floor:.0%})",
                          where=f"{p.teacher} -> student, {p.skill}",
                          remedy="choose a teacher or student whose tokenizers are nearer, or lower check.floor")
