"""Code: MBPP and HumanEval; a function is written, and run on the set's tests in the sandbox."""

from __future__ import annotations

import ast
import builtins
import re
import warnings

from persea.chat.messages import Message
from persea.tasks.benchmarks.readers import Asked, Published, Row, Source, every, item, json_lines, malformed, right, rows
from persea.tasks.sandbox.run_tests import Outcome, attempt
from persea.tasks.sandbox.sandbox import open_sandbox
from persea.tasks.task import Grade, Item

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def program(text: str, wanted: str) -> str:
    """The Python of an answer: the last fenced block that defines the wanted name, or the whole where none is fenced; "" for neither.

    Blocks before it are put in front where they are Python too: many answers define a helper first.
    """
    fenced = [body for language, body in FENCE.findall(text) if language.lower() in ("", "python", "py", "python3")]
    blocks = [b for b in fenced or [text] if _defined(b) is not None]
    last = max((k for k, b in enumerate(blocks) if wanted in (_defined(b) or ())), default=-1)
    return "\n\n".join(blocks[:last + 1])


def _defined(source: str) -> set[str] | None:
    """The names a program's top level defines; None for what is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an answer's own "\d"
            body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    found |= {t.id for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    return found | {(a.asname or a.name) for n in body if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}


def mbpp(source: Source) -> Asked:
    """A sentence, and tests of which the first is shown: it tells the function's name and form. All of them count."""
    def one(row: Row) -> Item:
        tests, setup = row.value("test_list", list), row.fields.get("test_setup_code") or ""
        if not tests or not all(isinstance(t, str) for t in tests) or not isinstance(setup, str):
            raise row.broken("`test_list` is empty or no list of texts")
        asked = row.text("text" if "text" in row.fields else "prompt")
        question = f"{asked}\nWrite it in Python, in one ```python block. It must pass this test:\n{tests[0]}"
        wanted = _called(tests[0], row)
        return item("mbpp", _named(row, "task_id"), "python", question, _fenced(row.text("code")), key="\0".join((wanted, setup, "\n".join(tests))))

    return every(map(one, rows(source, json_lines)), source)


def _called(test: str, row: Row) -> str:
    """The function that a test is about: the first it calls that is not Python's own; else the first, for answers may define a `sum`."""
    try:
        calls = [n.func.id for n in ast.walk(ast.parse(test)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    except (SyntaxError, ValueError) as error:
        raise row.broken(f"a test is no Python: {test[:60]!r}") from error
    if not calls:
        raise row.broken(f"a test calls no function: {test[:60]!r}")
    return next((c for c in calls if not hasattr(builtins, c)), calls[0])


def humaneval(source: Source) -> Asked:
    """The head of a function with its docstring; `check(candidate)` tests it."""
    def one(row: Row) -> Item:
        head, entry, tests = row.fields.get("prompt"), row.text("entry_point"), row.text("test")
        if not isinstance(head, str) or f"def {entry}" not in head:
            raise row.broken("`prompt` does not hold the function's head")
        question = f"Complete this Python function. Answer with the whole function in one ```python block.\n\n```python\n{head.strip()}\n```"
        solution = _fenced(head + str(row.value("canonical_solution", str)))
        # what the head defines beside the function is the tests' own, so that no answer redefines what it is judged by
        helpers = "\n".join(ast.unparse(n) for n in _body(head, row) if not (isinstance(n, ast.FunctionDef) and n.name == entry))
        key = "\0".join((entry, "", f"{helpers}\n{tests}\ncheck({entry})"))
        return item("humaneval", _named(row, "task_id"), "python", question, solution, key=key)

    return every(map(one, rows(source, json_lines)), source)


def _body(head: str, row: Row) -> list[ast.stmt]:
    try:
        return ast.parse(head).body
    except SyntaxError as error:
        raise row.broken(f"`prompt` is no Python: {error.msg}") from error


def _named(row: Row, key: str) -> Row:
    return Row(row.where, row.number, {**row.fields, "id": str(row.fields.get(key, row.number)).replace("/", "-")})


def _fenced(source: str) -> str:
    text = source.replace("\r\n", "\n").strip()
    return f"```python\n{text}\n```"


def grade_tests(item: Item, said: Message) -> Grade:
    """Right where every test holds. The tests run where the answer's code has no part (persea.tasks.sandbox.run_tests)."""
    wanted, setup, tests = item.key.split("\0")
    written = program(said.text, wanted)
    if not written:
        return malformed(f"no Python that defines {wanted}")
    found = attempt(open_sandbox(), f"{written}\n\n{setup}", tests, [wanted])
    if found.outcome is Outcome.BROKEN:
        raise RuntimeError(f"the tests of {item.prompt.id} came to no end: {found.why}")
    return right(found.outcome is Outcome.PASSED, f"{found.outcome}: {found.why}".rstrip(": "))


SETS = (
    Published("mbpp", "python", mbpp, grade_tests, runs=True),
    Published("humaneval", "python", humaneval, grade_tests, runs=True),
)
