"""Losses from hidden states and the language-model head, without a full matrix of logits.

Positions pass through the head a chunk at a time. The logits of a chunk are overwritten by their
gradient, from which the gradients of the hidden states and of the weight follow: three matrix
products, as many as cross-entropy from full logits needs, and a fourth where a teacher's own head
runs too. Memory is that of the logits of one chunk (MAX_CHUNK_BYTES), whatever the number of
positions and teachers. The losses are those on logits (`event_kl_loss`, `event_divergence_loss`):
the same functions compute the loss of a chunk.

The weight is an ordinary input whose gradient flows through autograd, so hooks of DDP fire. The
weight must be whole: a sharded one (DTensor) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from persea.distributions import DistributionKind
from persea.distributions.lm_head import LMHead
from persea.distributions.matmul import (
    accumulate_weight_gradient,
    max_padded_rows,
    padded_rows,
    project_to_hidden,
    project_to_logits,
    rounding_factors,
)
from persea.errors import DataError
from persea.losses.divergence import Divergence, divergence_with_gradient
from persea.losses.event_divergence import MaskedEventMap, event_divergence_per_token
from persea.losses.event_kl import event_kl_metrics, event_kl_per_token, row_slices
from persea.losses.loss import LossOutput
from persea.losses.targets import BatchTargets, split_targets

# Bytes of the logits of a chunk, teacher's included; with the other tensors 64 MiB and 1 GiB.
MAX_CHUNK_BYTES = {"cpu": 59 << 20, "cuda": 768 << 20}
PerTokenTensors = tuple[torch.Tensor, ...]
# (logits of a chunk, number of the chunk, its positions) -> tensors by position, the loss first.
# The function overwrites the logits by the gradient of the summed loss.
ChunkLossFn = Callable[[torch.Tensor, int, slice], PerTokenTensors]
# (logits of a chunk, labels, targets of each teacher) -> loss of each position, differentiable
TokenLossFn = Callable[[torch.Tensor, torch.Tensor, Sequence[BatchTargets]], torch.Tensor]


def event_kl_loss_from_hidden(
    hidden_ND: torch.Tensor,
    head: LMHead,
    labels_N: torch.Tensor,
    targets: Sequence[BatchTargets],
    event_weight: float,
    weight_N: torch.Tensor | None = None,
) -> LossOutput:
    """Compute `event_kl_loss` from hidden states; without targets it is cross-entropy.

    Args:
        hidden_ND: hidden states before the head at the N supervised positions.
        head: the language-model head.
        labels_N: int64 student tokens at these positions.
        targets: targets of each teacher.
        event_weight: weight of the event term, in [0, 1].
        weight_N: weight of each position's loss before the mean over N; None = 1.

    Raises:
        DataError: as `event_kl_loss`, and for a head whose weight is sharded or of another width.
    """
    bounds = _chunk_bounds(head, hidden_ND, head.vocab_size)
    labels_N = labels_N.to(hidden_ND.device)
    parts = [split_targets(one, bounds) for one in targets]
    has_rest = any(one.kind is DistributionKind.TOPK for one in targets)

    def chunk_loss(logits_CV: torch.Tensor, k: int, positions: slice) -> PerTokenTensors:
        targets_C = [part[k] for part in parts]
        if not has_rest and can_use_triton(logits_CV):
            from persea.losses.triton_kernels import triton_event_kl

            return triton_event_kl(logits_CV, labels_N[positions], targets_C, event_weight)
        per_token = event_kl_per_token(logits_CV, labels_N[positions], targets_C, event_weight)
        per_token.write_gradient(logits_CV, logits_CV)
        return (
            per_token.loss_N,
            per_token.cross_entropy_N,
            per_token.event_loss_N,
            per_token.supervised_N,
        )

    loss, grad_norm_N, (loss_N, *terms) = _chunked_head_loss(
        hidden_ND, head, bounds, chunk_loss, weight_N
    )
    return LossOutput(loss, event_kl_metrics(*terms), len(labels_N), loss_N, grad_norm_N)


def token_loss_from_hidden(
    hidden_ND: torch.Tensor,
    head: LMHead,
    labels_N: torch.Tensor,
    targets: Sequence[BatchTargets],
    token_loss_fn: TokenLossFn,
    name: str,
    weight_N: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the mean of any differentiable per-token loss from hidden states.

    Args:
        hidden_ND: hidden states before the head at the N supervised positions.
        head: the language-model head.
        labels_N: int64 student tokens at these positions.
        targets: targets of each teacher.
        token_loss_fn: loss of each position of a chunk, [C], nats; differentiable in the logits.
        name: key of the loss among the metrics.
        weight_N: weight of each position's loss before the mean over N; None = 1.
    """
    bounds = _chunk_bounds(head, hidden_ND, head.vocab_size)
    labels_N = labels_N.to(hidden_ND.device)
    parts = [split_targets(one, bounds) for one in targets]

    def chunk_loss(logits_CV: torch.Tensor, k: int, positions: slice) -> PerTokenTensors:
        with torch.enable_grad():
            leaf_CV = logits_CV.detach().clone().requires_grad_()
            loss_C = token_loss_fn(leaf_CV, labels_N[positions], [part[k] for part in parts])
            (grad_CV,) = torch.autograd.grad(loss_C.sum(), leaf_CV)
        logits_CV.copy_(grad_CV)
        return (loss_C.detach(),)

    loss, grad_norm_N, (loss_N,) = _chunked_head_loss(hidden_ND, head, bounds, chunk_loss, weight_N)
    return LossOutput(loss, {name: loss_N.mean()}, len(labels_N), loss_N, grad_norm_N)


