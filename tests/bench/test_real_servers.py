"""The proxy of `make engines` causes faults and notes requests, and repeats are counted rightly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench import engines
from bench.engines import count_repeats
from bench.real_servers import VLLM_OPTIONS, Asked, Proxy, free_port
from persea.teachers.engines import EngineFailure
from persea.teachers.engines.http_client import HttpClient, Request, RetryPolicy
from tests.servers import Script, events, playing

POLICY = RetryPolicy(concurrency=1, max_attempts=2, stall_timeout_s=2.0, give_up_after_s=20.0)


def streamed(number: int) -> Request[list[Any]]:
    """A request for one streamed token."""
    return Request(
        "/v1/completions",
        {"prompt": [number], "stream": True},
        lambda answer: [e["token"] for e in answer],
        event_has_token=lambda event: True,
    )


def test_every_fault_reaches_the_client_and_the_next_attempt_succeeds() -> None:
    """A second attempt answers each; faults that do not fire would leave `asked` shorter."""
    faults = ("429", "503", "cut", "stall", "slow")
    with playing(
        Script(lambda path, body: events({"token": body["prompt"][0], "pad": "x" * 300}))
    ) as s:
        proxy = Proxy(free_port())
        proxy.open(int(s.url.rpartition(":")[2]))
        client = HttpClient(f"http://127.0.0.1:{proxy.port}", "far", POLICY)
        assert client.send_all([streamed(0)]) == [[0]]
        for number, fault in enumerate(faults, 1):
            proxy.set_fault(lambda n, path, fault=fault: fault if n == 1 else "")  # type: ignore[misc]
            assert client.send_all([streamed(number)]) == [[number]], fault
        assert [a.fault for a in proxy.asked if a.fault] == list(faults)
        assert [a.body["prompt"][0] for a in proxy.asked] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
        assert client.num_lost_connections == 1  # cut
        proxy.close()
        (failed,) = HttpClient(client.url, "far", POLICY).send_all([streamed(9)])
        assert isinstance(failed, EngineFailure) and "ConnectError" in failed.reason


def write_run(folder: Path, audition: float, commits: list[float]) -> None:
    for name, at in [("audition/done.json", audition)] + [
        (f"capture/commits/{k}.json", at) for k, at in enumerate(commits)
    ]:
        path = folder / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path, (at, at))


@pytest.mark.parametrize(
    ("extra", "found"),
    [([], (0, 0)), ([(12.0, 1)], (1, 0)), ([(25.0, 1)], (0, 1)), ([(25.0, 7), (26.0, 7)], (1, 0))],
)
def test_a_prompt_that_is_asked_after_its_commit_is_counted(
    tmp_path: Path, extra: list[tuple[float, int]], found: tuple[int, int]
) -> None:
    """Prompts 1 and 2 are the first unit, 3 and 7 the second; 99 is the handshake's question."""
    write_run(tmp_path, audition=10.0, commits=[20.0, 30.0])
    times = [(5.0, 99), (11.0, 1), (11.0, 2), (19.0, 99), (21.0, 3), (29.0, 99), (31.0, 50), *extra]
    asked = [Asked(at, "/p", {"token_ids": [i], "stream": True}) for at, i in times]
    asked.append(Asked(12.0, "/p", {"token_ids": [1]}))  # a request for scores
    counts = count_repeats(asked, tmp_path, "tokens")
    assert (counts["asked_again_before_commit"], counts["asked_again_after_commit"]) == found
    assert counts["prompts_asked"] == len({i for _, i in times} - {99, 50})


def test_the_table_of_the_page_is_that_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No figure of the table is typed in by hand."""
    page = engines.PAGE.read_text()
    monkeypatch.setattr(engines, "PAGE", tmp_path / "page.md")
    engines.PAGE.write_text(page)
    results = json.loads(engines.RESULTS.read_text())
    engines.write_table(results)
    assert engines.PAGE.read_text() == page
    next(iter(results["servers"].values()))["greedy_equal"] = "7 of 8"
    engines.write_table(results)
    assert engines.PAGE.read_text() != page


@pytest.mark.parametrize(
    ("entry", "cells"),
    [
        (
            {
                "handshake": "passed",
                "run": {"exit": 5, "kills": 2, "seconds": 9.0, "error": "gone"},
            },
            ("ran 2026-12-01", "the run failed: exit 5"),
        ),
        ({"failure": "did not start: a|b"}, ("failed 2026-12-01: did not start: a/b", "-")),
        ({"handshake": "refused: no ids"}, ("ran 2026-12-01: refused, as it must be", "-")),
    ],
)
def test_a_failure_is_a_row_of_the_table(entry: dict[str, Any], cells: tuple[str, str]) -> None:
    """A run that failed has no counts; the reason of a server that failed breaks no column."""
    row = engines.table_row("a server, chat", {"date": "2026-12-01"} | entry)
    found = [cell.strip() for cell in row.strip("|").split("|")]
    assert (found[0], found[1], found[5]) == ("a server, chat", *cells)
    assert len(found) == 7


def test_vllm_runs_here_with_the_options_of_the_page() -> None:
    """Who pastes the page's line serves what `make engines` measured."""
    page = engines.PAGE.read_text(encoding="utf-8").splitlines()
    (line,) = [x for x in page if x.startswith("vllm serve MODEL ")]
    options = " ".join(line.split()[3:])
    assert options
    assert options in " ".join(VLLM_OPTIONS)
