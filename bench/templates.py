"""Render real chat templates as persea does and as transformers does, and compare the ids.

    python bench/templates.py [FOLDER ...]     (make templates)

Templates: those of PERSEA_DATA/templates, of the installed packages trl and transformers, and every
*.jinja below each FOLDER. No template is part of persea. Each gets a small byte-level tokenizer
with the control tokens that it writes; the end of text is the first of END_TOKENS in its text. For
every template 60 conversations are rendered at every effort that persea finds, and three with tool
calls and results where persea finds tools:

    equal      both renderings have the same ids, and the answer is parsed back
    refused    persea refuses, with a reason: the whole template, or one conversation
    different  the ids differ without a refusal

Writes bench/results/templates.json and prints one line a template. ONLY=PATTERN measures the
templates whose name it matches, and keeps the other results.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from persea.chat.messages import (
    ContentPart,
    Conversation,
    FinishReason,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
)
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.models.loading import ModelSource, load_renderer

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "templates.json"
# The token that ends an answer, or the model's declared end of text: the first that is in the text.
END_TOKENS = (
    "<|im_end|>",
    "[|endofturn|]",
    "<|endofturn|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|END_RESPONSE|>",
    "<|eot|>",
    "<|end_of_msg|>",
    "<|end_of_text|>",
    "<|assistant_end|>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    "<seed:eos>",
    "<|role_end|>",
    "<｜hy_eos:opensource｜>",
    "<end_of_sentence>",
    "<|message_sep|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_utterance>",
    "<|end_of_turn|>",
    "<|user|>",
    "</assistant>",
    "<SPECIAL_12>",
    "<sep>",
    "</s>",
)
# Models whose own end of text is not the first of these: part of the template's name -> the token.
OWN_ENDS = {"Olmo-3": "<|endoftext|>", "glm4-9b": "<|user|>"}
# Tokens that end an answer of calls, as the generation_config.json of their models declares them.
MORE_ENDS = ("<|observation|>", "<|eom_id|>")
CONTROL_PATTERN = re.compile(
    r"<[|｜][^<>{}'\"\s|｜]{1,40}[|｜]>|<[|][^<>{}'\"\s|]{1,20}>|<[^<>{}'\"\s|]{1,20}[|]>|<\|\"\|>"
    r"|</?(?:think(?::opensource)?|seed:[a-z]+|mm:think|start_of_turn|end_of_turn|end_of_utterance|assistant|"
    r"tool_call|tool_response|tool_calls|system|user|role|s|bos|eos|sop|end_of_sentence|beginning_of_sentence|image|fake_token_around_image)>"
    r"|<SPECIAL_1[0-2]>|<extra_id_\d>|<sep>|\[\|[a-z]+\|\]|\[/?[A-Z_]{3,20}\]|\[gMASK\]|\[[eb]~\[|\]~b\]|\]~!b\[|\]<\]minimax\[>\["
)
# As in Llama 3, Qwen and gpt-oss.
PRETOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_REPLACED = 24  # characters of markers that persea writes with other white space
# Written in pieces, such as '<|' + role + '|>': how the template shows that -> the tokens.
ROLE_TOKENS = {
    r"['\"]<\|['\"]|<\|\{\{": "<|user|> <|assistant|> <|system|> <|end|> <|tool|> <|observation|>",
    r"['\"]\[\|['\"]": "[|user|] [|assistant|] [|system|] [|tool|]",
}
TOOL = Tool(
    "get_weather",
    "Weather.",
    '{"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}',
)
TOOL_CALL = ToolCall("get_weather", '{"city": "ဘန်ကောက် 7", "n": 7}')
TEXTS = (
    "Hello",
    " two  words ",
    "\n x\n\n",
    "1 + 1 = 2",
    "你好，世界",
    "မင်္ဂလာပါ",
    "👩‍👩‍👧 é",
    "<b>",
    "x = [1]\n",
    'Reasoning effort: "high"',
)


def make_tokenizer_folder(folder: Path, template: str) -> Path:
    """Write a tokenizer with the control tokens of a template, and the template."""
    text = template.replace("{}", ":opensource") if "HYTK" in template else template
    names = list(dict.fromkeys(CONTROL_PATTERN.findall(text)))
    for pieces, tokens in ROLE_TOKENS.items():
        if re.search(pieces, template):
            names += [t for t in tokens.split() if t not in names]
    own = next((end for name, end in OWN_ENDS.items() if name in folder.name), "")
    end = own or next((t for t in END_TOKENS if t in text or t in names), "</s>")
    bos = next((t for t in ("<|begin_of_text|>", "<bos>", "<s>") if t in template), "<s>")
    names += [t for t in (end, bos) if t not in names]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([template, *TEXTS], trainer)
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = [end, *(t for t in MORE_ENDS if t in names)]
    ids = [tokenizer.token_to_id(t) for t in ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def conversations(effort: ThinkingEffort, thinks: bool) -> Iterator[Conversation]:
    """Yield conversations in which each text is question, answer, system text and thought."""

    def answer(text: str, thought: str) -> Message:
        parts: tuple[ContentPart, ...] = (Text(text),)
        if thinks and effort is not ThinkingEffort.NONE:
            parts = (Thinking(thought), *parts)
        return Message(Role.ASSISTANT, parts)

    for k, text in enumerate(TEXTS):
        other, third = TEXTS[(k + 3) % len(TEXTS)], TEXTS[(k + 7) % len(TEXTS)]
        system = Message(Role.SYSTEM, (Text(third),))
        first = (Message(Role.USER, (Text(text),)), answer(other, third))
        second = (Message(Role.USER, (Text(other),)), answer(text, other))
        plain = (Message(Role.USER, (Text(third),)), Message(Role.ASSISTANT, (Text(text),)))
        for messages in (
            first,
            (system, *first),
            (*first, *second),
            (system, *first, *second),
            (*first, *plain),
            (system, *plain, *second, *first),
        ):
            yield Conversation(messages, effort)


def tool_conversations(effort: ThinkingEffort, thinks: bool) -> Iterator[Conversation]:
    """Yield a call as answer, an answer behind a result, and a call behind a result."""
    thought = (Thinking("A tool."),) if thinks and effort is not ThinkingEffort.NONE else ()
    question = Message(Role.USER, (Text("How?"),))
    call = Message(Role.ASSISTANT, (*thought, TOOL_CALL))
    result = Message(Role.TOOL, (ToolResult(TOOL_CALL.name, '{"rain": "é"}'),))
    answer = Message(Role.ASSISTANT, (*thought, Text("It rains.")))
    for messages in (
        (question, call),
        (question, call, result, answer),
        (question, call, result, call),
    ):
        yield Conversation(messages, effort, (TOOL,))


@dataclass
class Outcome:
    """What became of one template.

    Attributes:
        family: The family that persea chose; "" where the template is refused.
        efforts: Its efforts.
        tools: Whether it has tools.
        counts: equal, refused, different -> conversations.
        reason: The first refusal or difference.
        seconds: Time to load the renderer, without the tokenizer's training.
    """

    family: str = ""
    efforts: tuple[str, ...] = ()
    tools: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    seconds: float = 0.0


def measure(name: str, template: str, folder: Path) -> Outcome:
    """Compare persea and transformers on one template."""
    from transformers import AutoTokenizer

    make_tokenizer_folder(folder, template)
    outcome = Outcome()
    began = time.perf_counter()
    try:
        renderer = load_renderer(ModelSource(str(folder)), name, date.today())
    except DataError as error:
        outcome.reason = error.message
        return outcome
    outcome.seconds = time.perf_counter() - began
    outcome.family = renderer.family.name
    outcome.efforts = tuple(e.value for e in renderer.family.efforts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for effort in renderer.family.efforts:
        thinks = bool(renderer.family.thought_ends)
        given = list(conversations(effort, thinks))
        if renderer.family.is_tool_text_verbatim is not None:
            outcome.tools = True
            given += tool_conversations(effort, thinks)
        for conversation in given:
            kind, reason = compare(renderer, tokenizer, conversation)
            outcome.counts[kind] += 1
            if kind != "equal" and (not outcome.reason or kind == "different"):
                outcome.reason = f"{kind}: {reason}"
    return outcome


def compare(renderer: ChatRenderer, tokenizer: Any, conversation: Conversation) -> tuple[str, str]:
    """Return (equal, refused or different; the reason) for one conversation."""
    question = replace(conversation, messages=conversation.messages[:-1])
    try:
        ids, asked = renderer.render(conversation), renderer.render_prompt(question)
    except DataError as error:
        return "refused", error.message
    # A family may trim white space around the last thought and answer, because one token would
    # cover the end of the prompt, too.
    retained = renderer.family.normalise(conversation).messages[-1]
    trimmed = replace(conversation, messages=(*question.messages, retained))
    theirs = []
    onward = replace(
        conversation, messages=(*conversation.messages, Message(Role.USER, (Text("And?"),)))
    )
    renderings = [(question, True), (conversation, False), (trimmed, False)]
    if not retained.calls:  # results must follow calls
        renderings.append((onward, False))
    for given, is_prompt in renderings:
        messages, kwargs = renderer.family.template_inputs(given)
        try:
            theirs.append(
                tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=is_prompt,
                    tokenize=True,
                    return_dict=False,
                    **kwargs,
                )
            )
        except Exception as error:
            return "different", f"transformers refuses: {error}"
    if asked.ids_T.tolist() != theirs[0]:
        return "different", f"prompt {tokenizer.decode(theirs[0])!r}"
    own = ids.ids_T.tolist()
    closed = [own, own[:-1]] if own[-1] in renderer.stop_ids else [own]
    # A template that leaves the last answer open ends it before the next question.
    is_same = own == theirs[-1][: len(own)] or any(
        is_same_conversation(tokenizer, each, theirs[0], full)
        for full in theirs[1:3]
        for each in closed
    )
    if not is_same:
        return "different", f"{tokenizer.decode(theirs[1])!r}, {tokenizer.decode(ids.ids_T)!r}"
    parts, finish = renderer.parse(
        ids.ids_T[ids.loss_mask_T].tolist(), conversation.effort, conversation.tools
    )
    wanted = retained
    got = Message(Role.ASSISTANT, parts)
    if finish is not FinishReason.STOP or (got.text, got.thinking, got.calls) != (
        wanted.text,
        wanted.thinking,
        wanted.calls,
    ):
        return "different", f"parsed as {parts} {finish}"
    return "equal", ""


def is_same_conversation(
    tokenizer: Any, own: list[int], prompt: list[int], full: list[int]
) -> bool:
    """Return whether the ids are the template's.

    What persea adds must be between the prompt and the rest of the template's conversation: text at
    the end of the prompt (an opened or empty thought) that finished conversations lack.
    """
    if own == full:
        return True
    text, asked, theirs = (tokenizer.decode(ids) for ids in (own, prompt, full))
    if own != tokenizer.encode(text, add_special_tokens=False) or not text.startswith(asked):
        return False
    pairs = enumerate(zip(asked, theirs, strict=False))
    shared = next((k for k, (a, b) in pairs if a != b), min(len(asked), len(theirs)))
    rest, added = theirs[shared:].rstrip(), text[len(asked) :].rstrip()
    return any(added.endswith(rest[k:]) for k in range(min(len(rest), MAX_REPLACED)))


def templates(folders: list[Path]) -> dict[str, str]:
    """Return name -> text of every template found; equal texts once."""
    found: dict[str, str] = {}
    data = os.environ.get("PERSEA_DATA")
    roots = [("data", Path(data) / "templates")] if data else []
    for package in ("trl", "transformers"):
        spec = find_spec(package)
        if spec is not None and spec.origin:
            roots.append((package, Path(spec.origin).parent))
    roots += [(folder.name.split(" ")[0], folder) for folder in folders]
    for label, root in roots:
        for path in sorted(root.rglob("*.jinja")):
            text = path.read_text(encoding="utf-8")
            if text not in found.values():
                found[f"{label}/{path.stem}"] = text
    return found


def main() -> None:
    """Measure every template, print and store the results."""
    only = os.environ.get("ONLY", "")
    results: dict[str, dict[str, Any]] = json.loads(OUT.read_text())["templates"] if only else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in templates([Path(a) for a in sys.argv[1:]]).items():
            if only and not re.search(only, name):
                continue
            outcome = measure(name, text, Path(scratch) / name.replace("/", "-"))
            results[name] = {
                "family": outcome.family,
                "efforts": outcome.efforts,
                "tools": outcome.tools,
                **outcome.counts,
                "reason": outcome.reason,
                "seconds": round(outcome.seconds, 2),
            }
            counts = " ".join(f"{k} {v}" for k, v in outcome.counts.items())
            print(
                f"{name:50} {outcome.family or 'refused':12} {','.join(outcome.efforts):20} "
                f"{counts:30} {outcome.seconds:.2f}s {outcome.reason[:160]}",
                flush=True,
            )
    totals = total(results.values())
    print(totals)
    OUT.write_text(
        json.dumps({"totals": totals, "templates": results}, indent=1, ensure_ascii=False) + "\n"
    )


def total(results: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Count templates and renderings over all templates."""
    totals: Counter[str] = Counter()
    for one in results:
        totals["followed template" if one["family"] else "refused template"] += 1
        totals["followed template with tools"] += bool(one.get("tools"))
        totals["templates with a difference"] += bool(one.get("different"))
        totals.update({k: one[k] for k in ("equal", "different", "refused") if one.get(k)})
    return dict(totals)


if __name__ == "__main__":
    main()
