"""Find out how an unknown chat template behaves, by rendering probe conversations.

    switches       the template variables that change the prompt, by thinking effort
    thought form   the message key that the template writes as a thought, and the text around it
    prompt tail    text at the end of the prompt that a finished conversation lacks, such as an
                   opened <think>
    stop token     the control token behind an answer; if the template leaves the last answer open,
                   the token before the next question, provided that the model's configuration
                   declares it as end of text
    strip rules    the white space that the template strips, by the place of a message

Texts of the probes are placeholders; the text around them is the template's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from persea.chat.families.tool_format import tools_to_json_schema
from persea.chat.messages import Role, ThinkingEffort, Tool
from persea.chat.template import ChatTemplate
from persea.errors import DataError

# Arguments of str.strip that templates use; None = all white space.
STRIP_CHARS_CHOICES = ("", "\n", " ", " \n", None)
PLACEHOLDER_FORMAT = "\ue000{}\ue001"  # private-use characters, which no template treats specially
WHITESPACE_PROBES = ("\n \t\u3000", " \n\t\u3000")
STOP_REMEDY = "the model would never stop; write a file for this family, see docs/new_family.md"
REMEDY = "write a file for this family, see docs/new_family.md"
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
CONTENT_PARTS = "content parts"  # thoughts as {"type": "thinking"} in a list, as in Ministral 3
# Markers of thoughts that prompts open although the template writes no thought of a message:
# (regular expression of the opening marker, the closing marker).
THOUGHT_MARKERS = (
    (r"<((?:\w+:)?think(?:ing)?(?::\w+)?)>", r"</\1>"),
    (r"\[(THINK)\]", r"[/\1]"),
    (r"<\|START_(THINKING)\|>", r"<|END_\1|>"),
    (r"◁(think)▷", r"◁/\1▷"),
    (r"Here are my (reasoning) steps:", r"[BEGIN FINAL RESPONSE]"),
)
# Template variables that switch thinking on or off.
TOGGLES = ("enable_thinking", "thinking")
OTHER_OFF_SWITCHES: tuple[tuple[str, Any], ...] = (
    ("thinking_option", "off"),
    ("thinking_mode", "disabled"),
    ("skip_thinking", True),
    ("thinking_budget", 0),
)
EFFORT_VARIABLES = ("reasoning_effort", "reasoning_strength", "thinking_effort")
EFFORT_VALUES: dict[ThinkingEffort, tuple[str, ...]] = {
    ThinkingEffort.NONE: ("none", "no_think"),
    ThinkingEffort.LOW: ("low",),
    ThinkingEffort.MEDIUM: ("medium",),
    ThinkingEffort.HIGH: ("high", "xhigh", "max"),
}
EFFORT_FLAGS = ((ThinkingEffort.LOW, "low_effort"), (ThinkingEffort.MEDIUM, "medium_effort"))


@dataclass(frozen=True)
class Turn:
    """One message of a probe."""

    role: Role
    text: str
    thought: str = ""


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
class Place:
    """Where a text is in a conversation, as far as templates trim it differently.

    Attributes:
        role: Whose message.
        is_last: Whether it is the last message.
        after_system: Whether it is the first question, behind a system text.
        has_thought: Whether the message has a thought.
        is_thought: Whether the text is that thought.
    """

    role: Role
    is_last: bool
    after_system: bool = False
    has_thought: bool = False
    is_thought: bool = False


@dataclass(frozen=True)
class PromptTail:
    """How a finished conversation differs from its prompt at the start of the last answer.

    Attributes:
        lacking: Text at the end of the prompt that the conversation lacks.
        instead: Text that the conversation has there.
        inserted: Text behind the prompt that takes its place; "{thought}" is the thought.
    """

    lacking: str = ""
    instead: str = ""
    inserted: str = ""


@dataclass(frozen=True)
class LastAnswer:
    """The template text of the last answer at one effort.

    Attributes:
        tail: How the conversation differs from the prompt.
        before_thought: Text between the prompt and the thought; "" without a thought.
        between: Text between thought and answer; without a thought, between prompt and answer.
    """

    tail: PromptTail
    before_thought: str
    between: str


@dataclass(frozen=True)
class EffortBehaviour:
    """The template at one effort.

    Attributes:
        switches: Keyword arguments of the template.
        plain: The last answer without a thought; None if the template cannot write it.
        thinking: The last answer with a thought; None if the template writes no thought.
        opening: The complete marker that opens a thought, also where the prompt has it.
        is_opened: Whether the prompt ends inside a thought.
        keeps_earlier_thoughts: Whether the thoughts of earlier answers are written.
    """

    switches: tuple[tuple[str, Any], ...]
    plain: LastAnswer | None
    thinking: LastAnswer | None
    opening: str
    is_opened: bool
    keeps_earlier_thoughts: bool


@dataclass(frozen=True)
class TemplateBehaviour:
    """The results of probing a template.

    Attributes:
        efforts: Effort -> behaviour, in the order of `ThinkingEffort`.
        thought_key: Message key of a thought, or CONTENT_PARTS; "" if the template writes none.
        stop_token: Control token that ends an answer.
        closes_last_answer: Whether the template also writes it after the last answer.
        answer_suffix: Text between the answer and its stop token.
        strip_rules: (place, stripped white space).
        no_system_reason: Why the template takes no system text; "" if it does.
    """

    efforts: tuple[tuple[ThinkingEffort, EffortBehaviour], ...]
    thought_key: str
    stop_token: str
    closes_last_answer: bool
    answer_suffix: str
    strip_rules: tuple[tuple[Place, StripRule], ...]
    no_system_reason: str


def make_messages(
    turns: Collection[Turn], thought_key: str, has_text_parts: bool = False
) -> list[dict[str, Any]]:
    """Return messages as the template takes them.

    Args:
        turns: The messages.
        thought_key: Message key of thoughts, or CONTENT_PARTS.
        has_text_parts: Write each text as a list of parts, as templates for pictures take it.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        text: Any = [{"type": "text", "text": turn.text}] if has_text_parts else turn.text
        message: dict[str, Any] = {"role": turn.role.value, "content": text}
        if turn.thought and thought_key == CONTENT_PARTS:
            message["content"] = [
                {"type": "thinking", "thinking": turn.thought},
                {"type": "text", "text": turn.text},
            ]
        elif turn.thought and thought_key:
            message[thought_key] = turn.thought
        messages.append(message)
    return messages


