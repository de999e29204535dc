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

from persea.distributions import RowKind
from persea.errors import DataError
from persea.losses.divergence import LossOut
from persea.losses.targets import Targets

PIECE = 1 << 18  # elements of logits worked on at once: 1 MiB in float32, which a core's own cache holds


def pieces(rows: int, columns: int) -> list[slice]:
    """Rows of a matrix, so many at a time that one operation's result stays in a core's cache."""
    step = max(1, PIECE // max(1, columns))
    return [slice(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def logsumexp_rows(logits_NV: torch.Tensor) -> torch.Tensor:
    """log sum exp of each row, [N], some rows at a time: the highest logit less the log of its probability, for torch's softmax takes
    half the time of its logsumexp."""
    return torch.cat([logits_NV[some].amax(-1) - logits_NV[some].softmax(-1).amax(-1).log() for some in pieces(*logits_NV.shape)])


def grouped_logsumexp(values_G: torch.Tensor, entry_G: torch.Tensor, m: int) -> torch.Tensor:
    """Of each of m groups. Exact: each group's own maximum is taken out, so that an event of probability 1e-60 counts too."""
    top_M = torch.full((m,), -torch.inf, dtype=values_G.dtype, device=values_G.device)
    top_M = top_M.scatter_reduce(0, entry_G, values_G.detach(), "amax")
    return torch.zeros_like(top_M).index_add(0, entry_G, (values_G - top_M[entry_G]).exp()).log() + top_M


def event_logprobs(logits_NV: torch.Tensor, lse_N: torch.Tensor, said: Targets) -> torch.Tensor:
    """log of the student's probability of each entry's event, natural, [M]; differentiable.

    Only the tokens of the events asked for are gathered: no [positions, events] matrix, no sort.
    """
    refuse_other_vocabulary(logits_NV, said)
    row_M = said.row_M.to(logits_NV.device)
    entry_G, token_G = said.entry_G.to(logits_NV.device), said.token_G.to(logits_NV.device)
    values_G = logits_NV[row_M[entry_G], token_G]
    return grouped_logsumexp(values_G, entry_G, len(row_M)) - lse_N[row_M]


def refuse_other_vocabulary(logits_NV: torch.Tensor, said: Targets) -> None:
    """Raises DataError where logits have more or fewer columns than the bridge knows student tokens."""
    if logits_NV.shape[-1] != said.vocabulary:
        raise DataError(f"{logits_NV.shape[-1]} logits a position, but the student's tokenizer has {said.vocabulary} tokens", where="losses",
                        remedy="cut the padded columns off; where columns are missing, the tokenizer is another model's")


def refuse_two_teachers(teachers: Sequence[Targets], positions: int) -> None:
    """Raises DataError where two teachers speak of one of so many positions."""
    spoken_N = torch.zeros(positions, dtype=torch.int64)
    for said in teachers:
        spoken_N += torch.zeros_like(spoken_N).index_fill(0, said.row_M.cpu(), 1)
    if bool((spoken_N > 1).any()):
        raise DataError("two teachers speak of one position", where=f"position {int((spoken_N > 1).nonzero()[0])}",
                        remedy="an answer has one teacher: give each its own lesson")


@dataclass(frozen=True)
class Known:
    """What N positions cost, nats, and what the gradient of each is made of: softmax, scaled by row, less what is pulled up at some tokens.

    pull_G belongs to (row_G, token_G); scale_N is None but where rows have a rest (TOPK_REST), whose named tokens (row_S, token_S) are not
    scaled: set, not added, for where the student is certain the scale is 1e25 and would leave no digits.
    """

    loss_N: torch.Tensor
    text_N: torch.Tensor
    events_N: torch.Tensor
    spoken_N: torch.Tensor
    lse_N: torch.Tensor
    scale_N: torch.Tensor | None
    row_G: torch.Tensor
    token_G: torch.Tensor
    pull_G: torch.Tensor
    row_S: torch.Tensor
    token_S: torch.Tensor

    def gradient(self, logits_NV: torch.Tensor, into_NV: torch.Tensor) -> None:
        """Write the gradient of loss_N.sum() with respect to the logits; `into_NV` may be the logits themselves."""
        kept_S = logits_NV[self.row_S, self.token_S] - self.lse_N[self.row_S]
        for some in pieces(*logits_NV.shape):
            into_NV[some] = logits_NV[some].softmax(-1)
            if self.scale_N is not None:
                into_NV[some].mul_(self.scale_N[some, None])
        if self.scale_N is not None:
            into_NV[self.row_S, self.token_S] = kept_S.exp()
        into_NV.index_put_((self.row_G, self.token_G), -self.pull_G, accumulate=True)


class _Composed(torch.autograd.Function):
    """The mean of losses whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, known: Known) -> torch.Tensor:
        ctx.save_for_backward(logits_NV)
        ctx.known = known
        return known.loss_N.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (logits_NV,) = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        ctx.known.gradient(logits_NV, gradient_NV)
        return gradient_NV.mul_(out / len(logits_NV)), None


def composed(logits_NV: torch.Tensor, targets_N: torch.Tensor, teachers: Sequence[Targets], event_share: float) -> LossOut:
    """The default objective; see the module's formula. Gradient with respect to logits_NV only.

    logits_NV    student logits at the N learned positions (float32); columns past the vocabulary must be cut off
    targets_N    the tokens that stand there
    teachers     what each teacher says; positions no teacher speaks of get full cross-entropy
    event_share  a, in [0, 1]
    Raises DataError for logits of another vocabulary or of half precision, for no position at all, and where two teachers speak of
    one position.
    """
    known = composed_rows(logits_NV, targets_N, teachers, event_share)
    loss = _Composed.apply(logits_NV, known)  # type: ignore[no-untyped-call]
    return LossOut(loss, composed_terms(known.text_N, known.events_N, known.spoken_N), len(targets_N))


def composed_terms(text_N: torch.Tensor, events_N: torch.Tensor, spoken_N: torch.Tensor) -> dict[str, float]:
    """Cross-entropy and event term, nats, and the share of positions that a teacher speaks of: each a mean over ALL positions, so that parts of a
    batch, weighted by their positions, add up to the whole (the event term where a teacher speaks is events / spoken)."""
    return {"cross_entropy": float(text_N.mean()), "events": float(events_N.mean()), "spoken": float(spoken_N.double().mean())}


@torch.no_grad()
def composed_rows(logits_NV: torch.Tensor, targets_N: torch.Tensor, teachers: Sequence[Targets], event_share: float) -> Known:
    """`composed`, position by position."""
    if logits_NV.dtype not in (torch.float32, torch.float64) or not len(targets_N):
        raise DataError(f"{len(targets_N)} positions of {logits_NV.dtype} logits", where="losses", remedy="give float32 logits of what is learned")
    device, n_N = logits_NV.device, torch.arange(len(targets_N), device=logits_NV.device)
    lse_N = logsumexp_rows(logits_NV)
    text_N = lse_N - logits_NV[n_N, targets_N]
    mass_N, events_N, scale_N = torch.zeros_like(text_N), torch.zeros_like(text_N), torch.ones_like(text_N)
    refuse_two_teachers(teachers, len(targets_N))
    rows, tokens, pulls, unscaled = [n_N], [targets_N], [], [(n_N[:0], n_N[:0])]
    for said in teachers:
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
        pulls.append(event_share * probs_M[entry_G] * (values_G - event_logprobs_M[entry_G]).exp())
        if said.kind is RowKind.TOPK_REST:
            rest_N = said.rest_N.to(device, text_N.dtype)
            apart = torch.cat([row_G, said.row_A.to(device)]), torch.cat([token_G, said.token_A.to(device)])
            at, named, rest_R = _rest(logits_NV, lse_N, rest_N, *apart)
            holds = rest_R > -torch.inf  # a rounding's worth of a rest that no student token is left for: the text has it
            at, rest_R = at[holds], rest_R[holds]
            mass_N[at] += rest_N[at]
            events_N[at] -= rest_N[at] * rest_R
            scale_N[at] -= event_share * rest_N[at] * (-rest_R).exp()  # the rest's own pull: a rest q(u) / q(rest)
            unscaled.append(named)
    left_N = 1 - event_share * mass_N
    row_S, token_S = (torch.cat(side) for side in zip(*unscaled, strict=True))
    rests = any(said.kind is RowKind.TOPK_REST for said in teachers)
    return Known(event_share * events_N + left_N * text_N, text_N, events_N, mass_N > 0, lse_N, scale_N if rests else None,
                 torch.cat(rows), torch.cat(tokens), torch.cat([left_N, *pulls]), row_S, token_S)


def _rest(logits_NV: torch.Tensor, lse_N: torch.Tensor, rest_N: torch.Tensor, row_G: torch.Tensor, token_G: torch.Tensor
          ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Positions with a rest, the tokens named there (each once), and log of the student's probability of all others.

    Summed over the others themselves, not as 1 - named, which has no digits left where the student is nearly certain.
    """
    at = torch.nonzero(rest_N > 0).squeeze(-1)
    has_N = torch.zeros_like(rest_N, dtype=torch.bool).index_fill(0, at, True)
    pairs = torch.unique(torch.stack([row_G[has_N[row_G]], token_G[has_N[row_G]]]), dim=1)
    place_N = torch.zeros_like(rest_N, dtype=torch.int64).index_put((at,), torch.arange(len(at), device=at.device))
    out = []
    place_P = place_N[pairs[0]]
    for few in pieces(len(at), logits_NV.shape[1]):
        some = logits_NV[at[few]]
        begin, end = torch.searchsorted(place_P, torch.tensor([few.start, few.stop], device=at.device)).tolist()
        some[place_P[begin:end] - few.start, pairs[1][begin:end]] = -torch.inf
        out.append(some.logsumexp(-1))
    rest_R = torch.cat(out) - lse_N[at] if out else lse_N[:0]
    return at, (pairs[0], pairs[1]), rest_R
