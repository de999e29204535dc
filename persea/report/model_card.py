"""Front matter of the model card, which the hub reads."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import yaml

from persea.evaluation.text_report import TextReport
from persea.report.run_files import RunFiles

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Licence names that the hub knows; every other licence is "other" there.
HUB_LICENCES = (
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "gpl-3.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc0-1.0",
    "openrail",
    "gemma",
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2",
    "llama3.3",
    "llama4",
)


def model_card_front_matter(files: RunFiles, texts: TextReport | None = None) -> str:
    """Return the YAML front matter of the card.

    `base_model` names the base alone: on the hub it means "made from these weights", which is not
    true of teachers. The licence is the student's in the lineage; else the one that all parents
    share; else "other".
    """
    # not at the top: it takes half a second, and a page needs no hub
    from huggingface_hub import ModelCardData

    lineage = files.lineage
    parent_licences = {str(m.get("licence") or "") for m in (lineage.base, *lineage.teachers)}
    shared = parent_licences.pop() if len(parent_licences) == 1 else ""
    licence = str(lineage.student.get("licence") or shared).lower()
    is_known = licence in HUB_LICENCES
    licence_name = None if is_known else re.sub(r"[^a-z0-9.]+", "-", licence) or "see-lineage"
    base = str(lineage.base.get("model", ""))
    languages = {s.language for s in files.evaluation.scores} | {x.language for x in files.examples}
    languages |= {g.language for g in texts.groups} if texts else set()
    results = _results(files, texts)
    card = ModelCardData(
        license=licence if is_known else "other",
        license_name=licence_name,
        # the hub cannot link to a local folder
        base_model=[base] if HUB_NAME.fullmatch(base) else [],
        datasets=_data_sets(files.recipe) or None,
        language=sorted(name for name in languages if re.fullmatch(r"[a-z]{2,3}", name)) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["persea", "distillation"],
        model_name=card_title(files) if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml()).strip() + "\n"


def card_title(files: RunFiles) -> str:
    """Return the student's name: what its licences ask for, or the recipe's name."""
    return str(files.lineage.student.get("name") or files.evaluation.student)


def answers_are_given(recipe: str) -> bool:
    """Return whether the teachers scored answers of the corpus instead of writing their own."""
    data = yaml.safe_load(recipe)
    capture = data.get("capture") if isinstance(data, dict) else None
    return isinstance(capture, dict) and capture.get("answers") == "given"


def _data_sets(recipe: str) -> list[str]:
    """Return the hub data sets that a recipe's corpus names."""
    data = yaml.safe_load(recipe)
    corpus = data.get("corpus") if isinstance(data, dict) else None
    parts = [part for part in corpus or () if isinstance(part, dict)]
    hubs = [part["hub"] for part in parts if isinstance(part.get("hub"), dict)]
    names = [str(hub.get("name", "")) for hub in hubs]
    return list(dict.fromkeys(name for name in names if HUB_NAME.fullmatch(name)))


def _results(files: RunFiles, texts: TextReport | None) -> list[EvalResult]:
    """Return the student's scores, and its bits per byte of held-out texts."""
    from huggingface_hub import EvalResult

    evaluation = files.evaluation
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"persea-{s.skill}",
            dataset_name=f"{s.skill}, {s.n} held-out questions",
            metric_type="accuracy",
            metric_value=round(s.value, 4),
        )
        for s in evaluation.scores
        if (s.model_name, s.language, s.effort) == (evaluation.student, "", evaluation.effort)
    ]
    for group in texts.overall if texts else ():
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=f"persea-{group.skill}-texts",
                dataset_name=f"{group.skill}, {group.documents} held-out documents",
                metric_type="bits_per_byte",
                metric_value=round(group.bits_per_byte[texts.student].value, 4) if texts else 0,
            )
        )
    return results
