"""Measure a hybrid student in each thinking mode.

Per skill and effort: the score, whether the student thinks when it should and only then, how long
its thoughts are, and in which language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from persea.chat.messages import FinishReason, Message, ThinkingEffort
from persea.data.language_id import detect_language, is_same_language
from persea.tasks.intervals import wilson_interval
from persea.tasks.task import Score, Task, TaskItem, grade_answers, score_results
from persea.teachers.teacher import Teacher
from persea.tokenization.vocabulary import Vocabulary

UNDETERMINED_LANGUAGE = "undetermined"


@dataclass(frozen=True)
class Proportion:
    """A count out of n, with the 95 % interval of the proportion."""

    count: int
    n: int
    low: float
    high: float

    @staticmethod
    def of(count: int, n: int) -> Proportion:
        """Return the proportion with its Wilson interval."""
        return Proportion(count, n, *wilson_interval(count, n))


@dataclass(frozen=True)
class ThinkingLength:
    """Length of finished thoughts, in the student's tokens and in bytes; all 0 if there are none.

    Attributes:
        num_finished: Number of finished thoughts.
        mean_tokens: Mean length in tokens.
        median_tokens: Median length in tokens.
        mean_bytes: Mean length in bytes.
        median_bytes: Median length in bytes.
        num_truncated: Thoughts cut by the token limit: the longest ones, and in no mean.
    """

    num_finished: int
    mean_tokens: float
    median_tokens: float
    mean_bytes: float
    median_bytes: float
    num_truncated: int


@dataclass(frozen=True)
class EffortResult:
    """One skill at one effort.

    Attributes:
        skill: Name of the skill.
        effort: Thinking effort.
        score: Score on the skill.
        wrong_mode: Answers with thinking at effort none, or without it at another effort.
        length: Length of the thoughts.
        languages: Language of the thought -> count; "undetermined" if it is short or symbols.
        in_question_language: Of the thoughts with a language, those in the item's language.
    """

    skill: str
    effort: ThinkingEffort
    score: Score
    wrong_mode: Proportion
    length: ThinkingLength
    languages: Mapping[str, int]
    in_question_language: Proportion


@dataclass(frozen=True)
class ThinkingModesReport:
    """All skills at all efforts.

    Attributes:
        student: Name of the student.
        modes: Results by skill and effort.
        unasked_thinking: Answers with thinking at effort none, over all skills.
        missing_thinking: Answers without thinking at all other efforts, over all skills.
        length_increases: Skill -> whether thoughts get longer from effort to effort.
    """

    student: str
    modes: tuple[EffortResult, ...]
    unasked_thinking: Proportion
    missing_thinking: Proportion
    length_increases: Mapping[str, bool]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)


def measure_thinking_modes(
    student: Teacher,
    tasks: Sequence[tuple[Task, Sequence[TaskItem]]],
    taught_efforts: Mapping[str, Sequence[ThinkingEffort]],
    max_new_tokens: int,
    direct_answers: Iterable[Mapping[str, Any]] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> ThinkingModesReport:
    """Measure the student on each skill at every effort it was taught.

    Args:
        student: The student.
        tasks: Tasks with their items; items with choices are left out, since they are answered
            without generation.
        taught_efforts: Skill -> efforts; other skills are left out.
        max_new_tokens: Longest answer, in tokens.
        direct_answers: Answers at effort none to other skills, as in examples.jsonl; they count
            for `unasked_thinking`.
        progress: Called with a text after each skill and effort.
    """
    modes: list[EffortResult] = []
    unasked = [
        _counts_as_thinking(
            line.get("thinking", ""), line["answer"] or line.get("calls"), line["finish"]
        )
        for line in direct_answers
    ]
    missing: list[bool] = []
    for task, all_items in tasks:
        items = [i for i in all_items if not i.choices]
        efforts = taught_efforts.get(task.name, ()) if items else ()
        for effort in (e for e in ThinkingEffort if e in efforts):
            prompts = [replace(i.prompt, effort=effort) for i in items]
            answers = [
                (a.conversation.messages[-1], a.finish)
                for a in student.answer(prompts, max_new_tokens)
            ]
            modes.append(_measure_effort(student, task, items, effort, answers))
            thinks = [_message_has_thinking(message, finish) for message, finish in answers]
            if effort is ThinkingEffort.NONE:
                unasked += thinks
            else:
                missing += [not t for t in thinks]
            progress(f"{task.name} at {effort} {modes[-1].score.value:.2f}")
    increases = {
        skill: _is_length_increasing([m for m in modes if m.skill == skill])
        for skill in dict.fromkeys(m.skill for m in modes)
    }
    return ThinkingModesReport(
        student.name,
        tuple(modes),
        Proportion.of(sum(unasked), len(unasked)),
        Proportion.of(sum(missing), len(missing)),
        {skill: value for skill, value in increases.items() if value is not None},
    )


def select_direct_answers(
    answer_records: Iterable[Mapping[str, Any]],
    model_name: str,
    taught_efforts: Mapping[str, object],
) -> list[Mapping[str, Any]]:
    """Select a model's answers at effort none to skills that are not taught with efforts.

    Items with choices are left out: they are answered without generation.

    Args:
        answer_records: Lines of examples.jsonl, of all models.
        model_name: The model.
        taught_efforts: Skills taught with efforts.

    Returns:
        The `direct_answers` of `measure_thinking_modes`.
    """
    return [
        line
        for line in answer_records
        if (line["model_name"], line["effort"]) == (model_name, ThinkingEffort.NONE)
        and line["skill"] not in taught_efforts
        and "choice_logprobs_per_byte" not in line
    ]


def _message_has_thinking(message: Message, finish: FinishReason) -> bool:
    return _counts_as_thinking(message.thinking, message.text or message.calls, finish)


def _counts_as_thinking(thinking: str, content: object, finish: str) -> bool:
    """Return whether an answer thought.

    An answer cut before any content counts as a thought: it was cut inside, or never closed.
    """
    return bool(thinking) or (finish != FinishReason.STOP and not content)


def _measure_effort(
    student: Teacher,
    task: Task,
    items: Sequence[TaskItem],
    effort: ThinkingEffort,
    answers: Sequence[tuple[Message, FinishReason]],
) -> EffortResult:
    results = grade_answers(task, items, answers)
    num_wrong = sum(
        _message_has_thinking(*one) is (effort is ThinkingEffort.NONE) for one in answers
    )
    thoughts = [
        (m.thinking, i.prompt.language)
        for (m, _), i in zip(answers, items, strict=True)
        if m.thinking
    ]
    languages = [(thinking_language(text), language) for text, language in thoughts]
    determined = [pair for pair in languages if pair[0] != UNDETERMINED_LANGUAGE]
    num_truncated = sum(
        _message_has_thinking(m, finish) and not m.thinking for m, finish in answers
    )
    return EffortResult(
        task.name,
        effort,
        score_results(student.name, task.name, results, effort),
        Proportion.of(num_wrong, len(answers)),
        _measure_length(student.renderer.vocabulary, [text for text, _ in thoughts], num_truncated),
        dict(Counter(found for found, _ in languages).most_common()),
        Proportion.of(
            sum(is_same_language(found, language) for found, language in determined),
            len(determined),
        ),
    )


def _measure_length(
    vocabulary: Vocabulary, thinking_texts: Sequence[str], num_truncated: int
) -> ThinkingLength:
    if not thinking_texts:
        return ThinkingLength(0, 0, 0, 0, 0, num_truncated)
    tokens = [len(ids) for ids in vocabulary.encode_batch(thinking_texts)]
    sizes = [len(t.encode()) for t in thinking_texts]
    return ThinkingLength(
        len(thinking_texts),
        fmean(tokens),
        median(tokens),
        fmean(sizes),
        median(sizes),
        num_truncated,
    )


def _is_length_increasing(modes: Sequence[EffortResult]) -> bool | None:
    """Return whether mean thoughts get longer from effort to effort, in tokens and in bytes.

    None if fewer than two efforts think. False if an effort has no finished thought.
    """
    lengths = [m.length for m in modes if m.effort is not ThinkingEffort.NONE]
    if len(lengths) < 2:
        return None
    return all(m.num_finished for m in lengths) and all(
        a.mean_tokens < b.mean_tokens and a.mean_bytes < b.mean_bytes for a, b in pairwise(lengths)
    )


def thinking_language(text: str) -> str:
    """Return the language of a text, such as "vi"; "undetermined" if none is found."""
    return detect_language(text) or UNDETERMINED_LANGUAGE
