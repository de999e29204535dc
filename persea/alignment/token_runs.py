"""Bytes and words of a run of text tokens."""

from __future__ import annotations

from collections.abc import Container
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from persea.tokenization.pretokenizer import (
    Pretokenizer,
    char_to_byte_offsets,
    decode_whole_characters,
)
from persea.tokenization.vocabulary import Vocabulary


def split_run(
    ids_T: npt.NDArray[np.integer],
    vocabulary: Vocabulary,
    pretokenizer: Pretokenizer,
    added_tokens: Container[bytes],
) -> tuple[bytes, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split the text of some tokens into words.

    Args:
        ids_T: Ids of text tokens, one after the other.
        vocabulary: Bytes of the tokens.
        pretokenizer: Where words end.
        added_tokens: Bytes of the tokens that are cut out of a text before it is split.

    Returns:
        The bytes of the tokens, the byte positions where words begin, the byte position of each
        token's end.
    """
    ids = ids_T.tolist()
    raw = b"".join(vocabulary.bytes_W[i] or b"" for i in ids)
    ends_T = np.cumsum(vocabulary.lengths_W[ids_T])
    if pretokenizer.never_splits:
        return raw, np.zeros(1, np.int64), ends_T
    # the text before and after an added token is split on its own
    edges = {0, len(raw)} | {
        int(e)
        for i, end in zip(ids, ends_T.tolist(), strict=True)
        if vocabulary.bytes_W[i] in added_tokens
        for e in (end - vocabulary.lengths_W[i], end)
    }
    cuts: list[int] = []
    for begin, end in pairwise(sorted(edges)):
        text = decode_whole_characters(raw[begin:end])[0]
        offsets = char_to_byte_offsets(text, pretokenizer.split_positions(text))
        cuts += [begin, *(begin + offsets).tolist()]
    return raw, np.unique(np.array(cuts, np.int64)), ends_T
