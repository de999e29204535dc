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

from persea.distributions import RowKind
from persea.errors import DataError
from persea.losses.divergence import Divergence, LossOut, same_rows
from persea.losses.event_divergence import Sides, full_rows
from persea.losses.event_kl import composed_rows, composed_terms, pieces
from persea.losses.matmul import add_outer, inward, most_rows, outward, rows_for
from persea.losses.targets import Targets, split

WORKSPACE = {"cpu": 59 << 20, "cuda": 768 << 20}  # bytes of a chunk's logits, teacher's included; 64 MiB and 1 GiB hold what stands beside
Columns = tuple[torch.Tensor, ...]
Rows = Callable[[torch.Tensor, int, slice], Columns]  # (a chunk's logits, its number, its positions) -> by position; the first is the loss


@dataclass(frozen=True, eq=False)
class Head:
    """From hidden states to logits: l = cap tanh(z / cap), z = scale (h W^T + b); cap = 0: l = z.

    weight_VD   whole; its rows past `vocabulary` are padding and get no gradient
    """

    weight_VD: torch.Tensor
    vocabulary: int
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, vocabulary], float32 (float64 of float64): differentiable, and as large as it looks."""
        bias_V = None if self.bias_V is None else self.bias_V[:self.vocabulary]
        logits_NV = torch.nn.functional.linear(hidden_ND, self.weight_VD[:self.vocabulary].to(hidden_ND.dtype), bias_V) * self.scale
        logits_NV = logits_NV if logits_NV.dtype is torch.float64 else logits_NV.float()
        return self.cap * torch.tanh(logits_NV / self.cap) if self.cap else logits_NV


def composed_head(hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, teachers: Sequence[Targets], event_share: float,
                  weight_N: torch.Tensor | None = None) -> LossOut:
    """`composed` from hidden states; without teachers it is cross-entropy.

    hidden_ND  what the head is given at the N learned positions
    weight_N   of each position's loss, before the mean over N; None = 1
    Raises DataError as `composed` does, and for a weight that is not whole or of another width.
    """
    bounds = _bounds(head, hidden_ND, head.vocabulary)
    targets_N = targets_N.to(hidden_ND.device)
    parts = [split(said, bounds) for said in teachers]
    rests = any(said.kind is RowKind.TOPK_REST for said in teachers)

    def rows(logits_CV: torch.Tensor, k: int, some: slice) -> Columns:
        if not rests and on_gpu(logits_CV):
            from persea.losses.triton_kernels import fused_composed

            return fused_composed(logits_CV, targets_N[some], [part[k] for part in parts], event_share)
        known = composed_rows(logits_CV, targets_N[some], [part[k] for part in parts], event_share)
        known.gradient(logits_CV, logits_CV)
        return known.loss_N, known.text_N, known.events_N, known.spoken_N

    loss, pull_N, (loss_N, text_N, events_N, spoken_N) = _chunked(hidden_ND, head, bounds, rows, weight_N)
    return LossOut(loss, composed_terms(text_N, events_N, spoken_N), len(targets_N), loss_N, pull_N)


def divergence_head(hidden_ND: torch.Tensor, head: Head, teacher: torch.Tensor | tuple[torch.Tensor, Head], sides: Sides | None = None,
                    divergence: Divergence = Divergence.FORWARD, weight_N: torch.Tensor | None = None) -> LossOut:
    """Mean divergence from a teacher's whole distributions, nats per position.

    teacher  its natural log-probabilities [N, W], or its hidden states [N, D'] and its head (a teacher in the loop: one product more)
    sides    how two vocabularies lie over each other (`full`); None = the vocabulary is the same
    Raises DataError where sides have other columns than tokens, or nothing both can say.
    """
    teacher_NX, columns = (teacher, teacher.shape[1]) if isinstance(teacher, torch.Tensor) else (teacher[0], teacher[1].vocabulary)
    if len(teacher_NX) != len(hidden_ND) or (sides is None and columns != head.vocabulary):
        raise DataError(f"{len(teacher_NX)} positions of {columns} tokens to teach {len(hidden_ND)} of {head.vocabulary}", where="losses",
                        remedy="between different vocabularies a bridge is needed")
    bounds = _bounds(head, hidden_ND, head.vocabulary + columns)
    run = None if isinstance(teacher, torch.Tensor) else _Run(teacher[1], teacher_NX, bounds)
    sides = sides and sides.ordered()

    def rows(logits_CV: torch.Tensor, k: int, some: slice) -> Columns:
        teacher_CW = run.logits(some) if run is not None else teacher_NX[some].to(logits_CV, copy=True)
        if (sides is None or sides.same) and on_gpu(logits_CV):
            from persea.losses.triton_kernels import fused_same

            return (fused_same(logits_CV, teacher_CW, divergence),)
        if sides is None or sides.same:
            return (torch.cat([same_rows(logits_CV[few], teacher_CW[few], divergence) for few in pieces(*logits_CV.shape)]),)
        out = []
        for few in pieces(len(logits_CV), logits_CV.shape[1] + columns):
            with torch.enable_grad():
                leaf_FV = logits_CV[few].detach().requires_grad_()  # read once: its gradient is made of sums over events
                here = slice(some.start + few.start, some.start + few.stop)
                loss_F = full_rows(leaf_FV, teacher_CW[few], sides, divergence, here)
                (logits_CV[few],) = torch.autograd.grad(loss_F.sum(), leaf_FV)
            out.append(loss_F.detach())
        return (torch.cat(out),)

    loss, pull_N, (loss_N,) = _chunked(hidden_ND, head, bounds, rows, weight_N)
    return LossOut(loss, {divergence.value: float(loss_N.mean())}, len(hidden_ND), loss_N, pull_N)


def on_gpu(logits_CV: torch.Tensor) -> bool:
    """Whether Triton's kernels take these logits (torch brings Triton along where it brings CUDA)."""
    return logits_CV.is_cuda and logits_CV.dtype is torch.float32 and find_spec("triton") is not None


def _bounds(head: Head, hidden_ND: torch.Tensor, columns: int) -> list[int]:
    """Where chunks of positions begin and end: of as many positions as WORKSPACE holds rows of so many columns, the last of what is left."""
    _refuse_parts(head, hidden_ND)
    dtype = _precision(hidden_ND)
    size = 8 if dtype is torch.float64 else 4
    fits = WORKSPACE[hidden_ND.device.type] // (size * (columns + (head.vocabulary if head.cap else 0)))
    at_once = most_rows(max(1, fits), hidden_ND.new_empty(0, dtype=dtype))
    return [*range(0, len(hidden_ND), at_once), len(hidden_ND)]


def _precision(hidden_ND: torch.Tensor) -> torch.dtype:
    """Half precision is multiplied as it is on a GPU, with sums in float32; on a CPU in float32, through a copy of the weight where that is
    half."""
    exact = hidden_ND.device.type == "cpu" or hidden_ND.dtype is torch.float32
    return torch.float64 if hidden_ND.dtype is torch.float64 else torch.float32 if exact else hidden_ND.dtype


def _refuse_parts(head: Head, hidden_ND: torch.Tensor) -> None:
    weight_VD = head.weight_VD
    if type(weight_VD) not in (torch.Tensor, torch.nn.Parameter):
        raise DataError(f"the head's weight is a {type(weight_VD).__name__}, not a whole matrix", where="losses",
                        remedy="gather it first (DTensor.full_tensor), or leave the head out of what is sharded")
    if not len(hidden_ND) or hidden_ND.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1] or weight_VD.shape[0] < head.vocabulary:
        raise DataError(f"hidden states {tuple(hidden_ND.shape)} for a head {tuple(weight_VD.shape)} of {head.vocabulary} tokens", where="losses",
                        remedy="give [positions, width] of what is learned, at least one position")
    if hidden_ND.device.type not in WORKSPACE:
        raise DataError(f"hidden states on {hidden_ND.device}", where="losses", remedy="train on a CPU or a CUDA GPU")


