"""Code: write a one-line Python function. Graded by what it computes, in a whitelisting evaluator; nothing is executed.

About 60,000 questions; sums and products may be written either way round, a choice from either side.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from persea.chat.messages import Conversation, Message
from persea.data.prompts import Prompt
from persea.tasks.task import Item, Skill, Split, Verdict, draw

PROBES_OF_NUMBER = (*range(-2, 34), 60, 100)
PROBES_OF_LIST = ([4], [3, 1, 2], [10, -5, 7, 7], [0, 0, 9], [42, 17, 99, -3, 8])
OF_LIST = {"the sum of": "sum(x)", "the largest of": "max(x)", "the smallest of": "min(x)", "the length of": "len(x)",
           "the first of": "x[0]", "the last of": "x[-1]"}


KINDS = {"line": 0.3, "list": 0.4, "choice": 0.3}
FORMS = ("def f(x):\n    return {}", "def f(x): return {}", "f = lambda x: {}", "def f(x):\n  return ({})")
BEFORE = ("Here it is:\n", "Sure:\n", "Like this:\n", "Python:\n")
BEHIND = ("\n# done", "\n# that is all", "\n# try f(3)")
PLAIN, OPEN = 0.6, 0.75  # as in frames: share of answers without words before, and behind
CODE_BEGINS = re.compile(r"^(?:def f\(|f = lambda )", re.MULTILINE)


def _both(a: str, sign: str, b: str, rng: random.Random) -> str:
    """A sum or a product either way round."""
    return f"{b} {sign} {a}" if sign in "+*" and rng.random() < 0.3 else f"{a} {sign} {b}"


def make(number: int) -> tuple[str, Item]:
    """One item from a number. `key` is the bare expression, `reference` one way to write and to present it."""
    rng = random.Random(f"code {number}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    a, b = rng.randint(2, 20), rng.randint(1, 30)
    sign, verb = rng.choice((("+", "plus"), ("-", "minus")))
    if kind == "line":
        question, key, body = f"x times {a} {verb} {b}", f"x * {a} {sign} {b}", _both(_both("x", "*", str(a), rng), sign, str(b), rng)
    elif kind == "list":
        words = rng.choice(list(OF_LIST))
        times = rng.random() < 0.5
        question = f"{words} x times {a} {verb} {b}" if times else f"{words} x {verb} {b}"
        key = f"{OF_LIST[words]} * {a} {sign} {b}" if times else f"{OF_LIST[words]} {sign} {b}"
        body = _both(_both(OF_LIST[words], "*", str(a), rng) if times else OF_LIST[words], sign, str(b), rng)
    else:
        c = rng.randint(1, 30)
        compare, word, not_ = rng.choice(((">", "greater", "<="), ("<", "less", ">=")))
        question, key = f"{a} if x is {word} than {b}, else {c}", f"{a} if x {compare} {b} else {c}"
        body = key if rng.random() < 0.7 else f"{c} if x {not_} {b} else {a}"
    id_ = f"code/{kind}/{question}"
    before = "" if rng.random() < PLAIN else rng.choice(BEFORE)
    behind = "" if rng.random() < OPEN else rng.choice(BEHIND)
    said = before + rng.choice(FORMS).format(body) + behind
    return id_, Item(Prompt(id_, Conversation.ask(f"Write f(x): {question}"), "code", "python"), said, key=key)


def items(split: Split, n: int, seed: int) -> tuple[Item, ...]:
    return draw(make, split, n, seed)


def program(text: str) -> str:
    """The program inside an answer: from the one line that begins it, words before it and comments behind it aside."""
    begins = list(CODE_BEGINS.finditer(text.strip()))
    if len(begins) != 1:
        raise NotAllowed(f"{len(begins)} programs")
    return text.strip()[begins[0].start():]


def grade(item: Item, said: Message) -> Verdict:
    """Same values as the expression, or without a key as the reference, on every probe; MALFORMED where it is no such function or
    leaves the whitelist.
    """
    probes: Sequence[Any] = PROBES_OF_LIST if item.prompt.id.startswith("code/list/") else PROBES_OF_NUMBER
    try:
        given, wanted = function(program(said.text)), function(f"f = lambda x: {item.key}" if item.key else program(item.reference))
        same = all(given(p) == wanted(p) for p in probes)
    except NotAllowed:
        return Verdict.MALFORMED
    return Verdict.RIGHT if same else Verdict.WRONG


class NotAllowed(Exception):
    """The answer is not a function of the whitelist, or computes something out of bounds."""


LIMIT = 10**12  # a value past it ends the evaluation: a hostile answer cannot fill memory
BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt, ast.Lt: operator.lt, ast.GtE: operator.ge, ast.LtE: operator.le, ast.Eq: operator.eq, ast.NotEq: operator.ne}
CALLS: Mapping[str, Callable[[Any], Any]] = {"sum": sum, "max": max, "min": min, "len": len, "abs": abs}


def function(source: str) -> Callable[[Any], Any]:
    """`def f(x): return EXPRESSION`, or the same as a lambda -> a function that walks the expression. Raises NotAllowed."""
    if len(source) > 400:
        raise NotAllowed("too long")
    try:
        tree = ast.parse(source.strip() + "\n")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotAllowed("not Python") from error
    match tree.body:
        case [ast.FunctionDef(
                name="f", decorator_list=[], body=[ast.Return(value=ast.expr() as expression)],
                args=ast.arguments(posonlyargs=[], args=[ast.arg(arg=name)], vararg=None, kwonlyargs=[], kwarg=None, defaults=[]))]:
            return lambda x: _value(expression, {name: x})
        case [ast.Assign(targets=[ast.Name(id="f")], value=ast.Lambda(
                body=body, args=ast.arguments(posonlyargs=[], args=[ast.arg(arg=name)], vararg=None, kwonlyargs=[], kwarg=None, defaults=[])))]:
            return lambda x: _value(body, {name: x})
    raise NotAllowed("not `def f(x): return ...`")


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of a whitelisted expression: whole numbers, x, + - * // %, comparisons, if-else, five calls, indices."""
    try:
        value = _step(node, names)
    except (TypeError, ZeroDivisionError, IndexError, ValueError, RecursionError) as error:
        raise NotAllowed(str(error)) from error
    if isinstance(value, int) and abs(value) > LIMIT:
        raise NotAllowed("too large")
    return value


def _step(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            a, b = _value(left, names), _value(right, names)
            if not (isinstance(a, int) and isinstance(b, int)):
                raise NotAllowed("arithmetic on something else than numbers")
            return BINARY[type(op)](a, b)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARE:
            return COMPARE[type(op)](_value(left, names), _value(right, names))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in CALLS:
            return CALLS[name](_value(argument, names))
        case ast.Subscript(value=value, slice=index):
            return _value(value, names)[_value(index, names)]
    raise NotAllowed(type(node).__name__)


CODE = Skill("code", ("python",), items, grade)
