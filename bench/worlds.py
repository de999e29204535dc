"""Exact worlds: one distribution over strings, and two tokenizers' exact models of it.

Both models define the same distribution over bytes, so an unbiased comparison of them finds zero;
any other value is the floor of the method: how far it pushes a PERFECT student away. Finite worlds
are counted string by string (order-1 Markov over {a, b, c, space}, at most six characters, 5,460
strings); for worlds without a longest string see bench/tunstall.py.

A common boundary carries information about the next bytes: the teacher's row is conditioned on the
teacher's boundary, the student's on the student's. `Boundary` holds both rows, and both again
conditioned on BOTH boundaries, counted exactly. Tokens are numbered as columns: only those that
occur. W, V: columns of teacher and student; C boundaries; R student prefixes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from persea.alignment.event_map import EventMap, build_event_map
from persea.chat.families.llama import LLAMA
from persea.chat.renderer import ChatRenderer
from persea.tokenization.vocabulary import BYTE_TO_CHAR, load_vocabulary

Merges: TypeAlias = tuple[tuple[str, str], ...]
Prefix: TypeAlias = tuple[int, ...]
Law: TypeAlias = dict[str, float]
Steps: TypeAlias = Mapping[str, Sequence[float]]
Floats: TypeAlias = npt.NDArray[np.float64]

ALPHABET, LONGEST = "abc ", 6
STEPS: Steps = {  # after no character, after a, ...: a, b, c, space, the string ends
    "": (0.1465, 0.2763, 0.1328, 0.1085, 0.3359),
    "a": (0.2607, 0.4515, 0.0604, 0.0156, 0.2118),
    "b": (0.0722, 0.7295, 0.0891, 0.0899, 0.0193),
    "c": (0.2027, 0.1769, 0.2374, 0.2566, 0.1264),
    " ": (0.0473, 0.0220, 0.3444, 0.5139, 0.0724),
}
WORDS = r" ?[abc]+| +(?!\S)| +"
WORLDS: dict[
    str, tuple[Merges, Merges, bool]
] = {  # teacher's merges, student's merges, split into words first
    "same": ((("a", "b"), ("b", "c")), (("a", "b"), ("b", "c")), False),
    "nested": ((("a", "b"), ("b", "c")), (("a", "b"), ("b", "c"), ("ab", "c"), ("a", "a")), False),
    "crossing": (
        (("a", "b"), ("b", "c"), ("ab", "a")),
        (("b", "c"), ("a", "b"), ("c", "c")),
        False,
    ),
    "words": (
        (("a", "b"), ("b", "c"), (" ", "a"), (" a", "b")),
        (("b", "c"), (" ", "a"), (" ", "b"), (" a", "bc"), ("c", "c")),
        True,
    ),
    "long": (
        (("a", "b"), ("ab", "c"), ("abc", "a"), ("c", "c"), ("b", "b")),
        (("b", "c"), ("a", "a"), ("c", "a")),
        False,
    ),
}


# --- laws and tokenizers ---


def markov(steps: Steps = STEPS, longest: int = LONGEST) -> Law:
    """Return every non-empty string up to a length with its probability.

    A string of the full length ends with probability one.
    """
    law: Law = {}

    def grow(text: str, p: float) -> None:
        if text:
            law[text] = p * steps[text[-1]][-1] if len(text) < longest else p
        if len(text) < longest:
            for c, step in zip(ALPHABET, steps[text[-1:]][:-1], strict=True):
                grow(text + c, p * step)

    grow("", 1.0)
    total = sum(law.values())
    return {text: p / total for text, p in law.items()}


def tilted(after: str, to: int, eps: float) -> Steps:
    """Return STEPS with one entry of one row multiplied by exp(eps), the row renormalised."""
    row = np.array(STEPS[after])
    row[to] *= math.exp(eps)
    return {**STEPS, after: tuple((row / row.sum()).tolist())}


def toy(merges: Merges, in_words: bool, name: str, missing: bytes = b"") -> ChatRenderer:
    """Build a real byte-level BPE with 256 bytes, these merges, and one stop token.

    Args:
        merges: The merges, in order of rank.
        in_words: Split into words first.
        name: Name in messages.
        missing: Bytes without a token, as real vocabularies lack some.
    """

    def spell(piece: str) -> str:
        return "".join(BYTE_TO_CHAR[b] for b in piece.encode())

    single = [BYTE_TO_CHAR[b] for b in range(256) if b not in missing]
    pieces = [*single, *(spell(a + b) for a, b in merges)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[(spell(a), spell(b)) for a, b in merges],
        )
    )
    split = [pre_tokenizers.Split(Regex(WORDS), "isolated")] if in_words else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return ChatRenderer(
        replace(LLAMA, stop_tokens=("<|end|>",)),
        load_vocabulary(tokenizer, name),
        lambda messages, **_: "",
        "",
    )


@dataclass(frozen=True)
class Exact:
    """A tokenizer's exact model of a distribution. Prefixes and rows use the tokenizer's own ids.

    ids    string -> its tokens, the stop token last
    mass   token prefix -> probability that a string's tokens start with it
    next   token prefix -> next token -> probability
    """

    ids: dict[str, Prefix]
    mass: dict[Prefix, float]
    next: dict[Prefix, dict[int, float]]

    def logprob(self, text: str) -> float:
        """Apply the chain rule along the string's own tokens."""
        ids = self.ids[text]
        return sum(math.log(self.next[ids[:k]][token]) for k, token in enumerate(ids))


