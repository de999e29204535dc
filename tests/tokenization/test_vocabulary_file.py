"""A vocabulary that was taken apart and put together encodes and decodes as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load, save

from persea.tokenization.pretokenizer import load_pretokenizer
from persea.tokenization.vocabulary import ROUND_TRIP_PROBES, Vocabulary, load_vocabulary
from persea.tokenization.vocabulary_file import (
    DeferredTokenizer,
    vocabulary_from_arrays,
    vocabulary_to_arrays,
)
from tests.alignment.test_event_map import SAID, byte_level, sentencepiece
from tests.tokenization import traits
from tests.tokenization.test_logit_rows import with_placeholder

MADE: dict[str, Callable[[], Vocabulary]] = {
    "byte-level": lambda: load_vocabulary(byte_level(SAID, 300), "v"),
    "sentencepiece": lambda: load_vocabulary(sentencepiece(SAID, 300), "v"),
    "lacks bytes": lambda: load_vocabulary(byte_level(SAID, 300, missing=b"\x04\xc0"), "v"),
    "placeholder": with_placeholder,
    "unigram": lambda: load_vocabulary(traits.unigram(), "v"),
    "flags": lambda: load_vocabulary(
        traits.byte_level_bpe(rstrip=["<s>"], ignore_merges=True), "v"
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_nothing_is_lost(case: str):
    before = MADE[case]()
    arrays = load(save(vocabulary_to_arrays(before)))
    after = vocabulary_from_arrays(arrays, "other name")
    assert after.name == "other name"
    for name in (
        "bytes_W",
        "control_token_ids",
        "digest",
        "byte_level",
        "prefix_space",
        "control_flags",
        "missing_bytes",
        "is_unigram",
        "start_ids",
    ):
        assert getattr(after, name) == getattr(before, name), name
    assert (after.original is None) == (before.original is None)
    texts = [
        text
        for text in (*ROUND_TRIP_PROBES, *SAID, "<|end|> as text")
        if before.can_write(text.encode()) and "▁" not in text
    ]
    assert len(texts) > 15
    assert after.encode_batch(texts) == before.encode_batch(texts)
    assert after.backend.get_vocab(with_added_tokens=True) == before.backend.get_vocab(
        with_added_tokens=True
    )
    assert np.array_equal(after.lengths_W, before.lengths_W)


def test_prefix_space_and_flags_are_kept():
    before = load_vocabulary(traits.sentencepiece_bpe("prepend", rstrip=["<s>"]), "v")
    after = vocabulary_from_arrays(vocabulary_to_arrays(before), "v")
    assert before.prefix_space is not None
    assert after.prefix_space == before.prefix_space
    assert before.control_flags
    assert after.control_flags == before.control_flags
    assert after.original is not None and before.original is not None
    text = "hello you"
    assert after.original.encode(text).ids == before.original.encode(text).ids
    assert after.encode(text) == before.encode(text)


def test_the_tokenizer_is_parsed_when_it_is_used():
    definition = byte_level(SAID, 300).to_str().encode()
    broken = DeferredTokenizer(b"{", True)
    with pytest.raises(Exception, match="EOF"):
        broken.encode("a")
    deferred = DeferredTokenizer(definition, True)
    assert deferred.encode("<|end|>").ids == deferred.encode("<|end|>").ids
    assert len(deferred.encode("<|end|>").ids) > 1, "a control token in a text is text"
    assert DeferredTokenizer(definition, False).encode("<|end|>").tokens == ["<|end|>"]
    with pytest.raises(AttributeError):
        deferred.no_such_method  # noqa: B018
    unused = DeferredTokenizer(definition, True)
    for clone in (copy.copy(deferred), pickle.loads(pickle.dumps(unused))):
        assert clone.encode("ab").ids == deferred.encode("ab").ids


@pytest.mark.parametrize("case", MADE)
def test_splits_need_no_tokens(case: str, monkeypatch: pytest.MonkeyPatch):
    """The whole definition of a real tokenizer takes a second to parse."""
    before = MADE[case]()
    after = vocabulary_from_arrays(vocabulary_to_arrays(before), "v")
    monkeypatch.setattr(after.backend, "_definition", b"")  # parsing it would fail
    one, other = load_pretokenizer(before), load_pretokenizer(after)
    assert [one.split_positions(t) for t in SAID] == [other.split_positions(t) for t in SAID]
    assert one.never_splits == other.never_splits
