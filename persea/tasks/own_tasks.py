"""Own tasks: rows with a prompt and a reference, or a Python file with questions and a grader.

A task is loaded as a benchmark is, so that audition, evaluation and page treat both alike. A hash
of question and reference assigns a quarter of the rows to the audition and the rest to the test.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import runpy
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from persea.chat.messages import Conversation, Message, Role, Text
from persea.config.schema import TaskSection
from persea.data.prompts import Prompt
from persea.data.rows import parse_row
from persea.data.tables import TableRow, iter_hub_table, iter_table
from persea.errors import DataError
from persea.tasks.benchmarks import LoadedBenchmark
from persea.tasks.benchmarks.benchmark import (
    Benchmark,
    BenchmarkItems,
    BenchmarkSource,
    Grader,
    GradingOptions,
    binary_grade,
    require_module,
)
from persea.tasks.benchmarks.code import tested_function
from persea.tasks.metrics import METRICS_BY_NAME, AskJudge, judge_grader, with_options
from persea.tasks.sandbox.sandbox import open_sandbox
from persea.tasks.task import Grade, TaskItem

# columns that a metric reads besides the prompt and the reference
REFERENCE_KEYS = ("reference", "references", "expected", "target", "gold")
REMEDY = (
    'a row is {"prompt": "...", "reference": "..."}; other names are mapped with `columns: '
    "{prompt: query, reference: gold}` (docs/howto/own_tasks.md)"
)


def load_own_task(
    section: TaskSection,
    name: str,
    options: GradingOptions,
    ask_judge: AskJudge | None = None,
) -> LoadedBenchmark:
    """Read a task of a recipe.

    Args:
        section: The task.
        name: Name of the task, unique in the recipe; it begins the ids of its questions.
        options: Limits of the graders.
        ask_judge: Prompt -> the judge's reply, for `metric: judge`.

    Raises:
        DataError: A file is broken, or a row lacks what the metric needs; with file and line.
        MissingRequirementError: A package or the sandbox is missing.
    """
    if section.metric == "judge":
        assert ask_judge is not None  # the recipe names a judge
        grade = judge_grader(ask_judge, section.rubric)
    else:
        metric = METRICS_BY_NAME[section.metric]
        for module in metric.required_modules:
            require_module(module, "eval", f"the metric {metric.name}")
        if metric.runs_code:
            open_sandbox(options.sandbox)
        grade = with_options(metric, options)
    file = section.file or ""
    rows: Iterable[TableRow] = ()
    if section.hub is not None:
        hub = section.hub
        file = f"hub:{hub.name}"
        rows = iter_hub_table(
            hub.name, hub.split, hub.config, hub.revision, streaming=hub.streaming
        )
    else:
        rows = iter_table(Path(file))
    return _loaded(
        name,
        section.skill,
        file,
        section.language,
        grade,
        options,
        _items(rows, section, name, file),
    )


def task_file_skill(path: Path) -> str:
    """Return the skill of a task file, without running it: SKILL, or the file's name."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError):
        return path.stem.lower()  # loading the file names the problem
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            if "SKILL" in names:
                return str(node.value.value).lower()
    return path.stem.lower()


def load_task_file(path: Path, options: GradingOptions) -> LoadedBenchmark:
    """Load a task from a Python file of the user's own, which runs in this process.

    The file defines `items()`, which yields rows as dictionaries with "prompt" and, if the grader
    wants one, "reference"; and `grade(row, answer)`, which returns True, False or a number in
    [0, 1]. `SKILL` names the skill; without it, the file's name does.

    Args:
        path: The file.
        options: Limits of the graders.

    Raises:
        DataError: The file does not exist or does not run, or lacks one of the two functions.
    """
    if not path.is_file():
        raise DataError("no such file", where=str(path), remedy="name a Python file after --tasks")
    try:
        module = runpy.run_path(str(path))
        missing = [name for name in ("items", "grade") if not callable(module.get(name))]
        rows = [] if missing else list(module["items"]())
    except Exception as error:
        raise DataError(
            f"does not run: {type(error).__name__}: {error}",
            where=str(path),
            remedy="correct the file; python FILE shows the line",
        ) from error
    if missing:
        raise DataError(
            f"defines no {missing[0]}()",
            where=str(path),
            remedy="define items() and grade(row, answer) (docs/howto/own_tasks.md)",
        )
    grade_row = module["grade"]
    skill = task_file_skill(path)
    source_digest = hashlib.sha256(path.read_bytes()).hexdigest()
    by_key = {json.dumps([k, source_digest]): row for k, row in enumerate(rows)}
    section = TaskSection(skill=skill, file=str(path), metric="exact")
    items: list[TaskItem] = []
    for key, row in by_key.items():
        where = f"{path}, row {json.loads(key)[0] + 1} of items()"
        item = _item(TableRow(where, where, row), section, skill, needs_reference=False)
        items.append(replace(item, answer_key=key))

    def grade(item: TaskItem, answer: Message) -> Grade:
        row = by_key.get(item.answer_key, {"prompt": item.prompt.id, "reference": item.reference})
        value = float(grade_row(row, answer.text))
        return replace(binary_grade(value >= 1), value=value)

    return _loaded(skill, skill, str(path), "", grade, options, items)


def _loaded(
    name: str,
    skill: str,
    file: str,
    language: str,
    grade: Grader,
    options: GradingOptions,
    items: Sequence[TaskItem],
) -> LoadedBenchmark:
    """Return the task with questions that differ; the first of two equal ones stays."""
    by_id: dict[str, TaskItem] = {}
    for item in items:
        by_id.setdefault(item.prompt.id, item)
    if len(by_id) < 2:
        raise DataError(
            f"{len(by_id)} different questions, and a task needs two: one chooses teachers, "
            "one tests",
            where=file,
            remedy="give a file with more rows",
        )
    left_out = Counter({"asked twice": len(items) - len(by_id)})
    kept = tuple(by_id.values())
    source = BenchmarkSource(file, language=language)
    benchmark = Benchmark(
        name, language, lambda _: BenchmarkItems(kept, {}), grade, options=options
    )
    return LoadedBenchmark(benchmark, source, skill, kept, dict(+left_out))


