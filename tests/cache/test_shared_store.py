"""Shared units are linked or copied whole, checked when they are taken, and pruned when unused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from persea import storage
from persea.cache.shared_store import SharedStore
from persea.cache.unit import is_committed, read_unit, write_unit
from persea.errors import StorageError

NAME = "a" * 32


def captured(folder: Path, *, quarantine: bool = False) -> Path:
    """A run's cache folder with one unit that holds no answer."""
    refused = [("p1", "too long")] if quarantine else []
    write_unit(folder, NAME, [], {"refused": len(refused)}, tau=0.02, quarantine=refused)
    return folder


def test_a_unit_is_linked_into_the_store_and_into_the_next_run(tmp_path: Path) -> None:
    store, first, second = SharedStore(tmp_path / "store"), captured(tmp_path / "a"), tmp_path / "b"
    assert not store.fetch(NAME, second)
    store.publish(NAME, first)
    store.publish(NAME, first)  # a second time changes nothing
    assert store.fetch(NAME, second) and read_unit(second, NAME) == ()
    assert (second / "units" / f"{NAME}.safetensors").stat().st_nlink == 3
    record = f"commits/{NAME}.json"
    assert (first / record).read_bytes() == (second / record).read_bytes()


def test_units_of_a_served_model_are_for_that_model_alone(tmp_path: Path) -> None:
    store, first = SharedStore(tmp_path / "store"), captured(tmp_path / "a")
    store.publish(NAME, first, "digest-of-qwen")
    assert not store.fetch(NAME, tmp_path / "b")
    assert not store.fetch(NAME, tmp_path / "b", "digest-of-gemma")
    assert store.fetch(NAME, tmp_path / "b", "digest-of-qwen")


def test_failed_requests_to_a_server_are_tried_again_by_the_next_run(tmp_path: Path) -> None:
    store, first = SharedStore(tmp_path / "store"), captured(tmp_path / "a", quarantine=True)
    store.publish(NAME, first, "digest-of-qwen")
    assert not store.fetch(NAME, tmp_path / "b", "digest-of-qwen")
    store.publish(NAME, first)  # what a local teacher cannot render, it never can
    assert store.fetch(NAME, tmp_path / "b")


@pytest.mark.parametrize("damage", ["unit", "record", "no unit"])
def test_a_damaged_unit_leaves_the_store(tmp_path: Path, damage: str) -> None:
    store, first, second = SharedStore(tmp_path / "store"), captured(tmp_path / "a"), tmp_path / "b"
    store.publish(NAME, first)
    unit = tmp_path / "store" / "local" / "units" / f"{NAME}.safetensors"
    record = tmp_path / "store" / "local" / "commits" / f"{NAME}.json"
    if damage == "no unit":
        unit.unlink()
    else:
        path = unit if damage == "unit" else record
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert not store.fetch(NAME, second) and not is_committed(second, NAME)
    assert not unit.exists() and not record.exists()
    assert read_unit(first, NAME) == ()


def test_without_hard_links_units_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def refuse(source: Path, path: Path) -> None:
        if str(path).endswith(".safetensors"):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, path)

    monkeypatch.setattr(os, "link", refuse)
    store, second = SharedStore(tmp_path / "store"), tmp_path / "b"
    store.publish(NAME, captured(tmp_path / "a"))
    assert store.fetch(NAME, second) and read_unit(second, NAME) == ()
    assert (second / "units" / f"{NAME}.safetensors").stat().st_nlink == 1


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        SharedStore(tmp_path / "store").publish(NAME, captured(tmp_path / "a"))


def test_prune_deletes_what_no_run_shares(tmp_path: Path) -> None:
    store, first = SharedStore(tmp_path / "store"), captured(tmp_path / "a")
    store.publish(NAME, first)
    num_bytes = (first / "units" / f"{NAME}.safetensors").stat().st_size
    assert store.size() == (1, num_bytes, 0)
    assert store.prune() == (0, 0)
    storage.DISK.remove(first / "units" / f"{NAME}.safetensors")
    assert store.size() == (1, num_bytes, num_bytes)
    assert store.prune() == (1, num_bytes)
    assert store.size() == (0, 0, 0)
