"""Of many distributions the tokens worth asking about."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from persea.losses import LMHead
from persea.training.on_policy import candidates as likely
from persea.training.on_policy.candidates import (
    MIN_CANDIDATE_PROB,
    candidates_from_hidden,
    candidates_from_logprobs,
)


@pytest.mark.parametrize("least", [MIN_CANDIDATE_PROB, 1e-2, 0.9])
def test_every_token_of_that_probability_and_no_other(
    monkeypatch: pytest.MonkeyPatch, least: float
) -> None:
    """However many positions are computed at once; the head's padding and soft cap count."""
    torch.manual_seed(0)
    head, hidden_LD = LMHead(torch.randn(90, 8), 70, torch.randn(90), 1.5, 20.0), torch.randn(11, 8)
    probs_LV = torch.softmax(head.logits(hidden_LD), -1).numpy()
    for at_once in (1 << 24, 70 * 3, 1):
        monkeypatch.setattr(likely, "MAX_LOGIT_ELEMENTS", at_once)
        found = candidates_from_hidden(hidden_LD, head, least)
        assert [found.at(k).tolist() for k in range(11)] == [
            np.flatnonzero(row >= least).tolist() for row in probs_LV
        ]
    assert [found.slice_positions(4, 6).at(k).tolist() for k in range(2)] == [
        found.at(4).tolist(),
        found.at(5).tolist(),
    ]
    assert (
        candidates_from_logprobs(torch.from_numpy(probs_LV).log(), least).ids_M.tolist()
        == found.ids_M.tolist()
    )


def test_of_nothing_nothing() -> None:
    found = candidates_from_hidden(torch.empty(0, 8), LMHead(torch.randn(5, 8), 5))
    assert found.offsets_L1.tolist() == [0] and not len(found.ids_M)
