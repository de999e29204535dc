"""The workers of a stage: open the executor that the recipe asks for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from persea import __version__
from persea.executors.executor import Executor, RunnerFactory
from persea.executors.local import ProcessExecutor

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext

STAGING_FOLDER = ".attempts"  # in the run folder: on the same file system as the cache


def has_workers(context: RunContext) -> bool:
    """Return whether units run in other processes than this one."""
    executor = context.recipe.executor
    return executor.kind != "local" or executor.workers != 1


def worker_threads(context: RunContext) -> int:
    """Return the threads of one operation in a worker: those of this process."""
    import torch

    return context.recipe.threads or torch.get_num_threads()


def open_workers(
    context: RunContext, factory: RunnerFactory, staging: Path, num_units: int
) -> Executor:
    """Open the executor of a recipe with workers.

    Args:
        context: The run.
        factory: Makes the runner of a worker; it is pickled.
        staging: Folder of all attempts, which every worker must see.
        num_units: Units to do; more workers are of no use.

    Raises:
        MissingRequirementError: Ray is not installed, or the cluster cannot be reached.
        RefusedError: The cluster has several machines and asks for no token.
    """
    settings = context.recipe.executor
    if settings.kind == "local":
        return ProcessExecutor(factory, min(settings.workers, num_units))
    from persea.executors.ray_cluster import RayExecutor, RaySettings, SharedFolder

    ray_settings = RaySettings(
        settings.address,
        min(settings.workers or num_units, num_units),
        settings.cpus_per_worker,
        settings.gpus_per_worker,
        settings.allow_unauthenticated,
        math.ceil(settings.workers * settings.cpus_per_worker),
    )
    return RayExecutor(factory, ray_settings, SharedFolder.create(staging.absolute()), __version__)
