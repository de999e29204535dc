"""Continue a tokenizer's byte-pair encoding on new text, and extend the tokenizer with the merges.

Merges are learned within the words of the tokenizer's own pre-tokenizer, and are appended to its
own merges: a word without a new pair is split as before, and no known token gets another id. When
`tokenizers` (0.23) opens a file, it numbers added tokens that the model's vocabulary lacks from the
vocabulary's size on: every new token would shift all control tokens by one. So control tokens are
written into the vocabulary. `refuse_changed_tokens` proves for each tokenizer that none is read out
of plain text.
"""

from __future__ import annotations

import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from persea.data.text_files import read_text_lines
from persea.errors import DataError, RefusedError
from persea.storage import digest_file
from persea.tokenization.pretokenizer import load_pretokenizer
from persea.tokenization.vocabulary import BYTE_TO_CHAR, Vocabulary

Merge = tuple[str, str]
HELD_OUT_LINE_INTERVAL = 10  # every tenth line is held out, to measure on
# Word weights are integers: this factor keeps the rounding of a file's weight below 1/16.
WORD_WEIGHT_SCALE = 16
MIN_PAIR_COUNT = 2  # a pair that occurs once is no pattern


@dataclass(frozen=True)
class MergeTrainingText:
    """A text file, split into lines to learn from and lines to measure on."""

    file: str
    sha256: str
    training_lines: tuple[str, ...] = field(repr=False)
    held_out_lines: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class TokenizationCost:
    """Bytes of a file's held-out lines, and their tokens before and after the extension."""

    file: str
    sha256: str
    lines: int
    bytes: int
    tokens_before: int
    tokens_after: int


# --- learning ---


def read_merge_training_texts(file_specs: Sequence[str]) -> tuple[MergeTrainingText, ...]:
    """Read text files, and hold out every tenth line of each.

    A line that is held out in one file is not learned from in another.

    Args:
        file_specs: `FILE` with a text a line, or `FILE#key` for that key of JSON lines. The key of
            a .jsonl file is `text` if none is given.

    Raises:
        DataError: A file cannot be read, or has fewer than ten different lines.
    """
    found = {}
    for reference in file_specs:
        name, separator, _ = reference.partition("#")
        if Path(name).exists() and not Path(name).is_file():
            raise DataError(
                "not a file",
                where=name,
                remedy="write the text to a file: a pipe can be read only once",
            )
        lines = read_text_lines(
            f"{name}#text" if not separator and name.endswith(".jsonl") else reference, name
        )
        found[reference] = (
            name,
            digest_file(Path(name)),
            [text for _, text in lines if text.strip()],
        )
    held_out = {
        text
        for _, _, texts in found.values()
        for text in texts[HELD_OUT_LINE_INTERVAL - 1 :: HELD_OUT_LINE_INTERVAL]
    }
    training_texts = tuple(
        MergeTrainingText(
            name,
            sha256,
            tuple(t for t in texts if t not in held_out),
            tuple(texts[HELD_OUT_LINE_INTERVAL - 1 :: HELD_OUT_LINE_INTERVAL]),
        )
        for name, sha256, texts in found.values()
    )
    for one in training_texts:
        if not (one.training_lines and one.held_out_lines):
            raise DataError(
                f"fewer than {HELD_OUT_LINE_INTERVAL} different lines with text",
                where=one.file,
                remedy="give more text: every tenth line is held out, to measure on",
            )
    return training_texts


