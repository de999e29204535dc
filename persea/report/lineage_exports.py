"""Write a lineage record in the forms of other tools: CycloneDX ML-BOM and SPDX 3.

Both are plain JSON of the record's own facts. Tests validate them with the libraries of the two
standards.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from persea.licences.table import spdx_id
from persea.storage import digest_json

NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # of RFC 4122, for URLs
SPDX_VERSION, SPDX_CONTEXT = "3.0.1", "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"


def cyclonedx_bom(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a CycloneDX 1.6 ML-BOM of a lineage record.

    The student is the described component; the base is its ancestor; teachers and data are
    components that it depends on.

    Args:
        record: A lineage record, as `read_lineage` returns it.
    """
    base, teachers = record["base"], record["teachers"]
    parents = [_cyclonedx_model(m) for m in (base, *teachers)]
    data = [_cyclonedx_data(k, part) for k, part in enumerate(record["data"].get("corpus", ()))]
    student = record["student"]
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "student",
        "name": str(student.get("name") or "student"),
        "version": digest_json(student["sha256"])[:12],
        "components": _cyclonedx_files("student", student["files"]),
        "pedigree": {"ancestors": [_cyclonedx_model(base, "ancestor:")]},
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "text-generation",
                "datasets": [{"ref": part["bom-ref"]} for part in data],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {
                        "type": "score",
                        "value": f"{s['value']:.4f}",
                        "slice": "/".join(
                            filter(None, (s["skill"], s.get("language"), s["effort"]))
                        ),
                        "confidenceInterval": {
                            "lowerBound": f"{s['low']:.4f}",
                            "upperBound": f"{s['high']:.4f}",
                        },
                    }
                    for s in record.get("scores", ())
                ]
            },
        },
    }
    if student.get("licence"):
        component["licenses"] = _cyclonedx_licence(str(student["licence"]))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, digest_json(record))}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {
                        "type": "application",
                        "name": "persea",
                        "version": record["software"]["persea"],
                    }
                ]
            },
            "component": component,
        },
        "components": [*parents, *data],
        "dependencies": [
            {"ref": "student", "dependsOn": [c["bom-ref"] for c in (*parents, *data)]},
        ],
    }


def _cyclonedx_model(parent: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"{prefix}model:{parent['name']}",
        "name": parent["model"],
        "licenses": _cyclonedx_licence(str(parent["licence"])),
        "properties": [
            {"name": f"persea:{key}", "value": str(parent[key])}
            for key in ("fingerprint", "family", "tokenizer", "template")
            if parent.get(key)
        ],
    }
    if parent.get("revision"):
        model["version"] = parent["revision"]
    if parent.get("files") and not prefix:
        model["components"] = _cyclonedx_files(parent["name"], parent["files"])
    return model


def _cyclonedx_files(owner: str, files: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "bom-ref": f"file:{owner}:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for name, digest in files.items()
    ]


def _cyclonedx_data(index: int, part: Mapping[str, Any]) -> dict[str, Any]:
    name = part.get("file") or part.get("hub") or f"{part['generated']} generated {part['skill']}"
    data: dict[str, Any] = {"type": "data", "bom-ref": f"corpus:{index}", "name": str(name)}
    if part.get("licence"):
        data["licenses"] = _cyclonedx_licence(str(part["licence"]))
    if part.get("sha256"):
        data["hashes"] = [{"alg": "SHA-256", "content": part["sha256"]}]
    return data


def _cyclonedx_licence(licence: str) -> list[dict[str, Any]]:
    known = spdx_id(licence)
    return [{"license": {"id": known} if known else {"name": licence}}]


