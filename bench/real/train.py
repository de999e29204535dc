"""One run: a student, some text, a loss; its result as a JSON line."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from bench.real.models import Packed, Trainee, bits, pack, rate_at
from bench.real.texts import ENGLISH, held_out

BATCH_BYTES = 1600  # training bytes of a step: the same texts for every student and method


@dataclass(frozen=True)
class Run:
    """The settings of a run; two runs with the same settings are the same run.

    Attributes:
        method: Name of the loss, as in `bench.real.methods`.
        languages: The languages taught.
        kilobytes: Training text of each language.
        passes: How often the text is read.
        rate: Peak learning rate.
        seed: Order of the texts.
        share: Weight of the teacher's term.
        student: plain, or a longer vocabulary: 'taught 4000 ridge', 'taught 4000 means'.
        more: Kilobytes of text of each language that the teacher wrote, read beside the text.
        end: text = the end is learned from the text alone, teacher = also from the teacher.
        arithmetic: half = bfloat16 with float32 master weights, single = float32, autocast =
            float32 with products in bfloat16, as persea trains with `precision: bfloat16`.
        part: dev while settings are searched, test for tables.
        new_rows: Learning rate of the rows of new tokens, as a multiple of `rate`.
        temperature: Of the teacher's distributions; they are sampled anew.
        entries: How the distributions are kept: '' = persea's default, 'sampled .1', 'top 8'.
        replay: Kilobytes of English text beside the languages, taught by the untrained student.
    """

    method: str
    languages: tuple[str, ...]
    kilobytes: int
    passes: float
    rate: float
    seed: int = 1
    share: float = 0.7
    student: str = "plain"
    more: int = 0
    end: str = "text"
    arithmetic: str = "half"
    part: str = "dev"
    new_rows: float = 1.0
    temperature: float = 1.0
    entries: str = ""
    replay: int = 0

    @property
    def key(self) -> str:
        """Digest of the settings. A setting that came later counts only if it is not at rest."""
        settings = {k: v for k, v in asdict(self).items() if k not in LATER or v != LATER[k]}
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


LATER = {
    one.name: one.default
    for one in fields(Run)
    if one.name in ("new_rows", "temperature", "entries", "replay")
}


def batches(sizes: Sequence[int], passes: float, seed: int) -> list[list[int]]:
    """Return the texts of each step: every pass in a new order, about BATCH_BYTES a step."""
    rng, out = np.random.default_rng([7, seed]), list[list[int]]()
    left = passes * sum(sizes)
    while left > 0:
        chosen, size = list[int](), 0
        for k in rng.permutation(len(sizes)).tolist():
            chosen.append(k)
            size += sizes[k]
            left -= sizes[k]
            if size >= BATCH_BYTES or left <= 0:
                out.append(chosen)
                chosen, size = [], 0
            if left <= 0:
                break
        if chosen:
            out.append(chosen)
    return out


Loss = Callable[[torch.Tensor, Packed, Sequence[int]], torch.Tensor]


def measure(model: Any, who: Any, languages: Sequence[str], part: str) -> dict[str, Any]:
    """Return per language: bits per byte, with the end, and (block, bits, bits with end, bytes)."""
    out = {}
    for language in languages:
        texts = held_out(language, part)
        found = bits(model, who, [t.text for t in texts])
        size = sum(t.size for t in texts)
        out[language] = {
            "bits_per_byte": round(sum(a for a, _ in found) / size, 4),
            "with_end": round(sum(b for _, b in found) / size, 4),
            "texts": [
                [t.block, round(a, 2), round(b, 2), t.size]
                for t, (a, b) in zip(texts, found, strict=True)
            ],
        }
    return out


def mean(measured: dict[str, Any], languages: Sequence[str]) -> float:
    return round(float(np.mean([measured[one]["bits_per_byte"] for one in languages])), 4)


def train(
    run: Run,
    model: Any,
    who: Any,
    ids: Sequence[Sequence[int]],
    sizes: Sequence[int],
    loss_of: Loss,
    first_new: int | None = None,
    points: int = 1,
) -> tuple[Any, dict[str, Any]]:
    """Train a student; return it in float32, and what the run cost.

    first_new: the first of the rows that learn `new_rows` times as fast; None = no row is new.
    """
    steps = batches(sizes, run.passes, run.seed)
    trainee = Trainee(
        model, run.arithmetic == "half", first_new, run.new_rows, run.arithmetic == "autocast"
    )
    end, curve, cpu, tokens, read = who.renderer.stop_ids[0], [], 0.0, 0, 0
    losses, every = list[float](), max(1, len(steps) // points)
    torch.manual_seed(run.seed)
    for step, chosen in enumerate(steps):
        begun = time.process_time()
        packed = pack([ids[k] for k in chosen], who.start, end)
        logits_SV = trainee.logits(packed)
        loss = loss_of(logits_SV, packed, chosen)
        trainee.step(loss, rate_at(step, len(steps), run.rate))
        cpu += time.process_time() - begun
        tokens += len(packed.ids_S)
        read += sum(sizes[k] for k in chosen)
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise SystemExit(f"{run}: the loss is {losses[-1]} at step {step}")
        # the last value on dev is the result itself where dev is what is measured
        is_last = step + 1 == len(steps)
        if (not is_last and (step + 1) % every == 0) or (is_last and run.part != "dev"):
            dev = measure(trainee.model, who, run.languages, "dev")
            curve.append([step + 1, tokens, read, round(cpu, 1), mean(dev, run.languages)])
    if trainee.half:
        model.float()
        with torch.no_grad():
            for master, own in zip(trainee.masters, trainee.own, strict=True):
                own.copy_(master)
    return model, {
        "steps": len(steps),
        "tokens": tokens,
        "bytes": read,
        "cpu_seconds": round(cpu, 1),
        "curve": curve,
        "losses": [round(x, 3) for x in losses],
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def finish(run: Run, model: Any, who: Any, cost: dict[str, Any]) -> dict[str, Any]:
    """Measure the trained student; return the run's line."""
    measured = measure(model, who, (*run.languages, ENGLISH), run.part)
    return {
        "key": run.key,
        **asdict(run),
        "mean": mean(measured, run.languages),
        "english": measured[ENGLISH]["bits_per_byte"],
        **cost,
        "measured": measured,
    }


def cross_entropy(logits_SV: torch.Tensor, packed: Packed, chosen: Sequence[int]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_SV, packed.labels_S)


def label_smoothing(amount: float) -> Loss:
    def loss(logits_SV: torch.Tensor, packed: Packed, chosen: Sequence[int]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits_SV, packed.labels_S, label_smoothing=amount)

    return loss


def repeated(lines: Iterator[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return result lines by key; the last of a key counts."""
    return {line["key"]: line for line in lines}
