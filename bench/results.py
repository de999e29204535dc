"""The quickstart with several seeds: does the table stand on one lucky run?

    python bench/results.py [seeds]             (make results)

Runs recipes/quickstart.yaml with seeds 0..seeds-1 (prompts, order and sampling of rows change; saplings stay) and n = 400 test
items a skill. Writes bench/results/quickstart.json and prints mean, least and most of each score.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    reports = []
    for seed in range(seeds):
        out = ROOT / "runs" / f"results-{seed}"
        command = [sys.executable, "-m", "persea.cli", "quickstart", "--set", f"seed={seed}", "--set", "evaluation.items=400", "--out", str(out)]
        subprocess.run(command, check=True)
        reports.append(json.loads((out / "report" / "report.json").read_text()))
    table = {}
    for skill in reports[0]["skills"]:
        rows = [r["skills"][skill] for r in reports]
        teachers = {t: [row["teachers"][t]["value"] for row in rows] for t in rows[0]["teachers"]}
        table[skill] = {"student": [row["student"]["value"] for row in rows], "base": [row["base"]["value"] for row in rows],
                        "retained": [row["retained"] for row in rows], "teachers": teachers}
    bits = {who: [r["bits_per_byte"][who]["all"] for r in reports] for who in reports[0]["bits_per_byte"]}
    spent = [sum(r["seconds"].values()) for r in reports]
    result = {"seeds": seeds, "items": 400, "skills": table, "bits_per_byte": bits, "seconds": spent}
    (ROOT / "bench" / "results" / "quickstart.json").write_text(json.dumps(result, indent=1) + "\n")
    for skill, row in table.items():
        print(f"{skill:10} student {mean(row['student']):.3f} ({min(row['student']):.3f}-{max(row['student']):.3f})")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
