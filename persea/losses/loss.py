"""The interface of a loss: `loss_fn(hidden_or_logits, labels, targets) -> LossOutput`.

A loss is an `nn.Module` without parameters. It takes logits, or hidden states together with the
language-model head; from hidden states no `[positions, vocabulary]` matrix is ever held
(chunked_head.py). Metrics are detached tensors: a loss never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch

from persea.distributions.lm_head import LMHead


@dataclass(frozen=True)
class LossOutput:
    """The value of a loss over N positions.

    Attributes:
        loss: scalar tensor to minimise, the (weighted) mean over positions.
        metrics: parts of the loss by name: detached scalar tensors, nats per position.
        num_tokens: number of positions (of spans, for `SpanLikelihood`) that `loss` is a mean over.
        token_loss_N: loss of each position before its weight, detached; None if unknown.
        grad_norm_N: norm of the gradient of `num_tokens * loss` with respect to each hidden state,
            weights included; None unless the loss was computed from hidden states.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor]
    num_tokens: int
    token_loss_N: torch.Tensor | None = None
    grad_norm_N: torch.Tensor | None = None


class HiddenStates(NamedTuple):
    """Hidden states [N, D] before the language-model head, and the head."""

    hidden_ND: torch.Tensor
    head: LMHead


HiddenOrLogits: TypeAlias = torch.Tensor | HiddenStates


class Loss(torch.nn.Module):
    """Base class of losses: modules without parameters.

    Subclasses define `name`, the key of `training.loss` in a recipe, and `forward`.

    Attributes:
        name: name in recipes and metrics, snake case.
        trains_on_captures: whether the targets are those of a captured answer (`BatchTargets`), so
            that a recipe may list the loss. The others need a teacher in the loop.
    """

    name: ClassVar[str]
    trains_on_captures: ClassVar[bool] = True

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> LossOutput:
            """Declare the type of `forward`: `nn.Module` declares Any."""

    def forward(
        self,
        hidden_or_logits: HiddenOrLogits,
        labels_N: torch.Tensor,
        targets: Any,
        token_weight_N: torch.Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss at N supervised positions.

        Args:
            hidden_or_logits: float32 logits [N, V] without padded columns, or `HiddenStates`.
            labels_N: int64, the student token at each position.
            targets: targets of the teacher; the type depends on the loss.
            token_weight_N: weight of each position's loss before the mean over N; None = 1.

        Returns:
            The loss, its metrics and the number of positions.
        """
        raise NotImplementedError
