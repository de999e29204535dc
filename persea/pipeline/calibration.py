"""Speeds of this machine with a recipe's own models, kept in PERSEA_HOME for later plans.

`calibrate` (persea.pipeline.calibrate) measures them; this module holds their form.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.storage import digest_json

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext

CALIBRATION_FOLDER = "calibration"
CALIBRATION_FORMAT = 2


@dataclass(frozen=True)
class Seconds:
    """Seconds of a piece of work.

    Attributes:
        wall: By the clock.
        cpu: Of this process on all cores; what other programs use is not in it.
    """

    wall: float
    cpu: float

    def __add__(self, other: Seconds) -> Seconds:
        """Add two pieces of work."""
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, times: float) -> Seconds:
        """Repeat a piece of work."""
        return Seconds(self.wall * times, self.cpu * times)


NO_TIME = Seconds(0.0, 0.0)


@dataclass(frozen=True)
class AskedSpeed:
    """A teacher that answers the prompts of one skill.

    Attributes:
        prompts: Prompts that were asked.
        answer_tokens: Mean tokens of a stored answer.
        stored_share: Share of the answers that are stored.
        stored_bytes: Bytes of a stored answer in the cache.
        writing: Time that one more prompt in a batch takes until its answer is written.
        storing: Time of a prompt to score and to store its answer.
        opening: Time of a batch beyond that of its prompts: its last answers are computed nearly
            alone.
    """

    prompts: int
    answer_tokens: float
    stored_share: float
    stored_bytes: float
    writing: Seconds
    storing: Seconds
    opening: Seconds = NO_TIME

    def asking(self, prompts: float, batch: float) -> Seconds:
        """Return the time to write the answers of prompts that are asked in batches."""
        return self.writing * prompts + self.opening * max(1.0, prompts / batch)

    def with_opening(self, small: AskedSpeed) -> AskedSpeed:
        """Return this speed, with the time of a batch split off by a measurement of fewer prompts.

        Measurements hold the time of all prompts of one batch: with a line through both, a batch of
        another size costs what the line says.
        """
        n, few = self.prompts, small.prompts
        slope = (self.writing * n + small.writing * -few) * (1 / (n - few))
        wall, cpu = (
            min(max(one, 0.0), whole)
            for one, whole in zip(astuple(slope), astuple(self.writing), strict=True)
        )
        writing = Seconds(wall, cpu)
        return replace(self, writing=writing, opening=(self.writing + writing * -1.0) * n)


@dataclass(frozen=True)
class ScoredSpeed:
    """A teacher that scores given texts.

    Attributes:
        text_bytes: Bytes of text that were scored.
        tokens_per_byte: Tokens of a byte of text.
        stored_bytes: Bytes of a byte of text in the cache; 0 if it was only read.
        capturing: Time of a byte of text to score and to store it.
        reading: Time of a byte of text whose log-probabilities are all that is kept.
    """

    text_bytes: int
    tokens_per_byte: float
    stored_bytes: float
    capturing: Seconds
    reading: Seconds


@dataclass(frozen=True)
class TrainedSpeed:
    """The student in training.

    Attributes:
        steps: Steps that were measured.
        step: Time of a step.
        example: Time to make the example of an answer.
        example_bytes: Bytes of the stored example of an answer.
        loading: Time before the first step that does not depend on the number of answers.
        saving: Time after the last step: checkpoint and student.
    """

    steps: int
    step: Seconds
    example: Seconds
    example_bytes: float
    loading: Seconds = NO_TIME
    saving: Seconds = NO_TIME


@dataclass(frozen=True)
class Calibration:
    """Speeds of a recipe's models on this machine.

    Attributes:
        asked: "teacher/skill" -> speed. The student's base has the name "base".
        scored: The same, for given texts.
        trained: The student.
        loading: Model -> time to load it.
        measured_on: Day of the measurement.
    """

    asked: Mapping[str, AskedSpeed] = field(default_factory=dict)
    scored: Mapping[str, ScoredSpeed] = field(default_factory=dict)
    trained: TrainedSpeed | None = None
    loading: Mapping[str, Seconds] = field(default_factory=dict)
    measured_on: str = ""

    def answer_tokens(self, skill: str, teachers: Sequence[str]) -> float | None:
        """Return the mean tokens of a skill's answers over teachers; None = not measured."""
        found = [
            one.answer_tokens
            for teacher in teachers
            if (one := self.asked.get(f"{teacher}/{skill}")) and one.answer_tokens
        ]
        return sum(found) / len(found) if found else None

    def asked_speed(self, model: str, skill: str) -> AskedSpeed | None:
        """Return the speed of a model on a skill, or on the mean of its measured skills."""
        if found := self.asked.get(f"{model}/{skill}"):
            return found
        others = [s for key, s in self.asked.items() if key.partition("/")[0] == model]
        return _mean_speed(others) if others else None

    def scored_speed(self, model: str) -> ScoredSpeed | None:
        """Return the speed of a model on given texts, of the skill with most text."""
        found = [s for key, s in self.scored.items() if key.partition("/")[0] == model]
        return max(found, key=lambda s: s.text_bytes, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {"format": CALIBRATION_FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """Return a calibration from `to_json`."""
        trained = value["trained"]
        return cls(
            {k: AskedSpeed(**_with_seconds(v)) for k, v in value["asked"].items()},
            {k: ScoredSpeed(**_with_seconds(v)) for k, v in value["scored"].items()},
            TrainedSpeed(**_with_seconds(trained)) if trained else None,
            {k: Seconds(**v) for k, v in value["loading"].items()},
            value["measured_on"],
        )


def _with_seconds(value: Mapping[str, Any]) -> dict[str, Any]:
    return {k: Seconds(**v) if isinstance(v, dict) else v for k, v in value.items()}


def _mean_speed(speeds: Sequence[AskedSpeed]) -> AskedSpeed:
    n = len(speeds)
    writing, storing, opening = NO_TIME, NO_TIME, NO_TIME
    for speed in speeds:
        writing, storing = writing + speed.writing, storing + speed.storing
        opening = opening + speed.opening
    return AskedSpeed(
        sum(s.prompts for s in speeds),
        sum(s.answer_tokens for s in speeds) / n,
        sum(s.stored_share for s in speeds) / n,
        sum(s.stored_bytes for s in speeds) / n,
        writing * (1 / n),
        storing * (1 / n),
        opening * (1 / n),
    )


def calibration_file(context: RunContext) -> Path:
    """Return the file of a recipe's calibration: named by models, settings and machine."""
    recipe, models = context.recipe, context.models
    inputs = [
        CALIBRATION_FORMAT,
        platform.node(),
        os.cpu_count(),
        models.teacher_identities,
        models.student_identity,
        recipe.threads,
        recipe.capture.model_dump(mode="json", exclude={"store", "max_hours", "max_total_tokens"}),
        recipe.training.batch_size,
        recipe.training.gradient_accumulation_steps,
        recipe.training.precision,
        recipe.training.max_length,
    ]
    name = digest_json(inputs)[:32]
    return storage.persea_home() / CALIBRATION_FOLDER / f"{name}.json"


def read_calibration(context: RunContext) -> Calibration | None:
    """Return the calibration of a recipe's models on this machine; None if there is none.

    A damaged file counts as none: `--calibrate` writes it anew.
    """
    path = calibration_file(context)
    if not path.is_file():
        return None
    try:
        return Calibration.from_json(json.loads(path.read_bytes()))
    except (KeyError, TypeError, ValueError):
        return None


def write_calibration(context: RunContext, calibration: Calibration) -> Path:
    """Keep a calibration, and return its file.

    Raises:
        StorageError: It cannot be written.
    """
    path = calibration_file(context)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, calibration.to_json())
    return path
