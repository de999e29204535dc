"""The executor of a Ray cluster: actors that hold a teacher each, on every node that has room.

Ray runs what it is given at least once, forgets results of nodes that die, and knows nothing of
units. Therefore actors return receipts alone, are never restarted by Ray, and Ray repeats no call:
the dispatcher does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from persea.errors import MissingRequirementError, PerseaError, RefusedError
from persea.executors.executor import (
    Attempt,
    Failure,
    Outcome,
    PartDone,
    Receipt,
    RunnerFactory,
    UnitRunner,
    failure_of,
)

CONNECT_TIMEOUT_S = 10.0  # for the head's port: Ray itself waits for minutes
LOOK_INTERVAL_S = 5.0  # between two looks at the cluster's free resources
PART_INTERVAL_S = 2.0  # between two questions for an actor's progress
LOCAL_OBJECT_STORE_BYTES = 100 << 20  # receipts are small; Ray takes 30 % of the memory by default
# Settings of this process that a worker on another node needs too.
PASSED_VARIABLES = ("HF_HUB_OFFLINE", "HF_HOME", "PERSEA_HOME", "TOKENIZERS_PARALLELISM")
TOKEN_VARIABLE = "RAY_AUTH_MODE"  # Ray sets it too, where it finds a token


@dataclass(frozen=True)
class RaySettings:
    """How to reach a cluster, and what a worker needs of it.

    Attributes:
        address: HOST:PORT or ray://HOST:PORT of the head; auto = this node's cluster; "" = a
            cluster of this machine alone, on the loopback interface.
        max_workers: Most workers; 0 = as many as the cluster has room for.
        cpus_per_worker: CPUs that a worker reserves.
        gpus_per_worker: GPUs that a worker reserves.
        allow_unauthenticated: Whether a cluster of several machines may lack a token.
        local_cpus: CPUs of the cluster that is started here; 0 = Ray counts them.
    """

    address: str = ""
    max_workers: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    allow_unauthenticated: bool = False
    local_cpus: int = 0


@dataclass(frozen=True)
class SharedFolder:
    """A folder that every worker must see, proved by a file with a random text.

    Attributes:
        path: The folder.
        token: Content of its file `.shared`.
    """

    path: Path
    token: str

    @staticmethod
    def create(path: Path) -> SharedFolder:
        """Create the folder and its file."""
        token = secrets.token_hex(16)
        path.mkdir(parents=True, exist_ok=True)
        (path / ".shared").write_text(token)
        return SharedFolder(path, token)

    def refuse_unseen(self) -> None:
        """Raise if this machine does not see the folder.

        Raises:
            RefusedError: It does not.
        """
        with contextlib.suppress(OSError):
            if (self.path / ".shared").read_text() == self.token:
                return
        raise RefusedError(
            f"node {socket.gethostname()} does not see the run folder",
            where=str(self.path),
            remedy="put --out on a file system that all nodes share, at the same path",
        )


class ActorWorker:
    """What an actor runs: one attempt at a time, and a second thread that answers questions."""

    def __init__(
        self,
        factory: bytes,
        shared: SharedFolder,
        version: str,
        variables: dict[str, str],
    ) -> None:
        os.environ.update(variables)
        self.factory, self.shared, self.version = factory, shared, version
        self.name = f"pid {os.getpid()} on {socket.gethostname()}"
        self.runner: UnitRunner | None = None
        self.share: tuple[str, float] | None = None
        self.lock = threading.Lock()

    def run(self, attempt: Attempt) -> Receipt | Failure:
        """Run an attempt; errors come back as a `Failure`."""
        try:
            if self.runner is None:
                self.refuse_other_installation()
                make_runner: RunnerFactory = pickle.loads(self.factory)
                self.runner = make_runner()
                if hasattr(self.runner, "worker"):
                    self.runner.worker = self.name
            return self.runner.run(attempt, lambda share: self.note(attempt.id, share))
        except Exception as error:
            return failure_of(attempt, self.name, error)

    def note(self, attempt_id: str, share: float) -> None:
        """Note the progress of an attempt."""
        with self.lock:
            self.share = (attempt_id, share)

    def progress(self) -> tuple[str, float] | None:
        """Return the attempt that runs and its share; None before the first."""
        with self.lock:
            return self.share

    def refuse_other_installation(self) -> None:
        """Raise if this node has another persea, or does not see the run folder.

        Raises:
            MissingRequirementError: The versions differ.
            RefusedError: The folder is not there.
        """
        import persea

        if persea.__version__ != self.version:
            raise MissingRequirementError(
                f"persea {persea.__version__}, and the run was started with {self.version}",
                where=self.name,
                remedy="install the same version on every node",
            )
        self.shared.refuse_unseen()


@dataclass
class _Actor:
    handle: Any
    attempt: Attempt | None = None
    result: Any = None  # reference of the call that runs
    question: Any = None  # reference of the last question for progress
    asked_at: float = 0.0


class RayExecutor:
    """Runs attempts in actors of a Ray cluster. Nodes may come and go.

    Args:
        make_runner: Makes the runner of an actor; it is pickled.
        settings: The cluster.
        shared: A folder that every node must see.
        version: persea's version, which every node must have.

    Raises:
        MissingRequirementError: Ray is not installed, or the cluster cannot be reached, has another
            version, or no node has room for one worker.
        RefusedError: The cluster has several machines and asks for no token.
    """

    def __init__(
        self,
        make_runner: RunnerFactory,
        settings: RaySettings,
        shared: SharedFolder,
        version: str,
    ) -> None:
        self._settings = settings
        self._owns_connection = connect(settings)
        self._arguments = (
            pickle.dumps(make_runner),
            shared,
            version,
            {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ},
        )
        self._actors: list[_Actor] = []
        self._room, self._looked_at = 0, -LOOK_INTERVAL_S
        if not self._fits_somewhere():
            self.close()
            raise MissingRequirementError(
                f"no node has {settings.cpus_per_worker:g} CPUs and "
                f"{settings.gpus_per_worker:g} GPUs for a worker",
                where=f"executor.address: {settings.address or 'this machine'}",
                remedy="lower `executor.cpus_per_worker` or `executor.gpus_per_worker`",
            )

    @property
    def num_workers(self) -> int:
        """Actors that live, and those that free resources of the cluster have room for."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_INTERVAL_S:
            self._looked_at, self._room = now, self._count_room()
        wanted = len(self._actors) + self._room
        return min(self._settings.max_workers or wanted, wanted)

    def submit(self, attempt: Attempt) -> str:
        """Give an attempt to an actor that waits, or to a new one."""
        free = [a for a in self._actors if a.attempt is None]
        actor = free[0] if free else self._start_actor()
        actor.attempt, actor.question = attempt, None
        actor.result = actor.handle.run.remote(attempt)
        return ""

    def receive(self, timeout_s: float) -> Sequence[Outcome]:
        """Wait for receipts, failures and dead actors."""
        import ray

        busy = {a.result: a for a in self._actors if a.attempt is not None}
        if not busy:
            time.sleep(timeout_s)
            return ()
        with _cluster_errors(self._settings.address):
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=timeout_s)
            if ready:  # whatever else is there already
                ready, _ = ray.wait(list(busy), num_returns=len(busy), timeout=0)
        outcomes = [self._result(busy[reference]) for reference in ready]
        return outcomes + self._ask_for_progress()

    def cancel(self, attempt_id: str) -> None:
        """Kill the actor of an attempt."""
        for actor in [a for a in self._actors if a.attempt and a.attempt.id == attempt_id]:
            self._drop(actor)

    def close(self) -> None:
        """Kill all actors; leave the cluster, and end it if it was started here."""
        for actor in list(self._actors):
            self._drop(actor)
        if self._owns_connection:
            import ray

            ray.shutdown()
            self._owns_connection = False

    # --- actors ---

    def _start_actor(self) -> _Actor:
        import ray

        options = {
            "num_cpus": self._settings.cpus_per_worker,
            "num_gpus": self._settings.gpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 2,  # `run`, and `progress` at the same time
            "scheduling_strategy": "SPREAD",
        }
        make: Any = ray.remote(ActorWorker).options(**options)
        actor = _Actor(make.remote(*self._arguments))
        self._actors.append(actor)
        self._room = max(0, self._room - 1)
        return actor

    def _result(self, actor: _Actor) -> Outcome:
        import ray

        attempt, reference = actor.attempt, actor.result
        assert attempt is not None
        actor.attempt = actor.result = actor.question = None
        try:
            outcome: Outcome = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._drop(actor)
            reason = str(error).strip().splitlines()
            return Failure(
                attempt.id, "", None, f"the actor is gone: {reason[0] if reason else error!r}"
            )
        return outcome

    def _ask_for_progress(self) -> list[Outcome]:
        import ray

        now, outcomes = time.monotonic(), list[Outcome]()
        for actor in [a for a in self._actors if a.attempt is not None]:
            if actor.question is None:
                if now - actor.asked_at >= PART_INTERVAL_S:
                    actor.question, actor.asked_at = actor.handle.progress.remote(), now
                continue
            if not ray.wait([actor.question], timeout=0)[0]:
                continue
            with contextlib.suppress(ray.exceptions.RayError):  # `_result` reports a dead actor
                found = ray.get(actor.question)
                if found is not None:
                    outcomes.append(PartDone(*found))
            actor.question = None
        return outcomes

    def _drop(self, actor: _Actor) -> None:
        import ray

        self._actors.remove(actor)
        with contextlib.suppress(Exception):  # it may be gone, and the cluster with it
            ray.kill(actor.handle, no_restart=True)
        self._looked_at = -LOOK_INTERVAL_S

    # --- the cluster ---

    def _count_room(self) -> int:
        """Return how many further workers the free resources of the cluster have room for."""
        import ray

        with _cluster_errors(self._settings.address):
            free: dict[str, float] = ray.available_resources()
        return _workers_in(free, self._settings)

    def _fits_somewhere(self) -> bool:
        import ray

        nodes = [n for n in ray.nodes() if n["Alive"]]
        return any(_workers_in(n["Resources"], self._settings) for n in nodes)


