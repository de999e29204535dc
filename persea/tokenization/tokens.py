"""A conversation as tokens of one tokenizer: ids, byte offsets in the content, loss mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]  # ids, positions and counts


@dataclass(frozen=True)
class RenderedTokens:
    """A conversation as token ids of one tokenizer. T = tokens.

    The byte offsets refer to the content of the conversation: the UTF-8 bytes of all its parts,
    concatenated, with one unused byte between two parts, so that the end of one part and the start
    of the next are different offsets. A part that the family drops has no tokens. All tokenizers
    share these offsets, so tokens of two tokenizers are comparable.

    Attributes:
        ids_T: int32 token ids.
        starts_T: int32, offset of the first content byte of the token. -1 for a template token
            without content bytes, and for a token that also covers text of the template, on either
            side. The token that ends the turn lies at the end of the content and has no bytes
            (start = end).
        ends_T: int32, offset one past the last content byte of the token; -1 for a template token.
        loss_mask_T: bool, True for the tokens of the last assistant turn, which the model must
            generate itself, including its stop token.
    """

    ids_T: npt.NDArray[np.int32]
    starts_T: npt.NDArray[np.int32]
    ends_T: npt.NDArray[np.int32]
    loss_mask_T: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids_T)
