"""Executors of one machine: this process, or several worker processes."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

from persea.errors import MissingRequirementError
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

MIN_PART_INTERVAL_S = 0.5  # between two messages of one attempt about its progress
MAX_DEATHS_BEFORE_WORK = 3  # workers that die before their first unit: none will live
# Imported once, before workers are forked: torch and transformers take seconds each.
PRELOADED_MODULES = (
    "persea.pipeline.capture_worker",
    "persea.teachers.engines.transformers",
    "transformers.models.auto.modeling_auto",
)


class InProcessExecutor:
    """Runs attempts in this process, one after another, while `receive` is called.

    Args:
        make_runner: Makes the runner.
        on_part: Called inside an attempt with (attempt, share done).

    Errors of the runner are raised by `receive`, unchanged.
    """

    def __init__(
        self,
        make_runner: RunnerFactory,
        on_part: Callable[[Attempt, float], None] = lambda attempt, share: None,
    ) -> None:
        self._make_runner, self._on_part = make_runner, on_part
        self._runner: UnitRunner | None = None
        self._waiting: deque[Attempt] = deque()

    @property
    def num_workers(self) -> int:
        """One."""
        return 1

    def submit(self, attempt: Attempt) -> str:
        """Note an attempt."""
        self._waiting.append(attempt)
        return worker_name()

    def receive(self, timeout_s: float) -> Sequence[Outcome]:
        """Run the attempt that waits."""
        if not self._waiting:
            return ()
        attempt = self._waiting.popleft()
        self._runner = self._runner or self._make_runner()
        return (self._runner.run(attempt, lambda share: self._on_part(attempt, share)),)

    def cancel(self, attempt_id: str) -> None:
        """Forget an attempt that waits."""
        self._waiting = deque(a for a in self._waiting if a.id != attempt_id)

    def close(self) -> None:
        """Drop the runner and what it loaded."""
        self._waiting.clear()
        self._runner = None


def start_fork_server() -> None:
    """Start the process that workers are forked from; it imports torch and transformers.

    Called early, its seconds pass beside what this process does before it needs workers. It ends
    with this process. A second call does nothing.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED_MODULES))
    forkserver.ensure_running()


def worker_name() -> str:
    """Return the name of this process as a worker."""
    return f"pid {os.getpid()}"


@dataclass
class _Worker:
    """A worker process, and the attempt that it runs."""

    process: Any
    connection: Connection
    alive: Connection  # closed when this process ends, so that the worker ends too
    attempt: Attempt | None = None
    has_worked: bool = False


class ProcessExecutor:
    """Runs attempts in worker processes of this machine. A worker that dies is replaced.

    Args:
        make_runner: Makes the runner of a worker; it is pickled.
        num_workers: Number of workers.
    """

    def __init__(self, make_runner: RunnerFactory, num_workers: int) -> None:
        self._make_runner, self._num_workers = make_runner, num_workers
        self._context = multiprocessing.get_context("forkserver")
        start_fork_server()
        self._numbers = itertools.count(1)
        self._deaths_before_work = 0
        self._workers: list[_Worker] = []

    @property
    def num_workers(self) -> int:
        """The number that was asked for: a worker that dies is replaced at the next `submit`."""
        return self._num_workers

    def submit(self, attempt: Attempt) -> str:
        """Give an attempt to a worker that waits, preferably one that did this group before."""
        free = [w for w in self._workers if w.attempt is None and w.process.is_alive()]
        worker = free[0] if free else self._start_worker()
        worker.attempt = attempt
        with contextlib.suppress(OSError):  # it has died: `receive` tells
            worker.connection.send(attempt)
        return f"pid {worker.process.pid}"

    def receive(self, timeout_s: float) -> Sequence[Outcome]:
        """Wait for outcomes.

        Raises:
            MissingRequirementError: Workers die before they have done anything.
        """
        by_handle: dict[Any, _Worker] = {w.process.sentinel: w for w in self._workers}
        by_handle |= {w.connection: w for w in self._workers}
        ready = wait(list(by_handle), timeout=timeout_s)
        outcomes: list[Outcome] = []
        for worker in {id(by_handle[h]): by_handle[h] for h in ready}.values():
            outcomes += self._messages(worker)
            if not worker.process.is_alive():
                outcomes += self._messages(worker)  # sent before it died
                outcomes += self._bury(worker)
        return outcomes

    def cancel(self, attempt_id: str) -> None:
        """Kill the worker of an attempt."""
        for worker in [w for w in self._workers if w.attempt and w.attempt.id == attempt_id]:
            self._stop(worker)

    def close(self) -> None:
        """Kill all workers."""
        for worker in list(self._workers):
            self._stop(worker)

    def _start_worker(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        their_alive, our_alive = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work,
            args=(theirs, their_alive, pickle.dumps(self._make_runner)),
            name=f"worker {next(self._numbers)}",
            daemon=True,
        )
        process.start()
        theirs.close()
        their_alive.close()
        worker = _Worker(process, ours, our_alive)
        self._workers.append(worker)
        return worker

    def _messages(self, worker: _Worker) -> list[Outcome]:
        outcomes: list[Outcome] = []
        with contextlib.suppress(EOFError, OSError):
            while worker.connection.poll():
                message = worker.connection.recv()
                if isinstance(message, Receipt | Failure):
                    worker.attempt, worker.has_worked = None, True
                outcomes.append(message)
        return outcomes

    def _bury(self, worker: _Worker) -> list[Outcome]:
        """Return the loss of the attempt of a dead worker."""
        code = worker.process.exitcode
        self._stop(worker)
        if not worker.has_worked:
            self._deaths_before_work += 1
        else:
            self._deaths_before_work = 0
        why = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        if self._deaths_before_work >= MAX_DEATHS_BEFORE_WORK:
            raise MissingRequirementError(
                f"{self._deaths_before_work} workers died before they had done a unit, "
                f"the last by {why}",
                where="executor",
                remedy="perhaps for memory: see the system's log, or use fewer `executor.workers`",
            )
        if worker.attempt is None:
            return []
        name = f"pid {worker.process.pid}"
        return [Failure(worker.attempt.id, name, None, f"the worker died: {why}")]

    def _stop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        worker.alive.close()


def _work(connection: Connection, alive: Connection, factory: bytes) -> None:
    """Run attempts until the connection ends (a worker process)."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process stops its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()
    make_runner: RunnerFactory = pickle.loads(factory)
    runner: UnitRunner | None = None
    while True:
        try:
            attempt: Attempt = connection.recv()
        except (EOFError, OSError):
            return
        try:
            runner = runner or make_runner()
            outcome: Any = runner.run(attempt, _part_sender(connection, attempt))
        except Exception as error:
            outcome = failure_of(attempt, worker_name(), error)
        try:
            connection.send(outcome)
        except OSError:
            return


def _part_sender(connection: Connection, attempt: Attempt) -> Callable[[float], None]:
    last = 0.0

    def send(share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= MIN_PART_INTERVAL_S:
            last = time.monotonic()
            connection.send(PartDone(attempt.id, share))

    return send


def _exit_with_parent(alive: Connection) -> None:
    """End this process when the other end of a pipe is closed: its process is gone."""
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)
