"""Forward KL over common events, combined with cross-entropy so that every position has weight one.

At a supervised position n the teacher gives probabilities p(w) of events w, each the set E(w) of
student tokens that realise the event. With the student's probabilities q and the event weight a:

    loss_n = - a sum_w p(w) log sum_{u in E(w)} q(u)  +  (1 - a M_n) cross_entropy_n
    M_n = sum_w p(w), and 0 where the position has no targets

With boundary masks, p and E hold only tokens that can follow a boundary of BOTH tokenizers. p is
not renormalised, so the loss is linear in p and unbiased for sampled distributions. q is not
renormalised either: the student's normaliser over possible tokens has weight -aM in the event term
and +aM in the cross-entropy, and cancels. So a student that is right stays right: with exact masks
the expected target distribution at the truth, over positions with and without a common boundary, is
q itself for every a. (Renormalising q within the events makes the tokens that the teacher's
boundary rules out too probable by 1 / (1 - aM); tests/bench/test_worlds.py shows both.)

The gradient with respect to the logits is q minus the target mass of each token: as many passes and
as much memory as cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from persea.distributions import DistributionKind
from persea.errors import DataError
from persea.losses.loss import LossOutput
from persea.losses.targets import BatchTargets

# Elements of logits processed at a time: 1 MiB in float32, which fits the cache of one core.
CPU_CACHE_ELEMENTS = 1 << 18


def row_slices(rows: int, columns: int) -> list[slice]:
    """Return slices of rows, small enough that the result of one operation stays in cache."""
    step = max(1, CPU_CACHE_ELEMENTS // max(1, columns))
    return [slice(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def logsumexp_rows(logits_NV: torch.Tensor) -> torch.Tensor:
    """Return log sum exp of each row, [N].

    Computed as the highest logit minus the log of its probability: torch's softmax takes half the
    time of its logsumexp.
    """
    return torch.cat(
        [
            logits_NV[rows].amax(-1) - logits_NV[rows].softmax(-1).amax(-1).log()
            for rows in row_slices(*logits_NV.shape)
        ]
    )


def grouped_logsumexp(
    values_G: torch.Tensor, entry_G: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Return log sum exp of the values of each group, [num_groups].

    Each group's own maximum is subtracted first, so that an event of probability 1e-60 counts too.

    Args:
        values_G: values of all groups.
        entry_G: int64, the group of each value.
        num_groups: number of groups.
    """
    top_M = torch.full((num_groups,), -torch.inf, dtype=values_G.dtype, device=values_G.device)
    top_M = top_M.scatter_reduce(0, entry_G, values_G.detach(), "amax")
    return (
        torch.zeros_like(top_M).index_add(0, entry_G, (values_G - top_M[entry_G]).exp()).log()
        + top_M
    )


def event_logprobs(
    logits_NV: torch.Tensor, lse_N: torch.Tensor, targets: BatchTargets
) -> torch.Tensor:
    """Return the student's natural log-probability of each entry's event, [M]; differentiable.

    Only the tokens of the target events are gathered: no [positions, events] matrix, no sort.

    Args:
        logits_NV: student logits.
        lse_N: log sum exp of each row of logits.
        targets: targets of one teacher at the N positions.

    Raises:
        DataError: if the logits have another number of columns than the student has tokens.
    """
    refuse_other_vocabulary(logits_NV, targets)
    row_M = targets.row_M.to(logits_NV.device)
    entry_G, token_G = targets.entry_G.to(logits_NV.device), targets.token_G.to(logits_NV.device)
    values_G = logits_NV[row_M[entry_G], token_G]
    return grouped_logsumexp(values_G, entry_G, len(row_M)) - lse_N[row_M]


def refuse_other_vocabulary(logits_NV: torch.Tensor, targets: BatchTargets) -> None:
    """Check that logits and targets belong to the same student vocabulary.

    Raises:
        DataError: if the logits have another number of columns than the student has tokens.
    """
    if logits_NV.shape[-1] != targets.vocab_size:
        raise DataError(
            f"{logits_NV.shape[-1]} logits a position, "
            f"but the student's tokenizer has {targets.vocab_size} tokens",
            where="losses",
            remedy="cut off the padded columns; if columns are missing, "
            "the tokenizer belongs to another model",
        )


def refuse_two_teachers(targets: Sequence[BatchTargets], num_tokens: int) -> None:
    """Check that no position has targets of two teachers.

    Raises:
        DataError: if two teachers have targets at the same position.
    """
    teachers_N = torch.zeros(num_tokens, dtype=torch.int64)
    for teacher_targets in targets:
        teachers_N += torch.zeros_like(teachers_N).index_fill(0, teacher_targets.row_M.cpu(), 1)
    if bool((teachers_N > 1).any()):
        raise DataError(
            "two teachers have targets at one position",
            where=f"position {int((teachers_N > 1).nonzero()[0])}",
            remedy="an example has one teacher: make one example for each teacher",
        )


