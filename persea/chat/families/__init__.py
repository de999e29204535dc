"""All model families. A new family is one file, one line in FAMILIES, and one test."""

from __future__ import annotations

from persea.chat.families.gemma import GEMMA, GEMMA4
from persea.chat.families.gpt_oss import GPT_OSS
from persea.chat.families.llama import LLAMA
from persea.chat.families.qwen import QWEN, QWEN3_CODER, QWEN25, QWEN35, QWQ
from persea.chat.family import Family
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary

FAMILIES = (
    LLAMA,
    QWEN,
    QWEN25,
    QWEN3_CODER,
    QWEN35,
    QWQ,
    GEMMA,
    GEMMA4,
    GPT_OSS,
)

# A vocabulary is loaded before its family is detected, so the markers of all families count.
CONTROL_MARKERS = tuple(dict.fromkeys(m for f in FAMILIES for m in f.control_markers))


def get_family(name: str) -> Family:
    """Return the family of that name.

    Raises:
        DataError: No family has that name; the message lists the known ones.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise DataError(
        f"unknown family {name!r}",
        remedy=f"known families: {', '.join(f.name for f in FAMILIES)}; or generic",
    )


def detect_family(vocabulary: Vocabulary, template_text: str) -> Family | None:
    """Return the family whose signature token and template signature a model has.

    Of several families the one with the longest template signature wins. None where no family fits
    or two fit equally well: such a model gets an inferred family (`generic.py`), never a guess.
    """
    candidates = [
        f
        for f in FAMILIES
        if f.signature_token in vocabulary.control_token_ids
        and f.template_signature in template_text
    ]
    longest = max((len(f.template_signature) for f in candidates), default=0)
    best = [f for f in candidates if len(f.template_signature) == longest]
    return best[0] if len(best) == 1 else None
