"""Prove that a family fits a model: render and parse probing conversations with both.

A control token and a piece of template text only make a family a candidate: other models borrow
both. A family is taken if its stop token and its turn opening stand in a rendering of the model's
own template, and if persea renders every probing conversation to the ids of transformers'
`apply_chat_template` and parses the answer back. The results are kept in PERSEA_HOME.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

from persea import storage
from persea.chat.family import Family
from persea.chat.messages import (
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
)
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError, StorageError

# Raised with every change of the probing conversations or of what counts as equal.
PROBING_VERSION = 2
# A family that refuses more of the conversations that the template renders does not fit.
MAX_REFUSED = 1 / 3  # all conversations with tools
RIM = " \n"  # white space that templates trim, or not
PROBING_TOOL = Tool(
    "get_weather",
    "Weather of a city.",
    '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}',
)
PROBING_CALL = ToolCall("get_weather", '{"city": "ဘန်ကောက် 7"}')
EncodeText = Callable[[str], list[int]]


@dataclass(frozen=True)
class ProbingConversation:
    """One conversation of the proof.

    Attributes:
        conversation: It ends with an answer.
        is_core: Whether every chat template renders it: a family that refuses it does not fit.
    """

    conversation: Conversation
    is_core: bool = False


def probing_conversations(family: Family) -> Iterator[ProbingConversation]:
    """Yield the probing conversations of a family.

    All are yielded at the effort none and at the highest, two at each effort between. Texts have
    white space at their rims, are empty, or are not ASCII; there are one or two turns, with and
    without a system text, with thoughts where the family thinks, and with tools where it has tools.
    """
    for effort in family.efforts:
        thinks = effort is not ThinkingEffort.NONE
        if effort not in (family.efforts[-1], ThinkingEffort.NONE):
            yield next(_text_conversations(effort))
            yield next(_thinking_conversations(effort))
            continue
        yield from _text_conversations(effort)
        if thinks:
            yield from _thinking_conversations(effort)
        if family.is_tool_text_verbatim is not None:
            yield from _tool_conversations(effort, thinks)


def _turns(
    effort: ThinkingEffort, system: str, *turns: tuple[str, tuple[ContentPart, ...]]
) -> Conversation:
    messages = [Message(Role.SYSTEM, (Text(system),))] if system else []
    for question, answer in turns:
        messages.append(Message(Role.USER, (Text(question),)))
        messages.append(Message(Role.ASSISTANT, answer))
    return Conversation(tuple(messages), effort)


def _text_conversations(effort: ThinkingEffort) -> Iterator[ProbingConversation]:
    plain = ("2 + 3?", (Text("It is 5."),))
    rims = (f"{RIM}two  words{RIM}", (Text(f"{RIM}so it is{RIM}"),))
    # A model that is asked to think may have no form for an answer without a thought.
    is_core = effort is ThinkingEffort.NONE
    yield ProbingConversation(_turns(effort, "", plain), is_core)
    yield ProbingConversation(_turns(effort, "", plain, ("And 4?", (Text("Nine."),))), is_core)
    yield ProbingConversation(_turns(effort, "Be brief.", plain))
    yield ProbingConversation(_turns(effort, "", rims))
    yield ProbingConversation(_turns(effort, f"{RIM}Be brief.{RIM}", rims))
    yield ProbingConversation(_turns(effort, "Be brief.", rims, plain, rims))
    yield ProbingConversation(_turns(effort, "你好，世界", (" မင်္ဂလာပါ", (Text("👩‍👩‍👧 สวัสดี"),))))
    yield ProbingConversation(_turns(effort, "", ("x = [1]\n", (Text("<b>1</b>\n\n"),)), rims))
    yield ProbingConversation(_turns(effort, "", ("Say nothing.", (Text(""),))))
    yield ProbingConversation(_turns(effort, "", ("", (Text("What?"),)), plain))


def _thinking_conversations(effort: ThinkingEffort) -> Iterator[ProbingConversation]:
    plain = ("2 + 3?", (Thinking("Two and three."), Text("It is 5.")))
    rims = (f"{RIM}two  words", (Thinking(f"{RIM}你好 so{RIM}"), Text(f"{RIM}so it is{RIM}")))
    yield ProbingConversation(_turns(effort, "", plain), is_core=True)
    yield ProbingConversation(_turns(effort, "Be brief.", plain, rims))
    yield ProbingConversation(_turns(effort, "", rims, plain))
    yield ProbingConversation(_turns(effort, "", rims, rims, ("And 4?", (Text("Nine."),))))


def _tool_conversations(effort: ThinkingEffort, thinks: bool) -> Iterator[ProbingConversation]:
    thought: tuple[ContentPart, ...] = (Thinking("The tool knows."),) if thinks else ()
    question = Message(Role.USER, (Text("How is the weather?"),))
    call = Message(Role.ASSISTANT, (*thought, PROBING_CALL))
    result = Message(Role.TOOL, (ToolResult(PROBING_CALL.name, "rain, 28 °C"),))
    answer = Message(Role.ASSISTANT, (Text("It rains."),))
    after_thought = Message(Role.ASSISTANT, (*thought, Text("It rains.")))
    for messages in (
        (question, answer),
        (question, call),
        (question, call, result, answer),
        (question, call, result, after_thought),
        (question, call, result, after_thought, question, call),
    ):
        yield ProbingConversation(Conversation(messages, effort, (PROBING_TOOL,)))


@dataclass(frozen=True)
class ProofResult:
    """What the probing conversations showed.

    Attributes:
        difference: How the first wrong rendering differs; "" if every rendering is equal.
        num_refused: Conversations that persea refuses although the template renders them.
        num_probes: Conversations that the template renders.
    """

    difference: str
    num_refused: int = 0
    num_probes: int = 0

    @property
    def is_proven(self) -> bool:
        """Whether nothing differs and most conversations are rendered."""
        return not self.difference and self.num_refused <= MAX_REFUSED * self.num_probes


def prove_family(renderer: ChatRenderer, encode: EncodeText) -> ProofResult:
    """Compare the family's renderings with those of the model's own template.

    Args:
        renderer: The family, tokenizer and template.
        encode: Text with control tokens -> ids, as transformers' tokenizer encodes a rendering.
    """
    is_opened = not renderer.family.signature_token
    num_probes = num_refused = 0
    for probe in probing_conversations(renderer.family):
        try:
            _apply_template(renderer, probe.conversation, is_prompt=False)
        except DataError as error:
            if probe.is_core:
                return ProofResult(f"a plain conversation is refused: {error.message}")
            continue
        num_probes += 1
        try:
            own = _own_renderings(renderer, probe.conversation)
        except DataError as error:
            if probe.is_core:
                return ProofResult(f"persea refuses a plain conversation: {error.message}")
            num_refused += 1
            continue
        if not is_opened and not _has_signature(renderer.family, own.conversations[0]):
            return ProofResult(
                f"the template writes no {renderer.family.signature_token} or no "
                f"{renderer.family.stop_tokens[0]}"
            )
        is_opened = True
        try:
            difference = _find_difference(renderer, probe.conversation, own, encode)
        except DataError as error:
            num_refused += 1
            difference = f"persea refuses it: {error.message}" if probe.is_core else ""
        if difference:
            return ProofResult(difference, num_refused, num_probes)
    return ProofResult("", num_refused, num_probes)


@dataclass(frozen=True)
class OwnRenderings:
    """What the model's template makes of one conversation.

    Attributes:
        prompt: The prompt of the last answer.
        conversations: The whole as it is given; then the whole with the white space around the
            last thought and answer trimmed as the family trims it. A family may trim more there
            than the template does, because one token would cover the end of the prompt, too.
    """

    prompt: str
    conversations: tuple[str, ...]


def _own_renderings(renderer: ChatRenderer, conversation: Conversation) -> OwnRenderings:
    """Render the prompt and the whole without persea's trimming."""
    question = replace(conversation, messages=conversation.messages[:-1])
    answer = renderer.family.normalise(conversation).messages[-1]
    is_trimmed_only = all(
        own.text.strip() == part.text.strip()
        for own, part in zip(answer.parts, conversation.messages[-1].parts, strict=True)
        if not isinstance(part, ToolCall)
    )
    trimmed = replace(conversation, messages=(*question.messages, answer))
    prompt = _apply_template(renderer, question, is_prompt=True)
    bare = prompt.removesuffix(renderer.family.prompt_only_suffix)
    wholes = []
    for given in (conversation, trimmed) if is_trimmed_only else (conversation,):
        full = _apply_template(renderer, given, is_prompt=False)
        if not full.startswith(prompt) and full.startswith(bare):
            full = prompt + full[len(bare) :]
        wholes.append(full)
    return OwnRenderings(prompt, tuple(dict.fromkeys(wholes)))


