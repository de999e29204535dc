"""Write docs/reference/*.md from schema, command line, raise sites, tables and results.

python docs/generate_reference.py

tests/test_docs.py holds the pages in step with the code.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from persea import errors
from persea.cli import app
from persea.config.foreign_keys import FOREIGN_KEYS
from persea.config.recipe import recipe_json_schema
from persea.config.renamed_keys import RENAMED_KEYS
from persea.config.size_defaults import defaults_markdown
from persea.licences.notice import licences_markdown
from persea.licences.table import licence_table

TEMPLATE_RESULTS = Path(__file__).resolve().parent.parent / "bench/results/templates.json"
# Instruct models of 2026 by name -> the template in bench/results/templates.json.
MODELS = {
    "Apertus": "data/apertus",
    "Aya Expanse": "trl/cohere",
    "Command A": "ollama-utils/command-a-111b",
    "Command R7B": "ollama-utils/command-r7b-7b",
    "DeepSeek R1 Distill": "llama-cpp-python/deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "DeepSeek V3.1": "data/deepseek-v3.1",
    "DeepSeek V3.2": "llama-cpp-python/deepseek-ai-DeepSeek-V3.2",
    "DeepSeek V4 Flash": "llama-cpp-python/deepseek-ai-DeepSeek-V4-Flash-0731",
    "EXAONE 4": "axolotl/exaone4",
    "EXAONE Deep": "ollama-utils/exaone-deep-32b",
    "Falcon H1": "axolotl/falcon_h1",
    "Gemma 2": "data/gemma2",
    "Gemma 3": "data/gemma3",
    "Gemma 4": "data/gemma4",
    "GigaChat 3.1": "llama-cpp-python/GigaChat3.1-10B-A1.8B",
    "GLM 4.6": "data/glm-4.6",
    "GLM 4.7 Flash": "llama-cpp-python/GLM-4.7-Flash",
    "GLM 5": "chat-template-drift/GLM-5",
    "GLM 5.2": "chat-template-drift/GLM-5.2",
    "GLM 5.3 Flash": "sglang/glm-5.3-flash",
    "gpt-oss": "data/gpt-oss",
    "Granite 4.1": "llama-cpp-python/ibm-granite-granite-4.1",
    "Hermes 3": "ollama-utils/hermes3-70b",
    "Hunyuan 3": "llama-cpp-python/tencent-Hy3",
    "K-EXAONE": "chat-template-drift/K-EXAONE-236B-A23B",
    "Kimi K2": "llama-cpp-python/moonshotai-Kimi-K2",
    "Kimi K2.7": "chat-template-drift/Kimi-K2.7-Code-NVFP4",
    "Kimi K3": "llama-cpp-python/Kimi-K3",
    "Laguna S 2.1": "llama-cpp-python/poolside-Laguna-S-2.1",
    "LFM2.5": "trl/lfm2_2_5",
    "Ling 3.0 Flash": "llama-cpp-python/inclusionai-ling-3.0-flash",
    "Llama 3.2": "data/llama3.2",
    "Llama 3.3": "data/llama3.1",
    "Llama 4": "axolotl/llama4",
    "LLM-jp 4.1": "llm-jp-tokenizer/llm-jp-4.1",
    "MiMo V2.5": "chat-template-drift/MiMo-V2.5",
    "MiniCPM 5": "llama-cpp-python/openbmb-MiniCPM5-1B",
    "MiniMax M2": "llama-cpp-python/MiniMax-M2",
    "MiniMax M3": "llama-cpp-python/MiniMax-M3",
    "Ministral 3 Reasoning": "llama-cpp-python/mistralai-Ministral-3-14B-Reasoning-2512",
    "Mistral Nemo": "llama-cpp-python/mistralai-Mistral-Nemo-Instruct-2407",
    "Mistral Small 3.2": "llama-cpp-python/Mistral-Small-3.2-24B-Instruct-2506",
    "Muse Glimmer": "trl/muse_glimmer",
    "Nemotron 3 Nano": "trl/nemotron_3_nano",
    "Nemotron 3 Super": "trl/nemotron_3_super",
    "Nemotron 3 Ultra": "trl/nemotron_3_ultra",
    "OLMo 3 Instruct": "chat-template-drift/Olmo-3-7B-Instruct",
    "OLMo 3 Think": "chat-template-drift/Olmo-3-7B-Think",
    "Phi-4": "chat-template-drift/phi-4",
    "Phi-4-mini": "ollama-utils/phi4-mini-3.8b",
    "Qwen 2.5": "data/qwen2.5",
    "Qwen 3": "data/qwen3",
    "Qwen 3 Coder": "data/qwen3-coder",
    "Qwen3-2507": "trl/qwen3_instruct_2507",
    "Qwen 3.5": "trl/qwen3_5_think",
    "Qwen 3.6": "trl/qwen3_6",
    "Qwen 3.8": "trl/qwen3_8",
    "Seed-OSS": "llama-cpp-python/ByteDance-Seed-OSS",
    "SmolLM2": "ollama-utils/smollm2-135m",
    "SmolLM3": "data/smollm3",
    "Solar Open": "llama-cpp-python/upstage-Solar-Open-100B",
    "Spark 2.5": "llama-cpp-python/Spark2.5",
    "Step 3.5 Flash": "llama-cpp-python/StepFun3.5-Flash",
    "Step 3.7 Flash": "llama.cpp/StepFun3.7-Flash",
    "TinyLlama": "ollama-utils/tinyllama-1.1b",
}
HERE = Path(__file__).resolve().parent / "reference"
SOURCE = HERE.parent.parent / "persea"
EXIT_CODES = {
    2: "Usage, or the recipe",
    3: "Data or models",
    4: "Refused: it could be done, and the result would be wrong",
    5: "A teacher or its server",
    6: "Storage",
    7: "The environment lacks something",
}


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _resolve(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """The node that a $ref names, with the keys written beside the $ref."""
    if "$ref" not in node:
        return node
    return defs[node["$ref"].rpartition("/")[2]] | {k: v for k, v in node.items() if k != "$ref"}


def _describe_type(node: dict[str, Any], defs: dict[str, Any]) -> str:
    """A value's type in words: `integer >= 1`, `full | lora`, `list of section`."""
    node = _resolve(node, defs)
    if options := node.get("anyOf") or node.get("oneOf"):
        return " or ".join(dict.fromkeys(_describe_type(part, defs) for part in options))
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"] if value != "")
    if "const" in node:
        return f"`{node['const']}`"
    if "properties" in node:
        return "section"
    kind = node.get("type", "any")
    if kind == "array":
        return f"list of {_describe_type(node.get('items', {}), defs)}"
    if kind == "object":
        value = node.get("additionalProperties", {})
        return f"mapping to {_describe_type(value, defs)}" if isinstance(value, dict) else "mapping"
    bounds = [
        f"{sign} {node[key]:,}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in node and node[key] < 10**9
    ]
    return " ".join([{"null": "none"}.get(kind, kind), ", ".join(bounds)]).strip()


