"""The stage train in one process and several: each part of a batch is itself, and what a person
sees of it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from persea import storage as store
from persea.cli import run as stages
from persea.cli.options import make_run_context
from persea.errors import RecipeError, RefusedError, RunInterrupted
from persea.losses import EventKL, LMHead, LossOutput
from persea.pipeline import train_stage as teach
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_pipeline
from persea.pipeline.status import RunState, read_status
from persea.pipeline.train_stage import format_step, group_stats, held_out_loss
from persea.training.dataset import DistillDataset, build_dataset
from persea.training.distributed.world import LaunchOptions, ParallelStrategy, World
from persea.training.loss_balancing import Group, GroupStats
from persea.training.on_policy.sampling import OwnSampler
from tests.cli.test_cli import enter, flowed, flowed_copy, persea, recipe, warm

LINE: dict[str, Any] = {
    "step": 3,
    "loss": 1.25,
    "gradient_norm": 1.0,
    "positions": 300,
    "seconds": 2.0,
    "left": 3723,
}


def test_a_step_in_a_few_words() -> None:
    assert format_step(LINE) == "loss 1.250, 150 tokens/s, 1:02:03 left"
    assert format_step(LINE | {"loss": float("nan")}) == "step 3 skipped: loss nan, gradient norm 1"


def test_what_each_group_taught_adds_up() -> None:
    qwen, gemma = Group("qwen", "languages"), Group("gemma", "code")
    batch: Any = SimpleNamespace(
        group_B=(qwen, gemma, qwen),
        row_N=torch.tensor([0, 0, 1, 2]),
        tokens_by_group={qwen: 3, gemma: 1},
    )
    each = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert group_stats(batch, LossOutput(each.mean(), {}, 4, each, each / 2)) == {
        qwen: GroupStats(3, 11.0, 69.0, 5.5),
        gemma: GroupStats(1, 4.0, 16.0, 2.0),
    }
    assert all(
        math.isnan(t.grad_norm_sum) and t.loss_sum
        for t in group_stats(batch, LossOutput(each.mean(), {}, 4, each)).values()
    )  # without a gradient


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (folder / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_tiny_run_is_there() -> None:
    """Made here, so that its time is nobody else's."""
    assert flowed()[1].code == 0


def river(folder: Path, how: LaunchOptions, *sets: str) -> RunContext:
    return replace(
        make_run_context(folder / "tiny.yaml", list(sets), folder / "run"), launch_options=how
    )


def test_two_processes_stopped_and_resumed_by_one_learn_what_was_asked(tmp_path: Path) -> None:
    """FSDP, accumulation, held-out lessons and a board at once; SIGTERM goes to the launcher, and
    one process goes on to the end.
    """
    flowed_copy(tmp_path, "check", "audition", "capture")
    sets = (
        "training.gradient_accumulation_steps=2",
        "training.eval_steps=4",
        "training.report_to=tensorboard",
        "training.loss_balancing=deviation",
    )
    before, heard = signal.getsignal(signal.SIGTERM), list[str]()

    def stop(stage: str, share: float, words: str) -> None:
        heard.append(words)
        if "loss" in words and sum("loss" in one for one in heard) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted, match=r"stopped by SIGTERM; step \d is saved") as caught:
        run_pipeline(river(tmp_path, LaunchOptions(2, ParallelStrategy.FSDP), *sets), stop, "train")
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    record = store.read_json_with_checksum(
        max((tmp_path / "run" / "train" / "checkpoints").glob("*.json")), ""
    )
    assert (record["world"], caught.value.detail) == (2, f"step {record['step']} is saved")
    told = read_status(tmp_path / "run")
    assert (told.state, told.stage, told.error, told.checkpoint_step, told.lock_holder) == (
        RunState.STOPPED,
        "train",
        str(caught.value),
        record["step"],
        "",
    )
    run_pipeline(river(tmp_path, LaunchOptions(), *sets), lambda *told: None, "train")
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]
    for line in lines(tmp_path):
        assert line["teachers"].keys() == line["share"].keys()
        assert sum(line["teachers"][t] * line["share"][t] for t in line["share"]) == pytest.approx(
            line["loss"], rel=1e-4
        )
        parts = [part for skills in line["groups"].values() for part in skills.values()]
        for kind in ("positions", "loss", "gradient"):
            assert sum(part[kind] for part in parts) == pytest.approx(1)
        assert any(part["weight"] != 1 for part in parts)
        assert ("held_out" in line) == (line["step"] in (4, 8))
    counts = json.loads((tmp_path / "run" / "train" / "dataset.json").read_text())
    assert (counts["held_out"], sum(counts["examples"].values()) > 50) == (4, True)
    assert list((tmp_path / "run" / "train" / "tensorboard").iterdir())


