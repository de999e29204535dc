"""Render probe conversations of an unknown chat template. Their texts are placeholders."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from persea.chat.messages import Role
from persea.chat.template import ChatTemplate
from persea.errors import DataError

PLACEHOLDER_FORMAT = "\ue000{}\ue001"  # private-use characters, which no template treats specially
REMEDY = (
    "a teacher can give its text alone, from a server: `model: text_only` (docs/engines.md); "
    "else write a file for this family (docs/new_family.md)"
)
CONTENT_PARTS = "content parts"  # thoughts as {"type": "thinking"} in a list, as in Ministral 3


@dataclass(frozen=True)
class Turn:
    """One message of a probe."""

    role: Role
    text: str
    thought: str = ""


def make_messages(
    turns: Collection[Turn], thought_key: str, has_text_parts: bool = False
) -> list[dict[str, Any]]:
    """Return messages as the template takes them.

    Args:
        turns: The messages.
        thought_key: Message key of thoughts, or CONTENT_PARTS.
        has_text_parts: Write each text as a list of parts, as templates for pictures take it.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        text: Any = [{"type": "text", "text": turn.text}] if has_text_parts else turn.text
        message: dict[str, Any] = {"role": turn.role.value, "content": text}
        if turn.thought and thought_key == CONTENT_PARTS:
            message["content"] = [
                {"type": "thinking", "thinking": turn.thought},
                {"type": "text", "text": turn.text},
            ]
        elif turn.thought and thought_key:
            message[thought_key] = turn.thought
        messages.append(message)
    return messages


def _placeholder(role: Role, number: int, with_thought: bool = False) -> Turn:
    thought = PLACEHOLDER_FORMAT.format(f"t{number}") if with_thought else ""
    return Turn(role, PLACEHOLDER_FORMAT.format(number), thought)


QUESTION, ANSWER, NEXT_QUESTION, SYSTEM, NEXT_ANSWER = (
    _placeholder(role, k)
    for k, role in enumerate((Role.USER, Role.ASSISTANT, Role.USER, Role.SYSTEM, Role.ASSISTANT))
)
THOUGHTFUL = _placeholder(Role.ASSISTANT, 1, with_thought=True)


@dataclass(frozen=True)
class TemplateProbe:
    """Renders probes of one template.

    Attributes:
        template: The compiled chat template.
        variables: Names that the template reads without defining them.
        literals: Texts in quotes in its source.
        control_pattern: Matches the tokenizer's control tokens.
        eos_tokens: Control tokens that the model's own configuration declares as end of text.
        where: The place for error messages.
        has_text_parts: Whether texts are lists of parts, as templates for pictures take them.
    """

    template: ChatTemplate
    variables: frozenset[str]
    literals: frozenset[str]
    control_pattern: re.Pattern[str]
    eos_tokens: frozenset[str]
    where: str
    has_text_parts: bool = False

    def render(
        self,
        *turns: Turn,
        prompt: bool = False,
        key: str = "",
        switches: tuple[tuple[str, Any], ...] = (),
    ) -> str:
        """Render turns. Raises DataError if the template refuses them."""
        return self.template(
            messages=make_messages(turns, key, self.has_text_parts),
            add_generation_prompt=prompt,
            **dict(switches),
        )

    def try_render(self, *turns: Turn, **options: Any) -> str | None:
        """Render turns; None if the template refuses them."""
        try:
            return self.render(*turns, **options)
        except DataError:
            return None

    def refuse(self, message: str, remedy: str = REMEDY) -> DataError:
        """Return the error that persea cannot follow the template."""
        return DataError(f"the chat template {message}", where=self.where, remedy=remedy)
