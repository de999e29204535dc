"""A longer model: old rows and logits bit for bit, new rows the means of their pieces', a folder
that everything opens, or one line why not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from persea import storage as store
from persea.alignment.event_map import load_event_map
from persea.errors import DataError, PerseaError, RefusedError, StorageError
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.models.random_init import random_init
from persea.tokenization.vocabulary import load_vocabulary
from persea.training.student import load_student
from persea.vocab_extension import resize_model as longer
from persea.vocab_extension.learn_merges import old_ids_of_new_tokens
from persea.vocab_extension.resize_model import (
    VocabExtension,
    extend_vocabulary,
    initialize_new_embeddings,
    load_in_stored_dtype,
    write_extended_model,
)
from tests.cli.test_cli import Ended, persea, recipe

ROOT = Path(__file__).resolve().parents[2]
SAPLINGS = ROOT / "saplings"
KHMER = [
    "មនុស្សទាំងអស់កើតមកមានសេរីភាព និងភាពស្មើគ្នា",
    "ในประเทศไทยมีคนจำนวนมาก",
    "the quick brown fox",
    "def f(x): return x",
]
TEXT = "មនុស្សទាំងអស់ quick ประเทศไทย"


def quiet(stage: str, share: float, words: str) -> None:
    pass


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "km.txt"
    path.write_text("".join(f"{k} {KHMER[k % 4]}\n" for k in range(60)), encoding="utf-8")
    return str(path)


@pytest.fixture(params=["llama", "qwen", "gpt-oss"])
def sapling(request: pytest.FixtureRequest) -> Path:
    return SAPLINGS / f"{request.param}-sapling"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A model folder that a test may break."""
    return Path(shutil.copytree(SAPLINGS / "llama-sapling", tmp_path / "copy"))


def made(model: Path, texts: str, out: Path, tokens: int = 40) -> VocabExtension:
    extension = extend_vocabulary(ModelSource(str(model)), [texts], tokens, quiet)
    write_extended_model(extension, out, quiet)
    return extension


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            torch.tensor([ids])
        ).logits[0]


def test_a_sapling_is_extended_and_everything_opens_it(sapling: Path, texts: str, tmp_path: Path):
    out = tmp_path / "deep" / "longer"
    extension = made(sapling, texts, out)
    old, new = (
        load_renderer(ModelSource(str(sapling)), "old"),
        load_renderer(ModelSource(str(out)), "new"),
    )
    size = len(old.vocabulary)
    assert (
        len(new.vocabulary) == size + 40
        and new.family.name == old.family.name
        and new.stop_ids == old.stop_ids
    )
    assert (
        new.vocabulary.control_token_ids == old.vocabulary.control_token_ids
        and new.vocabulary.bytes_W[:size] == old.vocabulary.bytes_W
    )
    assert len(new.vocabulary.encode(TEXT)) < 0.7 * len(old.vocabulary.encode(TEXT))

    # every weight as it was, type and all; new rows in place; the head tied where it was
    stored, now = load_file(sapling / "model.safetensors"), load_file(out / "model.safetensors")
    assert stored.keys() == now.keys() and {k: v.dtype for k, v in stored.items()} == {
        k: v.dtype for k, v in now.items()
    }
    for name, tensor in stored.items():
        assert torch.equal(now[name][: len(tensor)], tensor)
        assert now[name].shape == (
            tensor.shape
            if "embed_tokens" not in name
            else (extension.num_embedding_rows[1], tensor.shape[1])
        )
    rows = now["model.embed_tokens.weight"]
    assert sorted(extension.old_ids_by_new_id) == list(range(size, size + 40))
    for i, ids in extension.old_ids_by_new_id.items():
        assert old.vocabulary.decode(ids) == new.vocabulary.bytes_W[i]
        assert torch.equal(rows[i], rows[list(ids)].float().mean(0).to(rows.dtype))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (sapling, out))
    assert after == before | {"vocab_size": extension.num_embedding_rows[1]}
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (sapling / name).read_bytes()

    # transformers' own classes, persea's, and a student that can be trained
    assert AutoTokenizer.from_pretrained(out)(TEXT, add_special_tokens=False)[
        "input_ids"
    ] == new.vocabulary.encode(TEXT)
    ids = old.vocabulary.encode(TEXT)
    assert torch.equal(logits(out, ids)[:, :size], logits(sapling, ids)[:, :size])
    assert (
        load_model(ModelSource(str(out)), new, "new").config.vocab_size
        == extension.num_embedding_rows[1]
    )
    assert len(load_student(ModelSource(str(out)), new, None).renderer.vocabulary) == size + 40


