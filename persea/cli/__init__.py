"""The command line: one verb a stage, and the small ones. torch is imported only by verbs that run a model.

A file a group of verbs; stages holds the river's, options what they share.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from persea import __version__

# The order of the imports is the order of the verbs in `persea --help`.
from persea.cli import run as stages  # isort: skip
from persea.cli import cache as caches  # isort: skip
from persea.cli import status as watching  # isort: skip
from persea.cli import compare  # isort: skip
from persea.cli import chat as live  # isort: skip
from persea.cli import serve as serving  # isort: skip
from persea.cli.options import app
from persea.errors import PerseaError, RecipeError, RunInterrupted

__all__ = ["app", "caches", "compare", "live", "main", "serving", "stages", "watching"]
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[
    1
]  # click's UsageError, whichever click typer brings; it has no public name there


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"persea {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    pass


def _raise_interrupted(number: int, frame: object) -> None:
    raise RunInterrupted(number)


def main() -> None:
    """Entry point: every refusal is one line on stderr and an exit code; a traceback means a bug of ours."""
    signal.signal(signal.SIGTERM, _raise_interrupted)
    signal.signal(signal.SIGINT, _raise_interrupted)
    try:
        sys.exit(app(standalone_mode=False))
    except (PerseaError, RunInterrupted) as error:
        sys.stderr.write(f"persea: {error}\n")
        sys.exit(error.exit_code)
    except USAGE_ERROR as error:
        if said := error.format_message():  # type: ignore[attr-defined]  # nothing is said where no verb is given: that prints the help
            sys.stderr.write(f"persea: {said} -> persea --help\n")
        sys.exit(RecipeError.exit_code)
    except Exception:
        sys.stderr.write(
            "persea: this is a bug of persea; please report it with what follows and the recipe\n"
        )
        raise
