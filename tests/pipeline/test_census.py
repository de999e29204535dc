"""A corpus too large to read is counted and sampled, in seconds and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from persea.config.recipe import load_recipe
from persea.pipeline import census
from persea.pipeline.census import (
    SampledContext,
    count_file,
    is_large,
    sample_part,
    sampled_context,
)
from persea.pipeline.plan import plan_run
from persea.pipeline.run_context import RunContext
from tests.cli.test_cli import recipe


def write_prompts(path: Path, count: int) -> None:
    with path.open("w") as file:
        for k in range(count):
            file.write(f'{{"prompt": "How much is {k} plus {k % 97}, and {"why " * (k % 7)}?"}}\n')


def test_rows_are_counted_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}')  # without a last line end
    assert count_file(path) == 2
    (tmp_path / "q.csv").write_text("prompt\na\n")
    assert count_file(tmp_path / "q.csv") is None  # a cell may hold a line end
    assert count_file(tmp_path) is None
    (tmp_path / "q.csv").unlink()
    assert count_file(tmp_path) == 2
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"] * 7}), tmp_path / "r.parquet")
    assert count_file(tmp_path) == 9
    assert count_file(tmp_path / "nowhere") is None


def test_a_sample_is_spread_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_prompts(path, 5000)
    path.write_text(path.read_text() + "not json\n")
    recipe(tmp_path, corpus=[{"skill": "languages", "file": "p.jsonl"}], audition={"items": 8})
    loaded = load_recipe(tmp_path / "tiny.yaml")
    found = sample_part(loaded.corpus[0], loaded, 50)
    assert 45 <= len(found) <= 50
    numbers = [int(p.conversation.messages[-1].text.split()[3]) for p in found]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert numbers[-1] > 4800
    assert max(b - a for a, b in pairwise(numbers)) < 150


def test_a_generator_is_counted_at_once_and_asked_for_a_few(tmp_path: Path) -> None:
    recipe(tmp_path, corpus=[{"skill": "code", "generate": 11000}], audition={"items": 8})
    loaded = load_recipe(tmp_path / "tiny.yaml")
    assert len(sample_part(loaded.corpus[0], loaded, 20)) == 20
    assert census.count_parts(loaded)[0].rows == 11_000


def test_a_small_corpus_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(tmp_path)
    context = RunContext(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "run")
    assert sampled_context(context) is context
    monkeypatch.setattr(census, "LARGE_CORPUS", 10)
    assert is_large(context.recipe)
    found = sampled_context(context)
    assert isinstance(found, SampledContext)
    assert found.num_prompts == 72


def test_a_counted_plan_costs_what_the_read_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path)
    context = RunContext(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "run")
    whole = plan_run(context)
    monkeypatch.setattr(census, "LARGE_CORPUS", 10)
    counted = plan_run(RunContext(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "run"))
    assert counted.answers == whole.answers
    assert "72 prompts were counted" in "\n".join(counted.notes)
    for a, b in zip(counted.lines, whole.lines, strict=True):
        assert (a.stage, a.model, a.tokens_written) == (b.stage, b.model, b.tokens_written)
        assert a.tokens_read == pytest.approx(b.tokens_read, rel=0.1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_million_prompts_take_little_memory(tmp_path: Path) -> None:
    """The peak of a process that plans them; `python -m bench.plan_size` measures its time."""
    write_prompts(tmp_path / "p.jsonl", 1_000_000)
    recipe(
        tmp_path,
        corpus=[{"skill": "languages", "file": "p.jsonl"}],
        audition={"items": 4, "pinned": {"languages": "qwen-sapling"}},
    )
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from persea.config.recipe import load_recipe\nfrom persea.pipeline.plan import plan_run\n"
        "from persea.pipeline.run_context import RunContext\n"
        "plan = plan_run(RunContext(load_recipe(Path('tiny.yaml')), Path('run')))\n"
        # not ru_maxrss, which an exec inherits from the process before it
        "status = Path('/proc/self/status').read_text().split('VmHWM:')[1]\n"
        "print(json.dumps([plan.answers, int(status.split()[0]) * 1024]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    answers, peak = json.loads(done.stdout.splitlines()[-1])
    assert answers > 1_000_000
    assert peak < 1 << 30
