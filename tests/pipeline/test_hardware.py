"""Accelerators: shares of ceilings follow from measured rows; what cannot fit is refused."""

from __future__ import annotations

import pytest

from persea.errors import RecipeError, RefusedError
from persea.models.facts import read_catalogue
from persea.pipeline import hardware
from persea.pipeline.hardware import (
    efficiency,
    expected_failures,
    known_gpus,
    parse_fleet,
    read_hardware,
    refuse_unfit_student,
    served_speed,
)

MODELS = read_catalogue()
QWEN, OSS = "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "openai/gpt-oss-120b"


def test_every_figure_has_a_source_and_a_day_and_nothing_has_a_price() -> None:
    content = read_hardware()
    rows = [*content["gpus"], *content["measured"], *content["efficiencies"].values()]
    assert all(row["source"] and row["date"] for row in rows)
    assert not any("price" in row for row in rows)


@pytest.mark.parametrize(("name", "gpus"), [(QWEN, 4), (OSS, 2)])
def test_the_shares_of_ceilings_give_back_the_measured_speeds(name: str, gpus: int) -> None:
    """Within 15 %: the shares were derived from these rows, with 256 sequences of 700 tokens."""
    measured = next(r for r in read_hardware()["measured"] if r["model"] == name)
    found = hardware._share_of_ceilings(MODELS[name], known_gpus()["h100"], gpus, "none", 700)
    assert found.written_per_second == pytest.approx(measured["written_per_gpu"], rel=0.15)
    assert found.read_per_second == pytest.approx(measured["read_per_gpu"], rel=0.15)


def test_a_measured_speed_is_scaled_to_other_accelerators() -> None:
    on_h100, on_h200 = (
        served_speed(MODELS[OSS], parse_fleet(f"8x{gpu}"), "none", 700, "x")
        for gpu in ("H100", "H200")
    )
    assert on_h100.written_per_second == 3824
    assert on_h200.written_per_second == pytest.approx(3824 * 4800 / 3350)
    assert on_h200.read_per_second == on_h100.read_per_second
    assert "measured on 2xH100" in on_h100.basis
    assert "scaled to H200" in on_h200.basis


def test_more_accelerators_a_copy_if_that_writes_more() -> None:
    speed = served_speed(MODELS["Qwen/Qwen3-32B"], parse_fleet("8xH100"), "none", 2000, "x")
    assert speed.gpus_per_replica > 1  # one holds the weights, and hardly a sequence beside them
    assert speed.memory_bytes < 0.9 * 80e9


@pytest.mark.parametrize("text", ["H100", "0xH100", "8 x H100", "8xH900", "8x"])
def test_a_fleet_that_nobody_knows_is_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_fleet(text)
    assert caught.value.exit_code == 2
    assert "H" in str(caught.value).partition("->")[2]


def test_a_teacher_that_does_not_fit_gets_the_nearest_that_would() -> None:
    with pytest.raises(RefusedError) as caught:
        served_speed(MODELS[QWEN], parse_fleet("2xH100"), "none", 700, "teachers.qwen")
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith("teachers.qwen: its weights take 236 GB, and 2xH100 has")
    assert "--hardware 4xH100 or `quantize: 4bit` of this teacher" in str(caught.value)
    served_speed(MODELS[QWEN], parse_fleet("4xH100"), "none", 700, "x")
    with pytest.raises(RefusedError, match="--hardware 4xA100"):
        served_speed(MODELS[QWEN], parse_fleet("1xA100"), "none", 700, "x")
    with pytest.raises(RefusedError, match=r"--hardware 2xH200|--hardware 4xA100"):
        served_speed(MODELS[QWEN], parse_fleet("64xRTX4090"), "none", 700, "x")


def test_a_student_that_does_not_fit_gets_the_nearest_that_would() -> None:
    llama = MODELS["meta-llama/Llama-3.1-8B-Instruct"]
    with pytest.raises(RefusedError) as caught:
        refuse_unfit_student(llama, llama.parameters, parse_fleet("1xH100"), 5e9)
    assert "--hardware 2xH100 or `adapt: lora`" in str(caught.value)
    assert refuse_unfit_student(llama, llama.parameters, parse_fleet("2xH100"), 5e9) < 72e9
    assert refuse_unfit_student(llama, 40_000_000, parse_fleet("1xH100"), 5e9) < 72e9
    with pytest.raises(RefusedError, match="gradient_accumulation_steps"):
        refuse_unfit_student(llama, 40_000_000, parse_fleet("1xH100"), 90e9)


def test_failures_grow_with_the_hours() -> None:
    """512 accelerators for 5.8 days: about nine."""
    assert expected_failures(512 * 24 * 5.8) == pytest.approx(9, rel=0.05)
    assert efficiency("mtbf_gpu_hours") == pytest.approx(1024 * 7.9, rel=0.01)
