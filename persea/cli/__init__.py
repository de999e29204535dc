"""The command line: one verb for each stage, and tools around a run.

One file holds a group of verbs; `run` has the pipeline's, `options` the shared options. torch is
imported only by verbs that run a model.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from persea import __version__

# The order of these imports is the order of the verbs in `persea --help`.
from persea.cli import run  # isort: skip
from persea.cli import lineage  # isort: skip
from persea.cli import doctor  # isort: skip
from persea.cli import pilot  # isort: skip
from persea.cli import extend  # isort: skip
from persea.cli import cache  # isort: skip
from persea.cli import status  # isort: skip
from persea.cli import compare  # isort: skip
from persea.cli import audit  # isort: skip
from persea.cli import export  # isort: skip
from persea.cli import chat  # isort: skip
from persea.cli import serve  # isort: skip
from persea.cli.options import app
from persea.errors import PerseaError, RecipeError, RunInterrupted, StorageError

__all__ = [
    "app",
    "audit",
    "cache",
    "chat",
    "compare",
    "doctor",
    "export",
    "extend",
    "lineage",
    "main",
    "pilot",
    "run",
    "serve",
    "status",
]
# click's UsageError, of the click that typer bundles: typer has no public name for it
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"persea {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _raise_interrupted(number: int, frame: object) -> None:
    raise RunInterrupted(number)


def main() -> None:
    """Run the command line.

    Every refusal is one line on stderr and an exit code; a traceback means a bug in persea.
    """
    signal.signal(signal.SIGTERM, _raise_interrupted)
    signal.signal(signal.SIGINT, _raise_interrupted)
    try:
        sys.exit(app(prog_name="persea", standalone_mode=False))
    except (PerseaError, RunInterrupted) as error:
        sys.stderr.write(f"persea: {error}\n")
        sys.exit(error.exit_code)
    except USAGE_ERROR as error:
        # without a verb typer prints the help, and the message is empty
        if message := error.format_message():  # type: ignore[attr-defined]
            sys.stderr.write(f"persea: {message} -> persea --help\n")
        sys.exit(RecipeError.exit_code)
    except OSError as error:
        if error.filename is None:  # not of a file that somebody named
            raise
        problem = StorageError(
            f"cannot be read or written: {error.strerror}",
            where=str(error.filename),
            remedy="check that the path is right and that this user may use it",
        )
        sys.stderr.write(f"persea: {problem}\n")
        sys.exit(problem.exit_code)
    except Exception:
        sys.stderr.write(
            "persea: this is a bug in persea; please report it with the traceback below and the "
            "recipe\n"
        )
        raise