def _apply_template(renderer: ChatRenderer, conversation: Conversation, is_prompt: bool) -> str:
    messages, kwargs = renderer.family.template_inputs(conversation)
    return renderer.template(
        messages,
        add_generation_prompt=is_prompt,
        strftime_now=renderer.template_date.strftime,
        **kwargs,
    )


def _has_signature(family: Family, text: str) -> bool:
    return family.signature_token in text and family.stop_tokens[0] in text


def _find_difference(
    renderer: ChatRenderer, conversation: Conversation, own: OwnRenderings, encode: EncodeText
) -> str:
    """Return how persea's rendering or parsing of one conversation differs; "" if equal.

    Raises:
        DataError: persea refuses the conversation.
    """
    retained = renderer.family.normalise(conversation)
    asked = renderer.render_prompt(replace(conversation, messages=conversation.messages[:-1]))
    tokens = renderer.render(conversation)
    ids = tokens.ids_T.tolist()
    if asked.ids_T.tolist() != encode(own.prompt):
        return _describe(renderer, own.prompt, asked.ids_T.tolist())
    if all(ids != encode(text) for text in own.conversations):
        return _describe(renderer, own.conversations[0], ids)
    # A template may drop an earlier thought once an answer follows: then the prompt is another.
    seen = renderer.render_prompt(replace(retained, messages=retained.messages[:-1]))
    if ids[: len(seen)] != seen.ids_T.tolist():
        return f"the ids of the prompt {own.prompt[-40:]!r} are no prefix of the conversation's ids"
    answer = tokens.ids_T[tokens.loss_mask_T].tolist()
    parts, finish = renderer.parse(answer, conversation.effort, conversation.tools)
    wanted = retained.messages[-1].parts
    # Control tokens and prefix spaces swallow white space at the rims of an answer.
    swallows = renderer.vocabulary.original is not None
    if finish is not FinishReason.STOP or not _are_equal(parts, wanted, swallows):
        return f"the answer {_decode(renderer, answer)!r} is parsed as {parts} ({finish})"
    return ""


