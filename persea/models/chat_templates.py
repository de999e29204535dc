"""Where a model's chat template comes from, which models have none, and how it is copied."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from persea.chat.documents import TEXT_FAMILY_NAME
from persea.chat.families.hybrid import can_use_hybrid_template
from persea.chat.family import Family
from persea.errors import DataError
from persea.models.folder_files import MAX_TEMPLATE_BYTES
from persea.storage import read_input_bytes
from persea.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    from persea.models.loading import ModelSource


def is_text_model(
    source: ModelSource, template_text: str, vocabulary: Vocabulary, where: str
) -> bool:
    """Return whether a model is rendered as plain text: it has no template, or the recipe says so.

    Raises:
        DataError: The recipe names a family, or `thinking: true`, that needs a chat template.
    """
    if source.family == TEXT_FAMILY_NAME:
        needs_template = "`thinking: true`" if source.thinking else ""
    elif template_text or (source.thinking and can_use_hybrid_template(vocabulary)):
        return False
    else:
        needs_template = f"`family: {source.family}`" if source.family else ""
        needs_template = "`thinking: true`" if source.thinking else needs_template
    if needs_template:
        raise DataError(
            f"{source.tokenizer_name_or_path!r} has no chat template, which {needs_template} needs",
            where=where,
            remedy="name one with `chat_template: FILE.jinja`, or delete that key to score and "
            "learn plain text",
        )
    return True


def read_template(source: ModelSource, where: str) -> str:
    """Return the chat template that the recipe names; "" if it names none."""
    if not source.chat_template:
        return ""
    try:
        return read_input_bytes(Path(source.chat_template), MAX_TEMPLATE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the chat template {source.chat_template!r}: {str(error).splitlines()[0]}",
            where=where,
            remedy="name a .jinja file with `chat_template:`",
        ) from error


def refuse_thinking_option(family: Family, where: str) -> None:
    """Refuse `thinking: true` for a family with a switch of its own, or a template without one.

    Raises:
        DataError: Always.
    """
    if len(family.efforts) > 1:
        raise DataError(
            f"`thinking: true`, but {family.name} has its own thinking switch: "
            f"{', '.join(family.efforts)}",
            where=where,
            remedy="delete `thinking:`",
        )
    raise DataError(
        f"`thinking: true`, but the template of {family.name} does not keep the effort before the "
        "system text and the thought "
        "before the answer",
        where=where,
        remedy="choose a student whose template takes a system text and writes answers unchanged",
    )
