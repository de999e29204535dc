"""Everybody on every item, at every effort; the student beside each on the same items; where it
lost on its base, with confidence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from persea import storage as store
from persea.chat.messages import FinishReason, ThinkingEffort
from persea.config.recipe import load_recipe
from persea.errors import SafetyRegressionError
from persea.evaluation.answering import reference_bits
from persea.evaluation.evaluate import (
    EvaluationAnswers,
    EvaluationResult,
    compare_student,
    evaluate_model,
    find_regressions,
    refuse_safety_regressions,
)
from persea.pipeline import stages as run
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import Stage
from persea.tasks.generated import CODE_TASK, LANGUAGES_TASK, REASONING_TASK, TOOLS_TASK
from persea.tasks.intervals import paired_difference_interval
from persea.tasks.task import PairedComparison, Split
from tests.cli.test_cli import SAPLINGS, recipe
from tests.evaluation.test_answering import Counting, evaluated
from tests.evaluation.test_racing import item, result
from tests.servers import serving
from tests.teachers.test_teacher import teacher

ITEMS = [
    (skill, skill.items(Split.TEST, 6, 0)) for skill in (LANGUAGES_TASK, CODE_TASK, REASONING_TASK)
]


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))


def test_the_same_weights_under_two_names_have_the_same_scores() -> None:
    heard, done = EvaluationAnswers(), []
    for name in ("student", "base"):
        evaluate_model(
            heard,
            evaluated("gemma-sapling", name=name),
            ITEMS,
            40,
            lambda share, words: done.append(words.split()[:2]),
        )
    mine, its = (
        [replace(s, model_name="") for s in heard.iter_scores() if s.model_name == name]
        for name in ("student", "base")
    )
    assert mine == its
    assert any(s.value > 0 for s in mine)
    assert heard.bits_per_byte["student"] == heard.bits_per_byte["base"]
    assert done == [[who, skill.name] for who in ("student", "base") for skill, _ in ITEMS]
    assert (heard.num_answers, heard.num_reused) == (
        36,
        18,
    )  # the base is the same speaker, so nobody asks it again


def test_every_speaker_is_asked_every_item_and_bits_of_all_are_weighted_by_bytes() -> None:
    heard = EvaluationAnswers()
    evaluate_model(heard, evaluated("qwen-sapling"), ITEMS, 60)
    assert {(s.skill, s.language) for s in heard.iter_scores() if s.skill == "languages"} == {
        ("languages", x) for x in {"", *(i.prompt.language for i in ITEMS[0][1])}
    }
    assert [(name, effort, skill) for name, effort, skill in heard.results] == [
        ("qwen-sapling", ThinkingEffort.NONE, s.name) for s, _ in ITEMS
    ]
    for skill, items in ITEMS:
        assert [
            r.item for r in heard.results_for("qwen-sapling", ThinkingEffort.NONE, skill.name)
        ] == list(items)
    spent = {skill.name: reference_bits(evaluated("qwen-sapling"), items) for skill, items in ITEMS}
    told = heard.bits_per_byte["qwen-sapling"]
    assert {k: v for k, v in told.items() if k != "all"} == pytest.approx(
        {k: b / n for k, (b, n) in spent.items()}, rel=1e-6
    )
    assert told["all"] == pytest.approx(
        sum(b for b, _ in spent.values()) / sum(n for _, n in spent.values()), rel=1e-6
    )
    lines = list(heard.iter_answer_records())
    assert len(lines) == 18
    assert all(
        {"model_name", "skill", "effort", "id", "question", "answer", "verdict", "value"}
        <= line.keys()
        for line in lines
    )
    assert json.loads(json.dumps(lines, allow_nan=False)) == lines


def test_who_cannot_say_every_answer_has_no_bits_of_all() -> None:
    heard, some = EvaluationAnswers(), [(TOOLS_TASK, TOOLS_TASK.items(Split.TEST, 3, 0)), ITEMS[1]]
    evaluate_model(heard, evaluated("gemma-sapling"), some, 8)
    assert set(heard.bits_per_byte["gemma-sapling"]) == {"code"}  # its template has no tools


def test_prompt_files_are_evaluated_beside_teachers_behind_a_server(tmp_path: Path) -> None:
    """One by its words, one by its tokens: the same model, so the same score where both are asked
    at one effort.
    """
    rows = [
        {
            "key": k,
            "prompt": f"Say {k}.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for k in range(12)
    ]
    (tmp_path / "ifeval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    url, path = serving("gpt-oss-sapling"), str(SAPLINGS / "gpt-oss-sapling")
    teachers = [
        {
            "name": "words",
            "model": "text_only",
            "effort": "low",
            "endpoint": {"url": url, "protocol": "chat", "send_effort": True},
        },
        {"name": "far", "model": path, "effort": "low", "endpoint": {"url": url}},
    ]
    one = RunContext(
        load_recipe(
            recipe(
                tmp_path,
                teachers=teachers,
                corpus=[{"skill": "reasoning", "generate": 4}],
                audition={},
                evaluation={
                    "items": 3,
                    "max_new_tokens": 60,
                    "benchmarks": [{"benchmark": "ifeval", "file": str(tmp_path / "ifeval.jsonl")}],
                },
            )
        ),
        tmp_path / "run",
    )
    shutil.copytree(SAPLINGS / "llama-sapling", one.folder / "train" / "student")
    (one.folder / "evaluate").mkdir()
    run.run_evaluate(one, one.folder / "evaluate", lambda *_: None)
    told = json.loads((one.folder / "evaluate" / "evaluation.json").read_text())
    scores = {(s["model_name"], s["skill"]): s["value"] for s in told["scores"]}
    assert {who for who, _ in scores} == {"student", "base", "words", "far"}
    assert scores["words", "reasoning"] == scores["far", "reasoning"] > 0
    assert all(s["n"] == 3 and not s["grader_errors"] for s in told["scores"])
    assert told["bits_per_byte"]["words"] == {} and told["bits_per_byte"]["far"]["reasoning"] > 0


def test_each_effort_is_asked_apart() -> None:
    heard, opened = EvaluationAnswers(), Counting(lambda: teacher("gpt-oss-sapling"))
    one = replace(
        evaluated("gpt-oss-sapling"), efforts=(ThinkingEffort.LOW, ThinkingEffort.HIGH), load=opened
    )
    evaluate_model(heard, one, ITEMS[2:], 60)
    assert [k[1] for k in heard.results] == [ThinkingEffort.LOW, ThinkingEffort.HIGH]
    assert [(s.effort, s.n) for s in heard.iter_scores()] == [
        (ThinkingEffort.LOW, 6),
        (ThinkingEffort.HIGH, 6),
    ]
    assert (
        heard.results_for("gpt-oss-sapling", ThinkingEffort.NONE, "reasoning")
        is heard.results["gpt-oss-sapling", ThinkingEffort.LOW, "reasoning"]
    )
    assert opened.times > 0


def spoken(
    skill: str = "code",
    languages: Sequence[str] = ("en",),
    efforts: Sequence[ThinkingEffort] = (ThinkingEffort.NONE,),
    **rights: Sequence[float],
) -> EvaluationAnswers:
    """Speakers with these values on one skill's items, at each effort."""
    heard = EvaluationAnswers()
    for name, values in rights.items():
        for effort in efforts:
            results = tuple(
                result(item(k, languages[k % len(languages)], skill), v)
                for k, v in enumerate(values)
            )
            heard.results[name, effort, skill] = results
    return heard


