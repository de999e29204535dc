"""Bits per byte of whole documents, as plain text: no chat template, no question.

Every model reads the same windows of the same documents, so models with different tokenizers and
different numbers of positions are compared on equal bytes with equal context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.chat.messages import Conversation
from persea.chat.renderer import ChatRenderer
from persea.data.held_out_texts import HeldOutText
from persea.data.windows import MIN_WINDOW_TOKENS, TokenLimit, split_document
from persea.errors import DataError
from persea.evaluation.answering import ITEMS_PER_ANSWER_FILE, EvaluatedModel, load_or_compute

MAX_WINDOW_TOKENS = 2048


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


def split_documents(
    documents: Sequence[HeldOutText],
    readers: Iterable[TextReader],
    max_window_tokens: int = MAX_WINDOW_TOKENS,
) -> TextWindows:
    """Split documents into windows that every model can read at once.

    A document that a tokenizer cannot represent is left out for all models.

    Args:
        documents: The documents.
        readers: How each model reads.
        max_window_tokens: Longest window, in the tokens of any model.
    """
    limits = {
        (limit.vocabulary.digest, limit.max_tokens): limit
        for limit in (_token_limit(reader, max_window_tokens) for reader in readers)
    }
    kept: list[HeldOutText] = []
    windows: list[TextWindow] = []
    left_out: dict[str, str] = {}
    for document in documents:
        try:
            for limit in limits.values():
                limit.vocabulary.encode(document.text)
        except DataError as error:
            left_out[document.id] = f"{error.where}: {error.message}"
            continue
        pieces = split_document(document.text, list(limits.values()))
        windows += [
            TextWindow(len(kept), piece, k == len(pieces)) for k, piece in enumerate(pieces, 1)
        ]
        kept.append(document)
    return TextWindows(tuple(kept), tuple(windows), left_out)


def _token_limit(reader: TextReader, max_window_tokens: int) -> TokenLimit:
    longest = min(max_window_tokens, reader.max_positions or max_window_tokens)
    around = reader.renderer.document_tokens.count
    return TokenLimit(reader.renderer.vocabulary, max(MIN_WINDOW_TOKENS, longest - around))


def measure_document_bits(
    model: EvaluatedModel,
    windows: TextWindows,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> DocumentBits:
    """Measure the bits that a model needs for each document.

    Args:
        model: The model, with log-probabilities.
        windows: The documents.
        progress: Called with (share done, text).
    """
    conversations = [Conversation.from_document(w.text, ends=w.is_last) for w in windows.windows]
    content_D = np.zeros(len(windows.documents))
    end_D = np.zeros(len(windows.documents))
    bits = measure_text_bits(model, conversations, progress)
    for window, (content, end) in zip(windows.windows, bits, strict=True):
        content_D[window.document] += content
        end_D[window.document] += end
    return DocumentBits(content_D, end_D)


def measure_text_bits(
    model: EvaluatedModel,
    conversations: Sequence[Conversation],
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Iterator[tuple[float, float]]:
    """Measure the bits that a model needs for given texts: documents, or answers in its template.

    Results are kept on disk like answers, so that a killed evaluation continues.

    Args:
        model: The model, with log-probabilities.
        conversations: Documents, or conversations that end with an answer.
        progress: Called with (share done, text).

    Yields:
        (bits of the bytes, bits of the token that ends the text) of each.
    """
    for begin in range(0, len(conversations), ITEMS_PER_ANSWER_FILE):
        batch = conversations[begin : begin + ITEMS_PER_ANSWER_FILE]

        def score(batch: Sequence[Conversation] = batch) -> list[Any]:
            return _score_texts(model, batch)

        key = ["texts", model.identity, dict(model.settings), [c.to_json() for c in batch]]
        values, was_cached = load_or_compute(key, score)
        yield from ((content / math.log(2), end / math.log(2)) for content, end in values)
        note = ", from disk" if was_cached else ""
        done = begin + len(batch)
        progress(done / len(conversations), f"{model.name} {done:,} texts{note}")


def _score_texts(
    model: EvaluatedModel, conversations: Sequence[Conversation]
) -> list[tuple[float, float]]:
    """Return (nats of the bytes, nats of the end) of each text.

    Texts are computed in the order of their lengths, so that little is padded.
    """
    order = sorted(
        range(len(conversations)), key=lambda i: -len(conversations[i].messages[-1].text)
    )
    scored = model.load().compute_target_logprobs([conversations[i] for i in order])
    nats: dict[int, tuple[float, float]] = {}
    for i, (tokens, logprob_N) in zip(order, scored, strict=True):
        nats_N = -logprob_N.astype(np.float64)
        starts_N, ends_N = (x_T[tokens.loss_mask_T] for x_T in (tokens.starts_T, tokens.ends_T))
        has_bytes_N = (starts_N >= 0) & (ends_N > starts_N)
        is_end_N = (starts_N >= 0) & (ends_N == starts_N)
        nats[i] = (float(nats_N[has_bytes_N].sum()), float(nats_N[is_end_N].sum()))
    return [nats[i] for i in range(len(conversations))]
