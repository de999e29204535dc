"""A student whose own answers collapse is stopped; the last good checkpoint is kept and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persea.config.schema import OnPolicySection
from persea.errors import RefusedError
from persea.losses import LMHead
from persea.training.on_policy.candidates import mean_entropy
from persea.training.on_policy.tripwires import FINE, Tripwires
from tests.training.on_policy.test_rollouts import source
from tests.training.test_loop import INPUTS, SETTINGS, Out, run

CONFIG = OnPolicySection(start_step=0, tripwire_steps=2)
HEALTHY = {"rollout_tokens": 40.0, "rollout_ended": 0.9, "rollout_entropy": 1.5}


def observed(wires: Tripwires, *steps: dict[str, float]) -> list[tuple[bool, str]]:
    verdicts = [wires.observe(HEALTHY | step) for step in steps]
    return [(v.is_suspect, v.problem) for v in verdicts]


def test_the_first_steps_are_the_reference_and_healthy_ones_pass() -> None:
    found = observed(Tripwires(CONFIG), {}, {}, {"rollout_tokens": 20.0}, {"rollout_ended": 0.5})
    assert found == [(False, "")] * 4


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"rollout_tokens": 4.0}, "the mean length of the student's answers is 0.10 of that of"),
        ({"rollout_tokens": 200.0}, "the mean length of the student's answers is 5.00 of that of"),
        ({"rollout_ended": 0.1}, "the share of the student's answers that end is 0.11 of that of"),
        ({"rollout_entropy": 0.01}, "the entropy of the student's answers is 0.01 of that of"),
        ({"rollout_entropy": 9.0}, "the entropy of the student's answers is 6.00 of that of"),
    ],
)
def test_each_collapse_is_suspect_at_once_and_a_problem_when_it_lasts(
    step: dict[str, float], words: str
) -> None:
    wires = Tripwires(CONFIG)
    first, second, third, fourth = observed(wires, {}, {}, {}, step)
    assert [first, second, third] == [(False, "")] * 3
    assert fourth[0]
    ((suspect, problem),) = observed(wires, step)
    assert suspect
    assert problem.startswith(words)


def test_one_odd_step_passes() -> None:
    found = observed(Tripwires(CONFIG), {}, {}, {}, {"rollout_tokens": 8.0}, {}, {})
    assert found == [(False, "")] * 3 + [(True, "")] + [(False, "")] * 2


def test_what_never_was_cannot_be_lost() -> None:
    never = {"rollout_ended": 0.0}
    assert observed(Tripwires(CONFIG), *([never] * 6)) == [(False, "")] * 6


def test_other_steps_say_nothing_and_zero_switches_the_wires_off() -> None:
    wires = Tripwires(CONFIG)
    assert wires.observe({"event_kl": 1.0}) is FINE
    assert wires.first == []
    off = Tripwires(OnPolicySection(start_step=0, tripwire_steps=0))
    assert observed(off, {}, *([{"rollout_tokens": 0.0}] * 9)) == [(False, "")] * 10


def test_a_checkpoint_carries_the_reference() -> None:
    wires, resumed = Tripwires(CONFIG), Tripwires(CONFIG)
    observed(wires, {}, {}, {"rollout_tokens": 2.0})
    resumed.restore(json.loads(json.dumps(wires.to_json())))
    assert observed(resumed, {"rollout_tokens": 2.0}) == observed(wires, {"rollout_tokens": 2.0})
    assert resumed.to_json() == wires.to_json()


# --- in the training loop ---


def collapse(at: int) -> Callable[[int, Out], Out]:
    """From a step on the student's answers have no length."""

    def change(step: int, out: Out) -> Out:
        terms = HEALTHY | ({"rollout_tokens": 1.0} if step >= at else {})
        metrics = {name: torch.tensor(value) for name, value in terms.items()}
        return replace(out, metrics=metrics)

    return change


def test_an_injected_collapse_ends_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    settings = replace(SETTINGS, checkpoint_every=1)
    wires = Tripwires(CONFIG)
    with pytest.raises(RefusedError) as caught:
        run(tmp_path, settings, change=collapse(6), watch=wires.observe)
    assert caught.value.exit_code == 4
    assert caught.value.where == "train, step 8"
    newest = max((tmp_path / "checkpoints").glob("*.json"))
    assert newest.name == "step-00000006.json"
    assert f"{newest} is the last good checkpoint" in str(caught.value)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 8
    assert lines[-1]["terms"]["rollout_tokens"] == 1.0
    loosened = Tripwires(OnPolicySection(start_step=0, tripwire_steps=0))
    went_on = run(tmp_path, settings, INPUTS, collapse(6), watch=loosened.observe)
    assert went_on.steps == list(range(6, 12))


def test_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no checkpoint was due before"):
        run(
            tmp_path,
            replace(SETTINGS, checkpoint_every=100),
            change=collapse(3),
            watch=Tripwires(CONFIG).observe,
        )


# --- what is measured ---


def test_the_entropy_is_that_of_the_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (9, 50))
    logits = hidden @ weight.T
    logprobs = logits.log_softmax(-1)
    exact = -(logprobs.exp() * logprobs).sum(-1)
    assert mean_entropy(hidden, LMHead(weight, 50), 100) == pytest.approx(
        float(exact.mean()), rel=1e-5
    )
    assert mean_entropy(hidden, LMHead(weight, 50), 3) == pytest.approx(
        float(exact[[0, 3, 6]].mean()), rel=1e-5
    )


def test_the_metrics_of_a_step_are_those_of_its_answers() -> None:
    own = source("qwen-sapling")
    out, _ = own.loss(3)
    batch: Any = own._in_flight
    stops = own.student.renderer.stop_ids
    ended = [len(ids) > 0 and int(ids[-1]) in stops for ids in batch.ids[:2]]
    assert float(out.metrics["rollout_ended"]) == np.mean(ended)
    assert 0 < float(out.metrics["rollout_entropy"]) < np.log(len(own.student.renderer.vocabulary))
    terms = {name: float(value) for name, value in out.metrics.items()}
    assert own.observe(terms) is FINE
    resumed = source("qwen-sapling", of=own.student)
    resumed.restore((own.state(),))
    assert resumed._tripwires.first == own._tripwires.first != []
