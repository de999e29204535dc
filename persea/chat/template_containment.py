"""Render unknown chat templates in a child process: they could loop or allocate without end.

Jinja's sandbox keeps a template from files and from Python's inner objects, but not from time and
memory: a few nested `range` loops never end. A template that could do so is compiled and rendered
by a child with limits, at the first and at every call. A call that goes beyond a limit is refused.
Templates whose time and memory their conversation bounds, and the known templates of published
models (`persea.chat.known_templates`), are rendered in this process.
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
from jinja2 import nodes

from persea.chat.known_templates import is_known_template
from persea.chat.template import ChatTemplate, compile_template, parse_template
from persea.errors import DataError

MAX_SECONDS = 10  # CPU seconds of one rendering
MAX_MEMORY_BYTES = 2 << 30
MAX_OUTPUT_CHARS = 4_000_000
# A loaded machine gives the child little time.
MAX_WAIT_SECONDS = 10 * MAX_SECONDS
# Filters, operators and methods that can make long texts from short ones.
GROWING_FILTERS = frozenset(
    {"center", "indent", "wordwrap", "format", "batch", "slice", "replace", "join"}
)
GROWING_METHODS = frozenset(
    {"center", "ljust", "rjust", "zfill", "format", "expandtabs", "replace", "join"}
)
GROWING_NODES = (nodes.Mul, nodes.Pow, nodes.Mod)


def open_template(
    text: str, special_tokens: dict[str, str], template_date: date, where: str
) -> ChatTemplate:
    """Compile a chat template; one that could render without end gets a child process.

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
    # Compiling computes constants, so it is contained too.
    if is_known_template(text) or not can_grow(text):
        return compile_template(text, special_tokens, template_date, where)
    return _ContainedTemplate(text, special_tokens, template_date, where)


def can_grow(text: str) -> bool:
    """Return whether a template has parts whose time or memory its conversation does not bound."""
    try:
        parsed = parse_template(text)
    except (jinja2.TemplateError, RecursionError):
        return False  # it does not compile, and is refused for that
    if next(parsed.find_all(GROWING_NODES), None) is not None:
        return True
    if any(f.name in GROWING_FILTERS for f in parsed.find_all(nodes.Filter)):
        return True
    if any(loop.recursive for loop in parsed.find_all(nodes.For)):
        return True
    macros = {m.name for m in parsed.find_all(nodes.Macro)}
    if any(_is_growing_call(call, macros) for call in parsed.find_all(nodes.Call)):
        return True
    # A text that a loop makes longer can double at each message.
    return (
        any(
            next(assigned.node.find_all((nodes.Add, nodes.Concat)), None) is not None
            or isinstance(assigned.node, (nodes.Add, nodes.Concat))
            for loop in parsed.find_all(nodes.For)
            for assigned in loop.find_all(nodes.Assign)
        )
        or next(parsed.find_all(nodes.AssignBlock), None) is not None
    )


def _is_growing_call(call: nodes.Call, macros: set[str]) -> bool:
    called = call.node
    if isinstance(called, nodes.Name):
        return called.name in {"range", "lipsum"} | macros
    return isinstance(called, nodes.Getattr) and called.attr in GROWING_METHODS


@dataclass(eq=False)
class _ContainedTemplate:
    """A chat template that a child process renders, started at the first call.

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
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _owner: int = 0

    def __call__(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, **variables: Any
    ) -> str:
        """Render a conversation.

        Raises:
            DataError: The template refuses the conversation, fails, or does not end.
        """
        now = variables.pop("strftime_now", None)
        request = {
            "date": now("%Y-%m-%d") if now is not None else self.template_date.isoformat(),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "variables": variables,
        }
        with self._lock:
            answer = self._ask(json.dumps(request).encode() + b"\n")
        if "text" in answer:
            return str(answer["text"])
        raise DataError(answer["message"], where=self.where, remedy=answer["remedy"])

    def _ask(self, request: bytes) -> dict[str, Any]:
        child = self._running_child()
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
            self._stop()
            raise
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._stop()
        return {
            "message": "the chat template does not end: a conversation takes more than "
            f"{MAX_SECONDS} s, {MAX_MEMORY_BYTES >> 30} GB or {MAX_OUTPUT_CHARS:,} characters",
            "remedy": "take the template from the model's own repository",
        }

    def _running_child(self) -> subprocess.Popen[bytes]:
        """Return the child of this process; a forked worker starts its own."""
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            package = Path(__file__).resolve().parents[2]
            paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._child = subprocess.Popen(
                [sys.executable, "-m", "persea.chat.template_containment"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for this process
            )
            self._owner = os.getpid()
            atexit.register(self._stop)
            head = [self.text, self.special_tokens, MAX_SECONDS]
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(head).encode() + b"\n")
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        with suppress(OSError):
            child.kill()
            child.wait()

    def __del__(self) -> None:
        with suppress(Exception):
            atexit.unregister(self._stop)
            self._stop()


def _main() -> None:
    """Render the requests of the parent, one a line; the limits end this process."""
    text, special_tokens, max_seconds = json.loads(sys.stdin.readline())
    with suppress(ValueError, OSError):  # not every system limits the address space
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    template: ChatTemplate | None = None
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, max_seconds)  # SIGPROF ends this process
        today = date.fromisoformat(request["date"])
        try:
            template = template or compile_template(text, special_tokens, today, "template")
            rendered = template(
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
