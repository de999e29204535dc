"""A tiktoken file is opened with its own model's split pattern, and no code of it is run."""

from __future__ import annotations

import base64
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from persea.chat.messages import Conversation
from persea.errors import DataError
from persea.models.identity import fingerprint
from persea.models.loading import ModelSource, load_renderer
from persea.models.tokenizer_files import copy_tokenizer_files
from persea.tokenization.vocabulary import CHAR_TO_BYTE
from tests.tokenization.traits import CORPUS, TEMPLATES, byte_level_bpe

# Kimi's first branch: Chinese characters are words of their own.
PATTERN = "|".join(
    [r"""[\p{Han}]+""", r"""[^\r\n\p{L}\p{N}]?\p{L}+""", r"""\p{N}{1,3}""", r"\s+|."]
)
CODE = '''
raise SystemExit("never run")
class TikTokenTokenizer:
    pat_str = "|".join(
        [r"""[\\p{Han}]+""", r"""[^\\r\\n\\p{L}\\p{N}]?\\p{L}+""", r"""\\p{N}{1,3}""", r"\\s+|."]
    )
'''
END, ASSISTANT, USER = "<|end|>", "<|assistant|>", "<|user|>"


def reference() -> Tokenizer:
    """The same vocabulary as a byte-level BPE with merges."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "你好x世界 x你好 好x"], trainer)
    return tokenizer


def kimi_folder(folder: Path, code: str = CODE) -> tuple[Path, Tokenizer]:
    tokenizer = reference()
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [
        base64.b64encode(bytes(CHAR_TO_BYTE[c] for c in token)).decode() + f" {i}"
        for token, i in ids
    ]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    (folder / "tokenization_kimi.py").write_text(code)
    (folder / "chat_template.jinja").write_text(TEMPLATES["bare"])
    added = {str(len(ids) + k): {"content": c} for k, c in ((0, "<s>"), (1, USER), (3, END))}
    added[str(len(ids) + 4)] = {"content": ASSISTANT}
    config = {
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "eos_token": END,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, tokenizer


def test_a_tiktoken_file_has_the_pattern_of_its_own_code(tmp_path: Path):
    folder, expected = kimi_folder(tmp_path)
    renderer = load_renderer(str(folder))
    vocabulary, size = renderer.vocabulary, expected.get_vocab_size()
    assert vocabulary.control_token_ids[END] == size + 3
    assert len(vocabulary) == size + 5
    for text in ("你好x世界 the cat", "x你好", " 12345 hello, world!\n"):
        assert vocabulary.encode(text) == expected.encode(text).ids
    tokens = renderer.render_prompt(Conversation.from_question("你好"))
    assert tokens.ids_T.tolist()[-1] == vocabulary.control_token_ids[ASSISTANT]


def test_without_a_pattern_it_is_refused(tmp_path: Path):
    folder, _ = kimi_folder(tmp_path, "pattern = make_pattern()")
    with pytest.raises(DataError, match="no split patterns") as caught:
        load_renderer(str(folder), "teacher")
    assert caught.value.where == "teacher" and "tokenization_*.py" in caught.value.remedy


@pytest.mark.parametrize("damage", [b"not base64 at all\n", b"YQ== 7\n"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: bytes):
    folder, _ = kimi_folder(tmp_path)
    with (folder / "tiktoken.model").open("ab") as file:
        file.write(damage)
    with pytest.raises(DataError, match=r"tiktoken\.model is"):
        load_renderer(str(folder))


def test_vocabulary_and_merges_without_a_tokenizer_json_open(tmp_path: Path):
    """The files of a slow tokenizer: GPT-2's or Qwen's class."""
    tokenizer = byte_level_bpe()
    spec = json.loads(tokenizer.to_str())
    merges = "\n".join(" ".join(pair) for pair in spec["model"]["merges"])
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "chat_template.jinja").write_text(TEMPLATES["bare"])
    added = {str(t.pop("id")): t for t in spec["added_tokens"]}
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    renderer = load_renderer(str(folder))
    assert renderer.vocabulary.encode("the cat 你好") == tokenizer.encode("the cat 你好").ids
    before = fingerprint(ModelSource(str(folder)), "")
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_tokenizer_files(folder, copy)
    assert load_renderer(str(copy)).vocabulary.digest == renderer.vocabulary.digest
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\nx x\n")
    assert fingerprint(ModelSource(str(folder)), "") != before


def tekken(folder: Path) -> tuple[Path, Tokenizer]:
    """A tekken.json of the reference vocabulary, which mistral-common lays out."""
    tokenizer = reference()
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    vocab = [
        {
            "rank": i,
            "token_bytes": base64.b64encode(bytes(CHAR_TO_BYTE[c] for c in token)).decode(),
            "token_str": None,
        }
        for token, i in ids
    ]
    names = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
    special = [{"rank": k, "token_str": n, "is_control": True} for k, n in enumerate(names)]
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + len(names),
        "default_num_special_tokens": len(names),
        "version": "v7",
    }
    (folder / "tekken.json").write_text(
        json.dumps({"config": config, "vocab": vocab, "special_tokens": special})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATES["bare"])
    return folder, tokenizer


def test_tekken_json_opens(tmp_path: Path):
    folder, expected = tekken(tmp_path)
    vocabulary = load_renderer(str(folder)).vocabulary
    shift = len(vocabulary) - expected.get_vocab_size()
    ids = expected.encode("你好x世界 the cat").ids
    assert vocabulary.encode("你好x世界 the cat") == [i + shift for i in ids]


@pytest.mark.skipif(find_spec("mistral_common") is not None, reason="mistral-common is installed")
def test_a_first_tekken_names_its_package(tmp_path: Path):
    """Mistral's first tekken.json lists no control tokens."""
    folder, _ = tekken(tmp_path)
    content = json.loads((folder / "tekken.json").read_text())
    del content["special_tokens"]
    (folder / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="lists no control tokens") as caught:
        load_renderer(str(folder))
    assert "pip install mistral-common" in caught.value.remedy


def test_a_sentencepiece_model_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs the package sentencepiece") as caught:
        load_renderer(str(tmp_path))
    assert "persea[sentencepiece]" in caught.value.remedy
