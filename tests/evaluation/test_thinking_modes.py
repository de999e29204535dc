"""A student that strays from its mode is counted, a thought is measured and its language found; and
a whole run in modes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from persea.cache.maintenance import committed_units, find_cache_folder
from persea.cache.unit import read_unit
from persea.chat.messages import Text, Thinking, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.evaluation.thinking_modes import (
    UNDETERMINED_LANGUAGE,
    ThinkingModesReport,
    measure_thinking_modes,
    thinking_language,
)
from persea.models.loading import ModelSource, load_renderer
from persea.tasks.generated import REASONING_TASK
from persea.tasks.intervals import wilson_interval
from persea.tasks.task import Split
from persea.teachers.teacher import Teacher
from tests.cli.test_cli import SAPLINGS, TINY, persea, recipe
from tests.teachers.engines.test_transformers import engine
from tests.teachers.test_teacher import Scripted

ITEMS = REASONING_TASK.items(Split.TEST, 4, 0)
EOT = "<|eot_id|>"


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return load_renderer(ModelSource(str(SAPLINGS / "llama-sapling"), thinking=True), "student")


def says(renderer: ChatRenderer, text: str, stop: bool = True) -> list[int]:
    """What a model says: the markers of a thought are tokens."""
    control = renderer.vocabulary.control_token_ids
    ids = [
        i
        for piece in re.split("(</?think>)", text)
        for i in ([control[piece]] if piece in control else renderer.vocabulary.encode(piece))
    ]
    return [*ids, *([control[EOT]] if stop else [])]


def thinks(renderer: ChatRenderer, thought: str, text: str) -> list[int]:
    return says(renderer, f"<think>\n{thought}\n</think>\n\n{text}")


def measured(
    renderer: ChatRenderer,
    *said: list[int],
    efforts: tuple[ThinkingEffort, ...],
    direct: tuple[dict[str, object], ...] = (),
) -> tuple[ThinkingModesReport, Scripted]:
    scripted = Scripted(engine("llama-sapling"), list(said))
    skills = [(REASONING_TASK, ITEMS)]
    return measure_thinking_modes(
        Teacher("student", renderer, scripted), skills, {"reasoning": efforts}, 400, direct
    ), scripted


def test_items_with_choices_are_weighed_elsewhere_and_not_asked_in_words(
    renderer: ChatRenderer,
) -> None:
    scripted = Scripted(
        engine("llama-sapling"), [says(renderer, f"Answer: {i.answer_key}.") for i in ITEMS[:2]]
    )
    skills = [
        (REASONING_TASK, [*ITEMS[:2], *(replace(i, choices=("a", "b")) for i in ITEMS[2:])]),
        (replace(REASONING_TASK, name="code"), [replace(i, choices=("a", "b")) for i in ITEMS]),
    ]
    found = measure_thinking_modes(
        Teacher("student", renderer, scripted),
        skills,
        {"reasoning": (ThinkingEffort.NONE,), "code": (ThinkingEffort.NONE,)},
        400,
    )
    assert [(m.skill, m.score.n, m.score.value) for m in found.modes] == [("reasoning", 2, 1.0)]


def test_right_answers_and_strays_are_counted_mode_by_mode(renderer: ChatRenderer) -> None:
    answers = [f"Answer: {i.answer_key}." for i in ITEMS]
    at_once = [
        says(renderer, answers[0]),
        thinks(renderer, "Let me add them up first.", answers[1]),
        says(renderer, "Answer: 0.5"),
        says(renderer, "<think>\nso", stop=False),
    ]
    high = [
        thinks(renderer, "I add the first two numbers.", answers[0]),
        says(renderer, answers[1]),
        thinks(renderer, "1+1=2", answers[2]),
        says(renderer, "<think>\nand so on", stop=False),
    ]
    found, engine_ = measured(
        renderer, *at_once, *high, efforts=(ThinkingEffort.HIGH, ThinkingEffort.NONE)
    )
    none, loud = found.modes
    assert (none.effort, loud.effort) == (ThinkingEffort.NONE, ThinkingEffort.HIGH)
    assert (none.score.value, none.score.n, loud.score.value) == (0.5, 4, 0.75)
    assert none.score.effort is ThinkingEffort.NONE
    assert (none.wrong_mode.count, none.wrong_mode.n) == (2, 4)
    assert (none.wrong_mode.low, none.wrong_mode.high) == wilson_interval(2, 4)
    assert (loud.wrong_mode.count, loud.wrong_mode.n) == (1, 4)
    assert (found.unasked_thinking, found.missing_thinking) == (none.wrong_mode, loud.wrong_mode)
    assert [engine_.asked[k] != engine_.asked[k + 4] for k in range(4)] == [True] * 4
    assert loud.length.num_finished == 2
    assert loud.length.num_truncated == none.length.num_truncated == 1
    thoughts = ["I add the first two numbers.", "1+1=2"]
    assert loud.length.mean_bytes == sum(map(len, thoughts)) / 2
    assert loud.length.mean_tokens == sum(len(renderer.vocabulary.encode(t)) for t in thoughts) / 2
    assert loud.languages == {"en": 1, UNDETERMINED_LANGUAGE: 1}
    assert (loud.in_question_language.count, loud.in_question_language.n) == (
        int(ITEMS[0].prompt.language == "en"),
        1,
    )
    assert json.loads(json.dumps(found.to_json()))["modes"][1]["effort"] == "high"


def test_answers_to_other_skills_count_for_the_leak_at_none(renderer: ChatRenderer) -> None:
    direct = (
        {"answer": "a", "finish": "stop"},
        {"answer": "a", "finish": "stop", "thinking": "hm"},
        {"answer": "", "finish": "length"},
        {"answer": "cut but said", "finish": "length"},
        {"answer": "", "finish": "stop", "calls": [{}]},
        {"answer": "", "finish": "stop"},
    )
    found, _ = measured(
        renderer, *(says(renderer, "x"),) * 4, efforts=(ThinkingEffort.NONE,), direct=direct
    )
    assert (found.unasked_thinking.count, found.unasked_thinking.n) == (2, 10)
    assert (found.missing_thinking.n, found.length_increases) == (0, {})


@pytest.mark.parametrize(
    ("low", "high", "rises"),
    [
        ("short", "a longer thought", True),
        ("a longer thought", "short", False),
        ("same", "same", False),
        ("some", None, False),
    ],
)
def test_thoughts_rise_or_are_said_not_to(
    renderer: ChatRenderer, low: str, high: str | None, rises: bool
) -> None:
    loud = (
        says(renderer, "<think>\nno end", stop=False)
        if high is None
        else thinks(renderer, high, "x")
    )
    found, _ = measured(
        renderer,
        *(thinks(renderer, low, "x"),) * 4,
        *(loud,) * 4,
        efforts=(ThinkingEffort.LOW, ThinkingEffort.HIGH),
    )
    assert found.length_increases == {"reasoning": rises}


def test_who_chooses_by_likelihood_is_not_asked_in_words(renderer: ChatRenderer) -> None:
    scripted, chosen = (
        Scripted(engine("llama-sapling"), [says(renderer, "x")]),
        [replace(i, choices=("a", "b")) for i in ITEMS[1:]],
    )
    found = measure_thinking_modes(
        Teacher("student", renderer, scripted),
        [(REASONING_TASK, [ITEMS[0], *chosen])],
        {"reasoning": (ThinkingEffort.NONE,)},
        40,
    )
    assert [(m.score.n, m.wrong_mode.n) for m in found.modes] == [(1, 1)]
    assert (
        measure_thinking_modes(
            Teacher("student", renderer, scripted),
            [(REASONING_TASK, chosen)],
            {"reasoning": (ThinkingEffort.NONE,)},
            40,
        ).modes
        == ()
    )
    assert len(scripted.asked) == 1


def test_a_skill_without_modes_is_not_asked(renderer: ChatRenderer) -> None:
    scripted = Scripted(engine("llama-sapling"), [])
    found = measure_thinking_modes(
        Teacher("student", renderer, scripted), [(REASONING_TASK, ITEMS)], {}, 40
    )
    assert (found.modes, scripted.asked) == ((), [])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("First I add the two numbers, then I take three away from the sum.", "en"),
        ("Đầu tiên cộng hai số, rồi trừ đi ba.", "vi"),
        (
            "Pertama saya menjumlahkan kedua bilangan itu, kemudian mengurangi tiga dari hasilnya.",
            "id",
        ),
        ("先把两个数加起来，再减三。", "zh"),
        ("まず二つの数を足してから三を引きます。", "ja"),
        ("먼저 두 수를 더하고 셋을 뺍니다.", "ko"),
        ("บวกสองจำนวนก่อนแล้วลบสาม", "th"),
        ("ပထမဦးစွာ ဂဏန်းနှစ်ခုကို ပေါင်းပါ။", "my"),
        ("ដំបូងបូកលេខពីរ", "km"),
        ("ທໍາອິດບວກສອງຕົວເລກ", "lo"),
        ("10+18: 0+8=8, 1+1=2, 28. 28-21: 8-1=7.", UNDETERMINED_LANGUAGE),
        ("", UNDETERMINED_LANGUAGE),
        ("ok", UNDETERMINED_LANGUAGE),
        ("x = [1, 2] * 3; y = f(x) + 1", UNDETERMINED_LANGUAGE),
        ("二加三 = 5; 5 + 6 = 11; 11 + 12 = 23", UNDETERMINED_LANGUAGE),
        ("qxzv jkwq zzkx vvqj", UNDETERMINED_LANGUAGE),
    ],
)
def test_the_language_of_a_thought(text: str, language: str) -> None:
    assert thinking_language(text) == language


def test_a_whole_run_in_modes(tmp_path: Path) -> None:
    """The prompts' efforts reach teacher, cache, lesson and page; a student of eight steps is
    measured, good or not.
    """
    path = recipe(
        tmp_path,
        student=TINY["student"] | {"thinking": True},
        teachers=TINY["teachers"][1:],
        corpus=[
            {"skill": "code", "generate": 8},
            {"skill": "reasoning", "generate": 24, "effort_shares": {"none": 0.5, "high": 0.5}},
        ],
        audition={"items": 8, "pinned": {"code": "gemma-sapling", "reasoning": "gpt-oss-sapling"}},
        capture={"max_new_tokens": 96, "prompts_per_unit": 8},
    )
    ended = persea("run", path, "--out", "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    run = tmp_path / "run"
    where = find_cache_folder(run)
    answers = [c.answer for name in committed_units(where) for c in read_unit(where, name)]
    kinds = Counter(
        (a.skill, a.effort, bool(a.conversation.messages[-1].thinking)) for a in answers
    )
    assert kinds["code", None, False] == 8
    assert kinds["reasoning", ThinkingEffort.NONE, False] >= 10
    assert kinds["reasoning", ThinkingEffort.HIGH, True] >= 6
    assert (
        sum(kinds.values())
        == kinds["code", None, False]
        + kinds["reasoning", ThinkingEffort.NONE, False]
        + kinds["reasoning", ThinkingEffort.HIGH, True]
    )
    thought = next(a for a in answers if a.effort is ThinkingEffort.HIGH)
    assert [type(p) for p in thought.conversation.messages[-1].parts] == [Thinking, Text]
    told = json.loads((run / "evaluate" / "modes.json").read_text())
    assert [(m["skill"], m["effort"], m["score"]["n"]) for m in told["modes"]] == [
        ("reasoning", "none", 8),
        ("reasoning", "high", 8),
    ]
    assert (told["unasked_thinking"]["n"], told["missing_thinking"]["n"]) == (16, 8)
    assert "modes.json" in json.loads((run / "evaluate" / "done.json").read_text())["outputs"]
    assert json.loads((run / "report" / "report.json").read_text())["modes"] == told
    assert "Thinking modes</h2>" in (run / "report" / "index.html").read_text()
    assert "Missing thinking: with thinking on, the student did not think in" in ended.out
    saved = load_renderer(ModelSource(str(run / "train" / "student")), "student")
    assert saved.family.efforts == tuple(ThinkingEffort)
    assert (run / "train" / "student" / "chat_template.jinja").read_text() == saved.template_text
