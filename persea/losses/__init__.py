"""Pure functions from logits and targets to a LossOut; they import torch, rows, bridge and masks only.

composed() is the default objective, for rows of every kind; cross_entropy() is supervised fine-tuning on the same answers;
full() is any divergence over events from whole distributions; chunk() the debiased chunk term; same_vocabulary() the
ordinary divergences. composed_head() and divergence_head() are the same from hidden states and a head, for training; on a GPU they
run as Triton kernels (fused.py, imported there only), on a CPU over the products of products.py.
"""

from persea.losses.chunked_head import Head, composed_head, divergence_head
from persea.losses.divergence import Divergence, LossOut, cross_entropy, refuse_divergence, same_vocabulary
from persea.losses.event_divergence import Sides, full
from persea.losses.event_kl import composed, event_logprobs
from persea.losses.event_sums import Dead
from persea.losses.span_likelihood import Chunks, chunk
from persea.losses.targets import Entries, Targets, split, standing, targets, together

__all__ = ["Chunks", "Dead", "Divergence", "Entries", "Head", "LossOut", "Sides", "Targets", "chunk", "composed", "composed_head",
           "cross_entropy", "divergence_head", "event_logprobs", "full", "refuse_divergence", "same_vocabulary", "split", "standing", "targets",
           "together"]
