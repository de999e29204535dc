"""Continuous batching: answers that begin and end at different steps share each forward pass.

All answers of a batch are aligned at their ends: the answer with the longest text so far decides
the width of the key-value cache, and shorter ones are padded on the left. A new answer is prefilled
beside the others, and joins them at the next step; a finished one leaves at once. Prompts that
begin with a shared prefix are prefilled from its keys and values.

transformers' own manager of continuous batches (5.24) draws all answers from one seed, so that an
answer would depend on its neighbours; here every answer has its own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn.functional import pad

from persea.errors import PerseaError, TeacherError
from persea.models.cached_states import (
    EXACT,
    cache_input,
    cache_of,
    find_cache_use,
    takes_positions,
)
from persea.teachers.engines import Sampling
from persea.teachers.engines.shared_prefix import SharedPrefix
from persea.teachers.engines.token_sampling import (
    require_finite_logits,
    sample_token,
    seeded_generator,
)

if TYPE_CHECKING:
    from persea.teachers.engines.transformers import TransformersEngine

MAX_BATCH_ANSWERS = 64
# Answers times the longest of them, in tokens of prompt and answer: bounds the key-value cache.
MAX_BATCH_TOKENS = 1 << 16
# Layers of transformers' caches whose rows can be joined; other models' answers take turns.
JOINABLE_LAYERS = frozenset(
    {
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DummyLayer",
    }
)


class TokenConstraint(Protocol):
    """Decides which tokens may follow in an answer."""

    def allow(self, logits_W: torch.Tensor) -> torch.Tensor:
        """Return the logits with -inf for tokens that may not follow."""
        ...

    def accept(self, token: int) -> None:
        """Note the token that followed."""
        ...


@dataclass(eq=False)
class Generation:
    """One answer that is being generated.

    Attributes:
        prompt: Token ids.
        stop_ids: Tokens that end the answer.
        max_new_tokens: Longest answer, in tokens.
        sampling: How tokens are drawn.
        constraint: Which tokens may follow; None = all.
        ids: Tokens so far.
        error: Why the answer could not be generated.
        is_cancelled: Whether nobody wants the answer any more.
    """

    prompt: Sequence[int]
    stop_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    constraint: TokenConstraint | None = None
    ids: list[int] = field(default_factory=list)
    error: Exception | None = None
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self._generator = seeded_generator(np.asarray(self.prompt, np.int32), self.sampling)

    @property
    def is_finished(self) -> bool:
        """Whether no further token follows."""
        return (
            self.error is not None
            or self.is_cancelled
            or len(self.ids) >= self.max_new_tokens
            or (bool(self.ids) and self.ids[-1] in self.stop_ids)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the longest possible answer."""
        return len(self.prompt) + self.max_new_tokens

    def draw(self, logits_W: torch.Tensor) -> None:
        """Add the next token. Logits that are not finite end this answer, and no other."""
        try:
            require_finite_logits(logits_W)
        except TeacherError as error:
            self.error = error
            return
        if self.constraint is not None:
            logits_W = self.constraint.allow(logits_W)
        self.ids.append(sample_token(logits_W, self.sampling, self._generator))
        if self.constraint is not None:
            self.constraint.accept(self.ids[-1])


@dataclass(eq=False)
class Group:
    """Answers with a common key-value cache.

    Attributes:
        members: The answers, one row of the cache each.
        cache: A cache of transformers.
        width: Columns of the cache: tokens of the longest member that are in it.
        num_prefix: Columns on the left that hold a shared prefix, whose padding is behind them.
    """

    members: list[Generation]
    cache: Any = None
    width: int = 0
    num_prefix: int = 0


