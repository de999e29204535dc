"""A GGUF file opens as the model it was written from, once, or is refused with a remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from tokenizers import Tokenizer, pre_tokenizers

from persea.errors import DataError, MissingRequirementError, StorageError
from persea.models import gguf_model, loading
from persea.models.gguf_header import GgufHeader, find_gguf, read_header
from persea.models.gguf_tokenizer import SPLIT_RULES, build_tokenizer
from persea.models.gguf_weights import LLAMA3_ROPE, llama3_rope_factors
from persea.models.identity import (
    file_stats,
    fingerprint,
    gguf_origin,
    model_name,
    model_warnings,
    weight_bytes,
)
from persea.models.loading import (
    ModelSource,
    config_value,
    eos_token_ids,
    load_model,
    load_renderer,
    loadable_name,
    local_folder,
)
from persea.models.random_init import random_init
from persea.tokenization.vocabulary import ROUND_TRIP_PROBES
from persea.training.student import load_student
from tests.conftest import ROOT, Speaker
from tests.gguf_files import tokenizer_metadata, write_file, write_gguf

SIZES = {"hidden": 64, "layers": 2, "heads": 2, "seed": 3}
PRE = {"llama": "llama-bpe", "qwen": "qwen2", "gemma": ""}
TEXTS = (*ROUND_TRIP_PROBES, "def f(a12):\n    return 3 + 456  # 7\n", "  12  3", "it's WE'LL")
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PERSEA_HOME of its own: nothing is converted before."""
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def model_of(speaker: Speaker) -> Any:
    """A random model of the family's architecture, with distinct norms."""
    name = speaker.renderer.family.name
    model = random_init(name, len(speaker.renderer.vocabulary), SIZES)
    dice = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # a multiple of 1/64 survives Gemma's + 1 exactly
            parameter.data += torch.randint(-9, 9, parameter.shape, generator=dice) / 64
    if name == "gemma":
        model.config.query_pre_attn_scalar = model.config.head_dim
        for layer in model.model.layers:
            layer.self_attn.scaling = model.config.head_dim**-0.5
    return model.eval()


@pytest.fixture(scope="module")
def models(tiny_of: Callable[[str], Speaker]) -> Callable[[str], tuple[Speaker, Any]]:
    cache: dict[str, tuple[Speaker, Any]] = {}

    def of(family: str) -> tuple[Speaker, Any]:
        if family not in cache:
            cache[family] = tiny_of(family), model_of(tiny_of(family))
        return cache[family]

    return of


@pytest.fixture
def write(models: Callable[[str], tuple[Speaker, Any]], tmp_path: Path) -> Write:
    """Write the tiny Llama, or another family, as tmp_path/m/x.gguf."""

    def of(family: str = "llama", name: str = "x.gguf", **options: Any) -> Path:
        speaker, model = models(family)
        (tmp_path / "m").mkdir(exist_ok=True)
        path = tmp_path / "m" / name
        options = {"pre": PRE[family]} | options
        return write_gguf(path, model, speaker.folder, **options)

    return of


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("family", PRE)
def test_a_file_opens_as_the_model_it_was_written_from(
    family: str, models: Callable[[str], tuple[Speaker, Any]], write: Write
) -> None:
    speaker, model = models(family)
    source = ModelSource(str(write(family)))
    renderer = load_renderer(source, "w")
    for text in TEXTS:
        assert renderer.vocabulary.encode(text) == speaker.renderer.vocabulary.encode(text), text
    assert renderer.vocabulary.bytes_W == speaker.renderer.vocabulary.bytes_W
    assert renderer.template_text == speaker.renderer.template_text
    assert renderer.family.name == family
    ids = renderer.vocabulary.encode(TEXTS[0])
    opened = load_model(source, renderer, "w")
    assert torch.equal(logits_of(opened, ids), logits_of(model, ids))
    assert opened.dtype == torch.float32


