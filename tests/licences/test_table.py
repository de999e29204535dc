"""The table of licences is whole, and its names and patterns find what they mean."""

from __future__ import annotations

import re

import pytest

from persea.licences.table import (
    Distillation,
    checkpoint_licences,
    find_licence,
    host_licence,
    is_spdx_licence,
    licence_table,
)

KINDS = {"attribution", "notice", "policy", "terms", "copy", "threshold", "name"}


def test_every_reference_of_the_table_exists_and_every_name_is_one_licence() -> None:
    table = licence_table()
    ids = [row.id for row in table.licences]
    assert len(set(ids)) == len(ids)
    for row in table.licences:
        for name in (row.id, row.title, row.hub, *row.names):
            assert not name or find_licence(name) is row, name
        assert set(row.except_bases) <= set(ids)
        assert {d.kind for d in row.duties} <= KINDS
        assert row.source and row.confidence in ("primary", "quoted", "reported")
        assert re.fullmatch("([0-9a-f]{64})?", row.sha256)
        assert (row.uses and row.duties) or row.distillation is not Distillation.CONDITIONS
    for checkpoint in table.checkpoints:
        re.compile(checkpoint.pattern)
        assert set(checkpoint.licences) <= set(ids)
    assert {h.licence for h in table.hosts} <= set(ids)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", ("qwen-research",)),
        ("Qwen2.5-Coder-3B", ("qwen-research",)),
        ("Qwen/Qwen2.5-32B", ("Apache-2.0",)),
        ("Qwen/Qwen2.5-72B-Instruct", ("qwen-license",)),
        ("Qwen/Qwen2-72B", ("tongyi-qianwen",)),
        ("Qwen3-0.6B", ("Apache-2.0",)),
        ("google/gemma-2-2b-it", ("Gemma",)),
        ("gemma-3-270m-q4_k_m", ("Gemma",)),
        ("Gemma 3 270m", ("Gemma",)),
        ("google/gemma-4-31b", ("Apache-2.0",)),
        ("openai/gpt-oss-20b", ("Apache-2.0", "gpt-oss-usage-policy")),
        ("meta-llama/Meta-Llama-3-8B", ("llama-3",)),
        ("NousResearch/Hermes-3-Llama-3.1-8B", ("llama-3.1",)),
        ("meta-llama/Llama-2-7b-chat-hf", ("llama-2",)),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", ("MIT", "llama-3.3")),
        ("deepseek-ai/DeepSeek-V3", ("deepseek-la-1.0",)),
        ("deepseek-ai/DeepSeek-V3-0324", ("MIT",)),
        ("meta-models/Muse-Spark-Open-816B-A42B", ("muse-spark-open",)),
        ("muse-spark-1.2", ("meta-model-api-terms",)),
        ("o3-mini", ("openai-terms",)),
        ("llama-sapling", ()),
        ("gpt-oss-sapling", ()),
        ("EleutherAI/gpt-j-6b", ()),
    ],
)
def test_checkpoints(name: str, want: tuple[str, ...]) -> None:
    assert checkpoint_licences([name]) == want


@pytest.mark.parametrize(
    ("host", "want"),
    [
        ("api.openai.com", "openai-terms"),
        ("notopenai.com", "unknown"),
        ("API.Anthropic.com.", "anthropic-terms"),
        ("ec2-1.amazonaws.com", "unknown"),
        ("bedrock-runtime.eu-west-1.amazonaws.com", "aws-bedrock-terms"),
        ("8.8.8.8", "unknown"),
        ("192.168.1.4", ""),
        ("::1", ""),
        ("localhost", ""),
        ("vllm.lan", ""),
        ("", ""),
    ],
)
def test_hosts(host: str, want: str) -> None:
    assert host_licence(host) == want


def test_spdx_knows_more_than_the_table() -> None:
    assert is_spdx_licence("gpl-3.0-only") and find_licence("GPL-3.0-only") is None
    assert not is_spdx_licence("mystery-1")
