"""Ask a model the items of a task, keep its answers on disk, and grade them anew each time.

Answers are kept in PERSEA_HOME/answers under the digest of everything they depend on, so that a
killed audition or evaluation continues, and the next run does not generate the same answers again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from persea import storage
from persea.chat.messages import Conversation, FinishReason, Message, Text, ThinkingEffort
from persea.errors import DataError, TeacherError
from persea.tasks.task import ItemResult, Task, TaskItem, grade_answers
from persea.teachers.teacher import Teacher

# Raise it by hand when persea gives other answers for the same weights and prompt: a change of the
# rendering, the parsing, the generation or the scoring. All kept answers are then generated again.
# tests/evaluation/test_answers_version.py fails where answers changed and the number did not.
ANSWERS_VERSION = 1
# Items generated and kept together: the most that a kill can cost. Part of the key.
ITEMS_PER_ANSWER_FILE = 256

# An item's answer, how it ended, and log-probabilities per byte of its choices.
_ItemAnswer: TypeAlias = tuple[Message, FinishReason, tuple[float, ...]]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to be measured.

    Attributes:
        name: Name in reports.
        identity: Digest of weights, tokenizer, template and sampling: everything that an answer
            depends on besides the prompt and the effort.
        efforts: Thinking efforts it is measured at, its own first.
        load: Loads its weights; called only if something must be computed.
        settings: Settings that may change a last digit: batch size, threads.
        is_text_only: Whether it returns no log-probabilities.
        can_be_asked: Whether it has a chat template; a model without one only scores texts.
    """

    name: str
    identity: str
    efforts: tuple[ThinkingEffort, ...]
    load: Callable[[], Teacher]
    settings: Mapping[str, int]
    is_text_only: bool = False
    can_be_asked: bool = True


def single_model_loader(load: Callable[[str], Teacher]) -> Callable[[str], Teacher]:
    """Wrap a loader so that only the model loaded last stays in memory.

    Args:
        load: Loads the model of a name.

    Returns:
        A function that drops the previous model before it loads another.
    """
    loaded: dict[str, Teacher] = {}

    def load_single(name: str) -> Teacher:
        if name not in loaded:
            loaded.clear()
            loaded[name] = load(name)
        return loaded[name]

    return load_single


def answer_items(
    model: EvaluatedModel,
    effort: ThinkingEffort,
    task: Task,
    items: Sequence[TaskItem],
    max_new_tokens: int,
) -> tuple[tuple[ItemResult, ...], int]:
    """Answer and grade the items of a task.

    An item with choices is answered without generation, by the choice with the highest
    log-probability per byte.

    Args:
        model: The model.
        effort: Thinking effort.
        task: Grades the answers.
        items: Questions.
        max_new_tokens: Longest answer, in the model's tokens.

    Returns:
        Graded answers in order, and how many of them were read from disk.

    Raises:
        DataError: Two items share an id, a choice is empty, there are no items, or the model has
            no chat template.
        TeacherError: A text-only model would have to score choices, or its server failed.
    """
    answers, num_reused = keep_answers(model, effort, task.name, items, max_new_tokens)
    results = grade_answers(task, items, [answers[i.prompt.id][:2] for i in items])
    with_logprobs = tuple(
        replace(r, choice_logprobs_per_byte=answers[r.item.prompt.id][2]) for r in results
    )
    return with_logprobs, num_reused


def keep_answers(
    model: EvaluatedModel,
    effort: ThinkingEffort,
    task_name: str,
    items: Sequence[TaskItem],
    max_new_tokens: int,
) -> tuple[dict[str, _ItemAnswer], int]:
    """Answer the items of a task, and grade nothing. See `answer_items`.

    Returns:
        Prompt id -> answer, and how many answers were read from disk.
    """
    _refuse_bad_items(task_name, items)
    with_choices = [i for i in items if i.choices]
    if model.is_text_only:
        refuse_choice_items(model.name, task_name, with_choices)
    without_choices = [i for i in items if not i.choices]
    generated, num_generated = _generate_answers(model, effort, without_choices, max_new_tokens)
    chosen, num_chosen = _choose_answers(model, with_choices)
    return generated | chosen, num_generated + num_chosen


