"""Sentences claim what the numbers and their intervals support, and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from persea.report.claims import claims, headline
from persea.report.run_files import read_run_files
from persea.report.skill_comparison import compare_skills
from tests.report.test_page import (
    ABILITY,
    TEACHERS,
    change,
    evaluated,
    page_of,
    run,  # noqa: F401 (a fixture)
    scored,
    whole,  # noqa: F401 (a fixture)
    words_of,
)


def test_headline_names_the_lowest(whole: Path) -> None:
    page = words_of((whole / "report" / "index.html").read_text())
    assert (
        "One student, three teachers: the student retains 99 % of the best teacher's score on "
        "safety, "
        "90 % on languages, 90 % on code and 64 % (its lowest) on reasoning."
    ) in page


def test_sentences_claim_what_the_intervals_support(whole: Path) -> None:
    page = words_of((whole / "report" / "index.html").read_text())
    assert (
        "Compared with the best teacher, the student is not distinguishable (the 95 % interval of "
        "the difference contains 0) on languages, code and safety; below on reasoning."
    ) in page
    assert (
        "Compared with its base model, the student is above on languages, code, reasoning and "
        "safety." in page
    )
    assert (
        "The student is nowhere significantly below its base model (9 comparisons: each skill, "
        "language and thinking effort)." in page
    )
    assert (
        "No single teacher is among the best on all four skills: qwen is below the best on code, "
        "reasoning and safety; "
        "gemma is below the best on languages and reasoning; gpt-oss is below the best on "
        "languages."
    ) in page


def test_a_teacher_that_is_among_the_best_on_all_skills_is_named(run: Path) -> None:
    evaluated(
        run,
        lambda v: v["scores"].__setitem__(
            slice(None),
            [
                scored(
                    s["model_name"],
                    s["skill"],
                    1.0 if s["model_name"] == "gemma" else 0.4,
                    s["n"],
                    s["language"],
                )
                for s in v["scores"]
            ],
        ),
    )
    page = words_of(page_of(run))
    assert (
        "One teacher is among the best on all four skills, as far as the intervals show: gemma."
        in page
    )
    assert (
        "Compared with its base model, the student is not distinguishable (the 95 % interval of "
        "the "
        "difference contains 0) "
        "on languages, code, reasoning and safety."
    ) in page


def test_of_many_teachers_only_the_broadest_is_named(run: Path) -> None:
    def five(value: Any) -> None:
        more = {"glm": 0.05, "phi": 0.05}
        value["teachers"] += more
        value["scores"] = [s for s in value["scores"] if not s["language"]]
        value["scores"] += [
            scored(t, skill, share, 200) for t, share in more.items() for skill in ABILITY
        ]

    evaluated(run, five)
    change(
        run / "lineage" / "lineage.json",
        lambda v: v.update(teachers=v["teachers"] + [{"name": "glm"}, {"name": "phi"}]),
    )
    assert (
        "No single teacher is among the best on all four skills: even gpt-oss is below the best on "
        "languages." in words_of(page_of(run))
    )


def test_where_no_teacher_is_right_the_student_is_compared_with_its_base(run: Path) -> None:
    files = read_run_files(run).evaluation
    ignorant = [
        replace(c, teachers=tuple(replace(s, value=0.0) for s in c.teachers))
        for c in compare_skills(files, "x")[:1]
    ]
    assert words_of(headline(ignorant)) == (
        "One student, three teachers: the student is right in 71 % of the questions on languages "
        "(its base model in 33 %); no teacher answered anything right on languages."
    )
    assert not any("among the best" in sentence for sentence in claims(files, ignorant))


def test_many_skills_are_summarised_as_a_range(run: Path) -> None:
    def more(value: Any) -> None:
        value["scores"] += [
            scored(name, skill, share, 100)
            for skill, share in (("tools", 0.2), ("poems", 0.9))
            for name, share in {
                "avocado": share,
                "llama-base": 0.1,
                **dict.fromkeys(TEACHERS, 0.8),
            }.items()
        ]

    evaluated(run, more)
    assert (
        "the student retains between 25 % (tools, its lowest) and 112 % (poems) of the best "
        "teacher's score on six skills." in words_of(page_of(run))
    )


def test_bits_that_got_worse_are_named(run: Path) -> None:
    path = run / "evaluate" / "evaluation.json"
    value = json.loads(path.read_text())
    bits = value["bits_per_byte"]
    bits["avocado"]["code"], bits["llama-base"]["code"] = 1.0, 0.36
    bits["avocado"]["safety"] = bits["llama-base"]["safety"] + 0.01
    path.write_text(json.dumps(value))
    files = read_run_files(run).evaluation
    sentences = claims(files, compare_skills(files, "x"))
    (sentence,) = [s for s in sentences if "bits per byte" in s]
    assert "in bits per byte: code (0.36 to 1.00)." in sentence and "safety" not in sentence
