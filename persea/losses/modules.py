"""The losses as modules, all with the call `loss_fn(hidden_or_logits, labels, targets)`.

`EventKL` and `CrossEntropy` train on captured answers; a recipe lists them under `training.loss`.
`EventDivergence` needs a teacher's whole distributions and `SpanLikelihood` the likelihoods of
spans: both are for a teacher in the loop. A new per-token loss derives from `TokenLoss`
(docs/new_loss.md). Half-precision logits are converted to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from persea.alignment.event_map import EventMap
from persea.distributions.lm_head import LMHead
from persea.errors import DataError, RecipeError
from persea.losses.chunked_head import (
    divergence_loss_from_hidden,
    event_kl_loss_from_hidden,
    token_loss_from_hidden,
)
from persea.losses.divergence import Divergence, divergence_of_logprobs
from persea.losses.event_divergence import MaskedEventMap, event_divergence_per_token
from persea.losses.event_kl import event_kl_loss, event_kl_metrics, event_kl_per_token
from persea.losses.event_sums import ImpossibleTokens
from persea.losses.loss import HiddenOrLogits, HiddenStates, Loss, LossOutput
from persea.losses.span_likelihood import SpanTargets, span_likelihood_loss
from persea.losses.targets import BatchTargets, EventTargets, build_batch_targets


def _float32_logits(logits_NV: torch.Tensor) -> torch.Tensor:
    """Return half-precision logits as float32: transformers loads many models in bfloat16.

    bfloat16 has 8 significant bits, too few to sum the probabilities of a vocabulary.
    """
    return logits_NV.float() if logits_NV.dtype in (torch.bfloat16, torch.float16) else logits_NV


class TokenLoss(Loss):
    """A loss that is a mean over positions. Subclasses define `name` and `token_losses`.

    Example:
        >>> import torch
        >>> from persea.losses import TokenLoss
        >>> class ErrorProbability(TokenLoss):
        ...     name = "error_probability"
        ...     def token_losses(self, logits_CV, labels_C, targets):
        ...         return 1 - logits_CV.softmax(-1).gather(1, labels_C[:, None]).squeeze(1)
        >>> out = ErrorProbability()(torch.zeros(2, 4), torch.tensor([0, 3]), ())
        >>> out.loss.item(), out.num_tokens
        (0.75, 2)
    """

    def token_losses(
        self, logits_CV: torch.Tensor, labels_C: torch.Tensor, targets: Sequence[BatchTargets]
    ) -> torch.Tensor:
        """Return the loss of each position.

        Args:
            logits_CV: float32 student logits of some positions.
            labels_C: int64 student tokens at these positions.
            targets: targets of each teacher, positions numbered from 0.

        Returns:
            Nats, [C]; differentiable in the logits.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_or_logits: HiddenOrLogits,
        labels_N: torch.Tensor,
        targets: Sequence[BatchTargets] = (),
        token_weight_N: torch.Tensor | None = None,
    ) -> LossOutput:
        """Compute the mean of `token_losses`; see `Loss.forward`."""
        if isinstance(hidden_or_logits, HiddenStates):
            return token_loss_from_hidden(
                *hidden_or_logits, labels_N, targets, self.token_losses, self.name, token_weight_N
            )
        loss_N = self.token_losses(_float32_logits(hidden_or_logits), labels_N, targets)
        loss = _weighted_mean(loss_N, token_weight_N)
        metrics = {self.name: loss_N.detach().mean()}
        return LossOutput(loss, metrics, len(labels_N), loss_N.detach())