def _items(rows: Iterable[TableRow], section: TaskSection, name: str, file: str) -> list[TaskItem]:
    items = []
    for row in rows:
        if row.error:
            raise DataError(row.error, where=row.where, remedy="correct or delete the row")
        items.append(_item(row, section, name, needs_reference=section.metric != "judge"))
    if not items:
        raise DataError("no question: the file is empty", where=file, remedy=REMEDY)
    return items


def _item(row: TableRow, section: TaskSection, name: str, *, needs_reference: bool) -> TaskItem:
    """Return the question of a row."""
    if not isinstance(row.value, Mapping):
        raise DataError(
            f"a row is {type(row.value).__name__}, not an object", where=row.where, remedy=REMEDY
        )
    values = {str(k): v for k, v in row.value.items() if v is not None}
    for key, column in section.columns.items():
        if not column:  # the row's own column of that name is left unread
            values.pop(key, None)
            continue
        if column not in values:
            raise DataError(f"no column `{column}`", where=row.where, remedy=REMEDY)
        if key != column:
            values[key] = values.pop(column)
    choices, tests = values.pop("choices", None), values.pop("tests", None)
    key = next((k for k in REFERENCE_KEYS if k in values), "")
    reference = values.pop(key) if key else None
    if reference is not None:  # an answer beside it is somebody's, not the right one
        values = {k: v for k, v in values.items() if k not in ("answer", "response", "output")}
    elif isinstance(values.get("answer"), (int, float, bool)):
        reference = values.pop("answer")
    parsed = parse_row(values, row.where)
    conversation, given = parsed.turns(last_only=True)[0]
    text = "".join(part.text for part in given if isinstance(part, Text))
    text = text if reference is None else _as_text(reference)
    if section.metric == "choice":
        choices, text = _choices(choices, text, row.where)
    answer_key = ""
    if section.metric == "tests":
        answer_key, needs_reference = _tests(tests, row.where), False
    if needs_reference and not text.strip():
        raise DataError("no reference", where=row.where, remedy=REMEDY)
    _refuse_unusable_reference(section.metric, text, row.where)
    if section.instruction:
        conversation = _with_instruction(conversation, section.instruction)
    content = json.dumps([conversation.to_json(), text, list(choices or ())], sort_keys=True)
    language = str(values.get("language", section.language))
    digest = hashlib.sha256(content.encode(errors="replace")).hexdigest()[:16]
    prompt = Prompt(f"{name}/{language}/{digest}", conversation, section.skill, language)
    return TaskItem(
        prompt,
        unicodedata.normalize("NFC", text),
        choices=tuple(choices or ()) if section.metric == "choice" else (),
        answer_key=answer_key,
    )


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _choices(choices: Any, reference: str, where: str) -> tuple[tuple[str, ...], str]:
    """Return the choices of a row and the right one, given as text, letter or position."""
    if isinstance(choices, Mapping):  # {"text": [...], "label": [...]}, as ARC has it
        labels, choices = list(map(str, choices.get("label", ()))), choices.get("text")
    else:
        labels = []
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError("`choices` is no list of two or more texts", where=where, remedy=REMEDY)
    texts = tuple(unicodedata.normalize("NFC", str(c)) for c in choices)
    labels = labels or [chr(ord("A") + k) for k in range(len(texts))]
    wanted = unicodedata.normalize("NFC", reference.strip())
    if wanted in texts:
        return texts, wanted
    if wanted.upper() in labels:
        return texts, texts[labels.index(wanted.upper())]
    if wanted.isdecimal() and int(wanted) < len(texts):
        return texts, texts[int(wanted)]
    raise DataError(
        f"the reference {wanted[:40]!r} is none of the choices",
        where=where,
        remedy="give the text of the right choice, its letter, or its position from 0",
    )


def _tests(tests: Any, where: str) -> str:
    """Return the answer key of a code question: the function, no setup, and the asserts."""
    lines = [tests] if isinstance(tests, str) else tests
    if not isinstance(lines, list) or not lines or not all(isinstance(t, str) for t in lines):
        raise DataError(
            "`tests` is no text or list of Python asserts",
            where=where,
            remedy='for example "tests": ["assert double(2) == 4"]',
        )
    source = "\n".join(lines)
    return "\0".join((tested_function(source, where), "", source))


def _refuse_unusable_reference(metric: str, text: str, where: str) -> None:
    """Check that a metric can compare with a reference.

    Raises:
        DataError: It cannot.
    """
    problem = ""
    if metric == "regex":
        try:
            re.compile(text)
        except re.error as error:
            problem = f"the reference is no pattern: {error}"
    elif metric == "json":
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"the reference is not JSON: {error}"
    elif metric == "numeric":
        from persea.tasks.benchmarks.number_parsing import possible_values
        from persea.tasks.benchmarks.reasoning import extract_final_answer

        if not possible_values(extract_final_answer(text) or text, "en"):
            problem = f"the reference {text[:40]!r} is not a number"
    if problem:
        raise DataError(problem, where=where, remedy="correct or delete the row")


def _with_instruction(conversation: Conversation, instruction: str) -> Conversation:
    *before, last = conversation.messages
    if last.role is not Role.USER:
        return conversation
    asked = replace(last, parts=(*last.parts, Text(f"\n\n{instruction}")))
    return replace(conversation, messages=(*before, asked))
