"""A longer tokenizer: merges as counting by hand learns them, known ids where they were, text
without new pairs cut as before.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from persea.errors import DataError, RefusedError
from persea.tokenization.bpe import derive_bpe
from persea.tokenization.vocabulary import Vocabulary, load_vocabulary
from persea.vocab_extension.learn_merges import (
    Merge,
    apply_all_merges,
    count_words,
    extend_tokenizer_spec,
    learn_merges,
    measure_tokenization_cost,
    merge_pair,
    old_ids_of_new_tokens,
    read_merge_training_texts,
    refuse_changed_tokens,
    refuse_unextendable_tokenizer,
)
from tests.alignment.test_boundary_mask import (
    PATTERNS,
    STRINGS,
    byte_level,
    chosen,
    deleted,
    masks,
    toys,
)
from tests.conftest import ROOT

REAL = ("llama3", "qwen3", "gpt-oss")
LANGUAGES = ("khm", "mya", "lao", "tha", "eng", "jpn", "kor", "vie", "zho-CN")


@dataclass(frozen=True, repr=False, eq=False)
class Pair:
    """A tokenizer before, as its file says (`ids`) and as a vocabulary, and after; `ranks` of all
    merges it has after.
    """

    ids: dict[str, int]
    old: Vocabulary
    new: Vocabulary
    merges: Sequence[Merge]
    ranks: dict[Merge, int]

    def __repr__(self) -> str:
        return self.old.name


def longer(backend: Tokenizer, texts: Sequence[str], tokens: int, name: str = "toy") -> Pair:
    spec = json.loads(backend.to_str())
    merges = learn_merges(backend, count_words(backend, [texts]), tokens)
    after = extend_tokenizer_spec(spec, merges)
    ranks = {(a, b): rank for rank, (a, b) in reversed(list(enumerate(after["model"]["merges"])))}
    new = load_vocabulary(Tokenizer.from_str(json.dumps(after)), name)
    return Pair(
        backend.get_vocab(with_added_tokens=True),
        load_vocabulary(backend, name),
        new,
        merges,
        ranks,
    )


# ---- learning ------------------------------------------------------------------------------------


def by_hand(backend: Tokenizer, texts: Sequence[str], tokens: int) -> list[Merge]:
    """The same by counting everything anew each time; the tokenizer itself cuts the words."""
    spec, out = json.loads(backend.to_str()), list[Merge]()
    barred = {t["content"] for t in spec["added_tokens"]}
    words = {word: n for word, (n, _) in count_words(backend, [texts]).items()}
    while True:
        now = extend_tokenizer_spec(spec, out)
        if (
            len(now["model"]["vocab"]) - len(extend_tokenizer_spec(spec, [])["model"]["vocab"])
            >= tokens
        ):
            return out
        model = Tokenizer.from_str(json.dumps(now)).model
        counts = Counter[Merge]()
        for word, n in words.items():
            for pair in pairwise(t.value for t in model.tokenize(word)):
                counts[pair] += n
        often = [(n, pair) for pair, n in counts.items() if n >= 2 and "".join(pair) not in barred]
        if not often:
            return out
        out.append(max(often)[1])


words = st.lists(st.text("aab ", min_size=1, max_size=9), min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    chosen=chosen,
    lost=st.sets(st.integers(0, 7)),
    pattern=st.sampled_from(PATTERNS),
    added=st.booleans(),
    texts=words,
    tokens=st.integers(1, 9),
)
def test_what_is_learned_is_what_counting_by_hand_learns(
    chosen: list[tuple[int, int]],
    lost: set[int],
    pattern: str,
    added: bool,
    texts: list[str],
    tokens: int,
):
    """Also where a new pair makes a token that is known, its own merge lost, and older merges go on
    from it.
    """
    spec = json.loads(byte_level(chosen, pattern, added).backend.to_str())
    spec["model"]["merges"] = [
        merge for k, merge in enumerate(spec["model"]["merges"]) if k not in lost
    ]
    backend = Tokenizer.from_str(json.dumps(spec))
    assert learn_merges(backend, count_words(backend, [texts]), tokens) == by_hand(
        backend, texts, tokens
    )


def test_a_known_token_is_not_made_twice():
    """`bc` is in the vocabulary, and no merge makes it: the pair gets its id, costs no row, and the
    old merge bc+d goes on from it.
    """
    vocab = {c: i for i, c in enumerate("abcd")} | {"bc": 4, "bcd": 5}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("bc", "d")], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    merges = learn_merges(backend, count_words(backend, [["abcd dbc abcd dbc abcd"]]), 1)
    assert merges == [("b", "c"), ("a", "bcd")]
    spec = extend_tokenizer_spec(json.loads(backend.to_str()), merges)
    assert spec["model"]["vocab"] == vocab | {"abcd": 6}
    assert Tokenizer.from_str(json.dumps(spec)).encode("abcd dbcd abc").tokens == [
        "abcd",
        "d",
        "bcd",
        "a",
        "bc",
    ]


def test_no_merge_spells_an_added_token():
    backend = byte_level([], r"\S+|\s+", False).backend
    backend.add_special_tokens(["<s>", "é"])
    merges = learn_merges(backend, count_words(backend, [["<s> <s> <s> é é é"] * 9]), 50)
    assert merges and not {"<s>", "é", "Ã©"} & {"".join(pair) for pair in merges}


def test_no_merge_crosses_a_word():
    backend = byte_level([], r" ?[ab]+| +(?!\S)| +", False).backend
    made = {
        "".join(pair)
        for pair in learn_merges(backend, count_words(backend, [["ab ab ab aab"] * 5]), 50)
    }
    assert "Ġab" in made and not any("Ġ" in token[1:] for token in made)


def test_an_added_token_is_no_part_of_a_word():
    """Runs of spaces in Phi's tokenizer: a merge of them would make a token that no text shows."""
    backend = byte_level([], r" +|\S+", True).backend
    assert count_words(backend, [["abba bb a"]]) == count_words(backend, [["a", " ", " a"]])
    assert set(count_words(backend, [["abbba"]])) == {"a", "ba"}


