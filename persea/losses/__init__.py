"""Losses: modules with one call, and the pure functions behind them.

    loss_fn = EventKL(event_weight=0.7)
    out = loss_fn(hidden_or_logits, labels, targets)    # LossOutput: loss, metrics, num_tokens

`LOSSES` lists every loss; docs/new_loss.md adds one. The functions compute the same from logits
(`event_kl_loss`, `event_divergence_loss`, `span_likelihood_loss`, `divergence_loss`) or from hidden
states and the language-model head (`..._from_hidden`), which never holds a full matrix of logits. A
GPU runs Triton kernels (triton_kernels.py), imported only there.
"""

from collections.abc import Iterable

from persea.distributions.lm_head import LMHead
from persea.errors import RecipeError
from persea.losses.chunked_head import (
    divergence_loss_from_hidden,
    event_kl_loss_from_hidden,
)
from persea.losses.divergence import (
    Divergence,
    cross_entropy,
    divergence_loss,
    refuse_divergence,
)
from persea.losses.event_divergence import MaskedEventMap, event_divergence_loss
from persea.losses.event_kl import event_kl_loss, event_logprobs
from persea.losses.event_sums import ImpossibleTokens
from persea.losses.loss import HiddenStates, Loss, LossOutput
from persea.losses.modules import (
    CrossEntropy,
    EventDivergence,
    EventKL,
    SpanLikelihood,
    TeacherDistributions,
    TokenLoss,
    WeightedLosses,
)
from persea.losses.span_likelihood import SpanTargets, span_likelihood_loss
from persea.losses.targets import (
    BatchTargets,
    EventTargets,
    build_batch_targets,
    build_event_targets,
    concat_event_targets,
    split_targets,
)

LOSSES: tuple[type[Loss], ...] = (
    CrossEntropy,
    EventDivergence,
    EventKL,
    SpanLikelihood,
)


def build_loss(terms: Iterable[tuple[str, float]]) -> Loss:
    """Build the weighted sum of losses that a recipe lists under `training.loss`.

    Event KL is built with event weight 1; a cross-entropy term in the same sum takes the rest.

    Args:
        terms: name and weight of each loss.

    Raises:
        RecipeError: for an unknown name, and for a loss that cannot train on captured answers.

    Example:
        >>> from persea.losses import build_loss
        >>> build_loss([("event_kl", 0.7), ("cross_entropy", 0.3)]).terms
        [(EventKL(event_weight=0.7), 1.0)]
    """
    known = {one.name: one for one in LOSSES if one.trains_on_captures}
    built: list[tuple[Loss, float]] = []
    for name, weight in terms:
        if name not in known:
            raise RecipeError(
                f"no loss {name!r} that trains on captured answers",
                where="training.loss",
                remedy=f"known: {', '.join(sorted(known))}",
            )
        built.append((EventKL(event_weight=1.0) if name == EventKL.name else known[name](), weight))
    return WeightedLosses(built)


__all__ = [
    "LOSSES",
    "BatchTargets",
    "CrossEntropy",
    "Divergence",
    "EventDivergence",
    "EventKL",
    "EventTargets",
    "HiddenStates",
    "ImpossibleTokens",
    "LMHead",
    "Loss",
    "LossOutput",
    "MaskedEventMap",
    "SpanLikelihood",
    "SpanTargets",
    "TeacherDistributions",
    "TokenLoss",
    "WeightedLosses",
    "build_batch_targets",
    "build_event_targets",
    "build_loss",
    "concat_event_targets",
    "cross_entropy",
    "divergence_loss",
    "divergence_loss_from_hidden",
    "event_divergence_loss",
    "event_kl_loss",
    "event_kl_loss_from_hidden",
    "event_logprobs",
    "refuse_divergence",
    "span_likelihood_loss",
    "split_targets",
]
