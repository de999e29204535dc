"""All model families. A new family is one file, one line in FAMILIES, and one test."""

from __future__ import annotations

from persea.chat.families.gemma import GEMMA, GEMMA4, GEMMA4_CURRENT, GEMMA_TEXT_PARTS
from persea.chat.families.gpt_oss import GPT_OSS
from persea.chat.families.llama import LLAMA
from persea.chat.families.llm_jp import LLM_JP, LLM_JP_LAST_THOUGHT
from persea.chat.families.qwen import QWEN, QWEN3_CODER, QWEN25, QWQ
from persea.chat.families.qwen35 import QWEN35, QWEN35_ALL_THOUGHTS, QWEN38
from persea.chat.family import Family
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary

FAMILIES = (
    LLAMA,
    QWEN,
    QWEN25,
    QWEN3_CODER,
    QWEN35,
    QWEN35_ALL_THOUGHTS,
    QWEN38,
    QWQ,
    GEMMA,
    GEMMA_TEXT_PARTS,
    GEMMA4,
    GEMMA4_CURRENT,
    GPT_OSS,
    LLM_JP,
    LLM_JP_LAST_THOUGHT,
)

# A vocabulary is loaded before its family is detected, so the markers of all families count.
CONTROL_MARKERS = tuple(dict.fromkeys(m for f in FAMILIES for m in f.control_markers))


def get_families(name: str) -> tuple[Family, ...]:
    """Return the family of that name; several, one for each generation of its template, in order.

    Raises:
        DataError: No family has that name; the message lists the known ones.
    """
    found = tuple(f for f in FAMILIES if f.name == name)
    if not found:
        names = ", ".join(dict.fromkeys(f.name for f in FAMILIES))
        raise DataError(f"unknown family {name!r}", remedy=f"known families: {names}; or generic")
    return found


def get_family(name: str) -> Family:
    """Return the family of that name, the first generation of its template.

    Raises:
        DataError: No family has that name; the message lists the known ones.
    """
    return get_families(name)[0]


def candidate_families(vocabulary: Vocabulary, template_text: str) -> tuple[Family, ...]:
    """Return the families whose signature token and template signature a model has.

    The longest template signature comes first. Other models borrow control tokens and pieces of
    templates, so a candidate is taken only if it is proven, see `persea.chat.probing`.
    """
    return tuple(
        sorted(
            (
                f
                for f in FAMILIES
                if f.signature_token in vocabulary.control_token_ids
                and f.template_signature in template_text
            ),
            key=lambda f: -len(f.template_signature),
        )
    )