def _describe_default(node: dict[str, Any], required: bool) -> str:
    if required:
        return "**required**"
    if node.get("x-default"):
        return "[by size](defaults.md)"
    if "default" not in node:
        return "see meaning"
    default = node["default"]
    if default is None:
        return "none"
    if default in ("", [], {}):
        return "empty"
    if isinstance(default, dict):
        return "its defaults"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _subsections(node: dict[str, Any], defs: dict[str, Any], path: str) -> list[tuple[str, Any]]:
    """The sections below a value: (path, section), a list's items under the list's name with []."""
    node = _resolve(node, defs)
    if "properties" in node:
        return [(path, node)]
    found = []
    for part in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
        found += _subsections(part, defs, path)
    if "items" in node:
        found += _subsections(node["items"], defs, f"{path}[]")
    return found


def recipe_page() -> str:
    """Return docs/reference/recipe.md: one table a section, one row a key."""
    schema = recipe_json_schema()
    defs = schema.get("$defs", {})
    lines = [
        "# Recipe keys",
        "",
        "Every key of a recipe, from its JSON schema (`persea schema`).",
        "`python docs/generate_reference.py` writes this page.",
        "`training.steps` is the key `steps` in the section `training`;",
        "`teachers[]` is one entry of the list `teachers`.",
    ]
    queue: list[tuple[str, Any]] = [("", schema)]
    while queue:
        path, section = queue.pop(0)
        lines += ["", f"## {path or 'The recipe'}", ""]
        if path and (text := section.get("description")):
            lines += [_cell(text), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        below = []
        for name, node in section["properties"].items():
            merged = _resolve(node, defs)
            meaning = node.get("description") or merged.get("description", "")
            default = _describe_default(node, name in section.get("required", ()))
            cells = (f"`{name}`", _describe_type(node, defs), default, _cell(meaning))
            lines.append(f"| {' | '.join(cells)} |")
            below += _subsections(node, defs, f"{path}.{name}".lstrip("."))
        queue = below + queue
    for title, text, head, table in (
        ("Renamed keys", "The old names are still read", "old key", RENAMED_KEYS),
        ("Names of other trainers", "Names with the same meaning are read", "name", FOREIGN_KEYS),
    ):
        lines += ["", f"## {title}", "", f"{text}, each with a notice.", ""]
        lines += [f"| {head} | today |", "|---|---|"]
        for path, names in table.items():
            section = ".".join(path).replace(".*", "[]")
            for pair in names.items():
                cells = (f"`{f'{section}.{key}'.lstrip('.')}`" for key in pair)
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _parameter_rows(command: Any) -> list[str]:
    """One table row for each argument and option of a command."""
    rows = []
    for parameter in command.params:
        if "--help" in parameter.opts:
            continue
        is_option = parameter.param_type_name == "option"
        name = ", ".join(parameter.opts) if is_option else parameter.name.upper()
        default = getattr(parameter.default, "value", parameter.default)
        is_shown = parameter.show_default and not isinstance(default, bool | None | list | tuple)
        shown = "**required**" if parameter.required else f"`{default}`" if is_shown else ""
        rows.append(f"| `{name}` | {shown} | {_cell(parameter.help or '')} |")
    return rows


def cli_page() -> str:
    """Return docs/reference/cli.md: every command with its arguments and options."""
    root: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "Every command with its arguments and options, as in `persea --help`.",
        "`python docs/generate_reference.py` writes this page.",
        "Exit codes and error messages are in [troubleshooting](../troubleshooting.md).",
    ]
    for name, command in root.commands.items():
        for words, one in (
            [(name, command)]
            if not hasattr(command, "commands")
            else [(f"{name} {below}", c) for below, c in command.commands.items()]
        ):
            lines += ["", f"## persea {words}", "", _cell(one.help or "")]
            if rows := _parameter_rows(one):
                lines += ["", "| argument or option | default | meaning |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _texts_by_name(tree: ast.Module) -> dict[str, ast.expr]:
    """Names that a module assigns once, with a string."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return {
        name: values[0]
        for name, values in found.items()
        if len(values) == 1 and isinstance(values[0], ast.Constant | ast.JoinedStr)
    }


def _pattern(node: ast.expr | None, names: dict[str, ast.expr]) -> str:
    """A string expression as text, with … for each part that is known only at run time."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_pattern(part, {}) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _pattern(node.left, names) + _pattern(node.right, names)
    if isinstance(node, ast.IfExp):
        parts = [
            text for text in (_pattern(node.body, names), _pattern(node.orelse, names)) if text
        ]
        return " / ".join(parts) if len(parts) == 2 else "…"
    if isinstance(node, ast.Name) and node.id in names:
        return _pattern(names[node.id], {})
    return "" if node is None else "…"


def error_messages() -> Iterator[tuple[int, str, str, str]]:
    """Yield (exit code, module, message, remedy) of every raised PerseaError with a text."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = _texts_by_name(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            kind = getattr(errors, name, None)
            if not (isinstance(kind, type) and issubclass(kind, errors.PerseaError)):
                continue
            keywords = {k.arg: k.value for k in node.keywords}
            message = _pattern(node.args[0] if node.args else keywords.get("message"), names)
            if re.sub(r"[^a-z]", "", message):
                module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
                yield kind.exit_code, module, message, _pattern(keywords.get("remedy"), names)


def errors_page() -> str:
    """Return docs/reference/errors.md: every error message by exit code, with its remedy."""
    lines = [
        "# Every error message",
        "",
        "All error messages by exit code, taken from the source.",
        "… stands for a name, number or path.",
        "`python docs/generate_reference.py` writes this page.",
        "[Troubleshooting](../troubleshooting.md) explains the frequent ones.",
    ]
    found = sorted(set(error_messages()))
    for code, title in EXIT_CODES.items():
        lines += [
            "",
            f"## Exit code {code}: {title}",
            "",
            "| message | remedy | from |",
            "|---|---|---|",
        ]
        lines += [
            f"| {_cell(message)} | {_cell(remedy)} | {module} |"
            for one, module, message, remedy in found
            if one == code
        ]
    return "\n".join(lines) + "\n"


def licences_page() -> str:
    """Return docs/reference/licences.md: the rows of persea's table of licences."""
    return (
        "# Table of licences\n\n"
        "What persea knows of licences, checkpoints and servers: persea/licences/licences.yaml.\n"
        "`python docs/generate_reference.py` writes this page. [Licences](../licences.md) explain\n"
        "the check. silent = no clause on learning from outputs was found, unknown = it asks.\n\n"
        + licences_markdown(licence_table())
    )


def defaults_page() -> str:
    """Return docs/reference/defaults.md: the defaults that follow the student's size."""
    return (
        "# Defaults by size\n\n"
        "Keys of a recipe whose default follows the number of the student's weights and the\n"
        "skills: persea/config/size_defaults.py. `persea plan` prints the values of a run, and a\n"
        "key that the recipe sets always wins. `python docs/generate_reference.py` writes this\n"
        "page; [train](../train.md#defaults-by-size) gives the reasons and sources.\n\n"
        + defaults_markdown()
        + "\n"
    )


MODELS_INTRODUCTION = """# Models by name

What persea does with the chat templates of instruct models: `make templates` renders each of them
in 60 conversations at every effort, and with tools, as persea does and as transformers does, and
compares the token ids (`bench/results/templates.json`; `python docs/generate_reference.py` writes
this page). `equal` conversations have the same ids, and their answers are parsed back; `refused`
ones are refused at their place, with a remedy (exit code 3); {different} differ. Of all {templates}
templates {followed} are followed: {equal:,} renderings are equal, {refused:,} are refused. The
family `generic` is found out by rendering ([how](../new_family.md)). A template says nothing of a
model's licence, weights and tokenizer: `persea check` reads those from the model's own files.

| model | family | efforts | tools | equal | refused | first refusal | template |
|---|---|---|---|---|---|---|---|
"""


def models_page() -> str:
    """Return the page of models by name, from bench/results/templates.json."""
    results = json.loads(TEMPLATE_RESULTS.read_text(encoding="utf-8"))
    rows = []
    for name, key in MODELS.items():
        one = results["templates"][key]
        reason = _cell(one["reason"].removeprefix("refused: "))
        cells = (
            name,
            one["family"] or "none",
            ", ".join(one["efforts"]),
            "yes" if one["tools"] else "no",
            str(one.get("equal", 0)),
            str(one.get("refused", 0)),
            reason,
            f"`{key}`",
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    totals = results["totals"]
    return MODELS_INTRODUCTION.format(
        templates=totals["followed template"] + totals["refused template"],
        followed=totals["followed template"],
        different=totals.get("different", "none"),
        equal=totals["equal"],
        refused=totals["refused"],
    ) + "".join(rows)


PAGES = {
    "defaults.md": defaults_page,
    "recipe.md": recipe_page,
    "cli.md": cli_page,
    "errors.md": errors_page,
    "licences.md": licences_page,
    "models.md": models_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