def test_two_processes_hear_the_students_own_answers_as_one_does(tmp_path: Path) -> None:
    """Each draws the whole round, with the same weights and chance, and learns from its half: the
    loss is the mean over both halves' positions.
    """
    sets = (
        "training.on_policy={start_step: 2, share: 0.5, rollouts: 8, max_staleness_steps: 4, "
        "max_new_tokens: 12}",
        "training.log_every=1",
        "training.loss_balancing=deviation",
    )
    told = {}
    for procs in (1, 2):
        folder = tmp_path / str(procs)
        folder.mkdir()
        flowed_copy(folder, "check", "audition", "capture")
        run_pipeline(river(folder, LaunchOptions(procs), *sets), lambda *told: None, "train")
        told[procs] = lines(folder)
    own = [line["step"] for line in told[2] if "reverse_kl" in line["terms"]]
    assert own == [4, 6, 8]
    for one, two in zip(told[1], told[2], strict=True):
        assert two["positions"] == one["positions"]
        assert two["share"] == one["share"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-2)
        # the entropy of the answers is measured at some positions of each process' share
        entropies = [told["terms"].pop("rollout_entropy", 0.0) for told in (one, two)]
        assert entropies[1] == pytest.approx(entropies[0], rel=0.1)
        assert two["terms"] == pytest.approx(
            one["terms"], rel=1e-3, abs=1e-6
        )  # what is left out is told of the whole step
        assert two["groups"].keys() == one["groups"].keys()
        for name, skills in one["groups"].items():
            for skill, part in skills.items():
                assert two["groups"][name][skill] == pytest.approx(part, rel=1e-2)
    weighed = [
        line["step"]
        for line in told[1]
        if any(
            part["weight"] != 1 for skills in line["groups"].values() for part in skills.values()
        )
    ]
    assert 2 in weighed and own[-1] in weighed
    with pytest.raises(
        RecipeError,
        match=r"training\.on_policy: a student that is sharded over processes cannot generate",
    ):
        run_pipeline(
            river(tmp_path / "2", LaunchOptions(2, ParallelStrategy.FSDP), *sets),
            lambda *told: None,
            "train",
        )


