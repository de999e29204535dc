"""The distributions that a teacher's answers were drawn from, in place of a second pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persea.cache.sparsifier import DistributionSparsifier
from persea.data.prompts import Prompt
from persea.distributions import SparseDistributions
from persea.teachers.engines import Reducer
from persea.teachers.teacher import Answer, Teacher
from persea.tokenization.tokens import RenderedTokens


def reducer_of_prompts(
    sparsifier: DistributionSparsifier, teacher: Teacher, prompts: Sequence[Prompt]
) -> Reducer | None:
    """Return what samples the answers' distributions as they are generated; None if that is late.

    The rest of a topk distribution is spread by the tokens of all answers, which are not there yet.
    """
    if sparsifier.max_kl is not None or not teacher.engine.capabilities.has_full_distributions:
        return None
    return sparsifier.for_answers(teacher.name, [p.id for p in prompts])


def generated_distributions(answer: Answer, tokens: RenderedTokens) -> SparseDistributions | None:
    """Return the distributions that an answer was drawn from, if they are those of its tokens.

    The rendered answer is what a student learns. It can differ from the generated tokens: a
    template trims a text, and a tokenizer can write one text in several ways.
    """
    if answer.generated is None or answer.generated.distributions is None:
        return None
    assert answer.prompt_ids_T is not None
    begin = len(answer.prompt_ids_T)
    ids_T = np.concatenate([answer.prompt_ids_T, answer.generated.ids_T])
    is_generated_T = (np.arange(len(tokens)) >= begin) & (np.arange(len(tokens)) < len(ids_T))
    is_same = np.array_equal(tokens.ids_T[: len(ids_T)], ids_T) and np.array_equal(
        tokens.loss_mask_T, is_generated_T
    )
    return answer.generated.distributions if is_same else None
