"""What a vocabulary that lacks single bytes cannot write: tokens of the other side, and texts.

SmolLM2's vocabulary has no token for 21 bytes. A token of the other vocabulary that holds one has
no event: its probability goes to the cross-entropy, as a control token's does. A text that holds
one cannot be rendered and is left out. Both are counted here; too many such texts are refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.alignment.event_map import EventMap
from persea.chat.messages import Conversation
from persea.errors import RefusedError
from persea.evaluation.compatibility import ConversationSample
from persea.tokenization.vocabulary import Vocabulary

MAX_UNWRITABLE_SHARE = 0.05  # default of check.max_unwritable_share


@dataclass(frozen=True)
class UnwritableTexts:
    """Texts of the check that one model's vocabulary cannot write.

    Attributes:
        model: Name of the model.
        missing_bytes: The bytes without a token, in hexadecimal.
        left_out: Texts that need one, which are left out for all models.
        texts: Texts in all.
        example: Name of the first that is left out; "" if there is none.
    """

    model: str
    missing_bytes: str
    left_out: int
    texts: int
    example: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)


@dataclass(frozen=True)
class UnwritableTokens:
    """Tokens of text without an event, because the other vocabulary cannot write them.

    Attributes:
        teacher: Name of the teacher.
        side: "teacher" or "student": whose tokens they are.
        tokens: Number of such tokens.
        vocab_size: Tokens of that side.
    """

    teacher: str
    side: str
    tokens: int
    vocab_size: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)


def leave_out_unwritable(
    samples: Sequence[ConversationSample], vocabularies: Mapping[str, Vocabulary]
) -> tuple[tuple[ConversationSample, ...], list[UnwritableTexts]]:
    """Leave out the conversations that a vocabulary cannot write.

    Args:
        samples: Samples to compare tokenizers on.
        vocabularies: Model name -> vocabulary of the student and the teachers.

    Returns:
        The samples without these conversations, and a record of each vocabulary that lacks bytes.
    """
    poor = {name: v for name, v in vocabularies.items() if v.missing_bytes}
    if not poor:
        return tuple(samples), []
    lost: dict[str, list[str]] = {name: [] for name in poor}
    kept_samples = []
    for sample in samples:
        kept = []
        for k, (conversation, label) in enumerate(
            zip(sample.conversations, sample.labels, strict=True)
        ):
            raw = _text_of(conversation)
            unable = [name for name, v in poor.items() if not v.can_write(raw)]
            for name in unable:
                lost[name].append(label)
            if not unable:
                kept.append(k)
        kept_samples.append(
            replace(
                sample,
                conversations=tuple(sample.conversations[k] for k in kept),
                labels=tuple(sample.labels[k] for k in kept),
            )
        )
    num_texts = sum(len(s.conversations) for s in samples)
    return tuple(kept_samples), [
        UnwritableTexts(
            name, v.missing_bytes.hex(" "), len(lost[name]), num_texts, (*lost[name], "")[0]
        )
        for name, v in poor.items()
    ]


def _text_of(conversation: Conversation) -> bytes:
    text = "".join(part.text for m in conversation.messages for part in m.parts)
    return unicodedata.normalize("NFC", text).encode(errors="replace")


def find_unwritable_tokens(
    teacher_name: str, teacher: Vocabulary, student: Vocabulary, event_map: EventMap
) -> list[UnwritableTokens]:
    """Count the tokens of text without an event, for each side that has any.

    Args:
        teacher_name: Name of the teacher.
        teacher: Its vocabulary.
        student: The student's vocabulary.
        event_map: Event map of the two.
    """
    counts = [
        UnwritableTokens(teacher_name, side, len(tokens_without_event(v, event_X)), len(v))
        for side, v, event_X in (
            ("teacher", teacher, event_map.teacher_event_W),
            ("student", student, event_map.student_event_V),
        )
    ]
    return [c for c in counts if c.tokens]


def tokens_without_event(
    vocabulary: Vocabulary, event_X: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Return the ids of tokens of text that have no event, int64 sorted."""
    return np.flatnonzero((event_X < 0) & (vocabulary.lengths_W > 0)).astype(np.int64)


def refuse_unwritable_texts(
    found: Sequence[UnwritableTexts], max_share: float = MAX_UNWRITABLE_SHARE
) -> None:
    """Check that a vocabulary can write nearly all texts.

    Args:
        found: Result of `leave_out_unwritable`.
        max_share: Largest share of texts that may be left out for one model.

    Raises:
        RefusedError: A vocabulary cannot write a larger share.
    """
    for one in found:
        if one.left_out > max_share * one.texts:
            raise RefusedError(
                f"its vocabulary cannot write {one.left_out} of {one.texts} texts "
                f"({one.left_out / one.texts:.1%}, at most {max_share:.1%}), the first is "
                f"{one.example}",
                where=one.model,
                remedy="choose a model whose vocabulary has all bytes, or raise "
                "check.max_unwritable_share",
            )
