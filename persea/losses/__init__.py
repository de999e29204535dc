"""Pure functions from logits and targets to a LossOut; they import torch, rows, bridge and masks only.

composed() is the default objective, for rows of every kind; cross_entropy() is supervised fine-tuning on the same answers;
full() is any divergence over events from whole distributions; chunk() the debiased chunk term; same_vocabulary() the
ordinary divergences.
"""

from persea.losses.chunk import Chunks, chunk
from persea.losses.events import composed, event_logprobs
from persea.losses.full import Dead, full
from persea.losses.targets import Entries, Targets, standing, targets, together
from persea.losses.token import Divergence, LossOut, cross_entropy, refuse_divergence, same_vocabulary

__all__ = ["Chunks", "Dead", "Divergence", "Entries", "LossOut", "Targets", "chunk", "composed", "cross_entropy", "event_logprobs", "full",
           "refuse_divergence", "same_vocabulary", "standing", "targets", "together"]
