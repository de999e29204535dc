"""Extension: more tokens for what a tokenizer breaks into bytes: byte-pair encoding gone on with, from where its own merges stop.

Merges are learned inside the tokenizer's own words and stand behind its own merges: a word without a new pair is cut as before. No known
token gets another id. Opening a file, `tokenizers` (0.23) numbers added tokens that its model's vocabulary does not hold from that
vocabulary's size on: one token more, and every control would move by one. So controls are written into the vocabulary; that none is
read out of plain text there is proven for each tokenizer.
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
HELD_OUT_LINE_INTERVAL = 10  # every tenth line is measured, and nothing is learned on it
WORD_WEIGHT_SCALE = (
    16  # of the weight of a word, which is whole: a file's weight is rounded by at most a sixteenth
)


@dataclass(frozen=True)
class MergeTrainingText:
    """A text file: the lines that merges are learned on, and those held out."""

    file: str
    sha256: str
    training_lines: tuple[str, ...] = field(repr=False)
    held_out_lines: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class TokenizationCost:
    """What a file's held-out lines cost: bytes, and tokens before and after."""

    file: str
    sha256: str
    lines: int
    bytes: int
    tokens_before: int
    tokens_after: int


# ---- learning --------------------------------------------------------------------------------------------------------


def read_merge_training_texts(file_specs: Sequence[str]) -> tuple[MergeTrainingText, ...]:
    """Text files, each `FILE` or `FILE#key` as `check.texts` names it; a .jsonl file's key is `text` where none is named.

    Of each, every tenth line is held out; no line that is held out anywhere is learned on. Raises DataError as `check.read_lines` does, and
    for fewer than ten lines.
    """
    found = {}
    for reference in file_specs:
        name, sign, _ = reference.partition("#")
        if Path(name).exists() and not Path(name).is_file():
            raise DataError(
                "not a file",
                where=name,
                remedy="write the text to one; a pipe can be read only once",
            )
        lines = read_text_lines(
            f"{name}#text" if not sign and name.endswith(".jsonl") else reference, name
        )
        found[reference] = (
            name,
            digest_file(Path(name)),
            [text for _, text in lines if text.strip()],
        )
    held = {
        text
        for _, _, texts in found.values()
        for text in texts[HELD_OUT_LINE_INTERVAL - 1 :: HELD_OUT_LINE_INTERVAL]
    }
    out = tuple(
        MergeTrainingText(
            name,
            sha256,
            tuple(t for t in texts if t not in held),
            tuple(texts[HELD_OUT_LINE_INTERVAL - 1 :: HELD_OUT_LINE_INTERVAL]),
        )
        for name, sha256, texts in found.values()
    )
    for one in out:
        if not (one.training_lines and one.held_out_lines):
            raise DataError(
                f"fewer than {HELD_OUT_LINE_INTERVAL} different lines with a text",
                where=one.file,
                remedy="give more: every tenth is held out, to measure on",
            )
    return out


