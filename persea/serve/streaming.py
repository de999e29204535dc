"""The served model, and the parsers of an answer while it is generated."""

from __future__ import annotations

import asyncio
import json
from codecs import getincrementaldecoder
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from persea.chat.family import DecodedPieces
from persea.chat.messages import (
    ContentPart,
    Conversation,
    FinishReason,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
)
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.serve.constrained import ConstraintFactory, JsonConstraint
from persea.serve.scheduler import MAX_LOGPROB_ELEMENTS, ModelScheduler
from persea.teachers.engines import Sampling
from persea.teachers.engines.transformers import TransformersEngine

MAX_BYTES_PER_TOKEN = 32  # of a whole prompt; Thai and Khmer reach 10
MAX_PROMPT_BYTES = 4 << 20


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model with its chat renderer.

    Attributes:
        name: Name in the routes.
        renderer: Tokenizer and chat template.
        engine: Runs the weights.
        max_context_tokens: Most tokens of prompt and answer; 0 if the configuration has no limit.
    """

    name: str
    renderer: ChatRenderer
    engine: TransformersEngine
    max_context_tokens: int
    _text_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @cached_property
    def scheduler(self) -> ModelScheduler:
        """Runs the requests of all clients."""
        return ModelScheduler(self.engine)

    def stream_tokens(
        self,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        constraint: JsonConstraint | None = None,
    ) -> AsyncGenerator[list[int], None]:
        """Yield generated tokens, several where they come fast. See ModelScheduler."""
        return self.scheduler.generate(prompt, stop_ids, max_new_tokens, sampling, constraint)

    @cached_property
    def constraints(self) -> ConstraintFactory:
        """Makes the constraints of answers that must be JSON."""
        return ConstraintFactory(self.renderer)

    async def compute_logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Compute natural-log probabilities [T - 1, W]: row t is the prediction of token t + 1.

        Raises:
            DataError: The prompt is too long for the memory limit.
        """
        vocab_size = len(self.renderer.vocabulary)
        max_tokens = MAX_LOGPROB_ELEMENTS // vocab_size
        if len(ids) > max_tokens:
            raise DataError(
                f"{len(ids):,} tokens with {vocab_size:,} log-probabilities each exceed the "
                "memory limit",
                where="prompt",
                remedy=f"score at most {max_tokens:,} tokens at once",
            )
        return await self.scheduler.compute_logprobs(ids)

    def resolve_max_new_tokens(
        self,
        prompt: Sequence[int],
        requested_tokens: int | None,
        default_tokens: int,
        token_limit: int,
    ) -> int:
        """Return how many tokens may be generated.

        Args:
            prompt: Token ids.
            requested_tokens: The request's own limit; None if it has none.
            default_tokens: Limit for a request without one.
            token_limit: Limit of the server.

        Raises:
            DataError: The request exceeds the server's limit or the model's positions.
        """
        new = min(default_tokens, token_limit) if requested_tokens is None else requested_tokens
        if new > token_limit:
            raise DataError(
                f"{new:,} new tokens were requested, the limit is {token_limit:,}",
                where="max_tokens",
                remedy="request fewer",
            )
        if self.max_context_tokens and requested_tokens is None:
            new = max(1, min(new, self.max_context_tokens - len(prompt)))
        if self.max_context_tokens and len(prompt) + new > self.max_context_tokens:
            raise DataError(
                f"{len(prompt):,} prompt tokens and {new:,} new ones exceed the model's "
                f"{self.max_context_tokens:,} positions",
                where="max_tokens",
                remedy="shorten the prompt, or request fewer",
            )
        return new

    def refuse_long_text(self, num_bytes: int) -> None:
        """Refuse a prompt that is too long for the model's positions, before it is tokenized.

        Tokenizing takes a hundred times the memory of a text.

        Args:
            num_bytes: Bytes of the prompt's texts in UTF-8.

        Raises:
            DataError: The prompt is too long.
        """
        positions = self.max_context_tokens
        limit = min(MAX_PROMPT_BYTES, positions * MAX_BYTES_PER_TOKEN or MAX_PROMPT_BYTES)
        if num_bytes > limit:
            raise DataError(
                f"a prompt of {num_bytes:,} bytes; at most {limit:,} fit",
                where="prompt",
                remedy="shorten it",
            )

    async def encode_text(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the token ids of a prompt; one text at a time is tokenized.

        Raises:
            DataError: The prompt is too long, or `encode_prompt` refuses it.
        """
        if not isinstance(prompt, str):
            return self.encode_prompt(prompt)
        self.refuse_long_text(len(prompt.encode(errors="replace")))
        async with self._text_lock:
            return await asyncio.to_thread(self.encode_prompt, prompt)

    async def render_conversation(self, conversation: Conversation) -> list[int]:
        """Return the token ids of a conversation; one at a time is tokenized.

        Raises:
            DataError: The conversation is too long, or the template refuses it.
        """
        self.refuse_long_text(len(json.dumps(conversation.to_json(), ensure_ascii=False).encode()))
        async with self._text_lock:
            rendered = await asyncio.to_thread(self.renderer.render_prompt, conversation)
        ids: list[int] = rendered.ids_T.tolist()
        return ids

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the token ids of a prompt, given as text or ids.

        Raises:
            DataError: The prompt is empty or cannot be encoded, or an id is out of range.
        """
        vocabulary = self.renderer.vocabulary
        ids = vocabulary.encode_alone(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise DataError("the prompt is empty", where="prompt", remedy="give one token at least")
        if max(ids) >= len(self.renderer.vocabulary):
            raise DataError(
                f"id {max(ids)} is outside the vocabulary of "
                f"{len(self.renderer.vocabulary):,} tokens",
                where="prompt",
                remedy="the ids come from another tokenizer",
            )
        return ids


@dataclass
class StreamingAnswerParser:
    """Parses an answer while it is generated, and returns text once it is final.

    Attributes:
        renderer: The model's chat renderer.
        effort: Thinking effort of the prompt.
        tools: Tools of the prompt.
        stop_texts: Texts before which the answer ends; they are not searched for in its thinking.
        ids: Tokens so far.
        emitted: Text returned so far, by field.
        is_stopped: Whether a stop text has come.
    """

    renderer: ChatRenderer
    effort: ThinkingEffort
    tools: tuple[Tool, ...]
    stop_texts: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    emitted: dict[str, str] = field(
        default_factory=lambda: {"reasoning_content": "", "content": ""}
    )
    is_stopped: bool = False

    def add_token(self, token: int) -> dict[str, str]:
        """Add a token, and return the new text of each field.

        Half characters, half markers, trailing white space and possible tool calls are held back.
        """
        self.ids.append(token)
        if token in self.renderer.stop_ids:
            return {}
        pieces = self.renderer.decode_answer(self.ids, self.effort)
        parts = next(
            (
                p
                for end in ((), *self.renderer.family.thought_ends)
                if (p := self._parse_pieces((*pieces, *end))) is not None
            ),
            None,
        )
        texts = _text_by_field(parts or ())
        texts["content"], self.is_stopped = cut_at_stop(texts["content"], self.stop_texts)
        content, thinking = texts["content"].lstrip(), texts["reasoning_content"]
        # Where thought markers are plain text, the answer may begin with a part of one.
        opening, closing = self.renderer.family.text_thought_markers
        if (self.tools and content.startswith("{")) or opening.startswith(content):
            texts["content"] = ""
        overlap = next((n for n in range(len(closing), 0, -1) if thinking.endswith(closing[:n])), 0)
        texts["reasoning_content"] = thinking[: len(thinking) - overlap]
        return self._take_new_text({key: text.rstrip() for key, text in texts.items()})

    def add_tokens(self, tokens: Sequence[int]) -> dict[str, str]:
        """Add tokens that came together, and return the new text of each field.

        Tokens after a stop text are no part of the answer.
        """
        if not self.stop_texts:
            # parsed before the stop token too: a malformed answer keeps the text that came so far
            body = [token for token in tokens if token not in self.renderer.stop_ids]
            self.ids += body[:-1]
            before_stop = self.add_token(body[-1]) if body else {}
            self.ids += tokens[len(body) :]
            return before_stop
        new = dict.fromkeys(self.emitted, "")
        for token in tokens:
            for key, text in self.add_token(token).items():
                new[key] += text
            if self.is_stopped:
                break
        return {key: text for key, text in new.items() if text}

    def finish(self) -> tuple[dict[str, str], tuple[ToolCall, ...], FinishReason]:
        """Return the remaining text, the tool calls and the finish reason."""
        if self.is_stopped:  # what was held back before the stop text is part of the answer
            return self._take_new_text(self._stopped_texts()), (), FinishReason.STOP
        parts, finish = self.renderer.parse(self.ids, self.effort, self.tools)
        texts = _text_by_field(parts)
        if any(not texts[key].startswith(sent) for key, sent in self.emitted.items()):
            return {}, (), finish if finish is FinishReason.LENGTH else FinishReason.MALFORMED
        return (
            self._take_new_text(texts),
            tuple(p for p in parts if isinstance(p, ToolCall)),
            finish,
        )

    def _stopped_texts(self) -> dict[str, str]:
        """Return the texts of an answer that ends at a stop text."""
        pieces = self.renderer.vocabulary.decode_pieces(self.ids)
        texts = _text_by_field(self._parse_pieces(pieces) or ())
        return texts | {"content": cut_at_stop(texts["content"], self.stop_texts)[0]}

    def _take_new_text(self, text_by_field: dict[str, str]) -> dict[str, str]:
        new = {
            key: text[len(self.emitted[key]) :]
            for key, text in text_by_field.items()
            if text.startswith(self.emitted[key]) and text != self.emitted[key]
        }
        for key, text in new.items():
            self.emitted[key] += text
        return new

    def _parse_pieces(self, pieces: DecodedPieces) -> tuple[ContentPart, ...] | None:
        try:
            return self.renderer.family.parse(pieces, self.effort)
        except UnicodeDecodeError:
            return None


def _text_by_field(parts: Sequence[ContentPart]) -> dict[str, str]:
    """Return thinking and text under OpenAI's field names."""
    return {
        "reasoning_content": "".join(p.text for p in parts if isinstance(p, Thinking)),
        "content": "".join(p.text for p in parts if isinstance(p, Text)),
    }


def cut_at_stop(text: str, stop_texts: Sequence[str]) -> tuple[str, bool]:
    r"""Return the text before the first stop text, and whether there is one.

    Without one, an end that may be the beginning of a stop text is held back.

    Example:
        >>> cut_at_stop("one. two", ["."]), cut_at_stop("one\n", ["\n\n"])
        (('one', True), ('one', False))
    """
    found = [at for stop in stop_texts if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], True
    held = max(
        (n for stop in stop_texts for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
    return text[: len(text) - held], False


@dataclass
class CompletionText:
    """The text of a completion while it is generated.

    Parts of a character wait until it is complete, and the end of the text waits as long as it may
    be the beginning of a stop text.

    Attributes:
        renderer: The model's chat renderer.
        stop_texts: Texts before which the completion ends.
        ids: Tokens so far; none after a stop text.
        is_stopped: Whether a stop text has come.
    """

    renderer: ChatRenderer
    stop_texts: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    is_stopped: bool = False

    def __post_init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add_tokens(self, tokens: Sequence[int]) -> str:
        """Add tokens, and return the new text."""
        new = ""
        for token in tokens:
            if self.is_stopped:
                break
            self.ids.append(token)
            self._held += self._decoder.decode(content_bytes(self.renderer, [token]))
            text, self.is_stopped = cut_at_stop(self._held, self.stop_texts)
            new += text
            self._held = self._held[len(text) :]
        return new

    def finish(self) -> str:
        """Return the text that was held back, once no token follows."""
        return "" if self.is_stopped else self._held + self._decoder.decode(b"", True)


def content_bytes(renderer: ChatRenderer, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
    """Return the bytes of tokens, without control tokens."""
    return b"".join(
        p for p in renderer.vocabulary.decode_pieces([int(i) for i in ids]) if isinstance(p, bytes)
    )
