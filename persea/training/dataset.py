"""Where batches come from: offline() turns captures into lessons in the student's voice, and lessons into batches."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from persea.alignment.event_map import EventMap
from persea.alignment.partial_tokens import (
    PartialTokenProjector,
    make_partial_token_projector,
    require_projectable_kind,
    token_prefixes,
)
from persea.alignment.spans import SupervisionKind, align
from persea.alignment.token_order import UNRESTRICTED_CONTEXT
from persea.cache.reader import AnswerSource, AnswerSubset, CacheMixture
from persea.cache.unit import CachedAnswer
from persea.chat.messages import ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.distributions import DistributionKind
from persea.errors import DataError
from persea.losses import (
    BatchTargets,
    EventTargets,
    build_batch_targets,
    build_event_targets,
    concat_event_targets,
)
from persea.tokenization.bpe import expand_groups
from persea.tokenization.tokens import RenderedTokens
from persea.training.loss_balancing import Group


@dataclass(frozen=True)
class Example:
    """One answer in the student's voice, and what the teacher says of it where both begin a token at the same byte.

    said   over events; its positions are the learned tokens of `tokens`, in order
    found  what `Feed.diagnosis` adds up: learned tokens by align.Taught (4), boundaries whose two realised tokens are different
           events, the teacher's mass at boundaries, and what of it events and masks kept
    """

    tokens: RenderedTokens
    teacher: str
    skill: str
    language: str
    targets: EventTargets
    counts: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """What one step learns from. B conversations, S student positions, N learned positions.

    ids_BS, mask_BS  int64, right padded
    row_N, at_N      where the learned token's distribution is: conversation, and the position BEFORE the token
    targets_N        the learned tokens
    teachers         what each teacher says of the N positions
    share            learned positions of each group: a teacher's answers of a skill
    by_B             the group of each conversation
    """

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    row_N: torch.Tensor
    position_N: torch.Tensor
    labels_N: torch.Tensor
    targets: tuple[BatchTargets, ...]
    tokens_by_group: Mapping[Group, int]
    group_B: tuple[Group, ...]


@dataclass(frozen=True)
class DatasetStats:
    """What one pass over the captures found, before the first step.

    lessons, left_out    by teacher: answers to learn from, and answers left out
    too_long, unsayable  answers past the limit, and answers that cannot be said in the student's voice; `why` of the first SHOWN of these
    taught               by teacher and language, what `Lesson.found` adds up to
    modes                lessons by the effort they are learned at
    thoughts_dropped     lessons to answer at once, of teachers that thought first: the student does not see what they thought
    """

    examples: Mapping[str, int]
    skipped: Mapping[str, int]
    too_long: int
    unrenderable: int
    reasons: tuple[str, ...]
    supervision: Mapping[tuple[str, str], npt.NDArray[np.float64]]
    efforts: Mapping[str, int]
    thinking_dropped: int

    def to_json(self) -> dict[str, Any]:
        """taught: by teacher and language, shares of learned tokens, disagreement, the teacher's mass kept."""
        rows = []
        for (teacher, language), found in sorted(self.supervision.items()):
            taught, (differ, mass, kept) = (
                found[: len(SupervisionKind)],
                found[len(SupervisionKind) :].tolist(),
            )
            shares = {
                t.name.lower(): round(float(taught[t] / taught.sum()), 4) for t in SupervisionKind
            }
            rows.append(
                {
                    "teacher": teacher,
                    "language": language,
                    "tokens": int(taught.sum()),
                    **shares,
                    "disagreement": round(differ / max(1.0, taught[SupervisionKind.EVENT]), 4),
                    "mass_kept": round(kept / mass, 4) if mass else None,
                }
            )
        return {
            "lessons": dict(self.examples),
            "left_out": dict(self.skipped),
            "too_long": self.too_long,
            "unsayable": self.unrenderable,
            "why": list(self.reasons),
            "taught": rows,
            "modes": dict(self.efforts),
            "thoughts_dropped": self.thinking_dropped,
        }


