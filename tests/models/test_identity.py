"""A fingerprint changes with the weights, and unusual configurations are reported."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.models.hub import resolve_commit
from persea.models.identity import (
    RUNNING_STATE_TYPES,
    RUNNING_STATE_VERSION,
    computation_version,
    file_stats,
    fingerprint,
    model_warnings,
)
from persea.models.loading import ModelSource
from tests.conftest import Speaker
from tests.models.conftest import RANDOM, configure


def test_a_fingerprint_changes_with_any_byte(copy: Path):
    source = ModelSource(str(copy))
    before = fingerprint(source, "w")
    assert fingerprint(source, "w") == before
    places = (
        ("model.safetensors", -1),
        ("model.safetensors", 9),
        ("config.json", 3),
        ("tokenizer.json", 50),
        ("chat_template.jinja", 0),
    )
    for name, at in places:
        whole = (copy / name).read_bytes()
        broken = bytearray(whole)
        broken[at] ^= 1
        (copy / name).write_bytes(broken)
        with suppress(DataError):  # broken JSON
            assert fingerprint(source, "w") != before, name
        (copy / name).write_bytes(whole)
    assert fingerprint(source, "w") == before
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    assert fingerprint(source, "w") != before


def test_a_fingerprint_does_not_depend_on_the_place(copy: Path, llama: tuple[Path, ChatRenderer]):
    assert fingerprint(ModelSource(str(copy)), "w") == fingerprint(ModelSource(str(llama[0])), "w")


def test_only_models_with_a_running_state_have_a_computation_version(copy: Path):
    source = ModelSource(str(copy))
    assert computation_version(source, "w") == []
    for model_type in RUNNING_STATE_TYPES:
        configure(copy, config={"model_type": model_type})
        assert computation_version(source, "w") == [{"running_state": RUNNING_STATE_VERSION}]
    assert computation_version(ModelSource("random", tokenizer="x/y"), "w") == []


def test_fingerprints_of_hub_and_random_models():
    hub, random_model = (
        ModelSource("Qwen/Qwen3-8B", revision="a" * 40),
        ModelSource("random", tokenizer="x/y", sizes=RANDOM),
    )
    variants = [
        hub,
        replace(hub, revision="b" * 40),
        replace(hub, model="Qwen/Qwen3-4B"),
        random_model,
        replace(random_model, sizes=RANDOM[1:]),
        replace(random_model, tokenizer="x/z"),
    ]
    assert len({fingerprint(s, "w") for s in variants}) == len(variants)
    with pytest.raises(DataError, match="no model folder"):
        fingerprint(ModelSource("./none"), "w")


def test_a_hub_model_is_identified_by_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A branch that moves to another commit is another model."""
    commit = ["1" * 40]
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda model, name, revision: str(tmp_path / "snapshots" / commit[0] / name),
    )
    resolve_commit.cache_clear()
    branch = ModelSource("some/model", revision="main")
    first = fingerprint(branch, "w")
    assert first == fingerprint(ModelSource("some/model", revision="1" * 40), "w")
    commit[0] = "2" * 40
    assert fingerprint(branch, "w") == first  # resolved once in a process
    resolve_commit.cache_clear()
    assert fingerprint(branch, "w") != first
    resolve_commit.cache_clear()


def test_file_stats_change_when_a_file_is_written(copy: Path) -> None:
    source = ModelSource(str(copy))
    before = file_stats(source, "w")
    assert {name for name, *_ in before} >= {"model.safetensors", "config.json"}
    os.utime(copy / "config.json", ns=(1, 1))
    assert file_stats(source, "w") != before
    assert file_stats(ModelSource("random"), "w") == file_stats(ModelSource("a/b"), "w") == ()


def test_a_base_model_with_a_chat_template_is_reported(
    copy: Path, llama: tuple[Path, ChatRenderer]
):
    """As in Qwen's base model: its eos is 151643, and its template ends turns with 151645."""
    renderer = llama[1]
    text, turn = (
        renderer.vocabulary.control_token_ids[n] for n in ("<|end_of_text|>", "<|eot_id|>")
    )
    assert {text, turn} <= set(
        renderer.stop_ids
    )  # both end an answer, and that is not what is asked here
    note = model_warnings(configure(copy, generation_config={"eos_token_id": text}), renderer, "w")
    assert note.startswith("a base model with a chat template")
    assert f"<|end_of_text|> ({text})" in note
    assert f"<|eot_id|> ({turn})" in note
    assert "\n" not in note
    for eos in (turn, [text, turn]):
        assert (
            model_warnings(configure(copy, generation_config={"eos_token_id": eos}), renderer, "w")
            == ""
        )
    assert (
        model_warnings(ModelSource("random", tokenizer=str(copy)), renderer, "w") == ""
    )  # a sprout ends nowhere


def test_the_saplings_have_nothing_odd(tiny: Speaker):
    assert model_warnings(ModelSource(str(tiny.folder)), tiny.renderer, "w") == ""
