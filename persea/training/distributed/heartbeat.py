"""Heartbeats of training processes: detect dead or stopped ranks and exit together.

A thread of every process writes a heartbeat to the launch's store once a second. If a rank's
heartbeat stops for 30 s, the rank is reported and all processes exit. The store keeps the first
failure; the other processes exit silently with the same exit code.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from persea.errors import (
    DataError,
    MissingRequirementError,
    PerseaError,
    RecipeError,
    RefusedError,
    RunInterrupted,
    StorageError,
    TeacherError,
)
from persea.training.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

HEARTBEAT_INTERVAL_S = 1.0
# A stopped process is reported within 60 s; no training step holds Python's lock for 30 s.
HEARTBEAT_TIMEOUT_S = 30.0
# in units of HEARTBEAT_INTERVAL_S:
ASLEEP_INTERVALS = 5  # longer between two looks: this process was stopped itself
EXIT_INTERVALS = 5  # after a failure, for a rank that waits inside a library
FIND_CAUSE_INTERVALS = 3  # for the failed rank to report itself
READ_FAILURE_INTERVALS = 8  # for the other ranks to read the failure before the store is gone
FAILURE_KEY = "failed"  # key of the store that holds the first failure
FORWARDED_ERRORS = (
    RecipeError,
    DataError,
    RefusedError,
    TeacherError,
    StorageError,
    MissingRequirementError,
)


@contextmanager
def join_process_group(world: World, *, launcher_reports: bool = False) -> Iterator[Store | None]:
    """Join the process group, send heartbeats, and exit together with the other processes.

    The store keeps the first failure; the other processes exit silently with the same exit code.

    Args:
        world: this process among all processes.
        launcher_reports: whether a launcher reads the store and reports the failure.
    """
    if world.size == 1:
        yield None
        return
    import torch
    from torch import distributed as dist

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    backend = "gloo"
    if kind is not None:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        backend = f"cpu:gloo,{kind.type}:{dist.get_default_backend_for_device(kind.type)}"
    dist.init_process_group(
        backend,
        init_method="env://",
        rank=world.rank,
        world_size=world.size,
    )
    heartbeat = Heartbeat(world, _connect_store(), launcher_reports)
    dist.barrier()
    heartbeat.start()
    try:
        yield heartbeat.store
        heartbeat.is_over.set()
        dist.barrier()
    except BaseException as error:
        heartbeat.is_over.set()
        cause = heartbeat.find_cause(error)
        if heartbeat.claim_failure(cause) and not launcher_reports:
            heartbeat.wait_for_others()
            if cause is error:
                raise
            raise cause from error
        heartbeat.exit_process()
    dist.destroy_process_group()


def _connect_store() -> Store:
    """Open a second connection to the launch's store: that of the process group may be blocked."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    tcp = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=10),
    )
    return PrefixStore(f"persea/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)


class Heartbeat:
    """Sends heartbeats and exits this process if another rank fails, dies or stops."""

    def __init__(self, world: World, store: Store, launcher_reports: bool) -> None:
        self.world, self.store, self.launcher_reports, self.is_over = (
            world,
            store,
            launcher_reports,
            threading.Event(),
        )
        self.beats, self.peer_pids = 0, set[int]()
        self._beat()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="persea-heartbeat", daemon=True).start()

    def _beat(self) -> None:
        """Write a heartbeat: count, process id and host."""
        self.beats += 1
        self.store.set(
            f"beat/{self.world.rank}", f"{self.beats} {os.getpid()} {socket.gethostname()}"
        )

    def _run(self) -> None:
        """Send heartbeats and check the other ranks until the training is over."""
        last_beats: dict[int, tuple[bytes, float]] = {}
        last_look, failed_at = time.monotonic(), 0.0
        while not self.is_over.wait(HEARTBEAT_INTERVAL_S):
            try:
                self._beat()
                now = time.monotonic()
                if now - last_look > ASLEEP_INTERVALS * HEARTBEAT_INTERVAL_S:
                    last_beats.clear()  # this process was stopped: the others get their time again
                last_look = now
                self._check_ranks(last_beats, now)
                if self.store.check([FAILURE_KEY]):
                    failed_at = failed_at or now
                    # the main thread may wait for a dead rank in a library that does not wake up
                    if now - failed_at > EXIT_INTERVALS * HEARTBEAT_INTERVAL_S:
                        self.exit_process()
            except RuntimeError:
                # The store is gone, and the launcher with it: nothing else would end these
                # processes, stopped ones included.
                if not self.is_over.is_set():
                    for pid in self.peer_pids:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    os._exit(MissingRequirementError.exit_code)

    def _check_ranks(self, last_beats: dict[int, tuple[bytes, float]], now: float) -> None:
        """Note new heartbeats; fail if a rank has sent none for HEARTBEAT_TIMEOUT_S."""
        for rank in range(self.world.size):
            beat = self.store.get(f"beat/{rank}")
            if rank not in last_beats or last_beats[rank][0] != beat:
                last_beats[rank] = beat, now
                _, pid, host = beat.decode().split()
                is_peer = rank != self.world.rank and host == socket.gethostname()
                if self.launcher_reports and is_peer:
                    self.peer_pids.add(int(pid))
            elif now - last_beats[rank][1] > HEARTBEAT_TIMEOUT_S:
                self._fail_silent_rank(rank, beat)

    def _fail_silent_rank(self, rank: int, beat: bytes) -> None:
        """Report a rank without heartbeats and exit."""
        error = MissingRequirementError(
            f"rank {rank} ({_describe_process(beat)}) sent no heartbeat for "
            f"{HEARTBEAT_TIMEOUT_S:.0f} s: the process is stopped, or its machine is",
            where="train",
            remedy="check that process and machine; "
            "the same command resumes from the last checkpoint",
        )
        if self.claim_failure(error) and not self.launcher_reports:
            sys.stderr.write(f"persea: {error}\n")
            sys.stderr.flush()
        self.exit_process()

    def find_cause(self, error: BaseException) -> BaseException:
        """Return why this process fails: the error, or the dead rank behind a closed connection."""
        if isinstance(error, PerseaError | RunInterrupted) or not isinstance(error, RuntimeError):
            return error
        until = time.monotonic() + FIND_CAUSE_INTERVALS * HEARTBEAT_INTERVAL_S
        with suppress(RuntimeError):
            while time.monotonic() < until and not self.store.check([FAILURE_KEY]):
                for rank in range(self.world.size):
                    beat = self.store.get(f"beat/{rank}")
                    _, pid, host = beat.decode().split()
                    if host == socket.gethostname() and not _is_running(int(pid)):
                        return MissingRequirementError(
                            f"rank {rank} ({_describe_process(beat)}) is dead",
                            where="train",
                            remedy="it was killed, perhaps for memory: see the system's log; "
                            "the same command resumes from the last checkpoint",
                        )
                time.sleep(0.1)
        return error

    def claim_failure(self, error: BaseException) -> bool:
        """Store the failure; False if another rank stored one first."""
        encoded = encode_failure(self.world.rank, error)
        with suppress(RuntimeError):
            return bool(self.store.compare_set(FAILURE_KEY, "", encoded) == encoded.encode())
        return True

    def wait_for_others(self) -> None:
        """Give the other ranks time to read the failure, if the store ends with the first process.

        Ranks that wait inside a library exit through their own heartbeat thread.
        """
        others = [f"read/{rank}" for rank in range(self.world.size) if rank != self.world.rank]
        until = time.monotonic() + (
            0
            if self.world.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            else READ_FAILURE_INTERVALS * HEARTBEAT_INTERVAL_S
        )
        with suppress(RuntimeError):
            while time.monotonic() < until and not self.store.check(others):
                time.sleep(0.1)

    def exit_process(self) -> None:
        """Exit at once with the code of the stored failure; library threads would block an exit."""
        sys.stderr.flush()
        with suppress(RuntimeError):
            self.store.set(f"read/{self.world.rank}", "")
        with suppress(RuntimeError):
            os._exit(json.loads(self.store.get(FAILURE_KEY))["code"])
        os._exit(MissingRequirementError.exit_code)


def _describe_process(beat: bytes) -> str:
    """Return process id and host of a heartbeat."""
    _, pid, host = beat.decode().split()
    return f"pid {pid} on {host}"


def _is_running(pid: int) -> bool:
    """Return whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- failures in the store ---


def encode_failure(rank: int, error: BaseException) -> str:
    """Encode an error for the store."""
    failure = {"rank": rank, "code": getattr(error, "exit_code", 1)}
    if isinstance(error, RunInterrupted):
        return json.dumps(failure | {"message": error.detail, "signal": error.signal_number})
    if isinstance(error, PerseaError):
        return json.dumps(
            failure | {"message": error.message, "where": error.where, "remedy": error.remedy}
        )
    return json.dumps(failure | {"message": "".join(traceback.format_exception(error))})


def decode_failure(encoded: str) -> BaseException:
    """Decode an error from the store, to be raised again."""
    failure = json.loads(encoded)
    if "signal" in failure:
        return RunInterrupted(failure["signal"], failure["message"])
    for kind in FORWARDED_ERRORS:
        if failure["code"] == kind.exit_code:
            return kind(failure["message"], where=failure["where"], remedy=failure["remedy"])
    return RuntimeError(f"rank {failure['rank']}:\n{failure['message']}")
