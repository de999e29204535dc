"""Executors: the protocol between the process that plans units of work and those that compute them.

An executor moves attempts to workers and small receipts back. It holds no truth: whoever submits
the attempts decides which receipt becomes the unit, so that an attempt may run twice, be lost or
come late. A result never travels through the executor; it lies where the receipt says.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from persea.errors import PerseaError, TeacherError

# Errors that another attempt may not meet: a server that answers again, memory that is free again.
RETRIED_ERRORS = (TeacherError,)


@dataclass(frozen=True)
class WorkUnit:
    """A piece of work whose name is a digest of everything that determines its result.

    Attributes:
        name: The digest.
        group: What a worker must hold to do it, such as a teacher. Units of one group are done
            together.
        payload: What the runner needs; it is pickled.
    """

    name: str
    group: str
    payload: Any = None


@dataclass(frozen=True)
class Attempt:
    """One attempt at a unit.

    Attributes:
        unit: The unit.
        number: Number of the attempt, from 1, over all starts of the run.
    """

    unit: WorkUnit
    number: int

    @property
    def id(self) -> str:
        """Name of the attempt, which is also the name of the folder that it writes to."""
        return f"{self.unit.name}-{self.number}"


@dataclass(frozen=True)
class Receipt:
    """What a worker returns for a finished attempt.

    Attributes:
        attempt_id: The attempt.
        worker: Name of the worker: process, and host if it is another one.
        seconds: How long the attempt took, by a clock that does not jump.
        tokens_paid: Tokens of all conversations that were read or written.
        tokens_kept: Tokens of the result.
        digest: sha256 of the result.
    """

    attempt_id: str
    worker: str
    seconds: float
    tokens_paid: int
    tokens_kept: int
    digest: str


@dataclass(frozen=True)
class Failure:
    """An attempt that ended without a result.

    Attributes:
        attempt_id: The attempt.
        worker: Name of the worker.
        error: What the runner raised; None if the worker is gone.
        reason: One line for the ledger.
    """

    attempt_id: str
    worker: str
    error: PerseaError | None
    reason: str

    @property
    def is_lost(self) -> bool:
        """Whether the worker is gone."""
        return self.error is None

    @property
    def is_final(self) -> bool:
        """Whether every further attempt would end in the same way."""
        return self.error is not None and not isinstance(self.error, RETRIED_ERRORS)


@dataclass(frozen=True)
class PartDone:
    """How far an attempt is.

    Attributes:
        attempt_id: The attempt.
        share: Share that is done, in [0, 1].
    """

    attempt_id: str
    share: float


Outcome: TypeAlias = Receipt | Failure | PartDone


class UnitRunner(Protocol):
    """Computes attempts; each worker makes one, and keeps what it loads from unit to unit."""

    def run(self, attempt: Attempt, on_part: Callable[[float], None]) -> Receipt:
        """Compute a unit and leave its result where the receipt's attempt names it."""
        ...


RunnerFactory: TypeAlias = Callable[[], UnitRunner]  # pickled, called in the worker


class Executor(Protocol):
    """Runs attempts somewhere."""

    @property
    def num_workers(self) -> int:
        """Workers that can run an attempt now; it may change while units are done."""
        ...

    def submit(self, attempt: Attempt) -> str:
        """Give an attempt to a free worker.

        At most `num_workers` attempts are submitted at once.

        Returns:
            Name of the worker; "" if it is not known yet.
        """
        ...

    def receive(self, timeout_s: float) -> Sequence[Outcome]:
        """Wait for outcomes, at most `timeout_s` seconds; empty if there is none by then.

        Raises:
            PerseaError: No worker can work any more.
        """
        ...

    def cancel(self, attempt_id: str) -> None:
        """Stop an attempt. No outcome of it is received afterwards."""
        ...

    def close(self) -> None:
        """Stop all attempts and workers."""
        ...


# --- errors between processes ---


def failure_of(attempt: Attempt, worker: str, error: Exception) -> Failure:
    """Return the failure that reports an error of a runner; it can be pickled."""
    known = error if isinstance(error, PerseaError) else _explain(error)
    return Failure(attempt.id, worker, known, str(known))


def _explain(error: Exception) -> PerseaError:
    """Return an error of another library as one that another worker may not meet."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f"{last[0].filename}:{last[0].lineno}" if last else ""
    return TeacherError(
        f"{type(error).__name__}: {error}",
        where=where,
        remedy="see the log of the worker's machine: perhaps its memory is full",
    )
