"""The hybrid format of the student, on tiny and real tokenizers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from persea.alignment.spans import common_boundaries
from persea.chat.families.hybrid import HYBRID_PRELUDE, has_thinking_switch
from persea.chat.messages import (
    PINNED_DATE,
    Conversation,
    FinishReason,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
)
from persea.chat.renderer import ChatRenderer
from persea.chat.template import compile_template
from persea.errors import DataError
from persea.models.loading import ModelSource, load_renderer
from tests.chat.test_renderer import FRAGMENTS, LOOK_ALIKES, check_places, generated, texts
from tests.conftest import ROOT, Speaker

SAPLINGS = ROOT / "saplings"
CLOCK = Tool("clock", "Tells the time.", '{"type": "object"}')


@pytest.fixture(scope="module")
def llama(tiny_of: Callable[[str], Speaker]) -> ChatRenderer:
    """A tokenizer in which `<think>` is a token."""
    renderer: ChatRenderer = tiny_of("llama").renderer
    assert "<think>" in renderer.vocabulary.control_token_ids
    return renderer


@pytest.fixture(scope="module")
def maple(
    tiny_of: Callable[[str], Speaker], tmp_path_factory: pytest.TempPathFactory
) -> ChatRenderer:
    """An unknown family with the hybrid switch, in which `<think>` is plain text."""
    folder = Path(
        shutil.copytree(tiny_of("gemma").folder, tmp_path_factory.mktemp("maple") / "maple")
    )
    (folder / "chat_template.jinja").write_text(
        "{%- for m in messages %}{{- '<start_of_turn>' + m['role'] + '\n' + m['content'] + "
        "'<end_of_turn>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\n' }}{%- endif %}"
    )
    renderer = load_renderer(ModelSource(str(folder), family="generic", thinking=True), "student")
    assert "<think>" not in renderer.vocabulary.control_token_ids
    return renderer


@pytest.fixture(scope="module", params=["llama", "maple"])
def renderer(request: pytest.FixtureRequest) -> ChatRenderer:
    found: ChatRenderer = request.getfixturevalue(request.param)
    return found


def written(renderer: ChatRenderer, conversation: Conversation) -> str:
    answered = conversation.messages[-1].role is Role.ASSISTANT
    tokens = renderer.render(conversation) if answered else renderer.render_prompt(conversation)
    return "".join(
        p if isinstance(p, str) else p.decode()
        for p in renderer.vocabulary.decode_pieces(tokens.ids_T.tolist())
    )


def asked(effort: ThinkingEffort, *, system: str = "") -> Conversation:
    return Conversation.from_question("2+3?", system=system, effort=effort)


# ---- the form ------------------------------------------------------------------------------------


HEAD = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nReasoning: "
QUESTION = (
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n2+3?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.mark.parametrize("effort", ThinkingEffort)
def test_the_prompt_starts_with_the_effort(llama: ChatRenderer, effort: ThinkingEffort):
    assert written(llama, asked(effort)) == f"{HEAD}{effort}{QUESTION}"
    assert (
        written(llama, asked(effort, system="Be brief. "))
        == f"{HEAD}{effort}\n\nBe brief.{QUESTION}"
    )
    thought = "" if effort is ThinkingEffort.NONE else "<think>\nTwo and three.\n</think>\n\n"
    conversation = asked(effort).with_answer(Thinking(" Two and three.\n"), Text("\n5. "))
    assert written(llama, conversation) == f"{HEAD}{effort}{QUESTION}{thought}5.<|eot_id|>"


def test_the_template_without_an_effort_answers_at_once(llama: ChatRenderer):
    asks = [{"role": "user", "content": "2+3?"}]
    assert llama.template(messages=asks, add_generation_prompt=True) == f"{HEAD}none{QUESTION}"


def test_earlier_thoughts_are_dropped(renderer: ChatRenderer):
    first = asked(ThinkingEffort.HIGH).with_answer(Thinking("Early."), Text("5"))
    conversation = replace(
        first, messages=(*first.messages, *asked(ThinkingEffort.HIGH).messages)
    ).with_answer(Thinking("Late."), Text("5"))
    assert "Early." not in written(renderer, conversation)
    assert written(renderer, conversation).count("<think>\nLate.\n</think>\n\n5") == 1


def test_a_call_behind_a_thought_and_its_result(llama: ChatRenderer):
    call = ToolCall("clock", '{"zone": "UTC"}')
    conversation = replace(asked(ThinkingEffort.LOW), tools=(CLOCK,)).with_answer(
        Thinking("I look."), call
    )
    tokens = llama.render(conversation)
    declared = (
        "Functions:\nclock(): Tells the time.\n\n2+3?<|eot_id|>"  # in the sapling's own few words
    )
    assert declared in written(llama, conversation)
    assert written(llama, conversation).endswith(
        '<think>\nI look.\n</think>\n\n{"name": "clock", "parameters": {"zone": "UTC"} }<|eot_id|>'
    )
    assert llama.parse(generated(tokens), ThinkingEffort.LOW, conversation.tools) == (
        (Thinking("I look."), call),
        FinishReason.STOP,
    )
    answered = replace(
        conversation,
        messages=(*conversation.messages, Message(Role.TOOL, (ToolResult("clock", "10:00"),))),
    )
    assert written(llama, answered.with_answer(Text("Ten."))).endswith(
        '{"name": "clock", "parameters": {"zone": "UTC"} }<|eot_id|><|start_header_id|>ipython'
        '<|end_header_id|>\n\n"10:00"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\nTen.<|eot_id|>"
    )


# ---- there and back ------------------------------------------------------------------------------


@given(
    thought=texts(FRAGMENTS + LOOK_ALIKES[4:]),
    text=texts(FRAGMENTS + LOOK_ALIKES[4:]),
    system=texts(FRAGMENTS),
    effort=st.sampled_from(ThinkingEffort),
)
@example(thought="  ", text="\n\nx", system="", effort=ThinkingEffort.HIGH)
@example(thought="a", text="", system=" ", effort=ThinkingEffort.HIGH)
@example(thought="</thin", text="k>", system="", effort=ThinkingEffort.LOW)
def test_renderings_are_parsed_back(
    renderer: ChatRenderer, thought: str, text: str, system: str, effort: ThinkingEffort
):
    conversation = Conversation.from_question("q", system=system, effort=effort).with_answer(
        *((Thinking(thought),) if thought else ()), Text(text)
    )
    retained = renderer.family.normalise(conversation).messages[-1].parts
    assert renderer.family.normalise(
        renderer.family.normalise(conversation)
    ) == renderer.family.normalise(conversation)
    assert (
        retained[0].text == ("" if effort is ThinkingEffort.NONE else thought.strip())
        or not thought
    )
    parts, finish = renderer.parse(generated(renderer.render(conversation)), effort)
    assert finish is FinishReason.STOP
    assert [p for p in parts if p.text] == [p for p in retained if p.text]


@given(thought=texts(FRAGMENTS + LOOK_ALIKES), text=texts(FRAGMENTS + LOOK_ALIKES))
def test_a_tokenizer_with_think_tokens_distinguishes_them_from_text(
    llama: ChatRenderer, thought: str, text: str
):
    conversation = asked(ThinkingEffort.HIGH).with_answer(
        Thinking(f"a{thought}b"), Text(f"<think>{text}")
    )
    assert llama.parse(generated(llama.render(conversation)), ThinkingEffort.HIGH) == (
        (Thinking(f"a{thought}b"), Text(f"<think>{text}".strip())),
        FinishReason.STOP,
    )


@pytest.mark.parametrize(
    "parts", [(Thinking("so </think> then"), Text("x")), (Text(" <think> I do"),)]
)
def test_a_tokenizer_without_think_tokens_refuses_ambiguous_texts(maple: ChatRenderer, parts):
    with pytest.raises(DataError, match="looks like the end of a thought"):
        maple.render(asked(ThinkingEffort.HIGH).with_answer(*parts))


@pytest.mark.parametrize(
    ("generated_text", "want"),
    [
        ("<think>\nso", None),
        ("<think>\nso\n</think>\n\nHi", (Thinking("so"), Text("Hi"))),
        ("<think>\n\n</think>\n\nHi", (Text("Hi"),)),
        ("Hi </think>", (Text("Hi </think>"),)),
        ("Hi", (Text("Hi"),)),
        ("<think>so</think>", (Thinking("so"), Text(""))),
    ],
)
def test_answers_with_markers_in_plain_text(maple: ChatRenderer, generated_text: str, want):
    ids = [*maple.vocabulary.encode(generated_text), maple.stop_ids[0]]
    assert (
        maple.parse(ids, ThinkingEffort.HIGH) == ((), FinishReason.MALFORMED)
        if want is None
        else (want, FinishReason.STOP)
    )
    assert maple.parse(ids[:-1], ThinkingEffort.HIGH)[1] is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("pieces", "want"),
    [
        (("<think>", b"\nso\n"), None),
        (("<think>", b"\nso\n", "</think>", b"\n\nHi"), (Thinking("so"), Text("Hi"))),
        (("</think>", b"Hi"), None),
        (("<think>", b"a", "<think>", b"b", "</think>", b"Hi"), None),
        (("<think>", b"a", "</think>", b"Hi", "</think>"), None),
        ((b"<think>\nso\n</think>\n\nHi",), (Text("<think>\nso\n</think>\n\nHi"),)),
    ],
)
def test_answers_with_markers_as_tokens(llama: ChatRenderer, pieces, want):
    assert llama.family.parse(pieces, ThinkingEffort.HIGH) == want


# ---- who has it, who gets it ---------------------------------------------------------------------


def test_the_sapling_has_the_bundled_template():
    """The sapling's template equals the bundled one except for two details.

    It declares tools in fewer words, and writes a space after arguments: "}}" as one token would
    end both the arguments and the call.
    """
    mine, bundled = (
        (folder / name).read_text().splitlines()
        for folder, name in (
            (SAPLINGS / "templates", "llama.jinja"),
            (ROOT / "persea" / "chat" / "families", "hybrid.jinja"),
        )
    )
    assert [
        k for k, (one, other) in enumerate(zip(mine, bundled, strict=True)) if one != other
    ] == [
        k
        for k, line in enumerate(bundled)
        if "Functions; " in line
        or "t['function'] | tojson" in line
        or "call['arguments'] | tojson" in line
    ]


def test_no_other_tiny_family_has_the_switch(tiny: Speaker):
    assert has_thinking_switch(tiny.renderer.template) is (tiny.renderer.family.name == "llama")


@pytest.mark.realdata
def test_no_real_template_has_the_switch_already(data: Path):
    found = [
        p.stem
        for p in sorted((data / "templates").glob("*.jinja"))
        if has_thinking_switch(
            compile_template(
                p.read_text(), {"bos_token": "<s>", "eos_token": "</s>"}, PINNED_DATE, p.stem
            )
        )
    ]
    assert found == []


@pytest.mark.parametrize("family", ["qwen", "gpt-oss"])
def test_a_family_with_a_switch_of_its_own_is_refused(
    tiny_of: Callable[[str], Speaker], family: str
):
    with pytest.raises(DataError, match="its own thinking switch"):
        load_renderer(ModelSource(str(tiny_of(family).folder), thinking=True), "student.model")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{{ messages[-1]['content'] }}<end_of_turn>",
            "does not keep the effort|does not write an answer",
        ),
        (
            "{%- for m in messages if m['role'] != 'system' %}{{ '<start_of_turn>' + m['role'] "
            "+ '\n' + m['content'] + '<end_of_turn>\n' }}"
            "{%- endfor %}{%- if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{%- "
            "endif %}",
            "does not keep the effort",
        ),
        (
            "{%- for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + "
            "m['content'].split('</think>')[-1] + '<end_of_turn>\n' }}"
            "{%- endfor %}{%- if add_generation_prompt %}"
            "{{ '<start_of_turn>assistant\n' }}{%- endif %}",
            "does not keep the effort",
        ),
    ],
)
def test_a_template_that_loses_effort_or_thought_is_refused(
    tiny_of: Callable[[str], Speaker], tmp_path: Path, template: str, why: str
):
    folder = Path(shutil.copytree(tiny_of("gemma").folder, tmp_path / "odd"))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match=why):
        load_renderer(ModelSource(str(folder), family="generic", thinking=True), "student.model")


def test_a_llama_base_without_any_template_gets_the_bundled_one(
    tiny_of: Callable[[str], Speaker], llama: ChatRenderer, tmp_path: Path
):
    folder = Path(shutil.copytree(tiny_of("llama").folder, tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    assert load_renderer(ModelSource(str(folder)), "student.model").is_text
    assert (
        load_renderer(ModelSource(str(folder), thinking=True), "student.model").template_text
        == (ROOT / "persea" / "chat" / "families" / "hybrid.jinja").read_text()
        != llama.template_text
    )


def test_a_given_switch_is_found_again(maple: ChatRenderer, tmp_path: Path):
    """A saved student's folder is detected as thinking by its template alone."""
    folder = Path(shutil.copytree(maple.vocabulary.name, tmp_path / "again"))
    assert maple.template_text.startswith(HYBRID_PRELUDE)
    (folder / "chat_template.jinja").write_text(maple.template_text)
    again = load_renderer(ModelSource(str(folder), family="generic"), "student.model")
    assert (again.digest, again.family.efforts) == (maple.digest, tuple(ThinkingEffort))
    assert (
        load_renderer(
            ModelSource(str(folder), family="generic", thinking=True), "student.model"
        ).template_text
        == maple.template_text
    )


