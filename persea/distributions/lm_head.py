"""The language-model head: from hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from persea.distributions.blocks import BlockedLogits, LogitBuffer, block_logits
from persea.distributions.matmul import project_strip


@dataclass(frozen=True, eq=False)
class LMHead:
    """The linear map from hidden states to logits, as the model applies it.

    With z = scale (h W^T + b), the logits are z, or cap tanh(z / cap) where there is a soft cap.

    Attributes:
        weight_VD: the whole weight matrix; rows past `vocab_size` are padding and get no gradient.
        vocab_size: number of tokens V of the student's tokenizer.
        bias_V: bias, or None.
        logit_scale: factor of the head's output.
        logit_softcap: cap of the logits; 0 = none.
    """

    weight_VD: torch.Tensor
    vocab_size: int
    bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return all logits [N, V] at once, float32 (float64 for float64 input); differentiable."""
        bias_V = None if self.bias_V is None else self.bias_V[: self.vocab_size]
        logits_NV = (
            torch.nn.functional.linear(
                hidden_ND, self.weight_VD[: self.vocab_size].to(hidden_ND.dtype), bias_V
            )
            * self.logit_scale
        )
        logits_NV = logits_NV if logits_NV.dtype is torch.float64 else logits_NV.float()
        return (
            self.logit_softcap * torch.tanh(logits_NV / self.logit_softcap)
            if self.logit_softcap
            else logits_NV
        )

    def blocked_logits(
        self, hidden_ND: torch.Tensor, buffer: LogitBuffer | None = None
    ) -> BlockedLogits:
        """Return all logits of some positions and the sums of their blocks; not differentiable.

        The weight is multiplied strip by strip, so that each strip of logits is scaled and summed
        while the cache holds it. Half-precision weights on a GPU give float32 logits.

        Args:
            hidden_ND: Hidden states.
            buffer: Memory for the logits, which the next call with it overwrites; None = new.
        """
        weight_VD = self.weight_VD.detach()

        def write_strip(out_NS: torch.Tensor, begin: int, end: int) -> None:
            project_strip(hidden_ND, weight_VD[begin:end], out_NS)
            if self.bias_V is not None:
                out_NS += self.bias_V.detach()[begin:end]
            if self.logit_scale != 1:
                out_NS *= self.logit_scale
            if self.logit_softcap:
                out_NS.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)

        return block_logits(len(hidden_ND), self.vocab_size, write_strip, hidden_ND.device, buffer)
