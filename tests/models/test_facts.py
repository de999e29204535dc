"""Facts of models: from files on this machine, or from the catalogue, whose widths add up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from persea.models.facts import find_facts, is_at_hand, read_catalogue
from persea.models.loading import ModelSource

SAPLINGS = Path(__file__).resolve().parents[2] / "saplings"


def test_every_row_has_a_source_and_a_day() -> None:
    for name, facts in read_catalogue().items():
        assert name == facts.name
        assert facts.source
        assert re.fullmatch(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}", facts.date)
        assert facts.active_parameters <= facts.parameters
        embedding = facts.vocabulary * facts.hidden
        assert embedding < facts.parameters
        # attention and a feed-forward of 2 to 6 widths: a typing error of a digit is outside
        a_layer = (facts.active_parameters - embedding) / facts.layers / facts.hidden**2
        assert 2 < a_layer < 25, name


@pytest.mark.parametrize(
    ("name", "is_moe"),
    [("openai/gpt-oss-120b", True), ("Qwen/Qwen3-30B-A3B", True), ("google/gemma-3-27b-it", False)],
)
def test_dense_and_moe(name: str, is_moe: bool) -> None:
    facts = read_catalogue()[name]
    assert facts.is_moe is is_moe
    assert facts.operations_per_token == 2 * facts.active_parameters


def test_keys_and_values_of_layers_with_a_window_stop_growing() -> None:
    gemma, llama = (
        read_catalogue()[n] for n in ("google/gemma-3-27b-it", "meta-llama/Llama-3.1-8B-Instruct")
    )
    assert llama.kv_bytes(2000) == 2 * llama.kv_bytes(1000) == 2000 * 2 * 8 * 128 * 2 * 32
    assert gemma.kv_bytes(8000) < 4 * gemma.kv_bytes(1000)


def test_weights_in_fewer_bits() -> None:
    facts = read_catalogue()["google/gemma-3-27b-it"]
    assert facts.loaded_bytes() == 2 * facts.parameters
    assert facts.loaded_bytes("4bit") < facts.loaded_bytes("8bit") < facts.loaded_bytes()
    oss = read_catalogue()["openai/gpt-oss-120b"]
    assert oss.loaded_bytes("8bit") == oss.weight_bytes  # published in fewer


def test_a_model_on_this_machine_is_read_from_its_files() -> None:
    facts = find_facts(ModelSource(str(SAPLINGS / "gpt-oss-sapling")))
    assert facts is not None
    assert facts.is_moe
    # 2 of 4 experts are used
    assert facts.parameters - facts.active_parameters == pytest.approx(297_216)
    assert (facts.layers, facts.hidden, facts.vocabulary) == (3, 128, 1400)
    assert facts.sliding_share == pytest.approx(2 / 3)


def test_a_model_that_nobody_knows_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_at_hand("nobody/has-this")
    assert find_facts(ModelSource("nobody/has-this")) is None
    found = find_facts(ModelSource("openai/gpt-oss-20b"))
    assert found is not None
    assert found.date == "2025-08-05"