def _placeholder(role: Role, number: int, with_thought: bool = False) -> Turn:
    thought = PLACEHOLDER_FORMAT.format(f"t{number}") if with_thought else ""
    return Turn(role, PLACEHOLDER_FORMAT.format(number), thought)


QUESTION, ANSWER, NEXT_QUESTION, SYSTEM, NEXT_ANSWER = (
    _placeholder(role, k)
    for k, role in enumerate((Role.USER, Role.ASSISTANT, Role.USER, Role.SYSTEM, Role.ASSISTANT))
)
THOUGHTFUL = _placeholder(Role.ASSISTANT, 1, with_thought=True)


@dataclass(frozen=True)
class TemplateProbe:
    """Renders probes of one template.

    Attributes:
        template: The compiled chat template.
        variables: Names that the template reads without defining them.
        literals: Texts in quotes in its source.
        control_pattern: Matches the tokenizer's control tokens.
        eos_tokens: Control tokens that the model's own configuration declares as end of text.
        where: The place for error messages.
        has_text_parts: Whether texts are lists of parts, as templates for pictures take them.
    """

    template: ChatTemplate
    variables: frozenset[str]
    literals: frozenset[str]
    control_pattern: re.Pattern[str]
    eos_tokens: frozenset[str]
    where: str
    has_text_parts: bool = False

    def render(
        self,
        *turns: Turn,
        prompt: bool = False,
        key: str = "",
        switches: tuple[tuple[str, Any], ...] = (),
    ) -> str:
        """Render turns. Raises DataError if the template refuses them."""
        return self.template(
            messages=make_messages(turns, key, self.has_text_parts),
            add_generation_prompt=prompt,
            **dict(switches),
        )

    def try_render(self, *turns: Turn, **options: Any) -> str | None:
        """Render turns; None if the template refuses them."""
        try:
            return self.render(*turns, **options)
        except DataError:
            return None

    def refuse(self, message: str, remedy: str = REMEDY) -> DataError:
        """Return the error that persea cannot follow the template."""
        return DataError(f"the chat template {message}", where=self.where, remedy=remedy)