# ---- the real tokenizers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_hybrid(data: Path) -> ChatRenderer:
    """The real Llama 3 tokenizer, which has no <think> token, with the bundled template."""
    renderer = load_renderer(
        ModelSource(str(data / "tokenizers" / "llama3"), thinking=True), "student"
    )
    assert "<think>" not in renderer.vocabulary.control_token_ids
    return renderer


THOUGHTS = (
    ("First 12 * 345.\n\nThen I add: 4140.", "It is 4140."),
    ("先想一想：342×4=1368。", "一千三百六十八条。"),
    ("คิดก่อน สามร้อย", "สวัสดี 😀"),
    ("def f(x):\n    return x\n", "```\nx\n```"),
)


@pytest.mark.realdata
@pytest.mark.parametrize(("thought", "text"), THOUGHTS)
@pytest.mark.parametrize("effort", ThinkingEffort)
def test_real_llama_thinks_in_plain_text(
    real_hybrid: ChatRenderer, data: Path, thought: str, text: str, effort: ThinkingEffort
):
    conversation = Conversation.from_question(
        "How much?", system="Be brief.", effort=effort
    ).with_answer(Thinking(thought), Text(text))
    tokens = real_hybrid.render(conversation)
    check_places(real_hybrid, conversation, tokens)
    parts = real_hybrid.family.normalise(conversation).messages[-1].parts
    assert real_hybrid.parse(generated(tokens), effort) == (
        tuple(p for p in parts if p.text),
        FinishReason.STOP,
    )
    assert len(parts[0].text) == (0 if effort is ThinkingEffort.NONE else len(thought.strip()))


