"""What cannot be in the end is told in the beginning: a training that cannot be spread, a teacher that cannot be asked."""

from __future__ import annotations

from persea.evaluation.answering import refuse_choices
from persea.pipeline.run_context import River
from persea.tasks.task import Split
from persea.training.distributed.world import refuse_too_many, refuse_unheard
from persea.training.trackers import refuse_missing


def refuse_training(river: River) -> None:
    """Raises RecipeError where it cannot be spread over as many processes as were asked for, EnvironmentLacks without its board."""
    t, procs = river.recipe.training, max(river.how.procs, river.world.size)
    refuse_too_many(procs, t.batch, t.accumulate)
    if t.on_policy:
        refuse_unheard(procs, river.how.shard, [far.name for far in river.recipe.teachers if far.endpoint and far.endpoint.budget])
    refuse_missing(t.report_to)
    if river.how.resume not in ("auto", "never"):  # looked at now, not after a capture of hours
        from persea.training.checkpoint import choose

        choose(river.folder / "train", river.how.resume)


def refuse_mute(river: River) -> None:
    """Raises TeacherError, before anything is trained, where a chat route would be asked in the end what it cannot tell."""
    for name in (t.name for t in river.recipe.teachers if t.endpoint and t.endpoint.protocol == "chat"):
        for skill, items in river.items(Split.TEST):
            refuse_choices(name, skill.name, items)
