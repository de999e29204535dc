"""Texts that a teacher only scores: given answers of prompts, and documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from persea.chat.messages import FinishReason
from persea.data.prompts import Prompt
from persea.errors import DataError
from persea.teachers.engines import Reducer
from persea.teachers.teacher import Answer, Teacher


def count_prompt_tokens(prompt: Prompt, teacher: Teacher) -> int:
    """Return the tokens of a prompt, or of a document but its last: nothing follows that one."""
    if prompt.conversation.is_document:
        return len(teacher.renderer.render(prompt.conversation)) - 1
    return len(teacher.renderer.render_prompt(teacher.build_conversation(prompt)))


def answer_or_score(
    prompts: Sequence[Prompt],
    teacher: Teacher,
    max_new_tokens: int,
    use_given_answers: bool,
    make_reducer: Callable[[Sequence[Prompt]], Reducer | None] = lambda asked: None,
) -> list[Answer]:
    """Return one answer a prompt, in order: given ones and documents, or the teacher's own.

    Args:
        prompts: The prompts.
        teacher: The teacher.
        max_new_tokens: Longest answer, in tokens.
        use_given_answers: Score the answers that come with the prompts, and generate none.
        make_reducer: Returns what reduces the distributions of the answers to these prompts while
            they are generated; None = they are scored afterwards.
    """
    is_asked = [not use_given_answers and not p.conversation.is_document for p in prompts]
    asked = [p for p, ask in zip(prompts, is_asked, strict=True) if ask]
    written = iter(teacher.answer(asked, max_new_tokens, make_reducer(asked)) if asked else [])
    return [
        next(written) if ask else _given_answer(p, teacher)
        for p, ask in zip(prompts, is_asked, strict=True)
    ]


def _given_answer(prompt: Prompt, teacher: Teacher) -> Answer:
    conversation = prompt.conversation
    if not conversation.is_document:
        if not prompt.given_parts:
            raise _missing_answer_error(prompt.id)
        conversation = teacher.build_conversation(prompt).with_answer(*prompt.given_parts)
    return Answer(
        prompt.id,
        teacher.name,
        prompt.skill,
        prompt.language,
        conversation,
        FinishReason.STOP,
        prompt.effort,
        given=not conversation.is_document,
    )


def refuse_missing_answers(sources: Iterable[Iterable[Prompt]]) -> None:
    """Check before a capture that every prompt brings its answer.

    Raises:
        DataError: One has none.
    """
    for prompts in sources:
        for prompt in prompts:
            if not prompt.given_parts and not prompt.conversation.is_document:
                raise _missing_answer_error(prompt.id)


def _missing_answer_error(prompt_id: str) -> DataError:
    """Return the error for a prompt without the answer that should be scored."""
    return DataError(
        f"prompt {prompt_id} has no answer of its own",
        where="capture.answers: given",
        remedy='add an assistant turn or an "answer" to the prompt, or let the teachers '
        "answer: capture.answers: ask",
    )
