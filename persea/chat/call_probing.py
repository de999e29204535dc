"""Find out by rendering how an unknown chat template takes, writes and ends tool calls.

form       what a template wants of a message with calls: arguments as a mapping or as JSON text,
           identifiers of calls, empty or no content
grammar    the literal texts around names, keys and values (`persea.chat.call_grammar`)
stop       the control token that ends an answer of calls
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from persea.chat.call_grammar import IDENTIFIER, KEY, NAME, NUMBER, CallGrammar, ValueForm
from persea.chat.families.tool_format import verbatim_except_calls
from persea.chat.messages import ContentPart, Message, Tool, ToolCall, ToolResult
from persea.chat.template_probes import PLACEHOLDER_FORMAT
from persea.chat.template_probing import StripRule
from persea.errors import DataError

RenderAnswer: TypeAlias = Callable[[dict[str, Any]], str]
"""Assistant's message -> the text that the template writes behind the generation prompt."""

TYPES = '{"type": "object", "properties": {"firstkey": {}, "secondkey": {}}}'
PROBE_TOOLS = (Tool("alphatool", "First.", TYPES), Tool("betatool", "Second.", TYPES))
FIRST_TEXT, SECOND_TEXT = "valueone", "valuetwo"
# Two values of each JSON type that differ where the type allows it.
PROBE_VALUES: tuple[tuple[Any, Any], ...] = (
    (FIRST_TEXT, SECOND_TEXT),
    (770071, 770072),
    (77.25, 78.25),
    (True, True),
    (None, None),
    ([770071], [770072]),
    ({"innerkey": 770071}, {"innerkey": 770072}),
)
BEFORE_CALLS = PLACEHOLDER_FORMAT.format("b")
RESULT = PLACEHOLDER_FORMAT.format("r")
# A number that stands alone in template text counts calls.
COUNTER_PATTERN = re.compile(r"(?<![\w.])\d+(?![\w.])")
VALUE_NUMBERS = frozenset(("770071", "770072"))


class CallIds(StrEnum):
    """How calls are identified."""

    NAME = "the tool's name"
    DIGITS = "nine digits"  # Mistral
    FUNCTION = "functions.NAME:INDEX"  # Kimi

    def of(self, name: str, index: int) -> str:
        """Return the identifier of a call, by its name and its index in the conversation."""
        if self is CallIds.DIGITS:
            return f"{index + 1:09d}"
        return f"functions.{name}:{index}" if self is CallIds.FUNCTION else name


