"""Find out how an unknown chat template behaves, by rendering probe conversations.

thinking       switches, efforts and thoughts, see `persea.chat.thought_probing`
stop token     the control token behind an answer; if the template leaves the last answer open,
the token before the next question, provided that the model's configuration
declares it as end of text
strip rules    the white space that the template strips, by the place of a message
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from persea.chat.families.tool_format import tools_to_json_schema
from persea.chat.messages import Role, ThinkingEffort, Tool
from persea.chat.template import REFUSAL_REMEDY
from persea.chat.template_probes import (
    ANSWER,
    NEXT_ANSWER,
    NEXT_QUESTION,
    QUESTION,
    REMEDY,
    SYSTEM,
    THOUGHTFUL,
    TemplateProbe,
    Turn,
)
from persea.chat.thought_probing import (
    OFF_ONLY,
    TOGGLES,
    EffortBehaviour,
    ends_inside_thought,
    find_switches,
    find_thought_key,
    probe_effort,
    probe_efforts,
)
from persea.errors import DataError

# Arguments of str.strip that templates use; None = all white space.
STRIP_CHARS_CHOICES = ("", "\n", " ", " \n", None)
WHITESPACE_PROBES = ("\n \t\u3000", " \n\t\u3000")
STOP_REMEDY = f"the model would never stop; {REMEDY}"


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
    efforts = probe_efforts(probe, key, switches)
    if list(efforts) == [ThinkingEffort.NONE] and with_thinking:
        only = probe_effort(probe, key, highest)
        if only.thinking is not None:  # there is no switch: it may always think
            efforts = {ThinkingEffort.HIGH: only}
    if all(b.thinking is None for b in efforts.values()) and ThinkingEffort.NONE in efforts:
        efforts = {ThinkingEffort.NONE: efforts[ThinkingEffort.NONE]}
    last = efforts[list(efforts)[-1]]
    suffix, stop, closes = find_stop(probe, last)
    efforts = {e: b for e, b in efforts.items() if not ends_inside_thought(b, stop)}
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
            if error.remedy != REFUSAL_REMEDY:
                raise
            raise DataError(error.message, where=error.where, remedy=REMEDY) from error
        raise probe.refuse(
            "needs tools: it is the model's variant for tools",
            "use the model's template for conversations without tools (its default)",
        ) from error


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

    def render_text(text: str) -> str:
        changed = replace(turn, thought=text) if place.is_thought else replace(turn, text=text)
        return render(changed)

    placeholder = turn.thought if place.is_thought else turn.text
    return find_strip_rule(render_text, placeholder, name, probe.refuse)


def find_strip_rule(
    render: Callable[[str], str],
    placeholder: str,
    name: str,
    refuse: Callable[[str], DataError],
) -> StripRule:
    """Return the white space that a template strips from one text, probed around a letter.

    Args:
        render: Text -> the rendering with it.
        placeholder: A text that the template treats as any other.
        name: The text's name in error messages.
        refuse: Message -> the error that persea cannot follow the template.
    """
    before, found, after = render(placeholder).partition(placeholder)
    if not found or placeholder in after:
        raise refuse(f"drops or repeats the {name}")
    retained = []
    for white_space in WHITESPACE_PROBES:
        rendered = render(f"{white_space}x{white_space[::-1]}")
        if not rendered.startswith(before) or not rendered.endswith(after):
            raise refuse(f"changes with the white space around the {name}")
        retained.append(rendered[len(before) : len(rendered) - len(after)])
    for left in STRIP_CHARS_CHOICES:
        for right in STRIP_CHARS_CHOICES:
            if retained == [
                StripRule(left, right)(f"{white_space}x{white_space[::-1]}")
                for white_space in WHITESPACE_PROBES
            ]:
                return StripRule(left, right)
    raise refuse(f"rewrites the {name} {f'{WHITESPACE_PROBES[0]}x'!r} to {retained[0]!r}")
