"""python -m bench.plan_size: cost of plans of a million prompts and of 236 billion tokens."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
student: {{model: {root}/saplings/llama-sapling}}
teachers: [{{model: {root}/saplings/qwen-sapling}}]
corpus: [{{skill: languages, file: prompts.jsonl}}]
training: {{steps: 100000}}
"""


def measure(arguments: list[str], folder: Path) -> dict[str, float]:
    """Return CPU seconds and peak memory of a command of persea."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "persea.cli", *arguments],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": round(cpu, 1), "peak_mb": round(after.ru_maxrss / 1000)}


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fleet = str(ROOT / "recipes" / "avocado-236b.yaml")
        results["236 billion tokens"] = measure(
            ["plan", fleet, "--hardware", "512xH200", "--json"], folder
        )
        with (folder / "prompts.jsonl").open("w") as file:
            for k in range(1_000_000):
                row = {"prompt": f"How much is {k} plus {k % 97}? " + "Say why. " * (k % 40)}
                file.write(json.dumps(row) + "\n")
        (folder / "large.yaml").write_text(RECIPE.format(root=ROOT))
        results["a million prompts"] = measure(["plan", "large.yaml", "--json"], folder)
    path = ROOT / "bench" / "results" / "plan_size.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
