"""Tokens without a row of logits: a tokenizer may know more tokens than its model can predict.

Gemma 3 270M has 262,144 rows and a tokenizer of 262,145 tokens, the last a placeholder for
pictures. Such a control token is left out. A text token without a row would be encoded and then
looked up past the end of the embedding, so it is refused.
"""

from __future__ import annotations

from dataclasses import replace

from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary


def limit_to_rows(vocabulary: Vocabulary, num_rows: int, where: str) -> Vocabulary:
    """Return a vocabulary without the control tokens that have no row of logits.

    Their names stay in `control_token_ids`, so that a rendering that needs one can be refused.

    Args:
        vocabulary: The tokenizer.
        num_rows: Rows of logits of its model. More rows than tokens are padding.
        where: The place for error messages.

    Raises:
        DataError: A token of text has no row.
    """
    if num_rows >= len(vocabulary):
        return vocabulary
    texts = [(i, raw) for i, raw in enumerate(vocabulary.bytes_W[num_rows:], num_rows) if raw]
    if texts:
        first, raw = texts[0]
        raise DataError(
            f"{num_rows:,} logits for a vocabulary of {len(vocabulary):,} tokens: {len(texts):,} "
            f"tokens of text have none, the first is {raw.decode(errors='replace')!r} ({first})",
            where=where,
            remedy="tokenizer and model do not belong together",
        )
    return replace(vocabulary, bytes_W=vocabulary.bytes_W[:num_rows])


def tokens_without_row(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the names of the control tokens that `limit_to_rows` left out."""
    return tuple(t for t, i in vocabulary.control_token_ids.items() if i >= len(vocabulary))