def spdx_document(record: Mapping[str, Any], created: datetime) -> dict[str, Any]:
    """Return an SPDX 3.0.1 document with the AI and dataset profiles, as JSON-LD.

    Args:
        record: A lineage record, as `read_lineage` returns it.
        created: When the record was written.
    """
    root = f"urn:spdx:persea:{digest_json(record)[:32]}"
    info = "_:creation"
    graph: list[dict[str, Any]] = [
        {
            "type": "CreationInfo",
            "@id": info,
            "specVersion": SPDX_VERSION,
            "created": created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "createdBy": [f"{root}:persea"],
        },
        _element(root, "SoftwareAgent", "persea", f"persea {record['software']['persea']}"),
    ]
    student = record["student"]
    graph.append(
        _element(root, "ai_AIPackage", "student", str(student.get("name") or "student"))
        | {
            "software_packageVersion": digest_json(student["sha256"])[:12],
            "software_primaryPurpose": "model",
            "verifiedUsing": _spdx_hashes(student["files"].values()),
        }
    )
    for parent in (record["base"], *record["teachers"]):
        graph.append(
            _element(root, "ai_AIPackage", f"model-{parent['name']}", parent["model"])
            | {
                "software_packageVersion": parent["revision"] or parent["fingerprint"][:12],
                "software_primaryPurpose": "model",
                "verifiedUsing": _spdx_hashes(parent.get("files", {}).values()),
            }
        )
    data = record["data"].get("corpus", ())
    for k, part in enumerate(data):
        described = _cyclonedx_data(k, part)
        graph.append(
            _element(root, "dataset_DatasetPackage", f"corpus-{k}", described["name"])
            | {
                "dataset_datasetType": ["text"],
                "software_primaryPurpose": "data",
                "verifiedUsing": _spdx_hashes(filter(None, [part.get("sha256")])),
            }
        )
    links = [
        ("descendantOf", "base", [f"{root}:model-{record['base']['name']}"]),
        ("dependsOn", "teachers", [f"{root}:model-{t['name']}" for t in record["teachers"]]),
        ("trainedOn", "data", [f"{root}:corpus-{k}" for k in range(len(data))]),
    ]
    for kind, name, targets in links:
        if targets:
            graph.append(
                _element(root, "Relationship", f"relationship-{name}", name)
                | {"relationshipType": kind, "from": f"{root}:student", "to": targets}
            )
    _add_licences(graph, root, record)
    ids = [element["spdxId"] for element in graph[1:]]
    graph.append(
        _element(root, "SpdxDocument", "document", "lineage of a distilled model")
        | {
            "element": ids,
            "rootElement": [f"{root}:student"],
            "profileConformance": ["core", "software", "ai", "dataset", "simpleLicensing"],
        }
    )
    return {"@context": SPDX_CONTEXT, "@graph": graph}


def _add_licences(graph: list[dict[str, Any]], root: str, record: Mapping[str, Any]) -> None:
    """Add one licence text and one relationship for the student and each of its parents."""
    stated = {f"model-{m['name']}": m["licence"] for m in (record["base"], *record["teachers"])}
    stated["student"] = str(record["student"].get("licence") or "")
    for name, licence in stated.items():
        if not licence or licence == "unknown":
            continue
        expression = spdx_id(licence) or f"LicenseRef-{digest_json(licence)[:12]}"
        graph.append(
            _element(
                root,
                "simplelicensing_LicenseExpression",
                f"licence-{name}",
                licence,
            )
            | {"simplelicensing_licenseExpression": expression}
        )
        graph.append(
            _element(root, "Relationship", f"licensed-{name}", f"licence of {name}")
            | {
                "relationshipType": "hasDeclaredLicense",
                "from": f"{root}:{name}",
                "to": [f"{root}:licence-{name}"],
            }
        )


def _element(root: str, kind: str, name: str, label: str) -> dict[str, Any]:
    return {
        "type": kind,
        "spdxId": f"{root}:{name}",
        "creationInfo": "_:creation",
        "name": label,
    }


def _spdx_hashes(digests: Any) -> list[dict[str, str]]:
    return [{"type": "Hash", "algorithm": "sha256", "hashValue": d} for d in sorted(set(digests))]
