"""The student's logits end with its vocabulary, and what is saved is what was trained, whole or
with adapters.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from memory import Peak
from safetensors import safe_open

from persea.chat.messages import Conversation, Text, ThinkingEffort
from persea.errors import DataError, RefusedError, StorageError
from persea.losses import event_kl_loss_from_hidden
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.models.weight_shapes import read_stored_dtype
from persea.training.student import (
    ComputeOptions,
    HiddenStateModule,
    LoraSettings,
    StudentModel,
    load_student,
)
from tests.cli.test_cli import warm
from tests.teachers.engines.test_transformers import NAMES, SAPLINGS, opened

LORA = LoraSettings(4, 8, ("q_proj", "v_proj"))
PLAIN = ComputeOptions()


def student(
    name: str = "llama-sapling",
    lora: LoraSettings | None = None,
    seed: int = 0,
    ways: ComputeOptions = PLAIN,
) -> StudentModel:
    return load_student(ModelSource(str(SAPLINGS / name)), opened(name)[0], lora, seed, ways)


def spoken(one: StudentModel) -> tuple[torch.Tensor, ...]:
    """ids, mask, row, at of two answers of different length, right padded."""
    texts = ("Two.", "One hundred and twenty-three, in words.")
    tokens = [
        one.renderer.render(Conversation.from_question(f"question {k}").with_answer(Text(t)))
        for k, t in enumerate(texts)
    ]
    ids = torch.zeros((2, max(map(len, tokens))), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for k, t in enumerate(tokens):
        ids[k, : len(t)], mask[k, : len(t)] = torch.from_numpy(t.ids_T), 1
    row, at = zip(
        *((k, n - 1) for k, t in enumerate(tokens) for n in range(len(t)) if t.loss_mask_T[n]),
        strict=True,
    )
    return ids, mask, torch.tensor(row), torch.tensor(at)


def shake(one: StudentModel) -> None:
    """Some training: every weight that may change does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in one.trainable_parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("name", NAMES)
def test_logits_stand_where_they_were_asked_for(name: str) -> None:
    one = student(name)
    ids, mask, row, at = spoken(one)
    with torch.inference_mode():
        logits = one.logits(ids, mask, row, at)
        assert logits.shape == (len(row), len(one.renderer.vocabulary))
        assert logits.dtype == torch.float32
        for k in (0, 1):
            alone = one.model(input_ids=ids[k : k + 1, : int(mask[k].sum())]).logits[0]
            assert torch.allclose(
                logits[row == k], alone[at[row == k], : len(one.renderer.vocabulary)], atol=1e-4
            )


def test_logits_of_padded_rows_are_cut_off() -> None:
    one = student()
    model = deepcopy(one.model)
    model.resize_token_embeddings(len(one.renderer.vocabulary) + 37, mean_resizing=False)
    wide = StudentModel(model, one.renderer, one.source)
    assert model.get_output_embeddings().weight.shape[0] == len(one.renderer.vocabulary) + 37
    asked = spoken(one)
    with torch.inference_mode():
        assert torch.allclose(wide.logits(*asked), one.logits(*asked), atol=1e-5)
        assert wide.logits(*asked).shape[1] == len(one.renderer.vocabulary)


def test_a_student_that_was_given_the_switch_is_saved_with_it(tmp_path: Path) -> None:
    source = ModelSource(str(SAPLINGS / "gemma-sapling"), thinking=True)
    voice = load_renderer(source, "student")
    assert voice.template_text != (SAPLINGS / "gemma-sapling" / "chat_template.jinja").read_text()
    load_student(source, voice, None).save(tmp_path / "student")
    saved = ModelSource(str(tmp_path / "student"))
    again = load_renderer(saved, "student")
    assert (
        again.template_text
        == voice.template_text
        == (tmp_path / "student" / "chat_template.jinja").read_text()
    )
    assert again.family.efforts == tuple(ThinkingEffort)
    config = tmp_path / "student" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "old"}))
    load_student(ModelSource(str(tmp_path / "student"), thinking=True), again, None).save(
        tmp_path / "twice"
    )
    assert "chat_template" not in json.loads(
        (tmp_path / "twice" / "tokenizer_config.json").read_text()
    )
    assert (
        load_renderer(ModelSource(str(tmp_path / "twice")), "student").template_text
        == voice.template_text
    )