class ContinuousBatch:
    """Generates several answers at once.

    Args:
        engine: Runs the weights.
        on_drawn: Called after each pass with its answers, each with a new token or an error, and
            the logits [answers, vocabulary] that the tokens were drawn from.
        prefix: What prompts may begin with; None = compute every prompt whole.

    Example:
        >>> batch = ContinuousBatch(engine)                            # doctest: +SKIP
        >>> batch.add([Generation(prompt, stop_ids, 256, Sampling())]) # doctest: +SKIP
        >>> while batch.members: batch.step()                          # doctest: +SKIP
    """

    def __init__(
        self,
        engine: TransformersEngine,
        on_drawn: Callable[[Sequence[Generation], torch.Tensor], None] | None = None,
        prefix: SharedPrefix | None = None,
    ) -> None:
        self.engine = engine
        self._on_drawn = on_drawn
        self._prefix = prefix
        self._groups: list[Group] = []
        self._can_join: bool | None = None  # known after the first prefill
        self._use = EXACT
        self._takes_positions = takes_positions(engine.model)

    @property
    def can_join(self) -> bool:
        """Whether answers share passes; True before the first prompt shows otherwise."""
        return self._can_join is not False

    @property
    def members(self) -> list[Generation]:
        """The answers that are being generated."""
        return [member for group in self._groups for member in group.members]

    def has_room(self, new: Generation, others: Iterable[Generation] = ()) -> bool:
        """Return whether another answer fits beside the members and `others`.

        An answer that exceeds the limit alone is generated alone.
        """
        together = [*self.members, *others, new]
        longest = max(g.num_tokens for g in together)
        return len(together) == 1 or (
            len(together) <= MAX_BATCH_ANSWERS and len(together) * longest <= MAX_BATCH_TOKENS
        )

    @torch.inference_mode()
    def add(self, new: Sequence[Generation]) -> None:
        """Prefill the prompts of new answers, and draw the first token of each.

        An answer that fails gets its `error`; the others go on.
        """
        if self._can_join is None and new:
            self._prefill(new[:1])
            new = new[1:]
        for generations in [new] if self._can_join else [[g] for g in new]:
            if generations:
                self._prefill(generations)

    def _prefill(self, new: Sequence[Generation]) -> None:
        width = max(len(g.prompt) for g in new)
        group, prefix = Group(list(new)), self._prefix
        if prefix and prefix.fits(width) and all(prefix.begins(g.prompt) for g in new):
            group.width = group.num_prefix = len(prefix.ids)
            group.cache = prefix.copy(len(new))
        ids_BT = torch.full((len(new), width - group.width), int(new[0].prompt[0]))
        for row, generation in enumerate(new):
            ids_BT[row, width - len(generation.prompt) :] = torch.tensor(
                generation.prompt[group.width :]
            )
        cache = self._forward(group, ids_BT)
        if cache is not None or not self._use.steps:
            self._can_join = self._use.batches and _can_join(cache)
        if group.members and self._groups and self._can_join:
            _join(self._groups[0], group)
        elif group.members:
            self._groups.append(group)

    @torch.inference_mode()
    def step(self) -> None:
        """Generate the next token of every answer."""
        for group in self._groups:
            _keep(group, [g for g in group.members if not g.is_finished])
            if group.members:
                ids = [[g.ids[-1]] for g in group.members]
                if not self._use.steps:  # one member, without a cache
                    ids = [[*g.prompt, *g.ids] for g in group.members]
                self._forward(group, torch.tensor(ids))
        self._groups = [group for group in self._groups if group.members]

    def _forward(self, group: Group, ids_BT: torch.Tensor) -> Any:
        """Run new tokens of all members, draw one token each, and let finished members leave.

        Returns:
            The cache; None if there is none, or if the model failed, which is an error of all
            members.
        """
        model, engine = self.engine.model, self.engine
        new_width = group.width + ids_BT.shape[1]
        lengths_B1 = torch.tensor([[len(g.prompt) + len(g.ids)] for g in group.members])
        column_T = torch.arange(new_width)
        begins_B1 = new_width - lengths_B1 + group.num_prefix
        mask_BT = ((column_T < group.num_prefix) | (column_T >= begins_B1)).long()
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if self._takes_positions:
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BT[:, group.width :]
        try:
            self._use = find_cache_use(model, engine.vocab_size)
            if not self._use.batches and len(group.members) == 1:
                inputs = {"input_ids": ids_BT}
            output = model(
                **{key: value.to(model.device) for key, value in inputs.items()},
                **cache_input(model, group.cache),
                use_cache=self._use.steps,
                logits_to_keep=1,
            )
            logits_BW = output.logits[:, -1, : engine.vocab_size].float().cpu()
        except Exception as error:
            for generation in group.members:
                generation.error = as_teacher_error(error, len(group.members))
            group.members.clear()
            return None
        cache = group.cache = cache_of(output) if self._use.steps else None
        group.width = new_width if self._use.steps else 0
        _move_padding_left(group)
        for generation, logits_W in zip(group.members, logits_BW, strict=True):
            generation.draw(logits_W)
        if self._on_drawn is not None:
            self._on_drawn(group.members, logits_BW)
        _keep(group, [g for g in group.members if not g.is_finished])
        return cache


