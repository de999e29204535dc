"""What can go wrong, in one line a person can act on: what, where, why, remedy; and the exit code it ends with."""

from __future__ import annotations

import signal


class PerseaError(Exception):
    """A refusal persea can explain. The command line prints it without a traceback and exits with `exit_code`.

    what    one clause: what is refused
    where   file:line:column, pair of models, token, or bytes: the place to look at
    remedy  what the person can do about it
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", remedy: str = "") -> None:
        self.message, self.where, self.remedy = message, where, remedy
        place = f"{where}: " if where else ""
        advice = f" -> {remedy}" if remedy else ""
        super().__init__(f"{place}{message}{advice}")


class RecipeError(PerseaError):
    """Usage, or the recipe: unknown key, wrong type, contradiction."""

    exit_code = 2


class DataError(PerseaError):
    """Data or models: missing, broken, bytes that do not match, a digest that differs."""

    exit_code = 3


class RefusedError(PerseaError):
    """It could be done, and it would be wrong: a floor, a licence, a changed recipe, a plan that cannot fit."""

    exit_code = 4


class SafetyRegressionError(RefusedError):
    """A run that ended, and whose student is less safe than its base: page and table are there, and the exit code says no."""


class TeacherError(PerseaError):
    """A teacher or its endpoint failed."""

    exit_code = 5


class StorageError(PerseaError):
    """The disk: full, not writable, or locked by another run."""

    exit_code = 6


class MissingRequirementError(PerseaError):
    """This machine lacks something: an extra, a GPU, a sandbox."""

    exit_code = 7


class RunInterrupted(BaseException):
    """A signal asked the run to stop; what is committed stays. Exit code 128 + signal.

    Not an Exception: no `except Exception` on its way, a library's or ours, may take it for a broken file.
    """

    def __init__(self, signal_number: int, detail: str = "what is committed stays") -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}; {detail} -> the same command goes on"
        )
        self.signal_number, self.detail = signal_number, detail
        self.exit_code = 128 + signal_number
