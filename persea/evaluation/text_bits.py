"""Bits per byte of whole documents, as plain text: no chat template, no question.

Every model reads the same windows of the same documents, so models with different tokenizers and
different numbers of positions are compared on equal bytes with equal context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.chat.messages import Conversation
from persea.chat.renderer import ChatRenderer
from persea.data.held_out_texts import HeldOutText
from persea.errors import DataError
from persea.evaluation.answering import ITEMS_PER_ANSWER_FILE, EvaluatedModel, load_or_compute

MAX_WINDOW_BYTES = 8192
# Part of a window at its end in which a cut is moved back to a white space.
MAX_CUT_SHIFT_SHARE = 0.25
RESERVED_POSITIONS = 2  # of the token that begins a text, and of the one that ends it


@dataclass(frozen=True)
class TextReader:
    """What decides how a model reads a document.

    Attributes:
        renderer: The model's tokenizer.
        max_positions: Positions of the model; 0 = no limit known.
    """

    renderer: ChatRenderer
    max_positions: int = 0


@dataclass(frozen=True)
class TextWindow:
    """A part of a document that a model reads at once.

    Attributes:
        document: Number of the document.
        text: The part.
        is_last: Whether the document ends with it.
    """

    document: int
    text: str
    is_last: bool


@dataclass(frozen=True)
class TextWindows:
    """Documents as every model reads them.

    Attributes:
        documents: The documents that every model can read, in order.
        windows: Their parts, in order.
        left_out: Document id -> why a model cannot read it; no model is measured on it.
    """

    documents: tuple[HeldOutText, ...]
    windows: tuple[TextWindow, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class DocumentBits:
    """Bits that a model needs for each document. D = documents.

    Attributes:
        content_D: Bits of the bytes of the document.
        end_D: Bits of the token that ends the document; reported apart, because it has no bytes
            and not every model was trained to end a text.
    """

    content_D: npt.NDArray[np.float64]
    end_D: npt.NDArray[np.float64]


def encode_window(
    renderer: ChatRenderer, window: TextWindow
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], int]:
    """Return the token ids of a window, the mask of scored tokens, and how many of them are ends.

    The window is rendered as documents are in training (`persea.chat.documents`).

    Raises:
        DataError: The tokenizer does not reproduce the text.
    """
    tokens = renderer.render(Conversation.from_document(window.text, ends=window.is_last))
    num_ends = int(window.is_last and renderer.document_tokens.end_id is not None)
    return tokens.ids_T, tokens.loss_mask_T, num_ends


def split_documents(
    documents: Sequence[HeldOutText],
    readers: Iterable[TextReader],
    max_window_bytes: int = MAX_WINDOW_BYTES,
) -> TextWindows:
    """Split documents into windows that every model can read at once.

    A document that a tokenizer cannot represent is left out for all models.

    Args:
        documents: The documents.
        readers: How each model reads.
        max_window_bytes: Longest window.
    """
    kept: list[HeldOutText] = []
    windows: list[TextWindow] = []
    left_out: dict[str, str] = {}
    distinct = {(r.renderer.vocabulary.digest, r.max_positions): r for r in readers}
    for document in documents:
        try:
            pieces = _split_until_read(document.text, distinct.values(), max_window_bytes)
        except DataError as error:
            left_out[document.id] = f"{error.where}: {error.message}"
            continue
        windows += [
            TextWindow(len(kept), piece, k == len(pieces) - 1) for k, piece in enumerate(pieces)
        ]
        kept.append(document)
    return TextWindows(tuple(kept), tuple(windows), left_out)


def _split_until_read(
    text: str, readers: Collection[TextReader], max_window_bytes: int
) -> list[str]:
    limit = max_window_bytes
    while True:
        pieces = _split_text(text, limit)
        excess = max(_positions_used(pieces, reader) for reader in readers)
        if excess <= 1 or limit <= 1:
            return pieces
        limit = max(1, min(limit - 1, int(limit / excess)))


def _positions_used(pieces: Sequence[str], reader: TextReader) -> float:
    """Return the tokens of the longest part, as a share of the positions of the model."""
    longest = max(map(len, reader.renderer.vocabulary.encode_batch(pieces)))
    if not reader.max_positions:
        return 0.0
    return longest / (reader.max_positions - RESERVED_POSITIONS)


def _split_text(text: str, max_bytes: int) -> list[str]:
    """Cut a text into parts of about equal length, before a white space where one is near."""
    total = len(text.encode())
    num_parts = math.ceil(total / max_bytes)
    if num_parts <= 1:
        return [text]
    size = total / num_parts
    ends_C = np.cumsum([len(c.encode()) for c in text])
    cuts = [0]
    for k in range(1, num_parts):
        at = int(np.searchsorted(ends_C, k * size, side="right"))
        nearest = range(at, max(cuts[-1], at - int(MAX_CUT_SHIFT_SHARE * size)), -1)
        cuts.append(next((i for i in nearest if text[i : i + 1].isspace()), at))
    return [text[a:b] for a, b in pairwise([*cuts, len(text)]) if a < b]


def measure_document_bits(
    model: EvaluatedModel,
    windows: TextWindows,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> DocumentBits | None:
    """Measure the bits that a model needs for each document.

    Results are kept on disk like answers, so that a killed evaluation continues.

    Args:
        model: The model.
        windows: The documents.
        progress: Called with (share done, text).

    Returns:
        The bits; None for a model without log-probabilities.
    """
    if model.is_text_only:
        return None
    content_D = np.zeros(len(windows.documents))
    end_D = np.zeros(len(windows.documents))
    for begin in range(0, len(windows.windows), ITEMS_PER_ANSWER_FILE):
        batch = windows.windows[begin : begin + ITEMS_PER_ANSWER_FILE]

        def score(batch: Sequence[TextWindow] = batch) -> list[Any]:
            return list(_score_windows(model, batch))

        key = ["texts", model.identity, dict(model.settings), [[w.text, w.is_last] for w in batch]]
        values, was_cached = load_or_compute(key, score)
        for window, (content, end) in zip(batch, values, strict=True):
            content_D[window.document] += content / math.log(2)
            end_D[window.document] += end / math.log(2)
        note = ", from disk" if was_cached else ""
        done = begin + len(batch)
        progress(done / len(windows.windows), f"{model.name} {done:,} texts{note}")
    return DocumentBits(content_D, end_D)


def _score_windows(
    model: EvaluatedModel, windows: Sequence[TextWindow]
) -> Iterator[tuple[float, float]]:
    """Yield (nats of the content, nats of the end token) of each window.

    Windows are computed in the order of their lengths, so that little is padded.
    """
    teacher = model.load()
    encoded = [encode_window(teacher.renderer, w) for w in windows]
    order = sorted(range(len(windows)), key=lambda i: -len(encoded[i][0]))
    logprobs = teacher.score_token_ids(
        [encoded[i][0] for i in order], [encoded[i][1] for i in order]
    )
    nats: dict[int, tuple[float, float]] = {}
    for i, logprob_N in zip(order, logprobs, strict=True):
        values_N = -logprob_N.astype(np.float64)
        num_content = len(values_N) - encoded[i][2]
        nats[i] = (float(values_N[:num_content].sum()), float(values_N[num_content:].sum()))
    yield from (nats[i] for i in range(len(windows)))
