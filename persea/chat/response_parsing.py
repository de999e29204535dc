"""Parse the answers of an inferred family: a thought between two markers, then the answer.

Markers are text of the chat template, found by rendering (`persea.chat.template_probing`); they may
contain control tokens. An answer is searched as one string in which each control token is a lone
surrogate, which no decoded text contains: `</think>` as a control token and `</think>` as text stay
apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from persea.chat.family import DecodedPieces

FIRST_SURROGATE, LAST_SURROGATE = 0xD800, 0xDFFF
ControlCharacters: TypeAlias = Mapping[str, str]
"""Control token -> the lone surrogate that stands for it."""


def control_characters(*template_texts: str, control_pattern: re.Pattern[str]) -> dict[str, str]:
    """Return a lone surrogate for each control token in the markers of a template."""
    found = dict.fromkeys(
        match.group() for text in template_texts for match in control_pattern.finditer(text)
    )
    return {token: chr(FIRST_SURROGATE + 1 + k) for k, token in enumerate(found)}


def pieces_to_string(pieces: DecodedPieces, characters: ControlCharacters) -> str:
    """Return an answer as one string; control tokens of no marker share one surrogate.

    Raises:
        UnicodeDecodeError: The answer ends inside a character.
    """
    other = chr(FIRST_SURROGATE)
    return "".join(characters.get(p, other) if isinstance(p, str) else p.decode() for p in pieces)


def has_control_token(text: str) -> bool:
    """Return whether a string of `pieces_to_string` contains a control token."""
    return any(FIRST_SURROGATE <= ord(c) <= LAST_SURROGATE for c in text)


@dataclass(frozen=True)
class Marker:
    """Template text around a thought: white space, a marker, white space."""

    before: str
    text: str
    after: str

    @staticmethod
    def from_text(text: str) -> Marker:
        """Split the white space off."""
        bare = text.strip()
        start = text.find(bare)
        return Marker(text[:start], bare, text[start + len(bare) :])


@dataclass(frozen=True)
class AnswerForm:
    """What a model writes behind its prompt, with control tokens as surrogates.

    Attributes:
        lead: Template text before an answer without a thought.
        tail: Template text between the answer and its stop token.
        opening: Marker that opens a thought; "" if the template has no thoughts.
        closing: Marker that closes it.
        is_opened: Whether the prompt has opened the thought.
    """

    lead: str
    tail: str
    opening: Marker
    closing: Marker
    is_opened: bool

    def parse(self, text: str) -> tuple[str, str] | None:
        """Return (thought, answer); None if the answer is malformed or has control tokens."""
        parsed = self.split(text)
        return None if parsed is None or has_control_token("".join(parsed)) else parsed

    def split(self, text: str) -> tuple[str, str] | None:
        """Return (thought, answer), which may contain control tokens; None if it is malformed."""
        thought, rest = "", text
        opened = self.after_opening(text)
        if self.closing.text and opened is not None:
            thought, closed, rest = opened.partition(self.closing.text)
            if not closed:
                return None
            thought = thought.removesuffix(self.closing.before)
            rest = rest.removeprefix(self.closing.after)
        elif has_control_token(self.lead):
            if rest != self.lead.rstrip() and not rest.startswith(self.lead):
                return None
            rest = rest[len(self.lead) :]
        else:
            rest = rest.removeprefix(self.lead)
        return thought, rest.removesuffix(self.tail)

    def after_opening(self, text: str) -> str | None:
        """Return the text behind the opening of a thought; None if no thought is open.

        Some servers repeat the opening of the prompt.
        """
        bare = text.lstrip()
        if self.opening.text and bare.startswith(self.opening.text):
            return bare[len(self.opening.text) :].removeprefix(self.opening.after)
        return text if self.is_opened else None

    def find_ambiguity(self, thought: str, answer: str) -> str:
        """Return the marker that a text contains as plain text; "" if the texts are parsed back."""
        if self.closing.text and self.closing.text in thought:
            return self.closing.text
        if self.opening.text and answer.lstrip().startswith(self.opening.text) and not thought:
            return self.opening.text
        return ""
