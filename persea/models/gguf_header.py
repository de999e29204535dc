"""Find GGUF files and read their headers: metadata and the table of tensors.

Only the header is read, so that a wrong file is refused within milliseconds, before any library
opens it. The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import shutil
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from persea.errors import DataError, MissingRequirementError
from persea.models.references import model_path

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 counted in 32 bits; no converter has written it since 2023
DEFAULT_ALIGNMENT = 32  # bytes, unless `general.alignment` differs
MAX_DIMENSIONS = 8  # ggml has 4; a larger number is a damaged header
SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# metadata value type -> struct format; 8 = string, 9 = array
SCALAR_FORMATS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
UINT32, STRING, ARRAY = 4, 8, 9
COPY_BLOCK_BYTES = 1 << 20
OTHER_CONTENTS = {  # `general.type` -> what such a file holds
    "adapter": "a LoRA adapter",
    "mmproj": "the vision or audio encoder of a model (mmproj)",
    "imatrix": "an importance matrix",
    "vocab": "a vocabulary without weights",
}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the table of tensors.

    Attributes:
        name: Name in llama.cpp's convention, such as `blk.0.attn_q.weight`.
        shape: Sizes in torch's order, the slowest first.
        type_name: ggml type, such as F32 or Q4_K.
        offset: First byte, counted from the start of the data.
        num_bytes: Size in the file.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class HeaderLayout:
    """Where the parts of a header lie in the file: first byte, and first byte after the part.

    Attributes:
        version: GGUF version.
        values: Metadata key -> its place, with key and type.
        tensor_table: Place of the table of tensors.
        data_start: First byte of the data of tensors.
    """

    version: int
    values: Mapping[str, tuple[int, int]]
    tensor_table: tuple[int, int]
    data_start: int


@dataclass(frozen=True, eq=False)
class GgufHeader:
    """Metadata and table of tensors of a GGUF file.

    Attributes:
        path: The file.
        metadata: Key -> number, bool, string or list.
        tensors: The table of tensors.
        layout: Where the parts of the header lie.
    """

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: tuple[GgufTensor, ...] = field(repr=False)
    layout: HeaderLayout = field(default=HeaderLayout(3, {}, (0, 0), 0), repr=False)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def context_length(self) -> int:
        """Number of positions; 0 if the metadata does not tell."""
        stated = self.metadata.get(f"{self.architecture}.context_length")
        return stated if isinstance(stated, int) else 0

    @property
    def licence(self) -> str:
        """The licence in the file's metadata; "unknown" if it names none."""
        return str(self.metadata.get("general.license") or "unknown")

    @property
    def model_name(self) -> str:
        """`general.name`; "" if the file has none."""
        return str(self.metadata.get("general.name") or "")

    @property
    def num_embedding_rows(self) -> int:
        """Number of rows of the embedding, one a token; 0 if the file has none."""
        return next((t.shape[0] for t in self.tensors if t.name == "token_embd.weight"), 0)

    @property
    def num_weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def type_counts(self) -> dict[str, int]:
        """Type of ggml -> number of tensors, the commonest first."""
        return dict(Counter(t.type_name for t in self.tensors).most_common())


def find_gguf(name_or_path: str, where: str) -> Path | None:
    """Return the GGUF file that a model reference names, or that a folder holds.

    A folder with safetensors is a folder in Hugging Face form, also if it holds a GGUF file.

    Args:
        name_or_path: A file, a folder or a hub id.
        where: The place for error messages.

    Raises:
        DataError: The folder holds several GGUF files, or one in several parts, or cannot be
            looked at.
    """
    path = model_path(name_or_path, where)
    if path.suffix.lower() == ".gguf" and path.is_file():
        found = [path]
    elif name_or_path and path.is_dir() and not any(path.glob("*.safetensors")):
        found = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf" and p.is_file())
    else:
        found = []
    if not found:
        return None
    parts = [p.name for p in found if SPLIT_NAME.search(p.name)]
    if parts:
        raise _split_error(parts[0], where)
    models = [p for p in found if not p.name.lower().startswith("mmproj")] or found
    if len(models) > 1:
        raise DataError(
            f"{len(models)} GGUF files in {name_or_path!r}: "
            f"{', '.join(p.name for p in models[:4])}{', ...' if len(models) > 4 else ''}",
            where=where,
            remedy=f"name one of them: {path / models[0].name}",
        )
    return models[0]


