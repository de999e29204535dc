"""Draw one token from logits, with a random generator for each answer."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from persea.errors import TeacherError
from persea.teachers.engines import Sampling

BROKEN_WEIGHTS_REMEDY = "the weights are broken, or need another dtype"


def seeded_generator(prompt: npt.NDArray[np.int32], sampling: Sampling) -> torch.Generator:
    """Return the random generator of one answer, decided by the seed and the prompt."""
    seed = f"{sampling.seed} ".encode() + np.asarray(prompt, np.int32).tobytes()
    digest = hashlib.sha256(seed).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_token(logits_W: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Take the most likely token, or sample from the fewest that reach `top_p` together."""
    if not sampling.temperature:
        return int(logits_W.argmax())
    prob_K, id_K = torch.softmax(logits_W.double() / sampling.temperature, -1).sort(descending=True)
    prob_K[prob_K.cumsum(0) - prob_K >= sampling.top_p] = 0
    return int(id_K[torch.multinomial(prob_K, 1, generator=generator)])


def require_finite_logits(scores: torch.Tensor) -> None:
    """Check that each row of logits has a finite maximum: the argmax of NaN is no answer.

    -inf is allowed, since suppressed tokens have it, but not in a whole row.

    Raises:
        TeacherError: A row has NaN or infinity, or -inf alone.
    """
    if not ((scores < float("inf")).all() and torch.isfinite(scores.amax(dim=-1)).all()):
        raise TeacherError(
            "logits that are not finite", where="generate", remedy=BROKEN_WEIGHTS_REMEDY
        )
