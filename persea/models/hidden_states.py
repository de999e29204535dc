"""Hidden states before the language-model head of any transformers model, and its logit scaling.

The model's own forward pass runs, wrapped or not, so that all hooks fire. Only the head is
bypassed, and with it the [positions, vocabulary] matrix. A probe proves that the head's scaling is
known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from persea.distributions.lm_head import LMHead
from persea.errors import RefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# config keys of a factor of the head's output: Cohere; Falcon-H1; others
LOGIT_SCALE_KEYS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
HEAD_PROBE_TOKENS = 5  # tokens of the probe; one token would show a scale or a cap
PROBE_RANGE = 100.0  # outputs of a head that are tried on its scaling
# largest relative difference of a probe
FLOAT32_PROBE_TOLERANCE, HALF_PROBE_TOLERANCE = 1e-4, 2e-2


@dataclass(frozen=True)
class LogitScaling:
    """How a model turns its head's output z into logits.

    The logits are softcap tanh(scale z / softcap), or scale z without a soft cap.

    Attributes:
        scale: factor of z.
        softcap: cap of the logits; 0 = none.
    """

    scale: float = 1.0
    softcap: float = 0.0


def hidden_states(
    model: PreTrainedModel,
    ids_BS: torch.Tensor,
    mask_BS: torch.Tensor | None,
    positions_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a model and return the hidden states before its head, [B, S, D].

    Args:
        model: a causal language model.
        ids_BS: int64 token ids.
        mask_BS: 1 = token, 0 = padding; None = no padding.
        positions_BS: for rows of several texts (mask_BS None), each token's position in its own
            text, so that texts do not attend to each other; None = one text a row.
    """
    inputs: dict[str, Any] = {"input_ids": ids_BS, "use_cache": False}
    if mask_BS is not None:
        inputs["attention_mask"] = mask_BS
    if positions_BS is not None:
        inputs["position_ids"] = positions_BS
    return run_without_head(model, **inputs)[0]


def run_without_head(model: PreTrainedModel, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """Run a model with any inputs of its forward pass, and bypass its head.

    Returns:
        The hidden states that its head was given, and the output of the forward pass, whose
        logits mean nothing.

    Raises:
        RefusedError: The model does not call its head once.
    """
    given = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    with _bypass_head(model.get_output_embeddings()) as captured:
        output = model(**given)
    if len(captured) != 1:
        raise RefusedError(
            f"{type(model).__name__} calls its head {len(captured)} times",
            where="head",
            remedy="persea needs a model that calls its output embedding once for each forward "
            "pass; use another model",
        )
    return captured[0], output


@contextmanager
def _bypass_head(
    linear: torch.nn.Module, output: torch.Tensor | None = None
) -> Iterator[list[torch.Tensor]]:
    """Within the block, let the head return its input unchanged, or an output, and record it."""
    captured: list[torch.Tensor] = []

    def forward(hidden_BSD: torch.Tensor) -> torch.Tensor:
        captured.append(hidden_BSD)
        return hidden_BSD if output is None else output

    before = linear.__dict__.get("forward")  # hooks of accelerate replace the method too
    linear.forward = forward
    try:
        yield captured
    finally:
        del linear.forward
        if before is not None:
            linear.forward = before


@torch.no_grad()
def find_logit_scaling(model: PreTrainedModel, vocab_size: int, where: str) -> LogitScaling:
    """Return the logit scaling of a model from its configuration, proven by a probe.

    Args:
        model: a causal language model.
        vocab_size: number of tokens of its tokenizer.
        where: place for error messages.

    Raises:
        RefusedError: if the head is not a plain linear layer (adapted or quantised), or if the
            logits of the probe differ from the configuration's scaling.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not torch.nn.Linear:
        raise RefusedError(
            f"the head is a {type(linear).__module__}.{type(linear).__name__}, "
            "and persea needs a plain linear layer",
            where=where,
            remedy="leave the head (lm_head) out of lora.targets and of quantisation",
        )
    config = model.config.get_text_config()
    scale = 1 / getattr(config, "logits_scaling", 1.0)  # Granite divides
    for name in LOGIT_SCALE_KEYS:
        scale *= getattr(config, name, None) or 1.0
    scaling = LogitScaling(scale, getattr(config, "final_logit_softcapping", None) or 0.0)
    ids_BS = torch.arange(min(HEAD_PROBE_TOKENS, vocab_size))[None]
    with eval_mode(model):
        hidden_SD = hidden_states(model, ids_BS, None)[0]
        expected_SV = (
            model(input_ids=ids_BS.to(model.device), use_cache=False)
            .logits[0, :, :vocab_size]
            .float()
        )
    head = LMHead(linear.weight, vocab_size, linear.bias, scaling.scale, scaling.softcap)
    if not is_close(head.logits(hidden_SD), expected_SV, hidden_SD.dtype) or not _is_scaled_so(
        model, ids_BS, scaling
    ):
        raise RefusedError(
            f"the logits of {type(model).__name__} do not follow from its configuration",
            where=where,
            remedy="persea knows final_logit_softcapping, logits_scaling, "
            f"{', '.join(LOGIT_SCALE_KEYS)}; this model cannot be trained with persea",
        )
    return scaling


def _is_scaled_so(model: PreTrainedModel, ids_BS: torch.Tensor, scaling: LogitScaling) -> bool:
    """Return whether a model turns head outputs from -PROBE_RANGE to PROBE_RANGE into these logits.

    Logits of a few tokens may be too small to show a cap.
    """
    linear = model.get_output_embeddings()
    dtype = linear.weight.dtype
    size = ids_BS.numel() * linear.weight.shape[0]
    output = torch.linspace(-PROBE_RANGE, PROBE_RANGE, size).to(linear.weight.device, dtype)
    output = output.view(1, ids_BS.numel(), -1)
    with eval_mode(model), _bypass_head(linear, output):
        found = model(input_ids=ids_BS.to(model.device), use_cache=False).logits.float()
    expected = output.float() * scaling.scale
    if scaling.softcap:
        expected = scaling.softcap * torch.tanh(expected / scaling.softcap)
    return is_close(found, expected, dtype)


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, put the model in evaluation mode (no dropout)."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def is_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether values agree within the tolerance of a probe in `dtype`."""
    tolerance = FLOAT32_PROBE_TOLERANCE if dtype is torch.float32 else HALF_PROBE_TOLERANCE
    atol = tolerance * float(expected.abs().max())
    if not math.isfinite(atol):
        return False
    return torch.allclose(found, expected, rtol=tolerance, atol=atol)