class _Run:
    """A head run over chunks of hidden states into the same memory again and again, with as many rows of zeros more as products want."""

    def __init__(self, head: Head, hidden_ND: torch.Tensor, bounds: Sequence[int]) -> None:
        self.dtype = _precision(hidden_ND)
        self.half = self.dtype in (torch.bfloat16, torch.float16)
        self.head, self.hidden_ND = head, hidden_ND.detach()
        self.weight_VD = head.weight_VD.detach()[:head.vocabulary].to(self.dtype)
        longest = rows_for(max(end - begin for begin, end in pairwise(bounds)), self.weight_VD)
        self.room_PV = torch.empty((0 if self.half else longest, head.vocabulary), dtype=self.dtype, device=hidden_ND.device)

    def hidden(self, some: slice, factor_C: torch.Tensor | None = None) -> torch.Tensor:
        """[P, D]: each position's times its factor, then zeros."""
        hidden_CD = self.hidden_ND[some].to(self.dtype)
        hidden_CD = hidden_CD if factor_C is None else (hidden_CD * factor_C[:, None]).to(self.dtype)
        return torch.nn.functional.pad(hidden_CD, (0, 0, 0, rows_for(len(hidden_CD), self.weight_VD) - len(hidden_CD)))

    def wide(self, pull_CV: torch.Tensor) -> torch.Tensor:
        """[P, vocabulary]: the gradient of the logits that stand, then zeros."""
        if self.half:
            return pull_CV.to(self.dtype)
        wide_PV = self.room_PV[:rows_for(len(pull_CV), self.weight_VD)]
        wide_PV[len(pull_CV):] = 0
        return wide_PV

    def logits(self, some: slice) -> torch.Tensor:
        """[C, vocabulary], float32 or float64; stands until the next call."""
        hidden_PD = self.hidden(some)
        if self.half:
            logits_CV = torch.mm(hidden_PD, self.weight_VD.T, out_dtype=torch.float32)
        else:
            outward(hidden_PD, self.weight_VD, self.room_PV[:len(hidden_PD)])
            logits_CV = self.room_PV[:some.stop - some.start]
        if self.head.bias_V is not None:
            logits_CV += self.head.bias_V.detach()[:self.head.vocabulary]
        if self.head.scale != 1:
            logits_CV *= self.head.scale
        return logits_CV.div_(self.head.cap).tanh_().mul_(self.head.cap) if self.head.cap else logits_CV


