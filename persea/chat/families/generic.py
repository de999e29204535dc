"""Infer the family of an unknown model from its own chat template: no thinking, no tools.

The facts that a family's file states are found here by rendering probe conversations whose texts
are placeholders and reading the text around the placeholders.

    stop token     the control token after an answer; if the template leaves the last answer open,
                   the token before the next question, provided that the model's configuration
                   declares it as end of text
    strip rules    the white space that the template strips from a text, by role
    answer prefix  text between prompt and answer; the model generates it, `parse` removes it

If the probes contradict each other the model is refused. `Family.limitations` lists the facts that
probes cannot find.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from persea.chat.family import DecodedPieces, Family, edit_texts, pieces_to_text
from persea.chat.messages import ContentPart, Conversation, Role, Text, Thinking, ThinkingEffort
from persea.chat.template import ChatTemplate
from persea.errors import DataError
from persea.tokenization.name_pattern import compile_names
from persea.tokenization.vocabulary import Vocabulary

GENERIC_FAMILY_NAME = "generic"
# Arguments of str.strip that templates use; None = all white space.
STRIP_CHARS_CHOICES = ("", "\n", " ", " \n", None)
PLACEHOLDER_FORMAT = "\ue000{}\ue001"  # private-use characters, which no template treats specially
WHITESPACE_PROBES = ("\n \t\u3000", " \n\t\u3000")
NO_THINKING_KWARGS = {"enable_thinking": False}


@dataclass(frozen=True)
class StripRule:
    """White space that a template strips: the arguments of `str.lstrip` and `str.rstrip`."""

    left: str | None
    right: str | None

    def __call__(self, text: str) -> str:
        """Return the stripped text."""
        return text.lstrip(self.left).rstrip(self.right)


NO_STRIP = StripRule("", "")


@dataclass(frozen=True)
class TemplateBehaviour:
    """The results of probing a template.

    Attributes:
        stop_token: Control token that ends an answer.
        closes_last_answer: Whether the template also writes it after the last answer.
        answer_prefix: Text between the prompt and the answer.
        answer_suffix: Text between the answer and its stop token.
        strip_rules: ((role, is the last message), stripped white space).
        no_system_reason: Why the template takes no system text; "" if it does.
    """

    stop_token: str
    closes_last_answer: bool
    answer_prefix: str
    answer_suffix: str
    strip_rules: tuple[tuple[tuple[Role, bool], StripRule], ...]
    no_system_reason: str


def infer_family(
    vocabulary: Vocabulary, template: ChatTemplate, eos_tokens: Collection[str], where: str
) -> tuple[Family, ChatTemplate]:
    """Return the family of one model, and its template with the last answer closed.

    Args:
        vocabulary: The model's tokenizer.
        template: Its compiled chat template.
        eos_tokens: Control tokens that the model's own configuration declares as end of text.
        where: The place for error messages.

    Raises:
        DataError: The template's prompt is no prefix of its conversations, it does not end answers,
            or it rewrites texts.
    """
    behaviour = probe_template(vocabulary, template, eos_tokens, where)
    strip_rules = dict(behaviour.strip_rules)

    def normalise(conversation: Conversation) -> Conversation:
        """Drop thoughts; trim texts as the template does."""
        last = len(conversation.messages) - 1
        return edit_texts(
            conversation,
            lambda k, m, p: (
                ""
                if isinstance(p, Thinking)
                else strip_rules.get((m.role, k == last), NO_STRIP)(p.text)
            ),
        )

    def template_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return messages as every template takes them, with the usual thinking switch off."""
        if behaviour.no_system_reason and any(m.role is Role.SYSTEM for m in conversation.messages):
            raise DataError(
                f"the chat template takes no system text: {behaviour.no_system_reason}",
                where=where,
                remedy="put it into the question, or leave the conversation out",
            )
        return [{"role": m.role.value, "content": m.text} for m in conversation.messages], dict(
            NO_THINKING_KWARGS
        )

    def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
        """Parse one text without control tokens; remove the template's text around the answer."""
        text = pieces_to_text(pieces)
        if text is None:
            return None
        return (
            Text(
                strip_rules[Role.ASSISTANT, True](
                    text.removeprefix(behaviour.answer_prefix).removesuffix(behaviour.answer_suffix)
                )
            ),
        )

    stop_tokens = (
        behaviour.stop_token,
        *sorted(set(eos_tokens) & vocabulary.control_token_ids.keys() - {behaviour.stop_token}),
    )
    family = Family(
        name=GENERIC_FAMILY_NAME,
        licence="not known",
        signature_token="",
        efforts=(ThinkingEffort.NONE,),
        stop_tokens=stop_tokens,
        normalise=normalise,
        template_inputs=template_inputs,
        parse=parse,
        limitations=describe_limitations(behaviour, eos_tokens),
    )
    return family, template if behaviour.closes_last_answer else close_last_answer(
        template, behaviour.stop_token
    )


def close_last_answer(template: ChatTemplate, stop_token: str) -> ChatTemplate:
    """Return the template with the stop token after a last answer that it leaves open."""

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool, **switches: Any) -> str:
        text = template(messages=messages, add_generation_prompt=add_generation_prompt, **switches)
        ends_with_answer = bool(messages) and messages[-1]["role"] == Role.ASSISTANT.value
        return text + stop_token if ends_with_answer and not add_generation_prompt else text

    return render


