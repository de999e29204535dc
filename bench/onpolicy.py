"""Compare a student that trains on its own answers too with one that trains on its teachers' alone.

    python bench/onpolicy.py [seeds] [items]

3 seeds, 200 items per task; about 15 minutes per seed, 8 where bench/results.py has run.

For each seed two students of recipes/quickstart.yaml share one audition and one capture: "off"
trains on the teachers' answers to the end, "on" also on its own, as in recipes/onpolicy.yaml. Until
that starts both are the same, bit for bit. Measured: held-out answers by task and thinking effort
(reasoning at high effort and code are the long ones), bits per byte of reference answers, and
answers with unasked thinking or without requested thinking. Differences are paired by item over all
seeds, with 95 % intervals. Resumable: the students are in runs/onpolicy/SEED/, the first of them in
runs/results/SEED/ as bench/results.py leaves it. Writes bench/results/onpolicy.json and prints the
table.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import yaml
from results import ALL, ROOT, made, reference_bits
from results import RUNS as OFF

from persea import storage as store
from persea.chat.messages import FinishReason, ThinkingEffort
from persea.models.loading import set_threads
from persea.pipeline.model_refs import STUDENT
from persea.pipeline.run_context import RunContext
from persea.tasks.intervals import CONFIDENCE_LEVEL, paired_difference_interval
from persea.tasks.task import Split, grade_answers

RUNS, OUT = ROOT / "runs" / "onpolicy", ROOT / "bench" / "results" / "onpolicy.json"
TERMS = yaml.safe_load((ROOT / "recipes" / "onpolicy.yaml").read_text())["training"]["on_policy"]


def measured(context: RunContext, items: int) -> dict[str, Any]:
    """Measure a trained student, and keep the result beside its weights.

    "task effort" -> score of each item, and the number of answers with unasked or missing thinking;
    bits per byte; the data it trained on.
    """
    path = context.folder / f"told-{items}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    set_threads(context.recipe.threads)
    student, found, nats, size = (
        context.models.load_participant(STUDENT, 200),
        dict[str, Any](),
        0.0,
        0,
    )
    for skill, some in ((s, s.items(Split.TEST, items, context.recipe.seed)) for s in ALL):
        for effort in context.taught_efforts.get(skill.name, (ThinkingEffort.NONE,)):
            answers = student.answer(
                [replace(i.prompt, effort=effort) for i in some],
                context.recipe.evaluation.max_new_tokens,
            )
            answered = [(a.conversation.messages[-1], a.finish) for a in answers]
            thought = [
                bool(m.thinking) or (finish is not FinishReason.STOP and not m.text and not m.calls)
                for m, finish in answered
            ]
            found[f"{skill.name} {effort}"] = {
                "values": [r.value for r in grade_answers(skill, some, answered)],
                "leaks": sum(one is (effort is ThinkingEffort.NONE) for one in thought),
            }
        can = [
            i.reference_conversation for i in some if student.can_render(i.reference_conversation)
        ]
        nats += reference_bits(student, can)
        size += sum(len(p.text.encode()) for c in can for p in c.messages[-1].parts)
    lines = [
        json.loads(line)
        for line in (context.folder / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    own = [line for line in lines if "reverse_kl" in line["terms"]]
    out = {
        "answers": found,
        "bits_per_byte": nats / size,
        "seconds": context.stages.read_record("train")["seconds"],
        "positions": lines[-1]["positions"],
        "own": {
            "lines": len(own),
            "left_out": float(np.mean([line["terms"]["rollouts_left_out"] for line in own])),
        }
        if own
        else None,
    }
    store.write_json(path, out)
    return out


def table(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by task and effort, both students' means over seeds, on - off with its interval,
    leaks.
    """
    out: dict[str, Any] = {}
    for key in seeds[0]["off"]["answers"]:
        on, off = (
            np.concatenate([one[arm]["answers"][key]["values"] for one in seeds])
            for arm in ("on", "off")
        )
        low, high = paired_difference_interval(on, off)
        out[key] = {
            "on": round(float(on.mean()), 4),
            "off": round(float(off.mean()), 4),
            "difference": round(float(on.mean() - off.mean()), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "n": len(on),
            "leaks": {
                arm: sum(one[arm]["answers"][key]["leaks"] for one in seeds)
                for arm in ("on", "off")
            },
        }
    return out


def main() -> None:
    seeds, items = (int(a) for a in (*sys.argv[1:], *("3", "200")[len(sys.argv) - 1 :]))
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        sets = [f"seed={seed}"]
        off = made(OFF / str(seed) / "student", sets, "audition", "capture", "train")
        on = made(
            RUNS / str(seed) / "on",
            [*sets, f"training.on_policy={json.dumps(TERMS)}"],
            "train",
            reuse=off.folder,
        )
        found.append({"off": measured(off, items), "on": measured(on, items)})
        out = {
            "seeds": len(found),
            "items": items,
            "confidence": CONFIDENCE_LEVEL,
            "on_policy": TERMS,
            "table": table(found),
            "bits_per_byte": {
                arm: [round(one[arm]["bits_per_byte"], 4) for one in found] for arm in ("on", "off")
            },
            "training": {
                arm: [{k: one[arm][k] for k in ("seconds", "positions", "own")} for one in found]
                for arm in ("on", "off")
            },
        }
        OUT.write_text(json.dumps(out, indent=1) + "\n")
    print("skill and mode      on    off   difference            leaks on off")
    for key, row in out["table"].items():
        print(
            f"{key:18} {row['on']:.3f} {row['off']:.3f} {row['difference']:+.3f} "
            f"({row['low']:+.3f} to {row['high']:+.3f})  {row['leaks']['on']:4} "
            f"{row['leaks']['off']:4}  of {row['n']}"
        )
    print("bits/byte", out["bits_per_byte"])


if __name__ == "__main__":
    main()
