"""Voice: a Family bound to one tokenizer and the model's own chat template.

`render` gives exactly the ids the model's own template gives, and says where the content's bytes are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property

import numpy as np
import numpy.typing as npt

from persea.chat import PINNED_DATE, Conversation, Effort, Family, Finish, Part, Role, Tokens
from persea.errors import DataError
from persea.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Voice:
    """A Family bound to one vocabulary and the model's own chat template.

    template  callable (messages, add_generation_prompt, **kwargs) -> str; transformers' sandboxed Jinja
    """

    family: Family
    vocabulary: Vocabulary
    template: Callable[..., str]
    template_text: str
    today: date = PINNED_DATE

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end the assistant's turn; several spellings of one event."""
        return tuple(self.vocabulary.control[s] for s in self.family.stops if s in self.vocabulary.control)

    @cached_property
    def digest(self) -> str:
        """Changes whenever a rendering could change: tokenizer, template, family, pinned date."""
        what = json.dumps([self.vocabulary.digest, self.template_text, self.family.name, self.today.isoformat()])
        return hashlib.sha256(what.encode()).hexdigest()

    def prompt(self, conversation: Conversation) -> Tokens:
        """The tokens after which the assistant speaks. Nothing is learned in them."""
        return self._tokens(conversation, generate=True)

    def render(self, conversation: Conversation) -> Tokens:
        """The whole conversation, ending with the assistant's answer and its stop token.

        Raises DataError when the last message is not the assistant's, or the template changes the content's bytes.
        """
        if not conversation.messages or conversation.messages[-1].role is not Role.ASSISTANT:
            raise DataError("the conversation does not end with an answer", where=self.family.name, remedy="render() is for answers; use prompt()")
        return self._tokens(conversation, generate=False)

    def parse(self, ids: Sequence[int], effort: Effort) -> tuple[tuple[Part, ...], Finish]:
        """What a model in this voice generated -> parts and how it ended. Never raises on malformed answers."""
        stop = next((k for k, i in enumerate(ids) if i in self.stop_ids), None)
        pieces = self.vocabulary.pieces(ids if stop is None else ids[:stop])
        try:
            parts = self.family.parse(pieces, effort)
        except UnicodeDecodeError:
            parts = None
        if stop is None:
            return parts or (), Finish.LENGTH
        return (parts, Finish.STOP) if parts is not None else ((), Finish.MALFORMED)

    def _dressed(self, conversation: Conversation, generate: bool) -> str:
        messages, kwargs = self.family.inputs(conversation)
        return self.template(messages, add_generation_prompt=generate, strftime_now=self.today.strftime, **kwargs)

    def _segments(self, kept: Conversation, generate: bool) -> list[tuple[str, int | None]]:
        """(text, index of the content part or None for scaffolding), in order, as the model's own template writes them.

        Found by rendering twice, once with a stand-in for each part; where the two do not agree the template does more
        than dress (it repeats, rewrites or drops content) and the conversation is refused.
        """
        names = {i: f"\ue000{i}\ue001" for i, p in enumerate(kept.parts()) if p.text}
        texts = {i: p.text for i, p in enumerate(kept.parts()) if p.text}
        skeleton = self._dressed(_with_texts(kept, names), generate)
        fields = re.split("\ue000(\\d+)\ue001", skeleton)
        segments: list[tuple[str, int | None]] = [
            (field, None) if k % 2 == 0 else (texts[int(field)], int(field)) for k, field in enumerate(fields)]
        order = [i for _, i in segments if i is not None]
        if order != sorted(names) or "".join(t for t, _ in segments) != self._dressed(kept, generate):
            raise DataError(f"the chat template changes the content of message parts {sorted(names)} (found {order})",
                            where=self.family.name, remedy="the content collides with the template; rephrase it or leave it out")
        return [s for s in segments if s[0]]

    def _tokens(self, conversation: Conversation, generate: bool) -> Tokens:
        kept = self.family.normalise(conversation)
        origins = _origins(conversation, kept, self.family.name)
        segments = self._segments(kept, generate)
        full = "".join(t for t, _ in segments)
        opening = len(full)
        if not generate:
            before = self._dressed(replace(kept, messages=kept.messages[:-1]), generate=True)
            if not full.startswith(before):
                raise DataError("the answer is not rendered where the generation prompt ends", where=self.family.name,
                                remedy="this template cannot be used for training: its prompt is not a prefix of its conversations")
            opening = len(before)
        runs = list(self._runs(segments))
        encoded = iter(self.vocabulary.encode_batch([r.text for r in runs if r.control is None]))
        columns: list[npt.NDArray[np.int64]] = []
        turn_end = max((origins[i] + len(t.encode()) for t, i in segments if i is not None), default=0)
        stopped = False
        for run in runs:
            if run.control is None:
                columns.append(_place(self.vocabulary, next(encoded), run, origins, opening, stopped))
                continue
            learned = run.at >= opening and not stopped
            stopped = stopped or (learned and run.control in self.stop_ids)
            place = turn_end if learned and stopped else -1
            columns.append(np.array([[run.control, place, place, learned]]))
        if not generate and not stopped:
            raise DataError("the chat template does not end the assistant's turn with a stop token", where=self.family.name,
                            remedy=f"expected one of {', '.join(self.family.stops)}")
        table = np.concatenate(columns)
        ids, starts, ends = (table[:, k].astype(np.int32) for k in range(3))
        return Tokens(ids, starts, ends, table[:, 3].astype(bool))

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        names = sorted(self.vocabulary.control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _runs(self, segments: Sequence[tuple[str, int | None]]) -> Iterator[_Run]:
        """Control tokens, which only the scaffolding can hold, and the runs of text between them, which tokens may cross."""
        text, spans, start, at = "", [], 0, 0
        for segment, part in segments:
            if part is not None:
                spans.append((len(text.encode()), len((text + segment).encode()), part))
                text += segment
                at += len(segment)
                continue
            position = 0
            for m in self._controls.finditer(segment):
                text += segment[position:m.start()]
                if text:
                    yield _Run(None, text, start, tuple(spans))
                yield _Run(self.vocabulary.control[m.group()], "", at + m.start(), ())
                text, spans, position, start = "", [], m.end(), at + m.end()
            text += segment[position:]
            at += len(segment)
        if text:
            yield _Run(None, text, start, tuple(spans))


@dataclass(frozen=True)
class _Run:
    """A control token, or a text; `at` = its first character; `spans` = (first byte, last byte + 1, part) of content in it."""

    control: int | None
    text: str
    at: int
    spans: tuple[tuple[int, int, int], ...]


def _place(vocabulary: Vocabulary, ids: Sequence[int], run: _Run, origins: Mapping[int, int], opening: int, stopped: bool
           ) -> npt.NDArray[np.int64]:
    """[tokens, 4]: id, start and end in the content's bytes (-1 where there are none), learned."""
    ends = np.cumsum(vocabulary.lengths_W[np.asarray(ids, np.int64)])
    starts = ends - vocabulary.lengths_W[np.asarray(ids, np.int64)]
    table = np.full((len(ids), 4), -1, np.int64)
    table[:, 0] = ids
    first = len(run.text[:max(0, opening - run.at)].encode())
    table[:, 3] = (starts >= first) & (not stopped)
    for a, b, part in run.spans:
        begins = (starts >= a) & (starts < b)
        table[begins, 1] = starts[begins] - a + origins[part]
        touches = (ends > a) & (starts < b)
        table[touches, 2] = np.minimum(ends[touches], b) - a + origins[part]
    return table


def _origins(original: Conversation, kept: Conversation, family: str) -> dict[int, int]:
    """Part index -> place of its first kept byte in the original conversation's content bytes."""
    origins: dict[int, int] = {}
    at = 0
    pairs = zip(original.parts(), kept.parts(), strict=True)
    for i, (whole, part) in enumerate(pairs):
        offset = whole.text.find(part.text)
        if offset < 0:
            raise DataError(f"content part {i} was rewritten, not trimmed", where=family, remedy="a family may drop or trim content, nothing else")
        origins[i] = at + len(whole.text[:offset].encode())
        at += len(whole.text.encode()) + 1
    return origins


def _with_texts(conversation: Conversation, texts: Mapping[int, str]) -> Conversation:
    """The same conversation with other texts, by part index; a part without one becomes empty."""
    counter = iter(range(10**9))
    return replace(conversation, messages=tuple(
        replace(m, parts=tuple(replace(p, text=texts.get(next(counter), "")) for p in m.parts)) for m in conversation.messages))
