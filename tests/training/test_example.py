"""The end of a text is learned from the teacher only where the teacher wrote the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from persea.alignment.event_map import EventMap, build_event_map
from persea.alignment.spans import SupervisionKind
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason
from persea.chat.renderer import ChatRenderer
from persea.distributions import DistributionKind, SparseDistributions
from persea.losses import event_kl_loss
from persea.models.loading import ModelSource, load_renderer
from persea.teachers.teacher import Answer
from persea.training.dataset import DistillDataset, collate
from persea.training.example import Example, TeachEnd, build_example

TEXT = "Harga beras naik, kata menteri."


@pytest.fixture(scope="module")
def models() -> tuple[ChatRenderer, ChatRenderer, EventMap]:
    """Student, base teacher without a template, and their event map."""
    student = load_renderer("saplings/llama-sapling")
    teacher = load_renderer(ModelSource("saplings/gemma-sapling", family="text"), "w")
    return student, teacher, build_event_map(teacher, student)


def captured(
    teacher: ChatRenderer, conversation: Conversation, given: bool, end_id: int | None = None
) -> CachedAnswer:
    """Every distribution is certain of the text, or at the end of `end_id`."""
    tokens = teacher.render(conversation)
    target_N = tokens.ids_T[tokens.loss_mask_T].copy()
    if end_id is not None:
        target_N[-1] = end_id
    n = len(target_N)
    rows = SparseDistributions(
        np.arange(n + 1, dtype=np.int64),
        target_N.astype(np.int32),
        np.ones(n, np.float32),
        np.zeros(n, np.float32),
        DistributionKind.FULL,
    )
    answer = Answer("p", "base", "languages", "id", conversation, FinishReason.STOP, given=given)
    return CachedAnswer(answer, tokens, rows)


QUESTION = Conversation.from_question("Berita:").with_answer(TEXT)
DOCUMENT = Conversation.from_document(TEXT)


@pytest.mark.parametrize(
    ("conversation", "given", "teach_end", "is_taught"),
    [
        (QUESTION, False, "auto", True),
        (QUESTION, True, "auto", False),
        (QUESTION, True, "always", True),
        (QUESTION, False, "never", False),
        (DOCUMENT, False, "auto", False),
        (DOCUMENT, False, "never", False),
    ],
)
def test_the_end_position_has_a_teacher_distribution_or_none(
    models: Any, conversation: Conversation, given: bool, teach_end: TeachEnd, is_taught: bool
) -> None:
    student, teacher, event_map = models
    answer = captured(teacher, conversation, given)
    example = build_example(answer, student, event_map, teach_end=teach_end)
    last = int(example.tokens.loss_mask_T.sum()) - 1
    end = example.tokens.ids_T[example.tokens.loss_mask_T][-1]
    assert student.vocabulary.bytes_W[end] is None
    assert (last in example.targets.row_M) == is_taught
    # all other boundaries keep their distributions
    always = build_example(answer, student, event_map, teach_end="always")
    inner = [e.targets.row_M[e.targets.row_M < last].tolist() for e in (example, always)]
    assert inner[0] == inner[1]
    moved = example.counts - always.counts
    if teach_end != "always" and not is_taught and conversation is QUESTION:
        assert moved[SupervisionKind.EVENT] == -1
        assert moved[SupervisionKind.TEXT] == 1


def test_a_document_end_of_another_event_is_never_taught(models: Any) -> None:
    """The student's document end is no stop token of its template in general."""
    student, teacher, event_map = models
    last = int(student.render(DOCUMENT).loss_mask_T.sum()) - 1
    always = build_example(
        captured(teacher, DOCUMENT, False), student, event_map, teach_end="always"
    )
    assert last in always.targets.row_M  # Llama's <|end_of_text|> and Gemma's <eos> are one event
    ends = event_map.student_event_V.copy()
    ends[student.document_tokens.end_id] = -1
    other = replace(event_map, student_event_V=ends)
    example = build_example(captured(teacher, DOCUMENT, False), student, other, teach_end="always")
    assert last not in example.targets.row_M


def loss_at_the_end(example: Example, event_map: EventMap, seed: int = 0) -> tuple[float, float]:
    """(loss at the end position, cross-entropy there) of random logits."""
    batch = collate([example], {"base": event_map})
    torch.manual_seed(seed)
    logits_NV = torch.randn(len(batch.labels_N), len(event_map.student_event_V))
    out = event_kl_loss(logits_NV, batch.labels_N, batch.targets, 0.7)
    nll = torch.nn.functional.cross_entropy(logits_NV, batch.labels_N, reduction="none")
    return float(out.token_loss_N[-1]), float(nll[-1])


def test_the_loss_at_the_end_of_a_given_text_is_cross_entropy(models: Any) -> None:
    """A base teacher that is sure the text goes on does not move the student's end."""
    student, teacher, event_map = models
    goes_on = int(teacher.vocabulary.encode(" dan")[0])
    for conversation, given in ((QUESTION, True), (DOCUMENT, False)):
        losses = [
            loss_at_the_end(
                build_example(captured(teacher, conversation, given, end), student, event_map),
                event_map,
            )
            for end in (None, goes_on)
        ]
        assert losses[0] == losses[1]
        assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)
    wrong = build_example(
        captured(teacher, QUESTION, False, goes_on), student, event_map, teach_end="auto"
    )
    loss, nll = loss_at_the_end(wrong, event_map)
    assert loss != pytest.approx(nll, rel=1e-3)  # its own answer: the teacher's end counts


def test_a_base_teacher_and_a_chat_student_learn_one_answer_in_two_forms(models: Any) -> None:
    student, teacher, event_map = models
    answer = captured(teacher, QUESTION, True)
    dataset = DistillDataset([answer], student=student, event_maps={"base": event_map})
    example = dataset[0]
    assert example.tokens.ids_T.tolist() == student.render(QUESTION).ids_T.tolist()
    assert len(np.unique(example.targets.row_M)) > 5


def test_documents_in_a_dataset_keep_every_byte(models: Any) -> None:
    student, teacher, event_map = models
    parts = [Conversation.from_document(t, ends=k == 1) for k, t in enumerate((TEXT, " Selesai."))]
    answers = [captured(teacher, c, False) for c in parts]
    dataset = DistillDataset(answers, student=student, event_maps={"base": event_map})
    learned = [e.tokens.ids_T[e.tokens.loss_mask_T].tolist() for e in (dataset[0], dataset[1])]
    assert learned[1].pop() == student.document_tokens.end_id
    assert b"".join(map(student.vocabulary.decode, learned)).decode() == f"{TEXT} Selesai."
