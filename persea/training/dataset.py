"""Training examples from cached answers: a torch Dataset, and batches in a reproducible order.

`DistillDataset` works with a torch DataLoader, `transformers.Trainer` and TRL; its `collate_fn`
gives a dictionary with `input_ids`, `attention_mask`, `labels` and the `Batch` that persea's losses
take. persea's own training loop calls `batch(step)`: the batch of a step depends on the seed and
the step alone, so that a resumed training sees the same batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from persea.alignment.event_map import EventMap, load_event_map
from persea.cache.reader import AnswerSource, AnswerSubset, CacheMixture, CacheReader
from persea.cache.unit import CachedAnswer
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.losses import BatchTargets, EventTargets, build_batch_targets, concat_event_targets
from persea.training.dataset_stats import DatasetStats, DatasetSurvey
from persea.training.example import Example, ExampleMaker, TeachEnd
from persea.training.example_store import (
    ExampleStore,
    StoredExamples,
    locate,
    selected_answers,
    summarize,
)
from persea.training.loss_balancing import Group

if TYPE_CHECKING:
    import datasets

IGNORED_LABEL = -100  # label of a token without loss, as transformers and TRL use it
# Tokens and entries of examples that are cached in memory: about 100 MB, and all of the
# quickstart's.
EXAMPLE_CACHE_TOKENS = 1 << 21
EXAMPLE_OVERHEAD_TOKENS = 64  # counted for each example besides: the 2 kB of its array objects


@dataclass(frozen=True)
class Batch:
    """Input of one training step: B conversations, S student positions, N supervised positions.

    Attributes:
        ids_BS: int64 token ids, right-padded.
        mask_BS: int64, 1 = token, 0 = padding.
        row_N: int64, conversation of each supervised token.
        position_N: int64, position whose logits predict the token: the one BEFORE it.
        labels_N: int64, the supervised token.
        targets: targets of each teacher at the N positions.
        tokens_by_group: supervised tokens of each group (a teacher's answers of a skill).
        group_B: group of each conversation.
    """

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    row_N: torch.Tensor
    position_N: torch.Tensor
    labels_N: torch.Tensor
    targets: tuple[BatchTargets, ...]
    tokens_by_group: Mapping[Group, int]
    group_B: tuple[Group, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return a copy whose tensors are on a device."""
        moved = {
            name: side.to(device, non_blocking=non_blocking)
            for name, side in vars(self).items()
            if isinstance(side, torch.Tensor)
        }
        targets = tuple(one.to(device, non_blocking) for one in self.targets)
        return Batch(**(vars(self) | moved | {"targets": targets}))


class DistillDataset(torch.utils.data.Dataset[Example]):
    """Cached answers of one or several teachers as training examples for one student.

    `dataset[i]` is the i-th example; an example is built when it is asked for, and the last ones
    are cached, so memory grows by 8 bytes an answer. The constructor reads every answer once:
    answers that are longer than `max_length` or that the student's tokenizer or template cannot
    write (a literal U+2581 in a SentencePiece student) are skipped and counted in `stats`. No
    answer is cut.

    Args:
        cache: a cache, a list of cached answers, or several caches and the share of each. A share
            holds however many answers of the cache are skipped; each cache is read epoch after
            epoch.
        student: the student's renderer.
        teachers: renderer of each teacher, by the name in the cache. The event maps are built, or
            loaded from disk.
        event_maps: event map of each teacher, instead of `teachers`.
        batch_size: conversations of `batch(step)`.
        seed: seed of the order of `batch(step)`.
        max_length: longest example in student tokens.
        partial_tokens: whether student tokens that begin inside a teacher token get targets too.
        teach_end: whether the teacher's distribution at the end of a text is used: "auto" = where
            the teacher wrote the text, not at the end of given answers and documents; "always" or
            "never".

    Attributes:
        stats: counts of examples and of skipped answers.

    Raises:
        DataError: if no answer is left, if a cached distribution is invalid, or if the cache holds
            answers of a teacher without renderer and event map.

    Example:
        >>> import persea
        >>> from persea.cache.unit import CachedAnswer
        >>> from persea.chat.messages import Conversation, FinishReason, Text
        >>> from persea.distributions import text_only_distributions
        >>> from persea.teachers.teacher import Answer
        >>> teacher = persea.load_renderer("saplings/qwen-sapling")
        >>> student = persea.load_renderer("saplings/llama-sapling")
        >>> conversation = Conversation.from_question("2 + 2?").with_answer(Text("4"))
        >>> tokens = teacher.render(conversation)
        >>> answer = Answer("p0", "qwen", "reasoning", "en", conversation, FinishReason.STOP)
        >>> text = text_only_distributions(int(tokens.loss_mask_T.sum()))
        >>> cache = [CachedAnswer(answer, tokens, text)]  # or persea.open_cache("runs/avocado")
        >>> dataset = persea.DistillDataset(cache, student=student, teachers={"qwen": teacher})
        >>> sorted(dataset.collate_fn([dataset[0]]))
        ['attention_mask', 'batch', 'input_ids', 'labels']
    """

    def __init__(
        self,
        cache: AnswerSource | Sequence[CachedAnswer] | Sequence[tuple[AnswerSource, float]],
        *,
        student: ChatRenderer,
        teachers: Mapping[str, ChatRenderer] | None = None,
        event_maps: Mapping[str, EventMap] | None = None,
        batch_size: int = 16,
        seed: int = 0,
        max_length: int = 512,
        partial_tokens: bool = False,
        teach_end: TeachEnd = "auto",
    ) -> None:
        maps = {
            **{name: load_event_map(one, student) for name, one in (teachers or {}).items()},
            **(event_maps or {}),
        }
        caches = _as_caches(cache)
        built = build_dataset(
            caches,
            student,
            maps,
            batch_size=batch_size,
            seed=seed,
            max_length=max_length,
            partial_tokens=partial_tokens,
            teach_end=teach_end,
        )
        vars(self).update(vars(built))

    mixture: CacheMixture
    _example_cache: OrderedDict[tuple[int, int], Example]
    _cache_tokens: int
    example_of: Callable[[AnswerSource, int], Example]
    event_maps: Mapping[str, EventMap]
    batch_size: int
    stats: DatasetStats

    @classmethod
    def from_mixture(
        cls,
        mixture: CacheMixture,
        example_of: Callable[[AnswerSource, int], Example],
        event_maps: Mapping[str, EventMap],
        batch_size: int,
        stats: DatasetStats,
    ) -> DistillDataset:
        """Create a dataset from a mixture of caches whose answers are all usable.

        `example_of` returns the example of a cache's answer by its number.
        """
        self = cls.__new__(cls)
        self.mixture, self.example_of, self.event_maps = mixture, example_of, event_maps
        self.batch_size, self.stats = batch_size, stats
        self._example_cache = OrderedDict()
        self._cache_tokens = 0
        return self

    def __len__(self) -> int:
        """Return the number of examples."""
        return sum(map(len, self.mixture.readers))

    def __getitem__(self, index: int) -> Example:
        """Return the example of an index: cache by cache, in the order of the answers."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        edges = np.cumsum([0, *map(len, self.mixture.readers)]).tolist()
        which = bisect_right(edges, index % len(self)) - 1
        return self._cached_example((which, index % len(self) - edges[which]))

    def collate_fn(self, examples: Sequence[Example | Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples for a DataLoader, `transformers.Trainer` or TRL.

        Args:
            examples: examples, or rows of `to_hf_dataset()`.

        Returns:
            `input_ids`, `attention_mask` and `labels` ([B, S] int64, right-padded, labels
            IGNORED_LABEL where a token has no loss), and `batch`, a `Batch` for persea's losses.
        """
        batch = collate(
            [self[one["example"]] if isinstance(one, Mapping) else one for one in examples],
            self.event_maps,
        )
        labels_BS = torch.full_like(batch.ids_BS, IGNORED_LABEL)
        labels_BS[batch.row_N, batch.position_N + 1] = batch.labels_N
        return {
            "input_ids": batch.ids_BS,
            "attention_mask": batch.mask_BS,
            "labels": labels_BS,
            "batch": batch,
        }

    def to_hf_dataset(self) -> datasets.Dataset:
        """Return a `datasets.Dataset` with one column, `example`, the index of an example.

        TRL's SFTTrainer accepts no other kind of dataset; `collate_fn` takes its rows.
        """
        import datasets

        return datasets.Dataset.from_dict({"example": list(range(len(self)))})

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Return the batch of a training step, or a part of it.

        Args:
            step: the step, from 0.
            part: which part, from 0. The parts are consecutive slices: together they are the whole
                batch, however many there are.
            parts: number of parts.
        """
        begin, end = self.batch_size * part // parts, self.batch_size * (part + 1) // parts
        return collate(
            [self.example(step * self.batch_size + k) for k in range(begin, end)], self.event_maps
        )

    def train_test_split(self, validation_share: float) -> tuple[DistillDataset, DistillDataset]:
        """Split the examples into a training and a held-out dataset.

        Args:
            validation_share: share of the examples to hold out. The number is rounded to whole
                batches, at least one of each; the seed decides which.

        Returns:
            (training dataset, held-out dataset).

        Raises:
            DataError: if there are not enough examples.
        """
        mixture = self.mixture
        n = max(1, round(len(self) * validation_share / self.batch_size)) * self.batch_size
        if len(self) - n < self.batch_size:
            raise DataError(
                f"{len(self)} examples are too few to hold out {n} "
                f"and train on batches of {self.batch_size}",
                where="training.validation_share",
                remedy="a larger corpus, a smaller training.batch_size, or training.eval_steps: 0",
            )
        held_out_L = np.zeros(len(self), np.bool_)
        held_out_L[np.random.default_rng([mixture.seed, n]).permutation(len(self))[:n]] = True
        edges = np.cumsum([len(reader) for reader in mixture.readers])[:-1]
        sides = []
        for chosen_L in (~held_out_L, held_out_L):
            parts = [
                (AnswerSubset(reader, np.flatnonzero(chosen)), share)
                for reader, share, chosen in zip(
                    mixture.readers, mixture.shares, np.split(chosen_L, edges), strict=True
                )
                if chosen.any()
            ]
            readers, shares = zip(*parts, strict=True)
            # held out: every example once, so the shares are the sizes
            shares = shares if chosen_L is not held_out_L else tuple(map(len, readers))
            sides.append(
                self.from_mixture(
                    CacheMixture(readers, shares, mixture.seed),
                    self.example_of,
                    self.event_maps,
                    self.batch_size,
                    self.stats,
                )
            )
        return sides[0], sides[1]

    def prompt_ids(self) -> Iterator[str]:
        """Yield the id of each example's prompt."""
        return (
            reader[k].answer.prompt_id
            for reader in self.mixture.readers
            for k in range(len(reader))
        )

    def example(self, draw_index: int) -> Example:
        """Return the example of a draw from the mixture, which never ends."""
        return self._cached_example(self.mixture.locate_answer(draw_index))

    def _cached_example(self, key: tuple[int, int]) -> Example:
        """Return the example of (cache, answer), built if it is not cached."""
        one = self._example_cache.pop(key, None)
        if one is None:
            one = self.example_of(self.mixture.readers[key[0]], key[1])
            self._cache_tokens += _cache_cost(one)
        self._example_cache[key] = one
        while self._cache_tokens > EXAMPLE_CACHE_TOKENS and len(self._example_cache) > 1:
            self._cache_tokens -= _cache_cost(self._example_cache.popitem(last=False)[1])
        return one


class _AnswerList(tuple[CachedAnswer, ...]):
    """Cached answers in memory as an AnswerSource."""

    __slots__ = ()

    def epoch_order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return every index once, shuffled."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))


def _as_caches(
    cache: AnswerSource | Sequence[CachedAnswer] | Sequence[tuple[AnswerSource, float]],
) -> Sequence[tuple[AnswerSource, float]]:
    """Return (cache, share) pairs; a single cache has share 1."""
    if hasattr(cache, "epoch_order"):
        return [(cast("AnswerSource", cache), 1.0)]
    if all(isinstance(one, CachedAnswer) for one in cache):
        return [(cast("AnswerSource", _AnswerList(cast("Sequence[CachedAnswer]", cache))), 1.0)]
    return cast("Sequence[tuple[AnswerSource, float]]", cache)


def _cache_cost(one: Example) -> int:
    """Return the size of an example in the in-memory cache, in tokens."""
    return len(one.tokens) + len(one.targets.row_M) + EXAMPLE_OVERHEAD_TOKENS


def build_dataset(
    caches: Sequence[tuple[AnswerSource, float]],
    renderer: ChatRenderer,
    event_maps: Mapping[str, EventMap],
    *,
    batch_size: int,
    seed: int,
    max_length: int,
    partial_tokens: bool = False,
    teach_end: TeachEnd = "auto",
    example_folder: Path | None = None,
    on_answer: Callable[[int, int], None] = lambda read, answers: None,
) -> DistillDataset:
    """Build the dataset of several caches; see `DistillDataset` for arguments and errors.

    `on_answer` is called with the number of answers read, and of all answers: after each answer,
    or after each unit whose examples are stored. A cache of which no answer is left is no part of
    the mixture. With `example_folder`, examples of the units of a cache are stored there, and read
    where they are; see example_store.py.
    """
    maker = ExampleMaker.create(renderer, event_maps, partial_tokens, teach_end)
    store = ExampleStore(example_folder, maker) if example_folder else None
    survey = DatasetSurvey(max_length)
    parts: list[tuple[AnswerSubset, float]] = []
    stored: dict[CacheReader, StoredExamples] = {}
    num_answers, num_read = sum(len(cache) for cache, _ in caches), 0

    def count_answers(count: int) -> None:
        nonlocal num_read
        num_read += count
        on_answer(min(num_read, num_answers), num_answers)

    for cache, share in caches:
        whole, numbers = selected_answers(cache)
        if store is not None and isinstance(whole, CacheReader):
            stored[whole] = store.open(whole, count_answers)
            usable = _survey_stored(survey, stored[whole], numbers)
            usable = np.searchsorted(numbers, usable)
        else:
            usable = survey.add(summarize(cache, maker, count_answers))
        if len(usable):
            parts.append((AnswerSubset(cache, usable), share))
    if not parts:
        raise DataError(
            f"no answer is left: {survey.too_long} have more than {max_length} tokens, "
            f"{survey.unrenderable} cannot be written by the student's tokenizer or template"
            + "".join(f" ({reason})" for reason in survey.reasons[:1]),
            where="train",
            remedy="raise training.max_length, or choose another student",
        )
    readers, shares = zip(*parts, strict=True)

    def example_of(source: AnswerSource, number: int) -> Example:
        whole, at = locate(source, number)
        if isinstance(whole, CacheReader) and whole in stored:
            return stored[whole][at]
        return maker.make(whole[at])

    return DistillDataset.from_mixture(
        CacheMixture(readers, shares, seed), example_of, event_maps, batch_size, survey.stats()
    )


def _survey_stored(
    survey: DatasetSurvey, examples: StoredExamples, numbers: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Count the chosen answers of a cache, unit by unit; return those that become examples."""
    usable = []
    edges = np.searchsorted(numbers, examples.offsets_U1)
    for unit, summary in enumerate(examples.summaries):
        first = int(examples.offsets_U1[unit])
        chosen = numbers[edges[unit] : edges[unit + 1]] - first
        usable.append(survey.add(summary, chosen) + first)
    return np.concatenate(usable or [np.empty(0, np.int64)])


def collate(examples: Sequence[Example], event_maps: Mapping[str, EventMap]) -> Batch:
    """Collate examples into a batch, in their order.

    Args:
        examples: at least one example.
        event_maps: event map of each teacher.
    """
    width = max(len(one.tokens) for one in examples)
    ids = torch.zeros((len(examples), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    group_B = tuple(Group(one.teacher, one.skill) for one in examples)
    rows, positions, tokens_by_group = [], [], Counter[Group]()
    targets: dict[str, list[tuple[EventTargets, int]]] = {}
    n = 0
    for b, one in enumerate(examples):
        ids[b, : len(one.tokens)] = torch.from_numpy(one.tokens.ids_T)
        mask[b, : len(one.tokens)] = 1
        supervised = np.flatnonzero(one.tokens.loss_mask_T)
        rows.append(np.full(len(supervised), b))
        positions.append(supervised - 1)
        tokens_by_group[group_B[b]] += len(supervised)
        targets.setdefault(one.teacher, []).append((one.targets, n))
        n += len(supervised)
    row_N, position_N = (torch.from_numpy(np.concatenate(side)) for side in (rows, positions))
    batch_targets = tuple(
        build_batch_targets(event_maps[name], concat_event_targets(*zip(*parts, strict=True)), n)
        for name, parts in targets.items()
    )
    return Batch(
        ids,
        mask,
        row_N,
        position_N,
        ids[row_N, position_N + 1],
        batch_targets,
        dict(tokens_by_group),
        group_B,
    )