class _Chunked(torch.autograd.Function):
    """The weighted mean of what chunks cost; gradients are made in the forward pass and handed out, once, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, head: Head, bounds: Sequence[int],
                rows: Rows, weight_N: torch.Tensor, columns: list[Columns], pulls: list[torch.Tensor]) -> torch.Tensor:
        run = _Run(head, hidden_ND, bounds)
        wants = ctx.needs_input_grad[:3]
        sums = torch.float64 if run.dtype is torch.float64 else torch.float32
        hidden_grad_ND = torch.empty_like(hidden_ND) if wants[0] else None
        weight_grad_VD = torch.empty(weight_VD.shape, dtype=sums, device=hidden_ND.device) if wants[1] else None
        if weight_grad_VD is not None:
            weight_grad_VD[head.vocabulary:] = 0  # the first chunk overwrites the rest: a pass over the largest matrix less
        bias_grad_V = torch.zeros_like(bias_V, dtype=sums) if bias_V is not None and wants[2] else None
        for k, (begin, end) in enumerate(pairwise(bounds)):
            some = slice(begin, end)
            pull_CV = run.logits(some)
            slope_CV = 1 - (pull_CV / head.cap).square_() if head.cap else None
            columns.append(rows(pull_CV, k, some))
            if slope_CV is not None:
                pull_CV *= slope_CV
            factor_C = weight_N[some] * (head.scale / len(weight_N))
            if bias_grad_V is not None:
                bias_grad_V[:head.vocabulary].addmv_(pull_CV.T, factor_C.to(sums))
            pull_PV = run.wide(pull_CV)
            if hidden_grad_ND is not None:
                hidden_grad_ND[some] = inward(pull_PV, run.weight_VD)[:end - begin] * factor_C[:, None]
            if weight_grad_VD is not None:
                add_outer(weight_grad_VD[:head.vocabulary], pull_PV, run.hidden(some, factor_C), first=k == 0)
        if hidden_grad_ND is not None:
            pulls.append(torch.linalg.vector_norm(hidden_grad_ND, dim=1, dtype=sums) * len(weight_N))
        ctx.gradients = [hidden_grad_ND, None if weight_grad_VD is None else weight_grad_VD.to(weight_VD.dtype), bias_grad_V]
        return (torch.cat([chunk[0] for chunk in columns]) * weight_N).sum() / len(weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a head's gradient can be had once: compute the loss again")
        if float(out) != 1:
            gradients = [None if g is None else g.mul_(out) for g in gradients]
        return (*gradients, None, None, None, None, None, None)


def _chunked(hidden_ND: torch.Tensor, head: Head, bounds: Sequence[int], rows: Rows, weight_N: torch.Tensor | None
             ) -> tuple[torch.Tensor, torch.Tensor | None, Columns]:
    """(loss, by position its pull where hidden states get a gradient, and what `rows` said of it)."""
    columns, pulls = list[Columns](), list[torch.Tensor]()
    sums = torch.float64 if hidden_ND.dtype is torch.float64 else torch.float32
    weight_N = torch.ones(len(hidden_ND), dtype=sums, device=hidden_ND.device) if weight_N is None else weight_N.to(hidden_ND.device, sums)
    with torch.autocast(hidden_ND.device.type, enabled=False):  # precision is decided here, product by product
        loss: torch.Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
            hidden_ND, head.weight_VD, head.bias_V, head, bounds, rows, weight_N, columns, pulls)
    return loss, pulls[0] if pulls else None, tuple(torch.cat(column) for column in zip(*columns, strict=True))
