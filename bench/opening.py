"""CPU seconds and memory to open two tokenizers, for the first time and again.

    python bench/opening.py TEACHER STUDENT TEACHER_TOKENIZER [repeats] [row ...]

Each row is a process of its own: the interpreter with `import persea`, one renderer, both renderers
with their event map, the same and a first encoding (which parses both tokenizers), `persea plan`
and `persea check` without weights. `first` has an empty PERSEA_HOME, `again` the one that the first
left behind; the median of the repeats. User and system time of the process, peak resident memory.
Writes bench/results/opening.json after each row; with names of rows only these are measured.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RENDERERS = """
import sys
from persea.alignment.event_map import load_event_map
from persea.models.loading import ModelSource, load_renderer
models = [ModelSource(m, tokenizer=t) for m, t in zip(sys.argv[1::2], sys.argv[2::2])]
opened = [load_renderer(m) for m in models]
if len(opened) == 2:
    load_event_map(*opened)
"""
ENCODING = """
for renderer in opened:
    renderer.vocabulary.encode("hello")
"""
KEYS = ("cpu_s", "wall_s", "peak_mb")
PACKAGES = ("tokenizers", "transformers")
RECIPE = """
student: {{model: {student}, adapt: lora, lora: {{rank: 8, targets: [q_proj]}}}}
teachers:
  - {{name: teacher, model: {teacher}, tokenizer: {tokenizer}}}
corpus: [{{skill: languages, generate: 20}}]
training: {{steps: 10, batch_size: 4}}
audition: {{items: 20}}
evaluation: {{items: 5}}
capture: {{answers: given}}
check: {{measure_likelihood: false}}
"""


def run(command: Sequence[str], home: Path) -> tuple[float, float, float]:
    """Run a command; return its CPU seconds, wall seconds and peak memory in MB."""
    import time

    began = time.monotonic()
    environment = {**os.environ, "PERSEA_HOME": str(home), "OMP_NUM_THREADS": "1"}
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, *command],
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command)[:200]}: exit {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began, usage.ru_maxrss / 1024


def main(
    teacher: str, student: str, tokenizer: str, repeats: int = 3, only: Sequence[str] = ()
) -> None:
    out = Path(__file__).parent / "results" / "opening.json"
    rows: dict[str, Any] = json.loads(out.read_text())["rows"] if only else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            RECIPE.format(teacher=teacher, student=student, tokenizer=tokenizer or teacher)
        )
        verbs = {
            verb: ["-m", "persea.cli", verb, str(recipe), "--out", str(folder / "run")]
            for verb in ("plan", "check")
        }
        commands: dict[str, list[str]] = {
            "import persea": ["-c", "import persea"],
            "teacher": ["-c", RENDERERS, teacher, tokenizer],
            "student": ["-c", RENDERERS, student, ""],
            "both, event map": ["-c", RENDERERS, teacher, tokenizer, student, ""],
            "both, event map, first encoding": [
                "-c",
                RENDERERS + ENCODING,
                teacher,
                tokenizer,
                student,
                "",
            ],
            **verbs,
        }
        for title, command in commands.items():
            if only and title not in only:
                continue
            measured: dict[str, list[tuple[float, float, float]]] = {"first": [], "again": []}
            for _ in range(repeats):
                shutil.rmtree(folder / "home", ignore_errors=True)
                for found in measured.values():
                    shutil.rmtree(folder / "run", ignore_errors=True)
                    found.append(run(command, folder / "home"))
            rows[title] = {"repeats": repeats, "load": round(os.getloadavg()[0], 1)} | {
                when: {
                    key: round(statistics.median(values), 2)
                    for key, values in zip(KEYS, zip(*found, strict=True), strict=True)
                }
                for when, found in measured.items()
            }
            print(f"{title:32}", rows[title], flush=True)
            result = {
                "teacher": Path(tokenizer or teacher).name,
                "student": Path(student).name,
                "cpus": os.cpu_count(),
                "python": platform.python_version(),
                **{package: metadata.version(package) for package in PACKAGES},
                "rows": rows,
            }
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int((*sys.argv[4:5], "3")[0]), sys.argv[5:])
