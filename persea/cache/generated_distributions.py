"""The distributions that a teacher's answers were drawn from, in place of a second pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from persea.cache.sparsifier import DistributionSparsifier
from persea.data.prompts import Prompt
from persea.distributions import SparseDistributions, concat_distributions
from persea.teachers.engines import EngineFailure, Reducer
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


def answer_distributions(
    teacher_name: str,
    complete_answers: Sequence[tuple[Answer, RenderedTokens]],
    teacher: Teacher,
    sparsifier: DistributionSparsifier,
    on_scored: Callable[[float], None],
) -> Iterator[SparseDistributions | EngineFailure]:
    """Yield the distributions of each answer, reduced by the server or by the sparsifier."""
    ids, loss_masks = (
        [t.ids_T for _, t in complete_answers],
        [t.loss_mask_T for _, t in complete_answers],
    )
    token_counts_W = np.zeros(len(teacher.renderer.vocabulary), np.int64)
    for one in ids:
        token_counts_W += np.bincount(one, minlength=len(token_counts_W))
    found: list[SparseDistributions | EngineFailure | None] = [
        generated_distributions(answer, tokens) for answer, tokens in complete_answers
    ]
    left = [k for k, one in enumerate(found) if one is None]
    reducer = sparsifier.for_answers(
        teacher_name, [complete_answers[k][0].prompt_id for k in left], token_counts_W
    )
    parts: dict[int, list[SparseDistributions]] = {k: [] for k in left}
    num_rows, num_scored = sum(int(loss_masks[k].sum()) for k in left), 0
    for index, part in teacher.engine.reduce_distributions(
        [ids[k] for k in left], [loss_masks[k] for k in left], reducer
    ):
        if isinstance(part, EngineFailure):
            found[left[index]] = part
            continue
        num_scored += len(part)
        parts[left[index]].append(part)
        on_scored(num_scored / max(1, num_rows))
    for k, result in enumerate(found):
        yield concat_distributions(parts[k]) if result is None else result
