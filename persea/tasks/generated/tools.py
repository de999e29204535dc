"""Tools: one right call, or none where no declared tool fits. Graded by the call's name and arguments, or by the plain no.

About 26,000 questions: two of eight tools are declared; the question is of one of them, or of a third. Another wording is another question:
without that TEACH held 36 calls of `train`, and half of 1,500 questions were such that no tool fits.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache

from persea.chat.messages import Conversation, Effort, Message, Tool, ToolCall, canonical
from persea.data.prompts import Prompt
from persea.tasks.generated.answer_phrases import bare
from persea.tasks.task import Item, Skill, Split, Verdict, draw

CITIES = ("Hanoi", "Tokyo", "Seoul", "Bangkok", "Jakarta", "Beijing", "Manila", "Rome", "Cairo", "Lima", "Oslo", "Paris", "Delhi", "Quito", "Berlin",
          "Madrid", "Vienna", "Dublin", "Lagos", "Osaka", "Bonn", "Milan", "Turin", "Hue", "Dakar", "Accra", "Perth", "Basel", "Bali", "Kyoto",
          "Busan", "Nice")
SONGS = ("Moon", "Rain", "Home", "River", "Dance", "Stars", "Summer", "Train", "Gold", "Snow", "Fire", "Wind", "Night", "Smile", "Ocean", "Light",
         "Roses", "Clouds", "Storm", "Dawn", "Echo", "Honey", "Magic", "Shadow", "Silver", "Thunder", "Wings", "Blue", "Circle", "Dream", "Island",
         "Spring")
PEOPLE = ("Ana", "Ben", "Mia", "Tom", "Kim", "Lee", "Eva", "Max", "Zoe", "Ian", "Amy", "Bob", "Eve", "Jim", "Liz", "Sam", "Ada", "Dan", "Fay", "Gus",
          "Hal", "Ivy", "Jon", "Kai", "Leo", "May", "Ned", "Ora", "Pia", "Ray", "Sue", "Ty")
GOODS = ("rice", "milk", "bread", "tea", "fish", "salt", "eggs", "soap", "paper", "sugar", "oil", "corn", "beans", "lamps", "pens", "ink", "apples",
         "butter", "cheese", "chairs", "cloth", "coal", "flour", "glue", "honey", "jam", "nails", "onions", "paint", "rope", "shoes", "wool")
ARGUMENTS = {"city": CITIES, "song": SONGS, "person": PEOPLE, "item": GOODS}
NEEDS = {"weather": "city", "timer": "minutes", "play": "song", "call": "person", "light": "percent", "train": "city", "price": "item",
         "order": "item"}
QUESTIONS = {
    "weather": ("How is the weather in {}?", "Weather in {}, please."), "timer": ("Wake me in {} minutes.", "Set a timer: {} minutes."),
    "play": ("Play {} for me.", "I want to hear {}."), "call": ("Call {} now.", "Get {} on the phone."),
    "light": ("Light to {} percent.", "Make it {} percent bright."), "train": ("A train to {}, please.", "How do I get to {} by train?"),
    "price": ("What does {} cost?", "Tell me the price of {}."), "order": ("Order {} for me.", "We need more {}."),
}
KINDS = {**dict.fromkeys(NEEDS, 0.1), "none": 0.2}
NONE = ("I have no tool for that.", "No tool fits.", "Sorry, none of my tools can do that.", "That is not among my tools.", "I cannot: no such tool.")
REFUSED = re.compile("|".join(f"{re.escape(n[:-1])}[.!]?" for n in NONE))


@cache
def tool(name: str) -> Tool:
    """A declaration with one argument."""
    kind = "integer" if NEEDS[name] in ("minutes", "percent") else "string"
    schema = {"type": "object", "properties": {NEEDS[name]: {"type": kind}}, "required": [NEEDS[name]]}
    return Tool(name, f"{name} by {NEEDS[name]}", json.dumps(schema))


def _argument(name: str, rng: random.Random) -> str | int:
    need = NEEDS[name]
    return rng.randint(2, 90) if need in ("minutes", "percent") else rng.choice(ARGUMENTS[need])


def make(number: int) -> tuple[str, Item]:
    """One item from a number. `calls` is the right call; without one the reference says that none fits."""
    rng = random.Random(f"tools {number}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    wanted = rng.choice(list(NEEDS)) if kind == "none" else kind
    others = rng.sample([n for n in NEEDS if n != wanted], 2)
    declared = others if kind == "none" else rng.sample([wanted, others[0]], 2)
    argument = _argument(wanted, rng)
    wording = rng.randrange(2)
    question = QUESTIONS[wanted][wording].format(argument)
    key = f"tools/{kind}/{wanted}/{argument}/{'-'.join(sorted(declared))}/{wording}"
    asked = Conversation(Conversation.ask(question).messages, tools=tuple(map(tool, declared)))
    calls = () if kind == "none" else (ToolCall(wanted, canonical(json.dumps({NEEDS[wanted]: argument}))),)
    return key, Item(Prompt(key, asked, "tools", "en"), "" if calls else rng.choice(NONE), calls)


def items(split: Split, n: int, seed: int) -> tuple[Item, ...]:
    return draw(make, split, n, seed)


def thought(item: Item, effort: Effort) -> str:
    """Which tool fits; at high effort also which there are."""
    there = f"tools: {', '.join(t.name for t in item.prompt.conversation.tools)}. " if effort is Effort.HIGH else ""
    return f"{there}{item.calls[0].name} fits" if item.calls else f"{there}none fits"


def grade(item: Item, said: Message) -> Verdict:
    """Exactly the one right call and no word beside it; or no call and a plain no. Words that are neither are malformed."""
    if said.calls:
        return Verdict.RIGHT if said.calls == item.calls and not said.text.strip() else Verdict.WRONG
    if not REFUSED.fullmatch(bare(said.text, "en")):
        return Verdict.MALFORMED
    return Verdict.WRONG if item.calls else Verdict.RIGHT


TOOLS = Skill("tools", ("en",), items, grade)
