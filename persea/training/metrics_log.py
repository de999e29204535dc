"""metrics.jsonl: a line is appended at every logged step, and cut off where a training resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from persea import storage


def encode_log_line(line: Mapping[str, Any]) -> bytes:
    """Return a line of metrics.jsonl.

    Raises:
        ValueError: The line contains NaN or Infinity.
    """
    return (json.dumps(line, allow_nan=False) + "\n").encode()


class MetricsLog:
    """The file metrics.jsonl of a training.

    A line is on the disk as soon as its step is done. A kill may therefore leave lines of steps
    that no checkpoint holds, and the first part of a line; `restore` cuts them off, and the
    repeated steps write them again.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: tuple[Mapping[str, Any], ...] = ()
        self._ends: list[int] = []  # offset of the end of each line

    def restore(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Cut the file to the lines of the checkpoint that a training resumes.

        Raises:
            StorageError: The file cannot be written.
        """
        encoded = [encode_log_line(line) for line in lines]
        data = b"".join(encoded)
        before = self.path.read_bytes() if self.path.is_file() else b""
        if before.startswith(data):
            if before != data:
                storage.append_bytes(self.path, len(data), b"")
        else:  # another run's, or damaged
            storage.write_atomic(self.path, data)
        self._lines, self._ends = tuple(lines), list(accumulate(map(len, encoded)))

    def update(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append the lines that are new. A last line that was replaced is written again.

        Raises:
            StorageError: The file cannot be written.
        """
        kept = min(len(lines), len(self._lines))
        while kept and lines[kept - 1] is not self._lines[kept - 1]:
            kept -= 1
        if kept == len(lines) == len(self._lines):
            return
        encoded = [encode_log_line(line) for line in lines[kept:]]
        begin = self._ends[kept - 1] if kept else 0
        storage.append_bytes(self.path, begin, b"".join(encoded))
        self._ends[kept:] = [begin + end for end in accumulate(map(len, encoded))]
        self._lines = tuple(lines)

    def sync(self) -> None:
        """Flush the file to the disk, as a checkpoint is."""
        if self._lines:
            storage.sync_file(self.path)