def probe_template(probe: TemplateProbe, with_thinking: bool = True) -> TemplateBehaviour:
    """Find out how a template behaves by rendering probe conversations.

    Args:
        probe: The template.
        with_thinking: Look for thoughts and efforts; False where persea's own prelude has them.

    Raises:
        DataError: persea cannot follow the template.
    """
    _refuse_odd_template(probe)
    switches = dict(find_switches(probe)) if with_thinking else {ThinkingEffort.NONE: OFF_ONLY}
    highest = list(switches.values())[-1]
    if list(switches) == [ThinkingEffort.NONE]:
        highest = tuple((name, True) for name, _ in highest if name in TOGGLES)
    key = find_thought_key(probe, highest) if with_thinking else ""
    efforts = _probe_efforts(probe, key, switches)
    if list(efforts) == [ThinkingEffort.NONE] and with_thinking:
        only = probe_effort(probe, key, highest)
        if only.thinking is not None:  # there is no switch: it may always think
            efforts = {ThinkingEffort.HIGH: only}
    if all(b.thinking is None for b in efforts.values()) and ThinkingEffort.NONE in efforts:
        efforts = {ThinkingEffort.NONE: efforts[ThinkingEffort.NONE]}
    last = efforts[list(efforts)[-1]]
    suffix, stop, closes = find_stop(probe, last)
    efforts = {e: b for e, b in efforts.items() if not _ends_inside_thought(b, stop)}
    if not efforts:
        raise probe.refuse(f"writes {stop}, which ends an answer, between thought and answer")
    last = efforts[list(efforts)[-1]]
    no_system_reason = find_no_system_reason(probe, last.switches)
    rules = tuple(
        (place, _probe_strip_rule(probe, place, key, last))
        for place in _places(last, not no_system_reason)
    )
    return TemplateBehaviour(
        tuple((e, efforts[e]) for e in ThinkingEffort if e in efforts),
        key,
        stop,
        closes,
        suffix,
        rules,
        no_system_reason,
    )


def _refuse_odd_template(probe: TemplateProbe) -> None:
    """Raise DataError if the template renders no plain question."""
    try:
        probe.render(QUESTION, prompt=True)
    except DataError as error:
        tools = tools_to_json_schema([Tool("clock", "The time.", '{"type": "object"}')])
        if probe.try_render(QUESTION, prompt=True, switches=(("tools", tools),)) is None:
            raise
        raise probe.refuse(
            "needs tools: it is the model's variant for tools",
            "use the model's template for conversations without tools (its default)",
        ) from error


def _probe_efforts(
    probe: TemplateProbe, key: str, switches: dict[ThinkingEffort, tuple[tuple[str, Any], ...]]
) -> dict[ThinkingEffort, EffortBehaviour]:
    """Return the behaviour at each effort that persea can follow.

    Raises:
        DataError: persea can follow the template at no effort.
    """
    off = probe.render(QUESTION, prompt=True, switches=switches.get(ThinkingEffort.NONE, ()))
    efforts, refusal = {}, None
    for effort, given in switches.items():
        try:
            efforts[effort] = (
                probe_effort(probe, "", given)
                if effort is ThinkingEffort.NONE
                else probe_effort(probe, key, given, off)
            )
        except DataError as error:
            refusal = error
    if refusal is not None and not efforts:
        raise refusal
    return efforts


def _ends_inside_thought(behaviour: EffortBehaviour, stop: str) -> bool:
    """Return whether generation would stop at the end of the thought."""
    thinking = behaviour.thinking
    return thinking is not None and stop in (
        thinking.before_thought + thinking.between + thinking.tail.inserted
    )


