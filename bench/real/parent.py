"""The untrained student as a teacher of its own trained copy: the same tokenizer, whole rows.

It holds what the student knew (English beside new languages), and it recovers a student whose
layers were pruned. At each position of its texts the loss is share x KL(parent || student) + (1 -
share) x cross-entropy. New tokens of a longer student have no probability in the parent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.objectives.vocabularies import Speaker
from bench.real.models import Packed, load, pack, states
from bench.real.train import Loss


@dataclass(frozen=True, eq=False)
class Parent:
    """The student's base model with a cache of its hidden states."""

    folder: Path
    cache: Path
    speaker: Speaker

    @cached_property
    def model(self) -> Any:
        return load(self.folder, torch.float32).eval().requires_grad_(False)

    @property
    def head_VD(self) -> torch.Tensor:
        """The rows of the parent's vocabulary."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return the hidden states before each token of each text and before its end."""
        self.cache.mkdir(parents=True, exist_ok=True)
        out = []
        end = self.speaker.renderer.stop_ids[0]
        for text in texts:
            path = self.cache / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.pt"
            if not path.is_file():
                ids = self.speaker.vocabulary.encode(text)
                hidden_SD = states(self.model, pack([ids], self.speaker.start, end))
                torch.save(hidden_SD.to(torch.bfloat16).clone(), path)
            out.append(torch.load(path, weights_only=True).float())
        return out


def taught_beside(
    loss: Loss, head_VD: torch.Tensor, states_of: Mapping[int, torch.Tensor], share: float
) -> Loss:
    """Return a loss in which the parent teaches some of the texts.

    Args:
        loss: The loss of all texts; cross-entropy for those of the parent.
        head_VD: The parent's head.
        states_of: Text -> the parent's hidden states, one for each label of the text.
        share: Weight of the divergence.
    """

    def with_parent(logits_SV: torch.Tensor, packed: Packed, chosen: Sequence[int]) -> torch.Tensor:
        total = loss(logits_SV, packed, chosen)
        for b, k in enumerate(chosen):
            if k not in states_of:
                continue
            at = packed.text_S == b
            with torch.no_grad():
                parent_NV = torch.log_softmax(states_of[k] @ head_VD.T, -1)
            own_NV = torch.log_softmax(logits_SV[at], -1)
            cross = torch.nn.functional.nll_loss(own_NV, packed.labels_S[at], reduction="sum")
            known_NV = own_NV[:, : len(head_VD)]
            divergence = (parent_NV.exp() * (parent_NV - known_NV)).sum()
            total = total + share * (divergence - cross) / len(packed.labels_S)
        return total

    return with_parent
