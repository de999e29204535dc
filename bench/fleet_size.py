"""python -m bench.fleet_size [--units 225000]: the driver of a fleet, with simulated units.

Plans the units of a capture, writes the commit records and the ledger of a run that finished half
of them, and measures what a resumed run does before its first attempt: it lists the commit records,
reads the ledger, accounts for the units and finds those that are missing. Then the rest is
dispatched to simulated workers, 1, then 3, then 2. Each part is measured in CPU seconds, in a
process whose peak memory is that of all parts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from persea import storage
from persea.cache.capture import CaptureUnit, plan_units
from persea.cache.maintenance import committed_units
from persea.chat.messages import Conversation
from persea.data.prompts import Prompt
from persea.evaluation.audition import Cast
from persea.executors.dispatch import Dispatcher, missing_units
from persea.executors.executor import Attempt, Outcome, Receipt, WorkUnit
from persea.executors.ledger import Ledger, LedgerEvent

T = TypeVar("T")
TOKENS = 1 << 20


class SimulatedWorkers:
    """Finishes one attempt at a time; the newest first, so that units come in another order."""

    def __init__(self) -> None:
        self.running: list[Attempt] = []
        self.num_finished = 0

    @property
    def num_workers(self) -> int:
        """Workers of this moment: 1, then 3, then 2."""
        return 1 if self.num_finished < 1000 else 3 if self.num_finished < 50_000 else 2

    def submit(self, attempt: Attempt) -> str:
        """Note an attempt."""
        self.running.append(attempt)
        return "simulated"

    def receive(self, timeout_s: float) -> Sequence[Outcome]:
        """Finish the newest attempt."""
        self.num_finished += 1
        attempt = self.running.pop()
        return (Receipt(attempt.id, "simulated", 1.0, TOKENS, TOKENS, ""),)

    def cancel(self, attempt_id: str) -> None:
        """Forget an attempt."""
        self.running = [a for a in self.running if a.id != attempt_id]

    def close(self) -> None:
        """Forget all attempts."""
        self.running.clear()


def measured(results: dict[str, Any], name: str, work: Callable[[], T]) -> T:
    """Do a part and record its CPU seconds."""
    begin = time.process_time()
    found = work()
    results[name] = round(time.process_time() - begin, 2)
    return found


def plan(n: int) -> tuple[CaptureUnit, ...]:
    """Plan n units of one prompt each for two teachers."""
    prompts = [
        Prompt(f"p{k}", Conversation.from_question(f"What is {k}?"), "languages", "en")
        for k in range(n)
    ]
    cast = Cast({"languages": (("one", 0.5), ("two", 0.5))}, ())
    return plan_units(prompts, cast, {"one": "1", "two": "2"}, 1, {"tau": 0.02}, 64)


def write_half(folder: Path, units: Sequence[CaptureUnit]) -> None:
    """Write the commit records and the ledger of a run that died with half of its units."""
    (folder / "capture" / "commits").mkdir(parents=True)
    ledger = Ledger(folder, "capture")
    ledger.begin({u.name: u.teacher for u in units}, (), lambda unit: 0)
    lines = []
    for unit in units[::2]:
        (folder / "capture" / "commits" / f"{unit.name}.json").write_text("{}\n")
        values = {"unit": unit.name, "group": unit.teacher, "attempt": 1, "worker": "simulated"}
        lines.append(ledger._line(LedgerEvent.STARTED, **values))
        values |= {"seconds": 1.0, "tokens_paid": TOKENS, "tokens_kept": TOKENS}
        lines.append(ledger._line(LedgerEvent.COMMITTED, **values))
    ledger._append(lines)


def resume(folder: Path, units: Sequence[CaptureUnit]) -> tuple[Ledger, list[str]]:
    """Do what a resumed run does before its first attempt."""
    committed = frozenset(committed_units(folder / "capture"))
    ledger = Ledger(folder, "capture")
    done = [u.name for u in units if u.name in committed]
    ledger.begin({u.name: u.teacher for u in units}, done, lambda unit: TOKENS)
    return ledger, missing_units([u.name for u in units], committed)


def dispatch(ledger: Ledger, units: Sequence[WorkUnit]) -> int:
    """Commit the missing units on simulated workers."""
    executor, published = SimulatedWorkers(), set[str]()

    def publish(unit: WorkUnit, attempt: Attempt, receipt: Receipt) -> bool:
        published.add(unit.name)
        return True

    Dispatcher(executor, ledger, publish).run(units)
    return len(published)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet_size")
    parser.add_argument("--units", type=int, default=225_000)
    parser.add_argument("--dispatched", type=int, default=0, help="of the missing units; 0 = all")
    options = parser.parse_args()
    results: dict[str, Any] = {"units": options.units}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        units = measured(results, "plan, s", lambda: plan(options.units))
        write_half(folder, units)
        began = time.perf_counter()
        ledger, missing = measured(results, "resume, s", lambda: resume(folder, units))
        results["resume by the clock, s"] = round(time.perf_counter() - began, 2)
        assert len(missing) == options.units // 2
        left = missing[: options.dispatched or None]
        by_name = {u.name: u.teacher for u in units}
        work = [WorkUnit(unit, by_name[unit]) for unit in left]
        num_published = measured(results, "dispatch, s", lambda: dispatch(ledger, work))
        sums = ledger.sums
        assert num_published == len(left) == sums.committed - (options.units - len(missing))
        assert sums.tokens_kept == TOKENS * sums.committed
        assert sums.planned == sums.committed + len(sums.quarantined) + sums.pending
        results["dispatched units"] = len(left)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results |= {"peak, MB": round(peak / 1000), "cores": os.cpu_count()}
    path = Path(__file__).with_name("results") / "fleet_size.json"
    storage.write_atomic(path, (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