# --- switches and thoughts ---

OFF_ONLY: tuple[tuple[str, Any], ...] = (("enable_thinking", False),)


def find_switches(
    probe: TemplateProbe,
) -> Iterator[tuple[ThinkingEffort, tuple[tuple[str, Any], ...]]]:
    """Yield (effort, switches) for each effort whose prompt is distinct, the highest last.

    A template without switches has the effort NONE.
    """
    toggles = [name for name in TOGGLES if name in probe.variables]
    on: dict[str, Any] = dict.fromkeys(toggles, True)
    level = next((name for name in EFFORT_VARIABLES if name in probe.variables), "")
    candidates: dict[ThinkingEffort, list[dict[str, Any]]] = {e: [] for e in ThinkingEffort}
    off = dict.fromkeys(toggles, False)
    off |= {n: v for n, v in OTHER_OFF_SWITCHES if n in probe.variables}
    if level:
        for effort, values in EFFORT_VALUES.items():
            base = off if effort is ThinkingEffort.NONE else on
            candidates[effort] += [
                base | {level: value}
                for value in values
                if effort is not ThinkingEffort.NONE or value in probe.literals
            ]
    for effort, name in EFFORT_FLAGS:
        if name in probe.variables:
            candidates[effort].append(on | {name: True})
    candidates[ThinkingEffort.NONE].append(off)
    candidates[ThinkingEffort.HIGH].append(on)
    found: dict[ThinkingEffort, tuple[tuple[str, Any], ...]] = {}
    seen: set[str] = set()
    order = (ThinkingEffort.HIGH, ThinkingEffort.NONE, ThinkingEffort.LOW, ThinkingEffort.MEDIUM)
    for effort in order:
        for given in candidates[effort]:
            text = _prompt(probe, given)
            if text is None or text in seen:
                continue
            if effort is ThinkingEffort.NONE and _open_marker(text):
                continue
            seen.add(text)
            found[effort] = tuple(given.items())
            break
    if len(found) == 1:
        (effort,) = found
        text = _prompt(probe, dict(found[effort]))
        if text and _open_marker(text):
            yield ThinkingEffort.HIGH, found[effort]
        else:
            yield ThinkingEffort.NONE, tuple(off.items()) or OFF_ONLY
        return
    yield from ((e, found[e]) for e in ThinkingEffort if e in found)


def _prompt(probe: TemplateProbe, switches: dict[str, Any]) -> str | None:
    return probe.try_render(QUESTION, prompt=True, switches=tuple(switches.items()))


def _open_marker(prompt: str) -> tuple[str, str] | None:
    """Return the known markers of the thought that the prompt has opened."""
    tail = _end(prompt).rstrip()
    for opening, closing in THOUGHT_MARKERS:
        found = re.search(f"{opening}$", tail)
        if found:
            return found.group(), found.expand(closing)
    return None


def _find_closed_thought(text: str) -> tuple[str, str, str] | None:
    """Return (text up to the opening marker, the thought, text from the closing marker)."""
    for opening, closing in THOUGHT_MARKERS:
        for found in re.finditer(opening, text):
            thought, closed, _ = text[found.end() :].partition(found.expand(closing))
            if closed:
                return text[: found.end()], thought, text[found.end() + len(thought) :]
    return None


def _find_empty_thought(text: str) -> tuple[str, str, str] | None:
    """Return `_find_closed_thought`, if the thought is empty."""
    found = _find_closed_thought(text)
    return found if found is not None and not found[1].strip() else None


def find_thought_key(probe: TemplateProbe, switches: tuple[tuple[str, Any], ...]) -> str:
    """Return the message key that the template writes as the last answer's thought."""
    for key in (*THOUGHT_KEYS, CONTENT_PARTS):
        text = probe.try_render(QUESTION, THOUGHTFUL, key=key, switches=switches)
        if text is not None and text.count(THOUGHTFUL.thought) == 1:
            before, _, after = text.partition(THOUGHTFUL.thought)
            # A list that the template prints as it is has quotes around its texts.
            if after.count(THOUGHTFUL.text) == 1 and before[-1:] not in ("'", '"'):
                return key
    return ""


