"""The model behind the routes: its steps one at a time, and an answer read while it is said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from persea.chat.families.hybrid import CLOSE, OPEN
from persea.chat.messages import Effort, Finish, Part, Pieces, Text, Thinking, Tool, ToolCall
from persea.chat.renderer import Voice
from persea.errors import DataError
from persea.teachers.engines import Sampling
from persea.teachers.engines.transformers import LocalEngine

T = TypeVar("T")
LOGITS = 1 << 28  # numbers of one scored prompt: a gibibyte in float32
# What could end a thought that has begun, so that it can be read before its end is said: Qwen's block, the same as text, harmony's channel.
ENDS: tuple[tuple[str | bytes, ...], ...] = (
    (), (CLOSE,), (CLOSE.encode(),), ("<|end|>", "<|start|>", b"assistant", "<|channel|>", b"final", "<|message|>"))


@dataclass(frozen=True, eq=False)
class Speaker:
    """A model with its voice. context: most tokens of prompt and answer; 0 = its configuration says none."""

    name: str
    voice: Voice
    engine: LocalEngine
    context: int
    _one: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def steps(self, prompt: Sequence[int], stops: Sequence[int], most: int, sampling: Sampling) -> AsyncGenerator[int, None]:
        """Tokens as they come; many answers take turns."""
        steps = self.engine.stream(np.array(prompt, np.int32), stops, most, sampling)
        while (token := await self._alone(lambda: next(steps, None))) is not None:
            yield token

    async def score(self, ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [T - 1, vocabulary]: row t of token t + 1."""
        if len(ids) * len(self.voice.vocabulary) > LOGITS:
            raise DataError(f"{len(ids):,} tokens of {len(self.voice.vocabulary):,} log-probabilities are too many", where="prompt",
                            remedy=f"score at most {LOGITS // len(self.voice.vocabulary):,} tokens at once")
        sequence, learn = np.array(ids, np.int32), np.arange(len(ids)) > 0
        return await self._alone(lambda: next(iter(self.engine.score([sequence], [learn]))))

    async def _alone(self, work: Callable[[], T]) -> T:
        """One piece of work at a time: a thread cannot be cancelled, so what a client that went had begun holds the model until it is over."""
        await self._one.acquire()
        begun = asyncio.ensure_future(asyncio.to_thread(work))
        begun.add_done_callback(lambda done: self._one.release())
        return await asyncio.shield(begun)

    def room(self, prompt: Sequence[int], wanted: int | None, default: int, most: int) -> int:
        """New tokens that are allowed. Raises DataError where prompt and answer have no room."""
        new = min(default, most) if wanted is None else wanted
        if new > most:
            raise DataError(f"{new:,} new tokens are asked, at most {most:,} are given", where="max_tokens", remedy="ask for fewer")
        if self.context and wanted is None:
            new = max(1, min(new, self.context - len(prompt)))
        if self.context and len(prompt) + new > self.context:
            raise DataError(f"{len(prompt):,} tokens and {new:,} new ones, the model has positions for {self.context:,}", where="max_tokens",
                            remedy="shorten the prompt, or ask for fewer")
        return new

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens. Raises DataError for ids out of range, a text that cannot be encoded, and for nothing."""
        ids = self.voice.vocabulary.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise DataError("the prompt is empty", where="prompt", remedy="give one token at least")
        if max(ids) >= len(self.voice.vocabulary):
            raise DataError(f"id {max(ids)} lies outside the vocabulary of {len(self.voice.vocabulary):,} tokens", where="prompt",
                            remedy="the ids come from another tokenizer")
        return ids


@dataclass
class Heard:
    """An answer while it is said: what of its thought and its words is certain, and was not told yet."""

    voice: Voice
    effort: Effort
    tools: tuple[Tool, ...]
    ids: list[int] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=lambda: {"reasoning_content": "", "content": ""})

    def add(self, token: int) -> dict[str, str]:
        """The new piece of each. Half a character or marker, white space at the end, and what may become a call wait for more."""
        self.ids.append(token)
        if token in self.voice.stop_ids:
            return {}
        pieces = self.voice.vocabulary.pieces(self.ids)
        parts = next((p for end in ENDS if (p := self._read((*pieces, *end))) is not None), None)
        whole = _texts(parts or ())
        words, thought = whole["content"].lstrip(), whole["reasoning_content"]
        if (self.tools and words.startswith("{")) or OPEN.startswith(words):  # where markers are text, half of one may be the whole's beginning
            whole["content"] = ""
        half = next((n for n in range(len(CLOSE), 0, -1) if thought.endswith(CLOSE[:n])), 0)
        whole["reasoning_content"] = thought[:len(thought) - half]
        return self._more({key: text.rstrip() for key, text in whole.items()})

    def end(self) -> tuple[dict[str, str], tuple[ToolCall, ...], Finish]:
        """What is left to tell, the calls, and how it ended."""
        parts, finish = self.voice.parse(self.ids, self.effort, self.tools)
        whole = _texts(parts)
        if any(not whole[key].startswith(told) for key, told in self.told.items()):
            return {}, (), finish if finish is Finish.LENGTH else Finish.MALFORMED
        return self._more(whole), tuple(p for p in parts if isinstance(p, ToolCall)), finish

    def _more(self, whole: dict[str, str]) -> dict[str, str]:
        more = {key: text[len(self.told[key]):] for key, text in whole.items() if text.startswith(self.told[key]) and text != self.told[key]}
        for key, text in more.items():
            self.told[key] += text
        return more

    def _read(self, pieces: Pieces) -> tuple[Part, ...] | None:
        try:
            return self.voice.family.parse(pieces, self.effort)
        except UnicodeDecodeError:
            return None


def _texts(parts: Sequence[Part]) -> dict[str, str]:
    return {"reasoning_content": "".join(p.text for p in parts if isinstance(p, Thinking)),
            "content": "".join(p.text for p in parts if isinstance(p, Text))}


def plain(voice: Voice, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
    """The bytes of tokens, control tokens left out."""
    return b"".join(p for p in voice.vocabulary.pieces([int(i) for i in ids]) if isinstance(p, bytes))
