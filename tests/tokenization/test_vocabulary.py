"""Every token is its bytes or a control token, and no text becomes a control token."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from persea.errors import DataError
from persea.tokenization.vocabulary import (
    BYTE_TO_CHAR,
    CHAR_TO_BYTE,
    ROUND_TRIP_PROBES,
    Vocabulary,
    load_vocabulary,
)
from tests.conftest import REAL, Speaker
from tests.tokenization.traits import unigram

TRAINING = [
    "the cat sat on the mat",
    "hello, hello world",
    "def f(x):\n    return x\n",
    "xin chào thế giới",
    "你好世界 你好",
] * 3
LANGUAGES = (
    "eng",
    "fil",
    "hmn",
    "ind",
    "jpn",
    "khm",
    "kor",
    "lao",
    "msa",
    "mya",
    "tha",
    "vie",
    "yue",
    "zho-CN",
    "zho-TW",
)
# what notes/data.md counts: text tokens, distinct byte strings, tokens that are not valid UTF-8
BYTE_PROPERTIES = {
    "qwen3": (151_643, 151_643, 1_448),
    "gemma3": (262_136, 262_026, 128),
    "gpt-oss": (199_998, 199_998, 1_562),
    "llama3": (128_000, 128_000, 1_352),
    "gpt2": (50_256, 50_256, None),
}
REFERENCE = {
    "llama3": "llama32",
    "gemma3": "gemma3",
    "gpt-oss": "gpt_oss",
    "gpt2": "gpt2",
}  # ids made by another program

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60)
FRAGMENTS = [
    "cat",
    "  ",
    "\n",
    "\t",
    "你好",
    "ไทย",
    "မြန်မာ",
    "한국어",
    "👩‍👩‍👧",
    "é",
    "\u200b",
    "1234",
    "<0x41>",
    "\x00",
    "Ġ",
]
scripts = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
any_text = st.one_of(texts, scripts).map(lambda t: unicodedata.normalize("NFC", t))


def byte_level(
    *, normalizer: object = None, prefix: bool = False, alphabet: bool = True
) -> Tokenizer:
    """A tiny byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    symbols = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=symbols, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def sentencepiece(*, fallback: bool = True) -> Tokenizer:
    """A tiny SentencePiece-style BPE in Gemma's form."""
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)] if fallback else []
    tokenizer = Tokenizer(models.BPE(byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<eos>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in ("<unk>", "<eos>")]
    return Tokenizer.from_str(json.dumps(spec))


@pytest.fixture(
    scope="module", params=[byte_level, sentencepiece], ids=["byte-level", "sentencepiece"]
)
def small(request: pytest.FixtureRequest) -> Vocabulary:
    return load_vocabulary(request.param(), request.param.__name__)


def test_the_byte_alphabet_is_gpt2s():
    assert bytes_to_unicode() == BYTE_TO_CHAR
    assert {CHAR_TO_BYTE[c] for c in BYTE_TO_CHAR.values()} == set(range(256))


@given(text=any_text)
def test_round_trip(small: Vocabulary, text: str):
    ids = small.encode(text)
    assert small.decode(ids) == text.encode()
    assert small.encode_batch([text, "", text]) == [ids, [], ids]
    assert small.decode_pieces(ids) == ((text.encode(),) if text else ())
    assert small.lengths_W[ids].sum() == len(text.encode())


@given(text=any_text)
def test_round_trip_of_the_families(tiny: Speaker, text: str):
    vocabulary = tiny.renderer.vocabulary
    assert vocabulary.decode(vocabulary.encode(text)) == text.encode()


def test_byte_strings_token_by_token(tiny: Speaker):
    vocabulary = tiny.renderer.vocabulary
    assert vocabulary.byte_level == (tiny.renderer.family.name != "gemma")
    table = {c: b for b, c in bytes_to_unicode().items()}
    singles = set()
    for token, i in tiny.tokenizer.get_vocab().items():
        got = vocabulary.bytes_W[i]
        if token in vocabulary.control_token_ids:
            assert got is None
        elif vocabulary.byte_level:
            assert got == bytes(table[c] for c in token)
        elif token.startswith("<0x"):
            assert got == bytes([int(token[3:5], 16)])
        else:
            assert got == token.replace("▁", " ").encode()
        singles |= {got} if got is not None and len(got) == 1 else set()
    assert len(singles) == 256
    assert (vocabulary.lengths_W == [len(b or b"") for b in vocabulary.bytes_W]).all()


@pytest.mark.parametrize("text", ["ဪ", "𓀀", "ៜ", "🦚"])
def test_split_characters(small: Vocabulary, text: str):
    ids = small.encode(text)
    assert len(ids) > 1, "the tiny vocabularies have no token for this character"
    with pytest.raises(UnicodeDecodeError):
        small.decode(ids[:1]).decode()
    assert small.decode(ids).decode() == text


def test_control_tokens_are_found(tiny: Speaker, grow):
    plan = next(p for p in grow.PLANS if p.family == tiny.renderer.family.name)
    assert set(tiny.renderer.vocabulary.control_token_ids) == set(
        plan.control
    )  # also <think>, which its tokenizer calls not special
    assert all(
        tiny.renderer.vocabulary.bytes_W[i] is None
        for i in tiny.renderer.vocabulary.control_token_ids.values()
    )


def look_alikes(vocabulary: Vocabulary, sample: int = 10**6) -> None:
    """Check that every control token as text, alone, joined and doubled, is encoded as text."""
    names = sorted(vocabulary.control_token_ids, key=vocabulary.control_token_ids.__getitem__)
    names = names[:sample] + names[-sample:]
    controls = set(vocabulary.control_token_ids.values())
    batch = [
        t
        for name in names
        for t in (name, f"a{name}b", f" {name}\n{name}{name}", f"{name[:-1]}{name}{name[1:]}")
    ]
    for text, ids in zip(batch, vocabulary.encode_batch(batch), strict=True):
        assert not controls.intersection(ids), text
        assert vocabulary.decode(ids) == text.encode()


def test_control_look_alikes_are_text(tiny: Speaker):
    look_alikes(tiny.renderer.vocabulary)


def test_opening_leaves_the_tokenizer_as_it_was():
    tokenizer = byte_level()
    before = tokenizer.to_str()
    vocabulary = load_vocabulary(tokenizer)
    assert tokenizer.to_str() == before
    assert tokenizer.encode("<|end|>").ids == [vocabulary.control_token_ids["<|end|>"]]
    assert load_vocabulary(tokenizer).digest == vocabulary.digest


def test_truncation_padding_and_bos_of_the_tokenizer_do_not_reach_the_text():
    plain, meddling = byte_level(), byte_level()
    meddling.enable_truncation(4)
    meddling.enable_padding(length=64)
    end = [("<|end|>", meddling.token_to_id("<|end|>"))]
    meddling.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=end)
    text = "a sentence longer than four tokens, without any doubt"
    assert load_vocabulary(meddling).encode(text) == load_vocabulary(plain).encode(text)
    assert load_vocabulary(meddling).digest != load_vocabulary(plain).digest