def _workers_in(resources: dict[str, float], settings: RaySettings) -> int:
    needs = (("CPU", settings.cpus_per_worker), ("GPU", settings.gpus_per_worker))
    counts = [int(resources.get(name, 0.0) // each) for name, each in needs if each > 0]
    return min(counts, default=settings.max_workers or 1)


def refuse_missing_ray() -> None:
    """Raise if Ray is not installed. Ray itself is not imported.

    Raises:
        MissingRequirementError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise _missing_ray()


def _missing_ray() -> MissingRequirementError:
    return MissingRequirementError(
        "Ray is not installed", where="executor.kind: ray", remedy="pip install 'persea[ray]'"
    )


def connect(settings: RaySettings) -> bool:
    """Connect this process to a cluster, or start one on this machine.

    Returns:
        Whether the connection is new; False if the process had one before.

    Raises:
        MissingRequirementError: Ray is not installed, or the cluster cannot be reached or has
            another version.
        RefusedError: The cluster has several machines and asks for no token.
    """
    ray = _import_ray()
    is_new = not ray.is_initialized()
    if is_new:
        _refuse_closed_port(settings.address)
        quiet = {"log_to_driver": False, "configure_logging": False}
        with _cluster_errors(settings.address):
            if settings.address:
                ray.init(address=settings.address, **quiet)
            else:
                ray.init(
                    address="local",  # whatever cluster RAY_ADDRESS or an earlier `ray start` names
                    num_cpus=settings.local_cpus or None,
                    include_dashboard=False,
                    object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
    hosts = {n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    has_token = os.environ.get(TOKEN_VARIABLE, "").lower() == "token"
    if len(hosts) > 1 and not has_token and not settings.allow_unauthenticated:
        if is_new:
            ray.shutdown()
        raise RefusedError(
            f"the cluster has {len(hosts)} machines and asks for no token: whoever reaches its "
            "port runs code on all of them",
            where=f"executor.address: {settings.address}",
            remedy="`ray get-auth-token --generate`, then start every node and persea with "
            f"{TOKEN_VARIABLE}=token; or write `allow_unauthenticated: true`",
        )
    return is_new


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # by default 15: beside any other program, workers of a cluster on this machine stand still
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise _missing_ray() from error
    return ray


def _refuse_closed_port(address: str) -> None:
    """Raise if nobody listens at an address.

    Raises:
        MissingRequirementError: Nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, reason: str) -> MissingRequirementError:
    return MissingRequirementError(
        f"no Ray cluster there: {reason}",
        where=f"executor.address: {address or 'this machine'}",
        remedy="`ray start --head` on the head, `ray start --address HEAD:6379` on the others; "
        "`ray status` shows whether they found each other",
    )


@contextlib.contextmanager
def _cluster_errors(address: str) -> Iterator[None]:
    """Turn what Ray raises about a whole cluster into one line."""
    try:
        yield
    except PerseaError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = " ".join(lines)[:400] or repr(error)
        if "ersion mismatch" in text:
            raise MissingRequirementError(
                text,
                where=f"executor.address: {address}",
                remedy="install the cluster's versions of Python and Ray here",
            ) from error
        if "timed out during startup" in text:
            raise MissingRequirementError(
                "Ray did not start within the 30 s that it waits for itself",
                where=f"executor.address: {address or 'this machine'}",
                remedy="run again when this machine is less busy, or capture without Ray: "
                "`executor: {kind: local, workers: 2}`",
            ) from error
        raise _unreachable(address, text) from error
