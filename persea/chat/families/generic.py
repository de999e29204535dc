"""Any model persea does not know, by its own chat template alone: no thinking, no tools.

What a family's file says of a known family is found here by probing: conversations whose texts are stand-ins are
rendered, and what stands around the stand-ins is read off.

    stop     the control token behind an answer; where the template leaves the last answer open, the one it writes
             before the next question, if the model calls that token an end
    trims    what the template cuts off a text's rims, per role, asked with white space around a letter
    lead     what the template writes between its prompt and the answer; the model says it, `parse` takes it off

Where the probes contradict each other the model is refused. What they cannot tell is said in `Family.unknown`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from persea.chat.family import DecodedPieces, Family, edit_texts, pieces_to_text
from persea.chat.messages import ContentPart, Conversation, Role, Text, Thinking, ThinkingEffort
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary

GENERIC_FAMILY_NAME = "generic"
STRIP_CHARS_CHOICES = (
    "",
    "\n",
    " ",
    " \n",
    None,
)  # what a rim loses: str.strip's argument, None = all white space
PLACEHOLDER_FORMAT = "\ue000{}\ue001"  # a text no template looks into
WHITESPACE_PROBES = ("\n \t\u3000", " \n\t\u3000")
NO_THINKING_KWARGS = {"enable_thinking": False}

ChatTemplate = Callable[..., str]


@dataclass(frozen=True)
class StripRule:
    """What the template cuts off a text: `str.strip` arguments of its two rims."""

    left: str | None
    right: str | None

    def __call__(self, text: str) -> str:
        return text.lstrip(self.left).rstrip(self.right)


NO_STRIP = StripRule("", "")


@dataclass(frozen=True)
class TemplateBehaviour:
    """What probing a template found.

    stop    control token that ends an answer
    closed  whether the template writes it behind the last answer too
    lead    text between the prompt and the answer
    tail    text between the answer and its stop
    trims   (role, last message of the conversation) -> what is cut off
    system  "" or why it takes no system text
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
    """The family of one model, and its template with the last answer closed.

    ends  control tokens that the model's own configuration calls an end (eos)
    Raises DataError for a template whose prompt is no prefix of its conversations, that ends no answer, or that
    rewrites texts.
    """
    habits = probe_template(vocabulary, template, eos_tokens, where)
    trims = dict(habits.strip_rules)

    def normalise(conversation: Conversation) -> Conversation:
        """Thoughts dropped; texts trimmed as the template was seen to."""
        last = len(conversation.messages) - 1
        return edit_texts(
            conversation,
            lambda k, m, p: (
                "" if isinstance(p, Thinking) else trims.get((m.role, k == last), NO_STRIP)(p.text)
            ),
        )

    def inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Messages as every template takes them; thinking switched off where the template has the usual switch."""
        if habits.no_system_reason and any(m.role is Role.SYSTEM for m in conversation.messages):
            raise DataError(
                f"the chat template takes no system text: {habits.no_system_reason}",
                where=where,
                remedy="put it into the question, or leave the conversation out",
            )
        return [{"role": m.role.value, "content": m.text} for m in conversation.messages], dict(
            NO_THINKING_KWARGS
        )

    def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
        """One text, no control token inside, without what the template itself writes around an answer."""
        text = pieces_to_text(pieces)
        if text is None:
            return None
        return (
            Text(
                trims[Role.ASSISTANT, True](
                    text.removeprefix(habits.answer_prefix).removesuffix(habits.answer_suffix)
                )
            ),
        )

    stops = (
        habits.stop_token,
        *sorted(set(eos_tokens) & vocabulary.control_token_ids.keys() - {habits.stop_token}),
    )
    family = Family(
        name=GENERIC_FAMILY_NAME,
        licence="not known",
        signature_token="",
        efforts=(ThinkingEffort.NONE,),
        stop_tokens=stops,
        normalise=normalise,
        template_inputs=inputs,
        parse=parse,
        limitations=describe_limitations(habits, eos_tokens),
    )
    return family, template if habits.closes_last_answer else close_last_answer(
        template, habits.stop_token
    )


def close_last_answer(template: ChatTemplate, stop_token: str) -> ChatTemplate:
    """A template that leaves the last answer open, with the stop token behind that answer."""

    def close(messages: list[dict[str, Any]], add_generation_prompt: bool, **switches: Any) -> str:
        text = template(messages=messages, add_generation_prompt=add_generation_prompt, **switches)
        answered = bool(messages) and messages[-1]["role"] == Role.ASSISTANT.value
        return text + stop_token if answered and not add_generation_prompt else text

    return close


def describe_limitations(behaviour: TemplateBehaviour, eos_tokens: Collection[str]) -> str:
    """What is known of such a model and what is not, in plain words."""
    words = [
        "persea does not know this family: its own chat template alone says how it speaks. No thinking and no tools; "
        "whether it can do either is not known",
        f"an answer ends with {behaviour.stop_token}"
        + (
            ""
            if behaviour.closes_last_answer
            else ", which the template writes only before the next question"
        ),
    ]
    if behaviour.stop_token not in eos_tokens:
        words.append(
            f"its configuration ends at {', '.join(sorted(eos_tokens)) or 'no token'} instead; persea stops at either"
        )
    if behaviour.no_system_reason:
        words.append(f"it takes no system text ({behaviour.no_system_reason})")
    return "; ".join(words) + "."


def probe_template(
    vocabulary: Vocabulary, template: ChatTemplate, eos_tokens: Collection[str], where: str
) -> TemplateBehaviour:
    """Ask the template by rendering."""

    def said(*texts: tuple[Role, str], prompt: bool = False) -> str:
        return template(
            messages=[{"role": r.value, "content": t} for r, t in texts],
            add_generation_prompt=prompt,
            **NO_THINKING_KWARGS,
        )

    question, answer, again = (
        (r, PLACEHOLDER_FORMAT.format(k))
        for k, r in enumerate((Role.USER, Role.ASSISTANT, Role.USER))
    )
    before, whole = said(question, prompt=True), said(question, answer)
    if (
        not whole.startswith(before)
        or whole.count(answer[1]) != 1
        or before.count(question[1]) != 1
    ):
        raise DataError(
            "the chat template does not write an answer where its prompt ends",
            where=where,
            remedy="persea must know this family to teach with it; see docs/new_family.md",
        )
    lead, behind = whole[len(before) :].split(answer[1])
    controls = re.compile(
        "|".join(map(re.escape, sorted(vocabulary.control_token_ids, key=len, reverse=True)))
        or r"(?!)"
    )
    if controls.search(lead):
        raise DataError(
            f"the chat template writes {lead!r} between its prompt and the answer",
            where=where,
            remedy="persea must know this family's thinking; see docs/new_family.md",
        )
    found, closed = controls.search(behind), True
    if found is None:
        behind, closed = said(question, answer, again).split(answer[1])[1].split(again[1])[0], False
        found = controls.search(behind)
        if found is None or found.group() not in eos_tokens or behind[: found.start()]:
            raise DataError(
                "the chat template ends an answer with no control token"
                + (
                    f"; the next question begins with {found.group()}, which the model does not call an end (eos)"
                    if found
                    else ""
                ),
                where=where,
                remedy="nothing would tell the model to stop; see docs/new_family.md",
            )
    system, why = (Role.SYSTEM, PLACEHOLDER_FORMAT.format(3)), ""
    try:
        if said(system, question, answer).count(system[1]) != 1:
            why = "it leaves the text out"
    except DataError as error:
        why = error.message
    earlier, later = (question, answer), (again, (Role.ASSISTANT, PLACEHOLDER_FORMAT.format(4)))
    places: list[tuple[tuple[Role, bool], list[tuple[Role, str]], int]] = [
        ((Role.USER, True), [question], 0),
        ((Role.USER, False), [question, answer], 0),
        ((Role.ASSISTANT, True), [question, answer], 1),
        ((Role.ASSISTANT, False), [*earlier, *later], 1),
    ]
    if not why:
        places.append(((Role.SYSTEM, False), [system, question, answer], 0))
    trims = tuple((key, _probe_strip_rule(said, talk, at, where)) for key, talk, at in places)
    return TemplateBehaviour(found.group(), closed, lead, behind[: found.start()], trims, why)


def _probe_strip_rule(
    render: Callable[..., str], messages: list[tuple[Role, str]], index: int, where: str
) -> StripRule:
    """What the template cuts off the text of one message, asked with white space around a letter."""
    role, word = messages[index]
    head, found, foot = render(*messages, prompt=len(messages) == 1).partition(word)
    if not found or word in foot:
        raise DataError(
            f"the chat template leaves out or repeats the {role.value}'s text",
            where=where,
            remedy="persea must know this family; see docs/new_family.md",
        )
    kept = []
    for rim in WHITESPACE_PROBES:
        asked = render(
            *messages[:index],
            (role, f"{rim}x{rim[::-1]}"),
            *messages[index + 1 :],
            prompt=len(messages) == 1,
        )
        if not asked.startswith(head) or not asked.endswith(foot):
            raise DataError(
                f"the chat template changes with the white space around the {role.value}'s text",
                where=where,
                remedy="persea must know this family; see docs/new_family.md",
            )
        kept.append(asked[len(head) : len(asked) - len(foot)])
    for left in STRIP_CHARS_CHOICES:
        for right in STRIP_CHARS_CHOICES:
            if kept == [StripRule(left, right)(f"{rim}x{rim[::-1]}") for rim in WHITESPACE_PROBES]:
                return StripRule(left, right)
    raise DataError(
        f"the chat template rewrites the {role.value}'s text {f'{WHITESPACE_PROBES[0]}x'!r} to {kept[0]!r}",
        where=where,
        remedy="persea must know this family; see docs/new_family.md",
    )
