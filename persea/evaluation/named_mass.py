"""Named mass: how much of a teacher's probability the k listed tokens of a position keep.

Servers list the most likely tokens only. A student with another tokenizer learns from an event if
all of the teacher's tokens of that event are listed; the mass of the others is one rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from persea.alignment.event_map import EventMap
from persea.chat.messages import Conversation
from persea.errors import RefusedError
from persea.evaluation.compatibility import ConversationSample
from persea.losses.targets import is_fully_named
from persea.teachers.engines import EngineFailure
from persea.teachers.teacher import Teacher

MAX_CONVERSATIONS_PER_LANGUAGE = 16


@dataclass(frozen=True)
class NamedMass:
    """The probability that a teacher's listed tokens keep, in one language.

    Attributes:
        teacher: Name of the teacher.
        language: Language of the scored answers.
        conversations: Answers that were scored.
        failed: Answers that the server could not score.
        positions: Supervised tokens of the scored answers.
        top_logprobs: Tokens listed per position.
        listed_mass: Mean probability of the listed tokens together.
        event_mass: Mean probability of the events whose tokens are all listed.
    """

    teacher: str
    language: str
    conversations: int
    failed: int
    positions: int
    top_logprobs: int
    listed_mass: float
    event_mass: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)


def measure_named_mass(
    teacher: Teacher, event_map: EventMap, samples: Sequence[ConversationSample]
) -> list[NamedMass]:
    """Score some reference answers of each language, and sum what is listed.

    Args:
        teacher: The teacher; its engine must list tokens per position.
        event_map: Event map to the student.
        samples: Conversations with reference answers.

    Raises:
        TeacherError: The server is not there, or returns other values than were requested.
    """
    found = []
    for language in dict.fromkeys(s.language for s in samples):
        chosen = _take_turns([s.conversations for s in samples if s.language == language])
        tokens = [teacher.renderer.render(c) for c in chosen[:MAX_CONVERSATIONS_PER_LANGUAGE]]
        rows = teacher.engine.compute_sparse_distributions(
            [t.ids_T for t in tokens], [t.loss_mask_T for t in tokens]
        )
        scored, failed, positions, listed, events = 0, 0, 0, 0.0, 0.0
        for distributions in rows:
            if isinstance(distributions, EngineFailure):
                failed += 1
                continue
            scored += 1
            positions += len(distributions)
            row_M = np.repeat(np.arange(len(distributions)), np.diff(distributions.offsets_N1))
            event_M = event_map.teacher_event_W[distributions.ids_M].astype(np.int64)
            is_whole_M = is_fully_named(event_map, row_M, event_M)
            listed += float(distributions.probs_M.sum(dtype=np.float64))
            events += float(distributions.probs_M[is_whole_M].sum(dtype=np.float64))
        if positions:
            found.append(
                NamedMass(
                    teacher.name,
                    language,
                    scored,
                    failed,
                    positions,
                    teacher.engine.capabilities.num_top_logprobs,
                    round(listed / positions, 4),
                    round(events / positions, 4),
                )
            )
    return found


def _take_turns(conversations: Sequence[Sequence[Conversation]]) -> list[Conversation]:
    """Return the first conversation of each skill, then the second of each, and so on."""
    longest = max(map(len, conversations), default=0)
    return [some[k] for k in range(longest) for some in conversations if k < len(some)]


def refuse_low_named_mass(found: Iterable[NamedMass], min_named_mass: float) -> None:
    """Check the mass of each teacher and language.

    Raises:
        RefusedError: The listed tokens keep less of the events' probability than the limit.
    """
    low = [one for one in found if one.event_mass < min_named_mass]
    if low:
        worst = min(low, key=lambda one: one.event_mass)
        names = ", ".join(dict.fromkeys(f"{one.teacher}, {one.language}" for one in low))
        raise RefusedError(
            f"the {worst.top_logprobs} listed tokens of {worst.teacher} keep "
            f"{worst.event_mass:.0%} of the probability of events in {worst.language} (limit "
            f"{min_named_mass:.0%}); below the limit: {names}",
            where="check",
            remedy="list more: a higher `top_logprobs:` (vLLM needs --max-logprobs as high, and "
            "--logprobs-mode raw_logprobs); or load the weights here; or learn the text alone "
            "with `protocol: chat`; or lower `check.min_named_mass:`",
        )