MAX_SKIP_REASONS = 100  # of what cannot be said
EXAMPLE_CACHE_TOKENS = (
    1 << 21
)  # tokens and entries of lessons that are kept: some 100 MB, and all of the quickstart's
EXAMPLE_OVERHEAD_TOKENS = 64  # what a lesson counts beside them: its arrays' own bookkeeping, 2 kB


@dataclass(frozen=True, eq=False)
class DistillDataset:
    """Lessons in an order that depends on the seed and the step alone: batch(k) is the same whoever asks, and when.

    A lesson is made when a step wants it, and the last ones are kept: memory does not grow with the captures but by 8 bytes an answer.
    """

    mixture: CacheMixture
    make_example: Callable[[CachedAnswer], Example]
    event_maps: Mapping[str, EventMap]
    batch_size: int
    stats: DatasetStats
    _example_cache: OrderedDict[tuple[int, int], Example] = field(
        default_factory=OrderedDict, repr=False
    )
    _cache_tokens: list[int] = field(default_factory=lambda: [0], repr=False)

    def __len__(self) -> int:
        """Lessons."""
        return sum(map(len, self.mixture.readers))

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """The batch of a step, draws step * size and on of the mixture; or a part of it: parts are slices in order, so that together they
        are the same batch however many there are.
        """
        begin, end = self.batch_size * part // parts, self.batch_size * (part + 1) // parts
        return collate(
            [self.example(step * self.batch_size + k) for k in range(begin, end)], self.event_maps
        )

    def train_test_split(self, validation_share: float) -> tuple[DistillDataset, DistillDataset]:
        """(what is learned, what is held out): a share of the lessons, drawn by the seed, in whole batches and at least one of each.

        Raises DataError where there are not enough lessons for that.
        """
        mixture = self.mixture
        n = max(1, round(len(self) * validation_share / self.batch_size)) * self.batch_size
        if len(self) - n < self.batch_size:
            raise DataError(
                f"{len(self)} lessons are too few to hold out {n} and learn from batches of {self.batch_size}",
                where="training.validation_share",
                remedy="a larger corpus, a smaller training.batch_size, or training.evaluate_every: 0",
            )
        held_L = np.zeros(len(self), np.bool_)
        held_L[np.random.default_rng([mixture.seed, n]).permutation(len(self))[:n]] = True
        edges = np.cumsum([len(reader) for reader in mixture.readers])[:-1]
        sides = []
        for chosen_L in (~held_L, held_L):
            parts = [
                (AnswerSubset(reader, np.flatnonzero(mine)), old)
                for reader, old, mine in zip(
                    mixture.readers, mixture.shares, np.split(chosen_L, edges), strict=True
                )
                if mine.any()
            ]
            readers, shares = zip(*parts, strict=True)
            sides.append(
                replace(
                    self,
                    mixture=CacheMixture(
                        readers,
                        shares if chosen_L is not held_L else tuple(map(len, readers)),
                        mixture.seed,
                    ),
                    _example_cache=OrderedDict(),
                    _cache_tokens=[0],
                )
            )
        return sides[0], sides[1]

    def prompt_ids(self) -> Iterator[str]:
        """Which prompts its lessons answer, by id."""
        return (
            reader[k].answer.prompt_id
            for reader in self.mixture.readers
            for k in range(len(reader))
        )

    def example(self, number: int) -> Example:
        """The lesson of a draw."""
        key = self.mixture.locate_answer(number)
        one = self._example_cache.pop(key, None)
        if one is None:
            one = self.make_example(self.mixture.readers[key[0]][key[1]])
            self._cache_tokens[0] += _cache_cost(one)
        self._example_cache[key] = one
        while self._cache_tokens[0] > EXAMPLE_CACHE_TOKENS and len(self._example_cache) > 1:
            self._cache_tokens[0] -= _cache_cost(self._example_cache.popitem(last=False)[1])
        return one


def _cache_cost(one: Example) -> int:
    return len(one.tokens) + len(one.targets.row_M) + EXAMPLE_OVERHEAD_TOKENS


