"""A conversation with one model in the terminal: commands, history and streamed answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, cast

from persea.chat.messages import (
    Conversation,
    FinishReason,
    Message,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
)
from persea.chat.renderer import ChatRenderer
from persea.data.language_id import LANGUAGE_NAMES
from persea.errors import DataError
from persea.models.loading import load_model, load_renderer, resolve_model_source
from persea.serve.streaming import StreamingAnswerParser
from persea.teachers.engines import GREEDY
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher

CHAT_COMMAND_HELP = {
    "/think": "on, off, low, medium or high: thinking before the answer; alone: show it",
    "/lang": f"language of the answers ({', '.join(LANGUAGE_NAMES)}), or off",
    "/history": "the conversation, without thinking",
    "/reset": "start a new conversation",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer. Begin a line with a space to send a /",
}


def load_chat_model(model_ref: str) -> Teacher:
    """Load a model for a conversation: a model folder, hub id or run folder (then its student).

    Raises:
        DataError: There is no such model, or it has no chat template.
    """
    source, template_date = resolve_model_source(model_ref, "chat")
    renderer = load_renderer(source, "chat", template_date)
    if renderer.is_text:
        raise DataError(
            f"{model_ref} has no chat template, so it cannot chat",
            where="chat",
            remedy="add chat_template.jinja to its folder, or let it continue a text: persea "
            "serve, /v1/completions",
        )
    model = load_model(source, renderer, "chat")
    engine = TransformersEngine(model, len(renderer.vocabulary), batch_size=1)
    name = Path(model_ref).name
    return Teacher(name, renderer, engine, max_context_tokens=engine.max_context_tokens)


@dataclass
class ChatSession:
    """Settings and history of a conversation.

    Attributes:
        renderer: The model's chat renderer.
        effort: Thinking effort of the next answer.
        language: Language code that answers are requested in; "" leaves it to the model.
        messages: History, with thinking; the model's template drops earlier thinking.
    """

    renderer: ChatRenderer
    effort: ThinkingEffort
    language: str = ""
    messages: list[Message] = field(default_factory=list)

    @staticmethod
    def start(renderer: ChatRenderer) -> ChatSession:
        """Start an empty conversation at the model's lowest thinking effort."""
        return ChatSession(renderer, renderer.family.lowest_effort)

    def build_conversation(self, question_text: str) -> Conversation:
        """Return the whole conversation with a new question at its end."""
        question = Conversation.from_question(
            question_text,
            system=f"Answer in {LANGUAGE_NAMES[self.language]}." if self.language else "",
            effort=self.effort,
        )
        return replace(
            question, messages=(*question.messages[:-1], *self.messages, question.messages[-1])
        )

    def run_command(self, line: str) -> str:
        """Run a command, and return its output."""
        name, _, word = line.strip().partition(" ")
        word = word.strip().lower()
        if name == "/help":
            return "\n".join(
                f"{command:9} {meaning}" for command, meaning in CHAT_COMMAND_HELP.items()
            )
        if name == "/reset":
            self.messages.clear()
            return "new conversation"
        if name == "/history":
            lines = (f"{m.role}: {m.text}{_format_tool_calls(m.calls)}" for m in self.messages)
            return "\n".join(lines) or "no message yet"
        if name == "/think":
            return self.set_effort(word)
        if name == "/lang":
            return self._set_language(word)
        return f"no command {name}; /help lists them. Begin a line with a space to send a /"

    def set_effort(self, effort_name: str) -> str:
        """Set the thinking effort by name; an effort that the model lacks changes nothing."""
        supported = [e for e in ThinkingEffort if e in self.renderer.family.efforts]
        effort = {"on": supported[-1], "off": ThinkingEffort.NONE}.get(effort_name) or next(
            (e for e in ThinkingEffort if e == effort_name), None
        )
        if effort_name and effort is None:
            return f"/think {effort_name}? on, off, {', '.join(e for e in ThinkingEffort)}"
        cannot_think = effort_name == "on" and effort is ThinkingEffort.NONE
        if effort_name and (effort not in supported or cannot_think):
            return f"this model has no {effort_name}; it has {', '.join(supported)}"
        self.effort = effort or self.effort
        return f"thinking: {self.effort}"

    def _set_language(self, requested_language: str) -> str:
        code = next(
            (c for c, name in LANGUAGE_NAMES.items() if requested_language in (c, name.lower())), ""
        )
        if requested_language and requested_language != "off" and not code:
            names = ", ".join(f"{c} {n}" for c, n in LANGUAGE_NAMES.items())
            return f"/lang {requested_language}? {names}, or off"
        if requested_language:
            self.language = code
        return (
            f"the model is asked to answer in {LANGUAGE_NAMES[self.language]}"
            if self.language
            else "the model chooses the language of its answers"
        )


