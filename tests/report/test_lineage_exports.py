"""Exports of a lineage are valid by the standards' own libraries."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from persea.report.lineage_exports import cyclonedx_bom, spdx_document

DIGEST = "ab" * 32
PARENT = {
    "name": "base",
    "model": "some/base",
    "revision": "1" * 40,
    "family": "llama",
    "licence": "apache-2.0",
    "fingerprint": DIGEST,
    "files": {"model.safetensors": DIGEST, "config.json": DIGEST},
    "tokenizer": DIGEST,
}
RECORD: dict[str, Any] = {
    "student": {
        "name": "Llama-Pear",
        "licence": "Llama 3.2 Community License",
        "sha256": {"model.safetensors": DIGEST},
        "files": {"model.safetensors": DIGEST},
    },
    "base": PARENT,
    "teachers": [
        PARENT | {"name": "qwen", "licence": "unknown", "revision": ""},
        {k: v for k, v in PARENT.items() if k != "files"} | {"name": "remote"},
    ],
    "data": {
        "corpus": [
            {"skill": "code", "licence": "", "generated": 24},
            {"skill": "code", "licence": "CC-BY-4.0", "file": "a.jsonl", "sha256": DIGEST},
            {"skill": "code", "licence": "", "hub": "a/b", "revision": ""},
        ]
    },
    "software": {"persea": "1.2.3"},
    "scores": [
        {"skill": "code", "language": "", "effort": "none", "value": 0.5, "low": 0.4, "high": 0.6}
    ],
}


def test_the_ml_bom_is_valid_by_cyclonedx_own_library() -> None:
    pytest.importorskip("jsonschema")
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    bom = cyclonedx_bom(RECORD)
    assert validator.validate_str(json.dumps(bom)) is None
    student = bom["metadata"]["component"]
    assert student["name"] == "Llama-Pear"
    assert student["licenses"] == [{"license": {"name": "Llama 3.2 Community License"}}]
    assert student["pedigree"]["ancestors"][0]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert [c["name"] for c in bom["components"]] == [
        *["some/base"] * 3,
        "24 generated code",
        "a.jsonl",
        "a/b",
    ]
    assert cyclonedx_bom(RECORD) == bom  # the serial number is that of the record
    bom["metadata"]["component"]["licenses"] = [{"license": {"id": "no such licence"}}]
    assert validator.validate_str(json.dumps(bom)) is not None


def test_the_spdx_document_is_valid_by_spdx_own_model() -> None:
    spdx = pytest.importorskip("spdx_python_model")
    model = spdx.v3_0_1
    document = spdx_document(RECORD, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    objects = model.SHACLObjectSet()
    model.JSONLDDeserializer().read(io.StringIO(json.dumps(document)), objects)
    assert not objects.missing_ids
    packages = {p.name for p in objects.foreach_type(model.ai_AIPackage)}
    assert packages == {"Llama-Pear", "some/base"}
    assert len(list(objects.foreach_type(model.dataset_DatasetPackage))) == 3
    kinds = sorted(
        r.relationshipType.rpartition("/")[2] for r in objects.foreach_type(model.Relationship)
    )
    assert kinds == [
        "dependsOn",
        "descendantOf",
        *["hasDeclaredLicense"] * 3,
        "trainedOn",
    ]
