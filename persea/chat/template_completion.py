"""Complete the last answers of a chat template: from the prompt up to the stop token."""

from __future__ import annotations

from typing import Any

from persea.chat.messages import Role
from persea.chat.template import ChatTemplate
from persea.chat.template_probing import TemplateBehaviour
from persea.chat.thought_probing import PromptTail
from persea.errors import DataError

INSERTED_THOUGHT_KEY = "persea_thought"  # no template reads it


def _has_thinking_part(content: Any) -> bool:
    return isinstance(content, list) and content[0]["type"] == "thinking"


def complete_last_answer(
    template: ChatTemplate, behaviour: TemplateBehaviour, where: str, call_stop: str | None = None
) -> ChatTemplate:
    """Return the template with last answers that begin with the prompt and end with the stop token.

    Args:
        template: The compiled chat template.
        behaviour: The results of probing.
        where: The place for error messages.
        call_stop: Text that ends an answer of calls: "" if the template writes the control token
            itself, None if calls end as every answer.
    """
    efforts = [b for _, b in behaviour.efforts]
    key = behaviour.thought_key

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool, **switches: Any) -> str:
        text = template(messages=messages, add_generation_prompt=add_generation_prompt, **switches)
        if add_generation_prompt or not messages or messages[-1]["role"] != Role.ASSISTANT.value:
            return text
        answer = messages[-1]
        thought = answer.get(INSERTED_THOUGHT_KEY, "")
        has_thought = bool(thought or answer.get(key) or _has_thinking_part(answer["content"]))
        current = next(
            (b for b in efforts if all(switches.get(k) == v for k, v in b.switches)), efforts[-1]
        )
        last = current.thinking if has_thought else current.plain
        if last is None:
            raise DataError(
                "the chat template does not write an answer without a thought where its prompt "
                "ends",
                where=where,
                remedy="give the answer its thought, or leave the conversation out",
            )
        tail = last.tail
        if tail != PromptTail():
            prompt = template(messages=messages[:-1], add_generation_prompt=True, **switches)
            shared = prompt.removesuffix(tail.lacking) + tail.instead
            if not prompt.endswith(tail.lacking) or not text.startswith(shared):
                raise DataError(
                    "the answer is not rendered where the generation prompt ends",
                    where=where,
                    remedy="leave the conversation out",
                )
            text = prompt + tail.inserted.replace("{thought}", thought) + text[len(shared) :]
        if answer.get("tool_calls") and call_stop is not None:
            return text + call_stop
        if behaviour.closes_last_answer:
            return text
        return text + behaviour.answer_suffix + behaviour.stop_token

    return render
