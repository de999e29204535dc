"""What the output of each stage depends on, as JSON: while that is the same, and its files are there, a stage stands."""

from __future__ import annotations

from typing import Any

from persea.pipeline.run_context import RunContext, digest_json
from persea.pipeline.status import STAGE_NAMES

POST_EVALUATION_KEYS = {
    "allow_safety_regression",
    "lm_eval_results",
}  # what the recipe says of an evaluation once it is there


def check_inputs(context: RunContext) -> object:
    return [
        context.teacher_identities,
        context.student_identity,
        context.check_samples_digest,
        context.recipe.check.model_dump(),
    ]


def audition_inputs(context: RunContext) -> object:
    return [
        context.teacher_identities,
        context.items_digest,
        context.recipe.skills,
        context.recipe.audition.model_dump(),
        context.recipe.evaluation.grading.model_dump(),
        context.recipe.capture.max_new_tokens,
    ]


def capture_inputs(context: RunContext) -> object:
    return [
        *(u.name for u in context.capture_units),
        *([b.location, b.reason] for b in context.corpus.malformed),
        *(
            ["verify", context.recipe.evaluation.grading.model_dump()]
            if context.recipe.capture.drop_wrong_answers
            else []
        ),
    ]


def train_inputs(context: RunContext) -> dict[str, Any]:
    """What a student comes from. How often it is looked at, or shown, is no part of it; what verifying left out of the lessons is."""
    return {
        "training": context.recipe.training.model_dump(mode="json", exclude={"report_to"}),
        "seed": context.recipe.seed,
        "threads": context.recipe.threads,
        "max_mask_search_tokens": context.recipe.check.max_mask_search_tokens,
        "student": context.student_identity,
        "capture": digest_json([u.name for u in context.capture_units]),
    } | (
        {"verified": [context.read_stage_record("capture")["outputs"]["wrong.json"]]}
        if context.recipe.capture.drop_wrong_answers
        else {}
    )


def evaluate_inputs(context: RunContext) -> object:
    return [
        context.read_stage_record("train")["outputs"],
        context.teacher_identities,
        context.items_digest,
        context.recipe.evaluation.model_dump(exclude=POST_EVALUATION_KEYS),
    ]


def lineage_inputs(context: RunContext) -> object:
    return [
        context.read_stage_record("train")["outputs"],
        context.recipe.hash,
        context.cast.parts,
        context.cast.pinned,
    ]


def report_inputs(context: RunContext) -> object:
    return [
        *(context.read_stage_record(stage)["key"] for stage in STAGE_NAMES[:-1]),
        context.lm_eval_digests(),
    ]
