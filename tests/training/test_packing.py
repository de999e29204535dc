"""Several texts in one row do not see each other, or are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconH1Config

from persea.errors import RefusedError
from persea.training.packing import pack_sequences, refuse_packing
from tests.models.test_hidden_states import V, tiny


def test_a_state_that_runs_through_a_row_is_refused():
    model = tiny(
        FalconH1Config,
        lm_head_multiplier=0.5,
        mamba_d_ssm=32,
        mamba_n_heads=2,
        mamba_d_state=8,
        mamba_n_groups=1,
        num_key_value_heads=2,
    )
    with pytest.raises(
        RefusedError, match="does not separate texts in one row"
    ):  # its state runs through
        refuse_packing(model, V, "training.packing")


def test_packing_keeps_every_text_whole_and_knows_where_it_went():
    rng = torch.Generator().manual_seed(0)
    lengths = [7, 3, 4, 2, 5]
    ids, mask = torch.zeros(5, 7, dtype=torch.int64), torch.zeros(5, 7, dtype=torch.int64)
    for b, n in enumerate(lengths):
        ids[b, :n], mask[b, :n] = torch.randint(1, V, (n,), generator=rng), 1
    row, at = mask.nonzero(as_tuple=True)
    packed_ids, positions, row_N, at_N = pack_sequences(ids, mask, row, at)
    assert packed_ids.shape == (3, 7)  # 7, 5 + 2, 4 + 3
    assert torch.equal(packed_ids[row_N, at_N], ids[row, at])
    assert torch.equal(positions[row_N, at_N], at)  # each counts from its own begin
    assert len({(int(r), int(a)) for r, a in zip(row_N, at_N, strict=True)}) == sum(lengths)
    one_row = pack_sequences(ids[:2], mask[:2], *mask[:2].nonzero(as_tuple=True))
    assert one_row[1].tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 0, 1, 2, 3],
    ]  # what is left counts anew: a text of its own
