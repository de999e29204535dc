"""Advice: what a teacher says of a student's own tokens (beside.py), as a loss from hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from persea.chat.messages import Tokens
from persea.losses import Chunks, Dead, Divergence, Head, LossOut, Sides, chunk, divergence_head
from persea.training.loss_balancing import Taught
from persea.training.on_policy.candidates import Likely
from persea.training.on_policy.teacher_scores import Pair


@dataclass(frozen=True)
class Advice:
    """What a teacher says of some answers, as a loss.

    place_P  learned positions, counted through the answers; weight  how many the loss is the mean of (chunk: stretches)
    loss     from hidden states and targets at these positions, and the head
    """

    place_P: torch.Tensor
    weight: int
    loss: Callable[[torch.Tensor, Head, torch.Tensor], LossOut]

    def told(self, out: LossOut, weight: float) -> Taught:
        """What is said of it, once its loss is known and counts so much."""
        assert out.each_N is not None
        pull = math.nan if out.pull_N is None else weight * float(out.pull_N.double().sum())
        return Taught(self.weight, float(out.each_N.double().sum()), float(out.each_N.double().square().sum()), pull)


def advice(pair: Pair, some: Sequence[tuple[Tokens, Tokens]], objective: str, found: Likely | None = None) -> Advice:
    """Of answers in the student's own tokens and in the teacher's. objective: events (whole rows, and runs of markers) or chunk. found: as in
    `Pair.rows`."""
    if objective == "chunk":
        chunks, dead = pair.chunks(some, found)
        every_P = torch.arange(sum(int(own.learn_T.sum()) for own, _ in some))
        return Advice(every_P, len(chunks.teacher_C), lambda hidden, head, targets: chunk(head.logits(hidden), targets, chunks, dead))
    beside = pair.rows(some, found)
    sides, events = Sides(pair.bridge, beside.student_dead, beside.teacher_dead), len(beside.place_C)
    every_P, marks, dead = _among(beside.marks, beside.marks_dead)
    runs = len(marks.teacher_C)

    def loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> LossOut:
        """The mean over common boundaries and runs of markers: each has the gradient of its reverse KL."""
        parts = []
        if events:
            parts.append(divergence_head(hidden[:events], head, beside.teacher, sides, Divergence.REVERSE))
        if runs:
            own_PD = hidden[events:]
            said = chunk(head.logits(own_PD), targets[events:], marks, dead)
            (pull_PD,) = torch.autograd.grad(said.loss, own_PD, retain_graph=True) if own_PD.requires_grad else (None,)
            parts.append(said if pull_PD is None else replace(said, pull_N=torch.linalg.vector_norm(pull_PD.float(), dim=1) * said.positions))
        mean = torch.stack([one.loss * one.positions for one in parts]).sum() / (events + runs)
        each_N = torch.cat([one.each_N for one in parts if one.each_N is not None])
        pulls = [one.pull_N for one in parts if one.pull_N is not None]
        return LossOut(mean, {}, events + runs, each_N, torch.cat(pulls) if len(pulls) == len(parts) else None)

    return Advice(torch.cat([beside.place_C, every_P]), events + runs, loss)


def _among(chunks: Chunks, dead: Dead) -> tuple[torch.Tensor, Chunks, Dead]:
    """Chunks of many positions as those of the few they need: (these, chunks, dead)."""
    n, c, end_C = len(chunks.position_P), len(chunks.begin_C), chunks.end_C.clone()
    few_P, place_Q = torch.unique(torch.cat([chunks.position_P, chunks.begin_C, end_C[end_C >= 0]]), return_inverse=True)
    end_C[end_C >= 0] = place_Q[n + c:]
    said = Chunks(chunks.chunk_P, place_Q[:n], place_Q[n:n + c], end_C, chunks.teacher_C)
    return few_P, said, Dead(torch.searchsorted(few_P, dead.row_D), dead.token_D)
