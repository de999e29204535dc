"""An unknown chat template is rendered in a child process, which ends whatever it does."""

from __future__ import annotations

import os
import resource
from datetime import date
from typing import Any

import pytest

from persea.chat import template_containment
from persea.chat.template import ChatTemplate, compile_template
from persea.chat.template_containment import _CHILD, open_template
from persea.errors import DataError

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
BOUNDED_RANGE = "{% for k in range(messages | length) %}{{ messages[k].content }}{% endfor %}"
NESTED = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
GROW = (
    "{% set n = namespace(s=START) %}{% for k in range(64) %}{% set n.s = n.s + n.s %}{% endfor %}"
)
# The hostile forms, each with the limit or the sandbox that ends it.
HOSTILE = {
    "loops over ranges": NESTED,
    "loops over one text": "{% for a in 'abcdefghijklmnopqrstuvwxyz' %}" * 9 + "{% endfor %}" * 9,
    "loops over the question": "{% for c in messages[0].content %}" * 9 + "{% endfor %}" * 9,
    "a recursive macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "a long constant": "{{ 'x' * 5000000 }}",
    "a huge constant": "{{ ('x' * 1000000000) ~ ('y' * 1000000000) }}",
    "a doubled text": GROW.replace("START", "'x'") + "{{ n.s }}",
    "a doubled list": GROW.replace("START", "[1]") + "{{ n.s | length }}",
    "doubled without a loop": "{% set s = 'x' %}" + "{% set s = s ~ s %}" * 40 + "{{ s }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a wide indent": "{{ messages | tojson(indent=9999999999) }}",
    "a wide filter": "{{ 'x' | center(9999999999) }}",
    "a power": "{{ (9 ** (9 ** 9)) | string | length }}",
    "an escape": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "a change": "{{ messages.append(1) }}",
}


def opened(template: str) -> ChatTemplate:
    return open_template(template, {"bos_token": "<s>"}, date(2025, 1, 1), "teachers.0.model")


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_there_are_enough_hostile_forms() -> None:
    assert len(HOSTILE) >= 12


@pytest.mark.parametrize("form", HOSTILE)
def test_a_hostile_template_is_contained(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_containment, "MAX_SECONDS", 0.2)
    before = resource.getrusage(resource.RUSAGE_SELF)
    talk = question("The quick brown fox jumps over the lazy dog.")
    with pytest.raises(DataError) as caught:
        opened(HOSTILE[form])(talk, add_generation_prompt=True)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 1
    assert talk == question("The quick brown fox jumps over the lazy dog.")
    assert (caught.value.where, caught.value.exit_code) == ("teachers.0.model", 3)
    assert "\n" not in str(caught.value) and caught.value.remedy


def test_a_hostile_template_ends_after_three_seconds_of_work() -> None:
    """The limit is CPU time, so a loaded machine changes the wall time alone."""

    def used() -> float:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    _CHILD.stop()  # what the child did before does not count
    begin = used()
    with pytest.raises(DataError, match="does not end"):
        opened(NESTED)(question("Hi"), add_generation_prompt=True)
    assert 0 < used() - begin < 3


def test_one_child_serves_all_templates_of_a_process() -> None:
    assert opened(PLAIN)(question("Hi"), add_generation_prompt=False) == "<|user|>Hi"
    child = _CHILD.process
    assert child is not None and child.poll() is None
    assert opened(BOUNDED_RANGE)(question("Ho"), add_generation_prompt=False) == "Ho"
    with pytest.raises(DataError, match="ZeroDivision"):
        opened("{{ 1 / 0 }}")(question("Hi"), add_generation_prompt=False)
    assert _CHILD.process is child


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


def test_a_later_call_is_contained_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch):
    """A template can be harmless in every probe."""
    monkeypatch.setattr(template_containment, "MAX_SECONDS", 0.2)
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