def test_in_full_every_weight_learns_and_with_adapters_only_they_do() -> None:
    full, adapted = student(), student(lora=LORA)
    assert sum(p.numel() for p in full.trainable_parameters) == sum(
        p.numel() for p in full.model.parameters()
    )
    layers = full.model.config.num_hidden_layers
    assert len(adapted.trainable_parameters) == layers * len(LORA.targets) * 2
    assert all(LORA.rank in p.shape for p in adapted.trainable_parameters)
    asked = spoken(full)
    with torch.inference_mode():
        assert torch.allclose(
            full.logits(*asked), adapted.logits(*asked), atol=1e-5
        )  # an adapter begins as nothing


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_saved_is_what_was_trained(
    tmp_path: Path, name: str, lora: LoraSettings | None
) -> None:
    one = student(name, lora)
    asked = spoken(one)
    with torch.inference_mode():
        before = one.logits(*asked)
    shake(one)
    with torch.inference_mode():
        logits = one.logits(*asked)
    assert (logits - before).abs().max() > 0.01
    one.save(tmp_path / "student")
    source = ModelSource(str(tmp_path / "student"))
    voice = load_renderer(source, "student")
    assert voice.digest == one.renderer.digest
    again = StudentModel(load_model(source, voice, "student"), voice, source)
    with torch.inference_mode():
        saved = again.logits(*asked)
    assert torch.equal(saved, logits) if lora is None else torch.allclose(saved, logits, atol=1e-4)
    assert not any("lora" in n for n, _ in again.model.named_parameters())
    with torch.inference_mode():
        assert torch.equal(one.logits(*asked), logits)  # saving changed nothing


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_tied_weights_are_saved_once_in_another_type(
    tmp_path: Path, lora: LoraSettings | None
) -> None:
    student(lora=lora).save(tmp_path / "student", torch.bfloat16)
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
    with safe_open(SAPLINGS / "llama-sapling" / "model.safetensors", "pt") as base:
        assert names == set(base.keys())


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one = student(lora=LORA)
    shake(one)
    for name in ("a", "b"):
        one.save(tmp_path / name)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


def test_adapters_begin_at_random_by_the_seed_and_by_nothing_else() -> None:
    torch.manual_seed(1)
    one = student(lora=LORA, seed=7)
    torch.manual_seed(2)
    same, other = student(lora=LORA, seed=7), student(lora=LORA, seed=8)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.trainable_parameters, same.trainable_parameters, strict=True)
    )
    assert not all(
        torch.equal(a, b)
        for a, b in zip(one.trainable_parameters, other.trainable_parameters, strict=True)
    )


@pytest.mark.parametrize("targets", [("nowhere_proj",), ("",)])
def test_adapters_on_projections_that_are_not_there_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(
        DataError, match=r"student\.lora\.targets: .* -> name projections this model has"
    ) as caught:
        student(lora=LoraSettings(4, 8, targets))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def save_where_files_stay_small(folder: Path, pipe: Connection) -> None:
    """In a child: no file may grow beyond 1 MB, as on a disk that is nearly full."""
    one = student()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    try:
        one.save(folder)
    except StorageError as error:
        pipe.send((error.exit_code, str(error)))
    else:
        pipe.send((0, "written"))


def test_a_disk_too_full_for_the_student_is_a_storage_error(tmp_path: Path) -> None:
    mine, childs = warm().Pipe(duplex=False)
    child = warm().Process(target=save_where_files_stay_small, args=(tmp_path / "student", childs))
    child.start()
    assert mine.poll(120)
    code, words = mine.recv()
    child.join(60)
    assert (code, child.exitcode) == (6, 0), words
    assert re.search(
        r"student: cannot write the student: .*File too large.* -> free space, then run again",
        words,
    )


