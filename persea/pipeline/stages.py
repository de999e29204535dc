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

from persea import storage as store
from persea.chat.messages import Effort
from persea.pipeline import preflight as beforehand
from persea.pipeline import stage_keys as inputs
from persea.pipeline import tasks_and_prompts as questions
from persea.pipeline.remote_teachers import is_far
from persea.pipeline.run_context import BASE, STUDENT, River, Tell, digest_of, is_small, set_threads, source
from persea.pipeline.status import journal
from persea.tasks.task import Split
from persea.training.distributed.heartbeat import joined


@dataclass(frozen=True)
class Stage:
    """name = folder = verb; inputs: what determines the output; work: makes it in the folder."""

    name: str
    inputs: Callable[[River], object]
    work: Callable[[River, Path, Tell], None]


def check(river: River, folder: Path, tell: Tell) -> None:
    """Lay every teacher's tokenizer over the student's, on every skill's reference answers and the recipe's texts."""
    from persea.evaluation.compatibility import TEXTS, kept_by, likelihood, refuse
    from persea.evaluation.compatibility import check as pairing

    samples, settings, teachers = river.samples, river.recipe.check, [t for t in river.recipe.teachers if not t.yardstick]
    mine = [s.rendered(river.student_voice) for s in samples]
    pairs, likelihoods = [], []
    for k, teacher in enumerate(teachers):
        voice, bridge = river.voices[teacher.name], river.bridges[teacher.name]
        kept = None
        if not is_far(teacher) and (is_small(source(teacher)) if settings.likelihood is None else settings.likelihood):
            opened = river.teacher(teacher.name, river.recipe.audition.batch)
            likelihoods += likelihood(opened, [s for s in samples if s.skill != TEXTS and s.suits(voice)])
            kept = kept_by(opened, bridge)
        pairs += [pairing(teacher.name, voice, river.student_voice, bridge, s, said, kept if s.skill != TEXTS else None)
                  for s, said in zip(samples, mine, strict=True) if s.suits(voice)]
        about = river.families.get(teacher.name, {"family": "words", "note": ""})
        tell("check", (k + 1) / len(teachers), f"{teacher.name} ({about['family']}{', see its note in check.json' if about['note'] else ''})")
    store.publish_json(folder / "check.json", {"pairs": [p.to_json() for p in pairs], "likelihoods": [one.to_json() for one in likelihoods],
                                               "families": river.families})
    refuse(pairs, likelihoods, settings.floor, settings.disagreement)


def audition(river: River, folder: Path, tell: Tell) -> None:
    """Measure every teacher on every skill, in rounds, until the ranking is settled; cast the strongest."""
    from persea.evaluation.answering import hear, one_at_a_time
    from persea.evaluation.audition import cast, markdown
    from persea.evaluation.racing import at_efforts, contest

    settings, most = river.recipe.audition, river.recipe.capture.max_new_tokens
    load = one_at_a_time(lambda name: river.teacher(name, settings.batch))
    speakers = {name: river.heard_as(name, settings.batch, settings.efforts, load) for name in river.teaching}
    skills = river.items(Split.AUDITION)
    courses = contest(list(speakers), skills, river.recipe.seed, lambda name, skill, items: hear(
        speakers[name], speakers[name].efforts[0], skill, items, most)[0], lambda share, words: tell("audition", share, words))
    dials, said = at_efforts(courses, [s for s, _ in skills], {n: s.efforts for n, s in speakers.items()},
                             lambda name, effort, skill, items: hear(speakers[name], effort, skill, items, most)[0])
    for (name, skill, effort), results in said.items():
        other = "" if effort is speakers[name].efforts[0] else f".{effort}"
        store.publish_lines(folder / f"{name}.{skill}{other}.jsonl", (r.to_json() for r in results))
    chosen = cast(courses, {n: s.efforts[0] for n, s in speakers.items()}, settings.pinned, settings.floor, dials, river.recipe.taught)
    store.publish_json(folder / "cast.json", chosen.to_json())
    store.publish(folder / "table.md", markdown(chosen).encode())


def capture(river: River, folder: Path, tell: Tell) -> None:
    """Ask the cast; keep answers and distributions."""
    from persea.cache.capture import Pace, accounts, caches, quarantined, summary
    from persea.cache.capture import capture as ask

    settings = river.recipe.capture
    pace = Pace(len(river.corpus.prompts), settings.tokens or 0, settings.hours or 0)
    for name in dict.fromkeys(u.teacher for u in river.units):
        ask(river.units, river.teacher(name, settings.batch), folder, tau=settings.tau, kl=settings.kl,
            max_new_tokens=settings.max_new_tokens, seed=river.recipe.seed, given=settings.answers == "given",
            unchanged=partial(river.refuse_changed, name), progress=lambda step: tell("capture", *pace.step(step)))
    store.publish_lines(folder / "removed.jsonl", (r.to_json() for r in river.corpus.removed))
    told, aside = summary(river.units, folder), quarantined(river.units, folder, river.corpus.broken)
    (folder / "quarantine.jsonl").unlink(missing_ok=True)
    if aside:
        store.publish_lines(folder / "quarantine.jsonl", aside)
    verified: dict[str, object] = {}
    if settings.verify:
        from persea.cache.answer_filter import verify

        items = questions.known(river.recipe.corpus, river.skills, river.corpus.prompts, river.recipe.seed)
        verified = {"verified": verify([reader for reader, _ in caches(river.units, folder)], items, river.skills, folder)}
    removed = dict(Counter(r.why.value for r in river.corpus.removed))
    store.publish_json(folder / "summary.json", told | {"removed": removed} | verified | accounts(told, river.corpus, aside))


