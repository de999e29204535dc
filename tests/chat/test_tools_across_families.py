"""A conversation with calls, results and thoughts is learned turn by turn in another notation.

The templates are real ones, of PERSEA_DATA and, where it is installed, of the package trl. Each
has a tiny tokenizer with its control tokens. A teacher's turn is parsed from its own ids and
rendered in the student's notation: arguments and results keep their bytes, or the turn is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.templates import make_tokenizer_folder
from persea.alignment.spans import aligned_spans
from persea.chat.messages import (
    Conversation,
    FinishReason,
    Message,
    Role,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolResult,
)
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.models.loading import ModelSource, load_renderer

TEMPLATES = ("qwen3", "qwen3.5", "gemma4", "gpt-oss", "llama3.1", "glm-4.6")
OF_TRL = ("nemotron_3_super", "muse_glimmer", "lfm2_2_5_v2", "qwen3_8")
TOOL = Tool(
    "find_ship",
    "Finds a ship.",
    '{"type": "object", "properties": {"name": {"type": "string"}, "limit": {"type": "integer"}, '
    '"where": {"type": "object"}}}',
)
FIRST = ToolCall("find_ship", '{"name": "မြန်မာ é", "limit": 2, "where": {"a": [true, null, "x"]}}')
SECOND = ToolCall("find_ship", '{"name": "7", "limit": 7}')
AS_JSON, AS_TEXT = '{"ship": "ရွှေ", "n": [1, 2.5]}', "no ship\nfound: 0"


@pytest.fixture(scope="module")
def renderer_of(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ChatRenderer]:
    """Name of a real template -> its renderer."""
    found: dict[str, ChatRenderer] = {}

    def of(name: str) -> ChatRenderer:
        if name not in found:
            path = data / "templates" / f"{name}.jinja"
            if name in OF_TRL:
                spec = find_spec("trl")
                if spec is None or spec.origin is None:
                    pytest.skip("trl is not installed")
                path = next(Path(spec.origin).parent.rglob(f"{name}.jinja"))
            folder = tmp_path_factory.mktemp("tools") / name
            make_tokenizer_folder(folder, path.read_text(encoding="utf-8"))
            found[name] = load_renderer(ModelSource(str(folder)), name)
        return found[name]

    return of


def conversation(renderer: ChatRenderer, is_parallel: bool) -> Conversation:
    """Two rounds of calls with results, and an answer, at the renderer's highest effort."""
    effort = renderer.family.efforts[-1]
    thought = (Thinking("The tool knows."),) if renderer.family.thought_ends else ()
    calls, results = (
        ((FIRST, SECOND), (AS_JSON, AS_TEXT)) if is_parallel else ((FIRST,), (AS_JSON,))
    )
    return Conversation(
        (
            Message(Role.SYSTEM, (Text("Be brief."),)),
            Message(Role.USER, (Text("Which ships?"),)),
            Message(Role.ASSISTANT, (*thought, *calls)),
            Message(Role.TOOL, tuple(ToolResult(TOOL.name, r) for r in results)),
            Message(Role.ASSISTANT, (*thought, SECOND)),
            Message(Role.TOOL, (ToolResult(TOOL.name, AS_TEXT),)),
            Message(Role.ASSISTANT, (*thought, Text("One ship."))),
        ),
        effort,
        (TOOL,),
    )


def turns(whole: Conversation) -> list[Conversation]:
    """The conversation up to each of the assistant's turns."""
    return [
        replace(whole, messages=whole.messages[: k + 1])
        for k, m in enumerate(whole.messages)
        if m.role is Role.ASSISTANT
    ]


def own_answer(renderer: ChatRenderer, turn: Conversation) -> Message:
    """The answer as the model writes it, parsed from its ids."""
    tokens = renderer.render(turn)
    ids = tokens.ids_T[tokens.loss_mask_T].tolist()
    parts, finish = renderer.parse(ids, turn.effort, turn.tools)
    assert finish is FinishReason.STOP
    return Message(Role.ASSISTANT, parts)


def text_of(renderer: ChatRenderer, ids: list[int]) -> str:
    pieces = renderer.vocabulary.decode_pieces(ids)
    return "".join(p if isinstance(p, str) else p.decode() for p in pieces)


def comparable(calls: tuple[ToolCall, ...], *renderers: ChatRenderer) -> list[tuple[str, str]]:
    """Names and arguments; Gemma 4's template sorts the keys of arguments."""
    if all(r.family.name != "gemma-4" for r in renderers):
        return [(c.name, c.arguments) for c in calls]
    return [(c.name, json.dumps(json.loads(c.arguments), sort_keys=True)) for c in calls]


def learn_turn_by_turn(teacher: ChatRenderer, student: ChatRenderer, is_parallel: bool) -> None:
    given = conversation(teacher, is_parallel)
    for turn in turns(given):
        answer = own_answer(teacher, turn)
        want = comparable(turn.messages[-1].calls, teacher)
        assert comparable(answer.calls, teacher) == want
        assert answer.text == turn.messages[-1].text
        effort = student.family.efforts[-1]
        learned = replace(turn, messages=(*turn.messages[:-1], answer), effort=effort)
        own = own_answer(student, learned)
        assert comparable(own.calls, student) == comparable(answer.calls, student)
        assert own.text == answer.text
        kept = student.family.normalise(learned).messages[-1].thinking
        assert own.thinking == kept and kept in ("", answer.thinking)
        tokens = student.render(learned)
        written = text_of(student, tokens.ids_T.tolist())
        for message in learned.messages:
            for part in message.parts:
                if isinstance(part, ToolResult):
                    escaped = json.dumps(part.text, ensure_ascii=False)[1:-1]
                    assert part.text in written or escaped in written
        if answer.text:  # a template that writes calls key by key gives them no byte offsets
            spans = aligned_spans(tokens, teacher.render(replace(learned, effort=turn.effort)))
            assert len(spans.student_C2) == len(spans.teacher_C2) > 0


@pytest.mark.realdata
@pytest.mark.parametrize("student", [*TEMPLATES, *OF_TRL])
@pytest.mark.parametrize("teacher", ["qwen3", "gemma4", "glm-4.6", "muse_glimmer"])
def test_single_calls_are_learned_from_every_teacher(
    renderer_of: Callable[[str], ChatRenderer], teacher: str, student: str
):
    learn_turn_by_turn(renderer_of(teacher), renderer_of(student), is_parallel=False)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("student", "refusal"),
    [
        ("qwen3.5", ""),
        ("gemma4", ""),
        ("glm-4.6", ""),
        ("muse_glimmer", ""),
        ("lfm2_2_5_v2", ""),
        ("gpt-oss", "message 2 has 2 tool calls"),
        ("llama3.1", "message 2 has 2 tool calls"),
    ],
)
def test_parallel_calls_are_learned_or_refused_at_their_place(
    renderer_of: Callable[[str], ChatRenderer], student: str, refusal: str
):
    teacher, learner = renderer_of("qwen3"), renderer_of(student)
    if not refusal:
        learn_turn_by_turn(teacher, learner, is_parallel=True)
        return
    with pytest.raises(DataError, match=refusal):
        learn_turn_by_turn(teacher, learner, is_parallel=True)
