"""An audit from captures and models to a verdict, in folders and behind a server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from persea.cache.canaries import read_pairs
from persea.chat.messages import Conversation, Text
from persea.config.model_sections import EndpointSection
from persea.errors import RecipeError, RefusedError
from persea.evaluation.audit import Finding
from persea.pipeline.audit import (
    AuditModels,
    Suspect,
    audit_canaries,
    audit_prompts,
    audit_teachers,
    score_answers,
)
from tests.cache.test_canaries import captured
from tests.cli.test_cli import persea
from tests.conftest import ROOT
from tests.servers import serving

SAPLINGS = ROOT / "saplings"
LLAMA = str(SAPLINGS / "llama-sapling")


def test_a_model_that_never_saw_the_capture_agrees_with_the_coins_by_chance(tmp_path: Path) -> None:
    captured(tmp_path)
    pairs = read_pairs(tmp_path)
    test = audit_canaries(tmp_path, Suspect(LLAMA))
    assert (test.suspect, test.pairs, test.tested) == ("llama-sapling", len(pairs), len(pairs))
    assert test.p_value >= 2.0 ** -len(pairs)


def test_a_server_is_audited_as_its_folder_is(tmp_path: Path) -> None:
    """Its address may end with /v1, as OpenAI's clients are given it."""
    captured(tmp_path)
    endpoint = EndpointSection(url=f"{serving('llama-sapling')}/v1")
    here = audit_canaries(tmp_path, Suspect(LLAMA))
    assert audit_canaries(tmp_path, Suspect(LLAMA, endpoint)) == here


def test_a_text_that_a_template_cannot_hold_has_no_score() -> None:
    model = Suspect(LLAMA).open(4)
    texts = [Conversation.from_question(q).with_answer(Text("5")) for q in ("2 + 3?", "1 + 4?")]
    assert np.isfinite(score_answers(model, texts)).all()
    assert np.isnan(score_answers(model, texts, positions=3)).all()


def test_a_teachers_own_twin_shows_its_marks(tmp_path: Path) -> None:
    """The suspect is one of the teachers: it likes its own texts more than its base does."""
    qwen, gemma = (str(SAPLINGS / f"{name}-sapling") for name in ("qwen", "gemma"))
    result = audit_teachers(
        AuditModels(Suspect(qwen), LLAMA, (qwen, gemma)),
        audit_prompts(["languages"], 30),
        max_new_tokens=24,
    )
    assert [e.teacher for e in result.teachers] == ["qwen-sapling", "gemma-sapling"]
    assert [e.finding for e in result.teachers] == [Finding.MARKS, Finding.NO_EVIDENCE]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(RecipeError, match="a teacher needs something to be compared with"):
        AuditModels(Suspect(LLAMA), LLAMA, ("a",))
    with pytest.raises(RecipeError, match="two teachers or controls have the same name"):
        AuditModels(Suspect(LLAMA), LLAMA, ("x/a",), ("y/a",))
    with pytest.raises(RefusedError, match="a chat route returns no log-probabilities"):
        Suspect(LLAMA, EndpointSection(url="http://127.0.0.1:9", protocol="chat")).open(4)


def test_the_verb(tmp_path: Path) -> None:
    captured(tmp_path / "run")
    ended = persea("audit", LLAMA, "--canaries", "run", "--json", folder=tmp_path)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["suspect"] == "llama-sapling"
    assert 0 < found["p_value"] <= 1
    assert found["caveat"].startswith("evidence, not proof")
    for arguments, words in (
        ([], "nothing to compare the model with"),
        (["--canaries", "run", "--base", LLAMA], "--canaries needs no --base"),
        (["--canaries", "run", "--endpoint", "x"], "--endpoint"),
        (["--canaries", "run", "--endpoint", "http://a", "--protocol", "q"], "unknown protocol"),
    ):
        ended = persea("audit", LLAMA, *arguments, folder=tmp_path)
        assert ended.code == 2
        assert words in ended.err
        assert len(ended.err.splitlines()) == 1
    ended = persea("audit", LLAMA, "--canaries", "none", folder=tmp_path)
    assert ended.code == 3
    assert "no canaries" in ended.err