def test_a_bridge_to_another_family_is_built_for_it(texts: str, tmp_path: Path):
    made(SAPLINGS / "llama-sapling", texts, tmp_path / "longer")
    teacher, *students = (
        load_renderer(ModelSource(str(folder)), folder.name)
        for folder in (SAPLINGS / "gemma-sapling", SAPLINGS / "llama-sapling", tmp_path / "longer")
    )
    plain, bridge = (load_event_map(teacher, student) for student in students)
    assert len(bridge.student_event_V) == len(plain.student_event_V) + 40
    assert bridge.digest != plain.digest and bridge.student_mask and bridge.teacher_mask


def test_padded_rows_are_taken_before_new_ones_are_made(copy: Path, texts: str, tmp_path: Path):
    """Qwen3 has 151,936 rows for 151,669 tokens: an extension by fewer leaves all shapes."""
    tokenizer = load_vocabulary(Tokenizer.from_file(str(copy / "tokenizer.json")), "old")
    random_init(
        "llama", len(tokenizer) + 30, {"hidden": 16, "layers": 1, "heads": 2}
    ).save_pretrained(copy)
    for tokens, rows in ((20, 2030), (40, 2040)):
        extension = made(copy, texts, tmp_path / str(tokens), tokens)
        assert extension.num_embedding_rows == (2030, rows)
        weights = load_file(tmp_path / str(tokens) / "model.safetensors")[
            "model.embed_tokens.weight"
        ]
        assert len(weights) == rows and torch.equal(
            weights[2005], weights[list(extension.old_ids_by_new_id[2005])].float().mean(0)
        )
        assert (
            json.loads((tmp_path / str(tokens) / "config.json").read_text())["vocab_size"] == rows
        )


def test_an_untied_head_and_its_bias_get_rows_too(copy: Path, texts: str, tmp_path: Path):
    config = PhiConfig(
        vocab_size=2000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(copy)
    before = load_file(copy / "model.safetensors")
    before["lm_head.bias"] = torch.randn(2000).half()
    save_file(before, copy / "model.safetensors", {"format": "pt"})
    extension = made(copy, texts, tmp_path / "longer", 20)
    after = load_file(tmp_path / "longer" / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], before["model.embed_tokens.weight"])
    for name in ("lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"):
        assert (
            torch.equal(after[name][:2000], before[name])
            and len(after[name]) == 2020
            and after[name].dtype == torch.float16
        )
        assert all(
            torch.equal(after[name][i], before[name][list(ids)].float().mean(0).half())
            for i, ids in extension.old_ids_by_new_id.items()
        )


@pytest.mark.realdata
def test_a_sprout_on_the_real_llama_tokenizer(data: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(data / "tokenizers" / "llama3", model)
    random_init("llama", 128_256, {"hidden": 8, "layers": 1, "heads": 1}).save_pretrained(model)
    out = tmp_path / "longer"
    extension = made(model, str(data / "parallel" / "ntrex.khm.txt"), out, 64)
    tokenizer = AutoTokenizer.from_pretrained(out)
    known = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab(with_added_tokens=True)
    assert known.items() <= tokenizer.get_vocab().items() and len(tokenizer) == 128_256 + 64
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        128_000,
        128_009,
        128_004,
    )
    assert (
        extension.num_embedding_rows == (128_256, 128_320)
        and min(extension.old_ids_by_new_id) == 128_256
    )
    told = extension.to_json()["texts"][0]
    assert told["bytes_per_token_after"] > 1.3 * told["bytes_per_token_before"]
    ids = [128_000, *extension.old_vocabulary.encode("ប្រទេសកម្ពុជា is a country")]
    assert torch.equal(logits(out, ids)[:, :128_256], logits(model, ids))


