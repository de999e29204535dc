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
# Tokens that a CPU multiplies at a time. Whole blocks. Other devices take the vocabulary at once.
STRIP_TOKENS = 2048
# Positions of a strip that a CPU stores and sums at a time: 256 KiB, which a core's own cache holds
# from one pass to the next.
TILE_ROWS = 32


@dataclass(frozen=True, eq=False)
class BlockedLogits:
    """Logits of N positions. W = vocabulary in whole blocks, B = blocks, K = BLOCK_TOKENS.

    Attributes:
        logits_NW: float32, or the bfloat16 or float16 in which they were made; -inf past the
            vocabulary.
        vocab_size: Number of tokens.
        min_N: float32, the smallest logit of each position; NaN where one is NaN.
        max_NB: float32, the largest logit of each block.
        log_sum_NB: float64, ln of the sum of exp(logits) of each block.
        log_total_N: float64, what is subtracted from a logit to give its log-probability: ln of the
            sum over all tokens, or 0 where the logits are log-probabilities.
    """

    logits_NW: torch.Tensor
    vocab_size: int
    min_N: torch.Tensor
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
            self.min_N[begin:end],
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
        """Return the logits of some blocks, float32 [P, K]."""
        return _in_blocks(self.logits_NW)[row_P, block_P].float()

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
            strip_NS = self.logits_NW[:, begin:end].float()
            max_N1 = strip_NS.amax(1, keepdim=True).clamp(min=-1e30)
            x_NS = strip_NS - max_N1
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

    def rows(
        self, num_rows: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return memory [num_rows, width]; the next call may return the same."""
        import torch

        size, flat = num_rows * width, self._flat
        if flat is None or len(flat) < size or flat.device != device or flat.dtype is not dtype:
            flat = self._flat = torch.empty(size, device=device, dtype=dtype)
        return flat[:size].view(num_rows, width)


def block_logits(
    num_rows: int,
    vocab_size: int,
    make_strip: Callable[[int, int], torch.Tensor],
    device: torch.device,
    buffer: LogitBuffer | None = None,
    dtype: torch.dtype | None = None,
) -> BlockedLogits:
    """Make logits strip by strip; store and sum each strip while it is in the cache.

    Args:
        num_rows: Positions N.
        vocab_size: Number of tokens.
        make_strip: Called as make_strip(begin, end): returns the logits of the tokens [begin, end)
            of all positions.
        device: Where the logits are made.
        buffer: Memory for the logits, which the next call with it overwrites; None = new.
        dtype: In which they are stored; None = float32.
    """
    import torch

    width = -(-vocab_size // BLOCK_TOKENS) * BLOCK_TOKENS
    logits_NW = (buffer or LogitBuffer()).rows(num_rows, width, device, dtype or torch.float32)
    logits_NW[:, vocab_size:] = -torch.inf
    step = min(strip_tokens(logits_NW), width)
    tile = TILE_ROWS if device.type == "cpu" else max(1, num_rows)
    min_N = torch.full((num_rows,), torch.inf, device=device)
    max_NB = torch.empty(num_rows, width // BLOCK_TOKENS, device=device)
    sum_NB = torch.empty_like(max_NB)
    scratch = torch.empty(min(tile, num_rows), step, device=device)
    for begin in range(0, width, step):
        end = min(begin + step, vocab_size)
        strip_NS = make_strip(begin, end)
        blocks = slice(begin // BLOCK_TOKENS, min(begin + step, width) // BLOCK_TOKENS)
        for first in range(0, num_rows, tile):
            rows = slice(first, first + tile)
            logits_NW[rows, begin:end] = strip_NS[rows]
            part_RS = strip_NS[rows]
            if (end - begin) % BLOCK_TOKENS:
                part_RS = logits_NW[rows, begin : begin + step]
            work_RS = scratch[: len(part_RS), : part_RS.shape[1]]
            part_RS = part_RS if part_RS.dtype is torch.float32 else work_RS.copy_(part_RS)
            least_R = part_RS[:, : end - begin].amin(1)
            torch.minimum(min_N[rows], least_R, out=min_N[rows])
            _sum_blocks(part_RS, max_NB[rows, blocks], sum_NB[rows, blocks], work_RS)
    log_sum_NB = max_NB.double() + sum_NB.double().log()
    return BlockedLogits(
        logits_NW, vocab_size, min_N, max_NB, log_sum_NB, torch.logsumexp(log_sum_NB, dim=1)
    )


def _in_blocks(logits_NW: torch.Tensor) -> torch.Tensor:
    """Return a view [N, B, K] of logits in whole blocks."""
    n, width = logits_NW.shape
    return logits_NW.view(n, width // BLOCK_TOKENS, BLOCK_TOKENS)


def _sum_blocks(
    logits_RS: torch.Tensor, max_RB: torch.Tensor, sum_RB: torch.Tensor, work_RS: torch.Tensor
) -> None:
    """Write the maxima and the sums of exp(logit - maximum) of whole blocks, and to `work_RS`."""
    import torch

    part_RBK, work_RBK = _in_blocks(logits_RS), _in_blocks(work_RS)
    torch.amax(part_RBK, dim=-1, out=max_RB)
    shift_RB1 = max_RB.clamp(min=-1e30)[:, :, None]  # a block of -inf alone has the sum 0
    torch.sum(torch.sub(part_RBK, shift_RB1, out=work_RBK).exp_(), dim=-1, out=sum_RB)


def blocks_of_logits(logits_NV: torch.Tensor) -> BlockedLogits:
    """Sum the blocks of logits that exist.

    Args:
        logits_NV: Logits [positions, vocabulary]; one value may be added to all of a position.
    """
    return block_logits(
        len(logits_NV),
        logits_NV.shape[1],
        lambda begin, end: logits_NV[:, begin:end],
        logits_NV.device,
    )


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
