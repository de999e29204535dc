"""What a ledger says of a run's units, running and dead."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea import storage
from persea.errors import DataError
from persea.executors.ledger import LEDGER_FILE, Ledger, LedgerEvent
from persea.pipeline.ledger_status import read_units_status
from persea.pipeline.status import read_status, record_status, status_lines

UNITS = {f"unit{k}": "qwen" for k in range(8)}


class Clock:
    """Seconds since 1970 that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def ledger_of(folder: Path, clock: Clock) -> None:
    """Four units of 10 s, one that hangs, one that failed for good, one lost with its worker."""
    ledger = Ledger(folder, "capture", clock)
    ledger.begin(UNITS, [], lambda unit: 0)

    def start(unit: str, worker: str = "w1") -> None:
        number = ledger.next_attempt(unit)
        ledger.record(LedgerEvent.STARTED, unit, "qwen", attempt=number, worker=worker)

    def end(
        event: LedgerEvent, unit: str, paid: int | None, kept: int = 0, reason: str = ""
    ) -> None:
        ledger.record(
            event,
            unit,
            "qwen",
            attempt=1,
            worker="w1",
            seconds=10.0,
            tokens_paid=paid,
            tokens_kept=kept,
            reason=reason,
        )

    start("unit7", "slow")
    for k in range(4):
        start(f"unit{k}")
        clock.now += 10
        end(LedgerEvent.COMMITTED, f"unit{k}", 600, 500)
    start("unit4")
    end(LedgerEvent.LOST, "unit4", None, reason="its worker is gone")
    start("unit5")
    end(LedgerEvent.FAILED, "unit5", 30, reason="the answer is no JSON")
    ledger.record(LedgerEvent.QUARANTINED, "unit5", "qwen", reason="failed 3 times: no JSON")


def test_units_speed_cost_stragglers_and_quarantine(tmp_path: Path) -> None:
    clock = Clock()
    ledger_of(tmp_path, clock)
    (tmp_path / "recipe.yaml").write_text("name: x\nplan: {price_per_hour: 3.6}\n")
    (one,) = read_units_status(tmp_path, clock.now, is_running=True)
    assert (one.planned, one.committed, one.pending, len(one.quarantined)) == (8, 4, 3, 1)
    assert one.planned == one.committed + one.pending + len(one.quarantined)
    assert (one.tokens_paid, one.tokens_kept, one.tokens_per_second) == (2430, 2000, 50)
    assert (one.num_failed, one.num_lost) == (1, 1)
    assert one.money == pytest.approx(40 / 3600 * 3.6)
    assert [(s.unit, s.worker, s.seconds, s.median_seconds) for s in one.stragglers] == [
        ("unit7", "slow", 40, 10)
    ]
    lines = one.lines()
    assert lines[0] == "4 of 8 units done, 3 pending, 1 running, 1 in quarantine"
    assert "2,000 tokens kept of 2,430 paid, 50 tokens/s a worker" in lines[1]
    assert "cost so far 0.04" in lines[1]
    assert lines[3] == "slow: unit unit7 of qwen for 40 s, others take 10 s (slow)"
    assert lines[4] == "quarantine: unit unit5: failed 3 times: no JSON"


def test_of_a_dead_run_nothing_is_running_and_without_a_price_nothing_costs(
    tmp_path: Path,
) -> None:
    clock = Clock()
    ledger_of(tmp_path, clock)
    (one,) = read_units_status(tmp_path, clock.now + 1e6, is_running=False)
    assert (one.running, one.stragglers, one.money) == (0, (), None)
    assert "cost" not in "\n".join(one.lines())


def test_the_status_of_a_run_holds_its_units(tmp_path: Path) -> None:
    with (
        storage.lock_run_folder(tmp_path),
        record_status(tmp_path, "x", lambda *told: None) as tell,
    ):
        tell("capture", 0.5, "half")
        ledger_of(tmp_path, Clock())
        found = read_status(tmp_path)
        assert found.units[0].committed == 4
        shown = status_lines(found, found.updated_at)
    place = next(k for k, line in enumerate(shown) if line.startswith("  capture"))
    assert shown[place + 1].strip().startswith("4 of 8 units done")
    assert found.to_json()["units"][0]["tokens_paid"] == 2430


def test_a_broken_ledger_is_named(tmp_path: Path) -> None:
    ledger_of(tmp_path, Clock())
    path = tmp_path / LEDGER_FILE
    path.write_bytes(b'{"stage": "capture", "event": "odd", "at": 1}\n' + path.read_bytes())
    with pytest.raises(DataError, match=r"ledger\.jsonl:1: not a line of a ledger"):
        read_units_status(tmp_path, 0, is_running=False)
