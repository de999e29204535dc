"""Render an unknown chat template in a child process first: it could loop or allocate without end.

Jinja's sandbox keeps a template from files and from Python's inner objects, but not from time and
memory: a few nested `range` loops never end. A template that can do so is rendered once in a child
with limits, before this process renders it. The result is kept in PERSEA_HOME.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from persea import storage
from persea.chat.template import compile_template, parse_template
from persea.errors import DataError, StorageError

CONTAINMENT_VERSION = 1
MAX_SECONDS = 10
MAX_MEMORY_BYTES = 2 << 30
MAX_OUTPUT_CHARS = 4_000_000
TOO_LONG_EXIT_CODE = 3
# Filters and operators that can make long texts from short ones.
GROWING_FILTERS = frozenset({"center", "indent", "wordwrap", "format", "batch", "slice"})
GROWING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "format", "expandtabs"})


def refuse_endless_template(text: str, special_tokens: dict[str, str], where: str) -> None:
    """Refuse a chat template that does not end within the limits.

    Args:
        text: The Jinja source.
        special_tokens: bos_token, eos_token, ... as templates expect them.
        where: The place for error messages.

    Raises:
        DataError: A rendering takes more than MAX_SECONDS, MAX_MEMORY_BYTES or MAX_OUTPUT_CHARS.
    """
    if not can_grow(text):
        return
    state = json.dumps([CONTAINMENT_VERSION, text, sorted(special_tokens.items())])
    name = storage.digest_bytes(state.encode())[:32]
    path = storage.persea_home() / "families" / f"{name}.ends.json"
    if path.is_file():
        return
    if not _ends(text, special_tokens):
        raise DataError(
            f"the chat template does not end: a conversation of two turns takes more than "
            f"{MAX_SECONDS} s, {MAX_MEMORY_BYTES >> 30} GB or {MAX_OUTPUT_CHARS:,} characters",
            where=where,
            remedy="take the template from the model's own repository",
        )
    with suppress(StorageError):  # a cache that cannot be written costs time only
        storage.write_json(path, {"ends": True})


def can_grow(text: str) -> bool:
    """Return whether a template has parts whose time or memory its conversation does not bound."""
    try:
        parsed = parse_template(text)
    except (jinja2.TemplateError, RecursionError):
        return False  # it does not compile, and is refused for that
    macros = {m.name for m in parsed.find_all(nodes.Macro)}
    for node in parsed.find_all((nodes.Mul, nodes.Pow, nodes.Mod, nodes.Filter, nodes.Call)):
        if not isinstance(node, (nodes.Filter, nodes.Call)):
            return True
        if isinstance(node, nodes.Filter):
            if node.name in GROWING_FILTERS:
                return True
            continue
        called = node.node
        if isinstance(called, nodes.Name) and called.name in {"range", "lipsum"} | macros:
            return True
        if isinstance(called, nodes.Getattr) and called.attr in GROWING_METHODS:
            return True
    return any(loop.recursive for loop in parsed.find_all(nodes.For))


def _ends(text: str, special_tokens: dict[str, str]) -> bool:
    """Return whether the template ends in a child process with limits."""
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "persea.chat.template_containment"],
            input=json.dumps([text, special_tokens, MAX_SECONDS]),
            text=True,
            capture_output=True,
            timeout=10 * MAX_SECONDS,  # a loaded machine gives the child little time
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode == 0


def _probes() -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Yield (messages, template variables) of small conversations."""
    question = {"role": "user", "content": "2 + 3?"}
    answer = {"role": "assistant", "content": "5", "reasoning_content": "Two and three."}
    system = {"role": "system", "content": "Be brief."}
    tool = {"name": "clock", "description": "Time.", "parameters": {"type": "object"}}
    for messages in (
        [question],
        [question, answer],
        [system, question, answer, question, answer],
    ):
        yield messages, {}
        yield messages, {"enable_thinking": True}
    yield [question], {"tools": [{"type": "function", "function": tool}]}


def _main() -> None:
    """Render the probes with limits; the exit code says whether they end."""
    text, special_tokens, max_seconds = json.loads(sys.stdin.read())
    resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds))
    with suppress(ValueError, OSError):  # not every system limits the address space
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    from persea.chat.messages import PINNED_DATE

    template = compile_template(text, special_tokens, PINNED_DATE, "template")
    for messages, variables in _probes():
        for is_prompt in (True, False):
            try:
                rendered = template(messages, add_generation_prompt=is_prompt, **variables)
            except DataError as error:
                if "MemoryError" in error.message:
                    sys.exit(TOO_LONG_EXIT_CODE)
                continue
            if len(rendered) > MAX_OUTPUT_CHARS:
                sys.exit(TOO_LONG_EXIT_CODE)


if __name__ == "__main__":
    _main()
