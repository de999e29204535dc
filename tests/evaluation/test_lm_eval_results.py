"""The results file of lm-eval is read as it is written, and whatever else it may be is refused by
name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persea.errors import DataError
from persea.evaluation.lm_eval_results import LmEvalResult, read_lm_eval_results

STANDARD: dict[str, Any] = {  # in the published form, numbers invented
    "results": {
        "gsm8k": {
            "alias": "gsm8k",
            "sample_len": 1319,
            "exact_match,strict-match": 0.5012,
            "exact_match_stderr,strict-match": 0.0138,
            "exact_match,flexible-extract": 0.52,
            "exact_match_stderr,flexible-extract": 0.0137,
        },
        "mmlu": {"alias": "mmlu", "acc,none": 0.61, "acc_stderr,none": 0.004},
        "mmlu_law": {"alias": " - law", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "wikitext": {
            "alias": "wikitext",
            "word_perplexity,none": 12.5,
            "word_perplexity_stderr,none": "N/A",
        },
    },
    "group_subtasks": {"mmlu": ["mmlu_law"]},
    "configs": {},
    "versions": {"gsm8k": 3},
    "n-shot": {"gsm8k": 5},
    "higher_is_better": {"gsm8k": {"exact_match": True}, "wikitext": {"word_perplexity": False}},
    "n-samples": {
        "gsm8k": {"original": 1319, "effective": 1319},
        "mmlu_law": {"original": 1534, "effective": 100},
    },
    "config": {"model": "hf", "model_args": {"pretrained": "student"}},
    "date": 1.0,
}


def file(folder: Path, value: Any) -> Path:
    path = folder / "results_2026.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_every_number_is_read(tmp_path: Path) -> None:
    assert read_lm_eval_results("student", file(tmp_path, STANDARD)) == (
        LmEvalResult("student", "gsm8k", "exact_match (strict-match)", 0.5012, 0.0138, 1319, True),
        LmEvalResult(
            "student", "gsm8k", "exact_match (flexible-extract)", 0.52, 0.0137, 1319, True
        ),
        LmEvalResult("student", "mmlu", "acc", 0.61, 0.004, 0, True),
        LmEvalResult("student", "law", "acc", 0.5, None, 100, True),
        LmEvalResult("student", "wikitext", "word_perplexity", 12.5, None, 0, False),
    )


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("", "not JSON"),
        ("[]", "has no `results`"),
        ("{}", "has no `results`"),
        ({"results": []}, "has no `results`"),
        ({"results": {}}, "contains no number"),
        ({"results": {"gsm8k": {"alias": "gsm8k"}}}, "contains no number"),
        ({"results": {"gsm8k": 0.5}}, "not in lm-eval's format"),
        ({"results": {"gsm8k": {"acc,none": "high"}}}, "acc,none is 'high', not a number"),
        ({"results": {"gsm8k": {"acc,none": True}}}, "not a number"),
        ('{"results": {"gsm8k": {"acc,none": NaN}}}', "not a number"),
        ({"results": {"gsm8k": {"acc,none": 0.5}}, "n-samples": []}, "not in lm-eval's format"),
    ],
    ids=str,
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, value: Any, what: str) -> None:
    with pytest.raises(DataError) as refusal:
        read_lm_eval_results("student", file(tmp_path, value))
    assert (
        what in refusal.value.message
        and refusal.value.where.endswith("results_2026.json")
        and "\n" not in str(refusal.value)
    )
    assert refusal.value.exit_code == 3


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_lm_eval_results("student", tmp_path / "none.json")


def test_a_number_has_the_interval_of_its_standard_error() -> None:
    low, high = interval_of(0.5, 0.05, 100)
    assert (round(low, 2), round(high, 2)) == (0.4, 0.6)
    low, high = interval_of(1.0, 0.0, 30)  # all right: no certainty
    assert (round(low, 2), round(high, 2)) == (0.89, 1.0)
    low, high = interval_of(3.0, 0.5, 30)  # a perplexity
    assert (round(low, 2), round(high, 2)) == (2.02, 3.98)
    assert LmEvalResult("student", "t", "acc", 0.5, None, 9, True).interval is None


def interval_of(value: float, stderr: float, n: int) -> tuple[float, float]:
    found = LmEvalResult("student", "t", "acc", value, stderr, n, value <= 1).interval
    assert found
    return found
