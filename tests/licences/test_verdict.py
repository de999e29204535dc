"""The verdict on a student: what its base, teachers and data allow, and what it then owes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from persea.licences.table import Relation, Use
from persea.licences.verdict import (
    LicenceVerdict,
    LicensedInput,
    Outcome,
    Release,
    resolve_licences,
)

QWEN = "Qwen/Qwen3-8B"


def model(name: str, relation: Relation, known_as: str, *stated: str, host: str = "") -> Any:
    return LicensedInput(name, relation, stated, (known_as,) if known_as else (), host)


def verdict(
    base: str,
    teachers: list[Any],
    release: Release | None = None,
    decisions: dict[str, str] | None = None,
) -> LicenceVerdict:
    """The verdict on a base and teachers, each a checkpoint's name or (name, licence, host)."""
    inputs = [model("student", Relation.BASE, base)]
    for k, teacher in enumerate(teachers):
        known_as, stated, host = teacher if isinstance(teacher, tuple) else (teacher, "", "")
        inputs.append(model(f"t{k}", Relation.TEACHER, known_as, stated, host=host))
    return resolve_licences(inputs, release, decisions)


OK, DUTIES, ASK, REFUSED = Outcome
APACHE = Release(Use.PUBLISH, licence="Apache-2.0")
CASES: dict[str, tuple[str, list[Any], Release, Outcome, str]] = {
    "a Llama 3.0 teacher of a Qwen student": (
        QWEN,
        ["meta-llama/Meta-Llama-3-8B"],
        Release(),
        REFUSED,
        "improve any other large language model",
    ),
    "a Llama 3.0 teacher of a Llama 3.0 student": (
        "meta-llama/Meta-Llama-3-8B",
        ["meta-llama/Meta-Llama-3-70B-Instruct"],
        Release(),
        DUTIES,
        "",
    ),
    "a Gemma 3 teacher, released under Apache": (
        QWEN,
        ["google/gemma-3-27b-it"],
        APACHE,
        REFUSED,
        "may not be released under Apache-2.0 alone: gemma goes with it",
    ),
    "a Gemma 4 teacher, released under Apache": (QWEN, ["google/gemma-4-31b"], APACHE, OK, ""),
    "a Llama 3.1 student named Avocado-8B": (
        "meta-llama/Llama-3.1-8B",
        [QWEN],
        Release(name="Avocado-8B"),
        REFUSED,
        "'Avocado-8B' must begin with \"Llama\"",
    ),
    "a Llama 3.1 student named Llama-Avocado-8B": (
        "meta-llama/Llama-3.1-8B",
        [QWEN],
        Release(name="Llama-Avocado-8B"),
        DUTIES,
        "",
    ),
    "Qwen2.5-3B in a commercial student": (
        QWEN,
        ["Qwen/Qwen2.5-3B-Instruct"],
        Release(),
        REFUSED,
        "allows research and publish use only, the recipe's is commercial",
    ),
    "Qwen2.5-3B in research": (
        QWEN,
        ["Qwen/Qwen2.5-3B-Instruct"],
        Release(Use.RESEARCH),
        DUTIES,
        "",
    ),
    "a teacher distilled from Llama, named Avocado": (
        QWEN,
        ["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"],
        Release(name="Avocado"),
        REFUSED,
        'must begin with "Llama", because of t0',
    ),
    "gpt-oss of a host": (
        QWEN,
        [("openai/gpt-oss-120b", "", "openrouter.ai")],
        Release(),
        ASK,
        "terms of a host of open models",
    ),
    "two rules of names at once": (
        "meta-llama/Llama-3.1-8B",
        [("", "nimbus-1.0", "")],
        Release(),
        REFUSED,
        'begin with "Llama" and "Nimbus" at once',
    ),
    "an unknown licence": (
        QWEN,
        [("x/y", "my-own-licence-9", "")],
        Release(),
        ASK,
        "'my-own-licence-9' is not in persea's table",
    ),
    "Muse Spark Open, its outputs alone": (
        QWEN,
        [("meta-models/Muse-Spark-Open-816B-A42B", "", "")],
        APACHE,
        REFUSED,
        "muse-spark-open goes with it",
    ),
    "Muse Spark Open under its own licence": (
        QWEN,
        ["meta-models/Muse-Spark-Open-816B-A42B"],
        Release(Use.PUBLISH),
        DUTIES,
        "",
    ),
    "Muse Glimmer": (QWEN, ["meta-models/Muse-Glimmer-30B"], APACHE, OK, ""),
}


