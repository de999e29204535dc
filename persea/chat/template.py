"""Compile a model's own Jinja chat template in a sandbox, with a fixed date.

transformers renders the same templates, but its `strftime_now` always returns today's date: the
prompts of gpt-oss and Llama 3 would change every midnight, and cached captures with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from typing import Any, TypeAlias

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from persea.errors import DataError

ChatTemplate: TypeAlias = Callable[..., str]
"""(messages, add_generation_prompt, **template variables) -> the rendered text."""

TEMPLATE_REMEDY = "take the template from the model's own repository"
REFUSAL_REMEDY = "this family has no form for it; change or leave out the conversation"


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's tokens for TRL; only its body is used."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

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


def default_template(found: Any, where: str) -> tuple[str, str]:
    """Return (the chat template, a note if it is one of several): transformers takes "default".

    Args:
        found: `chat_template` of a tokenizer: a text, a mapping of several, or None.
        where: The place for error messages.

    Raises:
        DataError: There are several, and none is called "default".
    """
    if not found or isinstance(found, str):
        return found or "", ""
    names = ", ".join(sorted(found))
    if "default" not in found:
        raise DataError(
            f"several chat templates, none called default: {names}",
            where=where,
            remedy="save one of them as chat_template.jinja in the model's folder",
        )
    return str(found["default"]), f"It has several chat templates ({names}); persea takes default."


def parse_template(text: str) -> nodes.Template:
    """Return the syntax tree of a chat template.

    Raises:
        jinja2.TemplateError: It does not compile.
        RecursionError: It is nested too deeply.
    """
    environment = jinja2.Environment(extensions=[_GenerationBlock, loopcontrols])
    return environment.parse(text)


def read_names(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the variables that a chat template reads but does not define, and its quoted texts."""
    try:
        parsed = parse_template(text)
        variables = frozenset(meta.find_undeclared_variables(parsed))
    except (jinja2.TemplateError, RecursionError):
        return frozenset(), frozenset()
    constants = (c.value for c in parsed.find_all(nodes.Const))
    return variables, frozenset(c for c in constants if isinstance(c, str))


def compile_template(
    text: str, special_tokens: dict[str, str], template_date: date, where: str
) -> ChatTemplate:
    """Compile a chat template.

    Args:
        text: The Jinja source.
        special_tokens: bos_token, eos_token, ... as templates expect them.
        template_date: The date that the template's `strftime_now` returns.
        where: The place for error messages.

    Returns:
        A function (messages, add_generation_prompt, **template variables) -> text. It raises
        DataError if the template refuses the conversation or fails.

    Raises:
        DataError: The template does not compile.
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
            remedy=TEMPLATE_REMEDY,
        ) from error
    except RecursionError as error:
        raise DataError(
            "the chat template does not compile: nested too deeply",
            where=where,
            remedy=TEMPLATE_REMEDY,
        ) from error

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool, **kwargs: Any) -> str:
        # transformers always passes tools and documents: templates distinguish none from undefined.
        variables = {"tools": None, "documents": None, **special_tokens, **kwargs}
        try:
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template refuses the conversation: {error.message}",
                where=where,
                remedy=REFUSAL_REMEDY,
            ) from error
        except Exception as error:
            # A template can divide by zero, recurse without end, or add a number to a text.
            raise DataError(
                f"the chat template is broken: {type(error).__name__}: {error}",
                where=where,
                remedy=TEMPLATE_REMEDY,
            ) from error

    return render
