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
from persea.chat.messages import ThinkingEffort
from persea.pipeline import preflight as beforehand
from persea.pipeline import stage_keys as inputs
from persea.pipeline import tasks_and_prompts as questions
from persea.pipeline.remote_teachers import is_remote
from persea.pipeline.run_context import (
    BASE,
    STUDENT,
    ProgressCallback,
    RunContext,
    digest_json,
    is_small_local_model,
    model_source,
    set_threads,
)
from persea.pipeline.status import record_status
from persea.tasks.task import Split
from persea.training.distributed.heartbeat import join_process_group


@dataclass(frozen=True)
class Stage:
    """name = folder = verb; inputs: what determines the output; work: makes it in the folder."""

    name: str
    inputs: Callable[[RunContext], object]
    run: Callable[[RunContext, Path, ProgressCallback], None]


def run_check(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Lay every teacher's tokenizer over the student's, on every skill's reference answers and the recipe's texts."""
    from persea.evaluation.compatibility import (
        TEXT_FILES_SKILL,
        make_retained_mass,
        measure_template_likelihood,
        refuse_incompatible,
    )
    from persea.evaluation.compatibility import check_pair as pairing

    samples, settings, teachers = (
        context.check_samples,
        context.recipe.check,
        [t for t in context.recipe.teachers if not t.reference],
    )
    mine = [s.render(context.student_renderer) for s in samples]
    pairs, likelihoods = [], []
    for k, teacher in enumerate(teachers):
        voice, bridge = context.renderers[teacher.name], context.event_maps[teacher.name]
        kept = None
        if not is_remote(teacher) and (
            is_small_local_model(model_source(teacher), settings.max_likelihood_bytes)
            if settings.measure_likelihood is None
            else settings.measure_likelihood
        ):
            opened = context.load_teacher(teacher.name, context.recipe.audition.batch_size)
            likelihoods += measure_template_likelihood(
                opened,
                [s for s in samples if s.skill != TEXT_FILES_SKILL and s.is_supported_by(voice)],
            )
            kept = make_retained_mass(opened, bridge, settings.min_counted_probability)
        pairs += [
            pairing(
                teacher.name,
                voice,
                context.student_renderer,
                bridge,
                s,
                said,
                kept if s.skill != TEXT_FILES_SKILL else None,
            )
            for s, said in zip(samples, mine, strict=True)
            if s.is_supported_by(voice)
        ]
        about = context.family_info.get(teacher.name, {"family": "text_only", "note": ""})
        progress(
            "check",
            (k + 1) / len(teachers),
            f"{teacher.name} ({about['family']}{', see its note in check.json' if about['note'] else ''})",
        )
    store.write_json(
        folder / "check.json",
        {
            "pairs": [p.to_json() for p in pairs],
            "likelihoods": [one.to_json() for one in likelihoods],
            "families": context.family_info,
        },
    )
    refuse_incompatible(
        pairs,
        likelihoods,
        settings.min_common_share,
        settings.max_disagreement,
        settings.max_template_excess,
    )


def run_audition(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Measure every teacher on every skill, in rounds, until the ranking is settled; cast the strongest."""
    from persea.evaluation.answering import answer_items, single_model_loader
    from persea.evaluation.audition import build_cast, cast_markdown
    from persea.evaluation.racing import RaceSettings, compare_efforts, race_teachers

    settings, most = context.recipe.audition, context.recipe.capture.max_new_tokens
    load = single_model_loader(lambda name: context.load_teacher(name, settings.batch_size))
    speakers = {
        name: context.evaluated_model(name, settings.batch_size, settings.efforts, load)
        for name in context.teacher_names
    }
    skills = context.held_out_items(Split.AUDITION)
    courses = race_teachers(
        list(speakers),
        skills,
        context.recipe.seed,
        lambda name, skill, items: answer_items(
            speakers[name], speakers[name].efforts[0], skill, items, most
        )[0],
        lambda share, words: progress("audition", share, words),
        RaceSettings(settings.first_round, settings.min_items_per_language, settings.round_growth),
    )
    dials, said = compare_efforts(
        courses,
        [s for s, _ in skills],
        {n: s.efforts for n, s in speakers.items()},
        lambda name, effort, skill, items: answer_items(speakers[name], effort, skill, items, most)[
            0
        ],
    )
    for (name, skill, effort), results in said.items():
        other = "" if effort is speakers[name].efforts[0] else f".{effort}"
        store.write_json_lines(
            folder / f"{name}.{skill}{other}.jsonl", (r.to_json() for r in results)
        )
    chosen = build_cast(
        courses,
        {n: s.efforts[0] for n, s in speakers.items()},
        settings.pinned,
        settings.min_score,
        dials,
        context.recipe.skills,
    )
    store.write_json(folder / "cast.json", chosen.to_json())
    store.write_atomic(folder / "table.md", cast_markdown(chosen).encode())


def run_capture(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Ask the cast; keep answers and distributions."""
    from persea.cache.capture import (
        CaptureBudget,
        account_for_prompts,
        capture_summary,
        open_teacher_caches,
        quarantine_records,
    )
    from persea.cache.capture import capture_teacher as ask

    settings = context.recipe.capture
    pace = CaptureBudget(
        len(context.corpus.prompts), settings.max_total_tokens or 0, settings.max_hours or 0
    )
    for name in dict.fromkeys(u.teacher for u in context.capture_units):
        ask(
            context.capture_units,
            context.load_teacher(name, settings.batch_size),
            folder,
            tau=settings.sampling_threshold,
            max_kl=settings.max_kl,
            max_new_tokens=settings.max_new_tokens,
            seed=context.recipe.seed,
            use_given_answers=settings.answers == "given",
            refuse_if_changed=partial(context.refuse_changed_teacher, name),
            on_unit=lambda step: progress("capture", *pace.record_unit(step)),
        )
    store.write_json_lines(folder / "removed.jsonl", (r.to_json() for r in context.corpus.removed))
    told, aside = (
        capture_summary(context.capture_units, folder),
        quarantine_records(context.capture_units, folder, context.corpus.malformed),
    )
    (folder / "quarantine.jsonl").unlink(missing_ok=True)
    if aside:
        store.write_json_lines(folder / "quarantine.jsonl", aside)
    verified: dict[str, object] = {}
    if settings.drop_wrong_answers:
        from persea.cache.answer_filter import verify_answers

        items = questions.items_by_question(
            context.recipe.corpus, context.tasks, context.corpus.prompts, context.recipe.seed
        )
        verified = {
            "verified": verify_answers(
                [reader for reader, _ in open_teacher_caches(context.capture_units, folder)],
                items,
                context.tasks,
                folder,
            )
        }
    removed = dict(Counter(r.reason.value for r in context.corpus.removed))
    store.write_json(
        folder / "summary.json",
        told | {"removed": removed} | verified | account_for_prompts(told, context.corpus, aside),
    )


def run_train(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Teach the student from all teachers at once, in as many processes as were asked for."""
    from persea.pipeline.train_stage import train_in_processes

    train_in_processes(context, folder, inputs.train_inputs(context), progress)


def run_evaluate(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Measure student, base and every teacher on held-out items."""
    from persea.evaluation.answering import single_model_loader
    from persea.evaluation.evaluate import (
        EvaluationAnswers,
        EvaluationResult,
        compare_student,
        evaluate_model,
        find_regressions,
    )

    skills, settings = context.held_out_items(Split.TEST), context.recipe.evaluation
    names = [STUDENT, BASE, *context.renderers]
    load = single_model_loader(lambda name: context.load_participant(name, settings.batch_size))
    heard = EvaluationAnswers()
    for k, name in enumerate(names):
        evaluate_model(
            heard,
            context.evaluated_model(name, settings.batch_size, settings.efforts, load),
            skills,
            settings.max_new_tokens,
            lambda share, words, k=k: progress("evaluate", (k + share) / len(names), words),
        )  # type: ignore[misc]
    yardsticks = tuple(name for name in context.renderers if name not in context.teacher_names)
    out = EvaluationResult(
        STUDENT,
        BASE,
        context.teacher_names,
        ThinkingEffort.NONE,
        tuple(heard.iter_scores()),
        heard.bits_per_byte,
        yardsticks,
        compare_student(heard, STUDENT),
        find_regressions(heard, STUDENT, BASE),
    )
    lines = list(heard.iter_answer_records())
    store.write_json_lines(folder / "examples.jsonl", lines)
    store.write_json(folder / "evaluation.json", out.to_json())
    store.write_json(folder / "sets.json", [o.to_json() for o in context.benchmarks])
    if context.taught_efforts:
        from persea.evaluation.thinking_modes import measure_thinking_modes, select_direct_answers

        straight = select_direct_answers(lines, STUDENT, context.taught_efforts)
        store.write_json(
            folder / "modes.json",
            measure_thinking_modes(
                context.load_participant(STUDENT, settings.batch_size),
                skills,
                context.taught_efforts,
                settings.max_new_tokens,
                straight,
                lambda words: progress("evaluate", 0.99, words),
            ).to_json(),
        )


def run_lineage(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Write down what made the weights."""
    from persea.report.lineage import lineage_record as record

    teachers = [context.lineage_parent(n) for n in context.teacher_names]
    store.write_json(
        folder / "lineage.json",
        record(
            context.folder / "train" / "student",
            context.lineage_parent(BASE),
            teachers,
            context.recipe.hash,
            {"units": digest_json([u.name for u in context.capture_units])},
            context.cast,
        ),
    )


def run_report(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """The card and the page."""
    from persea.report.page import write_report as write

    write(
        context.folder,
        {name: Path(file) for name, file in context.recipe.evaluation.lm_eval_results.items()},
    )


STAGES: tuple[Stage, ...] = (
    Stage("check", inputs.check_inputs, run_check),
    Stage("audition", inputs.audition_inputs, run_audition),
    Stage("capture", inputs.capture_inputs, run_capture),
    Stage("train", inputs.train_inputs, run_train),
    Stage("evaluate", inputs.evaluate_inputs, run_evaluate),
    Stage("lineage", inputs.lineage_inputs, run_lineage),
    Stage("report", inputs.report_inputs, run_report),
)


def run_pipeline(context: RunContext, progress: ProgressCallback, only_stage: str = "") -> None:
    """Every stage in order, or the one named; a stage that stands is skipped.

    Raises Refused where a finished training would be overwritten by another recipe, DataError where `only` needs a
    stage before it; Regressed, once all is written, where the student is less safe than its base and the recipe does not allow it.
    """
    set_threads(context.recipe.threads)
    context.refuse_unsupported_efforts()
    context.lm_eval_digests()
    beforehand.refuse_missing_logprobs(context)
    with join_process_group(context.world):
        if only_stage in ("", "train"):  # what cannot be in the end is told in the beginning
            beforehand.refuse_impossible_training(context)
        if context.world.rank:  # the first process keeps the folder
            from persea.pipeline.train_stage import follow_first_rank

            follow_first_rank(context, context.folder / "train", inputs.train_inputs)
            return
        with (
            store.lock_run_folder(context.folder),
            record_status(context.folder, context.recipe.name, progress) as told,
        ):
            for stage in STAGES:
                if not only_stage or stage.name == only_stage:
                    context.run_stage(
                        stage.name, stage.inputs(context), partial(stage.run, context), told
                    )
        context.world.broadcast("over")
    if (
        only_stage in ("", "evaluate", "report")
        and not context.recipe.evaluation.allow_safety_regression
    ):
        from persea.evaluation.evaluate import refuse_saved_regressions

        refuse_saved_regressions(context.folder / "evaluate" / "evaluation.json")