def test_the_student_stands_beside_everybody_on_the_same_items() -> None:
    mine, its, best = [1.0, 0.0] * 20, [0.0] * 40, [1.0] * 40
    told = compare_student(
        spoken(languages=("th", "zh"), student=mine, base=its, qwen=best), "student"
    )
    assert [(p.other_model_name, p.language, p.n, p.difference) for p in told] == [
        ("base", "", 40, 0.5),
        ("base", "th", 20, 1.0),
        ("base", "zh", 20, 0.0),
        ("qwen", "", 40, -0.5),
        ("qwen", "th", 20, 0.0),
        ("qwen", "zh", 20, -1.0),
    ]
    assert (told[3].low, told[3].high) == paired_difference_interval(mine, best)
    assert told[3].retained == 0.5 and told[0].retained is None


def test_efforts_meet_their_like_or_the_others_own() -> None:
    heard = spoken(
        efforts=(ThinkingEffort.NONE, ThinkingEffort.HIGH), student=[1.0] * 4, base=[0.0] * 4
    )
    heard.results |= spoken(efforts=(ThinkingEffort.LOW,), oss=[1.0] * 4).results
    assert [
        (p.other_model_name, p.effort, p.difference) for p in compare_student(heard, "student")
    ] == [
        ("base", ThinkingEffort.NONE, 1.0),
        ("oss", ThinkingEffort.NONE, 0.0),
        ("base", ThinkingEffort.HIGH, 1.0),
        ("oss", ThinkingEffort.HIGH, 0.0),
    ]


