"""New tokens for a student from the vocabulary of its teacher.

Merges are learned as without a teacher (`learn_merges`), but only those whose token the teacher has
too, or that make a character or a part of one. Then student and teacher start more tokens at the
same bytes, where their distributions are compared, and the rows of the new tokens can be mapped
from the teacher's (`map_embeddings`). Words may be counted in a text and in the teacher's
distributions over it, which name likely words that a short text lacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from persea.chat.documents import find_document_tokens
from persea.chat.families import CONTROL_MARKERS
from persea.errors import DataError
from persea.models.loading import ModelSource, load_tokenizer, read_weights
from persea.tokenization.pretokenizer import GPT2_SPLIT_PATTERN
from persea.tokenization.vocabulary import (
    BYTE_TO_CHAR,
    CHAR_TO_BYTE,
    Vocabulary,
    load_vocabulary,
)
from persea.vocab_extension.learn_merges import MIN_PAIR_COUNT, WORD_WEIGHT_SCALE
from persea.vocab_extension.map_embeddings import RowMethod

LETTERS, LETTERS_AND_MARKS = r"\p{L}", r"\p{L}\p{M}"
MAX_SCORED_BYTES = 65_536  # of each text
WINDOW_TOKENS = 128  # that a teacher reads at once: 134 MB of logits with 262,144 tokens
# A rarer token would get no weight beside the words of the text.
MIN_EXPECTED_COUNT = 0.5 / WORD_WEIGHT_SCALE


@dataclass(frozen=True, eq=False)
class TokenTeacher:
    """The teacher whose tokens a student gets.

    Attributes:
        source: The model.
        vocabulary: Its vocabulary.
        start_ids: Control tokens before a text, see `find_document_tokens`.
        method: How its rows become the student's; None = means of the student's own rows.
        scores_texts: Whether its likely tokens are counted where the texts have too few pairs.
    """

    source: ModelSource
    vocabulary: Vocabulary = field(repr=False)
    start_ids: tuple[int, ...]
    method: RowMethod | None
    scores_texts: bool


def open_token_teacher(
    source: ModelSource, method: RowMethod | None, scores_texts: bool, where: str
) -> TokenTeacher:
    """Open a teacher's tokenizer; its weights are not read.

    Raises:
        DataError: The tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(source, where)
    vocabulary = load_vocabulary(tokenizer, where, CONTROL_MARKERS)
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    start_ids = find_document_tokens(vocabulary, special, ()).prefix_ids
    return TokenTeacher(source, vocabulary, start_ids, method, scores_texts)


def make_wanted(teacher: Vocabulary) -> Callable[[str], bool]:
    """Return a test whether a token, in the byte-level alphabet, is wanted for the student.

    Wanted are the teacher's tokens, and characters and parts of them, from which those are merged.

    Args:
        teacher: The teacher's vocabulary, of any kind.
    """
    known = {_byte_level(raw) for raw in teacher.bytes_W if raw}

    def is_wanted(token: str) -> bool:
        if token in known:
            return True
        raw = bytes(CHAR_TO_BYTE[c] for c in token)
        return raw[0] >= 0xC0 and all(0x80 <= b < 0xC0 for b in raw[1:])

    return is_wanted


def count_expected_tokens(
    teacher: TokenTeacher,
    files: Sequence[Sequence[str]],
    progress: Callable[[str, float, str], None],
) -> list[dict[int, float]]:
    """Return for each file: token id -> the sum of the teacher's probabilities of it.

    The teacher reads at most MAX_SCORED_BYTES of each file, in windows of WINDOW_TOKENS. Lines that
    its tokenizer does not reproduce are left out.

    Args:
        teacher: The teacher; its weights are loaded for this call.
        files: The lines of each file.
        progress: Called with the step, the fraction done and a message.

    Raises:
        DataError: The weights cannot be read, or there are fewer logits than tokens.
    """
    import torch

    where, start_ids = teacher.source.model, list(teacher.start_ids)
    windows = [(k, ids) for k, lines in enumerate(files) for ids in _windows(teacher, lines)]
    progress("score", 0.0, where)
    on_gpu = torch.cuda.is_available()
    model, _ = read_weights(teacher.source, where, dtype="auto" if on_gpu else torch.float32)
    model = model.to("cuda" if on_gpu else "cpu").eval()
    num_rows = model.get_output_embeddings().weight.shape[0]
    if any(teacher.vocabulary.bytes_W[num_rows:]):
        raise DataError(
            f"{num_rows:,} logits for a vocabulary of {len(teacher.vocabulary):,} tokens",
            where=where,
            remedy="tokenizer and model do not belong together",
        )
    expected_FW = torch.zeros(len(files), num_rows, device=model.device)
    with torch.no_grad():
        for done, (k, ids) in enumerate(windows, 1):
            inputs = torch.tensor([start_ids + ids], device=model.device)
            logits_TW = model(inputs).logits[0, max(0, len(start_ids) - 1) : -1].float()
            expected_FW[k] += torch.softmax(logits_TW, -1).sum(0)
            progress("score", done / len(windows), f"{done} of {len(windows)} windows")
    size = min(num_rows, len(teacher.vocabulary))
    return [
        {i: float(expected_W[i]) for i in torch.nonzero(likely_W).flatten().tolist()}
        for expected_W in expected_FW[:, :size].cpu()
        for likely_W in (expected_W >= MIN_EXPECTED_COUNT,)
    ]


