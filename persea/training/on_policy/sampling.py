"""Sample the student's own answers: a batch of rollouts in units, here or by workers.

A unit fixes everything that its answers depend on but the weights: prompts, their order, settings
and seed. So a batch has the same answers whoever samples its units. Sampled answers carry the
training step of the weights that sampled them, and a worker's also the digest of these weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from persea.config.schema import OnPolicySection

if TYPE_CHECKING:
    from persea.training.student import StudentModel

SAMPLING_SEED = 2  # last number of the seed; 1 = the order of prompts (rollouts.py)


@dataclass(frozen=True)
class SamplingUnit:
    """Prompts that are answered together.

    Attributes:
        step: training step whose weights sample the answers.
        prompts: token ids of each prompt, int32 [T].
        stop_ids: tokens that end an answer.
        max_new_tokens: longest answer, in tokens.
        temperature: sampling temperature.
        seed: seed of the unit.
    """

    step: int
    prompts: tuple[npt.NDArray[np.int32], ...]
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class SampledAnswers:
    """The answers of a unit, and the weights that sampled them.

    Attributes:
        step: training step of these weights.
        ids: token ids of each answer, up to and including the stop token.
        weights: digest of the weights; "" = those that the training itself held at that step.
    """

    step: int
    ids: tuple[npt.NDArray[np.int32], ...]
    weights: str = ""


class RolloutSampler(Protocol):
    """Samples the units of a batch somewhere."""

    def sample(
        self, student: StudentModel, units: Sequence[SamplingUnit]
    ) -> Sequence[SampledAnswers]:
        """Return the answers of each unit, sampled with the weights that a student holds now.

        Raises:
            TeacherError: logits are not finite, or workers failed at a unit every time.
        """
        ...


class OwnSampler:
    """Samples in this process, one unit after another."""

    def sample(
        self, student: StudentModel, units: Sequence[SamplingUnit]
    ) -> Sequence[SampledAnswers]:
        """Return the answers of each unit."""
        return [SampledAnswers(unit.step, sample_unit(student, unit)) for unit in units]


def sample_unit(student: StudentModel, unit: SamplingUnit) -> tuple[npt.NDArray[np.int32], ...]:
    """Sample the answers of a unit with the weights that a student holds now.

    Raises:
        TeacherError: logits are not finite.
    """
    from persea.teachers.engines.transformers import TransformersEngine

    model, training = student.model, student.model.training
    model.eval()
    sampled = TransformersEngine(
        model, len(student.renderer.vocabulary), max(1, len(unit.prompts))
    ).generate_rollouts(
        unit.prompts,
        unit.stop_ids,
        unit.max_new_tokens,
        temperature=unit.temperature,
        seed=unit.seed,
    )
    model.train(training)
    return tuple(sampled)


def split_batch(
    prompts: Sequence[npt.NDArray[np.int32]],
    stop_ids: Sequence[int],
    config: OnPolicySection,
    seed: int,
    step: int,
) -> list[SamplingUnit]:
    """Split a batch of prompts into units of `config.rollouts_per_unit`.

    Args:
        prompts: token ids of each prompt.
        stop_ids: tokens that end an answer.
        config: the recipe's section `training.on_policy`.
        seed: seed of the run.
        step: training step whose weights sample the answers.
    """
    size = config.rollouts_per_unit or config.rollouts
    parts = [tuple(prompts[k : k + size]) for k in range(0, len(prompts), size)]
    random = np.random.default_rng([seed, step, SAMPLING_SEED])
    return [
        SamplingUnit(
            step,
            part,
            tuple(stop_ids),
            config.max_new_tokens,
            config.temperature,
            int(random.integers(1 << 62)),
        )
        for part in parts
    ]
