"""A base model without a chat template: plain text, no roles.

    <bos>question
    answer<eos>

Such a model scores and learns text: documents, and answers that are given. It was never taught to
answer, so it is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from persea.chat.documents import (
    TEXT_FAMILY_NAME,
    find_document_end,
    make_document_tokens,
)
from persea.chat.family import DecodedPieces, Family, edit_texts, pieces_to_text
from persea.chat.messages import ContentPart, Conversation, Role, Text, Thinking, ThinkingEffort
from persea.chat.template import ChatTemplate
from persea.tokenization.vocabulary import Vocabulary

SEPARATOR = "\n"  # between two messages
TEXT_LIMITATIONS = (
    "a model without a chat template: it scores and learns plain text (documents, and given "
    "answers after their prompt and a line break), and is not asked for answers"
)


def make_text_family(
    vocabulary: Vocabulary, special_tokens: Mapping[str, str]
) -> tuple[Family, ChatTemplate]:
    """Return the family of a model without a chat template, and its rendering as a template.

    Args:
        vocabulary: The model's tokenizer.
        special_tokens: bos_token, eos_token, ... as its tokenizer declares them.
    """
    end = find_document_end(vocabulary, special_tokens, ())
    around = make_document_tokens(vocabulary, end)
    prefix = "".join(vocabulary.control_names.get(i, "") for i in around.prefix_ids)

    def template(messages: list[dict[str, Any]], add_generation_prompt: bool, **_: Any) -> str:
        is_answered = bool(messages) and messages[-1]["role"] == Role.ASSISTANT.value
        texts = [str(m["content"]) for m in messages]
        if not is_answered or add_generation_prompt:
            return prefix + "".join(text + SEPARATOR for text in texts)
        return prefix + SEPARATOR.join(texts) + end

    family = Family(
        name=TEXT_FAMILY_NAME,
        signature_token="",
        efforts=(ThinkingEffort.NONE,),
        stop_tokens=(end,) if end else (),
        normalise=_normalise,
        template_inputs=_template_inputs,
        parse=_parse,
        limitations=f"{TEXT_LIMITATIONS}.",
    )
    return family, template


def _normalise(conversation: Conversation) -> Conversation:
    """Drop thoughts; every text stays as it is."""
    return edit_texts(conversation, lambda _, m, p: "" if isinstance(p, Thinking) else p.text)


def _template_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return [{"role": m.role.value, "content": m.text} for m in conversation.messages], {}


def _parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    text = pieces_to_text(pieces)
    return None if text is None else (Text(text),)
