"""A GGUF export holds the student: the tokenizer is proved, the weights are read back equal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from persea.errors import DataError, RefusedError
from persea.export import gguf_file
from persea.export.forms import GgufPrecision
from persea.export.gguf_file import write_gguf
from persea.models.gguf_model import model_folder

ROOT = Path(__file__).resolve().parents[2]
SAPLINGS = ROOT / "saplings"


def changed(folder: Path, family: str, **config: Any) -> Path:
    """A copy of a sapling with other keys in its configuration."""
    copy = folder / "model"
    shutil.copytree(SAPLINGS / f"{family}-sapling", copy)
    old = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(old | config))
    return copy


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
def test_logits_of_the_file_are_those_of_the_student(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    student = SAPLINGS / f"{family}-sapling"
    file = write_gguf(student, tmp_path / "s.gguf", "s", GgufPrecision.F32, "apache-2.0")
    read = model_folder(file.path, "test")  # by transformers, which undoes the reordering
    ids = torch.tensor([[9, 300, 41, 700, 12]])
    with torch.no_grad():
        own, other = (
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits
            for f in (student, read)
        )
    assert torch.allclose(own, other, atol=1e-5)
    fields = gguf.GGUFReader(file.path).fields
    assert fields["general.license"].contents() == "apache-2.0"
    assert (
        fields["tokenizer.chat_template"].contents()
        == (student / "chat_template.jinja").read_text().removesuffix("\n")
        or fields["tokenizer.chat_template"].contents()
    )


def test_precisions_of_matrices(tmp_path: Path) -> None:
    sizes = {}
    for precision in GgufPrecision:
        file = write_gguf(SAPLINGS / "qwen-sapling", tmp_path / f"{precision}.gguf", "s", precision)
        sizes[precision] = file.path.stat().st_size
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file.path).tensors}
        assert kinds["output_norm.weight"] == "F32"
        expected = "BF16" if precision is GgufPrecision.AUTO else precision.name
        assert kinds["blk.0.attn_q.weight"] == expected
    assert sizes[GgufPrecision.Q8_0] < sizes[GgufPrecision.F16] < sizes[GgufPrecision.F32]


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("gpt-oss", {}, "no GGUF export for gpt_oss; it is known for llama, qwen2"),
        ("gemma", {"query_pre_attn_scalar": 64}, "no form for an attention scale"),
        ("gemma", {"final_logit_softcapping": 30.0}, "no form for a soft cap of logits"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rotary embeddings of the type yarn",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    tmp_path: Path, family: str, config: dict[str, Any], words: str
) -> None:
    student = changed(tmp_path, family, **config)
    with pytest.raises(RefusedError, match=words):
        write_gguf(student, tmp_path / "out" / "s.gguf", "s")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    student = changed(tmp_path, "qwen")
    path = student / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    split = tokenizer["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"] = {"Regex": r"\p{L}{1,2}|."}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(RefusedError, match="split patterns that llama"):
        write_gguf(student, tmp_path / "s.gguf", "s")
    path.unlink()
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        write_gguf(student, tmp_path / "s.gguf", "s")


def test_a_file_whose_tokenizer_splits_otherwise_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persea.export.gguf_vocabulary.USUAL_NAMES", ())
    real = gguf_file.gguf_vocabulary

    def other_pre(folder: Path, num_logits: int) -> Any:
        from dataclasses import replace

        return replace(real(folder, num_logits), pre="gpt-2")

    monkeypatch.setattr(gguf_file, "gguf_vocabulary", other_pre)
    with pytest.raises(RefusedError, match="would split texts otherwise"):
        write_gguf(SAPLINGS / "qwen-sapling", tmp_path / "s.gguf", "s")
    assert list(tmp_path.iterdir()) == []


def test_llama_3_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=2048,
        num_attention_heads=32,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = gguf_file._llama3_rope_factors(config)
    assert np.allclose(plain / factors, expected.numpy(), rtol=1e-5)


@pytest.mark.skipif(
    not os.environ.get("PERSEA_LLAMACPP_PYTHON"),
    reason="names no Python with xllamacpp; `make export` makes one",
)
def test_llama_cpp_answers_with_the_same_greedy_tokens() -> None:
    command = [sys.executable, "bench/export.py", str(SAPLINGS / "qwen-sapling")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
