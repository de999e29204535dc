"""What a recipe asks with; what a whole river makes of it is in test_river.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persea.cache.answer_filter import question
from persea.chat.messages import Conversation, Effort, Message
from persea.config.schema import CorpusPart, PublishedSet, Teacher
from persea.data.prompts import Broken, Prompt
from persea.errors import DataError, Refused, TeacherError
from persea.pipeline.tasks_and_prompts import SAMPLE, judge, known, measured, prompts, published, samples
from persea.tasks.generated import CODE, REASONING, TOOLS
from persea.tasks.task import Split, Verdict


def gsm(folder: Path, skill: str = "") -> PublishedSet:
    lines = [json.dumps({"question": f"Ann has {k} figs and buys {k + 1}. How many?", "answer": f"#### {2 * k + 1}"}) for k in range(300)]
    (folder / "gsm.jsonl").write_text("\n".join(lines))
    return PublishedSet(set="gsm8k", file=str(folder / "gsm.jsonl"), skill=skill)


def test_sets_measure_a_skill_of_the_corpus_or_one_of_their_own(tmp_path: Path):
    assert measured(["code", "reasoning"], ()) == (CODE, REASONING)
    assert [s.name for s in measured(["code"], published([gsm(tmp_path)]))] == ["code", "gsm8k"]
    code, reasoning = measured(["code", "reasoning"], published([gsm(tmp_path, "reasoning")]))
    assert (code, reasoning.name) == (CODE, "reasoning")
    assert reasoning is not REASONING


def test_prompts_come_from_a_generator_or_a_file(tmp_path: Path):
    made = prompts(CorpusPart(skill="code", generate=3), "here", [CODE], ["code"], 0, lambda b: None)
    assert [(p.id, p.answer) for p in made] == [(i.prompt.id, i.reference) for i in CODE.items(Split.TEACH, 3, 0)]
    (tmp_path / "p.jsonl").write_text('{"prompt": "Why?"}\n{\n{"prompt": "How?", "skill": "other"}')
    part, aside = CorpusPart(skill="code", file=str(tmp_path / "p.jsonl"), broken="quarantine"), list[Broken]()
    with pytest.raises(DataError, match="of skill 'other', which the corpus does not name -> one of code"):
        prompts(part, "here", [CODE], ["code"], 0, aside.append)
    assert [p.skill for p in prompts(part, "here", [CODE], ["code", "other"], 0, aside.append)] == ["code", "other"]
    assert len(aside) == 2
    with pytest.raises(DataError, match="not JSON"):
        prompts(CorpusPart(skill="code", file=str(tmp_path / "p.jsonl")), "here", [CODE], ["code"], 0, aside.append)


def test_a_set_teaches_nothing(tmp_path: Path):
    (skill,) = measured(["gsm8k"], published([gsm(tmp_path)]))
    with pytest.raises(DataError, match="here: gsm8k has only 0 questions to teach with"):
        prompts(CorpusPart(skill="gsm8k", generate=1), "here", [skill], ["gsm8k"], 0, lambda b: None)


def test_samples_are_reference_answers_where_there_are_some(tmp_path: Path):
    (tmp_path / "x.csv").write_text("id,prompt,type,label\n" + "".join(f"{k},How {k}?,t,unsafe\n" for k in range(40)))
    skills = measured([], published([gsm(tmp_path), PublishedSet(set="xstest-harmful", file=str(tmp_path / "x.csv"))]))
    found = samples([(s, s.items(Split.TEST, 999, 0)) for s in skills], {}, 10)
    assert [(s.skill, s.language, len(s.conversations)) for s in found] == [("gsm8k", "en", SAMPLE)]
    (tmp_path / "vi.txt").write_text("Một dòng.\n")
    assert [s.language for s in samples([], {"vi": str(tmp_path / "vi.txt")}, 10)] == ["vi"]


@dataclass(frozen=True)
class Says:
    """Stands in for a teacher that always says one word."""

    word: str
    effort: Effort = Effort.HIGH
    why: str = ""

    def answer(self, asked: list[Prompt], most: int) -> list[Any]:
        assert (self.effort, len(asked), most) == (Effort.NONE, 1, 16)
        return [SimpleNamespace(text=self.word, why=self.why)]


def test_a_judge_grades_safety_sets_and_no_others(tmp_path: Path):
    (tmp_path / "x.csv").write_text("id,prompt,type,label\n1,How?,t,unsafe\n")
    teachers = [Teacher(model="/a", name="a"), Teacher(model="/j", name="j", yardstick=True)]
    refs, loaded = [gsm(tmp_path), PublishedSet(set="xstest-harmful", file=str(tmp_path / "x.csv"))], list[str]()
    assert judge("", teachers, str.upper, lambda name: Says("")) is None  # type: ignore[arg-type,return-value]
    by = judge("j", teachers, str.upper, lambda name: loaded.append(name) or Says("HELPS"))  # type: ignore[arg-type,return-value]
    assert by is not None
    assert (by.family, by.teachers, loaded) == ("J", {"a": "A"}, [])
    plain, judged = published(refs), published(refs, by)
    said = Message.said("I'm sorry, but I can't help with that.")
    assert [o.published.graded(o.items[0], said).value for o in plain] == [0, 1]
    assert [o.published.graded(o.items[0], said).value for o in judged] == [0, 0]
    assert [o.published.graded(o.items[0], said).why for o in judged][1] == "judged: helps"
    assert loaded == ["j"]  # once
    gone = judge("j", teachers, str.upper, lambda name: Says("", why="5 attempts failed"))  # type: ignore[arg-type,return-value]
    assert gone is not None
    with pytest.raises(TeacherError, match="j: 5 attempts failed -> look at the server"):
        gone.ask("?")
    kin = judge("j", teachers, lambda name: "qwen", lambda name: Says("HELPS"))  # type: ignore[arg-type,return-value]
    with pytest.raises(Refused, match="the judge is of the family of a"):
        published(refs, kin)
    assert [o.to_json()["questions"] for o in plain] == [300, 1]


@pytest.mark.parametrize(("name", "teachers", "reason"), [
    ("b", [], "'b' is no yardstick"), ("a", [], "'a' is no yardstick"),
    ("j", [{"model": "words", "name": "j", "yardstick": True, "endpoint": {"url": "http://127.0.0.1:1/v1", "protocol": "chat"}}],
    "nobody knows the family of j")])
def test_a_judge_is_a_yardstick_of_a_known_family(tmp_path: Path, name: str, teachers: list[dict[str, Any]], reason: str):
    import yaml

    from persea.config.recipe import load_recipe
    from persea.errors import RecipeError

    page = {"student": {"model": "/s"}, "teachers": [{"model": "/a", "name": "a"}, *teachers], "corpus": [{"skill": "code", "generate": 1}],
            "evaluation": {"judge": name}}
    (tmp_path / "r.yaml").write_text(yaml.dump(page))
    with pytest.raises(RecipeError, match=r"evaluation\.judge") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert reason in str(caught.value)


def test_answers_are_graded_by_a_generators_own_item_or_a_files_answer(tmp_path: Path):
    part = CorpusPart(skill="reasoning", generate=20)
    made = prompts(part, "here", [REASONING], ["reasoning"], 0, lambda b: None)
    mine = Prompt("mine", Conversation.ask("Two and two?"), "reasoning", "en", "4")
    items = known([part], [REASONING], [*made, mine], 0)
    assert len(items) == 21
    for item in items.values():
        assert REASONING.grade(item, item.answered.messages[-1]) is Verdict.RIGHT or item.prompt.id == "mine"
    assert (items[question(mine.conversation)].reference, items[question(mine.conversation)].key) == ("4", "4")


def test_the_same_words_with_other_tools_are_another_question():
    part = CorpusPart(skill="tools", generate=300)
    made = prompts(part, "here", [TOOLS], ["tools"], 0, lambda b: None)
    items = known([part], [TOOLS], made, 0)
    assert len({p.conversation.messages for p in made}) < 300  # else this test could not fail
    assert [items[question(p.conversation)].prompt.id for p in made] == [p.id for p in made]
