"""How well `persea audit` tells taught students from untaught ones, on the saplings.

    python bench/audit.py [canaries|teachers]        (make bench-audit, 8 minutes of CPU)

- canaries: eight small runs, each with a key and prompts of its own, train the llama-sapling. Each
  student is audited with the canaries of its own run, and with those of two other runs, which it
  never saw; the untrained base with those of all.
- teachers: students of one teacher (three teachers, four seeds), students of reference answers and
  students of their own base's draws. Each is audited for each of the three teachers. A check is
  untaught if that teacher did not teach that student.

Writes bench/results/audit.json. What is there already stays, so the two parts may run apart.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
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

NUM_RUNS, NUM_PROMPTS, NUM_CANARIES = 8, 60, 48
NUM_OTHER_RUNS = 2  # whose canaries each student is audited with besides its own
SEEDS, NUM_UNTAUGHT = 4, 13  # students of each teacher; of reference answers, and of own draws
POOL, NUM_SAMPLES, NUM_STEPS, BATCH, LEARNING_RATE = 60, 36, 40, 8, 2e-3
PROMPTS_A_SKILL = 12
SHORT, LONG = 48, 64  # tokens of an answer


def log(text: str) -> None:
    print(text, flush=True)


def record(part: str, values: dict[str, Any]) -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(found | {part: values}, indent=1) + "\n")


# --- canaries ---


def train_run(seed: int, folder: Path) -> Path:
    """Capture and train one run with canaries; return its folder."""
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
                    "steps": 70,
                    "batch_size": 8,
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


def bench_canaries() -> None:
    """Audit every student with the canaries of every run, and the untrained base too."""
    with tempfile.TemporaryDirectory() as name:
        runs = [train_run(seed, Path(name)) for seed in range(NUM_RUNS)]
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
    untaught = [*others, *of_base]
    found = {
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


def draws(model: str, prompts: list[Prompt], seed: int) -> list[Conversation]:
    """Return a model's complete answers to prompts."""
    teacher = Suspect(str(SAPLINGS / model)).open(64)
    return [c for c in draw_texts(teacher, prompts, LONG, seed) if c]


def bench_teachers() -> None:
    """Audit taught and untaught students for each teacher, with leave-one-out calibration."""
    prompts = audit_prompts(SKILLS, PROMPTS_A_SKILL)
    texts = {
        name: draw_texts(Suspect(str(SAPLINGS / name)).open(64), prompts, SHORT, 1000)
        for name in TEACHERS
    }
    base = score_texts(Suspect(str(SAPLINGS / BASE)).open(64), texts)
    students: list[tuple[str, dict[str, Any]]] = []

    def add(taught_by: str, lessons: list[Conversation], seed: int) -> None:
        gains = subtract(score_texts(train_student(lessons, seed), texts), base)
        students.append((taught_by, gains))
        log(f"student {len(students)}: {taught_by}")

    pool_prompts = [i.prompt for i in training_items(50, POOL)]
    pools = {name: draws(name, pool_prompts, 50) for name in (*TEACHERS, BASE)}

    def some_of(pool: list[Conversation], seed: int) -> list[Conversation]:
        chosen = np.random.default_rng(seed).permutation(len(pool))[:NUM_SAMPLES]
        return [pool[i] for i in chosen]

    for seed in range(NUM_UNTAUGHT):
        for teacher in TEACHERS if seed < SEEDS else ():
            add(teacher, some_of(pools[teacher], seed), seed)
        references = [
            i.prompt.conversation.with_answer(Text(i.reference))
            for i in training_items(100 + seed, NUM_SAMPLES)
        ]
        add("reference answers", references, seed)
        add("own draws", some_of(pools[BASE], seed), seed)
        if seed >= SEEDS:  # enough untaught students for a calibration
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
    parts = sys.argv[1:] or ["canaries", "teachers"]
    for part in parts:
        {"canaries": bench_canaries, "teachers": bench_teachers}[part]()


if __name__ == "__main__":
    main()
