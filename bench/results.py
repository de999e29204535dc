"""The quickstart with several seeds, and what it must be compared with: does the table stand, and is one student of three teachers worth it?

    python bench/results.py [seeds] [items]     (make results: 3 seeds, 400 items a skill)

For each seed (prompts, order and sampling of rows change; saplings stay), beside the quickstart's own student:

    only NAME    a student of that teacher alone, asked every prompt of the recipe
    oracle NAME  a student of that teacher's own skills alone, as many steps; the routed oracle takes the best of these, skill by skill
    sft          a student of the same answers, by cross-entropy alone (training.event_share = 0)
    balance HOW  a student of the same answers, teachers' skills balanced as the recipe's student is not (training.balance)

Goes on where it was: every student stands in runs/results/SEED/, measured.json beside it. Writes bench/results/quickstart.json and prints
the table. Headroom reached = (student - base) / (oracle - base).
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from persea.balance import Balance
from persea.measure import Split, grade, score
from persea.recipe import load_recipe
from persea.river import BASE, STUDENT, River, set_threads
from persea.teacher import Teacher

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
RUNS = ROOT / "runs" / "results"
OUT = ROOT / "bench" / "results" / "quickstart.json"


def made(out: Path, sets: list[str], *verbs: str, reuse: Path | None = None) -> River:
    """The run folder after these stages; audition and capture taken over from another run's where they are the same."""
    if reuse is not None and not out.exists():
        for stage in ("audition", "capture"):
            shutil.copytree(reuse / stage, out / stage)
    for verb in verbs:
        subprocess.run([sys.executable, "-m", "persea.cli", verb, str(RECIPE), *(a for s in sets for a in ("--set", s)), "--out", str(out)],
                       check=True, stdout=subprocess.DEVNULL)
    return River(load_recipe(RECIPE, sets), out)


def measured(river: River, name: str, items: int) -> dict[str, Any]:
    """Scores with intervals, and bits per byte of the held-out reference answers, of one speaker of a run; kept beside its weights."""
    path = river.folder / f"measured-{name}-{items}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    set_threads(river.recipe.threads)
    speaker, settings = river.speaker(name, 200), river.recipe.evaluation
    scores, bits, size = {}, 0.0, 0
    for skill, some in ((s, s.items(Split.TEST, items, river.recipe.seed)) for s in ALL):
        answers = speaker.answer([i.prompt for i in some], settings.max_new_tokens)
        results = grade(skill, some, [(a.conversation.messages[-1], a.finish) for a in answers])
        scores[skill.name] = score(name, skill.name, results, speaker.effort).to_json()
        said = [i.answered for i in some if speaker.can_say(i.answered)]
        bits += surprise(speaker, said)
        size += sum(len(p.text.encode()) for c in said for p in c.messages[-1].parts)
    found = {"scores": scores, "bits_per_byte": bits / size}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def surprise(speaker: Teacher, said: list[Any]) -> float:
    """Bits spent on the last message of each conversation: content and the token that ends it."""
    nats = 0.0
    for tokens, logprobs_NW in speaker.score(said):
        learned = np.flatnonzero(tokens.learn_T)
        picked_N = logprobs_NW.numpy()[np.arange(len(learned)), tokens.ids_T[learned]]
        nats -= float(picked_N[tokens.starts_T[learned] >= 0].astype(np.float64).sum())
    return nats / math.log(2)


ALL = River(load_recipe(RECIPE), RUNS).skills


def one_seed(seed: int, items: int, so_far: list[dict[str, Any]]) -> dict[str, Any]:
    """Every student of a seed, measured; what is measured so far is written down beside the seeds before."""
    folder, sets = RUNS / str(seed), [f"seed={seed}"]
    main = made(folder / "student", sets, "audition", "capture", "train")
    teachers, corpus = list(main.voices), main.recipe.corpus
    cast = {skill: parts[0][0] for skill, parts in main.cast.parts.items()}
    found = {name: measured(main, name, items) for name in (STUDENT, BASE, *teachers)}
    found["sft"] = measured(made(folder / "sft", [*sets, "training.event_share=0"], "train", reuse=main.folder), STUDENT, items)
    for how in (b for b in Balance if b is not main.recipe.training.balance):
        other = made(folder / f"balance-{how}", [*sets, f"training.balance={how}"], "train", reuse=main.folder)
        found[f"balance {how}"] = measured(other, STUDENT, items)
    write(items, {"runs": [*so_far, found]})
    for name in teachers:
        pinned = json.dumps(dict.fromkeys(cast, name))
        only = made(folder / f"only-{name}", [*sets, f"audition.pinned={pinned}"], "audition", "capture", "train")
        found[f"only {name}"] = measured(only, STUDENT, items)
        mine = [p.model_dump(exclude_defaults=True, mode="json") for p in corpus if cast[p.skill] == name]
        if mine:
            routed = made(folder / f"oracle-{name}", [*sets, f"corpus={json.dumps(mine)}"], "capture", "train", reuse=main.folder)
            found[f"oracle {name}"] = measured(routed, STUDENT, items)
        write(items, {"runs": [*so_far, found]})
    return found


def write(items: int, found: dict[str, Any]) -> None:
    OUT.write_text(json.dumps({"seeds": len(found["runs"]), "items": items, **found}, indent=1) + "\n")


def told(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """skill -> means over seeds: student, base, best teacher, oracle, SFT, share kept, headroom reached."""
    table = {}
    for skill in (s.name for s in ALL):
        def mean(name: str, skill: str = skill) -> float:
            return sum(one[name]["scores"][skill]["value"] for one in seeds) / len(seeds)

        teachers = [n for n in seeds[0] if f"only {n}" in seeds[0]]
        best, oracle = max(map(mean, teachers)), max(mean(n) for n in seeds[0] if n.startswith("oracle "))
        table[skill] = {"student": mean(STUDENT), "base": mean(BASE), "best_teacher": best, "oracle": oracle, "sft": mean("sft"),
                        "kept": mean(STUDENT) / best, "headroom": (mean(STUDENT) - mean(BASE)) / (oracle - mean(BASE)),
                        "balance": {n.split()[1]: mean(n) for n in seeds[0] if n.startswith("balance ")},
                        "only": {n: mean(f"only {n}") / best for n in teachers},
                        "seeds": [one[STUDENT]["scores"][skill]["value"] for one in seeds]}
    return table


def main() -> None:
    seeds, items = (int(a) for a in (*sys.argv[1:], *("3", "400")[len(sys.argv) - 1:]))
    found = []
    for seed in range(seeds):
        found.append(one_seed(seed, items, found))
        table = told(found)
        bits = {name: sum(one[name]["bits_per_byte"] for one in found) / len(found) for name in found[0]}
        write(items, {"skills": table, "bits_per_byte": bits, "runs": found})
    print("skill      student base  teacher oracle sft   kept headroom  best student of one teacher, kept")
    for skill, row in table.items():
        print(f"{skill:10} {row['student']:.3f}   {row['base']:.3f} {row['best_teacher']:.3f}   {row['oracle']:.3f}  {row['sft']:.3f}"
              f" {row['kept']:4.0%} {row['headroom']:7.0%}    {'  '.join(f'{n} {share:.0%}' for n, share in row['only'].items())}"
              f"    balance {', '.join(f'{how} {value:.3f}' for how, value in row['balance'].items())}")
    print("bits/byte  " + "  ".join(f"{name} {value:.3f}" for name, value in bits.items()))


if __name__ == "__main__":
    main()
