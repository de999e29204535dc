"""Keys of any vendor are refused in recipes; names, paths, licences and commits are not keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.config.recipe import load_recipe
from persea.config.secrets import is_secret
from persea.errors import RecipeError

# Made-up keys in the forms of their vendors, joined here so that no scanner finds one in this file.
RANDOM = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6kL9n"
KEYS = {
    "OpenAI": "sk-" + "proj-" + RANDOM,
    "Anthropic": "sk-" + "ant-api03-" + RANDOM,
    "Hugging Face": "hf" + "_" + RANDOM[:34],
    "Google": "AIza" + "Sy" + RANDOM[:33],
    "Groq": "gsk" + "_" + RANDOM,
    "xAI": "xai" + "-" + RANDOM,
    "NVIDIA": "nvapi" + "-" + RANDOM,
    "Replicate": "r8" + "_" + RANDOM[:37],
    "GitHub": "ghp" + "_" + RANDOM[:36],
    "GitLab": "glpat" + "-" + RANDOM[:20],
    "AWS": "AKIA" + "Q3EGRLZX5TMN7WYD",
    "Slack": "xoxb" + "-123456789012-123456789012-" + RANDOM[:24],
    "Weights & Biases": "0f3a5b7c9d1e2f4a6b8c" * 2,
    "JSON web token": "eyJhbGciOi" + "JIUzI1NiJ9." + RANDOM + "." + RANDOM,
    "an address with a password": "https://user:password@example.org/v1",
    "an address with a key": "https://example.org/v1?key=abc",
    "a vendor that nobody knows": RANDOM,
    "within a sentence": f"the key is {RANDOM}, keep it",
}
NO_KEYS = (
    "meta-llama/Llama-3.2-3B-Instruct",
    "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    "DeepSeekR1DistillQwen32B",
    "Apertus-70B-Instruct-2509",
    "LicenseRef-scancode-gemma-tou-2024-04-01",
    "CC-BY-NC-SA-4.0 AND Apache-2.0",
    "/data/models--a--b/snapshots/0f3a5b7c9d1e2f4a6b8c0f3a5b7c9d1e2f4a6b8c/x.jsonl",
    "my-experiment-2026-11-30-seed17",
    "https://example.org/v1",
    "We may use these outputs: our lawyer decided so on 2026-11-30 (case 4711-B).",
    "OPENAI_API_KEY",
    "q_proj",
)
RECIPE = """
name: {name}
student: {{model: saplings/llama-sapling, revision: {revision}}}
teachers:
  - {{name: qwen, model: saplings/qwen-sapling, licence: {licence}}}
corpus:
  - {{skill: code, generate: 4}}
licence_decisions: {{qwen: {decision}}}
"""


@pytest.mark.parametrize("vendor", KEYS)
def test_a_key_is_found(vendor: str) -> None:
    assert is_secret(KEYS[vendor])


@pytest.mark.parametrize("text", NO_KEYS)
def test_other_values_are_no_keys(text: str) -> None:
    assert not is_secret(text)


def test_a_commit_is_no_key_where_a_revision_is_meant() -> None:
    commit = "0f3a5b7c9d1e2f4a6b8c" * 2
    assert is_secret(commit)
    assert not is_secret(commit, "revision")
    assert is_secret(RANDOM, "revision")


@pytest.mark.parametrize("place", ["name", "licence", "decision", "revision"])
@pytest.mark.parametrize(
    "vendor", ["OpenAI", "Hugging Face", "Google", "a vendor that nobody knows"]
)
def test_a_recipe_with_a_key_is_refused_and_the_key_not_shown(
    place: str, vendor: str, tmp_path: Path
) -> None:
    values = {"name": "a", "licence": "MIT", "decision": "fine", "revision": "main"}
    path = tmp_path / "a.yaml"
    path.write_text(RECIPE.format(**values | {place: KEYS[vendor]}))
    with pytest.raises(RecipeError, match="looks like a secret") as caught:
        load_recipe(path)
    assert KEYS[vendor] not in str(caught.value)
    path.write_text(RECIPE.format(**values))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [f"student.model={KEYS[vendor]}"])
    assert KEYS[vendor] not in str(caught.value)
