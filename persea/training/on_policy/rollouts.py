"""Rollouts: what the student says itself, and what its teachers think of it (on-policy distillation).

Some prompts are answered by the student, drawn from its own distribution, many at once. Each answer is then said in its teacher's own
template, and where both begin a token at the same byte the teacher's whole distribution stands beside the student's: reverse KL over
common events, position by position (Agarwal et al. 2024, over events). The positions are the student's own tokens, as it said them and not
as its tokenizer would have: that is what on-policy means. A run of tokens without bytes (where a thought ends) is compared as a whole
(beside.py). Where no boundary is common, nothing is learned here: a sample's own cross-entropy has no gradient in the mean.

Where a teacher gives no more than log-probabilities, `objective: chunk` compares how likely both find each stretch between two common
boundaries (losses/chunk.py): of the student's own answers the gradient of half the squared difference is minus the advantage (the
teacher's less the student's) times the gradient of the stretch's log-probability: reverse KL's policy gradient.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea.chat.messages import Conversation, Effort, Finish, Tokens
from persea.chat.renderer import Voice
from persea.config.schema import OnPolicy
from persea.data.prompts import Prompt
from persea.distributions import RowKind
from persea.errors import DataError, RecipeError, Refused
from persea.training import loss_balancing as balance
from persea.training.loss_balancing import Group
from persea.training.on_policy.candidates import LIKELY, likely_behind
from persea.training.on_policy.loss import Advice, advice
from persea.training.on_policy.teacher_scores import Pair

if TYPE_CHECKING:
    import torch

    from persea.alignment.event_map import Bridge
    from persea.losses import Head, LossOut
    from persea.teachers.teacher import Teacher
    from persea.training.student import Student

LOOP = 4        # times in a row that a stretch may not be said
STRETCH = 64    # longest stretch of tokens looked at
SHORTEST = 12   # tokens that a loop fills at least: "ha ha ha ha" is none
# what a process with no answer of its own runs its model on
NOTHING = Tokens(np.zeros(2, np.int32), np.array([0, 1], np.int32), np.array([1, 2], np.int32), np.array([False, True]))


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

    unasked    its prompt cannot be said in the student's voice
    malformed  in its own template's terms      length    it did not end, and `truncated` is drop, or ended within a character
    loop       it ends in a loop (`repeats`)    spelling  its tokens cannot be placed over its bytes
    unsayable  its template cannot write it     long      more than max_tokens tokens
    """
    if not len(ids):
        return "unasked"
    asked = task.asked
    parts, finish = voice.parse(ids.tolist(), asked.effort, asked.tools)
    if finish is Finish.MALFORMED:
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