# ---- what it cannot do right ---------------------------------------------------------------------


def changed(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    "quantised", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "mxfp4"}]
)
def test_quantised_weights_are_refused(copy: Path, texts: str, quantised: dict[str, Any]):
    changed(copy, quantization_config=quantised)
    with pytest.raises(RefusedError, match="its weights are quantized"):
        extend_vocabulary(ModelSource(str(copy)), [texts], 9, quiet)


@pytest.mark.parametrize("way", ["one in another type", "one more", "all in eight bits"])
def test_weights_that_transformers_reads_otherwise_are_refused(copy: Path, way: str):
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if way == "one more":
        weights["model.extra.weight"] = weights[name].clone()
    elif way == "one in another type":
        weights[name] = weights[name].float()
    else:
        weights = {k: w.to(torch.float8_e4m3fn) for k, w in weights.items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(RefusedError, match=r"does not load \d+ of its weights as they are stored"):
        load_in_stored_dtype(ModelSource(str(copy)), "here")


@pytest.mark.parametrize(
    ("way", "message"),
    [("one missing", "the files lack"), ("one more", "by its configuration the model has no")],
)
def test_weights_that_are_not_those_of_the_configuration_are_refused(
    copy: Path, way: str, message: str
):
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if way == "one missing":
        del weights[name]
    else:
        weights["model.layers.99.mlp.up_proj.weight"] = weights[name].clone()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=message):
        load_in_stored_dtype(ModelSource(str(copy)), "here")


