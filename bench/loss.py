"""What the event objective costs beside plain cross-entropy: forward and backward from logits, CPU seconds, one thread.

    python bench/loss.py                        (make bench)

Interleaved pairs, so that a machine that drifts does not favour either; the ratio's median and its spread are told. Vocabulary
and bridge are synthetic at real sizes (student 128,256, teacher 262,144, every student token an event); rows are sampled at tau .01.
Writes bench/results/loss.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from persea.bridge import Bridge
from persea.losses import Targets, composed, cross_entropy, standing, targets

V, W, PAIRS = 128_256, 262_144, 9


def case(n: int) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, (n, V)).astype(np.float32)).requires_grad_()
    bridge = Bridge(rng.integers(0, V, W).astype(np.int32), np.arange(V, dtype=np.int32), V, "synthetic")
    sizes = rng.integers(1, 30, n)
    rows = np.repeat(np.arange(n), sizes)
    probs = np.concatenate([rng.dirichlet(np.ones(k)) for k in sizes]).astype(np.float32)
    said = standing(bridge, rows, rng.integers(0, W, len(rows)), probs)
    return logits, torch.from_numpy(rng.integers(0, V, n)), targets(bridge, said, n)


def seconds(work: object) -> float:
    begin = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - begin


def main() -> None:
    torch.set_num_threads(1)
    result = {}
    for n in (64, 128, 256):
        logits, tokens, said = case(n)

        def plain(logits: torch.Tensor = logits, targets: torch.Tensor = tokens) -> None:
            logits.grad = None
            cross_entropy(logits, targets).loss.backward()

        def events(logits: torch.Tensor = logits, targets: torch.Tensor = tokens, said: Targets = said) -> None:
            logits.grad = None
            composed(logits, targets, [said], 0.7).loss.backward()

        plain(), events()
        pairs = [(seconds(events), seconds(plain)) for _ in range(PAIRS)]
        ratios = sorted(a / b for a, b in pairs)
        result[n] = {"events": round(statistics.median(a for a, _ in pairs), 4), "cross_entropy": round(statistics.median(b for _, b in pairs), 4),
                     "ratio": round(statistics.median(ratios), 2), "ratio_low": round(ratios[1], 2), "ratio_high": round(ratios[-2], 2)}
        print(n, result[n], flush=True)
    growth = result[256]["events"] / result[128]["events"]
    out = {"torch": torch.__version__, "student": V, "teacher": W, "cpu_seconds": result, "time_2n_over_n": round(growth, 2)}
    (Path(__file__).parent / "results" / "loss.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