def test_the_tokenizer_of_the_student_is_the_one_it_came_with(tmp_path: Path) -> None:
    one = student("gemma-sapling")
    one.save(tmp_path / "student")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "student" / name).read_bytes() == (
            SAPLINGS / "gemma-sapling" / name
        ).read_bytes()


# ---- ways to compute a step ----------------------------------------------------------------------


def learned(one: StudentModel) -> tuple[float, list[torch.Tensor], int]:
    """Loss and gradients of a step on texts of three lengths, and its peak memory in bytes."""
    texts = ("Two.", "One hundred and twenty-three, in words.", "Three and more.", "Yes.", "No.")
    tokens = [
        one.renderer.render(Conversation.from_question(f"question {k}").with_answer(Text(t)))
        for k, t in enumerate(texts)
    ]
    ids = torch.zeros((len(texts), max(map(len, tokens))), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for k, t in enumerate(tokens):
        ids[k, : len(t)], mask[k, : len(t)] = torch.from_numpy(t.ids_T), 1
    row, at = zip(
        *((k, n - 1) for k, t in enumerate(tokens) for n in range(len(t)) if t.loss_mask_T[n]),
        strict=True,
    )
    row_N, at_N = torch.tensor(row), torch.tensor(at)
    one.model.train()
    with Peak() as peak:
        out = event_kl_loss_from_hidden(
            *one.hidden_and_head(ids, mask, row_N, at_N), ids[row_N, at_N + 1], [], 0.7
        )
        out.loss.backward()
    return (
        out.loss.item(),
        [p.grad for p in one.trainable_parameters if p.grad is not None],
        peak.bytes,
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "gpt-oss-sapling"])
def test_packed_texts_teach_what_padded_ones_do(name: str) -> None:
    plain, packed = (
        learned(student(name)),
        learned(student(name, ways=ComputeOptions(packing=True))),
    )
    assert packed[0] == pytest.approx(plain[0], rel=1e-5)
    for a, b in zip(packed[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_activations_made_again_are_the_same_and_take_less_room(lora: LoraSettings | None) -> None:
    plain, again = (
        learned(student(lora=lora)),
        learned(student(lora=lora, ways=ComputeOptions(gradient_checkpointing=True))),
    )
    assert again[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(again[1], plain[1], strict=True))
    assert again[2] < 0.8 * plain[2]


def test_half_precision_changes_products_and_neither_weights_nor_gradients() -> None:
    one = student(ways=ComputeOptions(bf16=True))
    half, plain = learned(one), learned(student())
    assert half[0] != plain[0]
    assert half[0] == pytest.approx(plain[0], rel=0.05)
    assert all(p.dtype is torch.float32 for p in one.trainable_parameters)
    assert all(g.dtype is torch.float32 for g in half[1])
    whole, other = (torch.cat([g.flatten() for g in side]) for side in (half[1], plain[1]))
    assert torch.nn.functional.cosine_similarity(whole, other, 0) > 0.99


def test_a_student_that_cannot_do_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RefusedError, match=r"training\.packing: GptOss.* does not separate texts in one row"
    ):  # transformers 5.24 makes its mask without positions
        student("gpt-oss-sapling", ways=ComputeOptions(packing=True))
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(
        RefusedError,
        match=r"training\.gradient_checkpointing: .* does not support gradient checkpointing",
    ):
        student(ways=ComputeOptions(gradient_checkpointing=True))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process: every hook and gather of many, without the others."""
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_wrapped_forward_gives_the_head_its_gradient(how: str, tied: bool, group: None) -> None:
    """The head's weight comes out of the wrapped forward: whole, and where hooks wait for its
    gradient.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    plain, spread = student(), student()
    for one in (plain, spread):
        if not tied:
            linear = one.model.get_output_embeddings()
            linear.weight = torch.nn.Parameter(linear.weight.detach().clone())
            one.model.config.tie_word_embeddings = False
    want = learned(plain)
    forward = HiddenStateModule(spread.model, spread.options)
    if how == "ddp":
        wrapped: torch.nn.Module = DistributedDataParallel(forward, find_unused_parameters=True)
    else:
        for layer in spread.model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(forward)
    found = learned(replace(spread, forward_module=wrapped))
    whole = [g.full_tensor() if how == "fsdp" else g for g in found[1]]
    assert found[0] == pytest.approx(want[0], rel=1e-6)
    assert len(whole) == len(want[1]) == len(spread.trainable_parameters)
    for a, b in zip(whole, want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (
        float(
            dict(spread.model.named_parameters())[
                "model.embed_tokens.weight" if tied else "lm_head.weight"
            ].grad.norm()
        )
        > 0
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ("all-linear",)},
        {"use_rslora": True},
        {"use_dora": True},
        {"dropout": 0.1, "modules_to_save": ("norm",)},
    ],
)
def test_options_of_adapters_reach_peft_and_are_saved(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    one = student(lora=replace(LORA, **changes))
    asked = spoken(one)
    for p in one.trainable_parameters:
        p.data += 0.01
    one.model.eval()
    with torch.no_grad():
        logits = one.logits(*asked)
        one.save(tmp_path / "student")
        saved = student_of(tmp_path / "student").logits(*asked)
    assert torch.allclose(saved, logits, atol=1e-3)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llama-sapling"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    for key, value in changes.items():
        name = {"targets": "target_modules", "dropout": "lora_dropout"}.get(key, key)
        if key != "targets":
            assert config[name] == (list(value) if isinstance(value, tuple) else value)
        else:
            assert set(config[name]) >= {"gate_proj", "q_proj", "down_proj"}


def student_of(folder: Path) -> StudentModel:
    source = ModelSource(str(folder))
    one = load_student(source, load_renderer(source, "student"), None)
    one.model.eval()
    return one


def test_saved_adapters_are_the_student_on_its_base(tmp_path: Path) -> None:
    from peft import PeftModel

    one = student(lora=LORA)
    for p in one.trainable_parameters:
        p.data += 0.01
    one.model.eval()
    asked = spoken(one)
    one.save(tmp_path / "student")
    base = load_model(ModelSource(str(SAPLINGS / "llama-sapling")), one.renderer, "student")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        again = replace(one, model=adapted).logits(*asked)
        assert torch.allclose(again, one.logits(*asked), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ("embed_tokens",)},
        {"targets": ("q_proj", "lm_head")},
        {"modules_to_save": ("embed_tokens",)},
    ],
)
def test_adapters_on_one_of_two_tied_weights_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RefusedError, match="embedding and head of this student are one weight"):
        student(lora=replace(LORA, **changes))


