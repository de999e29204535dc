"""Reasoning: one- and two-step sums and comparisons in words. Graded by the last number of the answer.

About 600,000 questions. The reference works digit by digit, because a model that answers at once has nowhere else to
think: with bare sums ("44-10=34") saplings of 0.8 M parameters stayed at .27 after 3,000 steps (docs/diary.md).
"""

from __future__ import annotations

import random
import re

from persea.chat import Conversation, Message
from persea.corpus import Prompt
from persea.measure import Item, Skill, Split, Verdict, draw

WHO = ("Ana", "Ben", "Mia", "Tom", "Kim", "Lee")
WHAT = ("apples", "books", "coins", "cards", "eggs", "pens")


def worked(a: int, sign: str, b: int) -> str:
    """A sum of two numbers below 100, ones before tens: "18+19: 8+9=17, 1+1+1=3, 37. " """
    (a10, a1), (b10, b1) = divmod(a, 10), divmod(b, 10)
    carry = (a1 + b1) // 10 if sign == "+" else int(a1 < b1)
    ones = f"{a1}+{b1}={a1 + b1}" if sign == "+" else f"{a1 + 10 * carry}-{b1}={a1 + 10 * carry - b1}"
    result = a + b if sign == "+" else a - b
    tens = f"{a10}{sign}{b10}{f'{sign}1' if carry else ''}={result // 10}"
    return f"{a}{sign}{b}: {ones}, {tens}, {result}. "


def make(number: int) -> tuple[str, Item]:
    """One item from a number; its key holds the figures, so that another name is not another question."""
    rng = random.Random(f"reasoning {number}")
    who, what = rng.choice(WHO), rng.choice(WHAT)
    kind = rng.choice(("gain", "loss", "both", "more"))
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    if kind == "gain":
        question = f"{who} has {a} {what} and gets {b} more. How many now?"
        steps, result = worked(a, "+", b), a + b
    elif kind == "loss":
        a, b = max(a, b) + 1, min(a, b)
        question = f"{who} has {a} {what} and loses {b}. How many now?"
        steps, result = worked(a, "-", b), a - b
    elif kind == "both":
        c = rng.randint(2, min(a + b - 1, 39))
        question = f"{who} has {a} {what}, gets {b} more and loses {c}. How many now?"
        steps, result = worked(a, "+", b) + worked(a + b, "-", c), a + b - c
        b = b * 100 + c
    else:
        b = b if b != a else a + 1
        question = f"{who} has {a} {what}, and {b} are in a box. Which is more?"
        steps, result = "", max(a, b)
    key = f"reasoning/{kind}/{a}/{b}"
    reference = f"{steps}Answer: {result}"
    return key, Item(Prompt(key, Conversation.ask(question), "reasoning", "en"), reference)


def items(split: Split, n: int, seed: int) -> tuple[Item, ...]:
    return draw(make, split, n, seed)


def final_number(text: str) -> int | None:
    """The last whole number of a text; None where there is none, or it has more digits than a sum can (a model that cannot stop)."""
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found and len(found[-1]) <= 20 else None


def grade(item: Item, said: Message) -> Verdict:
    """The last number of the answer is the reference's."""
    number = final_number(said.text)
    if number is None:
        return Verdict.MALFORMED
    return Verdict.RIGHT if number == final_number(item.reference) else Verdict.WRONG


REASONING = Skill("reasoning", ("en",), items, grade)
