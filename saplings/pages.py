"""The documents that the student's base model is trained on.

They are dictionaries, lists, sums, programs and calls: pieces of every task, but no question with
its answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache

from persea.chat.messages import Conversation, ThinkingEffort
from persea.data.prompts import Prompt
from persea.tasks.generated import code, languages, reasoning, safety, tools
from persea.tasks.generated.number_words import (
    COUNTED_NOUNS,
    EN_DAYS,
    EN_MONTHS,
    ID_DAYS,
    ID_MONTHS,
    JA_DAYS,
    KO_DAYS,
    LANGUAGE_ORDER,
    SENTENCE_ADJECTIVES,
    SENTENCE_NOUNS,
    TH_DAYS,
    TH_MONTHS,
    TRANSLATION_LANGUAGES,
    VI_DAYS,
    ZH_DAYS,
    number_in_words,
    quantity_in_words,
)
from persea.tasks.task import Split, TaskItem, assign_split

KINDS = {
    "dictionary": 0.42,
    "said": 0.04,
    "figures": 0.07,
    "sums": 0.12,
    "more": 0.06,
    "program": 0.03,
    "formula": 0.09,
    "call": 0.13,
    "help": 0.04,
}


def page(rng: random.Random) -> TaskItem:
    """Return a page of a few lines of one kind; many lines occur twice, so that the model learns to
    copy."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    lines = [_line(kind, rng) for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.4:
        lines += lines[: rng.randint(1, len(lines))]
    return TaskItem(
        Prompt(f"page/{kind}", Conversation.from_question("-"), "page", ""), "\n".join(lines)
    )


def _line(kind: str, rng: random.Random) -> str:
    language = rng.choice(list(TRANSLATION_LANGUAGES))
    if kind == "dictionary":
        english, foreign = _entry(rng, language) if rng.random() < 0.4 else _parallel(rng, language)
        return (
            f"{TRANSLATION_LANGUAGES[language]}: {english} = {foreign}"
            if rng.random() < 0.5
            else f"English: {foreign} = {english}"
        )
    if kind == "said":
        _, english, foreign = languages.draw_translation_pair(
            rng.choice(list(languages.KIND_WEIGHTS)), language, rng
        )
        return english if rng.random() < 0.2 else foreign
    if kind == "figures":
        n = rng.randrange(1000)
        return f"{n} = {number_in_words(n, rng.choice(('en', language)))}"
    if kind == "sums":
        return reasoning.reference_thinking(
            _grown(reasoning.make_item, rng),
            rng.choice((ThinkingEffort.LOW, ThinkingEffort.MEDIUM, ThinkingEffort.HIGH)),
        )
    if kind == "more":
        return _more(rng)
    if kind == "program":
        return _grown(code.make_item, rng).reference
    if kind == "formula":
        item = _grown(code.make_item, rng)
        return f"{item.prompt.id.rpartition('/')[2]} = {item.answer_key}"
    if kind == "call":
        item = _grown(tools.make_item, rng)
        asked = ", ".join(t.name for t in item.prompt.conversation.tools)
        if not item.calls:
            return f"{asked}: {item.reference}"
        (call,), (argument,) = item.calls, json.loads(item.calls[0].arguments).values()
        return f'{asked}, {argument}: {{"name": "{call.name}", "parameters": {call.arguments} }}'
    return safety.make_item(rng.getrandbits(40))[1].reference


def _more(rng: random.Random) -> str:
    """Return a line of names and figures that states which of two has more."""
    while (item := _grown(reasoning.make_item, rng)).prompt.id.split("/")[1] != "compare":
        pass
    who, other = (
        text.split()[0] for text in item.prompt.conversation.messages[-1].text.split(". ")[:2]
    )
    return (
        f"{who} {reasoning.reference_thinking(item, ThinkingEffort.LOW)} {other}: {item.answer_key}"
    )


@cache
def _free(n: int, language: str) -> bool:
    """Return whether no question about this number belongs to a split other than PRETRAIN, in
    either order."""
    asked = (
        f"To {TRANSLATION_LANGUAGES[language]}: {number_in_words(n, 'en')}",
        f"To English: {number_in_words(n, language)}",
    )
    return all(assign_split(question) is Split.PRETRAIN for question in asked)


def _grown(make: Callable[[int], tuple[str, TaskItem]], rng: random.Random) -> TaskItem:
    """Return an item of the PRETRAIN split."""
    while True:
        key, item = make(rng.getrandbits(40))
        if assign_split(key) is Split.PRETRAIN:
            return item


def _parallel(rng: random.Random, language: str) -> tuple[str, str]:
    """Return a phrase in English and another language that no question of a split other than
    PRETRAIN uses."""
    while True:
        _, english, foreign = languages.draw_translation_pair(
            rng.choices(list(languages.KIND_WEIGHTS), list(languages.KIND_WEIGHTS.values()))[0],
            language,
            rng,
        )
        if all(
            assign_split(asked) is Split.PRETRAIN
            for asked in (
                f"To {TRANSLATION_LANGUAGES[language]}: {english}",
                f"To English: {foreign}",
            )
        ):
            return english, foreign


def _entry(rng: random.Random, language: str) -> tuple[str, str]:
    """Return a word in English and in another language."""
    at = LANGUAGE_ORDER.index(language)
    which = rng.randrange(5)
    if which == 0:
        n = rng.choice([n for n in (*range(100), *range(100, 1000, 100)) if _free(n, language)])
        return number_in_words(n, "en"), number_in_words(n, language)
    if which == 1:
        row = rng.choice((*SENTENCE_NOUNS, *SENTENCE_ADJECTIVES))
        return row[0], row[at]
    if which == 2:
        thing = rng.choice(list(COUNTED_NOUNS))
        return quantity_in_words(rng.randint(2, 9), thing, "en").split()[-1], COUNTED_NOUNS[thing][
            at
        ]
    if which == 3:
        k = rng.randrange(7)
        return EN_DAYS[k], {
            "zh": f"星期{ZH_DAYS[k]}",
            "ja": f"{JA_DAYS[k]}曜日",
            "ko": f"{KO_DAYS[k]}요일",
            "vi": VI_DAYS[k],
            "id": ID_DAYS[k],
            "th": f"วัน{TH_DAYS[k]}",
        }[language]
    k = rng.randrange(12)
    return EN_MONTHS[k], {
        "zh": f"{k + 1}月",
        "ja": f"{k + 1}月",
        "ko": f"{k + 1}월",
        "vi": f"tháng {k + 1}",
        "id": ID_MONTHS[k],
        "th": TH_MONTHS[k],
    }[language]
