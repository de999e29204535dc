"""One speaker on one skill's questions: asked once, kept under the digest of all that an answer depends on, graded anew each time.

What was heard lies in PERSEA_HOME/answers, so that a killed audition or evaluation goes on where it was, and the next run does not ask
its teachers again what they said before.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from persea import storage as store
from persea.chat.messages import Conversation, FinishReason, Message, Text, ThinkingEffort
from persea.errors import DataError, TeacherError
from persea.tasks.task import ItemResult, Task, TaskItem, grade_answers
from persea.teachers.teacher import Teacher

ITEMS_PER_ANSWER_FILE = 256  # items asked and kept together: the most that a kill can cost
ANSWER_CODE_MODULES = (
    "evaluation/answering",
    "chat/messages",
    "chat/renderer",
    "chat/template",
    "tokenization/vocabulary",
    "models/loading",
    "teachers/teacher",
    "chat/families",
    "teachers/engines",
)  # modules whose code makes an answer


@dataclass(frozen=True)
class EvaluatedModel:
    """Whoever is measured.

    identity  digest of weights, voice and drawing: what an answer depends on beside the question and the effort
    efforts   the efforts it is measured at, its own first
    open      loads its weights; called where something has to be asked, and only there
    settings  what else may move a last digit: batch, threads
    mute      it has words alone, and no log-probabilities
    """

    name: str
    identity: str
    efforts: tuple[ThinkingEffort, ...]
    load: Callable[[], Teacher]
    settings: Mapping[str, int]
    is_text_only: bool = False


def single_model_loader(load: Callable[[str], Teacher]) -> Callable[[str], Teacher]:
    """Loads a speaker's weights when first asked for them, and drops those of the one before."""
    held: dict[str, Teacher] = {}

    def hold(name: str) -> Teacher:
        if name not in held:
            held.clear()
            held[name] = load(name)
        return held[name]

    return hold


def answer_items(
    model: EvaluatedModel,
    effort: ThinkingEffort,
    task: Task,
    items: Sequence[TaskItem],
    max_new_tokens: int,
) -> tuple[tuple[ItemResult, ...], int]:
    """Graded answers in order, and how many of them had been kept.

    An item with choices is not answered in words: the choice that is likeliest per byte is the answer (see `surprises`).
    Raises DataError where two items have one id, a choice is empty, or nothing is asked; TeacherError where a mute speaker would have to choose.
    """
    if not items or len({i.prompt.id for i in items}) < len(items):
        raise DataError(
            "two questions have one id" if items else "no question is left to ask",
            where=task.name,
            remedy="give each line of the set an id of its own"
            if items
            else "ask for more items, or leave the skill out",
        )
    freely, chosen = [i for i in items if not i.choices], [i for i in items if i.choices]
    if empty := next((i for i in chosen if not all(i.choices)), None):
        raise DataError(
            "one of its choices is empty",
            where=f"{task.name}, {empty.prompt.id}",
            remedy="mend that line of the set",
        )
    if model.is_text_only:
        refuse_choice_items(model.name, task.name, chosen)
    said: dict[str, tuple[Message, FinishReason, tuple[float, ...]]] = {}
    reused = 0
    for some in _item_batches(freely):

        def ask(some: Sequence[TaskItem] = some) -> list[Any]:
            answers = model.load().answer(
                [replace(i.prompt, effort=effort) for i in some], max_new_tokens
            )
            for a in answers:
                if a.failure_reason:  # a server's failure is no answer, and is not kept as one
                    raise TeacherError(
                        a.failure_reason,
                        where=f"{model.name}, {a.prompt_id}",
                        remedy="look at the server, then run again: what was heard is kept",
                    )
            return [
                [Conversation((a.conversation.messages[-1],)).to_json(), a.finish.value]
                for a in answers
            ]

        lines, old = _load_or_compute(
            [
                "answers",
                model.identity,
                effort,
                max_new_tokens,
                dict(model.settings),
                [_item_key(i) for i in some],
            ],
            ask,
        )
        reused += len(some) * old
        said |= {
            i.prompt.id: (Conversation.from_json(words).messages[0], FinishReason(finish), ())
            for i, (words, finish) in zip(some, lines, strict=True)
        }
    for some in _item_batches(chosen):

        def weigh(some: Sequence[TaskItem] = some) -> list[Any]:
            weighed = compute_nll(
                model.load(),
                [i.prompt.conversation.with_answer(Text(c)) for i in some for c in i.choices],
            )
            return list(weighed)

        nats, old = _load_or_compute(
            [
                "choices",
                model.identity,
                dict(model.settings),
                [[_item_key(i), i.choices] for i in some],
            ],
            weigh,
        )
        reused += len(some) * old
        left = iter(nats)
        for i in some:
            likely = tuple(-next(left) / len(c.encode()) for c in i.choices)
            said[i.prompt.id] = (
                Message.from_assistant(i.choices[likely.index(max(likely))]),
                FinishReason.STOP,
                likely,
            )
    results = grade_answers(task, items, [said[i.prompt.id][:2] for i in items])
    return tuple(
        replace(r, choice_logprobs_per_byte=said[r.item.prompt.id][2]) for r in results
    ), reused


