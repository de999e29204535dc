"""Tokens of the teacher's vocabulary: which are wanted, which words are likely, marks in words."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from persea.models.loading import ModelSource
from persea.tokenization.vocabulary import BYTE_TO_CHAR, load_vocabulary
from persea.vocab_extension.teacher_tokens import (
    add_counts,
    count_expected_tokens,
    count_expected_words,
    join_marks,
    make_wanted,
    open_token_teacher,
    shared_token_ids,
    teacher_ids_of,
)
from tests.conftest import ROOT
from tests.tokenization.traits import sentencepiece_bpe

SAPLINGS = ROOT / "saplings"
THAI = "ที่นี่ดี"  # every vowel sign and tone is a combining mark
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def spelled(text: str) -> str:
    return "".join(BYTE_TO_CHAR[b] for b in text.encode())


def quiet(stage: str, share: float, words: str) -> None:
    pass


def test_wanted_are_the_teachers_tokens_and_parts_of_characters():
    teacher = load_vocabulary(sentencepiece_bpe("none"), "teacher")
    is_wanted = make_wanted(teacher)
    pieces = [raw.decode() for raw in teacher.bytes_W if raw and raw.isascii() and len(raw) > 1]
    assert all(is_wanted(spelled(text)) for text in pieces)
    assert is_wanted(spelled("ក")[:2]) and is_wanted(spelled("ក"))
    assert not is_wanted(spelled("កក")) and not is_wanted(spelled("xyzzy"))
    assert not is_wanted(spelled("ក")[1:])  # the end of a character begins no token


def split(spec: dict[str, object], text: str) -> list[str]:
    one = Tokenizer.from_str(json.dumps({**EMPTY, "pre_tokenizer": spec}))
    return [text[a:b] for _, (a, b) in one.pre_tokenizer.pre_tokenize_str(text)]


EMPTY = json.loads(Tokenizer(models.BPE()).to_str())


@pytest.mark.parametrize("pattern", ["gpt-2", "digits and gpt-2", "llama 3"])
def test_words_hold_marks_and_other_text_is_split_as_before(pattern: str):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern != "llama 3")
    parts = {
        "gpt-2": byte_level,
        "digits and gpt-2": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level]),
        "llama 3": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), byte_level]
        ),
    }[pattern]
    before = json.loads(parts.__getstate__())
    after = join_marks({"pre_tokenizer": before})["pre_tokenizer"]
    assert len(split(before, THAI)) > 1 and split(after, THAI) == [THAI]
    for text in ("it's 1234 words,  really?\n\n  x = a_b", "你好，世界 ab1", "()[]{} \t\\p"):
        assert split(after, text) == split(before, text)
    again = join_marks({"pre_tokenizer": after})["pre_tokenizer"]
    assert again == after


def test_a_pattern_with_marks_stays_as_it_is():
    spec = json.loads((SAPLINGS / "gpt-oss-sapling" / "tokenizer.json").read_text())
    assert r"\p{M}" in json.dumps(spec["pre_tokenizer"]).replace("\\\\", "\\")
    assert join_marks(spec) == spec


def test_likely_tokens_that_are_one_word_are_counted():
    backend = Tokenizer.from_file(str(SAPLINGS / "llama-sapling" / "tokenizer.json"))
    teacher = load_vocabulary(sentencepiece_bpe("none"), "teacher")
    by_bytes = {raw: i for i, raw in enumerate(teacher.bytes_W) if raw}
    the, byte = by_bytes[b" the"], by_bytes[b"\xe4"]
    found = count_expected_words(backend, teacher, {the: 1.5, byte: 3.0})
    assert found == {spelled(" the"): (2, 24)}
    counts = {spelled(" the"): (1, 16), "x": (1, 1)}
    add_counts(counts, found)
    assert counts == {spelled(" the"): (3, 40), "x": (1, 1)}


def test_a_teacher_scores_texts():
    source = ModelSource(str(SAPLINGS / "gemma-sapling"))
    teacher = open_token_teacher(source, "ridge", True, "teacher")
    assert [teacher.vocabulary.control_names[i] for i in teacher.start_ids] == ["<end_of_turn>"]
    text = "The answer is 12. " * 20
    counts, none = count_expected_tokens(teacher, [[text], []], quiet)
    assert none == {}
    size = len(teacher.vocabulary.encode(text))
    assert 0.9 * size < sum(counts.values()) <= size + 1e-3
    assert all(0 <= i < len(teacher.vocabulary) for i in counts)


def test_shared_and_spelled_tokens():
    student, teacher = (
        load_vocabulary(Tokenizer.from_file(str(SAPLINGS / name / "tokenizer.json")), name)
        for name in ("llama-sapling", "gemma-sapling")
    )
    shared = shared_token_ids(student, teacher)
    assert shared and all(student.bytes_W[i] == teacher.bytes_W[j] for i, j in shared)
    assert all(len(student.bytes_W[i] or b"") > 1 for i, _ in shared)
    one = shared[0]
    found = teacher_ids_of(
        teacher, {7: student.bytes_W[one[0]] or b"", 8: b"\xe0\xb8", 9: "zq ក".encode()}
    )
    assert found[7] == (one[1],) and 8 not in found
    assert teacher.decode(list(found[9])) == "zq ក".encode()
