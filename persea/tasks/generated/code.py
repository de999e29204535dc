"""One-line Python functions.

Graded by the values they compute, in an evaluator with a whitelist; no code is executed.

42,540 questions, 11,053 of them for training. References write sums and products in either
order, and a choice from either side.
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
from persea.tasks.generated.draw import draw_items
from persea.tasks.task import Split, Task, TaskItem, Verdict

NUMBER_PROBES = (*range(-2, 34), 60, 100)
LIST_PROBES = ([4], [3, 1, 2], [10, -5, 7, 7], [0, 0, 9], [42, 17, 99, -3, 8])
LIST_EXPRESSIONS = {
    "the sum of": "sum(x)",
    "the largest of": "max(x)",
    "the smallest of": "min(x)",
    "the length of": "len(x)",
    "the first of": "x[0]",
    "the last of": "x[-1]",
}
# Part of the saplings' pretraining text: weights of the question kinds, and shares of the ways to
# write an answer.
KIND_WEIGHTS = {"line": 0.3, "list": 0.4, "choice": 0.3}
SWAP_SHARE, TIMES_SHARE, DIRECT_CHOICE_SHARE = 0.3, 0.5, 0.7
FUNCTION_FORMS = (
    "def f(x):\n    return {}",
    "def f(x): return {}",
    "f = lambda x: {}",
    "def f(x):\n  return ({})",
)
PROGRAM_LEAD_INS = ("Here it is:\n", "Sure:\n", "Like this:\n", "Python:\n")
TRAILING_COMMENTS = ("\n# done", "\n# that is all", "\n# try f(3)")
# Shares of answers without text before the program and without a comment after it, as in
# answer_phrases.
NO_PROGRAM_LEAD_IN_SHARE, NO_TRAILING_COMMENT_SHARE = 0.6, 0.75
PROGRAM_START = re.compile(r"^(?:def f\(|f = lambda )", re.MULTILINE)


def _maybe_swap_operands(a: str, sign: str, b: str, rng: random.Random) -> str:
    """Write a sum or a product in either order."""
    return f"{b} {sign} {a}" if sign in "+*" and rng.random() < SWAP_SHARE else f"{a} {sign} {b}"


def make_item(item_seed: int) -> tuple[str, TaskItem]:
    """Make one item from a seed.

    `answer_key` is the bare expression, `reference` one way to write and present it.
    """
    rng = random.Random(f"code {item_seed}")
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    a, b = rng.randint(2, 20), rng.randint(1, 30)
    sign, verb = rng.choice((("+", "plus"), ("-", "minus")))
    if kind == "line":
        question, key, body = (
            f"x times {a} {verb} {b}",
            f"x * {a} {sign} {b}",
            _maybe_swap_operands(_maybe_swap_operands("x", "*", str(a), rng), sign, str(b), rng),
        )
    elif kind == "list":
        words = rng.choice(list(LIST_EXPRESSIONS))
        times = rng.random() < TIMES_SHARE
        question = f"{words} x times {a} {verb} {b}" if times else f"{words} x {verb} {b}"
        key = (
            f"{LIST_EXPRESSIONS[words]} * {a} {sign} {b}"
            if times
            else f"{LIST_EXPRESSIONS[words]} {sign} {b}"
        )
        body = _maybe_swap_operands(
            _maybe_swap_operands(LIST_EXPRESSIONS[words], "*", str(a), rng)
            if times
            else LIST_EXPRESSIONS[words],
            sign,
            str(b),
            rng,
        )
    else:
        c = rng.randint(1, 30)
        compare, word, not_ = rng.choice(((">", "greater", "<="), ("<", "less", ">=")))
        question, key = f"{a} if x is {word} than {b}, else {c}", f"{a} if x {compare} {b} else {c}"
        body = key if rng.random() < DIRECT_CHOICE_SHARE else f"{c} if x {not_} {b} else {a}"
    id_ = f"code/{kind}/{question}"
    before = "" if rng.random() < NO_PROGRAM_LEAD_IN_SHARE else rng.choice(PROGRAM_LEAD_INS)
    behind = "" if rng.random() < NO_TRAILING_COMMENT_SHARE else rng.choice(TRAILING_COMMENTS)
    reference = before + rng.choice(FUNCTION_FORMS).format(body) + behind
    return id_, TaskItem(
        Prompt(id_, Conversation.from_question(f"Write f(x): {question}"), "code", "python"),
        reference,
        answer_key=key,
    )


def items(split: Split, n: int, seed: int) -> tuple[TaskItem, ...]:
    """Return at most n different items of a split; the seed decides which."""
    return draw_items(make_item, split, n, seed)


def extract_program(text: str) -> str:
    """Return the program inside an answer, from the one line that begins it.

    Raises:
        DisallowedExpressionError: If the answer holds no program, or several.
    """
    begins = list(PROGRAM_START.finditer(text.strip()))
    if len(begins) != 1:
        raise DisallowedExpressionError(f"{len(begins)} programs")
    return text.strip()[begins[0].start() :]


def grade(item: TaskItem, answer: Message) -> Verdict:
    """Grade by values: RIGHT if the function equals the answer key on every probe.

    MALFORMED if the answer is no such function or leaves the whitelist. Without an answer key the
    function must equal the reference.
    """
    probes: Sequence[Any] = (
        LIST_PROBES if item.prompt.id.startswith("code/list/") else NUMBER_PROBES
    )
    try:
        given, wanted = (
            parse_function(extract_program(answer.text)),
            parse_function(
                f"f = lambda x: {item.answer_key}"
                if item.answer_key
                else extract_program(item.reference)
            ),
        )
        same = all(given(p) == wanted(p) for p in probes)
    except DisallowedExpressionError:
        return Verdict.MALFORMED
    return Verdict.RIGHT if same else Verdict.WRONG


class DisallowedExpressionError(Exception):
    """Raised if an answer is not a function of the whitelist, or computes a value out of bounds."""


MAX_ABS_VALUE = 10**12  # a larger value ends the evaluation: a hostile answer cannot fill memory
MAX_SOURCE_CHARS = 400
BINARY_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISON_OPERATORS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
ALLOWED_CALLS: Mapping[str, Callable[[Any], Any]] = {
    "sum": sum,
    "max": max,
    "min": min,
    "len": len,
    "abs": abs,
}


def parse_function(source: str) -> Callable[[Any], Any]:
    """Parse `def f(x): return EXPRESSION`, or the same as a lambda, into a Python function.

    The function evaluates the expression (`_evaluate`); no code is executed.

    Raises:
        DisallowedExpressionError: If the source is too long, no Python, or another kind of program.
    """
    if len(source) > MAX_SOURCE_CHARS:
        raise DisallowedExpressionError("too long")
    try:
        tree = ast.parse(source.strip() + "\n")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DisallowedExpressionError("not Python") from error
    match tree.body:
        case [
            ast.FunctionDef(
                name="f",
                decorator_list=[],
                body=[ast.Return(value=ast.expr() as expression)],
                args=ast.arguments(
                    posonlyargs=[],
                    args=[ast.arg(arg=name)],
                    vararg=None,
                    kwonlyargs=[],
                    kwarg=None,
                    defaults=[],
                ),
            )
        ]:
            return lambda x: _evaluate(expression, {name: x})
        case [
            ast.Assign(
                targets=[ast.Name(id="f")],
                value=ast.Lambda(
                    body=body,
                    args=ast.arguments(
                        posonlyargs=[],
                        args=[ast.arg(arg=name)],
                        vararg=None,
                        kwonlyargs=[],
                        kwarg=None,
                        defaults=[],
                    ),
                ),
            )
        ]:
            return lambda x: _evaluate(body, {name: x})
    raise DisallowedExpressionError("not `def f(x): return ...`")


def _evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Evaluate a whitelisted expression.

    Whole numbers, x, + - * // %, comparisons, if-else, five calls, indices.
    """
    try:
        value = _evaluate_node(node, names)
    except (TypeError, ZeroDivisionError, IndexError, ValueError, RecursionError) as error:
        raise DisallowedExpressionError(str(error)) from error
    if isinstance(value, int) and abs(value) > MAX_ABS_VALUE:
        raise DisallowedExpressionError("too large")
    return value


def _evaluate_node(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY_OPERATORS:
            a, b = _evaluate(left, names), _evaluate(right, names)
            if not (isinstance(a, int) and isinstance(b, int)):
                raise DisallowedExpressionError("arithmetic on something else than numbers")
            return BINARY_OPERATORS[type(op)](a, b)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if (
            type(op) in COMPARISON_OPERATORS
        ):
            return COMPARISON_OPERATORS[type(op)](_evaluate(left, names), _evaluate(right, names))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _evaluate(body if _evaluate(test, names) else orelse, names)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if (
            name in ALLOWED_CALLS
        ):
            return ALLOWED_CALLS[name](_evaluate(argument, names))
        case ast.Subscript(value=value, slice=index):
            return _evaluate(value, names)[_evaluate(index, names)]
    raise DisallowedExpressionError(type(node).__name__)


CODE_TASK = Task("code", ("python",), items, grade, 11_053)
