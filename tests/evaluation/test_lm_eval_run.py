"""lm-eval runs a task file with local data on a model; unknown tasks are refused at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persea.errors import DataError, MissingRequirementError
from persea.evaluation.lm_eval_results import read_lm_eval_results
from persea.evaluation.lm_eval_run import refuse_unknown_tasks, run_lm_eval
from tests.cli.test_cli import SAPLINGS

TASK = """\
task: tiny_sums
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (persea[lm-eval])")
    rows = [{"question": f"{k} + 1 =", "choices": [" 1", " 2"], "answer": k % 2} for k in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_sums.yaml").write_text(TASK % data)
    return tmp_path / "tasks"


def test_an_own_task_file_runs(tasks: Path, tmp_path: Path) -> None:
    refuse_unknown_tasks(["tiny_sums"], str(tasks))
    found = run_lm_eval(str(SAPLINGS / "llama-sapling"), ["tiny_sums"], str(tasks), limit=3)
    (tmp_path / "student.json").write_text(json.dumps(found))
    (result,) = read_lm_eval_results("student", tmp_path / "student.json")
    assert (result.task, result.metric, result.n) == ("tiny_sums", "acc", 3)
    assert 0 <= result.value <= 1
    assert result.stderr is not None


def test_an_unknown_task_is_refused(tasks: Path) -> None:
    with pytest.raises(DataError, match="lm-eval has no task tiny_product ->"):
        refuse_unknown_tasks(["tiny_sums", "tiny_product"], str(tasks))


def test_lm_eval_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingRequirementError, match=r"pip install 'persea\[lm-eval\]'"):
        refuse_unknown_tasks(["gsm8k"], "")
