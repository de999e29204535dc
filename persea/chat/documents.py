"""Render plain text by a model's own rules for plain text: no roles, no chat template.

    <bos> text <eos>

What stands before a text is what the tokenizer's own post-processor puts there. A tokenizer that
puts nothing there (GPT-2, Qwen, SmolLM2) was trained on documents with a separator between them,
so the separator stands before the text: the first token needs something to be predicted from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from persea.chat.messages import Message, Role
from persea.tokenization.tokens import RenderedTokens
from persea.tokenization.vocabulary import Vocabulary

TEXT_FAMILY_NAME = "text"  # family of models without a chat template, in families/text.py
# Control tokens that end a document, and never end a turn only, in the tokenizers of Qwen, GPT-2,
# SmolLM2, gpt-oss and Phi; Llama 3; Gemma; DeepSeek; Llama 2 and Mistral.
DOCUMENT_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "</s>",
)
NO_END_NOTE = (
    "no token of its tokenizer is known to end a document, so documents have no end for this model"
)
NO_START_NOTE = "nothing stands before a document, so its first token is not learned"


@dataclass(frozen=True)
class DocumentTokens:
    """Tokens around a plain text.

    Attributes:
        prefix_ids: Tokens before the text.
        end_id: The token that ends a document; None if none is known.
        note: What is missing, for people; "" if nothing is.
    """

    prefix_ids: tuple[int, ...]
    end_id: int | None
    note: str = ""

    @property
    def count(self) -> int:
        """Number of tokens around a document."""
        return len(self.prefix_ids) + (self.end_id is not None)


def find_document_end(
    vocabulary: Vocabulary, special_tokens: Mapping[str, str], turn_ends: Collection[str]
) -> str:
    """Return the control token that ends a document of this model; "" if it is not known.

    The end-of-text token that the tokenizer declares may be the end of a turn (SmolLM2's is
    `<|im_end|>`), so a token of a known name comes first.

    Args:
        vocabulary: The model's tokenizer.
        special_tokens: bos_token, eos_token, ... as its tokenizer declares them.
        turn_ends: Tokens that end an answer in its chat template; empty for a base model.
    """
    declared = special_tokens.get("eos_token", "")
    if _has_row(vocabulary, declared) and (
        declared in DOCUMENT_END_TOKENS or declared not in turn_ends
    ):
        return declared
    return next((t for t in DOCUMENT_END_TOKENS if _has_row(vocabulary, t)), "")


def _has_row(vocabulary: Vocabulary, token: str) -> bool:
    """Return whether this is a control token that the model has logits for."""
    return vocabulary.control_token_ids.get(token, len(vocabulary)) < len(vocabulary)


def find_document_tokens(
    vocabulary: Vocabulary, special_tokens: Mapping[str, str], turn_ends: Collection[str]
) -> DocumentTokens:
    """Return the tokens around a document; see `find_document_end` for the arguments."""
    end = find_document_end(vocabulary, special_tokens, turn_ends)
    return make_document_tokens(vocabulary, end)


def make_document_tokens(vocabulary: Vocabulary, end_token: str) -> DocumentTokens:
    """Return the tokens around a document.

    Args:
        vocabulary: The model's tokenizer. Its post-processor decides what stands before a text.
        end_token: Control token that ends a document; "" = none is known.
    """
    end_id = vocabulary.control_token_ids.get(end_token)
    prefix = vocabulary.start_ids or (() if end_id is None else (end_id,))
    notes = [NO_END_NOTE] if end_id is None else []
    notes += [] if prefix else [NO_START_NOTE]
    return DocumentTokens(prefix, end_id, "; ".join(notes))


def render_document(
    vocabulary: Vocabulary, around: DocumentTokens, message: Message
) -> RenderedTokens:
    """Render a document, or a window of one.

    Every token of the text is in the loss mask, and so is the end; only the first token of a model
    with nothing before a text is not, because nothing predicts it.

    Args:
        vocabulary: The model's tokenizer.
        around: Tokens around the text.
        message: The text, in NFC; its role says whether the document ends here.

    Raises:
        DataError: The tokenizer does not reproduce the text.
    """
    text, ends = message.text, message.role is Role.DOCUMENT
    space = vocabulary.prefix_space_before(text) if text else ""
    text_ids = vocabulary.encode(space + text)
    end_ids = [around.end_id] if ends and around.end_id is not None else []
    before, after = len(around.prefix_ids), len(end_ids)
    ids_T = np.array([*around.prefix_ids, *text_ids, *end_ids], np.int32)
    ends_T = np.full(len(ids_T), -1, np.int32)
    starts_T = ends_T.copy()
    lengths = vocabulary.lengths_W[np.asarray(text_ids, np.int64)]
    in_text = slice(before, before + len(text_ids))
    ends_T[in_text] = np.cumsum(lengths) - len(space)
    starts_T[in_text] = ends_T[in_text] - lengths
    num_bytes = len(text.encode())
    starts_T[len(ids_T) - after :] = ends_T[len(ids_T) - after :] = num_bytes
    # a token that also covers the space before a text has no start, as in a chat template
    starts_T[starts_T < 0] = -1
    ends_T[ends_T <= 0] = -1
    loss_mask_T = np.arange(len(ids_T)) >= max(before, 1)
    return RenderedTokens(ids_T, starts_T, ends_T, loss_mask_T)
