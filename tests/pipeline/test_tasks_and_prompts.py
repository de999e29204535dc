"""What a recipe asks with; what a whole river makes of it is in test_river.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persea.cache.answer_filter import question_key
from persea.chat.messages import Conversation, Message, ThinkingEffort
from persea.config.schema import BenchmarkSection, CorpusSection, TeacherSection
from persea.data.prompts import MalformedLine, Prompt
from persea.errors import DataError, RefusedError, TeacherError
from persea.pipeline.tasks_and_prompts import (
    items_by_question,
    load_benchmarks,
    load_part_prompts,
    make_check_samples,
    make_safety_judge,
    measured_tasks,
)
from persea.tasks.generated import CODE_TASK, REASONING_TASK, TOOLS_TASK
from persea.tasks.task import Split, Verdict


def gsm(folder: Path, skill: str = "") -> BenchmarkSection:
    lines = [
        json.dumps(
            {
                "question": f"Ann has {k} figs and buys {k + 1}. How many?",
                "answer": f"#### {2 * k + 1}",
            }
        )
        for k in range(300)
    ]
    (folder / "gsm.jsonl").write_text("\n".join(lines))
    return BenchmarkSection(benchmark="gsm8k", file=str(folder / "gsm.jsonl"), skill=skill)


def test_sets_measure_a_skill_of_the_corpus_or_one_of_their_own(tmp_path: Path):
    assert measured_tasks(["code", "reasoning"], ()) == (CODE_TASK, REASONING_TASK)
    assert [s.name for s in measured_tasks(["code"], load_benchmarks([gsm(tmp_path)]))] == [
        "code",
        "gsm8k",
    ]
    code, reasoning = measured_tasks(
        ["code", "reasoning"], load_benchmarks([gsm(tmp_path, "reasoning")])
    )
    assert (code, reasoning.name) == (CODE_TASK, "reasoning")
    assert reasoning is not REASONING_TASK


def test_prompts_come_from_a_generator_or_a_file(tmp_path: Path):
    made = load_part_prompts(
        CorpusSection(skill="code", generate=3), "here", [CODE_TASK], ["code"], 0, lambda b: None
    )
    assert [(p.id, p.answer) for p in made] == [
        (i.prompt.id, i.reference) for i in CODE_TASK.items(Split.TRAIN, 3, 0)
    ]
    (tmp_path / "p.jsonl").write_text('{"prompt": "Why?"}\n{\n{"prompt": "How?", "skill": "other"}')
    part, aside = (
        CorpusSection(skill="code", file=str(tmp_path / "p.jsonl"), on_malformed="quarantine"),
        list[MalformedLine](),
    )
    with pytest.raises(
        DataError, match="of skill 'other', which the corpus does not name -> use one of code"
    ):
        load_part_prompts(part, "here", [CODE_TASK], ["code"], 0, aside.append)
    assert [
        p.skill
        for p in load_part_prompts(part, "here", [CODE_TASK], ["code", "other"], 0, aside.append)
    ] == ["code", "other"]
    assert len(aside) == 2
    with pytest.raises(DataError, match="not JSON"):
        load_part_prompts(
            CorpusSection(skill="code", file=str(tmp_path / "p.jsonl")),
            "here",
            [CODE_TASK],
            ["code"],
            0,
            aside.append,
        )


def test_a_set_teaches_nothing(tmp_path: Path):
    (skill,) = measured_tasks(["gsm8k"], load_benchmarks([gsm(tmp_path)]))
    with pytest.raises(DataError, match="here: gsm8k has only 0 training questions"):
        load_part_prompts(
            CorpusSection(skill="gsm8k", generate=1), "here", [skill], ["gsm8k"], 0, lambda b: None
        )


def test_samples_are_reference_answers_where_there_are_some(tmp_path: Path):
    (tmp_path / "x.csv").write_text(
        "id,prompt,type,label\n" + "".join(f"{k},How {k}?,t,unsafe\n" for k in range(40))
    )
    skills = measured_tasks(
        [],
        load_benchmarks(
            [
                gsm(tmp_path),
                BenchmarkSection(benchmark="xstest-harmful", file=str(tmp_path / "x.csv")),
            ]
        ),
    )
    found = make_check_samples([(s, s.items(Split.TEST, 999, 0)) for s in skills], {}, 10)
    assert [(s.skill, s.language, len(s.conversations)) for s in found] == [("gsm8k", "en", 64)]
    (tmp_path / "vi.txt").write_text("Một dòng.\n")
    assert [s.language for s in make_check_samples([], {"vi": str(tmp_path / "vi.txt")}, 10)] == [
        "vi"
    ]


@dataclass(frozen=True)
class Says:
    """Stands in for a teacher that always says one word."""

    word: str
    effort: ThinkingEffort = ThinkingEffort.HIGH
    failure_reason: str = ""

    def answer(self, asked: list[Prompt], most: int) -> list[Any]:
        assert (self.effort, len(asked), most) == (ThinkingEffort.NONE, 1, 16)
        return [SimpleNamespace(text=self.word, failure_reason=self.failure_reason)]


def test_a_judge_grades_safety_sets_and_no_others(tmp_path: Path):
    (tmp_path / "x.csv").write_text("id,prompt,type,label\n1,How?,t,unsafe\n")
    teachers = [
        TeacherSection(model="/a", name="a"),
        TeacherSection(model="/j", name="j", reference=True),
    ]
    refs, loaded = (
        [gsm(tmp_path), BenchmarkSection(benchmark="xstest-harmful", file=str(tmp_path / "x.csv"))],
        list[str](),
    )
    assert make_safety_judge("", teachers, str.upper, lambda name: Says("")) is None  # type: ignore[arg-type,return-value]
    by = make_safety_judge(
        "j", teachers, str.upper, lambda name: loaded.append(name) or Says("HELPS")
    )  # type: ignore[arg-type,return-value]
    assert by is not None
    assert (by.family, by.teacher_families, loaded) == ("J", {"a": "A"}, [])
    plain, judged = load_benchmarks(refs), load_benchmarks(refs, by)
    said = Message.from_assistant("I'm sorry, but I can't help with that.")
    assert [o.benchmark.grade_answer(o.items[0], said).value for o in plain] == [0, 1]
    assert [o.benchmark.grade_answer(o.items[0], said).value for o in judged] == [0, 0]
    assert [o.benchmark.grade_answer(o.items[0], said).reason for o in judged][1] == "judged: helps"
    assert loaded == ["j"]  # once
    gone = make_safety_judge(
        "j", teachers, str.upper, lambda name: Says("", failure_reason="5 attempts failed")
    )  # type: ignore[arg-type,return-value]
    assert gone is not None
    with pytest.raises(TeacherError, match="j: 5 attempts failed -> look at the server"):
        gone.ask("?")
    kin = make_safety_judge("j", teachers, lambda name: "qwen", lambda name: Says("HELPS"))  # type: ignore[arg-type,return-value]
    with pytest.raises(RefusedError, match="the judge belongs to the family of a"):
        load_benchmarks(refs, kin)
    assert [o.to_json()["questions"] for o in plain] == [300, 1]


@pytest.mark.parametrize(
    ("name", "teachers", "reason"),
    [
        ("b", [], "'b' is not a reference model"),
        ("a", [], "'a' is not a reference model"),
        (
            "j",
            [
                {
                    "model": "text_only",
                    "name": "j",
                    "reference": True,
                    "endpoint": {"url": "http://127.0.0.1:1/v1", "protocol": "chat"},
                }
            ],
            "the family of j is unknown",
        ),
    ],
)
def test_a_judge_is_a_yardstick_of_a_known_family(
    tmp_path: Path, name: str, teachers: list[dict[str, Any]], reason: str
):
    import yaml

    from persea.config.recipe import load_recipe
    from persea.errors import RecipeError

    page = {
        "student": {"model": "/s"},
        "teachers": [{"model": "/a", "name": "a"}, *teachers],
        "corpus": [{"skill": "code", "generate": 1}],
        "evaluation": {"judge": name},
    }
    (tmp_path / "r.yaml").write_text(yaml.dump(page))
    with pytest.raises(RecipeError, match=r"evaluation\.judge") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert reason in str(caught.value)


def test_answers_are_graded_by_a_generators_own_item_or_a_files_answer(tmp_path: Path):
    part = CorpusSection(skill="reasoning", generate=20)
    made = load_part_prompts(part, "here", [REASONING_TASK], ["reasoning"], 0, lambda b: None)
    mine = Prompt("mine", Conversation.from_question("Two and two?"), "reasoning", "en", "4")
    items = items_by_question([part], [REASONING_TASK], [*made, mine], 0)
    assert len(items) == 21
    for item in items.values():
        assert (
            REASONING_TASK.grade(item, item.reference_conversation.messages[-1]) is Verdict.RIGHT
            or item.prompt.id == "mine"
        )
    assert (
        items[question_key(mine.conversation)].reference,
        items[question_key(mine.conversation)].answer_key,
    ) == ("4", "4")


def test_the_same_words_with_other_tools_are_another_question():
    part = CorpusSection(skill="tools", generate=300)
    made = load_part_prompts(part, "here", [TOOLS_TASK], ["tools"], 0, lambda b: None)
    items = items_by_question([part], [TOOLS_TASK], made, 0)
    assert len({p.conversation.messages for p in made}) < 300  # else this test could not fail
    assert [items[question_key(p.conversation)].prompt.id for p in made] == [p.id for p in made]
