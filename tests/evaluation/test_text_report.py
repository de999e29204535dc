"""Held-out texts: bits per byte, differences and the share of the gap, from the documents' bits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import TypeAdapter

from persea.data.held_out_texts import HeldOutText
from persea.evaluation.text_bits import DocumentBits, TextWindow, TextWindows
from persea.evaluation.text_report import (
    TextReport,
    compare_on_texts,
    document_records,
)

RATES = {  # model -> bits per byte in id, th, en
    "student": (2.0, 1.2, 1.36),
    "base": (2.5, 1.7, 1.36),
    "a": (1.3, 1.5, 1.30),
    "b": (1.6, 0.7, 1.38),
    "ref": (1.0, 1.0, 1.0),
}
LANGUAGES = ("id", "th", "en")


def report(teachers: tuple[str, ...] = ("a", "b"), noise: float = 0.05, n: int = 10) -> TextReport:
    windows, bits = measured(noise, n)
    shown = {k: v for k, v in bits.items() if k in ("student", "base", "ref", *teachers)}
    return compare_on_texts(
        windows, shown, "student", "base", (*teachers, "api"), {"api": "it has no bits"}
    )


def measured(noise: float = 0.05, n: int = 10) -> tuple[TextWindows, dict[str, DocumentBits]]:
    dice = np.random.default_rng(3)
    documents = [
        HeldOutText(f"{language}:{k}", "x" * int(dice.integers(50, 150)), "world", language)
        for language in LANGUAGES
        for k in range(n)
    ]
    windows = TextWindows(
        tuple(documents),
        tuple(TextWindow(k, d.text, True) for k, d in enumerate(documents)),
        {"th:99": "gemma: broken"},
    )
    own_D = dice.normal(size=len(documents))  # a document is hard for every model
    bits = {}
    for name, rates in RATES.items():
        rate_D = np.repeat(rates, n) + 0.2 * own_D + noise * dice.normal(size=len(documents))
        bits[name] = DocumentBits(
            rate_D * np.array([d.num_bytes for d in documents]), np.full(len(documents), 8.0)
        )
    return windows, bits


def test_every_language_has_its_best_teacher_and_its_gap() -> None:
    found = report(noise=0.0)
    groups = {g.language: g for g in found.groups}
    assert list(groups) == ["id", "th", "en", ""]
    assert [groups[x].best_teachers for x in ("id", "th", "en")] == [("a",), ("b",), ("a",)]
    for language, share in (("id", 0.5 / 1.2), ("th", 0.5), ("en", 0.0)):
        gap = groups[language].gap_closed
        assert gap and gap.low is not None and gap.high is not None
        assert (gap.low, gap.value, gap.high) == pytest.approx((share,) * 3, abs=1e-6)
    overall = groups[""]
    assert overall.best_teachers == ("a", "b")
    assert overall.minus_best
    assert overall.minus_best.value == pytest.approx(0.7 / 3 + 0.5 / 3 + 0.02)
    assert overall.gap_closed
    assert overall.gap_closed.value == pytest.approx(1.0 / (1.2 + 1.0 + 0.06))
    assert (overall.documents, overall.num_bytes) == (
        30,
        sum(g.num_bytes for x, g in groups.items() if x),
    )
    assert set(overall.bits_per_byte) == {"student", "base", "a", "b", "ref"}
    assert (found.teachers, found.reference_models) == (("a", "b"), ("ref",))
    assert found.overall == (overall,)
    assert [g.language for g in found.languages] == ["id", "th", "en"]


def test_differences_are_paired() -> None:
    """The documents' own difficulty, which all models share, is in no difference."""
    group = report(noise=0.01).groups[0]
    rate, difference = group.bits_per_byte["student"], group.student_minus["base"]
    assert rate.low is not None and rate.high is not None
    assert difference.low is not None and difference.high is not None
    assert difference.high - difference.low < (rate.high - rate.low) / 5
    assert difference.low < -0.5 < difference.high


def test_without_a_better_teacher_the_gap_is_undefined_and_says_why() -> None:
    english = report(teachers=("b",), noise=0.0).groups[2]
    assert english.gap_closed is None
    assert english.no_gap_reason.startswith("b (1.")
    assert english.no_gap_reason.endswith("is not better than the base (1.360)") or (
        "is not better than the base (1." in english.no_gap_reason
    )
    alone = report(teachers=()).groups[0]
    assert (alone.best_teachers, alone.minus_best, alone.gap_closed) == ((), None, None)
    assert alone.no_gap_reason == "no teacher was measured"
    assert set(alone.student_minus) == {"base", "ref"}


def test_the_report_survives_its_file_and_documents_have_a_line_each() -> None:
    found = report()
    text = json.dumps(found.to_json(), allow_nan=False)
    assert TypeAdapter(TextReport).validate_json(text) == found
    windows, bits = measured()
    lines = list(document_records(windows, bits))
    assert len(lines) == 30
    assert lines[0]["bits"].keys() == RATES.keys()
    assert sum(x["bits"]["base"] for x in lines[:10]) == pytest.approx(
        found.groups[0].bits_per_byte["base"].value * found.groups[0].num_bytes
    )
