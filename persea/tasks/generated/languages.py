"""Translation between English and zh, ja, ko, vi, id, th.

Numbers in words, dates, weekdays and hours, quantities, short sentences.

53,612 questions in both directions, 13,930 of them for training. The grader strips the phrasing
(answer_phrases) and wants the exact translation.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Mapping

from persea.chat.messages import Conversation, Message, ThinkingEffort
from persea.data.prompts import Prompt
from persea.tasks.generated.answer_phrases import answer_candidates, phrase_answer
from persea.tasks.generated.draw import draw_items
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
from persea.tasks.task import Split, Task, TaskItem, Verdict

# Part of the saplings' pretraining text: weights of the question kinds.
KIND_WEIGHTS = {"number": 0.35, "date": 0.2, "quantity": 0.2, "phrase": 0.15, "weekday": 0.1}
DAYS_PER_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def draw_translation_pair(kind: str, language: str, rng: random.Random) -> tuple[str, str, str]:
    """Draw (content code, English text, foreign text) of a kind of question."""
    if kind == "number":
        content = str(rng.randrange(1000) if rng.random() < 0.5 else rng.randrange(100))
    elif kind == "date":
        month = rng.randint(1, 12)
        content = f"{rng.randrange(7)}-{rng.randint(1, DAYS_PER_MONTH[month - 1])}-{month}"
    elif kind == "quantity":
        content = f"{rng.randint(2, 99)}-{rng.choice(list(COUNTED_NOUNS))}"
    elif kind == "phrase":
        content = f"{rng.randrange(len(SENTENCE_NOUNS))}-{rng.randrange(len(SENTENCE_ADJECTIVES))}"
    else:
        content = f"{rng.randrange(7)}-{rng.randint(1, 12)}"
    return content, verbalize(kind, content, "en"), verbalize(kind, content, language)


def verbalize(kind: str, content: str, language: str) -> str:
    """Write a content code of `draw_translation_pair` in a language."""
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
    """Make one item from a seed.

    `answer_key` is the bare translation, `reference` a phrasing of it.
    """
    rng = random.Random(f"languages {item_seed}")
    language, from_english = rng.choice(list(TRANSLATION_LANGUAGES)), rng.random() < 0.5
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    content, english, foreign = draw_translation_pair(kind, language, rng)
    source, target = (english, foreign) if from_english else (foreign, english)
    id_ = f"languages/{kind}/{language}/{'from' if from_english else 'to'}-english/{content}"
    question = f"To {TRANSLATION_LANGUAGES[language] if from_english else 'English'}: {source}"
    # The split goes by the question and not by the id: 六百二十七 is the same question in
    # Chinese and in Japanese.
    return question, TaskItem(
        Prompt(id_, Conversation.from_question(question), "languages", language),
        phrase_answer(target, language if from_english else "en", rng),
        answer_key=target,
    )


def items(split: Split, n: int, seed: int) -> tuple[TaskItem, ...]:
    """Return at most n different items of a split; the seed decides which."""
    return draw_items(make_item, split, n, seed)


def reference_thinking(item: TaskItem, effort: ThinkingEffort) -> str:
    """Return the reference thinking: the direction, and at high effort also the source text."""
    direction, _, source = item.prompt.conversation.messages[-1].text.partition(": ")
    return f"{direction}: {source}" if effort is ThinkingEffort.HIGH else direction


def grade(item: TaskItem, answer: Message) -> Verdict:
    """Grade by exact match after NFC, in any known phrasing of the target language.

    Without an answer key the bare answer inside the reference is right.
    """
    target = "en" if "/to-english/" in item.prompt.id else item.prompt.language
    right = unicodedata.normalize(
        "NFC", item.answer_key or min(answer_candidates(item.reference, target), key=len)
    )
    return Verdict.RIGHT if right in answer_candidates(answer.text, target) else Verdict.WRONG


LANGUAGES_TASK = Task("languages", tuple(TRANSLATION_LANGUAGES), items, grade, 13_930)
