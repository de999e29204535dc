"""Rows mapped from a teacher's: the fit, both matrices, and what cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiConfig

from persea.errors import DataError, RefusedError
from persea.models.loading import ModelSource
from persea.vocab_extension.map_embeddings import (
    ROW_METHODS,
    RowMethod,
    TeacherRows,
    fit_row_map,
    map_teacher_rows,
    read_token_matrices,
    refuse_few_shared_tokens,
    set_mapped_rows,
)
from tests.conftest import ROOT

SAPLINGS = ROOT / "saplings"
NAME = "model.embed_tokens.weight"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAPLINGS / "gemma-sapling", tmp_path / "copy"))


@pytest.mark.parametrize("method", ROW_METHODS)
@pytest.mark.parametrize("width", [8, 24])
def test_rows_that_a_map_made_are_found_again(method: RowMethod, width: int):
    """The student's rows are the teacher's, turned and moved; unseen rows come out right."""
    x_NE = normal(2000, 16)
    matrix_ED = torch.linalg.qr(normal(24, 24, seed=1))[0][:16, :width]
    y_ND = x_NE @ matrix_ED + 3.0
    fitted = fit_row_map(x_NE[:1500], y_ND[:1500], method)
    error = (fitted.apply(x_NE[1500:]) - y_ND[1500:]).norm() / (y_ND[1500:] - 3.0).norm()
    assert error < {"ridge": 0.02, "orthogonal": 0.4 if width == 8 else 0.02}[method]


def test_mapped_rows_have_the_spread_of_the_others():
    x_NE, y_ND = normal(600, 16), normal(600, 8, seed=1)  # nothing to learn: a ridge shrinks to 0
    mapped_ND = fit_row_map(x_NE, y_ND).apply(x_NE)
    spread = (mapped_ND - mapped_ND.mean(0)).norm(dim=1).mean()
    assert spread == pytest.approx(float((y_ND - y_ND.mean(0)).norm(dim=1).mean()), rel=0.01)


def test_only_the_new_rows_change_and_several_tokens_are_averaged():
    teacher, student = normal(400, 16), normal(500, 8, seed=1)
    before = student.clone()
    plan = TeacherRows(
        ModelSource("t"), "ridge", tuple((i, i) for i in range(300)), {450: (5,), 451: (5, 6)}
    )
    set_mapped_rows(student, teacher.bfloat16(), plan)
    changed = (student != before).any(1).nonzero().flatten().tolist()
    assert changed == [450, 451]
    fitted = fit_row_map(teacher[:300].bfloat16(), before[:300])
    expected = fitted.apply(teacher.bfloat16()[[5, 6]].float().mean(0, keepdim=True))[0]
    assert torch.allclose(student[451], expected, atol=1e-5)


def test_an_untied_head_has_a_map_of_its_own(tmp_path: Path):
    def phi(seed: int, hidden: int) -> AutoModelForCausalLM:
        torch.manual_seed(seed)
        sizes = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 1}
        config = PhiConfig(
            vocab_size=600, num_attention_heads=2, tie_word_embeddings=False, **sizes
        )
        return AutoModelForCausalLM.from_config(config)

    teacher, student = phi(0, 32), phi(1, 16)
    teacher.save_pretrained(tmp_path)
    embedding, head = read_token_matrices(ModelSource(str(tmp_path)), "teacher")
    assert torch.equal(embedding, teacher.get_input_embeddings().weight)
    assert torch.equal(head, teacher.get_output_embeddings().weight)
    plan = TeacherRows(
        ModelSource(str(tmp_path)), "ridge", tuple((i, i) for i in range(400)), {590: (595,)}
    )
    expected = []
    for ours, theirs in (
        (student.get_input_embeddings().weight, embedding),
        (student.get_output_embeddings().weight, head),
    ):
        fitted = fit_row_map(theirs[:400], ours[:400].detach())
        expected.append(fitted.apply(theirs[595:596])[0])
    bias = student.get_output_embeddings().bias.detach().clone()
    map_teacher_rows(student, plan)
    assert torch.allclose(student.get_input_embeddings().weight[590], expected[0], atol=1e-5)
    assert torch.allclose(student.get_output_embeddings().weight[590], expected[1], atol=1e-5)
    assert torch.equal(student.get_output_embeddings().bias, bias)


def test_tied_matrices_are_read_once_under_any_prefix_and_from_parts(copy: Path):
    stored = load_file(copy / "model.safetensors")
    embedding, head = read_token_matrices(ModelSource(str(copy)), "teacher")
    assert embedding is head and torch.equal(embedding, stored[NAME])
    inner = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    save_file(inner, copy / "model-00001-of-00001.safetensors", {"format": "pt"})
    (copy / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(inner, "model-00001-of-00001.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(read_token_matrices(ModelSource(str(copy)), "teacher")[0], stored[NAME])


def test_what_cannot_be_read_is_refused(copy: Path):
    stored = load_file(copy / "model.safetensors")
    source, path = ModelSource(str(copy)), copy / "model.safetensors"
    save_file(stored | {NAME: stored[NAME].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    with pytest.raises(RefusedError, match=r"embed_tokens\.weight is quantized"):
        read_token_matrices(source, "teacher")
    save_file({k: v for k, v in stored.items() if k != NAME}, path, {"format": "pt"})
    with pytest.raises(DataError, match=r"its files have 0 tensors called embed_tokens\.weight"):
        read_token_matrices(source, "teacher")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="cannot read its weights"):
        read_token_matrices(source, "teacher")
    path.unlink()
    with pytest.raises(DataError, match="cannot read its weights"):
        read_token_matrices(source, "teacher")


def test_too_few_shared_tokens_are_refused():
    plan = TeacherRows(ModelSource("t"), "ridge", ((1, 1),), {})
    with pytest.raises(RefusedError, match="share 1 tokens"):
        refuse_few_shared_tokens(plan, "teacher")
