"""Losses from hidden states and the language model's head: no matrix of logits, and the gradient is known when the loss is.

Positions pass through the head a chunk at a time. A chunk's logits are overwritten by their own gradient, from which come its
hidden states' gradient and its part of the weight's: three matrix products for targets that are given, as many as cross-entropy
from whole logits, and a fourth where a teacher's own head is run beside. What is needed at once is the logits of one chunk
(WORKSPACE), whatever the number of positions and teachers. The losses are those on logits (`composed`, `full`): the same functions
say what a chunk costs.

The weight is an ordinary input whose gradient flows back through autograd: hooks of DDP fire. It must be whole: a sharded one
(DTensor) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from persea.distributions import DistributionKind
from persea.errors import DataError
from persea.losses.divergence import Divergence, LossOutput, divergence_with_gradient
from persea.losses.event_divergence import MaskedEventMap, event_divergence_per_token
from persea.losses.event_kl import event_kl_metrics, event_kl_per_token, row_slices
from persea.losses.matmul import (
    accumulate_weight_gradient,
    max_padded_rows,
    padded_rows,
    project_to_hidden,
    project_to_logits,
)
from persea.losses.targets import BatchTargets, split_targets

MAX_CHUNK_BYTES = {
    "cpu": 59 << 20,
    "cuda": 768 << 20,
}  # bytes of a chunk's logits, teacher's included; 64 MiB and 1 GiB hold what stands beside
PerTokenTensors = tuple[torch.Tensor, ...]
ChunkLossFn = Callable[
    [torch.Tensor, int, slice], PerTokenTensors
]  # (a chunk's logits, its number, its positions) -> by position; the first is the loss


@dataclass(frozen=True, eq=False)
class LMHead:
    """From hidden states to logits: l = cap tanh(z / cap), z = scale (h W^T + b); cap = 0: l = z.

    weight_VD   whole; its rows past `vocabulary` are padding and get no gradient
    """

    weight_VD: torch.Tensor
    vocab_size: int
    bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, vocabulary], float32 (float64 of float64): differentiable, and as large as it looks."""
        bias_V = None if self.bias_V is None else self.bias_V[: self.vocab_size]
        logits_NV = (
            torch.nn.functional.linear(
                hidden_ND, self.weight_VD[: self.vocab_size].to(hidden_ND.dtype), bias_V
            )
            * self.logit_scale
        )
        logits_NV = logits_NV if logits_NV.dtype is torch.float64 else logits_NV.float()
        return (
            self.logit_softcap * torch.tanh(logits_NV / self.logit_softcap)
            if self.logit_softcap
            else logits_NV
        )


def event_kl_loss_from_hidden(
    hidden_ND: torch.Tensor,
    head: LMHead,
    labels_N: torch.Tensor,
    targets: Sequence[BatchTargets],
    event_weight: float,
    weight_N: torch.Tensor | None = None,
) -> LossOutput:
    """`composed` from hidden states; without teachers it is cross-entropy.

    hidden_ND  what the head is given at the N learned positions
    weight_N   of each position's loss, before the mean over N; None = 1
    Raises DataError as `composed` does, and for a weight that is not whole or of another width.
    """
    bounds = _chunk_bounds(head, hidden_ND, head.vocab_size)
    labels_N = labels_N.to(hidden_ND.device)
    parts = [split_targets(said, bounds) for said in targets]
    rests = any(said.kind is DistributionKind.TOPK for said in targets)

    def rows(logits_CV: torch.Tensor, k: int, some: slice) -> PerTokenTensors:
        if not rests and can_use_triton(logits_CV):
            from persea.losses.triton_kernels import triton_event_kl

            return triton_event_kl(
                logits_CV, labels_N[some], [part[k] for part in parts], event_weight
            )
        known = event_kl_per_token(
            logits_CV, labels_N[some], [part[k] for part in parts], event_weight
        )
        known.write_gradient(logits_CV, logits_CV)
        return known.loss_N, known.cross_entropy_N, known.event_loss_N, known.supervised_N

    loss, pull_N, (loss_N, text_N, events_N, spoken_N) = _chunked_head_loss(
        hidden_ND, head, bounds, rows, weight_N
    )
    return LossOutput(
        loss, event_kl_metrics(text_N, events_N, spoken_N), len(labels_N), loss_N, pull_N
    )