@pytest.mark.realdata
def test_real_llama_renders_as_transformers_does(real_hybrid: ChatRenderer, data: Path):
    judge = AutoTokenizer.from_pretrained(data / "tokenizers" / "llama3")
    for thought, text in THOUGHTS:
        conversation = Conversation.from_question(
            "How much?", effort=ThinkingEffort.LOW
        ).with_answer(Thinking(thought), Text(text))
        messages = [
            {"role": "user", "content": "How much?"},
            {"role": "assistant", "content": text, "reasoning_content": thought},
        ]
        theirs = judge.apply_chat_template(
            messages,
            chat_template=real_hybrid.template_text,
            return_dict=False,
            reasoning_effort="low",
        )
        assert real_hybrid.render(conversation).ids_T.tolist() == theirs


@pytest.mark.realdata
@pytest.mark.parametrize("teacher", ["qwen", "gpt-oss"])
def test_real_thoughts_are_aligned(
    real_hybrid: ChatRenderer, real_of: Callable[[str], Speaker], teacher: str
):
    """Qwen's <think> and harmony's analysis align with the student's plain text for most of the
    thought."""
    for thought, text in THOUGHTS[:3]:
        conversation = Conversation.from_question(
            "How much?", effort=ThinkingEffort.HIGH
        ).with_answer(Thinking(thought), Text(text))
        s, t = real_hybrid.render(conversation), real_of(teacher).renderer.render(conversation)
        begin = len(b"How much?") + 1
        end = begin + len(thought.encode())
        mine = {
            int(k)
            for k, learn in zip(s.starts_T, s.loss_mask_T, strict=True)
            if learn and begin <= k < end
        }
        common = {int(s.starts_T[k]) for k in common_boundaries(s, t).student_C} & mine
        assert begin in common or begin not in mine
        assert len(common) >= 0.5 * len(mine) > 2
