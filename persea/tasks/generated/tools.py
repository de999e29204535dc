"""Tool calls: one right call, or none if no declared tool fits.

Graded by the call's name and arguments, or by a plain no.

20,720 questions, 5,445 of them for training. Two of eight tools are declared; the question
needs one of them, or a third. Another wording counts as another question: otherwise split TRAIN
held 36 calls of `train`, and no tool fitted half of 1,500 questions.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache

from persea.chat.messages import (
    Conversation,
    Message,
    ThinkingEffort,
    Tool,
    ToolCall,
    canonical_json,
)
from persea.data.prompts import Prompt
from persea.tasks.generated.answer_phrases import strip_lead_in_and_closing
from persea.tasks.generated.draw import draw_items
from persea.tasks.task import Split, Task, TaskItem, Verdict

CITIES = (
    "Hanoi",
    "Tokyo",
    "Seoul",
    "Bangkok",
    "Jakarta",
    "Beijing",
    "Manila",
    "Rome",
    "Cairo",
    "Lima",
    "Oslo",
    "Paris",
    "Delhi",
    "Quito",
    "Berlin",
    "Madrid",
    "Vienna",
    "Dublin",
    "Lagos",
    "Osaka",
    "Bonn",
    "Milan",
    "Turin",
    "Hue",
    "Dakar",
    "Accra",
    "Perth",
    "Basel",
    "Bali",
    "Kyoto",
    "Busan",
    "Nice",
)
SONGS = (
    "Moon",
    "Rain",
    "Home",
    "River",
    "Dance",
    "Stars",
    "Summer",
    "Train",
    "Gold",
    "Snow",
    "Fire",
    "Wind",
    "Night",
    "Smile",
    "Ocean",
    "Light",
    "Roses",
    "Clouds",
    "Storm",
    "Dawn",
    "Echo",
    "Honey",
    "Magic",
    "Shadow",
    "Silver",
    "Thunder",
    "Wings",
    "Blue",
    "Circle",
    "Dream",
    "Island",
    "Spring",
)
CALL_NAMES = (
    "Ana",
    "Ben",
    "Mia",
    "Tom",
    "Kim",
    "Lee",
    "Eva",
    "Max",
    "Zoe",
    "Ian",
    "Amy",
    "Bob",
    "Eve",
    "Jim",
    "Liz",
    "Sam",
    "Ada",
    "Dan",
    "Fay",
    "Gus",
    "Hal",
    "Ivy",
    "Jon",
    "Kai",
    "Leo",
    "May",
    "Ned",
    "Ora",
    "Pia",
    "Ray",
    "Sue",
    "Ty",
)
PRODUCTS = (
    "rice",
    "milk",
    "bread",
    "tea",
    "fish",
    "salt",
    "eggs",
    "soap",
    "paper",
    "sugar",
    "oil",
    "corn",
    "beans",
    "lamps",
    "pens",
    "ink",
    "apples",
    "butter",
    "cheese",
    "chairs",
    "cloth",
    "coal",
    "flour",
    "glue",
    "honey",
    "jam",
    "nails",
    "onions",
    "paint",
    "rope",
    "shoes",
    "wool",
)
ARGUMENT_VALUES = {"city": CITIES, "song": SONGS, "person": CALL_NAMES, "item": PRODUCTS}
TOOL_ARGUMENTS = {
    "weather": "city",
    "timer": "minutes",
    "play": "song",
    "call": "person",
    "light": "percent",
    "train": "city",
    "price": "item",
    "order": "item",
}
TOOL_QUESTIONS = {
    "weather": ("How is the weather in {}?", "Weather in {}, please."),
    "timer": ("Wake me in {} minutes.", "Set a timer: {} minutes."),
    "play": ("Play {} for me.", "I want to hear {}."),
    "call": ("Call {} now.", "Get {} on the phone."),
    "light": ("Light to {} percent.", "Make it {} percent bright."),
    "train": ("A train to {}, please.", "How do I get to {} by train?"),
    "price": ("What does {} cost?", "Tell me the price of {}."),
    "order": ("Order {} for me.", "We need more {}."),
}
# Part of the saplings' pretraining text: weights of the question kinds.
KIND_WEIGHTS = {**dict.fromkeys(TOOL_ARGUMENTS, 0.1), "none": 0.2}
NO_TOOL_ANSWERS = (
    "I have no tool for that.",
    "No tool fits.",
    "Sorry, none of my tools can do that.",
    "That is not among my tools.",
    "I cannot: no such tool.",
)
NO_TOOL_SENTENCE = re.compile("|".join(f"{re.escape(n[:-1])}[.!]?" for n in NO_TOOL_ANSWERS))


@cache
def declare_tool(name: str) -> Tool:
    """Return the declaration of a tool, which has one argument."""
    kind = "integer" if TOOL_ARGUMENTS[name] in ("minutes", "percent") else "string"
    schema = {
        "type": "object",
        "properties": {TOOL_ARGUMENTS[name]: {"type": kind}},
        "required": [TOOL_ARGUMENTS[name]],
    }
    return Tool(name, f"{name} by {TOOL_ARGUMENTS[name]}", json.dumps(schema))


def _draw_argument(name: str, rng: random.Random) -> str | int:
    need = TOOL_ARGUMENTS[name]
    return (
        rng.randint(2, 90) if need in ("minutes", "percent") else rng.choice(ARGUMENT_VALUES[need])
    )


def make_item(item_seed: int) -> tuple[str, TaskItem]:
    """Make one item from a seed: `calls` is the right call.

    Without one the reference is a plain no.
    """
    rng = random.Random(f"tools {item_seed}")
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    wanted = rng.choice(list(TOOL_ARGUMENTS)) if kind == "none" else kind
    others = rng.sample([n for n in TOOL_ARGUMENTS if n != wanted], 2)
    declared = others if kind == "none" else rng.sample([wanted, others[0]], 2)
    argument = _draw_argument(wanted, rng)
    wording = rng.randrange(2)
    question = TOOL_QUESTIONS[wanted][wording].format(argument)
    key = f"tools/{kind}/{wanted}/{argument}/{'-'.join(sorted(declared))}/{wording}"
    asked = Conversation(
        Conversation.from_question(question).messages, tools=tuple(map(declare_tool, declared))
    )
    calls = (
        ()
        if kind == "none"
        else (ToolCall(wanted, canonical_json(json.dumps({TOOL_ARGUMENTS[wanted]: argument}))),)
    )
    return key, TaskItem(
        Prompt(key, asked, "tools", "en"), "" if calls else rng.choice(NO_TOOL_ANSWERS), calls
    )


def items(split: Split, n: int, seed: int) -> tuple[TaskItem, ...]:
    """Return at most n different items of a split; the seed decides which."""
    return draw_items(make_item, split, n, seed)


def reference_thinking(item: TaskItem, effort: ThinkingEffort) -> str:
    """Return the reference thinking: the tool that fits; at high effort also the declared tools."""
    declared = (
        f"tools: {', '.join(t.name for t in item.prompt.conversation.tools)}. "
        if effort is ThinkingEffort.HIGH
        else ""
    )
    return f"{declared}{item.calls[0].name} fits" if item.calls else f"{declared}none fits"


def grade(item: TaskItem, answer: Message) -> Verdict:
    """Grade: exactly the one right call without text, or no call and a plain no.

    Any other text is malformed.
    """
    if answer.calls:
        return (
            Verdict.RIGHT
            if answer.calls == item.calls and not answer.text.strip()
            else Verdict.WRONG
        )
    if not NO_TOOL_SENTENCE.fullmatch(strip_lead_in_and_closing(answer.text, "en")):
        return Verdict.MALFORMED
    return Verdict.WRONG if item.calls else Verdict.RIGHT


TOOLS_TASK = Task("tools", ("en",), items, grade, 5_445)
