"""Forward KL over common events, composed with cross-entropy so that every learned position carries total weight one.

For a learned position n with teacher entries p(w), each the event that any of the student's tokens E(w) is said, and the
student's probabilities q:

    loss_n = - a sum_w p(w) log sum_{u in E(w)} q(u)  +  (1 - a M_n) cross_entropy_n,     M_n = sum_w p(w)

and M_n = 0 where nothing is said. Masked (bridge, masks.py), p and E hold only what can stand where BOTH tokenizers have a
boundary; p is not renormalised, so that the loss stays linear in it and unbiased for sampled rows, and neither is q: the
student's normaliser over what can stand has weight -aM in the event term and +aM in the cross-entropy of which it is a
part, and cancels. That is what keeps a student who is right where it is: with exact masks the expected pull at the truth,
over positions with and without a common boundary, is q itself, for every a. (Renormalising q within the events alone makes
what the teacher's boundary rules out too likely by 1 / (1 - aM); tests/bench/test_worlds.py shows both.)

The gradient with respect to the logits is q - pull: passes and memory are cross-entropy's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from persea.distributions import DistributionKind
from persea.errors import DataError
from persea.losses.divergence import LossOutput
from persea.losses.targets import BatchTargets

CPU_CACHE_ELEMENTS = (
    1 << 18
)  # elements of logits worked on at once: 1 MiB in float32, which a core's own cache holds


def row_slices(rows: int, columns: int) -> list[slice]:
    """Rows of a matrix, so many at a time that one operation's result stays in a core's cache."""
    step = max(1, CPU_CACHE_ELEMENTS // max(1, columns))
    return [slice(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def logsumexp_rows(logits_NV: torch.Tensor) -> torch.Tensor:
    """Log sum exp of each row, [N], some rows at a time: the highest logit less the log of its probability, for torch's softmax takes
    half the time of its logsumexp.
    """
    return torch.cat(
        [
            logits_NV[some].amax(-1) - logits_NV[some].softmax(-1).amax(-1).log()
            for some in row_slices(*logits_NV.shape)
        ]
    )


def grouped_logsumexp(
    values_G: torch.Tensor, entry_G: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Of each of m groups. Exact: each group's own maximum is taken out, so that an event of probability 1e-60 counts too."""
    top_M = torch.full((num_groups,), -torch.inf, dtype=values_G.dtype, device=values_G.device)
    top_M = top_M.scatter_reduce(0, entry_G, values_G.detach(), "amax")
    return (
        torch.zeros_like(top_M).index_add(0, entry_G, (values_G - top_M[entry_G]).exp()).log()
        + top_M
    )


def event_logprobs(
    logits_NV: torch.Tensor, lse_N: torch.Tensor, targets: BatchTargets
) -> torch.Tensor:
    """Log of the student's probability of each entry's event, natural, [M]; differentiable.

    Only the tokens of the events asked for are gathered: no [positions, events] matrix, no sort.
    """
    refuse_other_vocabulary(logits_NV, targets)
    row_M = targets.row_M.to(logits_NV.device)
    entry_G, token_G = targets.entry_G.to(logits_NV.device), targets.token_G.to(logits_NV.device)
    values_G = logits_NV[row_M[entry_G], token_G]
    return grouped_logsumexp(values_G, entry_G, len(row_M)) - lse_N[row_M]


def refuse_other_vocabulary(logits_NV: torch.Tensor, targets: BatchTargets) -> None:
    """Raises DataError where logits have more or fewer columns than the bridge knows student tokens."""
    if logits_NV.shape[-1] != targets.vocab_size:
        raise DataError(
            f"{logits_NV.shape[-1]} logits a position, but the student's tokenizer has {targets.vocab_size} tokens",
            where="losses",
            remedy="cut the padded columns off; where columns are missing, the tokenizer is another model's",
        )


def refuse_two_teachers(targets: Sequence[BatchTargets], num_tokens: int) -> None:
    """Raises DataError where two teachers speak of one of so many positions."""
    spoken_N = torch.zeros(num_tokens, dtype=torch.int64)
    for said in targets:
        spoken_N += torch.zeros_like(spoken_N).index_fill(0, said.row_M.cpu(), 1)
    if bool((spoken_N > 1).any()):
        raise DataError(
            "two teachers speak of one position",
            where=f"position {int((spoken_N > 1).nonzero()[0])}",
            remedy="an answer has one teacher: give each its own lesson",
        )


@dataclass(frozen=True)
class EventKLPerToken:
    """What N positions cost, nats, and what the gradient of each is made of: softmax, scaled by row, less what is pulled up at some tokens.

    pull_G belongs to (row_G, token_G); scale_N is None but where rows have a rest (TOPK_REST), whose named tokens (row_S, token_S) are not
    scaled: set, not added, for where the student is certain the scale is 1e25 and would leave no digits.
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
        """Write the gradient of loss_N.sum() with respect to the logits; `into_NV` may be the logits themselves."""
        kept_S = (
            logits_NV[self.unscaled_row_S, self.unscaled_token_S] - self.lse_N[self.unscaled_row_S]
        )
        for some in row_slices(*logits_NV.shape):
            out_NV[some] = logits_NV[some].softmax(-1)
            if self.scale_N is not None:
                out_NV[some].mul_(self.scale_N[some, None])
        if self.scale_N is not None:
            out_NV[self.unscaled_row_S, self.unscaled_token_S] = kept_S.exp()
        out_NV.index_put_((self.row_G, self.token_G), -self.target_mass_G, accumulate=True)


class _EventKL(torch.autograd.Function):
    """The mean of losses whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, known: EventKLPerToken) -> torch.Tensor:
        ctx.save_for_backward(logits_NV)
        ctx.known = known
        return known.loss_N.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (logits_NV,) = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        ctx.known.write_gradient(logits_NV, gradient_NV)
        return gradient_NV.mul_(out / len(logits_NV)), None


