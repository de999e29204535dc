"""Candidate tokens: those of a distribution that are probable enough to test for impossibility.

Nearly all tokens of a real vocabulary have almost no probability at any position, and testing each
of them against a boundary mask takes seconds a position (bench/mask_cost.py). In that bench's
distributions, which are less peaked than a model's, 830 to 910 tokens have MIN_CANDIDATE_PROB or
more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from persea.losses import LMHead
from persea.tokenization.tokens import IntArray

NO_TOKENS = np.empty(0, np.int64)
MIN_CANDIDATE_PROB = 1e-4  # default of training.on_policy.min_candidate_prob
MAX_LOGIT_ELEMENTS = 1 << 24  # logits in memory at once: 64 MiB in float32


@dataclass(frozen=True)
class CandidateTokens:
    """Candidate tokens of L positions.

    Attributes:
        offsets_L1: start of each position's tokens in `ids_M`, and the end of the last.
        ids_M: token ids, sorted within a position.
    """

    offsets_L1: IntArray
    ids_M: IntArray

    def at(self, position: int) -> IntArray:
        """Return the tokens of a position."""
        return self.ids_M[self.offsets_L1[position] : self.offsets_L1[position + 1]]

    def slice_positions(self, first: int, last: int) -> CandidateTokens:
        """Return the tokens of positions first to last - 1."""
        return CandidateTokens(self.offsets_L1[first : last + 1], self.ids_M)


@torch.no_grad()
def candidates_from_hidden(
    hidden_LD: torch.Tensor, head: LMHead, min_prob: float = MIN_CANDIDATE_PROB
) -> CandidateTokens:
    """Return the tokens of at least `min_prob` at each position.

    Args:
        hidden_LD: hidden states before the head.
        head: the language-model head.
        min_prob: least probability of a candidate.
    """
    parts = [
        candidates_from_logprobs(torch.log_softmax(head.logits(part_ND), -1), min_prob)
        for part_ND in torch.split(hidden_LD, max(1, MAX_LOGIT_ELEMENTS // head.vocab_size))
    ]
    counts = np.concatenate([NO_TOKENS, *(np.diff(one.offsets_L1) for one in parts)])
    return CandidateTokens(
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate([NO_TOKENS, *(one.ids_M for one in parts)]),
    )


@torch.no_grad()
def mean_entropy(hidden_LD: torch.Tensor, head: LMHead, max_positions: int) -> float:
    """Return the mean entropy of the distributions at evenly spread positions, in nats.

    Args:
        hidden_LD: hidden states before the head, at least one.
        head: the language-model head.
        max_positions: positions to compute, at most.
    """
    count = min(max_positions, len(hidden_LD))
    at = torch.arange(count, device=hidden_LD.device) * len(hidden_LD) // count
    total = 0.0
    for part_ND in torch.split(hidden_LD[at], max(1, MAX_LOGIT_ELEMENTS // head.vocab_size)):
        logprobs_NV = torch.log_softmax(head.logits(part_ND).float(), -1)
        total -= float((logprobs_NV.exp() * logprobs_NV).sum())
    return total / count


def candidates_from_logprobs(logprobs_NV: torch.Tensor, min_prob: float) -> CandidateTokens:
    """Return the tokens of at least `min_prob` from natural log-probabilities."""
    row_M, id_M = (logprobs_NV >= math.log(min_prob)).nonzero(as_tuple=True)
    counts_N = torch.bincount(row_M, minlength=len(logprobs_NV)).cpu().numpy()
    return CandidateTokens(np.concatenate([[0], np.cumsum(counts_N)]), id_M.cpu().numpy())
