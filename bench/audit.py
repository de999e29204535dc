"""How well `persea audit` tells taught students from untaught ones, on the saplings.

    python bench/audit.py [canaries|teachers] [--work FOLDER]     (make bench-audit, 10 CPU minutes)

- canaries: eight small runs, each with a key and prompts of its own, train the llama-sapling. Each
  student is audited with the canaries of its own run, and with those of another run, which it
  never saw; the untrained base with those of all. That is 8 taught checks and 16 untaught ones.
- teachers: students of one teacher (three teachers, four seeds), students of reference answers and
  students of their own base's draws. Each is audited for each of the three teachers. A check is
  untaught if that teacher did not teach that student.

Writes bench/results/audit.json. What is there already stays, so the two parts may run apart. Runs,
students' scores and drawn texts are kept in the work folder (runs/audit): a bench that was stopped
continues there. Delete the folder to begin again with other keys.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from persea.cache.canaries import read_pairs  # noqa: E402
from persea.chat.messages import Conversation, Text  # noqa: E402
from persea.config.recipe import load_recipe  # noqa: E402
from persea.data.prompts import Prompt  # noqa: E402
from persea.evaluation.audit import (  # noqa: E402
    ALPHA,
    MIN_Z,
    Finding,
    compare_teachers,
    count_preferred,
)
from persea.pipeline.audit import (  # noqa: E402
    Suspect,
    audit_prompts,
    draw_texts,
    score_answers,
    score_texts,
    subtract,
)
from persea.pipeline.model_refs import silence_transformers  # noqa: E402
from persea.pipeline.run_context import RunContext  # noqa: E402
from persea.pipeline.stages import run_pipeline  # noqa: E402
from persea.tasks.generated import find_generated_task  # noqa: E402
from persea.tasks.task import Split, TaskItem  # noqa: E402
from persea.teachers.teacher import Teacher  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "audit.json"
SAPLINGS = ROOT / "saplings"
TEACHERS = ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling")
BASE = "llama-sapling"
SKILLS = ("languages", "code", "reasoning")

NUM_RUNS, NUM_PROMPTS, NUM_CANARIES = 8, 80, 64
CANARY_STEPS, CANARY_BATCH = 160, 16  # 32 passes over a run's answers
NUM_OTHER_RUNS = 1  # whose canaries each student is audited with besides its own
SEEDS, NUM_UNTAUGHT = 4, 13  # students of each teacher; of reference answers, and of own draws
POOL, NUM_SAMPLES, NUM_STEPS, BATCH, LEARNING_RATE = 60, 36, 40, 8, 2e-3
PROMPTS_A_SKILL = 12
SHORT, LONG = 48, 64  # tokens of an answer


def log(text: str) -> None:
    """Print a line with the CPU seconds so far."""
    print(f"[{time.process_time():.0f} CPU s] {text}", flush=True)


def record(part: str, values: dict[str, Any]) -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(found | {part: values}, indent=1) + "\n")


# --- canaries ---


def train_run(seed: int, folder: Path) -> Path:
    """Capture and train one run with canaries, or continue it; return its folder."""
    recipe_file = folder / f"{seed}.yaml"
    teacher = TEACHERS[seed % 2]
    skill = "languages" if seed % 2 == 0 else "code"
    recipe_file.write_text(
        json.dumps(
            {
                "name": f"canaries-{seed}",
                "seed": seed,
                "threads": 1,
                "student": {"model": str(SAPLINGS / BASE)},
                "teachers": [{"model": str(SAPLINGS / teacher)}],
                "corpus": [{"skill": skill, "generate": NUM_PROMPTS}],
                "audition": {"compare_with_base": False},
                "capture": {"max_new_tokens": SHORT, "canaries": NUM_CANARIES},
                "training": {
                    "steps": CANARY_STEPS,
                    "batch_size": CANARY_BATCH,
                    "learning_rate": 2e-3,
                    "warmup_steps": 10,
                    "precision": "float32",
                    "save_dtype": "float32",
                    "max_length": 512,
                },
            }
        )
    )
    out = folder / f"run-{seed}"
    context = RunContext(load_recipe(recipe_file), out)
    for stage in ("capture", "train"):
        run_pipeline(context, lambda stage, share, text: None, stage)
    log(f"run {seed}: {teacher} taught {skill}")
    return out


def bench_canaries(folder: Path) -> None:
    """Audit every student with its own canaries and another run's, and the untrained base too."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [train_run(seed, folder) for seed in range(NUM_RUNS)]
    pairs = [read_pairs(run) for run in runs]
    own, others, of_base = [], [], []
    for k, model in enumerate([*(r / "train" / "student" for r in runs), SAPLINGS / BASE]):
        suspect = Suspect(str(model)).open(64)
        for j, some in enumerate(pairs):
            if k < NUM_RUNS and (j - k) % NUM_RUNS > NUM_OTHER_RUNS:
                continue
            texts: list[Conversation] = [a for p in some for a in p.answers]
            test = count_preferred(
                f"student {k}" if k < NUM_RUNS else BASE,
                score_answers(suspect, texts).reshape(-1, 2),
                [p.learned for p in some],
            )
            entry = test.to_json() | {"run": j}
            (own if j == k else of_base if k == NUM_RUNS else others).append(entry)
            log(f"{entry['suspect']}, run {j}: {test.preferred} of {test.tested}, {test.p_value:g}")
    untaught = [*others, *of_base]
    found = {
        "prompts_of_a_run": NUM_PROMPTS,
        "canaries_of_a_run": NUM_CANARIES,
        "steps": CANARY_STEPS,
        "batch_size": CANARY_BATCH,
        "taught": len(own),
        "taught_found_at_.001": sum(t["p_value"] < 1e-3 for t in own),
        "largest_taught_p": max(t["p_value"] for t in own),
        "untaught": len(untaught),
        "untaught_found_at_.01": sum(t["p_value"] <= ALPHA for t in untaught),
        "smallest_untaught_p": min(t["p_value"] for t in untaught),
        "own": own,
        "other_runs": others,
        "base": of_base,
    }
    log(json.dumps({k: v for k, v in found.items() if not isinstance(v, list)}, indent=1))
    record("canaries", found)


