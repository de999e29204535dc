"""Training examples on disk: made once for each unit of a cache, memory-mapped afterwards.

To render an answer in the student's template and to project its distributions takes milliseconds,
and every process of a training needs the counts of all answers before its first step. The examples
of a unit depend on its answers, the student, the event maps and two settings; the name of their
file is a digest of these. Later starts, other processes and other learning rates read the file. A
damaged file is made anew.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from persea import storage
from persea.cache.reader import AnswerSource, AnswerSubset, CacheReader
from persea.cache.unit import CachedAnswer, open_unit, read_record
from persea.distributions import DistributionKind
from persea.errors import DataError
from persea.losses import EventTargets
from persea.tokenization.tokens import RenderedTokens
from persea.training.dataset_stats import ExampleSummary, ExampleSummaryBuilder
from persea.training.example import Example, ExampleMaker, render_answer

EXAMPLE_FORMAT = 2  # raise it whenever the examples of the same answers change
MAX_OPEN_FILES = 128  # each holds a file descriptor, and 256 is the smallest limit in use
SUMMARY_NAMES = (
    "teacher_A",
    "language_A",
    "length_A",
    "effort_A",
    "thinking_dropped_A",
    "counts_AC",
)
TOKEN_NAMES = ("ids_T", "starts_T", "ends_T", "loss_mask_T")
# arrays of EventTargets by their length; numbers are stored in 4 bytes
TARGET_NAMES = (
    ("row_M", "event_M", "probs_M"),
    ("impossible_entry_D", "impossible_token_D"),
    ("row_R", "rest_R"),
    ("excluded_row_A", "excluded_token_A"),
)
FLOAT_NAMES = frozenset({"probs_M", "rest_R"})
OFFSET_NAMES = ("tokens", *(names[0] for names in TARGET_NAMES))


@dataclass(frozen=True, eq=False)
class ExampleStore:
    """Examples of a student in a folder, one file a unit of the cache.

    Attributes:
        folder: the folder; it is created if it does not exist.
        maker: makes the examples that are not there yet.
    """

    folder: Path
    maker: ExampleMaker

    def path(self, cache_folder: Path, unit: str) -> Path:
        """Return the file of a unit's examples."""
        record = read_record(cache_folder, unit)
        event_map = self.maker.event_maps.get(record["about"].get("teacher", ""))
        key = [
            EXAMPLE_FORMAT,
            record["sha256"],
            self.maker.renderer.digest,
            event_map.digest if event_map else "",
            any(self.maker.projectors.values()),
            self.maker.teach_end,
        ]
        return self.folder / f"{storage.digest_json(key)[:32]}.examples"

    def open(
        self, reader: CacheReader, on_answers: Callable[[int], None] = lambda count: None
    ) -> StoredExamples:
        """Open the examples of a cache; make those that are not there.

        Args:
            reader: the cache.
            on_answers: called with the number of answers that were read since the last call.

        Raises:
            DataError: a unit of the cache is damaged, or a distribution is invalid.
            StorageError: the disk cannot take the files.
        """
        paths = []
        summaries = []
        for unit in reader.unit_names:
            path = self.path(reader.folder, unit)
            summary = read_summary(path)
            if summary is None:
                summary = self.build(reader.folder, unit, on_answers)
            else:
                on_answers(len(summary.length_A))
            paths.append(path)
            summaries.append(summary)
        return StoredExamples(tuple(paths), tuple(summaries))

    def build(
        self,
        cache_folder: Path,
        unit: str,
        on_answers: Callable[[int], None] = lambda count: None,
    ) -> ExampleSummary:
        """Make and store the examples of a unit, whether or not they are there.

        Raises:
            DataError: the unit is damaged, or a distribution is invalid.
            StorageError: the disk cannot take the file.
        """
        builder, examples = ExampleSummaryBuilder(), list[Example | None]()
        for answer in open_unit(cache_folder, unit):
            examples.append(_survey(answer, self.maker, builder))
            on_answers(1)
        summary = builder.build()
        storage.write_atomic(self.path(cache_folder, unit), _encode(examples, summary))
        return summary

    def build_missing(self, readers: Sequence[CacheReader], part: int, parts: int) -> None:
        """Make a part of the examples that are not there: every `parts`-th unit, from `part` on."""
        units = [(reader.folder, unit) for reader in readers for unit in reader.unit_names]
        missing = [one for one in units if read_summary(self.path(*one)) is None]
        for cache_folder, unit in missing[part::parts]:
            self.build(cache_folder, unit)

    def delete_others(self, readers: Sequence[CacheReader]) -> None:
        """Delete all other files of the folder: of other caches, students and settings."""
        wanted = {
            self.path(reader.folder, unit).name for reader in readers for unit in reader.unit_names
        }
        for path in self.folder.glob("*"):  # with partial files of a killed process
            if path.name not in wanted:
                path.unlink(missing_ok=True)