def test_added_text_tokens_keep_their_own_bytes():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("naïve café", normalized=False)])
    vocabulary = load_vocabulary(tokenizer)
    ids = vocabulary.encode("a naïve café!")
    assert tokenizer.token_to_id("naïve café") in ids
    assert vocabulary.decode(ids) == "a naïve café!".encode()


def test_a_hole_in_the_numbering_has_no_bytes():
    spec = json.loads(byte_level().to_str())
    ids = spec["model"]["vocab"]
    last = max(ids, key=ids.__getitem__)
    ids[last] += 3
    vocabulary = load_vocabulary(Tokenizer.from_str(json.dumps(spec)))
    assert len(vocabulary) == ids[last] + 1
    assert vocabulary.bytes_W[-4:-1] == (None, None, None)
    assert vocabulary.decode_pieces([ids[last] - 1]) == (f"<hole {ids[last] - 1}>",)
    with pytest.raises(DataError, match="has no bytes"):
        vocabulary.decode([ids[last] - 1])


def test_decomposed_text_is_refused_with_the_place():
    vocabulary = load_vocabulary(byte_level(normalizer=normalizers.NFC()), "with-nfc")
    with pytest.raises(DataError) as caught:
        vocabulary.encode("abc e\u0301")
    assert caught.value.where == "with-nfc"
    assert "byte 4 of 'abc e" in caught.value.message
    assert "65 cc 81" in caught.value.message
    assert "c3 a9" in caught.value.message
    assert "NFC" in caught.value.remedy
    with pytest.raises(DataError):
        vocabulary.encode_batch(["fine", "abc e\u0301"])
    assert vocabulary.decode(vocabulary.encode("abc é")) == "abc é".encode()


def test_the_place_of_a_lost_tail_is_its_end():
    vocabulary = load_vocabulary(
        byte_level(normalizer=normalizers.Replace("z", "")), "eats-z"
    )  # no probe holds a z
    with pytest.raises(DataError, match="byte 2 of 'fizz' is 7a 7a, decoded as the end"):
        vocabulary.encode("fizz")
    assert vocabulary.decode(vocabulary.encode("fix")) == b"fix"


