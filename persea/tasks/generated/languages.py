"""Languages: English <-> zh, ja, ko, vi, id, th; numbers in words, dates, weekdays and hours, quantities, small sentences.

About 56,000 questions, both ways. Graded by the translation inside the answer's dress (`frames`), exactly.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Mapping

from persea.chat.messages import Conversation, Message, ThinkingEffort
from persea.data.prompts import Prompt
from persea.tasks.generated.answer_phrases import answer_candidates, phrase_answer
from persea.tasks.generated.number_words import (
    COUNTED_NOUNS,
    SENTENCE_ADJECTIVES,
    SENTENCE_NOUNS,
    TRANSLATION_LANGUAGES,
    adjective_sentence,
    date_in_words,
    meeting_sentence,
    number_in_words,
    quantity_in_words,
)
from persea.tasks.task import Split, Task, TaskItem, Verdict, draw_items

KIND_WEIGHTS = {"number": 0.35, "date": 0.2, "quantity": 0.2, "phrase": 0.15, "weekday": 0.1}
DAYS_PER_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def draw_translation_pair(kind: str, language: str, rng: random.Random) -> tuple[str, str, str]:
    """(what, English, foreign) of a kind."""
    if kind == "number":
        what = str(rng.randrange(1000) if rng.random() < 0.5 else rng.randrange(100))
    elif kind == "date":
        month = rng.randint(1, 12)
        what = f"{rng.randrange(7)}-{rng.randint(1, DAYS_PER_MONTH[month - 1])}-{month}"
    elif kind == "quantity":
        what = f"{rng.randint(2, 99)}-{rng.choice(list(COUNTED_NOUNS))}"
    elif kind == "phrase":
        what = f"{rng.randrange(len(SENTENCE_NOUNS))}-{rng.randrange(len(SENTENCE_ADJECTIVES))}"
    else:
        what = f"{rng.randrange(7)}-{rng.randint(1, 12)}"
    return what, verbalize(kind, what, "en"), verbalize(kind, what, language)


def verbalize(kind: str, content: str, language: str) -> str:
    """What `both` drew, in a language."""
    first, *others = content.split("-")
    if kind == "quantity":
        return quantity_in_words(int(first), others[0], language)
    forms: Mapping[str, Callable[..., str]] = {
        "number": number_in_words,
        "date": date_in_words,
        "phrase": adjective_sentence,
        "weekday": meeting_sentence,
    }
    return forms[kind](int(first), *map(int, others), language)


def make_item(item_seed: int) -> tuple[str, TaskItem]:
    """One item from a number. `key` is the bare translation, `reference` one way to say it."""
    rng = random.Random(f"languages {item_seed}")
    language, away = rng.choice(list(TRANSLATION_LANGUAGES)), rng.random() < 0.5
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    what, english, foreign = draw_translation_pair(kind, language, rng)
    source, target = (english, foreign) if away else (foreign, english)
    id_ = f"languages/{kind}/{language}/{'from' if away else 'to'}-english/{what}"
    question = f"To {TRANSLATION_LANGUAGES[language] if away else 'English'}: {source}"
    # the key is the question, not the id: 六百二十七 is the same question in Chinese and in Japanese
    return question, TaskItem(
        Prompt(id_, Conversation.from_question(question), "languages", language),
        phrase_answer(target, language if away else "en", rng),
        answer_key=target,
    )


def items(split: Split, n: int, seed: int) -> tuple[TaskItem, ...]:
    return draw_items(make_item, split, n, seed)


def reference_thinking(item: TaskItem, effort: ThinkingEffort) -> str:
    """What a thinking teacher writes first: the direction, and at high effort the source again."""
    direction, _, source = item.prompt.conversation.messages[-1].text.partition(": ")
    return f"{direction}: {source}" if effort is ThinkingEffort.HIGH else direction


def grade(item: TaskItem, answer: Message) -> Verdict:
    """Exact, after NFC, in any of the ways to say it in the language that was asked for. Without a key the reference's core is right."""
    spoken = "en" if "/to-english/" in item.prompt.id else item.prompt.language
    right = unicodedata.normalize(
        "NFC", item.answer_key or min(answer_candidates(item.reference, spoken), key=len)
    )
    return Verdict.RIGHT if right in answer_candidates(answer.text, spoken) else Verdict.WRONG


LANGUAGES_TASK = Task("languages", tuple(TRANSLATION_LANGUAGES), items, grade)
