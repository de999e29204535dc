"""Run a program and its tests in two processes that exchange plain values. Standard library only:
this file is sent as text.

Each process runs in a sandbox of its own; a socket joins them. The program never sees the tests: it
can patch `assert`, walk frames, kill or leave its process, but it cannot pass a test that it fails.
The value of a call comes back as plain data (no object with an own __eq__) and is compared in the
process of the tests.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

MAX_MESSAGE_BYTES = 4 << 20  # of one message
MAX_ITERATOR_ITEMS = 100_000  # that are taken from a generator
MAX_VALUE_DEPTH = 60  # of nested containers
SCALAR_DECODERS: dict[Any, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
    "bytes": bytes.fromhex,
}
CONTAINER_DECODERS: dict[Any, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "iterator": iter,
}
PROGRAM_ENDED_MESSAGE = "the program ended before it returned a value"


class ExchangeError(Exception):
    """Raised for a message that is no plain value or too large, and for an exception of the program
    that tests cannot raise.
    """


def encode_value(value: Any, encode_other: Callable[[Any], Any], depth: int = 0) -> Any:
    """Encode a value as JSON. Instances of subclasses of plain types become plain.

    Args:
        value: Any value.
        encode_other: Encodes a value of no plain type, or raises.
        depth: Current depth of nesting.

    Returns:
        A JSON value.

    Raises:
        ExchangeError: If the value is nested too deep or holds too many items.
    """
    if depth > MAX_VALUE_DEPTH:
        raise ExchangeError(f"nested more than {MAX_VALUE_DEPTH} deep")

    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return ["int", hex(int.__index__(value))]
        case float():
            return ["float", float.hex(float.__float__(value))]
        case complex():
            return ["complex", float.hex(value.real), float.hex(value.imag)]
        case bytes() | bytearray():
            return ["bytes", bytes(value).hex()]
    encoded = _encode_container(value, lambda v: encode_value(v, encode_other, depth + 1))
    return encode_other(value) if encoded is None else encoded


def _encode_container(value: Any, encode: Callable[[Any], Any]) -> list[Any] | None:
    """Encode a container by the methods of its plain type; None for any other value."""
    match value:
        case list() | tuple() | set() | frozenset():
            kind: Any = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
            return [kind.__name__, *map(encode, kind.__iter__(value))]
        case dict():
            return ["dict", *([encode(k), encode(v)] for k, v in dict.items(value))]
        case Iterator() | range():
            items = list(islice(iter(value), MAX_ITERATOR_ITEMS + 1))
            if len(items) > MAX_ITERATOR_ITEMS:
                raise ExchangeError(f"more than {MAX_ITERATOR_ITEMS} items")
            return ["iterator", *map(encode, items)]
    return None


def decode_value(value: Any, decode_other: Callable[[list[Any]], Any]) -> Any:
    """Decode a value of `encode_value`.

    Args:
        value: A JSON value.
        decode_other: Decodes a list whose tag is of no plain type, or raises.

    Returns:
        The value.

    Raises:
        ExchangeError: If the JSON is not of that form.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if not isinstance(value, list) or not value:
        raise ExchangeError("not a value")

    tag, *parts = value
    try:
        if tag == "dict":
            return {decode_value(k, decode_other): decode_value(v, decode_other) for k, v in parts}
        if tag in CONTAINER_DECODERS:
            return CONTAINER_DECODERS[tag]([decode_value(v, decode_other) for v in parts])
        if tag in SCALAR_DECODERS and all(isinstance(p, str) for p in parts):
            return SCALAR_DECODERS[tag](*parts)
    except (ValueError, TypeError, OverflowError) as error:
        raise ExchangeError(f"not a value: {error}") from error
    return decode_other(value)


def send_message(channel: socket.socket, value: object) -> None:
    """Send a JSON value, preceded by its length in four bytes.

    Raises:
        ExchangeError: If the value is too large, or the other side is gone.
    """
    data = json.dumps(value).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ExchangeError(f"a value of more than {MAX_MESSAGE_BYTES} bytes")
    try:
        channel.sendall(len(data).to_bytes(4, "big") + data)
    except OSError as error:
        raise ExchangeError(PROGRAM_ENDED_MESSAGE) from error


def receive_message(channel: socket.socket) -> Any:
    """Receive the next JSON value.

    Raises:
        ExchangeError: If the other side is gone, or sends no message or too large a one.
    """
    data = b""
    size = 4
    while len(data) < size:
        try:
            more = channel.recv(min(1 << 16, size - len(data)))
        except OSError as error:
            raise ExchangeError(PROGRAM_ENDED_MESSAGE) from error
        if not more:
            raise ExchangeError(PROGRAM_ENDED_MESSAGE)
        data += more
        if size == 4 and len(data) == 4:
            size += int.from_bytes(data, "big")
            if size > MAX_MESSAGE_BYTES + 4:
                raise ExchangeError(f"a value of more than {MAX_MESSAGE_BYTES} bytes")
    try:
        return json.loads(data[4:])
    except (ValueError, RecursionError) as error:
        raise ExchangeError("not a message") from error


# --- the process of the program ---


