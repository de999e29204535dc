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
from tokenizers import Tokenizer

from persea.tokenization.control_tokens import ControlFlags
from persea.tokenization.prefix_space import PrefixSpace
from persea.tokenization.vocabulary import Vocabulary

Arrays: TypeAlias = dict[str, npt.NDArray[np.generic]]
NO_BYTES = -1  # length of a control token


class DeferredTokenizer:
    """A `tokenizers.Tokenizer` that is parsed when it is first used.

    Args:
        definition: Its content as JSON.
        encode_special_tokens: Whether it encodes a special token in a text as text.
    """

    def __init__(self, definition: bytes, encode_special_tokens: bool) -> None:
        self._definition, self._encode_special_tokens = definition, encode_special_tokens
        self._parsed: Tokenizer | None = None

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tokenizer."""
        if name.startswith("__"):  # copy and pickle ask for hooks before __init__ has run
            raise AttributeError(name)
        if self._parsed is None:
            parsed = Tokenizer.from_str(self._definition.decode())
            parsed.encode_special_tokens = self._encode_special_tokens
            self._parsed, self._definition = parsed, b""
        return getattr(self._parsed, name)


def vocabulary_to_arrays(vocabulary: Vocabulary) -> Arrays:
    """Return everything but the name of a vocabulary."""
    lengths = [NO_BYTES if raw is None else len(raw) for raw in vocabulary.bytes_W]
    state = {
        "control": list(vocabulary.control_token_ids.items()),
        "digest": vocabulary.digest,
        "byte_level": vocabulary.byte_level,
        "prefix_space": vocabulary.prefix_space and asdict(vocabulary.prefix_space),
        "control_flags": {k: asdict(v) for k, v in vocabulary.control_flags.items()},
    }
    arrays: Arrays = {
        "lengths": np.array(lengths, np.int32),
        "bytes": _to_array(b"".join(raw or b"" for raw in vocabulary.bytes_W)),
        "state": _to_array(json.dumps(state).encode()),
        "backend": _to_array(vocabulary.backend.to_str().encode()),
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
        cast(Tokenizer, DeferredTokenizer(arrays["backend"].tobytes(), True)),
        tuple(bytes_W),
        dict(state["control"]),
        state["digest"],
        state["byte_level"],
        state["prefix_space"] and PrefixSpace(**state["prefix_space"]),
        {k: ControlFlags(**v) for k, v in state["control_flags"].items()},
        None if original is None else cast(Tokenizer, DeferredTokenizer(original.tobytes(), False)),
    )


def _to_array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