def _survey(
    answer: CachedAnswer, maker: ExampleMaker, builder: ExampleSummaryBuilder
) -> Example | None:
    """Add an answer to a summary; return its example, or None if the student cannot write it."""
    try:
        tokens = render_answer(answer, maker.renderer)
    except DataError as error:
        builder.add_unrenderable(answer, error)
        return None
    example = maker.align(answer, tokens)
    builder.add(answer, example)
    return example


def summarize(
    answers: AnswerSource,
    maker: ExampleMaker,
    on_answers: Callable[[int], None] = lambda count: None,
) -> ExampleSummary:
    """Return the counts of answers that are not in units, without storing their examples."""
    builder = ExampleSummaryBuilder()
    for number in range(len(answers)):
        _survey(answers[number], maker, builder)
        on_answers(1)
    return builder.build()


class StoredExamples:
    """The examples of a cache, by the numbers of its answers.

    Args:
        paths: the file of each unit, in the order of the cache.
        summaries: the counts of each unit.
    """

    def __init__(self, paths: tuple[Path, ...], summaries: tuple[ExampleSummary, ...]) -> None:
        self.paths, self.summaries = paths, summaries
        self.offsets_U1 = np.cumsum([0, *(len(one.length_A) for one in summaries)])
        self._open = lru_cache(MAX_OPEN_FILES)(lambda k: _open_examples(paths[k]))

    def __len__(self) -> int:
        """Return the number of answers, with those that have no example."""
        return int(self.offsets_U1[-1])

    def __getitem__(self, number: int) -> Example:
        """Return the example of an answer.

        Raises:
            DataError: its bytes changed since they were written, or there is none.
        """
        unit = int(np.searchsorted(self.offsets_U1, number, side="right")) - 1
        return _decode(self._open(unit), number - int(self.offsets_U1[unit]), self.paths[unit])


def locate(source: AnswerSource, number: int) -> tuple[AnswerSource, int]:
    """Return the cache that holds an answer of a subset, and the answer's number in it."""
    whole: AnswerSource = source
    while isinstance(whole, AnswerSubset):
        number = int(whole.indices[number])
        whole = whole.parent
    return whole, number


def selected_answers(source: AnswerSource) -> tuple[AnswerSource, npt.NDArray[np.int64]]:
    """Return the cache behind a subset, and the numbers of the subset's answers in it."""
    whole: AnswerSource = source
    numbers = np.arange(len(source))
    while isinstance(whole, AnswerSubset):
        numbers = whole.indices[numbers]
        whole = whole.parent
    return whole, numbers


# --- the file ---


def _encode(examples: Sequence[Example | None], summary: ExampleSummary) -> bytes:
    """Return the file of a unit's examples."""
    parts: dict[str, list[npt.NDArray[np.generic]]] = {}
    sizes: dict[str, list[int]] = {name: [] for name in OFFSET_NAMES}
    checks, strings, kinds = [], dict[str, int](), []
    skill_A = []
    for example in examples:
        arrays = _arrays(example) if example else {}
        for name, values in arrays.items():
            parts.setdefault(name, []).append(values)
        sizes["tokens"].append(len(arrays.get("ids_T", ())))
        for names in TARGET_NAMES:
            sizes[names[0]].append(len(arrays.get(names[0], ())))
        checks.append(_checksum(arrays))
        skill_A.append(strings.setdefault(example.skill if example else "", len(strings)))
        kinds.append(_KINDS.index(example.targets.kind) if example else 0)
    tensors: dict[str, npt.NDArray[np.generic]] = {
        name: np.concatenate(values) for name, values in parts.items()
    }
    for name, counts in sizes.items():
        tensors[f"offsets {name}"] = np.cumsum([0, *counts], dtype=np.int64)
    tensors |= {
        "skill_A": np.array(skill_A, np.int32),
        "kind_A": np.array(kinds, np.int8),
        "checksum_A": np.array(checks, np.uint32),
    }
    tensors |= {name: getattr(summary, name) for name in SUMMARY_NAMES}
    about = {
        "teachers": summary.teachers,
        "languages": summary.languages,
        "skills": list(strings),
        "errors": summary.errors,
    }
    tensors["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    small = {name: tensors[name] for name in _SMALL_NAMES}
    tensors["digest"] = np.frombuffer(_digest(small), np.uint8)
    return bytes(save_tensors(tensors))


_KINDS = tuple(DistributionKind)
# everything that is read at every start, under one digest
_SMALL_NAMES = (
    "about",
    *SUMMARY_NAMES,
    "skill_A",
    "kind_A",
    "checksum_A",
    *(f"offsets {name}" for name in OFFSET_NAMES),
)


def _arrays(example: Example) -> dict[str, npt.NDArray[np.generic]]:
    arrays: dict[str, npt.NDArray[np.generic]] = {
        name: getattr(example.tokens, name) for name in TOKEN_NAMES
    }
    for name in (name for names in TARGET_NAMES for name in names):
        kept = np.float32 if name in FLOAT_NAMES else np.int32
        arrays[name] = getattr(example.targets, name).astype(kept)
    return arrays


def _checksum(arrays: Mapping[str, npt.NDArray[np.generic]]) -> int:
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), total)
    return total


