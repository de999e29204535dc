"""Metrics of own tasks: how an answer is compared with the reference of its row.

A new metric is one function and its line in METRICS.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from persea.chat.messages import Message
from persea.storage import parse_strict_json
from persea.tasks.benchmarks.benchmark import (
    Grader,
    GradingOptions,
    binary_grade,
    malformed_grade,
)
from persea.tasks.benchmarks.code import grade_tests
from persea.tasks.benchmarks.languages import grade_choice, grade_translation
from persea.tasks.benchmarks.number_parsing import find_numbers, possible_values
from persea.tasks.benchmarks.reasoning import extract_final_answer, has_two_numbers
from persea.tasks.task import Grade, TaskItem

REGEX_TIMEOUT_S = 5.0
AskJudge: TypeAlias = Callable[[str], str]
JUDGE_PROMPT = """\
Grade the answer to a question. Reply with one word: RIGHT or WRONG.

What makes an answer right: {rubric}

<question>
{question}
</question>
<reference>
{reference}
</reference>
<answer>
{answer}
</answer>

One word, RIGHT or WRONG:"""
TAGS = re.compile(r"</?(question|reference|answer)>")


@dataclass(frozen=True)
class Metric:
    """How answers are graded.

    Attributes:
        name: The name in a recipe.
        grade: (item, answer) -> the grade, with the reference in `item.reference`.
        required_modules: Modules of optional dependencies that it needs.
        runs_code: Whether it runs the answers in the sandbox.
    """

    name: str
    grade: Grader
    required_modules: tuple[str, ...] = ()
    runs_code: bool = False


def normalize_answer(text: str) -> str:
    """Return a text in NFKC without case, punctuation and repeated spaces.

    Example:
        >>> normalize_answer("  The  Tay. ")
        'the tay'
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in plain)
    return " ".join(words.split())


def grade_exact(item: TaskItem, answer: Message) -> Grade:
    """Right if the texts are equal; white space around them does not count."""
    return binary_grade(unicodedata.normalize("NFC", answer.text).strip() == item.reference.strip())


def grade_normalized(item: TaskItem, answer: Message) -> Grade:
    """Right if the texts are equal without case, punctuation and repeated spaces."""
    return binary_grade(normalize_answer(answer.text) == normalize_answer(item.reference))


def grade_contains(item: TaskItem, answer: Message) -> Grade:
    """Right if the answer contains the reference, as whole words where it ends in Latin letters."""
    wanted = normalize_answer(item.reference)
    head = r"(?<![a-z0-9])" if re.match(r"[a-z0-9]", wanted) else ""
    tail = r"(?![a-z0-9])" if re.search(r"[a-z0-9]$", wanted) else ""
    found = re.search(f"{head}{re.escape(wanted)}{tail}", normalize_answer(answer.text))
    return binary_grade(bool(wanted) and found is not None)


def grade_regex(item: TaskItem, answer: Message) -> Grade:
    """Right if the reference, a pattern, matches somewhere in the answer.

    Raises:
        TimeoutError: The pattern takes too long, so that the answer counts as a grader error.
    """
    import regex  # has a time limit, unlike re

    found = regex.search(item.reference, answer.text, timeout=REGEX_TIMEOUT_S)
    return binary_grade(found is not None)


def grade_numeric(item: TaskItem, answer: Message) -> Grade:
    """Right if the final number equals the reference, however the language writes numbers."""
    language = item.prompt.language
    gold = possible_values(extract_final_answer(item.reference) or item.reference, "en")
    end = extract_final_answer(answer.text)
    numbers = find_numbers(end) if end else find_numbers(answer.text)[-1:]
    if not numbers:
        return malformed_grade("no number")
    if has_two_numbers(end or answer.text, language):
        return binary_grade(False, "two final numbers")
    written = numbers[-1] if "=" in end or not end else numbers[0]
    return binary_grade(bool(gold & possible_values(written, language)), f"final number {written}")


def grade_json(item: TaskItem, answer: Message) -> Grade:
    """Right if the answer is JSON, fenced or not, with the value of the reference."""
    bare = re.sub(r"\A\s*```(?:json)?\s*\n?|\n?\s*```\s*\Z", "", answer.text, flags=re.IGNORECASE)
    try:
        found = parse_strict_json(bare.strip())
    except (ValueError, RecursionError) as error:
        return malformed_grade(f"not JSON: {error}"[:200])
    return binary_grade(_canonical(found) == _canonical(json.loads(item.reference)))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def judge_grader(ask: AskJudge, rubric: str) -> Grader:
    """Return a grader that asks a judge whether an answer satisfies a rubric.

    A judge that replies with neither word raises at grading: a grader error.

    Args:
        ask: Prompt -> the judge's reply.
        rubric: What makes an answer right.
    """

    def grade(item: TaskItem, answer: Message) -> Grade:
        if not answer.text.strip():
            return malformed_grade("empty answer")
        # tags that would end the frame are rewritten, so that no answer poses as the judge's prompt
        question = item.prompt.conversation.messages[-1].text
        texts = {"question": question, "reference": item.reference, "answer": answer.text}
        quoted = {key: TAGS.sub(r"[\1]", text) for key, text in texts.items()}
        reply = ask(JUDGE_PROMPT.format(rubric=rubric, **quoted)).strip().strip(".*").upper()
        if reply not in ("RIGHT", "WRONG"):
            raise ValueError(f"the judge replied {reply[:60]!r}")
        return binary_grade(reply == "RIGHT", f"judged: {reply.lower()}")

    return grade


METRICS: tuple[Metric, ...] = (
    Metric("exact", grade_exact),
    Metric("normalized", grade_normalized),
    Metric("contains", grade_contains),
    Metric("regex", grade_regex, ("regex",)),
    Metric("choice", grade_choice),
    Metric("numeric", grade_numeric),
    Metric("chrf", grade_translation, ("sacrebleu",)),
    Metric("json", grade_json),
    Metric("tests", grade_tests, runs_code=True),
)
METRICS_BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


def with_options(metric: Metric, options: GradingOptions) -> Grader:
    """Return the grader of a metric with the recipe's limits."""
    if metric.name == "chrf":
        return partial(grade_translation, min_correct_chrf=options.min_correct_chrf)
    if metric.name == "tests":
        return partial(grade_tests, limits=options.sandbox)
    return metric.grade
