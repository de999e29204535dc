"""The model's own Jinja chat template, sandboxed, its date pinned.

transformers renders the same templates, but hands `strftime_now` today's date and accepts no other: gpt-oss' and
Llama 3's prompts would then change every midnight, and a cached capture with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from persea.errors import DataError


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for TRL; here its body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def compile_template(
    text: str, special_tokens: dict[str, str], template_date: date, where: str
) -> Callable[..., str]:
    """Template text -> (messages, add_generation_prompt, **switches) -> the dressed string.

    special_tokens  bos_token, eos_token, ... as templates expect them
    today           what the template's `strftime_now` tells
    Raises DataError for a template that does not compile, and where the template itself refuses a conversation.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: template_date.strftime(form),
    }
    try:
        template = environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template does not compile: {error.message} (line {error.lineno})",
            where=where,
            remedy="take the template from the model's own repository",
        ) from error
    except RecursionError as error:
        raise DataError(
            "the chat template does not compile: nested too deeply",
            where=where,
            remedy="take the template from the model's own repository",
        ) from error

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool, **switches: Any) -> str:
        try:
            # tools and documents are always given by transformers too: templates tell `none` from undefined
            given = {"tools": None, "documents": None, **special_tokens, **switches}
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **given
            )
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template refuses the conversation: {error.message}",
                where=where,
                remedy="this family cannot say it; change or leave out the conversation",
            ) from error
        except Exception as error:  # divides by zero, recurses without end, adds a number to a text: whatever it is, the template is at fault
            raise DataError(
                f"the chat template is broken: {type(error).__name__}: {error}",
                where=where,
                remedy="take the template from the model's own repository",
            ) from error

    return render
