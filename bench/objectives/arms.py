"""The experiment: runs of students, one JSON line each; runs that have a line are skipped."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from bench.objectives import data, models, vocabularies
from bench.objectives.chunks import CHUNKED, gathered
from bench.objectives.data import ASKED, Window
from bench.objectives.examples import Batch, Lesson, Teacher, collate, open_lessons
from bench.objectives.extension import carried, open_extended
from bench.objectives.gold import gold, with_last
from bench.objectives.methods import KEPT, METHODS, Pair, Setting, keep, open_kept, prepare
from bench.objectives.models import Size, padded, states
from bench.objectives.vocabularies import Speaker

BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Arm:
    """One run.

    length: in units of the size's steps; regime: 'limited' (each window several times) or
    'unlimited' (once); part: the evaluation split, 'dev' while settings are searched, 'test' for
    tables.
    """

    method: str
    rows: str
    share: float
    rate: float
    regime: str
    seed: int
    length: float = 1.0
    part: str = "test"

    def key(self, size: Size) -> str:
        return json.dumps({"size": size.name, **asdict(self)})


@dataclass(frozen=True, eq=False)
class World:
    """The data and models that all runs share, loaded once from the cache folder."""

    size: Size
    folder: Path

    @cached_property
    def text(self) -> dict[str, dict[str, list[Window]]]:
        return {
            part: data.pools(
                data.data_folder(),
                part,
                per_document=None if part == "train" else self.size.per_page,
                domains=self.size.domains,
            )
            for part in ("train", "dev", "test")
        }

    @cached_property
    def speakers(self) -> dict[str, Speaker]:
        return self.real | (
            {"student": open_extended(self.folder, self.size.extended, self.texts_of("student"))}
            if self.size.extended
            else {}
        )

    @cached_property
    def real(self) -> dict[str, Speaker]:
        """The tokenizers before the student's vocabulary is extended."""
        return vocabularies.open_speakers(
            self.folder, self.size.vocabulary, self.texts_of, (*self.size.teaches, "student")
        )

    def texts_of(self, who: str) -> list[str]:
        return [
            w.text
            for d in self.size.teaches.get(who, self.size.domains)
            for w in self.text["train"][d][: self.size.seen]
        ]

    def kept(self, name: str) -> Path:
        """Return the path of a file that depends on the student's vocabulary."""
        return self.folder / f"{name}{f'+{self.size.extended}' if self.size.extended else ''}.pt"

    def begun(self, seed: int) -> LlamaForCausalLM:
        """Return a student before distillation: new, or pretrained on some windows, extended."""
        size, plain = self.size, self.real["student"]
        if not size.met:
            return models.make(size.student, len(plain.vocabulary), seed)
        path, model = (
            self.folder / f"met {size.met}.pt",
            models.make(size.student, len(plain.vocabulary), seed=1),
        )
        if not path.is_file():
            pools, n = (
                {d: self.text["train"][d][-size.met :] for d in size.domains},
                self.taught("unlimited", 1.0),
            )
            if any(n + size.met > len(self.text["train"][d]) for d in size.domains):
                raise SystemExit(
                    f"{size.name}: too little text for {size.met} windows "
                    "besides the training windows"
                )
            steps = size.met * len(size.domains) // size.batch
            models.read_through(
                model, plain, models.order(pools, size.batch, seed=1), steps, 8e-3, "student"
            )
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path, weights_only=True))
        return carried(model, plain, self.speakers["student"])

    def grow(self) -> None:
        """Train the teachers that do not exist yet."""
        for who, domains in self.size.teaches.items():
            path = self.folder / f"{who}.pt"
            if not path.is_file():
                models.train_teacher(
                    self.speakers[who],
                    {d: self.text["train"][d] for d in domains},
                    self.size,
                    who,
                    path,
                )

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        return {
            who: Teacher(
                self.speakers[who],
                models.open_teacher(self.speakers[who], self.size, self.folder / f"{who}.pt"),
            )
            for who in self.size.teaches
        }

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        return {
            who: Pair(teacher, self.speakers["student"]) for who, teacher in self.teachers.items()
        }

    def student(self, arm: Arm) -> Path:
        """Return the path of the student of seed 1, for later measurements."""
        size = self.size.name if self.size.of else ""
        return self.folder / f"student {size}{arm.method}, {arm.rows}, {arm.regime}.pt"

    def windows(self, regime: str, length: float) -> dict[str, list[Window]]:
        """Return training windows by domain: seen once in 'unlimited', several times in
        'limited'.
        """
        return {d: self.text["train"][d][: self.taught(regime, length)] for d in self.size.domains}

    def taught(self, regime: str, length: float) -> int:
        """Return the number of windows per domain."""
        return (
            self.size.limited
            if regime == "limited"
            else -(-round(self.size.steps * length) * self.size.batch // len(self.size.domains))
        )

    def examples(self, begin: float, end: float) -> dict[str, list[Lesson]]:
        """Return examples for the windows of `unlimited` between two lengths, cached on disk."""
        first = self.taught("unlimited", begin)
        pools = {d: pool[first:] for d, pool in self.windows("unlimited", end).items()}
        name = "lessons" + ("" if (begin, end) == (0, 1) else f" {begin:g} to {end:g}")
        found = iter(
            open_lessons(
                self.kept(name),
                [w for pool in pools.values() for w in pool],
                self.speakers["student"],
                self.teachers,
            )
        )
        return {d: [next(found) for _ in pool] for d, pool in pools.items()}

    @cached_property
    def first(self) -> dict[str, list[Lesson]]:
        """The examples of length 1; the windows of regime 'limited' are their beginning."""
        return self.examples(0, 1)

    @cached_property
    def teacher_text(self) -> dict[str, list[Window]]:
        """As many windows as in `first`: the first part unchanged, the rest sampled from the
        teacher.
        """
        from bench.objectives.words import open_continuations

        return open_continuations(
            self.folder / "said.json", self.windows("unlimited", 1.0), self.teachers
        )

    def batches(self, arm: Arm) -> Iterator[Batch]:
        student = self.speakers["student"]
        if arm.method in ("cross-entropy", "sft"):
            pools = (
                self.teacher_text if arm.method == "sft" else self.windows(arm.regime, arm.length)
            )
            if arm.method == "sft" and arm.regime == "limited":
                pools = {d: p[: self.size.limited] for d, p in pools.items()}
            for chosen in models.order(pools, self.size.batch, arm.seed):
                ids_BS, learn_BS = padded(
                    student.vocabulary.encode_batch([w.text for w in chosen]), student.start
                )
                yield Batch(ids_BS, learn_BS, ids_BS[:, 1:][learn_BS[:, :-1]], ())
        found = self.first
        if arm.regime == "unlimited" and arm.length > 1:
            found = {d: [*found[d], *more] for d, more in self.examples(1, arm.length).items()}
        n = {d: len(p) for d, p in self.windows(arm.regime, arm.length).items()}
        for some in models.order(
            {d: p[: n[d]] for d, p in found.items()}, self.size.batch, arm.seed
        ):
            batch = collate(some, student)
            yield with_last(batch) if arm.method == "gold" else batch


@lru_cache(maxsize=4)
def held_out(world: World, part: str, windows: int) -> tuple[Window, ...]:
    return tuple(w for d in world.size.domains for w in world.text[part][d][:windows])


@dataclass(frozen=True)
class Measured:
    """Bits and bytes by domain and page, and the expected calibration error.

    Calibration: |confidence - accuracy| of the likeliest token, over BINS bins.
    """

    pages: Mapping[str, Mapping[str, tuple[float, int]]]
    calibration: float

    def bits_per_byte(self) -> dict[str, float]:
        return {
            d: sum(b for b, _ in pages.values()) / sum(n for _, n in pages.values())
            for d, pages in self.pages.items()
        }

    def mean(self) -> float:
        return float(np.mean(list(self.bits_per_byte().values())))


def measure(model: LlamaForCausalLM, speaker: Speaker, windows: Sequence[Window]) -> Measured:
    pages: dict[str, dict[str, tuple[float, int]]] = defaultdict(dict)
    bins = np.zeros((BINS, 3))
    for at in range(0, len(windows), 32):
        some = windows[at : at + 32]
        ids = speaker.vocabulary.encode_batch([w.text for w in some])
        ids_BS, learn_BS = padded(ids, speaker.start)
        with torch.no_grad():
            logprobs_NV = torch.log_softmax(
                states(model, ids_BS, learn_BS) @ model.lm_head.weight.T, -1
            )
            targets_N = ids_BS[:, 1:][learn_BS[:, :-1]]
            bits_N = (
                (F.nll_loss(logprobs_NV, targets_N, reduction="none") / np.log(2)).double().numpy()
            )
            top = logprobs_NV.max(-1)
        sure_N, right_N = top.values.exp().numpy(), (top.indices == targets_N).numpy()
        which_N = np.minimum((sure_N * BINS).astype(int), BINS - 1)
        for column, values_N in enumerate((np.ones(len(sure_N)), sure_N, right_N)):
            np.add.at(bins[:, column], which_N, values_N)
        n = 0
        for w, one in zip(some, ids, strict=True):
            bits, length = pages[w.domain].get(w.page, (0.0, 0))
            pages[w.domain][w.page] = (
                bits + float(bits_N[n : n + len(one)].sum()),
                length + len(w.text.encode()),
            )
            n += len(one)
    return Measured(pages, float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum()))


