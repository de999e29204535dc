"""The same losses on a GPU, one Triton program a position: a row of logits is read for its statistics and overwritten by its gradient,
the sums over events between the two. Nothing but the row itself is as large as the vocabulary.

`composed_rows` and `same_rows` say what is computed; tests/losses/test_triton_kernels.py holds this to them, in Triton's interpreter where there
is no GPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from persea.losses.divergence import Divergence
from persea.losses.event_kl import refuse_other_vocabulary, refuse_two_teachers
from persea.losses.targets import BatchTargets

BLOCK_COLUMNS, BLOCK_EVENT_TOKENS = 4096, 32  # columns, and tokens of an event, looked at at once
DIVERGENCE_CODES = {Divergence.FORWARD: 0, Divergence.REVERSE: 1, Divergence.JSD: 2}


@triton.jit  # type: ignore[untyped-decorator]
def _logsumexp_kernel(row, columns, BLOCK: tl.constexpr) -> tl.tensor:  # type: ignore[no-untyped-def]
    """Log sum exp of a row, in one pass."""
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
def _event_kl_kernel(
    logits,
    stride,
    columns,
    target,
    first_entry,
    first_token,
    token,
    prob,
    pull,
    loss,
    text,
    events,
    mass,  # type: ignore[no-untyped-def]
    share,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    lse = _logsumexp_kernel(row, columns, BLOCK)
    said = tl.load(target + n)
    cross_entropy = lse - tl.load(row + said)
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
            tl.store(pull + g, share * p * tl.exp(x - event), mask=g < g_end)
    left = 1 - share * mass_sum
    tl.store(loss + n, share * event_sum + left * cross_entropy)
    tl.store(text + n, cross_entropy)
    tl.store(events + n, event_sum)
    tl.store(mass + n, mass_sum)
    tl.debug_barrier()  # other threads of this program may still read the logits that are overwritten now
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < columns, other=-float("inf"))
        tl.store(row + at, tl.exp(x - lse), mask=at < columns)
    tl.debug_barrier()
    g_begin, g_end = tl.load(first_token + begin), tl.load(first_token + end)
    for start in range(g_begin, g_end, FEW):
        g = start + tl.arange(0, FEW)
        u = tl.load(token + g, mask=g < g_end, other=0)
        tl.atomic_add(
            row + u, -tl.load(pull + g, mask=g < g_end, other=0.0), mask=g < g_end
        )  # a token may stand in two entries
    tl.atomic_add(row + said, -left)


@triton.jit  # type: ignore[untyped-decorator]
def _divergence_kernel(
    logits, stride, teacher, teacher_stride, columns, loss, BLOCK: tl.constexpr, KIND: tl.constexpr
) -> None:  # type: ignore[no-untyped-def]
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
            pull = q - tl.exp(t)
        elif KIND == 1:
            pull = q * (s - t - of_q)
        else:
            middle = (
                tl.maximum(s, t)
                + tl.log(tl.exp(-tl.abs(tl.where(t == -float("inf"), float("inf"), s - t))) + 1)
                - 0.6931471805599453
            )
            pull = q * (s - middle - of_q) / 2
        tl.store(row + at, pull, mask=at < columns)


def empty_float32(n: int, like: torch.Tensor) -> torch.Tensor:
    """Memory that a kernel fills."""
    return torch.empty(n, dtype=torch.float32, device=like.device)


def triton_event_kl(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    targets: Sequence[BatchTargets],
    event_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, cross-entropy, event term, whether spoken of) by position, as `composed_rows`; the logits are overwritten by the gradient.

    Float32 logits whose columns lie side by side; rows with a rest are not for it.
    """
    count = len(logits_CV)
    for said in targets:
        refuse_other_vocabulary(logits_CV, said)
    refuse_two_teachers(targets, count)
    row_M = torch.cat(
        [labels_C.new_empty(0, device="cpu"), *(said.row_M.cpu() for said in targets)]
    )
    row_M, order_M = row_M.sort(stable=True)
    prob_M = torch.cat([torch.empty(0), *(said.probs_M.cpu() for said in targets)])[order_M]
    before = [sum(len(said.row_M) for said in targets[:k]) for k in range(len(targets))]
    entry_G = torch.cat(
        [row_M[:0], *(said.entry_G.cpu() + m for said, m in zip(targets, before, strict=True))]
    )
    place_M = torch.empty_like(order_M).index_put((order_M,), torch.arange(len(order_M)))
    entry_G, order_G = place_M[entry_G].sort(stable=True)
    token_G = torch.cat([row_M[:0], *(said.token_G.cpu() for said in targets)])[order_G]
    first_entry = torch.searchsorted(row_M, torch.arange(count + 1))
    first_token = torch.searchsorted(entry_G, torch.arange(len(row_M) + 1))
    given = [
        side.to(logits_CV.device)
        for side in (labels_C, first_entry, first_token, token_G, prob_M.float())
    ]
    pull_G, loss_C, text_C, events_C, mass_C = (
        empty_float32(n, logits_CV) for n in (len(token_G), count, count, count, count)
    )
    _event_kl_kernel[(count,)](
        logits_CV,
        logits_CV.stride(0),
        logits_CV.shape[1],
        *given,
        pull_G,
        loss_C,
        text_C,
        events_C,
        mass_C,
        event_weight,
        BLOCK=BLOCK_COLUMNS,
        FEW=BLOCK_EVENT_TOKENS,
    )
    return loss_C, text_C, events_C, mass_C > 0


def triton_divergence(
    logits_CV: torch.Tensor, teacher_logits_CV: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """`same_rows`: by position; the student's logits are overwritten by the gradient, the teacher's stay."""
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
