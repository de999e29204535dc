"""Reduce a teacher's full distributions to the entries that a cache stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea.distributions import (
    DistributionKind,
    SparseDistributions,
    sample_distributions,
    topk_within_kl,
)
from persea.teachers.teacher import Answer
from persea.tokenization.tokens import RenderedTokens

if TYPE_CHECKING:
    import torch

# added to the count of each token in the unit: the counts spread the rest of a topk distribution
REST_SMOOTHING_COUNT = 1


@dataclass(frozen=True)
class DistributionSparsifier:
    """Reduces a full distribution to the entries that are stored. Give either tau or max_kl.

    Attributes:
        seed: Seed of the sample.
        tau: Store an unbiased sample: tokens below this probability are kept by chance.
        max_kl: Store the likeliest tokens, and spread the rest so that at most this KL divergence,
            in nats, is lost.
    """

    seed: int
    tau: float | None = None
    max_kl: float | None = None

    @property
    def kind(self) -> DistributionKind:
        """The kind of the stored distributions."""
        return DistributionKind.SAMPLED if self.max_kl is None else DistributionKind.TOPK

    def sparsify(
        self,
        teacher_name: str,
        answer: Answer,
        tokens: RenderedTokens,
        logprobs_NW: torch.Tensor,
        token_counts_W: npt.NDArray[np.int64],
        row_offset: int = 0,
    ) -> SparseDistributions:
        """Reduce consecutive distributions of an answer.

        Args:
            teacher_name: Name of the teacher; part of the seed.
            answer: The answer.
            tokens: The rendered conversation.
            logprobs_NW: The teacher's log-probabilities, in nats.
            token_counts_W: int64, how often each token occurs in the unit's answers. The counts
                spread the rest of a topk distribution.
            row_offset: Number of the first distribution within the answer.
        """
        target_N = tokens.ids_T[tokens.loss_mask_T][row_offset : row_offset + len(logprobs_NW)]
        if self.max_kl is not None:
            smoothed_W = token_counts_W + REST_SMOOTHING_COUNT
            return topk_within_kl(
                logprobs_NW,
                target_N,
                self.max_kl,
                smoothed_W / smoothed_W.sum(),
                f"prompt {answer.prompt_id}",
            )
        if self.tau is None:
            raise AssertionError("give either tau or max_kl")
        return sample_distributions(
            logprobs_NW,
            target_N,
            self.tau,
            f"{self.seed} {teacher_name} {answer.prompt_id}",
            row_offset,
        )
