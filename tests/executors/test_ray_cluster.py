"""What is refused before Ray is asked, and what an actor does with an attempt.

Kills of nodes and drivers are in bench/chaos_ray.py: a cluster of several nodes takes a minute to
start. One of this machine alone takes some seconds; that case runs where Ray is installed.
"""

from __future__ import annotations

import builtins
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest

from persea.errors import MissingRequirementError, RefusedError
from persea.executors.executor import Attempt, Failure, Receipt, WorkUnit
from persea.executors.ray_cluster import (
    ActorWorker,
    RayExecutor,
    RaySettings,
    SharedFolder,
    _cluster_errors,
    _refuse_closed_port,
    _workers_in,
    connect,
)
from tests.executors.test_local import Runner, ends


def actor(tmp_path: Path, version: str = "") -> ActorWorker:
    import persea

    shared = SharedFolder.create(tmp_path / "attempts")
    return ActorWorker(pickle.dumps(Runner), shared, version or persea.__version__, {})


def attempt(what: str = "") -> Attempt:
    return Attempt(WorkUnit("a", "teacher", what), 1)


def test_without_ray_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "ray":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingRequirementError, match=r"pip install 'persea\[ray\]'"):
        connect(RaySettings())


def test_a_head_that_nobody_started_is_named_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        _refuse_closed_port(address)
        _refuse_closed_port(f"ray://{address}")
    with pytest.raises(MissingRequirementError, match="no Ray cluster there") as raised:
        _refuse_closed_port(address)
    assert raised.value.where == f"executor.address: {address}"
    _refuse_closed_port("")
    _refuse_closed_port("auto")


def test_a_version_mismatch_has_a_remedy_of_its_own() -> None:
    with pytest.raises(MissingRequirementError, match="install the cluster's versions"):  # noqa: SIM117
        with _cluster_errors("head:6379"):
            raise RuntimeError("Version mismatch: The cluster was started with:\n  Ray: 2.1")
    with pytest.raises(MissingRequirementError, match="ray start --head"):  # noqa: SIM117
        with _cluster_errors("head:6379"):
            raise ConnectionError("Failed to connect to GCS.")
    with pytest.raises(MissingRequirementError, match="less busy"), _cluster_errors(""):
        raise RuntimeError("The current node timed out during startup. This could happen ...")


def test_room_for_workers() -> None:
    free = {"CPU": 7.0, "GPU": 2.0}
    assert _workers_in(free, RaySettings(cpus_per_worker=2)) == 3
    assert _workers_in(free, RaySettings(cpus_per_worker=1, gpus_per_worker=0.5)) == 4
    assert _workers_in({"CPU": 7.0}, RaySettings(gpus_per_worker=1)) == 0


def test_an_actor_returns_receipts_and_failures(tmp_path: Path) -> None:
    one = actor(tmp_path)
    assert one.progress() is None
    assert isinstance(one.run(attempt()), Receipt)
    assert one.progress() == ("a-1", 0.0)
    failure = one.run(attempt("data"))
    assert isinstance(failure, Failure)
    assert failure.is_final


def test_an_actor_refuses_another_version_and_an_unseen_folder(tmp_path: Path) -> None:
    other = actor(tmp_path, "0.0.1").run(attempt())
    assert isinstance(other, Failure)
    assert "the run was started with 0.0.1" in other.reason
    blind = actor(tmp_path)
    (tmp_path / "attempts" / ".shared").write_text("of another machine")
    found = blind.run(attempt())
    assert isinstance(found, Failure)
    assert isinstance(found.error, RefusedError)
    assert "does not see the run folder" in found.reason


def test_a_cluster_of_this_machine_runs_attempts_and_loses_an_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short case: receipts, a failure with its error, and an actor that dies on the way.

    Without an address no other cluster is looked for.
    """
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    import persea

    shared = SharedFolder.create(tmp_path / "attempts")
    settings = RaySettings(max_workers=1, local_cpus=1)  # each actor is a process that starts
    try:
        executor = RayExecutor(Runner, settings, shared, persea.__version__)
    except MissingRequirementError as error:
        if "did not start within the 30 s" not in str(error):
            raise
        pytest.skip("this machine is too busy: Ray waits 30 s for its own processes")
    try:
        assert executor.num_workers == 1
        found = []
        for name, number, what in (("a", 1, ""), ("b", 1, "data"), ("c", 1, "die"), ("c", 2, "")):
            executor.submit(Attempt(WorkUnit(name, "teacher", what), number))
            found += ends(executor, 1)
        receipt, failure, lost, again = found
        assert isinstance(receipt, Receipt)
        assert (receipt.attempt_id, receipt.tokens_paid, receipt.tokens_kept) == ("a-1", 2, 1)
        assert isinstance(failure, Failure)
        assert str(failure.error) == "file:3: no such row -> mend it"
        assert isinstance(lost, Failure)
        assert lost.is_lost
        assert lost.reason.startswith("the actor is gone")
        assert isinstance(again, Receipt)  # by another process
        assert len({receipt.worker, again.worker, f"pid {os.getpid()}"}) == 3
    finally:
        executor.close()
    import ray

    assert not ray.is_initialized()
