"""Tools of unknown models: their notation is found by rendering, or they have none."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.chat.messages import (
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
from persea.errors import DataError
from persea.models.loading import load_renderer
from tests.chat.families.test_generic import END, HEAD, ROLES, small

TOOL = Tool(
    "f",
    "Does it.",
    '{"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "integer"}, '
    '"o": {"type": "object"}}}',
)
NESTED = ToolCall("f", '{"s": "7", "n": 7, "o": {"a": [true, null, "ဘန်"]}}')
CALLS = (NESTED, ToolCall("f", "{}"), ToolCall("f", '{"s": "a b"}'))
MARKS = (*ROLES, "<|tool|>", "<|call|>", "<|sep|>", "<|close|>")
SYSTEM = "{% if tools %}<|system|>{{ tools | tojson }}<|stop|>{% endif %}"
TEXT = "{{ m.content or '' }}"


def template(calls: str) -> str:
    """Return a template whose answers end with these calls."""
    return f"{SYSTEM}{HEAD}<|{{{{ m.role }}}}|>{TEXT}{calls}<|stop|>{END}"


def each_call(body: str, between: str = "") -> str:
    """Return the template text of all calls."""
    separator = f"{{% if not loop.last %}}{between}{{% endif %}}"
    loop = "{% for t in m.tool_calls or [] %}{% set c = t.function %}"
    return f"{loop}{body}{separator}{{% endfor %}}"


def each_pair(body: str) -> str:
    """Return the template text of all arguments of a call."""
    return f"{{% for k, v in c.arguments.items() %}}{body}{{% endfor %}}"


BARE = "{{ v if v is string else v | tojson }}"
NOTATIONS = {
    "name and JSON": each_call("<|call|>{{ c.name }}<|sep|>{{ c.arguments | tojson }}<|close|>"),
    "list of JSON": (
        "{% if m.tool_calls %}<|call|>["
        + each_call(
            '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}, "id": "{{ t.id }}"}',
            ", ",
        )
        + "]<|close|>{% endif %}"
    ),
    "pairs": each_call(
        "<|call|>{{ c.name }}\n" + each_pair(f"<k>{{{{ k }}}}</k><v>{BARE}</v>\n") + "<|close|>"
    ),
    "typed pairs": each_call(
        "<|call|>{{ c.name }}"
        + each_pair(f' {{{{ k }}}} text="{{{{ v is string }}}}">{BARE}<|sep|>')
        + "<|close|>"
    ),
    "Python": (
        "{% if m.tool_calls %}<|call|>["
        + each_call(
            "{{ c.name }}(" + "{% for k, v in c.arguments.items() %}{{ k }}="
            "{% if v is string %}'{{ v }}'{% else %}{{ v | tojson }}{% endif %}"
            "{% if not loop.last %}, {% endif %}{% endfor %})",
            ", ",
        )
        + "]<|close|>{% endif %}"
    ),
    "identifiers alone": each_call("<|call|>{{ t.id }}<|sep|>{{ c.arguments | tojson }}<|close|>"),
    "text arguments": each_call("<|call|>{{ c.name }}<|sep|>{{ c.arguments + '' }}<|close|>"),
    "nine characters": each_call(
        "{% if t.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
        "<|call|>{{ c.name }}<|sep|>{{ t.id }}<|sep|>{{ c.arguments | tojson }}<|close|>"
    ),
    "counters": each_call(
        '<|call|>n="{{ loop.index0 }}" {{ c.name }}<|sep|>{{ c.arguments | tojson }}<|close|>'
    ),
    "Python values": each_call(
        "<|call|>{{ c.name }}\n" + each_pair("<k>{{ k }}</k><v>{{ v }}</v>\n") + "<|close|>"
    ),
}


def opened(path: Path, calls: str) -> ChatRenderer:
    return load_renderer(small(path, template(calls), controls=MARKS), "w")


def asked() -> Conversation:
    return Conversation((Message(Role.USER, (Text("q"),)),), tools=(TOOL,))


@pytest.mark.parametrize("notation", NOTATIONS)
def test_calls_and_results_of_a_notation_are_exact(tmp_path: Path, notation: str):
    renderer = opened(tmp_path, NOTATIONS[notation])
    assert "no tools" not in renderer.family.limitations
    for calls in ((NESTED,), CALLS[1:2], CALLS):
        conversation = asked().with_answer(Text("Wait: "), *calls)
        tokens = renderer.render(conversation)
        answer = tokens.ids_T[tokens.loss_mask_T].tolist()
        parsed = renderer.parse(answer, ThinkingEffort.NONE, (TOOL,))
        assert parsed == ((Text("Wait: "), *calls), FinishReason.STOP)
    results = Message(Role.TOOL, (ToolResult("f", '{"r": "é"}'), ToolResult("f", "\n x ")))
    done = Conversation((*asked().with_answer(*CALLS[:2]).messages, results), tools=(TOOL,))
    rendered = renderer.render(done.with_answer(Text("Done.")))
    text = b"".join(
        p
        for p in renderer.vocabulary.decode_pieces(rendered.ids_T.tolist())
        if isinstance(p, bytes)
    ).decode()
    assert '{"r": "é"}' in text and "\n x " in text


def test_a_template_may_write_calls_only_without_content(tmp_path: Path):
    """DeepSeek's do so: an empty text is another answer there."""
    body = each_call("<|call|>{{ c.name }}<|sep|>{{ c.arguments | tojson }}<|close|>")
    renderer = opened(tmp_path, f"{{% if m.content is none %}}{body}{{% endif %}}")
    tokens = renderer.render(asked().with_answer(*CALLS))
    answer = tokens.ids_T[tokens.loss_mask_T].tolist()
    assert renderer.parse(answer, ThinkingEffort.NONE, (TOOL,)) == (CALLS, FinishReason.STOP)
    with pytest.raises(DataError, match="text and tool calls"):
        renderer.render(asked().with_answer(Text("Wait"), NESTED))


