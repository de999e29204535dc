"""Measure the way from the capture to the student's batches: reading, training step, and memory.

A part of bench/cache.py: `python bench/cache.py feed`.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from cache import ROOT, SHARE, TAU, given

from persea.alignment.event_map import load_event_map
from persea.cache import unit as cache
from persea.cache.reader import open_cache_reader
from persea.losses import event_kl_loss
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split
from persea.teachers.engines.transformers import TransformersEngine
from persea.training.dataset import build_dataset
from persea.training.example import build_example
from persea.training.student import load_student

TEACHERS = ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling")


def cache_answers(folder: Path, each: int, times: int) -> list[list[str]]:
    """Cache `each` given answers per task and sapling, `times` times; return unit names per
    sapling.
    """
    names = []
    for name in TEACHERS:
        source = ModelSource(str(ROOT / "saplings" / name))
        renderer = load_renderer(source, name)
        engine = TransformersEngine(load_model(source, renderer, name), len(renderer.vocabulary))
        whole = [
            i.reference_conversation
            for skill in GENERATED_TASKS
            for i in skill.items(Split.TRAIN, each, 0)
        ]
        captures = list(given(name, engine, whole, [renderer.render(c) for c in whole]))
        names.append([f"{name}-{k}" for k in range(times)])
        for unit in names[-1]:
            cache.write_unit(folder, unit, captures, {}, tau=TAU)
    return names


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def grown(folder: Path, names: list[list[str]], draws: int, sizes: Any) -> None:
    """Measure, in a process of its own, the megabytes that examples and blocks occupy after
    `draws`.
    """
    renderer = load_renderer(ModelSource(str(ROOT / "saplings" / "llama-sapling")), "student")
    event_maps = {
        name: load_event_map(
            load_renderer(ModelSource(str(ROOT / "saplings" / name)), name), renderer
        )
        for name in TEACHERS
    }
    readers = [open_cache_reader(folder, mine) for mine in names]
    for read, name in zip(readers, TEACHERS, strict=True):
        for number in range(
            0, len(read), max(1, len(read) // 64)
        ):  # the caches of the masks are not part of the dataset
            build_example(read[number], renderer, event_maps[name])
    before = resident()
    feed = build_dataset(
        [(read, 1.0) for read in readers],
        renderer,
        event_maps,
        batch_size=16,
        seed=0,
        max_length=512,
    )
    for number in range(draws):
        feed.example(number)
    sizes.put(resident() - before)


def feed(each: int = 1000, times: int = 5) -> dict[str, Any]:
    """Measure reading, examples and the llama-sapling's training step on the saplings.

    CPU seconds of one thread; megabytes of examples.
    """
    where = ModelSource(str(ROOT / "saplings" / "llama-sapling"))
    renderer = load_renderer(where, "student")
    student = load_student(where, renderer, None)
    result: dict[str, Any] = {}
    event_maps = {
        name: load_event_map(
            load_renderer(ModelSource(str(ROOT / "saplings" / name)), name), renderer
        )
        for name in TEACHERS
    }
    with tempfile.TemporaryDirectory() as kept:
        names = cache_answers(Path(kept), each, times)
        readers = [open_cache_reader(Path(kept), mine[:1]) for mine in names]
        begin = time.process_time()
        for read in readers:
            for number in read.epoch_order(0, 0).tolist():
                read[number]
        seconds = time.process_time() - begin
        positions = sum(cache.read_record(Path(kept), mine[0])["positions"] for mine in names)
        begin = time.process_time()
        fed = build_dataset(
            [(read, 1.0) for read in readers],
            renderer,
            event_maps,
            batch_size=16,
            seed=0,
            max_length=512,
        )
        survey = time.process_time() - begin
        lessons, steps, learned = [], [], 0
        for step in range(100):
            begin = time.process_time()
            batch = fed.batch(step)
            lessons.append(time.process_time() - begin)
            learned += len(batch.labels_N)
            begin = time.process_time()
            logits_NV = student.logits(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N)
            event_kl_loss(logits_NV, batch.labels_N, batch.targets, SHARE).loss.backward()
            steps.append(time.process_time() - begin)
        consumed = learned / sum(steps)
        result["saplings"] = {
            "read_positions_per_second": round(positions / seconds),
            "training_positions_per_second": round(consumed),
            "reader_over_training": round(positions / seconds / consumed, 1),
            "survey_ms_an_answer": round(1e3 * survey / sum(fed.stats.examples.values()), 2),
            "lesson_ms_a_step": round(1e3 * statistics.median(lessons), 1),
            "training_ms_a_step": round(1e3 * statistics.median(steps), 1),
        }
        print(result["saplings"], flush=True)
        apart = multiprocessing.get_context("spawn")
        for some in (1, times):
            sizes = apart.Queue()
            child = apart.Process(
                target=grown, args=(Path(kept), [mine[:some] for mine in names], 20_000, sizes)
            )
            child.start()
            result[f"{9 * each * some:,} answers, lessons as steps want them"] = {
                "megabytes": round(sizes.get(timeout=3600))
            }
            child.join()
            print(result, flush=True)
    return result
