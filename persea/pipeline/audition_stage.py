"""The audition: measure the teachers and the student's base, and cast the teachers of each skill.

Skills whose prompts teachers answer are decided by questions; skills whose texts or answers are
given, by bits per byte of these texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea import storage
from persea.errors import RefusedError
from persea.evaluation.answering import EvaluatedModel, answer_items, single_model_loader
from persea.evaluation.audition import (
    Cast,
    apply_gains,
    build_cast,
    cast_markdown,
    gain_sentences,
)
from persea.evaluation.gain import GainDecision
from persea.evaluation.racing import RaceSettings, TaskRace, compare_efforts, race_teachers
from persea.evaluation.text_bits import measure_text_bits
from persea.evaluation.text_contest import TextContest, decide_text_contest
from persea.pipeline.base_contest import asks_base, compare_teachers_with_base, measures_base
from persea.pipeline.model_refs import BASE
from persea.pipeline.progress import WARNING_PREFIX
from persea.tasks.task import Split

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext
    from persea.tasks.task import ItemResult, Task, TaskItem
    from persea.vocab_extension.resize_model import ProgressCallback


def audition_teachers(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Measure every teacher on every skill, and cast the best teacher for each.

    Teachers answer in rounds until the ranking of a skill is settled; the student's base answers
    the same questions. Where a skill has one possible teacher, only that teacher and the base are
    measured. A model without a chat template answers no questions, and is measured on given texts.

    Raises:
        RefusedError: A skill has no teacher, or none that is better than the student's base and
            the recipe refuses that.
    """
    batch = context.recipe.audition.batch_size
    load = single_model_loader(lambda name: context.models.load_participant(name, batch))
    efforts = context.recipe.audition.efforts
    models = {
        name: context.models.evaluated_model(name, batch, efforts, load)
        for name in context.models.teacher_names
    }
    if measures_base(context):
        models[BASE] = context.models.evaluated_model(BASE, batch, (), load)
    cast, races = _race(context, folder, models, progress)
    gains = compare_teachers_with_base(context, folder, races, cast, models, progress)
    found = [_contest_on_texts(context, s, models, progress) for s in context.scored_skills]
    contests = [contest for contest in found if contest]
    gains += [gain for contest in contests for gain in contest.gains]
    cast = with_only_able_teachers(context, cast.with_text_contests(contests))
    _write_cast(context, folder, cast, gains, progress)


# --- questions ---


def _race(
    context: RunContext,
    folder: Path,
    models: Mapping[str, EvaluatedModel],
    progress: ProgressCallback,
) -> tuple[Cast, list[TaskRace]]:
    """Race the teachers on every skill with prompts; write their answers."""
    settings, recipe = context.recipe.audition, context.recipe
    max_new_tokens = recipe.capture.max_new_tokens
    own_efforts = {name: model.efforts[0] for name, model in models.items()}
    tasks = [
        (task, items)
        for task, items in context.held_out_items(Split.AUDITION)
        if task.name in context.asked_skills
    ]
    names_by_skill = {task.name: contestants(context, task.name) for task, _ in tasks}

    def answer(name: str, task: Task, items: Sequence[TaskItem]) -> Sequence[ItemResult]:
        return answer_items(models[name], own_efforts[name], task, items, max_new_tokens)[0]

    races: list[TaskRace] = []
    raced = [(task, items) for task, items in tasks if names_by_skill[task.name]]
    for names in dict.fromkeys(names_by_skill[task.name] for task, _ in raced):
        done = len(races)
        group = [(task, items) for task, items in raced if names_by_skill[task.name] == names]

        def race_progress(
            fraction: float, message: str, done: int = done, size: int = len(group)
        ) -> None:
            progress("audition", (done + size * fraction) / len(raced), message)

        races += race_teachers(
            names,
            group,
            recipe.seed,
            answer,
            race_progress,
            RaceSettings(
                settings.first_round, settings.min_items_per_language, settings.round_growth
            ),
        )
    by_skill = {race.skill: race for race in races}
    races = [by_skill[task.name] for task, _ in raced]
    effort_comparisons, results_by_effort = compare_efforts(
        races,
        [task for task, _ in raced],
        {name: model.efforts for name, model in models.items()},
        lambda name, effort, task, items: answer_items(
            models[name], effort, task, items, max_new_tokens
        )[0],
    )
    for (name, skill, effort), results in results_by_effort.items():
        suffix = "" if effort is own_efforts[name] else f".{effort}"
        storage.write_json_lines(
            folder / f"{name}.{skill}{suffix}.jsonl", (r.to_json() for r in results)
        )
    chosen = settings.pinned if context.needs_audition else context.single_teachers
    cast = build_cast(
        races, own_efforts, chosen, settings.min_score, effort_comparisons, recipe.skills
    )
    return _complete_cast(context, cast), races


