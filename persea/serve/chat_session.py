"""A conversation with one model, turn by turn: its switches, its history, and its words as they come."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from persea.chat.messages import Conversation, Effort, Finish, Message, Text, Thinking, ToolCall
from persea.chat.renderer import Voice
from persea.data.language_id import NAMES
from persea.errors import DataError
from persea.models.loading import find, open_model, open_voice
from persea.serve.streaming import Heard
from persea.teachers.engines import GREEDY
from persea.teachers.engines.transformers import LocalEngine
from persea.teachers.teacher import Teacher

HELP = {
    "/think": "on, off, low, medium or high: how long it thinks before it answers; alone: what it is now",
    "/lang": f"ask it to answer in a language ({', '.join(NAMES)}), or off",
    "/history": "what was said, thoughts left out",
    "/reset": "forget what was said",
    "/help": "these lines",
    "/quit": "end; Ctrl-D does too, and Ctrl-C stops an answer. A line that begins with a space is said even if a / follows"}


def open_speaker(reference: str) -> Teacher:
    """A model that can be talked to."""
    source, today = find(reference, "chat")
    voice = open_voice(source, "chat", today)
    model = open_model(source, voice, "chat")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    return Teacher(Path(reference).name, voice, LocalEngine(model, len(voice.vocabulary), 1), context=context)


@dataclass
class Talk:
    """The switches and the history of one conversation. Earlier thoughts stay in it; the model's template drops them."""

    voice: Voice
    effort: Effort
    language: str = ""
    messages: list[Message] = field(default_factory=list)

    @staticmethod
    def begin(voice: Voice) -> Talk:
        """Nothing said yet, at the least effort that the model knows."""
        return Talk(voice, next(e for e in Effort if e in voice.family.efforts))

    def asked(self, line: str) -> Conversation:
        """The whole conversation with this line as its question."""
        question = Conversation.ask(line, system=f"Answer in {NAMES[self.language]}." if self.language else "", effort=self.effort)
        return replace(question, messages=(*question.messages[:-1], *self.messages, question.messages[-1]))

    def obey(self, line: str) -> str:
        """What a command does, in a line or some."""
        name, _, word = line.strip().partition(" ")
        word = word.strip().lower()
        if name == "/help":
            return "\n".join(f"{command:9} {meaning}" for command, meaning in HELP.items())
        if name == "/reset":
            self.messages.clear()
            return "forgotten"
        if name == "/history":
            told = (f"{m.role}: {m.text}{_written(m.calls)}" for m in self.messages)
            return "\n".join(told) or "nothing was said yet"
        if name == "/think":
            return self.think(word)
        if name == "/lang":
            return self._speak(word)
        return f"no command {name}; /help lists them, and a line that begins with a space is said as it is"

    def think(self, word: str) -> str:
        """Set the effort by a word; nothing changes where the model does not know it."""
        known = [e for e in Effort if e in self.voice.family.efforts]
        wanted = {"on": known[-1], "off": Effort.NONE}.get(word) or next((e for e in Effort if e == word), None)
        if word and wanted is None:
            return f"/think {word}? on, off, {', '.join(e for e in Effort)}"
        if word and (wanted not in known or (word == "on" and wanted is Effort.NONE)):
            return f"this model knows no {word}; it knows {', '.join(known)}"
        self.effort = wanted or self.effort
        return f"thinking: {self.effort}"

    def _speak(self, word: str) -> str:
        code = next((c for c, name in NAMES.items() if word in (c, name.lower())), "")
        if word and word != "off" and not code:
            return f"/lang {word}? {', '.join(f'{c} {n}' for c, n in NAMES.items())}, or off"
        if word:
            self.language = code
        return f"answers are asked for in {NAMES[self.language]}" if self.language else "answers are in the language it chooses"


class Screen(Protocol):
    """Where a talk is shown."""

    def read(self) -> str | None:
        """The next line; None at the end."""
        ...

    def say(self, thought: str, text: str) -> None:
        """A piece of the answer."""
        ...

    def close(self, note: str) -> None:
        """The answer is over; note: what a person should know of it, or ""."""
        ...

    def note(self, text: str) -> None:
        """An answer to a command."""
        ...


def converse(speaker: Teacher, talk: Talk, screen: Screen, most: int) -> None:
    """Until the lines end or /quit. Ctrl-C ends an answer, not the talk; what cannot be said is told in a line and left out of the history."""
    while (line := screen.read()) is not None:
        if line.strip() == "/quit":
            return
        if line.startswith("/"):
            screen.note(talk.obey(line))
        elif line.strip():
            try:
                _turn(speaker, talk, screen, line.strip(), most)
            except KeyboardInterrupt:  # before the first word, or behind the last
                screen.close("stopped")
            except (DataError, UnicodeEncodeError) as error:  # half a surrogate pair has no bytes
                screen.note(str(error))


def _turn(speaker: Teacher, talk: Talk, screen: Screen, line: str, most: int) -> None:
    question = talk.asked(line)
    prompt = speaker.voice.prompt(question).ids_T
    room = min(most, speaker.context - len(prompt)) if speaker.context else most
    if room < 1:
        screen.note(f"the talk has {len(prompt):,} tokens, and the model positions for {speaker.context:,}: /reset forgets what was said")
        return
    if not isinstance(speaker.engine, LocalEngine):
        raise AssertionError("only weights that are here can be talked to")
    heard, stopped = Heard(speaker.voice, talk.effort, ()), False
    try:
        for token in speaker.engine.stream(prompt, speaker.voice.stop_ids, room, GREEDY):
            _show(screen, heard.add(token))
    except KeyboardInterrupt:
        stopped = True
    rest, calls, finish = heard.end()
    _show(screen, rest, calls)
    ended = {Finish.LENGTH: f"cut after {room:,} tokens", Finish.MALFORMED: "malformed: its markers do not fit"}
    why = "stopped" if stopped else ended.get(finish, "")
    keeps = bool(heard.told["content"]) or finish is Finish.STOP
    if keeps:
        thought, text = Thinking(heard.told["reasoning_content"]), Text(heard.told["content"])
        said = tuple(p for p in (thought, text) if p.text or (p is text and not calls))
        talk.messages += [question.messages[-1], question.answered(*said, *calls).messages[-1]]
    screen.close("; ".join(w for w in (why, "" if keeps else "this turn is forgotten") if w))


def _show(screen: Screen, more: Mapping[str, str], calls: Sequence[ToolCall] = ()) -> None:
    screen.say(more.get("reasoning_content", ""), more.get("content", "") + _written(calls))


def _written(calls: Sequence[ToolCall]) -> str:
    return "".join(f"{c.name}({c.text})" for c in calls)


def printable(text: str) -> str:
    """The text without what could steer a terminal: models say escape sequences too."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
