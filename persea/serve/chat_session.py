"""A conversation with one model, turn by turn: its switches, its history, and its words as they come."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

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
    "/think": "on, off, low, medium or high: how long it thinks before it answers; alone: what it is now",
    "/lang": f"ask it to answer in a language ({', '.join(LANGUAGE_NAMES)}), or off",
    "/history": "what was said, thoughts left out",
    "/reset": "forget what was said",
    "/help": "these lines",
    "/quit": "end; Ctrl-D does too, and Ctrl-C stops an answer. A line that begins with a space is said even if a / follows",
}


def load_chat_model(model_ref: str) -> Teacher:
    """A model that can be talked to."""
    source, today = resolve_model_source(model_ref, "chat")
    voice = load_renderer(source, "chat", today)
    model = load_model(source, voice, "chat")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    return Teacher(
        Path(model_ref).name,
        voice,
        TransformersEngine(model, len(voice.vocabulary), 1),
        max_context_tokens=context,
    )


@dataclass
class ChatSession:
    """The switches and the history of one conversation. Earlier thoughts stay in it; the model's template drops them."""

    renderer: ChatRenderer
    effort: ThinkingEffort
    language: str = ""
    messages: list[Message] = field(default_factory=list)

    @staticmethod
    def start(renderer: ChatRenderer) -> ChatSession:
        """Nothing said yet, at the least effort that the model knows."""
        return ChatSession(
            renderer, next(e for e in ThinkingEffort if e in renderer.family.efforts)
        )

    def build_conversation(self, question_text: str) -> Conversation:
        """The whole conversation with this line as its question."""
        question = Conversation.from_question(
            question_text,
            system=f"Answer in {LANGUAGE_NAMES[self.language]}." if self.language else "",
            effort=self.effort,
        )
        return replace(
            question, messages=(*question.messages[:-1], *self.messages, question.messages[-1])
        )

    def run_command(self, line: str) -> str:
        """What a command does, in a line or some."""
        name, _, word = line.strip().partition(" ")
        word = word.strip().lower()
        if name == "/help":
            return "\n".join(
                f"{command:9} {meaning}" for command, meaning in CHAT_COMMAND_HELP.items()
            )
        if name == "/reset":
            self.messages.clear()
            return "forgotten"
        if name == "/history":
            told = (f"{m.role}: {m.text}{_format_tool_calls(m.calls)}" for m in self.messages)
            return "\n".join(told) or "nothing was said yet"
        if name == "/think":
            return self.set_effort(word)
        if name == "/lang":
            return self._set_language(word)
        return f"no command {name}; /help lists them, and a line that begins with a space is said as it is"

    def set_effort(self, effort_name: str) -> str:
        """Set the effort by a word; nothing changes where the model does not know it."""
        known = [e for e in ThinkingEffort if e in self.renderer.family.efforts]
        wanted = {"on": known[-1], "off": ThinkingEffort.NONE}.get(effort_name) or next(
            (e for e in ThinkingEffort if e == effort_name), None
        )
        if effort_name and wanted is None:
            return f"/think {effort_name}? on, off, {', '.join(e for e in ThinkingEffort)}"
        if effort_name and (
            wanted not in known or (effort_name == "on" and wanted is ThinkingEffort.NONE)
        ):
            return f"this model knows no {effort_name}; it knows {', '.join(known)}"
        self.effort = wanted or self.effort
        return f"thinking: {self.effort}"

    def _set_language(self, requested_language: str) -> str:
        code = next(
            (c for c, name in LANGUAGE_NAMES.items() if requested_language in (c, name.lower())), ""
        )
        if requested_language and requested_language != "off" and not code:
            return f"/lang {requested_language}? {', '.join(f'{c} {n}' for c, n in LANGUAGE_NAMES.items())}, or off"
        if requested_language:
            self.language = code
        return (
            f"answers are asked for in {LANGUAGE_NAMES[self.language]}"
            if self.language
            else "answers are in the language it chooses"
        )


class ChatDisplay(Protocol):
    """Where a talk is shown."""

    def read_line(self) -> str | None:
        """The next line; None at the end."""
        ...

    def write_delta(self, thinking: str, text: str) -> None:
        """A piece of the answer."""
        ...

    def end_answer(self, note: str) -> None:
        """The answer is over; note: what a person should know of it, or ""."""
        ...

    def show_note(self, text: str) -> None:
        """An answer to a command."""
        ...


def run_chat(
    chat_model: Teacher, session: ChatSession, display: ChatDisplay, max_new_tokens: int
) -> None:
    """Until the lines end or /quit. Ctrl-C ends an answer, not the talk; what cannot be said is told in a line and left out of the history."""
    while (line := display.read_line()) is not None:
        if line.strip() == "/quit":
            return
        if line.startswith("/"):
            display.show_note(session.run_command(line))
        elif line.strip():
            try:
                _run_turn(chat_model, session, display, line.strip(), max_new_tokens)
            except KeyboardInterrupt:  # before the first word, or behind the last
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
            f"the talk has {len(prompt):,} tokens, and the model positions for {chat_model.max_context_tokens:,}: /reset forgets what was said"
        )
        return
    if not isinstance(chat_model.engine, TransformersEngine):
        raise AssertionError("only weights that are here can be talked to")
    heard, stopped = StreamingAnswerParser(chat_model.renderer, session.effort, ()), False
    try:
        for token in chat_model.engine.stream(prompt, chat_model.renderer.stop_ids, room, GREEDY):
            _write_delta(display, heard.add_token(token))
    except KeyboardInterrupt:
        stopped = True
    rest, calls, finish = heard.finish()
    _write_delta(display, rest, calls)
    ended = {
        FinishReason.LENGTH: f"cut after {room:,} tokens",
        FinishReason.MALFORMED: "malformed: its markers do not fit",
    }
    why = "stopped" if stopped else ended.get(finish, "")
    keeps = bool(heard.emitted["content"]) or finish is FinishReason.STOP
    if keeps:
        thought, text = Thinking(heard.emitted["reasoning_content"]), Text(heard.emitted["content"])
        said = tuple(p for p in (thought, text) if p.text or (p is text and not calls))
        session.messages += [
            question.messages[-1],
            question.with_answer(*said, *calls).messages[-1],
        ]
    display.end_answer("; ".join(w for w in (why, "" if keeps else "this turn is forgotten") if w))


def _write_delta(
    display: ChatDisplay, delta: Mapping[str, str], calls: Sequence[ToolCall] = ()
) -> None:
    display.write_delta(
        delta.get("reasoning_content", ""), delta.get("content", "") + _format_tool_calls(calls)
    )


def _format_tool_calls(calls: Sequence[ToolCall]) -> str:
    return "".join(f"{c.name}({c.text})" for c in calls)


def sanitize_for_terminal(text: str) -> str:
    """The text without what could steer a terminal: models say escape sequences too."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text
    )