@pytest.fixture()
def second_name_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A licence with another rule of names: no licence in the table has one beside Llama's."""
    from persea.licences import table

    row = next(r for r in table.licence_table().licences if r.id == "llama-3.1")
    other = table.LicenceRow(
        **{**row.__dict__, "id": "nimbus-1.0", "name_prefix": "Nimbus", "names": (), "hub": ""}
    )
    rows = {**table._rows_by_name(), "nimbus-1.0": other}
    monkeypatch.setattr(table, "_rows_by_name", lambda: rows)


@pytest.mark.usefixtures("second_name_rule")
@pytest.mark.parametrize("case", CASES)
def test_a_case(case: str) -> None:
    base, teachers, release, outcome, words = CASES[case]
    found = verdict(base, teachers, release)
    assert found.outcome is outcome, found
    assert words in " ".join(f.text for f in found.problems)
    assert all(f.remedy for f in found.problems)
    assert bool(found.problems) == (outcome in (ASK, REFUSED))
    assert json.loads(json.dumps(found.to_json())) == found.to_json()


def test_duties_names_and_licences_are_united() -> None:
    found = verdict("meta-llama/Llama-3.2-3B", ["google/gemma-3-27b-it", QWEN])
    assert (found.student_name, found.student_licence) == ("Llama-student", "llama3.2 AND gemma")
    owed = {(d.kind, d.names) for d in found.duties}
    assert {("name", ("student",)), ("attribution", ("student",)), ("terms", ("t0",))} <= owed
    assert not any("t1" in names for _, names in owed)
    muse = verdict(QWEN, ["meta-models/Muse-Spark-Open-816B-A42B"])
    assert any("Built with Muse Spark Open" in d.text for d in muse.duties)
    assert muse.student_licence == "muse-spark-open"


def test_what_stays_with_its_user_needs_no_name_and_no_notice() -> None:
    found = verdict("meta-llama/Llama-3.1-8B", [QWEN], Release(Use.INTERNAL, recipe_name="avocado"))
    assert (found.student_name, found.student_licence) == ("avocado", "")
    assert {d.kind for d in found.duties} == {"policy", "threshold"}


def test_the_outputs_of_a_llama_teacher_bring_the_name_alone() -> None:
    found = verdict(QWEN, ["meta-llama/Llama-3.3-70B-Instruct"])
    assert (found.student_name, found.student_licence) == ("Llama-student", "")
    assert not {"attribution", "copy", "notice"} & {d.kind for d in found.duties}


@pytest.mark.parametrize(
    ("stated", "outcome", "ids"),
    [
        ("Apache-2.0 AND Gemma", DUTIES, ("Apache-2.0", "Gemma")),
        ("Gemma OR MIT", OK, ("MIT",)),
        ("MIT AND (mystery-1 OR Apache-2.0)", OK, ("MIT", "Apache-2.0")),
        ("Apache-2.0 WITH LLVM-exception", OK, ("Apache-2.0",)),
        ("mit, apache-2.0", OK, ("MIT", "Apache-2.0")),
        ("Apache-2.0 AND mystery-1", ASK, ("Apache-2.0", "mystery-1")),
        ("GPL-3.0-only", ASK, ("GPL-3.0-only",)),
        ("Llama 3.1 Community License", DUTIES, ("llama-3.1",)),
        ("a (broken AND", ASK, ("a (broken AND",)),
    ],
)
def test_expressions(stated: str, outcome: Outcome, ids: tuple[str, ...]) -> None:
    found = verdict(QWEN, [("", stated, "")])
    assert (found.outcome, found.licences["t0"]) == (outcome, ids)