def build_example(
    capture: CachedAnswer,
    renderer: ChatRenderer,
    event_map: EventMap,
    projector: PartialTokenProjector | None = None,
) -> Example:
    """A capture in the student's voice: at the effort it was asked at by its mode, answering at once where it has none.

    completer  for student tokens that begin inside a teacher token; None = these learn from the text
    """
    return _align_capture(capture, _render_capture(capture, renderer), event_map, projector)


def _render_capture(capture: CachedAnswer, renderer: ChatRenderer) -> RenderedTokens:
    return renderer.render(replace(capture.answer.conversation, effort=_capture_effort(capture)))


def _capture_effort(capture: CachedAnswer) -> ThinkingEffort:
    return capture.answer.effort or ThinkingEffort.NONE


def _align_capture(
    capture: CachedAnswer,
    tokens: RenderedTokens,
    event_map: EventMap,
    projector: PartialTokenProjector | None,
) -> Example:
    found = align(tokens, capture.tokens)
    both, rows, answer = found.boundaries, capture.distributions, capture.answer
    place_S, row_T = np.cumsum(tokens.loss_mask_T) - 1, np.cumsum(capture.tokens.loss_mask_T) - 1
    row_C, place_C = row_T[both.teacher_C], place_S[both.student_C]
    at_M, which_M = expand_groups(rows.offsets_N1, row_C)
    contexts = np.full((2, int(tokens.loss_mask_T.sum())), UNRESTRICTED_CONTEXT)
    if event_map.teacher_mask is not None and event_map.student_mask is not None:
        contexts[0, place_C] = event_map.teacher_mask.other.supervised_context_ids(
            tokens, both.student_C
        )
        contexts[1, place_C] = event_map.student_mask.other.supervised_context_ids(
            capture.tokens, both.teacher_C
        )
    said = build_event_targets(
        event_map,
        place_C[which_M],
        rows.ids_M[at_M],
        rows.probs_M[at_M],
        student_context_N=contexts[0],
        teacher_context_N=contexts[1],
        kind=rows.kind,
    )
    differ = (
        event_map.student_event_V[tokens.ids_T[both.student_C]]
        != event_map.teacher_event_W[capture.tokens.ids_T[both.teacher_C]]
    )
    taught = np.bincount(
        found.supervision_S[found.supervision_S >= 0], minlength=len(SupervisionKind)
    )
    if rows.kind is DistributionKind.TEXT_ONLY:  # boundaries meet, and nothing is known there
        taught = np.bincount([SupervisionKind.TEXT], [taught.sum()], minlength=len(SupervisionKind))
    counts = np.array(
        [*taught, differ.sum(), rows.probs_M[at_M].sum(), said.probs_M.sum()], np.float64
    )
    if projector is not None:
        require_projectable_kind(rows.kind)
        at_I, in_I, said_I = (
            side[found.partial_tokens.at_common_boundary_I]
            for side in (
                found.partial_tokens.student_I,
                found.partial_tokens.teacher_I,
                found.partial_tokens.prefix_len_I,
            )
        )
        bytes_I = token_prefixes(
            projector.teacher_order.vocabulary, capture.tokens.ids_T[in_I], said_I
        )
        more = projector.project(
            rows, row_T[in_I], bytes_I, projector.student_order.supervised_context_ids(tokens, at_I)
        )
        none = np.empty(0, np.int64)
        said = concat_event_targets(
            [
                said,
                EventTargets(
                    place_S[at_I][more.student_index_M],
                    more.event_M,
                    more.probs_M,
                    more.entry_D,
                    more.token_D,
                    none,
                    none.astype(np.float32),
                    none,
                    none,
                    rows.kind,
                ),
            ],
            [0, 0],
        )
    return Example(tokens, answer.teacher, answer.skill, answer.language, said, counts)


