"""Event maps: two vocabularies as tokens of one common set of events.

The event of a token is its canonical fixpoint: the first token of its bytes encoded by the other
tokenizer, then the first token of those bytes encoded by its own, and so on until the bytes no
longer change. A teacher's distribution over its tokens and a student's over its own both become
distributions over events. With longest-prefix maps 14-38 % of the aligned positions of real
tokenizers are different events, with fixpoints 0-3 % (Hmong under Gemma 4.5 %;
tests/alignment/test_event_map.py pins them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from persea import storage
from persea.alignment.boundary_mask import MAX_SEARCH_TOKENS, BoundaryMask
from persea.alignment.token_order import TokenOrder, get_token_order
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.tokenization.bpe import BpeDerivations, expand_groups
from persea.tokenization.logit_rows import tokens_without_row
from persea.tokenization.pretokenizer import decode_whole_characters
from persea.tokenization.vocabulary import BYTE_TO_CHAR, Vocabulary

EVENT_MAP_FORMAT = 6
CHECKSUM_BYTES = 32
END_OF_TURN_EVENT, SPACES_EVENT, FIRST_TEXT_EVENT = 0, 1, 2
# Fields of BpeDerivations, which are also keys of the stored file.
BPE_ARRAY_NAMES = ("left_V", "right_V", "rank_V", "max_rank_V", "derivable_V", "pair_R2")


@dataclass(frozen=True)
class EventMap:
    """The event of every token of a teacher and of a student. W, V = their vocabularies.

    Attributes:
        teacher_event_W: int32, event of each teacher token; -1 = control token without counterpart,
            or a token that the student's vocabulary cannot write because it lacks a byte.
        student_event_V: int32, the same for the student.
        num_events: Number of events E. Event 0 is the end of the turn, event 1 any run of spaces
            and tabs.
        digest: SHA-256 of both vocabularies and their stop tokens.
        teacher_mask: Finds teacher tokens that are impossible at a boundary of the student; None if
            both have the same tokenizer.
        student_mask: Finds student tokens that are impossible at a boundary of the teacher.

    Example:
        >>> import persea
        >>> teacher = persea.load_renderer("saplings/qwen-sapling")
        >>> student = persea.load_renderer("saplings/llama-sapling")
        >>> emap = persea.event_map(teacher=teacher, student=student)
        >>> emap.teacher_event_W[teacher.stop_ids[0]] == emap.student_event_V[student.stop_ids[0]]
        np.True_
    """

    teacher_event_W: npt.NDArray[np.int32]
    student_event_V: npt.NDArray[np.int32]
    num_events: int
    digest: str
    teacher_mask: BoundaryMask | None = None
    student_mask: BoundaryMask | None = None

    @cached_property
    def tokens_by_event(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Student tokens grouped by event, as (offsets_E1, tokens).

        The tokens of event e are tokens[offsets_E1[e]:offsets_E1[e + 1]].
        """
        order = np.argsort(self.student_event_V, kind="stable")
        order = order[self.student_event_V[order] >= 0]
        sizes = np.bincount(self.student_event_V[order], minlength=self.num_events)
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), order.astype(np.int64)

    def tokens_of_events(
        self, event_M: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the student tokens of M events, concatenated, as (index into M, token)."""
        offsets, tokens = self.tokens_by_event
        at_G, entry_G = expand_groups(offsets, event_M)
        return entry_G, tokens[at_G]

    @cached_property
    def is_identity(self) -> bool:
        """Whether both sides have the same tokenizer, so that every token is its own event."""
        same = np.arange(self.num_events)
        return np.array_equal(self.teacher_event_W, same) and np.array_equal(
            self.student_event_V, same
        )

    def events_of_teacher_ids(self, ids_M: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Return the events of teacher token ids.

        Raises:
            DataError: An id is outside the teacher's vocabulary: the distributions come from
                another tokenizer.
        """
        wrong = (ids_M < 0) | (ids_M >= len(self.teacher_event_W))
        if wrong.any():
            raise DataError(
                f"teacher id {int(ids_M[wrong][0])} is outside the vocabulary of "
                f"{len(self.teacher_event_W)} tokens",
                where="event map",
                remedy="use distributions of this tokenizer, without the padding of the logits",
            )
        events: npt.NDArray[np.int64] = self.teacher_event_W[ids_M].astype(np.int64)
        return events


def event_map(*, teacher: ChatRenderer, student: ChatRenderer) -> EventMap:
    """Map two vocabularies to common events.

    Args:
        teacher: Renderer of the teacher.
        student: Renderer of the student.

    Returns:
        The event map. It is built once (seconds with real vocabularies) and then read from
        PERSEA_HOME (default ~/.cache/persea).

    Example:
        >>> import persea
        >>> teacher = persea.load_renderer("saplings/qwen-sapling")
        >>> student = persea.load_renderer("saplings/llama-sapling")
        >>> emap = persea.event_map(teacher=teacher, student=student)
        >>> emap.is_identity, emap.num_events < len(student.vocabulary)
        (False, True)
    """
    return load_event_map(teacher, student)


def event_map_digest(teacher: ChatRenderer, student: ChatRenderer) -> str:
    """Return the SHA-256 of everything that an event map depends on."""
    parts = [
        EVENT_MAP_FORMAT,
        teacher.vocabulary.digest,
        teacher.stop_ids,
        student.vocabulary.digest,
        student.stop_ids,
    ]
    if any(tokens_without_row(side.vocabulary) for side in (teacher, student)):
        parts += [len(teacher.vocabulary), len(student.vocabulary)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_event_map(
    teacher: ChatRenderer, student: ChatRenderer, max_search_tokens: int = MAX_SEARCH_TOKENS
) -> EventMap:
    """Read the event map of two renderers from PERSEA_HOME, or build and store it.

    Args:
        teacher: Renderer of the teacher.
        student: Renderer of the student.
        max_search_tokens: As in `BoundaryMask`; not part of the stored map.
    """
    digest = event_map_digest(teacher, student)
    path = storage.persea_home() / "event_maps" / f"{digest[:32]}.eventmap"
    tensors = _read_stored_tensors(path)
    if tensors is None:
        built = build_event_map(teacher, student, max_search_tokens)
        body = save_tensors(_to_tensors(built))
        storage.write_atomic(path, hashlib.sha256(body).digest() + body)
        return built
    loaded = EventMap(tensors["teacher"], tensors["student"], int(tensors["events"][0]), digest)
    if "teacher_first" not in tensors:
        return loaded
    teacher_order, student_order = (
        get_token_order(
            renderer.vocabulary,
            None
            if renderer.vocabulary.is_unigram  # its lattice is built anew
            else BpeDerivations(*(tensors[f"{side}_{name}"] for name in BPE_ARRAY_NAMES)),
        )
        for side, renderer in (("teacher", teacher), ("student", student))
    )
    return _with_masks(
        loaded,
        teacher_order,
        student_order,
        tensors["teacher_first"],
        tensors["student_first"],
        max_search_tokens,
    )


def _read_stored_tensors(path: Path) -> dict[str, Any] | None:
    """Return the arrays of a stored map; None if there is none, or it is damaged and rebuilt."""
    data = path.read_bytes() if path.is_file() else b""
    checksum, body = data[:CHECKSUM_BYTES], data[CHECKSUM_BYTES:]
    if not data or hashlib.sha256(body).digest() != checksum:
        return None
    tensors: dict[str, Any] = load_tensors(body)
    return tensors


def _to_tensors(event_map: EventMap) -> dict[str, npt.NDArray[np.generic]]:
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "teacher": event_map.teacher_event_W,
        "student": event_map.student_event_V,
        "events": np.array([event_map.num_events]),
    }
    if event_map.teacher_mask and event_map.student_mask:
        tensors |= {
            "teacher_first": event_map.teacher_mask.first_token_W,
            "student_first": event_map.student_mask.first_token_W,
        }
        for side, order in (
            ("teacher", event_map.student_mask.other),
            ("student", event_map.teacher_mask.other),
        ):
            if isinstance(order.derivations, BpeDerivations):
                tensors |= {
                    f"{side}_{name}": getattr(order.derivations, name) for name in BPE_ARRAY_NAMES
                }
    return tensors


def _with_masks(
    event_map: EventMap,
    teacher_order: TokenOrder,
    student_order: TokenOrder,
    teacher_first_token_W: npt.NDArray[np.integer],
    student_first_token_V: npt.NDArray[np.integer],
    max_search_tokens: int,
) -> EventMap:
    return replace(
        event_map,
        teacher_mask=BoundaryMask(
            student_order, teacher_order, teacher_first_token_W, max_search_tokens
        ),
        student_mask=BoundaryMask(
            teacher_order, student_order, student_first_token_V, max_search_tokens
        ),
    )


def build_event_map(
    teacher: ChatRenderer, student: ChatRenderer, max_search_tokens: int = MAX_SEARCH_TOKENS
) -> EventMap:
    """Build the event map of two renderers, without reading or writing PERSEA_HOME.

    Two renderers with the same tokenizer and the same stop tokens get the identity; a control token
    that has a row of logits on one side only has no event.

    Args:
        teacher: Renderer of the teacher.
        student: Renderer of the student.
        max_search_tokens: As in `BoundaryMask`.
    """
    t, s = teacher.vocabulary, student.vocabulary
    digest = event_map_digest(teacher, student)
    if t.digest == s.digest and teacher.stop_ids == student.stop_ids:
        shared = min(len(t), len(s))  # one side may lack rows for its last control tokens
        same_W, same_V = (np.arange(len(side), dtype=np.int32) for side in (t, s))
        same_W[shared:] = same_V[shared:] = -1
        return EventMap(same_W, same_V, shared, digest)
    student_of_W, teacher_of_V = first_tokens(t, s), first_tokens(s, t)
    fixpoints_W = canonical_fixpoints(t, s, student_of_W, teacher_of_V)
    fixpoints_V = canonical_fixpoints(s, t, teacher_of_V, student_of_W)
    event_numbers: dict[bytes, int] = {}
    teacher_event_W = _number_events(fixpoints_W, event_numbers)
    student_event_V = _number_events(fixpoints_V, event_numbers)
    for own, other in ((teacher_event_W, student_event_V), (student_event_V, teacher_event_W)):
        if not (other == SPACES_EVENT).any():  # one side has no token of spaces at all
            own[own == SPACES_EVENT] = -1
    teacher_event_W[list(teacher.stop_ids)] = END_OF_TURN_EVENT
    student_event_V[list(student.stop_ids)] = END_OF_TURN_EVENT
    num_events = len(event_numbers) + FIRST_TEXT_EVENT
    return _with_masks(
        EventMap(teacher_event_W, student_event_V, num_events, digest),
        get_token_order(t),
        get_token_order(s),
        student_of_W,
        teacher_of_V,
        max_search_tokens,
    )


def _number_events(
    fixpoints: Sequence[bytes | None], event_numbers: dict[bytes, int]
) -> npt.NDArray[np.int32]:
    """Return the events of byte strings; new strings are added to `event_numbers`.

    Spaces and tabs are one event, because 12-23 % of the positions in code disagree on the length
    of such a run.
    """
    event_W = np.full(len(fixpoints), -1, np.int32)
    for i, raw in enumerate(fixpoints):
        if raw is None:
            continue
        if not raw.strip(b" \t"):
            event_W[i] = SPACES_EVENT
        else:
            event_W[i] = event_numbers.setdefault(raw, len(event_numbers) + FIRST_TEXT_EVENT)
    return event_W


def canonical_fixpoints(
    own: Vocabulary,
    other: Vocabulary,
    other_of_own: npt.NDArray[np.int64],
    own_of_other: npt.NDArray[np.int64],
) -> list[bytes | None]:
    """Return the bytes of each own token's canonical fixpoint; None where there is none.

    A control token has none, nor a token that the other vocabulary cannot write. Each round trip
    gives a prefix of the bytes. It is repeated as long as the prefix gets shorter, so at most as
    often as the token has bytes.

    Args:
        own: Vocabulary of the tokens.
        other: The other vocabulary.
        other_of_own: `first_tokens(own, other)`.
        own_of_other: `first_tokens(other, own)`.
    """
    current = np.arange(len(own))
    active = other_of_own >= 0
    fixpoints: list[bytes | None] = [None] * len(own)
    while active.any():
        at = np.flatnonzero(active)
        there = other_of_own[current[at]]
        back = own_of_other[there]
        for i, u, v in zip(at.tolist(), there.tolist(), back.tolist(), strict=True):
            if v < 0 or other_of_own[v] < 0:  # one of the two cannot write the prefix
                active[i] = False
            # a token that its own tokenizer would split is not a fixpoint
            elif own.bytes_W[v] == other.bytes_W[u] and other_of_own[v] == u:
                fixpoints[i] = other.bytes_W[u]
                active[i] = False
            else:
                current[i] = v
    return fixpoints


def first_tokens(source: Vocabulary, target: Vocabulary) -> npt.NDArray[np.int64]:
    """Return the first target token of each source token's bytes.

    A token that is not valid UTF-8 (a piece of a character), or that the target's normaliser would
    change, is encoded byte by byte, below the normaliser.

    Returns:
        int64 by source token; -1 for control tokens and for tokens with bytes that the target
        cannot write.
    """
    out = np.full(len(source), -1, np.int64)
    texts: list[tuple[int, str]] = []
    for i, raw in enumerate(source.bytes_W):
        if raw is None or not target.can_write(raw):
            continue
        try:
            texts.append((i, raw.decode()))
        except UnicodeDecodeError:
            out[i] = _first_token_below_normalizer(raw, target)
    encodings = target.backend.encode_batch_fast([t for _, t in texts], add_special_tokens=False)
    for (i, text), encoding in zip(texts, encodings, strict=True):
        first = encoding.ids[0] if encoding.ids else -1
        piece = target.bytes_W[first] if first >= 0 else None
        out[i] = (
            first
            if piece and text.encode().startswith(piece)
            else _first_token_below_normalizer(text.encode(), target)
        )
    return out


def first_token_of_bytes(raw: bytes, target: Vocabulary) -> int:
    """Return the first token of some bytes in the target's encoding; -1 if it cannot write them.

    Args:
        raw: Bytes, not necessarily valid UTF-8.
        target: Vocabulary that encodes them.
    """
    if not target.can_write(raw):
        return -1
    try:
        ids = target.backend.encode(raw.decode(), add_special_tokens=False).ids
    except UnicodeDecodeError:
        ids = []
    piece = target.bytes_W[ids[0]] if ids else None
    return ids[0] if piece and raw.startswith(piece) else _first_token_below_normalizer(raw, target)


def _first_token_below_normalizer(raw: bytes, target: Vocabulary) -> int:
    if target.byte_level:
        tokens = target.backend.model.tokenize("".join(BYTE_TO_CHAR[b] for b in raw))
        candidates: list[int | None] = [tokens[0].id] if tokens else []
    else:
        text = decode_whole_characters(raw)[0]
        candidates = (
            [*target.backend.encode(text, add_special_tokens=False).ids[:1]] if text else []
        )
        # also for a literal "▁", which would come back as a space
        candidates.append(target.backend.token_to_id(f"<0x{raw[0]:02X}>"))
    for first in candidates:
        piece = target.bytes_W[first] if first is not None else None
        if first is not None and piece and raw.startswith(piece):
            return first
    return -1
