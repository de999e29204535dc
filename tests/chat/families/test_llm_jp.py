"""LLM-jp 4.1: several calls in one turn, and thoughts before calls up to the next question."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from bench.templates import compare
from persea.chat.families.gpt_oss import GPT_OSS
from persea.chat.families.llm_jp import LLM_JP, LLM_JP_LAST_THOUGHT
from persea.chat.messages import (
    Conversation,
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
from persea.errors import DataError
from persea.models.loading import ModelSource, load_renderer
from tests.chat.families.test_generic import folder_of
from tests.tokenization.traits import save_model_folder, unigram

CONTROLS = [f"<|{n}|>" for n in "start end message channel constrain return call".split()]
# What LLM-jp's template does, in few lines.
TEMPLATE = """
{{- '<|start|>system<|message|>Reasoning: ' + reasoning_effort | default('medium') + '<|end|>' }}
{%- if tools %}{{- '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set later = namespace(final=false) %}
{%- for n in messages[loop.index:] %}
{%- if n.role == 'assistant' and 'tool_calls' not in n and not loop.last %}
{%- set later.final = true %}
{%- endif %}
{%- endfor %}
{%- set thought = '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>'
  if m.thinking else '' %}
{%- if m.tool_calls %}
{{- '' if later.final else thought }}
{%- for call in m.tool_calls %}
{{- '<|start|>assistant to=functions.' + call.function.name }}
{{- '<|channel|>commentary <|constrain|> json<|message|>' + call.function.arguments | tojson }}
{{- '<|call|>' if loop.last else '<|end|>' }}
{%- endfor %}
{%- else %}
{%- set ends = loop.last and not add_generation_prompt %}
{{- (thought if ends else '') + '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if ends else '<|end|>' }}
{%- endif %}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- m.content | tojson + '<|end|>' }}
{%- else %}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""
TOOLS = tuple(
    Tool(name, "", '{"type": "object", "properties": {"city": {"type": "string"}}}')
    for name in ("get_rain", "get_wind")
)
CALLS = (ToolCall("get_rain", '{"city": "京都"}'), ToolCall("get_wind", '{"city": "大阪"}'))
RESULTS = (ToolResult("get_rain", "none"), ToolResult("get_wind", "3 m/s"))


def asked(*messages: Message) -> Conversation:
    first = Message(Role.USER, (Text("How?"),))
    return Conversation((first, *messages), ThinkingEffort.HIGH, TOOLS)


CALLED = Message(Role.ASSISTANT, (Thinking("Two tools."), *CALLS))
TOLD = Message(Role.TOOL, RESULTS)
ANSWERED = Message(Role.ASSISTANT, (Thinking("Dry."), Text("Dry, and a breeze.")))
AGAIN = Message(Role.USER, (Text("And now?"),))


@pytest.fixture(scope="module", params=["byte-level", "unigram"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ChatRenderer, Any]:
    """A renderer and transformers' tokenizer of the same folder; LLM-jp's is a Unigram."""
    folder = tmp_path_factory.mktemp("llm-jp")
    if request.param == "byte-level":
        folder_of(folder, TEMPLATE, bos=None, eos="<|return|>", controls=tuple(CONTROLS))
    else:
        tokenizer = unigram("beginning")
        tokenizer.add_special_tokens([AddedToken(c, normalized=False) for c in CONTROLS])
        save_model_folder(tokenizer, "bare", folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    source = ModelSource(str(folder))
    return load_renderer(source, "teacher", date.today()), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "messages",
    [
        (CALLED,),
        (CALLED, TOLD, ANSWERED),
        (CALLED, TOLD, CALLED),
        (CALLED, TOLD, ANSWERED, AGAIN, CALLED),
        (CALLED, TOLD, ANSWERED, AGAIN, CALLED, TOLD, ANSWERED),
    ],
    ids=["calls", "answer", "calls again", "second question", "second answer"],
)
def test_renderings_with_several_calls_are_transformers(
    model: tuple[ChatRenderer, Any], messages: tuple[Message, ...]
):
    renderer, tokenizer = model
    assert renderer.family is LLM_JP
    assert compare(renderer, tokenizer, asked(*messages)) == ("equal", "")


def test_a_finished_conversation_begins_with_its_prompt(model: tuple[ChatRenderer, Any]):
    """The thought before the calls is in both."""
    renderer, _ = model
    whole = renderer.render(asked(CALLED, TOLD, ANSWERED)).ids_T.tolist()
    prompt = renderer.render_prompt(asked(CALLED, TOLD)).ids_T.tolist()
    assert whole[: len(prompt)] == prompt
    assert [m.thinking for m in LLM_JP.normalise(asked(CALLED, TOLD, ANSWERED)).messages] == [
        *("", "Two tools.", "", "Dry.")
    ]
    later = LLM_JP.normalise(asked(CALLED, TOLD, ANSWERED, AGAIN, CALLED))
    assert [m.thinking for m in later.messages] == ["", "", "", "", "", "Two tools."]


def test_a_template_without_earlier_thoughts_is_its_next_generation(tmp_path: Path):
    """The template after LLM-jp 4.1's keeps the thoughts of the last message alone."""
    template = TEMPLATE.replace(
        "{{- '' if later.final else thought }}",
        "{{- thought if loop.last and not add_generation_prompt }}",
    )
    folder_of(tmp_path, template, bos=None, eos="<|return|>", controls=tuple(CONTROLS))
    renderer = load_renderer(ModelSource(str(tmp_path)), "teacher", date.today())
    assert renderer.family is LLM_JP_LAST_THOUGHT
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for messages in ((CALLED,), (CALLED, TOLD, ANSWERED), (CALLED, TOLD, ANSWERED, AGAIN, CALLED)):
        assert compare(renderer, tokenizer, asked(*messages)) == ("equal", "")


def test_gpt_oss_is_another_family(model: tuple[ChatRenderer, Any]):
    _, tokenizer = model
    source = ModelSource(tokenizer.name_or_path, family="gpt-oss")
    with pytest.raises(DataError, match="not of the family gpt-oss"):
        load_renderer(source, "teacher", date.today())


def test_an_answer_is_the_final_channel_or_calls():
    def message(head: bytes, *rest: str | bytes) -> tuple[str | bytes, ...]:
        return (head, *rest) if head else rest

    thought = ("<|channel|>", b"analysis", "<|message|>", b"hm")
    final = ("<|channel|>", b"final", "<|message|>", b"Dry.")
    call = message(b" to=functions.f", "<|channel|>", b"commentary ", "<|constrain|>", b" json")
    call = (*call, "<|message|>", b"{}")
    joint = ("<|end|>", "<|start|>", b"assistant")
    joined = (*joint[:2], b"assistant" + call[0], *call[1:])
    f, effort = ToolCall("f", "{}"), ThinkingEffort.HIGH
    assert LLM_JP.parse((*thought, *joined, *joined), effort) == (Thinking("hm"), f, f)
    assert LLM_JP.parse((*call, *joined), effort) == (f, f)
    assert LLM_JP.parse((*thought, *joint, *final), effort) == (Thinking("hm"), Text("Dry."))
    for broken in ((), thought, (*final, *joined), (*call, *joint, *final), (*call, *joint)):
        assert LLM_JP.parse(broken, effort) is None
    assert GPT_OSS.parse((*call, *joined), effort) is None
    assert GPT_OSS.parse(call, effort) == (f,)


def test_text_beside_calls_is_refused():
    both = replace(CALLED, parts=(Text("Let me see."), *CALLS))
    with pytest.raises(DataError, match="message 1 has text and tool calls"):
        LLM_JP.template_inputs(asked(both))
