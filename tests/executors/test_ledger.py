"""The ledger adds up: planned = committed + quarantined + pending, and every attempt once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persea.errors import DataError
from persea.executors.ledger import LEDGER_FILE, Ledger, LedgerEvent, read_ledger

GROUPS = {"a": "qwen", "b": "qwen", "c": "gemma"}


def started(ledger: Ledger, unit: str, worker: str = "w") -> int:
    number = ledger.next_attempt(unit)
    ledger.record(LedgerEvent.STARTED, unit, GROUPS[unit], attempt=number, worker=worker)
    return number


def ended(
    ledger: Ledger, event: LedgerEvent, unit: str, number: int, paid: int | None, kept: int = 0
) -> None:
    ledger.record(
        event,
        unit,
        GROUPS[unit],
        attempt=number,
        worker="w",
        seconds=1.5,
        tokens_paid=paid,
        tokens_kept=kept,
        reason="",
    )


def test_paid_and_kept_tokens_of_every_kind_of_attempt(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "capture")
    ledger.begin(GROUPS, [], lambda unit: 0)
    first, second = started(ledger, "a"), started(ledger, "a")
    assert (first, second) == (1, 2)
    ended(ledger, LedgerEvent.COMMITTED, "a", first, 100, 90)
    ended(ledger, LedgerEvent.DUPLICATE, "a", second, 100)
    ended(ledger, LedgerEvent.LOST, "b", started(ledger, "b"), None)
    ledger.record(LedgerEvent.QUARANTINED, "b", "qwen", reason="it fails")
    started(ledger, "c")
    sums = read_ledger(tmp_path)["capture"]
    assert sums == ledger.sums
    assert (sums.planned, sums.committed, sums.pending) == (3, 1, 1)
    assert sums.quarantined == {"b": "it fails"}
    assert (sums.tokens_paid, sums.tokens_kept) == (200, 90)
    assert (sums.num_attempts, sums.num_duplicates, sums.num_lost) == (4, 1, 1)
    assert sums.num_unknown == 1
    assert [r.unit for r in sums.running.values()] == ["c"]
    assert sums.seconds_by_group == {"qwen": [1.5]}
    assert sums.tokens_paid_by_group == {"qwen": 200}


def test_a_resumed_run_explains_units_whose_lines_are_lost(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "capture")
    ledger.begin(GROUPS, [], lambda unit: 0)
    ended(ledger, LedgerEvent.COMMITTED, "a", started(ledger, "a"), 100, 90)
    started(ledger, "b")  # committed on disk, but the run died before its line
    asked: list[str] = []
    again = Ledger(tmp_path, "capture")
    again.begin(GROUPS, ["a", "b"], lambda unit: asked.append(unit) or 40)
    assert asked == ["b"]
    sums = read_ledger(tmp_path)["capture"]
    assert (sums.committed, sums.pending, sums.tokens_kept, sums.tokens_paid) == (2, 1, 130, 100)
    assert (sums.num_lost, sums.num_unknown, sums.running) == (1, 1, {})
    assert again.next_attempt("b") == 2
    third = Ledger(tmp_path, "capture")
    third.begin(GROUPS, ["a", "b"], lambda unit: asked.append(unit) or 40)
    assert asked == ["b"]
    assert (third.sums.committed, third.sums.tokens_kept) == (2, 130)


def test_another_plan_counts_its_own_units_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "capture")
    ledger.begin(GROUPS, [], lambda unit: 0)
    for unit in ("a", "b"):
        ended(ledger, LedgerEvent.COMMITTED, unit, started(ledger, unit), 10, 10)
    other = Ledger(tmp_path, "capture")
    other.begin({"b": "qwen", "c": "gemma"}, ["b"], lambda unit: 0)
    assert (other.sums.planned, other.sums.committed, other.sums.pending) == (2, 1, 1)
    assert (other.sums.tokens_kept, other.sums.tokens_paid) == (10, 20)


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_last_line_that_a_crash_cut_is_ignored_and_removed(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path, "capture")
    ledger.begin(GROUPS, [], lambda unit: 0)
    started(ledger, "a")
    path = tmp_path / LEDGER_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_ledger(tmp_path)["capture"].num_attempts == 0
    again = Ledger(tmp_path, "capture")
    again.begin(GROUPS, [], lambda unit: 0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["planned", "planned"]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"stage": "capture", "event": "sung"}'])
def test_a_broken_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    Ledger(tmp_path, "capture").begin(GROUPS, [], lambda unit: 0)
    path = tmp_path / LEDGER_FILE
    path.write_text(path.read_text() + line + "\n")
    for read in (read_ledger, lambda folder: Ledger(folder, "capture")):
        with pytest.raises(DataError) as raised:
            read(tmp_path)
        assert raised.value.where == f"{path}:2"


def test_stages_have_sums_of_their_own_and_no_ledger_is_empty(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) == {}
    Ledger(tmp_path, "capture").begin(GROUPS, [], lambda unit: 0)
    Ledger(tmp_path, "evaluate").begin({"x": "student"}, [], lambda unit: 0)
    assert {s: sums.planned for s, sums in read_ledger(tmp_path).items()} == {
        "capture": 3,
        "evaluate": 1,
    }


def test_a_clock_that_jumps_changes_no_sum(tmp_path: Path) -> None:
    times = iter([1e9, 5.0, 2e9])
    ledger = Ledger(tmp_path, "capture", clock=lambda: next(times))
    ledger.begin(GROUPS, [], lambda unit: 0)
    ended(ledger, LedgerEvent.COMMITTED, "a", started(ledger, "a"), 7, 7)
    sums = read_ledger(tmp_path)["capture"]
    assert (sums.committed, sums.tokens_paid, sums.seconds_by_group) == (1, 7, {"qwen": [1.5]})
