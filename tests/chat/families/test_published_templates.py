"""Published chat templates without a file of their own are followed, with efforts and tools.

They are read from PERSEA_DATA, from the package trl where it is installed, and from the folder that
PERSEA_TEMPLATES names: `.templates`, into which `make templates` fetches the others. A template
that is not there is skipped.
"""

from __future__ import annotations

import os
from datetime import date
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bench.templates import compare, conversations, make_tokenizer_folder, tool_conversations
from persea.models.licence import UNKNOWN_LICENCE, read_licence
from persea.models.loading import ModelSource, load_renderer

# Template -> (efforts, stop token, whether it has tools)
PUBLISHED = {
    "apertus": ("none", "<|assistant_end|>", False),
    "smollm3": ("none high", "<|im_end|>", False),
    "glm-4.6": ("none high", "<|user|>", True),
    "deepseek-v3.1": ("none high", "<｜end▁of▁sentence｜>", False),
    "deepseekv3": ("high", "<｜end▁of▁sentence｜>", False),
    "glm4moe": ("none high", "<|user|>", True),
    "muse_glimmer": ("low medium high", "<|eot|>", True),
    "nemotron_3_nano": ("none high", "<|im_end|>", True),
    "nemotron_3_super": ("none low high", "<|im_end|>", True),
    "nemotron_3_ultra": ("none medium high", "<|im_end|>", True),
    "lfm2_2_5_v2": ("high", "<|im_end|>", True),
    "phi3": ("none", "<|end|>", False),
    "qwen3_instruct_2507": ("none", "<|im_end|>", True),
    "qwen3_vl": ("none", "<|im_end|>", True),
    "cohere2": ("none", "<|END_OF_TURN_TOKEN|>", False),
    "deepseek-ai-DeepSeek-V4-Flash-0731": ("none low high", "<｜end▁of▁sentence｜>", True),
    "GLM-4.7-Flash": ("none high", "<|user|>", True),
    "Kimi-K3": ("none low high", "<|end_of_msg|>", True),
    "moonshotai-Kimi-K2": ("none", "<|im_end|>", True),
    "MiniMax-M2": ("high", "[e~[", True),
    "MiniMax-M3": ("none high", "[e~[", True),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("high", "</s>", True),
    "ByteDance-Seed-OSS": ("none high", "<seed:eos>", True),
    "tencent-Hy3": ("none low high", "<｜hy_eos:opensource｜>", True),
    "ibm-granite-granite-4.1": ("none", "<|end_of_text|>", True),
    "inclusionai-ling-3.0-flash": ("none high", "<|role_end|>", True),
    "MiMo-VL": ("none", "<|im_end|>", True),
    "diffusion_gemma": ("none high", "<turn|>", False),
    "llm-jp-4.1": ("low medium high", "<|return|>", True),
    "llm-jp-4-alpha-2.0": ("low medium high", "<|return|>", True),
    "phi-4": ("none", "<|im_end|>", False),
    "phi4-mini-3.8b": ("none", "<|end|>", False),
    "phi4-reasoning-14b": ("none", "<|im_end|>", False),
    "Olmo-3-7B-Instruct": ("none", "<|endoftext|>", True),
    "Olmo-3-7B-Think": ("high", "<|endoftext|>", False),
    "GLM-5": ("none high", "<|user|>", True),
    "GLM-5.2": ("none high", "<|user|>", True),
    "glm-5.3-flash": ("low high", "<|user|>", True),
    "K-EXAONE-236B-A23B": ("none high", "<|endofturn|>", True),
    "exaone4": ("none high", "[|endofturn|]", True),
    "exaone-deep-32b": ("high", "[|endofturn|]", False),
    "MiMo-V2.5": ("none high", "<|im_end|>", True),
    "Kimi-K2.7-Code-NVFP4": ("high", "<|im_end|>", True),
    "StepFun3.7-Flash": ("low medium high", "<|im_end|>", True),
    "llama4": ("none", "<|eot|>", True),
    "command-a-111b": ("none", "<|END_OF_TURN_TOKEN|>", False),
    "gemma3-1b": ("none", "<end_of_turn>", False),
}
# Those that a family of persea's renders, token for token; the others are generic.
PROVEN = {
    "MiMo-VL": "qwen2.5",
    "llm-jp-4.1": "llm-jp",
    "llm-jp-4-alpha-2.0": "llm-jp",
    "gemma3-1b": "gemma",
}
# EXAONE 4 drops the thought before a call once the result is there, which persea refuses.
REFUSED = {"exaone4": 2}


def find_template(data: Path, name: str) -> Path:
    roots = [data / "templates", Path(os.environ.get("PERSEA_TEMPLATES", "no folder"))]
    spec = find_spec("trl")
    if spec is not None and spec.origin:
        roots.append(Path(spec.origin).parent)
    found = next((p for root in roots for p in root.rglob(f"{name}.jinja")), None)
    if found is None:
        pytest.skip(f"no template {name} in PERSEA_DATA, trl and PERSEA_TEMPLATES")
    return found


@pytest.mark.realdata
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_template_is_rendered_as_transformers_does(
    data: Path, tmp_path: Path, name: str
):
    folder = tmp_path / name
    make_tokenizer_folder(folder, find_template(data, name).read_text(encoding="utf-8"))
    renderer = load_renderer(ModelSource(str(folder)), name, date.today())
    family = renderer.family
    has_tools = family.is_tool_text_verbatim is not None
    efforts = " ".join(effort.value for effort in family.efforts)
    assert (efforts, family.stop_tokens[0], has_tools) == PUBLISHED[name]
    assert family.name == PROVEN.get(name, "generic")
    # A template makes no licence: Xiaomi's MiMo-VL has Qwen's text.
    assert read_licence(ModelSource(str(folder)), name) == UNKNOWN_LICENCE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    effort, thinks = family.efforts[-1], bool(family.thought_ends)
    first, behind_system = islice(conversations(effort, thinks), 2)
    given = [first] if "no system text" in family.limitations else [first, behind_system]
    given += tool_conversations(effort, thinks) if has_tools else []
    found = [compare(renderer, tokenizer, conversation)[0] for conversation in given]
    refused = REFUSED.get(name, 0)
    assert (found.count("equal"), found.count("refused")) == (len(given) - refused, refused)
