"""The beginning that prompts share: its keys and values are computed once and copied.

Prompts of one task often begin with the same system text, list of tools or worked examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from persea.models.cached_states import ATTENTION_LAYERS, cache_of, takes_positions

if TYPE_CHECKING:
    from persea.teachers.engines.transformers import TransformersEngine

# A pass of its own costs more than it saves where fewer tokens are saved.
MIN_TOKENS, MIN_SAVED_TOKENS = 16, 128
# Kinds of RoPE whose frequencies depend on the length of the whole text.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """A shared beginning and its cache.

    Attributes:
        ids: Token ids.
        cache: A cache of transformers with one row: keys and values of `ids`.
    """

    ids: tuple[int, ...]
    cache: Any

    def begins(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt begins with these tokens and has more."""
        return len(prompt) > len(self.ids) and tuple(prompt[: len(self.ids)]) == self.ids

    def fits(self, width: int) -> bool:
        """Return whether no layer's window ends before `width` columns."""
        return all(
            width < getattr(layer, "sliding_window", width + 1) for layer in self.cache.layers
        )

    def copy(self, num_rows: int) -> Any:
        """Return a cache with `num_rows` rows, each of them the prefix."""
        cache = deepcopy(self.cache)
        if num_rows > 1:
            for layer in cache.layers:
                layer.batch_repeat_interleave(num_rows)
        return cache


def count_shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with; each prompt has at least one more."""
    if len(prompts) < 2:
        return 0
    # In the order of words the first and the last differ the earliest.
    first, last = min(prompts, key=tuple), max(prompts, key=tuple)
    longest = min(len(prompt) for prompt in prompts) - 1
    for k in range(longest):
        if first[k] != last[k]:
            return k
    return max(longest, 0)


@torch.inference_mode()
def compute_shared_prefix(
    engine: TransformersEngine, prompts: Sequence[Sequence[int]]
) -> SharedPrefix | None:
    """Compute keys and values of the tokens that all prompts begin with.

    Args:
        engine: Runs the weights.
        prompts: Token ids of each prompt.

    Returns:
        The prefix; None if it is too short to pay, or if the model cannot continue from one (its
        layers keep states instead of columns, or its positions depend on the text's length).
    """
    length = count_shared_tokens(prompts)
    if length < MIN_TOKENS or length * (len(prompts) - 1) < MIN_SAVED_TOKENS:
        return None
    model = engine.model
    if not takes_positions(model) or LENGTH_DEPENDENT_ROPE & {*_rope_kinds(model.config)}:
        return None
    ids = tuple(prompts[0][:length])
    ids_1T = torch.tensor([ids], device=model.device)
    output = model(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        position_ids=torch.arange(length, device=model.device)[None],
        use_cache=True,
        logits_to_keep=1,
    )
    cache = cache_of(output)
    layers = getattr(cache, "layers", ())
    if not layers or any(type(layer).__name__ not in ATTENTION_LAYERS for layer in layers):
        return None
    prefix = SharedPrefix(ids, cache)
    return prefix if prefix.fits(length) else None


def _rope_kinds(config: Any) -> Iterator[str]:
    waiting = [getattr(config.get_text_config(), "rope_parameters", None)]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Mapping):
            yield str(found.get("rope_type"))
            waiting += found.values()
