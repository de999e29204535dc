"""A conversation with one model, turn by turn: its switches, its history, and its words as they come."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import yaml

from persea.chat import PINNED_DATE, Conversation, Effort, Finish, Message, Part, Pieces, Text, Thinking
from persea.engines.local import LocalEngine
from persea.errors import DataError
from persea.models import Source, open_model, open_voice
from persea.teacher import Teacher
from persea.voice import Voice

LANGUAGES = {"en": "English", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "vi": "Vietnamese", "id": "Indonesian", "th": "Thai", "ms": "Malay",
             "tl": "Filipino", "my": "Burmese", "km": "Khmer", "lo": "Lao"}
HELP = {
    "/think": "on, off, low, medium or high: how long it thinks before it answers; alone: what it is now",
    "/lang": f"ask it to answer in a language ({', '.join(LANGUAGES)}), or off",
    "/history": "what was said, thoughts left out",
    "/reset": "forget what was said",
    "/help": "these lines",
    "/quit": "end; Ctrl-D does too, and Ctrl-C stops an answer. A line that begins with a space is said even if a / follows"}
# What could end a thought that has begun, so that it can be shown before its end is said: Qwen's tokens, the same as text, harmony's channel
ENDS: tuple[Pieces, ...] = ((), ("</think>",), (b"</think>",), ("<|end|>", "<|start|>", b"assistant", "<|channel|>", b"final", "<|message|>"))


def find(reference: str) -> tuple[Source, date]:
    """The student of a run folder, or a model, and the date its template tells. DataError where there is neither."""
    folder = Path(reference).expanduser()
    if not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
        raise DataError(f"no run and no model {reference!r}", where="chat", remedy="give a run folder, a model folder or a hub id")
    if not (folder / "recipe.yaml").is_file():
        return Source(reference), PINNED_DATE
    student = folder / "train" / "student"
    if not student.is_dir():
        raise DataError("this run has no student yet", where=str(folder), remedy="train it first: persea run with the same recipe and --out")
    written = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    told = written.get("today", PINNED_DATE)
    return Source(str(student), family=written["student"].get("family", "")), told if isinstance(told, date) else date.fromisoformat(told)


def open_speaker(reference: str) -> Teacher:
    """A model that can be talked to."""
    source, today = find(reference)
    voice = open_voice(source, "chat", today)
    model = open_model(source, voice, "chat")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    return Teacher(Path(reference).name, voice, LocalEngine(model, len(voice.vocabulary), 1), context=context)


def steps(engine: LocalEngine, prompt: npt.NDArray[np.int32], stop_ids: Sequence[int], most: int) -> Iterator[int]:
    """What follows one prompt, the likeliest token each time, as `LocalEngine.generate` would say it, but token by token."""
    ids, past = torch.from_numpy(prompt.astype(np.int64))[None].to(engine.model.device), None
    for _ in range(most):
        with torch.inference_mode():
            out = engine.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, ids = out.past_key_values, out.logits[:, -1, :engine.vocabulary].argmax(-1, keepdim=True)
        yield int(ids)
        if int(ids) in stop_ids:
            return


@dataclass
class Heard:
    """An answer while it is said. thought, text: what was told of each so far."""

    voice: Voice
    effort: Effort
    ids: list[int] = field(default_factory=list)
    thought: str = ""
    text: str = ""

    def add(self, token: int) -> tuple[str, str]:
        """What is certain now and was not told: a piece of the thought, a piece of the text. Half a character waits, and half a marker."""
        self.ids.append(token)
        if token in self.voice.stop_ids:
            return "", ""
        pieces = _whole(self.voice.vocabulary.pieces(self.ids))
        parts = next((p for end in ENDS if (p := self._read((*pieces, *end))) is not None), ())
        thought, text = _said(parts)
        if not thought and "<think>".startswith(text.strip()):
            text = ""
        held = next((n for n in range(len("</think>") - 1, 0, -1) if thought.endswith("</think>"[:n])), 0)
        return self._more(thought[:len(thought) - held].rstrip(), text)

    def end(self) -> tuple[str, str, tuple[Part, ...], Finish]:
        """The rest of thought and text, what was said in all, and how it ended."""
        parts, finish = self.voice.parse(self.ids, self.effort)
        return *self._more(*_said(parts)), parts, finish

    def _more(self, thought: str, text: str) -> tuple[str, str]:
        more = tuple(new[len(old):] if new.startswith(old) else "" for new, old in ((thought, self.thought), (text, self.text)))
        self.thought, self.text = self.thought + more[0], self.text + more[1]
        return more[0], more[1]

    def _read(self, pieces: Pieces) -> tuple[Part, ...] | None:
        try:
            return self.voice.family.parse(pieces, self.effort)
        except UnicodeDecodeError:
            return None


def _whole(pieces: Sequence[str | bytes]) -> list[str | bytes]:
    """The pieces without the half character at their end."""
    if not pieces or isinstance(pieces[-1], str):
        return list(pieces)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(pieces[-1])
    half = len(decoder.getstate()[0])
    return [*pieces[:-1], pieces[-1][:len(pieces[-1]) - half]]


def _said(parts: Sequence[Part]) -> tuple[str, str]:
    """(thought, text); calls are shown as they are written."""
    return ("".join(p.text for p in parts if isinstance(p, Thinking)),
            "".join(p.text if isinstance(p, Text) else f"{p.name}({p.text})" for p in parts if not isinstance(p, Thinking)))


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
        question = Conversation.ask(line, system=f"Answer in {LANGUAGES[self.language]}." if self.language else "", effort=self.effort)
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
            told = (f"{m.role}: {m.text or _said(m.parts)[1]}" for m in self.messages)
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
        code = next((c for c, name in LANGUAGES.items() if word in (c, name.lower())), "")
        if word and word != "off" and not code:
            return f"/lang {word}? {', '.join(f'{c} {n}' for c, n in LANGUAGES.items())}, or off"
        if word:
            self.language = code
        return f"answers are asked for in {LANGUAGES[self.language]}" if self.language else "answers are in the language it chooses"


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
    heard, stopped = Heard(speaker.voice, talk.effort), False
    try:
        for token in steps(speaker.engine, prompt, speaker.voice.stop_ids, room):
            screen.say(*heard.add(token))
    except KeyboardInterrupt:
        stopped = True
    thought, text, parts, finish = heard.end()
    screen.say(thought, text)
    ended = {Finish.LENGTH: f"cut after {room:,} tokens", Finish.MALFORMED: "malformed: its markers do not fit"}
    why = "stopped" if stopped else ended.get(finish, "")
    said = tuple(p for p in (Thinking(heard.thought), Text(heard.text)) if p.text) if stopped or finish is not Finish.STOP else parts
    keeps = bool(heard.text) or finish is Finish.STOP
    if keeps:
        talk.messages += [question.messages[-1], question.answered(*said).messages[-1]]
    screen.close("; ".join(w for w in (why, "" if keeps else "this turn is forgotten") if w))


def printable(text: str) -> str:
    """The text without what could steer a terminal: models say escape sequences too."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
