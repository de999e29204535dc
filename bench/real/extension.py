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
from bench.real.teacher import RealTeacher, Scored
from persea.tokenization.vocabulary import BYTE_TO_CHAR, Vocabulary
from persea.vocab_extension.learn_merges import (
    count_words,
    extend_tokenizer_spec,
    learn_merges,
    old_ids_of_new_tokens,
    refuse_changed_tokens,
)
from persea.vocab_extension.resize_model import initialize_new_embeddings

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
PENALTY = 0.1  # of the ridge, times the mean variance of the teacher's embeddings


def with_marks(spec: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json in which combining marks belong to words."""
    return spec | {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {
                    "type": "Split",
                    "pattern": {"Regex": WORDS},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        }
    }


def byte_level(raw: bytes) -> str:
    return "".join(BYTE_TO_CHAR[b] for b in raw)


def likely_words(
    backend: Tokenizer, teacher: Vocabulary, scored: Sequence[Scored]
) -> dict[str, tuple[int, int]]:
    """Return the teacher's likely tokens that are one word, with their expected count times 16."""
    mass = Counter[int]()
    for one in scored:
        for i, p in zip(one.drawn.ids_M.tolist(), one.drawn.probs_M.tolist(), strict=True):
            mass[i] += p
    out = {}
    for i, p in mass.items():
        raw = teacher.bytes_W[i]
        try:
            text = raw.decode() if raw else ""
        except UnicodeDecodeError:
            continue
        words = backend.pre_tokenizer.pre_tokenize_str(text) if text else []
        if len(words) == 1:
            out[words[0][0]] = (2, max(1, round(16 * p)))
    return out


def extended_spec(
    text: str, count: int, teacher: Vocabulary, texts: Sequence[Sequence[str]], scored: Any
) -> str:
    """Return tokenizer.json with about `count` tokens more, which the teacher has too.

    `texts` and `scored`: one part per language.
    """
    spec = with_marks(json.loads(text))
    backend = Tokenizer.from_str(json.dumps(spec))
    counts = count_words(backend, texts)
    for part in scored:
        for word, (n, weight) in likely_words(backend, teacher, part).items():
            seen, weighed = counts.get(word, (0, 0))
            counts[word] = (seen + n, weighed + weight)
    known = {byte_level(raw) for raw in teacher.bytes_W if raw}
    char_of = {c: b for b, c in BYTE_TO_CHAR.items()}

    def is_wanted(token: str) -> bool:
        if token in known:
            return True
        raw = bytes(char_of[c] for c in token)
        return raw[0] >= 0xC0 and all(0x80 <= b < 0xC0 for b in raw[1:])  # part of a character

    merges = learn_merges(backend, counts, count, is_wanted=is_wanted)
    return json.dumps(extend_tokenizer_spec(spec, merges))


def ridge_rows(
    model: Any,
    teacher_model: Any,
    student: Vocabulary,
    teacher: Vocabulary,
    new: Sequence[int],
    spelled: Sequence[Sequence[int]],
    orthogonal: bool = False,
) -> torch.Tensor:
    """Return rows for new student tokens: their mapped teacher rows (the mean of several).

    `student` is the longer vocabulary; tokens in `new` are left out of the fit.
    """
    with torch.no_grad():
        ours = model.get_input_embeddings().weight.float()
        theirs = teacher_model.get_input_embeddings().weight.float()
        of_teacher = {raw: i for i, raw in enumerate(teacher.bytes_W) if raw}
        fresh = set(new)
        pairs = [
            (i, of_teacher[raw])
            for i, raw in enumerate(student.bytes_W)
            if raw and raw in of_teacher and i not in fresh and len(raw) > 1
        ]
        y = ours[torch.tensor([i for i, _ in pairs])]
        x = theirs[torch.tensor([i for _, i in pairs])]
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        if orthogonal:
            left, _, right = torch.linalg.svd(x.T @ y, full_matrices=False)
            mapping = left @ right
        else:
            gram = x.T @ x
            gram += PENALTY * gram.diagonal().mean() * torch.eye(len(gram))
            mapping = torch.linalg.solve(gram, x.T @ y)
        rows = torch.stack([theirs[list(ids)].mean(0) for ids in spelled])
        mapped: torch.Tensor = (rows - mean_x) @ mapping
        # a map shrinks or stretches: give the rows the spread that known tokens have
        mapped *= y.norm(dim=1).mean() / ((x @ mapping).norm(dim=1).mean())
        return mapped + mean_y


def extend(model: Any, old: Speaker, spec: str, rows: str, teacher: RealTeacher | None) -> Speaker:
    """Give the model the rows of the longer vocabulary; return the longer vocabulary.

    rows: means (needs no teacher), ridge, orthogonal, or both (the mean of means and ridge).
    """
    longer = student_speaker(spec)
    refuse_changed_tokens(old.vocabulary, longer.vocabulary, "the extended student")
    pieces = old_ids_of_new_tokens(old.vocabulary.backend, longer.vocabulary.backend)
    initialize_new_embeddings(model, pieces)
    if teacher is not None:
        at, spelled = [], []
        for i in pieces:
            raw = longer.vocabulary.bytes_W[i]
            assert raw is not None
            try:
                ids = teacher.speaker.vocabulary.encode(raw.decode())
            except UnicodeDecodeError:
                continue
            at.append(i)
            spelled.append(ids)
        found = ridge_rows(
            model,
            teacher.model,
            longer.vocabulary,
            teacher.speaker.vocabulary,
            list(pieces),
            spelled,
            orthogonal=rows == "orthogonal",
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
