"""persea chat: talk to a student, or to any model, in a terminal or through a pipe."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from persea.chat.messages import ThinkingEffort
from persea.cli.options import app
from persea.errors import DataError, RecipeError, RunInterrupted

if TYPE_CHECKING:
    from rich.console import Console


INPUT_PROMPT = (
    "\001\033[1m\002> \001\033[0m\002"  # bold; \001 and \002 tell readline what has no width
)


@dataclass
class TerminalDisplay:
    """Thoughts dim, answers plain, notes in italics."""

    console: Console
    has_open_line: bool = False  # whether an answer's line is not ended
    thinking: bool = False

    def read_line(self) -> str | None:
        while True:
            try:
                return input(INPUT_PROMPT)
            except KeyboardInterrupt:
                self.console.print()
                self.show_note("/quit or Ctrl-D ends")
            except EOFError:
                self.console.print()
                return None

    def write_delta(self, thinking: str, text: str) -> None:
        from persea.serve.chat_session import sanitize_for_terminal

        for piece, style in ((thinking, "dim"), (text, "none")):
            if not piece:
                continue
            if self.thinking and style == "none":
                self.console.print()
            self.thinking, self.has_open_line = style == "dim", True
            self.console.print(
                sanitize_for_terminal(piece),
                style=style,
                end="",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def end_answer(self, note: str) -> None:
        if self.has_open_line:
            self.console.print()
        self.has_open_line = self.thinking = False
        if note:
            self.show_note(f"({note})")

    def show_note(self, text: str) -> None:
        from persea.serve.chat_session import sanitize_for_terminal

        self.console.print(
            sanitize_for_terminal(text),
            style="dim italic",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


class PipeDisplay:
    """Lines in, answers out, one after the other; thoughts and notes go to stderr."""

    def read_line(self) -> str | None:
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise DataError(
                f"a line is no UTF-8: {error.reason}",
                where="stdin",
                remedy="write the lines as UTF-8",
            ) from error
        return line.rstrip("\n") if line else None

    def write_delta(self, thinking: str, text: str) -> None:
        _write_text(sys.stderr, thinking)
        _write_text(sys.stdout, text)
        sys.stdout.flush()

    def end_answer(self, note: str) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()
        sys.stderr.write(f"\n({note})\n" if note else "\n")

    def show_note(self, text: str) -> None:
        _write_text(sys.stderr, f"{text}\n")


def _write_text(stream: TextIO, text: str) -> None:
    """The text as it is; where a terminal is at the other end, without what could steer it."""
    from persea.serve.chat_session import sanitize_for_terminal

    stream.write(sanitize_for_terminal(text) if stream.isatty() else text)


@app.command(rich_help_panel="After a run")
def chat(
    run: Annotated[
        str,
        typer.Argument(
            help="A run folder (its student), a model folder or a hub id.", show_default=False
        ),
    ],
    think: Annotated[
        str,
        typer.Option(help="How long it thinks: on, off, low, medium or high.", show_default=False),
    ] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in its tokens, thought included.")
    ] = 512,
) -> None:
    """Talk to a student, or to any model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings(
        "ignore", ".*past_key_values", FutureWarning
    )  # transformers renames it; a person at a prompt cannot help it
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from persea.serve.chat_session import ChatSession, load_chat_model, run_chat

    speaker = load_chat_model(run)
    talk = ChatSession.start(speaker.renderer)
    told = talk.set_effort(think)
    if not told.startswith("thinking:"):
        raise RecipeError(told, where="--think")
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # an answer can be stopped; the verbs that keep work catch the signal instead
    screen = (
        _make_terminal_display() if sys.stdin.isatty() and sys.stdout.isatty() else PipeDisplay()
    )
    efforts = ", ".join(e for e in ThinkingEffort if e in speaker.renderer.family.efforts)
    screen.show_note(
        f"{speaker.name}: {speaker.renderer.family.name}, thinking {efforts}. /help lists the commands."
    )
    try:
        run_chat(speaker, talk, screen, max_new_tokens)
    except (
        BrokenPipeError
    ):  # whoever read the answers has gone: nothing is left to do, not even at Python's own end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:
        raise RunInterrupted(signal.SIGINT, "nothing of a talk is kept") from error


def _make_terminal_display() -> TerminalDisplay:
    import readline  # noqa: F401  (input() then edits lines and remembers them)

    from rich.console import Console

    return TerminalDisplay(Console())
