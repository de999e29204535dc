"""Tool-call benchmarks: BFCL. Calls are compared argument by argument; or no tool fits, and no call
is right.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from persea.chat.messages import Message, Role, Text, Tool, ToolCall, canonical_json
from persea.errors import DataError
from persea.tasks.benchmarks.benchmark import (
    Benchmark,
    BenchmarkItems,
    BenchmarkSource,
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
from persea.tasks.task import Grade, TaskItem

# BFCL's type names -> those of JSON schema; the others are equal.
BFCL_TO_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": ""}
NO_FUNCTION = "no function"  # why a row is left out
# Two text arguments are equal if they differ only in these characters, in case and in the kind of
# quotation mark: the rule of bfcl-eval 2026.3.23, with which `bench/graders.py` compares.
IGNORED_CHARACTERS = re.compile(r"[ ,./\-_*^]")


def to_json_schema(value: Any) -> Any:
    """Convert BFCL's types to those of JSON schema."""
    if isinstance(value, list):
        return [to_json_schema(v) for v in value]
    if not isinstance(value, dict):
        return value
    out = {k: to_json_schema(v) for k, v in value.items() if k != "type" or not isinstance(v, str)}
    if isinstance(kind := value.get("type"), str) and (
        json_type := BFCL_TO_JSON_TYPES.get(kind, kind)
    ):
        return {"type": json_type, **out}
    return out


def _parse_tool(row: BenchmarkRow, function: Any) -> Tool:
    try:
        return Tool(
            function["name"],
            function["description"],
            canonical_json(json.dumps(to_json_schema(function["parameters"]))),
        )
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise row.data_error(f"a `function` is not a tool: {error}") from error


def _question_and_tools(row: BenchmarkRow) -> tuple[tuple[Message, ...], str, tuple[Tool, ...]]:
    """Return the messages before the question of a row, the question, and its tools.

    BFCL's live categories have rows with a system text or with earlier answers before the question.
    """
    turns, functions = row.value("question", list), row.value("function", list)
    if len(turns) > 1:
        raise row.data_error(
            f"`question` has {len(turns)} turns: BFCL's multi_turn categories run simulated tools, "
            "which bfcl-eval alone has"
        )
    try:
        (messages,) = turns
        given = [(Role(m["role"]), unicodedata.normalize("NFC", m["content"])) for m in messages]
        last_role, text = given[-1]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise row.data_error("`question` is not one turn of messages with texts") from error
    if last_role is not Role.USER:
        raise row.data_error("`question` does not end with the user's message")
    if not text.strip():
        raise row.data_error("no question")
    before = tuple(Message(role, (Text(said),)) for role, said in given[:-1])
    return before, text, tuple(_parse_tool(row, f) for f in functions)


def bfcl(source: BenchmarkSource) -> BenchmarkItems:
    """Load questions with their calls; `answers` is the file of possible answers.

    Raises:
        DataError: If there is no file of possible answers, or a row is broken.
    """
    if not source.answers:
        raise DataError(
            "no file of possible answers",
            where=source.file,
            remedy="add `answers:`, BFCL's possible_answer/ file of the same name",
        )
    possible = {row.text("id"): row for row in read_json_lines(source.answers)}

    def one(row: BenchmarkRow) -> TaskItem | str:
        before, text, tools = _question_and_tools(row)
        if not tools:
            return NO_FUNCTION
        if row.text("id") not in possible:
            raise row.data_error(f"no possible answer for {row.text('id')} in {source.answers}")
        answer = possible[row.text("id")]
        truth = answer.value("ground_truth", list)
        try:
            required = {tool.name: _required_arguments(tool) for tool in tools}
            calls = tuple(
                ToolCall(name, _first_possible_arguments(arguments, required.get(name, ())))
                for call in truth
                for name, arguments in call.items()
            )
        except IndexError:
            return "an argument has no possible value"
        except (DataError, ValueError, TypeError, AttributeError) as error:
            raise answer.data_error(f"`ground_truth` is not a list of calls: {error}") from error
        names = {t.name for t in tools}
        if not calls or any(c.name not in names for c in calls):
            raise answer.data_error(
                "`ground_truth` holds no call, or one of a tool that the question does not declare"
            )
        return benchmark_item(
            "bfcl",
            row,
            "en",
            text,
            before=before,
            answer_key=json.dumps(truth),
            tools=tools,
            calls=calls,
        )

    return collect_items(map(one, read_benchmark_rows(source, read_json_lines)), source)


def _required_arguments(tool: Tool) -> Sequence[str]:
    required = json.loads(tool.parameters).get("required", ())
    return required if isinstance(required, list) else ()


