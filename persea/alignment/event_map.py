"""Bridge: two vocabularies laid over the same events.

Every token of either vocabulary maps to its canonical fixpoint: the first token of its bytes re-encoded with the other
tokenizer, back and forth until the bytes stay. What both maps share are the events, and a teacher's distribution over its
tokens and a student's over its own become distributions over the same events. With longest-prefix maps 14-38 % of aligned
rows disagree on real tokenizers, with the fixpoint 0-3 % (Hmong under Gemma 4.5 %; tests/alignment/test_event_map.py pins them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from persea import storage as store
from persea.alignment.boundary_mask import BoundaryMask, TokenOrder, get_token_order
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.tokenization.bpe import BpeDerivations, expand_groups
from persea.tokenization.vocabulary import BYTE_TO_CHAR, Vocabulary

EVENT_MAP_FORMAT = 4
BPE_ARRAY_NAMES = ("left_V", "right_V", "rank_V", "max_rank_V", "derivable_V", "pair_R2")


@dataclass(frozen=True)
class EventMap:
    """Event of every token of both vocabularies; -1 = a control token that has no counterpart and is left out.

    teacher_event_W, student_event_V  int32, token id -> event
    events  number of events E; event 0 is "the turn ends", event 1 any run of spaces and tabs
    digest  of both vocabularies and their stop tokens
    teacher_mask  teacher tokens that cannot stand where the student has a boundary; None where both have the same tokenizer
    student_mask  student tokens that cannot stand where the teacher has one
    """

    teacher_event_W: npt.NDArray[np.int32]
    student_event_V: npt.NDArray[np.int32]
    num_events: int
    digest: str
    teacher_mask: BoundaryMask | None = None
    student_mask: BoundaryMask | None = None

    @cached_property
    def tokens_by_event(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Student tokens by event: (offsets_E1, tokens), tokens of event e are tokens[offsets[e]:offsets[e + 1]]."""
        order = np.argsort(self.student_event_V, kind="stable")
        order = order[self.student_event_V[order] >= 0]
        sizes = np.bincount(self.student_event_V[order], minlength=self.num_events)
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), order.astype(np.int64)

    def tokens_of_events(
        self, event_M: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The student tokens of each event, laid end to end: (which of the M events, token)."""
        offsets, tokens = self.tokens_by_event
        at_G, entry_G = expand_groups(offsets, event_M)
        return entry_G, tokens[at_G]

    @cached_property
    def is_identity(self) -> bool:
        """The same tokenizer on both sides: every token is its own event."""
        same = np.arange(self.num_events)
        return np.array_equal(self.teacher_event_W, same) and np.array_equal(
            self.student_event_V, same
        )

    def events_of_teacher_ids(self, ids_M: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Events of raw teacher ids. Raises DataError for an id that is none of the teacher's: the rows come from another tokenizer."""
        wrong = (ids_M < 0) | (ids_M >= len(self.teacher_event_W))
        if wrong.any():
            raise DataError(
                f"teacher id {int(ids_M[wrong][0])} lies outside the vocabulary of {len(self.teacher_event_W)} tokens",
                where="bridge",
                remedy="the rows come from another tokenizer, or from logits whose padded rows were not cut off",
            )
        events: npt.NDArray[np.int64] = self.teacher_event_W[ids_M].astype(np.int64)
        return events


def event_map_digest(teacher: ChatRenderer, student: ChatRenderer) -> str:
    parts = [
        EVENT_MAP_FORMAT,
        teacher.vocabulary.digest,
        teacher.stop_ids,
        student.vocabulary.digest,
        student.stop_ids,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_event_map(teacher: ChatRenderer, student: ChatRenderer) -> EventMap:
    """The bridge of two voices, built once and kept in PERSEA_HOME (default ~/.cache/persea) under its digest."""
    digest = event_map_digest(teacher, student)
    path = store.persea_home() / "event_maps" / f"{digest[:32]}.eventmap"
    data = path.read_bytes() if path.is_file() else b""
    if (
        data and hashlib.sha256(data[32:]).digest() == data[:32]
    ):  # else damaged: it is only a copy of what build() makes again
        kept = load_tensors(data[32:])
        bridge = EventMap(kept["teacher"], kept["student"], int(kept["events"][0]), digest)  # type: ignore[arg-type]
        if "teacher_first" not in kept:
            return bridge
        keepers = [
            get_token_order(
                v.vocabulary, BpeDerivations(*(kept[f"{side}_{name}"] for name in BPE_ARRAY_NAMES))
            )  # type: ignore[arg-type]
            for side, v in (("teacher", teacher), ("student", student))
        ]
        return _with_masks(
            bridge, keepers[0], keepers[1], kept["teacher_first"], kept["student_first"]
        )
    bridge = build_event_map(teacher, student)
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "teacher": bridge.teacher_event_W,
        "student": bridge.student_event_V,
        "events": np.array([bridge.num_events]),
    }
    if bridge.teacher_mask and bridge.student_mask:
        tensors |= {
            "teacher_first": bridge.teacher_mask.first_token_W,
            "student_first": bridge.student_mask.first_token_W,
        }
        for side, keeper in (
            ("teacher", bridge.student_mask.other),
            ("student", bridge.teacher_mask.other),
        ):
            tensors |= {
                f"{side}_{name}": getattr(keeper.derivations, name) for name in BPE_ARRAY_NAMES
            }
    body = save_tensors(tensors)
    store.write_atomic(path, hashlib.sha256(body).digest() + body)
    return bridge


def _with_masks(
    event_map: EventMap,
    teacher_order: TokenOrder,
    student_order: TokenOrder,
    teacher_first_token_W: npt.NDArray[np.integer],
    student_first_token_V: npt.NDArray[np.integer],
) -> EventMap:
    return replace(
        event_map,
        teacher_mask=BoundaryMask(student_order, teacher_order, teacher_first_token_W),
        student_mask=BoundaryMask(teacher_order, student_order, student_first_token_V),
    )


def build_event_map(teacher: ChatRenderer, student: ChatRenderer) -> EventMap:
    """Lay two vocabularies over the same events. The same tokenizer on both sides, ending turns alike, gives the identity."""
    t, s = teacher.vocabulary, student.vocabulary
    digest = event_map_digest(teacher, student)
    if t.digest == s.digest and teacher.stop_ids == student.stop_ids:
        same = np.arange(len(t), dtype=np.int32)
        return EventMap(same, same.copy(), len(t), digest)
    s_of_W, t_of_V = first_tokens(t, s), first_tokens(s, t)
    names_W, names_V = (
        canonical_fixpoints(t, s, s_of_W, t_of_V),
        canonical_fixpoints(s, t, t_of_V, s_of_W),
    )
    numbers: dict[bytes, int] = {}
    events_W = _number_events(names_W, numbers)
    events_V = _number_events(names_V, numbers)
    events_W[list(teacher.stop_ids)] = 0
    events_V[list(student.stop_ids)] = 0
    return _with_masks(
        EventMap(events_W, events_V, len(numbers) + 2, digest),
        get_token_order(t),
        get_token_order(s),
        s_of_W,
        t_of_V,
    )


def _number_events(
    fixpoints: Sequence[bytes | None], event_numbers: dict[bytes, int]
) -> npt.NDArray[np.int32]:
    """Event numbers of byte strings; spaces and tabs are one event, or 12-23 % of code rows disagree about their length."""
    out = np.full(len(fixpoints), -1, np.int32)
    for i, name in enumerate(fixpoints):
        if name is not None:
            out[i] = (
                1
                if not name.strip(b" \t")
                else event_numbers.setdefault(name, len(event_numbers) + 2)
            )
    return out


def canonical_fixpoints(
    own: Vocabulary,
    other: Vocabulary,
    other_of_own: npt.NDArray[np.int64],
    own_of_other: npt.NDArray[np.int64],
) -> list[bytes | None]:
    """Byte string of each own token's canonical fixpoint; None for control tokens.

    Each round trip gives a prefix; where it is a shorter one it goes on, so it ends after at most a token's length.
    """
    current = np.arange(len(own))
    active = other_of_own >= 0
    names: list[bytes | None] = [None] * len(own)
    while active.any():
        at = np.flatnonzero(active)
        there = other_of_own[current[at]]
        back = own_of_other[there]
        for i, u, v in zip(at.tolist(), there.tolist(), back.tolist(), strict=True):
            if (
                own.bytes_W[v] == other.bytes_W[u] and other_of_own[v] == u
            ):  # a token its own tokenizer would cut is no fixpoint
                names[i] = other.bytes_W[u]
                active[i] = False
            else:
                current[i] = v
    return names


def first_tokens(source: Vocabulary, target: Vocabulary) -> npt.NDArray[np.int64]:
    """For each source token, the first token of its bytes encoded by the target; -1 for control tokens.

    A token that is no valid text (a piece of a character), or that the target's normaliser would rewrite, is encoded
    below the normaliser, byte by byte. Raises DataError where the target cannot say a byte at all.
    """
    out = np.full(len(source), -1, np.int64)
    texts: list[tuple[int, str]] = []
    for i, raw in enumerate(source.bytes_W):
        if raw is None:
            continue
        try:
            texts.append((i, raw.decode()))
        except UnicodeDecodeError:
            out[i] = _first_token_below_normalizer(raw, source, target)
    encodings = target.backend.encode_batch_fast([t for _, t in texts], add_special_tokens=False)
    for (i, text), encoding in zip(texts, encodings, strict=True):
        first = encoding.ids[0] if encoding.ids else -1
        piece = target.bytes_W[first] if first >= 0 else None
        out[i] = (
            first
            if piece and text.encode().startswith(piece)
            else _first_token_below_normalizer(text.encode(), source, target)
        )
    return out


def first_token_of_bytes(raw: bytes, source: Vocabulary, target: Vocabulary) -> int:
    """First token of some bytes in the target's encoding, whether they are text or not. Raises DataError where it cannot say them."""
    try:
        ids = target.backend.encode(raw.decode(), add_special_tokens=False).ids
    except UnicodeDecodeError:
        ids = []
    piece = target.bytes_W[ids[0]] if ids else None
    return (
        ids[0]
        if piece and raw.startswith(piece)
        else _first_token_below_normalizer(raw, source, target)
    )


def _first_token_below_normalizer(raw: bytes, source: Vocabulary, target: Vocabulary) -> int:
    if target.byte_level:
        tokens = target.backend.model.tokenize("".join(BYTE_TO_CHAR[b] for b in raw))
        candidates: list[int | None] = [tokens[0].id] if tokens else []
    else:
        text = _valid_utf8_prefix(raw)
        candidates = (
            [*target.backend.encode(text, add_special_tokens=False).ids[:1]] if text else []
        )
        candidates.append(
            target.backend.token_to_id(f"<0x{raw[0]:02X}>")
        )  # also where a literal ▁ would come back as a space
    for first in candidates:
        piece = target.bytes_W[first] if first is not None else None
        if first is not None and piece and raw.startswith(piece):
            return first
    raise DataError(
        f"{target.name} cannot say the bytes {raw[:8].hex(' ')} of a token of {source.name}",
        where=f"{source.name} -> {target.name}",
        remedy="the target's vocabulary lacks single bytes; use another student or teacher",
    )


def _valid_utf8_prefix(raw: bytes) -> str:
    """The longest start of some bytes that is text."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start].decode()
