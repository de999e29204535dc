"""Units in an object store: the first record stays, damage is found, a failing store is named.

The S3 cases run against moto's real server on the loopback interface, if moto and s3fs are here.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from persea.cache.object_store import ObjectStore, is_object_store
from persea.cache.unit import read_record, read_unit, write_unit
from persea.errors import MissingRequirementError, RecipeError, StorageError
from tests.cli.test_cli import tree

NAME = "0" * 32


def unit_in(
    folder: Path, name: str, text: str = "", quarantine: Sequence[tuple[str, str]] = ()
) -> None:
    """A cache folder with one unit that holds no answer, and a text in its metadata."""
    left_out = {"refused": len(quarantine)}
    write_unit(
        folder, name, [], left_out, tau=0.02, unit_metadata={"x": text}, quarantine=quarantine
    )


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server; yields the URL of a bucket."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = server_module.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    variables = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "value",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    import fsspec

    # file systems are kept by their arguments: an earlier module's is of another server
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with contextlib.suppress(FileExistsError):  # moto keeps its buckets from server to server
        fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket/persea"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        return ObjectStore(f"file://{tmp_path}/store")
    return ObjectStore(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def objects(store: ObjectStore) -> list[str]:
    file_system, root = store._file_system
    file_system.invalidate_cache()
    return sorted(path.removeprefix(root) for path in file_system.find(root))


def test_a_unit_travels_whole(store: ObjectStore, tmp_path: Path) -> None:
    source, into = tmp_path / "a", tmp_path / "b"
    unit_in(source, NAME)
    assert not store.fetch(NAME, into)
    assert store.publish(NAME, source)
    assert store.fetch(NAME, into)
    assert tree(into) == tree(source)
    assert read_unit(into, NAME) == ()
    sha = read_record(source, NAME)["sha256"]
    assert [path for path in objects(store) if "probe" not in path] == [
        f"/local/commits/{NAME}.json",
        f"/local/units/{NAME}-{sha[:16]}.safetensors",
    ]


def test_the_first_record_stays_and_the_loser_leaves_no_object(
    store: ObjectStore, tmp_path: Path
) -> None:
    unit_in(tmp_path / "a", NAME, text="one")
    unit_in(tmp_path / "b", NAME, text="two")
    assert store.publish(NAME, tmp_path / "a")
    other = ObjectStore(store.url)
    assert not other.publish(NAME, tmp_path / "b")
    assert not other.publish(NAME, tmp_path / "a")
    assert store.fetch(NAME, tmp_path / "c")
    assert tree(tmp_path / "c") == tree(tmp_path / "a")
    assert len([path for path in objects(store) if "/units/" in path]) == 1


def test_only_a_store_that_refuses_in_one_step_counts_as_such(s3: str, tmp_path: Path) -> None:
    assert ObjectStore(f"{s3}/probe").creates_once
    assert objects(ObjectStore(f"{s3}/probe")) == []
    assert not ObjectStore(f"file://{tmp_path}/store").creates_once


def test_two_writers_at_once_keep_one_record(s3: str, tmp_path: Path) -> None:
    """The second looks before the first has written, and writes after it."""
    store = ObjectStore(f"{s3}/race")
    unit_in(tmp_path / "a", NAME, text="one")
    unit_in(tmp_path / "b", NAME, text="two")
    file_system, _ = store._file_system
    real, raced = file_system.put_file, []

    def put_after_the_other(source: str, path: str, **options: Any) -> Any:
        file_system.put_file = real
        raced.append(ObjectStore(store.url).publish(NAME, tmp_path / "b"))
        return real(source, path, **options)

    assert store.creates_once
    file_system.put_file = put_after_the_other
    try:
        assert not store.publish(NAME, tmp_path / "a")
    finally:
        file_system.put_file = real
    assert raced == [True]
    assert store.fetch(NAME, tmp_path / "c")
    assert tree(tmp_path / "c") == tree(tmp_path / "b")


@pytest.mark.parametrize("part", ["commits", "units"])
def test_a_damaged_unit_leaves_the_store(store: ObjectStore, tmp_path: Path, part: str) -> None:
    unit_in(tmp_path / "a", NAME)
    store.publish(NAME, tmp_path / "a")
    file_system, root = store._file_system
    (path,) = [p for p in objects(store) if f"/{part}/" in p]
    data = bytearray(file_system.cat_file(root + path))
    data[len(data) // 2] ^= 1
    file_system.pipe_file(root + path, bytes(data))
    assert not store.fetch(NAME, tmp_path / "b")
    assert not (tmp_path / "b" / "commits").exists()
    assert not [p for p in objects(store) if "/commits/" in p]
    assert store.publish(NAME, tmp_path / "a")
    assert store.fetch(NAME, tmp_path / "b")


def test_units_of_a_server_are_apart_and_failed_ones_stay_away(
    store: ObjectStore, tmp_path: Path
) -> None:
    unit_in(tmp_path / "a", NAME)
    assert store.publish(NAME, tmp_path / "a", "f" * 64)
    assert not store.fetch(NAME, tmp_path / "b")
    assert store.fetch(NAME, tmp_path / "b", "f" * 64)
    unit_in(tmp_path / "c", "1" * 32, quarantine=[("p", "status 500")])
    assert not store.publish("1" * 32, tmp_path / "c", "f" * 64)


def test_a_store_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit_in(tmp_path / "a", NAME)
    store = ObjectStore(f"file://{tmp_path}/store")
    file_system, _ = store._file_system

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError("InsufficientStorage: the bucket's quota is used up")

    monkeypatch.setattr(file_system, "put_file", full)
    with pytest.raises(StorageError, match="the bucket's quota is used up") as raised:
        store.publish(NAME, tmp_path / "a")
    assert raised.value.where.startswith(store.url)
    assert not objects(store)


def test_unknown_protocols_are_refused() -> None:
    assert is_object_store("hf://buckets/me/captures")
    assert not is_object_store("/captures")
    with pytest.raises((RecipeError, MissingRequirementError), match=r"capture\.store"):
        ObjectStore("nonsense://a/b").fetch(NAME, Path("x"))


def test_a_record_is_what_a_local_cache_has(store: ObjectStore, tmp_path: Path) -> None:
    unit_in(tmp_path / "a", NAME)
    store.publish(NAME, tmp_path / "a")
    file_system, root = store._file_system
    found = json.loads(file_system.cat_file(f"{root}/local/commits/{NAME}.json"))
    assert found == json.loads((tmp_path / "a" / "commits" / f"{NAME}.json").read_text())


def test_a_bucket_of_the_hub_is_a_store_and_a_repository_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network: the bucket is opened, and what fails then is one line with a remedy."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    bucket = ObjectStore("hf://buckets/someone/some-bucket/persea")
    assert bucket._file_system[1] == "buckets/someone/some-bucket/persea"
    assert not bucket.creates_once  # no condition is sent
    with pytest.raises(StorageError, match="the store fails: OfflineModeIsEnabled") as raised:
        bucket.fetch(NAME, tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(RecipeError, match="a repository of the hub makes a commit of every file"):
        ObjectStore("hf://datasets/someone/captures").fetch(NAME, tmp_path)
