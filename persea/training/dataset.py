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

from persea.alignment.boundary_mask import FREE
from persea.alignment.event_map import Bridge
from persea.alignment.partial_tokens import Completer, open_completer, refuse_incomplete, said_before
from persea.alignment.spans import Taught, align
from persea.cache.reader import Chosen, Mixture, Ordered
from persea.cache.unit import Capture
from persea.chat.messages import Effort, Tokens
from persea.chat.renderer import Voice
from persea.distributions import RowKind
from persea.errors import DataError
from persea.losses import Entries, Targets, standing, targets, together
from persea.tokenization.bpe import expand
from persea.training.loss_balancing import Group


@dataclass(frozen=True)
class Lesson:
    """One answer in the student's voice, and what the teacher says of it where both begin a token at the same byte.

    said   over events; its positions are the learned tokens of `tokens`, in order
    found  what `Feed.diagnosis` adds up: learned tokens by align.Taught (4), boundaries whose two realised tokens are different
           events, the teacher's mass at boundaries, and what of it events and masks kept
    """

    tokens: Tokens
    teacher: str
    skill: str
    language: str
    said: Entries
    found: npt.NDArray[np.float64]


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
    at_N: torch.Tensor
    targets_N: torch.Tensor
    teachers: tuple[Targets, ...]
    share: Mapping[Group, int]
    by_B: tuple[Group, ...]


@dataclass(frozen=True)
class Survey:
    """What one pass over the captures found, before the first step.

    lessons, left_out    by teacher: answers to learn from, and answers left out
    too_long, unsayable  answers past the limit, and answers that cannot be said in the student's voice; `why` of the first SHOWN of these
    taught               by teacher and language, what `Lesson.found` adds up to
    modes                lessons by the effort they are learned at
    thoughts_dropped     lessons to answer at once, of teachers that thought first: the student does not see what they thought
    """

    lessons: Mapping[str, int]
    left_out: Mapping[str, int]
    too_long: int
    unsayable: int
    why: tuple[str, ...]
    taught: Mapping[tuple[str, str], npt.NDArray[np.float64]]
    modes: Mapping[str, int]
    thoughts_dropped: int

    def to_json(self) -> dict[str, Any]:
        """taught: by teacher and language, shares of learned tokens, disagreement, the teacher's mass kept."""
        rows = []
        for (teacher, language), found in sorted(self.taught.items()):
            taught, (differ, mass, kept) = found[:len(Taught)], found[len(Taught):].tolist()
            shares = {t.name.lower(): round(float(taught[t] / taught.sum()), 4) for t in Taught}
            rows.append({"teacher": teacher, "language": language, "tokens": int(taught.sum()), **shares,
                         "disagreement": round(differ / max(1.0, taught[Taught.EVENT]), 4), "mass_kept": round(kept / mass, 4) if mass else None})
        return {"lessons": dict(self.lessons), "left_out": dict(self.left_out), "too_long": self.too_long, "unsayable": self.unsayable,
                "why": list(self.why), "taught": rows, "modes": dict(self.modes), "thoughts_dropped": self.thoughts_dropped}


SHOWN = 100          # of what cannot be said
RECENT = 1 << 21     # tokens and entries of lessons that are kept: some 100 MB, and all of the quickstart's
EACH = 64            # what a lesson counts beside them: its arrays' own bookkeeping, 2 kB


