"""Compare the gradients of the span and event terms: cosine and ratio of norms over all weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from bench.objectives.arms import Arm, World
from bench.objectives.chunks import gathered
from bench.objectives.examples import Batch
from bench.objectives.methods import Setting, targets_of
from bench.objectives.models import make, states
from persea.losses import ImpossibleTokens, SpanTargets, event_logprobs
from persea.losses import span_likelihood_loss as chunk_term

BATCHES = 8


def of_events(logits_NV: torch.Tensor, batch: Batch, world: World) -> torch.Tensor:
    """Return the event term alone, a mean over the positions where it applies."""
    total, spoken = torch.zeros(()), 0
    for said in targets_of(batch, world.pairs, Setting("events + masks", "sampled .01", 1.0)):
        total = (
            total - (said.probs_M * event_logprobs(logits_NV, logits_NV.logsumexp(-1), said)).sum()
        )
        spoken += len(torch.unique(said.row_M))
    return total / spoken


def of_chunks(correct: bool) -> Callable[[torch.Tensor, Batch, World], torch.Tensor]:
    """Return the span term alone, with or (both sides) without boundary corrections."""

    def loss(logits_NV: torch.Tensor, batch: Batch, world: World) -> torch.Tensor:
        chunks, gone = gathered(batch, world.pairs)
        if not correct:
            nothing = torch.empty(0, dtype=torch.int64)
            gone = ImpossibleTokens(nothing, nothing)
            chunks = SpanTargets(
                chunks.span_P, chunks.position_P, chunks.begin_C, chunks.end_C, teacher_plain(batch)
            )
        return chunk_term(logits_NV, batch.labels_N, chunks, gone).loss

    return loss


def teacher_plain(batch: Batch) -> torch.Tensor:
    """Return the teacher's log-probability of every span, uncorrected, in `gathered`'s order.

    Spans of one token against one are left out.
    """
    out = []
    for group in batch.groups:
        said = torch.cat([torch.zeros(1), group.realised_T.cumsum(0)])
        s0, s1, t0, t1 = group.spans_C4.T
        mixed = (s1 - s0 != 1) | (t1 - t0 != 1)
        out.append((said[t1] - said[t0])[mixed])
    return torch.cat(out)


def gradient(
    model: LlamaForCausalLM,
    batch: Batch,
    loss_of: Callable[[torch.Tensor, Batch, World], torch.Tensor],
    world: World,
) -> torch.Tensor:
    logits_NV = states(model, batch.ids_BS, batch.learn_BS) @ model.lm_head.weight.T
    parts = torch.autograd.grad(loss_of(logits_NV, batch, world), list(model.parameters()))
    return torch.cat([p.flatten() for p in parts])


def measured(world: World, arms: dict[str, Arm | None]) -> dict[str, Any]:
    """Return mean and standard deviation over batches of cosine and norm ratio, by student.

    The span term against events; None = an untrained student.
    """
    out: dict[str, Any] = {}
    for name, arm in arms.items():
        model = make(world.size.student, len(world.speakers["student"].vocabulary), seed=1)
        if arm is not None:
            model.load_state_dict(torch.load(world.student(arm), weights_only=True))
        batches = world.batches(Arm("events", "sampled .01", 0.7, 0.0, "limited", 7))
        found: dict[str, list[tuple[float, float]]] = {"debiased": [], "plain": []}
        for _, batch in zip(range(BATCHES), batches, strict=False):
            events = gradient(model, batch, of_events, world)
            for kind in found:
                chunk = gradient(model, batch, of_chunks(kind == "debiased"), world)
                found[kind].append(
                    (
                        float(torch.nn.functional.cosine_similarity(events, chunk, dim=0)),
                        float(chunk.norm() / events.norm()),
                    )
                )
        out[name] = {
            kind: {
                "cosine": [round(float(f([c for c, _ in pairs])), 3) for f in (np.mean, np.std)],
                "norm_ratio": [
                    round(float(f([r for _, r in pairs])), 3) for f in (np.mean, np.std)
                ],
            }
            for kind, pairs in found.items()
        }
    return out
