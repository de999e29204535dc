"""The safetensors files of a model: which are read, what their headers state, and their digest.

transformers reads model.safetensors, or the files that an index names. An index may name a file
outside the folder or in another format; such an index is refused here, so that the files that are
fingerprinted are the files that are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from persea.errors import DataError
from persea.models.config_files import read_json_config

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 100_000_000  # as the safetensors library
LAYER_COUNT_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
MAX_EXPERTS = 1 << 16
NAMED_TENSORS = 5  # in a message
BLOCK_BYTES = 1 << 20
REMEDY = "fetch the weights again, or save the model with transformers' save_pretrained"
# dtype in a header -> (numpy type of the bits, mask): all bits of the mask set = infinite or NaN
NONFINITE_BITS: Mapping[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E4M3": ("<u1", 0x7F),
}


def find_weight_files(folder: Path, where: str) -> tuple[Path, ...]:
    """Return the safetensors files of a model that transformers reads; () if there are none.

    Args:
        folder: The model's folder.
        where: The place for error messages.

    Raises:
        DataError: The configuration or the index names a file that is missing, outside the folder,
            or no safetensors file.
    """
    config_file = folder / "config.json"
    config = read_json_config(config_file, where) if config_file.is_file() else {}
    named = config.get("transformers_weights")
    if named is not None:
        path = _named_file(folder, named, config_file, where)
        return _indexed_files(path, where) if path.suffix == ".json" else (path,)
    if (folder / WEIGHTS_NAME).is_file():
        return (folder / WEIGHTS_NAME,)
    if (folder / INDEX_NAME).is_file():
        return _indexed_files(folder / INDEX_NAME, where)
    return ()


def _indexed_files(index: Path, where: str) -> tuple[Path, ...]:
    """Return the files that an index names."""
    weight_map = read_json_config(index, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index} has no weight_map of tensors", where=where, remedy=REMEDY)
    names = sorted({str(name) for name in weight_map.values()})
    return tuple(_named_file(index.parent, name, index, where) for name in names)


def _named_file(folder: Path, name: Any, named_by: Path, where: str) -> Path:
    """Return a file of the folder itself that a configuration names."""
    endings = (SUFFIX, f"{SUFFIX}.index.json")
    if (
        not isinstance(name, str)
        or not name.endswith(endings)
        or Path(name).name != name
        or "\0" in name
    ):
        raise DataError(
            f"{named_by} names {name!r}; persea reads safetensors files in the folder itself",
            where=where,
            remedy=REMEDY,
        )
    if not (folder / name).is_file():
        raise DataError(f"{named_by} names {name}, which is not there", where=where, remedy=REMEDY)
    return folder / name


def read_header(path: Path, where: str) -> dict[str, dict[str, Any]]:
    """Return the header of a safetensors file without its metadata: tensor -> dtype, shape, place.

    Raises:
        DataError: The file is cut off, or its header is broken.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("the length of the header is impossible")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = sorted(tuple(map(int, tensor["data_offsets"])) for tensor in header.values())
        reached = 0
        for begin, end in ends:
            if begin != reached or end < begin:
                raise ValueError("the tensors do not follow each other")
            reached = end
        if 8 + length + reached != size:
            raise ValueError("the file is cut off, or has bytes after its tensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is no safetensors file: {str(error) or type(error).__name__}",
            where=where,
            remedy=REMEDY,
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}", where=where, remedy=REMEDY
        ) from error
    return dict(header)


