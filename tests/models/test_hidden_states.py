"""A model's head is found and proven, whatever the model makes of its output; what is not known is
refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
)

from persea.distributions.lm_head import LMHead
from persea.errors import RefusedError
from persea.models.hidden_states import LogitScaling, find_logit_scaling, hidden_states

V = 50
SIZES: dict[str, Any] = {
    "vocab_size": V + 3,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny(config: type, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES, **more), dtype=torch.float32).eval()
    for p in model.parameters():  # as initialised, logits are too small for a cap to show
        torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize(
    ("config", "more", "scaling"),
    [
        (LlamaConfig, {"tie_word_embeddings": True}, LogitScaling()),
        (LlamaConfig, {"tie_word_embeddings": False}, LogitScaling()),
        (GPTNeoXConfig, {}, LogitScaling()),  # its head has another name
        (
            Gemma2Config,
            {"final_logit_softcapping": 3.0, "head_dim": 8, "num_key_value_heads": 1},
            LogitScaling(softcap=3.0),
        ),
        (GraniteConfig, {"logits_scaling": 4.0}, LogitScaling(scale=0.25)),
        (CohereConfig, {"logit_scale": 0.0625}, LogitScaling(scale=0.0625)),
    ],
)
def test_head_and_hidden_states_make_the_models_own_logits(
    config: type, more: dict[str, Any], scaling: LogitScaling
):
    model = tiny(config, **more)
    found = find_logit_scaling(model, V, "student")
    assert found == scaling
    ids = torch.randint(0, V, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    wanted = model(input_ids=ids, attention_mask=mask).logits
    linear = model.get_output_embeddings()
    logits = LMHead(linear.weight, V, linear.bias, found.scale, found.softcap).logits(
        hidden_states(model, ids, mask)[mask.bool()]
    )
    torch.testing.assert_close(logits, wanted[mask.bool()][:, :V], rtol=1e-5, atol=1e-5)
    assert "forward" not in model.get_output_embeddings().__dict__  # the head works again
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, wanted)


def test_the_head_is_not_run():
    model = tiny(LlamaConfig)
    seen: list[Any] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, out: seen.append(out.shape[-1])
    )
    hidden_states(model, torch.zeros(1, 3, dtype=torch.int64), None)
    assert seen == [16]


def test_a_head_that_fails_is_put_back():
    model = tiny(LlamaConfig)
    with pytest.raises(IndexError):
        hidden_states(model, torch.full((1, 3), 10_000), None)
    assert "forward" not in model.get_output_embeddings().__dict__


def test_training_mode_is_left_as_it_was():
    model = tiny(LlamaConfig, attention_dropout=0.5).train()
    assert find_logit_scaling(model, V, "student") == LogitScaling()  # dropout would show
    assert model.training


@pytest.mark.parametrize("config", [LlamaConfig, GraniteConfig])
def test_logits_that_are_not_what_the_configuration_says_are_refused(config: type):
    model = tiny(config)
    forward = model.forward

    def warmer(*given: Any, **named: Any) -> Any:
        out = forward(*given, **named)
        out.logits = out.logits * 1.01
        return out

    model.forward = warmer
    with pytest.raises(RefusedError, match="do not follow from its configuration") as caught:
        find_logit_scaling(model, V, "student")
    assert caught.value.exit_code == 4


def test_a_head_with_an_adapter_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny(LlamaConfig, tie_word_embeddings=False),
        LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"),
    )
    with pytest.raises(
        RefusedError,
        match=r"student: the head is a peft\..*Linear, and persea needs a plain linear layer "
        r"-> leave the head",
    ):
        find_logit_scaling(model, V, "student")


def test_texts_in_a_row_do_not_see_each_other():
    model = tiny(LlamaConfig)
    one, two = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7]])
    packed = hidden_states(
        model, torch.cat([one, two], 1), None, torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    )
    torch.testing.assert_close(packed[:, :4], hidden_states(model, one, None))
    torch.testing.assert_close(packed[:, 4:], hidden_states(model, two, None))


def test_a_hybrid_is_known_too():
    """A hybrid of attention and state space, with a multiplier on its head's output."""
    model = tiny(
        FalconH1Config,
        lm_head_multiplier=0.5,
        mamba_d_ssm=32,
        mamba_n_heads=2,
        mamba_d_state=8,
        mamba_n_groups=1,
        num_key_value_heads=2,
    )
    assert find_logit_scaling(model, V, "student") == LogitScaling(scale=0.5)
