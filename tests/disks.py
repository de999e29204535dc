"""Stand-ins for `persea.storage.DISK` that record, fail, or kill the process."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from persea.storage import Disk

Step = tuple[Any, ...]
STEPS = ("make", "create", "open_at", "write", "sync", "replace", "link", "remove", "sync_folder")


class Watched(Disk):
    """Calls `step` before and `done` after each change of the disk; a write is a change too."""

    def step(self, *what: Any) -> None:
        """Called before a change."""

    def done(self, *what: Any) -> None:
        """Called after a change."""

    def make(self, folder: Path) -> None:
        self._do(super().make, "make", folder)

    def create(self, path: Path) -> BinaryIO:
        self._do(lambda path: None, "create", path)
        return io.BufferedWriter(_File(self, path))  # type: ignore[return-value]

    def open_at(self, path: Path, offset: int) -> BinaryIO:
        self._do(lambda path, offset: None, "open_at", path, offset)
        file = _File(self, path, "r+b" if path.exists() else "wb")
        file.truncate(offset)
        file.seek(offset)
        return io.BufferedWriter(file)  # type: ignore[return-value]

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        self._do(lambda path: super(Watched, self).sync(file), "sync", Path(file.name))

    def replace(self, path: Path, by: Path) -> None:
        self._do(super().replace, "replace", path, by)

    def link(self, path: Path, to: Path) -> None:
        self._do(super().link, "link", path, to)

    def remove(self, path: Path) -> None:
        self._do(super().remove, "remove", path)

    def sync_folder(self, folder: Path) -> None:
        self._do(super().sync_folder, "sync_folder", folder)

    def _do(self, work: Any, *what: Any) -> None:
        self.step(*what)
        work(*what[1:])
        self.done(*what)


class _File(io.FileIO):
    def __init__(self, disk: Watched, path: Path, mode: str = "wb") -> None:
        self.disk = disk
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        self.disk.step("write", Path(str(self.name)), bytes(data))
        written = super().write(data)
        self.disk.done("write", Path(str(self.name)), bytes(data))
        return written or 0


@dataclass
class Recording(Watched):
    """Records every change except the kinds in `forget`."""

    forget: tuple[str, ...] = ()
    steps: list[Step] = field(default_factory=list)

    def done(self, *what: Any) -> None:
        if what[0] not in self.forget:
            self.steps.append(what)


@dataclass
class Failing(Watched):
    """The n-th change fails, and all later ones if `lasts`."""

    at: int
    error: int = errno.ENOSPC
    lasts: bool = False
    seen: int = 0
    fired: int = 0

    def step(self, *what: Any) -> None:
        self.seen += 1
        if self.seen == self.at or (self.lasts and self.seen > self.at):
            self.fired += 1
            raise OSError(self.error, os.strerror(self.error))


@dataclass
class Dying(Watched):
    """SIGKILL before or after the n-th change."""

    at: int
    after: bool = False
    seen: int = 0

    def step(self, *what: Any) -> None:
        self.seen += 1
        if self.seen == self.at and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)

    def done(self, *what: Any) -> None:
        if self.seen == self.at and self.after:
            os.kill(os.getpid(), signal.SIGKILL)


# --- power loss -----------------------------------------------------------------------------------


@dataclass
class _Pending:
    """The state of a disk and what a power loss may undo: data by inode, names by folder."""

    kept: dict[int, bytes] = field(default_factory=dict)  # synced
    cached: dict[int, bytes] = field(default_factory=dict)  # written
    names: dict[Path, int] = field(
        default_factory=dict
    )  # as the running system sees them; -1 = a folder
    durable: dict[Path, int] = field(default_factory=dict)  # in synced folders
    loose: list[tuple[Path, dict[Path, int | None]]] = field(
        default_factory=list
    )  # (folder, names given or taken), not synced

    def apply(self, step: Step) -> None:
        kind, path = step[0], step[1]
        if kind == "make":
            self._name(path.parent, {path: -1})
        elif kind == "create":
            inode = len(self.cached)
            self.cached[inode] = b""
            self._name(path.parent, {path: inode})
        elif kind == "open_at" and path in self.names:
            self.cached[self.names[path]] = self.cached[self.names[path]][: step[2]]
        elif kind == "open_at":
            inode = len(self.cached)
            self.cached[inode] = b""
            self._name(path.parent, {path: inode})
        elif kind == "write":
            self.cached[self.names[path]] += step[2]
        elif kind == "sync":
            self.kept[self.names[path]] = self.cached[self.names[path]]
        elif kind == "replace":
            self._name(path.parent, {path: self.names[step[2]], step[2]: None})
        elif kind == "link":
            self._name(path.parent, {path: self.names[step[2]]})
        elif kind == "remove" and path in self.names:
            self._name(path.parent, {path: None})
        elif kind == "sync_folder":
            for folder, change in self.loose:
                if folder == path:
                    _change(self.durable, change)
            self.loose = [one for one in self.loose if one[0] != path]

    def _name(self, folder: Path, change: dict[Path, int | None]) -> None:
        _change(self.names, change)
        self.loose.append((folder, change))


def _change(names: dict[Path, int], change: dict[Path, int | None]) -> None:
    for path, inode in change.items():
        if inode is None:
            names.pop(path, None)
        else:
            names[path] = inode


def after_power_loss(steps: list[Step]) -> Iterator[dict[Path, bytes | None]]:
    """Yield what the disk may hold after a power loss following these steps: path -> bytes, None =
    folder.

    Names that no sync of their folder has secured may exist or not: none of them, all, each one
    alone, all but one. Data that no sync has secured may be complete, half, or missing.
    """
    state = _Pending()
    for step in steps:
        state.apply(step)
    n = len(state.loose)
    chosen = {
        (),
        tuple(range(n)),
        *((k,) for k in range(n)),
        *(tuple(j for j in range(n) if j != k) for k in range(n)),
    }
    for some in sorted(chosen):
        names = dict(state.durable)
        for k in some:
            _change(names, state.loose[k][1])
        for share in (0.0, 0.5, 1.0):
            tree: dict[Path, bytes | None] = {}
            for path, inode in sorted(names.items()):
                if path.parent not in tree and path.parent in state.names:
                    continue  # its folder did not make it
                written = state.cached.get(inode, b"")
                tree[path] = (
                    None
                    if inode < 0
                    else state.kept.get(inode, written[: int(len(written) * share)])
                )
            yield tree
