"""Code benchmarks: MBPP and HumanEval. The answer's function runs on the benchmark's tests in the
sandbox.
"""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from functools import partial

from persea.chat.messages import Message
from persea.errors import DataError
from persea.tasks.benchmarks.benchmark import (
    Benchmark,
    BenchmarkItems,
    BenchmarkSource,
    Grader,
    GradingOptions,
    binary_grade,
    malformed_grade,
)
from persea.tasks.benchmarks.readers import (
    BenchmarkRow,
    benchmark_item,
    collect_items,
    read_benchmark_rows,
    read_json_lines,
)
from persea.tasks.sandbox.run_tests import ProgramOutcome, run_tests
from persea.tasks.sandbox.sandbox import SandboxLimits, open_sandbox
from persea.tasks.task import Grade, TaskItem

FENCED_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)


def extract_python(text: str, function_name: str) -> str:
    """Return the Python code of an answer.

    The last fenced block that defines the function, after the Python blocks that precede it: many
    answers define a helper first. The whole text, if it has no fence.

    Args:
        text: The answer.
        function_name: The function that the code must define.

    Returns:
        The code; "" if no block defines the function.
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
    """Return the names that a program defines at top level; None if the text is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an answer may hold "\d"
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
    """Load task descriptions with tests. The question shows the first test, which gives the
    function's name; all tests count.
    """

    def one(row: BenchmarkRow) -> TaskItem:
        tests, setup = row.value("test_list", list), row.fields.get("test_setup_code") or ""
        if not tests or not all(isinstance(t, str) for t in tests) or not isinstance(setup, str):
            raise row.data_error("`test_list` is empty or not a list of texts")
        description = row.text("text" if "text" in row.fields else "prompt")
        question = (
            f"{description}\nWrite it in Python, in one ```python block. "
            f"It must pass this test:\n{tests[0]}"
        )
        function_name = tested_function(tests[0], row.location)
        return benchmark_item(
            "mbpp",
            _with_row_id(row, "task_id"),
            "python",
            question,
            _as_code_block(row.text("code")),
            answer_key="\0".join((function_name, setup, "\n".join(tests))),
        )

    return collect_items(map(one, read_benchmark_rows(source, read_json_lines)), source)


def tested_function(test: str, where: str) -> str:
    """Return the tested function: the first call that is no builtin, or else the first call, as an
    answer may define `sum`.

    Args:
        test: Python asserts.
        where: Their place, for error messages.

    Raises:
        DataError: They are not Python, or call no function.
    """
    remedy = "correct or delete the row"
    try:
        calls = [
            n.func.id
            for n in ast.walk(ast.parse(test))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
    except (SyntaxError, ValueError) as error:
        raise DataError(f"a test is not Python: {test[:60]!r}", where=where, remedy=remedy) from (
            error
        )
    if not calls:
        raise DataError(f"a test calls no function: {test[:60]!r}", where=where, remedy=remedy)
    return next((c for c in calls if not hasattr(builtins, c)), calls[0])


def humaneval(source: BenchmarkSource) -> BenchmarkItems:
    """Load function signatures with docstrings; `check(candidate)` tests the completed function."""

    def one(row: BenchmarkRow) -> TaskItem:
        head, entry, tests = row.fields.get("prompt"), row.text("entry_point"), row.text("test")
        if not isinstance(head, str) or f"def {entry}" not in head:
            raise row.data_error("`prompt` does not hold the function's signature")
        question = (
            "Complete this Python function. Answer with the whole function in one ```python block."
            f"\n\n```python\n{head.strip()}\n```"
        )
        solution = _as_code_block(head + str(row.value("canonical_solution", str)))
        # Helpers of the prompt belong to the tests, so that no answer redefines a function that
        # judges it.
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
        raise row.data_error(f"`prompt` is not Python: {error.msg}") from error


def _with_row_id(row: BenchmarkRow, key: str) -> BenchmarkRow:
    return BenchmarkRow(
        row.location,
        row.index,
        {**row.fields, "id": str(row.fields.get(key, row.index)).replace("/", "-")},
    )


def _as_code_block(source: str) -> str:
    text = source.replace("\r\n", "\n").strip()
    return f"```python\n{text}\n```"


def grade_tests(item: TaskItem, answer: Message, limits: SandboxLimits | None = None) -> Grade:
    """Grade by tests: right if all pass. The answer's code cannot reach the tests
    (persea.tasks.sandbox.run_tests).

    Args:
        item: The question; its answer key holds function name, setup code and tests.
        answer: The model's answer.
        limits: Limits of the sandbox; the defaults if None.

    Returns:
        The grade.

    Raises:
        RuntimeError: If the tests ended without a verdict, which is no fault of the answer.
        MissingRequirementError: If this machine has no sandbox (exit 7).
    """
    function_name, setup, tests = item.answer_key.split("\0")
    code = extract_python(answer.text, function_name)
    if not code:
        return malformed_grade(f"no Python that defines {function_name}")
    sandbox = open_sandbox(limits or SandboxLimits())
    result = run_tests(sandbox, f"{code}\n\n{setup}", tests, [function_name])
    if result.outcome is ProgramOutcome.NO_VERDICT:
        raise RuntimeError(f"the tests of {item.prompt.id} gave no verdict: {result.reason}")
    return binary_grade(
        result.outcome is ProgramOutcome.PASSED, f"{result.outcome}: {result.reason}".rstrip(": ")
    )


def _tests_grader(options: GradingOptions) -> Grader:
    return partial(grade_tests, limits=options.sandbox)


BENCHMARKS = (
    Benchmark("mbpp", "python", mbpp, grade_tests, runs_code=True, make_grader=_tests_grader),
    Benchmark(
        "humaneval", "python", humaneval, grade_tests, runs_code=True, make_grader=_tests_grader
    ),
)
