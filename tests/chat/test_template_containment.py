"""A chat template that could loop or allocate without end is rendered in a child process first."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.chat import template_containment
from persea.chat.template_containment import can_grow, refuse_endless_template
from persea.errors import DataError

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
BOUNDED_RANGE = "{% for k in range(messages | length) %}{{ messages[k].content }}{% endfor %}"
NESTED = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
LONG = "{{ 'x' * 5000000 }}"
HUGE = "{{ ('x' * 1000000000) ~ ('y' * 1000000000) }}"


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (PLAIN, False),
        (BOUNDED_RANGE, True),
        (NESTED, True),
        (LONG, True),
        ("{{ 2 ** 9999 }}", True),
        ("{{ '%99999d' % 1 }}", True),
        ("{{ 'x' | center(99999) }}", True),
        ("{{ 'x'.ljust(99999) }}", True),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", True),
        ("{% for m in messages recursive %}{% endfor %}", True),
        ("{% for", False),  # refused because it does not compile
    ],
)
def test_templates_that_their_conversation_does_not_bound(template: str, want: bool):
    assert can_grow(template) is want


def test_a_bounded_template_starts_no_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_containment.subprocess, "run", lambda *_, **__: pytest.fail())
    refuse_endless_template(PLAIN, {}, "w")


def test_a_template_with_loops_is_rendered_once_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    refuse_endless_template(BOUNDED_RANGE, {"bos_token": "<s>"}, "w")
    monkeypatch.setattr(template_containment.subprocess, "run", lambda *_, **__: pytest.fail())
    refuse_endless_template(BOUNDED_RANGE, {"bos_token": "<s>"}, "w")


@pytest.mark.parametrize("template", [NESTED, LONG, HUGE], ids=["loops", "prints", "allocates"])
def test_an_endless_template_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
):
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    monkeypatch.setattr(template_containment, "MAX_SECONDS", 1)
    with pytest.raises(DataError, match="the chat template does not end") as caught:
        refuse_endless_template(template, {}, "teachers.0.model")
    assert caught.value.where == "teachers.0.model"
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value) and caught.value.remedy
    assert not list(tmp_path.rglob("*.json"))  # nothing is kept of a refusal
