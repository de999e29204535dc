"""persea chat: talk to a student, or to any model, in a terminal or through a pipe."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from persea.chat.messages import Effort
from persea.cli.options import app
from persea.errors import DataError, RecipeError, Stopped

if TYPE_CHECKING:
    from rich.console import Console


PROMPT = "\001\033[1m\002> \001\033[0m\002"  # bold; \001 and \002 tell readline what has no width


@dataclass
class Terminal:
    """Thoughts dim, answers plain, notes in italics."""

    console: Console
    open: bool = False  # whether an answer's line is not ended
    thinking: bool = False

    def read(self) -> str | None:
        while True:
            try:
                return input(PROMPT)
            except KeyboardInterrupt:
                self.console.print()
                self.note("/quit or Ctrl-D ends")
            except EOFError:
                self.console.print()
                return None

    def say(self, thought: str, text: str) -> None:
        from persea.serve.chat_session import printable

        for piece, style in ((thought, "dim"), (text, "none")):
            if not piece:
                continue
            if self.thinking and style == "none":
                self.console.print()
            self.thinking, self.open = style == "dim", True
            self.console.print(printable(piece), style=style, end="", markup=False, highlight=False, soft_wrap=True)

    def close(self, note: str) -> None:
        if self.open:
            self.console.print()
        self.open = self.thinking = False
        if note:
            self.note(f"({note})")

    def note(self, text: str) -> None:
        from persea.serve.chat_session import printable

        self.console.print(printable(text), style="dim italic", markup=False, highlight=False, soft_wrap=True)


class Pipe:
    """Lines in, answers out, one after the other; thoughts and notes go to stderr."""

    def read(self) -> str | None:
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise DataError(f"a line is no UTF-8: {error.reason}", where="stdin", remedy="write the lines as UTF-8") from error
        return line.rstrip("\n") if line else None

    def say(self, thought: str, text: str) -> None:
        _write(sys.stderr, thought)
        _write(sys.stdout, text)
        sys.stdout.flush()

    def close(self, note: str) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()
        sys.stderr.write(f"\n({note})\n" if note else "\n")

    def note(self, text: str) -> None:
        _write(sys.stderr, f"{text}\n")


def _write(stream: TextIO, text: str) -> None:
    """The text as it is; where a terminal is at the other end, without what could steer it."""
    from persea.serve.chat_session import printable

    stream.write(printable(text) if stream.isatty() else text)


@app.command(rich_help_panel="After a run")
def chat(run: Annotated[str, typer.Argument(help="A run folder (its student), a model folder or a hub id.", show_default=False)],
         think: Annotated[str, typer.Option(help="How long it thinks: on, off, low, medium or high.", show_default=False)] = "",
         max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in its tokens, thought included.")] = 512) -> None:
    """Talk to a student, or to any model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", ".*past_key_values", FutureWarning)  # transformers renames it; a person at a prompt cannot help it
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from persea.serve.chat_session import Talk, converse, open_speaker

    speaker = open_speaker(run)
    talk = Talk.begin(speaker.voice)
    told = talk.think(think)
    if not told.startswith("thinking:"):
        raise RecipeError(told, where="--think")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # an answer can be stopped; the verbs that keep work catch the signal instead
    screen = _terminal() if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()
    efforts = ", ".join(e for e in Effort if e in speaker.voice.family.efforts)
    screen.note(f"{speaker.name}: {speaker.voice.family.name}, thinking {efforts}. /help lists the commands.")
    try:
        converse(speaker, talk, screen, max_new_tokens)
    except BrokenPipeError:  # whoever read the answers has gone: nothing is left to do, not even at Python's own end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:
        raise Stopped(signal.SIGINT, "nothing of a talk is kept") from error


def _terminal() -> Terminal:
    import readline  # noqa: F401  (input() then edits lines and remembers them)

    from rich.console import Console

    return Terminal(Console())
