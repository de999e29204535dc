"""What a run would do is told as it will be, and a run that this disk cannot hold is refused before
it starts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persea.config.recipe import load_recipe
from persea.errors import DataError, RefusedError
from persea.models.loading import ModelSource
from persea.models.sizes import read_model_size
from persea.pipeline import machine_cost, plan
from persea.pipeline.cost import training_bytes
from persea.pipeline.hardware import parse_fleet
from persea.pipeline.plan import plan_run
from persea.pipeline.preflight_data import (
    EXAMPLE_BYTES_PER_CAPTURED_BYTE,
    SAMPLED_BYTES_PER_TOKEN,
    TOPK_BYTES_PER_TOKEN,
)
from persea.pipeline.run_context import RunContext
from tests.cli.test_cli import SAPLINGS, STAGES, flowed_copy, recipe, tree

SAPLING_TEACHERS = ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling")


def river(folder: Path, *overrides: str) -> RunContext:
    return RunContext(load_recipe(folder / "tiny.yaml", overrides), folder / "run")


def states(folder: Path, *overrides: str) -> dict[str, str]:
    before = tree(folder)
    told = {c.stage: c.state for c in plan_run(river(folder, *overrides)).stages}
    assert tree(folder) == before  # to plan is to touch nothing
    return told


def but(**others: str) -> dict[str, str]:
    return dict.fromkeys(STAGES, "up to date") | others


def test_before_anything_the_later_stages_wait(tmp_path: Path) -> None:
    recipe(tmp_path)
    waits = dict.fromkeys(("train", "evaluate", "lineage", "report"), "waits")
    to_do = dict.fromkeys(("check", "audition", "capture"), "to do")
    assert states(tmp_path) == to_do | waits  # every skill is pinned: capture needs no audition
    assert states(tmp_path, "audition.pinned={}")["capture"] == "waits"
    flowed_copy(tmp_path, "check", "audition")
    assert states(tmp_path) == but(**waits | {"capture": "to do"})


def test_after_all_everything_stands_until_something_changes(tmp_path: Path) -> None:
    flowed_copy(tmp_path, *STAGES)
    assert states(tmp_path) == but()
    assert states(tmp_path, "evaluation.max_new_tokens=40") == but(
        evaluate="to do", lineage="to do", report="waits"
    )
    with pytest.raises(RefusedError, match="finished student of another recipe"):
        states(tmp_path, "capture.sampling_threshold=0.05")  # as `run` does
    assert states(tmp_path, "check.min_common_share=0.2") == but(
        check="to do", lineage="to do", report="waits"
    )
    for name in ("lineage", "evaluate"):
        shutil.rmtree(tmp_path / "run" / name)
        assert states(tmp_path)[name] == "to do"
        assert states(tmp_path)["report"] == "waits"
    shutil.rmtree(tmp_path / "run" / "train")
    assert states(tmp_path) == but(train="to do", evaluate="waits", lineage="waits", report="waits")


def test_what_is_said_of_an_evaluation_afterwards_measures_nothing_again(tmp_path: Path) -> None:
    flowed_copy(tmp_path, *STAGES)
    (tmp_path / "results.json").write_text("{}")
    for change in (
        "allow_regression=true",
        "lm_eval.student=results.json",
    ):  # the lineage holds the recipe's hash
        assert states(tmp_path, f"evaluation.{change}") == but(lineage="to do", report="waits")
    with pytest.raises(
        DataError, match=r"gone\.json: no such file -> run lm_eval on student first"
    ):
        plan_run(river(tmp_path, "evaluation.lm_eval_results.student=gone.json"))


def test_a_damaged_output_is_to_do(tmp_path: Path) -> None:
    flowed_copy(tmp_path, *STAGES)
    (tmp_path / "run" / "evaluate" / "evaluation.json").write_text("{}")
    assert states(tmp_path)["evaluate"] == "to do"


def test_answers_are_counted_and_the_disk_is_enough(tmp_path: Path) -> None:
    recipe(tmp_path)
    told = plan_run(river(tmp_path))
    assert told.answers == 3 * 8 * 2 + 72 + 3 * 8 * 5  # pinned teachers and the base
    assert {line.stage for line in told.lines} == {"capture", "train"}
    assert told.units == 9
    flowed_copy(tmp_path, *STAGES)
    units = sum(p.stat().st_size for p in (tmp_path / "run" / "capture" / "units").iterdir())
    used = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert 0 < units < 72 * 48 * SAMPLED_BYTES_PER_TOKEN
    assert units < used < told.disk_bytes < told.disk_free
    work = {c.stage: c.work for c in told.stages}
    assert work["audition"] == "at most 48 answers by 3 teachers and the student's base"
    assert work["capture"].startswith("72 answers, at most 0.00 GB, at most ")
    assert work["train"].startswith(
        "8 steps of 4 conversations, 0.4 passes over the prompts, learning rate 0.003, at most "
    )
    assert work["evaluate"] == "120 answers by 5 models"
    assert [r[0] for r in told.table_rows()] == [*STAGES, "total"]
    assert told.table_rows()[-1][2].startswith("240 answers, about 0.0")
    assert told.to_json()["stages"][0] == {
        "stage": "check",
        "state": "to do",
        "work": "3 tokenizer pairs",
    }


def test_what_is_done_is_not_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk does not refuse a finished run, nor a capture of which one unit is missing."""
    flowed_copy(tmp_path, *STAGES)
    full = lambda path: SimpleNamespace(free=0)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", full)
    told = plan_run(river(tmp_path))
    assert (told.answers, told.disk_bytes) == (0, 0)
    assert all(line.seconds == line.disk_bytes == 0 for line in told.lines)
    shutil.rmtree(tmp_path / "run" / "train")
    (tmp_path / "run" / "capture" / "done.json").unlink()
    commits = sorted((tmp_path / "run" / "capture" / "commits").glob("*.json"))
    commits[0].unlink()
    with pytest.raises(RefusedError, match=r"less is needed with `training: \{store_examples: f"):
        plan_run(river(tmp_path))
    monkeypatch.undo()
    told = plan_run(river(tmp_path))
    work = {c.stage: c.work for c in told.stages}
    assert "72 answers, 89% of them done, at most" in work["capture"]
    assert told.answers == 72 - 64 + 3 * 8 * 5


