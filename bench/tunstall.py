"""Worlds without a longest string: two Tunstall codes over one Markov source.

The tokens of a Tunstall code are the leaves of a complete tree over the alphabet, so every text has
one segmentation, found token by token without look-ahead: a boundary carries no information about
the next bytes, and P(token | last byte) is a product of the source's steps. The common events of
two such codes are the leaves of the intersection of both trees, and both maps always agree. So
every comparison of events, first bytes and chunks is exactly zero, however long the text: a test of
numerics and packing at length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from persea.alignment.event_map import EventMap
from persea.tokenization.tokens import RenderedTokens

SOURCE: Mapping[str, Mapping[str, float]] = {  # after "" (the text begins), a, b, c
    "": {"a": 0.5, "b": 0.3, "c": 0.2},
    "a": {"a": 0.1, "b": 0.7, "c": 0.2},
    "b": {"a": 0.6, "b": 0.1, "c": 0.3},
    "c": {"a": 0.25, "b": 0.15, "c": 0.6},
}


def logprob(
    text: str, after: str = "", source: Mapping[str, Mapping[str, float]] = SOURCE
) -> float:
    """Return the natural log-probability of a text after a byte."""
    return sum(
        math.log(source[a][b])
        for a, b in zip(after + text[:-1] if after else ["", *text[:-1]], text, strict=True)
    )


def code(leaves: int, after: str) -> tuple[str, ...]:
    """Build a code by splitting the likeliest leaf until there are enough leaves.

    Likelihoods are those after one byte, so that two codes can differ.
    """
    tokens = {c: SOURCE[after][c] for c in SOURCE[""]}
    while len(tokens) < leaves:
        best = max(tokens, key=lambda t: (tokens[t], t))
        p = tokens.pop(best)
        tokens |= {best + c: p * step for c, step in SOURCE[best[-1]].items()}
    return tuple(sorted(tokens))


@dataclass(frozen=True)
class Code:
    """One tokenizer: its tokens, each the leaf of a complete prefix-free tree."""

    tokens: tuple[str, ...]

    @cached_property
    def number(self) -> dict[str, int]:
        return {t: i for i, t in enumerate(self.tokens)}

    def parse(self, text: str) -> list[int]:
        """Return the tokens of a text, up to the last whole one."""
        ids, begin = [], 0
        for end in range(1, len(text) + 1):
            found = self.number.get(text[begin:end])
            if found is not None:
                ids.append(found)
                begin = end
        return ids

    def row(self, after: str) -> npt.NDArray[np.float64]:
        """Return the natural log-probability of every token after a byte, in closed form."""
        return np.array([logprob(t, after) for t in self.tokens])

    def rendered(self, ids: list[int]) -> RenderedTokens:
        """Return the tokens with their byte offsets, all supervised."""
        ends = np.cumsum([len(self.tokens[i]) for i in ids])
        starts = np.concatenate([[0], ends[:-1]])
        return RenderedTokens(
            np.array(ids, np.int32),
            starts.astype(np.int32),
            ends.astype(np.int32),
            np.ones(len(ids), np.bool_),
        )


def event_map(teacher: Code, student: Code) -> EventMap:
    """Map each token to its shortest prefix that is a token of either code."""
    leaves = {*teacher.tokens, *student.tokens}

    def event(token: str) -> str:
        return next(token[:n] for n in range(1, len(token) + 1) if token[:n] in leaves)

    names = sorted({event(t) for t in leaves})
    number = {name: i for i, name in enumerate(names)}
    events_W, events_V = (
        np.array([number[event(t)] for t in side.tokens], np.int32) for side in (teacher, student)
    )
    return EventMap(events_W, events_V, len(names), "tunstall")


def sample(length: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    letters, text = list(SOURCE[""]), ""
    steps = {after: np.cumsum([row[c] for c in letters]) for after, row in SOURCE.items()}
    out, last = [], ""
    for u in rng.random(length).tolist():
        last = letters[min(int(np.searchsorted(steps[last], u, side="right")), len(letters) - 1)]
        out.append(last)
    return text + "".join(out)