def build_dataset(
    caches: Sequence[tuple[AnswerSource, float]],
    renderer: ChatRenderer,
    event_maps: Mapping[str, EventMap],
    *,
    batch_size: int,
    seed: int,
    max_tokens: int,
    partial_tokens: bool = False,
) -> DistillDataset:
    """Batches from captures, mixed by share. One pass over them first: answers longer than max_tokens, or that the student's tokenizer or
    template cannot say (a literal U+2581 in a SentencePiece student), are left out and counted; nothing is cut.

    caches  captures and their share: however many of them are left out, so large a part of the lessons is from there, and each cache
            is read epoch after epoch. One of which nothing is left is no part of the mixture; Survey says so
    Raises DataError where none is left, and for a broken row.
    """
    completers = {
        name: make_partial_token_projector(bridge) if partial_tokens else None
        for name, bridge in event_maps.items()
    }

    def make(capture: CachedAnswer) -> Example:
        return build_example(
            capture,
            renderer,
            event_maps[capture.answer.teacher],
            completers[capture.answer.teacher],
        )

    lessons, left_out, why = Counter[str](), Counter[str](), list[str]()
    taught: dict[tuple[str, str], npt.NDArray[np.float64]] = {}
    modes = Counter[str]()
    too_long = unsayable = dropped = 0
    parts: list[tuple[AnswerSubset, float]] = []
    for captures, share in caches:
        kept = array("q")
        for number in range(len(captures)):
            capture = captures[number]
            answer = capture.answer
            try:
                tokens = _render_capture(capture, renderer)
            except DataError as error:
                unsayable += 1
                left_out[answer.teacher] += 1
                why += [f"{answer.prompt_id}: {error}"] if len(why) < MAX_SKIP_REASONS else []
                continue
            one = _align_capture(
                capture, tokens, event_maps[answer.teacher], completers[answer.teacher]
            )  # a broken row is refused
            if len(tokens) > max_tokens:
                too_long += 1
                left_out[answer.teacher] += 1
                continue
            kept.append(number)
            lessons[answer.teacher] += 1
            modes[_capture_effort(capture).value] += 1
            dropped += bool(
                _capture_effort(capture) is ThinkingEffort.NONE
                and answer.conversation.messages[-1].thinking
            )
            key = answer.teacher, answer.language
            taught[key] = taught.get(key, np.zeros(len(SupervisionKind) + 3)) + one.counts
        if len(kept):
            parts.append((AnswerSubset(captures, np.array(kept, np.int64)), share))
    if not parts:
        raise DataError(
            f"no answer is left: {too_long} have more than {max_tokens} tokens, {unsayable} cannot be said by the student"
            + "".join(f" ({reason})" for reason in why[:1]),
            where="train",
            remedy="raise training.max_length, or choose another student",
        )
    readers, shares = zip(*parts, strict=True)
    survey = DatasetStats(
        lessons, left_out, too_long, unsayable, tuple(why), taught, modes, dropped
    )
    return DistillDataset(CacheMixture(readers, shares, seed), make, event_maps, batch_size, survey)


def collate(examples: Sequence[Example], event_maps: Mapping[str, EventMap]) -> Batch:
    """Lessons as one batch, in order."""
    width = max(len(one.tokens) for one in examples)
    ids = torch.zeros((len(examples), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    by_B = tuple(Group(one.teacher, one.skill) for one in examples)
    rows, ats, share = [], [], Counter[Group]()
    said: dict[str, list[tuple[EventTargets, int]]] = {}
    n = 0
    for b, one in enumerate(examples):
        ids[b, : len(one.tokens)] = torch.from_numpy(one.tokens.ids_T)
        mask[b, : len(one.tokens)] = 1
        learned = np.flatnonzero(one.tokens.loss_mask_T)
        rows.append(np.full(len(learned), b))
        ats.append(learned - 1)
        share[by_B[b]] += len(learned)
        said.setdefault(one.teacher, []).append((one.targets, n))
        n += len(learned)
    row_N, at_N = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(ats))
    teachers = tuple(
        build_batch_targets(event_maps[name], concat_event_targets(*zip(*parts, strict=True)), n)
        for name, parts in said.items()
    )
    return Batch(ids, mask, row_N, at_N, ids[row_N, at_N + 1], teachers, dict(share), by_B)
