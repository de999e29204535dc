"""Leading signatures are made once for a tokenizer; what is kept is never trusted unchecked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from persea.alignment.kept_heads import TokenHeads, keep_heads
from persea.alignment.token_order import TokenOrder, get_token_order
from persea.tokenization.pretokenizer import load_pretokenizer
from persea.tokenization.vocabulary import Vocabulary
from tests.conftest import Speaker


@pytest.fixture
def vocabulary(
    tiny_of: Callable[[str], Speaker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Vocabulary:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    return tiny_of("qwen").renderer.vocabulary


def anew(vocabulary: Vocabulary) -> TokenOrder:
    """A token order that has computed nothing yet."""
    derivations = get_token_order(vocabulary).derivations
    return TokenOrder(vocabulary, derivations, load_pretokenizer(vocabulary))


def alike(one: TokenHeads, other: TokenHeads) -> bool:
    return bool((one[0] == other[0]).all()) and one[1] == other[1]


def kept_file(home: Path) -> Path:
    (path,) = (home / "tokenizers").glob("*.heads")
    return path


def never() -> TokenHeads:
    raise AssertionError("made again")


def test_what_is_read_is_what_was_made(vocabulary: Vocabulary, tmp_path: Path) -> None:
    made = anew(vocabulary)._token_heads
    assert len(made[1]) > 100 and len(made[0]) == len(vocabulary)
    assert alike(keep_heads(vocabulary, never), made)
    assert alike(anew(vocabulary)._token_heads, made)
    token = vocabulary.encode("hello world")[0]
    context = anew(vocabulary).context_ids(np.array([token, token]), [1])
    fresh = TokenOrder(vocabulary, anew(vocabulary).derivations, load_pretokenizer(vocabulary))
    fresh.__dict__["_token_heads"] = fresh._make_token_heads()
    read = anew(vocabulary)
    for order in (fresh, read):
        assert order.context_ids(np.array([token, token]), [1]).tolist() == context.tolist()
    assert (
        fresh.impossible_next_tokens(int(context[0])).tolist()
        == read.impossible_next_tokens(int(context[0])).tolist()
    )


@pytest.mark.parametrize("at", [0, 40, -1], ids=["checksum", "head", "end"])
def test_a_damaged_file_is_written_anew(vocabulary: Vocabulary, tmp_path: Path, at: int) -> None:
    made = anew(vocabulary)._token_heads
    whole = kept_file(tmp_path).read_bytes()
    damaged = bytearray(whole)
    damaged[at] ^= 1
    kept_file(tmp_path).write_bytes(damaged)
    assert alike(keep_heads(vocabulary, lambda: made), made)
    assert kept_file(tmp_path).read_bytes() == whole


def test_another_vocabulary_gets_its_own(vocabulary: Vocabulary, tmp_path: Path) -> None:
    made = anew(vocabulary)._token_heads
    shorter = replace(vocabulary, bytes_W=vocabulary.bytes_W[:-1])
    with pytest.raises(AssertionError, match="made again"):
        keep_heads(shorter, never)
    kept_file(tmp_path).rename(tmp_path / "tokenizers" / "other")
    with pytest.raises(AssertionError, match="made again"):
        keep_heads(vocabulary, never)
    assert alike(keep_heads(vocabulary, lambda: made), made)


def test_without_a_home_they_are_made(
    vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path / "file"))
    made = anew(vocabulary)._make_token_heads()
    assert alike(keep_heads(vocabulary, lambda: made), made)
