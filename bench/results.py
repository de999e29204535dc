"""Run the quickstart with several seeds, beside the students it must be compared with.

    python bench/results.py [seeds] [items] [arm ...]     (make results)

Default: 3 seeds, 400 items per task, every arm. Seeds change the prompts, the order and the
sampling of distributions, not the saplings. Arms, for each seed:

    student      the quickstart's student; base model and teachers are measured with it
    sft          a student of the same answers, by cross-entropy alone (training.event_weight = 0)
    balance      a student of the same answers with training.loss_balancing, which the recipe does
                 not use
    oracle       a student of each teacher's tasks alone, for as many steps; the routed oracle takes
                 the best of these, task by task
    only         a student of each teacher alone, which answers every prompt of the recipe

Resumable: students and measurements are in runs/results/SEED/. Headroom reached = (student - base)
/ (oracle - base), over the seeds that have both. Writes bench/results/quickstart.json and prints
the table.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from persea.config.recipe import load_recipe
from persea.config.schema import CorpusSection, LossBalancing
from persea.models.loading import set_threads
from persea.pipeline.model_refs import BASE, STUDENT
from persea.pipeline.run_context import RunContext
from persea.storage import digest_file
from persea.tasks.task import Split, grade_answers, score_results
from persea.teachers.teacher import Teacher

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
RUNS = ROOT / "runs" / "results"
OUT = ROOT / "bench" / "results" / "quickstart.json"
SAPLINGS = (ROOT / "saplings").glob("*/model.safetensors")


def made(out: Path, sets: list[str], *verbs: str, reuse: Path | None = None) -> RunContext:
    """Return the run folder after these stages, with audition and capture of `reuse` where
    equal.
    """
    if reuse is not None and not out.exists():
        for stage in ("audition", "capture"):
            shutil.copytree(reuse / stage, out / stage)
    for verb in verbs:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "persea.cli",
                verb,
                str(RECIPE),
                *(a for s in sets for a in ("--set", s)),
                "--out",
                str(out),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return RunContext(load_recipe(RECIPE, sets), out)


def measured(context: RunContext, name: str, items: int) -> dict[str, Any]:
    """Measure one model of a run, and keep the result beside its weights.

    Scores with intervals, and bits per byte of the held-out reference answers.
    """
    path, weights = (
        context.folder / f"measured-{name}-{items}.json",
        digest_file(_weights(context, name)),
    )
    if (
        path.is_file()
        and (previous := dict(json.loads(path.read_text()))).pop("weights") == weights
    ):
        return previous
    set_threads(context.recipe.threads)
    speaker, settings = context.models.load_participant(name, 200), context.recipe.evaluation
    scores, bits, size = {}, 0.0, 0
    for skill, some in ((s, s.items(Split.TEST, items, context.recipe.seed)) for s in ALL):
        answers = speaker.answer([i.prompt for i in some], settings.max_new_tokens)
        results = grade_answers(
            skill, some, [(a.conversation.messages[-1], a.finish) for a in answers]
        )
        scores[skill.name] = score_results(name, skill.name, results, speaker.effort).to_json()
        references = [
            i.reference_conversation for i in some if speaker.can_render(i.reference_conversation)
        ]
        bits += reference_bits(speaker, references)
        size += sum(len(p.text.encode()) for c in references for p in c.messages[-1].parts)
    found = {"scores": scores, "bits_per_byte": bits / size}
    path.write_text(json.dumps(found | {"weights": weights}, indent=1) + "\n")
    return found


def _weights(context: RunContext, name: str) -> Path:
    r = context.recipe
    model = {STUDENT: str(context.folder / "train" / "student"), BASE: r.student.model}.get(
        name
    ) or next(t.model for t in r.teachers if t.name == name)
    return Path(model) / "model.safetensors"


def reference_bits(speaker: Teacher, references: list[Any]) -> float:
    """Return the bits of the last message of each conversation: content and end-of-turn token."""
    nats = 0.0
    for tokens, logprobs_NW in speaker.compute_logprobs(references):
        learned = np.flatnonzero(tokens.loss_mask_T)
        picked_N = logprobs_NW.numpy()[np.arange(len(learned)), tokens.ids_T[learned]]
        nats -= float(picked_N[tokens.starts_T[learned] >= 0].astype(np.float64).sum())
    return nats / math.log(2)


ALL = RunContext(load_recipe(RECIPE), RUNS).tasks
ARMS = ("student", "sft", "balance", "oracle", "only")


def measurements(arm: str, seed: int, items: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every model of an arm with its measurements."""
    folder, sets = RUNS / str(seed), [f"seed={seed}"]
    main = made(folder / "student", sets, "audition", "capture", "train")
    cast = {skill: parts[0][0] for skill, parts in main.cast.parts.items()}
    if arm == "student":
        for name in (STUDENT, BASE, *main.models.renderers):
            yield name, measured(main, name, items)
    elif arm == "sft":
        yield (
            arm,
            measured(
                made(
                    folder / "sft", [*sets, "training.event_weight=0"], "train", reuse=main.folder
                ),
                STUDENT,
                items,
            ),
        )
    elif arm == "balance":
        for how in (b for b in LossBalancing if b is not main.recipe.training.loss_balancing):
            other = made(
                folder / f"balance-{how}",
                [*sets, f"training.loss_balancing={how}"],
                "train",
                reuse=main.folder,
            )
            yield f"balance {how}", measured(other, STUDENT, items)
    for name in main.models.renderers if arm in ("oracle", "only") else ():
        if arm == "only":
            pinned = f"audition.pinned={json.dumps(dict.fromkeys(cast, name))}"
            efforts = main.models.renderers[name].family.efforts
            parts = [_known(plain(p), efforts) for p in main.recipe.corpus]
            asked = f"corpus={json.dumps(parts)}"
            alone = made(
                folder / f"only-{name}", [*sets, pinned, asked], "audition", "capture", "train"
            )
            yield f"only {name}", measured(alone, STUDENT, items)
        elif mine := [
            p.model_dump(exclude_defaults=True, mode="json")
            for p in main.recipe.corpus
            if cast[p.skill] == name
        ]:
            routed = made(
                folder / f"oracle-{name}",
                [*sets, f"corpus={json.dumps(mine)}"],
                "capture",
                "train",
                reuse=main.folder,
            )
            yield f"oracle {name}", measured(routed, STUDENT, items)


