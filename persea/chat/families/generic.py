"""Infer the family of an unknown model from its own chat template: thoughts, but no tools.

`persea.chat.template_probing` finds out by rendering what the file of a family states. Here the
findings become a `Family` and a template whose prompts are prefixes of its conversations:

    the last answer gets the stop token that the template leaves out
    text that ends the prompt and that a finished conversation lacks (an opened <think>) is put into
    the conversation, with the thought and its end

Each conversation is rendered as it is given and as persea trims it; if the two differ it is
refused. `Family.limitations` lists the facts that probes cannot find.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from persea.chat.call_grammar import CallGrammar
from persea.chat.call_probing import CallUse
from persea.chat.families.qwen import last_question_index
from persea.chat.families.tool_format import tools_to_json_schema
from persea.chat.family import DecodedPieces, Family, edit_texts, keep_calls_as_parsed
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
    ToolResult,
)
from persea.chat.response_parsing import (
    FIRST_SURROGATE,
    AnswerForm,
    Marker,
    control_characters,
    has_control_token,
    pieces_to_string,
)
from persea.chat.template import ChatTemplate, read_names
from persea.chat.template_completion import INSERTED_THOUGHT_KEY, complete_last_answer
from persea.chat.template_probes import TemplateProbe, Turn, make_messages
from persea.chat.template_probing import (
    NO_STRIP,
    Place,
    StripRule,
    TemplateBehaviour,
    probe_template,
)
from persea.chat.thought_probing import EffortBehaviour
from persea.chat.tool_notation import ToolNotation
from persea.errors import DataError
from persea.tokenization.name_pattern import compile_names
from persea.tokenization.vocabulary import Vocabulary

GENERIC_FAMILY_NAME = "generic"
# Raised when the renderings of inferred families change: it is part of their digest.
GENERIC_VERSION = "3"
DROPPED_THOUGHT = "."


def infer_family(
    vocabulary: Vocabulary,
    template: ChatTemplate,
    template_text: str,
    eos_tokens: Collection[str],
    where: str,
    with_thinking: bool = True,
) -> InferredFamily:
    """Find out how a model's template behaves.

    Args:
        vocabulary: The model's tokenizer.
        template: Its compiled chat template.
        template_text: Its source.
        eos_tokens: Control tokens that the model's own configuration declares as end of text.
        where: The place for error messages.
        with_thinking: Look for thoughts; False where persea's own prelude has them.

    Raises:
        DataError: The template's prompt is no prefix of its conversations, it does not end answers,
            or it rewrites texts.
    """
    pattern = compile_names(vocabulary.control_token_ids)
    known_eos = frozenset(eos_tokens) & vocabulary.control_token_ids.keys()
    probe = TemplateProbe(template, *read_names(template_text), pattern, known_eos, where)
    try:
        behaviour = probe_template(probe, with_thinking)
    except DataError as refusal:
        probe = replace(probe, has_text_parts=True)  # a template for pictures
        try:
            behaviour = probe_template(probe, with_thinking)
        except DataError:
            raise refusal from None
    complete = complete_last_answer(template, behaviour, where)
    return InferredFamily(
        behaviour, complete, pattern, tuple(sorted(known_eos)), where, probe.has_text_parts
    )


@dataclass(frozen=True)
class InferredFamily:
    """The functions of an inferred family.

    Attributes:
        behaviour: The results of probing.
        template: The template with complete last answers.
        control_pattern: Matches the tokenizer's control tokens.
        eos_tokens: Control tokens that the model's own configuration declares as end of text.
        where: The place for error messages.
        has_text_parts: Whether texts are lists of parts, as templates for pictures take them.
        notation: How the model writes tool calls; None without tools.
        calls: How the template takes and ends them.
    """

    behaviour: TemplateBehaviour
    template: ChatTemplate
    control_pattern: re.Pattern[str]
    eos_tokens: tuple[str, ...]
    where: str
    has_text_parts: bool
    notation: ToolNotation | CallGrammar | None = None
    calls: CallUse = field(default_factory=CallUse)

    def to_family(self) -> Family:
        """Return the family."""
        stop, notation = self.behaviour.stop_token, self.notation
        return Family(
            name=GENERIC_FAMILY_NAME,
            signature_token="",
            efforts=tuple(effort for effort, _ in self.behaviour.efforts),
            stop_tokens=tuple(
                dict.fromkeys((stop, *filter(None, [self.calls.stop]), *self.eos_tokens))
            ),
            normalise=self.normalise,
            template_inputs=self.template_inputs,
            parse=self.parse,
            is_tool_text_verbatim=self.calls.is_verbatim if notation else None,
            resolve_calls=notation.resolve if notation else keep_calls_as_parsed,
            thought_ends=self.thought_ends,
            template_version=" ".join([GENERIC_VERSION, *([notation.name] if notation else [])]),
            limitations=describe_limitations(self.behaviour, self.eos_tokens, notation is not None),
        )

    def at(self, effort: ThinkingEffort) -> EffortBehaviour:
        """Return the behaviour at an effort; a model that always thinks has only the highest."""
        return dict(self.behaviour.efforts).get(effort, self.behaviour.efforts[-1][1])

    def normalise(self, conversation: Conversation) -> Conversation:
        """Drop the thoughts that the template drops; trim texts as it does.

        Raises:
            DataError: The template treats this conversation in another way than the probes.
        """
        self._refuse_text_before_calls(conversation)
        of_calls = self.calls.text_rule or NO_STRIP
        given = self._drop_thoughts(conversation)
        rules = dict(self.behaviour.strip_rules)
        last = len(given.messages) - 1

        def edit(k: int, m: Message, p: ContentPart) -> str:
            if isinstance(p, ToolResult):
                return p.text
            if m.calls and isinstance(p, Text):
                return of_calls(p.text)
            after_system = k > 0 and given.messages[k - 1].role is Role.SYSTEM
            place = Place(
                m.role,
                k == last,
                after_system=m.role is Role.USER and after_system,
                has_thought=bool(m.thinking),
                is_thought=isinstance(p, Thinking),
            )
            return rules.get(place, NO_STRIP)(p.text)

        normalised = edit_texts(given, edit)
        self._refuse_odd_empty_answer(normalised)
        if normalised != conversation and self._render(normalised) != self._render(conversation):
            raise DataError(
                "the chat template treats white space in this conversation in another way than in "
                "persea's probes",
                where=self.where,
                remedy="trim the texts of the conversation, or leave it out",
            )
        return normalised

    def _refuse_odd_empty_answer(self, conversation: Conversation) -> None:
        """Refuse a last answer of calls or of nothing that cannot be parsed back."""
        if not conversation.messages:
            return
        answer = conversation.messages[-1]
        if answer.role is not Role.ASSISTANT or (answer.text and not answer.calls):
            return
        question = replace(conversation, messages=conversation.messages[:-1])
        written = self._render(conversation).removeprefix(self._render(question))
        stop = self.calls.stop if answer.calls else ""
        written = written.partition(stop or self.behaviour.stop_token)[0]
        parts = self._parse_coded(self._code(written), conversation.effort)
        if parts is not None:
            parts = self.to_family().resolve_calls(parts, conversation.tools)
        parsed = None if parts is None else Message(Role.ASSISTANT, parts)
        if answer.calls:
            is_equal = parsed is not None and _is_same_answer(parsed, answer)
        else:
            is_equal = parsed is not None and not parsed.calls and not parsed.text.strip()
        if not is_equal:
            raise DataError(
                "the chat template writes these calls so that they cannot be parsed back"
                if answer.calls
                else "the chat template writes an empty answer in another way than a text",
                where=self.where,
                remedy="leave the conversation out",
            )

    def _refuse_text_before_calls(self, conversation: Conversation) -> None:
        if self.calls.text_rule is None and any(
            m.calls and m.text.strip() for m in conversation.messages
        ):
            raise DataError(
                "a message has text and tool calls, and the chat template writes no text before "
                "calls that can be parsed back",
                where=self.where,
                remedy="leave the conversation out",
            )

    def _drop_thoughts(self, conversation: Conversation) -> Conversation:
        behaviour, last = self.at(conversation.effort), len(conversation.messages) - 1
        # With tools, a turn of several answers begins at the last question.
        first = last_question_index(conversation) + 1 if conversation.tools else last

        def edit(k: int, m: Message, p: ContentPart) -> str:
            is_kept = behaviour.thinking is not None and (
                k >= first or behaviour.keeps_earlier_thoughts
            )
            return "" if isinstance(p, Thinking) and not is_kept else p.text

        return edit_texts(conversation, edit)

    def _render(self, conversation: Conversation) -> str:
        messages, kwargs = self.template_inputs(conversation)
        ends_with_answer = conversation.messages[-1].role is Role.ASSISTANT
        return self.template(messages, add_generation_prompt=not ends_with_answer, **kwargs)

    def template_inputs(
        self, conversation: Conversation
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return messages as the template takes them, and the switches of the effort."""
        behaviour = self.behaviour
        if behaviour.no_system_reason and any(m.role is Role.SYSTEM for m in conversation.messages):
            raise DataError(
                f"the chat template takes no system text: {behaviour.no_system_reason}",
                where=self.where,
                remedy="put it into the question, or leave the conversation out",
            )
        self._refuse_ambiguous_answer(conversation)
        key = behaviour.thought_key or INSERTED_THOUGHT_KEY
        last, index = len(conversation.messages) - 1, 0
        messages: list[dict[str, Any]] = []
        pending: list[tuple[str, int]] = []
        for k, m in enumerate(conversation.messages):
            if m.role is Role.TOOL:
                messages += self.calls.form.results(m, pending)
                continue
            turn = Turn(m.role, m.text, self._thought_of(m, conversation.effort, k == last))
            (made,) = make_messages([turn], key, self.has_text_parts)
            if m.calls:
                own = self.calls.form.message(m.calls, m.text, index)
                has_content = m.text or isinstance(made["content"], list)
                made |= own | ({"content": made["content"]} if has_content else {})
                pending += [(c.name, index + n) for n, c in enumerate(m.calls)]
                index += len(m.calls)
            messages.append(made)
        tools = tools_to_json_schema(conversation.tools)
        switches = dict(self.at(conversation.effort).switches)
        return messages, switches | ({"tools": tools} if tools else {})

    def _thought_of(self, message: Message, effort: ThinkingEffort, is_last: bool) -> str:
        """Return the thought that the template gets.

        An earlier thought that the template drops can leave a line break, so that a message whose
        thought was emptied gets another one.
        """
        behaviour = self.at(effort)
        if behaviour.thinking is None:
            return ""
        was_emptied = any(isinstance(p, Thinking) for p in message.parts) and not (
            is_last or message.calls
        )
        if was_emptied and not behaviour.keeps_earlier_thoughts and self.behaviour.thought_key:
            return message.thinking or DROPPED_THOUGHT
        return message.thinking

    def _refuse_ambiguous_answer(self, conversation: Conversation) -> None:
        if not conversation.messages or conversation.messages[-1].role is not Role.ASSISTANT:
            return
        answer = conversation.messages[-1]
        found = self.answer_forms[conversation.effort].find_ambiguity(answer.thinking, answer.text)
        if found:
            raise DataError(
                f"the answer contains {found}, which is plain text for this tokenizer and marks a "
                "thought",
                where=self.where,
                remedy="leave the conversation out",
            )

    @cached_property
    def answer_forms(self) -> dict[ThinkingEffort, AnswerForm]:
        """Return what the model writes behind its prompt, by effort.

        At the effort none a thought is parsed too: the model was not asked for it.
        """
        last = self.behaviour.efforts[-1][1]
        forms = {}
        for effort in ThinkingEffort:
            own = self.at(effort)
            thinker = own if own.thinking is not None else last
            closing = thinker.thinking.between if thinker.thinking is not None else ""
            forms[effort] = AnswerForm(
                lead=self._code(own.plain.between) if own.plain is not None else "",
                tail=self._code(self.behaviour.answer_suffix),
                opening=Marker.from_text(self._code(thinker.opening)),
                closing=Marker.from_text(self._code(closing)),
                is_opened=own.is_opened,
            )
        return forms

    def _code(self, text: str) -> str:
        """Return template text with a surrogate for each control token."""
        characters = self.characters
        return self.control_pattern.sub(
            lambda match: characters.get(match.group(), chr(FIRST_SURROGATE)), text
        )

    @cached_property
    def characters(self) -> dict[str, str]:
        """Return the surrogate of each control token in the template text around answers."""
        texts = [self.behaviour.answer_suffix]
        if self.notation is not None:
            texts.append(self.notation.texts)
        for _, behaviour in self.behaviour.efforts:
            texts.append(behaviour.opening)
            for answer in (behaviour.plain, behaviour.thinking):
                if answer is not None:
                    texts += [answer.before_thought, answer.between]
        return control_characters(*texts, control_pattern=self.control_pattern)

    def parse(
        self, pieces: DecodedPieces, effort: ThinkingEffort
    ) -> tuple[ContentPart, ...] | None:
        """Parse an answer; None if it is malformed."""
        return self._parse_coded(pieces_to_string(pieces, self.characters), effort)

    def _parse_coded(self, text: str, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
        """Parse an answer with surrogates for its control tokens."""
        form = self.answer_forms[effort]
        parsed = form.split(text) or self._split_before_calls(form, text)
        if parsed is None or has_control_token(parsed[0]):
            return None
        rules = dict(self.behaviour.strip_rules)
        place = Place(Role.ASSISTANT, is_last=True, has_thought=bool(parsed[0]))
        of_thought = replace(place, has_thought=True, is_thought=True)
        thought = rules.get(of_thought, NO_STRIP)(parsed[0])
        answer = self._parse_calls(parsed[1])
        if answer is None:
            return None
        if not any(isinstance(p, ToolCall) for p in answer):
            answer = (Text(rules.get(place, NO_STRIP)(parsed[1])),)
        return (Thinking(thought), *answer) if thought else answer

    def _split_before_calls(self, form: AnswerForm, text: str) -> tuple[str, str] | None:
        """Return (thought, calls) where calls have other text before them than a plain answer."""
        if not isinstance(self.notation, CallGrammar):
            return None
        head = self._code(self.notation.head_marker)
        opened = form.after_opening(text)
        end = self._code(self.calls.thought_end).strip()
        if opened is not None and end:
            thought, found, rest = opened.partition(end)
            if found and rest.lstrip().startswith(head):
                return thought, rest
        return ("", text) if text.lstrip().startswith(head) and not form.is_opened else None

    def _parse_calls(self, text: str) -> tuple[ContentPart, ...] | None:
        """Return [text] calls, or the text alone; None if it is malformed."""
        if self.notation is None or self.is_plain(text):
            return None if has_control_token(text) else (Text(text),)
        names = {character: token for token, character in self.characters.items()}
        parsed = self.notation.parse("".join(names.get(c, c) for c in text))
        if parsed is None or has_control_token(parsed[0]):
            return None
        content, calls = parsed
        if not calls:
            return None if has_control_token(text) else (Text(text),)
        content = (self.calls.text_rule or StripRule(None, None))(content)
        return (Text(content), *calls) if content else calls

    def is_plain(self, text: str) -> bool:
        """Return whether a text has no control token although the notation of calls has some."""
        return self.has_control_calls and not has_control_token(text)

    @cached_property
    def has_control_calls(self) -> bool:
        """Whether the notation of calls has control tokens of this tokenizer."""
        notation = self.notation
        return notation is not None and (self.control_pattern.search(notation.texts) is not None)

    @cached_property
    def thought_ends(self) -> tuple[DecodedPieces, ...]:
        """Return `Family.thought_ends`: the closing marker as pieces."""
        thinking = self.behaviour.efforts[-1][1].thinking
        if thinking is None:
            return ()
        text, position = thinking.between, 0
        pieces: list[str | bytes] = []
        for match in self.control_pattern.finditer(text):
            if match.start() > position:
                pieces.append(text[position : match.start()].encode())
            pieces.append(match.group())
            position = match.end()
        if text[position:]:
            pieces.append(text[position:].encode())
        return (tuple(pieces),)


def _is_same_answer(parsed: Message, answer: Message) -> bool:
    return (parsed.text, parsed.thinking, parsed.calls) == (
        answer.text,
        answer.thinking,
        answer.calls,
    )


def describe_limitations(
    behaviour: TemplateBehaviour, eos_tokens: Collection[str], has_tools: bool
) -> str:
    """Return the known and unknown facts about such a model, for people."""
    thinking = behaviour.efforts[-1][1].thinking
    missing = [*(["thinking"] if thinking is None else []), *([] if has_tools else ["tools"])]
    limitations = [
        "persea does not know this family and uses its chat template alone"
        + (f": no {' and no '.join(missing)}, even if the model has more" if missing else ""),
        f"an answer ends with {behaviour.stop_token}"
        + (
            ""
            if behaviour.closes_last_answer
            else ", which the template writes only before the next question"
        ),
    ]
    if thinking is not None:
        limitations.append(f"a thought ends with {thinking.between.strip()}")
        if ThinkingEffort.NONE not in dict(behaviour.efforts):
            limitations.append("its template has no switch to answer at once")
    if behaviour.stop_token not in eos_tokens:
        limitations.append(
            f"its configuration ends a text with {', '.join(sorted(eos_tokens)) or 'no token'} "
            "instead; persea stops at either"
        )
    if behaviour.no_system_reason:
        limitations.append(f"its template takes no system text ({behaviour.no_system_reason})")
    return "; ".join(limitations) + "."
