"""What grows, and with what: the rows of docs/scale.md."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.growth.measure import ROOT, Row

Work = Callable[[], dict[str, Any] | None]
ANSWERS_PER_UNIT = 4096
TEACHERS = ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling")
STEPS = 200
WORDS = ("time", "river", "number", "house", "green", "seven", "letter", "stone", "paper", "window")


def data() -> Path:
    """Return the folder of real tokenizers and texts."""
    return Path(os.environ["PERSEA_DATA"])


# --- prompts ---


def read_and_dedupe(size: int, folder: Path) -> Work:
    """Read prompts of a JSONL file, drop exact and near duplicates."""
    from persea.data.formats import read_prompts
    from persea.data.prompts import build_corpus

    rng = random.Random(0)
    path = folder / "prompts.jsonl"
    with path.open("w") as file:
        for k in range(size):
            words = " ".join(rng.choice(WORDS) + str(rng.randrange(10_000)) for _ in range(12))
            file.write(json.dumps({"id": f"p{k}", "prompt": f"What of {words}?"}) + "\n")

    def work() -> dict[str, Any]:
        corpus = build_corpus([read_prompts(path, "skill", "en")], [], [0.8])
        return {"kept": len(corpus.prompts)}

    return work


def draw_rollout_prompts(size: int, folder: Path) -> Work:
    """Draw 64 on-policy prompts in each of 20 steps."""
    from persea.training.on_policy.rollouts import prompt_order

    def work() -> None:
        for k in range(20 * 64):
            epoch, at = divmod(k, size)
            int(prompt_order(0, epoch, size)[at])

    return work


# --- cache ---


def _quickstart_answers(
    num_answers: int, family: str = TEACHERS[0], name: str = "teacher"
) -> tuple[list[Any], Any, Any]:
    """Return cached answers of a sapling with sampled distributions, and both renderers.

    Questions with tools are left out for other families than the first: Gemma has no tools.
    """
    from persea.cache.unit import CachedAnswer
    from persea.chat.messages import FinishReason
    from persea.distributions import DistributionKind, SparseDistributions
    from persea.models.loading import ModelSource, load_renderer
    from persea.tasks.generated import GENERATED_TASKS
    from persea.tasks.task import Split
    from persea.teachers.teacher import Answer

    teacher, student = (
        load_renderer(ModelSource(str(ROOT / "saplings" / folder)), folder)
        for folder in (family, "llama-sapling")
    )
    rng = np.random.default_rng(0)
    tasks = [one for one in GENERATED_TASKS if family == TEACHERS[0] or one.name != "tools"]
    items = [
        item for one in tasks for item in one.items(Split.TRAIN, -(-num_answers // len(tasks)), 0)
    ][:num_answers]
    answers = []
    for k, item in enumerate(items):
        conversation = item.reference_conversation
        tokens = teacher.render(conversation)
        real_N = tokens.ids_T[tokens.loss_mask_T]
        others_N3 = rng.integers(0, 300, (len(real_N), 3))
        ids, probs, offsets, own = [], [], [0], []
        for real, others in zip(real_N.tolist(), others_N3.tolist(), strict=True):
            row = sorted({real, *others})
            ids += row
            probs += [1 / len(row)] * len(row)
            offsets.append(len(ids))
            own.append(-np.log(len(row)))
        distributions = SparseDistributions(
            ids_M=np.array(ids, np.int32),
            probs_M=np.array(probs, np.float32),
            offsets_N1=np.array(offsets, np.int64),
            target_logprob_N=np.array(own, np.float32),
            kind=DistributionKind.SAMPLED,
        )
        answer = Answer(f"p{k}", name, "skill", "en", conversation, FinishReason.STOP)
        answers.append(CachedAnswer(answer, tokens, distributions))
    return answers, teacher, student


def _record(folder: Path, name: str) -> dict[str, Any]:
    """Return a unit's record without its checksum."""
    record = json.loads((folder / "commits" / f"{name}.json").read_text())
    return {key: value for key, value in record.items() if key != "seal"}


def _write_units(folder: Path, answers: list[Any], num_units: int) -> list[str]:
    """Write a unit, and further ones under other names with the same bytes."""
    from persea import storage
    from persea.cache.unit import write_unit

    write_unit(folder, "unit0000000", answers, {}, tau=0.1, unit_metadata={"teacher": "teacher"})
    record = _record(folder, "unit0000000")
    names = [f"unit{k:07}" for k in range(num_units)]
    source = folder / "units" / "unit0000000.safetensors"
    for name in names[1:]:
        os.link(source, folder / "units" / f"{name}.safetensors")
        path = folder / "commits" / f"{name}.json"
        storage.write_json_with_checksum(path, record | {"unit": name})
    return names


