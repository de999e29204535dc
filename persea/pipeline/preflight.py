"""Pre-flight checks: fail before the run starts if a later stage cannot succeed."""

from __future__ import annotations

from persea.config.optimization import OptimizerName
from persea.errors import DataError, RecipeError
from persea.evaluation.answering import refuse_choice_items
from persea.executors.ray_cluster import refuse_missing_ray
from persea.pipeline import preflight_data
from persea.pipeline.audition_stage import refuse_unmeasurable_answers
from persea.pipeline.lm_eval_stage import given_results_digests, refuse_impossible_lm_eval
from persea.pipeline.run_context import RunContext
from persea.pipeline.stage_keys import audition_inputs, stage_key, train_inputs
from persea.tasks.task import Split
from persea.training.distributed.world import (
    ParallelStrategy,
    refuse_on_policy_processes,
    refuse_too_many_processes,
)
from persea.training.trackers import refuse_missing_tracker

ASKING_STAGES = ("", "check", "audition", "capture", "train")


def check_run(context: RunContext, only_stage: str = "") -> list[str]:
    """Check everything that can be checked before a teacher is asked.

    Args:
        context: The recipe and its run folder.
        only_stage: The only stage that runs; "" = all.

    Returns:
        Warnings, for people.

    Raises:
        RecipeError: The corpus asks for an effort that no model supports, or LoRA for matrices that
            the student does not have.
        DataError: A file is missing, broken or empty, or a prompt lacks the answer to score.
        MissingRequirementError: A key, a package or a sandbox is missing.
        RefusedError: A part of the corpus is lost, no teacher can be chosen by given answers, the
            disk is too small, or the run folder holds another recipe's student.
        TeacherError: A server would have to rank choices.
    """
    refuse_unsupported_efforts(context)
    if only_stage in ASKING_STAGES:
        refuse_asking_text_models(context)
    given_results_digests(context)
    refuse_missing_logprobs(context)
    if only_stage not in ASKING_STAGES:
        return []
    if only_stage in ("", "capture") and context.recipe.executor.kind == "ray":
        refuse_missing_ray()
    refuse_impossible_lm_eval(context)
    preflight_data.refuse_missing_keys(context)
    preflight_data.refuse_unknown_lora_targets(context)
    refuse_unmeasurable_answers(context)
    warnings = preflight_data.describe_equal_models(context)
    warnings += preflight_data.refuse_long_prompts(context)
    if only_stage == "":
        preflight_data.refuse_full_disk(context)
    if only_stage in ("", "train"):
        refuse_other_student(context)
    return warnings


def refuse_other_student(context: RunContext) -> None:
    """Raise if the run would end at a finished student of another recipe, before anything is asked.

    Not if the teachers are still to be measured: the cast decides what is captured.

    Raises:
        RefusedError: The run folder holds another recipe's student.
    """
    stages = context.stages
    if context.launch_options.resume == "never" or not stages.has_record("train"):
        return
    is_cast_known = stages.is_up_to_date(
        "audition", stage_key("audition", audition_inputs(context))
    ) or not (context.needs_audition or context.recipe.audition.compare_with_base)
    needs_verdicts = context.recipe.capture.drop_wrong_answers and not stages.has_record("capture")
    if is_cast_known and not needs_verdicts:
        inputs = train_inputs(context)
        stages.refuse_other_student(stage_key("train", inputs), inputs)


def refuse_unsupported_efforts(context: RunContext) -> None:
    """Raise if the corpus asks for a thinking effort that a model does not support.

    Raises:
        RecipeError: The student's template cannot express an effort of the corpus, or no teacher
            that could be cast for the skill supports it.
    """
    models = context.models
    for k, part in enumerate(context.recipe.corpus):
        pinned = context.recipe.audition.pinned.get(part.skill)
        for effort in part.effort_shares:
            where = f"corpus.{k}.effort_shares"
            if effort not in models.student_renderer.family.efforts:
                raise RecipeError(
                    f"the corpus asks for {effort} effort, which the student's template cannot "
                    "express",
                    where=where,
                    remedy="write `thinking: true` under `student:`, or choose another student",
                )
            candidates = [pinned] if pinned else models.teacher_names
            if not any(models.can_answer_at(name, effort) for name in candidates):
                raise RecipeError(
                    f"the corpus asks for {effort} effort, and no teacher of {part.skill} "
                    f"supports it: {models.describe_efforts()}",
                    where=where,
                    remedy="choose an effort that a teacher supports, or add a teacher that "
                    "supports this one",
                )


