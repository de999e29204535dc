"""Pure functions from logits and targets to a LossOut; they import torch, rows, bridge and masks only.

composed() is the default objective, for rows of every kind; cross_entropy() is supervised fine-tuning on the same answers;
full() is any divergence over events from whole distributions; chunk() the debiased chunk term; same_vocabulary() the
ordinary divergences. composed_head() and divergence_head() are the same from hidden states and a head, for training; on a GPU they
run as Triton kernels (fused.py, imported there only), on a CPU over the products of products.py.
"""

from persea.losses.chunked_head import (
    LMHead,
    divergence_loss_from_hidden,
    event_kl_loss_from_hidden,
)
from persea.losses.divergence import (
    Divergence,
    LossOutput,
    cross_entropy,
    divergence_loss,
    refuse_divergence,
)
from persea.losses.event_divergence import MaskedEventMap, event_divergence_loss
from persea.losses.event_kl import event_kl_loss, event_logprobs
from persea.losses.event_sums import ImpossibleTokens
from persea.losses.span_likelihood import SpanTargets, span_likelihood_loss
from persea.losses.targets import (
    BatchTargets,
    EventTargets,
    build_batch_targets,
    build_event_targets,
    concat_event_targets,
    split_targets,
)

__all__ = [
    "BatchTargets",
    "Divergence",
    "EventTargets",
    "ImpossibleTokens",
    "LMHead",
    "LossOutput",
    "MaskedEventMap",
    "SpanTargets",
    "build_batch_targets",
    "build_event_targets",
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
