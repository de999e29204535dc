"""What the output of each stage depends on, as JSON: while that is the same, and its files are there, a stage stands."""

from __future__ import annotations

from typing import Any

from persea.pipeline.run_context import River, digest_of
from persea.pipeline.status import STAGES

AFTERWARDS = {"allow_regression", "lm_eval"}  # what the recipe says of an evaluation once it is there


def check(river: River) -> object:
    return [river.identities, river.student_identity, river.measured, river.recipe.check.model_dump()]


def audition(river: River) -> object:
    return [river.identities, river.asked, river.recipe.taught, river.recipe.audition.model_dump(), river.recipe.capture.max_new_tokens]


def capture(river: River) -> object:
    return [*(u.name for u in river.units), *([b.where, b.why] for b in river.corpus.broken), *["verify"] * river.recipe.capture.verify]


def train(river: River) -> dict[str, Any]:
    """What a student comes from. How often it is looked at, or shown, is no part of it; what verifying left out of the lessons is."""
    return {"training": river.recipe.training.model_dump(mode="json", exclude={"report_to"}), "seed": river.recipe.seed,
            "threads": river.recipe.threads, "student": river.student_identity, "capture": digest_of([u.name for u in river.units])} | (
                {"verified": [river.done("capture")["outputs"]["wrong.json"]]} if river.recipe.capture.verify else {})


def evaluate(river: River) -> object:
    return [river.done("train")["outputs"], river.identities, river.asked, river.recipe.evaluation.model_dump(exclude=AFTERWARDS)]


def lineage(river: River) -> object:
    return [river.done("train")["outputs"], river.recipe.hash, river.cast.parts, river.cast.pinned]


def report(river: River) -> object:
    return [*(river.done(stage)["key"] for stage in STAGES[:-1]), river.lm_eval()]
