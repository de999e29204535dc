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

    def stored_dtype(self, hidden_ND: torch.Tensor) -> torch.dtype:
        """Return the type of `blocked_logits`.

        On a CPU a product in bfloat16 stays as it is: float32 would add nothing. What follows a
        product (bias, scale, cap) is computed in float32.
        """
        return hidden_ND.dtype if self._is_product(hidden_ND) else torch.float32

    def _is_product(self, hidden_ND: torch.Tensor) -> bool:
        """Return whether the logits are the product of hidden states and weight alone."""
        is_plain = self.bias_V is None and self.logit_scale == 1 and not self.logit_softcap
        return is_plain and hidden_ND.device.type == "cpu"

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
        weight_VD, hidden_ND = self.weight_VD.detach(), hidden_ND.contiguous()

        def make_strip(begin: int, end: int) -> torch.Tensor:
            strip_NS = project_strip(hidden_ND, weight_VD[begin:end])
            if self._is_product(hidden_ND):
                return strip_NS
            strip_NS = strip_NS.float()
            if self.bias_V is not None:
                strip_NS += self.bias_V.detach()[begin:end]
            if self.logit_scale != 1:
                strip_NS *= self.logit_scale
            if self.logit_softcap:
                strip_NS.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)
            return strip_NS

        return block_logits(
            len(hidden_ND),
            self.vocab_size,
            make_strip,
            hidden_ND.device,
            buffer,
            self.stored_dtype(hidden_ND),
        )
