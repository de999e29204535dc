"""Hidden states before the language-model head of any transformers model, and its logit scaling.

The model's own forward pass runs, wrapped or not, so that all hooks fire. Only the head is
bypassed, and with it the [positions, vocabulary] matrix. A probe proves that the head's scaling is
known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from persea.errors import RefusedError
from persea.losses import LMHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# config keys of a factor of the head's output: Cohere; Falcon-H1; others
LOGIT_SCALE_KEYS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
HEAD_PROBE_TOKENS = 5  # tokens of the probe; one token would show a scale or a cap
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
    inputs: dict[str, Any] = {"input_ids": ids_BS.to(model.device), "use_cache": False}
    if mask_BS is not None:
        inputs["attention_mask"] = mask_BS.to(model.device)
    if positions_BS is not None:
        inputs["position_ids"] = positions_BS.to(model.device)
    with _bypass_head(model.get_output_embeddings()) as captured:
        model(**inputs)
    (hidden_BSD,) = captured
    return hidden_BSD


@contextmanager
def _bypass_head(linear: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within the block, let the head return its input unchanged and record it."""
    captured: list[torch.Tensor] = []

    def forward(hidden_BSD: torch.Tensor) -> torch.Tensor:
        captured.append(hidden_BSD)
        return hidden_BSD

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
    with _eval_mode(model):
        hidden_SD = hidden_states(model, ids_BS, None)[0]
        expected_SV = (
            model(input_ids=ids_BS.to(model.device), use_cache=False)
            .logits[0, :, :vocab_size]
            .float()
        )
    if not _is_close(
        LMHead(linear.weight, vocab_size, linear.bias, scaling.scale, scaling.softcap).logits(
            hidden_SD
        ),
        expected_SV,
        hidden_SD.dtype,
    ):
        raise RefusedError(
            f"the logits of {type(model).__name__} do not follow from its configuration",
            where=where,
            remedy="persea knows final_logit_softcapping, logits_scaling, "
            f"{', '.join(LOGIT_SCALE_KEYS)}; this model cannot be trained with persea",
        )
    return scaling


@torch.no_grad()
def refuse_packing(model: PreTrainedModel, vocab_size: int, where: str) -> None:
    """Check that packed texts do not influence each other.

    Args:
        model: a causal language model.
        vocab_size: number of tokens of its tokenizer.
        where: place for error messages.

    Raises:
        RefusedError: if a text's hidden states change when another text precedes it in the row
            (recurrent state, attention without masks): packed texts would train on each other.
    """
    one_BS, two_BS = (
        torch.arange(n)[None] % vocab_size for n in (HEAD_PROBE_TOKENS + 1, HEAD_PROBE_TOKENS)
    )
    with _eval_mode(model):
        alone_SD = hidden_states(model, two_BS, None)[0]
        both_SD = hidden_states(
            model,
            torch.cat([one_BS, two_BS], 1),
            None,
            torch.cat([torch.arange(HEAD_PROBE_TOKENS + 1), torch.arange(HEAD_PROBE_TOKENS)])[None],
        )[0]
    if not _is_close(both_SD[HEAD_PROBE_TOKENS + 1 :], alone_SD, alone_SD.dtype):
        raise RefusedError(
            f"{type(model).__name__} does not separate texts in one row",
            where=where,
            remedy="packing: false",
        )


def pack_sequences(
    ids_BS: torch.Tensor, mask_BS: torch.Tensor, row_N: torch.Tensor, position_N: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Pack right-padded texts into fewer rows of the same width: first fit, longest first.

    The rest of a row is a text of its own without supervised positions.

    Args:
        ids_BS: int64 token ids, right-padded.
        mask_BS: 1 = token, 0 = padding.
        row_N: row of each wanted position.
        position_N: the position.

    Returns:
        Token ids [P, S], each token's position in its own text [P, S], and the new row_N and
        position_N.
    """
    width, lengths_B = ids_BS.shape[1], mask_BS.sum(1).tolist()
    used: list[int] = []
    place_B: list[tuple[int, int]] = [(0, 0)] * len(lengths_B)
    for b in sorted(range(len(lengths_B)), key=lambda b: -lengths_B[b]):
        row = next((r for r, full in enumerate(used) if full + lengths_B[b] <= width), len(used))
        used += [0] if row == len(used) else []
        place_B[b] = row, used[row]
        used[row] += lengths_B[b]
    ids_PS = torch.zeros((len(used), width), dtype=torch.int64)
    positions_PS = torch.stack([torch.arange(width) - full for full in used])
    for b, (row, begin) in enumerate(place_B):
        ids_PS[row, begin : begin + lengths_B[b]] = ids_BS[b, : lengths_B[b]]
        positions_PS[row, begin : begin + lengths_B[b]] = torch.arange(lengths_B[b])
    row_B, begin_B = torch.tensor(place_B).T
    return ids_PS, positions_PS, row_B[row_N], position_N + begin_B[row_N]


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, put the model in evaluation mode (no dropout)."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _is_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether values agree within the tolerance of a probe in `dtype`."""
    tolerance = FLOAT32_PROBE_TOLERANCE if dtype is torch.float32 else HALF_PROBE_TOLERANCE
    atol = tolerance * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=tolerance, atol=atol)