def probe_effort(
    probe: TemplateProbe, key: str, switches: tuple[tuple[str, Any], ...], off_prompt: str = ""
) -> EffortBehaviour:
    """Return the behaviour of the template at one effort.

    Args:
        probe: The template.
        key: Message key of thoughts.
        switches: The switches of the effort.
        off_prompt: The prompt with thinking switched off; "" if there is no switch.

    Raises:
        DataError: An answer does not begin where the prompt ends.
    """
    prompt = probe.render(QUESTION, prompt=True, switches=switches)
    full = probe.render(QUESTION, ANSWER, switches=switches)
    if full.count(ANSWER.text) != 1 or prompt.count(QUESTION.text) != 1:
        raise probe.refuse("drops or repeats a question or an answer")
    pair, thinking = _open_marker(prompt), None
    if key:
        thoughtful = probe.render(QUESTION, THOUGHTFUL, key=key, switches=switches)
        thinking = _last_answer(probe, prompt, thoughtful, THOUGHTFUL, pair, "")
    if thinking is not None and not thinking.between.strip():
        thinking = None  # nothing ends the thought
    closing = thinking.between if thinking else _closing(prompt, pair)
    plain = _last_answer(probe, prompt, full, ANSWER, pair, closing)
    if not key and plain is not None:
        thinking = _inserted_thought(prompt, plain, pair, off_prompt)
    if plain is None and thinking is not None and not thinking.before_thought.strip():
        # The prompt has opened a thought: an answer without one begins with the thought's end.
        lacking, rest = _split_at_difference(probe, prompt, full, pair)
        instead = rest.partition(ANSWER.text)[0]
        between = thinking.between
        plain = LastAnswer(PromptTail(lacking, instead, between), "", between)
    if plain is None and thinking is None:
        raise probe.refuse("does not write an answer where its prompt ends")
    opening = ""
    if thinking is not None:
        opening = pair[0] if pair else thinking.before_thought
    return EffortBehaviour(
        switches,
        plain,
        thinking,
        opening,
        thinking is not None and not thinking.before_thought.strip(),
        bool(key) and _keeps_earlier_thoughts(probe, key, switches),
    )


def _closing(prompt: str, pair: tuple[str, str] | None) -> str:
    """Return the text that closes a thought which no conversation of the template shows."""
    if pair is None:
        return ""
    return f"\n{pair[1]}\n\n" if prompt.endswith("\n") else pair[1]


def _inserted_thought(
    prompt: str, plain: LastAnswer, pair: tuple[str, str] | None, off_prompt: str
) -> LastAnswer | None:
    """Return the last answer with a thought that the template itself never writes.

    Args:
        prompt: The prompt.
        plain: The last answer without a thought.
        pair: The known markers of the thought that the prompt has opened.
        off_prompt: The prompt with thinking switched off; "" if there is no switch.
    """
    if pair and plain.tail.inserted:  # the conversation lacks the opening
        close = _closing(prompt, pair)
        return LastAnswer(replace(plain.tail, inserted="{thought}" + close), "", close)
    if plain.tail.lacking:
        return None
    if pair and plain.between.lstrip().startswith(pair[1]):
        tail = PromptTail("", plain.between, "{thought}" + plain.between)
        return LastAnswer(tail, "", plain.between)
    # An empty thought is before each answer, or ends the prompt that switches thinking off.
    empty = _find_empty_thought(plain.between)
    if empty is None and not plain.between and not pair:
        empty = _find_empty_thought(_end(off_prompt).removeprefix(_end(prompt)))
    if empty is None:
        return None
    before, space, after = empty
    half = len(space) // 2
    before, after = before + space[:half], space[half:] + after
    return LastAnswer(PromptTail("", plain.between, before + "{thought}" + after), before, after)


