"""The first prompt of a corpus in the format of every model, with the learned tokens marked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.data.prompts import Prompt
from persea.errors import DataError

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext

PLACEHOLDER = "(the teacher's answer)"
LEARNED_BEGIN, LEARNED_END = "\033[32;1m", "\033[0m"  # green and bold
MARK_BEGIN, MARK_END = "⟦", "⟧"
MAX_PIECE_CHARS = 600  # of a piece on a terminal; JSON has all


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the tokens of one model.

    Attributes:
        model: Name of the model.
        family: Its chat family.
        tokens: Number of tokens.
        pieces: (text, whether its tokens are learned), in order. Bytes that are no whole character
            are shown as U+FFFD.
        problem: Why the model's template cannot render it; "" if it can.
    """

    model: str
    family: str
    tokens: int
    pieces: tuple[tuple[str, bool], ...]
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON: each piece as an object with `text` and `learned`."""
        pieces = [{"text": text, "learned": learned} for text, learned in self.pieces]
        return asdict(self) | {"pieces": pieces}

    def lines(self, *, colour: bool) -> list[str]:
        """Return the rendering as text.

        Args:
            colour: Colour the learned tokens; otherwise they stand between brackets.
        """
        head = f"{self.model} ({self.family}), {self.tokens:,} tokens"
        if self.problem:
            return [f"{self.model} ({self.family}): {self.problem}"]
        begin, end = (LEARNED_BEGIN, LEARNED_END) if colour else (MARK_BEGIN, MARK_END)
        text = "".join(
            f"{begin}{_shorten(piece)}{end}" if learned else _shorten(piece)
            for piece, learned in self.pieces
        )
        return [head, *("  " + line for line in text.split("\n"))]


def _shorten(text: str) -> str:
    safe = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    if len(safe) <= MAX_PIECE_CHARS:
        return safe
    half = MAX_PIECE_CHARS // 2
    return f"{safe[:half]} ... {len(safe) - 2 * half:,} characters ... {safe[-half:]}"


def render_first_prompt(context: RunContext) -> tuple[RenderedPrompt, ...]:
    """Render the first prompt of the corpus for the student and each teacher."""
    if not context.corpus.prompts:
        return ()
    models = {"student": context.models.student_renderer}
    models |= {name: context.models.renderers[name] for name in context.models.teacher_names}
    return render_for(context.corpus.prompts[0], models)


def render_for(prompt: Prompt, renderers: Mapping[str, ChatRenderer]) -> tuple[RenderedPrompt, ...]:
    """Render a prompt with its own answer, or with a placeholder, for each model.

    Args:
        prompt: A prompt or document.
        renderers: Model -> its renderer.
    """
    conversation = prompt.conversation
    if not conversation.is_document:
        conversation = conversation.with_answer(*(prompt.given_parts or (Text(PLACEHOLDER),)))
    return tuple(_render(name, one, conversation) for name, one in renderers.items())


def _render(name: str, renderer: ChatRenderer, conversation: Conversation) -> RenderedPrompt:
    family = renderer.family.name
    try:
        tokens = renderer.render(conversation)
    except DataError as error:
        return RenderedPrompt(name, family, 0, (), error.message)
    pieces = []
    for learned, indexes in groupby(range(len(tokens)), key=lambda k: bool(tokens.loss_mask_T[k])):
        ids = tokens.ids_T[np.fromiter(indexes, np.int64)].tolist()
        parts = renderer.vocabulary.decode_pieces(ids)
        text = "".join(p if isinstance(p, str) else p.decode(errors="replace") for p in parts)
        pieces.append((text, learned))
    return RenderedPrompt(name, family, len(tokens), tuple(pieces))
