"""The model behind the routes: its steps one at a time, and an answer read while it is said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from persea.chat.family import DecodedPieces
from persea.chat.messages import (
    ContentPart,
    FinishReason,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
)
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.teachers.engines import Sampling
from persea.teachers.engines.transformers import TransformersEngine

T = TypeVar("T")
MAX_LOGPROB_ELEMENTS_PER_PROMPT = 1 << 28  # numbers of one scored prompt: a gibibyte in float32


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model with its voice. context: most tokens of prompt and answer; 0 = its configuration says none."""

    name: str
    renderer: ChatRenderer
    engine: TransformersEngine
    max_context_tokens: int
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def stream_tokens(
        self,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> AsyncGenerator[int, None]:
        """Tokens as they come; many answers take turns."""
        steps = self.engine.stream(np.array(prompt, np.int32), stop_ids, max_new_tokens, sampling)
        while (token := await self._run_exclusively(lambda: next(steps, None))) is not None:
            yield token

    async def compute_logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [T - 1, vocabulary]: row t of token t + 1."""
        if len(ids) * len(self.renderer.vocabulary) > MAX_LOGPROB_ELEMENTS_PER_PROMPT:
            raise DataError(
                f"{len(ids):,} tokens of {len(self.renderer.vocabulary):,} log-probabilities are too many",
                where="prompt",
                remedy=f"score at most {MAX_LOGPROB_ELEMENTS_PER_PROMPT // len(self.renderer.vocabulary):,} tokens at once",
            )
        sequence, learn = np.array(ids, np.int32), np.arange(len(ids)) > 0
        return await self._run_exclusively(
            lambda: next(iter(self.engine.compute_logprobs([sequence], [learn])))
        )

    async def _run_exclusively(self, work: Callable[[], T]) -> T:
        """One piece of work at a time: a thread cannot be cancelled, so what a client that went had begun holds the model until it is over."""
        await self._lock.acquire()
        begun = asyncio.ensure_future(asyncio.to_thread(work))
        begun.add_done_callback(lambda done: self._lock.release())
        return await asyncio.shield(begun)

    def resolve_max_new_tokens(
        self,
        prompt: Sequence[int],
        requested_tokens: int | None,
        default_tokens: int,
        token_limit: int,
    ) -> int:
        """New tokens that are allowed. Raises DataError where prompt and answer have no room."""
        new = min(default_tokens, token_limit) if requested_tokens is None else requested_tokens
        if new > token_limit:
            raise DataError(
                f"{new:,} new tokens are asked, at most {token_limit:,} are given",
                where="max_tokens",
                remedy="ask for fewer",
            )
        if self.max_context_tokens and requested_tokens is None:
            new = max(1, min(new, self.max_context_tokens - len(prompt)))
        if self.max_context_tokens and len(prompt) + new > self.max_context_tokens:
            raise DataError(
                f"{len(prompt):,} tokens and {new:,} new ones, the model has positions for {self.max_context_tokens:,}",
                where="max_tokens",
                remedy="shorten the prompt, or ask for fewer",
            )
        return new

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens. Raises DataError for ids out of range, a text that cannot be encoded, and for nothing."""
        ids = self.renderer.vocabulary.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise DataError("the prompt is empty", where="prompt", remedy="give one token at least")
        if max(ids) >= len(self.renderer.vocabulary):
            raise DataError(
                f"id {max(ids)} lies outside the vocabulary of {len(self.renderer.vocabulary):,} tokens",
                where="prompt",
                remedy="the ids come from another tokenizer",
            )
        return ids


@dataclass
class StreamingAnswerParser:
    """An answer while it is said: what of its thought and its words is certain, and was not told yet."""

    renderer: ChatRenderer
    effort: ThinkingEffort
    tools: tuple[Tool, ...]
    ids: list[int] = field(default_factory=list)
    emitted: dict[str, str] = field(
        default_factory=lambda: {"reasoning_content": "", "content": ""}
    )

    def add_token(self, token: int) -> dict[str, str]:
        """The new piece of each. Half a character or marker, white space at the end, and what may become a call wait for more."""
        self.ids.append(token)
        if token in self.renderer.stop_ids:
            return {}
        pieces = self.renderer.vocabulary.decode_pieces(self.ids)
        parts = next(
            (
                p
                for end in ((), *self.renderer.family.thought_ends)
                if (p := self._parse_pieces((*pieces, *end))) is not None
            ),
            None,
        )
        whole = _text_by_field(parts or ())
        words, thought = whole["content"].lstrip(), whole["reasoning_content"]
        # Where thought markers are plain text, the answer may begin with a part of one.
        opening, closing = self.renderer.family.text_thought_markers
        if (self.tools and words.startswith("{")) or opening.startswith(words):
            whole["content"] = ""
        half = next((n for n in range(len(closing), 0, -1) if thought.endswith(closing[:n])), 0)
        whole["reasoning_content"] = thought[: len(thought) - half]
        return self._take_new_text({key: text.rstrip() for key, text in whole.items()})

    def finish(self) -> tuple[dict[str, str], tuple[ToolCall, ...], FinishReason]:
        """What is left to tell, the calls, and how it ended."""
        parts, finish = self.renderer.parse(self.ids, self.effort, self.tools)
        whole = _text_by_field(parts)
        if any(not whole[key].startswith(told) for key, told in self.emitted.items()):
            return {}, (), finish if finish is FinishReason.LENGTH else FinishReason.MALFORMED
        return (
            self._take_new_text(whole),
            tuple(p for p in parts if isinstance(p, ToolCall)),
            finish,
        )

    def _take_new_text(self, text_by_field: dict[str, str]) -> dict[str, str]:
        more = {
            key: text[len(self.emitted[key]) :]
            for key, text in text_by_field.items()
            if text.startswith(self.emitted[key]) and text != self.emitted[key]
        }
        for key, text in more.items():
            self.emitted[key] += text
        return more

    def _parse_pieces(self, pieces: DecodedPieces) -> tuple[ContentPart, ...] | None:
        try:
            return self.renderer.family.parse(pieces, self.effort)
        except UnicodeDecodeError:
            return None


def _text_by_field(parts: Sequence[ContentPart]) -> dict[str, str]:
    return {
        "reasoning_content": "".join(p.text for p in parts if isinstance(p, Thinking)),
        "content": "".join(p.text for p in parts if isinstance(p, Text)),
    }


def content_bytes(renderer: ChatRenderer, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
    """The bytes of tokens, control tokens left out."""
    return b"".join(
        p for p in renderer.vocabulary.decode_pieces([int(i) for i in ids]) if isinstance(p, bytes)
    )