def _split_error(name: str, where: str) -> DataError:
    return DataError(
        f"{name} is one part of a GGUF file in several parts",
        where=where,
        remedy="join them (llama-gguf-split --merge FIRST_PART WHOLE.gguf) and name the whole file",
    )


def refuse_without_gguf(where: str) -> None:
    """Raise if the package `gguf` is missing.

    Raises:
        MissingRequirementError: It is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingRequirementError(
            "reading a GGUF file needs the package gguf",
            where=where,
            remedy="pip install 'persea[gguf]'",
        ) from error


def read_header(path: Path, where: str) -> GgufHeader:
    """Read the header of a GGUF file that holds a language model.

    Args:
        path: The file.
        where: The place for error messages.

    Raises:
        DataError: The file is no GGUF file, is cut off or damaged, or holds no language model.
        MissingRequirementError: The package `gguf` is missing.
    """
    refuse_without_gguf(where)
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise DataError(
                    f"{path.name} is no GGUF file: it does not begin with GGUF",
                    where=where,
                    remedy="fetch the model again",
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                metadata, tensors, layout = _Reader(blob, path.name, where).read_all()
                ends = [layout.data_start + t.offset + t.num_bytes for t in tensors]
                end = max(ends, default=layout.tensor_table[1])
                missing = end - len(blob)
    except OSError as error:
        raise DataError(
            f"cannot read {path.name}: {error.strerror or error}",
            where=where,
            remedy="check the path and its permissions",
        ) from error
    header = GgufHeader(path, metadata, tensors, layout)
    _refuse_other_contents(header, where)
    if missing > 0:
        raise DataError(
            f"{path.name} is cut off: {missing:,} of {end:,} bytes are missing",
            where=where,
            remedy="fetch the file again",
        )
    return header


def _refuse_other_contents(header: GgufHeader, where: str) -> None:
    if int(header.metadata.get("split.count", 0)) > 1:
        raise _split_error(header.path.name, where)
    content = OTHER_CONTENTS.get(str(header.metadata.get("general.type", "model")), "")
    if header.architecture == "clip":
        content = OTHER_CONTENTS["mmproj"]
    elif not content and not any(t.name == "token_embd.weight" for t in header.tensors):
        content = OTHER_CONTENTS["vocab"] if not header.tensors else "no token embeddings"
    if content:
        raise DataError(
            f"{header.path.name} holds {content}, no language model",
            where=where,
            remedy="name the file of the language model itself",
        )


class _Reader:
    """Reads a header from bytes and refuses every value that cannot be there."""

    def __init__(self, blob: mmap.mmap, name: str, where: str) -> None:
        self.blob, self.name, self.where, self.position = blob, name, where, len(MAGIC)

    def read_all(self) -> tuple[dict[str, Any], tuple[GgufTensor, ...], HeaderLayout]:
        """Return metadata, tensors, and the layout of the header."""
        try:
            return self._read_all()
        except (struct.error, KeyError, OverflowError, ValueError, RecursionError) as error:
            raise self._damaged(f"at byte {self.position:,}") from error

    def _damaged(self, detail: str) -> DataError:
        return DataError(
            f"{self.name} is cut off or damaged {detail} of its header",
            where=self.where,
            remedy="fetch the file again",
        )

    def _read_all(self) -> tuple[dict[str, Any], tuple[GgufTensor, ...], HeaderLayout]:
        version, num_tensors, num_values = self._unpack("<IQQ")
        if version not in VERSIONS:
            raise DataError(
                f"{self.name} has GGUF version {version}; persea reads {VERSIONS[0]} and "
                f"{VERSIONS[1]}, little-endian",
                where=self.where,
                remedy="convert it with a current llama.cpp, or give the model's safetensors",
            )
        metadata, places = {}, {}
        for _ in range(num_values):
            begin = self.position
            key = self._string()
            (kind,) = self._unpack("<I")
            metadata[key] = self._value(kind)
            places[key] = (begin, self.position)
        begin = self.position
        tensors = tuple(self._tensor() for _ in range(num_tensors))
        alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        if alignment < 1:
            raise self._damaged("in the alignment")
        start = -(-self.position // alignment) * alignment
        return metadata, tensors, HeaderLayout(version, places, (begin, self.position), start)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.blob, self.position)
        self.position += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        end = self.position + length
        if end > len(self.blob):
            raise self._damaged(f"at byte {self.position:,}")
        text = self.blob[self.position : end].decode("utf-8")
        self.position = end
        return text

    def _strings(self, count: int) -> list[str]:
        """Return many strings; a list of tokens or merges holds hundreds of thousands."""
        blob, size, position = self.blob, len(self.blob), self.position
        read_length, strings = struct.Struct("<Q").unpack_from, list[str]()
        for _ in range(count):
            (length,) = read_length(blob, position)
            end = position + 8 + length
            if end > size:
                self.position = position
                raise self._damaged(f"at byte {position:,}")
            strings.append(blob[position + 8 : end].decode("utf-8"))
            position = end
        self.position = position
        return strings

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._unpack(SCALAR_FORMATS[kind])[0]
        element, count = self._unpack("<IQ")
        if count > len(self.blob):
            raise self._damaged(f"at byte {self.position:,}")
        if element == STRING:
            return self._strings(count)
        if element == ARRAY:
            return [self._value(ARRAY) for _ in range(count)]
        return list(self._unpack(f"<{count}{SCALAR_FORMATS[element][1]}"))

    def _tensor(self) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        (num_dimensions,) = self._unpack("<I")
        if num_dimensions > MAX_DIMENSIONS:
            raise self._damaged(f"at byte {self.position:,}")
        shape = tuple(reversed(self._unpack(f"<{num_dimensions}Q")))
        type_id, offset = self._unpack("<IQ")
        if type_id not in (known.value for known in GGMLQuantizationType):
            raise DataError(
                f"{self.name} has a tensor of the ggml type {type_id}, unknown to the package gguf",
                where=self.where,
                remedy="pip install --upgrade gguf, or give the model's safetensors",
            )
        kind = GGMLQuantizationType(type_id)
        block_weights, block_bytes = GGML_QUANT_SIZES[kind]
        return GgufTensor(
            name, shape, kind.name, offset, -(-prod(shape) // block_weights) * block_bytes
        )


def write_without_tokens(header: GgufHeader, target: Path) -> None:
    """Copy a GGUF file without its lists of tokens, scores and merges.

    Libraries read these lists item by item, which takes longer than the weights of a small model.

    Args:
        header: The file's header.
        target: The file to write.
    """
    layout = header.layout
    kept = [
        place
        for key, place in layout.values.items()
        if not (key.startswith("tokenizer.") and isinstance(header.metadata[key], list))
    ]
    key = f"{header.architecture}.vocab_size"
    size = b""
    if key not in layout.values:
        num_tokens = len(header.metadata.get("tokenizer.ggml.tokens", ()))
        name = key.encode()
        size = struct.pack(f"<Q{len(name)}sII", len(name), name, UINT32, num_tokens)
    counts = struct.pack("<IQQ", layout.version, len(header.tensors), len(kept) + bool(size))
    alignment = int(header.metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    with header.path.open("rb") as source, target.open("wb") as file:
        file.write(MAGIC + counts + size)
        for begin, end in (*kept, layout.tensor_table):
            source.seek(begin)
            file.write(source.read(end - begin))
        file.write(bytes(-file.tell() % alignment))
        source.seek(layout.data_start)
        shutil.copyfileobj(source, file, COPY_BLOCK_BYTES)


def describe_types(type_counts: Mapping[str, int]) -> str:
    """Return the ggml types of a file in one clause, such as "Q4_1 (210), F32 (61)"."""
    return ", ".join(f"{name} ({count})" for name, count in type_counts.items())


def has_only_types(tensors: Sequence[GgufTensor], *names: str) -> bool:
    """Return whether every matrix has one of these ggml types; vectors are F32 in any file."""
    return all(t.type_name in names for t in tensors if len(t.shape) > 1)