def _end(prompt: str) -> str:
    """Return the text behind the question."""
    return prompt.rsplit("\ue001", 1)[-1]


def _split_at_difference(
    probe: TemplateProbe, prompt: str, full: str, pair: tuple[str, str] | None
) -> tuple[str, str]:
    """Return what prompt and conversation have behind their common start.

    The common start ends inside no control token and inside no marker.
    """
    shared = next(
        (k for k, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b),
        min(len(prompt), len(full)),
    )
    if shared == len(prompt):
        return "", full[shared:]
    starts = [m.start() for m in probe.control_pattern.finditer(prompt) if m.end() > shared]
    if pair and shared < prompt.rindex(pair[0]) + len(pair[0]):
        starts.append(prompt.rindex(pair[0]))
    if starts and min(starts) < shared:
        shared = min(starts)
    return prompt[shared:], full[shared:]


def _last_answer(
    probe: TemplateProbe,
    prompt: str,
    full: str,
    answer: Turn,
    pair: tuple[str, str] | None,
    closing: str,
) -> LastAnswer | None:
    """Return the template text of the last answer; None if persea cannot join it to the prompt."""
    lacking, rest = _split_at_difference(probe, prompt, full, pair)
    first = answer.thought or answer.text
    instead, found, behind = rest.partition(first)
    if not found or answer.text not in rest:
        return None
    between = behind.partition(answer.text)[0] if answer.thought else ""
    if not lacking:
        if not answer.thought:
            return LastAnswer(PromptTail(), "", instead)
        return LastAnswer(PromptTail(), instead, between)
    inserted = _joined(lacking, instead, bool(answer.thought), pair, closing)
    if inserted is None:
        return None
    tail = PromptTail(lacking, instead, inserted)
    if answer.thought:
        return LastAnswer(tail, inserted, between)
    return LastAnswer(tail, "", inserted)


def _joined(
    lacking: str, instead: str, has_thought: bool, pair: tuple[str, str] | None, closing: str
) -> str | None:
    """Return the text to insert between the prompt and what follows; None if there is none.

    Args:
        lacking: Text at the end of the prompt that the conversation lacks.
        instead: Text that the conversation has there.
        has_thought: Whether the thought follows, and not the answer.
        pair: The known markers of the thought that the prompt has opened.
        closing: Text that closes an opened thought.
    """
    if pair is not None and has_thought:
        return "" if instead.strip() in ("", pair[0]) else None
    if pair is not None:
        if instead.strip() in ("", pair[1]):
            return closing
        if pair[1] in instead:
            return instead
        return closing if closing.rstrip().endswith(instead.strip()) else closing + instead
    if not lacking.strip() and not instead:  # the conversation goes on behind the white space
        return ""
    closed = _find_closed_thought(lacking)
    if closed is None or has_thought:
        return None
    return "" if instead.strip() in closed[2] else instead


def _keeps_earlier_thoughts(
    probe: TemplateProbe, key: str, switches: tuple[tuple[str, Any], ...]
) -> bool:
    text = probe.try_render(
        QUESTION, THOUGHTFUL, NEXT_QUESTION, NEXT_ANSWER, key=key, switches=switches
    )
    return text is not None and text.count(THOUGHTFUL.thought) == 1


# --- stop token, system text and white space ---


def find_stop(probe: TemplateProbe, behaviour: EffortBehaviour) -> tuple[str, str, bool]:
    """Return (text before the stop token, the stop token, whether the last answer has it).

    Raises:
        DataError: Answers end with no control token.
    """
    switches = behaviour.switches
    suffix = probe.render(QUESTION, ANSWER, switches=switches).split(ANSWER.text)[1]
    found = list(probe.control_pattern.finditer(suffix))
    if found:
        stop = next((m for m in found if m.group() in probe.eos_tokens), found[0])
        return suffix[: stop.start()], stop.group(), True
    onward = probe.render(QUESTION, ANSWER, NEXT_QUESTION, switches=switches)
    suffix = onward.split(ANSWER.text)[1].split(NEXT_QUESTION.text)[0]
    next_token = probe.control_pattern.search(suffix)
    if next_token is None:
        raise probe.refuse("ends an answer with no control token", STOP_REMEDY)
    before, stop_token = suffix[: next_token.start()], next_token.group()
    if stop_token not in probe.eos_tokens or before.strip():
        raise probe.refuse(
            "ends an answer with no control token; the next question begins with "
            f"{before + stop_token}, which the model's configuration does not declare as eos",
            STOP_REMEDY,
        )
    return before, stop_token, False


