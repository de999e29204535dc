"""The river: every stage in order, each skipped when its output already stands. Read this file first.

    check -> audition -> capture -> train -> evaluate -> lineage -> report

A stage writes into runs/<name>/<stage>/ and nowhere else; `done.json`, written last, names its inputs by digest and its
outputs by sha256. It stands as long as both hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from persea import store
from persea.boards import refuse_missing
from persea.chat import Effort
from persea.measure import Score, Split
from persea.ranks import refuse_too_many
from persea.river import BASE, STUDENT, River, Tell, digest_of, is_small, set_threads, source
from persea.status import journal
from persea.watch import joined


@dataclass(frozen=True)
class Stage:
    """name = folder = verb; inputs: what determines the output; work: makes it in the folder."""

    name: str
    inputs: Callable[[River], object]
    work: Callable[[River, Path, Tell], None]


def check(river: River, folder: Path, tell: Tell) -> None:
    """Lay every teacher's tokenizer over the student's, on every skill's reference answers and the recipe's texts."""
    from persea.check import TEXTS, kept_by, likelihood, refuse
    from persea.check import check as pairing

    samples, settings, teachers = river.samples, river.recipe.check, river.recipe.teachers
    mine = [s.rendered(river.student_voice) for s in samples]
    pairs, likelihoods = [], []
    for k, teacher in enumerate(teachers):
        voice, bridge = river.voices[teacher.name], river.bridges[teacher.name]
        kept = None
        if is_small(source(teacher)) if settings.likelihood is None else settings.likelihood:
            opened = river.teacher(teacher.name, river.recipe.audition.batch)
            likelihoods += likelihood(opened, [s for s in samples if s.skill != TEXTS])
            kept = kept_by(opened, bridge)
        pairs += [pairing(teacher.name, voice, river.student_voice, bridge, s, said, kept if s.skill != TEXTS else None)
                  for s, said in zip(samples, mine, strict=True)]
        family, note = river.families[teacher.name]["family"], river.families[teacher.name]["note"]
        tell("check", (k + 1) / len(teachers), f"{teacher.name} ({family}{', see its note in check.json' if note else ''})")
    store.publish_json(folder / "check.json", {"pairs": [p.to_json() for p in pairs], "likelihoods": [one.to_json() for one in likelihoods],
                                               "families": river.families})
    refuse(pairs, likelihoods, settings.floor, settings.disagreement)


def audition(river: River, folder: Path, tell: Tell) -> None:
    """Measure every teacher on every skill and cast the strongest."""
    from persea.audition import ask, cast

    scores: list[Score] = []
    skills = river.items(Split.AUDITION)
    for k, name in enumerate(river.voices):
        teacher = river.teacher(name, river.recipe.audition.batch)
        for j, (skill, items) in enumerate(skills):
            results, mine = ask(teacher, skill, items, river.recipe.capture.max_new_tokens)
            scores += mine
            store.publish_lines(folder / f"{name}.{skill.name}.jsonl", (r.to_json() for r in results))
            tell("audition", (k + (j + 1) / len(skills)) / len(river.voices), f"{name} {skill.name} {mine[0].value:.2f}")
    chosen = cast([s.name for s, _ in skills], list(river.voices), scores, river.recipe.audition.pinned)
    store.publish_json(folder / "cast.json", chosen.to_json())


def capture(river: River, folder: Path, tell: Tell) -> None:
    """Ask the cast; keep answers and distributions."""
    from persea.capture import Pace, accounts, quarantined, summary
    from persea.capture import capture as ask

    settings = river.recipe.capture
    pace = Pace(len(river.corpus.prompts), settings.tokens or 0, settings.hours or 0)
    for name in dict.fromkeys(u.teacher for u in river.units):
        ask(river.units, river.teacher(name, settings.batch), folder, tau=settings.tau, kl=settings.kl,
            max_new_tokens=settings.max_new_tokens, seed=river.recipe.seed, given=settings.answers == "given",
            unchanged=partial(river.refuse_changed, name), progress=lambda step: tell("capture", *pace.step(step)))
    removed = Counter(why.value for _, why in river.corpus.removed)
    told, aside = summary(river.units, folder), quarantined(river.units, folder, river.corpus.broken)
    (folder / "quarantine.jsonl").unlink(missing_ok=True)
    if aside:
        store.publish_lines(folder / "quarantine.jsonl", aside)
    store.publish_json(folder / "summary.json", told | {"removed": dict(removed)} | accounts(told, river.corpus, aside))


def train(river: River, folder: Path, tell: Tell) -> None:
    """Teach the student from all teachers at once, in as many processes as were asked for."""
    from persea.teach import teach

    teach(river, folder, trained(river), tell)


def trained(river: River) -> dict[str, Any]:
    """What a student comes from. How often it is looked at, or shown, is no part of it."""
    return {"training": river.recipe.training.model_dump(mode="json", exclude={"report_to"}), "seed": river.recipe.seed,
            "threads": river.recipe.threads, "student": river.student_identity, "capture": digest_of([u.name for u in river.units])}


def evaluate(river: River, folder: Path, tell: Tell) -> None:
    """Measure student, base and every teacher on held-out items."""
    from persea.evaluate import Evaluation
    from persea.evaluate import evaluate as measure

    skills, settings = river.items(Split.TEST), river.recipe.evaluation
    names = [STUDENT, BASE, *river.voices]
    scores: list[Score] = []
    bits: dict[str, dict[str, float]] = {}
    lines: list[dict[str, Any]] = []
    for k, name in enumerate(names):
        some, spent, results = measure([river.speaker(name, settings.batch)], skills, settings.max_new_tokens)
        scores += some
        bits |= spent
        lines += [{"speaker": name, "skill": r.item.prompt.skill} | r.to_json() for r in results[name]]
        tell("evaluate", (k + 1) / len(names), f"{name} " + " ".join(f"{s.value:.2f}" for s in some if not s.language))
    out = Evaluation(STUDENT, BASE, tuple(river.voices), Effort.NONE, tuple(scores), bits)
    store.publish_lines(folder / "examples.jsonl", lines)
    store.publish_json(folder / "evaluation.json", out.to_json())


def lineage(river: River, folder: Path, tell: Tell) -> None:
    """Write down what made the weights."""
    from persea.lineage import lineage as record

    teachers = [river.parent(n) for n in river.voices]
    store.publish_json(folder / "lineage.json", record(river.folder / "train" / "student", river.parent(BASE), teachers, river.recipe.hash,
                                                       {"units": digest_of([u.name for u in river.units])}))


def report(river: River, folder: Path, tell: Tell) -> None:
    """The card and the page."""
    from persea.report import report as write

    write(river.folder)


STAGES: tuple[Stage, ...] = (
    Stage("check", lambda r: [r.identities, r.student_identity, r.measured, r.recipe.check.model_dump()], check),
    Stage("audition", lambda r: [r.identities, r.asked, r.recipe.audition.model_dump(), r.recipe.capture.max_new_tokens], audition),
    Stage("capture", lambda r: [*(u.name for u in r.units), *([b.where, b.why] for b in r.corpus.broken)], capture),
    Stage("train", trained, train),
    Stage("evaluate", lambda r: [r.done("train")["outputs"], r.identities, r.asked, r.recipe.evaluation.model_dump()], evaluate),
    Stage("lineage", lambda r: [r.done("train")["outputs"], r.recipe.hash], lineage),
    Stage("report", lambda r: [r.done(s.name)["key"] for s in STAGES[:-1]], report),
)


def run(river: River, tell: Tell, only: str = "") -> None:
    """Every stage in order, or the one named; a stage that stands is skipped.

    Raises Refused where a finished training would be overwritten by another recipe, DataError where `only` needs a
    stage before it.
    """
    set_threads(river.recipe.threads)
    t = river.recipe.training
    with joined(river.world):
        if only in ("", "train"):  # what cannot be in the end is told in the beginning
            refuse_too_many(max(river.how.procs, river.world.size), t.batch, t.accumulate)
            refuse_missing(t.report_to)
        if river.world.rank:  # the first process keeps the folder
            from persea.teach import follow

            follow(river, river.folder / "train", trained)
            return
        with store.lock(river.folder), journal(river.folder, river.recipe.name, tell) as told:
            for stage in STAGES:
                if not only or stage.name == only:
                    river.pass_through(stage.name, stage.inputs(river), partial(stage.work, river), told)
        river.world.told("over")
