"""Where batches come from: offline() turns captures into lessons in the student's voice, and lessons into batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from persea.align import Taught, align
from persea.bridge import Bridge
from persea.cache import Capture
from persea.chat import Effort, Tokens
from persea.completion import Completer, open_completer, refuse_incomplete, said_before
from persea.errors import DataError
from persea.losses import Entries, Targets, standing, targets, together
from persea.masks import FREE
from persea.merges import expand
from persea.voice import Voice


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
    share            teacher -> learned positions of its answers
    by_B             the teacher of each conversation
    """

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    row_N: torch.Tensor
    at_N: torch.Tensor
    targets_N: torch.Tensor
    teachers: tuple[Targets, ...]
    share: Mapping[str, int]
    by_B: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feed:
    """Lessons in an order that depends on the seed and the step alone: batch(k) is the same whoever asks, and when.

    too_long, unsayable  what was left out: answers past the limit, and why answers cannot be said in the student's voice
    """

    lessons: tuple[Lesson, ...]
    bridges: Mapping[str, Bridge]
    size: int
    seed: int
    too_long: int
    unsayable: tuple[str, ...] = ()

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """The batch of a step, or a part of it: parts are slices in order, so that together they are the same batch however many there are.

        Each epoch is a new permutation of all lessons.
        """
        begin, end = self.size * part // parts, self.size * (part + 1) // parts
        return _collate([self._lesson(step * self.size + k) for k in range(begin, end)], self.bridges)

    def set_aside(self, share: float) -> tuple[Feed, Feed]:
        """(what is learned, what is held out): a share of the lessons, drawn by the seed, in whole batches and at least one of each.

        Raises DataError where there are not enough lessons for that.
        """
        n = max(1, round(len(self.lessons) * share / self.size)) * self.size
        if len(self.lessons) - n < self.size:
            raise DataError(f"{len(self.lessons)} lessons are too few to hold out {n} and learn {self.size} at once", where="training.held_out",
                            remedy="a larger corpus, a smaller training.batch, or training.evaluate_every: 0")
        order = np.random.default_rng([self.seed, n]).permutation(len(self.lessons))
        held, kept = (tuple(self.lessons[k] for k in sorted(some.tolist())) for some in (order[:n], order[n:]))
        return replace(self, lessons=kept), replace(self, lessons=held)

    def diagnosis(self) -> list[dict[str, Any]]:
        """By teacher and language, what the lessons are taught by: shares of learned tokens, disagreement, the teacher's mass kept."""
        sums: dict[tuple[str, str], npt.NDArray[np.float64]] = {}
        for one in self.lessons:
            sums[one.teacher, one.language] = sums.get((one.teacher, one.language), np.zeros(len(Taught) + 3)) + one.found
        rows = []
        for (teacher, language), found in sorted(sums.items()):
            taught, (differ, mass, kept) = found[:len(Taught)], found[len(Taught):].tolist()
            shares = {t.name.lower(): round(float(taught[t] / taught.sum()), 4) for t in Taught}
            rows.append({"teacher": teacher, "language": language, "tokens": int(taught.sum()), **shares,
                         "disagreement": round(differ / max(1.0, taught[Taught.EVENT]), 4), "mass_kept": round(kept / mass, 4) if mass else None})
        return rows

    def _lesson(self, number: int) -> Lesson:
        epoch, place = divmod(number, len(self.lessons))
        return self.lessons[int(_permutation(self.seed, epoch, len(self.lessons))[place])]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(n)


def lesson(capture: Capture, voice: Voice, bridge: Bridge, completer: Completer | None = None) -> Lesson:
    """A capture in the student's voice, answering at once (the student's own thinking switch comes with its template).

    completer  for student tokens that begin inside a teacher token; None = these learn from the text
    """
    return _laid(capture, _said(capture, voice), bridge, completer)


def _said(capture: Capture, voice: Voice) -> Tokens:
    return voice.render(replace(capture.answer.conversation, effort=Effort.NONE))


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


def offline(captures: Iterable[Capture], voice: Voice, bridges: Mapping[str, Bridge], *, size: int, seed: int, max_tokens: int,
            completion: bool = False) -> Feed:
    """Batches from captures. Answers longer than max_tokens, or that the student's tokenizer or template cannot say (a
    literal U+2581 in a SentencePiece student), are left out and counted; nothing is cut. Raises DataError where none is left.
    """
    completers = {name: open_completer(bridge) if completion else None for name, bridge in bridges.items()}
    kept: list[Lesson] = []
    unsayable: list[str] = []
    too_long = 0
    for capture in captures:
        try:
            tokens = _said(capture, voice)
        except DataError as error:
            unsayable.append(f"{capture.answer.prompt_id}: {error}")
            continue
        one = _laid(capture, tokens, bridges[capture.answer.teacher], completers[capture.answer.teacher])  # a broken row is refused
        if len(one.tokens) <= max_tokens:
            kept.append(one)
        else:
            too_long += 1
    if not kept:
        raise DataError(f"no answer is left: {too_long} have more than {max_tokens} tokens, {len(unsayable)} cannot be said by the student"
                        + "".join(f" ({reason})" for reason in unsayable[:1]), where="train",
                        remedy="raise training.max_tokens, or choose another student")
    return Feed(tuple(kept), bridges, size, seed, too_long, tuple(unsayable))


def _collate(lessons: Sequence[Lesson], bridges: Mapping[str, Bridge]) -> Batch:
    width = max(len(one.tokens) for one in lessons)
    ids = torch.zeros((len(lessons), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    rows, ats, share = [], [], Counter[str]()
    said: dict[str, list[tuple[Entries, int]]] = {}
    n = 0
    for b, one in enumerate(lessons):
        ids[b, :len(one.tokens)] = torch.from_numpy(one.tokens.ids_T)
        mask[b, :len(one.tokens)] = 1
        learned = np.flatnonzero(one.tokens.learn_T)
        rows.append(np.full(len(learned), b))
        ats.append(learned - 1)
        share[one.teacher] += len(learned)
        said.setdefault(one.teacher, []).append((one.said, n))
        n += len(learned)
    row_N, at_N = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(ats))
    teachers = tuple(targets(bridges[name], together(*zip(*parts, strict=True)), n) for name, parts in said.items())
    return Batch(ids, mask, row_N, at_N, ids[row_N, at_N + 1], teachers, dict(share), tuple(one.teacher for one in lessons))
