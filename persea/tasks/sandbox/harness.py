"""Tests on one side, the tested program on the other: they exchange plain values and nothing else. Standard library only.

Runs inside two sandboxes, joined by a socket. The program never sees the tests, so it can patch `assert`, walk frames, kill its process
or leave it: what it cannot do is pass. A call's value comes back as plain data (no object with an __eq__ of its own), and is compared where
the program has no hand in it.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

MAX_MESSAGE_BYTES = 4 << 20  # bytes of one value on its way
MAX_ITERATOR_ITEMS = 100_000  # taken of a generator
MAX_VALUE_DEPTH = 60  # of nesting
PROGRAM_ENDED_MESSAGE = "the program ended before it answered"


class ExchangeError(Exception):
    """What came over the wire is no plain value, or too much of it; or what the program raised."""


def encode_value(value: Any, encode_other: Callable[[Any], Any], depth: int = 0) -> Any:
    """A value as JSON. Subclasses of plain types become plain; `strange` packs everything else."""
    if depth > MAX_VALUE_DEPTH:
        raise ExchangeError(f"nested more than {MAX_VALUE_DEPTH} deep")

    def each(values: Iterable[Any]) -> list[Any]:
        return [encode_value(v, encode_other, depth + 1) for v in values]

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
        case list() | tuple() | set() | frozenset():
            kind: Any = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
            return [kind.__name__, *each(kind.__iter__(value))]
        case dict():
            return [
                "dict",
                *(
                    [
                        encode_value(k, encode_other, depth + 1),
                        encode_value(v, encode_other, depth + 1),
                    ]
                    for k, v in dict.items(value)
                ),
            ]
        case Iterator() | range():
            some = list(islice(iter(value), MAX_ITERATOR_ITEMS + 1))
            if len(some) > MAX_ITERATOR_ITEMS:
                raise ExchangeError(f"more than {MAX_ITERATOR_ITEMS} items")
            return ["iterator", *each(some)]
    return encode_other(value)


def decode_value(value: Any, decode_other: Callable[[list[Any]], Any]) -> Any:
    """The value that was packed; `strange` takes what is no plain value. Raises Strange for what nobody packs so."""
    if value is None or isinstance(value, bool | str):
        return value
    if not isinstance(value, list) or not value:
        raise ExchangeError("not a value")

    def each() -> Iterator[Any]:
        return (decode_value(v, decode_other) for v in value[1:])

    try:
        match value:
            case ["int", str(text)]:
                return int(text, 16)
            case ["float", str(text)]:
                return float.fromhex(text)
            case ["complex", str(real), str(imaginary)]:
                return complex(float.fromhex(real), float.fromhex(imaginary))
            case ["bytes", str(text)]:
                return bytes.fromhex(text)
            case ["list", *_]:
                return list(each())
            case ["tuple", *_]:
                return tuple(each())
            case ["set", *_]:
                return set(each())
            case ["frozenset", *_]:
                return frozenset(each())
            case ["iterator", *_]:
                return iter(list(each()))
            case ["dict", *pairs]:
                return {
                    decode_value(k, decode_other): decode_value(v, decode_other) for k, v in pairs
                }
    except (ValueError, TypeError, OverflowError) as error:
        raise ExchangeError(f"not a value: {error}") from error
    return decode_other(value)


def send_message(channel: socket.socket, value: object) -> None:
    data = json.dumps(value).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ExchangeError(f"a value of more than {MAX_MESSAGE_BYTES} bytes")
    try:
        channel.sendall(len(data).to_bytes(4, "big") + data)
    except OSError as error:
        raise ExchangeError(PROGRAM_ENDED_MESSAGE) from error


def receive_message(channel: socket.socket) -> Any:
    """The next message. Raises Strange where the other side is gone or sends no message."""
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


# --- the program's side ---


def serve_program(channel_fd: int, source: str) -> None:
    """Run the program, then make the calls that are asked for until nobody asks."""
    channel = socket.socket(fileno=channel_fd)
    names: dict[str, Any] = {"__name__": "program"}
    kept: list[Any] = []

    def keep(value: Any) -> Any:
        kept.append(value)
        return ["kept", len(kept) - 1]

    def known(value: list[Any]) -> Any:
        if value[0] == "kept":
            return kept[value[1]]
        return names[value[1]] if value[1] in names else getattr(builtins, value[1])

    exec(compile(source, "<answer>", "exec"), names)
    while True:
        asked = receive_message(channel)
        try:
            if asked["name"] not in names:
                raise NameError(f"name {asked['name']!r} is not defined")
            arguments = [decode_value(a, known) for a in asked["args"]]
            value = names[asked["name"]](
                *arguments, **{k: decode_value(v, known) for k, v in asked["kwargs"].items()}
            )
            reply = {"value": encode_value(value, keep)}
        except Exception as error:
            reply = {"error": [type(error).__name__, str(error)[:200]]}
        send_message(channel, reply)


# --- the tests' side ---


class ProgramFunction:
    """A name of the program's: it can be called, and handed back to the program."""

    def __init__(
        self, name: str, ask: Callable[[str, Sequence[Any], Mapping[str, Any]], Any]
    ) -> None:
        self.name, self.ask = name, ask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.ask(self.name, args, kwargs)


