"""A family is taken only if it renders and parses as the model's own template does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from persea import storage
from persea.chat import probing
from persea.chat.families.gemma import GEMMA, GEMMA_TEXT_PARTS
from persea.chat.families.llama import LLAMA
from persea.chat.families.qwen import QWEN, QWEN25
from persea.chat.family import edit_texts
from persea.chat.messages import Conversation, Message, Role, Text, Thinking, ThinkingEffort
from persea.chat.probing import probing_conversations, prove_family, prove_family_once
from persea.errors import DataError
from persea.models.loading import ModelSource, load_renderer
from tests.chat.families.test_generic import folder_of
from tests.conftest import Speaker

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def encode_of(speaker: Speaker) -> Callable[[str], list[int]]:
    return lambda text: speaker.tokenizer.encode(text, add_special_tokens=False)


def test_each_sapling_is_proven(tiny: Speaker):
    result = prove_family(tiny.renderer, encode_of(tiny))
    assert result.is_proven and result.num_probes >= 10


def test_conversations_cover_what_templates_treat_differently():
    probes = [p.conversation for p in probing_conversations(QWEN)]
    assert 25 <= len(probes) <= 60
    assert {c.effort for c in probes} == set(QWEN.efforts)
    assert any(c.tools for c in probes)
    texts = [p.text for c in probes for p in c.parts()]
    assert "" in texts
    assert any(t != t.strip() for t in texts)
    assert any(not t.isascii() for t in texts)
    thoughts = {c.effort for c in probes for p in c.parts() if isinstance(p, Thinking)}
    assert thoughts == {ThinkingEffort.HIGH}
    assert not any(
        c.tools for p in (GEMMA,) for c in [q.conversation for q in probing_conversations(p)]
    )


def test_chatml_on_llamas_vocabulary_is_not_llama(tmp_path: Path):
    """Hermes and Dolphin rename two reserved tokens of Llama 3."""
    folder = folder_of(
        tmp_path / "hermes",
        CHATML,
        bos="<|begin_of_text|>",
        eos="<|im_end|>",
        controls=LLAMA_TOKENS,
    )
    assert load_renderer(str(folder)).family.name == "generic"
    with pytest.raises(DataError, match=r"not of the family llama: .*writes no") as caught:
        load_renderer(ModelSource(str(folder), family="llama"), "student.model")
    assert caught.value.where == "student.model"
    assert "family" in caught.value.remedy


def test_a_plain_template_on_gemmas_vocabulary_is_not_gemma(tmp_path: Path):
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    )
    folder = folder_of(
        tmp_path / "base",
        template,
        bos="<bos>",
        eos="<eos>",
        controls=("<start_of_turn>", "<end_of_turn>"),
    )
    renderer = load_renderer(str(folder))
    assert (renderer.family.name, renderer.family.stop_tokens) == ("generic", ("<eos>",))


def test_a_generation_that_renders_more_is_taken(tmp_path: Path):
    """The first templates of Gemma 3 take a system text as content parts only."""
    template = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
        "{{ first if loop.first }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    controls = ("<start_of_turn>", "<end_of_turn>")
    renderer = load_renderer(
        ModelSource(
            str(folder_of(tmp_path / "g", template, bos="<bos>", eos="<eos>", controls=controls))
        ),
        "teacher",
    )
    assert renderer.family is GEMMA_TEXT_PARTS
    question = Conversation.from_question("2 + 3?")
    brief = replace(
        question, messages=(Message(Role.SYSTEM, (Text("Brief."),)), *question.messages)
    )
    pieces = renderer.vocabulary.decode_pieces(renderer.render_prompt(brief).ids_T.tolist())
    assert b"user\nBrief.\n\n2 + 3?" in pieces


def test_a_borrowed_template_text_makes_no_family(tmp_path: Path):
    """Nemotron 3 declares tools as Qwen 3.5 does, but trims nothing."""
    signature = "{# <parameter=example_parameter_2>\\nThis is the value for the second parameter #}"
    folder = folder_of(tmp_path / "nemotron", signature + CHATML, bos=None, eos="<|im_end|>")
    assert load_renderer(str(folder)).family.name == "generic"


def test_a_difference_names_the_place(tiny_of: Callable[[str], Speaker]):
    speaker = tiny_of("llama")

    def shout(conversation):
        return edit_texts(LLAMA.normalise(conversation), lambda k, m, p: p.text.rstrip("?"))

    wrong = replace(speaker.renderer, family=replace(speaker.renderer.family, normalise=shout))
    result = prove_family(wrong, encode_of(speaker))
    assert not result.is_proven
    assert "2 + 3" in result.difference and "\n" not in result.difference


def test_a_family_that_trims_too_much_is_not_proven(tiny_of: Callable[[str], Speaker]):
    speaker = tiny_of("qwen")

    def trim(conversation):
        return edit_texts(
            speaker.renderer.family.normalise(conversation), lambda k, m, p: p.text.strip()
        )

    wrong = replace(speaker.renderer, family=replace(speaker.renderer.family, normalise=trim))
    assert "transformers renders" in prove_family(wrong, encode_of(speaker)).difference


def test_other_ids_of_the_same_text_are_a_difference(tiny_of: Callable[[str], Speaker]):
    speaker = tiny_of("llama")
    encode = encode_of(speaker)
    result = prove_family(speaker.renderer, lambda text: encode(text)[:-1])
    assert "with other tokens" in result.difference


def test_an_answer_that_is_not_parsed_back_is_a_difference(tiny_of: Callable[[str], Speaker]):
    speaker = tiny_of("llama")
    deaf = replace(speaker.renderer.family, parse=lambda pieces, effort: None)
    result = prove_family(replace(speaker.renderer, family=deaf), encode_of(speaker))
    assert "is parsed as" in result.difference


def test_a_family_that_refuses_most_conversations_is_not_proven(tiny_of: Callable[[str], Speaker]):
    result = probing.ProofResult("", 4, 10)
    assert not result.is_proven
    assert probing.ProofResult("", 5, 15).is_proven


def test_the_proof_is_kept_by_digest(
    tiny_of: Callable[[str], Speaker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    speaker = tiny_of("gemma")
    first = prove_family_once(speaker.renderer, encode_of(speaker))
    assert first.is_proven
    monkeypatch.setattr(probing, "prove_family", lambda *_: pytest.fail("probed again"))
    assert prove_family_once(speaker.renderer, encode_of(speaker)) == first
    (path,) = (storage.persea_home() / "families").glob("*.json")
    path.write_text("{")  # a broken record is probed again
    with pytest.raises(pytest.fail.Exception):
        prove_family_once(speaker.renderer, encode_of(speaker))
    with pytest.raises(pytest.fail.Exception):  # another template version has its own record
        other = replace(speaker.renderer.family, template_version="2")
        prove_family_once(replace(speaker.renderer, family=other), encode_of(speaker))


def test_the_wrong_family_of_a_recipe_is_refused(tiny_of: Callable[[str], Speaker]):
    folder = tiny_of("qwen").folder
    with pytest.raises(DataError, match=rf"not of the family {QWEN25.name}"):
        load_renderer(ModelSource(str(folder), family=QWEN25.name))
