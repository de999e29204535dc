"""Find out by rendering how an unknown chat template switches thinking and marks thoughts.

switches       the template variables that change the prompt, by thinking effort
thought form   the message key that the template writes as a thought, and the text around it
prompt tail    text at the end of the prompt that a finished conversation lacks, such as an
opened <think>
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from persea.chat.messages import ThinkingEffort
from persea.chat.template_probes import (
    ANSWER,
    CONTENT_PARTS,
    NEXT_ANSWER,
    NEXT_QUESTION,
    QUESTION,
    THOUGHTFUL,
    TemplateProbe,
    Turn,
)
from persea.errors import DataError

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
# Markers of thoughts that prompts open although the template writes no thought of a message:
# (regular expression of the opening marker, the closing marker).
THOUGHT_MARKERS = (
    (r"<((?:\w+:)?(?:think(?:ing)?|thought)(?::\w+)?)>", r"</\1>"),
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


def probe_efforts(
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


def ends_inside_thought(behaviour: EffortBehaviour, stop: str) -> bool:
    """Return whether generation would stop at the end of the thought."""
    thinking = behaviour.thinking
    return thinking is not None and stop in (
        thinking.before_thought + thinking.between + thinking.tail.inserted
    )


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
            if not _is_honoured(probe, effort, given, level, text):
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


def _is_honoured(
    probe: TemplateProbe, effort: ThinkingEffort, given: dict[str, Any], level: str, prompt: str
) -> bool:
    """Return whether a prompt has the effort that it was asked for.

    A template renders a value that it does not know as its default, which may be its highest. A
    default is taken for the effort only if the prompt names no other one.

    Args:
        probe: The template.
        effort: The effort.
        given: The switches of the prompt.
        level: The variable of the effort's value; "" if the template has none.
        prompt: The rendered prompt.
    """
    if effort is ThinkingEffort.NONE and _open_marker(prompt):
        return False
    is_default = not given and effort is ThinkingEffort.NONE
    if not level or not (level in given or is_default) or given.get(level) in probe.literals:
        return True
    named = {word.lower() for word in re.findall(r"\w+", prompt)}
    return given.get(level) in named or named.isdisjoint(
        other for e, values in EFFORT_VALUES.items() if e is not effort for other in values
    )


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
    if prompt[-1:].isspace():  # one token would cover the end of the prompt and an empty thought
        closing = closing.lstrip()
    plain = _last_answer(probe, prompt, full, ANSWER, pair, closing)
    if not key and plain is not None:
        thinking = _inserted_thought(prompt, plain, pair, off_prompt)
    if plain is None and thinking is not None and not thinking.before_thought.strip():
        # The prompt has opened a thought: an answer without one begins with the thought's end.
        lacking, rest = _split_at_difference(probe, prompt, full, pair)
        instead = rest.partition(ANSWER.text)[0]
        plain = LastAnswer(PromptTail(lacking, instead, closing), "", closing)
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
