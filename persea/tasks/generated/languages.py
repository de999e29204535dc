"""Languages: English <-> zh, ja, ko, vi, id, th; numbers in words, dates, weekdays and hours, quantities, small sentences.

About 56,000 questions, both ways. Graded by the translation inside the answer's dress (`frames`), exactly.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Mapping

from persea.chat.messages import Conversation, Effort, Message
from persea.data.prompts import Prompt
from persea.tasks.generated.answer_phrases import cores, dress
from persea.tasks.generated.number_words import NAMES, NOUNS, QUALITIES, THINGS, day, meeting, number, quantity, sentence
from persea.tasks.task import Item, Skill, Split, Verdict, draw

KINDS = {"number": 0.35, "date": 0.2, "quantity": 0.2, "phrase": 0.15, "weekday": 0.1}
DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def both(kind: str, language: str, rng: random.Random) -> tuple[str, str, str]:
    """(what, English, foreign) of a kind."""
    if kind == "number":
        what = str(rng.randrange(1000) if rng.random() < 0.5 else rng.randrange(100))
    elif kind == "date":
        month = rng.randint(1, 12)
        what = f"{rng.randrange(7)}-{rng.randint(1, DAYS[month - 1])}-{month}"
    elif kind == "quantity":
        what = f"{rng.randint(2, 99)}-{rng.choice(list(THINGS))}"
    elif kind == "phrase":
        what = f"{rng.randrange(len(NOUNS))}-{rng.randrange(len(QUALITIES))}"
    else:
        what = f"{rng.randrange(7)}-{rng.randint(1, 12)}"
    return what, put(kind, what, "en"), put(kind, what, language)


def put(kind: str, what: str, language: str) -> str:
    """What `both` drew, in a language."""
    first, *others = what.split("-")
    if kind == "quantity":
        return quantity(int(first), others[0], language)
    forms: Mapping[str, Callable[..., str]] = {"number": number, "date": day, "phrase": sentence, "weekday": meeting}
    return forms[kind](int(first), *map(int, others), language)


def make(number_of_item: int) -> tuple[str, Item]:
    """One item from a number. `key` is the bare translation, `reference` one way to say it."""
    rng = random.Random(f"languages {number_of_item}")
    language, away = rng.choice(list(NAMES)), rng.random() < 0.5
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    what, english, foreign = both(kind, language, rng)
    source, target = (english, foreign) if away else (foreign, english)
    id_ = f"languages/{kind}/{language}/{'from' if away else 'to'}-english/{what}"
    question = f"To {NAMES[language] if away else 'English'}: {source}"
    # the key is the question, not the id: 六百二十七 is the same question in Chinese and in Japanese
    return question, Item(Prompt(id_, Conversation.ask(question), "languages", language), dress(target, language if away else "en", rng), key=target)


def items(split: Split, n: int, seed: int) -> tuple[Item, ...]:
    return draw(make, split, n, seed)


def thought(item: Item, effort: Effort) -> str:
    """What a thinking teacher writes first: the direction, and at high effort the source again."""
    direction, _, source = item.prompt.conversation.messages[-1].text.partition(": ")
    return f"{direction}: {source}" if effort is Effort.HIGH else direction


def grade(item: Item, said: Message) -> Verdict:
    """Exact, after NFC, in any of the ways to say it in the language that was asked for. Without a key the reference's core is right."""
    spoken = "en" if "/to-english/" in item.prompt.id else item.prompt.language
    right = unicodedata.normalize("NFC", item.key or min(cores(item.reference, spoken), key=len))
    return Verdict.RIGHT if right in cores(said.text, spoken) else Verdict.WRONG


LANGUAGES = Skill("languages", tuple(NAMES), items, grade)