class ChatDisplay(Protocol):
    """Where a conversation is shown."""

    def read_line(self) -> str | None:
        """Return the next line; None at the end."""
        ...

    def write_delta(self, thinking: str, text: str) -> None:
        """Show a piece of the answer."""
        ...

    def end_answer(self, note: str) -> None:
        """End the answer; `note` describes anything unusual, or is ""."""
        ...

    def show_note(self, text: str) -> None:
        """Show the output of a command."""
        ...


def run_chat(
    chat_model: Teacher, session: ChatSession, display: ChatDisplay, max_new_tokens: int
) -> None:
    """Run a conversation until the input ends or /quit.

    Ctrl-C stops an answer, not the conversation. A message that cannot be rendered is reported, and
    not added to the history.

    Args:
        chat_model: The model; its engine must have a local model.
        session: Settings and history; changed.
        display: Input and output.
        max_new_tokens: Longest answer, in tokens.
    """
    while (line := display.read_line()) is not None:
        if line.strip() == "/quit":
            return
        if line.startswith("/"):
            display.show_note(session.run_command(line))
        elif line.strip():
            try:
                _run_turn(chat_model, session, display, line.strip(), max_new_tokens)
            except KeyboardInterrupt:  # before the first token, or after the last
                display.end_answer("stopped")
            except (DataError, UnicodeEncodeError) as error:  # half a surrogate pair has no bytes
                display.show_note(str(error))


def _run_turn(
    chat_model: Teacher,
    session: ChatSession,
    display: ChatDisplay,
    question_text: str,
    max_new_tokens: int,
) -> None:
    question = session.build_conversation(question_text)
    prompt = chat_model.renderer.render_prompt(question).ids_T
    room = (
        min(max_new_tokens, chat_model.max_context_tokens - len(prompt))
        if chat_model.max_context_tokens
        else max_new_tokens
    )
    if room < 1:
        display.show_note(
            f"the conversation has {len(prompt):,} tokens, the model has "
            f"{chat_model.max_context_tokens:,} positions: /reset starts a new one"
        )
        return
    assert chat_model.engine.capabilities.has_local_model
    engine = cast(TransformersEngine, chat_model.engine)
    parser, stopped = StreamingAnswerParser(chat_model.renderer, session.effort, ()), False
    try:
        for token in engine.stream(prompt, chat_model.renderer.stop_ids, room, GREEDY):
            _write_delta(display, parser.add_token(token))
    except KeyboardInterrupt:
        stopped = True
    rest, calls, finish = parser.finish()
    _write_delta(display, rest, calls)
    reasons = {
        FinishReason.LENGTH: f"cut after {room:,} tokens",
        FinishReason.MALFORMED: "malformed: its control tokens do not form an answer",
    }
    notes = ["stopped" if stopped else reasons.get(finish, "")]
    if parser.emitted["content"] or finish is FinishReason.STOP:
        thinking = Thinking(parser.emitted["reasoning_content"])
        text = Text(parser.emitted["content"])
        parts = tuple(p for p in (thinking, text) if p.text or (p is text and not calls))
        session.messages += [
            question.messages[-1],
            question.with_answer(*parts, *calls).messages[-1],
        ]
    else:
        notes.append("this turn is not in the history")
    display.end_answer("; ".join(note for note in notes if note))


def _write_delta(
    display: ChatDisplay, delta: Mapping[str, str], calls: Sequence[ToolCall] = ()
) -> None:
    display.write_delta(
        delta.get("reasoning_content", ""), delta.get("content", "") + _format_tool_calls(calls)
    )


def _format_tool_calls(calls: Sequence[ToolCall]) -> str:
    return "".join(f"{c.name}({c.text})" for c in calls)


def sanitize_for_terminal(text: str) -> str:
    """Replace control characters: models can generate terminal escape sequences."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text
    )