def divergence_loss_from_hidden(
    hidden_ND: torch.Tensor,
    head: LMHead,
    teacher: torch.Tensor | tuple[torch.Tensor, LMHead],
    masked_map: MaskedEventMap | None = None,
    divergence: Divergence = Divergence.FORWARD,
    weight_N: torch.Tensor | None = None,
) -> LossOutput:
    """Mean divergence from a teacher's whole distributions, nats per position.

    teacher  its natural log-probabilities [N, W], or its hidden states [N, D'] and its head (a teacher in the loop: one product more)
    sides    how two vocabularies lie over each other (`full`); None = the vocabulary is the same
    Raises DataError where sides have other columns than tokens, or nothing both can say.
    """
    teacher_NX, columns = (
        (teacher, teacher.shape[1])
        if isinstance(teacher, torch.Tensor)
        else (teacher[0], teacher[1].vocab_size)
    )
    if len(teacher_NX) != len(hidden_ND) or (masked_map is None and columns != head.vocab_size):
        raise DataError(
            f"{len(teacher_NX)} positions of {columns} tokens to teach {len(hidden_ND)} of {head.vocab_size}",
            where="losses",
            remedy="between different vocabularies a bridge is needed",
        )
    bounds = _chunk_bounds(head, hidden_ND, head.vocab_size + columns)
    run = (
        None if isinstance(teacher, torch.Tensor) else _ChunkLogits(teacher[1], teacher_NX, bounds)
    )
    masked_map = masked_map and masked_map.sorted_by_row()

    def rows(logits_CV: torch.Tensor, k: int, some: slice) -> PerTokenTensors:
        teacher_CW = (
            run.logits(some) if run is not None else teacher_NX[some].to(logits_CV, copy=True)
        )
        if (masked_map is None or masked_map.is_same_vocabulary) and can_use_triton(logits_CV):
            from persea.losses.triton_kernels import triton_divergence

            return (triton_divergence(logits_CV, teacher_CW, divergence),)
        if masked_map is None or masked_map.is_same_vocabulary:
            return (
                torch.cat(
                    [
                        divergence_with_gradient(logits_CV[few], teacher_CW[few], divergence)
                        for few in row_slices(*logits_CV.shape)
                    ]
                ),
            )
        out = []
        for few in row_slices(len(logits_CV), logits_CV.shape[1] + columns):
            with torch.enable_grad():
                leaf_FV = (
                    logits_CV[few].detach().requires_grad_()
                )  # read once: its gradient is made of sums over events
                here = slice(some.start + few.start, some.start + few.stop)
                loss_F = event_divergence_per_token(
                    leaf_FV, teacher_CW[few], masked_map, divergence, here
                )
                (logits_CV[few],) = torch.autograd.grad(loss_F.sum(), leaf_FV)
            out.append(loss_F.detach())
        return (torch.cat(out),)

    loss, pull_N, (loss_N,) = _chunked_head_loss(hidden_ND, head, bounds, rows, weight_N)
    return LossOutput(
        loss, {divergence.value: float(loss_N.mean())}, len(hidden_ND), loss_N, pull_N
    )


def can_use_triton(logits_CV: torch.Tensor) -> bool:
    """Whether Triton's kernels take these logits (torch brings Triton along where it brings CUDA)."""
    return (
        logits_CV.is_cuda and logits_CV.dtype is torch.float32 and find_spec("triton") is not None
    )


def _chunk_bounds(head: LMHead, hidden_ND: torch.Tensor, columns: int) -> list[int]:
    """Where chunks of positions begin and end: of as many positions as WORKSPACE holds rows of so many columns, the last of what is left."""
    _refuse_head_shapes(head, hidden_ND)
    dtype = _matmul_dtype(hidden_ND)
    size = 8 if dtype is torch.float64 else 4
    fits = MAX_CHUNK_BYTES[hidden_ND.device.type] // (
        size * (columns + (head.vocab_size if head.logit_softcap else 0))
    )
    at_once = max_padded_rows(max(1, fits), hidden_ND.new_empty(0, dtype=dtype))
    return [*range(0, len(hidden_ND), at_once), len(hidden_ND)]


