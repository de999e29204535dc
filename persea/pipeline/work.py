"""How much work is left: bytes of text times weights of the model, not a number of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from persea.pipeline.model_refs import BASE, STUDENT

if TYPE_CHECKING:
    from persea.data.prompts import Prompt
    from persea.pipeline.run_context import RunContext

# A generated token costs about as much as these bytes of a text that is only read.
BYTES_PER_NEW_TOKEN = 8


def model_work(context: RunContext, name: str) -> float:
    """Return the work of a model for each byte of text: its weights.

    A model of unknown size, such as one behind a server, counts like the mean of the others.
    """
    sizes = _weights_by_name(context)
    known = [n for n in sizes.values() if n]
    return sizes[name] or (sum(known) / len(known) if known else 1.0)


def _weights_by_name(context: RunContext) -> dict[str, float]:
    models = context.models
    student = models.student_size
    weights = {n: float(student.num_parameters) if student else 0.0 for n in (STUDENT, BASE)}
    for name in models.renderers:
        size = models.teacher_sizes[name]
        weights[name] = float(size.num_parameters) if size else 0.0
    return weights


def capture_work(context: RunContext) -> dict[str, float]:
    """Return unit -> its work: bytes of texts and answers, times the weights of the teacher."""
    work, by_teacher = {}, dict[str, float]()
    for unit in context.capture_units:
        if unit.teacher not in by_teacher:
            by_teacher[unit.teacher] = model_work(context, unit.teacher)
        generation = context.models.teacher_ref(unit.teacher).generation
        limit = generation.max_new_tokens or context.recipe.capture.max_new_tokens
        num_bytes = sum(
            _prompt_bytes(p, limit, given=context.are_answers_given) for p in unit.prompts
        )
        work[unit.name] = num_bytes * by_teacher[unit.teacher]
    return work


def _prompt_bytes(prompt: Prompt, max_new_tokens: int, *, given: bool) -> int:
    num_bytes = sum(len(p.text.encode(errors="replace")) for p in prompt.conversation.parts())
    if prompt.conversation.is_document:
        return num_bytes
    if given:
        return num_bytes + len(prompt.given_text.encode(errors="replace"))
    return num_bytes + BYTES_PER_NEW_TOKEN * max_new_tokens


class EvaluationWork:
    """Reports the progress of an evaluation: models one after another, then texts.

    Args:
        work: Work of each model.
        num_rounds: 2 if the models answer tasks and then read texts, otherwise 1.
        report: Called with the fraction done and a message.
    """

    def __init__(
        self, work: Sequence[float], num_rounds: int, report: Callable[[float, str], None]
    ) -> None:
        self._work, self._num_rounds, self._report = work, max(1, num_rounds), report
        self._fraction = 0.0
        self._message = ""

    def report_model(self, k: int, share: float, message: str) -> None:
        """Report the share of the k-th model's tasks that is done."""
        done = sum(self._work[:k]) + share * self._work[k]
        self._say(done / sum(self._work) / self._num_rounds, message)

    def report_texts(self, share: float, message: str) -> None:
        """Report the share of the texts that is done, over all models."""
        self._say((self._num_rounds - 1 + share) / self._num_rounds, message)

    def report_words(self, message: str) -> None:
        """Report what is being done, at the fraction of the last report."""
        self._say(self._fraction, message)

    def report_answers(self, name: str, share: float) -> None:
        """Report the share of a model's current answers that is done, in words only."""
        self._report(self._fraction, f"{name}: {share:.0%} of a batch of answers; {self._message}")

    def _say(self, fraction: float, message: str) -> None:
        self._fraction, self._message = min(1.0, fraction), message
        self._report(self._fraction, message)