def test_the_student_is_saved_in_the_type_it_came_in_and_others_may_read_it(
    tmp_path: Path,
) -> None:
    one = student()
    assert one.stored_dtype is torch.bfloat16
    one.save(tmp_path / "student", one.stored_dtype)
    assert read_stored_dtype(tmp_path / "student") == "bfloat16"
    assert json.loads((tmp_path / "student/config.json").read_text())["dtype"] == "bfloat16"
    assert next(one.model.parameters()).dtype is torch.float32


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_saved_files_have_the_mode_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        student(lora=LORA).save(tmp_path / "student")
    finally:
        os.umask(before)
    files = [p for f in ("student", "adapter") for p in (tmp_path / f).iterdir()]
    assert {p.name for p in files} >= {"model.safetensors", "adapter_model.safetensors"}
    assert {p.name: p.stat().st_mode & 0o777 for p in files} == {
        p.name: 0o666 & ~mask for p in files
    }


def test_a_tokenizer_of_vocab_and_merges_is_saved_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(SAPLINGS / "qwen-sapling", base)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    (base / "vocab.json").write_text(json.dumps(vocab))
    merges = (m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"])
    (base / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = json.loads((base / "tokenizer_config.json").read_text())
    added = {
        str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]
    }
    config |= {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "tokenizer.json").unlink()
    source = ModelSource(str(base))
    renderer = load_renderer(source, "student")
    load_student(source, renderer, None).save(tmp_path / "student")
    assert load_renderer(ModelSource(str(tmp_path / "student")), "x").digest == renderer.digest
