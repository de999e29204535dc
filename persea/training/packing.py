"""Several texts in one row of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from persea.errors import RefusedError
from persea.models.hidden_states import HEAD_PROBE_TOKENS, eval_mode, hidden_states, is_close

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def refuse_packing(model: PreTrainedModel, vocab_size: int, where: str) -> None:
    """Check that packed texts do not influence each other.

    Args:
        model: a causal language model.
        vocab_size: number of tokens of its tokenizer.
        where: place for error messages.

    Raises:
        RefusedError: if a text's hidden states change when another text precedes it in the row
            (recurrent state, attention without masks): packed texts would train on each other.
    """
    one_BS, two_BS = (
        torch.arange(n)[None] % vocab_size for n in (HEAD_PROBE_TOKENS + 1, HEAD_PROBE_TOKENS)
    )
    with eval_mode(model):
        alone_SD = hidden_states(model, two_BS, None)[0]
        both_SD = hidden_states(
            model,
            torch.cat([one_BS, two_BS], 1),
            None,
            torch.cat([torch.arange(HEAD_PROBE_TOKENS + 1), torch.arange(HEAD_PROBE_TOKENS)])[None],
        )[0]
    if not is_close(both_SD[HEAD_PROBE_TOKENS + 1 :], alone_SD, alone_SD.dtype):
        raise RefusedError(
            f"{type(model).__name__} does not separate texts in one row",
            where=where,
            remedy="packing: false",
        )


def pack_sequences(
    ids_BS: torch.Tensor, mask_BS: torch.Tensor, row_N: torch.Tensor, position_N: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Pack right-padded texts into fewer rows of the same width: first fit, longest first.

    The rest of a row is a text of its own without supervised positions.

    Args:
        ids_BS: int64 token ids, right-padded.
        mask_BS: 1 = token, 0 = padding.
        row_N: row of each wanted position.
        position_N: the position.

    Returns:
        Token ids [P, S], each token's position in its own text [P, S], and the new row_N and
        position_N.
    """
    width, lengths_B = ids_BS.shape[1], mask_BS.sum(1).tolist()
    used: list[int] = []
    place_B: list[tuple[int, int]] = [(0, 0)] * len(lengths_B)
    for b in sorted(range(len(lengths_B)), key=lambda b: -lengths_B[b]):
        row = next((r for r, full in enumerate(used) if full + lengths_B[b] <= width), len(used))
        used += [0] if row == len(used) else []
        place_B[b] = row, used[row]
        used[row] += lengths_B[b]
    ids_PS = torch.zeros((len(used), width), dtype=torch.int64)
    positions_PS = torch.stack([torch.arange(width) - full for full in used])
    for b, (row, begin) in enumerate(place_B):
        ids_PS[row, begin : begin + lengths_B[b]] = ids_BS[b, : lengths_B[b]]
        positions_PS[row, begin : begin + lengths_B[b]] = torch.arange(lengths_B[b])
    row_B, begin_B = torch.tensor(place_B).T
    return ids_PS, positions_PS, row_B[row_N], position_N + begin_B[row_N]
