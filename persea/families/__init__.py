"""How each model family speaks. A new family = one file, one line in FAMILIES, one test."""

from __future__ import annotations

from persea.chat import Family
from persea.errors import DataError
from persea.families.gemma import GEMMA
from persea.families.gpt_oss import GPT_OSS
from persea.families.llama import LLAMA
from persea.families.qwen import QWEN
from persea.vocabulary import Vocabulary

FAMILIES = (LLAMA, QWEN, GEMMA, GPT_OSS)


def named(name: str) -> Family:
    """The family of that name, or an error that lists the known ones."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise DataError(f"unknown family {name!r}", remedy=f"known families: {', '.join(f.name for f in FAMILIES)}")


def detect(vocabulary: Vocabulary) -> Family:
    """The family whose control tokens this vocabulary has; exactly one, or refused."""
    found = [f for f in FAMILIES if f.signature in vocabulary.control]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"its family is not recognised: control tokens of {', '.join(f.name for f in found) or 'no known family'}", where=vocabulary.name,
        remedy="name it in the recipe with `family:`, one of " + ", ".join(f.name for f in FAMILIES))
