"""Compare gpt-oss's renderings with those of openai-harmony, OpenAI's own renderer, token by token.

    PERSEA_DATA=... python bench/harmony.py VENV

VENV is a virtual environment with openai-harmony, which is made where it is missing. Its vocabulary
file, o200k_base.tiktoken, is written from the tokenizer.json of gpt-oss in PERSEA_DATA; the library
compares its SHA-256 before it takes it. The conversations are those of bench/templates.py at each
effort: 60 without tools and three with calls and results, and one with tools and instructions.
`as documented` uses the library as its page says; `adjusted` gives it the four known differences:
two line breaks behind instructions without tools, `json` in place of `<|constrain|>json`, results
as JSON texts, and the thoughts that the template keeps, kept. Writes bench/results/harmony.json;
about 30 CPU seconds.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import tempfile
import venv
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from templates import conversations, tool_conversations
from tokenizers import Tokenizer

from persea.chat.families.gpt_oss import GPT_OSS
from persea.chat.messages import (
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
    ToolResult,
)
from persea.models.loading import ModelSource, load_renderer
from persea.tokenization.vocabulary import CHAR_TO_BYTE

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PERSEA_DATA", ROOT.parent / "shared" / "data"))
OUT = ROOT / "bench" / "results" / "harmony.json"
PACKAGE = "openai-harmony==0.0.8"
DATE = date(2025, 8, 5)
EFFORTS = (ThinkingEffort.LOW, ThinkingEffort.MEDIUM, ThinkingEffort.HIGH)
CONTEXT_TOKENS, SHOWN = 12, 8


def write_vocabulary(folder: Path) -> None:
    """Write o200k_base.tiktoken: the bytes of each token in base64, and its rank."""
    spec = json.loads((DATA / "tokenizers" / "gpt-oss" / "tokenizer.json").read_text())
    by_rank = sorted((rank, token) for token, rank in spec["model"]["vocab"].items())
    lines = (
        base64.b64encode(bytes(CHAR_TO_BYTE[c] for c in token)) + b" %d\n" % rank
        for rank, token in by_rank
    )
    (folder / "o200k_base.tiktoken").write_bytes(b"".join(lines))


def to_case(conversation: Conversation, is_prompt: bool, *, adjusted: bool) -> dict[str, Any]:
    """Return a conversation as the other process reads it."""
    messages: list[dict[str, str]] = []
    instructions = ""
    if adjusted:
        conversation = GPT_OSS.normalise(conversation)
    for m in conversation.messages:
        if m.role is Role.SYSTEM:
            instructions = m.text + "\n\n" * (adjusted and not conversation.tools)
        elif m.role is Role.USER:
            messages.append({"kind": "user", "text": m.text})
        for p in m.parts if m.role in (Role.ASSISTANT, Role.TOOL) else ():
            if not isinstance(p, Thinking) or p.text:
                messages.append(_part(p, adjusted=adjusted))
    return {
        "effort": conversation.effort.value,
        "date": DATE.isoformat(),
        "instructions": instructions,
        "tools": [
            {"name": t.name, "description": t.description, "parameters": json.loads(t.parameters)}
            for t in conversation.tools
        ],
        "messages": messages,
        "is_prompt": is_prompt,
        "drops_thoughts": not adjusted,
    }


def _part(part: Any, *, adjusted: bool) -> dict[str, str]:
    if isinstance(part, Thinking):
        return {"kind": "thought", "text": part.text}
    if isinstance(part, Text):
        return {"kind": "answer", "text": part.text}
    if isinstance(part, ToolCall):
        return {
            "kind": "call",
            "text": part.arguments,
            "name": part.name,
            "content_type": "json" if adjusted else "<|constrain|>json",
        }
    assert isinstance(part, ToolResult)
    text = json.dumps(part.text, ensure_ascii=False) if adjusted else part.text
    return {"kind": "result", "text": text, "name": part.name}


def cases() -> Iterator[tuple[str, Conversation, bool]]:
    """Yield (group, conversation, whether it is a prompt)."""
    for effort in EFFORTS:
        for group, some in (
            ("text", conversations(effort, True)),
            ("tools", tool_conversations(effort, True)),
            ("tools and instructions", with_instructions(tool_conversations(effort, True))),
        ):
            for conversation in some:
                question = replace(conversation, messages=conversation.messages[:-1])
                yield group + ", prompt", question, True
                yield group + ", whole", conversation, False


def with_instructions(some: Iterator[Conversation]) -> Iterator[Conversation]:
    """Yield conversations behind a system text."""
    system = Message(Role.SYSTEM, (Text("Be brief."),))
    for conversation in some:
        yield replace(conversation, messages=(system, *conversation.messages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("venv", type=Path)
    options = parser.parse_args()
    python = options.venv / "bin" / "python"
    if not python.exists():
        venv.create(options.venv, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PACKAGE], check=True)
    source = ModelSource(str(DATA / "tokenizers" / "gpt-oss"))
    renderer = load_renderer(source, "gpt-oss", DATE)
    some = list(cases())
    result: dict[str, Any] = {"package": PACKAGE}
    with tempfile.TemporaryDirectory() as scratch:
        write_vocabulary(Path(scratch))
        for name, adjusted in (("as documented", False), ("adjusted", True)):
            given = [to_case(c, is_prompt, adjusted=adjusted) for _, c, is_prompt in some]
            done = subprocess.run(
                [python, ROOT / "bench" / "harmony_reference.py"],
                input="".join(json.dumps(case) + "\n" for case in given),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"TIKTOKEN_ENCODINGS_BASE": scratch},
            )
            theirs = [json.loads(line) for line in done.stdout.splitlines()]
            result[name] = compare(renderer, some, theirs)
            for group, found in result[name].items():
                print(name, group, found["equal"], "of", found["renderings"], flush=True)
    OUT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def compare(renderer: Any, some: Any, theirs: list[list[int]]) -> dict[str, Any]:
    """Count equal renderings of each group, and the places where others begin to differ."""
    groups: dict[str, Any] = {}
    decode = Tokenizer.from_file(str(DATA / "tokenizers" / "gpt-oss" / "tokenizer.json")).decode
    for (group, conversation, is_prompt), reference in zip(some, theirs, strict=True):
        render = renderer.render_prompt if is_prompt else renderer.render
        own = render(conversation).ids_T.tolist()
        found = groups.setdefault(group, {"renderings": 0, "equal": 0, "differences": Counter()})
        found["renderings"] += 1
        if own == reference:
            found["equal"] += 1
            continue
        pairs = enumerate(zip(own, reference, strict=False))
        start = next((k for k, (a, b) in pairs if a != b), min(len(own), len(reference)))
        window = slice(start, start + CONTEXT_TOKENS)
        shown = [decode(ids[window], skip_special_tokens=False) for ids in (own, reference)]
        found["differences"][f"template {shown[0]!r}, harmony {shown[1]!r}"] += 1
    for found in groups.values():
        found["differences"] = dict(found["differences"].most_common(SHOWN))
    return groups


if __name__ == "__main__":
    main()
