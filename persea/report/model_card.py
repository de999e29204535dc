"""Front matter of the model card, which the hub reads."""

from __future__ import annotations

import re
from typing import Any

import yaml

from persea.evaluation.text_report import TextReport
from persea.report.run_files import RunFiles

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
    lineage = files.lineage
    parent_licences = {str(m.get("licence") or "") for m in (lineage.base, *lineage.teachers)}
    shared = parent_licences.pop() if len(parent_licences) == 1 else ""
    licence = str(lineage.student.get("licence") or shared).lower()
    card: dict[str, Any] = {"license": licence}
    if licence not in HUB_LICENCES:
        name = re.sub(r"[^a-z0-9.]+", "-", licence) or "see-lineage"
        card = {"license": "other", "license_name": name}
    base = str(lineage.base.get("model", ""))
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base)
    card["base_model"] = [base] if is_hub_name else []  # the hub cannot link to a local folder
    card["tags"] = ["persea", "distillation"]
    languages = {s.language for s in files.evaluation.scores} | {x.language for x in files.examples}
    languages |= {g.language for g in texts.groups} if texts else set()
    card["language"] = sorted(name for name in languages if re.fullmatch(r"[a-z]{2,3}", name))
    return yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
