"""Keep the leading signatures of a vocabulary's tokens in PERSEA_HOME.

They say before which tokens a word may end (persea.tokenization.pretokenizer). They depend on the
tokenizer alone, and making them takes seconds for a real vocabulary. The name of the kept file is a
digest of the tokenizer and of the code that makes them; a damaged file is written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from persea import storage
from persea.errors import StorageError
from persea.tokenization import pretokenizer
from persea.tokenization.vocabulary import Vocabulary

FORMAT = 1
CHECKSUM_BYTES = 32
# number of each token's leading signatures, the distinct leading signatures
TokenHeads: TypeAlias = tuple[npt.NDArray[np.int64], list[tuple[str, ...]]]


def keep_heads(vocabulary: Vocabulary, make: Callable[[], TokenHeads]) -> TokenHeads:
    """Read the leading signatures of all tokens, or make and keep them."""
    key = _digest(vocabulary)
    path = storage.persea_home() / "tokenizers" / f"{key[:32]}.heads"
    kept = _read(path, key, len(vocabulary))
    if kept is not None:
        return kept
    head_W, heads = make()
    body = save_tensors(
        {
            "head_W": head_W.astype(np.int32),
            "heads": np.frombuffer(json.dumps([key, heads]).encode(), np.uint8),
        }
    )
    with suppress(StorageError):  # a full disk or a read-only home costs time only
        storage.write_atomic(path, hashlib.sha256(body).digest() + body)
    return head_W, heads


def _digest(vocabulary: Vocabulary) -> str:
    """Return the sha256 of everything that the signatures depend on."""
    return storage.digest_json([FORMAT, vocabulary.digest, len(vocabulary), *_digest_of_code()])


@cache
def _digest_of_code() -> tuple[str, str]:
    return storage.digest_file(Path(pretokenizer.__file__)), metadata.version("tokenizers")


def _read(path: Path, key: str, num_tokens: int) -> TokenHeads | None:
    """Return kept signatures; None if there are none, or they are damaged or another's."""
    data = path.read_bytes() if path.is_file() else b""
    body = data[CHECKSUM_BYTES:]
    if not data or hashlib.sha256(body).digest() != data[:CHECKSUM_BYTES]:
        return None
    try:
        tensors = load_tensors(body)
        written_key, heads = json.loads(tensors["heads"].tobytes())
        head_W = tensors["head_W"].astype(np.int64)
    except (SafetensorError, KeyError, ValueError, TypeError):
        return None
    if written_key != key or head_W.shape != (num_tokens,):
        return None
    return head_W, [tuple(head) for head in heads]
