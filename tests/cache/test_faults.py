"""Killed, out of power, out of space: what is committed stays, the rest is done again, and the
cache ends with the same bytes.

Every injector says that it fired, and the last tests take away fsync, digests and commits and see
the others fail.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from persea import storage as store
from persea.cache import unit as cache
from persea.cache.maintenance import committed_units, verify_cache
from persea.cache.reader import open_cache_reader
from persea.errors import DataError, PerseaError, StorageError
from tests.cache.test_unit import TAU, captures
from tests.cli.test_cli import tree
from tests.disks import STEPS, Dying, Failing, Recording, Step, after_power_loss

NAMES = tuple(f"unit{k}" for k in range(3))
SAID = {
    name: captures(k, 3) for k, name in enumerate(NAMES)
}  # made before any fork: torch's threads do not survive one


def work(folder: Path) -> int:
    """What a capture does with its disk: every unit that is not committed is written; how many that
    were.
    """
    todo = [name for name in NAMES if not cache.is_committed(folder, name)]
    for name in todo:
        cache.write_unit(folder, name, SAID[name], {"length": 1}, tau=TAU)
    return len(todo)


def visible(folder: Path) -> dict[str, bytes]:
    return {
        name: data
        for name, data in tree(folder).items()
        if not name.rpartition("/")[2].startswith(".")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What undisturbed work leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert work(folder) == len(NAMES)
    return tree(folder)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[store.Disk], None]:
    return lambda disk: monkeypatch.setattr(store, "DISK", disk)


# --- killed ---


def killed(folder: Path, disk: store.Disk) -> bool:
    """Work in a child until the disk kills it; False where it came through."""
    child = os.fork()
    if not child:
        store.DISK = disk
        try:
            work(folder)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_step_it_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], after: bool
) -> None:
    at = 0
    while killed(tmp_path / f"{(at := at + 1)}", Dying(at, after)):
        folder = tmp_path / f"{at}"
        stood = len(committed_units(folder)) if folder.is_dir() else 0
        assert (
            len(list(folder.glob("units/*.safetensors"))) <= stood + 1
        )  # at most one unit is done twice
        before = visible(folder)
        assert (
            [f for f in verify_cache(folder) if not f.is_harmless] == []
            if folder.is_dir()
            else True
        )
        assert work(folder) == len(NAMES) - stood
        assert visible(folder) == whole
        assert {n: d for n, d in before.items() if "commits" in n}.items() <= whole.items()
        shutil.rmtree(folder)
    assert at > 36


def test_killed_again_and_again_each_unit_is_asked_at_most_once_more(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    rng, kills = random.Random(3), 0
    while killed(tmp_path, Dying(rng.randrange(4, 20), rng.random() < 0.5)):
        kills += 1
    assert kills >= 3
    assert visible(tmp_path) == whole


# --- power loss ---


def recorded(folder: Path, forget: tuple[str, ...] = ()) -> list[Step]:
    """The changes of the whole work, made in a folder of its own and told as if in this one."""
    disk = Recording(forget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "DISK", disk)
        with tempfile.TemporaryDirectory() as real:
            work(Path(real) / "run")
            base = Path(real)
    return [
        tuple(folder / p.relative_to(base) if isinstance(p, Path) else p for p in step)
        for step in disk.steps
    ]


def lay(root: Path, found: dict[Path, bytes | None]) -> None:
    for path, data in found.items():
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def sound_after_power_loss(folder: Path, steps: list[Step], every: int = 1) -> Counter[str]:
    """Lay down every disk that may be left after every prefix; no committed unit may be broken. How
    many disks, how many sound.
    """
    told: Counter[str] = Counter()
    promised: list[str] = []
    for length in range(0, len(steps) + 1):
        if (
            length
            and steps[length - 1][0] == "sync_folder"
            and steps[length - 1][1].name == "commits"
        ):
            promised = [
                NAMES[k] for k in range(len(promised) + 1)
            ]  # write_unit returned: this one was promised
        if length % every:
            continue
        for found in after_power_loss(steps[:length]):
            shutil.rmtree(folder, ignore_errors=True)
            lay(folder, found)
            told["disks"] += 1
            run = folder / "run"
            try:
                for name in committed_units(run):
                    cache.read_unit(run, name)
                told["sound"] += set(promised) <= set(committed_units(run))
            except PerseaError:
                told["broken"] += 1
    return told


def test_after_a_power_loss_no_committed_unit_is_broken_and_none_is_lost(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    steps = recorded(tmp_path / "disk")
    assert {s[0] for s in steps} == set(STEPS) - {"open_at"}  # that appends to a metrics log
    assert len(steps) > 36
    told = sound_after_power_loss(tmp_path / "disk", steps)
    assert told["disks"] > 300
    assert told["sound"] == told["disks"]
    lay(tmp_path / "disk", next(iter(after_power_loss(steps[:30]))))
    work(tmp_path / "disk" / "run")
    assert visible(tmp_path / "disk" / "run") == whole


# --- a disk that fails ---


@pytest.mark.parametrize(
    "error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE], ids=lambda e: errno.errorcode[e]
)
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
def test_whatever_fails_is_told_and_costs_nothing_that_was_committed(
    tmp_path: Path,
    whole: dict[str, bytes],
    on: Callable[[store.Disk], None],
    error: int,
    lasts: bool,
) -> None:
    at, fired, stride = 0, 0, 1 if error == errno.ENOSPC else 3
    while True:
        at += stride
        folder, disk = tmp_path / f"{at}", Failing(at, error, lasts)
        on(disk)
        try:
            work(folder)
        except StorageError as told:
            assert told.exit_code == 6
            assert os.strerror(error) in str(told)
            assert "committed work is kept" in told.remedy
        else:
            if not disk.fired:
                break
        fired += disk.fired > 0
        on(store.Disk())
        if folder.is_dir():
            assert [f for f in verify_cache(folder) if not f.is_harmless] == []
        work(folder)
        assert visible(folder) == whole
        shutil.rmtree(folder)
    assert fired == at // stride - 1
    assert at > 36


def test_a_file_that_cannot_be_opened_is_not_called_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(tmp_path)
    fired = []

    def refuse(*_: object) -> None:
        fired.append(1)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(cache.np, "memmap", refuse)
    with pytest.raises(
        StorageError,
        match=(
            r"unit0\.safetensors: cannot read: Too many open files -> check the disk and "
            r"`ulimit -n`"
        ),
    ):
        cache.open_unit(tmp_path, "unit0")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StorageError, match=r"unit0\.json: cannot read"):
        cache.read_record(tmp_path, "unit0")
    assert len(fired) == 2


def test_a_reader_of_more_units_than_files_may_be_open(tmp_path: Path) -> None:
    """A map holds a descriptor: 64 of them, and 150 units."""
    for k in range(150):
        cache.write_unit(tmp_path, f"u{k}", SAID["unit0"][:1], {}, tau=TAU)
    child = os.fork()
    if not child:
        status = 1
        try:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (64 + len(os.listdir("/proc/self/fd")), 4096)
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("persea.cache.reader.MAX_OPEN_UNITS", 32)
                read = open_cache_reader(tmp_path, [f"u{k}" for k in range(150)])
                status = sum(1 for n in read.epoch_order(0, 0).tolist() if read[n]) != 150
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# --- flips ---


def undetected_flips(folder: Path, flips: int) -> int:
    """Flip one bit at a time over every kind of file; how many reads of the whole cache went
    through.
    """
    rng, files = random.Random(1), sorted(p for p in folder.rglob("*") if p.is_file())
    passed = 0
    for k in range(flips):
        path = files[k % len(files)]
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            for name in NAMES:
                tuple(cache.open_unit(folder, name))
            passed += 1
        except DataError:
            pass
        path.write_bytes(data)
    return passed


def test_no_flip_passes_a_reader(tmp_path: Path) -> None:
    work(tmp_path)
    assert undetected_flips(tmp_path, 200) == 0


# --- without what protects it, the tests above fail ---


@pytest.mark.parametrize("forget", ["sync", "sync_folder"])
def test_without_fsync_a_power_loss_breaks_or_loses_committed_units(
    tmp_path: Path, forget: str
) -> None:
    told = sound_after_power_loss(
        tmp_path / "disk", recorded(tmp_path / "disk", (forget,)), every=5
    )
    assert told["sound"] < told["disks"]


def test_without_digests_flips_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = hashlib.sha256(b"")

    def same(*_: object) -> SimpleNamespace:
        return SimpleNamespace(
            update=lambda data: None, digest=fixed.digest, hexdigest=fixed.hexdigest
        )

    monkeypatch.setattr(cache, "hashlib", SimpleNamespace(sha256=same))
    work(tmp_path)
    try:
        passed = undetected_flips(tmp_path, 60)
    except Exception:  # or the decoder falls over what no digest stopped
        passed = 1
    assert passed


def test_without_commits_work_is_done_again_or_taken_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    monkeypatch.setattr(store, "create_json_once", lambda path, record: None)
    work(tmp_path)
    assert work(tmp_path) == len(NAMES)  # all of it again
    assert visible(tmp_path) != whole


@pytest.fixture(autouse=True)
def real_disk() -> Iterator[None]:
    """No test leaves its disk to the next."""
    yield
    assert type(store.DISK) is store.Disk