def test_the_first_prompt_is_shown_in_every_format(tmp_path: Path) -> None:
    recipe(tmp_path)
    shown = plan_run(river(tmp_path)).first_prompt
    assert [p.model for p in shown] == ["student", *SAPLING_TEACHERS]
    for one in shown:
        assert one.tokens > 4
        assert [learned for _, learned in one.pieces][:2] == [False, True]
        plain, coloured = ("\n".join(one.lines(colour=c)) for c in (False, True))
        assert "⟦" in plain
        assert "\033[32;1m" in coloured
    assert len({one.pieces[0][0] for one in shown}) == len(shown)


def test_a_prompt_that_is_left_out_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": " ONE "}\n{"prompt": "two"}\n')
    recipe(tmp_path, corpus=[{"skill": "languages", "file": "p.jsonl"}], audition={"items": 8})
    told = plan_run(river(tmp_path))
    assert next(c.work for c in told.stages if c.stage == "capture").startswith("2 answers, ")
    assert told.left_out == {"duplicate": 1}
    assert ("", "", "1 left out: duplicate") in told.table_rows()


def test_the_likeliest_tokens_within_a_kl_cost_more_disk(tmp_path: Path) -> None:
    recipe(tmp_path)
    captured = SAMPLED_BYTES_PER_TOKEN * 72 * 48
    more = (
        plan_run(river(tmp_path, "capture.distributions=topk")).disk_bytes
        - plan_run(river(tmp_path)).disk_bytes
    )
    captured *= TOPK_BYTES_PER_TOKEN / SAMPLED_BYTES_PER_TOKEN - 1
    assert more == pytest.approx((1 + EXAMPLE_BYTES_PER_CAPTURED_BYTE) * captured)
    without = plan_run(river(tmp_path, "training.store_examples=false")).disk_bytes
    assert without < plan_run(river(tmp_path)).disk_bytes


