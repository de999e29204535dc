"""A Vocabulary as named arrays, and back: what is derived from a tokenizer is derived once.

The tokenizer's own definition is among the arrays. It is parsed when a text is encoded for the
first time: Gemma's takes a second, and many commands encode nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models

from persea.tokenization.control_tokens import ControlFlags
from persea.tokenization.prefix_space import PrefixSpace
from persea.tokenization.vocabulary import Vocabulary

Arrays: TypeAlias = dict[str, npt.NDArray[np.generic]]
NO_BYTES = -1  # length of a control token
SPLITTING_PARTS = ("normalizer", "pre_tokenizer")


class DeferredTokenizer:
    """A `tokenizers.Tokenizer` that is parsed when it is first used.

    Args:
        definition: Its content as JSON.
        encode_special_tokens: Whether it encodes a special token in a text as text.
        splitting: The same without tokens, as JSON: normaliser and pre-tokenizer alone; b"" = not
            known.
    """

    def __init__(
        self, definition: bytes, encode_special_tokens: bool, splitting: bytes = b""
    ) -> None:
        self._definition, self._encode_special_tokens = definition, encode_special_tokens
        self._splitting = splitting
        self._parts: Tokenizer | None = None
        self._parsed: Tokenizer | None = None

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tokenizer."""
        if name.startswith("__"):  # copy and pickle ask for hooks before __init__ has run
            raise AttributeError(name)
        if name in SPLITTING_PARTS and self._splitting:
            self._parts = self._parts or Tokenizer.from_str(self._splitting.decode())
            return getattr(self._parts, name)
        if self._parsed is None:
            parsed = Tokenizer.from_str(self._definition.decode())
            parsed.encode_special_tokens = self._encode_special_tokens
            self._parsed, self._definition = parsed, b""
        return getattr(self._parsed, name)


def _splitting_of(backend: Tokenizer) -> bytes:
    """Return a tokenizer's normaliser and pre-tokenizer as the JSON of one without tokens."""
    bare = Tokenizer(models.BPE())
    for name in SPLITTING_PARTS:
        if (part := getattr(backend, name)) is not None:
            setattr(bare, name, part)
    return bare.to_str().encode()


def vocabulary_to_arrays(vocabulary: Vocabulary) -> Arrays:
    """Return everything but the name of a vocabulary."""
    lengths = [NO_BYTES if raw is None else len(raw) for raw in vocabulary.bytes_W]
    state = {
        "control": list(vocabulary.control_token_ids.items()),
        "digest": vocabulary.digest,
        "byte_level": vocabulary.byte_level,
        "prefix_space": vocabulary.prefix_space and asdict(vocabulary.prefix_space),
        "start_ids": vocabulary.start_ids,
        "is_unigram": vocabulary.is_unigram,
        "control_flags": {k: asdict(v) for k, v in vocabulary.control_flags.items()},
    }
    arrays: Arrays = {
        "lengths": np.array(lengths, np.int32),
        "bytes": _to_array(b"".join(raw or b"" for raw in vocabulary.bytes_W)),
        "state": _to_array(json.dumps(state).encode()),
        "backend": _to_array(vocabulary.backend.to_str().encode()),
        "splitting": _to_array(_splitting_of(vocabulary.backend)),
    }
    if vocabulary.original is not None:
        arrays["original"] = _to_array(vocabulary.original.to_str().encode())
    return arrays


def vocabulary_from_arrays(arrays: Mapping[str, npt.NDArray[Any]], name: str) -> Vocabulary:
    """Return the vocabulary that `vocabulary_to_arrays` took apart.

    Args:
        arrays: Its arrays.
        name: Name in messages.
    """
    state = json.loads(arrays["state"].tobytes())
    lengths_W, raw = arrays["lengths"], arrays["bytes"].tobytes()
    bytes_W: list[bytes | None] = []
    begin = 0
    for length, end in zip(
        lengths_W.tolist(), np.cumsum(np.maximum(lengths_W, 0)).tolist(), strict=True
    ):
        bytes_W.append(None if length == NO_BYTES else raw[begin:end])
        begin = end
    original = arrays.get("original")
    return Vocabulary(
        name,
        cast(
            Tokenizer,
            DeferredTokenizer(arrays["backend"].tobytes(), True, arrays["splitting"].tobytes()),
        ),
        tuple(bytes_W),
        dict(state["control"]),
        state["digest"],
        state["byte_level"],
        state["prefix_space"] and PrefixSpace(**state["prefix_space"]),
        {k: ControlFlags(**v) for k, v in state["control_flags"].items()},
        None if original is None else cast(Tokenizer, DeferredTokenizer(original.tobytes(), False)),
        tuple(state["start_ids"]),
        state["is_unigram"],
    )


def _to_array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
