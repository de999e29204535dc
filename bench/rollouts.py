"""Measure batched generation beside one prompt at a time: tokens per CPU second, one thread.

    python bench/rollouts.py        (make bench-rollouts, about a minute)

The unchanged llama-sapling samples at temperature 1, up to 96 tokens. Pairs are interleaved; each
pair gives one ratio. Writes bench/results/rollouts.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from persea.models.loading import ModelSource, load_model, load_renderer
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split
from persea.teachers.engines.transformers import TransformersEngine

ROOT = Path(__file__).resolve().parent.parent
TOGETHER, ALONE, PAIRS, NEW = 64, 8, 3, 96


def main() -> None:
    torch.set_num_threads(1)
    where = ModelSource(str(ROOT / "saplings" / "llama-sapling"))
    renderer = load_renderer(where, "student")
    model = load_model(where, renderer, "student")
    asked = [
        renderer.render_prompt(i.prompt.conversation).ids_T
        for skill in GENERATED_TASKS
        for i in skill.items(Split.TRAIN, TOGETHER, 0)
    ][:: len(GENERATED_TASKS)][:TOGETHER]

    def pace(batch: int, prompts: int, seed: int) -> float:
        begin = time.process_time()
        sampled = TransformersEngine(model, len(renderer.vocabulary), batch).generate_rollouts(
            asked[:prompts], renderer.stop_ids, NEW, temperature=1.0, seed=seed
        )
        return sum(map(len, sampled)) / (time.process_time() - begin)

    pace(TOGETHER, TOGETHER, 99)
    pairs = [(pace(TOGETHER, TOGETHER, k), pace(1, ALONE, k)) for k in range(PAIRS)]
    ratios = [many / one for many, one in pairs]
    result = {
        "torch": torch.__version__,
        "together": TOGETHER,
        "tokens_per_cpu_second": {
            "together": round(statistics.median(many for many, _ in pairs)),
            "one by one": round(statistics.median(one for _, one in pairs)),
        },
        "ratio": round(statistics.median(ratios), 1),
        "ratios": [round(r, 1) for r in ratios],
    }
    print(json.dumps(result, indent=1))
    (ROOT / "bench" / "results" / "rollouts.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
