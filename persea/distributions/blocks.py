"""Logits of some positions with the sums of their exponentials by blocks of the vocabulary.

A block is BLOCK_TOKENS consecutive tokens. The sums are made while a strip of logits is in the
processor's cache, and they are all that a sample or a selection of likely tokens needs to know of
most blocks: only the few blocks that hold a stored entry are read again, in float64. Nothing else
passes over the vocabulary, and no softmax of it exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea.distributions.sparse import MASS_TOLERANCE, validate_logprobs

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 256
LIKELY_BLOCK = 1e-3  # float32 sums of blocks below this are off by less than 1e-10
# Tokens of a strip on a CPU: 2 MiB for 256 positions, which the cache of one core holds. Whole
# blocks. Other devices take the vocabulary at once.
STRIP_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class BlockedLogits:
    """Logits of N positions. W = vocabulary in whole blocks, B = blocks, K = BLOCK_TOKENS.

    Attributes:
        logits_NW: float32; -inf past the vocabulary.
        vocab_size: Number of tokens.
        max_NB: float32, the largest logit of each block.
        log_sum_NB: float64, ln of the sum of exp(logits) of each block.
        log_total_N: float64, what is subtracted from a logit to give its log-probability: ln of the
            sum over all tokens, or 0 where the logits are log-probabilities.
    """

    logits_NW: torch.Tensor
    vocab_size: int
    max_NB: torch.Tensor
    log_sum_NB: torch.Tensor
    log_total_N: torch.Tensor

    def __len__(self) -> int:
        return len(self.logits_NW)

    def rows(self, begin: int, end: int) -> BlockedLogits:
        """Return some of the positions, without a copy."""
        return BlockedLogits(
            self.logits_NW[begin:end],
            self.vocab_size,
            self.max_NB[begin:end],
            self.log_sum_NB[begin:end],
            self.log_total_N[begin:end],
        )

    @property
    def prob_NB(self) -> torch.Tensor:
        """Probability of each block, float64."""
        return (self.log_sum_NB - self.log_total_N[:, None]).exp()

    @property
    def max_prob_NB(self) -> torch.Tensor:
        """Largest probability of each block, float64."""
        return (self.max_NB.double() - self.log_total_N[:, None]).exp()

    def exact_mass(self) -> torch.Tensor:
        """Return the sum of each position's probabilities, float64, to within 1e-9.

        The sum of a block is float32, in which a token of 1e-8 beside a certain one is lost.
        """
        prob_NB = self.prob_NB
        row_P, block_P = (prob_NB >= LIKELY_BLOCK).nonzero(as_tuple=True)
        prob_NB[row_P, block_P] = self.block_logprobs(row_P, block_P).exp().sum(1)
        return prob_NB.sum(1)

    def block_logprobs(self, row_P: torch.Tensor, block_P: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of some blocks, float64 [P, K]."""
        logit_PK = self.block_values(row_P, block_P)
        return logit_PK.double() - self.log_total_N[row_P][:, None]

    def block_values(self, row_P: torch.Tensor, block_P: torch.Tensor) -> torch.Tensor:
        """Return the logits of some blocks, [P, K]."""
        found: torch.Tensor = _in_blocks(self.logits_NW)[row_P, block_P]
        return found

    def token_logprobs(self, ids_N: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Return the natural log-probability of one token of each position."""
        import torch

        id_N1 = torch.from_numpy(np.asarray(ids_N, np.int64))[:, None].to(self.logits_NW.device)
        logprob_N = self.logits_NW.gather(1, id_N1)[:, 0].double() - self.log_total_N
        return np.asarray(logprob_N.float().cpu().numpy())

    def kl_to(self, log_frequency_W: torch.Tensor) -> torch.Tensor:
        """Return KL(p || frequency) of each position in nats, float64.

        Args:
            log_frequency_W: float32, ln of a distribution over the tokens.
        """
        import torch

        kl_N = torch.zeros_like(self.log_total_N)
        step = strip_tokens(self.logits_NW)
        for begin in range(0, self.vocab_size, step):
            end = min(begin + step, self.vocab_size)
            # Sums of at most a strip are float32; a strip's own largest logit is its zero.
            max_N1 = self.logits_NW[:, begin:end].amax(1, keepdim=True).clamp(min=-1e30)
            x_NS = self.logits_NW[:, begin:end] - max_N1
            mass_N1 = (max_N1[:, 0].double() - self.log_total_N).exp()
            e_NS = x_NS.exp()
            cross_N = (x_NS.clamp_(min=-1e4).sub_(log_frequency_W[begin:end]).mul_(e_NS)).sum(1)
            base_N = (max_N1[:, 0].double() - self.log_total_N) * e_NS.sum(1).double()
            kl_N += mass_N1 * (cross_N.double() + base_N)
        return kl_N


def strip_tokens(like: torch.Tensor) -> int:
    """Return how many tokens are processed at a time on a tensor's device."""
    return STRIP_TOKENS if like.device.type == "cpu" else 1 << 30


class LogitBuffer:
    """Memory for logits that is used again.

    The system clears new memory page by page, which takes a part of the time of a large head.
    """

    def __init__(self) -> None:
        self._flat: torch.Tensor | None = None

    def rows(self, num_rows: int, width: int, device: torch.device) -> torch.Tensor:
        """Return memory [num_rows, width], float32; the next call may return the same."""
        import torch

        size = num_rows * width
        if self._flat is None or len(self._flat) < size or self._flat.device != device:
            self._flat = torch.empty(size, device=device)
        return self._flat[:size].view(num_rows, width)


def block_logits(
    num_rows: int,
    vocab_size: int,
    write_strip: Callable[[torch.Tensor, int, int], None],
    device: torch.device,
    buffer: LogitBuffer | None = None,
) -> BlockedLogits:
    """Make logits strip by strip, and sum each strip while it is in the cache.

    Args:
        num_rows: Positions N.
        vocab_size: Number of tokens.
        write_strip: Called as write_strip(out_NS, begin, end): writes the logits of the tokens
            [begin, end).
        device: Where the logits are made.
        buffer: Memory for the logits, which the next call with it overwrites; None = new.
    """
    import torch

    width = -(-vocab_size // BLOCK_TOKENS) * BLOCK_TOKENS
    logits_NW = (buffer or LogitBuffer()).rows(num_rows, width, device)
    logits_NW[:, vocab_size:] = -torch.inf
    step = min(strip_tokens(logits_NW), width)
    max_NB = torch.empty(num_rows, width // BLOCK_TOKENS, device=device)
    sum_NB = torch.empty_like(max_NB)
    scratch = torch.empty(num_rows, step // BLOCK_TOKENS, BLOCK_TOKENS, device=device)
    for begin in range(0, width, step):
        end = min(begin + step, vocab_size)
        write_strip(logits_NW[:, begin:end], begin, end)
        _sum_blocks(logits_NW, begin, min(begin + step, width), max_NB, sum_NB, scratch)
    log_sum_NB = max_NB.double() + sum_NB.double().log()
    return BlockedLogits(
        logits_NW, vocab_size, max_NB, log_sum_NB, torch.logsumexp(log_sum_NB, dim=1)
    )


def _in_blocks(logits_NW: torch.Tensor) -> torch.Tensor:
    """Return a view [N, B, K] of logits in whole blocks."""
    n, width = logits_NW.shape
    return logits_NW.view(n, width // BLOCK_TOKENS, BLOCK_TOKENS)


def _sum_blocks(
    logits_NW: torch.Tensor,
    begin: int,
    end: int,
    max_NB: torch.Tensor,
    sum_NB: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Write the maxima and the sums of exp(logit - maximum) of the blocks in [begin, end)."""
    import torch

    blocks = slice(begin // BLOCK_TOKENS, end // BLOCK_TOKENS)
    part_NBK = _in_blocks(logits_NW[:, begin:end])
    torch.amax(part_NBK, dim=-1, out=max_NB[:, blocks])
    shift_NB1 = max_NB[:, blocks, None].clamp(min=-1e30)  # a block of -inf alone has the sum 0
    minus = torch.sub(part_NBK, shift_NB1, out=scratch[:, : blocks.stop - blocks.start])
    torch.sum(minus.exp_(), dim=-1, out=sum_NB[:, blocks])


def blocks_of_logits(logits_NV: torch.Tensor) -> BlockedLogits:
    """Sum the blocks of logits that exist.

    Args:
        logits_NV: Logits [positions, vocabulary]; one value may be added to all of a position.
    """

    def copy_strip(out_NS: torch.Tensor, begin: int, end: int) -> None:
        out_NS.copy_(logits_NV[:, begin:end])

    return block_logits(len(logits_NV), logits_NV.shape[1], copy_strip, logits_NV.device)


def blocks_of_logprobs(
    logprobs_NW: torch.Tensor, span: slice, where: str, is_complete: bool
) -> BlockedLogits:
    """Sum the blocks of some positions' log-probabilities, which stay as they are.

    Args:
        logprobs_NW: Natural log-probabilities.
        span: The positions.
        where: The place for error messages.
        is_complete: Whether a sum of probabilities below 1 is refused too.

    Raises:
        DataError: A position is no distribution (`validate_logprobs`).
    """
    import torch

    blocked = blocks_of_logits(logprobs_NW[span])
    mass_N = blocked.log_total_N.exp()
    least = 1 - MASS_TOLERANCE if is_complete else -1.0
    # The comparison is also False for NaN and for a probability above 1.
    if not bool(((mass_N >= least) & (mass_N <= 1 + MASS_TOLERANCE)).all()):
        validate_logprobs(logprobs_NW, where, is_complete)
    return replace(blocked, log_total_N=torch.zeros_like(blocked.log_total_N))
