"""The Go template of a Modelfile writes prompts as the student's own Jinja template does."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from persea.chat.renderer import ChatRenderer
from persea.errors import RefusedError
from persea.export.ollama import find_turn_template, modelfile
from persea.models.loading import ModelSource, load_renderer
from tests.export.test_gguf_file import SAPLINGS


def renderer(family: str) -> ChatRenderer:
    return load_renderer(ModelSource(str(SAPLINGS / f"{family}-sapling")), "test")


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma", "gpt-oss"])
def test_every_family_has_a_template(family: str) -> None:
    found = find_turn_template(renderer(family))
    assert found.has_system
    own = renderer(family)
    prompt = own.template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        strftime_now=own.template_date.strftime,
    )
    if family not in ("llama", "gpt-oss", "qwen"):  # their templates take the effort too
        assert found.render([("Hi", "")]) == prompt
    text = found.to_go()
    assert text.count("{{ if") + text.count("{{ range") == text.count("{{ end }}")
    assert not re.search(r'"""', text)


def test_a_template_that_counts_turns_has_none() -> None:
    own = renderer("qwen")

    def counting(messages: list[dict[str, str]], **options: object) -> str:
        return "".join(f"[{k}]{m['content']}" for k, m in enumerate(messages)) + "A:"

    with pytest.raises(RefusedError, match="no form in Ollama"):
        find_turn_template(replace(own, template=counting))


def test_the_modelfile_names_file_stops_and_licence() -> None:
    found = find_turn_template(renderer("gemma"), bos="<bos>")
    assert found.begin == ""
    lines = modelfile("s.gguf", found, ("<end_of_turn>",), 1024, "gemma").splitlines()
    assert lines[0] == "FROM ./s.gguf" and lines[1].startswith('TEMPLATE """')
    assert lines[2:] == [
        'PARAMETER stop "<end_of_turn>"',
        "PARAMETER num_ctx 1024",
        "PARAMETER temperature 0",
        'LICENSE "gemma"',
    ]
