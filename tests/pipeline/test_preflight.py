"""What cannot be in the end is told in the beginning."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from persea.config.optimization import OptimizerName
from persea.config.schema import OnPolicySection, TrainingSection
from persea.errors import MissingRequirementError, PerseaError, RecipeError
from persea.pipeline.preflight import refuse_impossible_training, refuse_missing_logprobs
from persea.training.distributed.world import LaunchOptions, ParallelStrategy, World

OWN = OnPolicySection(start_step=2, rollouts=16)
FAR = SimpleNamespace(
    name="far", endpoint=SimpleNamespace(max_total_tokens=10, protocol="completions")
)
NEAR = SimpleNamespace(name="near", endpoint=None)


def river(
    training: TrainingSection,
    how: LaunchOptions | None = None,
    world: World | None = None,
    teachers: tuple[Any, ...] = (NEAR,),
) -> Any:
    return SimpleNamespace(
        recipe=SimpleNamespace(training=training, teachers=teachers),
        training=training,
        launch_options=how or LaunchOptions(),
        world=world or World(),
        held_out_items=lambda split: 1 // 0,
    )


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        (
            river(TrainingSection(batch_size=4), LaunchOptions(5)),
            RecipeError,
            "a batch of 4 conversations cannot be split over 5 processes",
        ),
        (
            river(TrainingSection(batch_size=4), world=World(0, 5)),
            RecipeError,
            "a batch of 4 conversations cannot be split over 5 processes",
        ),
        (
            river(TrainingSection(on_policy=OWN), LaunchOptions(2, ParallelStrategy.FSDP)),
            RecipeError,
            "cannot generate answers",
        ),
        (
            river(TrainingSection(on_policy=OWN), LaunchOptions(2), teachers=(NEAR, FAR)),
            RecipeError,
            "each of 2 processes would spend the budget of far",
        ),
        (
            river(TrainingSection(report_to="trackio")),
            MissingRequirementError,
            "trackio, which is not installed",
        ),
        (
            river(
                TrainingSection(optim=OptimizerName.MUON), LaunchOptions(2, ParallelStrategy.FSDP)
            ),
            RecipeError,
            "Muon needs whole matrices",
        ),
        (
            river(TrainingSection(optim=OptimizerName.ADAMW_8BIT)),
            MissingRequirementError,
            "optim: adamw_8bit needs",
        ),
    ],
)
def test_a_training_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: Any, kind: type[PerseaError], words: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(kind, match=words):
        refuse_impossible_training(asked)


@pytest.mark.parametrize(
    "asked",
    [
        river(TrainingSection()),
        river(
            TrainingSection(batch_size=4), LaunchOptions(4, ParallelStrategy.FSDP), teachers=(FAR,)
        ),
        river(TrainingSection(on_policy=OWN), LaunchOptions(2)),
        river(
            TrainingSection(on_policy=OWN), LaunchOptions(1, ParallelStrategy.FSDP), teachers=(FAR,)
        ),
    ],
)
def test_one_that_can_be_is_not(asked: Any) -> None:
    refuse_impossible_training(asked)


def test_only_chat_routes_are_looked_at() -> None:
    refuse_missing_logprobs(river(TrainingSection(), teachers=(NEAR, FAR)))
    chat = SimpleNamespace(
        name="chat", endpoint=SimpleNamespace(max_total_tokens=0, protocol="chat")
    )
    with pytest.raises(ZeroDivisionError):
        refuse_missing_logprobs(river(TrainingSection(), teachers=(chat,)))
