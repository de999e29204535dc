"""Open a tokenizer once: what persea derives from it is kept in PERSEA_HOME.

transformers takes seconds to import and to convert a tokenizer of 262,144 tokens. The kept file
holds the vocabulary, the chat template and the special tokens. Its name is a digest of all files
beside the tokenizer but weights, and of the code that read them. A file that is damaged, or of
another name, is written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from tokenizers import Tokenizer

import persea.tokenization
from persea import storage
from persea.chat.families import CONTROL_MARKERS
from persea.errors import StorageError
from persea.tokenization.vocabulary import Vocabulary, load_vocabulary
from persea.tokenization.vocabulary_file import (
    Arrays,
    DeferredTokenizer,
    vocabulary_from_arrays,
    vocabulary_to_arrays,
)

FORMAT = 1
CHECKSUM_BYTES = 32
READING_PACKAGES = ("tokenizers", "transformers")
# Files of these kinds hold weights or pictures; a tokenizer is in none of them.
UNREAD_SUFFIXES = frozenset(
    (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".png", ".jpg")
)


@dataclass(frozen=True, eq=False)
class OpenedTokenizer:
    """A tokenizer as transformers opens it, and as bytes.

    Attributes:
        vocabulary: The tokenizer as bytes.
        chat_template: The chat template; None without one, a mapping for several.
        special_tokens_map: bos_token, eos_token, ...
        backend_tokenizer: The tokenizer as transformers has it, with control tokens.
    """

    vocabulary: Vocabulary
    chat_template: Any
    special_tokens_map: Mapping[str, Any]
    backend_tokenizer: Tokenizer

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids that transformers gives a text; control tokens in it count."""
        encoded = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return list(encoded.ids)


def open_tokenizer(folder: Path, name: str, load: Callable[[], Any]) -> OpenedTokenizer:
    """Read the kept form of a tokenizer, or load and keep it.

    Args:
        folder: The folder of the tokenizer.
        name: Its name in messages.
        load: Loads it with transformers.

    Raises:
        DataError: The tokenizer cannot be read, or `load_vocabulary` refuses it.
    """
    key = _digest_of_sources(folder)
    path = storage.persea_home() / "tokenizers" / f"{key[:32]}.tokenizer"
    kept = _read(path, key, name)
    if kept is not None:
        return kept
    tokenizer = load()
    opened = _open_anew(tokenizer, name)
    if _is_read_back_alike(opened):
        body = save_tensors(_to_arrays(opened, key))
        with suppress(StorageError):  # a full disk or a read-only home costs time only
            storage.write_atomic(path, hashlib.sha256(body).digest() + body)
    return opened


def _open_anew(tokenizer: Any, name: str) -> OpenedTokenizer:
    return OpenedTokenizer(
        load_vocabulary(tokenizer, name, CONTROL_MARKERS),
        tokenizer.chat_template,
        {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        tokenizer.backend_tokenizer,
    )


def _digest_of_sources(folder: Path) -> str:
    """Return the sha256 of everything that an opened tokenizer depends on."""
    files = sorted(
        path
        for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*"))
        if path.is_file() and path.suffix.lower() not in UNREAD_SUFFIXES
    )
    found = [(str(path.relative_to(folder)), storage.digest_file(path)) for path in files]
    return storage.digest_bytes(json.dumps([found, *_digest_of_code()]).encode())


@cache
def _digest_of_code() -> tuple[Any, ...]:
    """Return what identifies the code that reads tokenizers."""
    own = Path(persea.tokenization.__file__).parent
    return (
        FORMAT,
        CONTROL_MARKERS,
        [(package, metadata.version(package)) for package in READING_PACKAGES],
        [(path.name, storage.digest_file(path)) for path in sorted(own.glob("*.py"))],
    )


def _to_arrays(opened: OpenedTokenizer, key: str) -> Arrays:
    state = {
        "key": key,
        "chat_template": opened.chat_template,
        "special_tokens_map": dict(opened.special_tokens_map),
    }
    return {
        **vocabulary_to_arrays(opened.vocabulary),
        "opened": np.frombuffer(json.dumps(state).encode(), np.uint8),
        "transformers": np.frombuffer(opened.backend_tokenizer.to_str().encode(), np.uint8),
    }


def _read(path: Path, key: str, name: str) -> OpenedTokenizer | None:
    """Return a kept tokenizer; None if there is none, or it is damaged or another's."""
    data = path.read_bytes() if path.is_file() else b""
    body = memoryview(data)[CHECKSUM_BYTES:]
    if not data or hashlib.sha256(body).digest() != data[:CHECKSUM_BYTES]:
        return None
    try:
        arrays = load_tensors(bytes(body))
        state = json.loads(arrays["opened"].tobytes())
        if state["key"] != key:
            return None
        return OpenedTokenizer(
            vocabulary_from_arrays(arrays, name),
            state["chat_template"],
            state["special_tokens_map"],
            cast(Tokenizer, DeferredTokenizer(arrays["transformers"].tobytes(), False)),
        )
    except (SafetensorError, KeyError, ValueError, TypeError):
        return None


def _is_read_back_alike(opened: OpenedTokenizer) -> bool:
    """Return whether the definitions, read back, give each token its id.

    The tokenizers library numbers added tokens that the model lacks from the vocabulary's size on,
    whatever id the file states. Only where ids have gaps must the file be read to know.
    """
    sides = (opened.vocabulary.backend, opened.vocabulary.original, opened.backend_tokenizer)
    for tokenizer in sides:
        if tokenizer is None:
            continue
        size = tokenizer.get_vocab_size(with_added_tokens=False)
        behind = {i for i in tokenizer.get_added_tokens_decoder() if i >= size}
        num_behind = tokenizer.get_vocab_size(with_added_tokens=True) - size
        if behind == set(range(size, size + num_behind)):
            continue
        again = Tokenizer.from_str(tokenizer.to_str())
        if again.get_vocab(with_added_tokens=True) != tokenizer.get_vocab(with_added_tokens=True):
            return False
    return True
