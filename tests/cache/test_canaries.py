"""Canaries: pairs are drawn by a secret coin, one answer is learned, and no rule looks at it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from persea.cache.canaries import (
    KEY_FILE,
    Canaries,
    canary_coin,
    choose_canaries,
    count_pairs,
    read_key,
    read_pairs,
)
from persea.cache.capture import capture_teacher
from persea.cache.shared_store import place_unit
from persea.chat.messages import FinishReason
from persea.errors import DataError, RefusedError
from persea.teachers.teacher import Answer, Teacher
from tests.cache.test_capture import SETTINGS, Counting, prompts, read, units
from tests.teachers.engines.test_transformers import engine, opened

KEY = bytes(range(32))


def qwen(real: Any = None) -> Teacher:
    name = "qwen-sapling"
    return Teacher(name, opened(name)[0], real or engine(name))


def captured(folder: Path, wanted: int = 4) -> tuple[Canaries, Any, list[Any]]:
    """A capture of eight prompts with canaries in a run folder."""
    some = prompts(4)
    canaries = Canaries(KEY, frozenset(p.id for p in some[:wanted]))
    planned = units(some, **canaries.settings)
    canaries.save_key(folder)
    capture_teacher(planned, qwen(), folder / "capture", canaries=canaries, **SETTINGS)
    return canaries, planned, some


def test_the_learned_answer_of_each_pair_is_the_coins(tmp_path: Path) -> None:
    canaries, planned, some = captured(tmp_path)
    pairs = read_pairs(tmp_path)
    assert 0 < len(pairs) <= 4
    assert count_pairs(tmp_path / "capture", [u.name for u in planned]) == len(pairs)
    learned = {c.prompt_id: c.answer.conversation for c in read(planned, tmp_path / "capture")}
    for pair in pairs:
        assert pair.learned == canaries.coin(pair.prompt_id)
        assert pair.answers[0] != pair.answers[1]
        assert learned[pair.prompt_id] == pair.answers[pair.learned]
    assert {p.prompt_id for p in pairs} <= {p.id for p in some[:4]}
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o077 == 0


def test_a_pair_needs_two_complete_answers_whichever_is_learned() -> None:
    prompt = prompts(1)[0]
    canaries = Canaries(KEY, frozenset([prompt.id]))
    for refused in ("first", "second"):
        draws: list[Answer] = []

        def is_complete(answer: Answer, seen: list[Answer] = draws, refused: str = refused) -> bool:
            seen.append(answer)
            return (len(seen) == 1) is (refused == "second")

        answers, pairs, num_tokens = canaries.answer([prompt], qwen(), 40, is_complete)
        assert pairs == []
        assert num_tokens > 20  # the prompt twice, and two answers
        assert answers == {prompt.id: draws[refused == "first"]}


def test_the_same_key_gives_the_same_capture_and_another_key_another_name(tmp_path: Path) -> None:
    _, planned, some = captured(tmp_path / "a")
    captured(tmp_path / "b")
    for unit in planned:
        name = f"units/{unit.name}.safetensors"
        a, b = (tmp_path / run / "capture" / name for run in "ab")
        assert a.read_bytes() == b.read_bytes()
    other = Canaries(b"\1" * 32, frozenset(p.id for p in some[:4]))
    assert not {u.name for u in planned} & {u.name for u in units(some, **other.settings)}
    assert KEY.hex() not in json.dumps(other.settings)


def test_coins_are_fair_and_of_the_key_alone() -> None:
    coins = Counter(canary_coin(KEY, str(k)) for k in range(2000))
    assert 900 < coins[0] < 1100
    agree = sum(canary_coin(KEY, str(k)) == canary_coin(b"\1" * 32, str(k)) for k in range(2000))
    assert 900 < agree < 1100


def test_prompts_are_chosen_by_the_key_of_the_run(tmp_path: Path) -> None:
    some = prompts(10)
    first = choose_canaries(tmp_path, some, 6)
    assert len(first.prompt_ids) == 6
    assert not list(tmp_path.iterdir())  # the capture alone writes the key
    first.save_key(tmp_path)
    assert choose_canaries(tmp_path, some, 6).prompt_ids == first.prompt_ids
    assert read_key(tmp_path) == first.key
    with pytest.raises(RefusedError, match="21 canaries, but teachers answer 20 prompts"):
        choose_canaries(tmp_path, some, 21)


def test_damage_is_refused(tmp_path: Path) -> None:
    captured(tmp_path)
    with pytest.raises(DataError, match="no canaries"):
        read_pairs(tmp_path / "capture")
    key = tmp_path / KEY_FILE
    content = key.read_text()
    key.write_text(content.replace("00", "01", 1))
    with pytest.raises(DataError, match="checksum"):
        read_pairs(tmp_path)
    key.unlink()
    pairs_file = next((tmp_path / "capture" / "canaries").glob("*.json"))
    asked = [p["prompt_id"] for p in json.loads(pairs_file.read_text())["pairs"]]
    other = next(
        bytes([k]) * 32
        for k in range(256)
        if asked and any(canary_coin(bytes([k]) * 32, i) != canary_coin(KEY, i) for i in asked)
    )
    Canaries(other, frozenset()).save_key(tmp_path)
    with pytest.raises(DataError, match=r"the coin of prompt .* is not the one of the run's key"):
        read_pairs(tmp_path)
    key.unlink()
    for act in (lambda: read_pairs(tmp_path), lambda: choose_canaries(tmp_path, prompts(4), 2)):
        with pytest.raises(RefusedError, match="the key of this run's canaries is missing"):
            act()


def test_pairs_of_an_earlier_capture_leave(tmp_path: Path) -> None:
    _, planned, _ = captured(tmp_path)
    folder = tmp_path / "capture"
    old = folder / "canaries" / "old.json"
    old.write_bytes(next((folder / "canaries").glob("*.json")).read_bytes())
    count_pairs(folder, [u.name for u in planned])
    assert not old.exists()


def test_the_attempt_of_a_worker_brings_its_pairs(tmp_path: Path) -> None:
    _, planned, _ = captured(tmp_path)
    for unit in planned:
        place_unit(unit.name, tmp_path / "capture", tmp_path / "run" / "capture")
    Canaries(KEY, frozenset()).save_key(tmp_path / "run")
    assert read_pairs(tmp_path / "run") == read_pairs(tmp_path)


def test_an_engine_that_cannot_draw_is_refused(tmp_path: Path) -> None:
    some = prompts(1)
    canaries = Canaries(KEY, frozenset([some[0].id]))
    teacher = qwen(Counting(engine("qwen-sapling")))
    with pytest.raises(RefusedError, match="canaries need sampled answers"):
        canaries.answer(some, teacher, 8, lambda a: a.finish is FinishReason.STOP)
