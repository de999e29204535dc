"""Workers that sample the student's answers: the same student, and no answer of other weights."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persea import storage
from persea.errors import RefusedError, TeacherError
from persea.executors.executor import Attempt, Receipt, WorkUnit
from persea.executors.ledger import read_ledger
from persea.executors.local import InProcessExecutor
from persea.pipeline import rollout_dispatch
from persea.pipeline.rollout_dispatch import RolloutDispatch, has_rollout_workers
from persea.pipeline.rollout_worker import (
    RolloutRunner,
    RolloutUnit,
    load_weights,
    save_weights,
    write_answers,
)
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_pipeline
from persea.training.distributed.world import LaunchOptions, World
from persea.training.on_policy.sampling import SampledAnswers, SamplingUnit
from tests.cli.test_cli import flowed_copy
from tests.pipeline.test_train_stage import river

SETS = (
    "training.on_policy={start_step: 1, share: 1.0, rollouts: 8, rollouts_per_unit: 4, "
    "max_staleness_steps: 2, max_new_tokens: 12}",
    "training.steps=5",
    "training.warmup_steps=1",
    "training.checkpoint_every=100",
)


class Late(RolloutRunner):
    """Samples the third attempt, the first of a second batch, with the weights that it has."""

    asked: list[str]
    always = False

    def run(self, attempt: Attempt, on_part: Callable[[float], None]) -> Receipt:
        self.asked.append(attempt.id)
        if len(self.asked) == 3 or (self.always and len(self.asked) > 3):
            late = replace(attempt.unit.payload, weights=self._weights[0])
            attempt = replace(attempt, unit=replace(attempt.unit, payload=late))
        return super().run(attempt, on_part)


def workers(monkeypatch: pytest.MonkeyPatch, *, always: bool = False) -> list[str]:
    """Let this process be the workers; return the attempts that are asked for."""
    asked: list[str] = []

    def open_here(context: Any, factory: Any, staging: Path, num_units: int) -> InProcessExecutor:
        assert num_units == 2

        def make() -> RolloutRunner:
            made = pickle.loads(pickle.dumps(factory))()
            runner = Late(made.context, made.folder_of)
            runner.asked, runner.always = asked, always
            return runner

        return InProcessExecutor(make)

    monkeypatch.setattr(rollout_dispatch, "open_workers", open_here)
    return asked


def trained(
    folder: Path, workers: int, tell: Callable[[str], None] = lambda words: None
) -> RunContext:
    if not folder.exists():
        folder.mkdir()
        flowed_copy(folder, "check", "audition", "capture")
        (folder / "run" / "ledger.jsonl").unlink(missing_ok=True)
    context = river(folder, LaunchOptions(), *SETS, f"executor.workers={workers}")
    run_pipeline(context, lambda stage, share, words: tell(words), "train")
    return context


def weights_of(folder: Path) -> bytes:
    return (folder / "run" / "train" / "student" / "model.safetensors").read_bytes()


class Killed(BaseException):
    """As if the process ended."""


def test_workers_late_answers_and_a_kill_give_the_same_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "alone", 1)
    assert "train" not in read_ledger(tmp_path / "alone" / "run")
    asked, heard = workers(monkeypatch), list[str]()

    def kill(words: str) -> None:
        heard.append(words)
        if sum("a worker sampled" in one for one in heard) == 4:
            raise Killed

    with pytest.raises(Killed):
        trained(tmp_path / "fleet", 2, kill)
    run = tmp_path / "fleet" / "run"
    kept = sorted((run / ".rollouts").iterdir())
    assert [json.loads(p.read_text())["step"] for p in kept] == [1, 1, 3, 3]
    trained(tmp_path / "fleet", 2)
    assert weights_of(tmp_path / "fleet") == weights_of(tmp_path / "alone")
    # the batches of steps 1 and 3, one unit of them twice; the resumed training asks for none
    assert len(asked) == 5
    assert asked[4].endswith("-2")
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    failed = [line for line in lines if line["event"] == "failed"]
    assert len(failed) == 1
    assert "answers of the weights of step 3" in failed[0]["reason"]
    assert "those of step 1" in failed[0]["reason"]
    sums = read_ledger(run)["train"]
    assert (sums.planned, sums.committed, sums.pending, sums.num_attempts) == (4, 4, 0, 5)
    kept_tokens = sum(line.get("tokens_kept", 0) for line in lines if line["event"] == "committed")
    assert sums.tokens_kept == kept_tokens > 0
    ends = [x for x in lines if x["event"] in ("committed", "failed")]
    assert sums.tokens_paid == sum(x["tokens_paid"] for x in ends) > kept_tokens
    assert not (run / ".attempts").exists()
    assert not (run / ".rollouts").exists()


def test_answers_that_are_always_late_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = workers(monkeypatch, always=True)
    with pytest.raises(TeacherError, match=r"those of step 1 .* came") as raised:
        trained(tmp_path / "fleet", 2)
    assert raised.value.exit_code == 5
    assert len(asked) == 2 + 2 * 3  # three attempts at each late unit
    sums = read_ledger(tmp_path / "fleet" / "run")["train"]
    assert len(sums.quarantined) == 2
    assert not (tmp_path / "fleet" / "run" / "train" / "student").exists()


def test_weights_of_another_file_are_refused(tmp_path: Path) -> None:
    from tests.training.on_policy.test_rollouts import student

    own, path = student(), tmp_path / "weights.safetensors"
    unit = SamplingUnit(7, (np.array([1], np.int32),), (0,), 4, 1.0, 3)
    work = RolloutUnit(unit, "student", save_weights(own, path, 7), path)
    assert load_weights(own, work) == (work.weights, 7)
    with pytest.raises(TeacherError, match="the file here is"):
        load_weights(own, replace(work, weights="0" * 64))
    with pytest.raises(TeacherError, match="cannot be read: No such file"):
        load_weights(own, replace(work, path=tmp_path / "none"))
    next(iter(own.trainable_parameters)).requires_grad = False
    with pytest.raises(TeacherError, match="other names of weights"):
        load_weights(own, work)


def test_a_worker_with_another_student_is_refused(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "check", "audition", "capture")
    context = river(tmp_path, LaunchOptions(), *SETS, "executor.workers=2")
    assert has_rollout_workers(context)
    assert not has_rollout_workers(replace(context, world=World(0, 2)))
    whole = river(tmp_path, LaunchOptions(), SETS[0].replace("per_unit: 4", "per_unit: 8"))
    assert not has_rollout_workers(whole)
    unit = SamplingUnit(7, (), (0,), 4, 1.0, 3)
    attempt = Attempt(WorkUnit("u", "student", RolloutUnit(unit, "other", "", tmp_path)), 1)
    runner = RolloutRunner(context, lambda attempt: tmp_path / attempt.id)
    with pytest.raises(RefusedError, match="others than where the run was started"):
        runner.run(attempt, lambda share: None)


@pytest.mark.parametrize("problem", ["none", "cut", "few", "receipt", "fine"])
def test_only_whole_answers_become_a_unit(tmp_path: Path, problem: str) -> None:
    flowed_copy(tmp_path, "check")
    context = river(tmp_path, LaunchOptions(), *SETS)
    dispatch = RolloutDispatch(context, {}, lambda step, words: None)
    vars(dispatch)["_dispatcher"] = type("", (), {"ledger": type("", (), {"kept_units": ()})})
    work = RolloutUnit(SamplingUnit(7, (), (0,), 4, 1.0, 3), "student", "w" * 64, tmp_path)
    attempt = Attempt(WorkUnit("u", "student", work), 1)
    path = dispatch.staging / attempt.id / "answers.json"
    ids = (np.array([1], np.int32),) * (problem == "few")
    if problem != "none":
        write_answers(path, SampledAnswers(7, ids, work.weights))
    digest = storage.digest_file(path) if path.exists() else ""
    if problem == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    receipt = Receipt(attempt.id, "w", 1.0, 1, 1, digest if problem != "receipt" else "other")
    if problem == "fine":
        assert dispatch._publish(attempt.unit, attempt, receipt)
        assert dispatch._read_committed("u", work).step == 7
    else:
        with pytest.raises(TeacherError, match="answers of the weights of step 7"):
            dispatch._publish(attempt.unit, attempt, receipt)
        with pytest.raises(TeacherError, match="no whole answers are there"):
            dispatch._read_committed("u", work)
    assert not path.parent.exists()