def test_a_run_that_the_disk_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path)
    needed = plan_run(river(tmp_path)).disk_bytes
    asked: list[Path] = []

    def usage(free: int) -> Any:
        return lambda path: asked.append(Path(path)) or SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage(needed - 1))
    with pytest.raises(
        RefusedError,
        match=(
            r"run: the run needs up to 0\.0 GB, 0\.0 GB are free -> free space or give "
            r"another --out"
        ),
    ) as caught:
        plan_run(river(tmp_path))
    assert caught.value.exit_code == 4
    assert set(asked) == {tmp_path}  # the disk of the run folder, which is not there yet
    monkeypatch.setattr(shutil, "disk_usage", usage(needed))
    assert plan_run(river(tmp_path)).disk_free == needed


@pytest.mark.parametrize("rank", [1, 8])
def test_checkpoints_of_adapters_are_counted_as_adapters(tmp_path: Path, rank: int) -> None:
    """A checkpoint of LoRA holds the matrices that are trained; these are counted from shapes."""
    from persea.config.schema import LoraSection, StudentSection, TrainingSection
    from persea.models.loading import load_renderer
    from persea.training.student import LoraSettings, load_student

    model = str(SAPLINGS / "llama-sapling")
    lora = LoraSection(rank=rank, alpha=2, targets=("q_proj", "v_proj"))
    size, many = read_model_size(ModelSource(model)), TrainingSection(steps=1000)
    full, adapted = (
        training_bytes(size, StudentSection(model=model, **more), many)
        for more in ({}, {"adapt": "lora", "lora": lora})
    )
    assert size is not None and full is not None and adapted is not None
    student = load_student(
        ModelSource(model),
        load_renderer(ModelSource(model), "student"),
        LoraSettings(rank, 2, ("q_proj", "v_proj")),
        0,
    )
    num_trained = sum(p.numel() for p in student.trainable_parameters)
    num_weights = size.num_parameters
    assert full == 4 * 3 * 3 * num_weights  # three checkpoints, while the oldest is not deleted yet
    assert adapted == 4 * max(3 * 3 * num_trained, 2 * 3 * num_trained + num_weights)
    assert adapted < full / 3


def test_weights_in_half_precision_are_counted_once(tmp_path: Path) -> None:
    """The size in float32 comes from shapes: it does not depend on the stored type."""
    import torch
    from safetensors.torch import save_file

    from persea.config.schema import StudentSection, TrainingSection

    sizes = []
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        save_file({"a.weight": torch.zeros(3, 5, dtype=dtype)}, folder / "model.safetensors")
        size = read_model_size(ModelSource(str(folder)))
        student, training = StudentSection(model=str(folder)), TrainingSection(steps=1000)
        sizes.append(training_bytes(size, student, training))
    assert sizes == [4 * 15 * 3 * 3] * 2


def peak_bytes(folder: Path, change: Any, *overrides: str) -> tuple[int, int]:
    """(sum of the files at the peak, what plan said) of a run that is watched at every write."""
    from persea import storage
    from persea.pipeline.stages import run_pipeline
    from tests.disks import Watched

    class Weighing(Watched):
        peak = 0

        def step(self, *what: Any) -> None:
            if what[0] in ("replace", "remove", "sync_folder"):
                files = (p for p in (folder / "run").rglob("*") if p.is_file())
                self.peak = max(self.peak, sum(p.stat().st_size for p in files))

    disk = Weighing()
    before = sum(p.stat().st_size for p in (folder / "run").rglob("*") if p.is_file())
    planned = plan_run(river(folder, *overrides)).disk_bytes + before
    change(storage, "DISK", disk)
    run_pipeline(river(folder, *overrides), lambda *told: None, "train")
    files = (p for p in (folder / "run").rglob("*") if p.is_file())
    return max(disk.peak, sum(p.stat().st_size for p in files)), planned


@pytest.mark.parametrize("checkpoint_every", [3, 4, 8])
def test_the_disk_is_told_to_15_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_every: int
) -> None:
    """One, two or three checkpoints and the student, measured on a real training."""
    flowed_copy(tmp_path, "check", "audition", "capture")
    peak, planned = peak_bytes(
        tmp_path, monkeypatch.setattr, f"training.checkpoint_every={checkpoint_every}"
    )
    assert planned == pytest.approx(peak, rel=0.15)


