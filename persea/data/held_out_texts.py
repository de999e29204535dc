"""Held-out documents: the user's own texts that models are measured on and never trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from persea.data.text_files import read_text_lines
from persea.errors import DataError

TEXT_KEY = "text"  # of a JSON line, where the recipe names no key


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
    file_ref: str, skill: str, language: str, where: str
) -> tuple[HeldOutText, ...]:
    r"""Read the documents of a file, one a line.

    Args:
        file_ref: A .jsonl file with a `text` on every line, `FILE#key` for another key, or a plain
            text file with a document on every line.
        skill: Skill under which they are reported.
        language: Their language.
        where: Location for error messages.

    Raises:
        DataError: The file is missing, not UTF-8 or empty, or a line has no text.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "id.dev.jsonl"
        >>> _ = path.write_text('{"text": "Selamat pagi."}\n')
        >>> [t.text for t in read_held_out_texts(str(path), "languages", "id", "evaluation.texts")]
        ['Selamat pagi.']
    """
    name, _, key = file_ref.partition("#")
    if not key and name.endswith((".jsonl", ".ndjson")):
        key = TEXT_KEY
    lines = read_text_lines(f"{name}#{key}" if key else name, f"{where}, {name}")
    texts = tuple(
        HeldOutText(f"{Path(name).name}:{number}", text, skill, language)
        for number, text in lines
        if text.strip()
    )
    if not texts:
        raise DataError(
            "no line with a text", where=f"{where}, {name}", remedy="give one document a line"
        )
    return texts
