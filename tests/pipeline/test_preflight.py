"""What cannot be in the end is told in the beginning."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from persea.config.schema import OnPolicy, Training
from persea.errors import EnvironmentLacks, PerseaError, RecipeError
from persea.pipeline.preflight import refuse_mute, refuse_training
from persea.training.distributed.world import How, Shard, World

OWN = OnPolicy(after=2, rollouts=16)
FAR = SimpleNamespace(name="far", endpoint=SimpleNamespace(budget=10, protocol="completions"))
NEAR = SimpleNamespace(name="near", endpoint=None)


def river(training: Training, how: How = How(), world: World = World(), teachers: tuple[Any, ...] = (NEAR,)) -> Any:  # noqa: B008 (frozen)
    return SimpleNamespace(recipe=SimpleNamespace(training=training, teachers=teachers), how=how, world=world, items=lambda split: 1 // 0)


@pytest.mark.parametrize(("asked", "kind", "words"), [
    (river(Training(batch=4), How(5)), RecipeError, "a batch of 4 conversations cannot be split over 5 processes"),
    (river(Training(batch=4), world=World(0, 5)), RecipeError, "a batch of 4 conversations cannot be split over 5 processes"),
    (river(Training(on_policy=OWN), How(2, Shard.FSDP)), RecipeError, "cannot answer for itself"),
    (river(Training(on_policy=OWN), How(2), teachers=(NEAR, FAR)), RecipeError, "each of 2 processes would spend the budget of far"),
    (river(Training(report_to="trackio")), EnvironmentLacks, "trackio, which is not installed")])
def test_a_training_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, asked: Any, kind: type[PerseaError], words: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(kind, match=words):
        refuse_training(asked)


@pytest.mark.parametrize("asked", [
    river(Training()), river(Training(batch=4), How(4, Shard.FSDP), teachers=(FAR,)), river(Training(on_policy=OWN), How(2)),
    river(Training(on_policy=OWN), How(1, Shard.FSDP), teachers=(FAR,))])
def test_one_that_can_be_is_not(asked: Any) -> None:
    refuse_training(asked)


def test_only_chat_routes_are_looked_at() -> None:
    refuse_mute(river(Training(), teachers=(NEAR, FAR)))
    chat = SimpleNamespace(name="chat", endpoint=SimpleNamespace(budget=0, protocol="chat"))
    with pytest.raises(ZeroDivisionError):
        refuse_mute(river(Training(), teachers=(chat,)))
