"""Copies of a run's status in the object store of its captures, for `persea status` elsewhere.

A run with `capture.store: s3://bucket/persea` writes its status, ledger and recipe to
`runs/NAME-DIGEST/` there, at most every half minute and when it ends. The copies are for people
alone: no run reads them, and a store that fails costs a copy.
"""

from __future__ import annotations

import hashlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from persea.cache.object_store import ObjectStore, is_object_store
from persea.errors import DataError, PerseaError
from persea.executors.ledger import LEDGER_FILE
from persea.pipeline.status import STATUS_FILE, RunState, RunStatus, read_status

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext

COPIED_FILES = (LEDGER_FILE, "recipe.yaml", STATUS_FILE)
RUNS_FOLDER = "runs"
COPY_INTERVAL_S = 30.0
STALE_AFTER_S = 300.0  # a run that writes no status for so long does not run any more


@dataclass
class StatusCopies:
    """Writes the copies of one run.

    Attributes:
        store: The store.
        folder: The run folder.
        warn: Called with the reason, once, if the store fails.
        clock: Monotonic seconds.
    """

    store: ObjectStore
    folder: Path
    warn: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _last: float | None = None
    _has_failed: bool = False

    def write(self, is_end: bool = False) -> None:
        """Copy the files, unless that was done a moment ago."""
        now = self.clock()
        if not is_end and self._last is not None and now - self._last < COPY_INTERVAL_S:
            return
        self._last = now
        try:
            for name in COPIED_FILES:
                if (self.folder / name).is_file():
                    path = f"{RUNS_FOLDER}/{run_key(self.folder)}/{name}"
                    self.store.write_file(path, (self.folder / name).read_bytes())
        except (PerseaError, OSError) as error:
            if not self._has_failed:
                self.warn(f"no status in the store: {error}")
            self._has_failed = True


def run_key(folder: Path) -> str:
    """Return the name of a run's copies: of its folder, and a digest of machine and path."""
    path = folder.absolute()
    digest = hashlib.sha256(f"{socket.gethostname()}:{path}".encode()).hexdigest()
    return f"{path.name}-{digest[:8]}"


def status_copies(context: RunContext, warn: Callable[[str], None]) -> StatusCopies | None:
    """Return what copies the status of a run; None if its captures are in no object store."""
    store = context.recipe.capture.store
    if not is_object_store(store):
        return None
    return StatusCopies(ObjectStore(store), context.folder, warn)


def read_copied_statuses(url: str) -> Iterator[tuple[str, RunStatus]]:
    """Yield (URL, status) of a run in a store, or of every run of a store.

    Args:
        url: The store, as the recipe has it; or the folder of a run in it.

    Raises:
        DataError: There is no run.
        StorageError: The store cannot be read.
    """
    store = ObjectStore(url.rstrip("/"))
    if store.read_file(STATUS_FILE) is not None:
        yield store.url, _read_copy(store, "")
        return
    names = store.list_folders(RUNS_FOLDER)
    if not names:
        raise DataError(
            "no run in this store",
            where=url,
            remedy="give the `capture.store:` of a run; the first copy comes half a minute after "
            "its start",
        )
    for name in names:
        yield f"{store.url}/{RUNS_FOLDER}/{name}", _read_copy(store, f"{RUNS_FOLDER}/{name}/")


def _read_copy(store: ObjectStore, prefix: str) -> RunStatus:
    with _downloaded(store, prefix) as folder:
        found = read_status(folder)
    if found.state is not RunState.DIED:
        return found
    # no lock travels to a store: what was running and still writes is taken to be alive
    age = time.time() - found.updated_at
    if age < STALE_AFTER_S:
        return replace(found, state=RunState.RUNNING, error="")
    error = f"no status for {age / 60:.0f} min: the run ended without recording why, or its store"
    return replace(found, error=f"{error} cannot be written -> look at its machine")


@contextmanager
def _downloaded(store: ObjectStore, prefix: str) -> Iterator[Path]:
    """Yield a run folder with the copied files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "lock").touch()
        for file in COPIED_FILES:
            data = store.read_file(prefix + file)
            if data is not None:
                (folder / file).write_bytes(data)
        yield folder
