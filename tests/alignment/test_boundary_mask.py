"""Boundary masks remove impossible tokens, nearly all of them and nothing else.

Checked by enumeration of toy tokenizers and on many kinds of real text.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from persea.alignment import boundary_mask
from persea.alignment.boundary_mask import BoundaryMask
from persea.alignment.event_map import first_tokens
from persea.alignment.token_order import (
    MID_CHARACTER,
    UNRESTRICTED_CONTEXT,
    TokenOrder,
    get_token_order,
)
from persea.tokenization.vocabulary import BYTE_TO_CHAR, Vocabulary, load_vocabulary
from tests.alignment.test_event_map import real_event_map, real_home
from tests.conftest import FAMILIES, Speaker
from tests.tokenization.test_unigram import toys as unigram_toys

assert real_home  # a fixture of test_event_map: event maps are built once for all
TEXTS = [
    "Hello, two  words and 1234 cats.",
    "isn't don't WE'RE x='s",
    "你好，世界。三百四十二",
    "สวัสดีชาวโลก สามร้อย",
    "မင်္ဂလာပါ ကမ္ဘာ",
    "def f(x):\n    return x\n\n\n\ty",
    "tiếng Việt một hai",
    "👩‍👩‍👧 ok 🏳️‍🌈",
    "こんにちは、カタカナ",
    "a\r\n\r\nb  \n c",
    "\ufeffBOM",
    "é ü ñ",
    "안녕하세요 세계",
    "x   y\t\tz",
    "100,000.50 12345678",
]


def masks(teacher: Vocabulary, student: Vocabulary) -> tuple[BoundaryMask, BoundaryMask]:
    """(of the teacher's tokens where the student has a boundary, the other way round)."""
    t, s = get_token_order(teacher), get_token_order(student)
    return BoundaryMask(s, t, first_tokens(teacher, student)), BoundaryMask(
        t, s, first_tokens(student, teacher)
    )


def common(
    vocabularies: Sequence[Vocabulary], text: str
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Ids of both, and the tokens that begin at a common byte."""
    ids = [np.array(v.encode(text), np.int64) for v in vocabularies]
    at = [
        {int(b): k for k, b in enumerate(np.cumsum(v.lengths_W[i]) - v.lengths_W[i])}
        for v, i in zip(vocabularies, ids, strict=True)
    ]
    return ids, [(at[0][b], at[1][b]) for b in sorted(at[0].keys() & at[1].keys())]


def deleted(pair: tuple[BoundaryMask, BoundaryMask], texts: Sequence[str]) -> tuple[int, int]:
    """(realised next tokens that a mask would drop, realised next tokens)."""
    of_teacher, of_student = pair
    vocabularies = of_teacher.own.vocabulary, of_student.own.vocabulary
    lost = seen = 0
    for text in texts:
        ids, both = common(vocabularies, text)
        contexts = (
            of_student.other.context_ids(ids[0], [k for k, _ in both]),
            of_teacher.other.context_ids(ids[1], [j for _, j in both]),
        )
        for (k, j), teachers, students in zip(both, *contexts, strict=True):
            for mask, context, token in (
                (of_teacher, students, ids[0][k]),
                (of_student, teachers, ids[1][j]),
            ):
                lost += len(mask.impossible_tokens(int(context), np.array([token])))
                seen += 1
    return lost, seen


# --- any two tokenizers, by enumeration ---


def byte_level(
    chosen: list[tuple[int, int]],
    pattern: str,
    added: bool,
    alphabet: str = "ab ",
    missing: bytes = b"",
) -> Vocabulary:
    single = [BYTE_TO_CHAR[b] for b in range(256) if b not in missing]
    pieces, merges = list(single), list[tuple[str, str]]()
    for a, b in chosen:
        known = [*(BYTE_TO_CHAR[ord(c)] for c in alphabet), *pieces[len(single) :]]
        pair = known[a % len(known)], known[b % len(known)]
        if "".join(pair) not in pieces and len("".join(pair)) <= 4:
            merges.append(pair)
            pieces.append("".join(pair))
    tokenizer = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, ignore_merges=added)
    )
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if added:
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("bb", "bba")])
    return load_vocabulary(tokenizer, "toy")


def sentencepiece(
    chosen: list[tuple[int, int]],
    alphabet: str = "ab▁",
    missing: bytes = b"",
    words: bool = False,
) -> Vocabulary:
    single = ["<unk>", *(f"<0x{b:02X}>" for b in range(256) if b not in missing)]
    pieces, merges = [*single, *alphabet], list[tuple[str, str]]()
    for a, b in chosen:
        known = pieces[len(single) :]
        pair = known[a % len(known)], known[b % len(known)]
        if "".join(pair) not in pieces and len("".join(pair)) <= 4:
            merges.append(pair)
            pieces.append("".join(pair))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return load_vocabulary(tokenizer, "toy")


chosen = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=8)
PATTERNS = ("", r" ?[ab]+| +(?!\S)| +", r"[ab]{1,3}| +", r"a+|b| ", r" ?a+b?| ?b+|\s+")
toys = st.one_of(
    st.builds(byte_level, chosen, st.sampled_from(PATTERNS), st.booleans()),
    st.builds(sentencepiece, chosen, words=st.booleans()),
)
unigrams = st.one_of(
    unigram_toys(),
    unigram_toys(fallback=False),
    unigram_toys(words=True),
    unigram_toys(added=("bb", "ab b")),
)
STRINGS = [
    "".join(s) for n in range(1, 8) for s in product("ab ", repeat=n) if n < 7 or s[0] == "a"
]


@settings(max_examples=25)
@given(one=toys, two=toys)
def test_no_possible_token_is_masked(one: Vocabulary, two: Vocabulary):
    """Masks are sound for any merges, words, added tokens and byte fallback."""
    lost, seen = deleted(masks(one, two), STRINGS[::3])
    assert seen > 1000
    assert lost == 0


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [r"[ab]{1,3}| +", r"[ab]{2}|[ab]| +", r" ?[ab]{3,}|[ab]| +", r"[a-b]{1,4}|\s", r"\w{1,5}|\W"],
)
def test_no_possible_token_is_masked_where_a_pattern_counts(pattern: str, added: bool) -> None:
    """A word of limited length ends after any of its characters, however far back it begins."""
    chosen = [(19, 1), (16, 19), (12, 10), (10, 16), (16, 19), (18, 16), (14, 15), (6, 2)]
    one, two = byte_level(chosen, pattern, False), byte_level([], r" ?a+b?| ?b+|\s+", added)
    for pair in ((one, two), (two, one)):
        lost, seen = deleted(masks(*pair), STRINGS[::3])
        assert (lost, seen > 1000) == (0, True)


def test_answers_are_kept_forgotten_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """For many contexts and tokens at once as for one, whatever was asked before."""
    one, two = byte_level([(0, 1), (1, 3)], PATTERNS[1], False), sentencepiece([(1, 0), (2, 3)])
    asked = []
    for text in STRINGS[::40]:
        ids, both = common((one, two), text)
        contexts = get_token_order(one).context_ids(ids[0], [k for k, _ in both])
        asked += [(c, j) for c in contexts.tolist() for j in {*ids[1].tolist(), 7, len(two) - 1}]
    context_P, token_P = np.array(asked).T
    of_two = masks(one, two)[1]
    found_P = of_two.are_impossible(context_P, token_P)
    assert found_P.any() and not found_P[context_P == UNRESTRICTED_CONTEXT].any()
    assert np.array_equal(of_two.are_impossible(context_P, token_P), found_P)
    monkeypatch.setattr(boundary_mask, "MAX_CACHED_ANSWERS", 3)
    other = masks(one, two)[1]
    for (context, token), wanted in zip(asked, found_P.tolist(), strict=True):
        assert len(other.impossible_tokens(context, np.array([token]))) == wanted
        assert len(other._answers.key_K) <= 3


@settings(max_examples=15)
@given(one=unigrams, two=st.one_of(unigrams, toys))
def test_no_possible_token_is_masked_with_unigram(one: Vocabulary, two: Vocabulary):
    """The same with a lattice on one side or on both."""
    for pair in ((one, two), (two, one)):
        lost, seen = deleted(masks(*pair), STRINGS[::11])
        assert seen > 200
        assert lost == 0


poor_bytes = st.sampled_from([b"", b"\x04\xc0\xff", b"xy", bytes(range(128, 256)) + b"y"])


@st.composite
def poor_toys(draw: st.DrawFn) -> Vocabulary:
    """A tokenizer that lacks bytes; those that it has are merged with a and b."""
    missing, merges = draw(poor_bytes), draw(chosen)
    kept = "".join(c for c in "xy" if ord(c) not in missing)
    if draw(st.booleans()):
        return byte_level(merges, draw(st.sampled_from(PATTERNS)), False, "ab " + kept, missing)
    return sentencepiece(merges, "ab▁" + kept, missing)


@settings(max_examples=25)
@given(one=poor_toys(), two=poor_toys())
def test_no_possible_token_is_masked_where_vocabularies_lack_bytes(
    one: Vocabulary, two: Vocabulary
):
    """What both can write stays, also beside tokens of a byte that the other side lacks."""
    both = [c for c in "ab xy" if one.can_write(c.encode()) and two.can_write(c.encode())]
    rng = np.random.default_rng(len(one) * len(two))
    some = ["".join(rng.choice(both, int(rng.integers(2, 8)))) for _ in range(300)]
    lost, seen = deleted(masks(one, two), some)
    assert seen > 300
    assert lost == 0


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RIGHT_ALIGNED = r"\d{1,3}(?=(?:\d{3})*(?!\d))|\D+"


def worded(
    chosen: list[tuple[int, int]], pattern: str, added: tuple[AddedToken, ...]
) -> Vocabulary:
    """Like byte_level, over an alphabet that real patterns care about."""
    tokenizer = Tokenizer.from_str(byte_level(chosen, pattern, False, "'vsxl 1.").backend.to_str())
    tokenizer.add_tokens(list(added))
    return load_vocabulary(tokenizer, "worded")


plain_added = st.sampled_from(
    [(), (AddedToken("  ", normalized=False),), (AddedToken("vs", single_word=True),)]
)
real_toys = st.builds(
    worded, chosen, st.sampled_from(["", GPT2, LLAMA, RIGHT_ALIGNED, r"(?i:[a-s]+)|."]), plain_added
)


@settings(max_examples=25)
@given(one=real_toys, two=real_toys, seed=st.integers(0, 999))
def test_no_possible_token_is_masked_with_real_pretokenizers(
    one: Vocabulary, two: Vocabulary, seed: int
):
    """Contractions, digits, look-ahead, added tokens that stand among words: what occurs stays."""
    rng = np.random.default_rng(seed)
    some = ["".join(rng.choice(list("'vsxlVS 1.  "), int(rng.integers(2, 9)))) for _ in range(150)]
    assert deleted(masks(one, two), [".  'sx", "a'vex", "12345", "GGvsx", *some])[0] == 0


@settings(max_examples=15)
@given(one=chosen, two=chosen)
def test_impossible_tokens_are_masked(one: list[tuple[int, int]], two: list[tuple[int, int]]):
    """Without word ends masks are nearly complete: less than 2 % of impossible tokens stay."""
    vocabularies = byte_level(one, "", False, "ab"), byte_level(two, "", False, "ab")
    pair = masks(*vocabularies)
    follows: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[set[int], set[int]]] = defaultdict(
        lambda: (set(), set())
    )
    own: list[dict[tuple[int, ...], set[int]]] = [defaultdict(set), defaultdict(set)]
    for text in ("".join(s) for n in range(1, 9) for s in product("ab", repeat=n)):
        ids, both = common(vocabularies, text)
        for side in (0, 1):
            for k, token in enumerate(ids[side].tolist()):
                own[side][tuple(ids[side][:k])].add(token)
        for k, j in both:
            for side, token in enumerate((ids[0][k], ids[1][j])):
                follows[tuple(ids[0][:k]), tuple(ids[1][:j])][side].add(int(token))
    stays = ruled_out = 0
    for prefixes, realised in follows.items():
        if not prefixes[0] or sum(len(vocabularies[0].bytes_W[i] or b"") for i in prefixes[0]) > 3:
            continue
        contexts = [
            mask.other.context_ids(np.array(p), [len(p)])[0]
            for mask, p in zip((pair[1], pair[0]), prefixes, strict=True)
        ]
        for side in (0, 1):
            impossible = set(pair[side].impossible_tokens(int(contexts[1 - side])).tolist())
            assert not impossible & realised[side]
            never = own[side][prefixes[side]] - realised[side]
            ruled_out, stays = ruled_out + len(never), stays + len(never - impossible)
    assert (
        stays <= 0.02 * ruled_out + 2
    )  # a place where both meet may lie beyond the longest string


# --- the exact worlds ---


@pytest.mark.parametrize("name", worlds.WORLDS)
def test_the_exact_worlds(name: str):
    """A possible token is never masked; one stays only because strings end at 6 characters."""
    world = worlds.world(name)
    emap = world.full_event_map
    if name == "same":
        assert emap.teacher_mask is None and emap.student_mask is None
        return
    assert emap.teacher_mask and emap.student_mask
    stays = 0
    for b in world.boundaries:
        if not b.teacher:
            continue
        for mask, order, own, columns, row, both in (
            (emap.teacher_mask, b.student, b.teacher, world.columns_W, b.p_W, b.both_p_W),
            (emap.student_mask, b.teacher, b.student, world.columns_V, b.q_V, b.both_q_V),
        ):
            impossible = np.isin(
                columns,
                mask.impossible_tokens(
                    int(mask.other.context_ids(np.array(order), [len(order)])[0])
                ),
            )
            assert not (impossible & (both > 0)).any()
            length = sum(len(mask.own.vocabulary.bytes_W[i] or b"") for i in own)
            stays += int((~impossible & (both == 0) & (row > 0) & (length < 3)).sum())
    assert stays == 0


# --- real and tiny families ---


@pytest.fixture(scope="module")
def tiny_masks(
    tiny_of: Callable[[str], Speaker],
) -> Callable[[str, str], tuple[BoundaryMask, BoundaryMask]]:
    found: dict[tuple[str, str], tuple[BoundaryMask, BoundaryMask]] = {}

    def of(teacher: str, student: str) -> tuple[BoundaryMask, BoundaryMask]:
        if (teacher, student) not in found:
            found[teacher, student] = masks(
                tiny_of(teacher).renderer.vocabulary, tiny_of(student).renderer.vocabulary
            )
        return found[teacher, student]

    return of


texts = st.lists(
    st.one_of(st.sampled_from(TEXTS), st.text("abtsdl'. \n1é你สัต", max_size=8)),
    min_size=1,
    max_size=4,
).map(lambda parts: unicodedata.normalize("NFC", "".join(parts)))


@given(text=texts.filter(len), teacher=st.sampled_from(FAMILIES), student=st.sampled_from(FAMILIES))
def test_no_observed_token_of_a_family_is_masked(
    tiny_masks: Callable[[str, str], tuple[BoundaryMask, BoundaryMask]],
    text: str,
    teacher: str,
    student: str,
):
    if teacher != student:
        assert deleted(tiny_masks(teacher, student), [text])[0] == 0


def fresh(mask: BoundaryMask) -> BoundaryMask:
    """The same, nothing searched yet."""
    return BoundaryMask(mask.other, mask.own, mask.first_token_W)


@pytest.mark.parametrize("teacher", ["qwen", "gpt-oss"])
def test_masks_do_not_depend_on_earlier_searches(
    monkeypatch: pytest.MonkeyPatch,
    tiny_masks: Callable[[str, str], tuple[BoundaryMask, BoundaryMask]],
    teacher: str,
):
    """Masks are equal in any order of contexts, each alone, and with a full state cache."""
    for mask in tiny_masks(teacher, "llama"):
        ids = np.array(mask.other.vocabulary.encode(TEXTS[0] + TEXTS[1]))
        contexts = sorted(set(mask.other.context_ids(ids, range(1, len(ids))).tolist()))[:12]
        alone = [fresh(mask).impossible_tokens(context).tolist() for context in contexts]
        assert any(alone)
        for order in (contexts, contexts[::-1]):
            used = fresh(mask)
            found = {context: used.impossible_tokens(context).tolist() for context in order}
            assert [found[context] for context in contexts] == alone
        assert (used._witness_WK >= 0).any() and used._meeting_states and used._dead_end_states, (
            "something was remembered"
        )
        monkeypatch.setattr("persea.alignment.boundary_mask.MAX_CACHED_STATES", 20)
        used = fresh(mask)
        assert [used.impossible_tokens(context).tolist() for context in contexts] == alone
        monkeypatch.undo()


def test_a_candidate_whose_search_is_given_up_is_kept_and_not_taken_for_known(
    tiny_masks: Callable[[str, str], tuple[BoundaryMask, BoundaryMask]],
):
    """A mask with few search tokens removes a subset; undecided searches leave no witnesses."""
    mask = tiny_masks("gpt-oss", "llama")[1]
    ids = np.array(mask.other.vocabulary.encode(TEXTS[0] + TEXTS[1]))
    contexts = sorted(set(mask.other.context_ids(ids, range(1, len(ids))).tolist()))[:12]
    unlimited = fresh(mask)
    limited = BoundaryMask(mask.other, mask.own, mask.first_token_W, max_search_tokens=3)
    whole = [set(unlimited.impossible_tokens(context).tolist()) for context in contexts]
    less = [set(limited.impossible_tokens(context).tolist()) for context in contexts]
    assert all(few <= every for few, every in zip(less, whole, strict=True)) and sum(
        map(len, less)
    ) < sum(map(len, whole))
    assert limited._undecided_states
    for state in limited._meeting_states:
        assert unlimited._search_meeting(state, [0, 0])
    for candidate in np.flatnonzero((limited._witness_WK >= 0).any(1)).tolist():
        raw = mask.own.vocabulary.bytes_W[candidate] or b""
        assert all(
            unlimited._search_meeting(unlimited._advance(True, u, raw, candidate), [0, 0])
            for u in limited._witness_WK[candidate].tolist()
            if u >= 0
        )


@pytest.mark.parametrize("teacher", ["qwen", "gemma", "gpt-oss"])
def test_masks_of_some_candidates_and_of_all_agree(
    tiny_masks: Callable[[str, str], tuple[BoundaryMask, BoundaryMask]], teacher: str
):
    """The same answer; control tokens never are in it, and after a control token nothing is."""
    dropped = 0
    for mask in tiny_masks(teacher, "llama"):
        order, own = mask.other, mask.own.vocabulary
        assert not len(mask.impossible_tokens(UNRESTRICTED_CONTEXT))
        for text in TEXTS[:4]:
            ids = np.array(order.vocabulary.encode(text))
            for context in order.context_ids(ids, range(1, len(ids))).tolist():
                impossible = mask.impossible_tokens(context)
                everything = np.arange(len(own))
                assert np.array_equal(
                    impossible, fresh(mask).impossible_tokens(context, everything)
                )
                assert all(own.bytes_W[i] is not None for i in impossible.tolist())
                dropped += len(impossible)
                for some in (everything[::3], everything[::2]):  # the second has kept answers
                    assert np.array_equal(
                        mask.impossible_tokens(context, some), np.intersect1d(some, impossible)
                    )
    assert dropped > 100


def test_contexts_are_the_words_so_far(tiny_of: Callable[[str], Speaker]):
    renderer = tiny_of("llama").renderer
    order: TokenOrder = get_token_order(renderer.vocabulary)
    stop = renderer.stop_ids[0]
    ids = np.array(
        [
            stop,
            *renderer.vocabulary.encode(" hello hello"),
            stop,
            *renderer.vocabulary.encode(" hello"),
        ]
    )
    contexts = order.context_ids(ids, range(len(ids)))
    assert contexts[0] == contexts[1] == UNRESTRICTED_CONTEXT
    assert contexts[-1] != UNRESTRICTED_CONTEXT
    second = int(np.flatnonzero(ids == stop)[1])
    assert contexts[second + 1] == UNRESTRICTED_CONTEXT
    assert contexts[2] == contexts[second + 2], "the same word so far, the same context"
    emoji = np.array(renderer.vocabulary.encode("👩"))
    inside = order.context_ids(emoji, range(1, len(emoji)))
    assert order.context_id(int(emoji[0]), "👩".encode()[:1]) == inside[0]
    assert MID_CHARACTER in {word for _, word in order._context_keys}


def real_texts(data: Path, lines: int) -> dict[str, list[str]]:
    """Lines of each language, code, JSON, chat."""
    out = {}
    for file in sorted((data / "parallel").glob("ntrex.*.txt")):
        some = [
            unicodedata.normalize("NFC", line)
            for line in file.read_text(encoding="utf-8").split("\n")[-lines:]
        ]
        out[file.stem.removeprefix("ntrex.")] = [line for line in some if line and "▁" not in line]
    out["python"] = [
        (Path(os.__file__).parent / name).read_text(encoding="utf-8")[:6000]
        for name in ("textwrap.py", "dataclasses.py")
    ]
    paragraphs = json.loads((data / "eval" / "xquad.vi.dev.json").read_text(encoding="utf-8"))[
        "data"
    ][2:4]
    out["json"] = [
        unicodedata.normalize("NFC", json.dumps(p, ensure_ascii=False, indent=2)[:5000])
        for p in paragraphs
    ]
    return out


@pytest.mark.realdata
@pytest.mark.parametrize("family", ["qwen", "gemma", "gpt-oss"])
def test_no_observed_token_of_real_text_is_masked(
    data: Path, real_of: Callable[[str], Speaker], real_home: Path, family: str
):
    """Some lines of everything (all of it: `python bench/masks.py`)."""
    emap, _ = real_event_map(real_of(family).renderer, real_of("llama").renderer, real_home)
    assert emap.teacher_mask and emap.student_mask
    seen = {}
    for name, lines in real_texts(data, 2).items():
        lost, seen[name] = deleted((emap.teacher_mask, emap.student_mask), lines)
        assert lost == 0, name
    assert len(seen) > 15 and min(seen.values()) > 0 and sum(seen.values()) > 5000, seen
