"""persea chat: chat with a model in a terminal or through a pipe."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from persea.chat.messages import ThinkingEffort
from persea.cli.options import AFTER_PANEL, app, refuse_other_versions
from persea.errors import DataError, RecipeError, RunInterrupted

if TYPE_CHECKING:
    from rich.console import Console


# bold; \001 and \002 enclose bytes that have no width, for readline
INPUT_PROMPT = "\001\033[1m\002> \001\033[0m\002"


@dataclass
class TerminalDisplay:
    """Shows thinking dimmed, answers plain, and notes in italics."""

    console: Console
    has_open_line: bool = False  # a line of an answer has not ended
    thinking: bool = False

    def read_line(self) -> str | None:
        """Read a line from the person; None = the end of the chat."""
        while True:
            try:
                return input(INPUT_PROMPT)
            except KeyboardInterrupt:
                self.console.print()
                self.show_note("/quit or Ctrl-D ends the chat")
            except EOFError:
                self.console.print()
                return None

    def write_delta(self, thinking: str, text: str) -> None:
        """Print a piece of thinking and a piece of the answer."""
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
        """End an answer, with a note if there is one."""
        if self.has_open_line:
            self.console.print()
        self.has_open_line = self.thinking = False
        if note:
            self.show_note(f"({note})")

    def show_note(self, text: str) -> None:
        """Print a note that is no part of an answer."""
        from persea.serve.chat_session import sanitize_for_terminal

        self.console.print(
            sanitize_for_terminal(text),
            style="dim italic",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


class PipeDisplay:
    """Reads lines from stdin and writes answers to stdout; thinking and notes go to stderr."""

    def read_line(self) -> str | None:
        """Read a line; None = the end of the input.

        Raises:
            DataError: The line is not UTF-8.
        """
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise DataError(
                f"a line is not UTF-8: {error.reason}",
                where="stdin",
                remedy="write the lines as UTF-8",
            ) from error
        return line.rstrip("\n") if line else None

    def write_delta(self, thinking: str, text: str) -> None:
        """Write a piece of thinking and a piece of the answer."""
        _write_text(sys.stderr, thinking)
        _write_text(sys.stdout, text)
        sys.stdout.flush()

    def end_answer(self, note: str) -> None:
        """End an answer, with a note if there is one."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        sys.stderr.write(f"\n({note})\n" if note else "\n")

    def show_note(self, text: str) -> None:
        """Write a note that is no part of an answer."""
        _write_text(sys.stderr, f"{text}\n")


def _write_text(stream: TextIO, text: str) -> None:
    """Write a text; on a terminal without control characters, which could steer it."""
    from persea.serve.chat_session import sanitize_for_terminal

    stream.write(sanitize_for_terminal(text) if stream.isatty() else text)


@app.command(rich_help_panel=AFTER_PANEL)
def chat(
    run: Annotated[
        str,
        typer.Argument(
            help="A run folder (its student), a model folder, a GGUF file or a hub id.",
            show_default=False,
        ),
    ],
    think: Annotated[
        str,
        typer.Option(help="Thinking effort: on, off, low, medium or high.", show_default=False),
    ] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens, thinking included.")
    ] = 512,
) -> None:
    """Chat with a student, or with any model.

    /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # a deprecation inside transformers, of no use in a chat
    warnings.filterwarnings("ignore", ".*past_key_values", FutureWarning)
    from persea.pipeline.model_refs import silence_transformers
    from persea.serve.chat_session import ChatSession, load_chat_model, run_chat

    silence_transformers()
    refuse_other_versions(Path(run), "train")
    model = load_chat_model(run)
    session = ChatSession.start(model.renderer)
    message = session.set_effort(think)
    if not message.startswith("thinking:"):
        raise RecipeError(message, where="--think")
    # Ctrl-C stops an answer; verbs with work to save install a handler instead
    signal.signal(signal.SIGINT, signal.default_int_handler)
    display = (
        _make_terminal_display() if sys.stdin.isatty() and sys.stdout.isatty() else PipeDisplay()
    )
    efforts = ", ".join(e for e in ThinkingEffort if e in model.renderer.family.efforts)
    display.show_note(
        f"{model.name}: {model.renderer.family.name}, thinking {efforts}. /help lists the commands."
    )
    try:
        run_chat(model, session, display, max_new_tokens)
    except BrokenPipeError:  # the reader has gone; without this Python fails again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:
        raise RunInterrupted(signal.SIGINT, "a chat is not saved") from error


def _make_terminal_display() -> TerminalDisplay:
    import readline  # noqa: F401  (gives input() line editing and history)

    from rich.console import Console

    return TerminalDisplay(Console())