def _matmul_dtype(hidden_ND: torch.Tensor) -> torch.dtype:
    """Half precision is multiplied as it is on a GPU, with sums in float32; on a CPU in float32, through a copy of the weight where that is
    half.
    """
    exact = hidden_ND.device.type == "cpu" or hidden_ND.dtype is torch.float32
    return (
        torch.float64
        if hidden_ND.dtype is torch.float64
        else torch.float32
        if exact
        else hidden_ND.dtype
    )


def _refuse_head_shapes(head: LMHead, hidden_ND: torch.Tensor) -> None:
    weight_VD = head.weight_VD
    if type(weight_VD) not in (torch.Tensor, torch.nn.Parameter):
        raise DataError(
            f"the head's weight is a {type(weight_VD).__name__}, not a whole matrix",
            where="losses",
            remedy="gather it first (DTensor.full_tensor), or leave the head out of what is sharded",
        )
    if (
        not len(hidden_ND)
        or hidden_ND.dim() != 2
        or hidden_ND.shape[1] != weight_VD.shape[1]
        or weight_VD.shape[0] < head.vocab_size
    ):
        raise DataError(
            f"hidden states {tuple(hidden_ND.shape)} for a head {tuple(weight_VD.shape)} of {head.vocab_size} tokens",
            where="losses",
            remedy="give [positions, width] of what is learned, at least one position",
        )
    if hidden_ND.device.type not in MAX_CHUNK_BYTES:
        raise DataError(
            f"hidden states on {hidden_ND.device}",
            where="losses",
            remedy="train on a CPU or a CUDA GPU",
        )


class _ChunkLogits:
    """A head run over chunks of hidden states into the same memory again and again, with as many rows of zeros more as products want."""

    def __init__(self, head: LMHead, hidden_ND: torch.Tensor, bounds: Sequence[int]) -> None:
        self.dtype = _matmul_dtype(hidden_ND)
        self.is_half = self.dtype in (torch.bfloat16, torch.float16)
        self.head, self.hidden_ND = head, hidden_ND.detach()
        self.weight_VD = head.weight_VD.detach()[: head.vocab_size].to(self.dtype)
        longest = padded_rows(max(end - begin for begin, end in pairwise(bounds)), self.weight_VD)
        self.buffer_PV = torch.empty(
            (0 if self.is_half else longest, head.vocab_size),
            dtype=self.dtype,
            device=hidden_ND.device,
        )

    def padded_hidden(self, positions: slice, factor_C: torch.Tensor | None = None) -> torch.Tensor:
        """[P, D]: each position's times its factor, then zeros."""
        hidden_CD = self.hidden_ND[positions].to(self.dtype)
        hidden_CD = (
            hidden_CD if factor_C is None else (hidden_CD * factor_C[:, None]).to(self.dtype)
        )
        return torch.nn.functional.pad(
            hidden_CD, (0, 0, 0, padded_rows(len(hidden_CD), self.weight_VD) - len(hidden_CD))
        )

    def padded_gradient(self, grad_CV: torch.Tensor) -> torch.Tensor:
        """[P, vocabulary]: the gradient of the logits that stand, then zeros."""
        if self.is_half:
            return grad_CV.to(self.dtype)
        wide_PV = self.buffer_PV[: padded_rows(len(grad_CV), self.weight_VD)]
        wide_PV[len(grad_CV) :] = 0
        return wide_PV

    def logits(self, positions: slice) -> torch.Tensor:
        """[C, vocabulary], float32 or float64; stands until the next call."""
        hidden_PD = self.padded_hidden(positions)
        if self.is_half:
            logits_CV = torch.mm(hidden_PD, self.weight_VD.T, out_dtype=torch.float32)
        else:
            project_to_logits(hidden_PD, self.weight_VD, self.buffer_PV[: len(hidden_PD)])
            logits_CV = self.buffer_PV[: positions.stop - positions.start]
        if self.head.bias_V is not None:
            logits_CV += self.head.bias_V.detach()[: self.head.vocab_size]
        if self.head.logit_scale != 1:
            logits_CV *= self.head.logit_scale
        return (
            logits_CV.div_(self.head.logit_softcap).tanh_().mul_(self.head.logit_softcap)
            if self.head.logit_softcap
            else logits_CV
        )


