"""Reduce a teacher's full distributions to the entries that a cache stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from persea.distributions import DistributionKind, SparseDistributions
from persea.distributions.blocks import BlockedLogits
from persea.distributions.sampling import sample_blocks, uniform_draws
from persea.distributions.topk import topk_blocks_within_kl

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

    def for_answers(
        self,
        teacher_name: str,
        prompt_ids: Sequence[str],
        token_counts_W: npt.NDArray[np.int64] | None = None,
    ) -> AnswerReducer:
        """Return the reducer of some answers' distributions.

        Args:
            teacher_name: Name of the teacher; part of the seed.
            prompt_ids: Prompt of each answer; part of its seed.
            token_counts_W: int64, how often each token occurs in the unit's answers. The counts
                spread the rest of a topk distribution, and a sample needs none.
        """
        frequency_W = None
        if self.max_kl is not None:
            if token_counts_W is None:
                raise AssertionError("a topk distribution needs the counts of tokens")
            smoothed_W = token_counts_W + REST_SMOOTHING_COUNT
            frequency_W = smoothed_W / smoothed_W.sum()
        seeds = [f"{self.seed} {teacher_name} {prompt_id}" for prompt_id in prompt_ids]
        return AnswerReducer(self, seeds, frequency_W)


@dataclass(frozen=True, eq=False)
class AnswerReducer:
    """Reduces the distributions of some answers as an engine makes them. See Reducer.

    Attributes:
        sparsifier: What is stored.
        seeds: Name of each answer's draw.
        frequency_W: How often each token is expected, for topk.
    """

    sparsifier: DistributionSparsifier
    seeds: Sequence[str]
    frequency_W: npt.NDArray[np.float64] | None = None
    _draws: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)

    def reduce(
        self,
        blocks: BlockedLogits,
        index_N: npt.NDArray[np.int64],
        row_N: npt.NDArray[np.int64],
        target_N: npt.NDArray[np.int64],
    ) -> SparseDistributions:
        """Reduce some positions. A position depends on itself, its answer and its number alone."""
        if self.sparsifier.max_kl is not None:
            assert self.frequency_W is not None
            return topk_blocks_within_kl(blocks, target_N, self.sparsifier.max_kl, self.frequency_W)
        if self.sparsifier.tau is None:
            raise AssertionError("give either tau or max_kl")
        uniform_N = np.array(
            [self._draw(int(k), int(n)) for k, n in zip(index_N, row_N, strict=True)], np.float64
        )
        return sample_blocks(blocks, target_N, uniform_N, self.sparsifier.tau)

    def _draw(self, index: int, row: int) -> float:
        """Return the random number of one position, the `row`-th of its answer's draw."""
        drawn = self._draws.get(index, np.empty(0))
        if row >= len(drawn):
            drawn = self._draws[index] = uniform_draws(self.seeds[index], 2 * row + 64)
        return float(drawn[row])
