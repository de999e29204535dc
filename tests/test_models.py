"""Weights and voices come from folders without surprises: no code, no pickle, no vocabulary that does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, Speaker

from persea.chat import PINNED_DATE, Conversation, Text
from persea.errors import DataError
from persea.models import Source, fingerprint, local_folder, open_model, open_voice, sprout
from persea.voice import Voice

SIZES = {"hidden": 32, "layers": 1, "heads": 2, "seed": 1, "experts": 2}
RANDOM = tuple(SIZES.items())


@pytest.fixture(scope="module")
def llama(tiny_of, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Voice]:
    """A whole model folder: the tiny Llama tokenizer, and weights that fit it."""
    speaker = tiny_of("llama")
    folder = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(speaker.folder, folder)
    sprout("llama", len(speaker.voice.vocabulary), SIZES).save_pretrained(folder)
    return folder, speaker.voice


@pytest.fixture
def copy(llama: tuple[Path, Voice], tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(llama[0], tmp_path / "copy"))


# ---- where ---------------------------------------------------------------------------------------------------------


def test_what_is_a_folder_and_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    assert local_folder(str(tmp_path), "w") == tmp_path
    assert local_folder("here", "w") == Path("here")
    assert local_folder("./here", "w") == Path("here")
    assert local_folder("Qwen/Qwen3-8B", "w") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~/here", "w") == tmp_path / "here"


@pytest.mark.parametrize("reference", ["./none", "../none/x", "/none", "~/none", "none", "a/b/c", "file", "", "https://huggingface.co/Qwen/Qwen3-8B"])
def test_a_missing_folder_is_refused_and_not_looked_up(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    for call in (lambda: local_folder(reference, "teachers.a"), lambda: open_voice(Source(reference), "teachers.a")):
        with pytest.raises(DataError, match="no model folder") as caught:
            call()
        assert caught.value.where == "teachers.a"


def test_a_folder_below_home_is_opened(copy: Path, llama: tuple[Path, Voice], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert open_voice(Source("~/copy"), "w").vocabulary.digest == llama[1].vocabulary.digest
    assert open_model(Source("~/copy"), llama[1], "w").config.hidden_size == 32


def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line():
    with pytest.raises(DataError, match="no tokenizer in 'nobody/nothing'") as caught:
        open_voice(Source("nobody/nothing", revision="0" * 40), "teachers.a")
    assert "\n" not in str(caught.value)


# ---- voices --------------------------------------------------------------------------------------------------------


def test_a_voice_is_what_its_folder_says(tiny: Speaker):
    voice = open_voice(Source(str(tiny.folder)), "w")
    assert voice.digest == tiny.voice.digest
    assert voice.today == PINNED_DATE
    assert voice.template_text == (tiny.folder / "chat_template.jinja").read_text()
    assert open_voice(Source(str(tiny.folder)), "w", today=date(2026, 1, 1)).digest != voice.digest
    other = FAMILIES[FAMILIES.index(voice.family.name) - 1]
    assert open_voice(Source(str(tiny.folder), family=other), "w").family.name == other
    assert open_voice(Source("random", tokenizer=str(tiny.folder)), "w").digest == voice.digest


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no tokenizer in") as caught:
        open_voice(Source(str(tmp_path)), "w")
    assert "tokenizer.json" in caught.value.remedy


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {}}'])
def test_a_broken_tokenizer_is_refused(copy: Path, content: str):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="no tokenizer in"):
        open_voice(Source(str(copy)), "w")


def test_no_chat_template_is_refused(copy: Path):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template") as caught:
        open_voice(Source(str(copy)), "w")
    assert "chat_template.jinja" in caught.value.remedy


def test_several_chat_templates_are_refused(copy: Path):
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    with pytest.raises(DataError, match="several chat templates"):
        open_voice(Source(str(copy)), "w")


def test_a_chat_template_that_does_not_compile_is_refused(copy: Path):
    (copy / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(DataError, match="does not compile"):
        open_voice(Source(str(copy)), "w")


def test_an_unknown_family_is_refused(copy: Path):
    with pytest.raises(DataError, match="unknown family 'falcon'"):
        open_voice(Source(str(copy), family="falcon"), "w")


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sprout_of_each_family_runs(family: str, tiny_of):
    voice = tiny_of(family).voice
    tokens = voice.render(Conversation.ask("Hello").answered(Text("Hi")))
    source = Source("random", tokenizer=str(tiny_of(family).folder), sizes=RANDOM)
    model = open_model(source, voice, "w")
    assert not model.training
    assert model.config.model_type == {"llama": "llama", "qwen": "qwen3", "gemma": "gemma3_text", "gpt-oss": "gpt_oss"}[family]
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens.ids_T)[None].long()).logits
    assert logits.shape == (1, len(tokens), len(voice.vocabulary))
    assert torch.isfinite(logits).all()
    again, other = (sprout(family, len(voice.vocabulary), SIZES | {"seed": s}) for s in (1, 2))
    first = model.get_input_embeddings().weight
    assert torch.equal(first, again.get_input_embeddings().weight)
    assert not torch.equal(first, other.get_input_embeddings().weight)


def test_a_sprout_of_an_unknown_family_is_refused():
    with pytest.raises(DataError, match="no small architecture known for family 'falcon'"):
        sprout("falcon", 100, SIZES)


def test_weights_come_back_as_they_were_saved(llama: tuple[Path, Voice]):
    folder, voice = llama
    model = open_model(Source(str(folder)), voice, "w")
    assert not model.training
    for ours, saved in zip(model.parameters(), sprout("llama", len(voice.vocabulary), SIZES).parameters(), strict=True):
        assert torch.equal(ours.cpu(), saved)


def test_too_few_logits_are_refused(copy: Path, llama: tuple[Path, Voice]):
    voice = llama[1]
    sprout("llama", len(voice.vocabulary) - 1, SIZES).save_pretrained(copy)
    with pytest.raises(DataError, match=f"{len(voice.vocabulary) - 1} logits for a vocabulary of {len(voice.vocabulary)} tokens"):
        open_model(Source(str(copy)), voice, "w")
    sprout("llama", len(voice.vocabulary) + 27, SIZES).save_pretrained(copy)  # a padded matrix is usual
    assert open_model(Source(str(copy)), voice, "w").config.vocab_size == len(voice.vocabulary) + 27


def test_pickled_weights_are_refused(copy: Path, llama: tuple[Path, Voice]):
    (copy / "model.safetensors").unlink()
    torch.save(sprout("llama", len(llama[1].vocabulary), SIZES).state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot load"):
        open_model(Source(str(copy)), llama[1], "w")


def test_cut_weights_are_refused(copy: Path, llama: tuple[Path, Voice]):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DataError, match="cannot load"):
        open_model(Source(str(copy)), llama[1], "w")


@pytest.mark.parametrize("content", [None, "", "{", "\ud800".encode("utf-8", "surrogatepass"), "3", "[]", "null"])
def test_a_missing_or_broken_config_is_refused(copy: Path, llama: tuple[Path, Voice], content: str | bytes | None):
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"config\.json|cannot load"):
        open_model(Source(str(copy)), llama[1], "w")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_brings_its_own_code_is_refused_unread(copy: Path, llama: tuple[Path, Voice], file: str):
    """The code would leave a mark; the known classes stand beside it, so that only our own refusal can stop it."""
    mark = copy / "ran"
    (copy / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    config = json.loads((copy / file).read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Slow", "own.Fast"]}
    (copy / file).write_text(json.dumps(config))
    calls = [lambda: open_voice(Source(str(copy)), "w")]
    if file == "config.json":
        calls.append(lambda: open_model(Source(str(copy)), llama[1], "w"))
    for call in calls:
        with pytest.raises(DataError, match="brings its own code"):
            call()
    assert not mark.exists()


# ---- fingerprints --------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_any_byte(copy: Path):
    source = Source(str(copy))
    before = fingerprint(source, "w")
    assert fingerprint(source, "w") == before
    places = (("model.safetensors", -1), ("model.safetensors", 9), ("config.json", 3), ("tokenizer.json", 50), ("chat_template.jinja", 0))
    for name, at in places:
        whole = (copy / name).read_bytes()
        broken = bytearray(whole)
        broken[at] ^= 1
        (copy / name).write_bytes(broken)
        assert fingerprint(source, "w") != before, name
        (copy / name).write_bytes(whole)
    assert fingerprint(source, "w") == before
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    assert fingerprint(source, "w") != before


def test_a_fingerprint_does_not_depend_on_the_place(copy: Path, llama: tuple[Path, Voice]):
    assert fingerprint(Source(str(copy)), "w") == fingerprint(Source(str(llama[0])), "w")


def test_fingerprints_of_what_is_not_here():
    hub, sprouted = Source("Qwen/Qwen3-8B", revision="a" * 40), Source("random", tokenizer="x/y", sizes=RANDOM)
    variants = [hub, replace(hub, revision="b" * 40), replace(hub, model="Qwen/Qwen3-4B"), sprouted, replace(sprouted, sizes=RANDOM[1:]),
                replace(sprouted, tokenizer="x/z")]
    assert len({fingerprint(s, "w") for s in variants}) == len(variants)
    with pytest.raises(DataError, match="no model folder"):
        fingerprint(Source("./none"), "w")
