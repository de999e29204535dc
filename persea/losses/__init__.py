"""Pure functions from logits and a Batch to a LossOut; they import torch, align and bridge only.

composed() is the default objective; cross_entropy() is supervised fine-tuning on the same answers.
"""

from persea.losses.events import Targets, composed, event_logprobs
from persea.losses.token import LossOut, cross_entropy

__all__ = ["LossOut", "Targets", "composed", "cross_entropy", "event_logprobs"]