def test_a_literal_sentencepiece_space_is_refused():
    vocabulary = load_vocabulary(sentencepiece(), "spm")
    with pytest.raises(DataError, match="byte 1 of 'a▁b' is e2 96 81") as caught:
        vocabulary.encode("a▁b")
    assert (
        "leave the text out" in caught.value.remedy
    )  # it is NFC already: normalising would not help


def test_half_a_surrogate_pair_is_refused(small: Vocabulary):
    with pytest.raises(DataError, match="surrogate"):
        small.encode("broken \ud83d emoji")
    with pytest.raises(DataError, match="surrogate"):
        small.encode_batch(["fine", "broken \ud83d emoji"])


@pytest.mark.parametrize("i", [-1, 10**9, "len"])
def test_ids_out_of_range_are_refused(small: Vocabulary, i: int | str):
    at = len(small) if i == "len" else int(i)
    with pytest.raises(DataError, match="out of range"):
        small.decode([at])
    with pytest.raises(DataError, match="outside the vocabulary"):
        small.decode_pieces([at])


def test_control_ids_are_not_decoded_but_are_pieces(small: Vocabulary):
    name, i = next(iter(small.control_token_ids.items()))
    with pytest.raises(DataError, match="has no bytes"):
        small.decode([i])
    ids = [*small.encode("hello"), *small.encode(" world"), i, i, *small.encode("x")]
    assert small.decode_pieces(ids) == (b"hello world", name, name, b"x")


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer.train_from_iterator(
        TRAINING, trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False)
    )
    return tokenizer


