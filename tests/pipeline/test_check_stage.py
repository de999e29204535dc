"""What the check measures, whom it asks, and that no training starts without it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persea.config.schema import TeacherSection
from persea.errors import RefusedError
from persea.pipeline import check_stage, stages
from tests.pipeline.test_preflight_data import context_of

ROWS = [
    {"prompt": "Siapa di sana?", "answer": "Tetangga.", "language": "id"},
    {"prompt": "Jam berapa kedai buka?", "answer": "Pukul enam pagi.", "language": "id"},
    {"prompt": "Berita:", "answer": "Harga beras naik lagi minggu ini.", "language": "ms"},
]


def test_only_servers_that_list_tokens_are_asked_for_their_mass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check_stage, "measure_named_mass", lambda *asked: asked)
    told = SimpleNamespace(is_supported_by=lambda renderer: renderer == "r")
    context: Any = SimpleNamespace(
        recipe=SimpleNamespace(
            check=SimpleNamespace(min_named_mass=0.1), audition=SimpleNamespace(batch_size=8)
        ),
        models=SimpleNamespace(
            load_teacher=lambda name, batch: (name, batch),
            event_maps={"far": "events"},
            renderers={"far": "r"},
        ),
        check_samples=[told, SimpleNamespace(is_supported_by=lambda renderer: False)],
    )

    def asked(**endpoint: Any) -> Any:
        keys = {"model": "a/b", "name": "far"} | (
            {"endpoint": {"url": "http://x"} | endpoint} if endpoint else {}
        )
        return check_stage._measure_named_mass(
            context, TeacherSection.model_validate(keys), lambda share, words: None
        )

    assert asked(protocol="tokens") == (("far", 8), "events", [told])
    assert asked(protocol="llamacpp") == (("far", 8), "events", [told])
    assert asked(protocol="chat") == []
    assert asked() == []  # its weights are here
    context.recipe.check.min_named_mass = 0
    assert asked(protocol="tokens") == []
    assert check_stage.nonempty("key", []) == {}


def test_given_answers_are_what_the_check_measures(tmp_path: Path) -> None:
    given = context_of(tmp_path, ROWS, capture={"answers": "given"})
    assert [(s.skill, s.language) for s in given.check_samples] == [
        ("languages", "id"),
        ("languages", "ms"),
    ]
    assert [
        [[m.text for m in c.messages] for c in s.conversations] for s in given.check_samples
    ] == [
        [["Siapa di sana?", "Tetangga."], ["Jam berapa kedai buka?", "Pukul enam pagi."]],
        [["Berita:", "Harga beras naik lagi minggu ini."]],
    ]
    other = context_of(tmp_path, [*ROWS[:2], ROWS[2] | {"answer": "Tiada."}])
    asked = {c.messages[-1].text for s in other.check_samples for c in s.conversations}
    assert asked and "Tiada." not in asked  # teachers answer: the generator's own answers


def test_no_student_is_trained_on_a_pair_that_check_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(tmp_path, ROWS, capture={"answers": "given"})
    worked: list[str] = []

    def work(name: str) -> None:
        worked.append(name)
        if name == "check" and worked.count("check") == 1:
            raise RefusedError("too few common boundaries", where="here", remedy="another teacher")

    fakes = tuple(
        stages.Stage(s.name, lambda c: 0, lambda c, folder, tell, name=s.name: work(name))
        for s in stages.STAGES
    )
    monkeypatch.setattr(stages, "STAGES", fakes)

    def train(**options: Any) -> list[str]:
        worked_before = len(worked)
        stages.run_pipeline(context, lambda *told: None, "train", **options)
        (tmp_path / "run" / "train" / "done.json").unlink()
        return worked[worked_before:]

    assert train() == ["train"]  # nothing is captured: `train` itself refuses that
    (tmp_path / "run" / "capture").mkdir()
    assert train(check_before_train=False) == ["train"]  # a candidate of `persea pilot`
    with pytest.raises(RefusedError, match="too few common boundaries"):
        train()
    assert worked == ["train", "train", "check"]
    assert train() == ["check", "train"]
    assert train() == ["train"]  # the check has passed
