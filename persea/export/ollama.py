"""Write an Ollama Modelfile with the student's chat template.

Ollama renders Go templates, not Jinja. The template is found by rendering conversations with the
student's own: what stands around each text becomes the Go template, and conversations of several
turns prove it.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from datetime import date

from persea.chat.messages import Conversation, Message, Role, Text
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError, RefusedError

SYSTEM, PROMPT, ANSWER = "Sy7stem", "Qu7estion", "An7swer"
LATER = "2"  # behind a text of a later turn
OTHER_REMEDY = "export with --to gguf and run it with llama.cpp, which renders Jinja (--jinja)"


@dataclass(frozen=True)
class TurnTemplate:
    """The texts around system prompt, question and answer.

    Attributes:
        begin: Before the first turn, such as the begin-of-text token.
        before_system: Before a system prompt.
        after_system: Between a system prompt and the question.
        before_prompt: Before a question without a system prompt.
        after_prompt: Between a question and its answer.
        after_last_prompt: After the question that is answered now.
        after_answer: After an answer.
        has_system: Whether the template has a place for a system prompt.
    """

    begin: str
    before_system: str
    after_system: str
    before_prompt: str
    after_prompt: str
    after_last_prompt: str
    after_answer: str
    has_system: bool

    def render(self, turns: list[tuple[str, str]], system: str = "") -> str:
        """Return the prompt as Ollama renders the template; the last answer is not written yet."""
        parts = [self.begin]
        for k, (prompt, answer) in enumerate(turns):
            is_first, is_last = k == 0, k + 1 == len(turns)
            if is_first and system:
                parts += [self.before_system, system, self.after_system]
            else:
                parts.append(self.before_prompt)
            parts.append(prompt)
            parts += (
                [self.after_last_prompt]
                if is_last
                else [self.after_prompt, answer, self.after_answer]
            )
        return "".join(parts)

    def to_go(self) -> str:
        """Return the template in Go's language."""
        before = _go(self.before_prompt)
        system = ""
        if self.has_system:  # as the first message; what follows it begins the first question too
            system = (
                '{{ if eq .Role "system" }}'
                f"{_go(self.before_system)}{{{{ .Content }}}}{_go(self.after_system)}"
                "{{ end }}"
            )
            before = f"{{{{ if not (and $.System (eq $i 1)) }}}}{before}{{{{ end }}}}"
        return (
            f"{_go(self.begin)}{{{{ range $i, $_ := .Messages }}}}{system}"
            f'{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}'
            "{{ if eq (len (slice $.Messages $i)) 1 }}"
            f"{_go(self.after_last_prompt)}{{{{ else }}}}{_go(self.after_prompt)}{{{{ end }}}}"
            "{{ end }}"
            f'{{{{ if eq .Role "assistant" }}}}{{{{ .Content }}}}{_go(self.after_answer)}'
            "{{ end }}{{ end }}"
        )


def _go(text: str) -> str:
    """Return a text as an action of Go's template language; "" for none."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def find_turn_template(renderer: ChatRenderer, bos: str = "") -> TurnTemplate:
    """Return the texts that a student's chat template puts around the texts of a conversation.

    Args:
        renderer: The student's chat renderer.
        bos: The begin-of-text token if the tokenizer adds it: the template then leaves it out.

    Raises:
        RefusedError: The template does more than put texts around texts.
    """
    one = _render(renderer, [(Role.USER, PROMPT)])
    two = _render(
        renderer,
        [(Role.USER, PROMPT), (Role.ASSISTANT, ANSWER), (Role.USER, PROMPT + LATER)],
    )
    try:
        begin, after_last_prompt = _split(one, PROMPT)
        _, rest = _split(two, PROMPT)
        after_prompt, rest = _split(rest, ANSWER)
        between, _ = _split(rest, PROMPT + LATER)
        # an answer and the next question: what begins the first question ends the text between
        before_prompt = _common_suffix(begin, between)
        found = TurnTemplate(
            begin[: len(begin) - len(before_prompt)].removeprefix(bos),
            "",
            "",
            before_prompt,
            after_prompt,
            after_last_prompt,
            between[: len(between) - len(before_prompt)],
            has_system=False,
        )
        found = _with_system(found, renderer, bos)
        _prove(found, renderer, bos)
    except ValueError as error:
        raise RefusedError(
            f"the student's chat template has no form in Ollama: {error}",
            where="chat_template.jinja",
            remedy=OTHER_REMEDY,
        ) from error
    return found


def _with_system(found: TurnTemplate, renderer: ChatRenderer, bos: str) -> TurnTemplate:
    try:
        text = _render(renderer, [(Role.SYSTEM, SYSTEM), (Role.USER, PROMPT)])
    except DataError:  # this template takes no system prompt
        return found
    before, rest = _split(text.removeprefix(bos), SYSTEM)
    between, _ = _split(rest, PROMPT)
    if not before.startswith(found.begin):
        raise ValueError("a system prompt changes how a text begins")
    return replace(
        found,
        before_system=before[len(found.begin) :],
        after_system=between,
        has_system=True,
    )


def _prove(found: TurnTemplate, renderer: ChatRenderer, bos: str) -> None:
    """Raise ValueError if the template renders a conversation otherwise than the student's own."""
    texts = ("Hello?", "two\nlines", '{"a": "b"}', "ü 🥑 ไทย")
    for system, num_turns in itertools.product(("", "Be brief."), (1, 2, 3)):
        if system and not found.has_system:
            continue
        turns = [(texts[k], texts[k + 1]) for k in range(num_turns)]
        messages = [(Role.SYSTEM, system)] if system else []
        for k, (prompt, answer) in enumerate(turns):
            messages.append((Role.USER, prompt))
            if k + 1 < num_turns:
                messages.append((Role.ASSISTANT, answer))
        if found.render(turns, system) != _render(renderer, messages).removeprefix(bos):
            raise ValueError(f"a conversation of {num_turns} turns is rendered otherwise")


def _render(renderer: ChatRenderer, messages: list[tuple[Role, str]]) -> str:
    conversation = Conversation(tuple(Message(role, (Text(text),)) for role, text in messages))
    inputs, kwargs = renderer.family.template_inputs(conversation)
    return renderer.template(
        inputs,
        add_generation_prompt=True,
        strftime_now=date.today().strftime,
        **kwargs,
    )


def _split(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError("a text is changed or left out")
    return before, after


def _common_suffix(a: str, b: str) -> str:
    size = 0
    while size < min(len(a), len(b)) and a[-1 - size] == b[-1 - size]:
        size += 1
    return a[len(a) - size :]


def modelfile(
    gguf_name: str, template: TurnTemplate, stop_tokens: tuple[str, ...], context: int, licence: str
) -> str:
    """Return the Modelfile.

    Args:
        gguf_name: The GGUF file beside it.
        template: The chat template.
        stop_tokens: Texts of the tokens that end an answer.
        context: Positions of the model.
        licence: Name of the student's licence; "" = none.
    """
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template.to_go()}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stop_tokens]
    lines.append(f"PARAMETER num_ctx {context}")
    # greedy, as the evaluation asks
    lines.append("PARAMETER temperature 0")
    lines += [f"LICENSE {json.dumps(licence, ensure_ascii=False)}"] if licence else []
    return "\n".join(lines) + "\n"