def merge_units(size: int, folder: Path) -> Work:
    """Merge a cache of units into an empty one; each byte is checked."""
    from persea.cache.maintenance import merge_caches

    answers, _, _ = _quickstart_answers(4)
    _write_units(folder / "from", answers, size)
    return lambda: {"copied": merge_caches(folder / "into", [folder / "from"])}


def merge_again(size: int, folder: Path) -> Work:
    """Merge the same cache again: nothing is new."""
    from persea.cache.maintenance import merge_caches

    answers, _, _ = _quickstart_answers(4)
    for side in ("from", "into"):
        _write_units(folder / side, answers, size)
    return lambda: {"copied": merge_caches(folder / "into", [folder / "from"])}


def open_units(size: int, folder: Path) -> Work:
    """Open the reader of a cache: every unit once."""
    from persea.cache.reader import open_cache_reader

    answers, _, _ = _quickstart_answers(4)
    names = _write_units(folder, answers, size)
    return lambda: {"answers": len(open_cache_reader(folder, names))}


def first_step_again(size: int, folder: Path) -> Work:
    """Open stored examples at a later start, and build the first batch."""
    from persea.alignment.event_map import load_event_map
    from persea.cache.reader import open_cache_reader
    from persea.training.dataset import build_dataset
    from persea.training.example import ExampleMaker
    from persea.training.example_store import ExampleStore

    per_unit = min(size, ANSWERS_PER_UNIT)
    answers, teacher, student = _quickstart_answers(per_unit)
    num_units = -(-size // per_unit)
    names = _write_units(folder, answers, num_units)
    # each unit has a digest of its own, and so a file of examples of its own
    from persea import storage

    for name in names[1:]:
        record = _record(folder, name)
        path = folder / "commits" / f"{name}.json"
        storage.write_json_with_checksum(path, record | {"sha256": name * 4})
    maps = {"teacher": load_event_map(teacher, student)}
    store = ExampleStore(folder / "examples", ExampleMaker.create(student, maps, False, "auto"))
    store.build(folder, names[0])
    first = store.path(folder, names[0])
    for name in names[1:]:
        os.link(first, store.path(folder, name))

    def work() -> dict[str, Any]:
        dataset = build_dataset(
            [(open_cache_reader(folder, names), 1.0)],
            student,
            maps,
            batch_size=16,
            seed=0,
            max_length=512,
            example_folder=folder / "examples",
        )
        dataset.batch(0)
        return {"examples": len(dataset)}

    return work


def make_examples(size: int, folder: Path) -> Work:
    """Make the examples of answers for the first time."""
    from persea.alignment.event_map import load_event_map
    from persea.training.example import ExampleMaker

    answers, teacher, student = _quickstart_answers(size)
    maps = {"teacher": load_event_map(teacher, student)}
    maker = ExampleMaker.create(student, maps, False, "auto")
    for answer in answers[:50]:
        maker.make(answer)

    def work() -> None:
        for answer in answers:
            maker.make(answer)

    return work


# --- teachers and processes ---


def make_examples_of_teachers(size: int, folder: Path) -> Work:
    """Load the event maps of some teachers, and make the examples of 960 answers that they share.

    Beyond three teachers a sapling counts again, under another name.
    """
    from persea.alignment.event_map import load_event_map
    from persea.training.example import ExampleMaker

    answers, renderers, student = [], {}, None
    for k in range(size):
        name = f"teacher{k}"
        family = TEACHERS[k % len(TEACHERS)]
        some, renderers[name], student = _quickstart_answers(960 // size, family, name)
        answers += some

    def work() -> dict[str, Any]:
        maps = {name: load_event_map(one, student) for name, one in renderers.items()}
        maker = ExampleMaker.create(student, maps, False, "auto")
        for answer in answers:
            maker.make(answer)
        return {"answers": len(answers)}

    return work


def loss_teachers(size: int, folder: Path) -> Work:
    """Loss and gradient over events at 240 positions that some teachers share."""
    return _event_loss(240, 49_152, num_teachers=size)


def train_by_processes(size: int, folder: Path) -> Work:
    """Train the quickstart's student by some processes of torchrun, whole command.

    CPU time is that of all processes, memory that of the largest.
    """
    recipe = ["recipes/quickstart.yaml", "--out", str(folder / "run")]
    for key, value in (("training.steps", STEPS), ("audition.items", 8), ("evaluation.items", 8)):
        recipe += ["--set", f"{key}={value}"]
    for k in range(5):
        recipe += ["--set", f"corpus.{k}.generate=64"]

    def python(*words: str) -> None:
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=sys.stderr)

    for stage in ("check", "audition", "capture"):
        python("-m", "persea.cli", stage, *recipe)

    def work() -> dict[str, Any]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(size))
        python("-m", *launch, "-m", "persea.cli", "train", *recipe)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"cpu_s": round(cpu, 2), "mb": round(after.ru_maxrss / 1000, 1)}

    return work


