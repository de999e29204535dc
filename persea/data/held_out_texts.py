"""Held-out documents: the user's own texts that models are measured on and never trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from persea.data.text_files import DEFAULT_TEXT_COLUMN, read_documents
from persea.errors import DataError


@dataclass(frozen=True)
class HeldOutText:
    """A document.

    Attributes:
        id: Unique within a recipe: file name and line.
        text: The document, in NFC.
        skill: Skill under which it is reported.
        language: Language code; "" if unknown.
    """

    id: str
    text: str
    skill: str
    language: str

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the document."""
        return len(self.text.encode())


def read_held_out_texts(
    path: Path, skill: str, language: str, where: str, column: str = DEFAULT_TEXT_COLUMN
) -> tuple[HeldOutText, ...]:
    r"""Read the documents of a file; empty ones are left out.

    Args:
        path: A .jsonl file with a document on every line, or a text file that is one document.
        skill: Skill under which they are reported.
        language: Their language.
        where: Key of the recipe, for messages.
        column: Key of the text in a line of a .jsonl file.

    Raises:
        DataError: The file is missing, not UTF-8 or has no text, or a line is no document.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "id.dev.jsonl"
        >>> _ = path.write_text('{"text": "Selamat pagi."}\n')
        >>> [t.text for t in read_held_out_texts(path, "languages", "id", "evaluation.texts.0")]
        ['Selamat pagi.']
    """
    texts = tuple(
        HeldOutText(name, text, skill, language)
        for name, text in read_documents(path, column)
        if text.strip()
    )
    if not texts:
        raise DataError(
            "no text in the file", where=f"{where}, {path}", remedy="give one document a line"
        )
    return texts
