"""The stage `lineage`: collect what the record of a student's origin holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.pipeline.licence_gate import write_notice
from persea.pipeline.model_refs import BASE
from persea.storage import digest_json

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext

EARLIER_STAGES = ("check", "audition", "capture", "train", "evaluate")


def write_lineage(context: RunContext, folder: Path) -> None:
    """Write lineage.json, NOTICE, and the local places of the files that the record speaks of."""
    from persea.report.lineage import RECORD_FILE, SOURCES_FILE, lineage_record

    models = context.models
    verdict = write_notice(context.recipe, context.folder, folder)
    record = lineage_record(
        context.folder / "train" / "student",
        models.lineage_parent(BASE),
        [models.lineage_parent(name) for name in models.teacher_names],
        context.recipe.hash,
        _data_entry(context),
        context.cast,
        verdict,
        {
            "recipe": {"seed": context.recipe.seed, "threads": context.recipe.threads},
            "stages": earlier_stage_keys(context),
            "scores": _scores(context),
            "training": {"learning_rate": models.learning_rate} | trained_precision(context.folder),
        }
        | _conditional_entries(context),
    )
    storage.write_json_with_checksum(folder / RECORD_FILE, record)
    storage.write_json_with_checksum(folder / SOURCES_FILE, _sources(context))


def trained_precision(folder: Path) -> dict[str, str]:
    """Return the precision of a training that left it to its machine, as that machine chose.

    Args:
        folder: The run folder.

    Returns:
        {"precision": "bfloat16" or "float32"}; {} where the recipe names the precision.
    """
    counts = storage.read_json(folder / "train" / "dataset.json")
    return {key: counts[key] for key in ("precision",) if key in counts}


def _conditional_entries(context: RunContext) -> dict[str, Any]:
    """Return the defaults that follow the student's size, and digests of task files, if any."""
    task_files = {str(f): storage.digest_file(f) for f in context.task_files}
    entries: dict[str, Any] = {"size_defaults": context.size_defaults, "task_files": task_files}
    if context.canaries:  # the digest of a secret key: it fixes the coins and reveals none
        entries["canaries"] = {"commitment": context.canaries.commitment}
    return {name: value for name, value in entries.items() if value}


def earlier_stage_keys(context: RunContext) -> dict[str, str]:
    """Return the key of each finished stage before this one."""
    return {
        stage: str(context.stages.read_record(stage)["key"])
        for stage in EARLIER_STAGES
        if context.stages.has_record(stage)
    }


def _data_entry(context: RunContext) -> dict[str, Any]:
    """Describe the captured answers and the prompts and texts that they come from."""
    entry: dict[str, Any] = {
        "units": digest_json([u.name for u in context.capture_units]),
        "corpus": [_corpus_part(context, k) for k in range(len(context.recipe.corpus))],
    }
    summary = storage.read_json(context.folder / "capture" / "summary.json")
    entry["captured"] = {
        name: {key: counts[key] for key in ("prompts", "kept", "tokens")}
        for name, counts in summary["teachers"].items()
    }
    if context.unwritable_texts:
        entry["unwritable_texts"] = [one.to_json() for one in context.unwritable_texts]
        entry["max_unwritable_share"] = context.recipe.check.max_unwritable_share
    return entry


def _corpus_part(context: RunContext, index: int) -> dict[str, Any]:
    """Describe one part of the corpus: its origin, licence and digest."""
    part = context.recipe.corpus[index]
    entry: dict[str, Any] = {"skill": part.skill, "licence": part.licence}
    if own_file := part.file or part.texts:
        path = Path(own_file)
        return entry | {"file": path.name, "sha256": storage.digest_path(path)}
    if part.hub:
        return entry | {"hub": part.hub.name, "revision": part.hub.revision}
    return entry | {"generated": part.generate}


def _scores(context: RunContext) -> list[dict[str, Any]]:
    """Return the scores of the student; none before the evaluation."""
    if not context.stages.has_record("evaluate"):
        return []
    evaluation = storage.read_json(context.folder / "evaluate" / "evaluation.json")
    return [s for s in evaluation["scores"] if s["model_name"] == evaluation["student"]]


def _sources(context: RunContext) -> dict[str, Any]:
    """Return where the files of base, teachers and corpus are on this machine."""
    models = {BASE: context.recipe.student.model} | {
        name: context.models.teacher_ref(name).model for name in context.models.teacher_names
    }
    local = {name: Path(path).expanduser().absolute() for name, path in models.items()}
    return {
        "models": {name: str(path) for name, path in local.items() if path.exists()},
        "corpus": {
            str(k): str(Path(own_file).absolute())
            for k, part in enumerate(context.recipe.corpus)
            if (own_file := part.file or part.texts)
        },
    }