def test_a_model_without_weights_has_the_size_of_its_configuration(tmp_path: Path) -> None:
    for name in ("llama-sapling", "gemma-sapling", "gpt-oss-sapling"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(SAPLINGS / name / "config.json", folder)
        whole, bare = (read_model_size(ModelSource(str(f))) for f in (SAPLINGS / name, folder))
        assert whole is not None and bare is not None
        assert (bare.num_parameters, bare.hidden, bare.layers) == (
            whole.num_parameters,
            whole.hidden,
            whole.layers,
        )
    assert read_model_size(ModelSource(str(tmp_path / "nowhere"))) is None


def test_cost_is_told_with_how_it_was_got(tmp_path: Path) -> None:
    recipe(tmp_path)
    told = plan_run(river(tmp_path))
    for stage in ("capture", "train"):
        assert told.costs[stage].seconds > 0
        assert told.costs[stage].memory_bytes > 6e8
        assert told.costs[stage].tokens > 1000
    assert "matrix product measured just now" in told.notes[0]
    assert not any("warning" in note for note in told.notes)
    assert told.notes[-1].startswith("persea pilot would try 3 teachers with 8 steps each, about ")
    (warned, _) = plan_run(river(tmp_path, "training.learning_rate=0.1")).notes[1:]
    assert warned.startswith("warning: training.learning_rate 0.1 is high for a student of 0.8 M")


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_on_a_processor_without_it_is_told(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path)
    monkeypatch.setattr(plan, "has_fast_bfloat16", lambda device: fast)
    notes = plan_run(river(tmp_path, "training.precision=bfloat16")).notes
    assert any("no instructions for it" in note for note in notes) is not fast
    assert not any("no instructions" in note for note in plan_run(river(tmp_path)).notes)


def test_a_gguf_file_is_counted_like_the_folder_it_was_written_from(tmp_path: Path) -> None:
    """Its matrices have other names, which `lora.targets` does not use."""
    from transformers import AutoModelForCausalLM

    from persea.config.schema import LoraSection, StudentSection, TrainingSection
    from tests.gguf_files import write_gguf

    folder = SAPLINGS / "llama-sapling"
    model = AutoModelForCausalLM.from_pretrained(folder)
    path = write_gguf(tmp_path / "x.gguf", model, folder, "llama-bpe")
    lora = LoraSection(rank=4, alpha=2, targets=("q_proj", "o_proj", "down_proj"))
    for more in ({}, {"adapt": "lora", "lora": lora}):
        sizes = {
            training_bytes(
                read_model_size(ModelSource(str(m))),
                StudentSection(model=str(m), **more),
                TrainingSection(),
            )
            for m in (folder, path)
        }
        assert len(sizes) == 1 and sizes != {0}
    whole, gguf = (read_model_size(ModelSource(str(m))) for m in (folder, path))
    assert whole is not None and gguf is not None
    assert (gguf.hidden, gguf.layers) == (whole.hidden, whole.layers)


def test_models_on_this_machine_are_planned_for_a_fleet(tmp_path: Path) -> None:
    recipe(tmp_path)
    told = plan_run(river(tmp_path), parse_fleet("2xH100"), 2.0)
    assert told.hardware == "2xH100"
    assert [line.model for line in told.lines] == [*SAPLING_TEACHERS, "student"]
    assert all(line.money == 2.0 * (line.gpu_hours or 0) > 0 for line in told.lines)
    assert {way.kind for way in told.ways} == {"dense", "MoE"}  # gpt-oss-sapling has experts
    assert told.failures is not None


def test_a_teacher_larger_than_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path)
    monkeypatch.setattr(machine_cost, "total_memory", lambda: 1_000_000)
    with pytest.raises(RefusedError, match=r"in float32, and this machine has 0 GB .*--hardware"):
        plan_run(river(tmp_path))
    plan_run(river(tmp_path), parse_fleet("1xH100"))  # not run here
