"""Code: MBPP and HumanEval; a function is written, and run on the set's tests in the sandbox."""

from __future__ import annotations

import ast
import builtins
import re
import warnings

from persea.chat.messages import Message
from persea.tasks.benchmarks.readers import (
    Benchmark,
    BenchmarkItems,
    BenchmarkRow,
    BenchmarkSource,
    benchmark_item,
    binary_grade,
    collect_items,
    malformed_grade,
    read_benchmark_rows,
    read_json_lines,
)
from persea.tasks.sandbox.run_tests import ProgramOutcome, run_tests
from persea.tasks.sandbox.sandbox import open_sandbox
from persea.tasks.task import Grade, TaskItem

FENCED_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)


def extract_python(text: str, function_name: str) -> str:
    """The Python of an answer: the last fenced block that defines the wanted name, or the whole where none is fenced; "" for neither.

    Blocks before it are put in front where they are Python too: many answers define a helper first.
    """
    fenced = [
        body
        for language, body in FENCED_BLOCK.findall(text)
        if language.lower() in ("", "python", "py", "python3")
    ]
    blocks = [b for b in fenced or [text] if _top_level_names(b) is not None]
    last = max(
        (k for k, b in enumerate(blocks) if function_name in (_top_level_names(b) or ())),
        default=-1,
    )
    return "\n\n".join(blocks[: last + 1])


def _top_level_names(source: str) -> set[str] | None:
    """The names a program's top level defines; None for what is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an answer's own "\d"
            body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = {
        n.name for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    found |= {
        t.id
        for n in body
        if isinstance(n, ast.Assign)
        for t in n.targets
        if isinstance(t, ast.Name)
    }
    return found | {
        (a.asname or a.name)
        for n in body
        if isinstance(n, ast.Import | ast.ImportFrom)
        for a in n.names
    }


def mbpp(source: BenchmarkSource) -> BenchmarkItems:
    """A sentence, and tests of which the first is shown: it tells the function's name and form. All of them count."""

    def one(row: BenchmarkRow) -> TaskItem:
        tests, setup = row.value("test_list", list), row.fields.get("test_setup_code") or ""
        if not tests or not all(isinstance(t, str) for t in tests) or not isinstance(setup, str):
            raise row.data_error("`test_list` is empty or no list of texts")
        asked = row.text("text" if "text" in row.fields else "prompt")
        question = f"{asked}\nWrite it in Python, in one ```python block. It must pass this test:\n{tests[0]}"
        wanted = _tested_function(tests[0], row)
        return benchmark_item(
            "mbpp",
            _with_row_id(row, "task_id"),
            "python",
            question,
            _as_code_block(row.text("code")),
            answer_key="\0".join((wanted, setup, "\n".join(tests))),
        )

    return collect_items(map(one, read_benchmark_rows(source, read_json_lines)), source)


def _tested_function(test: str, row: BenchmarkRow) -> str:
    """The function that a test is about: the first it calls that is not Python's own; else the first, for answers may define a `sum`."""
    try:
        calls = [
            n.func.id
            for n in ast.walk(ast.parse(test))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
    except (SyntaxError, ValueError) as error:
        raise row.data_error(f"a test is no Python: {test[:60]!r}") from error
    if not calls:
        raise row.data_error(f"a test calls no function: {test[:60]!r}")
    return next((c for c in calls if not hasattr(builtins, c)), calls[0])


def humaneval(source: BenchmarkSource) -> BenchmarkItems:
    """The head of a function with its docstring; `check(candidate)` tests it."""

    def one(row: BenchmarkRow) -> TaskItem:
        head, entry, tests = row.fields.get("prompt"), row.text("entry_point"), row.text("test")
        if not isinstance(head, str) or f"def {entry}" not in head:
            raise row.data_error("`prompt` does not hold the function's head")
        question = f"Complete this Python function. Answer with the whole function in one ```python block.\n\n```python\n{head.strip()}\n```"
        solution = _as_code_block(head + str(row.value("canonical_solution", str)))
        # what the head defines beside the function is the tests' own, so that no answer redefines what it is judged by
        helpers = "\n".join(
            ast.unparse(n)
            for n in _parse_prompt(head, row)
            if not (isinstance(n, ast.FunctionDef) and n.name == entry)
        )
        key = "\0".join((entry, "", f"{helpers}\n{tests}\ncheck({entry})"))
        return benchmark_item(
            "humaneval", _with_row_id(row, "task_id"), "python", question, solution, answer_key=key
        )

    return collect_items(map(one, read_benchmark_rows(source, read_json_lines)), source)


def _parse_prompt(head: str, row: BenchmarkRow) -> list[ast.stmt]:
    try:
        return ast.parse(head).body
    except SyntaxError as error:
        raise row.data_error(f"`prompt` is no Python: {error.msg}") from error


def _with_row_id(row: BenchmarkRow, key: str) -> BenchmarkRow:
    return BenchmarkRow(
        row.location,
        row.index,
        {**row.fields, "id": str(row.fields.get(key, row.index)).replace("/", "-")},
    )


def _as_code_block(source: str) -> str:
    text = source.replace("\r\n", "\n").strip()
    return f"```python\n{text}\n```"


def grade_tests(item: TaskItem, answer: Message) -> Grade:
    """Right where every test holds. The tests run where the answer's code has no part (persea.tasks.sandbox.run_tests)."""
    wanted, setup, tests = item.answer_key.split("\0")
    written = extract_python(answer.text, wanted)
    if not written:
        return malformed_grade(f"no Python that defines {wanted}")
    found = run_tests(open_sandbox(), f"{written}\n\n{setup}", tests, [wanted])
    if found.outcome is ProgramOutcome.NO_VERDICT:
        raise RuntimeError(f"the tests of {item.prompt.id} came to no end: {found.reason}")
    return binary_grade(
        found.outcome is ProgramOutcome.PASSED, f"{found.outcome}: {found.reason}".rstrip(": ")
    )


BENCHMARKS = (
    Benchmark("mbpp", "python", mbpp, grade_tests, runs_code=True),
    Benchmark("humaneval", "python", humaneval, grade_tests, runs_code=True),
)
