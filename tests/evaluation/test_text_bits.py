"""Documents under every model: the same bytes for all, and the bits of a plain forward pass."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from persea.chat.messages import Conversation
from persea.data.held_out_texts import HeldOutText
from persea.evaluation.text_bits import (
    TextReader,
    TextWindows,
    measure_document_bits,
    measure_text_bits,
    split_documents,
)
from tests.evaluation.test_answering import Counting, evaluated
from tests.teachers.engines.test_transformers import opened
from tests.teachers.test_teacher import teacher

TEXTS = (
    "Tiga puluh dua ribu orang.\nDan satu lagi.",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 " * 9,
    "x",
)
NAMES = ("llama-sapling", "qwen-sapling", "gemma-sapling")
DOCUMENTS = tuple(HeldOutText(f"dev:{k}", t, "world", "id") for k, t in enumerate(TEXTS))


def readers(positions: int = 0) -> list[TextReader]:
    return [TextReader(opened(name)[0], positions) for name in NAMES]


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))


def joined(windows: TextWindows) -> list[str]:
    texts = [""] * len(windows.documents)
    for window in windows.windows:
        texts[window.document] += window.text
    return texts


def test_windows_are_the_documents_and_every_model_takes_them() -> None:
    whole, cut = split_documents(DOCUMENTS, readers()), split_documents(DOCUMENTS, readers(24))
    assert joined(whole) == joined(cut) == list(TEXTS)
    assert len(whole.windows) == 3 < len(cut.windows)
    assert [sum(w.is_last for w in some.windows) for some in (whole, cut)] == [3, 3]
    for reader in readers():
        for window in cut.windows:
            conversation = Conversation.from_document(window.text, ends=window.is_last)
            assert len(reader.renderer.render(conversation)) <= 24
    assert split_documents(DOCUMENTS, readers(), max_window_tokens=24).windows == cut.windows


def test_a_text_that_a_tokenizer_cannot_represent_is_left_out_for_all() -> None:
    broken = HeldOutText("dev:9", "half \ud83d", "world", "id")
    found = split_documents([*DOCUMENTS, broken], readers())
    assert found.documents == DOCUMENTS
    assert list(found.left_out) == ["dev:9"]
    assert "half a surrogate pair" in found.left_out["dev:9"]


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_a_forward_pass_and_the_end_is_apart(name: str) -> None:
    windows = split_documents(DOCUMENTS, readers(24))
    found = measure_document_bits(evaluated(name), windows)
    engine, renderer = teacher(name).engine, opened(name)[0]
    content, end = np.zeros(3), np.zeros(3)
    for window in windows.windows:
        text_ids = renderer.vocabulary.encode(window.text)
        around = renderer.document_tokens
        assert around.prefix_ids and around.end_id is not None
        ids = [*around.prefix_ids, *text_ids, *([around.end_id] if window.is_last else [])]
        with torch.no_grad():
            logits = engine.model(torch.tensor([ids])).logits[0].float()  # type: ignore[attr-defined]
        logprobs = logits[:, : len(renderer.vocabulary)].log_softmax(-1)
        bits = [-float(logprobs[t - 1, ids[t]]) / math.log(2) for t in range(1, len(ids))]
        content[window.document] += sum(bits[: len(text_ids)])
        end[window.document] += sum(bits[len(text_ids) :])
    np.testing.assert_allclose(found.content_D, content, rtol=1e-4)
    np.testing.assert_allclose(found.end_D, end, rtol=1e-4)
    assert (found.end_D > 0).all()


def test_texts_are_measured_once_and_another_model_again() -> None:
    counting = Counting(lambda: teacher("qwen-sapling"))
    windows = split_documents(DOCUMENTS, readers())
    told: list[str] = []
    first = measure_document_bits(evaluated("qwen-sapling", counting), windows)
    again = measure_document_bits(
        evaluated("qwen-sapling", counting), windows, lambda share, text: told.append(text)
    )
    assert (counting.times, told) == (1, ["qwen-sapling 3 texts, from disk"])
    assert again.content_D.tolist() == first.content_D.tolist()
    other = replace(evaluated("qwen-sapling", counting), identity="other weights")
    measure_document_bits(other, windows)
    assert counting.times == 2


def test_answers_are_measured_in_the_models_own_template() -> None:
    conversation = Conversation.from_question("One?").with_answer("One, of course.")
    ((content, end),) = measure_text_bits(evaluated("qwen-sapling"), [conversation])
    one = teacher("qwen-sapling")
    ((tokens, logprob_N),) = one.compute_target_logprobs([conversation])
    assert content + end <= -float(logprob_N.sum()) / math.log(2) + 1e-3
    assert 0 < content and 0 < end
    assert tokens.loss_mask_T.sum() == len(logprob_N)