@dataclass(frozen=True, eq=False)
class Feed:
    """Lessons in an order that depends on the seed and the step alone: batch(k) is the same whoever asks, and when.

    A lesson is made when a step wants it, and the last ones are kept: memory does not grow with the captures but by 8 bytes an answer.
    """

    mixture: Mixture
    make: Callable[[Capture], Lesson]
    bridges: Mapping[str, Bridge]
    size: int
    survey: Survey
    _recent: OrderedDict[tuple[int, int], Lesson] = field(default_factory=OrderedDict, repr=False)
    _weight: list[int] = field(default_factory=lambda: [0], repr=False)

    def __len__(self) -> int:
        """Lessons."""
        return sum(map(len, self.mixture.readers))

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """The batch of a step, draws step * size and on of the mixture; or a part of it: parts are slices in order, so that together they
        are the same batch however many there are."""
        begin, end = self.size * part // parts, self.size * (part + 1) // parts
        return collate([self.lesson(step * self.size + k) for k in range(begin, end)], self.bridges)

    def set_aside(self, share: float) -> tuple[Feed, Feed]:
        """(what is learned, what is held out): a share of the lessons, drawn by the seed, in whole batches and at least one of each.

        Raises DataError where there are not enough lessons for that.
        """
        mixture = self.mixture
        n = max(1, round(len(self) * share / self.size)) * self.size
        if len(self) - n < self.size:
            raise DataError(f"{len(self)} lessons are too few to hold out {n} and learn from batches of {self.size}", where="training.held_out",
                            remedy="a larger corpus, a smaller training.batch, or training.evaluate_every: 0")
        held_L = np.zeros(len(self), np.bool_)
        held_L[np.random.default_rng([mixture.seed, n]).permutation(len(self))[:n]] = True
        edges = np.cumsum([len(reader) for reader in mixture.readers])[:-1]
        sides = []
        for chosen_L in (~held_L, held_L):
            parts = [(Chosen(reader, np.flatnonzero(mine)), old) for reader, old, mine in
                     zip(mixture.readers, mixture.shares, np.split(chosen_L, edges), strict=True) if mine.any()]
            readers, shares = zip(*parts, strict=True)
            sides.append(replace(self, mixture=Mixture(readers, shares if chosen_L is not held_L else tuple(map(len, readers)), mixture.seed),
                                 _recent=OrderedDict(), _weight=[0]))
        return sides[0], sides[1]

    def prompts(self) -> Iterator[str]:
        """Which prompts its lessons answer, by id."""
        return (reader[k].answer.prompt_id for reader in self.mixture.readers for k in range(len(reader)))

    def lesson(self, number: int) -> Lesson:
        """The lesson of a draw."""
        key = self.mixture.answer(number)
        one = self._recent.pop(key, None)
        if one is None:
            one = self.make(self.mixture.readers[key[0]][key[1]])
            self._weight[0] += _weighs(one)
        self._recent[key] = one
        while self._weight[0] > RECENT and len(self._recent) > 1:
            self._weight[0] -= _weighs(self._recent.popitem(last=False)[1])
        return one


def _weighs(one: Lesson) -> int:
    return len(one.tokens) + len(one.said.row_M) + EACH


def lesson(capture: Capture, voice: Voice, bridge: Bridge, completer: Completer | None = None) -> Lesson:
    """A capture in the student's voice: at the effort it was asked at by its mode, answering at once where it has none.

    completer  for student tokens that begin inside a teacher token; None = these learn from the text
    """
    return _laid(capture, _said(capture, voice), bridge, completer)


def _said(capture: Capture, voice: Voice) -> Tokens:
    return voice.render(replace(capture.answer.conversation, effort=_mode(capture)))


def _mode(capture: Capture) -> Effort:
    return capture.answer.mode or Effort.NONE


def _laid(capture: Capture, tokens: Tokens, bridge: Bridge, completer: Completer | None) -> Lesson:
    found = align([tokens], [capture.tokens])
    both, rows, answer = found.boundaries, capture.rows, capture.answer
    place_S, row_T = np.cumsum(tokens.learn_T) - 1, np.cumsum(capture.tokens.learn_T) - 1
    row_C, place_C = row_T[both.teacher_C], place_S[both.student_C]
    at_M, which_M = expand(rows.offsets_N1, row_C)
    contexts = np.full((2, int(tokens.learn_T.sum())), FREE)
    if bridge.teacher_mask is not None and bridge.student_mask is not None:
        contexts[0, place_C] = bridge.teacher_mask.keeper.inner(tokens, both.student_C)
        contexts[1, place_C] = bridge.student_mask.keeper.inner(capture.tokens, both.teacher_C)
    said = standing(bridge, place_C[which_M], rows.ids_M[at_M], rows.probs_M[at_M],
                    student_N=contexts[0], teacher_N=contexts[1], kind=rows.kind)
    differ = bridge.student_event_V[tokens.ids_T[both.student_C]] != bridge.teacher_event_W[capture.tokens.ids_T[both.teacher_C]]
    taught = np.bincount(found.taught_S[found.taught_S >= 0], minlength=len(Taught))
    if rows.kind is RowKind.WORDS:  # boundaries meet, and nothing is known there
        taught = np.bincount([Taught.TEXT], [taught.sum()], minlength=len(Taught))
    counts = np.array([*taught, differ.sum(), rows.probs_M[at_M].sum(), said.probs_M.sum()], np.float64)
    if completer is not None:
        refuse_incomplete(rows.kind)
        at_I, in_I, said_I = (side[found.inside.common_I] for side in (found.inside.student_I, found.inside.teacher_I, found.inside.said_I))
        bytes_I = said_before(completer.teacher.vocabulary, capture.tokens.ids_T[in_I], said_I)
        more = completer.complete(rows, row_T[in_I], bytes_I, completer.student.inner(tokens, at_I))
        none = np.empty(0, np.int64)
        said = together([said, Entries(place_S[at_I][more.at_M], more.event_M, more.probs_M, more.entry_D, more.token_D, none,
                                       none.astype(np.float32), none, none, rows.kind)], [0, 0])
    return Lesson(tokens, answer.teacher, answer.skill, answer.language, said, counts)