def contestants(context: RunContext, skill: str) -> tuple[str, ...]:
    """Return the teachers that are asked the questions of a skill: those with a chat template.

    Of a skill with one possible teacher it is that one, to compare the student's base with it. It
    is not asked where the base is not, nor where only the user's own prompts are taught, of which
    the generated questions say nothing.
    """
    models, recipe = context.models, context.recipe
    askable = [name for name in models.teacher_names if not models.renderers[name].is_text]
    if context.needs_audition:
        return tuple(askable)
    is_represented = any(p.skill == skill and p.generate for p in recipe.corpus) or any(
        b.skill == skill for b in context.benchmarks
    )
    if not asks_base(context) or not is_represented:
        return ()
    return tuple(n for n in [context.single_teachers.get(skill)] if n in askable)


def _complete_cast(context: RunContext, cast: Cast) -> Cast:
    """Add the skills with one possible teacher that nobody was asked about."""
    pinned = context.recipe.audition.pinned
    singles = {
        skill: ((teacher, 1.0),)
        for skill, teacher in context.single_teachers.items()
        if skill not in cast.parts
    }
    return replace(
        cast,
        parts={**cast.parts, **singles},
        pinned=tuple(s for s in context.recipe.skills if s in pinned),
    )


# --- given texts ---


def is_contested_on_texts(context: RunContext, skill: str) -> bool:
    """Return whether at least two models are measured on the given texts of a skill."""
    num_teachers = 1 if skill in context.single_teachers else len(context.models.teacher_names)
    return num_teachers + measures_base(context) > 1


def _contest_on_texts(
    context: RunContext,
    skill: str,
    models: Mapping[str, EvaluatedModel],
    progress: ProgressCallback,
) -> TextContest | None:
    """Measure the teachers and the base on a sample of the texts of a skill.

    Returns:
        The teachers of the texts; None if there is one possible teacher and nothing to compare.
    """
    able, texts = context.text_contestants(skill)
    pinned = context.recipe.audition.pinned.get(skill, "")
    names = [pinned] if pinned else list(able)
    teachers = [name for name in names if not models[name].is_text_only]
    measured = [*teachers, *([BASE] if BASE in models else [])]
    if len(measured) < 2 or not teachers or not texts:
        return None
    bits: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in measured}
    steps = len(measured) * len(texts)
    for k, name in enumerate(measured):
        for j, one in enumerate(texts):
            values = list(measure_text_bits(models[name], one.conversations))
            bits[name].append(np.array([content for content, _ in values]))
            rate = bits[name][-1].sum() / sum(one.num_bytes)
            where = " ".join(filter(None, (skill, one.language)))
            progress(
                "audition", (k * len(texts) + j + 1) / steps, f"{name} {where} {rate:.3f} bits/byte"
            )
    return decide_text_contest(texts, bits, teachers, BASE if BASE in models else None, pinned)


def with_only_able_teachers(context: RunContext, cast: Cast) -> Cast:
    """Add the skills whose given texts only one teacher can render, and nobody was measured on.

    Raises:
        RefusedError: No teacher of a skill can be chosen.
    """
    parts = dict(cast.parts)
    chosen = {part.partition("/")[0] for part in (*parts, *cast.skipped)}
    for skill in context.scored_skills:
        if skill in chosen:
            continue
        able, _ = context.text_contestants(skill)
        if len(able) != 1:
            raise _no_choice(context, skill, able)
        parts[skill] = ((able[0], 1.0),)
    return replace(cast, parts=parts)


def refuse_unmeasurable_answers(context: RunContext) -> None:
    """Raise if no teacher of a skill can be chosen by its given answers.

    Raises:
        RefusedError: No teacher can render the answers, or they hold no text to compare several
            teachers by.
    """
    for skill in context.scored_skills:
        if skill in context.single_teachers:
            continue
        able, texts = context.text_contestants(skill)
        if not able or (len(able) > 1 and not texts):
            raise _no_choice(context, skill, able)


def _no_choice(context: RunContext, skill: str, able: Sequence[str]) -> RefusedError:
    name = context.models.teacher_names[0]
    reason = "none has a text to measure them by" if able else "no teacher can render them"
    return RefusedError(
        f"no teacher can be chosen for the given answers of {skill}: {reason}",
        where="audition",
        remedy=f"choose one: `audition: {{pinned: {{{skill}: {name}}}}}`"
        if able
        else "add a teacher whose chat template has tools, or leave this part out",
    )


def _write_cast(
    context: RunContext,
    folder: Path,
    cast: Cast,
    gains: Sequence[GainDecision],
    progress: ProgressCallback,
) -> None:
    """Act on parts without a better teacher, and write cast.json and table.md.

    A refused cast has a table, and no cast.json that a capture could use.
    """
    table = folder / "table.md"
    storage.write_atomic(table, cast_markdown(cast.with_gains(gains)).encode())
    cast = apply_gains(cast, gains, context.recipe.audition.without_gain)
    storage.write_json(folder / "cast.json", cast.to_json())
    storage.write_atomic(table, cast_markdown(cast).encode())
    for sentence in gain_sentences(cast):
        progress("audition", 1.0, f"{WARNING_PREFIX}{sentence}")