def test_a_pair_must_be_seen_twice_whatever_its_file_weighs():
    backend = byte_level([], r"\S+|\s+", False).backend
    assert learn_merges(backend, count_words(backend, [["ab"], ["c" + "d" * 500]]), 9)[:1] == [
        ("d", "d")
    ]
    assert learn_merges(backend, count_words(backend, [["ab"], ["ab"]]), 9) == [("a", "b")]
    assert learn_merges(backend, count_words(backend, [["ab"]]), 9) == []


def test_a_short_file_counts_as_much_as_a_long_one():
    backend = byte_level([], r"\S+|\s+", False).backend
    long, short = ["aa ab ba bb " * 40], ["cc dd"] * 4
    assert not set("cd") & set(
        "".join(a + b for a, b in learn_merges(backend, count_words(backend, [long + short]), 4))
    )
    assert {("c", "c"), ("d", "d")} & set(
        learn_merges(backend, count_words(backend, [long, short]), 4)
    )
    words = count_words(backend, [["ab"] * 3, ["ab"] * 3])
    assert words["ab"] == (6, 6 * count_words(backend, [["ab"]])["ab"][1]), "as long, as much"


# ---- texts ---------------------------------------------------------------------------------------


@given(parts=st.lists(st.sampled_from("ab"), max_size=12), pair=st.sampled_from(["ab", "aa"]))
def test_one_pair_is_merged_as_by_all_merges(parts: list[str], pair: str):
    left, right = pair
    assert merge_pair(parts, (left, right)) == apply_all_merges(parts, {(left, right): 0})