def test_quantised_weights_are_dequantised_exactly(
    models: Callable[[str], tuple[Speaker, Any]], write: Write
) -> None:
    model = models("llama")[1]
    source = ModelSource(str(write(kind=Q.Q8_0)))
    renderer = load_renderer(source, "w")
    opened = load_model(source, renderer, "w")
    down = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(down, Q.Q8_0), Q.Q8_0)
    assert np.array_equal(opened.model.layers[0].mlp.down_proj.weight.detach().numpy(), expected)
    ids = renderer.vocabulary.encode(TEXTS[0])
    difference = (logits_of(opened, ids) - logits_of(model, ids)).abs().max()
    assert 0 < difference < 0.05 * logits_of(model, ids).abs().max()
    assert (
        json.loads((local_folder(source.model, "w") / "config.json").read_text()).get(
            "quantization_config"
        )
        is None
    )


def test_bfloat16_stays_bfloat16(write: Write) -> None:
    path = write(kind=Q.BF16)
    header = read_header(path, "w")
    assert gguf_model.stored_dtype(header) == "bfloat16"
    assert gguf_model.converted_bytes(header) == weight_bytes(ModelSource(str(path)), "w")
    folder = gguf_model.model_folder(path, "w")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_many_weights_are_kept_in_bfloat16(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(write(), "w")
    assert gguf_model.stored_dtype(header) == "float32"
    monkeypatch.setattr(gguf_model, "MAX_FLOAT32_WEIGHTS", header.num_weights - 1)
    assert gguf_model.stored_dtype(header) == "bfloat16"


# ---- once ----------------------------------------------------------------------------------------


def test_a_file_is_converted_once_and_a_damaged_folder_anew(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    calls: list[Path] = []
    real = gguf_model.convert_weights
    monkeypatch.setattr(gguf_model, "convert_weights", lambda *a: calls.append(a[2]) or real(*a))
    folder = gguf_model.model_folder(path, "w")
    assert gguf_model.model_folder(path, "w") == folder
    weights = (folder / "model.safetensors").read_bytes()
    moved = path.with_name("other name.gguf")
    path.rename(moved)
    assert gguf_model.model_folder(moved, "w") == folder  # the content names it
    assert len(calls) == 1
    for damage in (
        lambda: (folder / "model.safetensors").write_bytes(weights[:-1] + b"\x00"),
        lambda: (folder / "config.json").unlink(),
        lambda: (folder / "more.json").touch(),
        lambda: (folder / "gguf.json").write_text("{}"),
    ):
        damage()
        gguf_model.model_folder(moved, "w")
        assert (folder / "model.safetensors").read_bytes() == weights
        assert (folder / "config.json").is_file()
        assert not (folder / "more.json").exists()
    assert len(calls) == 5


def test_opening_a_tokenizer_converts_no_weights(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_model, "convert_weights", lambda *_: pytest.fail("converted"))
    source = ModelSource(str(write()))
    renderer = load_renderer(source, "w")
    assert "converted from x.gguf, F32 (" in model_warnings(source, renderer, "w")
    assert fingerprint(source, "w") and file_stats(source, "w")[0][0] == "x.gguf"


def test_a_conversion_that_fails_leaves_nothing(
    write: Write, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    space = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: space)
        with pytest.raises(StorageError, match=r"need 0\.2 GB when dequantised") as caught:
            gguf_model.model_folder(path, "w")
        assert "PERSEA_HOME" in caught.value.remedy
    assert not list(home.rglob("*.tmp")) and not list(home.rglob("model"))
    left = next(home.rglob("tokenizer")).with_name(".model.1.tmp")  # by a killed process
    left.mkdir()
    gguf_model.model_folder(path, "w")
    assert not list(home.rglob("*.tmp"))


def test_a_large_file_is_not_copied(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers gets from the file itself and from the copy without tokens is equal."""
    path = write()
    copied = gguf_model.model_folder(path, "w")
    weights, config = (
        (copied / "model.safetensors").read_bytes(),
        (copied / "config.json").read_text(),
    )
    shutil.rmtree(copied)
    monkeypatch.setattr(gguf_model, "MAX_COPIED_BYTES", 0)
    monkeypatch.setattr(gguf_model, "write_without_tokens", lambda *_: pytest.fail("copied"))
    linked = gguf_model.model_folder(path, "w")
    assert (linked / "model.safetensors").read_bytes() == weights
    assert (linked / "config.json").read_text() == config


def test_positions_need_no_weights(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(str(write()))
    converted = config_value(source, "config.json", "max_position_embeddings", "w")
    monkeypatch.setattr(gguf_model, "model_folder", lambda *_: pytest.fail("converted"))
    monkeypatch.setattr(loading, "model_folder", lambda *_: pytest.fail("converted"))
    assert loading.max_positions(source, "w") == converted > 0


def test_nothing_beside_the_file_is_read(write: Write) -> None:
    path = write()
    (path.parent / "adapter_config.json").write_text("{")
    (path.parent / "config.json").write_text('{"auto_map": {}}')
    (path.parent / "generation_config.json").write_text("{")
    source = ModelSource(str(path))
    assert load_model(source, load_renderer(source, "w"), "w") is not None


# ---- which file ----------------------------------------------------------------------------------


def test_a_folder_with_one_file_is_that_file(write: Write, tmp_path: Path) -> None:
    path = write()
    assert find_gguf(str(path.parent), "w") == path
    assert fingerprint(ModelSource(str(path)), "w") == fingerprint(
        ModelSource(str(path.parent)), "w"
    )
    (path.parent / "mmproj-x.gguf").touch()
    assert find_gguf(str(path.parent), "w") == path
    second = Path(shutil.copy(path, path.with_name("y.GGUF")))
    with pytest.raises(DataError, match=r"2 GGUF files in .*: x\.gguf, y\.GGUF") as caught:
        find_gguf(str(path.parent), "w")
    assert str(path) in caught.value.remedy
    assert find_gguf(str(second), "w") == second
    (path.parent / "model.safetensors").touch()
    assert find_gguf(str(path.parent), "w") is None
    assert find_gguf("Qwen/Qwen3-8B", "w") is None and find_gguf(str(tmp_path), "w") is None


def test_a_missing_file_is_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model folder") as caught:
        load_renderer(str(tmp_path / "none.gguf"))
    assert "GGUF" in caught.value.remedy


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def patch(path: Path, at: int, raw: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[at : at + len(raw)] = raw
    path.write_bytes(content)
    return path


BROKEN = {
    "is no GGUF file": lambda w: patch(w(), 0, b"PK\x03\x04"),
    "has GGUF version 1": lambda w: patch(w(), 4, b"\x01\x00\x00\x00"),
    "has GGUF version 50331648": lambda w: patch(w(), 4, b"\x00\x00\x00\x03"),  # big-endian
    "is cut off: 1 of": lambda w: cut(w(), -1),
    "is cut off or damaged at byte": lambda w: cut(w(), 3000),
    "of its header": lambda w: patch(w(), 16, b"\xff" * 8),
    "x.gguf is cut off or damaged": lambda w: patch(w(), 24, b"\xff" * 7),
    "one part of a GGUF file": lambda w: w(name="m-00001-of-00003.gguf"),
    "is one part of a": lambda w: w(more={"split.count": 3}),
    "holds the vision or audio encoder": lambda w: w(more={"general.type": "mmproj"}),
    "holds a LoRA adapter": lambda w: w(more={"general.type": "adapter"}),
    "holds a vocabulary without weights": lambda w: w(edit=lambda t: t.clear()),
    "holds no token embeddings": lambda w: w(edit=lambda t: t.pop("token_embd.weight")),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_file_that_is_no_model_is_refused(message: str, write: Write) -> None:
    with pytest.raises(DataError) as caught:
        load_renderer(ModelSource(str(BROKEN[message](write))), "teachers.a")
    assert message in caught.value.message and caught.value.remedy
    assert caught.value.where == "teachers.a" and "\n" not in str(caught.value)


def test_every_cut_header_is_refused(write: Write) -> None:
    path = write()
    whole = path.read_bytes()
    for size in [*range(0, 300), *range(300, len(whole), len(whole) // 50)]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_header(path, "w")


def test_without_the_package_gguf_the_remedy_is_its_installation(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingRequirementError, match=r"pip install 'persea\[gguf\]'"):
        load_renderer(str(path))


# ---- weights that would be lost ------------------------------------------------------------------

EXTRA = np.ones((4, 4), np.float32)
FACTORS = np.linspace(1, 8, 16, dtype=np.float32)
INCOMPLETE = {
    "missing keys: model.layers.1.mlp.up_proj.weight": {
        "edit": lambda t: t.pop("blk.1.ffn_up.weight")
    },
    "weights": {"edit": lambda t: t.update({"blk.0.attn_q_norm.weight": EXTRA})},
    "llama.rope.scaling.factor = 8.0, which transformers does not read": {
        "more": {"llama.rope.scaling.factor": 8.0}
    },
    "llama.attention.sliding_window = 16, which transformers does not read": {
        "more": {"llama.attention.sliding_window": 16}
    },
    "llama.attention.value_length = 16, which transformers reads as 32": {
        "more": {"llama.attention.value_length": 16}
    },
    "not Llama 3's": {"edit": lambda t: t.update({"rope_freqs.weight": FACTORS})},
}


@pytest.mark.parametrize("message", INCOMPLETE)
def test_a_model_that_transformers_would_cut_is_refused(message: str, write: Write) -> None:
    options = INCOMPLETE[message]
    with pytest.raises(DataError) as caught:
        gguf_model.model_folder(write(**options), "student.model")
    assert message in caught.value.message
    assert "safetensors" in caught.value.remedy


def test_an_unknown_architecture_is_refused(tmp_path: Path, write: Write, models: Any) -> None:
    values = {
        f"tokenizer.{k}": v
        for k, v in tokenizer_metadata(models("llama")[0].folder, "llama-bpe").items()
    }
    rows = len(values["tokenizer.ggml.tokens"])
    embedding = np.zeros((rows, 4), np.float32)
    path = write_file(tmp_path / "m.gguf", "plamo9", values, {"token_embd.weight": embedding})
    assert load_renderer(str(path)).family.name == "llama"
    with pytest.raises(DataError, match=r"transformers cannot load .* architecture 'plamo9'"):
        gguf_model.model_folder(path, "w")


def test_harmless_metadata_is_no_reason_to_refuse(write: Write) -> None:
    more = {"llama.rope.scaling.type": "none", "llama.attention.key_length": 32}
    gguf_model.model_folder(write(more=more), "w")


def test_the_rotary_frequencies_of_llama_3_are_restored(
    models: Callable[[str], tuple[Speaker, Any]], write: Write
) -> None:
    from transformers import LlamaForCausalLM

    model = models("llama")[1]
    factors = llama3_rope_factors(32, 500000.0, 32)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    path = write(edit=lambda t: t.update({"rope_freqs.weight": factors.astype(np.float32)}))
    folder = gguf_model.model_folder(path, "w")
    model.config.rope_parameters = {"rope_theta": 500000.0, "factor": 32.0, **LLAMA3_ROPE}
    scaled = LlamaForCausalLM(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    opened = LlamaForCausalLM.from_pretrained(folder)
    base = 1 / 500000.0 ** (np.arange(0, 32, 2) / 32)
    assert np.allclose(scaled.model.rotary_emb.inv_freq.numpy(), base / factors, rtol=1e-6)
    ids = list(range(40))
    assert torch.equal(logits_of(opened, ids), logits_of(scaled, ids))


# ---- tokenizers ----------------------------------------------------------------------------------


def header_with(values: dict[str, Any], architecture: str = "llama") -> GgufHeader:
    """The header of a file that was not written."""
    return GgufHeader(Path("t.gguf"), {"general.architecture": architecture, **values}, ())


def byte_level_values(speaker: Speaker, pre: str) -> dict[str, Any]:
    return {f"tokenizer.{k}": v for k, v in tokenizer_metadata(speaker.folder, pre).items()}


def test_the_digits_of_smollm_are_split(tiny_of: Callable[[str], Speaker]) -> None:
    """transformers' own reading has GPT-2's split alone and gives other ids."""
    speaker = tiny_of("llama")
    header = header_with(byte_level_values(speaker, "smollm"))
    ours = build_tokenizer(header, "w")
    reference = Tokenizer.from_file(str(speaker.folder / "tokenizer.json"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = Tokenizer.from_str(reference.to_str())
    plain.pre_tokenizer = byte_level
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    texts = ["  12", "    return 3 + 456", "a  1", "ปี 2567", *TEXTS]
    for text in texts:
        assert (
            ours.encode(text, add_special_tokens=False).ids
            == reference.encode(text, add_special_tokens=False).ids
        ), text
    assert any(
        plain.encode(text).tokens != ours.encode(text, add_special_tokens=False).tokens
        for text in texts
    )


@pytest.mark.parametrize("pre", SPLIT_RULES)
def test_every_known_pre_tokenizer_keeps_each_byte(
    pre: str, tiny_of: Callable[[str], Speaker]
) -> None:
    header = header_with(byte_level_values(tiny_of("llama"), pre))
    tokenizer = build_tokenizer(header, "w")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("pre", "message"),
    [
        ("viking", "names the pre-tokenizer 'viking'"),
        ("default", "names the pre-tokenizer 'default'"),
        (None, "names no pre-tokenizer"),
    ],
)
def test_an_unknown_pre_tokenizer_needs_a_tokenizer(
    pre: str | None, message: str, write: Write, tiny_of: Callable[[str], Speaker]
) -> None:
    path = write(more={"tokenizer.ggml.pre": pre})
    with pytest.raises(DataError, match=message) as caught:
        load_renderer(str(path))
    assert "`tokenizer: FOLDER`" in caught.value.remedy
    speaker = tiny_of("llama")
    source = ModelSource(str(path), tokenizer=str(speaker.folder))
    renderer = load_renderer(source, "w")
    assert renderer.digest == speaker.renderer.digest
    assert load_model(source, renderer, "w") is not None
    assert eos_token_ids(source, "w") == (renderer.vocabulary.control_token_ids["<|eot_id|>"],)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(speaker.folder / name, path.parent)
    beside = ModelSource(str(path.parent))
    assert load_renderer(beside, "w").digest == speaker.renderer.digest
    load_student(beside, renderer, None, 0).save(path.parent / "student")
    assert load_renderer(str(path.parent / "student")).digest == speaker.renderer.digest


def test_a_student_is_saved_with_the_files_tokenizer(write: Write, tmp_path: Path) -> None:
    source = ModelSource(str(write("qwen")))
    assert loadable_name(source.model, "w") == str(gguf_model.model_folder(Path(source.model), "w"))
    assert loadable_name("Qwen/Qwen3-8B", "w") == "Qwen/Qwen3-8B"
    renderer = load_renderer(source, "w")
    load_student(source, renderer, None, 0).save(tmp_path / "student")
    assert load_renderer(str(tmp_path / "student")).digest == renderer.digest


def test_a_kept_folder_is_made_by_one_process_at_a_time(write: Write, tmp_path: Path) -> None:
    """Two processes that open a file at once make one folder, and neither fails."""
    path = write()
    code = f"from persea.models.loading import *; print(load_renderer({str(path)!r}).digest)"
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    ]
    digests = {child.communicate()[0] for child in children}
    assert digests == {load_renderer(str(path)).digest.encode() + b"\n"}


def test_another_models_tokenizer_is_refused(
    write: Write, tiny_of: Callable[[str], Speaker]
) -> None:
    source = ModelSource(str(write()), tokenizer=str(tiny_of("qwen").folder))
    with pytest.raises(DataError, match=r"token \d+ of x\.gguf is .* in its tokenizer it is"):
        load_renderer(source, "w")


def test_a_tokenizer_with_a_control_token_more_fits(
    write: Write, tiny_of: Callable[[str], Speaker], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_of("llama").folder, tmp_path / "more"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    source = ModelSource(str(write()), tokenizer=str(folder))
    assert "<image_soft_token>" in load_renderer(source, "w").vocabulary.control_token_ids
    tokenizer.add_tokens(["a word"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match="1 tokens beyond"):
        load_renderer(source, "w")


def test_padding_entries_are_no_tokens(tiny_of: Callable[[str], Speaker]) -> None:
    values = byte_level_values(tiny_of("qwen"), "qwen2")
    size = len(values["tokenizer.ggml.tokens"])
    values["tokenizer.ggml.tokens"] += ["[PAD1]", "[PAD2]"]
    values["tokenizer.ggml.token_type"] += [5, 5]
    header = header_with(values)
    tokenizer = build_tokenizer(header, "w")
    assert tokenizer.get_vocab_size() == size
    assert tokenizer.encode("[PAD1]").tokens != ["[PAD1]"]


def test_sentencepiece_puts_a_space_first_where_the_file_says_so(
    tiny_of: Callable[[str], Speaker],
) -> None:
    values = byte_level_values(tiny_of("gemma"), "")
    pieces = {}
    for prefix in (True, False):
        header = header_with(values | {"tokenizer.ggml.add_space_prefix": prefix})
        tokenizer = build_tokenizer(header, "w")
        pieces[prefix] = "".join(tokenizer.encode("  hi", add_special_tokens=False).tokens)
        assert tokenizer.decode(tokenizer.encode("  hi").ids) == "  hi"
    assert pieces == {True: "▁▁▁hi", False: "▁▁hi"}


def test_bos_and_stop_tokens_are_those_of_the_file(
    tiny_of: Callable[[str], Speaker], write: Write
) -> None:
    controls = tiny_of("llama").renderer.vocabulary.control_token_ids
    bos, end, turn = (controls[f"<|{n}|>"] for n in ("begin_of_text", "end_of_text", "eot_id"))
    more = {
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.eot_token_id": turn,
        "tokenizer.ggml.add_bos_token": None,  # llama.cpp adds it for llama-bpe
        "tokenizer.chat_template.tool_use": "x",
    }
    source = ModelSource(str(write(more=more)))
    folder = gguf_model.model_folder(Path(source.model), "w")
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tuple(stops) == eos_token_ids(source, "w") == (end, turn)
    renderer = load_renderer(source, "w")
    assert renderer.vocabulary.backend.encode("Hi").ids[0] == bos
    assert "left out: tool_use" in model_warnings(source, renderer, "w")


def test_a_base_model_is_told_apart(write: Write) -> None:
    path = write(more={"tokenizer.chat_template": None})
    assert load_renderer(str(path)).is_text
    assert "no chat template" in gguf_model.gguf_note(path, "w")


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "pre"),
    [("gpt2", "gpt-2"), ("qwen3", "qwen2")],
)
def test_real_tokenizers_survive(folder: str, pre: str, data: Path) -> None:
    """Forty lines in each language: token for token."""
    values = byte_level_values(SimpleNamespace(folder=data / "tokenizers" / folder), pre)
    header = header_with(values)
    ours = build_tokenizer(header, "w")
    reference = Tokenizer.from_file(str(data / "tokenizers" / folder / "tokenizer.json"))
    files = sorted((data / "parallel").rglob("*.txt"))
    assert files
    for file in files:
        lines = unicodedata.normalize("NFC", file.read_text()).splitlines()[:40]
        for a, b in zip(
            ours.encode_batch(lines, add_special_tokens=False),
            reference.encode_batch(lines, add_special_tokens=False),
            strict=True,
        ):
            assert a.ids == b.ids


# ---- who it is -----------------------------------------------------------------------------------


def test_the_origin_names_digest_quantisation_and_licence(write: Write) -> None:
    path = write(kind=Q.Q8_0, more={"general.license": "apache-2.0", "general.name": "Tiny"})
    origin = gguf_origin(ModelSource(str(path)), "w")
    assert origin is not None
    assert origin["licence"] == "apache-2.0" and origin["name"] == "Tiny"
    assert set(origin["quantization"]) == {"Q8_0", "F32"}
    assert origin["sha256"] == gguf_model.gguf_digest(path)
    assert gguf_origin(ModelSource(str(ROOT / "saplings" / "qwen-sapling")), "w") is None
    assert read_header(write(name="y.gguf"), "w").licence == "unknown"
    assert model_name(str(path)) == "x.gguf" and model_name("a/b") == "a/b"


def test_a_fingerprint_is_that_of_the_content(write: Write) -> None:
    path = write()
    source = ModelSource(str(path))
    first = fingerprint(source, "w")
    assert fingerprint(ModelSource(str(path), quantize="8bit"), "w") != first
    assert fingerprint(ModelSource(str(path), precision="bfloat16"), "w") != first
    write(more={"general.name": "another"})
    assert fingerprint(source, "w") != first
