"""Render unknown chat templates in a child process: they could loop or allocate without end.

Jinja's sandbox keeps a template from files and from Python's inner objects, but not from time and
memory: a few nested loops over one text never end. So every template that is not one of the known
templates of published models (`persea.chat.known_templates`) is compiled and rendered by a child
with limits, at the first and at every call. One child serves all templates of a process. A call
that goes beyond a limit is refused, and the next call gets a new child.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import jinja2

from persea.chat.known_templates import is_known_template
from persea.chat.template import ChatTemplate, compile_template, parse_template
from persea.errors import DataError

MAX_SECONDS = 2.5  # CPU seconds of one rendering
MAX_MEMORY_BYTES = 2 << 30
MAX_OUTPUT_CHARS = 4_000_000
# A loaded machine gives the child little time.
MAX_WAIT_SECONDS = 40 * MAX_SECONDS
MAX_COMPILED = 64  # templates that a child keeps


def open_template(
    text: str, special_tokens: dict[str, str], template_date: date, where: str
) -> ChatTemplate:
    """Compile a chat template; one that persea does not know is rendered in a child process.

    Args:
        text: The Jinja source.
        special_tokens: bos_token, eos_token, ... as templates expect them.
        template_date: The date that the template's `strftime_now` returns.
        where: The place for error messages.

    Returns:
        The template, as `compile_template` returns it. A contained one raises DataError at a call
        that takes more than MAX_SECONDS, MAX_MEMORY_BYTES or MAX_OUTPUT_CHARS.

    Raises:
        DataError: The template does not compile.
    """
    if is_known_template(text):
        return compile_template(text, special_tokens, template_date, where)
    try:
        parse_template(text)
    except (jinja2.TemplateError, RecursionError):
        return compile_template(text, special_tokens, template_date, where)  # raises
    # Compiling computes constants, so it is contained too.
    return _ContainedTemplate(text, special_tokens, template_date, where)


@dataclass(frozen=True)
class _ContainedTemplate:
    """A chat template that the child process renders.

    Attributes:
        text: The Jinja source.
        special_tokens: bos_token, eos_token, ... as templates expect them.
        template_date: The date that the template's `strftime_now` returns.
        where: The place for error messages.
    """

    text: str
    special_tokens: dict[str, str]
    template_date: date
    where: str

    def __call__(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, **variables: Any
    ) -> str:
        """Render a conversation.

        Raises:
            DataError: The template refuses the conversation, fails, or does not end.
        """
        now = variables.pop("strftime_now", None)
        request = {
            "template": [self.text, self.special_tokens],
            "max_seconds": MAX_SECONDS,
            "date": now("%Y-%m-%d") if now is not None else self.template_date.isoformat(),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "variables": variables,
        }
        answer = _CHILD.ask(json.dumps(request).encode() + b"\n")
        if "text" in answer:
            return str(answer["text"])
        raise DataError(answer["message"], where=self.where, remedy=answer["remedy"])


@dataclass(eq=False)
class _Child:
    """The child of this process, started at the first request; a forked worker starts its own."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        """Return the child's answer to a request of one line."""
        with self.lock:
            child = self._running()
            line = b""
            try:
                assert child.stdin is not None and child.stdout is not None
                child.stdin.write(request)
                child.stdin.flush()
                if select.select([child.stdout], [], [], MAX_WAIT_SECONDS)[0]:
                    line = child.stdout.readline()
            except (BrokenPipeError, ValueError):
                line = b""
            except BaseException:  # Ctrl-C between request and answer
                self.stop()
                raise
            if line.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(line)
                return answer
            self.stop()
        return {
            "message": "the chat template does not end: a conversation takes more than "
            f"{MAX_SECONDS} s, {MAX_MEMORY_BYTES >> 30} GB or {MAX_OUTPUT_CHARS:,} characters",
            "remedy": "take the template from the model's own repository",
        }

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            package = Path(__file__).resolve().parents[2]
            paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "persea.chat.template_containment"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for this process
            )
        return self.process

    def stop(self) -> None:
        """End the child."""
        child, self.process = self.process, None
        if child is None:
            return
        with suppress(OSError):
            child.kill()
            child.wait()

    def forget(self) -> None:
        """Leave the child to the process that this one was forked from."""
        self.lock, self.process = threading.Lock(), None


_CHILD = _Child()
atexit.register(_CHILD.stop)
os.register_at_fork(after_in_child=_CHILD.forget)


def _main() -> None:
    """Render the requests of the parent, one a line; the limits end this process."""
    with suppress(ValueError, OSError):  # not every system limits the address space
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    compiled: dict[str, ChatTemplate] = {}
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["max_seconds"])  # SIGPROF ends this process
        today = date.fromisoformat(request["date"])
        key = json.dumps(request["template"])
        try:
            if key not in compiled:
                if len(compiled) >= MAX_COMPILED:
                    compiled.clear()
                text, special_tokens = request["template"]
                compiled[key] = compile_template(text, special_tokens, today, "template")
            rendered = compiled[key](
                request["messages"],
                add_generation_prompt=request["add_generation_prompt"],
                strftime_now=today.strftime,
                **request["variables"],
            )
            answer = {"text": rendered}
        except MemoryError:
            return
        except DataError as error:
            if "MemoryError" in error.message:
                return
            answer = {"message": error.message, "remedy": error.remedy}
        signal.setitimer(signal.ITIMER_PROF, 0)
        if len(answer.get("text", "")) > MAX_OUTPUT_CHARS:
            return
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
