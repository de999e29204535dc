"""Losses over the student's own tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class LossOut:
    """loss: scalar tensor to minimise; terms: its parts, detached, nats per learned position; positions: how many."""

    loss: torch.Tensor
    terms: Mapping[str, float]
    positions: int


def cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> LossOut:
    """Mean negative log-likelihood, nats per position: -1/N sum_n log softmax(logits_n)[target_n]."""
    loss = F.cross_entropy(logits_NV, targets_N)
    return LossOut(loss, {"cross_entropy": float(loss.detach())}, len(targets_N))