def _move_padding_left(group: Group) -> None:
    """Move each member's padding from behind the shared prefix to the left of it."""
    lengths = {len(g.prompt) for g in group.members}
    if group.num_prefix and lengths != {group.width}:
        missing_B1 = torch.tensor([[group.width - len(g.prompt)] for g in group.members])
        source_BT = torch.arange(group.width).expand(len(group.members), -1)
        source_BT = torch.where(
            source_BT < group.num_prefix + missing_B1,
            (source_BT - missing_B1) % group.width,  # padding itself: any column, it is masked
            source_BT,
        )
        for layer in group.cache.layers:
            for name in ("keys", "values") if layer.is_initialized else ():
                states = getattr(layer, name)
                index = source_BT.to(states.device)[:, None, :, None].expand(states.shape)
                setattr(layer, name, states.gather(-2, index))
    group.num_prefix = 0


def as_teacher_error(error: Exception, num_answers: int) -> Exception:
    """Return the error of persea that tells that a pass over answers failed."""
    if isinstance(error, PerseaError):
        return error
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return TeacherError(
        f"the model failed with {num_answers} answers at once: {type(error).__name__}: "
        f"{str(error)[:200]}",
        where="generate",
        remedy="lower the batch size, or the --concurrency of a server"
        if out_of_memory
        else "check that the model runs with this version of transformers",
    )


def _can_join(cache: Any) -> bool:
    return all(type(layer).__name__ in JOINABLE_LAYERS for layer in cache.layers)


def _keep(group: Group, kept: list[Generation]) -> None:
    """Remove all members but the given ones, and the columns that only others needed."""
    if len(kept) == len(group.members):
        return
    rows = torch.tensor([k for k, g in enumerate(group.members) if g in kept], dtype=torch.long)
    group.members = kept
    if not kept:
        group.cache = None
        return
    # The newest token of a member is not in the cache yet.
    group.width = max(len(g.prompt) + len(g.ids) - 1 for g in kept)
    for layer in group.cache.layers:
        _map_rows(layer, lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        _fit_columns(layer, group.width)


def _join(group: Group, other: Group) -> None:
    """Append the members of another group."""
    width = max(group.width, other.width)
    for layer, other_layer in zip(group.cache.layers, other.cache.layers, strict=True):
        _fit_columns(layer, width)
        _fit_columns(other_layer, width)
        others = iter(_row_tensors(other_layer))
        _map_rows(layer, lambda tensor, others=others: torch.cat([tensor, next(others)]))  # type: ignore[misc]
    group.members += other.members
    group.width = width


def _fit_columns(layer: Any, width: int) -> None:
    """Give the keys and values of a layer `width` columns: pad or cut them on the left.

    A sliding window keeps one column fewer than it has.
    """
    if not getattr(layer, "is_initialized", False):
        return
    kept = width
    if getattr(layer, "is_sliding", False):
        kept = min(width, layer.sliding_window - 1)
        layer.cumulative_length = width
    for name in ("keys", "values"):
        states = getattr(layer, name)
        missing = kept - states.shape[-2]
        states = pad(states, (0, 0, missing, 0)) if missing > 0 else states[..., -kept:, :]
        setattr(layer, name, states)


def _row_tensors(layer: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _map_rows(layer, collect)
    return found


def _map_rows(layer: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace each tensor of a layer that has one row per member."""
    if getattr(layer, "is_initialized", False):
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    for name in ("conv_states", "recurrent_states"):
        states: dict[int, torch.Tensor | None] = getattr(layer, name, {})
        for key, value in states.items():
            if value is not None:
                states[key] = change(value)
