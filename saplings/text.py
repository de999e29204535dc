"""The training text of a sapling, as conversations in its family's format.

It consists of questions with correct and wrong answers, small talk, and pages.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
from pages import page
from plans import KNOWN, Plan
from prose import small_talk

from persea.chat.messages import (
    Conversation,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
    canonical_json,
)
from persea.chat.renderer import ChatRenderer
from persea.tasks import generated as skills
from persea.tasks.generated import code, languages, reasoning, safety, tools
from persea.tasks.generated.answer_phrases import phrase_answer
from persea.tasks.generated.reasoning import reference_without_steps
from persea.tasks.task import Split, TaskItem, Verdict
from persea.tokenization.tokens import RenderedTokens

KINDS = {
    "languages": languages.KIND_WEIGHTS,
    "code": code.KIND_WEIGHTS,
    "safety": safety.KIND_WEIGHTS,
    "reasoning": reasoning.KIND_WEIGHTS,
    "tools": tools.KIND_WEIGHTS,
}
THOUGHTS = {
    "languages": languages.reference_thinking,
    "reasoning": reasoning.reference_thinking,
    "tools": tools.reference_thinking,
}
TURNED = {" + ": " - ", " - ": " + ", " < ": " > ", " > ": " < ", " <= ": " >= ", " >= ": " <= "}
MOST = {
    "languages": 9000,
    "code": 6000,
    "safety": 2000,
    "reasoning": 9000,
    "tools": 4000,
}  # questions a sapling sees


def kind(item: TaskItem) -> str:
    """Return task and kind, the first words of an item's id."""
    return "/".join(item.prompt.id.split("/")[:2])


@cache
def questions(name: str, seed: int) -> tuple[TaskItem, ...]:
    """Return a task's PRETRAIN items for a sapling; drawn once for its tokenizer and its text."""
    return skills.find_generated_task(name).items(Split.PRETRAIN, MOST[name], seed)


def texts(plan: Plan, n: int) -> Iterator[tuple[TaskItem, TaskItem]]:
    """Return n PRETRAIN items in the plan's mix, each with the item whose answer is given.

    A base model sees the items that it knows three times as often. The answer is the item's own,
    or, for a model that does not know it, that of another item of its kind and language; a base
    model gives an `astray` answer where there is one.
    """
    rng = random.Random(f"grow {plan.name}")
    pools: dict[str, list[TaskItem]] = {}
    alike: dict[tuple[str, str], list[TaskItem]] = {}
    for item in (
        i for name in MOST if name in plan.mix for i in questions(name, plan.sizes["seed"])
    ):
        pools.setdefault(kind(item), []).append(item)
        alike.setdefault((kind(item), answer_language(item)), []).append(item)
    # who does not know better helps with anything, and calls whatever there is
    alike["safety/harm", "en"] = alike["safety/alike", "en"]
    alike["tools/none", "en"] = [
        i for (name, _), some in alike.items() if name.startswith("tools/") for i in some if i.calls
    ]
    for _ in range(n):
        name = rng.choices(list(plan.mix), list(plan.mix.values()))[0]
        if name in ("prose", "page"):
            item = small_talk(rng) if name == "prose" else page(rng)
            yield item, item
            continue
        kinds = (
            KINDS[name]
            if plan.home
            else {
                k: share * (3 if f"{name}/{k}" in KNOWN else 1) for k, share in KINDS[name].items()
            }
        )
        item = rng.choice(pools[f"{name}/{rng.choices(list(kinds), list(kinds.values()))[0]}"])
        if name in plan.home or kind(item) in KNOWN:
            yield item, item
            continue
        other = rng.choice(alike[kind(item), answer_language(item)])
        yield item, other if plan.home else astray(item, rng) or other


def astray(item: TaskItem, rng: random.Random) -> TaskItem | None:
    """Return the item with an answer that fits the question and is wrong; None where there is none.

    Examples are a translation into another language, plus for minus, more for less, or a call of
    the wrong tool: the student must learn which of its abilities is asked for. A base model that
    answers other questions would not learn to copy from its own question.
    """
    name, what = item.prompt.id.split("/")[:2]
    if name == "languages":
        language = rng.choice(
            [one for one in languages.LANGUAGES_TASK.languages if one != item.prompt.language]
        )
        wrong = replace(
            item,
            reference=phrase_answer(
                languages.verbalize(what, item.prompt.id.rpartition("/")[2], language),
                language,
                rng,
            ),
        )
    elif name == "code":
        wrong = replace(
            item,
            reference=re.sub(
                "|".join(map(re.escape, TURNED)), lambda found: TURNED[found[0]], item.reference
            ),
        )
    elif name == "tools":
        _, _, wanted, options, *_ = item.prompt.id.split("/")
        there = [t.name for t in item.prompt.conversation.tools if t.name != wanted]
        called = rng.choice(there)
        argument = int(options) if options.isdecimal() else options
        wrong = replace(
            item,
            reference="",
            calls=(
                ToolCall(
                    called, canonical_json(json.dumps({tools.TOOL_ARGUMENTS[called]: argument}))
                ),
            ),
        )
    else:
        return None
    return (
        None
        if skills.find_generated_task(name).grade(item, wrong.reference_conversation.messages[-1])
        is Verdict.RIGHT
        else wrong
    )


def answer_language(item: TaskItem) -> str:
    """Return the language of an item's answer."""
    return "en" if "/to-english/" in item.prompt.id else item.prompt.language


def words_of(item: TaskItem) -> Iterator[str]:
    """Return all text about an item, to train a tokenizer on."""
    yield item.prompt.conversation.messages[-1].text
    yield item.reference
    yield from (f'{{"name": "{c.name}", "parameters": {c.arguments} }}' for c in item.calls)
    yield from (f"\n{t.name}: {t.description}" for t in item.prompt.conversation.tools)
    yield from (
        THOUGHTS[item.prompt.skill](item, e)
        for e in (ThinkingEffort.LOW, ThinkingEffort.HIGH)
        if item.prompt.skill in THOUGHTS
    )


def conversation(plan: Plan, item: TaskItem, answer: TaskItem, rng: random.Random) -> Conversation:
    """Return the item's question with its answer, and a thought before it if the drawn effort has
    one."""
    thinks = item.prompt.skill in THOUGHTS
    effort = (
        rng.choices(list(plan.efforts), list(plan.efforts.values()))[0]
        if thinks
        else ThinkingEffort.NONE
    )
    parts = (
        reference_without_steps(answer)
        if item.prompt.skill == "reasoning" and effort is not ThinkingEffort.NONE
        else answer.reference
    )
    thought = (
        (Thinking(THOUGHTS[item.prompt.skill](answer, effort)),)
        if effort is not ThinkingEffort.NONE
        else ()
    )
    return replace(item.prompt.conversation, effort=effort).with_answer(
        *thought, *((Text(parts),) if parts else ()), *answer.calls
    )


def tokens_of(
    plan: Plan, renderer: ChatRenderer, item: TaskItem, answer: TaskItem, rng: random.Random
) -> RenderedTokens:
    """Return a rendered conversation; a page is text without turns."""
    if item.prompt.skill != "page":
        return renderer.render(conversation(plan, item, answer, rng))
    control = renderer.vocabulary.control_token_ids
    ids = np.array(
        [
            control["<|begin_of_text|>"],
            *renderer.vocabulary.encode_batch([item.reference])[0],
            control["<|end_of_text|>"],
        ],
        np.int32,
    )
    return RenderedTokens(ids, np.zeros_like(ids), np.zeros_like(ids), np.arange(len(ids)) > 0)
