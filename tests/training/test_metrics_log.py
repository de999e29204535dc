"""metrics.jsonl grows by appending, and holds after a resume the lines of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persea.training.metrics_log import MetricsLog, encode_log_line


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_appended_and_a_replaced_last_line_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "train" / "metrics.jsonl"
    log, lines = MetricsLog(path), [{"step": k} for k in range(5)]
    log.restore(())
    log.update(lines[:2])
    inode = path.stat().st_ino
    log.update(lines[:4])
    log.update(lines[:4])
    assert steps(path) == [0, 1, 2, 3]
    log.update([*lines[:3], {"step": 3, "skipped": [1]}])
    assert steps(path) == [0, 1, 2, 3] and "skipped" in path.read_text().splitlines()[-1]
    log.sync()
    assert path.stat().st_ino == inode  # the same file: `tail -f` goes on


@pytest.mark.parametrize("torn", [b"", b'{"step": 7}\n{"st'])
def test_what_no_checkpoint_holds_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": k} for k in range(3)]
    path.write_bytes(b"".join(map(encode_log_line, lines)) + torn)
    log = MetricsLog(path)
    log.restore(lines[:2])
    assert steps(path) == [0, 1]
    log.update([*lines[:2], {"step": 9}])
    assert steps(path) == [0, 1, 9]


def test_another_runs_lines_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\nnot a line')
    MetricsLog(path).restore([{"step": 1}])
    assert steps(path) == [1]
    MetricsLog(path).restore([])
    assert path.read_bytes() == b""


def test_a_number_that_is_not_finite_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode_log_line({"loss": float("nan")})