def event_kl_loss(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    targets: Sequence[BatchTargets],
    event_weight: float,
) -> LossOutput:
    """The default objective; see the module's formula. Gradient with respect to logits_NV only.

    logits_NV    student logits at the N learned positions (float32); columns past the vocabulary must be cut off
    targets_N    the tokens that stand there
    teachers     what each teacher says; positions no teacher speaks of get full cross-entropy
    event_share  a, in [0, 1]
    Raises DataError for logits of another vocabulary or of half precision, for no position at all, and where two teachers speak of
    one position.
    """
    known = event_kl_per_token(logits_NV, labels_N, targets, event_weight)
    loss = _EventKL.apply(logits_NV, known)  # type: ignore[no-untyped-call]
    return LossOutput(
        loss,
        event_kl_metrics(known.cross_entropy_N, known.event_loss_N, known.supervised_N),
        len(labels_N),
    )


def event_kl_metrics(
    cross_entropy_N: torch.Tensor, event_loss_N: torch.Tensor, supervised_N: torch.Tensor
) -> dict[str, float]:
    """Cross-entropy and event term, nats, and the share of positions that a teacher speaks of: each a mean over ALL positions, so that parts of a
    batch, weighted by their positions, add up to the whole (the event term where a teacher speaks is events / spoken).
    """
    return {
        "cross_entropy": float(cross_entropy_N.mean()),
        "events": float(event_loss_N.mean()),
        "spoken": float(supervised_N.double().mean()),
    }


@torch.no_grad()
def event_kl_per_token(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    targets: Sequence[BatchTargets],
    event_weight: float,
) -> EventKLPerToken:
    """`composed`, position by position."""
    if logits_NV.dtype not in (torch.float32, torch.float64) or not len(labels_N):
        raise DataError(
            f"{len(labels_N)} positions of {logits_NV.dtype} logits",
            where="losses",
            remedy="give float32 logits of what is learned",
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
    rows, tokens, pulls, unscaled = [n_N], [labels_N], [], [(n_N[:0], n_N[:0])]
    for said in targets:
        refuse_other_vocabulary(logits_NV, said)
        row_M, probs_M = said.row_M.to(device), said.probs_M.to(device, text_N.dtype)
        entry_G, token_G = said.entry_G.to(device), said.token_G.to(device)
        row_G = row_M[entry_G]
        values_G = logits_NV[row_G, token_G] - lse_N[row_G]
        event_logprobs_M = grouped_logsumexp(values_G, entry_G, len(row_M))
        mass_N.index_add_(0, row_M, probs_M)
        events_N.index_add_(0, row_M, -probs_M * event_logprobs_M)
        rows.append(row_G)
        tokens.append(token_G)
        pulls.append(event_weight * probs_M[entry_G] * (values_G - event_logprobs_M[entry_G]).exp())
        if said.kind is DistributionKind.TOPK:
            rest_N = said.rest_N.to(device, text_N.dtype)
            apart = (
                torch.cat([row_G, said.excluded_row_A.to(device)]),
                torch.cat([token_G, said.excluded_token_A.to(device)]),
            )
            at, named, rest_R = _topk_rest_logprobs(logits_NV, lse_N, rest_N, *apart)
            holds = (
                rest_R > -torch.inf
            )  # a rounding's worth of a rest that no student token is left for: the text has it
            at, rest_R = at[holds], rest_R[holds]
            mass_N[at] += rest_N[at]
            events_N[at] -= rest_N[at] * rest_R
            scale_N[at] -= (
                event_weight * rest_N[at] * (-rest_R).exp()
            )  # the rest's own pull: a rest q(u) / q(rest)
            unscaled.append(named)
    left_N = 1 - event_weight * mass_N
    row_S, token_S = (torch.cat(side) for side in zip(*unscaled, strict=True))
    rests = any(said.kind is DistributionKind.TOPK for said in targets)
    return EventKLPerToken(
        event_weight * events_N + left_N * text_N,
        text_N,
        events_N,
        mass_N > 0,
        lse_N,
        scale_N if rests else None,
        torch.cat(rows),
        torch.cat(tokens),
        torch.cat([left_N, *pulls]),
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
    """Positions with a rest, the tokens named there (each once), and log of the student's probability of all others.

    Summed over the others themselves, not as 1 - named, which has no digits left where the student is nearly certain.
    """
    at = torch.nonzero(rest_N > 0).squeeze(-1)
    has_N = torch.zeros_like(rest_N, dtype=torch.bool).index_fill(0, at, True)
    pairs = torch.unique(torch.stack([row_G[has_N[row_G]], token_G[has_N[row_G]]]), dim=1)
    place_N = torch.zeros_like(rest_N, dtype=torch.int64).index_put(
        (at,), torch.arange(len(at), device=at.device)
    )
    out = []
    place_P = place_N[pairs[0]]
    for few in row_slices(len(at), logits_NV.shape[1]):
        some = logits_NV[at[few]]
        begin, end = torch.searchsorted(
            place_P, torch.tensor([few.start, few.stop], device=at.device)
        ).tolist()
        some[place_P[begin:end] - few.start, pairs[1][begin:end]] = -torch.inf
        out.append(some.logsumexp(-1))
    rest_R = torch.cat(out) - lse_N[at] if out else lse_N[:0]
    return at, (pairs[0], pairs[1]), rest_R