def test_a_checkpoint_counts_whatever_its_card_or_the_recipe_state() -> None:
    found = verdict(QWEN, [("Qwen/Qwen2.5-3B-Instruct", "Apache-2.0", "")])
    assert found.outcome is REFUSED
    assert found.licences["t0"] == ("Apache-2.0", "qwen-research")


@pytest.mark.parametrize(
    ("known_as", "host", "outcome"),
    [
        ("", "api.openai.com", REFUSED),
        ("gpt-5.2", "127.0.0.1", REFUSED),  # behind a proxy of one's own
        ("openai/gpt-5", "openrouter.ai", REFUSED),
        ("", "generativelanguage.googleapis.com", REFUSED),
        ("claude-opus-4-6", "", REFUSED),
        ("", "bedrock-runtime.us-east-1.amazonaws.com", REFUSED),
        ("muse-spark-1.3", "api.meta.ai", ASK),
        (QWEN, "models.example.com", ASK),
        (QWEN, "10.0.0.7", OK),
        (QWEN, "gpu-box", OK),
        ("", "127.0.0.1", ASK),
    ],
)
def test_servers(known_as: str, host: str, outcome: Outcome) -> None:
    assert verdict(QWEN, [(known_as, "", host)]).outcome is outcome
    inputs = [
        model("student", Relation.BASE, QWEN),
        model("t0", Relation.REFERENCE, known_as, host=host),
    ]
    assert resolve_licences(inputs).outcome is OK  # measured, never learned from


def test_a_decision_answers_a_question_and_lifts_no_refusal() -> None:
    decided = {"t0": "J. Doe asked the owner, 2026-11-30"}
    unknown = verdict(QWEN, [("x/y", "", "")], decisions=decided)
    assert (unknown.outcome, dict(unknown.decisions)) == (OK, decided)
    assert "decided: J. Doe asked the owner" in unknown.findings[1].text
    assert verdict(QWEN, [("gpt-5", "", "")], decisions=decided).outcome is REFUSED
    agreed = [("gpt-5", "LicenseRef-separate-agreement", "api.openai.com")]
    assert verdict(QWEN, agreed).outcome is ASK
    assert verdict(QWEN, agreed, decisions=decided).outcome is OK


def test_a_question_names_the_line_that_answers_it() -> None:
    (problem,) = verdict(QWEN, [("x/y", "", "")]).problems
    assert problem.text == "its licence is not known"
    assert problem.remedy == (
        'write its `licence:`, or add `licence_decisions: {t0: "WHO decided WHAT, YYYY-MM-DD"}`'
    )


def test_data() -> None:
    def with_data(licence: str) -> LicenceVerdict:
        data = LicensedInput("corpus.0", Relation.DATA, (licence,), ("p.jsonl",), is_own=True)
        return resolve_licences([model("student", Relation.BASE, QWEN), data])

    assert with_data("").outcome is OK
    assert "taken for your own" in with_data("").findings[1].text
    assert with_data("muse-spark-open").student_licence == "muse-spark-open"
    assert with_data("CC-BY-NC-4.0").outcome is ASK
    theirs = LicensedInput("corpus.0", Relation.DATA, ("",), ("someone/theirs",))
    assert resolve_licences([theirs]).problems[0].text == "its licence is not known"


def test_random_weights_have_no_licence() -> None:
    assert resolve_licences([LicensedInput("student", Relation.BASE, is_random=True)]).outcome is OK


def test_a_region_is_a_question() -> None:
    found = verdict(QWEN, ["tencent/Hunyuan-A13B-Instruct"])
    assert found.outcome is ASK
    assert "grants nothing in European Union" in found.problems[0].text