class RemoteObject:
    """A value that stayed with the program: it can only be handed back. It equals nothing but itself."""

    def __init__(self, number: int) -> None:
        self.number = number


def free_names(tests: str) -> set[str]:
    """The names that tests read and do not define."""
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
    """The modules of the standard library that tests use without importing them: theirs, not what a program may call so."""
    nodes = list(ast.walk(ast.parse(tests)))
    used = {
        n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    return used & sys.stdlib_module_names & free_names(tests)


def execute_tests(
    channel_fd: int, verdict_fd: int, nonce: str, tests: str, names: Sequence[str]
) -> None:
    """Run the tests, their free names and `names` answered by the program; write the nonce and how it ended to `verdict`."""
    channel = socket.socket(fileno=channel_fd)

    def mine(value: Any) -> Any:
        if isinstance(value, ProgramFunction):
            return ["name", value.name]
        if isinstance(value, RemoteObject):
            return ["kept", value.number]
        name = str(getattr(value, "__name__", ""))
        if isinstance(value, type) and getattr(builtins, name, None) is value:
            return ["name", name]
        raise ExchangeError(f"a {type(value).__name__} cannot be handed over")

    def theirs(value: list[Any]) -> Any:
        if value[0] != "kept" or not isinstance(value[1], int):
            raise ExchangeError("not a value")
        return RemoteObject(value[1])

    def ask(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        send_message(
            channel,
            {
                "name": name,
                "args": [encode_value(a, mine) for a in args],
                "kwargs": {k: encode_value(v, mine) for k, v in kwargs.items()},
            },
        )
        match receive_message(channel):
            case {"error": [str(kind), str(text)]}:
                known = getattr(builtins, kind, None)
                # a StopIteration of the program's would end a map() of the tests' early, as if all had held
                if not (isinstance(known, type) and issubclass(known, Exception)) or issubclass(
                    known, StopIteration | StopAsyncIteration
                ):
                    raise ExchangeError(f"{kind}: {text}")
                raise known(text)
            case {"value": value}:
                return decode_value(value, theirs)
        raise ExchangeError("not a message")

    try:
        theirs_alone = {name: ProgramFunction(name, ask) for name in {*names, *free_names(tests)}}
        ours = {
            name: importlib.import_module(name) for name in used_stdlib_modules(tests) - set(names)
        }
        exec(compile(tests, "<tests>", "exec"), {"__name__": "tests"} | theirs_alone | ours)
    except AssertionError as error:
        outcome, why = "wrong", str(error)
    except Exception as error:
        outcome, why = "raised", f"{type(error).__name__}: {error}"
    else:
        outcome, why = "passed", ""
    os.write(verdict_fd, json.dumps([nonce, outcome, why[:300]]).encode())