def _digest(small: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    sha = hashlib.sha256()
    for name in _SMALL_NAMES:
        sha.update(f"{name} {small[name].shape} ".encode() + small[name].tobytes())
    return sha.digest()


@dataclass(frozen=True, eq=False)
class _OpenExamples:
    """An open file: the small arrays in memory, the others mapped."""

    file: Any
    small: Mapping[str, npt.NDArray[Any]]
    about: Mapping[str, Any]


def _open_examples(path: Path) -> _OpenExamples:
    """Open a file and check everything but the examples themselves.

    Raises:
        DataError: the file is missing or damaged.
    """
    remedy = f"delete {path}: the next start makes it anew"
    try:
        file: Any = safe_open(path, "np")
        small = {name: file.get_tensor(name) for name in _SMALL_NAMES}
        is_intact = _digest(small) == file.get_tensor("digest").tobytes()
    except (OSError, SafetensorError) as error:
        raise DataError("cannot be read", where=str(path), remedy=remedy) from error
    if not is_intact:
        raise DataError("its bytes changed since persea wrote it", where=str(path), remedy=remedy)
    return _OpenExamples(file, small, json.loads(small["about"].tobytes()))


def read_summary(path: Path) -> ExampleSummary | None:
    """Return the counts of a stored unit; None if there are none, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        opened = _open_examples(path)
    except DataError:
        return None
    about = opened.about
    arrays: dict[str, Any] = {name: opened.small[name] for name in SUMMARY_NAMES}
    return ExampleSummary(
        teachers=tuple(about["teachers"]),
        languages=tuple(about["languages"]),
        errors=tuple((number, words) for number, words in about["errors"]),
        **arrays,
    )


def _decode(opened: _OpenExamples, number: int, path: Path) -> Example:
    """Read one example."""
    small, about = opened.small, opened.about
    damaged = DataError(
        f"example {number} is not as it was written",
        where=str(path),
        remedy=f"delete {path}: the next start makes it anew",
    )

    def read(name: str, group: str) -> npt.NDArray[Any]:
        begin, end = small[f"offsets {group}"][number : number + 2].tolist()
        if begin == end:
            return np.empty(0, _DTYPES.get(name, np.int32))
        values: npt.NDArray[Any] = opened.file.get_slice(name)[begin:end]
        return values

    try:
        tokens = {name: read(name, "tokens") for name in TOKEN_NAMES}
        targets = {name: read(name, names[0]) for names in TARGET_NAMES for name in names}
    except SafetensorError as error:
        raise damaged from error
    if _checksum(tokens | targets) != small["checksum_A"][number] or not len(tokens["ids_T"]):
        raise damaged
    wide: dict[str, Any] = {
        name: values if name in FLOAT_NAMES else values.astype(np.int64)
        for name, values in targets.items()
    }
    return Example(
        RenderedTokens(**tokens),
        about["teachers"][small["teacher_A"][number]],
        about["skills"][small["skill_A"][number]],
        about["languages"][small["language_A"][number]],
        EventTargets(**wide, kind=_KINDS[int(small["kind_A"][number])]),
        small["counts_AC"][number],
    )


_DTYPES = {"loss_mask_T": np.bool_, **dict.fromkeys(FLOAT_NAMES, np.float32)}
