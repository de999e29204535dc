"""A template can only write text, and writes the same text as in transformers."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from persea.chat.template import compile_template
from persea.errors import DataError

DAY = date(2021, 2, 3)
TALK = [{"role": "user", "content": "Grüße & <b>你好</b>"}, {"role": "assistant", "content": "Hi"}]


def render(
    text: str,
    messages: list[dict[str, Any]] | None = None,
    *,
    generate: bool = False,
    **switches: Any,
) -> str:
    return compile_template(text, {"bos_token": "<bos>"}, DAY, "some/model")(
        TALK if messages is None else messages, generate, **switches
    )


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'changed'}) }}",
        "{% set _ = messages[0].__setitem__('content', 'changed') %}",
    ],
)
def test_escapes_are_refused(text: str):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(DataError, match=r"unsafe|undefined") as caught:
        render(text, messages)
    assert caught.value.where == "some/model"
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{% include 'other.jinja' %}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ nothing.here }}", "undefined"),
        ("{{ raise_exception() }}", "TypeError"),
    ],
)
def test_a_broken_template_is_the_templates_fault(text: str, reason: str):
    with pytest.raises(DataError, match=reason):
        render(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{% if %}", 1),
        ("fine\n{% for m in messages %}", 2),
        ("\n\n{{ x | nofilter }}", 3),
        ("{{ 'open }}", 1),
    ],
)
def test_syntax_errors_are_refused_with_their_line(text: str, line: int):
    with pytest.raises(DataError, match=rf"does not compile: .*\(line {line}\)"):
        compile_template(text, {}, DAY, "some/model")


def test_a_template_nested_without_end_does_not_compile():
    with pytest.raises(DataError, match="does not compile"):
        compile_template("{{ " + "(" * 5000 + " }}", {}, DAY, "some/model")


def test_the_templates_own_refusal():
    with pytest.raises(DataError, match="refuses the conversation: roles must alternate") as caught:
        render(
            "{% if messages[0].role == 'user' %}{{ raise_exception('roles must alternate') }}{% "
            "endif %}"
        )
    assert caught.value.exit_code == 3
    assert caught.value.remedy


def test_the_date_is_pinned():
    assert render("{{ strftime_now('%d %b %Y') }}") == "03 Feb 2021"


def test_loop_controls():
    assert (
        render(
            "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role "
            "}}{% endfor %}"
        )
        == "assistant"
    )
    assert render("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}") == "user"


def test_generation_blocks_are_their_body():
    text = (
        "{% for m in messages %}[{% generation %}{{ m.content }}{% if loop.last %}!{% endif "
        "%}{% endgeneration %}]{% endfor %}"
    )
    assert render(text) == "[Grüße & <b>你好</b>][Hi!]"


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages | tojson(ensure_ascii=true) }}",
        "  {% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\n",
        "{{ '<b>' }}{{ messages[0].content | trim }}",
        "{% if tools is none %}none{% else %}tools{% endif %}",
        "{% if tools is not none and tools is defined %}{{ raise_exception('no tools here') }}"
        "{% endif %}{{ documents is none }}",
        "{% if add_generation_prompt %}go{% endif %}{{ enable_thinking }}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor "
        "%}{{ ns.n }}{{ bos_token }}",
        "{{ undefined_thing }}{{ messages[0].nothing }}",
    ],
)
def test_templates_render_as_in_transformers(text: str, generate: bool):
    (want,), _ = render_jinja_template(
        [TALK],
        chat_template=text,
        add_generation_prompt=generate,
        bos_token="<bos>",
        enable_thinking=True,
    )
    assert render(text, generate=generate, enable_thinking=True) == want


@pytest.mark.realdata
@pytest.mark.parametrize("generate", [False, True])
def test_every_real_template_is_written_as_transformers_writes_it(data, generate: bool):
    paths = sorted((data / "templates").glob("*.jinja"))
    assert len(paths) >= 17
    today = date.today()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        got = compile_template(
            text, {"bos_token": "<bos>", "eos_token": "<eos>"}, today, path.name
        )(TALK, generate)
        (want,), _ = render_jinja_template(
            [TALK],
            chat_template=text,
            add_generation_prompt=generate,
            bos_token="<bos>",
            eos_token="<eos>",
        )
        assert got == want, path.name
        assert "你好" in got