def describe_limitations(behaviour: TemplateBehaviour, eos_tokens: Collection[str]) -> str:
    """Return the known and unknown facts about such a model, for people."""
    limitations = [
        "persea does not know this family and uses its chat template alone: no thinking and no "
        "tools, although the model may have them",
        f"an answer ends with {behaviour.stop_token}"
        + (
            ""
            if behaviour.closes_last_answer
            else ", which the template writes only before the next question"
        ),
    ]
    if behaviour.stop_token not in eos_tokens:
        limitations.append(
            f"its configuration ends a text with {', '.join(sorted(eos_tokens)) or 'no token'} "
            "instead; persea stops at either"
        )
    if behaviour.no_system_reason:
        limitations.append(f"its template takes no system text ({behaviour.no_system_reason})")
    return "; ".join(limitations) + "."


def probe_template(
    vocabulary: Vocabulary, template: ChatTemplate, eos_tokens: Collection[str], where: str
) -> TemplateBehaviour:
    """Find out how a template behaves by rendering probe conversations.

    Raises:
        DataError: persea cannot follow the template.
    """

    def render(*texts: tuple[Role, str], prompt: bool = False) -> str:
        return template(
            messages=[{"role": r.value, "content": t} for r, t in texts],
            add_generation_prompt=prompt,
            **NO_THINKING_KWARGS,
        )

    question, answer, next_question = (
        (r, PLACEHOLDER_FORMAT.format(k))
        for k, r in enumerate((Role.USER, Role.ASSISTANT, Role.USER))
    )
    prompt, full = render(question, prompt=True), render(question, answer)
    if not full.startswith(prompt) or full.count(answer[1]) != 1 or prompt.count(question[1]) != 1:
        raise DataError(
            "the chat template does not write an answer where its prompt ends",
            where=where,
            remedy="write a file for this family, see docs/new_family.md",
        )
    prefix, suffix = full[len(prompt) :].split(answer[1])
    control_pattern = compile_names(vocabulary.control_token_ids)
    if control_pattern.search(prefix):
        raise DataError(
            f"the chat template writes {prefix!r} between its prompt and the answer",
            where=where,
            remedy="write a file for this family, see docs/new_family.md",
        )
    stop, closes = control_pattern.search(suffix), True
    if stop is None:
        suffix, closes = (
            render(question, answer, next_question).split(answer[1])[1].split(next_question[1])[0],
            False,
        )
        stop = control_pattern.search(suffix)
        if stop is None or stop.group() not in eos_tokens or suffix[: stop.start()]:
            raise DataError(
                "the chat template ends an answer with no control token"
                + (
                    f"; the next question begins with {stop.group()}, "
                    "which the model's configuration does not declare as eos"
                    if stop
                    else ""
                ),
                where=where,
                remedy="the model would never stop; "
                "write a file for this family, see docs/new_family.md",
            )
    system, no_system_reason = (Role.SYSTEM, PLACEHOLDER_FORMAT.format(3)), ""
    try:
        if render(system, question, answer).count(system[1]) != 1:
            no_system_reason = "it drops the text"
    except DataError as error:
        no_system_reason = error.message
    earlier, later = (
        (question, answer),
        (next_question, (Role.ASSISTANT, PLACEHOLDER_FORMAT.format(4))),
    )
    probes: list[tuple[tuple[Role, bool], list[tuple[Role, str]], int]] = [
        ((Role.USER, True), [question], 0),
        ((Role.USER, False), [question, answer], 0),
        ((Role.ASSISTANT, True), [question, answer], 1),
        ((Role.ASSISTANT, False), [*earlier, *later], 1),
    ]
    if not no_system_reason:
        probes.append(((Role.SYSTEM, False), [system, question, answer], 0))
    strip_rules = tuple(
        (key, _probe_strip_rule(render, messages, index, where)) for key, messages, index in probes
    )
    return TemplateBehaviour(
        stop.group(), closes, prefix, suffix[: stop.start()], strip_rules, no_system_reason
    )


def _probe_strip_rule(
    render: Callable[..., str], messages: list[tuple[Role, str]], index: int, where: str
) -> StripRule:
    """Return the white space that the template strips from one message, probed around a letter."""
    role, placeholder = messages[index]
    before, found, after = render(*messages, prompt=len(messages) == 1).partition(placeholder)
    if not found or placeholder in after:
        raise DataError(
            f"the chat template drops or repeats the {role.value}'s text",
            where=where,
            remedy="write a file for this family, see docs/new_family.md",
        )
    retained = []
    for white_space in WHITESPACE_PROBES:
        rendered = render(
            *messages[:index],
            (role, f"{white_space}x{white_space[::-1]}"),
            *messages[index + 1 :],
            prompt=len(messages) == 1,
        )
        if not rendered.startswith(before) or not rendered.endswith(after):
            raise DataError(
                f"the chat template changes with the white space around the {role.value}'s text",
                where=where,
                remedy="write a file for this family, see docs/new_family.md",
            )
        retained.append(rendered[len(before) : len(rendered) - len(after)])
    for left in STRIP_CHARS_CHOICES:
        for right in STRIP_CHARS_CHOICES:
            if retained == [
                StripRule(left, right)(f"{white_space}x{white_space[::-1]}")
                for white_space in WHITESPACE_PROBES
            ]:
                return StripRule(left, right)
    raise DataError(
        f"the chat template rewrites the {role.value}'s text "
        f"{f'{WHITESPACE_PROBES[0]}x'!r} to {retained[0]!r}",
        where=where,
        remedy="write a file for this family, see docs/new_family.md",
    )