@dataclass(frozen=True)
class CallForm:
    """How a template takes messages with calls.

    Attributes:
        ids: Identifiers of calls.
        has_text_arguments: Whether arguments are JSON text, and not a mapping.
        has_null_content: Whether an empty text is None.
    """

    ids: CallIds = CallIds.NAME
    has_text_arguments: bool = False
    has_null_content: bool = False

    def message(self, calls: Sequence[ToolCall], text: str, first: int = 0) -> dict[str, Any]:
        """Return an assistant's message; `first` is the index of its first call."""
        return {
            "role": "assistant",
            "content": None if self.has_null_content and not text else text,
            "tool_calls": [
                {
                    "type": "function",
                    "id": self.ids.of(c.name, first + k),
                    "function": {
                        "name": c.name,
                        "arguments": c.arguments
                        if self.has_text_arguments
                        else json.loads(c.arguments),
                    },
                }
                for k, c in enumerate(calls)
            ],
        }

    def results(self, message: Message, pending: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
        """Yield the messages of results.

        Args:
            message: A tool's message.
            pending: (name, index) of the calls without a result; the answered ones are removed.
        """
        for part in message.parts:
            if not isinstance(part, ToolResult):
                continue
            found = next((p for p in pending if p[0] == part.name), (part.name, 0))
            if found in pending:
                pending.remove(found)
            yield {
                "role": message.role.value,
                "name": part.name,
                "tool_call_id": self.ids.of(*found),
                "content": part.text,
            }


@dataclass(frozen=True)
class CallUse:
    """How a template takes and ends the calls of one answer.

    Attributes:
        form: How it takes messages with calls.
        stop: The control token that ends an answer of calls; "" if it is not known.
        thought_end: Text between a thought and the calls' head.
        text_rule: White space that it strips from a text before calls; None if persea cannot follow
            such a text.
        is_verbatim: `Family.is_tool_text_verbatim`.
    """

    form: CallForm = CallForm()
    stop: str = ""
    thought_end: str = ""
    text_rule: StripRule | None = None
    is_verbatim: Callable[[ContentPart], bool] = verbatim_except_calls


def call_forms() -> Iterator[CallForm]:
    """Yield the forms that templates may want, the usual one first."""
    for has_text_arguments in (False, True):
        for has_null_content in (True, False):
            for ids in (CallIds.NAME, CallIds.FUNCTION, CallIds.DIGITS):
                yield CallForm(ids, has_text_arguments, has_null_content)


def find_call_form(render: RenderAnswer) -> CallForm | None:
    """Return the first form in which the template writes a call; None if it writes none."""
    call = ToolCall("alphatool", json.dumps({"firstkey": FIRST_TEXT}))
    for form in call_forms():
        message = form.message([call], "")
        try:
            texts = [render(message), render(_with_probe_ids(message, form))]
        except DataError:
            continue
        # Kimi's template writes identifiers and no names. `None` or a mapping that Python printed
        # is no notation of calls.
        if all(
            call.name in text and FIRST_TEXT in text and not re.search(r"None\b|\{'", text)
            for text in texts
        ):
            return form
    return None


def find_call_stop(text: str, stops: frozenset[str], control_pattern: re.Pattern[str]) -> str:
    """Return the first token of a text that ends an answer; "" if there is none."""
    return next((m.group() for m in control_pattern.finditer(text) if m.group() in stops), "")


def find_grammar(render: RenderAnswer, form: CallForm) -> CallGrammar | None:
    """Return how the template writes calls; None if persea cannot follow it.

    Args:
        render: Assistant's message -> its text, without what precedes a plain answer and without
            the token that ends it.
        form: How the template takes messages with calls.
    """

    def written(first: dict[str, Any], second: dict[str, Any] | None, text: str = "") -> str | None:
        calls = [ToolCall("alphatool", json.dumps(first))]
        calls += [] if second is None else [ToolCall("betatool", json.dumps(second))]
        try:
            return _mark_ids(render(_with_probe_ids(form.message(calls, text), form)), form)
        except DataError:
            return None

    arguments = {"firstkey": FIRST_TEXT, "secondkey": SECOND_TEXT}
    one, two = written(arguments, None), written(arguments, arguments)
    if one is None or "alphatool" not in one:
        return None
    pieces = _split_at_names(two) if two is not None else None
    head, only = _around(one, "alphatool")
    spelled = json.dumps(arguments)
    if only.count(spelled) == 1:
        middle, last = only.split(spelled)
        next_call = None
        if pieces is not None and pieces[0] == head and pieces[1].startswith(middle + spelled):
            next_call = pieces[1].removeprefix(middle + spelled)
            last = pieces[2].removeprefix(middle + spelled)
        forms: tuple[ValueForm, ...] = (ValueForm(middle, False, None, next_call, last.rstrip()),)
        first_key, empty = "", None
    else:
        found = [f for values in PROBE_VALUES if (f := _value_form(written, values)) is not None]
        if not found or not found[0][1].is_text or not found[0][1].value_end:
            return None
        first_key = found[0][0]
        forms = tuple(dict.fromkeys(f for key, f in found if key == first_key))
        if all(_layout(f) == _layout(forms[0]) for f in forms):
            forms = forms[:1]
        none, both = written({}, None), written({}, {})
        ends = _split_at_names(both) if both is not None else None
        if none is None or "alphatool" not in none:
            return None
        last = ends[2] if ends else _around(none, "alphatool")[1]
        empty = (ends[1] if ends else None, last.rstrip())
    behind = written(arguments, None, BEFORE_CALLS)
    text_head = None
    if behind is not None and behind.count(BEFORE_CALLS) == 1:
        text_head = _around(behind.split(BEFORE_CALLS)[1], "alphatool")[0]
        if text_head.strip() != head.strip() or behind.split(BEFORE_CALLS)[0]:
            text_head = None
    return CallGrammar(head, text_head, first_key, empty, forms)


def _mark_ids(text: str, form: CallForm) -> str:
    """Replace identifiers of calls, and numbers that count them, by marks."""
    if form.ids is not CallIds.FUNCTION:
        for index in range(2):
            text = text.replace(_probe_id(form, index), IDENTIFIER)
    return COUNTER_PATTERN.sub(lambda m: m[0] if m[0] in VALUE_NUMBERS else NUMBER, text)


def _probe_id(form: CallForm, index: int) -> str:
    return form.ids.of("", index) if form.ids is CallIds.DIGITS else f"probeid{index}"


def _with_probe_ids(message: dict[str, Any], form: CallForm) -> dict[str, Any]:
    """Return the message with identifiers that differ from the names."""
    if form.ids is CallIds.FUNCTION:
        return message
    calls = [c | {"id": _probe_id(form, k)} for k, c in enumerate(message["tool_calls"])]
    return message | {"tool_calls": calls}


def _around(text: str, name: str) -> tuple[str, str]:
    """Return the text before the first name, and the text behind it with NAME for the others."""
    before, _, behind = text.partition(name)
    return before, behind.replace(name, NAME)


def _split_at_names(text: str) -> tuple[str, str, str] | None:
    """Return the texts before, between and behind the first occurrences of two names."""
    before, found, behind = text.partition("alphatool")
    between, also, last = behind.partition("betatool")
    if not found or not also or "alphatool" in last:
        return None
    return before, between.replace("alphatool", NAME), last.replace("betatool", NAME)


def _layout(form: ValueForm) -> tuple[str, str | None, str | None, str]:
    return form.middle, form.next_key, form.next_call, form.last


def _value_form(
    written: Callable[..., str | None], values: tuple[Any, Any]
) -> tuple[str, ValueForm] | None:
    """Return (text before the first key, how values of one type are written)."""
    arguments = dict(zip(("firstkey", "secondkey"), values, strict=True))
    two = written(arguments, arguments)
    pieces = _split_at_names(two) if two is not None else None
    if pieces is None:
        one = written(arguments, None)
        if one is None or "alphatool" not in one:
            return None
        regions = [_around(one, "alphatool")[1]] * 2
    else:
        regions = list(pieces[1:])
    read = [_read_pair(region, values) for region in regions]
    if read[0] is None or read[1] is None or read[0][:3] != read[1][:3]:
        return None
    first_key, middle, next_key, behind = read[0]
    form = ValueForm(
        middle,
        isinstance(values[0], str),
        next_key,
        behind if pieces is not None else None,
        read[1][3].rstrip(),
    )
    return first_key, form


def _read_pair(region: str, values: tuple[Any, Any]) -> tuple[str, str, str, str] | None:
    """Return the texts before key, value, next key and behind the last value of one call."""
    first_key, found, behind = region.partition("firstkey")
    first, also, second = behind.partition("secondkey")
    if not found or not also:
        return None
    split = [_split_at_value(t, v) for t, v in zip((first, second), values, strict=True)]
    if split[0] is None or split[1] is None:
        return None
    middle, next_key = (t.replace("firstkey", KEY) for t in split[0])
    again, last = (t.replace("secondkey", KEY) for t in split[1])
    return (first_key, middle, next_key, last) if middle == again else None


def _split_at_value(text: str, value: Any) -> tuple[str, str] | None:
    """Return the texts around the last spelling of a value as JSON or as Python writes it."""
    spellings = [value] if isinstance(value, str) else [json.dumps(value), str(value)]
    at, spelling = max((text.rfind(s), s) for s in spellings)
    return None if at < 0 else (text[:at], text[at + len(spelling) :])