def _refuse_bad_items(task_name: str, items: Sequence[TaskItem]) -> None:
    if not items:
        raise DataError(
            "there is no item to answer",
            where=task_name,
            remedy="ask for more items, or leave the skill out",
        )
    if len({i.prompt.id for i in items}) < len(items):
        raise DataError(
            "two items have the same id",
            where=task_name,
            remedy="give each line of the set an id of its own",
        )
    for item in items:
        if item.choices and not all(item.choices):
            raise DataError(
                "one of its choices is empty",
                where=f"{task_name}, {item.prompt.id}",
                remedy="correct that line of the set",
            )


def _generate_answers(
    model: EvaluatedModel,
    effort: ThinkingEffort,
    items: Sequence[TaskItem],
    max_new_tokens: int,
) -> tuple[dict[str, _ItemAnswer], int]:
    """Generate answers; return them by prompt id, and how many were read from disk."""
    if items and not model.can_be_asked:
        raise DataError(
            f"{model.name} has no chat template, so it cannot answer questions",
            where=model.name,
            remedy="measure it in bits per byte of held-out texts (`evaluation.texts`), or give it "
            "a chat template",
        )
    answers: dict[str, _ItemAnswer] = {}
    num_reused = 0
    for batch in _item_batches(items):

        def generate(batch: Sequence[TaskItem] = batch) -> list[Any]:
            prompts = [replace(i.prompt, effort=effort) for i in batch]
            generated = model.load().answer(prompts, max_new_tokens)
            for answer in generated:
                if answer.failure_reason:  # a server's failure must not be kept as an answer
                    raise TeacherError(
                        answer.failure_reason,
                        where=f"{model.name}, {answer.prompt_id}",
                        remedy="look at the server, then run again: finished answers are kept",
                    )
            return [
                [Conversation((a.conversation.messages[-1],)).to_json(), a.finish.value]
                for a in generated
            ]

        key = [
            "answers",
            model.identity,
            effort,
            max_new_tokens,
            dict(model.settings),
            [_item_key(i) for i in batch],
        ]
        records, was_cached = load_or_compute(key, generate)
        num_reused += len(batch) * was_cached
        for item, (message, finish) in zip(batch, records, strict=True):
            conversation = Conversation.from_json(message)
            answers[item.prompt.id] = (conversation.messages[0], FinishReason(finish), ())
    return answers, num_reused


def _choose_answers(
    model: EvaluatedModel, items: Sequence[TaskItem]
) -> tuple[dict[str, _ItemAnswer], int]:
    """Choose the most likely choice per byte; same result as `_generate_answers`."""
    answers: dict[str, _ItemAnswer] = {}
    num_reused = 0
    for batch in _item_batches(items):

        def score(batch: Sequence[TaskItem] = batch) -> list[Any]:
            conversations = [
                i.prompt.conversation.with_answer(Text(c)) for i in batch for c in i.choices
            ]
            return list(compute_nll(model.load(), conversations))

        key = [
            "choices",
            model.identity,
            dict(model.settings),
            [[_item_key(i), i.choices] for i in batch],
        ]
        nll, was_cached = load_or_compute(key, score)
        num_reused += len(batch) * was_cached
        remaining = iter(nll)
        for item in batch:
            logprobs = tuple(-next(remaining) / len(c.encode()) for c in item.choices)
            choice = item.choices[logprobs.index(max(logprobs))]
            answers[item.prompt.id] = (Message.from_assistant(choice), FinishReason.STOP, logprobs)
    return answers, num_reused


def refuse_choice_items(model_name: str, skill: str, items: Sequence[TaskItem]) -> None:
    """Check that a text-only model has no items with choices, which need log-probabilities.

    Raises:
        TeacherError: An item has choices.
    """
    if any(i.choices for i in items):
        raise TeacherError(
            f"its engine returns no log-probabilities, and {skill} compares the likelihoods "
            "of several answers",
            where=model_name,
            remedy="leave that set out, or use an engine with log-probabilities (docs/engines.md)",
        )