@dataclass(frozen=True)
class EventKLPerToken:
    """Loss of N positions in nats, and the parts of its gradient.

    The gradient of a position is the softmax, scaled by row, minus the target mass of some tokens.

    Attributes:
        loss_N: loss.
        cross_entropy_N: cross-entropy of the label.
        event_loss_N: event term before its weight.
        supervised_N: bool, whether a teacher has targets at the position.
        lse_N: log sum exp of the logits.
        scale_N: scale of the softmax; None unless targets of kind TOPK have a rest.
        row_G: position of each target token.
        token_G: target token.
        target_mass_G: its target mass.
        unscaled_row_S: position of a token that an entry names where there is a rest: not scaled.
        unscaled_token_S: that token. Its gradient is set, not corrected: where the student is
            certain the scale reaches 1e25, and a difference would keep no digits.
    """

    loss_N: torch.Tensor
    cross_entropy_N: torch.Tensor
    event_loss_N: torch.Tensor
    supervised_N: torch.Tensor
    lse_N: torch.Tensor
    scale_N: torch.Tensor | None
    row_G: torch.Tensor
    token_G: torch.Tensor
    target_mass_G: torch.Tensor
    unscaled_row_S: torch.Tensor
    unscaled_token_S: torch.Tensor

    def write_gradient(self, logits_NV: torch.Tensor, out_NV: torch.Tensor) -> None:
        """Write the gradient of loss_N.sum() with respect to the logits into `out_NV`.

        `out_NV` may be `logits_NV` itself.
        """
        unscaled_logprob_S = (
            logits_NV[self.unscaled_row_S, self.unscaled_token_S] - self.lse_N[self.unscaled_row_S]
        )
        for rows in row_slices(*logits_NV.shape):
            out_NV[rows] = logits_NV[rows].softmax(-1)
            if self.scale_N is not None:
                out_NV[rows].mul_(self.scale_N[rows, None])
        if self.scale_N is not None:
            out_NV[self.unscaled_row_S, self.unscaled_token_S] = unscaled_logprob_S.exp()
        out_NV.index_put_((self.row_G, self.token_G), -self.target_mass_G, accumulate=True)


class _EventKL(torch.autograd.Function):
    """Mean of per-token losses whose gradient is known in closed form."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, per_token: EventKLPerToken) -> torch.Tensor:
        ctx.save_for_backward(logits_NV)
        ctx.per_token = per_token
        return per_token.loss_N.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (logits_NV,) = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        ctx.per_token.write_gradient(logits_NV, gradient_NV)
        return gradient_NV.mul_(out / len(logits_NV)), None


def event_kl_loss(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    targets: Sequence[BatchTargets],
    event_weight: float,
) -> LossOutput:
    """Compute the default training objective; the module docstring has the formula.

    Args:
        logits_NV: float32 student logits at the N supervised positions, without padded columns.
        labels_N: int64 student tokens at these positions.
        targets: targets of each teacher; positions without targets get full cross-entropy.
        event_weight: a, in [0, 1].

    Returns:
        The loss, whose gradient flows to `logits_NV` only, and the metrics of `event_kl_metrics`.

    Raises:
        DataError: for logits of another vocabulary or of half precision, for no position at all,
            and if two teachers have targets at one position.
    """
    per_token = event_kl_per_token(logits_NV, labels_N, targets, event_weight)
    loss = _EventKL.apply(logits_NV, per_token)  # type: ignore[no-untyped-call]
    return LossOutput(
        loss,
        event_kl_metrics(per_token.cross_entropy_N, per_token.event_loss_N, per_token.supervised_N),
        len(labels_N),
        per_token.loss_N,
    )


def event_kl_metrics(
    cross_entropy_N: torch.Tensor, event_loss_N: torch.Tensor, supervised_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return cross-entropy and event term in nats, and the share of supervised positions.

    Each is a mean over ALL positions, so that parts of a batch, weighted by their positions, add up
    to the whole batch. The event term per supervised position is event_kl / supervised.
    """
    return {
        "cross_entropy": cross_entropy_N.mean(),
        "event_kl": event_loss_N.mean(),
        "supervised": supervised_N.double().mean(),
    }