def count_words(backend: Tokenizer, files: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Count the words of some files; return word -> (count, weight).

    Each file counts as if it were as long as the longest, so that a small one is not ignored. With
    equal weight for each byte instead, 512 tokens learned on Khmer and a fiftieth as much Lao leave
    Lao at .418 tokens a byte (.254 with weights) and Khmer at .199 (.234):
    bench/results/extension.json, `balance`.

    Args:
        backend: The tokenizer.
        files: The lines of each file.
    """
    sizes = [sum(len(text.encode()) for text in texts) for texts in files]
    added = sorted(
        (t.content for t in backend.get_added_tokens_decoder().values() if not t.special),
        key=len,
        reverse=True,
    )
    # added tokens are not words and not parts of words
    split_added = re.compile("|".join(map(re.escape, added)) or r"(?!)").split
    seen, weight = Counter[str](), Counter[str]()
    for texts, size in zip(files, sizes, strict=True):
        normal = (
            backend.normalizer.normalize_str(part) if backend.normalizer else part
            for text in texts
            for part in split_added(text)
            if part
        )
        found = Counter(
            word for part in normal for word, _ in backend.pre_tokenizer.pre_tokenize_str(part)
        )
        seen.update(found)
        weight.update(
            {word: n * (WORD_WEIGHT_SCALE * max(sizes) // size) for word, n in found.items()}
        )
    return {word: (n, weight[word]) for word, n in seen.items()}


class _ReverseOrderedPair(tuple[str, str]):
    """A pair in a heap: of equal counts the alphabetically last comes first."""

    __slots__ = ()

    def __lt__(self, other: tuple[str, ...]) -> bool:
        return tuple.__gt__(self, other)


def learn_merges(
    backend: Tokenizer,
    word_counts: Mapping[str, tuple[int, int]],
    num_tokens: int,
    on_token: Callable[[int], None] = lambda num_new: None,
    is_wanted: Callable[[str], bool] = lambda token: True,
) -> list[Merge]:
    """Continue byte-pair encoding: merge the pair with the greatest weight, again and again.

    Stops when `num_tokens` new tokens are made, or no pair occurs twice. A pair that spells a known
    token is merged into it. A pair that spells an added token is never merged.

    Args:
        backend: The tokenizer.
        word_counts: Word -> (count, weight), from `count_words`.
        num_tokens: New tokens to make.
        on_token: Called with the number of new tokens after each merge.
        is_wanted: Whether a token, in the byte-level alphabet, may be made.

    Returns:
        The merges, in the order in which they were learned.
    """
    spec = json.loads(backend.to_str())
    known_tokens, added_tokens = (
        set(spec["model"]["vocab"]),
        {s for t in spec["added_tokens"] for s in (t["content"], _to_byte_level(t["content"]))},
    )
    ranks: dict[Merge, int] = {
        (a, b): rank for rank, (a, b) in reversed(list(enumerate(spec["model"]["merges"])))
    }
    parts, times = list[list[str]](), list[tuple[int, int]]()
    for word, word_times in word_counts.items():
        pieces = [t.value for t in backend.model.tokenize(word)]
        if "".join(pieces) == word:  # a byte that the vocabulary lacks is dropped without a word
            parts.append(pieces)
            times.append(word_times)
    seen, counts, where = Counter[Merge](), Counter[Merge](), defaultdict[Merge, set[int]](set)

    def count(k: int, sign: int) -> None:
        for pair in pairwise(parts[k]):
            seen[pair] += sign * times[k][0]
            counts[pair] += sign * times[k][1]
            where[pair].add(k)

    for k in range(len(parts)):
        count(k, 1)
    # the count of each pair when it was last pushed; its count now may be lower, never higher
    queued = dict(counts)
    heap = [(-n, _ReverseOrderedPair(pair)) for pair, n in queued.items()]
    heapq.heapify(heap)
    merges: list[Merge] = []
    num_new = 0
    while heap and num_new < num_tokens:
        n, (left, right) = heapq.heappop(heap)
        pair, token = (left, right), left + right
        if counts[pair] != -n:
            queued[pair] = counts[pair]
            heapq.heappush(heap, (-counts[pair], _ReverseOrderedPair(pair)))
        elif seen[pair] >= MIN_PAIR_COUNT and token not in added_tokens and is_wanted(token):
            merges.append(pair)
            ranks.setdefault(pair, len(ranks))
            touched = where.pop(pair)
            is_new = token not in known_tokens
            for k in touched:
                count(k, -1)
                # only a merge that makes a known token may enable older merges
                parts[k] = (
                    merge_pair(parts[k], pair) if is_new else apply_all_merges(parts[k], ranks)
                )
                count(k, 1)
            for new in {new for k in touched for new in pairwise(parts[k])}:
                if counts[new] > queued.get(new, 0):
                    queued[new] = counts[new]
                    heapq.heappush(heap, (-counts[new], _ReverseOrderedPair(new)))
            num_new += is_new
            known_tokens.add(token)
            on_token(num_new)
    return merges


def merge_pair(parts: Sequence[str], pair: Merge) -> list[str]:
    """Merge every occurrence of one pair in the parts of a word, from left to right."""
    out: list[str] = []
    k = 0
    while k < len(parts):
        if k + 1 < len(parts) and (parts[k], parts[k + 1]) == pair:
            out.append(parts[k] + parts[k + 1])
            k += 2
        else:
            out.append(parts[k])
            k += 1
    return out


def apply_all_merges(parts: Sequence[str], ranks: Mapping[Merge, int]) -> list[str]:
    """Apply merges to the parts of a word until none is left.

    A merge that makes a known token may enable older merges.
    """
    parts, none = list(parts), len(ranks)
    while len(parts) > 1:
        ordered = [ranks.get(pair, none) for pair in pairwise(parts)]
        rank = min(ordered)
        if rank == none:
            break
        k = ordered.index(rank)
        parts[k : k + 2] = [parts[k] + parts[k + 1]]
    return parts


def _to_byte_level(text: str) -> str:
    """Spell a text in the byte-level alphabet."""
    return "".join(BYTE_TO_CHAR[b] for b in text.encode())


# --- the tokenizer ---


def extend_tokenizer_spec(
    spec: Mapping[str, Any], merges: Sequence[Merge], first_id: int = 0
) -> dict[str, Any]:
    """Return the content of a tokenizer.json with merges appended to its own.

    Args:
        spec: The content of the tokenizer.json.
        merges: The merges to append.
        first_id: First id that new tokens may have; they are numbered behind all known ids.
    """
    vocab: dict[str, int] = spec["model"]["vocab"] | {
        t["content"]: t["id"] for t in spec["added_tokens"]
    }
    free = max(first_id, 1 + max(vocab.values()))
    for token in dict.fromkeys(a + b for a, b in merges):
        if token not in vocab:
            vocab[token] = free
            free += 1
    return {
        **spec,
        "model": {
            **spec["model"],
            "vocab": vocab,
            "merges": [*spec["model"]["merges"], *map(list, merges)],
        },
    }


def old_ids_of_new_tokens(
    old_tokenizer: Tokenizer, new_tokenizer: Tokenizer
) -> dict[int, list[int]]:
    """Return new id -> the ids into which the old tokenizer splits that token."""
    known = old_tokenizer.get_vocab(with_added_tokens=True)
    return {
        i: [t.id for t in old_tokenizer.model.tokenize(token)]
        for token, i in new_tokenizer.get_vocab(with_added_tokens=True).items()
        if token not in known
    }


def refuse_unextendable_tokenizer(
    vocabulary: Vocabulary, spec: Mapping[str, Any], where: str
) -> None:
    """Raise if persea cannot extend a tokenizer.

    A word of SentencePiece (Gemma, Llama 2) is the whole text: merges would cross words. And its
    fallback bytes are decoded one by one, so no merge may join them: the scripts that need new
    tokens would gain nothing.

    Raises:
        RefusedError: The tokenizer has no words, or a feature that persea cannot extend.
    """
    if not vocabulary.byte_level or load_pretokenizer(vocabulary).never_splits:
        raise RefusedError(
            "its tokenizer does not split text into words, so merges would cross word boundaries",
            where=where,
            remedy="extend a student with byte-level BPE that does: Llama 3, Qwen, gpt-oss",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if spec["model"].get(key):
            raise RefusedError(
                f"its tokenizer has a {key}, which persea cannot extend",
                where=where,
                remedy="extend a student whose tokenizer has none",
            )


def refuse_changed_tokens(old: Vocabulary, new: Vocabulary, where: str) -> None:
    """Raise if a known token changes, or if plain text is read as a control token.

    Raises:
        RefusedError: A known token has another id, other bytes or another role in the new
            tokenizer.
    """
    before, after = (v.backend.get_vocab(with_added_tokens=True) for v in (old, new))
    changed = [
        token
        for token, i in before.items()
        if after.get(token) != i or old.bytes_W[i] != new.bytes_W[i]
    ]
    changed += [token for token, _ in old.control_token_ids.items() ^ new.control_token_ids.items()]
    if changed:
        raise RefusedError(
            f"{len(changed)} known tokens would change, the first is {changed[0]!r}",
            where=where,
            remedy="extend a student of another family",
        )
    texts, ids = (
        [front + control for control in new.control_token_ids for front in ("", " ", "a", "\n")],
        set(new.control_token_ids.values()),
    )
    for text, encoding in zip(
        texts, new.backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
    ):
        if not ids.isdisjoint(encoding.ids):
            raise RefusedError(
                f"the plain text {text!r} would be read as a control token",
                where=where,
                remedy="extend a student of another family",
            )


def measure_tokenization_cost(
    text: MergeTrainingText, old_vocabulary: Vocabulary, new_vocabulary: Vocabulary
) -> TokenizationCost:
    """Count the tokens of the held-out lines before and after.

    Raises:
        DataError: A tokenizer does not reproduce a line.
    """
    tokens = [
        sum(map(len, v.encode_batch(text.held_out_lines))) for v in (old_vocabulary, new_vocabulary)
    ]
    return TokenizationCost(
        text.file,
        text.sha256,
        len(text.held_out_lines),
        sum(len(t.encode()) for t in text.held_out_lines),
        *tokens,
    )
