"""What a run says of itself, and what its files say of it once it is dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from persea import storage as store
from persea.errors import DataError, RefusedError, RunInterrupted
from persea.pipeline import status as module
from persea.pipeline.stage_keys import STAGE_VERSIONS
from persea.pipeline.status import RunState, read_status, record_status, status_lines
from tests.cli.test_cli import persea


def silent(stage: str, share: float, words: str) -> None:
    pass


def said(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return value


def test_it_goes_through_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, float, str]] = []
    clock = iter(range(0, 3000, 3))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with (
        store.lock_run_folder(tmp_path),
        record_status(tmp_path, "run", lambda *told: heard.append(told)) as tell,
    ):
        tell("train", 0.0, "")
        tell(
            "train", 0.25, "loss 2"
        )  # where its pace begins: a training that is resumed does not begin at 0
        tell("train", 0.5, "loss 1")
        now = read_status(tmp_path)
        assert (now.state, now.stage, now.fraction_done, now.message, now.error) == (
            RunState.RUNNING,
            "train",
            0.5,
            "loss 1",
            "",
        )
        assert now.lock_holder.startswith(f"pid {os.getpid()} on ")
        assert now.seconds_left is not None
        assert 0 < now.seconds_left < 60
        store.write_json_with_checksum(
            tmp_path / "train" / "done.json",
            {"key": "k", "version": STAGE_VERSIONS["train"], "seconds": 12.5, "outputs": {}},
        )
        tell("train", 1.0, "13 s")
    assert len(heard) == 4
    after = read_status(tmp_path)
    assert (after.state, after.seconds_by_stage, after.lock_holder, after.seconds_left) == (
        RunState.DONE,
        {"train": 12.5},
        "",
        None,
    )
    assert any("train done in 12 s" in line for line in status_lines(after, after.updated_at))


def test_it_is_written_at_a_modest_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, writes = store.write_json, []
    monkeypatch.setattr(
        store,
        "write_json",
        lambda path, value: (writes.append(value["fraction_done"]), real(path, value))[1],
    )
    with record_status(tmp_path, "run", silent) as tell:
        for k in range(1000):
            tell("train", 0.1 + k / 10000, f"{k}")
    assert 2 <= len(writes) < 10


@pytest.mark.parametrize(
    ("error", "life", "words"),
    [
        (RefusedError("a floor", remedy="lower it"), RunState.FAILED, "a floor -> lower it"),
        (ZeroDivisionError("x"), RunState.FAILED, "a bug in persea: ZeroDivisionError: x"),
        (
            RunInterrupted(15, "step 3 is saved"),
            RunState.STOPPED,
            "stopped by SIGTERM; step 3 is saved -> run the same command to continue",
        ),
    ],
)
def test_what_ended_it_is_kept(
    tmp_path: Path, error: BaseException, life: RunState, words: str
) -> None:
    with (
        pytest.raises(type(error)),
        store.lock_run_folder(tmp_path),
        record_status(tmp_path, "run", silent) as tell,
    ):
        tell("check", 0.5, "half")
        raise error
    told = read_status(tmp_path)
    assert (told.state, told.error) == (life, words)
    assert status_lines(told, told.updated_at)[-1] == f"    error {words}"


def test_a_killed_run_is_dead_by_its_files_alone(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom persea import storage as store\n"
        "from persea.pipeline.status import record_status\n"
        "with store.lock_run_folder(Path('run')), record_status(Path('run'), 'x', lambda *a: "
        "None) as tell:\n"
        "    tell('train', 0.0, '')\n    print('on', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE
    ) as run:
        assert run.stdout and run.stdout.readline() == b"on\n"
        alive = read_status(tmp_path / "run")
        run.send_signal(signal.SIGKILL)
        run.wait()
    dead = read_status(tmp_path / "run")
    assert (alive.state, dead.state, dead.lock_holder) == (RunState.RUNNING, RunState.DIED, "")
    assert dead.error.startswith(
        "the run ended without recording why (killed, out of memory, or a power loss): "
        f"pid {run.pid} on "
    )
    assert said(tmp_path / "run")["state"] == "running"  # the last recorded state
    (tmp_path / "run" / ".status.json.1.tmp").write_text("what a killed writer leaves")
    with record_status(tmp_path / "run", "x", silent):
        assert not list((tmp_path / "run").glob(".*"))


def test_looking_never_keeps_a_run_from_its_folder(tmp_path: Path) -> None:
    """The look holds the lock for some microseconds; who wants it then tries again."""
    with (tmp_path / "lock").open("a+b") as file:
        import fcntl
        import threading

        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.07, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        with store.lock_run_folder(tmp_path):
            assert store.lock_holder(tmp_path)
    assert store.lock_holder(tmp_path) == ""


def test_no_run_and_a_broken_status_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        read_status(tmp_path)
    with store.lock_run_folder(tmp_path):
        pass
    assert read_status(tmp_path).state is RunState.NEW
    for text in ("{", "[1]", '{"state": "x"}', '{"state": "done", "fraction_done": "much"}'):
        (tmp_path / "status.json").write_text(text)
        with pytest.raises(
            DataError,
            match=r"status\.json: not a status file: .* -> delete it; the next run writes it anew",
        ):
            read_status(tmp_path)


def test_the_verb_says_it_in_words_and_json_and_watch_ends_with_the_run(tmp_path: Path) -> None:
    with (
        pytest.raises(RefusedError),
        store.lock_run_folder(tmp_path / "run"),
        record_status(tmp_path / "run", "run", silent) as tell,
    ):
        tell("capture", 0.5, "12 tokens/s")
        raise RefusedError("no")
    words, value, watched = (
        persea("status", "run", *more, folder=tmp_path)
        for more in ([], ["--json"], ["--watch", "--json"])
    )
    assert words.code == value.code == watched.code == 0
    assert "failed" in words.out
    assert "capture 50% 12 tokens/s" in words.out
    assert json.loads(value.out)["state"] == "failed"
    assert json.loads(value.out) == json.loads(watched.out)
    assert persea("status", "nowhere", folder=tmp_path).code == 3


def test_watch_goes_on_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from persea.cli.status import status as verb

    naps: list[float] = []
    with store.lock_run_folder(tmp_path), record_status(tmp_path, "run", silent) as tell:
        tell("train", 0.0, "")

        def nap(seconds: float) -> None:
            naps.append(seconds)
            if len(naps) == 2:
                monkeypatch.setattr(store, "lock_holder", lambda folder: "")

        monkeypatch.setattr(time, "sleep", nap)
        verb(str(tmp_path), watch=True)
    assert naps == [2.0, 2.0]
