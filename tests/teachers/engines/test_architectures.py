"""The local engine's distributions are those of model(...).logits, whatever an architecture makes
of its head's output, and a model whose head is not understood takes the way of whole logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from persea.teachers.engines import transformers as local
from persea.teachers.engines.transformers import TransformersEngine

V, PADDED = 300, 303  # tokens, rows of the matrix
SIZES: dict[str, Any] = {
    "vocab_size": PADDED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# configuration class -> further keys; each growth of its logits is large enough to show
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"tie_word_embeddings": False},
    "Qwen2Config": {},
    "Qwen3Config": {"tie_word_embeddings": True},
    "MistralConfig": {"sliding_window": 8},
    "Gemma2Config": {"final_logit_softcapping": 3.0, "sliding_window": 8},
    "Gemma3TextConfig": {"sliding_window": 8, "final_logit_softcapping": 2.0},
    "GraniteConfig": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "CohereConfig": {"logit_scale": 0.25},
    "Cohere2Config": {"logit_scale": 0.25, "sliding_window": 8},
    "GptOssConfig": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    "GPTNeoXConfig": {},
    "Olmo2Config": {},
    "SmolLM3Config": {},
    "FalconH1Config": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
}


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES | ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    loaded: PreTrainedModel = model
    return loaded


def texts() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, V, n).astype(np.int32) for n in (21, 5, 33)]
    return ids, [rng.random(len(one)) < 0.6 for one in ids]


def expected(model: PreTrainedModel, ids_T: np.ndarray, mask_T: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(ids_T)[None].long()).logits[0, :, :V].double()
    return torch.log_softmax(logits[np.flatnonzero(mask_T) - 1], -1)


def check(model: PreTrainedModel, is_known: bool) -> None:
    engine = TransformersEngine(model, V, 8)
    ids, masks = texts()
    for mask_T in masks:
        mask_T[0] = False
    assert (engine._lm_head() is not None) == is_known
    for ids_T, mask_T, found_NV in zip(
        ids, masks, engine.compute_logprobs(ids, masks), strict=True
    ):
        torch.testing.assert_close(
            found_NV.double(), expected(model, ids_T, mask_T), rtol=1e-5, atol=2e-5
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architectures_own_logits(name: str) -> None:
    check(tiny(name), is_known=True)


@pytest.mark.parametrize("name", ["Gemma2Config", "CohereConfig", "GraniteConfig"])
def test_a_scale_and_a_cap_change_the_distributions(name: str) -> None:
    """The trap is set: without them, the distributions would be others."""
    model = tiny(name)
    ids, masks = texts()
    own = expected(model, ids[0], masks[0])
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, key, None):
            setattr(model.config, key, 1e6 if "cap" in key else 1.0)
            if hasattr(model, key):
                setattr(model, key, 1.0)
    assert (own - expected(model, ids[0], masks[0])).abs().max() > 0.1


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.01,
        lambda logits: 50 * torch.tanh(logits / 50),  # a cap that small logits do not show
        lambda logits: logits + torch.arange(logits.shape[-1]) / 100,
        lambda logits: logits.clamp(max=3.0),
    ],
)
def test_logits_that_are_changed_in_another_way_are_taken_whole(change: Any) -> None:
    model = tiny("LlamaConfig")
    forward = model.forward

    def changed(*given: Any, **named: Any) -> Any:
        output = forward(*given, **named)
        if output.logits.shape[-1] == PADDED:
            output.logits = change(output.logits)
        return output

    model.forward = changed  # type: ignore[method-assign]
    check(model, is_known=False)


def test_a_head_that_is_no_plain_linear_layer_is_taken_whole() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    model = tiny("LlamaConfig")
    head = Doubled(SIZES["hidden_size"], PADDED, bias=False)
    head.weight = model.get_output_embeddings().weight
    model.set_output_embeddings(head)
    check(model, is_known=False)


def test_a_model_that_passes_by_its_head_is_taken_whole() -> None:
    model = tiny("LlamaConfig")
    head = model.get_output_embeddings()

    def forward(input_ids: torch.Tensor, **named: Any) -> Any:
        named = {key: value for key, value in named.items() if key != "use_cache"}
        output = model.model(input_ids=input_ids, use_cache=False, **named)
        output.logits = output.last_hidden_state @ head.weight.T
        return output

    model.forward = forward  # type: ignore[method-assign]
    check(model, is_known=False)


def test_the_scaling_is_found_once_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [0], local.find_logit_scaling

    def counted(*given: Any) -> Any:
        calls[0] += 1
        return real(*given)

    monkeypatch.setattr(local, "find_logit_scaling", counted)
    engine = TransformersEngine(tiny("LlamaConfig"), V, 8)
    for some in (engine, engine.reporting(lambda share: None)):
        list(some.compute_logprobs(*texts()))
    assert calls == [1]