# --- teachers ---


def training_items(seed: int, count: int) -> list[TaskItem]:
    """Return training questions of each skill, other ones for other seeds."""
    return [
        item
        for skill in SKILLS
        for item in find_generated_task(skill).items(Split.TRAIN, count // len(SKILLS), seed)
    ]


def train_student(texts: list[Conversation], seed: int) -> Teacher:
    """Train the base on texts by plain cross-entropy, and return it ready to score."""
    student = Suspect(str(SAPLINGS / BASE)).open(64)
    model: Any = student.engine.model  # type: ignore[attr-defined]
    rendered = [student.renderer.render(t) for t in texts]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    generator = np.random.default_rng(seed)
    model.train()
    for _ in range(NUM_STEPS):
        batch = [rendered[i] for i in generator.integers(0, len(rendered), BATCH)]
        longest = max(map(len, batch))
        ids_BS = torch.zeros(BATCH, longest, dtype=torch.long)
        labels_BS = torch.full((BATCH, longest), -100)
        for row, tokens in enumerate(batch):
            ids = torch.tensor(tokens.ids_T, dtype=torch.long)
            ids_BS[row, : len(ids)] = ids
            learned = torch.tensor(tokens.loss_mask_T)
            labels_BS[row, : len(ids)][learned] = ids[learned]
        logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BSV[:, :-1].flatten(0, 1).float(), labels_BS[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return student


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return the JSON value of a file, or make it and write it there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(make()))
        partial.replace(path)
        log(f"{path.parent.name}/{path.stem}")
    return json.loads(path.read_text())


def conversations(values: list[Any]) -> list[Conversation | None]:
    return [v and Conversation.from_json(v) for v in values]


def bench_teachers(folder: Path) -> None:
    """Audit taught and untaught students for each teacher, with leave-one-out calibration."""
    prompts = audit_prompts(SKILLS, PROMPTS_A_SKILL)

    def texts_of(name: str, prompts: list[Prompt], tokens: int, seed: int) -> Callable[[], Any]:
        def draw() -> list[Any]:
            writer = Suspect(str(SAPLINGS / name)).open(64)
            return [c and c.to_json() for c in draw_texts(writer, prompts, tokens, seed)]

        return draw

    texts = {
        name: conversations(
            kept(folder / "texts" / f"{name}.json", texts_of(name, prompts, SHORT, 1000))
        )
        for name in TEACHERS
    }
    pool_prompts = [i.prompt for i in training_items(50, POOL)]
    pools = {
        name: conversations(
            kept(folder / "pools" / f"{name}.json", texts_of(name, pool_prompts, LONG, 50))
        )
        for name in (*TEACHERS, BASE)
    }
    base = score_texts(Suspect(str(SAPLINGS / BASE)).open(64), texts)
    students: list[tuple[str, dict[str, Any]]] = []

    def add(taught_by: str, lessons: list[Conversation], seed: int) -> None:
        def gains() -> dict[str, Any]:
            found = subtract(score_texts(train_student(lessons, seed), texts), base)
            return {name: [float(v) for v in gain_N] for name, gain_N in found.items()}

        path = folder / "students" / f"{taught_by.replace(' ', '-')}-{seed}.json"
        found = {name: np.asarray(v) for name, v in kept(path, gains).items()}
        students.append((taught_by, found))

    def some_of(pool: list[Conversation | None], seed: int) -> list[Conversation]:
        complete = [c for c in pool if c]
        chosen = np.random.default_rng(seed).permutation(len(complete))[:NUM_SAMPLES]
        return [complete[i] for i in chosen]

    for seed in range(NUM_UNTAUGHT):
        for teacher in TEACHERS if seed < SEEDS else ():
            add(teacher, some_of(pools[teacher], seed), seed)
        references = [
            i.prompt.conversation.with_answer(Text(i.reference))
            for i in training_items(100 + seed, NUM_SAMPLES)
        ]
        add("reference answers", references, seed)
        add("own draws", some_of(pools[BASE], seed), seed)
        if (seed + 1) % SEEDS == 0 or seed + 1 == NUM_UNTAUGHT:
            record("teachers", judge(students))


def judge(students: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Compare every student with every teacher; each is calibrated by the others."""
    checks = []
    top_1 = 0
    for k, (taught_by, gains) in enumerate(students):
        untaught = [g for j, (by, g) in enumerate(students) if j != k and by not in TEACHERS]
        plain = compare_teachers(taught_by, BASE, gains, TEACHERS)
        calibrated = compare_teachers(taught_by, BASE, gains, TEACHERS, (), untaught)
        top_1 += calibrated.teachers[0].teacher == taught_by
        by_name = {e.teacher: e for e in plain.teachers}
        checks += [
            {
                "student": k,
                "taught_by": taught_by,
                "teacher": e.teacher,
                "prompts": e.prompts,
                "effect": round(e.effect, 5),
                "p": e.p_value,
                "p_every": e.p_every,
                "z": round(e.z or 0, 2),
                "found": e.finding is not Finding.NO_EVIDENCE,
                "found_marks": e.finding is Finding.MARKS,
                "found_without_calibration": by_name[e.teacher].finding is not Finding.NO_EVIDENCE,
                "marks_without_calibration": by_name[e.teacher].finding is Finding.MARKS,
            }
            for e in calibrated.teachers
        ]
    taught = [c for c in checks if c["taught_by"] == c["teacher"]]
    untaught_checks = [c for c in checks if c["taught_by"] != c["teacher"]]
    found: dict[str, Any] = {
        "alpha": ALPHA,
        "min_z": MIN_Z,
        "students": len(students),
        "planned_students": SEEDS * len(TEACHERS) + 2 * NUM_UNTAUGHT,
        "taught": len(taught),
        "top_1": top_1,
        "untaught_checks": len(untaught_checks),
    }
    for key in (
        "found",
        "found_marks",
        "found_without_calibration",
        "marks_without_calibration",
    ):
        found[f"taught_{key}"] = sum(c[key] for c in taught)
        found[f"untaught_{key}"] = sum(c[key] for c in untaught_checks)
    log(json.dumps(found, indent=1))
    return found | {"checks": checks}


def main() -> None:
    """Run the parts that are named, or both."""
    torch.set_num_threads(1)
    silence_transformers()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["canaries", "teachers"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "audit")
    given = parser.parse_args()
    for part in given.parts:
        {"canaries": bench_canaries, "teachers": bench_teachers}[part](given.work / part)


if __name__ == "__main__":
    main()
