"""A stage publishes its output whole, in place of the old; versions of persea are told apart."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from persea import storage
from persea.config.recipe import load_recipe
from persea.errors import DataError, RefusedError
from persea.pipeline import stage_keys
from persea.pipeline.run_context import RunContext
from persea.pipeline.stage_store import StageStore
from persea.pipeline.stages import run_pipeline
from persea.pipeline.status import read_status
from tests.cli.test_cli import STAGES, flowed_copy, persea, tree
from tests.disks import Dying

Work = Callable[[Path, object], None]


def writes(**files: str) -> Work:
    """Work of a stage that writes these files."""

    def work(folder: Path, progress: object) -> None:
        for name, text in files.items():
            storage.write_atomic(folder / name.replace("_", "."), text.encode())

    return work


def run(folder: Path, inputs: object, work: Work, stage: str = "evaluate", **more: object) -> str:
    """Run a stage; return its last message."""
    messages: list[str] = []
    StageStore(folder).run(
        stage,
        inputs,
        work,
        lambda stage, fraction, message: messages.append(message),
        recipe_yaml="name: x\n",
        **more,  # type: ignore[arg-type]
    )
    return messages[-1]


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_files_of_an_older_recipe_are_gone(tmp_path: Path) -> None:
    with storage.lock_run_folder(tmp_path):
        run(tmp_path, 1, writes(evaluation_json="1", modes_json="1"))
        assert run(tmp_path, 1, writes()) == "up to date"
        run(tmp_path, 2, writes(evaluation_json="2"))
    assert names(tmp_path / "evaluate") == {"evaluation.json", "done.json"}
    assert names(tmp_path) - {"lock", "recipe.yaml"} == {
        "evaluate/evaluation.json",
        "evaluate/done.json",
    }


def test_modes_of_an_older_recipe_are_not_on_the_new_page(tmp_path: Path) -> None:
    """A run with modes.json, then a recipe whose corpus has no modes."""
    run_folder = flowed_copy(tmp_path, *STAGES) / "run"
    (run_folder / "evaluate" / "modes.json").write_text("{}")
    ended = persea(
        "evaluate",
        "tiny.yaml",
        "--out",
        "run",
        "--set",
        "evaluation.max_new_tokens=40",
        folder=tmp_path,
    )
    assert ended.code == 0, ended.err
    assert not (run_folder / "evaluate" / "modes.json").exists()
    assert not [n for n in tree(run_folder) if n.startswith(".")]


def test_what_a_stage_refuses_is_published_without_a_record(tmp_path: Path) -> None:
    def refusing(folder: Path, progress: object) -> None:
        storage.write_json(folder / "check.json", 1)
        raise RefusedError("a floor")

    with pytest.raises(RefusedError, match="a floor"):
        run(tmp_path, 1, refusing, stage="check")
    assert names(tmp_path / "check") == {"check.json"}
    assert not StageStore(tmp_path).is_up_to_date("check", stage_keys.stage_key("check", 1))


def test_a_stage_that_fails_leaves_the_old_output(tmp_path: Path) -> None:
    run(tmp_path, 1, writes(a="1"))
    before = tree(tmp_path)

    def failing(folder: Path, progress: object) -> None:
        storage.write_json(folder / "b", 2)
        raise ValueError

    with pytest.raises(ValueError):
        run(tmp_path, 2, failing)
    assert tree(tmp_path) == before


def test_resumable_parts_stay_and_the_rest_goes_before_the_work(tmp_path: Path) -> None:
    keep = ("units", "commits")
    run(tmp_path, 1, writes(summary_json="1", rejected_json="1"), stage="capture", resumable=keep)
    storage.write_json(tmp_path / "capture" / "units" / "u.json", 1)
    (tmp_path / "capture" / "units" / ".v.json.7.tmp").write_text("of a killed run")

    def work(folder: Path, progress: object) -> None:
        assert names(folder) == {"units/u.json"}
        storage.write_json(folder / "summary.json", 2)

    run(tmp_path, 2, work, stage="capture", resumable=keep)
    assert names(tmp_path / "capture") == {"units/u.json", "summary.json", "done.json"}


def killed(folder: Path, disk: storage.Disk, inputs: int) -> bool:
    """Run the stage in a child until the disk kills it; False if it finished."""
    child = os.fork()
    if not child:
        storage.DISK = disk
        try:
            StageStore(folder).recover()
            run(folder, inputs, writes(a=str(inputs), **{f"b{inputs}": "x"}))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_step_the_output_is_the_old_or_the_new(tmp_path: Path, after: bool) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    run(origin, 1, writes(a="1", b1="x"))
    step, outcomes = 0, set()
    while True:
        step += 1
        folder = tmp_path / f"{step}"
        shutil.copytree(origin, folder)
        if not killed(folder, Dying(step, after), 2):
            break
        final = folder / "evaluate"
        if final.exists():  # readers never see a mixture
            assert names(final) in ({"a", "b1", "done.json"}, {"a", "b2", "done.json"})
        StageStore(folder).recover()
        content = (final / "a").read_text()
        outcomes.add(content)
        assert names(final) == {"a", f"b{content}", "done.json"}
        key = stage_keys.stage_key("evaluate", int(content))
        assert StageStore(folder).is_up_to_date("evaluate", key)
        assert not [n for n in tree(folder) if n.startswith(".") and "/" in n]
        run(folder, 2, writes(a="2", b2="x"))
        assert names(final) == {"a", "b2", "done.json"}
    assert step > 15
    assert outcomes == {"1", "2"}


# --- versions ---


def test_a_raised_version_makes_a_stage_anew_and_readers_refuse_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lock").touch()
    run(tmp_path, 1, writes(a="1"))
    assert StageStore(tmp_path).read_record("evaluate")["version"] == 1
    monkeypatch.setitem(stage_keys.STAGE_VERSIONS, "evaluate", 2)
    for read in (
        lambda: StageStore(tmp_path).read_record("evaluate"),
        lambda: StageStore(tmp_path).refuse_other_versions(),
        lambda: read_status(tmp_path),
    ):
        with pytest.raises(RefusedError, match="written by version 1 of the stage evaluate") as e:
            read()
        assert e.value.remedy == f"run the stage again: persea evaluate RECIPE --out {tmp_path}"
    assert run(tmp_path, 1, writes(a="1")) != "up to date"
    StageStore(tmp_path).refuse_other_versions()


def older(folder: Path, stage: str) -> None:
    """Make a stage's record one of the time before versions."""
    path = folder / "run" / stage / "done.json"
    record = json.loads(path.read_text())
    storage.write_json_with_checksum(
        path, {k: v for k, v in record.items() if k not in ("seal", "version")}
    )


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("check", ["status", "run"]),
        ("evaluate", ["compare", "run", "run"]),
        ("train", ["chat", "run"]),
        ("train", ["serve", "run", "--port", "0"]),
        ("audition", ["report", "tiny.yaml", "--out", "run"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_every_reader_of_a_run_folder_refuses_an_older_version_in_one_line(
    tmp_path: Path, stage: str, arguments: list[str]
) -> None:
    older(flowed_copy(tmp_path, *STAGES), stage)
    (tmp_path / "run" / "lock").touch()
    ended = persea(*arguments, folder=tmp_path)
    assert ended.code == 4, ended
    line = ended.err.splitlines()[-1]
    assert line.startswith(f"persea: run/{stage}: written by version 0 of the stage {stage}; this")
    assert " -> " in line
    assert "Traceback" not in ended.err


def test_a_report_before_the_evaluation_names_the_command(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "check", "audition", "capture", "train")
    context = RunContext(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "run")
    with pytest.raises(DataError, match=r"run/evaluate/done\.json: not there") as caught:
        run_pipeline(context, lambda *told: None, "report")
    remedy = "run the stage that writes evaluate/ first: `persea evaluate RECIPE`"
    assert caught.value.remedy == remedy
    assert not (tmp_path / "run" / "report").exists()
