"""What a person sees: whole names and numbers at 80 columns, a few lines where there is no
terminal, a bar where there is one.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest

from persea.pipeline.progress import (
    TOKEN_SHARES,
    print_check,
    print_report,
    print_table,
    progress_bars,
)


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": 8}


REPORT: dict[str, Any] = {
    "skills": {
        "languages": {
            "student": score(0.5),
            "base": score(0.25),
            "teachers": {"qwen-sapling": score(1.0), "gemma-sapling": score(0.125)},
            "best_teacher": "qwen-sapling",
            "retained": 0.5,
        },
        "code": {
            "student": score(0.0),
            "base": score(0.0),
            "teachers": {"qwen-sapling": score(0.0), "gemma-sapling": score(0.0)},
            "best_teacher": "qwen-sapling",
            "retained": None,
        },
    },
    "bits_per_byte": {
        who: {"all": 0.5 + k}
        for k, who in enumerate(("student", "base", "qwen-sapling", "gemma-sapling"))
    },
}


def test_the_comparison_shows_everybody_on_every_skill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_report(REPORT)
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["skill", "student", "base", "qwen-sapling", "gemma-sapling", "retained"]
    assert ["languages", "0.50", "0.25", "1.00*", "0.12", "50%"] in rows
    assert ["0.40-0.60", "0.15-0.35", "0.90-1.00", "0.02-0.23"] in rows
    assert ["code", "0.00", "0.00", "0.00", "0.00", "-"] in rows  # nobody is best at nothing
    assert ["bits/byte", "0.50", "1.50", "2.50", "3.50"] in rows
    assert "n = 8 " in out


def test_no_name_is_cut_where_the_window_is_narrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"a-teacher-with-a-long-name-{k}" for k in range(4)]
    skill = REPORT["skills"]["languages"] | {
        "teachers": {n: score(0.5) for n in names},
        "best_teacher": names[0],
    }
    print_report(
        {
            "skills": {"languages": skill},
            "bits_per_byte": {n: {"all": 1.0} for n in ("student", "base", *names)},
        }
    )
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert sum(out.count(str(k)) for k in range(4)) >= 4
    assert len(re.findall(r"0\.50\b", out)) >= 5


def test_a_table_is_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(("stage", "work"), [("check", "3 pairs"), ("train", "8 steps")])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "stage",
        "check",
        "train",
    ]


def test_without_a_terminal_a_stage_tells_its_tenths(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as tell:
        for k in range(1001):
            tell("train", k / 1000, f"step {k}")
        tell("report", 1.0, "up to date")
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""  # stdout is for the result
    assert lines[0] == "    train   0% step 0"
    assert lines[-2:] == ["    train 100% step 1000", "   report 100% up to date"]
    assert len(lines) == 12
    assert lines[4] == "    train  40% step 400"


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars(quiet=True) as tell:
        tell("train", 0.5, "half")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_a_stage() -> None:
    code = (
        "from persea.pipeline.progress import progress_bars\nwith progress_bars() as tell:\n"
        "    tell('check', 1.0, 'up to date')\n    tell('train', 0.5, 'loss 1.5')"
    )
    mine, childs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=childs,
        stdout=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(childs)
    shown = b""
    while True:
        try:
            block = os.read(mine, 4096)
        except OSError:  # the other side is closed
            break
        shown += block
        if not block:
            break
    assert done.communicate()[0] == b""
    assert done.returncode == 0
    os.close(mine)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"check .*100%.*up to date", last)
    assert re.search(r"train .*50%.*loss 1\.5", last)
    assert "━" in last


def test_a_narrow_terminal_wraps_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interval that is cut in two, or loses its end, would be another number."""
    monkeypatch.setenv("COLUMNS", "60")
    columns = ("skill", "effort", "score", "thinking tokens", "thinking language")
    print_table(columns, [("reasoning", "high", "0.94 (0.89-0.96)", "20.1", "200 undetermined")])
    words = capsys.readouterr().out.split()
    assert {"0.94", "(0.89-0.96)", "20.1", "200", "undetermined"} <= set(words)


def test_the_table_of_check_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    pair = dict.fromkeys((*TOKEN_SHARES.values(), "one_to_one_share"), 1.0) | {
        "teacher": "qwen",
        "skill": "languages",
        "language": "id",
        "tokens": 150,
        "event_disagreement": 0.028,
        "space_event_share": 0.01,
        "mean_event_bytes": 3.7,
        "mean_token_bytes": 3.8,
        "retained_mass_mean": 1.0,
        "retained_mass_p5": 0.98,
    }
    print_check({"pairs": [pair], "likelihoods": []})
    words = capsys.readouterr().out.split()
    assert {"languages", "150", "2.8%", "3.7/3.8", "100.0%/98%"} <= set(words)