def test_json_arguments_have_byte_offsets(tmp_path: Path):
    """Then their tokens learn from the distributions of a teacher with another tokenizer."""
    renderer = opened(tmp_path, NOTATIONS["name and JSON"])
    tokens = renderer.render(asked().with_answer(NESTED))
    covered = tokens.ends_T[tokens.loss_mask_T] - tokens.starts_T[tokens.loss_mask_T]
    assert covered.sum() == len(NESTED.arguments.encode())


def test_a_value_that_ends_the_value_is_refused_at_its_place(tmp_path: Path):
    renderer = opened(tmp_path, NOTATIONS["pairs"])
    call = ToolCall("f", '{"s": "a</v>\\n<k>b"}')
    with pytest.raises(DataError, match="cannot be parsed back"):
        renderer.render(asked().with_answer(call))
    renderer.render(asked().with_answer(ToolCall("f", '{"s": "a</v> b"}')))


def test_a_malformed_call_is_malformed_and_no_text(tmp_path: Path):
    renderer = opened(tmp_path, NOTATIONS["name and JSON"])
    good = renderer.render(asked().with_answer(NESTED))
    answer = good.ids_T[good.loss_mask_T].tolist()
    broken = [*answer[:-4], *answer[-2:]]
    assert renderer.parse(broken, ThinkingEffort.NONE, (TOOL,)) == ((), FinishReason.MALFORMED)


@pytest.mark.parametrize(
    "calls",
    [
        each_call("<|call|>{{ c.name }}<|close|>"),  # the arguments are dropped
        each_call("<|call|>{{ c.name | upper }}{{ c.arguments | tojson }}<|close|>"),
        each_call("{{ c.name }} {{ c.arguments | tojson }}"),  # as any text
    ],
)
def test_what_cannot_be_parsed_back_is_no_notation(tmp_path: Path, calls: str):
    renderer = opened(tmp_path, calls)
    assert "no tools" in renderer.family.limitations
    with pytest.raises(DataError, match="tools"):
        renderer.render(asked().with_answer(NESTED))


def test_calls_may_end_with_another_token_that_the_next_turn_writes(tmp_path: Path):
    """GLM: an answer ends with the next role's token, a call with the tool's."""
    text = (
        f"{SYSTEM}{HEAD}<|{{{{ m.role }}}}|>{TEXT}"
        + each_call("<|call|>{{ c.name }}<|sep|>{{ c.arguments | tojson }}<|close|>")
        + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    ends = ("<|user|>", "<|tool|>")
    renderer = load_renderer(small(tmp_path, text, eos="<|stop|>", ends=ends, controls=MARKS), "w")
    ids = renderer.vocabulary.control_token_ids
    for parts, end in (((NESTED,), "<|tool|>"), ((Text("a"),), "<|user|>")):
        assert renderer.render(asked().with_answer(*parts)).ids_T[-1] == ids[end]


def test_text_around_a_plain_answer_may_be_missing_before_calls(tmp_path: Path):
    """Muse and Cohere: an answer has an envelope that calls do not have, also behind a thought."""
    text = (
        SYSTEM + "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
        "{% if m.thinking %} to=self<|sep|>{{ m.thinking }}<|close|><|assistant|>{% endif %}"
        "{% if m.tool_calls %}"
        + each_call(" to={{ c.name }}<|sep|>{{ c.arguments | tojson }}", "<|close|><|assistant|>")
        + "{% else %} to=user<|sep|>{{ m.content }}{% endif %}<|stop|>"
        "{% else %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endif %}" + END
    )
    renderer = load_renderer(small(tmp_path, text, controls=MARKS), "w")
    effort = renderer.family.efforts[-1]
    for parts in ((Thinking("so"), NESTED, CALLS[2]), (CALLS[1],), (Thinking("so"), Text("to=f"))):
        conversation = Conversation(asked().messages, effort, (TOOL,)).with_answer(*parts)
        tokens = renderer.render(conversation)
        answer = tokens.ids_T[tokens.loss_mask_T].tolist()
        assert renderer.parse(answer, effort, (TOOL,)) == (parts, FinishReason.STOP)
