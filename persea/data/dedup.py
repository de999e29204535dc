"""Find prompts that share text with held-out items or nearly repeat other prompts.

Texts are compared by runs of words. In scripts without spaces (Chinese, Japanese, Thai, Khmer,
Lao, Burmese) characters are counted instead, each as a fraction of a word, so that a run holds
about as much as one of English words: in the same NTREX sentences one English word corresponds to
1.6 Chinese, 2.4 Japanese, 4.9 Thai, 4.8 Lao, 6.0 Khmer and 6.4 Burmese characters
(tests/data/test_dedup.py counts them).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

CONTAMINATION_NGRAM_WORDS = 13.0  # as GPT-3 (Brown et al. 2020, appendix C) and most after it
MIN_CONTAMINATION_WORDS = 8.0
MAX_LINE_REPEATS = 5
SHINGLE_WORDS = 3.0
MINHASH_PERMUTATIONS = 128
# Largest chance that the index misses a pair at the threshold: 32 bands miss one pair of
# similarity .8 in 20 million, but 19 of 300 at .5 and 211 of 300 at .3.
MAX_LSH_MISS_PROBABILITY = 1e-6
MAX_LSH_ROWS = 4  # more rows a band would look up fewer candidates, which are few at .8 already
SCRIPT_WORD_WEIGHTS = (  # characters of scripts without spaces, and the share of a word of each
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


@dataclass(frozen=True)
class DedupOptions:
    """When a prompt counts as contaminated or repeated (the recipe's `dedup:`).

    Attributes:
        ngram_words: Words in a row that a prompt may not share with a held-out text.
        min_words: A held-out text with at least so many words, but fewer than `ngram_words`, is
            found as a whole inside a prompt; a shorter one only if it is the whole prompt.
        max_line_repeats: A line in more held-out texts than this is the form of a question set,
            not a question, and is not compared.
        shingle_words: Words of a run by which near-duplicates are compared.
    """

    ngram_words: float = CONTAMINATION_NGRAM_WORDS
    min_words: float = MIN_CONTAMINATION_WORDS
    max_line_repeats: int = MAX_LINE_REPEATS
    shingle_words: float = SHINGLE_WORDS


DEFAULT_DEDUP_OPTIONS = DedupOptions()


def normalize_text(text: str) -> str:
    """Return the text in NFC, case-folded, with one space for each run of white space."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def weighted_words(text: str) -> tuple[list[str], list[float]]:
    """Split a text into words and characters.

    Args:
        text: Any text; punctuation is dropped.

    Returns:
        (words, weights): words of scripts with spaces count 1, characters of other scripts the
        fraction of a word in `SCRIPT_WORD_WEIGHTS`.
    """
    found = list(WORD_OR_CHARACTER.finditer(unicodedata.normalize("NFC", text).casefold()))
    weights = [*(weight for _, weight in SCRIPT_WORD_WEIGHTS), 1.0]
    return [m.group() for m in found], [weights[(m.lastindex or 1) - 1] for m in found]


def word_ngrams(text: str, min_weight: float) -> Iterator[str]:
    """Yield, for each start word, the shortest run of words with at least this weight."""
    words, weights = weighted_words(text)
    end, total = 0, 0.0
    for begin in range(len(words)):
        while total < min_weight - 1e-9 and end < len(words):
            total += weights[end]
            end += 1
        if total < min_weight - 1e-9:
            return
        yield " ".join(words[begin:end])
        total -= weights[begin]


class HeldOutIndex:
    """Held-out texts, searchable by exact match and by shared runs of words."""

    def __init__(
        self, texts: Iterable[tuple[str, str]], options: DedupOptions = DEFAULT_DEDUP_OPTIONS
    ) -> None:
        """Index (name, text) pairs."""
        named = list(texts)
        self._options = options
        line_counts = Counter(
            line for _, text in named for line in set(map(normalize_text, text.split("\n")))
        )
        self._names_by_text: dict[str, str] = {}
        self._names_by_ngram: dict[str, str] = {}
        # first `min_words` words -> (all words, name)
        self._short_texts: dict[str, list[tuple[str, str]]] = {}
        for name, text in named:
            content = "\n".join(
                line
                for line in text.split("\n")
                if line_counts[normalize_text(line)] <= options.max_line_repeats
            )
            self._names_by_text.setdefault(normalize_text(text), name)
            if not normalize_text(content):
                continue
            self._names_by_text.setdefault(normalize_text(content), name)
            for run in word_ngrams(content, options.ngram_words):
                self._names_by_ngram.setdefault(run, name)
            words, weights = weighted_words(content)
            if options.min_words <= sum(weights) < options.ngram_words:
                first_run = next(word_ngrams(content, options.min_words))
                self._short_texts.setdefault(first_run, []).append((" ".join(words), name))

    def find_exact(self, text: str) -> str:
        """Return the name of the held-out text equal to this one after normalisation, or ""."""
        return self._names_by_text.get(normalize_text(text), "")

    def find_overlap(self, text: str) -> str:
        """Return the name of a held-out text that this one overlaps with, or "".

        Texts overlap if they share `ngram_words` words in a row, or if this one contains all of a
        held-out text that has `min_words` to `ngram_words` words.
        """
        for run in word_ngrams(text, self._options.ngram_words):
            if run in self._names_by_ngram:
                return self._names_by_ngram[run]
        if not self._short_texts:
            return ""
        words = weighted_words(text)[0]
        for begin, run in enumerate(word_ngrams(text, self._options.min_words)):
            for whole, name in self._short_texts.get(run, ()):
                if " ".join(words[begin : begin + whole.count(" ") + 1]) == whole:
                    return name
        return ""


class NearDuplicateIndex:
    """Texts seen so far, searchable by the Jaccard similarity of their word runs.

    MinHash with locality-sensitive hashing proposes candidates; the word runs decide, so that a
    hash collision never removes a text.
    """

    def __init__(self, min_threshold: float, shingle_words: float = SHINGLE_WORDS) -> None:
        """Prepare an index.

        Args:
            min_threshold: Lowest threshold that will be asked for. Lower means more candidates.
            shingle_words: Words of a compared run.
        """
        self._min_threshold = min_threshold
        self._shingle_words = shingle_words
        self._index: Any = None
        self._shingles: list[frozenset[str]] = []
        self._names: list[str] = []

    def find_or_add(self, name: str, text: str, threshold: float) -> str:
        """Return the name of the first similar text; add this one if there is none.

        Args:
            name: Name of this text.
            text: The text.
            threshold: Least Jaccard similarity, at least the index's `min_threshold`.

        Returns:
            Name of the earliest text with this similarity or more; "" if there is none.
        """
        from rensa import RMinHash, RMinHashLSH

        if threshold < self._min_threshold:
            raise ValueError(f"threshold {threshold} below {self._min_threshold}, the index's own")
        if self._index is None:
            # rensa ignores its threshold argument; the number of bands decides
            bands = lsh_bands(self._min_threshold)
            self._index = RMinHashLSH(self._min_threshold, MINHASH_PERMUTATIONS, bands)
        shingles = frozenset(word_ngrams(text, self._shingle_words))
        shingles = shingles or frozenset([normalize_text(text)])
        hashed = RMinHash(MINHASH_PERMUTATIONS, 0)
        hashed.update(sorted(shingles))
        for number in sorted(map(int, self._index.query(hashed))):
            if jaccard_similarity(shingles, self._shingles[number]) >= threshold:
                return self._names[number]
        self._index.insert(len(self._names), hashed)
        self._shingles.append(shingles)
        self._names.append(name)
        return ""


def lsh_bands(threshold: float) -> int:
    """Return the number of LSH bands that finds pairs of this Jaccard similarity.

    With b bands of r = permutations / b rows a pair of similarity s is missed with probability
    (1 - s^r)^b. The fewest bands below `MAX_LSH_MISS_PROBABILITY` are taken, because more bands
    propose more candidates. Reference: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
    section 3.4.
    """
    rows = MAX_LSH_ROWS
    while rows > 1:
        bands = MINHASH_PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= MAX_LSH_MISS_PROBABILITY:
            return bands
        rows //= 2
    return MINHASH_PERMUTATIONS


def jaccard_similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the size of the intersection over the size of the union, in [0, 1]."""
    return len(a & b) / len(a | b) if a or b else 1.0
