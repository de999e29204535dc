"""Voice: a Family bound to one tokenizer and the model's own chat template.

`render` gives exactly the ids the model's own template gives, and says where the content's bytes are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from itertools import count

import numpy as np
import numpy.typing as npt

from persea.chat.messages import (
    PINNED_DATE,
    ContentPart,
    Conversation,
    Family,
    FinishReason,
    Message,
    RenderedTokens,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
    replace_text,
)
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary

BYTE_OFFSETS_VERSION = 2  # how tokens are placed over content, as captures keep it; 1: a token that ran on into the clothing had a start


@dataclass(frozen=True, eq=False)
class ChatRenderer:
    """A Family bound to one vocabulary and the model's own chat template.

    template  callable (messages, add_generation_prompt, **kwargs) -> str; transformers' sandboxed Jinja
    """

    family: Family
    vocabulary: Vocabulary
    template: Callable[..., str]
    template_text: str
    template_date: date = PINNED_DATE
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end the assistant's turn; several spellings of one event."""
        return tuple(
            self.vocabulary.control_token_ids[s]
            for s in self.family.stop_tokens
            if s in self.vocabulary.control_token_ids
        )

    @cached_property
    def digest(self) -> str:
        """Changes whenever a rendering could change: tokenizer, template and the special tokens it writes, family, pinned date."""
        what = json.dumps(
            [
                self.vocabulary.digest,
                self.template_text,
                sorted(self.special_tokens.items()),
                self.family.name,
                self.template_date.isoformat(),
                BYTE_OFFSETS_VERSION,
            ]
        )
        return hashlib.sha256(what.encode()).hexdigest()

    def render_prompt(self, conversation: Conversation) -> RenderedTokens:
        """The tokens after which the assistant speaks. Nothing is learned in them."""
        return self._render_tokens(conversation, add_generation_prompt=True)

    def render(self, conversation: Conversation) -> RenderedTokens:
        """The whole conversation, ending with the assistant's answer and its stop token.

        Raises DataError when the last message is not the assistant's, or the template changes the content's bytes.
        """
        if not conversation.messages or conversation.messages[-1].role is not Role.ASSISTANT:
            raise DataError(
                "the conversation does not end with an answer",
                where=self.family.name,
                remedy="render() is for answers; use prompt()",
            )
        return self._render_tokens(conversation, add_generation_prompt=False)

    def parse(
        self, ids: Sequence[int], effort: ThinkingEffort, tools: tuple[Tool, ...] = ()
    ) -> tuple[tuple[ContentPart, ...], FinishReason]:
        """What a model in this voice generated, asked with these tools -> parts and how it ended. Never raises on malformed answers."""
        stop = next((k for k, i in enumerate(ids) if i in self.stop_ids), None)
        pieces = self.vocabulary.decode_pieces(ids if stop is None else ids[:stop])
        try:
            said = self.family.parse(pieces, effort)
            parts = None if said is None else self.family.resolve_calls(said, tools)
        except UnicodeDecodeError:
            parts = None
        if stop is None:
            return parts or (), FinishReason.LENGTH
        return (parts, FinishReason.STOP) if parts is not None else ((), FinishReason.MALFORMED)

    def _apply_template(self, conversation: Conversation, add_generation_prompt: bool) -> str:
        messages, kwargs = self.family.template_inputs(conversation)
        return self.template(
            messages,
            add_generation_prompt=add_generation_prompt,
            strftime_now=self.template_date.strftime,
            **kwargs,
        )

    def _split_segments(
        self, normalised: Conversation, add_generation_prompt: bool
    ) -> list[tuple[str, int | None]]:
        """(text, index of the content part or None for scaffolding), in order, as the model's own template writes them.

        Found by rendering twice, once with a stand-in for each part; where the two do not agree the template does more
        than dress (it repeats, rewrites or drops content) and the conversation is refused.
        """
        written = {i for i, p in enumerate(normalised.parts()) if p.text and self._has_bytes(p)}
        others = "".join(
            (
                *(p.text for i, p in enumerate(normalised.parts()) if i not in written),
                *(t.description + t.parameters for t in normalised.tools),
            )
        )
        mark = next(m for m in (f"\ue000{k}." for k in count()) if m not in others)
        names = {
            i: _placeholder(f"{mark}{i}\ue001", p)
            for i, p in enumerate(normalised.parts())
            if i in written
        }
        texts = [p.text for p in normalised.parts()]
        skeleton = self._apply_template(_replace_texts(normalised, names), add_generation_prompt)
        segments: list[tuple[str, int | None]] = []
        order, at = [], 0
        word = re.escape(mark) + "(\\d{1,9})\ue001"
        for m in re.finditer(f'\\{{"{word}": 0\\}}|{word}', skeleton):
            order.append(int(m[1] or m[2]))
            if order[-1] < len(texts):
                segments += [(skeleton[at : m.start()], None), (texts[order[-1]], order[-1])]
            at = m.end()
        segments.append((skeleton[at:], None))
        if order != sorted(names) or "".join(t for t, _ in segments) != self._apply_template(
            normalised, add_generation_prompt
        ):
            raise DataError(
                f"the chat template changes the content of message parts {sorted(names)} (found {order})",
                where=self.family.name,
                remedy="the content collides with the template; rephrase it or leave it out",
            )
        self._check_template_only_parts(normalised, names, add_generation_prompt)
        return [s for s in segments if s[0]]

    def _has_bytes(self, part: ContentPart) -> bool:
        """Whether the template writes this part's text as it stands, so that its bytes have tokens."""
        return isinstance(part, (Text, Thinking)) or (
            self.family.is_tool_text_verbatim is not None
            and self.family.is_tool_text_verbatim(part)
        )

    def _check_template_only_parts(
        self, normalised: Conversation, placeholders: Mapping[int, str], add_generation_prompt: bool
    ) -> None:
        """Tools, and calls and results without bytes, become scaffolding: refused where the template drops them, or where they
        hold a control token, which scaffolding would make real.
        """
        hidden = {
            i: p for i, p in enumerate(normalised.parts()) if i not in placeholders and p.text
        }
        if not hidden and not normalised.tools:
            return
        for text in [
            *(p.text for p in hidden.values()),
            *(t for tool in normalised.tools for t in (tool.description, tool.parameters)),
        ]:
            found = self._control_pattern.search(text) or self._control_pattern.search(
                text.replace('\\"', '"')
            )
            if found:
                raise DataError(
                    f"{found.group()} in a tool's words is a control token of this tokenizer",
                    where=self.family.name,
                    remedy="rephrase the tool, its call or its result, or leave the conversation out",
                )
        probes = {i: f"persea-probe-{i}." for i in hidden}
        tools = tuple(
            replace(t, description=f"persea-probe-tool-{k}.")
            for k, t in enumerate(normalised.tools)
        )
        texts = {
            i: json.dumps({"p": probes[i]}) if isinstance(p, ToolCall) else probes[i]
            for i, p in hidden.items()
        }
        dressed = self._apply_template(
            replace(_replace_texts(normalised, texts), tools=tools), add_generation_prompt
        )
        if not all(
            probe in dressed for probe in (*probes.values(), *(t.description for t in tools))
        ):
            raise DataError(
                "the chat template drops tools, tool calls or tool results",
                where=self.family.name,
                remedy="this model's template has no tools; leave the conversation out, or give the model a template that has",
            )

    def _check_message_parts(self, conversation: Conversation) -> None:
        """Calls are the assistant's last words of a turn, results are all of a tool's turn: no template can say it otherwise."""
        parts = {type(p) for p in conversation.parts()}
        if self.family.is_tool_text_verbatim is None and (
            conversation.tools or parts & {ToolCall, ToolResult}
        ):
            raise DataError(
                "the chat template of this family drops tools: it has no notation for them",
                where=self.family.name,
                remedy="leave conversations with tools to another teacher",
            )
        for k, m in enumerate(conversation.messages):
            if not _is_well_formed(m):
                raise DataError(
                    f"message {k} ({m.role}) mixes what cannot be said in one turn",
                    where=self.family.name,
                    remedy="tool results alone in a tool's turn; calls in the assistant's, behind thought and text",
                )

    def _render_tokens(
        self, conversation: Conversation, add_generation_prompt: bool
    ) -> RenderedTokens:
        self._check_message_parts(conversation)
        kept = self.family.normalise(conversation)
        origins = _part_offsets(conversation, kept, self._has_bytes, self.family.name)
        segments = self._split_segments(kept, add_generation_prompt)
        full = "".join(t for t, _ in segments)
        opening = len(full)
        if not add_generation_prompt:
            before = self._apply_template(
                replace(kept, messages=kept.messages[:-1]), add_generation_prompt=True
            )
            bare = before.removesuffix(self.family.prompt_only_suffix)
            if not full.startswith(before) and full.startswith(bare):
                segments = _insert_prompt_only_suffix(
                    segments, len(bare), self.family.prompt_only_suffix
                )
                full = "".join(t for t, _ in segments)
            if not full.startswith(before):
                raise DataError(
                    "the answer is not rendered where the generation prompt ends",
                    where=self.family.name,
                    remedy="this template cannot be used for training: its prompt is not a prefix of its conversations",
                )
            opening = len(before)
        runs = list(self._split_runs(segments))
        encoded = iter(self.vocabulary.encode_batch([r.text for r in runs if r.control_id is None]))
        columns: list[npt.NDArray[np.int64]] = []
        turn_end = max(
            (origins[i] + len(t.encode()) for t, i in segments if i is not None), default=0
        )
        stopped = False
        for run in runs:
            if run.control_id is None:
                columns.append(
                    _token_table(self.vocabulary, next(encoded), run, origins, opening, stopped)
                )
                continue
            learned = run.start_char >= opening and not stopped
            stopped = stopped or (learned and run.control_id in self.stop_ids)
            place = turn_end if learned and stopped else -1
            columns.append(np.array([[run.control_id, place, place, learned]]))
        if not add_generation_prompt and not stopped:
            raise DataError(
                "the chat template does not end the assistant's turn with a stop token",
                where=self.family.name,
                remedy=f"expected one of {', '.join(self.family.stop_tokens)}",
            )
        table = np.concatenate(columns)
        ids, starts, ends = (table[:, k].astype(np.int32) for k in range(3))
        return RenderedTokens(ids, starts, ends, table[:, 3].astype(bool))

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        names = sorted(self.vocabulary.control_token_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _split_runs(self, segments: Sequence[tuple[str, int | None]]) -> Iterator[_TextRun]:
        """Control tokens, which only the scaffolding can hold, and the runs of text between them, which tokens may cross."""
        text, spans, start, at = "", [], 0, 0
        for segment, part in segments:
            if part is not None:
                spans.append((len(text.encode()), len((text + segment).encode()), part))
                text += segment
                at += len(segment)
                continue
            position = 0
            for m in self._control_pattern.finditer(segment):
                text += segment[position : m.start()]
                if text:
                    yield _TextRun(None, text, start, tuple(spans))
                yield _TextRun(self.vocabulary.control_token_ids[m.group()], "", at + m.start(), ())
                text, spans, position, start = "", [], m.end(), at + m.end()
            text += segment[position:]
            at += len(segment)
        if text:
            yield _TextRun(None, text, start, tuple(spans))


@dataclass(frozen=True)
class _TextRun:
    """A control token, or a text; `at` = its first character; `spans` = (first byte, last byte + 1, part) of content in it."""

    control_id: int | None
    text: str
    start_char: int
    content_spans: tuple[tuple[int, int, int], ...]


def _token_table(
    vocabulary: Vocabulary,
    ids: Sequence[int],
    run: _TextRun,
    part_offsets: Mapping[int, int],
    answer_start: int,
    turn_ended: bool,
) -> npt.NDArray[np.int64]:
    """[tokens, 4]: id, start and end in the content's bytes (-1 where there are none), learned. A token that the template's text shares
    has no start: `.` and newline at the end of a thought are often one token, and a teacher that says `.` does not mean that one.
    """
    ends = np.cumsum(vocabulary.lengths_W[np.asarray(ids, np.int64)])
    starts = ends - vocabulary.lengths_W[np.asarray(ids, np.int64)]
    table = np.full((len(ids), 4), -1, np.int64)
    table[:, 0] = ids
    first = len(run.text[: max(0, answer_start - run.start_char)].encode())
    if ((starts < first) & (ends > first)).any():
        answer = run.text.encode()[first : first + 20].decode(errors="replace")
        raise DataError(
            f"one token covers the end of the prompt and the start of the answer {answer!r}",
            where=vocabulary.name,
            remedy="no model asked with this prompt can say this answer; leave it out",
        )
    table[:, 3] = (starts >= first) & (not turn_ended)
    inside = np.zeros(len(ids), np.int64)  # bytes of content in each token
    for a, b, part in run.content_spans:
        begins = (starts >= a) & (starts < b)
        table[begins, 1] = starts[begins] - a + part_offsets[part]
        touches = (ends > a) & (starts < b)
        table[touches, 2] = np.minimum(ends[touches], b) - a + part_offsets[part]
        inside += np.clip(np.minimum(ends, b) - np.maximum(starts, a), 0, None)
    table[inside < ends - starts, 1] = -1
    return table


def _insert_prompt_only_suffix(
    segments: Sequence[tuple[str, int | None]], position: int, suffix: str
) -> list[tuple[str, int | None]]:
    """The segments with `opening` at this character, which lies in scaffolding."""
    out: list[tuple[str, int | None]] = []
    at = 0
    for text, part in segments:
        if part is None and at < position <= at + len(text):
            out += [(text[: position - at] + suffix + text[position - at :], None)]
        else:
            out.append((text, part))
        at += len(text)
    return out


def _is_well_formed(m: Message) -> bool:
    kinds = [type(p) for p in m.parts]
    if m.role is Role.TOOL:
        return bool(kinds) and set(kinds) == {ToolResult}
    calls = kinds.count(ToolCall)
    return ToolResult not in kinds and (
        not calls or (m.role is Role.ASSISTANT and kinds[-calls:] == [ToolCall] * calls)
    )


def _placeholder(text: str, part: ContentPart) -> str:
    """What stands in for a part's text; for the arguments of a call a JSON object, for templates write one there."""
    return f'{{"{text}": 0}}' if isinstance(part, ToolCall) else text


def _part_offsets(
    original: Conversation,
    normalised: Conversation,
    has_bytes: Callable[[ContentPart], bool],
    family: str,
) -> dict[int, int]:
    """Part index -> place of its first kept byte in the original conversation's content bytes."""
    origins: dict[int, int] = {}
    at = 0
    pairs = zip(original.parts(), normalised.parts(), strict=True)
    for i, (whole, part) in enumerate(pairs):
        offset = whole.text.find(part.text) if has_bytes(part) else 0
        if offset < 0:
            raise DataError(
                f"content part {i} was rewritten, not trimmed",
                where=family,
                remedy="a family may drop or trim content, nothing else",
            )
        origins[i] = at + len(whole.text[:offset].encode())
        at += len(whole.text.encode()) + 1
    return origins


def _replace_texts(conversation: Conversation, texts: Mapping[int, str]) -> Conversation:
    """The same conversation with other texts, by part index; a part without one stays as it is."""
    counter = iter(range(10**9))
    return replace(
        conversation,
        messages=tuple(
            replace(
                m, parts=tuple(replace_text(p, texts.get(next(counter), p.text)) for p in m.parts)
            )
            for m in conversation.messages
        ),
    )
