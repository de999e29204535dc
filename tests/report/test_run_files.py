"""The files of a run are read whole and consistent, or refused with the name of the file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persea.chat.messages import ThinkingEffort
from persea.errors import DataError
from persea.report.page import write_report
from persea.report.skill_comparison import IntervalOrder, difference_order, score_order
from persea.tasks.task import PairedComparison, Score
from tests.report.test_page import SECONDS, change, evaluated, page_of, run, words_of  # noqa: F401 (run is a fixture)


def test_intervals_that_touch_overlap() -> None:
    def at(low: float, high: float) -> Score:
        return Score("a", "b", "", ThinkingEffort.NONE, (low + high) / 2, 10, low, high)

    assert score_order(at(0.5, 0.6), at(0.6, 0.7)) is IntervalOrder.OVERLAPS
    assert score_order(at(0.5, 0.6), at(0.61, 0.7)) is IntervalOrder.BELOW
    assert score_order(at(0.5, 0.6), at(0.1, 0.49)) is IntervalOrder.ABOVE


def test_pairs_are_ordered_by_the_interval_of_their_difference() -> None:
    def at(low: float, high: float) -> PairedComparison:
        return PairedComparison(
            "a", "b", "c", "", ThinkingEffort.NONE, 10, (low + high) / 2, low, high
        )

    assert [
        difference_order(at(*x))
        for x in ((0.01, 0.5), (0.0, 0.5), (-0.1, 0.1), (-0.5, 0.0), (-0.5, -0.01))
    ] == [
        IntervalOrder.ABOVE,
        IntervalOrder.OVERLAPS,
        IntervalOrder.OVERLAPS,
        IntervalOrder.OVERLAPS,
        IntervalOrder.BELOW,
    ]


FILES = (
    "recipe.yaml",
    "audition/cast.json",
    "check/check.json",
    "capture/summary.json",
    "train/metrics.jsonl",
    "evaluate/evaluation.json",
    "evaluate/examples.jsonl",
    "lineage/lineage.json",
    *(f"{stage}/done.json" for stage in SECONDS),
)


def refusal_of(run: Path, name: str) -> DataError:
    """What report() says of a run whose file `name` is bad; it must name the file, a remedy, and
    have written nothing."""
    with pytest.raises(DataError) as refusal:
        write_report(run)
    assert (
        refusal.value.where == str(run / name)
        and refusal.value.remedy
        and not (run / "report").exists()
    )
    return refusal.value


def test_missing_files_are_refused(run: Path) -> None:
    for name in FILES:
        kept = (run / name).read_bytes()
        (run / name).unlink()
        assert refusal_of(run, name).message == "not there"
        (run / name).write_bytes(kept)
    assert write_report(run).is_file()


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_nan_and_infinity_are_refused(run: Path, number: str) -> None:
    for name in FILES[1:]:
        text = (run / name).read_text()
        spoilt = re.sub(r"(: )(\d[\d.e+-]*)", lambda m: m[1] + number, text, count=1)
        (run / name).write_text(
            spoilt if spoilt != text else text.replace("{", f'{{"x": {number}, ', 1)
        )
        assert refusal_of(run, name).message == "holds NaN or infinity"
        (run / name).write_text(text)


def test_broken_files_are_refused(run: Path) -> None:
    for name in FILES[1:]:
        kept = (run / name).read_bytes()
        (run / name).write_bytes(kept[:-4])
        assert "JSON" in refusal_of(run, name).message
        (run / name).write_bytes(kept)


CONTRADICTIONS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "interval": (
        "evaluate/evaluation.json",
        lambda v: v["scores"][0].update(low=0.9),
        "not inside its interval",
    ),
    "percent": (
        "evaluate/evaluation.json",
        lambda v: v["scores"][0].update(value=71, high=80),
        "not inside its interval",
    ),
    "model_name": (
        "evaluate/evaluation.json",
        lambda v: v["scores"].pop(3),
        "gemma has no score on languages",
    ),
    "nothing asked": (
        "evaluate/evaluation.json",
        lambda v: v["scores"][0].update(n=0),
        "avocado has no score on languages",
    ),
    "no skill": (
        "evaluate/evaluation.json",
        lambda v: v.update(scores=[]),
        "no skill was measured",
    ),
    "no teacher": (
        "evaluate/evaluation.json",
        lambda v: v.update(teachers=[]),
        "need different names",
    ),
    "one name": (
        "evaluate/evaluation.json",
        lambda v: v.update(base="avocado"),
        "need different names",
    ),
    "effort": ("evaluate/evaluation.json", lambda v: v.update(effort="a lot"), "effort"),
    "type": (
        "evaluate/evaluation.json",
        lambda v: v["scores"][0].update(n="many"),
        r"scores\.0\.n",
    ),
    "stranger": (
        "audition/cast.json",
        lambda v: v["parts"].update(code=[["mistral", 1.0]]),
        "mistral teaches, but was not evaluated",
    ),
    "captured stranger": (
        "capture/summary.json",
        lambda v: v["teachers"].update(mistral={"kept": 1}),
        "mistral teaches",
    ),
    "not listed": (
        "lineage/lineage.json",
        lambda v: v["teachers"].pop(),
        "gpt-oss was evaluated as a teacher, but has no entry here",
    ),
    "no pair": ("check/check.json", lambda v: v.update(pairs=[]), "no pair was checked"),
    "share": (
        "check/check.json",
        lambda v: v["pairs"][1].update(boundary_share=86.0),
        "shares from 0 to 1",
    ),
    "no share": (
        "check/check.json",
        lambda v: v["pairs"][1].pop("one_to_one_share"),
        "needs boundary_share, one_to_one_share",
    ),
    "twice": (
        "evaluate/evaluation.json",
        lambda v: v["scores"].append(v["scores"][5]),
        "two scores on one skill",
    ),
    "pair of strangers": (
        "evaluate/evaluation.json",
        lambda v: v["compared"][0].update(other_model_name="mistral"),
        "avocado is compared with mistral",
    ),
    "pair of others": (
        "evaluate/evaluation.json",
        lambda v: v["compared"][0].update(model_name="qwen"),
        "qwen is compared with",
    ),
    "difference": (
        "evaluate/evaluation.json",
        lambda v: v["compared"][0].update(difference=0.99),
        "a difference of 0.99 is not inside",
    ),
    "not compared": (
        "evaluate/evaluation.json",
        lambda v: v.update(compared=[]),
        "the student is not compared on languages",
    ),
    "before pairs": (
        "evaluate/evaluation.json",
        lambda v: v.pop("compared"),
        "compared: missing: another version of persea wrote this file",
    ),
    "ended": (
        "audition/cast.json",
        lambda v: v.update(
            decisions={"code": {"num_items_asked": 9, "stop_reason": "bored", "eliminated": {}}}
        ),
        r"decisions\.code\.stop_reason",
    ),
    "negative": (
        "check/done.json",
        lambda v: v.update(seconds=-1),
        "seconds: Input should be greater",
    ),
    "seconds": ("train/done.json", lambda v: v.pop("seconds"), "seconds: missing: another version"),
}


@pytest.mark.parametrize(
    ("name", "new", "old"),
    [
        ("evaluate/evaluation.json", "model_name", "speaker"),
        ("evaluate/evaluation.json", "reference_models", "yardsticks"),
        ("evaluate/examples.jsonl", "model_name", "speaker"),
        ("audition/cast.json", "model_name", "speaker"),
        ("audition/cast.json", "stop_reason", "ended"),
    ],
)
def test_files_of_another_version_are_refused_in_one_line(
    run: Path, name: str, new: str, old: str
) -> None:
    path = run / name
    path.write_text(path.read_text().replace(f'"{new}"', f'"{old}"'))
    refusal = refusal_of(run, name)
    assert "missing: another version of persea wrote this file" in refusal.message
    assert "\n" not in str(refusal)
    assert refusal.remedy.startswith(f"delete {path} and run the recipe again into this folder")


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(run: Path, case: str) -> None:
    name, edit, words = CONTRADICTIONS[case]
    change(run / name, edit)
    assert re.search(words, refusal_of(run, name).message)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no step is logged"),
        (
            '{"step": 1, "loss": 1, "terms": {}, "share": {"qwen": 0.7, "gemma": 0.7}}',
            "positions of step 1 add up to more than 1",
        ),
        (
            '{"step": 1, "loss": 1, "terms": {}, "share": {}, "groups": {"qwen": {"code": '
            '{"positions": 0.5, "weight": 1, "loss": 0.7}, '
            '"tools": {"positions": 0.5, "weight": 1, "loss": 0.7}}}}',
            "loss of step 1 add up to more than 1",
        ),
        (
            '{"step": 1, "loss": 1, "terms": {}, "share": {}, "groups": {"nobody": {"code": '
            '{"positions": 0.5, "weight": 1}}}}',
            "nobody teaches",
        ),
    ],
)
def test_training_logs_must_add_up(run: Path, text: str, words: str) -> None:
    (run / "train" / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=words):
        write_report(run)


@pytest.mark.parametrize("stage", ["check", "audition", "capture", "train"])
def test_a_stage_without_a_folder_is_shown_as_absent(run: Path, stage: str) -> None:
    shutil.rmtree(run / stage)
    page = words_of(page_of(run))
    assert page.count(f"This run has no {stage}/ folder") == 1
    assert stage not in json.loads((run / "report" / "report.json").read_text())["seconds"]


def test_one_logged_step_and_one_teacher_are_enough(run: Path) -> None:
    def alone(value: Any) -> None:
        value["teachers"] = ["qwen"]
        value["scores"] = [
            s for s in value["scores"] if s["model_name"] not in ("gemma", "gpt-oss")
        ]

    evaluated(run, alone)
    change(run / "audition" / "cast.json", lambda v: v.update(parts={"code": [["qwen", 1.0]]}))
    change(
        run / "capture" / "summary.json",
        lambda v: v.update(teachers={"qwen": v["teachers"]["qwen"]}, tokens=0),
    )
    (run / "train" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5, "terms": {"events": 2.5}, "share": {"qwen": 1}}\n'
    )
    page = words_of(page_of(run))
    assert (
        "One student, one teacher: the student retains 115 % of its teacher's score on safety"
        in page
    )
    assert "among the best" not in page