class EventKL(Loss):
    """Forward KL over common events together with cross-entropy (the default; event_kl.py).

    Args:
        event_map: map between the vocabularies; needed only where targets are `EventTargets`, and
            checked against the logits.
        event_weight: weight a of the event term, in [0, 1]. The cross-entropy of a position has
            weight 1 - a M, with M the teacher's mass on its events.

    Example:
        >>> import torch
        >>> from persea.losses import EventKL
        >>> loss_fn = EventKL(event_weight=0.7)
        >>> out = loss_fn(torch.zeros(2, 4), torch.tensor([0, 3]), targets=())
        >>> round(out.loss.item(), 4), sorted(out.metrics)
        (1.3863, ['cross_entropy', 'event_kl', 'supervised'])
    """

    name: ClassVar[str] = "event_kl"

    def __init__(self, event_map: EventMap | None = None, event_weight: float = 0.7) -> None:
        super().__init__()
        if not 0 <= event_weight <= 1:
            raise RecipeError(
                f"event_weight is {event_weight:g}",
                where="losses.EventKL",
                remedy="pass a number from 0 to 1",
            )
        self.event_map, self.event_weight = event_map, event_weight

    def forward(
        self,
        hidden_or_logits: HiddenOrLogits,
        labels_N: torch.Tensor,
        targets: Sequence[BatchTargets | EventTargets] = (),
        token_weight_N: torch.Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss; `targets` has one element a teacher. See `Loss.forward`."""
        batch_targets = [self._batch_targets(one, len(labels_N)) for one in targets]
        if isinstance(hidden_or_logits, HiddenStates):
            return event_kl_loss_from_hidden(
                *hidden_or_logits, labels_N, batch_targets, self.event_weight, token_weight_N
            )
        logits_NV = _float32_logits(hidden_or_logits)
        labels_N = labels_N.to(logits_NV.device)
        if token_weight_N is None:
            return event_kl_loss(logits_NV, labels_N, batch_targets, self.event_weight)
        return _weighted_event_kl(
            logits_NV, labels_N, batch_targets, self.event_weight, token_weight_N
        )

    def _batch_targets(self, targets: BatchTargets | EventTargets, num_tokens: int) -> BatchTargets:
        """Turn targets over events into targets over student tokens."""
        if isinstance(targets, BatchTargets):
            return targets
        if self.event_map is None:
            raise DataError(
                "targets over events without an event map",
                where="losses.EventKL",
                remedy="pass event_map to EventKL, or BatchTargets",
            )
        return build_batch_targets(self.event_map, targets, num_tokens)

    def extra_repr(self) -> str:
        """Return the arguments for `repr`."""
        return f"event_weight={self.event_weight:g}"


class CrossEntropy(Loss):
    """Cross-entropy of the teacher's text: supervised fine-tuning. Targets are ignored.

    Example:
        >>> import torch
        >>> from persea.losses import CrossEntropy
        >>> out = CrossEntropy()(torch.zeros(1, 4), torch.tensor([2]))
        >>> round(out.loss.item(), 4)
        1.3863
    """

    name: ClassVar[str] = "cross_entropy"

    def forward(
        self,
        hidden_or_logits: HiddenOrLogits,
        labels_N: torch.Tensor,
        targets: Sequence[BatchTargets] = (),
        token_weight_N: torch.Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss; see `Loss.forward`."""
        out = EventKL(event_weight=0)(hidden_or_logits, labels_N, (), token_weight_N)
        return LossOutput(
            out.loss,
            {self.name: out.metrics["cross_entropy"]},
            out.num_tokens,
            out.token_loss_N,
            out.grad_norm_N,
        )


@dataclass(frozen=True, eq=False)
class TeacherDistributions:
    """Whole distributions of a teacher at N common boundaries.

    Attributes:
        outputs: natural log-probabilities [N, W], or the teacher's hidden states [N, D'] and head.
        student_impossible_tokens: student tokens that cannot follow the boundary; None = no mask.
        teacher_impossible_tokens: teacher tokens that cannot follow the boundary; None = no mask.
    """

    outputs: torch.Tensor | tuple[torch.Tensor, LMHead]
    student_impossible_tokens: ImpossibleTokens | None = None
    teacher_impossible_tokens: ImpossibleTokens | None = None


class EventDivergence(Loss):
    """Any divergence over common events, from the teacher's whole distributions.

    Args:
        event_map: map between the vocabularies; None = both share one vocabulary.
        divergence: forward KL, reverse KL or JSD.

    Example:
        >>> import torch
        >>> from persea.losses import Divergence, EventDivergence, TeacherDistributions
        >>> loss_fn = EventDivergence(divergence=Divergence.REVERSE)
        >>> teacher = TeacherDistributions(torch.zeros(1, 4).log_softmax(-1))
        >>> loss_fn(torch.zeros(1, 4), None, teacher).loss.item()
        0.0
    """

    name: ClassVar[str] = "event_divergence"
    trains_on_captures: ClassVar[bool] = False

    def __init__(
        self, event_map: EventMap | None = None, divergence: Divergence = Divergence.FORWARD
    ) -> None:
        super().__init__()
        self.event_map, self.divergence = event_map, divergence

    def forward(
        self,
        hidden_or_logits: HiddenOrLogits,
        labels_N: torch.Tensor | None,
        targets: TeacherDistributions,
        token_weight_N: torch.Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss; labels are ignored. See `Loss.forward`."""
        masked_map = (
            None
            if self.event_map is None
            else MaskedEventMap(
                self.event_map, targets.student_impossible_tokens, targets.teacher_impossible_tokens
            )
        )
        if isinstance(hidden_or_logits, HiddenStates):
            return divergence_loss_from_hidden(
                *hidden_or_logits, targets.outputs, masked_map, self.divergence, token_weight_N
            )
        teacher_NW = (
            targets.outputs
            if isinstance(targets.outputs, torch.Tensor)
            else torch.log_softmax(targets.outputs[1].logits(targets.outputs[0]), -1)
        )
        logits_NV, teacher_NW = _float32_logits(hidden_or_logits), _float32_logits(teacher_NW)
        if masked_map is None or masked_map.is_same_vocabulary:
            student_NV = torch.log_softmax(logits_NV, -1)
            loss_N = divergence_of_logprobs(teacher_NW, student_NV, self.divergence)
        else:
            loss_N = event_divergence_per_token(logits_NV, teacher_NW, masked_map, self.divergence)
        loss = _weighted_mean(loss_N, token_weight_N)
        metrics = {self.divergence.metric_name: loss_N.detach().mean()}
        return LossOutput(loss, metrics, len(loss_N), loss_N.detach())

    def extra_repr(self) -> str:
        """Return the arguments for `repr`."""
        return f"divergence={self.divergence.value}"


class SpanLikelihood(Loss):
    """Debiased likelihood matching of spans without a common boundary inside (span_likelihood.py).

    The targets are a pair: the spans, and the student tokens that cannot occur at their edges.

    Example:
        >>> import torch
        >>> from persea.losses import ImpossibleTokens, SpanLikelihood, SpanTargets
        >>> spans = SpanTargets(*map(torch.tensor, ([0, 0], [0, 1], [0], [-1], [-2.0])))
        >>> nothing = ImpossibleTokens(*(torch.empty(0, dtype=torch.int64) for _ in range(2)))
        >>> out = SpanLikelihood()(torch.zeros(2, 4), torch.tensor([0, 3]), (spans, nothing))
        >>> round(out.loss.item(), 4), out.num_tokens
        (0.2984, 1)
    """

    name: ClassVar[str] = "span_likelihood"
    trains_on_captures: ClassVar[bool] = False

    def forward(
        self,
        hidden_or_logits: HiddenOrLogits,
        labels_N: torch.Tensor,
        targets: tuple[SpanTargets, ImpossibleTokens],
        token_weight_N: torch.Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss; a weight belongs to a span, not a token. See `Loss.forward`."""
        if token_weight_N is not None:
            raise RecipeError(
                "spans have no token weights",
                where="losses.SpanLikelihood",
                remedy="multiply the loss instead",
            )
        logits_NV = (
            hidden_or_logits.head.logits(hidden_or_logits.hidden_ND)
            if isinstance(hidden_or_logits, HiddenStates)
            else hidden_or_logits
        )
        logits_NV = _float32_logits(logits_NV)
        return span_likelihood_loss(logits_NV, labels_N.to(logits_NV.device), *targets)


class WeightedLosses(Loss):
    """Weighted sum of losses. Event KL and cross-entropy run in one pass through the head.

    `w1 event_kl + w2 cross_entropy` equals `w1 + w2` times event KL with the event weight
    `w1 a / (w1 + w2)`: the cross-entropy of a position has the weight that its events leave over.

    Args:
        terms: losses and their weights, at least one.

    Example:
        >>> from persea.losses import CrossEntropy, EventKL, WeightedLosses
        >>> loss_fn = WeightedLosses([(EventKL(event_weight=1.0), 0.7), (CrossEntropy(), 0.3)])
        >>> loss_fn.terms
        [(EventKL(event_weight=0.7), 1.0)]
    """

    name: ClassVar[str] = "weighted"

    def __init__(self, terms: Sequence[tuple[Loss, float]]) -> None:
        super().__init__()
        self.terms = _fold_cross_entropy(terms)

    def forward(
        self,
        hidden_or_logits: HiddenOrLogits,
        labels_N: torch.Tensor,
        targets: Any = (),
        token_weight_N: torch.Tensor | None = None,
    ) -> LossOutput:
        """Compute the weighted sum; see `Loss.forward`."""
        outs = [
            (loss_fn(hidden_or_logits, labels_N, targets, token_weight_N), weight)
            for loss_fn, weight in self.terms
        ]
        if len(outs) == 1 and outs[0][1] == 1:
            return outs[0][0]
        token_losses = [
            out.token_loss_N * weight for out, weight in outs if out.token_loss_N is not None
        ]
        (first, weight), metrics = outs[0], dict[str, torch.Tensor]()
        for out, _ in outs:
            metrics |= out.metrics
        return LossOutput(
            torch.stack([out.loss * weight for out, weight in outs]).sum(),
            metrics,
            first.num_tokens,
            torch.stack(token_losses).sum(0) if len(token_losses) == len(outs) else None,
            # the norm of a sum of gradients is not known from the norms of its parts
            first.grad_norm_N * weight
            if len(outs) == 1 and first.grad_norm_N is not None
            else None,
        )


def _fold_cross_entropy(terms: Sequence[tuple[Loss, float]]) -> list[tuple[Loss, float]]:
    """Merge event KL and cross-entropy into one event KL; see `WeightedLosses`."""
    events = [(one, weight) for one, weight in terms if isinstance(one, EventKL)]
    text = sum(weight for one, weight in terms if isinstance(one, CrossEntropy))
    if len(events) != 1 or not text:
        return list(terms)
    loss_fn, weight = events[0]
    total = weight + text
    total = 1.0 if abs(total - 1) < 1e-9 else total  # 0.7 + 0.3 is one, also in floats
    folded = EventKL(loss_fn.event_map, weight * loss_fn.event_weight / total)
    others = [pair for pair in terms if not isinstance(pair[0], EventKL | CrossEntropy)]
    return [(folded, total), *others]


def _weighted_event_kl(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    targets: Sequence[BatchTargets],
    event_weight: float,
    token_weight_N: torch.Tensor,
) -> LossOutput:
    """Event KL from logits with weights: the gradient is scaled by row."""
    per_token = event_kl_per_token(logits_NV.detach(), labels_N, targets, event_weight)
    gradient_NV = torch.empty_like(logits_NV)
    per_token.write_gradient(logits_NV.detach(), gradient_NV)
    weight_N = token_weight_N.to(logits_NV)
    gradient_NV.mul_(weight_N[:, None] / len(labels_N))
    value = (per_token.loss_N * weight_N).sum() / len(labels_N)
    # value of the loss, gradient of the closed form
    surrogate = (logits_NV * gradient_NV).sum()
    return LossOutput(
        value + (surrogate - surrogate.detach()),
        event_kl_metrics(per_token.cross_entropy_N, per_token.event_loss_N, per_token.supervised_N),
        len(labels_N),
        per_token.loss_N,
    )


def _weighted_mean(loss_N: torch.Tensor, weight_N: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over positions of loss times weight."""
    return loss_N.mean() if weight_N is None else (loss_N * weight_N.to(loss_N)).mean()
