"""One process among others: joined, watched, and ended together with them; who is gone or silent is named.

Every process beats once a second in the launch's store, from a thread of its own; one that is silent for 30 s is named, and all end. What
made the first one fail is kept in that store, first come; the others end with its exit code and say nothing.
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

HEARTBEAT_INTERVAL_S, HEARTBEAT_TIMEOUT_S = (
    1.0,
    30.0,
)  # seconds. A stopped process is named within 60 s; no step of ours holds Python's lock for 30
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
    """Be one of a world's processes: open its process group, beat, and end together with the others.

    silent  another process, which reads the store, says what went wrong (a launcher of ours)
    Where one fails, its reason is kept in the store, first come; the others end with the same exit code and say nothing.
    """
    if world.size == 1:
        yield None
        return
    import torch
    from torch import distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        init_method="env://",
        rank=world.rank,
        world_size=world.size,
    )
    watch = Heartbeat(world, _connect_store(), launcher_reports)
    dist.barrier()
    watch.start()
    try:
        yield watch.store
        watch.is_over.set()
        dist.barrier()
    except BaseException as error:
        watch.is_over.set()
        told = watch.find_cause(error)
        if watch.claim_failure(told) and not launcher_reports:
            watch.wait_for_others()
            if told is error:
                raise
            raise told from error
        watch.exit_process()
    dist.destroy_process_group()


def _connect_store() -> Store:
    """A connection of its own to the launch's store: the one of the process group may be waiting for somebody."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    tcp = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=10),
    )
    return PrefixStore(f"persea/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)


class Heartbeat:
    """Beats for this process, and ends it where another one fails, is gone, or is silent."""

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
        threading.Thread(target=self._run, name="persea-watch", daemon=True).start()

    def _beat(self) -> None:
        self.beats += 1
        self.store.set(
            f"beat/{self.world.rank}", f"{self.beats} {os.getpid()} {socket.gethostname()}"
        )

    def _run(self) -> None:
        heard: dict[int, tuple[bytes, float]] = {}
        looked, failed = time.monotonic(), 0.0
        while not self.is_over.wait(HEARTBEAT_INTERVAL_S):
            try:
                self._beat()
                now = time.monotonic()
                if now - looked > 5 * HEARTBEAT_INTERVAL_S:
                    heard.clear()  # it was this process that slept: the others get their time again
                looked = now
                for rank in range(self.world.size):
                    beat = self.store.get(f"beat/{rank}")
                    if rank not in heard or heard[rank][0] != beat:
                        heard[rank] = beat, now
                        _, who, host = beat.decode().split()
                        if (
                            self.launcher_reports
                            and rank != self.world.rank
                            and host == socket.gethostname()
                        ):
                            self.peer_pids.add(int(who))
                    elif now - heard[rank][1] > HEARTBEAT_TIMEOUT_S:
                        self._fail_silent_rank(rank, beat)
                if self.store.check(["failed"]):
                    failed = failed or now
                    if (
                        now - failed > 5 * HEARTBEAT_INTERVAL_S
                    ):  # it waits for one that is gone, in a library that does not wake up
                        self.exit_process()
            except RuntimeError:  # the store is gone, and with it the launcher: nobody would look after these processes, stopped ones included
                if not self.is_over.is_set():
                    for stopped in self.peer_pids:
                        with suppress(ProcessLookupError):
                            os.kill(stopped, signal.SIGKILL)
                    os._exit(MissingRequirementError.exit_code)

    def _fail_silent_rank(self, rank: int, beat: bytes) -> None:
        told = MissingRequirementError(
            f"rank {rank} ({_describe_process(beat)}) has been silent for {HEARTBEAT_TIMEOUT_S:.0f} s: it is stopped, or its machine is",
            where="train",
            remedy="look at that process and machine; the same command goes on from the last checkpoint",
        )
        if self.claim_failure(told) and not self.launcher_reports:
            sys.stderr.write(f"persea: {told}\n")
            sys.stderr.flush()
        self.exit_process()

    def find_cause(self, error: BaseException) -> BaseException:
        """Why this process ends: the error, or, where a library only found a connection closed, who is gone."""
        if isinstance(error, PerseaError | RunInterrupted) or not isinstance(error, RuntimeError):
            return error
        until = time.monotonic() + 3 * HEARTBEAT_INTERVAL_S
        with suppress(RuntimeError):
            while time.monotonic() < until and not self.store.check(["failed"]):
                for rank in range(self.world.size):
                    beat = self.store.get(f"beat/{rank}")
                    _, pid, host = beat.decode().split()
                    if host == socket.gethostname() and not _is_running(int(pid)):
                        return MissingRequirementError(
                            f"rank {rank} ({_describe_process(beat)}) is gone",
                            where="train",
                            remedy="it was killed, perhaps for memory: "
                            "look at the system's log; the same command goes on from the last checkpoint",
                        )
                time.sleep(0.1)
        return error

    def claim_failure(self, error: BaseException) -> bool:
        """Say why all end; False where another said it first."""
        mine = encode_failure(self.world.rank, error)
        with suppress(RuntimeError):
            return bool(self.store.compare_set("failed", "", mine) == mine.encode())
        return True

    def wait_for_others(self) -> None:
        """Where the store is the first process' own and ends with it, give the others the time to read why: those that wait in a library are
        woken by their own watch after 5 beats.
        """
        others = [f"heard/{rank}" for rank in range(self.world.size) if rank != self.world.rank]
        until = time.monotonic() + (
            0
            if self.world.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            else 8 * HEARTBEAT_INTERVAL_S
        )
        with suppress(RuntimeError):
            while time.monotonic() < until and not self.store.check(others):
                time.sleep(0.1)

    def exit_process(self) -> None:
        """End with the code of what was claimed: at once, for libraries wait in their own threads."""
        sys.stderr.flush()
        with suppress(RuntimeError):
            self.store.set(f"heard/{self.world.rank}", "")
        with suppress(RuntimeError):
            os._exit(json.loads(self.store.get("failed"))["code"])
        os._exit(MissingRequirementError.exit_code)


def _describe_process(beat: bytes) -> str:
    _, pid, host = beat.decode().split()
    return f"pid {pid} on {host}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- what is said of a failure ---


def encode_failure(rank: int, error: BaseException) -> str:
    """An error as it travels to whoever tells it."""
    told = {"rank": rank, "code": getattr(error, "exit_code", 1)}
    if isinstance(error, RunInterrupted):
        return json.dumps(told | {"what": error.detail, "signal": error.signal_number})
    if isinstance(error, PerseaError):
        return json.dumps(
            told | {"what": error.message, "where": error.where, "remedy": error.remedy}
        )
    return json.dumps(told | {"what": "".join(traceback.format_exception(error))})


def decode_failure(encoded: str) -> BaseException:
    """What `failure` wrote, to be raised again."""
    said = json.loads(encoded)
    if "signal" in said:
        return RunInterrupted(said["signal"], said["what"])
    for kind in FORWARDED_ERRORS:
        if said["code"] == kind.exit_code:
            return kind(said["what"], where=said["where"], remedy=said["remedy"])
    return RuntimeError(f"rank {said['rank']}:\n{said['what']}")