def refuse_choice_items(model_name: str, skill: str, items: Sequence[TaskItem]) -> None:
    """Raises TeacherError where a speaker of words alone would have to choose by likelihood."""
    if any(i.choices for i in items):
        raise TeacherError(
            f"tells words alone, and {skill} asks which of several answers it finds likeliest",
            where=model_name,
            remedy="leave that set out, or reach the model by a route that tells log-probabilities (docs/engines.md)",
        )


def reference_bits(model: EvaluatedModel, items: Sequence[TaskItem]) -> tuple[float, int]:
    """(bits, bytes) a speaker spends on the reference answers in its own voice: content tokens and the stop token.

    Per byte and not per token, so that tokenizers compare. Markers of a template between content are left out, and so are items
    that its template cannot say: (0, 0) where it can say none, and of a speaker that tells no log-probabilities.
    """
    spent, size = 0.0, 0
    if model.is_text_only:
        return spent, size
    for some in _item_batches([i for i in items if i.reference or i.calls]):
        said = [i.reference_conversation for i in some]
        nats, _ = _load_or_compute(
            ["bits", model.identity, dict(model.settings), [c.to_json() for c in said]],
            lambda said=said: _nll_or_none(model.load(), said),
        )  # type: ignore[misc]
        spent += sum(n for n in nats if n is not None) / math.log(2)
        size += sum(
            len(p.text.encode())
            for c, n in zip(said, nats, strict=True)
            if n is not None
            for p in c.messages[-1].parts
        )
    return spent, size


def _nll_or_none(teacher: Teacher, conversations: Sequence[Conversation]) -> list[float | None]:
    """`surprises`, None where its template cannot say the conversation."""
    able = [teacher.can_render(c) for c in conversations]
    nats = compute_nll(teacher, [c for c, can in zip(conversations, able, strict=True) if can])
    return [next(nats) if can else None for can in able]


def compute_nll(teacher: Teacher, conversations: Sequence[Conversation]) -> Iterator[float]:
    """Nats each conversation's last message costs in this voice: its content tokens and the stop token."""
    for tokens, picked_N in teacher.compute_target_logprobs(conversations):
        yield -float(picked_N[tokens.starts_T[tokens.loss_mask_T] >= 0].astype(np.float64).sum())


def _item_key(item: TaskItem) -> list[Any]:
    return [item.prompt.id, item.prompt.conversation.to_json()]


def _item_batches(items: Sequence[TaskItem]) -> Iterator[Sequence[TaskItem]]:
    return (
        items[begin : begin + ITEMS_PER_ANSWER_FILE]
        for begin in range(0, len(items), ITEMS_PER_ANSWER_FILE)
    )


def _load_or_compute(key: object, compute: Callable[[], list[Any]]) -> tuple[list[Any], bool]:
    """What is kept under a key, or is made and kept now; and whether it was there. What is not as it was written is made again."""
    name = hashlib.sha256(
        json.dumps([_answer_code_digest(), key], sort_keys=True, default=str).encode()
    ).hexdigest()
    path = store.persea_home() / "answers" / name[:2] / f"{name}.json"
    if path.is_file():
        try:
            record = store.read_json_with_checksum(path, "delete it")
            if record["key"] == name:
                return list(record["said"]), True
        except DataError:
            pass  # it is only a copy of what `make` says again
    said = compute()
    store.write_json_with_checksum(path, {"key": name, "said": said})
    return said, False


@cache
def _answer_code_digest() -> str:
    """Digest of the code that makes an answer: what an earlier persea heard may be what a mended one would not."""
    here, digest = Path(__file__).parent.parent, hashlib.sha256()
    for module in ANSWER_CODE_MODULES:
        for path in (
            [here / f"{module}.py"]
            if (here / f"{module}.py").is_file()
            else sorted((here / module).glob("*.py"))
        ):
            digest.update(path.read_bytes())
    return digest.hexdigest()