def rank(
    world: int, k: int, port: int, arguments: tuple[str, ...], folder: Path, said: Path
) -> None:
    """What torchrun does with a process of its own: the variables, and the command."""
    os.environ.update(
        RANK=str(k),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(k),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    said.mkdir()
    enter(arguments, folder, said)


def launched(folder: Path, *arguments: str) -> list[tuple[int | None, str]]:
    """(exit code, stderr) of two processes with the variables of torchrun; the real one is in
    bench/chaos_train.py.
    """
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    said = [Path(tempfile.mkdtemp()) / "said" for _ in range(2)]
    ranks = [
        warm().Process(target=rank, args=(2, k, port, arguments, folder, said[k])) for k in range(2)
    ]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(200)
    return [
        (one.exitcode, (path / "err").read_text()) for one, path in zip(ranks, said, strict=True)
    ]


def test_two_of_torchruns_processes_learn_what_one_learned_and_one_of_them_speaks(
    tmp_path: Path,
) -> None:
    flowed_copy(tmp_path, "check", "audition", "capture")
    first, second = launched(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert "train 100%" in first[1]
    assert "train" not in second[1]
    alone = [
        json.loads(line)
        for line in (flowed()[0] / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(
        [line["loss"] for line in alone], rel=1e-4
    )
    assert (tmp_path / "run" / "train" / "done.json").is_file()
    refused = launched(
        tmp_path, "train", "tiny.yaml", "--out", "run", "--set", "training.steps=9", "--json"
    )
    assert [code for code, _ in refused] == [4, 4]
    assert refused[0][1].count("persea: ") == 1
    assert "(training.steps: 8 -> 9)" in refused[0][1]
    assert "persea" not in refused[1][1]


@pytest.mark.parametrize("verb", ["train", "run"])
def test_the_options_of_a_training_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    given: list[LaunchOptions] = []

    def flow(river: RunContext, only: str, as_json: bool) -> None:
        given.append(river.launch_options)
        raise RefusedError("enough")

    monkeypatch.setattr(stages, "_run_with_progress", flow)
    with pytest.raises(RefusedError):
        stages.app(
            [
                "train" if verb == "train" else "run",
                str(recipe(tmp_path)),
                "--procs",
                "3",
                "--shard",
                "fsdp",
                "--resume",
                "never",
            ],
            standalone_mode=False,
        )
    assert given == [LaunchOptions(3, ParallelStrategy.FSDP, "never")]


def test_more_processes_than_conversations_are_refused(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "check", "audition", "capture")
    ended = persea("train", "tiny.yaml", "--out", "run", "--procs", "5", "--json", folder=tmp_path)
    assert ended.code == 2
    assert ended.err == (
        "persea: training.batch_size: a batch of 4 conversations cannot be split over 5 processes "
        "-> at most 4 processes, or a larger training.batch_size\n"
    )


def test_a_question_whose_lesson_is_held_out_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flowed_copy(tmp_path, "check", "audition", "capture")
    here = river(
        tmp_path,
        LaunchOptions(),
        "training.eval_steps=4",
        "training.on_policy={start_step: 0, rollouts: 8}",
    )
    asked = list[str]()
    monkeypatch.setattr(
        teach, "build_rollouts", lambda some, *rest: asked.extend(prompt.id for prompt, _ in some)
    )
    student = here.models.load_student()
    t = here.recipe.training
    feed = build_dataset(
        teach._teacher_caches(here),
        student.renderer,
        here.models.event_maps,
        batch_size=t.batch_size,
        seed=0,
        max_length=t.max_length,
    )
    learned, held = feed.train_test_split(t.validation_share)
    teach._load_rollouts(here, student, held, OwnSampler())
    unseen, seen = set(held.prompt_ids()), set(learned.prompt_ids())
    assert len(unseen) == len(held) > 0 and unseen & set(asked) == set() == unseen & seen
    assert set(asked) >= seen and set(asked) | unseen == {
        prompt.id for prompt in here.corpus.prompts
    }
    asked.clear()
    teach._load_rollouts(here, student, None, OwnSampler())
    assert set(asked) >= unseen


def test_a_finished_training_is_trained_anew_where_that_is_asked_for(tmp_path: Path) -> None:
    """`--resume never` began anew only where a training was half done; a finished one was said to
    stand, and so was a refused one.
    """
    flowed_copy(tmp_path, "check", "audition", "capture", "train")
    student = tmp_path / "run" / "train" / "student" / "model.safetensors"
    before, first = student.read_bytes(), student.stat().st_mtime_ns
    heard = list[str]()

    def hear(stage: str, share: float, words: str) -> None:
        if stage == "train":  # and not the check before it
            heard.append(words)

    run_pipeline(
        river(tmp_path, LaunchOptions(resume="auto")),
        hear,
        "train",
    )
    assert (
        heard[-1] == "up to date"
        and not any("loss" in words for words in heard)
        and student.stat().st_mtime_ns == first
    )
    heard.clear()
    run_pipeline(
        river(tmp_path, LaunchOptions(resume="never")),
        hear,
        "train",
    )
    assert "up to date" not in heard and any("loss" in words for words in heard)
    assert student.stat().st_mtime_ns > first and student.read_bytes() == before
    run_pipeline(
        river(tmp_path, LaunchOptions(resume="never"), "training.steps=2"),
        lambda *told: None,
        "train",
    )  # another recipe's too
    assert [line["step"] for line in lines(tmp_path)] == [2] and student.read_bytes() != before
    with pytest.raises(
        RefusedError, match="the folder holds a finished student of another recipe, base or capture"
    ):
        run_pipeline(river(tmp_path, LaunchOptions()), lambda *told: None, "train")


LISTED = "training.loss=[{name: event_kl, weight: 0.7}, {name: cross_entropy, weight: 0.3}]"


@pytest.mark.parametrize(
    ("keys", "listed"),
    [
        (("training.event_weight=0.7",), (LISTED,)),
        (("training.objective=sft",), ("training.loss=[{name: cross_entropy}]",)),
    ],
    ids=["events", "sft"],
)
def test_listed_losses_give_the_same_student_as_objective_and_event_weight(
    tmp_path: Path, keys: tuple[str, ...], listed: tuple[str, ...]
) -> None:
    students = []
    for name, sets in (("keys", keys), ("listed", listed)):
        folder = tmp_path / name
        folder.mkdir()
        flowed_copy(folder, "check", "audition", "capture")
        run_pipeline(river(folder, LaunchOptions(), *sets), lambda *told: None, "train")
        students.append((folder / "run" / "train" / "student" / "model.safetensors").read_bytes())
    assert students[0] == students[1]


def test_an_unknown_loss_is_refused_before_anything_runs(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "check", "audition", "capture")
    context = river(tmp_path, LaunchOptions(), "training.loss=[{name: event_cl}]")
    with pytest.raises(RecipeError, match=r"training\.loss: no loss 'event_cl'"):
        run_pipeline(context, lambda *told: None, "train")
    assert not (tmp_path / "run" / "train").exists()


def test_held_out_is_the_same_in_parts() -> None:
    """Two ranks' halves of held-out batches, gathered by hand, give what one gives."""

    class Heard(World):
        def all_gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return list(parts)

    parts: list[Any] = []
    feed, student, loss_fn = _feed(), _Student(), EventKL(event_weight=0.7)
    whole = held_out_loss(student, feed, World(), loss_fn)  # type: ignore[arg-type]
    held_out_loss(student, feed, Heard(0, 2), loss_fn)  # type: ignore[arg-type]
    assert held_out_loss(student, feed, Heard(1, 2), loss_fn) == pytest.approx(whole)
    assert set(whole) == {"all", "a", "b"}
    assert (
        student.asleep == [True] * 6 and student.model.training
    )  # without dropout, and back to where training needs it


class _Student:
    def __init__(self) -> None:
        self.model, self.asleep = torch.nn.Identity(), list[bool]()

    def hidden_and_head(
        self, ids: torch.Tensor, mask: torch.Tensor, row: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, LMHead]:
        self.asleep.append(not self.model.training)
        return torch.sin(ids[row, at, None] + torch.arange(7.0)), LMHead(torch.eye(7), 7)


def _feed() -> DistillDataset:
    from persea.cache.reader import CacheMixture
    from persea.distributions import DistributionKind
    from persea.losses import EventTargets
    from persea.tokenization.tokens import RenderedTokens
    from persea.training.dataset_stats import DatasetStats
    from persea.training.example import Example

    none = np.empty(0, np.int64)
    entries = EventTargets(
        none,
        none,
        none.astype(np.float32),
        none,
        none,
        none,
        none.astype(np.float32),
        none,
        none,
        DistributionKind.SAMPLED,
    )
    lessons = [
        Example(
            RenderedTokens(np.arange(n) % 7, np.arange(n), np.arange(n), np.arange(n) > 0),
            who,
            "s",
            "",
            entries,
            np.zeros(7),
        )
        for n, who in ((3, "a"), (5, "b"), (4, "a"), (6, "b"))
    ]
    bridge: Any = SimpleNamespace(
        student_event_V=np.zeros(7, np.int64), tokens_of_events=lambda events: (none, none)
    )
    made = {id(one): one for one in lessons}
    reader: Any = _Lessons([id(one) for one in lessons])
    survey = DatasetStats({}, {}, 0, 0, (), {}, {}, 0)
    return DistillDataset.from_mixture(
        CacheMixture((reader,), (1.0,), 0),
        lambda source, k: made[source[k]],
        {"a": bridge, "b": bridge},
        2,
        survey,
    )  # type: ignore[arg-type]


class _Lessons(list[int]):
    """Lessons by number; a lesson stands for its own capture."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def epoch_order(self, seed: int, epoch: int) -> Any:
        return np.arange(len(self))
