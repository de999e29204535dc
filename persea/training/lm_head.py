"""What a causal model gives to its head, and what it makes of the head's output: found in any model of transformers, and proven.

The model's own forward runs, wrapped or not, so that every hook of it fires; only its head is passed by, and with it the largest
matrix of all, [positions, vocabulary].
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

LOGIT_SCALE_KEYS = (
    "logit_scale",
    "lm_head_multiplier",
    "output_multiplier",
)  # Cohere; Falcon-H1; a multiplier of the head's output
HEAD_PROBE_TOKENS = 5  # tokens; a scale or a cap shows in one


@dataclass(frozen=True)
class LogitScaling:
    """What a model makes of its head's output z: cap tanh(scale z / cap); cap = 0: scale z."""

    scale: float = 1.0
    softcap: float = 0.0


def hidden_states(
    model: PreTrainedModel,
    ids_BS: torch.Tensor,
    mask_BS: torch.Tensor | None,
    positions_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the head is given, [B, S, D].

    mask_BS       1 = a token, 0 = padding; None = no padding
    positions_BS  where several texts follow each other in a row (mask_BS None): each token's place in its own text, so that none
                  sees another; None = the model counts
    """
    inputs: dict[str, Any] = {"input_ids": ids_BS.to(model.device), "use_cache": False}
    if mask_BS is not None:
        inputs["attention_mask"] = mask_BS.to(model.device)
    if positions_BS is not None:
        inputs["position_ids"] = positions_BS.to(model.device)
    with _bypass_head(model.get_output_embeddings()) as given:
        model(**inputs)
    (hidden_BSD,) = given
    return hidden_BSD


@contextmanager
def _bypass_head(linear: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """While it lasts, the head hands on what it is given and keeps it."""
    given: list[torch.Tensor] = []

    def forward(hidden_BSD: torch.Tensor) -> torch.Tensor:
        given.append(hidden_BSD)
        return hidden_BSD

    before = linear.__dict__.get("forward")  # accelerate's hooks replace it too
    linear.forward = forward
    try:
        yield given
    finally:
        del linear.forward
        if before is not None:
            linear.forward = before


@torch.no_grad()
def find_logit_scaling(model: PreTrainedModel, vocab_size: int, where: str) -> LogitScaling:
    """What the model makes of its head's output, by its configuration; a probe proves it.

    Raises Refused for a head that is more than a linear map (an adapter, a quantised one), and for a model whose logits are not
    what its configuration says.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not torch.nn.Linear:
        raise RefusedError(
            f"its head is a {type(linear).__module__}.{type(linear).__name__}, and persea trains through a plain linear map",
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
        wanted_SV = (
            model(input_ids=ids_BS.to(model.device), use_cache=False)
            .logits[0, :, :vocab_size]
            .float()
        )
    if not _is_close(
        LMHead(linear.weight, vocab_size, linear.bias, scaling.scale, scaling.softcap).logits(
            hidden_SD
        ),
        wanted_SV,
        hidden_SD.dtype,
    ):
        raise RefusedError(
            f"{type(model).__name__} makes something else of its head's output than its configuration says",
            where=where,
            remedy=f"persea knows final_logit_softcapping, logits_scaling, {', '.join(LOGIT_SCALE_KEYS)}; this model cannot be trained by it",
        )
    return scaling


@torch.no_grad()
def refuse_packing(model: PreTrainedModel, vocab_size: int, where: str) -> None:
    """Raises Refused where a text changes when another stands before it in its row (a state that runs through, attention without
    masks): packed, they would teach each other's prompts.
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
            f"in {type(model).__name__} texts in one row see each other",
            where=where,
            remedy="packing: false",
        )


def pack_sequences(
    ids_BS: torch.Tensor, mask_BS: torch.Tensor, row_N: torch.Tensor, position_N: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Right-padded texts in as few rows of the same width as first-fit finds, longest first: (ids, each token's place in its own text,
    row_N, at_N). What is left of a row is a text of its own that nobody learns from.
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
    """Without dropout, for a moment."""
    trains = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(trains)


def _is_close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    digits = 1e-4 if dtype is torch.float32 else 2e-2
    return torch.allclose(found, wanted, rtol=digits, atol=digits * float(wanted.abs().max()))