def refuse_asking_text_models(context: RunContext) -> None:
    """Raise if a model without a chat template would have to answer, or to learn answers.

    Raises:
        DataError: Such a teacher is asked for answers, or cannot be compared with others; the
            student is given conversations and no template to write them in; or no prompt is left
            for on-policy steps.
    """
    recipe, models = context.recipe, context.models
    pinned = recipe.audition.pinned
    for name in models.teacher_names:
        if not models.renderers[name].is_text:
            continue
        can_win = any(skill not in pinned for skill in context.scored_skills)
        if context.needs_audition and not can_win and name not in pinned.values():
            raise DataError(
                f"{name} has no chat template, so an audition cannot ask it",
                where="audition",
                remedy=f"pin the skills that it teaches: `audition: {{pinned: {{SKILL: {name}}}}}`",
            )
        only_teacher = "" if context.needs_audition else models.teacher_names[0]
        taught = [s for s in recipe.skills if pinned.get(s, only_teacher) == name]
        asked = [s for s in taught if s in context.skills_with_prompts]
        if asked and not context.are_answers_given:
            raise DataError(
                f"{name} has no chat template, so it cannot answer the prompts of "
                f"{', '.join(asked)}",
                where="corpus",
                remedy="give it plain texts (`texts:`) or answers to score (`capture: {answers: "
                "given}`), or choose a teacher with a chat template",
            )
    is_unnamed_text = models.student_renderer.is_text and not recipe.student.family
    if is_unnamed_text and context.skills_with_prompts:
        raise DataError(
            "it has no chat template, so it cannot learn the conversations of "
            f"{', '.join(sorted(context.skills_with_prompts))}",
            where="student.model",
            remedy="name a template: `student: {chat_template: FILE.jinja}`; or write `family: "
            "text` to learn prompt and answer as plain text",
        )
    if recipe.training.on_policy and not context.skills_with_prompts:
        raise DataError(
            "the corpus has texts only, and the student answers no text",
            where="training.on_policy",
            remedy="delete `on_policy:`, or add prompts to the corpus",
        )
    if recipe.evaluation.judge and models.renderers[recipe.evaluation.judge].is_text:
        raise DataError(
            f"{recipe.evaluation.judge} has no chat template, so it cannot judge answers",
            where="evaluation.judge",
            remedy="name a model with a chat template",
        )


def refuse_impossible_training(context: RunContext) -> None:
    """Raise if the training cannot start as it was launched.

    Raises:
        RecipeError: The batch cannot be split over that many processes, a loss is unknown, or the
            optimiser cannot be sharded.
        MissingRequirementError: The package of `training.report_to` or `training.optim` is not
            installed.
        DataError: The checkpoint of --resume does not exist.
    """
    training = context.training
    num_processes = max(context.launch_options.num_processes, context.world.size)
    refuse_too_many_processes(
        num_processes, training.batch_size, training.gradient_accumulation_steps
    )
    if training.on_policy:
        refuse_on_policy_processes(
            num_processes,
            context.launch_options.parallel,
            [t.name for t in context.recipe.teachers if t.endpoint and t.endpoint.max_total_tokens],
        )
    refuse_missing_tracker(training.report_to)
    _refuse_unusable_optimizer(training.optim, context.launch_options.parallel, num_processes)
    if training.loss:
        from persea.losses import build_loss  # imports torch

        build_loss(training.loss_terms)
    if context.launch_options.resume not in ("auto", "never"):
        # looked up now: a capture of hours may come before the training
        from persea.training.checkpoint import find_checkpoint

        find_checkpoint(context.folder / "train", context.launch_options.resume)


def _refuse_unusable_optimizer(
    name: OptimizerName, parallel: ParallelStrategy, num_processes: int
) -> None:
    if name is OptimizerName.ADAMW_8BIT:
        from persea.training.optimizers import require_adamw_8bit  # imports torch

        require_adamw_8bit()
    if name is OptimizerName.MUON and num_processes > 1 and parallel is ParallelStrategy.FSDP:
        raise RecipeError(
            "Muon needs whole matrices, and fsdp gives each process a part",
            where="training.optim",
            remedy="--shard ddp, or `optim: adamw_torch`",
        )


def refuse_missing_logprobs(context: RunContext) -> None:
    """Raise if an evaluation needs log-probabilities that a chat server does not give.

    Raises:
        TeacherError: A model behind a chat server would have to answer an item with choices.
    """
    for teacher in context.recipe.teachers:
        if teacher.endpoint and teacher.endpoint.protocol == "chat":
            for task, items in context.held_out_items(Split.TEST):
                refuse_choice_items(teacher.name, task.name, items)