def divergence_loss_from_hidden(
    hidden_ND: torch.Tensor,
    head: LMHead,
    teacher: torch.Tensor | tuple[torch.Tensor, LMHead],
    masked_map: MaskedEventMap | None = None,
    divergence: Divergence = Divergence.FORWARD,
    weight_N: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the mean divergence from a teacher's whole distributions, nats per position.

    Args:
        hidden_ND: hidden states of the student before its head at N positions.
        head: the student's head.
        teacher: natural log-probabilities [N, W], or the teacher's hidden states [N, D'] and its
            head (one matrix product more).
        masked_map: event map and impossible tokens; None = both share one vocabulary.
        divergence: which divergence.
        weight_N: weight of each position's loss before the mean over N; None = 1.

    Raises:
        DataError: if a side has another number of columns than its tokenizer has tokens, or if no
            event is left at a position that both sides can produce.
    """
    teacher_NX, columns = (
        (teacher, teacher.shape[1])
        if isinstance(teacher, torch.Tensor)
        else (teacher[0], teacher[1].vocab_size)
    )
    if len(teacher_NX) != len(hidden_ND) or (masked_map is None and columns != head.vocab_size):
        raise DataError(
            f"the teacher has {len(teacher_NX)} positions of {columns} tokens, "
            f"the student {len(hidden_ND)} of {head.vocab_size}",
            where="losses",
            remedy="different vocabularies need an event map",
        )
    bounds = _chunk_bounds(head, hidden_ND, head.vocab_size + columns)
    teacher_head = (
        None if isinstance(teacher, torch.Tensor) else _ChunkLogits(teacher[1], teacher_NX, bounds)
    )
    masked_map = masked_map and masked_map.sorted_by_row()

    def chunk_loss(logits_CV: torch.Tensor, k: int, positions: slice) -> PerTokenTensors:
        teacher_CW = (
            teacher_NX[positions].to(logits_CV, copy=True)
            if teacher_head is None
            else teacher_head.logits(positions)
        )
        if (masked_map is None or masked_map.is_same_vocabulary) and can_use_triton(logits_CV):
            from persea.losses.triton_kernels import triton_divergence

            return (triton_divergence(logits_CV, teacher_CW, divergence),)
        if masked_map is None or masked_map.is_same_vocabulary:
            return (
                torch.cat(
                    [
                        divergence_with_gradient(logits_CV[rows], teacher_CW[rows], divergence)
                        for rows in row_slices(*logits_CV.shape)
                    ]
                ),
            )
        losses = []
        for rows in row_slices(len(logits_CV), logits_CV.shape[1] + columns):
            with torch.enable_grad():
                # read before it is overwritten: the gradient is made of sums over events
                leaf_FV = logits_CV[rows].detach().requires_grad_()
                part = slice(positions.start + rows.start, positions.start + rows.stop)
                loss_F = event_divergence_per_token(
                    leaf_FV, teacher_CW[rows], masked_map, divergence, part
                )
                (logits_CV[rows],) = torch.autograd.grad(loss_F.sum(), leaf_FV)
            losses.append(loss_F.detach())
        return (torch.cat(losses),)

    loss, grad_norm_N, (loss_N,) = _chunked_head_loss(hidden_ND, head, bounds, chunk_loss, weight_N)
    metrics = {divergence.metric_name: loss_N.mean()}
    return LossOutput(loss, metrics, len(hidden_ND), loss_N, grad_norm_N)


def can_use_triton(logits_CV: torch.Tensor) -> bool:
    """Return whether the Triton kernels take these logits (CUDA builds of torch bring Triton)."""
    return (
        logits_CV.is_cuda and logits_CV.dtype is torch.float32 and find_spec("triton") is not None
    )


def _chunk_bounds(head: LMHead, hidden_ND: torch.Tensor, columns: int) -> list[int]:
    """Return the edges of chunks: as many positions each as MAX_CHUNK_BYTES holds rows."""
    _refuse_head_shapes(head, hidden_ND)
    dtype = _matmul_dtype(hidden_ND)
    size = 8 if dtype is torch.float64 else 4
    fits = MAX_CHUNK_BYTES[hidden_ND.device.type] // (
        size * (columns + (head.vocab_size if head.logit_softcap else 0))
    )
    at_once = max_padded_rows(max(1, fits), hidden_ND.new_empty(0, dtype=dtype))
    return [*range(0, len(hidden_ND), at_once), len(hidden_ND)]


def _matmul_dtype(hidden_ND: torch.Tensor) -> torch.dtype:
    """Return the dtype of matrix products.

    A GPU multiplies half precision as it is, with float32 sums. A CPU multiplies float32 copies,
    whose factors it rounds to bfloat16 if that is what the hidden states are (`rounding_factors`).
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
    """Raise DataError for a sharded weight, mismatched shapes, or a device without support."""
    weight_VD = head.weight_VD
    if type(weight_VD) not in (torch.Tensor, torch.nn.Parameter):
        raise DataError(
            f"the head's weight is a {type(weight_VD).__name__}, not a whole matrix",
            where="losses",
            remedy="gather it first (DTensor.full_tensor), or do not shard the head",
        )
    if (
        not len(hidden_ND)
        or hidden_ND.dim() != 2
        or hidden_ND.shape[1] != weight_VD.shape[1]
        or weight_VD.shape[0] < head.vocab_size
    ):
        raise DataError(
            f"hidden states {tuple(hidden_ND.shape)} "
            f"for a head {tuple(weight_VD.shape)} of {head.vocab_size} tokens",
            where="losses",
            remedy="pass [positions, hidden size] of at least one supervised position",
        )
    if hidden_ND.device.type not in MAX_CHUNK_BYTES:
        raise DataError(
            f"hidden states on {hidden_ND.device}",
            where="losses",
            remedy="train on a CPU or a CUDA GPU",
        )