def serve_program(channel_fd: int, source: str) -> None:
    """Run the program, then serve calls of its functions until the tests end.

    Args:
        channel_fd: Descriptor of the socket to the tests.
        source: The program.
    """
    channel = socket.socket(fileno=channel_fd)
    names: dict[str, Any] = {"__name__": "program"}
    objects: list[Any] = []  # values that are not plain; the tests hold their index

    def encode_handle(value: Any) -> Any:
        objects.append(value)
        return ["handle", len(objects) - 1]

    def decode_handle_or_name(value: list[Any]) -> Any:
        if value[0] == "handle":
            return objects[value[1]]
        return names[value[1]] if value[1] in names else getattr(builtins, value[1])

    exec(compile(source, "<answer>", "exec"), names)
    while True:
        request = receive_message(channel)
        try:
            if request["name"] not in names:
                raise NameError(f"name {request['name']!r} is not defined")
            arguments = [decode_value(a, decode_handle_or_name) for a in request["args"]]
            value = names[request["name"]](
                *arguments,
                **{k: decode_value(v, decode_handle_or_name) for k, v in request["kwargs"].items()},
            )
            reply = {"value": encode_value(value, encode_handle)}
        except Exception as error:
            reply = {"error": [type(error).__name__, str(error)[:200]]}
        send_message(channel, reply)


# --- the process of the tests ---


class ProgramFunction:
    """A function of the program: the tests can call it and pass it back to the program."""

    def __init__(
        self,
        name: str,
        call_program: Callable[[str, Sequence[Any], Mapping[str, Any]], Any],
    ) -> None:
        self.name, self.call_program = name, call_program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function in the process of the program."""
        return self.call_program(self.name, args, kwargs)


class RemoteObject:
    """A value in the process of the program: the tests can only pass it back. It equals nothing but
    itself.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle


def free_names(tests: str) -> set[str]:
    """Return the names that the tests use and do not define."""
    nodes = list(ast.walk(ast.parse(tests)))
    defined = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    defined |= {
        n.name
        for n in nodes
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    defined |= {n.arg for n in nodes if isinstance(n, ast.arg)} | {
        n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name
    }
    defined |= {
        (a.asname or a.name).partition(".")[0]
        for n in nodes
        if isinstance(n, ast.Import | ast.ImportFrom)
        for a in n.names
    }
    return {n.id for n in nodes if isinstance(n, ast.Name)} - defined - set(dir(builtins))


def used_stdlib_modules(tests: str) -> set[str]:
    """Return the standard library modules that the tests use without an import.

    The tests get the real modules, and not objects of the program with these names.
    """
    nodes = list(ast.walk(ast.parse(tests)))
    used = {
        n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    return used & sys.stdlib_module_names & free_names(tests)


def _encode_reference(value: Any) -> Any:
    """Encode a value of no plain type that the tests pass to the program."""
    if isinstance(value, ProgramFunction):
        return ["name", value.name]
    if isinstance(value, RemoteObject):
        return ["handle", value.handle]
    name = str(getattr(value, "__name__", ""))
    if isinstance(value, type) and getattr(builtins, name, None) is value:
        return ["name", name]
    raise ExchangeError(f"a {type(value).__name__} cannot be passed to the program")


def _decode_handle(value: list[Any]) -> Any:
    """Decode a value that stays in the process of the program."""
    if value[0] != "handle" or not isinstance(value[1], int):
        raise ExchangeError("not a value")
    return RemoteObject(value[1])


def _program_error(kind: str, text: str) -> Exception:
    """Return the exception that the tests see: a builtin one, or else an ExchangeError.

    A StopIteration would end a map() of the tests early, as if all tests had passed.
    """
    error_type = getattr(builtins, kind, None)
    if (
        isinstance(error_type, type)
        and issubclass(error_type, Exception)
        and not issubclass(error_type, StopIteration | StopAsyncIteration)
    ):
        return error_type(text)
    return ExchangeError(f"{kind}: {text}")


def execute_tests(
    channel_fd: int, verdict_fd: int, nonce: str, tests: str, names: Sequence[str]
) -> None:
    """Run the tests and write [nonce, outcome, reason] to the verdict pipe.

    Args:
        channel_fd: Descriptor of the socket to the program.
        verdict_fd: Descriptor of the verdict pipe.
        nonce: Secret that proves that this process wrote the verdict.
        tests: Source of the tests.
        names: Functions of the program, besides the free names of the tests.
    """
    channel = socket.socket(fileno=channel_fd)

    def call_program(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        send_message(
            channel,
            {
                "name": name,
                "args": [encode_value(a, _encode_reference) for a in args],
                "kwargs": {k: encode_value(v, _encode_reference) for k, v in kwargs.items()},
            },
        )
        match receive_message(channel):
            case {"error": [str(kind), str(text)]}:
                raise _program_error(kind, text)
            case {"value": value}:
                return decode_value(value, _decode_handle)
        raise ExchangeError("not a message")

    try:
        functions = {
            name: ProgramFunction(name, call_program) for name in {*names, *free_names(tests)}
        }
        modules = {
            name: importlib.import_module(name) for name in used_stdlib_modules(tests) - set(names)
        }
        exec(compile(tests, "<tests>", "exec"), {"__name__": "tests"} | functions | modules)
    except AssertionError as error:
        outcome, reason = "wrong", str(error)
    except Exception as error:
        outcome, reason = "raised", f"{type(error).__name__}: {error}"
    else:
        outcome, reason = "passed", ""
    os.write(verdict_fd, json.dumps([nonce, outcome, reason[:300]]).encode())