@dataclass(eq=False)
class Rollouts:
    """A source of steps: the student's own answers. What a step draws depends on seed, step and the student's weights alone.

    A round is drawn when its first step comes, `terms.rollouts` answers, and used up `size` a step. `state` is what a checkpoint must hold.
    """

    student: Student
    tasks: tuple[Task, ...]
    pairs: Mapping[str, Pair]
    terms: OnPolicy
    size: int
    seed: int
    max_tokens: int
    _round: Round | None = None

    def __post_init__(self) -> None:
        for name, pair in self.pairs.items():
            kind = pair.teacher.engine.abilities.kind
            if kind is RowKind.WORDS or (kind is not RowKind.FULL and self.terms.objective == "events"):
                raise RecipeError(f"{name} gives rows of kind {kind.value}, and reverse KL over events needs whole ones" if kind is not RowKind.WORDS
                                  else f"{name} gives words alone: it cannot say how likely it finds what the student said",
                                  where="training.on_policy.objective", remedy="teach from captures, or with a teacher whose weights are here"
                                  + ("" if kind is RowKind.WORDS else "; or `objective: chunk`"))

    def due(self, step: int) -> bool:
        """Whether the step learns from rollouts: from `after` on, `share` of the steps, evenly."""
        since = step - self.terms.after
        return since >= 0 and math.floor((since + 1) * self.terms.share) > math.floor(since * self.terms.share)

    def loss(self, step: int, part: int = 0, parts: int = 1, weights: Mapping[Group, float] = MappingProxyType({})
             ) -> tuple[LossOut, dict[Group, balance.Taught]]:
        """Reverse KL of a step, or a part of it, and what each group taught. What is left out is told of the whole step, in every part alike.

        weights  what a group's positions count for; 1 where none is given
        Refused where nothing the student said in this step can be learned from. A part of which that is so costs nothing and has no positions:
        the others go on without it.
        """
        import torch

        from persea.losses import LossOut

        everything, left_out, lengths = self._said(step, 0, 1)
        spoken = self._spoken(everything, left_out)
        if not spoken:
            raise Refused(f"of {len(lengths)} answers of the student none can be learned from ({dict(left_out)})", where=f"train, step {step}",
                          remedy="raise training.on_policy.after, so that it can answer before it is heard, or max_new_tokens")
        if parts > 1:
            spoken = self._spoken(self._said(step, part, parts)[0], Counter())
        heard_from = len(lengths)
        terms = {"rollout_tokens": float(np.mean(lengths)), "rollouts_left_out": sum(left_out.values()) / heard_from,
                 **{f"left_out_{why}": n / heard_from for why, n in sorted(left_out.items())}}
        answers = [own for members in spoken.values() for own, _ in members] or [NOTHING]
        ids_BS, mask_BS, learn_BS = torch.zeros((3, len(answers), max(map(len, answers))), dtype=torch.int64)
        for b, own in enumerate(answers):
            ids_BS[b, :len(own)], mask_BS[b, :len(own)], learn_BS[b, :len(own)] = torch.from_numpy(own.ids_T), 1, torch.from_numpy(own.learn_T)
        row_L, at_L = learn_BS.nonzero(as_tuple=True)
        hidden_LD, head = self.student.hidden(ids_BS, mask_BS, row_L, at_L - 1)  # once: processes must run a model equally often
        targets_L = ids_BS[row_L, at_L].to(hidden_LD.device)
        masked = any(self.pairs[group.teacher].bridge.student_mask is not None for group in spoken)
        found = likely_behind(hidden_LD, head) if masked else None
        ends = np.cumsum([0, *(sum(int(own.learn_T.sum()) for own, _ in members) for members in spoken.values())]).tolist()
        taught, outs = dict[Group, Advice](), dict[Group, LossOut]()
        for (group, some), first, last in zip(spoken.items(), ends[:-1], ends[1:], strict=True):
            one = advice(self.pairs[group.teacher], some, self.terms.objective, found and found.within(first, last))
            if one.weight:
                taught[group] = one
                outs[group] = one.loss(hidden_LD[first:last][one.place_P], head, targets_L[first:last][one.place_P])
        if not taught:
            return LossOut(_nothing(hidden_LD, head), terms, 0), {}
        total = sum(one.weight for one in taught.values())
        weight = {group: weights.get(group, 1.0) for group in taught}
        told = {group: taught[group].told(out, weight[group]) for group, out in outs.items()}
        loss = torch.stack([out.loss * (weight[group] * taught[group].weight / total) for group, out in outs.items()]).sum()
        mean = sum(one.nats for one in told.values()) / total
        return LossOut(loss, {"reverse" if self.terms.objective == "events" else "chunk": mean} | terms, total), told

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
        from persea.teachers.engines.transformers import LocalEngine

        voice, model = self.student.voice, self.student.model
        asked: list[npt.NDArray[np.int32]] = []
        for k in range(self.terms.rollouts):
            try:
                asked.append(voice.prompt(self._task(number, k).asked).ids_T)
            except DataError:
                asked.append(np.empty(0, np.int32))  # told as unasked
        some = [k for k, ids in enumerate(asked) if len(ids)]
        training = model.training
        model.eval()
        seed = int(np.random.default_rng([self.seed, step, 2]).integers(1 << 62))
        said = LocalEngine(model, len(voice.vocabulary), self.terms.rollouts).rollouts(
            [asked[k] for k in some], voice.stop_ids, self.terms.max_new_tokens, temperature=self.terms.temperature, seed=seed)
        model.train(training)
        answers = dict(zip(some, said, strict=True))
        return [answers.get(k, np.empty(0, np.int32)) for k in range(self.terms.rollouts)]

    def _spoken(self, said: Sequence[Said], left_out: Counter[str]) -> dict[Group, list[tuple[Tokens, Tokens]]]:
        """By teacher and skill, each answer in the student's own tokens and in the teacher's; what a teacher cannot say is counted as left out."""
        spoken: dict[Group, list[tuple[Tokens, Tokens]]] = {}
        for one in said:
            teacher = self.pairs[one.task.teacher].teacher
            try:
                theirs = teacher.voice.render(replace(one.conversation, effort=one.task.prompt.effort or teacher.effort))
            except DataError:
                theirs = None
            if theirs is None or 0 < teacher.context < len(theirs):
                left_out["teacher"] += 1
                continue
            spoken.setdefault(Group(one.task.teacher, one.task.prompt.skill, own=True), []).append((one.tokens, theirs))
        return spoken


def _nothing(hidden_LD: torch.Tensor, head: Head) -> torch.Tensor:
    """0, in which every output of a forward is: each backward must reach every weight."""
    import torch

    return torch.stack([side.sum().float() * 0 for side in (hidden_LD, head.weight_VD, head.bias_V) if side is not None]).sum()


def open_rollouts(asked: Iterable[tuple[Prompt, str]], student: Student, teacher: Callable[[str], Teacher], bridges: Mapping[str, Bridge],
                  terms: OnPolicy, size: int, seed: int, max_tokens: int) -> Rollouts:
    """Each prompt with the teacher that the cast gives it (capture.assigned), all of these open at once."""
    tasks = tuple(Task(prompt, name) for prompt, name in asked)
    pairs = {name: Pair(teacher(name), bridges[name], LIKELY) for name in dict.fromkeys(task.teacher for task in tasks)}
    return Rollouts(student, tasks, pairs, terms, size, seed, max_tokens)
