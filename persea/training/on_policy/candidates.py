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

from persea.losses import LMHead

IntArray = npt.NDArray[np.int64]
NO_TOKENS = np.empty(0, np.int64)
MIN_CANDIDATE_PROB = 1e-4
MAX_LOGIT_ELEMENTS = 1 << 24  # logits that stand at once: 64 MiB in float32


@dataclass(frozen=True)
class CandidateTokens:
    """By learned position of the student, counted through the answers: its likely tokens, sorted."""

    offsets_L1: IntArray
    ids_M: IntArray

    def at(self, position: int) -> IntArray:
        return self.ids_M[self.offsets_L1[position] : self.offsets_L1[position + 1]]

    def slice_positions(self, first: int, last: int) -> CandidateTokens:
        return CandidateTokens(self.offsets_L1[first : last + 1], self.ids_M)


@torch.no_grad()
def candidates_from_hidden(
    hidden_LD: torch.Tensor, head: LMHead, min_prob: float = MIN_CANDIDATE_PROB
) -> CandidateTokens:
    """The tokens of probability `least` or more behind each of the hidden states that the head is given."""
    parts = [
        candidates_from_logprobs(torch.log_softmax(head.logits(some_ND), -1), min_prob)
        for some_ND in torch.split(hidden_LD, max(1, MAX_LOGIT_ELEMENTS // head.vocab_size))
    ]
    counts = np.concatenate([NO_TOKENS, *(np.diff(one.offsets_L1) for one in parts)])
    return CandidateTokens(
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate([NO_TOKENS, *(one.ids_M for one in parts)]),
    )


def candidates_from_logprobs(logprobs_NV: torch.Tensor, min_prob: float) -> CandidateTokens:
    """Those of some rows of natural log-probabilities."""
    row_M, id_M = (logprobs_NV >= math.log(min_prob)).nonzero(as_tuple=True)
    counts_N = torch.bincount(row_M, minlength=len(logprobs_NV)).cpu().numpy()
    return CandidateTokens(np.concatenate([[0], np.cumsum(counts_N)]), id_M.cpu().numpy())
