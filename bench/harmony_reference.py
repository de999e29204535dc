"""Render conversations with OpenAI's own renderer; run by the Python that has openai-harmony.

    TIKTOKEN_ENCODINGS_BASE=FOLDER VENV/bin/python bench/harmony_reference.py < cases > ids

`bench/harmony.py` writes the cases, one JSON object a line, and FOLDER/o200k_base.tiktoken.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    HarmonyEncodingName,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    ToolDescription,
    load_harmony_encoding,
)


def header(case: dict[str, Any]) -> list[Message]:
    """Return the system message, and the developer's where there are instructions or tools."""
    system = (
        SystemContent.new()
        .with_reasoning_effort(ReasoningEffort(case["effort"].capitalize()))
        .with_conversation_start_date(case["date"])
    )
    messages = [Message.from_role_and_content(Role.SYSTEM, system)]
    developer = DeveloperContent.new()
    if case["instructions"]:
        developer = developer.with_instructions(case["instructions"])
    if case["tools"]:
        developer = developer.with_function_tools(
            [
                ToolDescription.new(t["name"], t["description"], t["parameters"])
                for t in case["tools"]
            ]
        )
    if case["instructions"] or case["tools"]:
        messages.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    return messages


def message(one: dict[str, Any]) -> Message:
    """Return a message of the user, the assistant on a channel, or a tool."""
    if one["kind"] == "user":
        return Message.from_role_and_content(Role.USER, one["text"])
    if one["kind"] == "result":
        author = Author.new(Role.TOOL, f"functions.{one['name']}")
        found = Message.from_author_and_content(author, one["text"])
        return found.with_recipient("assistant").with_channel("commentary")
    found = Message.from_role_and_content(Role.ASSISTANT, one["text"])
    if one["kind"] == "call":
        found = found.with_channel("commentary").with_recipient(f"functions.{one['name']}")
        return found.with_content_type(one["content_type"])
    return found.with_channel({"thought": "analysis", "answer": "final"}[one["kind"]])


def main() -> None:
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    for line in sys.stdin:
        case = json.loads(line)
        config = RenderConversationConfig(auto_drop_analysis=case["drops_thoughts"])
        conversation = Conversation.from_messages([*header(case), *map(message, case["messages"])])
        if case["is_prompt"]:
            ids = encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, config)
        else:
            ids = encoding.render_conversation_for_training(conversation, config)
        print(json.dumps(ids))


if __name__ == "__main__":
    main()
