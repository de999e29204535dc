"""Answer many prompts with one continuous batch, and keep the distributions that it draws from.

Prompts are sorted by length, the longest first, and prefilled with others of about their length, so
that little of a pass is padding. When answers end, the next prompts take their places. Each answer
has its own random generator, so it depends on its prompt and the seed alone. The logits that a
token is drawn from are its distribution: reduced there, they need no second pass over the answer.
What all prompts begin with is computed once (`shared_prefix.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from persea.distributions import SparseDistributions, concat_distributions
from persea.distributions.blocks import blocks_of_logits
from persea.distributions.sparse import slice_distributions
from persea.teachers.engines import GeneratedTokens, Reducer
from persea.teachers.engines.batching import (
    ContinuousBatch,
    Generation,
    as_teacher_error,
)
from persea.teachers.engines.shared_prefix import compute_shared_prefix

if TYPE_CHECKING:
    from persea.teachers.engines.transformers import TransformersEngine

MAX_PADDING_SHARE = 0.125  # of the tokens of prompts that are prefilled together
# Free places, as a share of the batch, that new prompts wait for: a prefill delays every answer.
REFILL_SHARE = 0.125


@dataclass(eq=False)
class _Distributions:
    """Reduces the logits of each pass. Index k is the k-th prompt."""

    reducer: Reducer
    index_of: dict[Generation, int]
    rows: list[list[SparseDistributions]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = [[] for _ in self.index_of]

    def collect(self, drawn: Sequence[Generation], logits_BW: torch.Tensor) -> None:
        """Reduce the logits that each answer's newest token was drawn from."""
        at = [k for k, generation in enumerate(drawn) if generation.error is None]
        if not at:
            return
        index_N = np.array([self.index_of[drawn[k]] for k in at], np.int64)
        row_N = np.array([len(drawn[k].ids) - 1 for k in at], np.int64)
        target_N = np.array([drawn[k].ids[-1] for k in at], np.int64)
        blocks = blocks_of_logits(logits_BW if len(at) == len(drawn) else logits_BW[at])
        reduced = self.reducer.reduce(blocks, index_N, row_N, target_N)
        for n, index in enumerate(index_N.tolist()):
            self.rows[index].append(slice_distributions(reduced, n, n + 1))


def generate_batched(
    engine: TransformersEngine,
    prompts: Sequence[npt.NDArray[np.int32]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    reducer: Reducer | None = None,
) -> list[GeneratedTokens] | None:
    """Answer prompts; see the head of this file.

    Args:
        engine: Runs the weights; at most its `batch_size` answers share a pass.
        prompts: Token ids, int32 [T] each.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Longest answer, in tokens.
        reducer: Reduces the distribution of each token; None = keep none.

    Returns:
        The answers in order; None if the model's cache cannot be joined, so that answers cannot
        share passes.

    Raises:
        TeacherError: The model failed, or its logits are not finite.
    """
    answers = [Generation(p.tolist(), stop_ids, max_new_tokens, engine.sampling) for p in prompts]
    kept = None
    if reducer is not None:
        kept = _Distributions(reducer, {answer: k for k, answer in enumerate(answers)})
    try:
        prefix = compute_shared_prefix(engine, [answer.prompt for answer in answers])
    except Exception as error:
        raise as_teacher_error(error, 1) from error
    num_shared = 0 if prefix is None else len(prefix.ids)
    batch = ContinuousBatch(engine, None if kept is None else kept.collect, prefix)
    waiting = sorted(answers, key=lambda answer: len(answer.prompt), reverse=True)
    while waiting or batch.members:
        batch.step()
        free = engine.batch_size - len(batch.members)
        if waiting and (not batch.members or free >= max(1, engine.batch_size * REFILL_SHARE)):
            for group in _groups(_admit(waiting, batch, free), num_shared):
                batch.add(group)
                if not batch.can_join:
                    return None
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        engine.on_progress(sum(map(_share_done, answers)) / len(answers))
    return [
        GeneratedTokens(
            np.array(answer.ids, np.int32),
            None if kept is None or not kept.rows[k] else concat_distributions(kept.rows[k]),
        )
        for k, answer in enumerate(answers)
    ]


def _share_done(answer: Generation) -> float:
    return 1.0 if answer.is_finished else len(answer.ids) / answer.max_new_tokens


def _admit(waiting: list[Generation], batch: ContinuousBatch, free: int) -> list[Generation]:
    """Take prompts out of `waiting` that fit into the batch; at least one if it is empty."""
    admitted: list[Generation] = []
    while waiting and len(admitted) < free and batch.has_room(waiting[0], admitted):
        admitted.append(waiting.pop(0))
    return admitted


def _groups(
    sorted_answers: Sequence[Generation], num_shared: int = 0
) -> Iterator[list[Generation]]:
    """Split prompts, the longest first, into groups with little padding.

    The first `num_shared` tokens of each prompt are not computed again, and do not count.
    """
    group: list[Generation] = []
    for answer in sorted_answers:
        width = len((group or [answer])[0].prompt) - num_shared
        tokens = sum(len(g.prompt) - num_shared for g in [*group, answer])
        if group and width * (len(group) + 1) - tokens > MAX_PADDING_SHARE * tokens:
            yield group
            group = []
        group.append(answer)
    if group:
        yield group
