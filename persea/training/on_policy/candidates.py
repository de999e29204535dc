"""Likely: of many distributions the tokens worth asking about.

Of a real vocabulary nearly all tokens are next to impossible at any place, and to ask a mask for each of them takes seconds a place
(bench/beside.py). Of that bench's rows, less sure than a model's, 830 to 910 tokens have LIKELY or more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from persea.losses import Head

Ints = npt.NDArray[np.int64]
NONE = np.empty(0, np.int64)
LIKELY = 1e-4
AT_ONCE = 1 << 24  # logits that stand at once: 64 MiB in float32


@dataclass(frozen=True)
class Likely:
    """By learned position of the student, counted through the answers: its likely tokens, sorted."""

    offsets_L1: Ints
    ids_M: Ints

    def at(self, place: int) -> Ints:
        return self.ids_M[self.offsets_L1[place]:self.offsets_L1[place + 1]]

    def within(self, first: int, last: int) -> Likely:
        return Likely(self.offsets_L1[first:last + 1], self.ids_M)


@torch.no_grad()
def likely_behind(hidden_LD: torch.Tensor, head: Head, least: float = LIKELY) -> Likely:
    """The tokens of probability `least` or more behind each of the hidden states that the head is given."""
    parts = [likely_in(torch.log_softmax(head.logits(some_ND), -1), least) for some_ND in torch.split(hidden_LD, max(1, AT_ONCE // head.vocabulary))]
    counts = np.concatenate([NONE, *(np.diff(one.offsets_L1) for one in parts)])
    return Likely(np.concatenate([[0], np.cumsum(counts)]), np.concatenate([NONE, *(one.ids_M for one in parts)]))


def likely_in(logprobs_NV: torch.Tensor, least: float) -> Likely:
    """Those of some rows of natural log-probabilities."""
    row_M, id_M = (logprobs_NV >= math.log(least)).nonzero(as_tuple=True)
    counts_N = torch.bincount(row_M, minlength=len(logprobs_NV)).cpu().numpy()
    return Likely(np.concatenate([[0], np.cumsum(counts_N)]), id_M.cpu().numpy())