class _ChunkLogits:
    """Applies a head to chunks of hidden states, reusing one buffer, with rows of zeros as padding.

    The padding rounds the number of rows up for oneDNN (matmul.py).
    """

    def __init__(self, head: LMHead, hidden_ND: torch.Tensor, bounds: Sequence[int]) -> None:
        self.dtype = _matmul_dtype(hidden_ND)
        self.is_half = self.dtype in (torch.bfloat16, torch.float16)
        self.rounds = hidden_ND.dtype is torch.bfloat16 and hidden_ND.device.type == "cpu"
        self.head, self.hidden_ND = head, hidden_ND.detach()
        self.weight_VD = head.weight_VD.detach()[: head.vocab_size].to(self.dtype)
        longest = padded_rows(max(end - begin for begin, end in pairwise(bounds)), self.weight_VD)
        self.buffer_PV = torch.empty(
            (0 if self.is_half else longest, head.vocab_size),
            dtype=self.dtype,
            device=hidden_ND.device,
        )

    def padded_hidden(self, positions: slice, factor_C: torch.Tensor | None = None) -> torch.Tensor:
        """Return hidden states [P, D], each times its factor, then rows of zeros."""
        hidden_CD = self.hidden_ND[positions].to(self.dtype)
        hidden_CD = (
            hidden_CD if factor_C is None else (hidden_CD * factor_C[:, None]).to(self.dtype)
        )
        return torch.nn.functional.pad(
            hidden_CD, (0, 0, 0, padded_rows(len(hidden_CD), self.weight_VD) - len(hidden_CD))
        )

    def padded_gradient(self, grad_CV: torch.Tensor) -> torch.Tensor:
        """Return the gradient [P, V] that was written over the logits, then rows of zeros."""
        if self.is_half:
            return grad_CV.to(self.dtype)
        padded_PV = self.buffer_PV[: padded_rows(len(grad_CV), self.weight_VD)]
        padded_PV[len(grad_CV) :] = 0
        return padded_PV

    def logits(self, positions: slice) -> torch.Tensor:
        """Return logits [C, V], float32 or float64; the next call overwrites them."""
        hidden_PD = self.padded_hidden(positions)
        if self.is_half:
            logits_CV = torch.mm(hidden_PD, self.weight_VD.T, out_dtype=torch.float32)
        else:
            with rounding_factors(self.rounds):
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
    """Weighted mean of the per-token losses of all chunks.

    The forward pass computes the gradients too; the backward pass returns them, once.
    """

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
        chunks = _ChunkLogits(head, hidden_ND, bounds)
        needs_grad = ctx.needs_input_grad[:3]
        sums = torch.float64 if chunks.dtype is torch.float64 else torch.float32
        hidden_grad_ND = torch.empty_like(hidden_ND) if needs_grad[0] else None
        weight_grad_VD = (
            torch.empty(weight_VD.shape, dtype=sums, device=hidden_ND.device)
            if needs_grad[1]
            else None
        )
        if weight_grad_VD is not None:
            # the first chunk overwrites the other rows, which saves a pass over the largest matrix
            weight_grad_VD[head.vocab_size :] = 0
        bias_grad_V = (
            torch.zeros_like(bias_V, dtype=sums) if bias_V is not None and needs_grad[2] else None
        )
        for k, (begin, end) in enumerate(pairwise(bounds)):
            positions = slice(begin, end)
            grad_CV = chunks.logits(positions)  # logits, until chunk_loss_fn overwrites them
            slope_CV = 1 - (grad_CV / head.logit_softcap).square_() if head.logit_softcap else None
            outputs.append(chunk_loss_fn(grad_CV, k, positions))
            if slope_CV is not None:
                grad_CV *= slope_CV
            factor_C = weight_N[positions] * (head.logit_scale / len(weight_N))
            if bias_grad_V is not None:
                bias_grad_V[: head.vocab_size].addmv_(grad_CV.T, factor_C.to(sums))
            grad_PV = chunks.padded_gradient(grad_CV)
            with rounding_factors(chunks.rounds):
                if hidden_grad_ND is not None:
                    hidden_grad_ND[positions] = (
                        project_to_hidden(grad_PV, chunks.weight_VD)[: end - begin]
                        * factor_C[:, None]
                    )
                if weight_grad_VD is not None:
                    accumulate_weight_gradient(
                        weight_grad_VD[: head.vocab_size],
                        grad_PV,
                        chunks.padded_hidden(positions, factor_C),
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
            raise RuntimeError("backward ran twice on this loss: compute the loss again")
        if out.device.type != "cpu" or float(out) != 1:  # reading a GPU's value would wait for it
            gradients = [None if g is None else g.mul_(out) for g in gradients]
        return (*gradients, None, None, None, None, None, None)


def _chunked_head_loss(
    hidden_ND: torch.Tensor,
    head: LMHead,
    bounds: Sequence[int],
    chunk_loss_fn: ChunkLossFn,
    weight_N: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, PerTokenTensors]:
    """Run all chunks: (loss, norm of each hidden state's gradient or None, tensors by position)."""
    columns, grad_norms = list[PerTokenTensors](), list[torch.Tensor]()
    sums = torch.float64 if hidden_ND.dtype is torch.float64 else torch.float32
    weight_N = (
        torch.ones(len(hidden_ND), dtype=sums, device=hidden_ND.device)
        if weight_N is None
        else weight_N.to(hidden_ND.device, sums)
    )
    # the dtype of each product is decided here, not by autocast
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss: torch.Tensor = _ChunkedHeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden_ND,
            head.weight_VD,
            head.bias_V,
            head,
            bounds,
            chunk_loss_fn,
            weight_N,
            columns,
            grad_norms,
        )
    return (
        loss,
        grad_norms[0] if grad_norms else None,
        tuple(torch.cat(column) for column in zip(*columns, strict=True)),
    )