def _describe(renderer: ChatRenderer, theirs: str, ids: list[int]) -> str:
    """Return where two renderings begin to differ."""
    ours = _decode(renderer, ids)
    if ours == theirs:
        return f"persea and transformers write {theirs[-60:]!r} with other tokens"
    at = next(
        (k for k, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
        min(len(theirs), len(ours)),
    )
    start = max(0, at - 30)
    return (
        f"behind {theirs[start:at]!r} transformers renders {theirs[at : at + 30]!r}, "
        f"persea {ours[at : at + 30]!r}"
    )


def _are_equal(
    parts: tuple[ContentPart, ...], wanted: tuple[ContentPart, ...], swallows_rims: bool
) -> bool:
    """Return whether two answers are equal; with `swallows_rims`, but for white space around."""
    found, expected = _by_kind(parts), _by_kind(wanted)
    if not swallows_rims:
        return found == expected
    return (
        found[0].strip() == expected[0].strip()
        and found[1].strip() == expected[1].strip()
        and found[2] == expected[2]
    )


def _by_kind(parts: tuple[ContentPart, ...]) -> tuple[str, str, tuple[ContentPart, ...]]:
    message = Message(Role.ASSISTANT, parts)
    return message.thinking, message.text, message.calls


def _decode(renderer: ChatRenderer, ids: list[int]) -> str:
    return "".join(
        p if isinstance(p, str) else p.decode(errors="replace")
        for p in renderer.vocabulary.decode_pieces(ids)
    )


def prove_family_once(renderer: ChatRenderer, encode: EncodeText) -> ProofResult:
    """Return `prove_family`, kept in PERSEA_HOME by the digest of template and tokenizer."""
    state = json.dumps(
        [
            PROBING_VERSION,
            version("persea"),
            version("transformers"),
            renderer.digest,
            renderer.family.has_hybrid_format,
        ]
    )
    name = storage.digest_bytes(state.encode())[:32]
    path = storage.persea_home() / "families" / f"{name}.json"
    with suppress(StorageError, DataError, TypeError):
        if path.is_file():
            return ProofResult(**storage.read_json(path))
    result = prove_family(renderer, encode)
    with suppress(StorageError):  # a cache that cannot be written costs time only
        storage.write_json(path, asdict(result))
    return result