def plain(part: CorpusSection) -> dict[str, Any]:
    return part.model_dump(exclude_defaults=True, exclude_none=True, mode="json")


def _known(part: dict[str, Any], efforts: Collection[str]) -> dict[str, Any]:
    """Return the part with the efforts that one teacher knows, in the same proportion."""
    modes = {
        mode: share for mode, share in part.get("effort_shares", {}).items() if mode in efforts
    }
    if modes == part.get("effort_shares", {}):
        return part
    return {k: v for k, v in part.items() if k != "effort_shares"} | (
        {"effort_shares": {m: s / sum(modes.values()) for m, s in modes.items()}} if modes else {}
    )


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by task, means over the seeds that have both sides of a comparison.

    Student, base, best teacher, oracle, SFT, share retained, headroom reached.
    """
    table = {}
    for skill in (s.name for s in ALL):

        def mean(name: str, having: str = STUDENT, skill: str = skill) -> float:
            return float(
                np.mean(
                    [
                        one[name]["scores"][skill]["value"]
                        for one in runs
                        if name in one and any(n.startswith(having) for n in one)
                    ]
                )
            )

        names = [n for n in runs[0] if " " not in n and n not in (STUDENT, BASE, "sft")]
        best = max(map(mean, names))
        row = {
            "student": mean(STUDENT),
            "base": mean(BASE),
            "best_teacher": best,
            "kept": mean(STUDENT) / best,
            "seeds": [one[STUDENT]["scores"][skill]["value"] for one in runs],
        }
        if any("sft" in one for one in runs):
            row["sft"] = mean("sft")
        if oracles := [n for n in runs[0] if n.startswith("oracle ")]:
            row["oracle"] = max(map(mean, oracles))
            row["headroom"] = (mean(STUDENT, "oracle ") - mean(BASE, "oracle ")) / (
                row["oracle"] - mean(BASE, "oracle ")
            )
        row |= {n: mean(n) for n in runs[0] if n.startswith("balance ")}
        if only := [n for n in runs[0] if n.startswith("only ")]:
            row["only"] = {n.removeprefix("only "): mean(n) / best for n in only}
        table[skill] = row
    return table


def main() -> None:
    given = sys.argv[1:]
    seeds, items = (int(a) for a in (*given[:2], *("3", "400")[len(given[:2]) :]))
    arms = given[2:] or ARMS
    if unknown := set(arms) - set(ARMS):
        raise SystemExit(f"no arm {sorted(unknown)}; there are {', '.join(ARMS)}")
    asked = {
        "items": items,
        "recipe": load_recipe(RECIPE).hash,
        "saplings": {p.parent.name: digest_file(p) for p in sorted(SAPLINGS)},
    }
    before = json.loads(OUT.read_text()) if OUT.is_file() else {}
    previous = before.get("runs", []) if before.get("asked") == asked else []
    runs: list[dict[str, Any]] = [
        previous[k] if k < len(previous) else {} for k in range(max(seeds, len(previous)))
    ]
    for arm in arms:
        for seed in range(seeds):
            runs[seed] |= dict(measurements(arm, seed, items))
            some = [one for one in runs if STUDENT in one]
            bits = {
                n: float(np.mean([one[n]["bits_per_byte"] for one in some if n in one]))
                for n in some[0]
            }
            table = {
                "asked": asked,
                "seeds": {n: sum(n in one for one in some) for n in some[0]},
                "skills": summary(some),
                "bits_per_byte": bits,
            }
            OUT.write_text(json.dumps({**table, "runs": some}, indent=1) + "\n")
    done = json.loads(OUT.read_text())
    print(
        "task       student base  teacher kept  sft   oracle headroom  "
        "best student of one teacher, kept"
    )
    for skill, row in done["skills"].items():
        forms = {"sft": ".3f", "oracle": ".3f", "headroom": ".0%"}
        sft, oracle, headroom = (
            f"{row[key]:{form}}" if key in row else "-" for key, form in forms.items()
        )
        alone = "  ".join(f"{n} {share:.0%}" for n, share in row.get("only", {}).items())
        alone += "".join(
            f"  {key} {value:.3f}" for key, value in row.items() if key.startswith("balance ")
        )
        print(
            f"{skill:10} {row['student']:.3f}   {row['base']:.3f} {row['best_teacher']:.3f}   "
            f"{row['kept']:4.0%}  {sft:5} {oracle:6} {headroom:8}"
            f"  {alone}"
        )
    print(
        "bits/byte  "
        + "  ".join(f"{name} {value:.3f}" for name, value in done["bits_per_byte"].items())
    )


if __name__ == "__main__":
    main()
