"""Errors with exit codes. Each states in one line what failed, where, why, and the remedy."""

from __future__ import annotations

import signal
import unicodedata
from typing import Any

# categories of Unicode: control characters, directions and other formats, halves of surrogates
UNPRINTABLE = ("Cc", "Cf", "Cs")


def make_printable(text: str) -> str:
    """Return a text with its control characters written out, line ends apart.

    Outside text in a message (a file's name, a server's answer) could otherwise move the cursor or
    hide what follows.
    """
    if text.isprintable():
        return text
    return "".join(
        c
        if c == "\n" or c.isprintable() or unicodedata.category(c) not in UNPRINTABLE
        else c.encode("unicode_escape").decode()
        for c in text
    )


class PerseaError(Exception):
    """An error that persea explains. The command line prints it without a traceback.

    Attributes:
        message: One clause that names the failure.
        where: The place to look at: file:line:column, a model, a token, a recipe key.
        remedy: How to avoid or repair the failure.
        exit_code: Exit code of the command line.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", remedy: str = "") -> None:
        message, where, remedy = map(make_printable, (message, where, remedy))
        self.message, self.where, self.remedy = message, where, remedy
        prefix = f"{where}: " if where else ""
        suffix = f" -> {remedy}" if remedy else ""
        super().__init__(f"{prefix}{message}{suffix}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parts: the joined text would become the message of the copy."""
        return _restore_error, (type(self), self.message, self.where, self.remedy)


def _restore_error(kind: type[PerseaError], message: str, where: str, remedy: str) -> PerseaError:
    return kind(message, where=where, remedy=remedy)


class RecipeError(PerseaError):
    """Wrong usage or a wrong recipe: an unknown key, a wrong type, a contradiction. Exit code 2."""

    exit_code = 2


class DataError(PerseaError):
    """Missing or broken data or models, or a checksum that does not match. Exit code 3."""

    exit_code = 3


class RefusedError(PerseaError):
    """The request is possible but would be wrong. Exit code 4.

    Examples: a score below its floor, a licence, a changed recipe, a plan that cannot fit.
    """

    exit_code = 4


class SafetyRegressionError(RefusedError):
    """The run finished, but the student is less safe than its base model. The report is written.
    Exit code 4.
    """


class TeacherError(PerseaError):
    """A teacher or its server failed. Exit code 5."""

    exit_code = 5


class OtherModelError(TeacherError):
    """A server runs another model than the one that answered before, or than the teacher's other
    servers. Exit code 5.
    """


class StorageError(PerseaError):
    """The disk is full, not writable, not readable, or the run folder is locked by another run.
    Exit code 6.
    """

    exit_code = 6


class MissingRequirementError(PerseaError):
    """This machine lacks an optional package, a GPU, or a sandbox. Exit code 7."""

    exit_code = 7


class RunInterrupted(BaseException):
    """A signal asked the run to stop; committed work is kept. Exit code 128 + signal.

    This is no `Exception`, so that no `except Exception` between here and the command line, in a
    library or in persea, can mistake it for a broken file.
    """

    def __init__(self, signal_number: int, detail: str = "committed work is kept") -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}; {detail} "
            "-> run the same command to continue"
        )
        self.signal_number, self.detail = signal_number, detail
        self.exit_code = 128 + signal_number
