"""The verb `plan`: fleets, prices and refusals, in words and in JSON."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_cli import persea

FLEET = Path(__file__).resolve().parents[2] / "recipes" / "avocado-236b.yaml"


def test_a_fleet_in_words_and_in_json(tmp_path: Path) -> None:
    words, value = (
        persea(
            "plan", FLEET, "--hardware", "8xh200", "--price-per-hour", "2", *more, folder=tmp_path
        )
        for more in ([], ["--json"])
    )
    assert words.code == value.code == 0
    assert "what is still to do costs, on 8xH200:" in words.out
    assert "277,939 units; about 4.4 devices fail on the way" in words.out
    assert "licences: ok with duties" in words.out
    plan = json.loads(value.out)
    assert plan["hardware"] == "8xH200"
    assert [line["model"] for line in plan["lines"]] == ["qwen", "gemma", "gpt-oss", "student"]
    total = sum(line["gpu_hours"] for line in plan["lines"])
    assert sum(line["money"] for line in plan["lines"]) == 2 * total
    assert {way["kind"] for way in plan["ways"]} == {"MoE", "dense"}
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_names_the_hardware_and_the_option_wins(tmp_path: Path) -> None:
    own, other = (
        json.loads(persea("plan", FLEET, "--json", *more, folder=tmp_path).out)["hardware"]
        for more in ([], ["--hardware", "512xH100"])
    )
    assert (own, other) == ("64xH200", "512xH100")


def test_what_cannot_be_planned_is_told_in_one_line(tmp_path: Path) -> None:
    for arguments, code, words in (
        (["--hardware", "8xH900"], 2, "--hardware: no accelerator 'H900' in the table -> "),
        (["--hardware", "H200"], 2, "names no accelerators -> write a count, x, and one of A100"),
        (["--hardware", "2xH100"], 4, "its weights take 236 GB, and 2xH100 has 160 GB"),
        (["--hardware", "8xH200", "--calibrate"], 2, "this machine is measured, and the plan is"),
        (["--set", "plan.hardware=8xFOO"], 2, "plan.hardware: no accelerator 'FOO'"),
        (["--set", "plan.expect.cods={prompts: 3}"], 2, "did you mean 'code'?"),
    ):
        ended = persea("plan", FLEET, *arguments, folder=tmp_path)
        assert (ended.code, ended.out) == (code, ""), arguments
        assert words in ended.err
        assert len(ended.err.splitlines()) == 1
