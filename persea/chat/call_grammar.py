"""How an unknown chat template writes tool calls: literal text around names, keys and values.

`persea.chat.call_probing` finds the grammar by rendering. Two forms of arguments exist:

    JSON       [TOOL_CALLS]f[ARGS]{"x": 1}
    pairs      <tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>, f(x=1)

A literal text contains marks where a rendering repeats the name or the key, or counts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from persea.chat.families.qwen_xml_tools import PYTHON_LITERALS, resolve_call_types
from persea.chat.family import keep_calls_as_parsed
from persea.chat.messages import ContentPart, Tool, ToolCall
from persea.storage import parse_strict_json

# Marks in literal texts: the name, the key, a number that counts calls, the identifier of a call.
NAME, KEY, NUMBER, IDENTIFIER = "\ue010", "\ue011", "\ue012", "\ue013"
MARK_PATTERN = re.compile("[\ue010-\ue013]")
NAME_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
END_PATTERN = re.compile(r"\s*\Z")
MAX_KEY_CHARS = 200
ParsedCalls: TypeAlias = "tuple[str, tuple[ToolCall, ...]]"
"""The text before the calls, and the calls."""


@dataclass(frozen=True)
class ValueForm:
    """How values of some JSON types are written.

    Attributes:
        middle: Text between key and value.
        is_text: Whether the value is bare text, and not JSON.
        next_key: Text between the value and the next key; None if a call has one value at most.
        next_call: Text between the value and the name of the next call; None if there is none.
        last: Text between the value and the end of the answer.
    """

    middle: str
    is_text: bool
    next_key: str | None
    next_call: str | None
    last: str

    @property
    def value_end(self) -> str:
        """The text that ends a value, whatever follows."""
        ends = [e for e in (self.next_key, self.next_call, self.last) if e is not None]
        first, last = min(ends), max(ends)
        shared = next((k for k, c in enumerate(first) if last[k] != c), len(first))
        return MARK_PATTERN.split(first[:shared])[0]


@dataclass(frozen=True)
class CallGrammar:
    """How a template writes the calls of one answer.

    Attributes:
        head: Text before the first name.
        text_head: The same behind a text; None if the template writes no text before calls.
        first_key: Text between name and first key; "" for JSON arguments.
        empty: Text behind the name of a call without arguments, in front of the next name (None if
            there is none) and at the end; None for JSON arguments.
        forms: The forms of values. JSON arguments are one value without a key.
    """

    head: str
    text_head: str | None
    first_key: str
    empty: tuple[str | None, str] | None
    forms: tuple[ValueForm, ...]

    @property
    def name(self) -> str:
        """Part of the digest of renderings."""
        return "json calls" if self.empty is None else "pairs"

    @property
    def head_marker(self) -> str:
        """The text that begins calls, without white space around and up to the first mark."""
        return MARK_PATTERN.split(self.head)[0].strip()

    @property
    def texts(self) -> str:
        """All literal texts, in which control tokens are looked for."""
        given = [self.head, self.text_head, self.first_key, *(self.empty or ())]
        for form in self.forms:
            given += [form.middle, form.next_key, form.next_call, form.last]
        return "\n".join(text for text in given if text)

    @property
    def has_typed_values(self) -> bool:
        """Whether the notation itself tells numbers from texts."""
        return len(self.forms) > 1 or not self.forms[0].is_text

    def resolve(
        self, parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
    ) -> tuple[ContentPart, ...] | None:
        """Return `Family.resolve_calls`: give values without types those that the tools declare."""
        return (keep_calls_as_parsed if self.has_typed_values else resolve_call_types)(parts, tools)

    def parse(self, text: str) -> ParsedCalls | None:
        """Return (the text before the calls, the calls); None if a call is malformed."""
        start = text.find(self.head_marker)
        if start < 0:
            return text, ()
        content = text[:start] if text[:start].strip() else ""
        if self.text_head is not None:
            core = MARK_PATTERN.split(self.text_head)[0].strip()
            content = content.removesuffix(self.text_head[: self.text_head.find(core)])
        calls = _Reader(self, text, start).read_calls()
        return None if calls is None else (content, calls)


@lru_cache(maxsize=4096)
def _compile(literal: str, name: str, key: str, is_loose: bool) -> re.Pattern[str]:
    """Return the pattern of a literal text with marks; loose about white space if asked."""
    given = {NAME: re.escape(name), KEY: re.escape(key), NUMBER: r"\d+", IDENTIFIER: r"[\w.:-]+"}
    marks = MARK_PATTERN.pattern + (r"|\s+" if is_loose else "")
    parts = filter(None, re.split(f"({marks})", literal))
    return re.compile(
        "".join(
            given.get(p) or (r"\s*" if is_loose and p.isspace() else re.escape(p)) for p in parts
        )
    )


class _Reader:
    """Reads calls from one answer, in one pass."""

    def __init__(self, grammar: CallGrammar, text: str, position: int) -> None:
        self.grammar = grammar
        self.text = text
        self.position = position
        self.name = ""
        self.key = ""

    def read_calls(self) -> tuple[ToolCall, ...] | None:
        """Return the calls up to the end of the text; None if one is malformed."""
        if not self._take(self.grammar.head.lstrip()):
            return None
        calls: list[ToolCall] = []
        is_last: bool | None = False
        while is_last is False:
            found = NAME_PATTERN.match(self.text, self.position)
            if found is None:
                return None
            self.name, self.position = found.group(), found.end()
            is_json = self.grammar.empty is None
            read = self._read_json_arguments() if is_json else self._read_pairs()
            call = None if read is None else ToolCall.from_generated(self.name, read[0])
            if read is None or call is None:
                return None
            calls.append(call)
            is_last = read[1]
        return tuple(calls)

    def _read_json_arguments(self) -> tuple[str, bool] | None:
        """Return (arguments, whether the answer ends behind them)."""
        (form,) = self.grammar.forms
        if not self._take(form.middle):
            return None
        arguments = self._read_json()
        is_last = self._ends(form.next_call, form.last)
        return None if arguments is None or is_last is None else (arguments, is_last)

    def _read_pairs(self) -> tuple[dict[str, Any], bool] | None:
        """Return (arguments, whether the answer ends behind them)."""
        values: dict[str, Any] = {}
        is_last = self._ends(*self.grammar.empty) if self.grammar.empty is not None else None
        literal: str | None = self.grammar.first_key
        while is_last is None:
            form = self._read_key() if literal is not None and self._take(literal) else None
            value = None if form is None or self.key in values else self._read_value(form)
            if form is None or value is None:
                return None
            (values[self.key],) = value
            is_last = self._ends(form.next_call, form.last)
            literal = form.next_key
        return values, is_last

    def _read_key(self) -> ValueForm | None:
        """Read a key and the text behind it; the longest text that fits decides the form."""
        best: tuple[int, int, ValueForm] | None = None
        until = self.position + MAX_KEY_CHARS
        for form in self.grammar.forms:
            end = self.text.find(MARK_PATTERN.split(form.middle)[0], self.position, until)
            key = self.text[self.position : max(end, 0)]
            found = _compile(form.middle, self.name, key, False).match(self.text, max(end, 0))
            if end < 0 or found is None:
                continue
            if best is None or (end, -found.end()) < (best[0], -best[1]):
                best = (end, found.end(), form)
        if best is None:
            return None
        self.key, self.position = self.text[self.position : best[0]], best[1]
        return best[2]

    def _read_value(self, form: ValueForm) -> tuple[Any] | None:
        if form.is_text:
            end = self.text.find(form.value_end, self.position)
            if end < 0:
                return None
            value, self.position = self.text[self.position : end], end
            return (value,)
        for literal, meaning in PYTHON_LITERALS.items():
            if self.text.startswith(literal, self.position):
                self.position += len(literal)
                return (meaning,)
        text = self._read_json()
        try:
            return None if text is None else (parse_strict_json(text),)
        except ValueError:
            return None

    def _read_json(self) -> str | None:
        """Return the text of the JSON value at the position."""
        start = self.position
        try:
            _, self.position = json.JSONDecoder().raw_decode(self.text, start)
        except (ValueError, RecursionError):
            return None
        return self.text[start : self.position]

    def _ends(self, next_call: str | None, last: str) -> bool | None:
        """Return whether the answer ends here; False if another call follows, None if neither."""
        found = self._match(last)
        if found is not None and END_PATTERN.match(self.text, found):
            return True
        return False if next_call is not None and self._take(next_call) else None

    def _match(self, literal: str) -> int | None:
        is_loose = self.grammar.empty is None
        found = _compile(literal, self.name, self.key, is_loose).match(self.text, self.position)
        return None if found is None else found.end()

    def _take(self, literal: str) -> bool:
        end = self._match(literal)
        self.position = self.position if end is None else end
        return end is not None
