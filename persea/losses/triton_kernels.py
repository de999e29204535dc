"""Triton kernels of the per-token losses, one program a position.

A program reads a row of logits for its statistics, sums over the events of the targets, and
overwrites the row by its gradient. No other tensor has the size of the vocabulary.

`event_kl_per_token` and `divergence_with_gradient` define the results.
tests/losses/test_triton_kernels.py compares both, in Triton's interpreter where there is no GPU
(TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from persea.losses.divergence import Divergence
from persea.losses.event_kl import refuse_other_vocabulary, refuse_two_teachers
from persea.losses.targets import BatchTargets

BLOCK_COLUMNS = 4096  # columns of a row processed at a time
BLOCK_EVENT_TOKENS = 32  # tokens of an event processed at a time
DIVERGENCE_CODES = {Divergence.FORWARD: 0, Divergence.REVERSE: 1, Divergence.JSD: 2}


@triton.jit  # type: ignore[untyped-decorator]
def _logsumexp_kernel(row, columns, BLOCK: tl.constexpr) -> tl.tensor:  # type: ignore[no-untyped-def]
    """Return log sum exp of a row, in one pass."""
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < columns, other=-float("inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    return top + tl.log(total)


@triton.jit  # type: ignore[untyped-decorator]
def _event_kl_kernel(  # type: ignore[no-untyped-def]
    logits,
    stride,
    columns,
    target,
    first_entry,
    first_token,
    token,
    prob,
    target_mass,
    loss,
    label_loss,
    event_loss,
    mass,
    event_weight,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
) -> None:
    """Event KL of one position; writes the gradient over the logits."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    lse = _logsumexp_kernel(row, columns, BLOCK)
    label = tl.load(target + n)
    cross_entropy = lse - tl.load(row + label)
    event_sum = tl.full((), 0.0, tl.float32)
    mass_sum = tl.full((), 0.0, tl.float32)
    begin, end = tl.load(first_entry + n), tl.load(first_entry + n + 1)
    for m in range(begin, end):
        p = tl.load(prob + m)
        g_begin, g_end = tl.load(first_token + m), tl.load(first_token + m + 1)
        top = tl.full((), -float("inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(g_begin, g_end, FEW):
            g = start + tl.arange(0, FEW)
            u = tl.load(token + g, mask=g < g_end, other=0)
            x = tl.load(row + u, mask=g < g_end, other=-float("inf"))
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        event = top + tl.log(total)
        event_sum -= p * (event - lse)
        mass_sum += p
        for start in range(g_begin, g_end, FEW):
            g = start + tl.arange(0, FEW)
            u = tl.load(token + g, mask=g < g_end, other=0)
            x = tl.load(row + u, mask=g < g_end, other=-float("inf"))
            tl.store(target_mass + g, event_weight * p * tl.exp(x - event), mask=g < g_end)
    left = 1 - event_weight * mass_sum
    tl.store(loss + n, event_weight * event_sum + left * cross_entropy)
    tl.store(label_loss + n, cross_entropy)
    tl.store(event_loss + n, event_sum)
    tl.store(mass + n, mass_sum)
    tl.debug_barrier()  # other threads of this program may still read the logits overwritten below
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < columns, other=-float("inf"))
        tl.store(row + at, tl.exp(x - lse), mask=at < columns)
    tl.debug_barrier()
    g_begin, g_end = tl.load(first_token + begin), tl.load(first_token + end)
    for start in range(g_begin, g_end, FEW):
        g = start + tl.arange(0, FEW)
        u = tl.load(token + g, mask=g < g_end, other=0)
        # atomic: a token may belong to two entries
        tl.atomic_add(row + u, -tl.load(target_mass + g, mask=g < g_end, other=0.0), mask=g < g_end)
    tl.atomic_add(row + label, -left)


@triton.jit  # type: ignore[untyped-decorator]
def _divergence_kernel(  # type: ignore[no-untyped-def]
    logits, stride, teacher, teacher_stride, columns, loss, BLOCK: tl.constexpr, KIND: tl.constexpr
) -> None:
    """Divergence of one position (KIND: DIVERGENCE_CODES); writes the gradient over the logits."""
    n = tl.program_id(0).to(tl.int64)
    row, other = logits + n * stride, teacher + n * teacher_stride
    s_lse, t_lse = _logsumexp_kernel(row, columns, BLOCK), _logsumexp_kernel(other, columns, BLOCK)
    of_p = tl.full((), 0.0, tl.float32)
    of_q = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = tl.load(row + at, mask=at < columns, other=0.0) - s_lse
        t = tl.load(other + at, mask=at < columns, other=0.0) - t_lse
        p, q = tl.exp(t), tl.exp(s)
        if KIND == 2:
            middle = (
                tl.maximum(s, t)
                + tl.log(tl.exp(-tl.abs(tl.where(t == -float("inf"), float("inf"), s - t))) + 1)
                - 0.6931471805599453
            )
        else:
            middle = s if KIND == 0 else t
        of_p += tl.sum(tl.where((at < columns) & (p > 0), p * (t - middle), 0.0), 0)
        of_q += tl.sum(tl.where((at < columns) & (q > 0), q * (s - middle), 0.0), 0)
    if KIND == 0:
        tl.store(loss + n, of_p)
    elif KIND == 1:
        tl.store(loss + n, of_q)
    else:
        tl.store(loss + n, (of_p + of_q) / 2)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = tl.load(row + at, mask=at < columns, other=0.0) - s_lse
        t = tl.load(other + at, mask=at < columns, other=0.0) - t_lse
        q = tl.exp(s)
        if KIND == 0:
            grad = q - tl.exp(t)
        elif KIND == 1:
            grad = q * (s - t - of_q)
        else:
            middle = (
                tl.maximum(s, t)
                + tl.log(tl.exp(-tl.abs(tl.where(t == -float("inf"), float("inf"), s - t))) + 1)
                - 0.6931471805599453
            )
            grad = q * (s - middle - of_q) / 2
        tl.store(row + at, grad, mask=at < columns)


def empty_float32(n: int, like: torch.Tensor) -> torch.Tensor:
    """Return uninitialised float32 memory on the device of `like`."""
    return torch.empty(n, dtype=torch.float32, device=like.device)


def triton_event_kl(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    targets: Sequence[BatchTargets],
    event_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `event_kl_per_token` on a GPU and write the gradient over the logits.

    Args:
        logits_CV: float32 logits with contiguous columns; overwritten by the gradient.
        labels_C: int64 student tokens.
        targets: targets of each teacher, without a rest.
        event_weight: weight of the event term, in [0, 1].

    Returns:
        Loss, cross-entropy, event term and whether the position is supervised, [C] each.
    """
    count = len(logits_CV)
    for one in targets:
        refuse_other_vocabulary(logits_CV, one)
    refuse_two_teachers(targets, count)
    row_M = torch.cat([labels_C.new_empty(0, device="cpu"), *(one.row_M.cpu() for one in targets)])
    row_M, order_M = row_M.sort(stable=True)
    prob_M = torch.cat([torch.empty(0), *(one.probs_M.cpu() for one in targets)])[order_M]
    before = [sum(len(one.row_M) for one in targets[:k]) for k in range(len(targets))]
    entry_G = torch.cat(
        [row_M[:0], *(one.entry_G.cpu() + m for one, m in zip(targets, before, strict=True))]
    )
    place_M = torch.empty_like(order_M).index_put((order_M,), torch.arange(len(order_M)))
    entry_G, order_G = place_M[entry_G].sort(stable=True)
    token_G = torch.cat([row_M[:0], *(one.token_G.cpu() for one in targets)])[order_G]
    first_entry = torch.searchsorted(row_M, torch.arange(count + 1))
    first_token = torch.searchsorted(entry_G, torch.arange(len(row_M) + 1))
    inputs = [
        side.to(logits_CV.device)
        for side in (labels_C, first_entry, first_token, token_G, prob_M.float())
    ]
    target_mass_G, loss_C, label_loss_C, event_loss_C, mass_C = (
        empty_float32(n, logits_CV) for n in (len(token_G), count, count, count, count)
    )
    _event_kl_kernel[(count,)](
        logits_CV,
        logits_CV.stride(0),
        logits_CV.shape[1],
        *inputs,
        target_mass_G,
        loss_C,
        label_loss_C,
        event_loss_C,
        mass_C,
        event_weight,
        BLOCK=BLOCK_COLUMNS,
        FEW=BLOCK_EVENT_TOKENS,
    )
    return loss_C, label_loss_C, event_loss_C, mass_C > 0


def triton_divergence(
    logits_CV: torch.Tensor, teacher_logits_CV: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """Compute `divergence_with_gradient` on a GPU, [C]; the teacher's logits stay unchanged."""
    loss_C = empty_float32(len(logits_CV), logits_CV)
    _divergence_kernel[(len(logits_CV),)](
        logits_CV,
        logits_CV.stride(0),
        teacher_logits_CV,
        teacher_logits_CV.stride(0),
        logits_CV.shape[1],
        loss_C,
        BLOCK=BLOCK_COLUMNS,
        KIND=DIVERGENCE_CODES[divergence],
    )
    return loss_C
