"""The parts of a published benchmark: its source, its items, its grader and the options of
grading.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from persea.chat.messages import Message
from persea.errors import MissingRequirementError
from persea.tasks.sandbox.sandbox import SandboxLimits
from persea.tasks.task import Grade, Split, TaskItem, Verdict

# Of the 256 values of a hash byte, those that make a row AUDITION: a quarter. Fixed for ever.
NUM_AUDITION_VALUES = 64
Grader: TypeAlias = Callable[[TaskItem, Message], Grade]


@dataclass(frozen=True)
class BenchmarkSource:
    """Location of a benchmark's questions.

    Attributes:
        file: A local file in its published format; or "hub:OWNER/NAME", read through `datasets`.
        answers: The file of answers, if they are published in a file of their own.
        language: Language of the answers; "" = the benchmark's own.
        config: Configuration of a hub dataset.
        split: Split of a hub dataset.
    """

    file: str
    answers: str = ""
    language: str = ""
    config: str = ""
    split: str = "test"


@dataclass(frozen=True)
class BenchmarkItems:
    """The questions of a benchmark, and the number of rows left out by reason."""

    items: tuple[TaskItem, ...]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class GradingOptions:
    """Limits that can decide a grade. A recipe sets them under `evaluation.grading`.

    Attributes:
        max_answer_chars: A longer answer is malformed: the model could not stop.
        min_correct_chrf: chrF in [0, 1] from which a translation is labelled right. Scores use the
            chrF itself.
        math_timeout_s: Seconds for one comparison of formulas by math-verify.
        sandbox: Limits of the programs that code benchmarks run.
    """

    max_answer_chars: int = 200_000
    min_correct_chrf: float = 0.5
    math_timeout_s: float = 5.0
    sandbox: SandboxLimits = field(default_factory=SandboxLimits)


@dataclass(frozen=True)
class Benchmark:
    """One published benchmark.

    Attributes:
        name: The name in a recipe.
        language: Language of the answers; "" = the recipe must give one.
        load_items: Source -> every question that can be graded, in the order of the file.
        grade: (item, answer) -> the grade.
        required_modules: Modules of optional dependencies that grading needs.
        runs_code: Whether grading runs the answers in the sandbox.
        skill: Name of the skill if the recipe gives none; "" = the benchmark's name.
        make_grader: Grading options -> the grader, if the options matter to it; else `grade` is
            used.
        options: The options in use.
        grader_version: Raised when equal answers get other grades; evaluations are made anew.
    """

    name: str
    language: str
    load_items: Callable[[BenchmarkSource], BenchmarkItems]
    grade: Grader
    required_modules: tuple[str, ...] = ()
    runs_code: bool = False
    skill: str = ""
    make_grader: Callable[[GradingOptions], Grader] | None = None
    options: GradingOptions = GradingOptions()
    grader_version: int = 1

    def with_options(self, options: GradingOptions) -> Benchmark:
        """Return the benchmark with other grading options."""
        grade = self.make_grader(options) if self.make_grader else self.grade
        return replace(self, grade=grade, options=options)

    def grade_answer(self, item: TaskItem, answer: Message) -> Grade:
        """Grade an answer; one that is too long is malformed and reaches no grader."""
        num_chars = len(answer.text) + len(answer.thinking)
        if num_chars > self.options.max_answer_chars:
            return malformed_grade(f"{num_chars:,} characters")
        return self.grade(item, answer)


def require_module(module: str, extra: str, purpose: str) -> None:
    """Check that an optional module is installed.

    Args:
        module: Name of the module.
        extra: The extra of persea that installs it.
        purpose: The part of persea that needs it, for the message.

    Raises:
        MissingRequirementError: If the module is not installed (exit 7).
    """
    if importlib.util.find_spec(module) is None:
        raise MissingRequirementError(
            f"{purpose} needs {module}, which is not installed",
            where=purpose,
            remedy=f"pip install 'persea[{extra}]'",
        )


def binary_grade(is_right: bool, reason: str = "") -> Grade:
    """Return a grade of value 1 or 0."""
    return Grade(Verdict.RIGHT if is_right else Verdict.WRONG, float(is_right), reason)


def malformed_grade(reason: str) -> Grade:
    """Return the grade of an answer that the grader cannot read; its value is 0."""
    return Grade(Verdict.MALFORMED, 0.0, reason)


def select_split(
    items: Sequence[TaskItem], split: Split, n: int, seed: int
) -> tuple[TaskItem, ...]:
    """Select at most n items of a split, in an order that the seed decides.

    A hash of benchmark and row assigns a quarter of the rows to AUDITION and the rest to TEST, for
    ever; PRETRAIN and TRAIN get none, so that nothing of a benchmark is taught. A row is in the
    same split in every language, and its translations are selected together: languages stay
    balanced, and no row is auditioned in one language and tested in another. Of a few rows at least
    one is in each of the two.

    Args:
        items: Items with ids of the form "benchmark/language/row".
        split: The split to select.
        n: How many items to select.
        seed: Decides the order.

    Returns:
        At most n items.
    """

    def digest(salt: object, item: TaskItem) -> bytes:
        name, _, row = item.prompt.id.split("/", 2)
        return hashlib.sha256(f"{salt} {name}/{row}".encode()).digest()

    is_audition = {Split.AUDITION: True, Split.TEST: False}.get(split)
    values = [digest("split", i) for i in items]
    bound = bytes([NUM_AUDITION_VALUES])
    if len(values) > 1 and not min(values) < bound <= max(values):
        # so few rows that one side is empty: the first quarter of the hashes, at least one
        bound = sorted(values)[max(1, len(values) // 4)]
    selected = [i for i, v in zip(items, values, strict=True) if (v < bound) is is_audition]
    return tuple(sorted(selected, key=lambda i: (digest(seed, i), i.prompt.id))[:n])
