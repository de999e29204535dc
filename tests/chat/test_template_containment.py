"""A chat template that could loop or allocate without end is rendered in a child process."""

from __future__ import annotations

import os
from datetime import date
from typing import Any

import pytest

from persea.chat import template_containment
from persea.chat.template import ChatTemplate, compile_template
from persea.chat.template_containment import can_grow, open_template
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
        (
            "{% set n = namespace(s='x') %}"
            "{% for m in messages %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            True,
        ),
        ("{{ 'x' | replace('x', 'xx') }}", True),
        ("{% for", False),  # refused because it does not compile
    ],
)
def test_templates_that_their_conversation_does_not_bound(template: str, want: bool):
    assert can_grow(template) is want


def opened(template: str) -> ChatTemplate:
    return open_template(template, {"bos_token": "<s>"}, date(2025, 1, 1), "teachers.0.model")


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_a_bounded_template_starts_no_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_containment.subprocess, "Popen", lambda *_, **__: pytest.fail())
    assert opened(PLAIN)(question("Hi"), add_generation_prompt=False) == "<|user|>Hi"


def test_a_known_template_starts_no_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_containment.subprocess, "Popen", lambda *_, **__: pytest.fail())
    monkeypatch.setattr(
        template_containment, "is_known_template", lambda text: text == BOUNDED_RANGE
    )
    assert opened(BOUNDED_RANGE)(question("Hi"), add_generation_prompt=False) == "Hi"


def test_a_child_renders_as_this_process_does():
    text = (
        "{{ bos_token }}{% for k in range(messages | length) %}{{ messages[k].content }}"
        "{% endfor %}{{ strftime_now('%d %b %Y') }}{{ tools | tojson }}{{ documents is none }}"
        "{% if add_generation_prompt %}{{ raise_exception('no prompt') }}{% endif %}"
    )
    own, child = compile_template(text, {"bos_token": "<s>"}, date(2025, 1, 1), "w"), opened(text)
    tools = [{"b": 1, "a": "ဘ \ud800"}]
    for given in (question("é\n"), question("") * 3):
        wanted = own(given, add_generation_prompt=False, tools=tools)
        assert child(given, add_generation_prompt=False, tools=tools) == wanted
    later = child(question(""), add_generation_prompt=False, strftime_now=date(2026, 2, 3).strftime)
    assert later == "<s>03 Feb 2026nullTrue"
    with pytest.raises(DataError, match="no prompt") as caught:
        child(question(""), add_generation_prompt=True)
    assert caught.value.where == "teachers.0.model"
    assert child(question("x"), add_generation_prompt=False).startswith("<s>x")


@pytest.mark.parametrize("template", [NESTED, LONG, HUGE], ids=["loops", "prints", "allocates"])
def test_an_endless_template_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, template: str):
    monkeypatch.setattr(template_containment, "MAX_SECONDS", 1)
    with pytest.raises(DataError, match="the chat template does not end") as caught:
        opened(template)(question("Hi"), add_generation_prompt=True)
    assert caught.value.where == "teachers.0.model"
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value) and caught.value.remedy


def test_a_later_call_is_contained_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch):
    """A template can be harmless in every probe."""
    monkeypatch.setattr(template_containment, "MAX_SECONDS", 1)
    template = opened("{% if messages[0].content == 'now' %}" + NESTED + "{% endif %}Hi")
    assert template(question("not yet"), add_generation_prompt=False) == "Hi"
    with pytest.raises(DataError, match="does not end"):
        template(question("now"), add_generation_prompt=False)
    assert template(question("not yet"), add_generation_prompt=False) == "Hi"


def test_a_forked_worker_has_its_own_child():
    template = opened(BOUNDED_RANGE)
    template(question("a"), add_generation_prompt=False)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        rendered = template(question("b"), add_generation_prompt=False)
        os.write(writing, rendered.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reading, 9) == b"b"
    assert template(question("c"), add_generation_prompt=False) == "c"


def test_a_template_that_does_not_compile_is_refused_at_once():
    with pytest.raises(DataError, match="does not compile"):
        opened("{% for")
