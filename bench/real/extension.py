"""The student's vocabulary with tokens of the teacher's vocabulary, for the languages it learns.

Merges are learned as `persea extend` learns them, but only those whose token the teacher has too
(or a part of one character). They are counted in the training text and in the teacher's
distributions over it: the tokens that the teacher finds likely, with their probability. So the
vocabulary is not limited to the words of the text. A word may hold combining marks, which the
pre-tokenizer of SmolLM2 (GPT-2's) cuts at; other text is cut as before.

New rows: `means` of the rows of the old tokens; `ridge`, the teacher's embedding mapped by a ridge
regression fitted on the tokens that both vocabularies have; `orthogonal`, mapped by the orthogonal
matrix that fits best; or `both`, the mean of `means` and `ridge`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from bench.objectives.vocabularies import Speaker
from bench.real.models import student_speaker
from bench.real.teacher import RealTeacher
from persea.models.loading import ModelSource
from persea.tokenization.vocabulary import Vocabulary
from persea.vocab_extension.learn_merges import (
    count_words,
    extend_tokenizer_spec,
    learn_merges,
    old_ids_of_new_tokens,
    refuse_changed_tokens,
)
from persea.vocab_extension.map_embeddings import RowMethod, TeacherRows, set_mapped_rows
from persea.vocab_extension.resize_model import initialize_new_embeddings
from persea.vocab_extension.teacher_tokens import (
    add_counts,
    count_expected_words,
    join_marks,
    make_wanted,
    shared_token_ids,
    teacher_ids_of,
)


def extended_spec(
    text: str, count: int, teacher: Vocabulary, texts: Sequence[Sequence[str]], scored: Any
) -> str:
    """Return tokenizer.json with about `count` tokens more, which the teacher has too.

    `texts` and `scored`: one part per language.
    """
    spec = join_marks(json.loads(text))
    backend = Tokenizer.from_str(json.dumps(spec))
    counts = count_words(backend, texts)
    for part in scored:
        expected = Counter[int]()
        for one in part:
            for i, p in zip(one.drawn.ids_M.tolist(), one.drawn.probs_M.tolist(), strict=True):
                expected[i] += p
        add_counts(counts, count_expected_words(backend, teacher, expected))
    merges = learn_merges(backend, counts, count, is_wanted=make_wanted(teacher))
    return json.dumps(extend_tokenizer_spec(spec, merges))


def mapped_rows(
    model: Any,
    teacher_model: Any,
    student: Vocabulary,
    teacher: Vocabulary,
    new: Sequence[int],
    method: RowMethod,
) -> tuple[list[int], torch.Tensor]:
    """Return the new ids that the teacher can spell, and their rows mapped from the teacher's.

    `student` is the longer vocabulary; tokens in `new` are left out of the fit.
    """
    fresh = set(new)
    shared = [(i, j) for i, j in shared_token_ids(student, teacher) if i not in fresh]
    ids = teacher_ids_of(teacher, {i: student.bytes_W[i] or b"" for i in new})
    with torch.no_grad():
        ours = model.get_input_embeddings().weight.float().clone()
        set_mapped_rows(
            ours,
            teacher_model.get_input_embeddings().weight,
            TeacherRows(ModelSource("teacher"), method, tuple(shared), ids),
        )
    return list(ids), ours[list(ids)]


def extend(model: Any, old: Speaker, spec: str, rows: str, teacher: RealTeacher | None) -> Speaker:
    """Give the model the rows of the longer vocabulary; return the longer vocabulary.

    rows: means (needs no teacher), ridge, orthogonal, or both (the mean of means and ridge).
    """
    longer = student_speaker(spec)
    refuse_changed_tokens(old.vocabulary, longer.vocabulary, "the extended student")
    pieces = old_ids_of_new_tokens(old.vocabulary.backend, longer.vocabulary.backend)
    initialize_new_embeddings(model, pieces)
    if teacher is not None:
        at, found = mapped_rows(
            model,
            teacher.model,
            longer.vocabulary,
            teacher.speaker.vocabulary,
            list(pieces),
            "orthogonal" if rows == "orthogonal" else "ridge",
        )
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            if rows == "both":
                found = (found + weight[torch.tensor(at)]) / 2
            weight[torch.tensor(at)] = found.to(weight.dtype)
    return longer


def tokens_per_byte(who: Speaker, texts: Sequence[str]) -> float:
    sizes = [len(ids) for ids in who.vocabulary.encode_batch(list(texts))]
    return float(np.sum(sizes) / sum(len(t.encode()) for t in texts))
