"""What a teacher says of a student's own tokens, as one loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from persea.losses import Divergence, Head, Sides, chunk, divergence_head
from persea.training.on_policy.loss import advice
from tests.teachers.engines.test_transformers import opened
from tests.training.on_policy.test_rollouts import STUDENT, pair
from tests.training.on_policy.test_teacher_scores import spoken, structured


@pytest.mark.parametrize("name", ["qwen-sapling", "gpt-oss-sapling"])
def test_events_and_stretches_count_alike(name: str) -> None:
    """The mean over boundaries and stretches, each with its own loss; the gradient is that of the two apart, and what is told adds up."""
    some, here = [*spoken(name), *structured(name)], pair(name)
    size, learned = len(opened(STUDENT)[0].vocabulary), sum(int(own.learn_T.sum()) for own, _ in some)
    torch.manual_seed(0)
    hidden_LD = torch.randn(learned, 16, requires_grad=True)
    head = Head(torch.randn(size, 16) / 4, size)
    targets_L = torch.from_numpy(np.concatenate([own.ids_T[own.learn_T] for own, _ in some])).long()
    said, beside = advice(here, some, "events"), here.rows(some)
    out = said.loss(hidden_LD[said.place_P], head, targets_L[said.place_P])
    rows = divergence_head(hidden_LD[beside.place_C], head, beside.logprobs_CW, Sides(here.bridge, beside.student_dead, beside.teacher_dead),
                           Divergence.REVERSE)
    runs = chunk(head.logits(hidden_LD), targets_L, beside.marks, beside.marks_dead)
    assert said.weight == rows.positions + runs.positions and min(rows.positions, runs.positions) > 0
    want = (rows.loss * rows.positions + runs.loss * runs.positions) / said.weight
    assert float(out.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    (mine,), (apart,) = (torch.autograd.grad(loss, hidden_LD, retain_graph=True) for loss in (out.loss, want))
    assert torch.allclose(mine, apart, atol=1e-6)
    told = said.told(out, 2.0)
    assert told.positions == said.weight and told.nats == pytest.approx(float(want.detach()) * said.weight, rel=1e-5)
    assert told.pull == pytest.approx(2 * float(out.pull_N.sum())) and math.isfinite(told.squares)


def test_of_chunks_alone_every_learned_position_may_be_asked() -> None:
    some, here = spoken("qwen-sapling"), pair("qwen-sapling")
    said, (chunks, _) = advice(here, some, "chunk"), here.chunks(some)
    assert said.place_P.tolist() == list(range(sum(int(own.learn_T.sum()) for own, _ in some)))
    assert said.weight == len(chunks.teacher_C) > 0
