"""Which models compute the same behind a cache: proven by a probe, and by whole texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from persea.models import cached_states
from persea.models.cached_states import EXACT, CacheUse, cache_input, cache_of, find_cache_use
from persea.teachers.engines import GREEDY
from persea.teachers.engines import transformers as local
from persea.teachers.engines.batching import ContinuousBatch, Generation
from persea.teachers.engines.transformers import TransformersEngine

V = 128
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
JAMBA = {
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 8,
}
FALCON = {"num_hidden_layers": 2, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_state": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"num_hidden_layers": 2},
    "JambaConfig": JAMBA,
    "MambaConfig": {"num_hidden_layers": 2, "state_size": 8},
    "FalconMambaConfig": {"num_hidden_layers": 2, "state_size": 8},
    "RwkvConfig": {"num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    "FalconH1Config": FALCON | {"mamba_n_groups": 1, "head_dim": 8},
}


@pytest.fixture(scope="module", params=CONFIGS)
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    return TransformersEngine(tiny(request.param), V, 3)


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES | CONFIGS[name])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # differences of a wrong state are large enough to show
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def whole_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_the_probe_finds_what_pieces_and_steps_give(engine: TransformersEngine):
    """As in a text of 40 tokens that is computed in pieces of 10, or one token after another."""
    model, ids = engine.model, np.random.default_rng(0).integers(0, V, 40).tolist()
    expected_TV = whole_logits(model, ids)

    def is_right(step: int) -> bool:
        cache, found = None, []
        for begin in range(0, len(ids), step):
            given = torch.tensor([ids[begin : begin + step]])
            with torch.inference_mode():
                output = model(input_ids=given, use_cache=True, **cache_input(model, cache))
            cache = cache_of(output)
            found.append(output.logits[0])
        return torch.allclose(torch.cat(found), expected_TV, rtol=1e-3, atol=1e-3)

    use = find_cache_use(model, V)
    assert (use.pieces, use.steps) == (is_right(10), is_right(1))


def test_which_models_pass_the_probe():
    assert find_cache_use(tiny("LlamaConfig"), V) is EXACT
    assert find_cache_use(tiny("FalconH1Config"), V) == EXACT
    jamba = find_cache_use(tiny("JambaConfig"), V)
    assert not jamba.pieces and jamba.steps


def test_a_long_text_has_the_logits_of_the_whole(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
):
    ids_T = np.random.default_rng(1).integers(0, V, 60).astype(np.int32)
    mask_T = np.arange(60) > 0
    expected_NV = whole_logits(engine.model, ids_T.tolist())[:-1].log_softmax(-1)
    monkeypatch.setattr(local, "MAX_TOKENS_PER_FORWARD", 16)
    (found_NV,) = engine.compute_logprobs([ids_T], [mask_T])
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-4, atol=1e-4)


def best_tokens(model: PreTrainedModel, prompt: list[int], num: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num):
        ids.append(int(whole_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_answers_are_those_of_whole_texts(engine: TransformersEngine):
    """Alone as a stream, many of different lengths at once, and side by side as a server has."""
    draw = np.random.default_rng(2)
    prompts = [draw.integers(1, V, n).astype(np.int32) for n in (9, 4, 7)]
    expected = [best_tokens(engine.model, p.tolist(), 6) for p in prompts]
    assert [list(engine.stream(p, (0,), 6, GREEDY)) for p in prompts] == expected
    assert [a.tolist() for a in engine.generate(prompts, (0,), 6)] == expected
    batch = ContinuousBatch(engine)
    made = [Generation(p.tolist(), (0,), 6, GREEDY) for p in prompts]
    batch.add(made[:2])
    batch.step()
    batch.add(made[2:])
    while batch.members:
        batch.step()
    assert [g.error for g in made] == [None] * 3
    assert [g.ids for g in made] == expected


def test_a_model_that_has_no_right_step_computes_whole_texts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        cached_states, "_probe", lambda model, vocab_size: CacheUse(False, False, False)
    )
    engine = TransformersEngine(tiny("LlamaConfig"), V)
    test_answers_are_those_of_whole_texts(engine)