def count_words(backend: Tokenizer, files: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Word -> (how often it was seen, what it counts for).

    A file counts as if it were as long as the longest, so that none drowns another: of Lao with a fiftieth of Khmer's text 512 tokens leave .254
    tokens a byte, as one text .418; of Khmer .234 and .199 (bench/results/extension.json, `balance`).
    """
    sizes = [sum(len(text.encode()) for text in texts) for texts in files]
    added = sorted(
        (t.content for t in backend.get_added_tokens_decoder().values() if not t.special),
        key=len,
        reverse=True,
    )
    cut = re.compile(
        "|".join(map(re.escape, added)) or r"(?!)"
    ).split  # an added token is no word, and no part of one
    seen, weight = Counter[str](), Counter[str]()
    for texts, size in zip(files, sizes, strict=True):
        normal = (
            backend.normalizer.normalize_str(part) if backend.normalizer else part
            for text in texts
            for part in cut(text)
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
    """A pair in a heap: of equal counts the last by the alphabet comes first."""

    __slots__ = ()

    def __lt__(self, other: tuple[str, ...]) -> bool:
        return tuple.__gt__(self, other)


def learn_merges(
    backend: Tokenizer,
    word_counts: Mapping[str, tuple[int, int]],
    num_tokens: int,
    on_token: Callable[[int], None] = lambda fresh: None,
) -> list[Merge]:
    """Byte-pair encoding gone on with: each time the pair that counts most and was seen twice, until `tokens` new tokens are made or no such
    pair is left. A pair that spells a token of the vocabulary is merged into that one; a pair that spells an added token, a control above
    all, never is merged.
    """
    spec = json.loads(backend.to_str())
    known, barred = (
        set(spec["model"]["vocab"]),
        {s for t in spec["added_tokens"] for s in (t["content"], _to_byte_level(t["content"]))},
    )
    ranks: dict[Merge, int] = {
        (a, b): rank for rank, (a, b) in reversed(list(enumerate(spec["model"]["merges"])))
    }
    parts, times = (
        [[t.value for t in backend.model.tokenize(word)] for word in word_counts],
        list(word_counts.values()),
    )
    seen, counts, where = Counter[Merge](), Counter[Merge](), defaultdict[Merge, set[int]](set)

    def count(k: int, sign: int) -> None:
        for pair in pairwise(parts[k]):
            seen[pair] += sign * times[k][0]
            counts[pair] += sign * times[k][1]
            where[pair].add(k)

    for k in range(len(parts)):
        count(k, 1)
    queued = dict(
        counts
    )  # what a pair counted for when it was last put on the heap; that may have become less, never more
    heap = [(-n, _ReverseOrderedPair(pair)) for pair, n in queued.items()]
    heapq.heapify(heap)
    out: list[Merge] = []
    fresh = 0
    while heap and fresh < num_tokens:
        n, (one, other) = heapq.heappop(heap)
        pair, token = (one, other), one + other
        if counts[pair] != -n:
            queued[pair] = counts[pair]
            heapq.heappush(heap, (-counts[pair], _ReverseOrderedPair(pair)))
        elif seen[pair] >= 2 and token not in barred:
            out.append(pair)
            ranks.setdefault(pair, len(ranks))
            touched = where.pop(pair)
            for k in touched:
                count(k, -1)
                parts[k] = apply_all_merges(parts[k], ranks)
                count(k, 1)
            for new in {new for k in touched for new in pairwise(parts[k])}:
                if counts[new] > queued.get(new, 0):
                    queued[new] = counts[new]
                    heapq.heappush(heap, (-counts[new], _ReverseOrderedPair(new)))
            fresh += token not in known
            known.add(token)
            on_token(fresh)
    return out


def apply_all_merges(parts: Sequence[str], ranks: Mapping[Merge, int]) -> list[str]:
    """Parts of a word, merged on until no merge is left: one that makes a known token may set off older ones."""
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
    """A text in the byte-level alphabet."""
    return "".join(BYTE_TO_CHAR[b] for b in text.encode())


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def extend_tokenizer_spec(
    spec: Mapping[str, Any], merges: Sequence[Merge], first_id: int = 0
) -> dict[str, Any]:
    """A tokenizer.json's content with these merges behind its own. New ids begin at `first`, or behind every id it knows."""
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
    """New id -> the ids that the tokenizer before cuts that token into."""
    known = old_tokenizer.get_vocab(with_added_tokens=True)
    return {
        i: [t.id for t in old_tokenizer.model.tokenize(token)]
        for token, i in new_tokenizer.get_vocab(with_added_tokens=True).items()
        if token not in known
    }


def refuse_unextendable_tokenizer(
    vocabulary: Vocabulary, spec: Mapping[str, Any], where: str
) -> None:
    """Raises Refused for a tokenizer whose merges cannot be gone on with.

    SentencePiece's word (Gemma, Llama 2) is the whole text: merges would join across words. And no merge may join its bytes of fallback, which
    its decoder reads back one by one: the very scripts that are to gain would not.
    """
    if not vocabulary.byte_level or load_pretokenizer(vocabulary).never_splits:
        raise RefusedError(
            "its tokenizer does not cut text into words, and merges would join across them",
            where=where,
            remedy="extend a student whose byte-level BPE does: Llama 3, Qwen, gpt-oss",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if spec["model"].get(key):
            raise RefusedError(
                f"its tokenizer has a {key}, and how to go on with it is not known",
                where=where,
                remedy="extend a student whose tokenizer has none",
            )


def refuse_changed_tokens(old: Vocabulary, new: Vocabulary, where: str) -> None:
    """Raises Refused where a known token has another id, other bytes or another role, or where plain text is read as a control."""
    before, after = (v.backend.get_vocab(with_added_tokens=True) for v in (old, new))
    other = [
        token
        for token, i in before.items()
        if after.get(token) != i or old.bytes_W[i] != new.bytes_W[i]
    ]
    other += [token for token, _ in old.control_token_ids.items() ^ new.control_token_ids.items()]
    if other:
        raise RefusedError(
            f"{len(other)} known tokens would be others, {other[0]!r} first",
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
                f"a plain text that says {text!r} would be read as that control token",
                where=where,
                remedy="extend a student of another family",
            )


def measure_tokenization_cost(
    text: MergeTrainingText, old_vocabulary: Vocabulary, new_vocabulary: Vocabulary
) -> TokenizationCost:
    """What the held-out lines cost. Raises DataError for a line that a tokenizer does not give back."""
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