def test_a_loss_on_the_base_is_named_with_its_skill_and_language() -> None:
    better = [1.0] * 100
    worse = [
        0.0 if k % 2 and k < 60 else 1.0 for k in range(100)
    ]  # 30 of 50 Chinese items are lost, no Thai one
    found = find_regressions(
        spoken(languages=("th", "zh"), student=worse, base=better), "student", "base"
    )
    assert [(p.skill, p.language, round(p.difference, 2), p.n) for p in found] == [
        ("code", "", -0.3, 100),
        ("code", "zh", -0.6, 50),
    ]
    assert (
        found[1].low < paired_difference_interval(worse[1::2], better[1::2])[0]
    )  # two languages: each at 97.5 %
    assert find_regressions(spoken(student=better, base=worse), "student", "base") == ()


def test_a_loss_that_chance_could_explain_is_none() -> None:
    base = [1.0] * 60
    assert (
        find_regressions(spoken(student=[0.0] * 4 + [1.0] * 56, base=base), "student", "base") == ()
    )
    assert (
        len(find_regressions(spoken(student=[0.0] * 9 + [1.0] * 51, base=base), "student", "base"))
        == 1
    )


@pytest.mark.parametrize(
    ("skill", "refused"),
    [("safety", True), ("safety-jail", True), ("code", False), ("unsafety", False)],
)
def test_only_a_loss_of_safety_ends_badly(skill: str, refused: bool) -> None:
    found = find_regressions(
        spoken(skill, languages=("th", "zh"), student=[0.0] * 60, base=[1.0] * 60),
        "student",
        "base",
    )
    assert len(found) == 3
    if not refused:
        refuse_safety_regressions(found, "here")
        return
    with pytest.raises(
        SafetyRegressionError,
        match=rf"here: the student is less safe than its base: {skill} -1\.00 "
        rf"\(-1\.00 to -0\.\d+, n 60\); {skill} in th "
        r".*-> .*allow_safety_regression: true",
    ) as caught:
        refuse_safety_regressions(found, "here")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("only", "allowed", "refused"),
    [
        ("", False, True),
        ("evaluate", False, True),
        ("report", False, True),
        ("", True, False),
        ("train", False, False),
    ],
)
def test_a_run_ends_badly_once_all_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, only: str, allowed: bool, refused: bool
) -> None:
    """The stages run to the last one first: what was measured is there to be looked at."""
    river = RunContext(
        load_recipe(
            recipe(tmp_path), [f"evaluation.allow_safety_regression={str(allowed).lower()}"]
        ),
        tmp_path / "run",
    )
    worked: list[str] = []
    lost = PairedComparison(
        "student", "base", "safety", "th", ThinkingEffort.NONE, 30, -0.5, -0.7, -0.2
    ).to_json()

    def work(name: str, folder: Path, tell: object) -> None:
        worked.append(name)
        if name == "evaluate":
            store.write_json(folder / "evaluation.json", {"regressions": [lost]})

    stages = tuple(
        Stage(s.name, lambda r: 0, lambda r, folder, tell, name=s.name: work(name, folder, tell))
        for s in run.STAGES
    )
    monkeypatch.setattr(run, "STAGES", stages)
    if only == "report":
        run.run_pipeline(
            replace(
                river,
                recipe=load_recipe(recipe(tmp_path), ["evaluation.allow_safety_regression=true"]),
            ),
            lambda *a: None,
        )
        worked.clear()
        (tmp_path / "run" / "report" / "done.json").unlink()
    with pytest.raises(SafetyRegressionError, match="safety in th") if refused else nullcontext():
        run.run_pipeline(river, lambda *a: None, only)
    assert worked == ([only] if only else [s.name for s in stages])


def test_an_evaluation_is_plain_json() -> None:
    heard = EvaluationAnswers()
    evaluate_model(heard, evaluated("qwen-sapling"), ITEMS[2:], 40)
    pair = PairedComparison(
        "student", "base", "code", "", ThinkingEffort.NONE, 3, -0.5, -0.9, -0.1, None, None, None
    )
    out = EvaluationResult(
        "student",
        "base",
        ("qwen-sapling",),
        ThinkingEffort.NONE,
        tuple(heard.iter_scores()),
        heard.bits_per_byte,
        ("gpt",),
        (pair,),
        (pair,),
    )
    value = out.to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert (value["effort"], value["reference_models"]) == ("none", ["gpt"])
    assert set(value["bits_per_byte"]["qwen-sapling"]) == {"reasoning", "all"}
    assert [PairedComparison(**p) for p in value["compared"]] == [pair]
    assert FinishReason.STOP in {
        r.finish for r in heard.results_for("qwen-sapling", ThinkingEffort.NONE, "reasoning")
    }
