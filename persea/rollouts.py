"""Rollouts: what the student says itself, and what its teachers think of it (on-policy distillation).

Some prompts are answered by the student, drawn from its own distribution, many at once. Each answer is then said in its teacher's own
template, and where both begin a token at the same byte the teacher's whole distribution stands beside the student's: reverse KL over
common events, position by position (Agarwal et al. 2024, over events). The positions are the student's own tokens, as it said them and not
as its tokenizer would have: that is what on-policy means. Where no boundary is common, nothing is learned here: a sample's own
cross-entropy has no gradient in the mean.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea.align import align
from persea.bridge import Bridge
from persea.chat import Conversation, Effort, Finish, Tokens
from persea.corpus import Prompt
from persea.errors import DataError, Refused
from persea.masks import Mask
from persea.sections import OnPolicy
from persea.teacher import Teacher
from persea.voice import Voice

if TYPE_CHECKING:
    import torch

    from persea.losses import Dead, LossOut
    from persea.student import Student

LOOP = 4        # times in a row that a stretch may not be said
STRETCH = 64    # longest stretch of tokens looked at
SHORTEST = 12   # tokens that a loop fills at least: "ha ha ha ha" is none


@dataclass(frozen=True)
class Task:
    """A prompt, and who teaches it."""

    prompt: Prompt
    teacher: str

    @property
    def asked(self) -> Conversation:
        """As the student is asked: in the prompt's mode, to answer at once where it has none."""
        return replace(self.prompt.conversation, effort=self.prompt.effort or Effort.NONE)


@dataclass(frozen=True)
class Said:
    """An answer of the student, fit to learn from: its own tokens, and what they say."""

    task: Task
    tokens: Tokens
    conversation: Conversation
    finish: Finish


@dataclass(frozen=True)
class Round:
    """What was drawn at once: `number` counts rounds, `step` is the training step whose weights said it, ids the answers."""

    number: int
    step: int
    ids: tuple[npt.NDArray[np.int32], ...]


