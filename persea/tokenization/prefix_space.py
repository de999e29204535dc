"""The space that a tokenizer puts before a text: where it goes, and the same tokenizer without it.

SentencePiece models begin a text with a space ("▁Hello"), and some byte-level ones do
(`add_prefix_space`). Their files spell that in six ways, and transformers adds two more when it
converts: a Prepend normaliser, a Replace of the text's beginning (LLM-jp), Metaspace with `first`
or `always`, ByteLevel, each with its own exception for a text that begins with white space. So the
rule is not read from the file but found by encoding, with the tokenizer as it is and with the same
tokenizer without the space, and then checked on the probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from persea.tokenization.control_tokens import WHITESPACE

SPACE_MARK = "▁"  # what SentencePiece writes for a space
# A text of each kind of beginning: a letter, a space, other white space.
LETTER_PROBE, SPACE_PROBE, NEWLINE_PROBE = "hello", " hello", "\nhello"
# Regular expression of LLM-jp's Replace normaliser: the beginning of a text.
TEXT_BEGINNING = r"(?<!\n)^"


@dataclass(frozen=True)
class PrefixSpace:
    """Where a tokenizer writes a space that is not in the text.

    Attributes:
        every_run: Before every run of text between control tokens; else only where a text begins
            without a control token.
        skipped_before: A text that begins with one of these characters gets no space.
    """

    every_run: bool
    skipped_before: str

    def before(self, text: str, is_first: bool) -> str:
        """Return the space before a run of text, or "".

        Args:
            text: The run, not empty.
            is_first: Whether the run begins the whole text.
        """
        if not (self.every_run or is_first) or text[0] in self.skipped_before:
            return ""
        return " "

    def strip(self, raw: bytes) -> bytes:
        """Return the bytes of a run of tokens without the space that the tokenizer put there."""
        rest = raw.removeprefix(b" ")
        if self.skipped_before and rest.decode(errors="ignore")[:1] in self.skipped_before:
            return raw  # such a text, or none, got no space: the space is its own
        return rest


def remove_prefix_space(spec: dict[str, Any]) -> bool:
    """Change a tokenizer's definition so that it writes no space; return whether it did."""
    normalizers = _parts(spec["normalizer"], "normalizers")
    kept = [n for n in normalizers if not _writes_prefix(n)]
    changed = len(kept) < len(normalizers)
    if changed:
        spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in _parts(spec["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace" and _prepend_scheme(part) != "never":
            part["prepend_scheme"], changed = "never", True
            part.pop("add_prefix_space", None)
        elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            part["add_prefix_space"], changed = False, True
    return changed


def _parts(spec: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if spec is None:
        return []
    if spec["type"] != "Sequence":
        return [spec]
    return [part for inner in spec[key] for part in _parts(inner, key)]


def _writes_prefix(normalizer: dict[str, Any]) -> bool:
    """Return whether a normaliser writes the space.

    transformers doubles a leading "▁", because Metaspace takes it for the space that it would add.
    """
    if normalizer["type"] != "Replace":
        return bool(normalizer["type"] == "Prepend")
    beginning = normalizer["pattern"].get("Regex")
    return (normalizer["content"] == SPACE_MARK * 2 and beginning in (r"\A▁", "^▁")) or (
        normalizer["content"] == SPACE_MARK and beginning == TEXT_BEGINNING
    )


def _prepend_scheme(metaspace: dict[str, Any]) -> str:
    """Return the scheme; older files have `add_prefix_space` alone, whose default is true."""
    default = "always" if metaspace.get("add_prefix_space", True) else "never"
    return str(metaspace.get("prepend_scheme", default))


def find_prefix_space(
    original: Tokenizer, plain: Tokenizer, control_token: str, probes: Sequence[str]
) -> PrefixSpace | None:
    """Return where a tokenizer writes its space; None if no rule explains its tokens.

    Args:
        original: The tokenizer as it is.
        plain: The same without the space.
        control_token: A control token that swallows no white space, or "" if there is none.
        probes: Texts on which the rule must hold.
    """

    def ids(tokenizer: Tokenizer, text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def has_space(text: str, lead: str = "") -> bool:
        got = ids(original, lead + text)[1 if lead else 0 :]
        return got == ids(plain, " " + text)

    skipped = ""
    if not has_space(SPACE_PROBE):
        skipped = " "
    if not has_space(NEWLINE_PROBE):
        skipped = WHITESPACE
    rule = PrefixSpace(bool(control_token) and has_space(LETTER_PROBE, control_token), skipped)
    for lead in ("", control_token) if control_token else ("",):
        for text in (LETTER_PROBE, SPACE_PROBE, NEWLINE_PROBE, *probes):
            want = ids(plain, rule.before(text, is_first=not lead) + text)
            if ids(original, lead + text)[1 if lead else 0 :] != want:
                return None
    return rule
