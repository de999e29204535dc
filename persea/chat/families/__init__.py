"""How each model family speaks. A new family = one file, one line in FAMILIES, one test."""

from __future__ import annotations

from persea.chat.families.gemma import GEMMA, GEMMA4
from persea.chat.families.gpt_oss import GPT_OSS
from persea.chat.families.llama import LLAMA
from persea.chat.families.qwen import QWEN, QWEN3_CODER, QWEN25, QWEN35, QWQ
from persea.chat.messages import Family
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


def get_family(name: str) -> Family:
    """The family of that name, or an error that lists the known ones."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise DataError(
        f"unknown family {name!r}",
        remedy=f"known families: {', '.join(f.name for f in FAMILIES)}; or generic",
    )


def detect_family(vocabulary: Vocabulary, template_text: str) -> Family | None:
    """The family whose signature the vocabulary has and whose mark the template holds; of several, the one with the longest mark.

    None where no family fits or two fit equally well: such a model speaks through `generic`, never through a guess.
    """
    found = [
        f
        for f in FAMILIES
        if f.signature_token in vocabulary.control_token_ids
        and f.template_signature in template_text
    ]
    longest = max((len(f.template_signature) for f in found), default=0)
    best = [f for f in found if len(f.template_signature) == longest]
    return best[0] if len(best) == 1 else None