def refuse_impossible_weights(folder: Path, where: str) -> None:
    """Refuse a folder whose weights cannot be those of its configuration, before a model is made.

    Raises:
        DataError: There are no weights, a header is broken, two files hold the same tensor, or the
            configuration has more layers than the files have tensors.
    """
    files = find_weight_files(folder, where)
    if not files:
        raise DataError(
            f"no {WEIGHTS_NAME} in {folder}",
            where=where,
            remedy="give a folder with safetensors weights; persea reads no pickles",
        )
    tensors: dict[str, Path] = {}
    for path in files:
        for name in read_header(path, where):
            if name in tensors:
                raise DataError(
                    f"{tensors[name].name} and {path.name} both hold {name}",
                    where=where,
                    remedy=REMEDY,
                )
            tensors[name] = path
    config = read_json_config(folder / "config.json", where)
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in (*LAYER_COUNT_KEYS, *EXPERT_COUNT_KEYS):
            is_layers, count = key in LAYER_COUNT_KEYS, part.get(key)
            limit = len(tensors) if is_layers else MAX_EXPERTS
            if isinstance(count, int) and not int(is_layers) <= count <= limit:
                raise DataError(
                    f"{folder / 'config.json'} states {count:,} for {key}; the weights are "
                    f"{len(tensors):,} tensors",
                    where=where,
                    remedy="configuration and weights do not belong together: fetch both again",
                )


def refuse_partial_load(
    missing: Sequence[str], unexpected: Sequence[str], parameters: Sequence[str], where: str
) -> None:
    """Refuse a model whose weights were not all in its files, or not all used.

    transformers fills a missing weight at random and leaves out one that it does not expect. A
    tensor beside the language model (a vision tower, heads for more tokens) may be left out; one of
    its layers may not.

    Args:
        missing: Names of the model's weights that no file holds.
        unexpected: Names of tensors in the files that the model does not have.
        parameters: Names of the model's weights.
        where: The place for error messages.

    Raises:
        DataError: A weight is missing, or a tensor of the model's own layers was left out.
    """
    if missing:
        raise DataError(
            f"the files lack {_some_names(missing)}"
            + (f" and hold the unknown {_some_names(unexpected)}" if unexpected else ""),
            where=where,
            remedy=REMEDY,
        )
    own = {_stem(name) for name in parameters}
    if left_out := [name for name in unexpected if _stem(name) in own]:
        raise DataError(
            f"by its configuration the model has no {_some_names(left_out)}, which its files hold",
            where=where,
            remedy="configuration and weights do not belong together: fetch both again",
        )


def _stem(name: str) -> str:
    """Return a tensor's name up to its first number: model.layers.3.mlp.weight -> model.layers."""
    return re.split(r"\.\d+(?:\.|$)", name, maxsplit=1)[0]


def _some_names(names: Sequence[str]) -> str:
    more = len(names) - NAMED_TENSORS
    return ", ".join(sorted(names)[:NAMED_TENSORS]) + (f" and {more:,} more" if more > 0 else "")


def update_with_weights(digest: hashlib._Hash, path: Path, where: str) -> None:
    """Add the bytes of a safetensors file to a digest, and check that its weights are finite.

    Args:
        digest: The digest, updated in place.
        path: The file.
        where: The place for error messages.

    Raises:
        DataError: The file is broken, or a weight is NaN or infinite.
    """
    header = read_header(path, where)
    with path.open("rb") as file:
        digest.update(length := file.read(8))
        digest.update(file.read(int.from_bytes(length, "little")))
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = tensor["data_offsets"]
            _update_with_tensor(digest, file, end - begin, str(tensor.get("dtype")), name, where)


def _update_with_tensor(
    digest: hashlib._Hash, file: IO[bytes], num_bytes: int, dtype: str, name: str, where: str
) -> None:
    bits, mask = NONFINITE_BITS.get(dtype, ("", 0))
    while num_bytes > 0:
        block = file.read(min(BLOCK_BYTES, num_bytes))
        if not block:
            raise DataError(f"{name} is cut off", where=where, remedy=REMEDY)
        num_bytes -= len(block)
        digest.update(block)
        if bits and len(block) % np.dtype(bits).itemsize == 0:
            values = np.frombuffer(block, bits)
            if ((values & mask) == mask).any():
                raise DataError(
                    f"the weight {name} holds NaN or infinity", where=where, remedy=REMEDY
                )