def run(world: World, arm: Arm) -> dict[str, Any]:
    """Train one student and measure it."""
    size, student = world.size, world.speakers["student"]
    model = world.begun(arm.seed)
    adam, steps = models.optimizer(model, arm.rate), round(size.steps * arm.length)
    setting, loss_of = (
        Setting(arm.method, arm.rows, arm.share),
        (METHODS | CHUNKED | {"gold": gold})[arm.method],
    )
    curve, tokens, raw, cpu, of_loss = [], 0, 0, 0.0, 0.0
    for step, batch in zip(range(steps), world.batches(arm), strict=False):
        if batch.groups:
            prepare(batch, world.pairs, setting)
        if arm.method in CHUNKED:
            gathered(batch, world.pairs)
        begun = time.process_time()
        logits_NV = states(model, batch.ids_BS, batch.learn_BS) @ model.lm_head.weight.T
        before = time.process_time()
        loss = loss_of(logits_NV, batch, world.pairs if batch.groups else {}, setting)
        of_loss += time.process_time() - before
        models.step_with(adam, model, loss, models.rate(step, steps, arm.rate))
        cpu += time.process_time() - begun
        tokens += len(batch.labels_N)
        raw += int(student.vocabulary.lengths_W[batch.labels_N.numpy()].sum())
        if not bool(torch.isfinite(loss.detach())):
            raise SystemExit(f"{arm}: the loss is {float(loss.detach())} at step {step}")
        if (step + 1) % max(1, steps // 4) == 0:
            curve.append(
                [
                    tokens,
                    round(
                        measure(
                            model, student, held_out(world, "dev", max(2, size.test // 6))
                        ).mean(),
                        4,
                    ),
                ]
            )
    if (arm.seed, arm.length, arm.part) == (1, 1.0, "test"):
        torch.save(model.state_dict(), world.student(arm))
    found = measure(model, student, held_out(world, arm.part, size.test))
    return {
        "bits_per_byte": {d: round(v, 4) for d, v in found.bits_per_byte().items()},
        "mean": round(found.mean(), 4),
        "calibration": round(found.calibration, 4),
        "tokens": tokens,
        "bytes": raw,
        "steps": steps,
        "curve": curve,
        "cpu_per_step": round(cpu / max(1, steps), 4),
        "loss_cpu_per_step": round(of_loss / max(1, steps), 4),
        "pages": {
            d: [[round(b, 1), n] for b, n in pages.values()] for d, pages in found.pages.items()
        },
    }


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Return the result lines by key."""
    lines = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    )
    return {line["key"]: line for line in lines}


def run_all(world: World, arms: Sequence[Arm], results: Path) -> list[dict[str, Any]]:
    """Run the arms without a result line, in order; return the lines of all arms."""
    out = []
    for arm in arms:
        key = arm.key(world.size)
        if key not in read(results):
            if "masks" in arm.method and not any(masked for _, _, masked, _ in KEPT):
                open_kept(world.kept("masked"))
            before = len(KEPT)
            line = {"key": key, "size": world.size.name, **asdict(arm), **run(world, arm)}
            if "masks" in arm.method and len(KEPT) > before:
                keep(world.kept("masked"))
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{line['mean']:.4f} {line['calibration']:.3f} "
                f"{line['cpu_per_step']:.3f} s/step  {key}",
                flush=True,
            )
        out.append(read(results)[key])
    return out


def teachers_measured(world: World) -> dict[str, Any]:
    """Return bits per byte of every teacher on its domains, and its training cost."""
    out = {}
    for who, teacher in world.teachers.items():
        windows = [w for w in held_out(world, "test", world.size.test) if ASKED[w.domain] == who]
        record = json.loads((world.folder / f"{who}.json").read_text())
        out[who] = record | {
            "bits_per_byte": {
                d: round(v, 4)
                for d, v in measure(teacher.model, teacher.speaker, windows).bits_per_byte().items()
            }
        }
    return out