def test_a_tenth_is_held_out_and_nothing_is_learned_on_it(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"line {k % 15}\r\n\n" for k in range(30)))
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": f"line {k}", "n": str(k)}) + "\n" for k in range(9, 29))
    )
    a, b, n = read_merge_training_texts(
        [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), f"{tmp_path}/b.jsonl#n"]
    )
    assert (a.held_out_lines, b.held_out_lines, n.held_out_lines) == (
        ("line 9", "line 4", "line 14"),
        ("line 18", "line 28"),
        ("18", "28"),
    )
    assert a.file.endswith("a.txt") and n.file.endswith("b.jsonl")
    assert (
        not {*a.training_lines, *b.training_lines} & {*a.held_out_lines, *b.held_out_lines}
        and len(a.training_lines) == 24
        and len(b.training_lines) == 16
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no line with a text"),
        (b"\n \n", "no line with a text"),
        (b"a\nb\n", "fewer than 10"),
        (b"a\n" * 30, "fewer than 10"),
        (b"good\n\xff\n", r"a\.txt:2: cannot read the text: not UTF-8"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_with_their_place(
    tmp_path: Path, content: bytes, why: str
):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=why):
        read_merge_training_texts([str(tmp_path / "a.txt")])


def test_json_lines_without_the_key_or_with_half_a_character_are_refused(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"texts": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: no text under 'text'"):
        read_merge_training_texts([str(path)])
    path.write_text('{"text": "a\\ud83d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: half a surrogate pair"):
        read_merge_training_texts([str(path)])
    with pytest.raises(DataError, match="No such file"):
        read_merge_training_texts([str(tmp_path / "none.txt")])


# ---- known ids -----------------------------------------------------------------------------------


def test_the_library_would_move_every_control():
    """Why controls are written into the vocabulary. Should this fail one day, that is no longer
    needed.
    """
    backend = byte_level([(0, 1)], "", False).backend
    backend.add_special_tokens(["<|end|>", "<|other|>"])
    before, spec = backend.get_vocab(), json.loads(backend.to_str())
    spec["model"]["vocab"]["aab"] = len(before)
    spec["model"]["merges"].append(["a", "ab"])
    assert Tokenizer.from_str(json.dumps(spec)).get_vocab()["<|end|>"] == before["<|end|>"] + 1
    spec = extend_tokenizer_spec(json.loads(backend.to_str()), [("a", "ab")])
    assert Tokenizer.from_str(json.dumps(spec)).get_vocab() == {**before, "aab": len(before)}


def test_new_ids_leave_gaps_as_they_are():
    """gpt-oss has numbers that no token has; and a configuration may name an id that its tokenizer
    does not know.
    """
    spec = json.loads(byte_level([(0, 1)], "", False).backend.to_str())
    spec["model"]["vocab"]["<|late|>"] = 400
    spec["added_tokens"] = [
        {
            "id": 400,
            "content": "<|late|>",
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
    ]
    old = load_vocabulary(Tokenizer.from_str(json.dumps(spec)), "gaps")
    for first, there in ((0, 401), (500, 500)):
        new = load_vocabulary(
            Tokenizer.from_str(
                json.dumps(extend_tokenizer_spec(spec, [("a", "ab"), ("b", "b")], first))
            ),
            "gaps",
        )
        refuse_changed_tokens(old, new, "gaps")
        assert old_ids_of_new_tokens(old.backend, new.backend) == {
            there: [97, 256],
            there + 1: [98, 98],
        }
        assert new.bytes_W[there] == b"aab" and new.bytes_W[300] is None and len(new) == there + 2


def test_a_control_that_plain_text_could_say_is_refused():
    """One word, and a tokenizer that looks words up whole: in the vocabulary it would be read out
    of any text.
    """
    backend = byte_level([], r"\S+|\s+", True).backend
    backend.add_special_tokens(["<|end|>"])
    with pytest.raises(RefusedError, match=r"'<\|end\|>' would be read as a control token"):
        made = longer(backend, ["aab aab"], 1)
        refuse_changed_tokens(made.old, made.new, "toy")


def test_an_added_token_that_the_vocabulary_would_spell_otherwise_is_refused():
    backend = byte_level([], "", False).backend
    backend.add_tokens([AddedToken("éé", normalized=False)])
    made = longer(backend, ["aab aab"], 1)
    assert made.old.bytes_W[256] == "éé".encode() != made.new.bytes_W[256]
    with pytest.raises(RefusedError, match="1 known tokens would change, the first is 'éé'"):
        refuse_changed_tokens(made.old, made.new, "toy")


def sapling(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "saplings" / f"{name}-sapling" / "tokenizer.json"))


def test_tokenizers_that_cannot_be_gone_on_with_are_refused():
    def refused(vocabulary: Vocabulary, **model: object) -> str:
        spec = json.loads(vocabulary.backend.to_str())
        with pytest.raises(RefusedError) as error:
            refuse_unextendable_tokenizer(vocabulary, {"model": spec["model"] | model}, "here")
        return str(error.value)

    for one in (load_vocabulary(sapling("gemma")), byte_level([], "", False)):
        assert refused(one).startswith("here: its tokenizer does not split text into words")
    llama = load_vocabulary(sapling("llama"))
    assert "end_of_word_suffix" in refused(
        llama, end_of_word_suffix="</w>"
    ) and "dropout" in refused(llama, dropout=0.1)
    refuse_unextendable_tokenizer(llama, json.loads(llama.backend.to_str()), "here")


# ---- real tokenizers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_pair(data: Path) -> Callable[[str], Pair]:
    """A real tokenizer and 64 tokens more, learned on a hundred lines each of Khmer, Thai and
    English.
    """
    texts = [line for name in ("khm", "tha", "eng") for line in _parallel(data, name)[:100]]
    return cache(
        lambda name: longer(
            Tokenizer.from_file(str(data / "tokenizers" / name / "tokenizer.json")), texts, 64, name
        )
    )


@pytest.fixture(scope="module")
def lines(data: Path) -> list[str]:
    return [line for name in LANGUAGES for line in _parallel(data, name)[300:306]]


def _parallel(data: Path, name: str) -> list[str]:
    return (data / "parallel" / f"ntrex.{name}.txt").read_text(encoding="utf-8").split("\n")


@pytest.mark.realdata
@pytest.mark.parametrize("name", REAL)
def test_every_known_id_of_a_real_tokenizer_is_as_before(
    real_pair: Callable[[str], Pair], name: str
):
    pair = real_pair(name)
    refuse_changed_tokens(pair.old, pair.new, name)
    after = pair.new.backend.get_vocab(with_added_tokens=True)
    assert pair.ids.items() <= after.items()
    assert sorted(set(after.values()) - set(pair.ids.values())) == list(
        range(len(pair.old), len(pair.old) + 64)
    )
    assert len(pair.old) == {"llama3": 128_256, "qwen3": 151_669, "gpt-oss": 201_088}[name]
    for i, pieces in old_ids_of_new_tokens(pair.old.backend, pair.new.backend).items():
        assert len(pieces) > 1 and pair.old.decode(pieces) == pair.new.bytes_W[i]


@pytest.mark.realdata
@pytest.mark.parametrize("name", REAL)
@given(drawn=st.data())
def test_text_without_a_new_pair_is_cut_as_before(
    real_pair: Callable[[str], Pair], lines: list[str], name: str, drawn: st.DataObject
):
    """Word by word: what the old tokenizer leaves, merged on by the new merges alone. And every
    byte comes back.
    """
    pair = real_pair(name)
    some = st.one_of(
        st.sampled_from(lines),
        st.text(max_size=12),
        st.sampled_from(sorted(pair.old.control_token_ids)),
        st.text("ab១២ក្រ สวัน'1 \n", max_size=9),
    )
    text = "".join(drawn.draw(st.lists(some, min_size=1, max_size=3)))
    backend = pair.old.backend
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    before, after = (
        pair.old.encode(text),
        pair.new.encode(text),
    )  # each refuses a text whose bytes do not come back
    assert pair.new.decode(after) == text.encode()
    words = [
        [t.value for t in backend.model.tokenize(word)]
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)
    ]
    assert [pair.new.backend.id_to_token(i) for i in after] == [
        part for word in words for part in apply_all_merges(word, pair.ranks)
    ]
    if not set(pair.merges) & {two for word in words for two in pairwise(word)}:
        assert after == before
    assert not set(after) & set(pair.new.control_token_ids.values())


@pytest.mark.realdata
def test_khmer_gets_shorter_and_what_it_costs_is_told(real_pair: Callable[[str], Pair], data: Path):
    pair = real_pair("llama3")
    (texts,) = read_merge_training_texts([str(data / "parallel" / "ntrex.khm.txt")])
    told = measure_tokenization_cost(texts, pair.old, pair.new)
    assert (told.lines, told.bytes) == (115, sum(len(t.encode()) for t in texts.held_out_lines))
    assert told.bytes / told.tokens_before < 1.9 and told.tokens_after < 0.6 * told.tokens_before


# ---- what lays tokenizers over each other knows it -----------------------------------------------


@settings(max_examples=8)
@given(
    chosen=chosen,
    pattern=st.sampled_from(PATTERNS),
    added=st.booleans(),
    texts=words,
    tokens=st.integers(1, 9),
    other=toys,
)
def test_masks_drop_nothing_that_occurs(
    chosen: list[tuple[int, int]],
    pattern: str,
    added: bool,
    texts: list[str],
    tokens: int,
    other: Vocabulary,
):
    made = longer(byte_level(chosen, pattern, added).backend, texts, tokens)
    lost, seen = deleted(masks(other, made.new), STRINGS[::5])
    assert seen > 500 and lost == 0


@pytest.fixture(scope="module")
def tiny_pair() -> Pair:
    texts = [
        "the quick brown fox jumps over the lazy dog",
        "สวัสดีชาวโลก สามร้อย",
        "សួស្តីពិភពលោក",
        "def f(x):\n    return x",
    ]
    return longer(sapling("llama"), texts * 3, 80, "llama")


@given(
    text=st.lists(
        st.one_of(
            st.sampled_from(["the quick", "lazy", "ชาวโลก", "ពិភព", "return x", " x"]),
            st.text("thequickា \nส", max_size=6),
        ),
        min_size=1,
        max_size=4,
    )
    .map("".join)
    .filter(len)
)
def test_a_derivation_holds_for_new_tokens(tiny_pair: Pair, text: str):
    vocabulary = tiny_pair.new
    merges = _derived(vocabulary)
    assert not any(
        merges.is_impossible_pair(a, b)
        for word, _ in vocabulary.backend.pre_tokenizer.pre_tokenize_str(text)
        for a, b in pairwise(t.id for t in vocabulary.backend.model.tokenize(word))
    )
    assert all(
        merges.derivable_V[i]
        for i in old_ids_of_new_tokens(tiny_pair.old.backend, vocabulary.backend)
    )


@cache
def _derived(vocabulary: Vocabulary):
    return derive_bpe(vocabulary)
