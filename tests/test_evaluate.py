"""Bits are those of a model whose bits are known, and two speakers with the same weights have the same scores."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from test_engines import NAMES, opened
from test_teacher import scripted, teacher, words

from persea.chat import Effort, Finish, Text
from persea.engines.local import LocalEngine
from persea.evaluate import Evaluation, bits_per_byte, evaluate
from persea.measure import Split
from persea.skills import CODE, LANGUAGES, REASONING
from persea.teacher import Teacher

ITEMS = {skill: skill.items(Split.TEST, 6, 0) for skill in (LANGUAGES, CODE, REASONING)}


def uniform(name: str) -> Teacher:
    """A speaker to whom every token is as likely as any other."""
    voice, model = opened(name)
    model = deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return Teacher("uniform", voice, LocalEngine(model, len(voice.vocabulary)))


@pytest.mark.parametrize("name", NAMES)
def test_a_uniform_model_spends_the_logarithm_of_its_vocabulary_on_every_token(name: str) -> None:
    speaker, vocabulary = uniform(name), opened(name)[0].vocabulary
    for items in ITEMS.values():
        bits, size = bits_per_byte(speaker, items)
        tokens = sum(len(ids) + 1 for ids in vocabulary.encode_batch([i.reference for i in items]))  # and the one that ends the turn
        assert size == sum(len(i.reference.encode("utf-8")) for i in items)
        assert bits == pytest.approx(tokens * math.log2(len(vocabulary)), rel=1e-6)


def test_bits_are_the_surprise_of_the_very_tokens() -> None:
    name = "qwen-sapling"
    voice, model = opened(name)
    items = ITEMS[LANGUAGES]
    bits = 0.0
    for item in items:
        tokens = voice.render(item.prompt.conversation.answered(Text(item.reference)))
        with torch.inference_mode():
            p = torch.log_softmax(model(input_ids=torch.from_numpy(tokens.ids_T)[None].long()).logits[0, :, :len(voice.vocabulary)].double(), -1)
        bits -= sum(float(p[t - 1, tokens.ids_T[t]]) / math.log(2) for t in range(len(tokens)) if tokens.learn_T[t] and tokens.starts_T[t] >= 0)
    assert bits_per_byte(teacher(name), items)[0] == pytest.approx(bits, rel=1e-4)
    assert bits < bits_per_byte(uniform(name), items)[0] / 2  # and it has learned something


def test_the_same_weights_under_two_names_have_the_same_scores() -> None:
    student, base = (replace(teacher("gemma-sapling"), name=name) for name in ("student", "base"))
    done: list[tuple[str, str]] = []
    scores, bits, results = evaluate([student, base], list(ITEMS.items()), 40, lambda *what: done.append(what))
    mine, its = ([replace(s, speaker="") for s in scores if s.speaker == name] for name in ("student", "base"))
    assert mine == its
    assert any(s.value > 0 for s in mine)
    assert bits["student"] == bits["base"]
    assert [r.to_json() for r in results["student"]] == [r.to_json() for r in results["base"]]
    assert done == [(who, skill.name) for who in ("student", "base") for skill in ITEMS]


def test_every_speaker_is_asked_every_item_and_bits_of_all_are_weighted_by_bytes() -> None:
    name, stop = "llama-sapling", "<|eot_id|>"
    says = [words(name, i.reference if k % 2 else "no", stop) for skill in ITEMS for k, i in enumerate(ITEMS[skill])]
    scores, bits, results = evaluate([scripted(name, *says)], list(ITEMS.items()), 60)
    assert {s.skill: (s.value, s.n) for s in scores if not s.language} == {skill.name: (0.5, 6) for skill in ITEMS}
    assert {s.language for s in scores if s.skill == "languages"} == {"", *(i.prompt.language for i in ITEMS[LANGUAGES])}
    assert [r.item for r in results[name]] == [i for items in ITEMS.values() for i in items]
    assert all(r.finish is Finish.STOP for r in results[name])
    spent = {skill.name: bits_per_byte(teacher(name), items) for skill, items in ITEMS.items()}
    assert {k: v for k, v in bits[name].items() if k != "all"} == pytest.approx({k: b / n for k, (b, n) in spent.items()}, rel=1e-6)
    assert bits[name]["all"] == pytest.approx(sum(b for b, _ in spent.values()) / sum(n for _, n in spent.values()), rel=1e-6)


def test_an_evaluation_is_plain_json() -> None:
    scores, bits, _ = evaluate([teacher("qwen-sapling")], [(REASONING, ITEMS[REASONING][:2])], 40)
    value = Evaluation("student", "base", ("qwen-sapling",), Effort.NONE, scores, bits).to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["effort"] == "none"
    assert set(value["bits_per_byte"]["qwen-sapling"]) == {"reasoning", "all"}
