"""What a text shares with another: runs of 13 words for what is tested, near-duplicates for what is asked twice.

Words where a script parts them with spaces; characters where it does not (Chinese, Japanese, Thai, Khmer, Lao, Burmese), so many to a word
that a run says about as much as one of English words: one English word of NTREX is 1.6 Chinese, 2.4 Japanese, 4.9 Thai, 4.8 Lao, 6.0 Khmer
and 6.4 Burmese characters in the same sentences (tests/data/test_dedup.py counts them).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

CONTAMINATION_NGRAM_WORDS = 13.0  # words; the length that GPT-3 and most after it decontaminate by
MIN_CONTAMINATION_WORDS = 8.0  # a tested text shorter than RUN is found as a whole from so many words on, below it only where it is the whole prompt
MAX_LINE_REPEATS = (
    5  # a line that stands in more tested texts than this is how the set asks, not what it asks
)
SHINGLE_WORDS = 3.0  # words of a run by which near-duplicates are compared
MINHASH_PERMUTATIONS, LSH_BANDS = (
    128,
    32,
)  # of the hashes: of pairs that share .8, one in 20 million is missed
SCRIPT_WORD_WEIGHTS = (  # characters of scripts without spaces, and how much of a word one is
    ("\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0003134f", 0.6),
    ("\u3040-\u30ff\u31f0-\u31ff", 0.36),
    ("\u0e00-\u0eff", 0.2),
    ("\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f", 0.16),
)
WORD_OR_CHARACTER = re.compile(
    "|".join(f"([{characters}])" for characters, _ in SCRIPT_WORD_WEIGHTS)
    + r"|((?:(?!["
    + "".join(c for c, _ in SCRIPT_WORD_WEIGHTS)
    + r"])\w)+)"
)


def normalize_text(text: str) -> str:
    """NFC, small letters, one space for each white space: two texts are the same where these are."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def weighted_words(text: str) -> tuple[list[str], list[float]]:
    """The words and characters of a text without its marks, and the weight of each in words."""
    found = list(WORD_OR_CHARACTER.finditer(unicodedata.normalize("NFC", text).casefold()))
    weights = [*(weight for _, weight in SCRIPT_WORD_WEIGHTS), 1.0]
    return [m.group() for m in found], [weights[(m.lastindex or 1) - 1] for m in found]


def word_ngrams(text: str, min_weight: float) -> Iterator[str]:
    """From each place on, the shortest run of at least this weight, where the text is long enough."""
    words, weights = weighted_words(text)
    end, held = 0, 0.0
    for begin in range(len(words)):
        while held < min_weight - 1e-9 and end < len(words):
            held += weights[end]
            end += 1
        if held < min_weight - 1e-9:
            return
        yield " ".join(words[begin:end])
        held -= weights[begin]


class HeldOutIndex:
    """Texts that somebody is tested on, each by its name."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        named = [(name, text) for name, text in texts]
        lines = Counter(
            line for _, text in named for line in set(map(normalize_text, text.split("\n")))
        )
        self._names_by_text: dict[str, str] = {}
        self._names_by_ngram: dict[str, str] = {}
        self._short_texts: dict[
            str, list[tuple[str, str]]
        ] = {}  # the first LEAST words -> (all words, name)
        for name, text in named:
            kept = "\n".join(
                line for line in text.split("\n") if lines[normalize_text(line)] <= MAX_LINE_REPEATS
            )
            self._names_by_text.setdefault(normalize_text(text), name)
            if not normalize_text(kept):
                continue
            self._names_by_text.setdefault(normalize_text(kept), name)
            for run in word_ngrams(kept, CONTAMINATION_NGRAM_WORDS):
                self._names_by_ngram.setdefault(run, name)
            words, weights = weighted_words(kept)
            if MIN_CONTAMINATION_WORDS <= sum(weights) < CONTAMINATION_NGRAM_WORDS:
                self._short_texts.setdefault(
                    next(word_ngrams(kept, MIN_CONTAMINATION_WORDS)), []
                ).append((" ".join(words), name))

    def find_exact(self, text: str) -> str:
        """The name of the tested text that this one is; "" where there is none."""
        return self._names_by_text.get(normalize_text(text), "")

    def find_overlap(self, text: str) -> str:
        """The name of a tested text of which this one holds 13 words on end, or all where it has 8 to 13; "" where there is none."""
        for run in word_ngrams(text, CONTAMINATION_NGRAM_WORDS):
            if run in self._names_by_ngram:
                return self._names_by_ngram[run]
        if not self._short_texts:
            return ""
        words = weighted_words(text)[0]
        for begin, run in enumerate(word_ngrams(text, MIN_CONTAMINATION_WORDS)):
            for whole, name in self._short_texts.get(run, ()):
                if " ".join(words[begin : begin + whole.count(" ") + 1]) == whole:
                    return name
        return ""


class NearDuplicateIndex:
    """Texts seen so far, and which of them a new one nearly repeats."""

    def __init__(self) -> None:
        self._index: Any = None
        self._shingles: list[frozenset[str]] = []
        self._names: list[str] = []

    def find_or_add(self, name: str, text: str, threshold: float) -> str:
        """The name of the first text whose runs of three words are this one's by `share` (Jaccard) or more; "" and keep it, where there is none.

        Hashing finds candidates, the runs themselves decide: no text is dropped by the chance of a hash.
        """
        from rensa import RMinHash, RMinHashLSH

        if self._index is None:
            self._index = RMinHashLSH(0.5, MINHASH_PERMUTATIONS, LSH_BANDS)
        shingles = frozenset(word_ngrams(text, SHINGLE_WORDS)) or frozenset([normalize_text(text)])
        hashed = RMinHash(MINHASH_PERMUTATIONS, 0)
        hashed.update(sorted(shingles))
        for number in sorted(map(int, self._index.query(hashed))):
            if jaccard_similarity(shingles, self._shingles[number]) >= threshold:
                return self._names[number]
        self._index.insert(len(self._names), hashed)
        self._shingles.append(shingles)
        self._names.append(name)
        return ""


def jaccard_similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared over all, in [0, 1]."""
    return len(a & b) / len(a | b) if a or b else 1.0