def find_no_system_reason(probe: TemplateProbe, switches: tuple[tuple[str, Any], ...]) -> str:
    """Return why the template takes no system text; "" if it does."""
    try:
        text = probe.render(SYSTEM, QUESTION, ANSWER, switches=switches)
    except DataError as error:
        return error.message
    return "" if text.count(SYSTEM.text) == 1 else "it drops the text"


def _places(behaviour: EffortBehaviour, takes_system: bool) -> Iterator[Place]:
    for is_last in (True, False):
        yield Place(Role.USER, is_last)
        if takes_system:
            yield Place(Role.USER, is_last, after_system=True)
        if behaviour.plain is not None or not is_last:
            yield Place(Role.ASSISTANT, is_last)
        if behaviour.thinking is not None and (is_last or behaviour.keeps_earlier_thoughts):
            yield Place(Role.ASSISTANT, is_last, has_thought=True)
            yield Place(Role.ASSISTANT, is_last, has_thought=True, is_thought=True)
    if takes_system:
        yield Place(Role.SYSTEM, is_last=False)


def _probe_turns(place: Place) -> tuple[list[Turn], int]:
    """Return a probe conversation and the index of the message in question."""
    system = [SYSTEM] if place.after_system or place.role is Role.SYSTEM else []
    if place.role is not Role.ASSISTANT:
        turns = [*system, QUESTION] + ([] if place.is_last else [ANSWER])
        return turns, 0 if place.role is Role.SYSTEM else len(system)
    answer = THOUGHTFUL if place.has_thought else ANSWER
    return [QUESTION, answer, *([] if place.is_last else [NEXT_QUESTION, NEXT_ANSWER])], 1


def _probe_strip_rule(
    probe: TemplateProbe, place: Place, key: str, behaviour: EffortBehaviour
) -> StripRule:
    """Return the white space that the template strips from one text, probed around a letter."""
    turns, index = _probe_turns(place)
    if place.has_thought and not key:
        if place.is_thought:  # persea inserts the thought
            return NO_STRIP
        return _probe_strip_rule(probe, replace(place, has_thought=False), key, behaviour)

    def render(changed: Turn) -> str:
        return probe.render(
            *turns[:index],
            changed,
            *turns[index + 1 :],
            prompt=turns[-1].role is Role.USER,
            key=key,
            switches=behaviour.switches,
        )

    turn, name = turns[index], "thought" if place.is_thought else f"{place.role.value}'s text"
    placeholder = turn.thought if place.is_thought else turn.text
    before, found, after = render(turn).partition(placeholder)
    if not found or placeholder in after:
        raise probe.refuse(f"drops or repeats the {name}")
    retained = []
    for white_space in WHITESPACE_PROBES:
        text = f"{white_space}x{white_space[::-1]}"
        changed = replace(turn, thought=text) if place.is_thought else replace(turn, text=text)
        rendered = render(changed)
        if not rendered.startswith(before) or not rendered.endswith(after):
            raise probe.refuse(f"changes with the white space around the {name}")
        retained.append(rendered[len(before) : len(rendered) - len(after)])
    for left in STRIP_CHARS_CHOICES:
        for right in STRIP_CHARS_CHOICES:
            if retained == [
                StripRule(left, right)(f"{white_space}x{white_space[::-1]}")
                for white_space in WHITESPACE_PROBES
            ]:
                return StripRule(left, right)
    raise probe.refuse(f"rewrites the {name} {f'{WHITESPACE_PROBES[0]}x'!r} to {retained[0]!r}")
