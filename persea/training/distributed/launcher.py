"""Several processes on this machine that train together: started, listened to, signalled, and none of them left behind.

What torchrun does, without its command: the same variables, a store on the loopback interface, one process a rank.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TYPE_CHECKING, Any

from persea.errors import MissingRequirementError, RunInterrupted
from persea.training.distributed.heartbeat import decode_failure, encode_failure, join_process_group
from persea.training.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

EXIT_GRACE_S = (
    10.0  # seconds that the others get to end by themselves once one has ended with an error
)
# Imported once for all ranks: importing FSDP alone takes 4 s a process.
PRELOADED_MODULES = (
    "persea.training.student",
    "persea.training.loop",
    "persea.training.dataset",
    "persea.losses",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.auto.modeling_auto",
)


def launch_processes(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    num_processes: int,
    on_message: Callable[[Any], None],
) -> None:
    """Run work(world, store, *arguments) in `procs` processes, to the end of all.

    work  a module's function; hear  what the first process tells (`tell`), the newest of it
    Raises what the first rank to fail said of it, EnvironmentLacks where one was killed, Stopped after a signal to any of them or to this one.
    Needs a main program that can be imported, as every use of multiprocessing does.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        server = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(door.fileno()),
        )
    store = PrefixStore("persea/0", server)
    variables = {
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if sys.platform == "linux":
        variables.setdefault(
            "GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        )  # nobody else's network
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # DDP warns of an option that is set on purpose (student.py)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED_MODULES))
    ranks = [
        context.Process(
            target=_run_rank,
            args=(
                World(k, num_processes),
                variables | {"RANK": str(k), "LOCAL_RANK": str(k)},
                work,
                arguments,
            ),
            name=f"rank {k}",
        )
        for k in range(num_processes)
    ]
    with _forward_signals(ranks):
        try:
            for one in ranks:
                one.start()
            _wait_for_ranks(ranks, store, on_message)
        finally:
            for one in ranks:
                if one.pid and one.is_alive():
                    one.kill()  # also one that is stopped
                    one.join()
    if store.check(["failed"]):
        raise decode_failure(store.get("failed").decode())
    if ended := [f"{one.name} with code {one.exitcode}" for one in ranks if one.exitcode]:
        raise MissingRequirementError(
            f"processes ended and said nothing: {', '.join(ended)}",
            where="train",
            remedy="run it again: it goes on from the last checkpoint",
        )


def _wait_for_ranks(
    ranks: Sequence[BaseProcess], store: Store, on_message: Callable[[Any], None]
) -> None:
    """Until all have ended, or one failed and the others had their time."""
    running, heard, since = list(ranks), b"", 0.0
    while running and not (since and time.monotonic() - since > EXIT_GRACE_S):
        wait([one.sentinel for one in running], timeout=0.5)
        for one in running:
            if one.exitcode:
                since = since or time.monotonic()
                if one.exitcode < 0:
                    number = signal.Signals(-one.exitcode).name
                    told = MissingRequirementError(
                        f"{one.name} (pid {one.pid}) was ended by {number}",
                        where="train",
                        remedy="perhaps for memory: look at "
                        "the system's log; the same command goes on from the last checkpoint",
                    )
                    store.compare_set("failed", "", encode_failure(ranks.index(one), told))
        running = [one for one in running if one.exitcode is None]
        if store.check(["told"]) and (newest := store.get("told")) != heard:
            heard = newest
            on_message(json.loads(newest))


@contextmanager
def _forward_signals(ranks: Sequence[BaseProcess]) -> Iterator[None]:
    """Pass SIGTERM and SIGINT on to every rank: they agree on a step, save it, and end."""

    def forward(number: int, frame: FrameType | None) -> None:
        for one in ranks:
            if one.pid and one.is_alive():
                os.kill(one.pid, number)
        if not any(one.pid for one in ranks):
            raise RunInterrupted(number)

    try:
        before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are its owner's
        before = {}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _run_rank(
    world: World, variables: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """A rank's whole life."""
    os.environ.update(variables)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)
    with join_process_group(world, launcher_reports=True) as store:
        work(world, store, *arguments)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise RunInterrupted(number)


def send_to_launcher(store: Store | None, value: object) -> None:
    """What the first rank says to its launcher, the newest of it."""
    if store is not None:
        store.set("told", json.dumps(value))