def test_weights_stay_in_the_type_they_are_stored_in_whatever_the_configuration_says(copy: Path):
    weights = {k: w.float() for k, w in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert json.loads((copy / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in load_in_stored_dtype(ModelSource(str(copy)), "here").parameters()} == {
        torch.float32
    }
    (copy / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot read its weights"):
        load_in_stored_dtype(ModelSource(str(copy)), "here")


def test_an_id_that_only_the_configuration_names_is_not_given_away(copy: Path, texts: str):
    random_init("llama", 2064, {"hidden": 16, "layers": 1, "heads": 2}).save_pretrained(copy)
    changed(copy, image_token_id=2010, sep_token_id=70_000)
    assert (
        min(extend_vocabulary(ModelSource(str(copy)), [texts], 9, quiet).old_ids_by_new_id) == 2011
    )


def test_pieces_are_what_the_tokenizer_before_makes_of_a_token(texts: str):
    extension = extend_vocabulary(ModelSource(str(SAPLINGS / "llama-sapling")), [texts], 9, quiet)
    after = Tokenizer.from_str(json.dumps(extension.tokenizer_spec))
    assert (
        dict(extension.old_ids_by_new_id)
        == old_ids_of_new_tokens(extension.old_vocabulary.backend, after)
        and len(extension.merges) == 9
    )
    model = AutoModelForCausalLM.from_pretrained(SAPLINGS / "llama-sapling")
    initialize_new_embeddings(model, extension.old_ids_by_new_id)
    assert model.lm_head.weight is model.get_input_embeddings().weight


# ---- whole, or not at all ------------------------------------------------------------------------


def test_a_tokenizer_that_comes_back_another_is_not_published(
    copy: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A class of transformers may make its own of the file."""
    extension = extend_vocabulary(ModelSource(str(copy)), [texts], 9, quiet)
    monkeypatch.setattr(
        longer, "load_tokenizer", lambda source, where: AutoTokenizer.from_pretrained(copy)
    )
    with pytest.raises(RefusedError, match="read back, differs from the written one"):
        write_extended_model(extension, tmp_path / "out", quiet)
    assert sorted(os.listdir(tmp_path)) == ["copy"]


@pytest.mark.parametrize("breaks", ["copy_tokenizer_files", "refuse_changed_tokens", "fingerprint"])
def test_nothing_is_left_of_a_folder_that_was_not_finished(
    copy: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
):
    extension = extend_vocabulary(ModelSource(str(copy)), [texts], 9, quiet)

    def full(*_: object) -> None:
        raise (
            OSError(28, "No space left on device")
            if breaks == "copy_tokenizer_files"
            else RefusedError("broken", where="here")
        )

    monkeypatch.setattr(longer, breaks, full)
    with pytest.raises(StorageError if breaks == "copy_tokenizer_files" else RefusedError):
        write_extended_model(extension, tmp_path / "out", quiet)
    assert sorted(os.listdir(tmp_path)) == ["copy"]


# ---- as a person types it ------------------------------------------------------------------------


@pytest.fixture
def run(texts: str, tmp_path: Path) -> Callable[..., Ended]:
    return lambda *arguments, model=SAPLINGS / "llama-sapling", file=texts, options=(): persea(
        "extend", model, "--texts", file, *arguments, *options, folder=tmp_path
    )


def test_the_verb_tells_what_it_does_and_a_recipe_names_what_it_wrote(
    run: Callable[..., Ended], texts: str, tmp_path: Path
):
    dry = run("--tokens", 40, "--dry-run")
    assert (
        dry.code == 0
        and "nothing is written" in dry.out
        and "40 new tokens, from id 2,000 on; embedding rows: 2,000 -> 2,040" in dry.out
    )
    assert not list(tmp_path.iterdir()) and "learn 100% 40 tokens" in dry.err
    ended = run("--tokens", 40, "--out", "student", "--json")
    told = json.loads(ended.out)
    assert ended.code == 0 and (
        told["tokens"],
        told["num_requested"],
        told["out"],
        told["rows_after"],
    ) == (
        40,
        40,
        "student",
        2040,
    )
    (told_of,) = told["texts"]
    assert "km.txt" in dry.out and told["model"] == "llama-sapling"
    assert (told_of["file"], told_of["sha256"], told_of["lines"]) == (
        "km.txt",
        store.digest_file(Path(texts)),
        6,
    )
    record = json.loads((tmp_path / "student" / "extension.json").read_text())
    assert {k: told[k] for k in record if k != "fingerprint"} == {
        k: v for k, v in record.items() if k != "fingerprint"
    }
    named = recipe(tmp_path, student={"model": str(tmp_path / "student")})
    planned = persea("run", named, "--dry-run", folder=tmp_path)
    assert planned.code == 0, planned.err
    again = run("--tokens", 40, "--out", "student")
    assert again.code == 2 and again.err.splitlines()[-1].startswith(
        "persea: student: it exists already -> "
    )


def test_a_teacher_names_the_tokens_and_gives_the_rows(run: Callable[..., Ended], tmp_path: Path):
    teacher = SAPLINGS / "gemma-sapling"
    dry = run("--tokens", 40, "--dry-run", "--teacher", teacher, "--no-score")
    assert dry.code == 0, dry.err
    assert f"{teacher}'s, mapped by ridge over " in dry.out
    assert "is a token of the teacher" in dry.out and "words hold combining marks now" in dry.out
    ended = run("--tokens", 40, "--out", "student", "--teacher", teacher, "--no-score", "--json")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "student" / "extension.json").read_text())["teacher_rows"]
    assert (record["model"], record["method"], len(record["fingerprint"])) == (
        "gemma-sapling",
        "ridge",
        64,
    )
    old, new, of_teacher = (
        load_renderer(str(folder)).vocabulary
        for folder in (SAPLINGS / "llama-sapling", tmp_path / "student", teacher)
    )
    assert new.bytes_W[: len(old)] == old.bytes_W
    whole = [raw for raw in new.bytes_W[len(old) :] if raw and _is_text(raw)]
    longer_than_a_character = {raw for raw in whole if len(raw.decode()) > 1}
    assert longer_than_a_character and longer_than_a_character <= set(of_teacher.bytes_W)
    rows = load_file(tmp_path / "student" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.isfinite(rows.float()).all()
    assert record["mapped_tokens"] == len(whole)


def _is_text(raw: bytes) -> bool:
    try:
        return bool(raw.decode())
    except UnicodeDecodeError:
        return False


def test_a_teacher_fills_up_with_its_likely_tokens(run: Callable[..., Ended]):
    """`--score` reads the teacher's weights where the texts have too few pairs."""
    teacher = SAPLINGS / "gemma-sapling"
    found = {}
    for option in ("--no-score", "--score"):
        ended = run("--tokens", 300, "--dry-run", "--teacher", teacher, option)
        assert ended.code == 0, ended.err
        (found[option],) = map(int, re.findall(r"^(\d+) new tokens", ended.out, re.MULTILINE))
        assert ("score 100%" in ended.err) == (option == "--score")
    assert 300 >= found["--score"] > found["--no-score"]


def test_fewer_pairs_than_asked_for_are_told(run: Callable[..., Ended]):
    ended = run("--tokens", 5000, "--dry-run")
    assert ended.code == 0 and "of 5,000: no other pair occurs twice" in ended.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--tokens", 0, "--dry-run"), 2, "'--tokens': Input should be greater than or equal to 1"),
        (("--tokens", 9), 2, "no folder to write to"),
        (("--tokens", 9, "--out", f"{__file__}/x"), 2, "cannot write into"),
        (("--tokens", "many", "--dry-run"), 2, "'--tokens': Input should be a valid integer"),
        (("--dry-run",), 2, "Missing option '--tokens'"),
        (("--tokens", 9, "--dry-run", "--rows", "means"), 2, "--rows means needs a teacher"),
    ],
)
def test_usage_is_refused_in_one_line(
    run: Callable[..., Ended], arguments: tuple[object, ...], code: int, words: str
):
    ended = run(*arguments)
    assert (
        ended.code == code
        and words in ended.err
        and len(ended.err.splitlines()) == 1
        and ended.out == ""
    )


def test_what_cannot_be_used_is_refused_in_one_line(run: Callable[..., Ended], tmp_path: Path):
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"a\n\xff\n")
    os.mkfifo(tmp_path / "pipe")
    for code, words, asked in (
        (3, "pipe: not a file", {"file": "pipe"}),
        (4, "does not split text into words", {"model": SAPLINGS / "gemma-sapling"}),
        (3, "no model folder", {"model": "./none"}),
        (3, "./none: no model folder", {"options": ("--teacher", "./none")}),
        (3, "No such file", {"file": "none.txt"}),
        (3, "broken.txt:2: cannot read the text", {"file": broken}),
    ):
        ended = run("--tokens", 9, "--dry-run", **asked)
        said = [line for line in ended.err.splitlines() if line.startswith("persea: ")]
        assert (
            ended.code == code
            and len(said) == 1
            and words in said[0]
            and " -> " in said[0]
            and "Traceback" not in ended.err
        )


def test_texts_in_which_no_pair_is_seen_twice_are_refused(copy: Path, tmp_path: Path):
    (tmp_path / "once.txt").write_text(
        "".join(f"{word}\n" for word in ("a b c d e f g h i j k l m n").split())
    )
    with pytest.raises(PerseaError, match="no pair of neighbouring tokens occurs twice"):
        extend_vocabulary(ModelSource(str(copy)), [str(tmp_path / "once.txt")], 9, quiet)