def reference_bits(model: EvaluatedModel, items: Sequence[TaskItem]) -> tuple[float, int]:
    """Compute how many bits a model needs for the reference answers.

    Counts content tokens and the stop token; template markers between contents are left out. Bits
    are reported per byte, not per token, so that models with different tokenizers compare.

    Args:
        model: The model, at effort NONE.
        items: Items; those without a reference answer, and those that the model's template cannot
            render, are left out.

    Returns:
        (bits, bytes of the references); (0, 0) for a text-only model.
    """
    bits, num_bytes = 0.0, 0
    if model.is_text_only:
        return bits, num_bytes
    for batch in _item_batches([i for i in items if i.reference or i.calls]):
        conversations = [i.reference_conversation for i in batch]

        def score(conversations: Sequence[Conversation] = conversations) -> list[Any]:
            return list(_nll_or_none(model.load(), conversations))

        key = ["bits", model.identity, dict(model.settings), [c.to_json() for c in conversations]]
        nll, _ = load_or_compute(key, score)
        bits += sum(n for n in nll if n is not None) / math.log(2)
        num_bytes += sum(
            len(p.text.encode())
            for c, n in zip(conversations, nll, strict=True)
            if n is not None
            for p in c.messages[-1].parts
        )
    return bits, num_bytes


def _nll_or_none(teacher: Teacher, conversations: Sequence[Conversation]) -> list[float | None]:
    """`compute_nll`, with None for a conversation that the template cannot render."""
    renderable = [teacher.can_render(c) for c in conversations]
    nll = compute_nll(teacher, [c for c, ok in zip(conversations, renderable, strict=True) if ok])
    return [next(nll) if ok else None for ok in renderable]


def compute_nll(teacher: Teacher, conversations: Sequence[Conversation]) -> Iterator[float]:
    """Yield the negative log-likelihood of each conversation's last message, in nats.

    Counts content tokens and the stop token.
    """
    for tokens, logprob_N in teacher.compute_target_logprobs(conversations):
        has_text_N = tokens.starts_T[tokens.loss_mask_T] >= 0
        yield -float(logprob_N[has_text_N].astype(np.float64).sum())


def _item_key(item: TaskItem) -> list[Any]:
    return [item.prompt.id, item.prompt.conversation.to_json()]


def _item_batches(items: Sequence[TaskItem]) -> Iterator[Sequence[TaskItem]]:
    for begin in range(0, len(items), ITEMS_PER_ANSWER_FILE):
        yield items[begin : begin + ITEMS_PER_ANSWER_FILE]


_recordings: list[dict[str, Path]] = []


@contextmanager
def recorded_answer_files() -> Iterator[dict[str, Path]]:
    """Yield a dictionary that receives each file of kept values that is used: name -> path."""
    files: dict[str, Path] = {}
    _recordings.append(files)
    try:
        yield files
    finally:
        _recordings.remove(files)


def answers_folder() -> Path:
    """Return the folder of kept values."""
    return storage.persea_home() / "answers"


def adopt_answer_file(path: Path) -> bool:
    """Take a file of kept values that another process wrote; a damaged one is left out.

    Args:
        path: The file, named by its key.

    Returns:
        Whether it is whole.
    """
    own = answers_folder() / path.name[:2] / path.name
    try:
        record = storage.read_json_with_checksum(path, "delete it")
        is_whole = bool(record["key"] == path.stem)
    except (DataError, KeyError):
        return False
    if is_whole and not own.is_file():
        storage.write_json_with_checksum(own, record)
    return is_whole


def load_or_compute(key: object, compute: Callable[[], list[Any]]) -> tuple[list[Any], bool]:
    """Return the values kept under a key, or compute and keep them; and whether they were kept.

    A damaged file is computed again.
    """
    name = hashlib.sha256(
        json.dumps([ANSWERS_VERSION, key], sort_keys=True, default=str).encode()
    ).hexdigest()
    path = answers_folder() / name[:2] / f"{name}.json"
    for files in _recordings:
        files[path.name] = path
    if path.is_file():
        try:
            record = storage.read_json_with_checksum(path, "delete it")
            if record["key"] == name:
                return list(record["said"]), True
        except DataError:
            pass
    values = compute()
    storage.write_json_with_checksum(path, {"key": name, "said": values})
    return values, False
