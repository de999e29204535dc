"""ChatRenderer: a family bound to one tokenizer and the model's own chat template.

It renders exactly the ids of the model's own template and knows which bytes of the content each
token covers. The bytes are located by rendering a second time with a placeholder for each part.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from itertools import count

import numpy as np
import numpy.typing as npt

from persea.chat.byte_offsets import part_offsets, token_table
from persea.chat.documents import (
    TEXT_FAMILY_NAME,
    DocumentTokens,
    find_document_tokens,
    render_document,
)
from persea.chat.family import DecodedPieces, Family
from persea.chat.messages import (
    PINNED_DATE,
    ContentPart,
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
    replace_text,
)
from persea.chat.template import ChatTemplate
from persea.chat.text_runs import (
    encode_runs,
    insert_prompt_only_suffix,
    refuse_other_encoding,
    refuse_tokens_without_row,
    split_runs,
)
from persea.errors import DataError
from persea.tokenization.name_pattern import compile_names
from persea.tokenization.tokens import RenderedTokens
from persea.tokenization.vocabulary import Vocabulary

# Version of the byte offsets in captures. In version 1 a token that also covers text of the
# template had a start offset.
BYTE_OFFSETS_VERSION = 2


@dataclass(frozen=True, eq=False)
class ChatRenderer:
    """Turns conversations into token ids and parses generated ids.

    Attributes:
        family: The model family.
        vocabulary: The tokenizer.
        template: The compiled chat template.
        template_text: Its source.
        template_date: The date that the template writes.
        special_tokens: bos_token, eos_token, ... as the template sees them.

    Example:
        >>> import persea
        >>> from persea.chat.messages import Text, ThinkingEffort
        >>> renderer = persea.load_renderer("saplings/llama-sapling")
        >>> conversation = persea.Conversation.from_question("Hi").with_answer(Text("Hello"))
        >>> tokens = renderer.render(conversation)
        >>> answer_ids = tokens.ids_T[tokens.loss_mask_T].tolist()
        >>> parts, finish = renderer.parse(answer_ids, ThinkingEffort.NONE)
        >>> parts, finish.value
        ((Text(text='Hello'),), 'stop')
    """

    family: Family
    vocabulary: Vocabulary
    template: ChatTemplate
    template_text: str
    template_date: date = PINNED_DATE
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    _prompt_ends: dict[ThinkingEffort, bool] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the control tokens that end the assistant's turn."""
        return tuple(
            self.vocabulary.control_token_ids[s]
            for s in self.family.stop_tokens
            if self.vocabulary.control_token_ids.get(s, len(self.vocabulary)) < len(self.vocabulary)
        )

    @property
    def is_text(self) -> bool:
        """Whether the model has no chat template: it scores and learns text, and is not asked."""
        return self.family.name == TEXT_FAMILY_NAME

    @cached_property
    def document_tokens(self) -> DocumentTokens:
        """Tokens around a plain text without roles."""
        turn_ends = () if self.is_text else self.family.stop_tokens[:1]
        return find_document_tokens(self.vocabulary, self.special_tokens, turn_ends)

    @cached_property
    def digest(self) -> str:
        """sha256 that changes whenever a rendering could change.

        It covers the tokenizer, the template and its special tokens, the family, the date, and
        BYTE_OFFSETS_VERSION.
        """
        state = json.dumps(
            [
                self.vocabulary.digest,
                self.template_text,
                sorted(self.special_tokens.items()),
                " ".join(filter(None, (self.family.name, self.family.template_version))),
                self.template_date.isoformat(),
                BYTE_OFFSETS_VERSION,
                *(["control flags"] if self.vocabulary.control_flags else []),
            ]
        )
        return hashlib.sha256(state.encode()).hexdigest()

    def render_prompt(self, conversation: Conversation) -> RenderedTokens:
        """Render a conversation as the prompt of an answer. No token is in the loss mask.

        Raises:
            DataError: The template changes the bytes of the content, or the family has no form for
                it; or the conversation is a document.
        """
        if conversation.is_document:
            raise DataError(
                "a document is no prompt: there is nothing to answer",
                where=self.family.name,
                remedy="use render(); documents are scored and learned, never answered",
            )
        return self._render_tokens(conversation, add_generation_prompt=True)

    def render(self, conversation: Conversation) -> RenderedTokens:
        """Render a conversation that ends with the assistant's answer and its stop token.

        A document is rendered by the model's rules for plain text, without its chat template.

        Returns:
            Token ids, byte offsets and the loss mask over the last answer, or over the document.

        Raises:
            DataError: The last message is not the assistant's, the template changes the bytes of
                the content, or the family has no form for it.
        """
        if conversation.is_document:
            return render_document(self.vocabulary, self.document_tokens, conversation.messages[0])
        if not conversation.messages or conversation.messages[-1].role is not Role.ASSISTANT:
            raise DataError(
                "the conversation does not end with an answer",
                where=self.family.name,
                remedy="use render_prompt() for a conversation without an answer",
            )
        return self._render_tokens(conversation, add_generation_prompt=False)

    def parse(
        self, ids: Sequence[int], effort: ThinkingEffort, tools: tuple[Tool, ...] = ()
    ) -> tuple[tuple[ContentPart, ...], FinishReason]:
        """Parse generated ids into parts. A malformed answer is no exception.

        Args:
            ids: Generated token ids, with or without the stop token.
            effort: The thinking effort of the prompt.
            tools: The tools that the prompt declared.

        Returns:
            The parts and how the answer ended: STOP, LENGTH (no stop token), or MALFORMED (no
            parts).

        Raises:
            DataError: An id is outside the vocabulary.
        """
        stop = next((k for k, i in enumerate(ids) if i in self.stop_ids), None)
        pieces = self.decode_answer(ids if stop is None else ids[:stop], effort)
        try:
            parsed = self.family.parse(pieces, effort)
            parts = None if parsed is None else self.family.resolve_calls(parsed, tools)
        except UnicodeDecodeError:  # the answer ends inside a character
            parts = None
        if stop is None:
            return parts or (), FinishReason.LENGTH
        return (parts, FinishReason.STOP) if parts is not None else ((), FinishReason.MALFORMED)

    def decode_answer(self, ids: Sequence[int], effort: ThinkingEffort) -> DecodedPieces:
        """Return generated ids as control tokens and the bytes of the text between them.

        The space that the tokenizer puts before a run of text is left out.

        Args:
            ids: Generated token ids without the stop token.
            effort: The thinking effort of the prompt.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        pieces = self.vocabulary.decode_pieces(ids)
        prefix = self.vocabulary.prefix_space
        if prefix is None or not prefix.every_run:
            return pieces
        begins_run = self._prompt_ends_with_control(effort)
        decoded: list[str | bytes] = []
        for piece in pieces:
            decoded.append(
                prefix.strip(piece) if begins_run and isinstance(piece, bytes) else piece
            )
            begins_run = isinstance(piece, str)
        return tuple(p for p in decoded if p)

    def _prompt_ends_with_control(self, effort: ThinkingEffort) -> bool:
        """Return whether an answer begins a new run of text."""
        if effort not in self._prompt_ends:
            prompt = self.render_prompt(replace(Conversation.from_question("Hi"), effort=effort))
            self._prompt_ends[effort] = self.vocabulary.bytes_W[int(prompt.ids_T[-1])] is None
        return self._prompt_ends[effort]

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
        """Return the rendering as (text, index of the content part; None for template text).

        They are found by rendering twice, once with a placeholder for each part. If the two
        renderings disagree the template repeats, rewrites or drops content, and the conversation is
        refused.
        """
        verbatim = {i for i, p in enumerate(normalised.parts()) if p.text and self._has_bytes(p)}
        others = "".join(
            (
                *(p.text for i, p in enumerate(normalised.parts()) if i not in verbatim),
                *(t.description + t.parameters for t in normalised.tools),
            )
        )
        marker = next(m for m in (f"\ue000{k}." for k in count()) if m not in others)
        placeholders = {
            i: _placeholder(f"{marker}{i}\ue001", p)
            for i, p in enumerate(normalised.parts())
            if i in verbatim
        }
        texts = [p.text for p in normalised.parts()]
        skeleton = self._apply_template(
            _replace_texts(normalised, placeholders), add_generation_prompt
        )
        segments: list[tuple[str, int | None]] = []
        order, position = [], 0
        pattern = re.escape(marker) + "(\\d{1,9})\ue001"
        for match in re.finditer(f'\\{{"{pattern}": 0\\}}|{pattern}', skeleton):
            order.append(int(match[1] or match[2]))
            if order[-1] < len(texts):
                segments += [
                    (skeleton[position : match.start()], None),
                    (texts[order[-1]], order[-1]),
                ]
            position = match.end()
        segments.append((skeleton[position:], None))
        if order != sorted(placeholders) or "".join(t for t, _ in segments) != self._apply_template(
            normalised, add_generation_prompt
        ):
            raise DataError(
                f"the chat template changes the content of message parts {sorted(placeholders)} "
                f"(found {order})",
                where=self.family.name,
                remedy="the content collides with the template; rephrase it or leave it out",
            )
        self._check_template_only_parts(normalised, placeholders, add_generation_prompt)
        return [s for s in segments if s[0]]

    def _has_bytes(self, part: ContentPart) -> bool:
        """Return whether the template writes this part's text unchanged."""
        return isinstance(part, (Text, Thinking)) or (
            self.family.is_tool_text_verbatim is not None
            and self.family.is_tool_text_verbatim(part)
        )

    def _check_template_only_parts(
        self, normalised: Conversation, placeholders: Mapping[int, str], add_generation_prompt: bool
    ) -> None:
        """Refuse tools, calls and results without byte offsets that the template drops.

        They are part of the template text, so they are also refused if they contain a control
        token.
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
                    f"{found.group()} in the text of a tool is a control token of this tokenizer",
                    where=self.family.name,
                    remedy="rephrase the tool, its call or its result, or leave the conversation "
                    "out",
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
        rendered = self._apply_template(
            replace(_replace_texts(normalised, texts), tools=tools), add_generation_prompt
        )
        if not all(
            probe in rendered for probe in (*probes.values(), *(t.description for t in tools))
        ):
            raise DataError(
                "the chat template drops tools, tool calls or tool results",
                where=self.family.name,
                remedy="this template has no tools; leave the conversation out, or give the model "
                "a template with tools",
            )

    def _check_message_parts(self, conversation: Conversation) -> None:
        """Refuse messages that no template can render.

        Calls must end an assistant's turn, results must fill a tool's turn.
        """
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
                    f"message {k} ({m.role}) mixes parts that do not belong in one turn",
                    where=self.family.name,
                    remedy="put tool results alone in a tool's turn, and calls after thought and "
                    "text in the assistant's turn",
                )

    def _render_tokens(
        self, conversation: Conversation, add_generation_prompt: bool
    ) -> RenderedTokens:
        self._check_message_parts(conversation)
        normalised = self.family.normalise(conversation)
        offsets = part_offsets(conversation, normalised, self._has_bytes, self.family.name)
        segments = self._split_segments(normalised, add_generation_prompt)
        full = "".join(t for t, _ in segments)
        answer_start = len(full)
        if not add_generation_prompt:
            prompt = self._apply_template(
                replace(normalised, messages=normalised.messages[:-1]), add_generation_prompt=True
            )
            bare_prompt = prompt.removesuffix(self.family.prompt_only_suffix)
            if not full.startswith(prompt) and full.startswith(bare_prompt):
                segments = insert_prompt_only_suffix(
                    segments, len(bare_prompt), self.family.prompt_only_suffix
                )
                full = "".join(t for t, _ in segments)
            if not full.startswith(prompt):
                raise DataError(
                    "the answer is not rendered where the generation prompt ends",
                    where=self.family.name,
                    remedy="this template cannot be used for training: its prompt is no prefix of "
                    "its conversations",
                )
            answer_start = len(prompt)
        runs = list(split_runs(self.vocabulary, self._control_pattern, segments))
        refuse_tokens_without_row(self.vocabulary, runs)
        encoded = iter(encode_runs(self.vocabulary, runs))
        columns: list[npt.NDArray[np.int64]] = []
        turn_end = max(
            (offsets[i] + len(t.encode()) for t, i in segments if i is not None), default=0
        )
        stopped = False
        for run in runs:
            if run.control_id is None:
                columns.append(
                    token_table(self.vocabulary, next(encoded), run, offsets, answer_start, stopped)
                )
                continue
            in_answer = run.start_char >= answer_start and not stopped
            stopped = stopped or (in_answer and run.control_id in self.stop_ids)
            offset = turn_end if in_answer and stopped else -1
            columns.append(np.array([[run.control_id, offset, offset, in_answer]]))
        if not add_generation_prompt and not stopped and self.family.stop_tokens:
            raise DataError(
                "the chat template does not end the assistant's turn with a stop token",
                where=self.family.name,
                remedy=f"expected one of {', '.join(self.family.stop_tokens)}",
            )
        table = np.concatenate(columns)
        refuse_other_encoding(
            self.vocabulary, self._control_pattern, segments, table[:, 0].tolist()
        )
        ids, starts, ends = (table[:, k].astype(np.int32) for k in range(3))
        return RenderedTokens(ids, starts, ends, table[:, 3].astype(bool))

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return compile_names(self.vocabulary.control_token_ids)


def _is_well_formed(message: Message) -> bool:
    kinds = [type(p) for p in message.parts]
    if message.role is Role.TOOL:
        return bool(kinds) and set(kinds) == {ToolResult}
    calls = kinds.count(ToolCall)
    return ToolResult not in kinds and (
        not calls or (message.role is Role.ASSISTANT and kinds[-calls:] == [ToolCall] * calls)
    )


def _placeholder(text: str, part: ContentPart) -> str:
    """Return the placeholder for a part's text; templates need JSON objects for arguments."""
    return f'{{"{text}": 0}}' if isinstance(part, ToolCall) else text


def _replace_texts(conversation: Conversation, texts: Mapping[int, str]) -> Conversation:
    """Return the conversation with other texts, by part index; other parts stay unchanged."""
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
