"""Start several training processes on this machine, forward signals, and leave none behind.

The launcher works as torchrun does: the same variables, a store on the loopback interface, one
process a rank.
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
from persea.training.distributed.heartbeat import (
    FAILURE_KEY,
    decode_failure,
    encode_failure,
    join_process_group,
)
from persea.training.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

EXIT_GRACE_S = 10.0  # seconds for the other ranks to exit by themselves after one has failed
MESSAGE_KEY = "message"  # key of the store that holds the newest message to the launcher
# Imported once for all ranks: importing FSDP alone takes 4 s a process.
PRELOADED_MODULES = (
    "persea.training.student",
    "persea.training.loop",
    "persea.training.dataset",
    "persea.losses",
    "torch.distributed.checkpoint",
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
    """Run work(world, store, *arguments) in several processes and wait for all.

    The main program must be importable, as for every use of multiprocessing.

    Args:
        work: a function of a module.
        arguments: further arguments; they are pickled.
        num_processes: number of processes.
        on_message: called with the newest message of the first rank (`send_to_launcher`).

    Raises:
        PerseaError: the error of the first rank that failed.
        MissingRequirementError: if a rank was killed or exited without a reason.
        RunInterrupted: after a signal to a rank or to this process.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
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
        )  # loopback only
    # DDP warns about find_unused_parameters, which is set on purpose (student.py)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
                    one.kill()  # works for a stopped process too
                    one.join()
    if store.check([FAILURE_KEY]):
        raise decode_failure(store.get(FAILURE_KEY).decode())
    if ended := [f"{one.name} with code {one.exitcode}" for one in ranks if one.exitcode]:
        raise MissingRequirementError(
            f"processes exited without a reason: {', '.join(ended)}",
            where="train",
            remedy="run again: the training resumes from the last checkpoint",
        )


def _wait_for_ranks(
    ranks: Sequence[BaseProcess], store: Store, on_message: Callable[[Any], None]
) -> None:
    """Wait until all ranks have exited, or EXIT_GRACE_S after one failed."""
    running, received, since = list(ranks), b"", 0.0
    while running and not (since and time.monotonic() - since > EXIT_GRACE_S):
        wait([one.sentinel for one in running], timeout=0.5)
        for one in running:
            if one.exitcode:
                since = since or time.monotonic()
                if one.exitcode < 0:
                    number = signal.Signals(-one.exitcode).name
                    error = MissingRequirementError(
                        f"{one.name} (pid {one.pid}) was killed by {number}",
                        where="train",
                        remedy="perhaps for memory: see the system's log; "
                        "the same command resumes from the last checkpoint",
                    )
                    store.compare_set(FAILURE_KEY, "", encode_failure(ranks.index(one), error))
        running = [one for one in running if one.exitcode is None]
        if store.check([MESSAGE_KEY]) and (newest := store.get(MESSAGE_KEY)) != received:
            received = newest
            on_message(json.loads(newest))


@contextmanager
def _forward_signals(ranks: Sequence[BaseProcess]) -> Iterator[None]:
    """Forward SIGTERM and SIGINT to every rank: they agree on a step, save it and exit."""

    def forward(number: int, frame: FrameType | None) -> None:
        for one in ranks:
            if one.pid and one.is_alive():
                os.kill(one.pid, number)
        if not any(one.pid for one in ranks):
            raise RunInterrupted(number)

    try:
        before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, which may set no handlers
        before = {}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _run_rank(
    world: World, variables: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Run `work` as one rank."""
    os.environ.update(variables)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_interrupted)
    with join_process_group(world, launcher_reports=True) as store:
        work(world, store, *arguments)


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    """Raise RunInterrupted (a signal handler)."""
    raise RunInterrupted(number)


def send_to_launcher(store: Store | None, value: object) -> None:
    """Send a message from the first rank to its launcher, which reads the newest one."""
    if store is not None:
        store.set(MESSAGE_KEY, json.dumps(value))
