"""Real text of PERSEA_DATA: parallel news lines of seven languages, split by blocks of ten lines.

Line k is the same sentence in every language, so a block is held out in all languages or in none.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bench.objectives.data import data_folder

LANGUAGES = ("ind", "vie", "tha", "zho-CN", "jpn", "kor")
ENGLISH = "eng"
BLOCK = 10  # lines
HELD_OUT_BYTES = {"dev": 2500, "test": 7000}  # at most, of a language
LINES_PER_BLOCK = {"dev": (1, 4, 7), "test": (2, 7)}  # held-out lines of a block


@dataclass(frozen=True)
class Text:
    """One document: its language, its block of lines (the unit of the bootstrap), its text."""

    language: str
    block: int
    text: str

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return len(self.text.encode())


def part_of(block: int) -> str:
    """Return the split of a block: test (20 %), dev (10 %) or train."""
    bucket = int.from_bytes(hashlib.sha256(f"ntrex/{block}".encode()).digest()[:4], "big") % 100
    return "test" if bucket < 20 else "dev" if bucket < 30 else "train"


@lru_cache
def lines(language: str) -> tuple[str, ...]:
    """Return all lines of a language, NFC."""
    raw = (data_folder() / "parallel" / f"ntrex.{language}.txt").read_text()
    return tuple(unicodedata.normalize("NFC", line).strip() for line in raw.splitlines())


def train_texts(language: str, kilobytes: int) -> list[Text]:
    """Return training lines up to a size, in an order that never changes: smaller sizes are
    beginnings of larger ones.
    """
    own = lines(language)
    blocks = [b for b in range(-(-len(own) // BLOCK)) if part_of(b) == "train"]
    places = [(b, k) for b in blocks for k in range(b * BLOCK, min((b + 1) * BLOCK, len(own)))]
    order = np.random.default_rng(19).permutation(len(places)).tolist()
    out, size = list[Text](), 0
    for block, k in (places[i] for i in order):
        if own[k]:
            out.append(Text(language, block, own[k]))
            size += out[-1].size
        if size >= 1000 * kilobytes:
            break
    return out


def held_out(language: str, part: str) -> list[Text]:
    """Return some lines of each block of `dev` or `test`, up to HELD_OUT_BYTES."""
    own, out = lines(language), list[Text]()
    blocks = [b for b in range(-(-len(own) // BLOCK)) if part_of(b) == part]
    for k in LINES_PER_BLOCK[part]:
        for b in blocks:
            if b * BLOCK + k < len(own) and own[b * BLOCK + k]:
                one = Text(language, b, own[b * BLOCK + k])
                if sum(t.size for t in out) + one.size <= HELD_OUT_BYTES[part]:
                    out.append(one)
    return out
