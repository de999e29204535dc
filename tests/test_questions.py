"""What a recipe asks with; what a whole river makes of it is in test_river.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persea.corpus import Broken
from persea.errors import DataError
from persea.measure import Split
from persea.questions import SAMPLE, measured, prompts, published, samples
from persea.sections import CorpusPart, PublishedSet
from persea.skills import CODE, REASONING


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
