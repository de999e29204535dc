"""`persea runs` lists run folders with states, scores, and where the recipes differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persea.errors import DataError
from persea.pipeline.run_list import list_runs, table
from tests.cli.test_cli import command
from tests.report.test_page import make_run, write


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for k in range(2):
        run = make_run(tmp_path / "runs" / "sweep" / f"lr{k}")
        text = (run / "recipe.yaml").read_text()
        write(run / "recipe.yaml", text.replace("steps: 600", f"steps: {600 + k}"))
        write(run / "lock", "")
        status = {"state": "done", "stage": "report", "fraction_done": 1.0, "updated_at": 7.0}
        write(run / "status.json", json.dumps(status))
    return tmp_path


def test_runs_are_found_below_a_folder_and_told_apart(sweep: Path) -> None:
    runs = list_runs([sweep / "runs"])
    assert [Path(r.folder).name for r in runs] == ["lr0", "lr1"]
    assert [r.differs for r in runs] == [{"training.steps": 600}, {"training.steps": 601}]
    assert runs[0].state == "done" and runs[0].updated_at == 7.0
    written = json.loads((sweep / "runs/sweep/lr0/evaluate/evaluation.json").read_text())
    of_student = [
        s
        for s in written["scores"]
        if s["model_name"] == written["student"] and not s["language"] and s["effort"] == "none"
    ]
    assert runs[0].scores == {s["skill"]: s["value"] for s in of_student} != {}
    columns, rows = table(runs)
    assert columns[:2] == ("run", "state") and columns[-1] == "differs in"
    assert rows[1][-1] == "training.steps=601"


def test_a_run_without_results_and_a_broken_one_are_listed_too(sweep: Path) -> None:
    (sweep / "runs/sweep/lr0/evaluate/evaluation.json").unlink()
    write(sweep / "runs/sweep/lr1/status.json", "[]")
    first, second = list_runs([sweep / "runs"])
    assert first.scores == {} and second.state.startswith("broken: not a status file")


def test_bits_per_byte_of_held_out_texts_are_listed(sweep: Path) -> None:
    run = sweep / "runs" / "sweep" / "lr0"
    groups = [
        {"skill": "news", "language": language, "bits_per_byte": {"student": {"value": value}}}
        for language, value in (("id", 1.5), ("", 1.25))
    ]
    write(run / "evaluate" / "texts.json", json.dumps({"student": "student", "groups": groups}))
    assert list_runs([run])[0].bits_per_byte == {"news": 1.25}


def test_the_command(sweep: Path) -> None:
    told = command("runs", folder=sweep)
    assert told.code == 0 and "runs/sweep/lr1" in told.out
    assert len(json.loads(command("runs", "runs/sweep", "--json", folder=sweep).out)) == 2
    for arguments, words in ((("nope",), "no such folder"), (("empty",), "no run folder in it")):
        (sweep / "empty").mkdir(exist_ok=True)
        refused = command("runs", *arguments, folder=sweep)
        assert refused.code == 3 and words in refused.err
    with pytest.raises(DataError):
        list_runs([sweep / "empty"])
