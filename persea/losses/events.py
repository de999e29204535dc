"""Forward KL over common events, composed with cross-entropy so that every learned position carries total weight one.

For a learned position n with teacher entries p(w), each the event that any of the student's tokens E(w) is said, and the
student's probabilities q:

    loss_n = - a sum_w p(w) log sum_{u in E(w)} q(u)  +  (1 - a M_n) cross_entropy_n,     M_n = sum_w p(w)

and M_n = 0 where nothing is said. Masked (bridge, masks.py), p and E hold only what can stand where BOTH tokenizers have a
boundary; p is not renormalised, so that the loss stays linear in it and unbiased for sampled rows, and neither is q: the
student's normaliser over what can stand has weight -aM in the event term and +aM in the cross-entropy of which it is a
part, and cancels. That is what keeps a student who is right where it is: with exact masks the expected pull at the truth,
over positions with and without a common boundary, is q itself, for every a. (Renormalising q within the events alone makes
what the teacher's boundary rules out too likely by 1 / (1 - aM); tests/test_worlds.py shows both.)

The gradient with respect to the logits is q - pull: passes and memory are cross-entropy's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from persea.errors import DataError
from persea.losses.targets import Targets
from persea.losses.token import LossOut
from persea.rows import RowKind

CHUNK = 1 << 24  # elements of logits worked on at once: 64 MiB in float32


def logsumexp_rows(logits_NV: torch.Tensor) -> torch.Tensor:
    """log sum exp of each row, [N], some rows at a time."""
    rows = max(1, CHUNK // max(1, logits_NV.shape[1]))
    return torch.cat([some.logsumexp(-1) for some in torch.split(logits_NV, rows)])


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


class _Known(torch.autograd.Function):
    """A loss whose gradient is known: softmax, scaled by row, less what is pulled up at some tokens.

    pull_G belongs to (row_G, token_G); scale_N is 1 but for rows with a rest (TOPK_REST), whose named tokens (row_S, token_S) are not
    scaled: set, not added, for where the student is certain the scale is 1e25 and would leave no digits.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, loss: torch.Tensor, lse_N: torch.Tensor, scale_N: torch.Tensor, row_G: torch.Tensor,
                token_G: torch.Tensor, pull_G: torch.Tensor, row_S: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits_NV, lse_N, scale_N, row_G, token_G, pull_G, row_S, token_S)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_NV, lse_N, scale_N, row_G, token_G, pull_G, row_S, token_S = ctx.saved_tensors
        scale = out / len(logits_NV)
        gradient_NV = torch.empty_like(logits_NV)
        rows = max(1, CHUNK // max(1, logits_NV.shape[1]))
        for begin in range(0, len(logits_NV), rows):
            some = slice(begin, begin + rows)
            torch.sub(logits_NV[some], lse_N[some, None], out=gradient_NV[some])
            gradient_NV[some].exp_().mul_((scale_N[some] * scale)[:, None])
        if len(row_S):
            gradient_NV[row_S, token_S] = (logits_NV[row_S, token_S] - lse_N[row_S]).exp() * scale
        gradient_NV.index_put_((row_G, token_G), pull_G * -scale, accumulate=True)
        return gradient_NV, None, None, None, None, None, None, None, None


def composed(logits_NV: torch.Tensor, targets_N: torch.Tensor, teachers: Sequence[Targets], event_share: float) -> LossOut:
    """The default objective; see the module's formula. Gradient with respect to logits_NV only.

    logits_NV    student logits at the N learned positions (float32); columns past the vocabulary must be cut off
    targets_N    the tokens that stand there
    teachers     what each teacher says; positions no teacher speaks of get full cross-entropy
    event_share  a, in [0, 1]
    Raises DataError for logits of another vocabulary or of half precision, for no position at all, and where two teachers speak of
    one position.
    """
    if logits_NV.dtype not in (torch.float32, torch.float64) or not len(targets_N):
        raise DataError(f"{len(targets_N)} positions of {logits_NV.dtype} logits", where="losses", remedy="give float32 logits of what is learned")
    with torch.no_grad():
        device, n_N = logits_NV.device, torch.arange(len(targets_N), device=logits_NV.device)
        lse_N = logsumexp_rows(logits_NV)
        ce_N = lse_N - logits_NV[n_N, targets_N]
        mass_N, events_N, scale_N = torch.zeros_like(ce_N), torch.zeros_like(ce_N), torch.ones_like(ce_N)
        spoken_N = torch.zeros_like(ce_N, dtype=torch.bool)
        rows, tokens, pulls, unscaled = [n_N], [targets_N], [], [(n_N[:0], n_N[:0])]
        for said in teachers:
            refuse_other_vocabulary(logits_NV, said)
            here_N = torch.zeros_like(spoken_N).index_fill(0, said.row_M.to(device), True)
            if bool((spoken_N & here_N).any()):
                raise DataError("two teachers speak of one position", where=f"position {int((spoken_N & here_N).nonzero()[0])}",
                                remedy="an answer has one teacher: give each its own lesson")
            spoken_N |= here_N
            row_M, probs_M = said.row_M.to(device), said.probs_M.to(device, ce_N.dtype)
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
                rest_N = said.rest_N.to(device, ce_N.dtype)
                apart = torch.cat([row_G, said.row_A.to(device)]), torch.cat([token_G, said.token_A.to(device)])
                at, named, rest_R = _rest(logits_NV, lse_N, rest_N, *apart)
                holds = rest_R > -torch.inf  # a rounding's worth of a rest that no student token is left for: the text has it
                at, rest_R = at[holds], rest_R[holds]
                mass_N[at] += rest_N[at]
                events_N[at] -= rest_N[at] * rest_R
                scale_N[at] -= event_share * rest_N[at] * (-rest_R).exp()  # the rest's own pull: a rest q(u) / q(rest)
                unscaled.append(named)
        text_N = 1 - event_share * mass_N
        each_N = event_share * events_N + text_N * ce_N
        loss = each_N.mean()
        spoken = max(1, int((mass_N > 0).sum()))
        terms = {"cross_entropy": float(ce_N.mean()), "events": float(events_N.sum() / spoken)}
        pull_G = torch.cat([text_N, *pulls])
        row_S, token_S = (torch.cat(side) for side in zip(*unscaled, strict=True))
    known = _Known.apply(logits_NV, loss, lse_N, scale_N, torch.cat(rows), torch.cat(tokens), pull_G, row_S, token_S)  # type: ignore[no-untyped-call]
    return LossOut(known, terms, len(targets_N), each_N)


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
    rows = max(1, CHUNK // max(1, logits_NV.shape[1]))
    for begin in range(0, len(at), rows):
        some = logits_NV[at[begin:begin + rows]]
        where = (place_N[pairs[0]] >= begin) & (place_N[pairs[0]] < begin + rows)
        some[place_N[pairs[0][where]] - begin, pairs[1][where]] = -torch.inf
        out.append(some.logsumexp(-1))
    rest_R = torch.cat(out) - lse_N[at] if out else lse_N[:0]
    return at, (pairs[0], pairs[1]), rest_R
