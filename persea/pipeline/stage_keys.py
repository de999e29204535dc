"""The key of each stage: a digest of everything that the stage's output depends on.

A stage is up to date while its key and its output files are unchanged. persea's own code enters
the key as one version number a stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from persea.config.optimization import OptimizerName
from persea.pipeline.licence_gate import licence_verdict
from persea.pipeline.lineage_stage import earlier_stage_keys
from persea.pipeline.lm_eval_stage import given_results_digests
from persea.storage import digest_json
from persea.tasks.task import Split

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext

# Raise a stage's number by hand when a change of persea's code changes the stage's output:
# finished runs then compute the stage again. tests/pipeline/test_stage_versions.py holds a digest
# of each stage's output at its number. Records without a number are version 0.
STAGE_VERSIONS = {
    "check": 2,
    "audition": 2,
    "capture": 1,
    "train": 3,
    "evaluate": 1,
    "lineage": 4,
    "report": 3,
}
STAGE_NAMES = tuple(STAGE_VERSIONS)

# keys of `evaluation` that are read after the evaluation, and change none of its numbers
POST_EVALUATION_KEYS = {
    "allow_safety_regression",
    "lm_eval_results",
}
# keys of `evaluation` that matter only if lm-eval runs
LM_EVAL_KEYS = {"lm_eval", "lm_eval_include", "lm_eval_limit"}
# keys of `training` about what is saved, logged and shown, which change no weight
OBSERVATION_KEYS = {"report_to", "log_every", "checkpoint_every", "eval_steps", "store_examples"}
# keys of `training` that are in the number of steps
RESOLVED_KEYS = {"num_train_epochs", "warmup_ratio"}
# key -> its name in records and checkpoints, where it was renamed since
RECORDED_NAMES = {
    "lr_scheduler_type": "schedule",
    "gradient_accumulation_steps": "micro_batches",
}
# keys of `training.on_policy` that end a training, and change no weight of one that goes on
TRIPWIRE_KEYS = {
    "tripwire_steps",
    "min_length_ratio",
    "max_length_ratio",
    "min_ended_ratio",
    "min_entropy_ratio",
    "max_entropy_ratio",
}


def stage_key(stage: str, inputs: object) -> str:
    """Return the key of a stage: a digest of its version and its inputs."""
    return digest_json([stage, STAGE_VERSIONS[stage], inputs])


def check_inputs(context: RunContext) -> object:
    """Return the inputs of `check`, as JSON: everything that its output depends on."""
    return [
        context.models.teacher_identities,
        context.models.student_identity,
        context.check_samples_digest,
        context.recipe.check.model_dump(),
    ]


def audition_inputs(context: RunContext) -> object:
    """Return the inputs of `audition`, as JSON: everything that its output depends on."""
    audition = context.recipe.audition
    if not context.needs_audition and not audition.compare_with_base:  # nothing is measured
        return ["without questions", context.cast_without_audition.to_json()]
    return [
        context.models.teacher_identities,
        context.items_digest(Split.AUDITION),
        context.recipe.skills,
        audition.model_dump(),
        context.recipe.evaluation.grading.model_dump(),
        context.recipe.capture.max_new_tokens,
        *([context.models.student_identity] if audition.compare_with_base else []),
        *(
            [one.skill, one.language, [c.to_json() for c in one.conversations]]
            for skill in context.scored_skills
            for one in context.text_contestants(skill)[1]
        ),
    ]


def capture_inputs(context: RunContext) -> object:
    """Return the inputs of `capture`, as JSON: everything that its output depends on."""
    return [
        *(u.name for u in context.capture_units),
        *([b.location, b.reason] for b in context.corpus.malformed),
        *(
            [
                "verify",
                context.recipe.evaluation.grading.model_dump(),
                *([t.skill, t.metric, t.rubric] for t in context.recipe.tasks),
            ]
            if context.recipe.capture.drop_wrong_answers
            else []
        ),
    ]


def train_inputs(context: RunContext) -> dict[str, Any]:
    """Return everything that the trained student depends on, as JSON.

    Checkpoints hold the same value: a training resumes only from a checkpoint with equal inputs.
    Answers that `capture.drop_wrong_answers` rejected are part of it.
    """
    teach_end = context.recipe.capture.teach_end
    return {
        "training": _training_inputs(context) | {"learning_rate": context.models.learning_rate},
        "seed": context.recipe.seed,
        "threads": context.recipe.threads,
        "max_mask_search_tokens": context.recipe.check.max_mask_search_tokens,
        "student": context.models.student_identity,
        "capture": digest_json([u.name for u in context.capture_units]),
        "version": STAGE_VERSIONS["train"],
        **({} if teach_end == "auto" else {"teach_end": teach_end}),
    } | (
        {"verified": [context.stages.read_record("capture")["outputs"]["rejected.json"]]}
        if context.recipe.capture.drop_wrong_answers
        else {}
    )


def _training_inputs(context: RunContext) -> dict[str, Any]:
    """Return the section `training` without keys that change no weight, in the record's names."""
    left_out = dict.fromkeys(OBSERVATION_KEYS | RESOLVED_KEYS, True)
    section = context.training.model_dump(
        mode="json", exclude={**left_out, "on_policy": TRIPWIRE_KEYS}
    )
    # these two differ from what they are recorded as by rounding, as on another processor
    if section["precision"] == "auto":
        section["precision"] = "float32"
    if "training.optim" in context.size_defaults:
        section["optim"] = OptimizerName.ADAMW.value
    if section["on_policy"] and section["on_policy"]["rollouts_per_unit"] is None:
        del section["on_policy"]["rollouts_per_unit"]  # records from before the key stay
    return {RECORDED_NAMES.get(key, key): value for key, value in section.items()}


def _student_files(context: RunContext) -> dict[str, str]:
    """Return name -> sha256 of the student's files; the log beside them holds clock times."""
    outputs = context.stages.read_record("train")["outputs"]
    return {name: digest for name, digest in outputs.items() if name.startswith("student/")}


def evaluate_inputs(context: RunContext) -> object:
    """Return the inputs of `evaluate`, as JSON: everything that its output depends on."""
    return [
        _student_files(context),
        context.models.teacher_identities,
        context.items_digest(Split.TEST),
        context.recipe.evaluation.model_dump(
            exclude=POST_EVALUATION_KEYS
            | (set() if context.recipe.evaluation.lm_eval else LM_EVAL_KEYS)
        ),
        *([context.held_out_texts_digest] if context.recipe.evaluation.texts else []),
    ]


def lineage_inputs(context: RunContext) -> object:
    """Return the inputs of `lineage`, as JSON: everything that its output depends on."""
    return [
        _student_files(context),
        context.recipe.hash,
        context.cast.parts,
        context.cast.pinned,
        licence_verdict(context.recipe, context.folder).to_json(),
        earlier_stage_keys(context),
    ]


def report_inputs(context: RunContext) -> object:
    """Return the inputs of `report`, as JSON: everything that its output depends on."""
    return [
        *(context.stages.read_record(stage)["key"] for stage in STAGE_NAMES[:-1]),
        context.stages.read_record("train")["outputs"],
        given_results_digests(context),
    ]