def train(river: River, folder: Path, tell: Tell) -> None:
    """Teach the student from all teachers at once, in as many processes as were asked for."""
    from persea.pipeline.train_stage import teach

    teach(river, folder, inputs.train(river), tell)


def evaluate(river: River, folder: Path, tell: Tell) -> None:
    """Measure student, base and every teacher on held-out items."""
    from persea.evaluation.answering import one_at_a_time
    from persea.evaluation.evaluate import Evaluation, Heard, beside, listen, regressions

    skills, settings = river.items(Split.TEST), river.recipe.evaluation
    names = [STUDENT, BASE, *river.voices]
    load = one_at_a_time(lambda name: river.speaker(name, settings.batch))
    heard = Heard()
    for k, name in enumerate(names):
        listen(heard, river.heard_as(name, settings.batch, settings.efforts, load), skills, settings.max_new_tokens,
               lambda share, words, k=k: tell("evaluate", (k + share) / len(names), words))  # type: ignore[misc]
    yardsticks = tuple(name for name in river.voices if name not in river.teaching)
    out = Evaluation(STUDENT, BASE, river.teaching, Effort.NONE, tuple(heard.scores()), heard.bits_per_byte, yardsticks, beside(heard, STUDENT),
                     regressions(heard, STUDENT, BASE))
    lines = list(heard.lines())
    store.publish_lines(folder / "examples.jsonl", lines)
    store.publish_json(folder / "evaluation.json", out.to_json())
    store.publish_json(folder / "sets.json", [o.to_json() for o in river.published])
    if river.modes:
        from persea.evaluation.thinking_modes import at_once, measure

        straight = at_once(lines, STUDENT, river.modes)
        store.publish_json(folder / "modes.json", measure(river.speaker(STUDENT, settings.batch), skills, river.modes, settings.max_new_tokens,
                                                          straight, lambda words: tell("evaluate", 0.99, words)).to_json())


def lineage(river: River, folder: Path, tell: Tell) -> None:
    """Write down what made the weights."""
    from persea.report.lineage import lineage as record

    teachers = [river.parent(n) for n in river.teaching]
    store.publish_json(folder / "lineage.json", record(river.folder / "train" / "student", river.parent(BASE), teachers, river.recipe.hash,
                                                       {"units": digest_of([u.name for u in river.units])}, river.cast))


def report(river: River, folder: Path, tell: Tell) -> None:
    """The card and the page."""
    from persea.report.page import report as write

    write(river.folder, {name: Path(file) for name, file in river.recipe.evaluation.lm_eval.items()})


STAGES: tuple[Stage, ...] = (
    Stage("check", inputs.check, check),
    Stage("audition", inputs.audition, audition),
    Stage("capture", inputs.capture, capture),
    Stage("train", inputs.train, train),
    Stage("evaluate", inputs.evaluate, evaluate),
    Stage("lineage", inputs.lineage, lineage),
    Stage("report", inputs.report, report),
)


def run(river: River, tell: Tell, only: str = "") -> None:
    """Every stage in order, or the one named; a stage that stands is skipped.

    Raises Refused where a finished training would be overwritten by another recipe, DataError where `only` needs a
    stage before it; Regressed, once all is written, where the student is less safe than its base and the recipe does not allow it.
    """
    set_threads(river.recipe.threads)
    river.refuse_modes()
    river.lm_eval()
    beforehand.refuse_mute(river)
    with joined(river.world):
        if only in ("", "train"):  # what cannot be in the end is told in the beginning
            beforehand.refuse_training(river)
        if river.world.rank:  # the first process keeps the folder
            from persea.pipeline.train_stage import follow

            follow(river, river.folder / "train", inputs.train)
            return
        with store.lock(river.folder), journal(river.folder, river.recipe.name, tell) as told:
            for stage in STAGES:
                if not only or stage.name == only:
                    river.pass_through(stage.name, stage.inputs(river), partial(stage.work, river), told)
        river.world.told("over")
    if only in ("", "evaluate", "report") and not river.recipe.evaluation.allow_regression:
        from persea.evaluation.evaluate import refuse_regressed

        refuse_regressed(river.folder / "evaluate" / "evaluation.json")