# --- positions and vocabulary, with real tokenizers ---


def _real(name: str) -> Any:
    from transformers import AutoTokenizer

    from persea.tokenization.vocabulary import load_vocabulary

    folder = data() / "tokenizers" / name
    return load_vocabulary(AutoTokenizer.from_pretrained(str(folder)), name)


def align_positions(size: int, folder: Path) -> Work:
    """Align the tokens of one text of some bytes by two real tokenizers."""
    from persea.alignment.spans import aligned_spans, common_boundaries
    from persea.tokenization.tokens import RenderedTokens

    lines = (data() / "parallel" / "ntrex.eng.txt").read_text().splitlines()
    text = "\n".join(lines * (1 + size // 20_000))[:size]
    sides = []
    for name in ("gemma3", "qwen3"):
        vocabulary = _real(name)
        ids = np.asarray(vocabulary.encode(text), np.int32)
        ends = np.cumsum(vocabulary.lengths_W[ids]).astype(np.int32)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int32)
        sides.append(RenderedTokens(ids, starts, ends, np.ones(len(ids), np.bool_)))

    def work() -> dict[str, Any]:
        both = common_boundaries(*sides)
        aligned_spans(*sides)
        return {"tokens": len(sides[0]), "common": len(both.student_C)}

    return work


def loss_positions(size: int, folder: Path) -> Work:
    """Loss and gradient over events at some positions: vocabulary of 49,152."""
    return _event_loss(size, 49_152)


def loss_vocabulary(size: int, folder: Path) -> Work:
    """Loss and gradient over events at 32 positions of a vocabulary of some size."""
    return _event_loss(32, size)


def _event_loss(num_positions: int, vocab_size: int, num_teachers: int = 1) -> Work:
    import torch

    from persea.alignment.event_map import EventMap
    from persea.distributions import DistributionKind
    from persea.losses import build_batch_targets, build_event_targets, event_kl_loss

    rng = np.random.default_rng(0)
    events_V = np.arange(vocab_size, dtype=np.int32)
    emap = EventMap(events_V, events_V.copy(), vocab_size, "growth")
    ids_N8 = np.stack([rng.choice(vocab_size, 8, replace=False) for _ in range(num_positions)])
    targets = []
    for rows_P in np.array_split(np.arange(num_positions), num_teachers):
        ids_M = ids_N8[rows_P].ravel()
        probs_M = np.full(len(ids_M), 0.12, np.float32)
        of_events = build_event_targets(
            emap, np.repeat(rows_P, 8), ids_M, probs_M, kind=DistributionKind.FULL
        )
        targets.append(build_batch_targets(emap, of_events, num_positions))
    logits_NV = torch.randn(num_positions, vocab_size, requires_grad=True)
    labels_N = torch.from_numpy(ids_N8[:, 0].astype(np.int64))

    def work() -> None:
        event_kl_loss(logits_NV, labels_N, targets, 0.7).loss.backward()

    work()  # libraries set themselves up in the first call
    return work


ROWS: tuple[Row, ...] = (
    Row("read prompts, drop near duplicates", "prompts", (1_000, 10_000, 100_000), read_and_dedupe),
    Row(
        "draw 64 rollout prompts, 20 times",
        "prompts",
        (1_000, 10_000, 100_000, 1_000_000),
        draw_rollout_prompts,
        fit_from=100_000,
    ),
    Row("make examples, the first time", "answers", (250, 1_000, 4_000), make_examples),
    Row(
        "first batch at a later start",
        "answers",
        (4_096, 16_384, 131_072, 1_048_576),
        first_step_again,
        fit_from=16_384,
    ),
    Row("open a cache", "units", (250, 1_000, 4_000, 16_000), open_units),
    Row("merge into an empty cache", "units", (250, 1_000, 4_000), merge_units),
    Row("merge again, nothing new", "units", (1_000, 4_000, 16_000), merge_again),
    Row(
        "align one text, two real tokenizers",
        "bytes",
        (10_000, 100_000, 1_000_000),
        align_positions,
        needs_data=True,
        fit_from=100_000,
    ),
    Row("loss and gradient over events", "positions", (16, 64, 256), loss_positions),
    Row(
        "loss and gradient, 32 positions",
        "vocabulary",
        (49_152, 128_256, 262_144),
        loss_vocabulary,
    ),
    Row("make 960 answers' examples", "teachers", (1, 2, 3, 4, 5), make_examples_of_teachers),
    Row("loss and gradient, 240 positions", "teachers", (1, 2, 3, 4, 5), loss_teachers),
    Row(f"train {STEPS} steps", "processes", (1, 2, 4), train_by_processes),
)
