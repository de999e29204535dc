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
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from persea.chat.family import DecodedPieces, Family, edit_texts
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
)
from persea.chat.response_parsing import (
    FIRST_SURROGATE,
    AnswerForm,
    Marker,
    control_characters,
    pieces_to_string,
)
from persea.chat.template import ChatTemplate, read_names
from persea.chat.template_probes import TemplateProbe, Turn, make_messages
from persea.chat.template_probing import NO_STRIP, Place, TemplateBehaviour, probe_template
from persea.chat.thought_probing import EffortBehaviour, PromptTail
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary

GENERIC_FAMILY_NAME = "generic"
# Raised when the renderings of inferred families change: it is part of their digest.
GENERIC_VERSION = "2"
DROPPED_THOUGHT = "."
INSERTED_THOUGHT_KEY = "persea_thought"  # no template reads it


def infer_family(
    vocabulary: Vocabulary,
    template: ChatTemplate,
    template_text: str,
    eos_tokens: Collection[str],
    where: str,
    with_thinking: bool = True,
) -> tuple[Family, ChatTemplate]:
    """Return the family of one model, and its template with complete last answers.

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
    names = sorted(vocabulary.control_token_ids, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    probe = TemplateProbe(
        template, *read_names(template_text), pattern, frozenset(eos_tokens), where
    )
    try:
        behaviour = probe_template(probe, with_thinking)
    except DataError as refusal:
        probe = replace(probe, has_text_parts=True)  # a template for pictures
        try:
            behaviour = probe_template(probe, with_thinking)
        except DataError:
            raise refusal from None
    complete = complete_last_answer(template, behaviour, where)
    inferred = InferredFamily(behaviour, complete, pattern, where, probe.has_text_parts)
    stop_tokens = (
        behaviour.stop_token,
        *sorted(set(eos_tokens) & vocabulary.control_token_ids.keys() - {behaviour.stop_token}),
    )
    family = Family(
        name=GENERIC_FAMILY_NAME,
        signature_token="",
        efforts=tuple(effort for effort, _ in behaviour.efforts),
        stop_tokens=stop_tokens,
        normalise=inferred.normalise,
        template_inputs=inferred.template_inputs,
        parse=inferred.parse,
        thought_ends=inferred.thought_ends,
        template_version=GENERIC_VERSION,
        limitations=describe_limitations(behaviour, eos_tokens),
    )
    return family, complete


@dataclass(frozen=True)
class InferredFamily:
    """The functions of an inferred family.

    Attributes:
        behaviour: The results of probing.
        template: The template with complete last answers.
        control_pattern: Matches the tokenizer's control tokens.
        where: The place for error messages.
        has_text_parts: Whether texts are lists of parts, as templates for pictures take them.
    """

    behaviour: TemplateBehaviour
    template: ChatTemplate
    control_pattern: re.Pattern[str]
    where: str
    has_text_parts: bool

    def at(self, effort: ThinkingEffort) -> EffortBehaviour:
        """Return the behaviour at an effort; a model that always thinks has only the highest."""
        return dict(self.behaviour.efforts).get(effort, self.behaviour.efforts[-1][1])

    def normalise(self, conversation: Conversation) -> Conversation:
        """Drop the thoughts that the template drops; trim texts as it does.

        Raises:
            DataError: The template treats this conversation in another way than the probes.
        """
        given = self._drop_thoughts(conversation)
        rules = dict(self.behaviour.strip_rules)
        last = len(given.messages) - 1

        def edit(k: int, m: Message, p: ContentPart) -> str:
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
        """Refuse an empty last answer that the template writes in another way than a text."""
        if not conversation.messages:
            return
        answer = conversation.messages[-1]
        if answer.role is not Role.ASSISTANT or answer.text:
            return
        question = replace(conversation, messages=conversation.messages[:-1])
        written = self._render(conversation).removeprefix(self._render(question))
        written = written.partition(self.behaviour.stop_token)[0]
        parsed = self.answer_forms[conversation.effort].parse(self._code(written))
        if parsed is None or parsed[1].strip():
            raise DataError(
                "the chat template writes an empty answer in another way than a text",
                where=self.where,
                remedy="leave the conversation out",
            )

    def _drop_thoughts(self, conversation: Conversation) -> Conversation:
        behaviour, last = self.at(conversation.effort), len(conversation.messages) - 1

        def edit(k: int, m: Message, p: ContentPart) -> str:
            is_kept = behaviour.thinking is not None and (
                k == last or behaviour.keeps_earlier_thoughts
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
        last = len(conversation.messages) - 1
        turns = [
            Turn(m.role, m.text, self._thought_of(m, conversation.effort, k == last))
            for k, m in enumerate(conversation.messages)
        ]
        switches = dict(self.at(conversation.effort).switches)
        return make_messages(turns, key, self.has_text_parts), switches

    def _thought_of(self, message: Message, effort: ThinkingEffort, is_last: bool) -> str:
        """Return the thought that the template gets.

        An earlier thought that the template drops can leave a line break, so that a message whose
        thought was emptied gets another one.
        """
        behaviour = self.at(effort)
        if behaviour.thinking is None:
            return ""
        was_emptied = any(isinstance(p, Thinking) for p in message.parts) and not is_last
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
        parsed = self.answer_forms[effort].parse(pieces_to_string(pieces, self.characters))
        if parsed is None:
            return None
        rules = dict(self.behaviour.strip_rules)
        place = Place(Role.ASSISTANT, is_last=True, has_thought=bool(parsed[0]))
        of_thought = replace(place, has_thought=True, is_thought=True)
        thought = rules.get(of_thought, NO_STRIP)(parsed[0])
        answer = Text(rules.get(place, NO_STRIP)(parsed[1]))
        return (Thinking(thought), answer) if thought else (answer,)

    @cached_property
    def thought_ends(self) -> tuple[DecodedPieces, ...]:
        """Return `Family.thought_ends`: the closing marker as pieces."""
        thinking = self.behaviour.efforts[-1][1].thinking
        if thinking is None:
            return ()
        text, pieces, position = thinking.between, [], 0
        for match in self.control_pattern.finditer(text):
            if match.start() > position:
                pieces.append(text[position : match.start()].encode())
            pieces.append(match.group())
            position = match.end()
        if text[position:]:
            pieces.append(text[position:].encode())
        return (tuple(pieces),)


def _has_thinking_part(content: Any) -> bool:
    return isinstance(content, list) and content[0]["type"] == "thinking"


def complete_last_answer(
    template: ChatTemplate, behaviour: TemplateBehaviour, where: str
) -> ChatTemplate:
    """Return the template with last answers that begin with the prompt and end with the stop token.

    Args:
        template: The compiled chat template.
        behaviour: The results of probing.
        where: The place for error messages.
    """
    efforts = [b for _, b in behaviour.efforts]
    key = behaviour.thought_key

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool, **switches: Any) -> str:
        text = template(messages=messages, add_generation_prompt=add_generation_prompt, **switches)
        if add_generation_prompt or not messages or messages[-1]["role"] != Role.ASSISTANT.value:
            return text
        answer = messages[-1]
        thought = answer.get(INSERTED_THOUGHT_KEY, "")
        has_thought = bool(thought or answer.get(key) or _has_thinking_part(answer["content"]))
        current = next(
            (b for b in efforts if all(switches.get(k) == v for k, v in b.switches)), efforts[-1]
        )
        last = current.thinking if has_thought else current.plain
        if last is None:
            raise DataError(
                "the chat template does not write an answer without a thought where its prompt "
                "ends",
                where=where,
                remedy="give the answer its thought, or leave the conversation out",
            )
        tail = last.tail
        if tail != PromptTail():
            prompt = template(messages=messages[:-1], add_generation_prompt=True, **switches)
            shared = prompt.removesuffix(tail.lacking) + tail.instead
            if not prompt.endswith(tail.lacking) or not text.startswith(shared):
                raise DataError(
                    "the answer is not rendered where the generation prompt ends",
                    where=where,
                    remedy="leave the conversation out",
                )
            text = prompt + tail.inserted.replace("{thought}", thought) + text[len(shared) :]
        if behaviour.closes_last_answer:
            return text
        return text + behaviour.answer_suffix + behaviour.stop_token

    return render


def describe_limitations(behaviour: TemplateBehaviour, eos_tokens: Collection[str]) -> str:
    """Return the known and unknown facts about such a model, for people."""
    thinking = behaviour.efforts[-1][1].thinking
    limitations = [
        "persea does not know this family and uses its chat template alone: "
        + (
            "no thinking and no tools, although the model may have them"
            if thinking is None
            else "no tools, although the model may have them"
        ),
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