def _first_possible_arguments(arguments: Mapping[str, Any], required: Sequence[str]) -> str:
    """Return the first possible value of each argument that may not be missing.

    Raises:
        IndexError: If an argument has no possible value.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v[0]) if isinstance(v, list) else plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else value

    chosen = {
        k: plain(next((v for v in values if v != ""), values[0]))
        for k, values in arguments.items()
        if "" not in values or (k in required and any(v != "" for v in values))
    }
    return canonical_json(json.dumps(chosen))


def grade_calls(item: TaskItem, answer: Message) -> Grade:
    """Grade by calls: the same functions in any order, each argument one of its possible values;
    optional ones may be missing.
    """
    truth = json.loads(item.answer_key)
    if not answer.calls:
        return malformed_grade("no call")
    if len(answer.calls) != len(truth):
        return binary_grade(False, f"{len(answer.calls)} calls instead of {len(truth)}")
    schemas = {t.name: json.loads(t.parameters) for t in item.prompt.conversation.tools}
    left = list(answer.calls)
    for wanted in truth:
        ((name, possible),) = wanted.items()
        reasons = [_call_difference(call, name, possible, schemas.get(name, {})) for call in left]
        if "" not in reasons:
            # the reason of the call of that function, if there is one
            named = [r for r in reasons if not r.startswith("calls ")]
            return binary_grade(False, (named or reasons)[0])
        del left[reasons.index("")]
    return binary_grade(True)


def _call_difference(
    call: ToolCall, name: str, possible: Mapping[str, Any], schema: Mapping[str, Any]
) -> str:
    """Return why a call is not the wanted one; "" if it is."""
    # some chat templates allow no dots in names
    if call.name not in (name, name.replace(".", "_")):
        return f"calls {call.name} instead of {name}"
    given = json.loads(call.arguments)
    if unknown := given.keys() - possible.keys():
        return f"unknown argument {sorted(unknown)[0]}"
    required = schema.get("required") or ()
    properties = schema.get("properties") or {}
    for key, values in possible.items():
        if key not in given:
            if "" not in values or key in required:
                return f"{key} is missing"
        elif _is_float_for_integer(given[key], values, properties.get(key)) or not any(
            _values_match(given[key], v) for v in values
        ):
            return f"{key} is {json.dumps(given[key], ensure_ascii=False)[:60]}"
    return ""


def _is_float_for_integer(given: Any, values: Sequence[Any], schema: Any) -> bool:
    """Whether an argument that is declared as integer is given as a float, such as 5.0."""
    if not isinstance(schema, dict):
        return False
    if isinstance(given, list) and schema.get("type") == "array":
        wanted = [one for value in values if isinstance(value, list) for one in value]
        return any(_is_float_for_integer(one, wanted, schema.get("items")) for one in given)
    return (
        schema.get("type") == "integer"
        and isinstance(given, float)
        and not any(isinstance(v, float) for v in values)
    )


def _values_match(given: Any, wanted: Any) -> bool:
    """Compare values: numbers by value, texts without case and punctuation, lists in order, objects
    key by key.
    """
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(given, int | float) and isinstance(wanted, int | float):
        return given == wanted
    if isinstance(given, str) and isinstance(wanted, str):
        return _normalize_string(given) == _normalize_string(wanted)
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_values_match, given, wanted))
    if isinstance(given, dict) and isinstance(wanted, dict):
        options = {k: v if isinstance(v, list) else [v] for k, v in wanted.items()}
        return given.keys() <= options.keys() and all(
            any(_values_match(given[k], v) for v in some) if k in given else "" in some
            for k, some in options.items()
        )
    return given is None and wanted is None


def _normalize_string(text: str) -> str:
    return IGNORED_CHARACTERS.sub("", text).lower().replace("'", '"')


# --- no tool fits ---


def bfcl_irrelevance(source: BenchmarkSource) -> BenchmarkItems:
    """Load questions whose tools do not help."""

    def one(row: BenchmarkRow) -> TaskItem | str:
        before, text, tools = _question_and_tools(row)
        if not tools:
            return NO_FUNCTION
        return benchmark_item("bfcl-irrelevance", row, "en", text, before=before, tools=tools)

    return collect_items(map(one, read_benchmark_rows(source, read_json_lines)), source)


def grade_no_call(item: TaskItem, answer: Message) -> Grade:
    """Grade: text without a call. A call written as JSON or as name(...) in the text counts as a
    call.
    """
    if answer.calls:
        return binary_grade(False, f"calls {answer.calls[0].name}")
    text = answer.text.strip()
    if not text:
        return malformed_grade("empty answer")
    for tool in item.prompt.conversation.tools:
        if _written_call(tool.name).search(text):
            return binary_grade(False, f"writes a call of {tool.name}")
    return binary_grade(True)


def _written_call(name: str) -> re.Pattern[str]:
    """Match `"name": "area"`, `area(radius=3)` at the start of a line, or a line that is `area(3)`
    alone.
    """
    tool = re.escape(name)
    return re.compile(
        rf"\"name\"\s*:\s*\"{tool}\"|^\W*{tool}\s*\([^)]*=|^\W*{tool}\([^\n]*\)\W*$", re.MULTILINE
    )


BENCHMARKS = (
    Benchmark("bfcl", "en", bfcl, grade_calls, grader_version=2),
    Benchmark("bfcl-irrelevance", "en", bfcl_irrelevance, grade_no_call),
)
