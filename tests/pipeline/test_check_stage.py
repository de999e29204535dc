"""The check asks a teacher's server only where it lists tokens, and the recipe wants to know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from persea.config.schema import TeacherSection
from persea.pipeline import check_stage


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
