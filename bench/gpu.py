"""Checks on a device what no CPU can show; takes at most 10 minutes, most of it compiling kernels.

    python bench/gpu.py [--out bench/results/gpu.json] [--cpu]

1. The Triton kernels against the functions that they implement, on the device.
2. The chunked head's forward and backward pass against the roofline: the time that its matrix
   products alone would take at the speed of one large product, measured just before.
3. A distillation step in bfloat16: a short run of the saplings, from capture to trained student.
4. Optimisers and LoRA options that need a device: fused AdamW, 8-bit AdamW, QLoRA.

Without a device it refuses with exit code 7. `--cpu` runs the same script small, to check itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from persea.losses import LMHead, event_kl_loss_from_hidden
from persea.losses.event_kl import event_kl_per_token

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "losses"), str(ROOT / "bench")]
MATRIX_PRODUCTS = 3  # of the head with cached targets: logits, gradient of hidden, of weight
TOLERANCE = 2e-4
PINNED = {
    "languages": "qwen-sapling",
    "code": "gemma-sapling",
    "safety": "gemma-sapling",
    "reasoning": "gpt-oss-sapling",
    "tools": "gpt-oss-sapling",
}
TRAINING = {
    "adamw_fused": ["training.optim=adamw_torch_fused"],
    "bf16_compiled": ["training.torch_compile=true"],
    "adamw_8bit": ["training.optim=adamw_8bit"],
    "muon": ["training.optim=muon"],
    "qlora": ["student.adapt=lora", "student.lora.quantize=4bit"],
}
NEEDS_BITSANDBYTES = ("adamw_8bit", "qlora")


def seconds(device: torch.device, work: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest time of some repeats, after one that compiles."""
    best = float("inf")
    for k in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - begin) if k else best
    return best


def on(device: torch.device, targets: Any) -> Any:
    """Return targets with every tensor on the device."""
    moved = {
        name: value.to(device)
        for name, value in vars(targets).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(targets, **moved)


def check_kernels(device: torch.device) -> dict[str, Any]:
    """Compare the kernels with the functions that they implement, on random cases."""
    if device.type == "cpu" or find_spec("triton") is None:
        return {"skipped": "needs a CUDA device and Triton"}
    from test_losses import case

    from persea.losses.triton_kernels import triton_event_kl

    worst = 0.0
    for seed in range(20):
        one = case(seed)
        targets = [t.targets for t in one.teachers]
        known = event_kl_per_token(one.logits_NV, one.labels_N, targets, 0.7)
        gradient = torch.empty_like(one.logits_NV)
        known.write_gradient(one.logits_NV, gradient)
        logits = one.logits_NV.to(device)
        loss = triton_event_kl(
            logits, one.labels_N.to(device), [on(device, t) for t in targets], 0.7
        )[0]
        worst = max(worst, float((loss.cpu() - known.loss_N).abs().max()))
        worst = max(worst, float((logits.cpu() - gradient).abs().max()))
    return {"cases": 20, "largest_difference": worst, "ok": worst < TOLERANCE}


def check_head(device: torch.device) -> dict[str, Any]:
    """Time the head's forward and backward pass, and the products that it cannot do without."""
    is_cpu = device.type == "cpu"
    tokens, hidden, vocabulary = (64, 64, 2048) if is_cpu else (4096, 2048, 131_072)
    dtype = torch.float32 if is_cpu else torch.bfloat16
    h = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, device=device, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), device=device)

    def step() -> None:
        h.grad = weight.grad = None
        loss = event_kl_loss_from_hidden(h, LMHead(weight, vocabulary), labels, [], 0.7).loss
        loss.backward()

    a, b = h.detach(), weight.detach().to(dtype)
    product = seconds(device, lambda: a @ b.T)
    whole = seconds(device, step)
    memory = None if is_cpu else torch.cuda.max_memory_allocated(device)
    return {
        "tokens": tokens,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "dtype": str(dtype).removeprefix("torch."),
        "product_s": product,
        "head_s": whole,
        "times_the_roofline": whole / (MATRIX_PRODUCTS * product),
        "peak_bytes": memory,
    }


def check_run(name: str, overrides: list[str], is_cpu: bool) -> dict[str, Any]:
    """Run the quickstart's recipe, shortened, in a process of its own."""
    if name in NEEDS_BITSANDBYTES and (is_cpu or find_spec("bitsandbytes") is None):
        return {"skipped": "needs a CUDA device and bitsandbytes"}
    short = {"training.steps": 6, "training.batch_size": 8, "training.checkpoint_every": 6}
    short |= {
        "training.precision": "bfloat16",
        "audition.compare_with_base": "false",
        "evaluation.items": 4,
    }
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    short |= {f"audition.pinned.{skill}": teacher for skill, teacher in PINNED.items()}
    short |= {f"corpus.{k}.generate": 16 for k in range(len(recipe["corpus"]))}
    sets = [f"{key}={value}" for key, value in short.items()] + overrides
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "persea.cli", "run"]
        command += [str(ROOT / "recipes" / "quickstart.yaml"), "--out", f"{out}/run"]
        command += [word for one in sets for word in ("--set", one)]
        begin = time.perf_counter()
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        took = time.perf_counter() - begin
        log = Path(out) / "run" / "train" / "metrics.jsonl"
        losses = (
            [json.loads(line)["loss"] for line in log.read_text().splitlines()]
            if log.is_file()
            else []
        )
    result = {"ok": ended.returncode == 0, "seconds": round(took, 1), "losses": losses}
    return result if result["ok"] else result | {"error": ended.stderr.strip()[-400:]}


def main() -> None:
    """Run the checks, print them, and exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="check this script, without a device")
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.accelerator.is_available():
        sys.stderr.write("bench/gpu.py: no accelerator here -> run it on a machine with a GPU\n")
        sys.exit(7)
    device = torch.device("cpu")
    if not arguments.cpu:
        device = torch.accelerator.current_accelerator() or device
    is_cpu = device.type == "cpu"
    name = "cpu" if is_cpu else torch.get_device_module(device).get_device_name()
    results: dict[str, Any] = {"device": name, "torch": torch.__version__}
    checks: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("kernels", lambda: check_kernels(device)),
        ("head", lambda: check_head(device)),
        ("step_bf16", lambda: check_run("step_bf16", [], is_cpu)),
    ]
    if not is_cpu:
        checks += [
            (name, lambda name=name, sets=sets: check_run(name, sets, is_cpu))
            for name, sets in TRAINING.items()
        ]
    for key, check in checks:
        results[key] = check()
        print(key, json.dumps(results[key]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(one.get("ok") is False for one in results.values() if isinstance(one, dict)))


if __name__ == "__main__":
    main()
