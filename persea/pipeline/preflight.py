"""What cannot be in the end is told in the beginning: a training that cannot be spread, a teacher that cannot be asked."""

from __future__ import annotations

from persea.evaluation.answering import refuse_choice_items
from persea.pipeline.run_context import RunContext
from persea.tasks.task import Split
from persea.training.distributed.world import refuse_on_policy_processes, refuse_too_many_processes
from persea.training.trackers import refuse_missing_tracker


def refuse_impossible_training(context: RunContext) -> None:
    """Raises RecipeError where it cannot be spread over as many processes as were asked for, EnvironmentLacks without its board."""
    t, procs = (
        context.recipe.training,
        max(context.launch_options.num_processes, context.world.size),
    )
    refuse_too_many_processes(procs, t.batch_size, t.micro_batches)
    if t.on_policy:
        refuse_on_policy_processes(
            procs,
            context.launch_options.parallel,
            [
                far.name
                for far in context.recipe.teachers
                if far.endpoint and far.endpoint.max_total_tokens
            ],
        )
    refuse_missing_tracker(t.report_to)
    if t.loss:
        from persea.losses import build_loss  # imports torch

        build_loss(t.loss_terms)  # raises RecipeError for an unknown name
    if context.launch_options.resume not in (
        "auto",
        "never",
    ):  # looked at now, not after a capture of hours
        from persea.training.checkpoint import find_checkpoint

        find_checkpoint(context.folder / "train", context.launch_options.resume)


def refuse_missing_logprobs(context: RunContext) -> None:
    """Raises TeacherError, before anything is trained, where a chat route would be asked in the end what it cannot tell."""
    for name in (
        t.name for t in context.recipe.teachers if t.endpoint and t.endpoint.protocol == "chat"
    ):
        for skill, items in context.held_out_items(Split.TEST):
            refuse_choice_items(name, skill.name, items)
