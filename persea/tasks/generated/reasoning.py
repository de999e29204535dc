"""Word problems: sums of two and three steps, and comparisons.

Graded by the final answer, whatever precedes it.

33,031 questions, 8,566 of them for training. The numbers alone identify a question: another
name or object does not make another question. Without thinking, the reference writes the sums
before the answer, because a model of this size has nowhere else to compute; with thinking, the sums
are in the thinking text.
"""

from __future__ import annotations

import random
import re

from persea.chat.messages import Conversation, Message, ThinkingEffort
from persea.data.prompts import Prompt
from persea.tasks.generated.answer_phrases import phrase_answer, strip_lead_in_and_closing
from persea.tasks.generated.draw import draw_items
from persea.tasks.task import Split, Task, TaskItem, Verdict

PERSON_NAMES = ("Ana", "Ben", "Mia", "Tom", "Kim", "Lee")
OBJECTS = ("apples", "books", "coins", "cards", "eggs", "pens")
# Part of the saplings' pretraining text: weights of the question kinds.
KIND_WEIGHTS = {"two": 0.4, "three": 0.4, "compare": 0.2}
CONCLUSION_FORMS = ("Answer: {}", "Answer: {}.", "So {}.", "That makes {}.", "The answer is {}.")
CHANGE_VERBS = {1: "gets", -1: "loses"}


def chain_steps(figures: tuple[int, ...], effort: ThinkingEffort) -> str:
    """Write out a sum of signed numbers.

    Effort none and low: the partial sums. Medium: also the start. High: also the start and the end.
    """
    total, sums = figures[0], []
    for figure in figures[1:]:
        sums.append(f"{total}{'+' if figure > 0 else '-'}{abs(figure)}={total + figure}")
        total += figure
    start = (
        [f"start {figures[0]}"] if effort in (ThinkingEffort.MEDIUM, ThinkingEffort.HIGH) else []
    )
    return ",".join([*start, *sums, *([f"end {total}"] if effort is ThinkingEffort.HIGH else [])])


def draw_chain(rng: random.Random, length: int) -> tuple[int, ...]:
    """Draw a start and `length` signed numbers whose partial sums never fall below zero."""
    figures = [rng.randint(2, 12)]
    for _ in range(length):
        figure = rng.randint(2, 9)
        figures.append(-figure if rng.random() < 0.5 and sum(figures) >= figure else figure)
    return tuple(figures)


def make_item(item_seed: int) -> tuple[str, TaskItem]:
    """Make one item from a seed: `answer_key` is the bare answer, a whole number or a name."""
    rng = random.Random(f"reasoning {item_seed}")
    (person, other), thing = rng.sample(PERSON_NAMES, 2), rng.choice(OBJECTS)
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    figures = draw_chain(rng, 1 if kind == "compare" else 2 if kind == "two" else 3)
    changes = [f"{CHANGE_VERBS[1 if f > 0 else -1]} {abs(f)}" for f in figures[1:]]
    if kind == "compare":
        total = sum(figures)
        rival = rng.choice([n for n in range(max(1, total - 9), total + 10) if n != total])
        question = (
            f"{person} has {figures[0]} {thing} and {changes[0]}. "
            f"{other} has {rival}. Who has more?"
        )
        answer, figures = person if total > rival else other, (*figures, rival)
    else:
        question = f"{person} has {figures[0]} {thing}, {', '.join(changes)}. How many?"
        answer = str(sum(figures))
    key = f"reasoning/{kind}/{'/'.join(map(str, figures))}"
    prompt = Prompt(key, Conversation.from_question(question), "reasoning", "en")
    steps = solution_steps(kind, figures, ThinkingEffort.NONE)
    conclusion = phrase_answer(answer, "en", rng, CONCLUSION_FORMS)
    return key, TaskItem(prompt, f"{steps}. {conclusion}", answer_key=answer)


def solution_steps(kind: str, figures: tuple[int, ...], effort: ThinkingEffort) -> str:
    """Return the steps of an item; a comparison ends with the larger-or-smaller sign."""
    if kind != "compare":
        return chain_steps(figures, effort)
    total, rival = sum(figures[:-1]), figures[-1]
    return f"{chain_steps(figures[:-1], effort)}{'>' if total > rival else '<'}{rival}"


def reference_thinking(item: TaskItem, effort: ThinkingEffort) -> str:
    """Return the reference thinking: the steps, more of them with more effort."""
    _, kind, *figures = item.prompt.id.split("/")
    return solution_steps(kind, tuple(map(int, figures)), effort)


def reference_without_steps(item: TaskItem) -> str:
    """Return the reference answer after thinking: the conclusion alone."""
    return item.reference.partition(". ")[2]


def items(split: Split, n: int, seed: int) -> tuple[TaskItem, ...]:
    """Return at most n different items of a split; the seed decides which."""
    return draw_items(make_item, split, n, seed)


def final_number_or_name(text: str) -> str | None:
    """Return the whole number or the name at the end of a text, before a closing and a full stop.

    None if it ends with neither.
    """
    found = re.search(
        r"(?<![\w.,-])(\d{1,20}|[A-Z][a-z]+)\.?$", strip_lead_in_and_closing(text, "en")
    )
    return None if found is None else found[1]


def grade(item: TaskItem, answer: Message) -> Verdict:
    """Grade the number or name at the end of the answer; thinking is not graded.

    Without an answer key the end of the reference is right.
    """
    found = final_number_or_name(answer.text)
    if found is None or not (found.isdecimal() or found in PERSON_NAMES):
        return Verdict.MALFORMED
    right = item.answer_key or final_number_or_name(item.reference) or ""
    same = int(found) == int(right) if found.isdecimal() and right.isdecimal() else found == right
    return Verdict.RIGHT if same else Verdict.WRONG


REASONING_TASK = Task("reasoning", ("en",), items, grade, 8_566)
