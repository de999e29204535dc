"""Tools of inferred families: how a template writes calls and results, found by rendering."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from persea.chat.call_grammar import CallGrammar
from persea.chat.call_probing import (
    BEFORE_CALLS,
    FIRST_TEXT,
    PROBE_TOOLS,
    RESULT,
    CallForm,
    CallUse,
    find_call_form,
    find_call_stop,
    find_grammar,
)
from persea.chat.families.generic import InferredFamily
from persea.chat.families.tool_format import (
    always_verbatim,
    tools_to_json_schema,
    verbatim_except_calls,
    verbatim_plain_results,
    verbatim_unless_escaped,
)
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
)
from persea.chat.template import ChatTemplate
from persea.chat.template_completion import INSERTED_THOUGHT_KEY, complete_last_answer
from persea.chat.template_probes import NEXT_ANSWER, QUESTION, THOUGHTFUL, Turn, make_messages
from persea.chat.template_probing import find_strip_rule
from persea.chat.thought_probing import EffortBehaviour
from persea.chat.tool_notation import find_notations
from persea.errors import DataError

CALL = ToolCall("alphatool", json.dumps({"firstkey": FIRST_TEXT}))
# JSON escapes the quotes, and nothing else.
ODD_CALL = ToolCall("alphatool", json.dumps({"firstkey": 'é "x"'}, ensure_ascii=False))
MIN_MARKER_CHARS = 8
ODD_RESULT = 'ö "y"'
TOOLS = tools_to_json_schema(PROBE_TOOLS)


def infer_tools(
    family: InferredFamily, template: ChatTemplate, template_text: str, response_template: object
) -> Iterator[InferredFamily]:
    """Yield the family with each notation of calls that it may have, the likeliest first.

    Args:
        family: The family without tools.
        template: The model's chat template as it is.
        template_text: Its source.
        response_template: How transformers parses the model's answers, if its tokenizer states it.
    """
    if family.has_text_parts or "tools" not in template_text or "tool_calls" not in template_text:
        return
    probe = _CallProbe.of(family, template)
    form = find_call_form(probe.render)
    stop, is_written = probe.find_stop(form) if form is not None else ("", False)
    if form is None or not stop:
        return
    probe = replace(probe, stop=stop)
    use = CallUse(form, stop, is_verbatim=probe.find_verbatim(form))
    with suppress(DataError):
        rule = find_strip_rule(
            lambda text: probe.render(form.message([CALL], text)),
            BEFORE_CALLS,
            "text",
            probe.refuse,
        )
        use = replace(use, text_rule=rule)
    end = "" if is_written else stop
    completed = complete_last_answer(template, family.behaviour, family.where, end)
    known = replace(family, template=completed, calls=use)
    found: list[InferredFamily] = []
    for notation in find_notations(response_template, template_text):
        found.append(replace(known, notation=notation))
    grammar = find_grammar(probe.render, form)
    if grammar is not None and probe.is_marked(grammar):
        use = replace(use, thought_end=probe.find_thought_end(form, grammar.head))
        use = use if grammar.text_head is not None else replace(use, text_rule=None)
        # Only JSON is read by the common notation where models write it in another order.
        place = len(found) if grammar.empty is None else 0
        found.insert(place, replace(known, notation=grammar, calls=use))
    yield from filter(probe.can_call, found)


@dataclass(frozen=True)
class _CallProbe:
    """Renders answers with calls at one effort.

    Attributes:
        family: The family without tools.
        template: The model's chat template as it is.
        behaviour: The template at the effort.
        stop: The control token that ends an answer of calls.
    """

    family: InferredFamily
    template: ChatTemplate
    behaviour: EffortBehaviour
    stop: str = ""

    @staticmethod
    def of(family: InferredFamily, template: ChatTemplate) -> _CallProbe:
        """Return the probe at the lowest effort that has an answer without a thought."""
        behaviours = [b for _, b in family.behaviour.efforts]
        plain = [b for b in behaviours if b.plain is not None]
        open_calls = complete_last_answer(template, family.behaviour, family.where, "")
        family = replace(family, template=open_calls)
        return _CallProbe(family, template, (plain or behaviours)[0])

    def refuse(self, message: str) -> DataError:
        """Return the error that persea cannot follow the template."""
        return DataError(f"the chat template {message}", where=self.family.where)

    def _apply(self, messages: list[dict[str, Any]], is_prompt: bool) -> str:
        switches = dict(self.behaviour.switches)
        return self.family.template(
            messages, add_generation_prompt=is_prompt, tools=TOOLS, **switches
        )

    def render(self, message: dict[str, Any]) -> str:
        """Return what the template writes behind the prompt, up to the token that ends it.

        The text of a plain answer before its first word is left out, and so is a thought.

        Raises:
            DataError: The template refuses the message, or it is not written behind the prompt.
        """
        plain, thinking = self.behaviour.plain, self.behaviour.thinking
        if plain is None and thinking is not None:
            answer = self._render_thoughtful(message).partition(THOUGHTFUL.thought)[2]
            return self._until_stop(answer.removeprefix(thinking.between))
        between = plain.between if plain is not None else ""
        return self._until_stop(self._render_answer(message).removeprefix(between))

    def _render_answer(self, message: dict[str, Any]) -> str:
        (question,) = make_messages([QUESTION], "")
        prompt = self._apply([question], is_prompt=True)
        text = self._apply([question, message], is_prompt=False)
        if not text.startswith(prompt):
            raise self.refuse("does not write calls where its prompt ends")
        return text[len(prompt) :]

    def _render_thoughtful(self, message: dict[str, Any]) -> str:
        key = self.family.behaviour.thought_key or INSERTED_THOUGHT_KEY
        turn = Turn(Role.ASSISTANT, message["content"] or "", THOUGHTFUL.thought)
        (given,) = make_messages([turn], key)
        has_list = isinstance(given["content"], list)
        own = given if has_list else {k: v for k, v in given.items() if k not in message}
        return self._render_answer(message | own)

    def _until_stop(self, answer: str) -> str:
        if not self.stop:
            return answer
        return answer.partition(self.stop)[0]

    def find_stop(self, form: CallForm) -> tuple[str, bool]:
        """Return (the control token that ends calls; "" for none, whether the template writes it).

        A template that leaves the last answer open writes the token in front of the result.
        """
        stops = frozenset((self.family.behaviour.stop_token, *self.family.eos_tokens))
        last = self.render(form.message([CALL], "")).rpartition(FIRST_TEXT)[2]
        between = self._conversation(form, CALL, RESULT).partition(RESULT)[0]
        for text in (last, between.rpartition(FIRST_TEXT)[2]):
            stop = find_call_stop(text, stops, self.family.control_pattern)
            if stop:
                return stop, text is last
        return "", False

    def is_marked(self, grammar: CallGrammar) -> bool:
        """Return whether plain answers seldom look like calls.

        Calls begin with a control token or a long text, or a control token is behind the name.
        """
        pattern, head = self.family.control_pattern, grammar.head_marker
        behind_name = grammar.first_key or grammar.forms[0].middle
        return bool(head) and (
            len(head) >= MIN_MARKER_CHARS
            or pattern.search(head) is not None
            or pattern.match(behind_name) is not None
        )

    def find_thought_end(self, form: CallForm, head: str) -> str:
        """Return the text between a thought and the head of the calls; "" if there is none."""
        behaviour = self.family.behaviour.efforts[-1][1]
        if behaviour.thinking is None:
            return ""
        try:
            text = replace(self, behaviour=behaviour)._render_thoughtful(form.message([CALL], ""))
        except DataError:
            return ""
        between = text.partition(THOUGHTFUL.thought)[2].partition(CALL.name)[0]
        head = head.lstrip()
        return between.removesuffix(head) if between.endswith(head) else ""

    def can_call(self, family: InferredFamily) -> bool:
        """Return whether the family writes a call as an answer and parses it back."""
        effort = next(
            e for e, b in family.behaviour.efforts if b.switches == self.behaviour.switches
        )
        thought = (Thinking("So."),) if self.behaviour.plain is None else ()
        messages = (
            Message(Role.USER, (Text("How?"),)),
            Message(Role.ASSISTANT, (*thought, CALL)),
        )
        try:
            family.normalise(Conversation(messages, effort, PROBE_TOOLS))
        except DataError:
            return False
        return True

    def _conversation(self, form: CallForm, call: ToolCall, result: str) -> str:
        """Render question, call, result and answer; "" if the template refuses them."""
        question, answer = make_messages([QUESTION, NEXT_ANSWER], "")
        results = form.results(
            Message(Role.TOOL, (ToolResult(call.name, result),)), [(call.name, 0)]
        )
        try:
            return self.template(
                [question, form.message([call], ""), *results, answer],
                add_generation_prompt=False,
                tools=TOOLS,
                **dict(self.behaviour.switches),
            )
        except DataError:
            return ""

    def find_verbatim(self, form: CallForm) -> Callable[[ContentPart], bool]:
        """Return which arguments and results the template writes unchanged."""
        text = self._conversation(form, ODD_CALL, ODD_RESULT)
        arguments = text.replace(ODD_CALL.arguments, "")
        if ODD_RESULT in arguments:
            return always_verbatim if arguments != text else verbatim_except_calls
        return verbatim_unless_escaped if arguments != text else verbatim_plain_results