def offline(caches: Sequence[tuple[Ordered, float]], voice: Voice, bridges: Mapping[str, Bridge], *, size: int, seed: int, max_tokens: int,
            completion: bool = False) -> Feed:
    """Batches from captures, mixed by share. One pass over them first: answers longer than max_tokens, or that the student's tokenizer or
    template cannot say (a literal U+2581 in a SentencePiece student), are left out and counted; nothing is cut.

    caches  captures and their share: however many of them are left out, so large a part of the lessons is from there, and each cache
            is read epoch after epoch. One of which nothing is left is no part of the mixture; Survey says so
    Raises DataError where none is left, and for a broken row.
    """
    completers = {name: open_completer(bridge) if completion else None for name, bridge in bridges.items()}

    def make(capture: Capture) -> Lesson:
        return lesson(capture, voice, bridges[capture.answer.teacher], completers[capture.answer.teacher])

    lessons, left_out, why = Counter[str](), Counter[str](), list[str]()
    taught: dict[tuple[str, str], npt.NDArray[np.float64]] = {}
    modes = Counter[str]()
    too_long = unsayable = dropped = 0
    parts: list[tuple[Chosen, float]] = []
    for captures, share in caches:
        kept = array("q")
        for number in range(len(captures)):
            capture = captures[number]
            answer = capture.answer
            try:
                tokens = _said(capture, voice)
            except DataError as error:
                unsayable += 1
                left_out[answer.teacher] += 1
                why += [f"{answer.prompt_id}: {error}"] if len(why) < SHOWN else []
                continue
            one = _laid(capture, tokens, bridges[answer.teacher], completers[answer.teacher])  # a broken row is refused
            if len(tokens) > max_tokens:
                too_long += 1
                left_out[answer.teacher] += 1
                continue
            kept.append(number)
            lessons[answer.teacher] += 1
            modes[_mode(capture).value] += 1
            dropped += bool(_mode(capture) is Effort.NONE and answer.conversation.messages[-1].thinking)
            key = answer.teacher, answer.language
            taught[key] = taught.get(key, np.zeros(len(Taught) + 3)) + one.found
        if len(kept):
            parts.append((Chosen(captures, np.array(kept, np.int64)), share))
    if not parts:
        raise DataError(f"no answer is left: {too_long} have more than {max_tokens} tokens, {unsayable} cannot be said by the student"
                        + "".join(f" ({reason})" for reason in why[:1]), where="train",
                        remedy="raise training.max_tokens, or choose another student")
    readers, shares = zip(*parts, strict=True)
    survey = Survey(lessons, left_out, too_long, unsayable, tuple(why), taught, modes, dropped)
    return Feed(Mixture(readers, shares, seed), make, bridges, size, survey)


def collate(lessons: Sequence[Lesson], bridges: Mapping[str, Bridge]) -> Batch:
    """Lessons as one batch, in order."""
    width = max(len(one.tokens) for one in lessons)
    ids = torch.zeros((len(lessons), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    by_B = tuple(Group(one.teacher, one.skill) for one in lessons)
    rows, ats, share = [], [], Counter[Group]()
    said: dict[str, list[tuple[Entries, int]]] = {}
    n = 0
    for b, one in enumerate(lessons):
        ids[b, :len(one.tokens)] = torch.from_numpy(one.tokens.ids_T)
        mask[b, :len(one.tokens)] = 1
        learned = np.flatnonzero(one.tokens.learn_T)
        rows.append(np.full(len(learned), b))
        ats.append(learned - 1)
        share[by_B[b]] += len(learned)
        said.setdefault(one.teacher, []).append((one.said, n))
        n += len(learned)
    row_N, at_N = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(ats))
    teachers = tuple(targets(bridges[name], together(*zip(*parts, strict=True)), n) for name, parts in said.items())
    return Batch(ids, mask, row_N, at_N, ids[row_N, at_N + 1], teachers, dict(share), by_B)