@torch.no_grad()
def event_kl_per_token(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    targets: Sequence[BatchTargets],
    event_weight: float,
) -> EventKLPerToken:
    """Compute `event_kl_loss` for each position; arguments and errors are the same."""
    if logits_NV.dtype not in (torch.float32, torch.float64) or not len(labels_N):
        raise DataError(
            f"{len(labels_N)} positions of {logits_NV.dtype} logits",
            where="losses",
            remedy="pass float32 logits of at least one supervised position",
        )
    device, n_N = logits_NV.device, torch.arange(len(labels_N), device=logits_NV.device)
    lse_N = logsumexp_rows(logits_NV)
    text_N = lse_N - logits_NV[n_N, labels_N]
    mass_N, events_N, scale_N = (
        torch.zeros_like(text_N),
        torch.zeros_like(text_N),
        torch.ones_like(text_N),
    )
    refuse_two_teachers(targets, len(labels_N))
    rows, tokens, masses, unscaled = [n_N], [labels_N], [], [(n_N[:0], n_N[:0])]
    for one in targets:
        refuse_other_vocabulary(logits_NV, one)
        row_M, probs_M = one.row_M.to(device), one.probs_M.to(device, text_N.dtype)
        entry_G, token_G = one.entry_G.to(device), one.token_G.to(device)
        row_G = row_M[entry_G]
        values_G = logits_NV[row_G, token_G] - lse_N[row_G]
        event_logprobs_M = grouped_logsumexp(values_G, entry_G, len(row_M))
        mass_N.index_add_(0, row_M, probs_M)
        events_N.index_add_(0, row_M, -probs_M * event_logprobs_M)
        rows.append(row_G)
        tokens.append(token_G)
        share_G = (values_G - event_logprobs_M[entry_G]).exp()
        masses.append(event_weight * probs_M[entry_G] * share_G)
        if one.kind is DistributionKind.TOPK:
            rest_N = one.rest_N.to(device, text_N.dtype)
            not_in_rest = (
                torch.cat([row_G, one.excluded_row_A.to(device)]),
                torch.cat([token_G, one.excluded_token_A.to(device)]),
            )
            at, named, rest_R = _topk_rest_logprobs(logits_NV, lse_N, rest_N, *not_in_rest)
            # a rest of rounding error, with no student token left, goes to the cross-entropy
            holds = rest_R > -torch.inf
            at, rest_R = at[holds], rest_R[holds]
            mass_N[at] += rest_N[at]
            events_N[at] -= rest_N[at] * rest_R
            # the target mass of the rest: a rest q(u) / q(rest)
            scale_N[at] -= event_weight * rest_N[at] * (-rest_R).exp()
            unscaled.append(named)
    left_N = 1 - event_weight * mass_N
    row_S, token_S = (torch.cat(side) for side in zip(*unscaled, strict=True))
    has_rest = any(one.kind is DistributionKind.TOPK for one in targets)
    return EventKLPerToken(
        event_weight * events_N + left_N * text_N,
        text_N,
        events_N,
        mass_N > 0,
        lse_N,
        scale_N if has_rest else None,
        torch.cat(rows),
        torch.cat(tokens),
        torch.cat([left_N, *masses]),
        row_S,
        token_S,
    )


def _topk_rest_logprobs(
    logits_NV: torch.Tensor,
    lse_N: torch.Tensor,
    rest_N: torch.Tensor,
    row_G: torch.Tensor,
    token_G: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return positions with a rest, the named tokens, and the log-probability of all others.

    The probability is summed over the unnamed tokens themselves. 1 minus the named mass would keep
    no digits where the student is nearly certain. Each named token is listed once.
    """
    at = torch.nonzero(rest_N > 0).squeeze(-1)
    has_N = torch.zeros_like(rest_N, dtype=torch.bool).index_fill(0, at, True)
    pairs = torch.unique(torch.stack([row_G[has_N[row_G]], token_G[has_N[row_G]]]), dim=1)
    place_N = torch.zeros_like(rest_N, dtype=torch.int64).index_put(
        (at,), torch.arange(len(at), device=at.device)
    )
    out = []
    place_P = place_N[pairs[0]]
    for rows in row_slices(len(at), logits_NV.shape[1]):
        logits_FV = logits_NV[at[rows]]
        begin, end = torch.searchsorted(
            place_P, torch.tensor([rows.start, rows.stop], device=at.device)
        ).tolist()
        logits_FV[place_P[begin:end] - rows.start, pairs[1][begin:end]] = -torch.inf
        out.append(logits_FV.logsumexp(-1))
    rest_R = torch.cat(out) - lse_N[at] if out else lse_N[:0]
    return at, (pairs[0], pairs[1]), rest_R
