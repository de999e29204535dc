"""The losses of a training section: listed with weights, or from objective and event_weight."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from persea.config.schema import LossTerm, TrainingSection

EVENTS = (LossTerm(name="event_kl", weight=0.7), LossTerm(name="cross_entropy", weight=0.3))


@pytest.mark.parametrize(
    ("keys", "terms"),
    [
        ({}, (("event_kl", 0.7), ("cross_entropy", 1 - 0.7))),
        ({"event_weight": 1.0}, (("event_kl", 1.0),)),
        ({"event_weight": 0.0}, (("cross_entropy", 1.0),)),
        ({"objective": "sft"}, (("cross_entropy", 1.0),)),
        ({"loss": EVENTS}, (("event_kl", 0.7), ("cross_entropy", 0.3))),
        ({"loss": (LossTerm(name="mine"),)}, (("mine", 1.0),)),
    ],
)
def test_terms(keys: dict[str, Any], terms: tuple[tuple[str, float], ...]) -> None:
    assert TrainingSection(**keys).loss_terms == terms


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"loss": EVENTS, "event_weight": 0.7}, "given together with `event_weight`"),
        ({"loss": EVENTS, "objective": "events"}, "given together with `objective`"),
        ({"loss": (*EVENTS, EVENTS[0])}, "a loss is named twice"),
        (
            {"loss": EVENTS[1:], "partial_tokens": True},
            "given, but `loss` has no loss of the teachers' distributions",
        ),
    ],
)
def test_contradictions_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingSection(**keys)
    found = caught.value.errors()[0]["ctx"]["found"]
    assert words in {what for _, what, _ in found}


@pytest.mark.parametrize("term", [{"name": "Event KL"}, {"name": "event_kl", "weight": 0.0}])
def test_a_term_needs_a_name_and_a_weight_above_zero(term: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LossTerm(**term)
