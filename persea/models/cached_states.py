"""How a model computes behind a cache of earlier tokens, proven by a probe.

A cache of keys and values gives the logits of the whole text. A running state (Mamba, Jamba) need
not: transformers 5.24 starts Jamba's state anew at each piece of several tokens, and Mamba cuts a
mask of the whole text wrongly. A probe compares, and models that fail it get whole texts.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from persea.models.hidden_states import eval_mode, is_close

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_PREFIX = 6  # tokens before the cache is used
PROBE_STEPS = 3  # tokens behind it
# Layers of a cache that hold keys and values alone.
ATTENTION_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})


@dataclass(frozen=True)
class CacheUse:
    """What a model computes rightly behind a cache.

    Attributes:
        pieces: Several tokens at once.
        steps: One token after another.
        batches: One token after another for texts of different lengths, padded on the left.
    """

    pieces: bool
    steps: bool
    batches: bool


EXACT = CacheUse(pieces=True, steps=True, batches=True)
_USES: WeakKeyDictionary[PreTrainedModel, CacheUse] = WeakKeyDictionary()


def takes_positions(model: torch.nn.Module) -> bool:
    """Return whether positions can be given to a model, so that padding may stand anywhere."""
    return "position_ids" in inspect.signature(model.forward).parameters


def cache_input(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """Return the argument of a forward pass that continues behind a cache; None = a new one.

    transformers before 5.24 calls it past_key_values; under that name 5.24 ignores Mamba's.
    """
    if cache is None:
        return {}
    takes_cache = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if takes_cache else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """Return the cache of a forward pass; None if the model made none."""
    return output.cache if "cache" in output else getattr(output, "past_key_values", None)


def find_cache_use(model: PreTrainedModel, vocab_size: int) -> CacheUse:
    """Return what a model computes rightly behind a cache, probed once a model.

    Args:
        model: A causal language model.
        vocab_size: Number of tokens of its tokenizer.

    Returns:
        What was the same as without a cache; attention alone is not probed further.

    Example:
        >>> find_cache_use(model, 49_152).batches    # a Llama           # doctest: +SKIP
        True
    """
    if model not in _USES:
        with eval_mode(model), torch.no_grad():
            _USES[model] = _probe(model, vocab_size)
    return _USES[model]


def _probe(model: PreTrainedModel, vocab_size: int) -> CacheUse:
    ids_T = torch.arange(1, PROBE_PREFIX + PROBE_STEPS + 1) * 7 % vocab_size
    if _has_attention_alone(model, ids_T[:1]):
        return EXACT
    return CacheUse(
        _agrees(model, ids_T[None], PROBE_STEPS, masked=True),
        _agrees(model, ids_T[None], 1, masked=False),
        _agrees(model, torch.stack([ids_T, ids_T.flip(0)]), 1, masked=True, padding=2),
    )


def _has_attention_alone(model: PreTrainedModel, ids_T: torch.Tensor) -> bool:
    try:
        cache = cache_of(model(input_ids=ids_T[None].to(model.device), use_cache=True))
    except (RuntimeError, TypeError, ValueError, IndexError):  # it makes no cache at all
        return False
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer).__name__ in ATTENTION_LAYERS for layer in layers)


def _agrees(
    model: PreTrainedModel, ids_BT: torch.Tensor, step: int, *, masked: bool, padding: int = 0
) -> bool:
    """Return whether the logits behind a cache are those of the whole texts.

    Args:
        model: The model.
        ids_BT: Token ids, all rows of one length.
        step: Tokens of a pass behind the first.
        masked: Whether each pass gets the mask of the whole text so far.
        padding: First tokens of the last row that are padding.
    """
    width, device = ids_BT.shape[1], model.device
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[-1, :padding] = 0
    places_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    has_positions = takes_positions(model)
    cache, found = None, []
    try:
        for begin in (0, *range(PROBE_PREFIX, width, step)):
            end = PROBE_PREFIX if begin == 0 else begin + step
            inputs = {"input_ids": ids_BT[:, begin:end]}
            if masked:
                inputs["attention_mask"] = mask_BT[:, :end]
            if masked and has_positions:
                inputs["position_ids"] = places_BT[:, begin:end]
            output = model(
                **{key: value.to(device) for key, value in inputs.items()},
                **cache_input(model, cache),
                use_cache=True,
            )
            cache = cache_of(output)
            found.append(output.logits)
    except (RuntimeError, TypeError, ValueError, IndexError):  # it cannot take these at all
        return False
    logits_BTV = torch.cat(found, 1).float()
    if logits_BTV.shape[1] != width:  # a mask of the whole text made tokens of it
        return False
    for row, first in enumerate([0] * (len(ids_BT) - 1) + [padding]):
        whole_TV = model(input_ids=ids_BT[row : row + 1, first:].to(device), use_cache=False)
        expected_TV = whole_TV.logits[0].float()
        if not is_close(logits_BTV[row, first:], expected_TV, output.logits.dtype):
            return False
    return True