class _ChunkedHeadLoss(torch.autograd.Function):
    """The weighted mean of what chunks cost; gradients are made in the forward pass and handed out, once, in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        head: LMHead,
        bounds: Sequence[int],
        chunk_loss_fn: ChunkLossFn,
        weight_N: torch.Tensor,
        outputs: list[PerTokenTensors],
        grad_norms: list[torch.Tensor],
    ) -> torch.Tensor:
        run = _ChunkLogits(head, hidden_ND, bounds)
        wants = ctx.needs_input_grad[:3]
        sums = torch.float64 if run.dtype is torch.float64 else torch.float32
        hidden_grad_ND = torch.empty_like(hidden_ND) if wants[0] else None
        weight_grad_VD = (
            torch.empty(weight_VD.shape, dtype=sums, device=hidden_ND.device) if wants[1] else None
        )
        if weight_grad_VD is not None:
            weight_grad_VD[head.vocab_size :] = (
                0  # the first chunk overwrites the rest: a pass over the largest matrix less
            )
        bias_grad_V = (
            torch.zeros_like(bias_V, dtype=sums) if bias_V is not None and wants[2] else None
        )
        for k, (begin, end) in enumerate(pairwise(bounds)):
            some = slice(begin, end)
            pull_CV = run.logits(some)
            slope_CV = 1 - (pull_CV / head.logit_softcap).square_() if head.logit_softcap else None
            outputs.append(chunk_loss_fn(pull_CV, k, some))
            if slope_CV is not None:
                pull_CV *= slope_CV
            factor_C = weight_N[some] * (head.logit_scale / len(weight_N))
            if bias_grad_V is not None:
                bias_grad_V[: head.vocab_size].addmv_(pull_CV.T, factor_C.to(sums))
            pull_PV = run.padded_gradient(pull_CV)
            if hidden_grad_ND is not None:
                hidden_grad_ND[some] = (
                    project_to_hidden(pull_PV, run.weight_VD)[: end - begin] * factor_C[:, None]
                )
            if weight_grad_VD is not None:
                accumulate_weight_gradient(
                    weight_grad_VD[: head.vocab_size],
                    pull_PV,
                    run.padded_hidden(some, factor_C),
                    is_first=k == 0,
                )
        if hidden_grad_ND is not None:
            grad_norms.append(
                torch.linalg.vector_norm(hidden_grad_ND, dim=1, dtype=sums) * len(weight_N)
            )
        ctx.gradients = [
            hidden_grad_ND,
            None if weight_grad_VD is None else weight_grad_VD.to(weight_VD.dtype),
            bias_grad_V,
        ]
        return (torch.cat([chunk[0] for chunk in outputs]) * weight_N).sum() / len(weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a head's gradient can be had once: compute the loss again")
        if float(out) != 1:
            gradients = [None if g is None else g.mul_(out) for g in gradients]
        return (*gradients, None, None, None, None, None, None)


def _chunked_head_loss(
    hidden_ND: torch.Tensor,
    head: LMHead,
    bounds: Sequence[int],
    chunk_loss_fn: ChunkLossFn,
    weight_N: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, PerTokenTensors]:
    """(loss, by position its pull where hidden states get a gradient, and what `rows` said of it)."""
    columns, pulls = list[PerTokenTensors](), list[torch.Tensor]()
    sums = torch.float64 if hidden_ND.dtype is torch.float64 else torch.float32
    weight_N = (
        torch.ones(len(hidden_ND), dtype=sums, device=hidden_ND.device)
        if weight_N is None
        else weight_N.to(hidden_ND.device, sums)
    )
    with torch.autocast(
        hidden_ND.device.type, enabled=False
    ):  # precision is decided here, product by product
        loss: torch.Tensor = _ChunkedHeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden_ND,
            head.weight_VD,
            head.bias_V,
            head,
            bounds,
            chunk_loss_fn,
            weight_N,
            columns,
            pulls,
        )
    return (
        loss,
        pulls[0] if pulls else None,
        tuple(torch.cat(column) for column in zip(*columns, strict=True)),
    )