def repeats(ids: Sequence[int]) -> bool:
    """Whether an answer ends in a loop: a stretch of at most STRETCH tokens said LOOP times in a row, SHORTEST tokens or more in all.

    A stop token at its end is left aside. Teachers find the fifth round of a loop likely too: they are no cure for it.
    """
    for tail in (ids, ids[:-1]):
        for period in range(1, min(STRETCH, len(tail) // LOOP) + 1):
            n = max(period * LOOP, SHORTEST)
            if n <= len(tail) and all(tail[-k] == tail[-k - period] for k in range(1, n - period + 1)):
                return True
    return False


def own_words(voice: Voice, conversation: Conversation, prompt: Tokens, ids: npt.NDArray[np.int32]) -> Tokens | None:
    """The conversation as the student said it: the prompt's tokens, then its own, placed over the content's bytes. None where that cannot
    be told: a spelling of its own within markers, or bytes the template does not write.

    A tokenizer spells a text in one way, a model that samples in many; the rendering says where the bytes are, the ids which tokens.
    """
    whole, first, stops = voice.render(conversation), len(prompt), len(ids) > 0 and int(ids[-1]) in voice.stop_ids
    if not np.array_equal(whole.ids_T[:first], prompt.ids_T):
        return None
    last = len(ids) - stops
    end = first + int(np.argmax(np.isin(whole.ids_T[first:], voice.stop_ids)))  # the rendering's own stop token
    lengths_W = voice.vocabulary.lengths_W
    if np.array_equal(whole.ids_T[first:end], ids[:last]):
        starts_T, ends_T = whole.starts_T[first:end], whole.ends_T[first:end]
    else:
        body = slice(first, end)
        plain = (whole.starts_T[body] >= 0).all() and (whole.ends_T[body] - whole.starts_T[body] == lengths_W[whole.ids_T[body]]).all()
        said, meant = (b"".join(voice.vocabulary.bytes_W[i] or b"\0\0control" for i in some.tolist()) for some in (ids[:last], whole.ids_T[body]))
        if not plain or said != meant or (whole.starts_T[body][1:] != whole.ends_T[body][:-1]).any() or last == 0:
            return None
        ends_T = (whole.starts_T[first] + np.cumsum(lengths_W[ids[:last]])).astype(np.int32)
        starts_T = (ends_T - lengths_W[ids[:last]]).astype(np.int32)
    stop = np.full(int(stops), whole.starts_T[end], np.int32)
    learn_T = np.arange(first + len(ids)) >= first
    return Tokens(np.concatenate([prompt.ids_T, ids]).astype(np.int32), np.concatenate([whole.starts_T[:first], starts_T, stop]),
                  np.concatenate([whole.ends_T[:first], ends_T, stop]), learn_T)


def heard(task: Task, voice: Voice, ids: npt.NDArray[np.int32], terms: OnPolicy, max_tokens: int) -> Said | str:
    """The answer, or in a word why it is not learned from.

    malformed  in its own template's terms      length    it did not end, and `truncated` is drop, or ended within a character
    loop       it ends in a loop (`repeats`)    spelling  its tokens cannot be placed over its bytes
    unsayable  its template cannot write it     long      more than max_tokens tokens
    """
    asked = task.asked
    parts, finish = voice.parse(ids.tolist(), asked.effort, asked.tools)
    if finish is Finish.MALFORMED or not len(ids):
        return "malformed"
    if finish is Finish.LENGTH and (terms.truncated == "drop" or not parts):
        return "length"
    if repeats(ids.tolist()):
        return "loop"
    conversation = asked.answered(*parts)
    try:
        tokens = own_words(voice, conversation, voice.prompt(asked), ids)
    except DataError:
        return "unsayable"
    if tokens is None:
        return "spelling"
    return "long" if len(tokens) > max_tokens else Said(task, tokens, conversation, finish)


@dataclass(frozen=True)
class Beside:
    """One teacher's whole distributions beside positions of a batch. C positions.

    place_C       position among the batch's learned ones
    logprobs_CW   natural; student_dead, teacher_dead: what cannot stand there
    """

    place_C: torch.Tensor
    logprobs_CW: torch.Tensor
    student_dead: Dead
    teacher_dead: Dead


@dataclass(eq=False)
class Rollouts:
    """A source of steps: the student's own answers. What a step draws depends on seed, step and the student's weights alone.

    A round is drawn when its first step comes, `terms.rollouts` answers, and used up `size` a step. `state` is what a checkpoint must hold.
    """

    student: Student
    tasks: tuple[Task, ...]
    teachers: Mapping[str, Teacher]
    bridges: Mapping[str, Bridge]
    terms: OnPolicy
    size: int
    seed: int
    max_tokens: int
    _round: Round | None = None
    _dead: dict[tuple[int, int], npt.NDArray[np.int64]] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Whether the step learns from rollouts: from `after` on, `share` of the steps, evenly."""
        since = step - self.terms.after
        return since >= 0 and math.floor((since + 1) * self.terms.share) > math.floor(since * self.terms.share)

    def loss(self, step: int, part: int = 0, parts: int = 1) -> tuple[LossOut, dict[str, int]]:
        """Reverse KL of a step, or a part of it, and each teacher's positions. Refused where nothing the student said can be learned from."""
        import torch

        from persea.losses import Divergence, LossOut, Sides, divergence_head

        said, left_out, lengths = self._said(step, part, parts)
        beside = self._beside(said, left_out)
        if not beside:
            raise Refused(f"of {self.size} answers of the student none can be learned from ({dict(left_out)})", where=f"train, step {step}",
                          remedy="raise training.on_policy.after, so that it can answer before it is heard, or max_new_tokens")
        width = max(len(one.tokens) for one in said)
        ids_BS, mask_BS = torch.zeros((2, len(said), width), dtype=torch.int64)
        for b, one in enumerate(said):
            ids_BS[b, :len(one.tokens)], mask_BS[b, :len(one.tokens)] = torch.from_numpy(one.tokens.ids_T), 1
        learned = [np.flatnonzero(one.tokens.learn_T) - 1 for one in said]
        row_N, at_N = (torch.from_numpy(np.concatenate(side)) for side in ([np.full(len(at), b) for b, at in enumerate(learned)], learned))
        share = {name: len(one.place_C) for name, one in beside.items()}
        all_C, total = torch.cat([one.place_C for one in beside.values()]), sum(share.values())
        hidden_CD, head = self.student.hidden(ids_BS, mask_BS, row_N[all_C], at_N[all_C])
        loss = torch.zeros((), device=hidden_CD.device)
        for (name, one), mine_CD in zip(beside.items(), hidden_CD.split(list(share.values())), strict=True):
            out = divergence_head(mine_CD, head, one.logprobs_CW, Sides(self.bridges[name], one.student_dead, one.teacher_dead),
                                  Divergence.REVERSE)
            loss = loss + out.loss * (share[name] / total)
        heard_from = len(said) + sum(left_out.values())
        terms = {"reverse": float(loss.detach()), "rollout_tokens": float(np.mean(lengths)), "rollouts_left_out": sum(left_out.values()) / heard_from,
                 **{f"left_out_{why}": n / heard_from for why, n in sorted(left_out.items())}}
        return LossOut(loss, terms, total), share

    def state(self) -> bytes:
        """Answers in flight, with the step that drew them; empty where there are none."""
        r = self._round
        return b"" if r is None else json.dumps({"number": r.number, "step": r.step, "ids": [i.tolist() for i in r.ids]}).encode()

    def restore(self, states: tuple[bytes, ...]) -> None:
        """Every process draws the same answers, so the first one's state is everybody's."""
        found = json.loads(states[0]) if states and states[0] else None
        self._round = found and Round(found["number"], found["step"], tuple(np.array(i, np.int32) for i in found["ids"]))

    def _said(self, step: int, part: int, parts: int) -> tuple[list[Said], Counter[str], list[int]]:
        """What a step learns from, why the others are left out, and how many tokens each answer has."""
        number, place = divmod(math.floor((step - self.terms.after) * self.terms.share), self.terms.rollouts // self.size)
        if place == 0 and (self._round is None or self._round.step != step):
            self._round = Round(number, step, tuple(self._draw(number, step)))
        flying = self._round
        if flying is None or flying.number != number:
            raise DataError(f"answers of round {number} are not in flight at step {step}", where="train",
                            remedy="resume from a checkpoint of this run: it holds them")
        if step - flying.step > self.terms.refresh:
            raise Refused(f"answers drawn at step {flying.step} are stale at step {step}: at most {self.terms.refresh} steps old", where="train",
                          remedy="raise training.on_policy.refresh, or lower rollouts")
        begin = place * self.size
        mine = range(begin + self.size * part // parts, begin + self.size * (part + 1) // parts)
        found = [heard(self._task(number, k), self.student.voice, flying.ids[k], self.terms, self.max_tokens) for k in mine]
        return ([one for one in found if isinstance(one, Said)], Counter(one for one in found if isinstance(one, str)),
                [len(flying.ids[k]) for k in mine])

    def _task(self, number: int, k: int) -> Task:
        epoch, at = divmod(number * self.terms.rollouts + k, len(self.tasks))
        return self.tasks[int(np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.tasks))[at])]

    def _draw(self, number: int, step: int) -> list[npt.NDArray[np.int32]]:
        from persea.engines.local import LocalEngine

        voice, model = self.student.voice, self.student.model
        asked = [voice.prompt(self._task(number, k).asked).ids_T for k in range(self.terms.rollouts)]
        training = model.training
        model.eval()
        seed = int(np.random.default_rng([self.seed, step, 2]).integers(1 << 62))
        said = LocalEngine(model, len(voice.vocabulary), self.terms.rollouts).rollouts(
            asked, voice.stop_ids, self.terms.max_new_tokens, temperature=self.terms.temperature, seed=seed)
        model.train(training)
        return said

    def _beside(self, said: list[Said], left_out: Counter[str]) -> dict[str, Beside]:
        """Each teacher's rows beside what it can teach of. What a teacher cannot say, or has no common boundary with, is taken out of `said`."""
        spoken: dict[str, list[tuple[Said, Tokens]]] = {}
        for one in list(said):
            teacher = self.teachers[one.task.teacher]
            try:
                theirs = teacher.voice.render(replace(one.conversation, effort=one.task.prompt.effort or teacher.effort))
            except DataError:
                theirs = None
            if theirs is None or 0 < teacher.context < len(theirs):
                said.remove(one)
                left_out["teacher"] += 1
                continue
            spoken.setdefault(one.task.teacher, []).append((one, theirs))
        firsts, n = {}, 0
        for one in said:
            firsts[id(one)] = n
            n += int(one.tokens.learn_T.sum())
        found = {}
        for name, some in spoken.items():
            beside = self._of(name, some, [firsts[id(one)] for one, _ in some])
            if len(beside.place_C):
                found[name] = beside
        return found

    def _of(self, name: str, some: list[tuple[Said, Tokens]], firsts: list[int]) -> Beside:
        import torch

        bridge = self.bridges[name]
        places, rows, contexts = [], [], []
        for (one, theirs), first in zip(some, firsts, strict=True):
            both = align([one.tokens], [theirs]).boundaries
            places.append(first + (np.cumsum(one.tokens.learn_T) - 1)[both.student_C])
            rows.append((np.cumsum(theirs.learn_T) - 1)[both.teacher_C])
            if bridge.teacher_mask is not None and bridge.student_mask is not None:
                contexts.append((bridge.student_mask.keeper.inner(theirs, both.teacher_C),
                                 bridge.teacher_mask.keeper.inner(one.tokens, both.student_C)))
        pieces: list[list[torch.Tensor]] = [[] for _ in some]
        at = [0] * len(some)
        for k, some_NW in self.teachers[name].engine.pieces([t.ids_T for _, t in some], [t.learn_T for _, t in some]):
            mine = rows[k][(rows[k] >= at[k]) & (rows[k] < at[k] + len(some_NW))] - at[k]
            pieces[k].append(some_NW[torch.from_numpy(mine)])
            at[k] += len(some_NW)
        place_C, logprobs_CW = np.concatenate(places), torch.cat([piece for parts in pieces for piece in parts])
        if not contexts:
            return Beside(torch.from_numpy(place_C), logprobs_CW, self._dead_in([]), self._dead_in([]))
        assert bridge.student_mask is not None and bridge.teacher_mask is not None
        of_student, of_teacher = ([self._gone(mask, context) for context in np.concatenate(side).tolist()] for mask, side in zip(
            (bridge.student_mask, bridge.teacher_mask), zip(*contexts, strict=True), strict=True))
        fits = np.array([_agree(bridge, *dead) for dead in zip(of_student, of_teacher, strict=True)])
        of_student, of_teacher = ([dead for dead, good in zip(side, fits.tolist(), strict=True) if good] for side in (of_student, of_teacher))
        return Beside(torch.from_numpy(place_C[fits]), logprobs_CW[torch.from_numpy(fits)], self._dead_in(of_student), self._dead_in(of_teacher))

    def _dead_in(self, dead_C: Sequence[npt.NDArray[np.int64]]) -> Dead:
        import torch

        from persea.losses import Dead

        row_D = np.repeat(np.arange(len(dead_C)), [len(d) for d in dead_C])
        return Dead(torch.from_numpy(row_D), torch.from_numpy(np.concatenate([np.empty(0, np.int64), *dead_C])))

    def _gone(self, mask: Mask, context: int) -> npt.NDArray[np.int64]:
        """What cannot stand in a context, the whole vocabulary; each context is asked once."""
        key = id(mask), context
        if key not in self._dead:
            self._dead[key] = mask.dead(context)
        return self._dead[key]


def _agree(bridge: Bridge, dead_V: npt.NDArray[np.int64], dead_W: npt.NDArray[np.int64]) -> bool:
    """Whether some event is left that both sides can say."""
    left = [np.bincount(event_X[event_X >= 0], minlength=bridge.events) - np.bincount(event_X[dead][event_X[dead] >= 0], minlength=bridge.events)
            for event_X, dead in ((bridge.student_event_V, dead_V), (bridge.teacher_event_W, dead_W))]
    return bool((np.minimum(*left) > 0).any())