def _windows(teacher: TokenTeacher, lines: Sequence[str]) -> list[list[int]]:
    windows, num_bytes = list[list[int]](), 0
    for line in lines:
        if num_bytes >= MAX_SCORED_BYTES:
            break
        if ids := _encode(teacher.vocabulary, line):
            num_bytes += len(line.encode())
            windows += [ids[k : k + WINDOW_TOKENS] for k in range(0, len(ids), WINDOW_TOKENS)]
    return windows


def _encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """Return the tokens of a text; none if the tokenizer does not reproduce it."""
    try:
        return vocabulary.encode(text)
    except DataError:
        return []


def count_expected_words(
    backend: Tokenizer, teacher: Vocabulary, expected_counts: Mapping[int, float]
) -> dict[str, tuple[int, int]]:
    """Return word -> (count, weight), as `count_words` does, of a teacher's likely tokens.

    A token counts if it is one word for the student. It counts as seen often enough to be a
    pattern, and its weight is its expected number.

    Args:
        backend: The student's tokenizer.
        teacher: The teacher's vocabulary.
        expected_counts: Teacher's token id -> the sum of its probabilities over some text.
    """
    words: dict[str, tuple[int, int]] = {}
    for i, expected in expected_counts.items():
        raw = teacher.bytes_W[i]
        try:
            text = raw.decode() if raw else ""
        except UnicodeDecodeError:
            continue
        parts = backend.pre_tokenizer.pre_tokenize_str(text) if text else []
        if len(parts) == 1:
            words[parts[0][0]] = (MIN_PAIR_COUNT, max(1, round(WORD_WEIGHT_SCALE * expected)))
    return words


def add_counts(counts: dict[str, tuple[int, int]], more: Mapping[str, tuple[int, int]]) -> None:
    """Add the counts and weights of `more` to those of `counts`."""
    for word, (count, weight) in more.items():
        seen, weighed = counts.get(word, (0, 0))
        counts[word] = (seen + count, weighed + weight)


def shared_token_ids(student: Vocabulary, teacher: Vocabulary) -> tuple[tuple[int, int], ...]:
    """Return (student's id, teacher's id) of the tokens of two or more bytes that both have."""
    by_bytes = _ids_by_bytes(teacher)
    return tuple(
        (i, by_bytes[raw])
        for i, raw in enumerate(student.bytes_W)
        if raw is not None and len(raw) > 1 and raw in by_bytes
    )


def teacher_ids_of(
    teacher: Vocabulary, bytes_by_new_id: Mapping[int, bytes]
) -> dict[int, Sequence[int]]:
    """Return new id -> the teacher's tokens for its bytes: one where the teacher has that token.

    Parts of characters and bytes that the teacher cannot write are left out.
    """
    by_bytes, found = _ids_by_bytes(teacher), dict[int, Sequence[int]]()
    for i, raw in bytes_by_new_id.items():
        if raw in by_bytes:
            found[i] = (by_bytes[raw],)
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            continue
        if ids := _encode(teacher, text):
            found[i] = tuple(ids)
    return found


def join_marks(spec: Mapping[str, Any]) -> dict[str, Any]:
    r"""Return a tokenizer.json whose words hold combining marks as they hold letters.

    GPT-2's, Llama 3's and Qwen 3's patterns end a word before each combining mark (`\p{M}`): every
    vowel sign of Thai, Khmer or Burmese. Then no token spells a word of these scripts. In every
    pattern that names letters and no marks, marks are added to the letters.

    Returns:
        The content of the tokenizer.json; equal to `spec` if no pattern ends words before marks.
    """
    return {**spec, "pre_tokenizer": _join_marks(spec["pre_tokenizer"])}


def _join_marks(part: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if part is None:
        return None
    if part["type"] == "Sequence":
        inner = [_join_marks(one) for one in part["pretokenizers"]]
        flat = [
            p
            for one in inner
            if one is not None
            for p in (one["pretokenizers"] if one["type"] == "Sequence" else [one])
        ]
        return {**part, "pretokenizers": flat}
    if part["type"] == "ByteLevel" and part.get("use_regex", True):
        split = {
            "type": "Split",
            "pattern": {"Regex": _with_marks(GPT2_SPLIT_PATTERN)},
            "behavior": "Isolated",
            "invert": False,
        }
        return {"type": "Sequence", "pretokenizers": [split, {**part, "use_regex": False}]}
    pattern = part.get("pattern", {}).get("Regex", "") if part["type"] == "Split" else ""
    if LETTERS in pattern and r"\p{M}" not in pattern:
        return {**part, "pattern": {"Regex": _with_marks(pattern)}}
    return dict(part)


def _with_marks(pattern: str) -> str:
    r"""Add `\p{M}` to every `\p{L}` of a regular expression, inside or outside of a class."""
    out, in_class = [], False
    for piece in re.findall(r"\\p\{L\}|\\.|.", pattern, re.DOTALL):
        if piece == LETTERS:
            piece = LETTERS_AND_MARKS if in_class else f"[{LETTERS_AND_MARKS}]"
        elif piece in "[]":
            in_class = piece == "["
        out.append(piece)
    return "".join(out)


def _ids_by_bytes(vocabulary: Vocabulary) -> dict[bytes, int]:
    return {raw: i for i, raw in enumerate(vocabulary.bytes_W) if raw}


def _byte_level(raw: bytes) -> str:
    return "".join(BYTE_TO_CHAR[b] for b in raw)
