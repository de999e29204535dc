"""Files are complete or absent, the first record wins, one run holds a folder, and disk faults exit
with 6."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from persea import storage as store
from persea.errors import DataError, StorageError
from tests.disks import Recording

SIZES = (3_000_000, 1_000_000)


def child(code: str, *arguments: object, wrap: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Run Python code in its own process."""
    return subprocess.Popen(
        [*wrap, sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def hidden(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


# --- publish --------------------------------------------------------------------------------------


def test_write_atomic_writes_the_bytes_and_returns_their_digest(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "file"
    sha = store.write_atomic(path, b"persea")
    assert path.read_bytes() == b"persea"
    assert sha == store.digest_bytes(b"persea") == store.digest_file(path)
    assert not hidden(tmp_path)


def test_digest_is_sha256_also_of_a_file_longer_than_a_block(tmp_path: Path) -> None:
    assert (
        store.digest_bytes(b"abc")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-2
    data = random.Random(0).randbytes((1 << 20) + 17)
    (tmp_path / "long").write_bytes(data)
    assert store.digest_file(tmp_path / "long") == store.digest_bytes(data)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, stop = tmp_path / "file", threading.Event()
    store.write_atomic(path, b"\0" * SIZES[0])
    seen: dict[int, int] = {}

    def watch() -> None:
        while not stop.is_set():
            size = path.stat().st_size
            seen[size] = seen.get(size, 0) + 1

    poller = threading.Thread(target=watch)
    poller.start()
    try:
        for k in range(30):
            store.write_atomic(path, bytes([k]) * SIZES[k % 2])
    finally:
        stop.set()
        poller.join()
    assert set(seen) == set(SIZES)
    assert sum(seen.values()) > 300
    assert not hidden(tmp_path)


def test_a_killed_writer_leaves_the_file_complete(tmp_path: Path) -> None:
    path, rng, killed = tmp_path / "file", random.Random(5), 0

    code = (
        "import sys, itertools\nfrom pathlib import Path\nfrom persea import storage as store\n"
        f"for k in itertools.count():\n    store.write_atomic(Path(sys.argv[1]), bytes([k % "
        f"256]) * {SIZES[1]})\n    print(k, flush=True)"
    )
    for _ in range(6):
        process = child(code, path)
        assert process.stdout and process.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
        data = path.read_bytes()
        assert data == data[:1] * SIZES[1]
    assert killed == 6


def test_publish_survives_a_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are on the disk before the name points to them, and the name before the call
    returns.

    SIGKILL cannot show this.
    """
    order: list[str] = []
    fsync, replace, link = os.fsync, Path.replace, os.link
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (order.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)),
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("replace"), replace(self, to))
    )
    monkeypatch.setattr(os, "link", lambda one, other: (order.append("link"), link(one, other)))
    store.write_atomic(tmp_path / "file", b"x")
    assert order == [f".file.{os.getpid()}.tmp", "replace", tmp_path.name]
    order.clear()
    store.create_json_once(tmp_path / "record", {})
    assert order == [f".record.{os.getpid()}.tmp", "link", tmp_path.name]


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    (tmp_path / f".out.{os.getpid()}.tmp" / "left").mkdir(parents=True)
    with store.open_atomic_folder(tmp_path / "out") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a").write_text("a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and [
        p.name for p in (tmp_path / "out").iterdir()
    ] == ["part"]


def test_a_folder_appears_complete_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (order.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)),
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("replace"), replace(self, to))
    )
    with store.open_atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert not list((tmp_path / "out").iterdir())
    neighbour = f".out.{os.getpid()}.tmp"
    assert (
        order[-4:] == ["a", neighbour, "replace", tmp_path.name]
        and (tmp_path / "out" / "a").read_text() == "a"
    )
    with (
        pytest.raises(StorageError, match="not empty"),
        store.open_atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "b").write_text("b")
    assert sorted(os.listdir(tmp_path)) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


# --- commit ---------------------------------------------------------------------------------------


def test_the_first_commit_wins(tmp_path: Path) -> None:
    path = tmp_path / "records" / "a.json"
    store.create_json_once(path, {"attempt": 1})
    store.create_json_once(path, {"attempt": 2})
    assert store.read_json(path) == {"attempt": 1}
    assert not hidden(tmp_path)


def test_of_many_processes_that_commit_at_once_one_wins_and_none_fails(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom persea import storage as "
        "store\nprint('ready', flush=True)\nsys.stdin.read()\n"
        "store.create_json_once(Path(sys.argv[1]), {'by': sys.argv[2], 'long': 'x' * 100_000})"
    )
    many = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "a.json"), str(k)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for k in range(4)
    ]
    for process in many:
        assert process.stdout and process.stdout.readline() == b"ready\n"
    for process in many:
        assert process.stdin
        process.stdin.close()
    assert [process.wait() for process in many] == [0] * 4
    assert store.read_json(tmp_path / "a.json")["by"] in "0123"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    for process in many:
        assert process.stdout
        process.stdout.close()


# --- JSON -----------------------------------------------------------------------------------------


def test_json_comes_back_and_nan_is_refused(tmp_path: Path) -> None:
    value = {"ü": [1, 2.5, None, "漢"]}
    store.write_json(tmp_path / "a.json", value)
    assert store.read_json(tmp_path / "a.json") == value
    assert "ü" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        store.write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_missing_json_names_the_stage_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"audition/cast\.json: not there -> run the stage that writes audition/ first",
    ) as caught:
        store.read_json(tmp_path / "audition" / "cast.json")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"a": 1}}', b"\xff\xfe", json.dumps({"a": "b"}).encode()[:-3]]
)
def test_broken_json_names_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.json: not JSON: .* -> delete"):
        store.read_json(tmp_path / "a.json")


# --- lock -----------------------------------------------------------------------------------------

HOLD = (
    "import sys\nfrom pathlib import Path\nfrom persea import storage as store\n"
    "with store.lock_run_folder(Path(sys.argv[1])):\n    print('held', flush=True)\n    "
    "sys.stdin.read()"
)


def test_a_second_run_on_a_folder_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdout and first.stdout.readline() == b"held\n"
    for _ in range(20):
        with (
            pytest.raises(
                StorageError, match=rf"another run holds this folder \(pid {first.pid} on .+\)"
            ) as caught,
            store.lock_run_folder(tmp_path / "run"),
        ):
            pytest.fail("two runs hold one folder")
        assert caught.value.exit_code == 6
    first.kill()  # a lock does not outlive its holder, however that ends
    first.wait()
    first.stdout.close()
    with store.lock_run_folder(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").read_text().startswith(f"pid {os.getpid()} on ")
    with store.lock_run_folder(tmp_path / "run"):
        pass


def test_a_lock_in_a_place_that_is_no_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(StorageError, match="cannot write"),
        store.lock_run_folder(tmp_path / "file"),
    ):
        pytest.fail("a file was locked as a folder")


@pytest.mark.parametrize("name", ["lock", "locks/cache"])
def test_a_link_in_the_place_of_a_lock_is_refused_and_its_target_stays(
    tmp_path: Path, name: str
) -> None:
    target = tmp_path / "precious"
    target.write_text("keep me")
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    held = store.lock_run_folder(tmp_path / "run") if name == "lock" else store.hold_lock(path)
    with pytest.raises(StorageError, match="cannot write"), held:
        pytest.fail("a link was locked")
    assert target.read_text() == "keep me"


# --- files that a user names ---


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "long name", "NUL", "loop", "large"])
def test_what_is_no_file_of_a_bounded_size_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("device", "loop"):
        path.symlink_to("/dev/zero" if kind == "device" else path)
    elif kind == "large":
        path.write_bytes(b"x" * 101)
    else:
        path = tmp_path / ("x" * 300 if kind == "long name" else "a\0b")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as caught:
        store.read_input_bytes(path, 100)
    assert caught.value.filename == str(path)
    assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "good").write_bytes(b"x" * 100)
    assert store.read_input_bytes(tmp_path / "good", 100) == b"x" * 100


# --- disks that fail ------------------------------------------------------------------------------

TRY = """
import sys
from pathlib import Path
from persea import storage as store
from persea.errors import StorageError
folder, big = Path(sys.argv[1]), b"x" * 2_000_000

def hold():
    with store.lock_run_folder(folder / "run"):
        pass

def write():
    store.write_atomic(folder / "big", big)

def create():
    store.create_json_once(folder / "big.json", {"x": "x" * len(big)})

for work in (write, create, hold):
    try:
        work()
    except StorageError as error:
        print(error.exit_code, error)
    else:
        print("written")
print(sorted(p.name for p in folder.rglob("*")), (folder / "early").read_bytes())
"""


def in_namespace(prepare: str, folder: Path) -> list[str]:
    """Run TRY where `prepare` has mounted something at the folder; skips without user
    namespaces."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip(
            "no unprivileged user namespaces here (unshare -rm): a full disk cannot be made"
        )
    folder.mkdir()
    script = prepare.replace("@", str(folder)) + f' && exec {sys.executable} -c "$0" {folder}'
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, TRY], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_is_a_storage_error_and_leaves_no_half_file(tmp_path: Path) -> None:
    fill = (
        "mount -t tmpfs -o size=1m tmpfs @ && printf early > @/early && mkdir @/run && ! cat "
        "/dev/zero > @/run/full 2> /dev/null"
    )
    big, record, lock, files = in_namespace(fill, tmp_path / "disk")
    for line in (big, record, lock):
        assert line.startswith("6 ")
        assert "No space left on device -> free space" in line
    assert files == "['early', 'full', 'lock', 'run'] b'early'"


def test_a_read_only_disk_is_a_storage_error(tmp_path: Path) -> None:
    mount = "mount -t tmpfs tmpfs @ && printf early > @/early && mount -o remount,ro @"
    *refused, files = in_namespace(mount, tmp_path / "disk")
    assert len(refused) == 3
    for line in refused:
        assert line.startswith("6 ")
        assert "Read-only file system" in line
    assert files == "['early'] b'early'"


def test_a_file_that_may_not_grow_is_a_storage_error(tmp_path: Path) -> None:
    """The same without namespaces: a limit on the file size fails every larger write."""
    (tmp_path / "early").write_bytes(b"early")
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    big, record, lock, files = done.stdout.splitlines()
    assert big.startswith("6 ")
    assert record.startswith("6 ")
    assert "File too large" in big + record
    assert (lock, files) == ("written", "['early', 'lock', 'run'] b'early'")


def test_a_nested_folder_is_synced_from_the_deepest_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Recording()
    monkeypatch.setattr(store, "DISK", disk)
    with store.open_atomic_folder(tmp_path / "out") as folder:
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "file").write_text("x")
    synced = [step[1].name for step in disk.steps if step[0] in ("sync", "sync_folder")]
    assert synced == ["file", "b", "a", f".out.{os.getpid()}.tmp", tmp_path.name]


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]", "{", b"\xff"])
def test_json_of_the_standard_only(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        store.parse_strict_json(text)
    assert store.parse_strict_json('{"a": [1.5, null]}') == {"a": [1.5, None]}