def encode(renderer: ChatRenderer, texts: Sequence[str]) -> dict[str, Prefix]:
    vocabulary = renderer.vocabulary
    ids = vocabulary.encode_batch([vocabulary.prefix_space_before(t) + t for t in texts])
    return {t: (*some, renderer.stop_ids[0]) for t, some in zip(texts, ids, strict=True)}


def exact(ids: dict[str, Prefix], law: Law) -> Exact:
    mass: dict[Prefix, float] = defaultdict(float)
    joint: dict[Prefix, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for text, p in law.items():
        for k, token in enumerate(ids[text]):
            mass[ids[text][:k]] += p
            joint[ids[text][:k]][token] += p
        mass[ids[text]] += p
    return Exact(
        ids,
        dict(mass),
        {prefix: {v: p / mass[prefix] for v, p in row.items()} for prefix, row in joint.items()},
    )


def starts(renderer: ChatRenderer, ids: Sequence[int]) -> Iterator[int]:
    """Yield the first byte of each token; the stop token starts at the end of the string.

    A space that the tokenizer puts before the string lies at byte -1.
    """
    at = -len(renderer.vocabulary.prefix_space_before("a"))
    for i in ids:
        yield at
        at += len(renderer.vocabulary.bytes_W[i] or b"")


# --- both tokenizers over the same law ---


@dataclass(frozen=True, eq=False)
class Boundary:
    """A common boundary: a teacher prefix and a student prefix that end at the same byte.

    Over all strings that have both.

    mass           probability of these strings
    p_W, q_V       the models' own rows: conditioned on the own boundary only
    both_p_W, both_q_V  conditioned on both boundaries
    leak_W, leak_V  for each next token, the probability that the OTHER boundary is kept too (0
        where the token never follows)
    b_T, b_S       probability of the other's boundary given the own: sum p_W leak_W, sum q_V leak_V
    disagree       probability, given both, that the maps name different events for the next tokens
    joint          (teacher column, student column) -> probability given both
    """

    teacher: Prefix
    student: Prefix
    mass: float
    p_W: Floats
    q_V: Floats
    both_p_W: Floats
    both_q_V: Floats
    leak_W: Floats
    leak_V: Floats
    b_T: float
    b_S: float
    disagree: float
    joint: Mapping[tuple[int, int], float]


@dataclass(frozen=True, eq=False)
class Inside:
    """A student boundary inside a teacher token.

    teacher, student  prefixes; the teacher's ends before the token that is being written
    emitted        bytes of that token already written
    mass, q_V      of the strings with this boundary: their probability, and the distribution of
        their next student token
    p_W            the teacher's row at its last boundary, over longer tokens that start with
        `emitted`; not renormalised
    """

    teacher: Prefix
    student: Prefix
    emitted: bytes
    mass: float
    q_V: Floats
    p_W: Floats


@dataclass(frozen=True, eq=False)
class World:
    """Two renderers, a distribution, and both exact models. columns: the ids that occur,
    ascending.
    """

    name: str
    law: Law
    teacher: ChatRenderer
    student: ChatRenderer
    t: Exact
    s: Exact

    @cached_property
    def columns_W(self) -> npt.NDArray[np.int64]:
        return np.unique(np.concatenate([np.array(ids) for ids in self.t.ids.values()]))

    @cached_property
    def columns_V(self) -> npt.NDArray[np.int64]:
        return np.unique(np.concatenate([np.array(ids) for ids in self.s.ids.values()]))

    @cached_property
    def full_event_map(self) -> EventMap:
        """Persea's own event map, over whole vocabularies."""
        return build_event_map(self.teacher, self.student)

    @cached_property
    def event_map(self) -> EventMap:
        """The same maps over columns; events renumbered without those that never occur."""
        events_W, events_V = (
            self.full_event_map.teacher_event_W[self.columns_W],
            self.full_event_map.student_event_V[self.columns_V],
        )
        used, both = np.unique(np.concatenate([events_W, events_V]), return_inverse=True)
        return EventMap(
            both[: len(events_W)].astype(np.int32),
            both[len(events_W) :].astype(np.int32),
            len(used),
            self.full_event_map.digest,
        )

    def row_W(self, row: Mapping[int, float]) -> Floats:
        return _row(row, self.columns_W)

    def row_V(self, row: Mapping[int, float]) -> Floats:
        return _row(row, self.columns_V)

    def bytes_W(self) -> tuple[bytes | None, ...]:
        """Return the bytes of the columns; None = the stop token."""
        return tuple(self.teacher.vocabulary.bytes_W[i] for i in self.columns_W)

    def bytes_V(self) -> tuple[bytes | None, ...]:
        return tuple(self.student.vocabulary.bytes_W[i] for i in self.columns_V)

    def truth_RV(self) -> dict[Prefix, Floats]:
        """Return the true student's row of every student prefix that is not a whole string."""
        return {prefix: self.row_V(row) for prefix, row in self.s.next.items()}

    @cached_property
    def boundaries(self) -> tuple[Boundary, ...]:
        joint: dict[tuple[Prefix, Prefix], dict[tuple[int, int], float]] = defaultdict(
            lambda: defaultdict(float)
        )
        for text, p in self.law.items():
            t, s = self.t.ids[text], self.s.ids[text]
            for k, j in common(self, text):
                joint[t[:k], s[:j]][t[k], s[j]] += p
        at_W, at_V = (
            {int(i): n for n, i in enumerate(c)} for c in (self.columns_W, self.columns_V)
        )
        return tuple(
            self._boundary(*prefixes, {(at_W[w], at_V[v]): p for (w, v), p in cells.items()})
            for prefixes, cells in joint.items()
        )

    def _boundary(
        self, teacher: Prefix, student: Prefix, joint: dict[tuple[int, int], float]
    ) -> Boundary:
        mass = sum(joint.values())
        p_W, q_V = self.row_W(self.t.next[teacher]), self.row_V(self.s.next[student])
        both_W, both_V = np.zeros_like(p_W), np.zeros_like(q_V)
        for (w, v), p in joint.items():
            both_W[w] += p
            both_V[v] += p
        mass_t, mass_s = self.t.mass[teacher], self.s.mass[student]
        leak_W, leak_V = (
            np.divide(x, m * y, out=np.zeros_like(x), where=y > 0)
            for x, m, y in ((both_W, mass_t, p_W), (both_V, mass_s, q_V))
        )
        events_W, events_V = self.event_map.teacher_event_W, self.event_map.student_event_V
        disagree = sum(p for (w, v), p in joint.items() if events_W[w] != events_V[v]) / mass
        return Boundary(
            teacher,
            student,
            mass,
            p_W,
            q_V,
            both_W / mass,
            both_V / mass,
            leak_W,
            leak_V,
            mass / mass_t,
            mass / mass_s,
            disagree,
            {cell: p / mass for cell, p in joint.items()},
        )

    @cached_property
    def insides(self) -> tuple[Inside, ...]:
        joint: dict[tuple[Prefix, Prefix, bytes], dict[int, float]] = defaultdict(
            lambda: defaultdict(float)
        )
        for text, p in self.law.items():
            t, s = self.t.ids[text], self.s.ids[text]
            begin_t = list(starts(self.teacher, t))
            for j, at in enumerate(starts(self.student, s)):
                k = int(np.searchsorted(begin_t, at, side="right")) - 1
                if 0 <= begin_t[k] != at:
                    joint[t[:k], s[:j], text.encode()[begin_t[k] : at]][s[j]] += p
        return tuple(self._inside(*key, cells) for key, cells in joint.items())

    def _inside(
        self, teacher: Prefix, student: Prefix, emitted: bytes, cells: Mapping[int, float]
    ) -> Inside:
        mass = sum(cells.values())
        goes_on = np.array(
            [
                b is not None and len(b) > len(emitted) and b.startswith(emitted)
                for b in self.bytes_W()
            ]
        )
        return Inside(
            teacher,
            student,
            emitted,
            mass,
            self.row_V(cells) / mass,
            np.where(goes_on, self.row_W(self.t.next[teacher]), 0.0),
        )


def _row(row: Mapping[int, float], columns: npt.NDArray[np.int64]) -> Floats:
    out = np.zeros(len(columns))
    out[np.searchsorted(columns, list(row))] = list(row.values())
    return out


def common(world: World, text: str) -> list[tuple[int, int]]:
    """Return the index pairs (teacher token, student token) that start at the same byte.

    The stop tokens come last.
    """
    at_s = {at: j for j, at in enumerate(starts(world.student, world.s.ids[text])) if at >= 0}
    return [
        (k, at_s[at]) for k, at in enumerate(starts(world.teacher, world.t.ids[text])) if at in at_s
    ]


def world(name: str, law: Law | None = None) -> World:
    """Return one of WORLDS, with the Markov distribution or another over the same characters."""
    merges_t, merges_s, in_words = WORLDS[name]
    law = markov() if law is None else law
    teacher, student = toy(merges_t, in_words, "teacher"), toy(merges_s, in_words, "student")
    return of_renderers(name, law, teacher, student)


def lacking_bytes(name: str, law: Law) -> World:
    """Return one of WORLDS whose teacher and student each lack bytes that the other has.

    No string has them, but both vocabularies hold tokens with the other's bytes.
    """
    merges_t, merges_s, in_words = WORLDS[name]
    return of_renderers(
        name,
        law,
        toy((*merges_t, ("y", "a"), ("b", "y")), in_words, "teacher", b"\x04x\xc0\xff"),
        toy((("x", "a"), *merges_s, ("a", "x")), in_words, "student", b"\x06y\xc0\xf1"),
    )


def of_renderers(name: str, law: Law, teacher: ChatRenderer, student: ChatRenderer) -> World:
    """Return the world of two tokenizers that can both write every string of a distribution."""
    return World(
        name,
        law,
        teacher,
        student,
        exact(encode(teacher, list(law)), law),
        exact(encode(student, list(law)), law),
    )


@dataclass(frozen=True)
class Chunk:
    """The tokens of one string from one common boundary to the next. Natural logs.

    weight         the string's probability
    begin, end     index into World.boundaries; -1 = the string ends
    teacher_ids, student_ids  its tokens; teacher, student  their log-probabilities
    """

    weight: float
    begin: int
    end: int
    teacher_ids: Prefix
    student_ids: Prefix
    teacher: float
    student: float


def chunks(world: World) -> list[Chunk]:
    number = {(b.teacher, b.student): n for n, b in enumerate(world.boundaries)}
    out = []
    for text, p in world.law.items():
        t, s = world.t.ids[text], world.s.ids[text]
        places = [*common(world, text), (len(t), len(s))]
        for (k, j), (k2, j2) in pairwise(places):
            out.append(
                Chunk(
                    p,
                    number[t[:k], s[:j]],
                    number.get((t[:k2], s[:j2]), -1),
                    t[k:k2],
                    s[j:j2],
                    math.log(world.t.mass[t[:k2]] / world.t.mass[t[:k]]),
                    math.log(world.s.mass[s[:j2]] / world.s.mass[s[:j]]),
                )
            )
    return out