def lossy_unigram() -> Tokenizer:
    """T5's form, which joins white space."""
    tokenizer = unigram("metaspace always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    return tokenizer


REFUSED = {
    "wordpiece": (wordpiece, "WordPiece"),
    "decomposed": (lambda: byte_level(normalizer=normalizers.NFD()), "changes texts by NFD"),
    "T5": (lossy_unigram, "changes texts by WhitespaceSplit"),
    "words": (lambda: Tokenizer(models.WordLevel({"a": 0}, "a")), "WordLevel"),
    "sentencepiece without bytes": (lambda: sentencepiece(fallback=False), "neither byte-level"),
    "lower case": (
        lambda: byte_level(normalizer=normalizers.Lowercase()),
        "byte 0 .* by Lowercase",
    ),
    "compatibility forms": (lambda: byte_level(normalizer=normalizers.NFKC()), "byte "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokenizers_whose_bytes_cannot_be_known_are_refused(case: str):
    make, reason = REFUSED[case]
    with pytest.raises(DataError, match=reason) as caught:
        load_vocabulary(make(), "odd/model")
    assert caught.value.where == "odd/model"
    assert "model: text_only" in caught.value.remedy
    assert "leave the text out" not in caught.value.remedy, "the text is persea's own probe"


def test_a_vocabulary_that_lacks_bytes_opens_and_refuses_only_the_texts_that_need_them():
    poor = load_vocabulary(byte_level(alphabet=False), "poor")
    assert 0x04 in poor.missing_bytes
    assert poor.decode(poor.encode("the cat sat")) == b"the cat sat"
    assert poor.can_write(b"the cat")
    assert not poor.can_write(b"the \x04 cat")
    with pytest.raises(DataError, match=r"no token for the bytes 04 at character 4 of 'the \\x04"):
        poor.encode("the \x04 cat")


def test_a_character_with_a_token_needs_no_bytes():
    tokenizer = sentencepiece()
    spec = json.loads(tokenizer.to_str())
    known = next(c for c in "世界你好" if c in spec["model"]["vocab"])
    lost = {f"<0x{b:02X}>" for b in known.encode()}
    for token in lost:
        del spec["model"]["vocab"][token]
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in lost]
    poor = load_vocabulary(Tokenizer.from_str(json.dumps(spec)), "poor")
    assert poor.missing_bytes == bytes(sorted(set(known.encode())))
    assert poor.can_write(known.encode())
    assert poor.decode(poor.encode(known)) == known.encode()
    assert not poor.can_write(known.encode()[:1])


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(DataError, match="not a fast tokenizer"):
        load_vocabulary(object(), "slow")


def test_round_trip_probes_cover_their_kinds():
    joined = "".join(ROUND_TRIP_PROBES)
    blocks = {
        "CJK UNIFIED",
        "HIRAGANA",
        "HANGUL",
        "THAI",
        "MYANMAR",
        "KHMER",
        "LAO",
        "ZERO WIDTH JOINER",
    }
    names = {unicodedata.name(c, "") for c in joined}
    assert all(any(n.startswith(b) for n in names) for b in blocks)
    assert "\t" in joined
    assert "\r\n" in joined
    assert "  " in joined


# ---- the real tokenizers -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gpt2(data: Path) -> Vocabulary:
    return load_vocabulary(
        Tokenizer.from_file(str(data / "tokenizers" / "gpt2" / "tokenizer.json")), "gpt2"
    )


@pytest.fixture(scope="session", params=[*REAL, "gpt2"])
def actual(request: pytest.FixtureRequest, real_of, data: Path) -> tuple[str, Vocabulary]:
    """(folder name, vocabulary) of every folder in data/tokenizers."""
    if request.param == "gpt2":
        return "gpt2", request.getfixturevalue("gpt2")
    return REAL[request.param], real_of(request.param).renderer.vocabulary


@pytest.mark.realdata
def test_no_real_tokenizer_is_left_out(data: Path):
    assert {p.name for p in (data / "tokenizers").iterdir() if p.is_dir()} == set(BYTE_PROPERTIES)


@pytest.mark.realdata
def test_real_byte_properties(actual: tuple[str, Vocabulary], data: Path):
    name, vocabulary = actual
    added = json.loads((data / "tokenizers" / name / "tokenizer.json").read_text())["added_tokens"]
    text = [b for b in vocabulary.bytes_W if b is not None]
    # notes/data.md counts as text what a tokenizer.json does not call special; persea is stricter:
    # <unused7> is no text
    stricter = (
        [
            t["content"].encode()
            for t in added
            if not t["special"] and t["content"] in vocabulary.control_token_ids
        ]
        if name == "gemma3"
        else []
    )
    tokens, distinct, broken = BYTE_PROPERTIES[name]
    assert len(text) + len(stricter) == tokens
    assert len({*text, *stricter}) == distinct
    assert len({b for b in text if len(b) == 1}) == 256
    if broken is not None:
        assert sum(not _is_utf8(b) for b in text) == broken


def _is_utf8(b: bytes) -> bool:
    try:
        b.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.realdata
@pytest.mark.parametrize("language", LANGUAGES)
def test_real_sentences_are_reproduced(actual: tuple[str, Vocabulary], data: Path, language: str):
    lines = (data / "parallel" / f"ntrex.{language}.txt").read_text(encoding="utf-8").splitlines()
    batch = [unicodedata.normalize("NFC", line) for line in lines[:20]]
    assert len(batch) == 20
    for text, ids in zip(batch, actual[1].encode_batch(batch), strict=True):
        assert actual[1].decode(ids) == text.encode()
        assert 0 < len(ids) <= len(text.encode())


@pytest.mark.realdata
def test_real_control_look_alikes_are_text(actual: tuple[str, Vocabulary]):
    look_alikes(actual[1], 60)


@pytest.mark.realdata
def test_real_ids_are_those_of_other_programs(actual: tuple[str, Vocabulary], data: Path):
    name, vocabulary = actual
    folder = data / "tokenizers_reference"
    if name == "qwen3":  # llama.cpp's
        lines = (
            (folder / "ggml-vocab-qwen2.gguf.inp")
            .read_text(encoding="utf-8")
            .split("\n__ggml_vocab_test__\n")
        )
        answers = (folder / "ggml-vocab-qwen2.gguf.out").read_text().split("\n")
    else:  # kitoken's
        lines = (folder / "mixed_input.txt").read_text(encoding="utf-8").split("\n")[:40]
        answers = (
            (folder / f"mixed_tokens_{REFERENCE[name]}.txt")
            .read_text()
            .replace(",", " ")
            .split("\n")[:40]
        )
    assert vocabulary.encode_batch(lines) == [[int(i) for i in line.split()] for line in answers]


@pytest.mark.realdata
def test_real_qwen_refuses_decomposed_burmese(real_of, data: Path):
    vocabulary = real_of("qwen").renderer.vocabulary
    lines = (data / "parallel" / "ntrex.mya.txt").read_text(encoding="utf-8").splitlines()
    decomposed = next(line for line in lines if not unicodedata.is_normalized("NFC", line))
    with pytest.raises(DataError, match="does not reproduce the text: byte"):
        vocabulary.encode(decomposed)
    assert vocabulary.encode(unicodedata.normalize("NFC", decomposed))
