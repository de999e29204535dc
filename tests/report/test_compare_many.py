"""Any number of runs is compared with the first: as a table, CSV, JSON and a page."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from persea.report.compare_many import CSV_COLUMNS, compare_many_runs
from tests.cli.test_cli import command
from tests.report.test_compare_runs import answered, lines
from tests.report.test_page import make_run, write

VALUES = ([1] * 20 + [0] * 20, [1] * 30 + [0] * 10, [0] * 40)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    runs = []
    for k, values in enumerate(VALUES):
        run = make_run(tmp_path / f"r{k}")
        lines(run, answered(run, {("code", "en"): list(map(float, values))}))
        text = (run / "recipe.yaml").read_text()
        write(run / "recipe.yaml", text.replace("steps: 600", f"steps: {600 + k}"))
        runs.append(run)
    return runs


def test_each_run_is_compared_with_the_first(three: list[Path]) -> None:
    found = compare_many_runs(three)
    outcomes = [c.differences[0].outcome for c in found.comparisons]
    assert outcomes == ["better", "worse"]
    assert found.recipe_values == {"training.steps": (600, 601, 602)}
    columns, rows = found.table()
    assert columns == ("skill", *map(str, three))
    assert rows == [
        ("code", "0.500", "0.750 (+0.250, better)", "0.000 (-0.500, worse)"),
    ]
    parsed = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert tuple(parsed[0]) == CSV_COLUMNS
    assert [(r["run"], r["score"], r["outcome"]) for r in parsed] == [
        (str(three[1]), "0.75", "better"),
        (str(three[2]), "0.0", "worse"),
    ]
    page = found.to_html()
    assert page.count('<th scope="col">') == 8 and "<script" not in page
    assert '<td class="worse">0.000' in page


def test_names_of_folders_cannot_break_the_page(three: list[Path]) -> None:
    odd = three[1].rename(three[1].with_name("<b>&"))
    page = compare_many_runs([three[0], odd]).to_html()
    assert "<b>&<" not in page and "&lt;b&gt;&amp;" in page


def test_the_command_prints_every_form(three: list[Path]) -> None:
    names = [run.name for run in three]
    folder = three[0].parent
    table = command("compare", *names, folder=folder)
    assert (table.code, table.err) == (0, "") and "training.steps: 600 | 601 | 602" in table.out
    told = command("compare", *names, "--format", "json", folder=folder)
    assert json.loads(told.out)["runs"] == names
    text = command("compare", *names[:2], "--format", "csv", folder=folder)
    assert text.out.splitlines()[1].startswith("r1,code,,none,0.75,40,r0,0.5,0.25,")
    alone = command("compare", names[0], folder=folder)
    assert alone.code == 2 and "nothing to be compared with" in alone.err
