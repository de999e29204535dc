"""The status of a run whose captures are in an object store, read from the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persea import storage
from persea.cache.object_store import ObjectStore
from persea.cli import app
from persea.config.recipe import load_recipe
from persea.errors import DataError, TeacherError
from persea.executors.ledger import Ledger, LedgerEvent
from persea.pipeline import status_copy
from persea.pipeline.run_context import RunContext
from persea.pipeline.status import RunState, record_status
from persea.pipeline.status_copy import (
    StatusCopies,
    read_copied_statuses,
    run_key,
    status_copies,
)
from tests.cache.test_object_store import s3  # noqa: F401 - a fixture
from tests.cli.test_cli import recipe
from tests.pipeline.test_capture_stage import ONE


def silent(*ignored: Any) -> None:
    return


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{tmp_path.name}/store"
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def written(folder: Path, url: str, error: Exception | None = None) -> list[str]:
    """Record the status of a run with a ledger; return the warnings."""
    warnings: list[str] = []
    copies = StatusCopies(ObjectStore(url), folder, warnings.append)
    folder.mkdir(parents=True, exist_ok=True)
    with storage.lock_run_folder(folder):
        try:
            with record_status(folder, "run", silent, copies.write) as progress:
                ledger = Ledger(folder, "capture")
                ledger.begin({"a": "qwen", "b": "qwen"}, (), lambda unit: 0)
                values = {"attempt": 1, "worker": "w", "seconds": 2.0}
                ledger.record(LedgerEvent.STARTED, "a", "qwen", **values)
                paid = {"tokens_paid": 50, "tokens_kept": 40}
                ledger.record(LedgerEvent.COMMITTED, "a", "qwen", **values, **paid)
                progress("capture", 0.5, "1/2 units")
                if error:
                    raise error
        except TeacherError:
            pass
    return warnings


def test_a_run_is_seen_from_its_store(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run in this store"):
        list(read_copied_statuses(url))
    folder = tmp_path / "runs" / "mine"
    assert written(folder, url, TeacherError("the server is gone")) == []
    ((where, found),) = read_copied_statuses(url)
    assert where == f"{url}/runs/{run_key(folder)}"
    assert (found.state, found.stage, found.fraction_done) == (RunState.FAILED, "capture", 0.5)
    assert found.error == "the server is gone"
    (units,) = found.units
    assert (units.planned, units.committed, units.pending) == (2, 1, 1)
    assert (units.tokens_paid, units.tokens_kept) == (50, 40)
    assert list(read_copied_statuses(where)) == [(where, found)]
    written(tmp_path / "runs" / "other", url)
    assert [one.state for _, one in read_copied_statuses(url)] == [RunState.FAILED, RunState.DONE]
    told = CliRunner().invoke(app, ["status", url])
    assert told.exit_code == 0
    assert where in told.output
    assert "1 of 2 units done, 1 pending" in told.output
    told = CliRunner().invoke(app, ["status", where, "--json"])
    assert json.loads(told.output)["url"] == where


def test_a_run_that_writes_is_alive_and_one_that_does_not_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = f"memory://{tmp_path.name}", tmp_path / "run"
    store = ObjectStore(url)
    copies = StatusCopies(store, folder, silent)
    folder.mkdir()
    with storage.lock_run_folder(folder), record_status(folder, "x", silent, copies.write) as tell:
        tell("capture", 0.25, "1/4 units")
        ((_, found),) = read_copied_statuses(url)
        assert (found.state, found.error) == (RunState.RUNNING, "")
        monkeypatch.setattr(status_copy, "STALE_AFTER_S", -1.0)  # the time of a status is rounded
        ((_, found),) = read_copied_statuses(url)
        assert found.state is RunState.DIED
        assert "look at its machine" in found.error


def test_copies_are_rare_and_a_store_that_fails_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, writes, warnings = [0.0], list[str](), list[str]()
    (tmp_path / "status.json").write_text("{}")
    store = ObjectStore(f"memory://{tmp_path.name}")
    copies = StatusCopies(store, tmp_path, warnings.append, lambda: now[0])
    monkeypatch.setattr(ObjectStore, "write_file", lambda self, path, data: writes.append(path))
    for now[0] in (0.0, 10.0, 29.0, 31.0, 40.0):
        copies.write()
    assert len(writes) == 2
    copies.write(is_end=True)
    assert len(writes) == 3

    def fail(self: ObjectStore, path: str, data: bytes) -> None:
        raise OSError("no space")

    monkeypatch.setattr(ObjectStore, "write_file", fail)
    copies.write(is_end=True)
    copies.write(is_end=True)
    assert warnings == ["no status in the store: no space"]


def test_only_captures_in_an_object_store_are_copied(tmp_path: Path) -> None:
    path = recipe(tmp_path, **ONE)
    for store, is_copied in ((None, False), (str(tmp_path), False), ("memory://x", True)):
        overrides = [f"capture.store={store}"] if store else []
        context = RunContext(load_recipe(path, overrides), tmp_path / "run")
        assert (status_copies(context, silent) is not None) == is_copied
