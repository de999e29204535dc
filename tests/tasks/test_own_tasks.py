"""Own tasks are read from rows of any shape, or from a Python file; a bad row is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persea.chat.messages import Message, Role, Text
from persea.config.schema import TaskSection
from persea.errors import DataError
from persea.tasks.benchmarks import LoadedBenchmark, benchmark_tasks
from persea.tasks.benchmarks.benchmark import GradingOptions
from persea.tasks.own_tasks import load_own_task, load_task_file, task_file_skill
from persea.tasks.task import Split

OPTIONS = GradingOptions()


def load(folder: Path, rows: list[Any], **keys: Any) -> LoadedBenchmark:
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = TaskSection(
        **{"skill": "support", "file": str(folder / "held.jsonl"), "metric": "contains", **keys}
    )
    return load_own_task(section, "support", OPTIONS)


def test_rows_of_several_shapes(tmp_path: Path) -> None:
    rows = [
        {"prompt": "One?", "reference": "1"},
        {"question": "Two?", "answer": 2},
        {"instruction": "Say three.", "output": "3"},
        {"messages": [{"role": "user", "content": "Four?"}], "expected": "4"},
        {"prompt": "Five?", "answer": "someone said six", "target": "5"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Six?"},
                {"role": "assistant", "content": "6"},
            ]
        },
    ]
    loaded = load(tmp_path, rows, instruction="One word.", language="en")
    assert [i.reference for i in loaded.items] == list("123456")
    assert loaded.items[0].prompt.conversation.messages[-1].text == "One?\n\nOne word."
    assert {i.prompt.language for i in loaded.items} == {"en"}


def test_columns_are_mapped(tmp_path: Path) -> None:
    columns = {"prompt": "query", "reference": "gold"}
    rows = [{"query": "Tide?", "gold": "high"}, {"query": "Wind?", "gold": "west"}]
    loaded = load(tmp_path, rows, columns=columns)
    assert [i.reference for i in loaded.items] == ["high", "west"]
    rows = [{**row, "context": f"Page {k}."} for k, row in enumerate(rows)]
    with pytest.raises(DataError, match="`context` changes what the row means"):
        load(tmp_path, rows, columns=columns)
    unread = load(tmp_path, rows, columns=columns | {"context": ""})
    assert [i.prompt.conversation.messages[0].text for i in unread.items] == ["Tide?", "Wind?"]


@pytest.mark.parametrize("wanted", ["Leith", "B", 1])
def test_choices(tmp_path: Path, wanted: Any) -> None:
    rows = [{"prompt": f"{k}?", "choices": ["Oban", "Leith"], "answer": wanted} for k in range(2)]
    loaded = load(tmp_path, rows, metric="choice")
    assert {(i.choices, i.reference) for i in loaded.items} == {(("Oban", "Leith"), "Leith")}


@pytest.mark.parametrize(
    ("row", "metric", "problem"),
    [
        ({"prompt": "x"}, "exact", "no reference"),
        ({"prompt": "x", "reference": "("}, "regex", "the reference is no pattern"),
        ({"prompt": "x", "reference": "{"}, "json", "the reference is not JSON"),
        ({"prompt": "x", "reference": "many"}, "numeric", "'many' is not a number"),
        ({"prompt": "x", "reference": "y"}, "choice", "`choices` is no list"),
        ({"prompt": "x"}, "tests", "`tests` is no text or list"),
        ({"prompt": "x", "tests": "assert 1 +"}, "tests", "a test is not Python"),
        (["x"], "exact", "a row is list, not an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, metric: str, problem: str) -> None:
    with pytest.raises(DataError, match=rf"held\.jsonl:1: .*{problem}"):
        load(tmp_path, [row], metric=metric)


def test_rows_that_repeat_are_counted_and_two_must_differ(tmp_path: Path) -> None:
    row, other = {"prompt": "x", "reference": "y"}, {"prompt": "z", "reference": "y"}
    assert load(tmp_path, [row, row, other]).left_out == {"asked twice": 1}
    with pytest.raises(DataError, match="1 different questions, and a task needs two"):
        load(tmp_path, [row, row])


@pytest.mark.parametrize("count", [2, 5, 60])
def test_audition_and_test_share_no_row_and_neither_is_empty(tmp_path: Path, count: int) -> None:
    rows = [{"prompt": f"question {k}", "reference": "y"} for k in range(count)]
    (task,) = benchmark_tasks([load(tmp_path, rows)])
    chosen, tested = ({i.prompt.id for i in task.items(s, 99, 0)} for s in Split if s in HELD_OUT)
    assert chosen
    assert tested
    assert not chosen & tested
    assert len(chosen | tested) == count


HELD_OUT = (Split.AUDITION, Split.TEST)


def test_a_python_file(tmp_path: Path) -> None:
    path = tmp_path / "style.py"
    path.write_text(
        'SKILL = "Brevity"\n'
        "def items():\n"
        "    for k in range(4):\n"
        "        yield {'prompt': f'{k}?', 'most': k}\n"
        "def grade(row, answer):\n"
        "    return len(answer) <= row['most'] or 0.5\n"
    )
    loaded = load_task_file(path, OPTIONS)
    assert (loaded.skill, task_file_skill(path), len(loaded.items)) == ("brevity", "brevity", 4)
    answer = Message(Role.ASSISTANT, (Text("ab"),))
    values = [loaded.benchmark.grade_answer(i, answer).value for i in loaded.items]
    assert values == [0.5, 0.5, 1, 1]
    before = [i.answer_key for i in loaded.items]
    path.write_text(path.read_text() + "# another\n")
    assert [i.answer_key for i in load_task_file(path, OPTIONS).items] != before


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def items():\n    return []\n", r"defines no grade\(\)"),
        ("1 / 0\n", "does not run: ZeroDivisionError"),
        (
            "def items():\n    return [{}['prompt']]\ndef grade(row, answer):\n    return 1\n",
            "does not run: KeyError: 'prompt'",
        ),
        ("def items(:\n", "does not run: SyntaxError"),
    ],
)
def test_a_bad_python_file(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(DataError, match=problem):
        load_task_file(tmp_path / "bad.py", OPTIONS)
    with pytest.raises(DataError, match="no such file"):
        load_task_file(tmp_path / "gone.py", OPTIONS)
