"""Rollouts: what the student says itself, and what its teachers think of it (on-policy distillation).

Some prompts are answered by the student, drawn from its own distribution, many at once. Each answer is then said in its teacher's own
template, and where both begin a token at the same byte the teacher's whole distribution stands beside the student's: reverse KL over
common events, position by position (Agarwal et al. 2024, over events). The positions are the student's own tokens, as it said them and not
as its tokenizer would have: that is what on-policy means. A run of tokens without bytes (where a thought ends) is compared as a whole
(beside.py). Where no boundary is common, nothing is learned here: a sample's own cross-entropy has no gradient in the mean.

Where a teacher gives no more than log-probabilities, `objective: span_likelihood` compares how likely both find each stretch between two common
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

from persea.chat.messages import Conversation, FinishReason, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.config.schema import OnPolicySection
from persea.data.prompts import Prompt
from persea.distributions import DistributionKind
from persea.errors import DataError, RecipeError, RefusedError
from persea.tokenization.tokens import RenderedTokens
from persea.training import loss_balancing as balance
from persea.training.loss_balancing import Group
from persea.training.on_policy.candidates import MIN_CANDIDATE_PROB, candidates_from_hidden
from persea.training.on_policy.loss import OnPolicyLoss, build_on_policy_loss
from persea.training.on_policy.teacher_scores import TeacherScorer

if TYPE_CHECKING:
    import torch

    from persea.alignment.event_map import EventMap
    from persea.losses import LMHead, LossOutput
    from persea.teachers.teacher import Teacher
    from persea.training.student import StudentModel

MIN_LOOP_REPEATS = 4  # times in a row that a stretch may not be said
MAX_LOOP_PERIOD_TOKENS = 64  # longest stretch of tokens looked at
MIN_LOOP_TOKENS = 12  # tokens that a loop fills at least: "ha ha ha ha" is none
# what a process with no answer of its own runs its model on
PLACEHOLDER_TOKENS = RenderedTokens(
    np.zeros(2, np.int32),
    np.array([0, 1], np.int32),
    np.array([1, 2], np.int32),
    np.array([False, True]),
)


@dataclass(frozen=True)
class RolloutPrompt:
    """A prompt, and who teaches it."""

    prompt: Prompt
    teacher: str

    @property
    def conversation(self) -> Conversation:
        """As the student is asked: in the prompt's mode, to answer at once where it has none."""
        return replace(self.prompt.conversation, effort=self.prompt.effort or ThinkingEffort.NONE)


@dataclass(frozen=True)
class RolloutAnswer:
    """An answer of the student, fit to learn from: its own tokens, and what they say."""

    rollout_prompt: RolloutPrompt
    tokens: RenderedTokens
    conversation: Conversation
    finish: FinishReason


@dataclass(frozen=True)
class RolloutBatch:
    """What was drawn at once: `number` counts rounds, `step` is the training step whose weights said it, ids the answers."""

    index: int
    step: int
    ids: tuple[npt.NDArray[np.int32], ...]


def has_repetition_loop(ids: Sequence[int]) -> bool:
    """Whether an answer ends in a loop: a stretch of at most STRETCH tokens said LOOP times in a row, SHORTEST tokens or more in all.

    A stop token at its end is left aside. Teachers find the fifth round of a loop likely too: they are no cure for it.
    """
    for tail in (ids, ids[:-1]):
        for period in range(1, min(MAX_LOOP_PERIOD_TOKENS, len(tail) // MIN_LOOP_REPEATS) + 1):
            n = max(period * MIN_LOOP_REPEATS, MIN_LOOP_TOKENS)
            if n <= len(tail) and all(
                tail[-k] == tail[-k - period] for k in range(1, n - period + 1)
            ):
                return True
    return False


def place_sampled_tokens(
    renderer: ChatRenderer,
    conversation: Conversation,
    prompt: RenderedTokens,
    ids: npt.NDArray[np.int32],
) -> RenderedTokens | None:
    """The conversation as the student said it: the prompt's tokens, then its own, placed over the content's bytes. None where that cannot
    be told: a spelling of its own within markers, or bytes the template does not write.

    A tokenizer spells a text in one way, a model that samples in many; the rendering says where the bytes are, the ids which tokens.
    """
    whole, first, stops = (
        renderer.render(conversation),
        len(prompt),
        len(ids) > 0 and int(ids[-1]) in renderer.stop_ids,
    )
    if not np.array_equal(whole.ids_T[:first], prompt.ids_T):
        return None
    last = len(ids) - stops
    end = first + int(
        np.argmax(np.isin(whole.ids_T[first:], renderer.stop_ids))
    )  # the rendering's own stop token
    lengths_W = renderer.vocabulary.lengths_W
    if np.array_equal(whole.ids_T[first:end], ids[:last]):
        starts_T, ends_T = whole.starts_T[first:end], whole.ends_T[first:end]
    else:
        body = slice(first, end)
        plain = (whole.starts_T[body] >= 0).all() and (
            whole.ends_T[body] - whole.starts_T[body] == lengths_W[whole.ids_T[body]]
        ).all()
        said, meant = (
            b"".join(renderer.vocabulary.bytes_W[i] or b"\0\0control" for i in some.tolist())
            for some in (ids[:last], whole.ids_T[body])
        )
        if (
            not plain
            or said != meant
            or (whole.starts_T[body][1:] != whole.ends_T[body][:-1]).any()
            or last == 0
        ):
            return None
        ends_T = (whole.starts_T[first] + np.cumsum(lengths_W[ids[:last]])).astype(np.int32)
        starts_T = (ends_T - lengths_W[ids[:last]]).astype(np.int32)
    stop = np.full(int(stops), whole.starts_T[end], np.int32)
    learn_T = np.arange(first + len(ids)) >= first
    return RenderedTokens(
        np.concatenate([prompt.ids_T, ids]).astype(np.int32),
        np.concatenate([whole.starts_T[:first], starts_T, stop]),
        np.concatenate([whole.ends_T[:first], ends_T, stop]),
        learn_T,
    )


def parse_rollout(
    rollout_prompt: RolloutPrompt,
    renderer: ChatRenderer,
    ids: npt.NDArray[np.int32],
    config: OnPolicySection,
    max_tokens: int,
) -> RolloutAnswer | str:
    """The answer, or in a word why it is not learned from.

    unasked    its prompt cannot be said in the student's voice
    malformed  in its own template's terms      length    it did not end, and `truncated` is drop, or ended within a character
    loop       it ends in a loop (`repeats`)    spelling  its tokens cannot be placed over its bytes
    unsayable  its template cannot write it     long      more than max_tokens tokens
    """
    if not len(ids):
        return "unasked"
    asked = rollout_prompt.conversation
    parts, finish = renderer.parse(ids.tolist(), asked.effort, asked.tools)
    if finish is FinishReason.MALFORMED:
        return "malformed"
    if finish is FinishReason.LENGTH and (config.truncated == "drop" or not parts):
        return "length"
    if has_repetition_loop(ids.tolist()):
        return "loop"
    conversation = asked.with_answer(*parts)
    try:
        tokens = place_sampled_tokens(renderer, conversation, renderer.render_prompt(asked), ids)
    except DataError:
        return "unsayable"
    if tokens is None:
        return "spelling"
    return (
        "long"
        if len(tokens) > max_tokens
        else RolloutAnswer(rollout_prompt, tokens, conversation, finish)
    )


@dataclass(eq=False)
class Rollouts:
    """A source of steps: the student's own answers. What a step draws depends on seed, step and the student's weights alone.

    A round is drawn when its first step comes, `terms.rollouts` answers, and used up `size` a step. `state` is what a checkpoint must hold.
    """

    student: StudentModel
    prompts: tuple[RolloutPrompt, ...]
    scorers: Mapping[str, TeacherScorer]
    config: OnPolicySection
    batch_size: int
    seed: int
    max_tokens: int
    _in_flight: RolloutBatch | None = None

    def __post_init__(self) -> None:
        for name, pair in self.scorers.items():
            kind = pair.teacher.engine.capabilities.kind
            if kind is DistributionKind.TEXT_ONLY or (
                kind is not DistributionKind.FULL and self.config.objective == "events"
            ):
                raise RecipeError(
                    f"{name} gives rows of kind {kind.value}, and reverse KL over events needs whole ones"
                    if kind is not DistributionKind.TEXT_ONLY
                    else f"{name} gives words alone: it cannot say how likely it finds what the student said",
                    where="training.on_policy.objective",
                    remedy="teach from captures, or with a teacher whose weights are here"
                    + (
                        ""
                        if kind is DistributionKind.TEXT_ONLY
                        else "; or `objective: span_likelihood`"
                    ),
                )

    def is_due(self, step: int) -> bool:
        """Whether the step learns from rollouts: from `start_step` on, `share` of the steps, evenly."""
        since = step - self.config.start_step
        return since >= 0 and math.floor((since + 1) * self.config.share) > math.floor(
            since * self.config.share
        )

    def loss(
        self,
        step: int,
        part: int = 0,
        parts: int = 1,
        weights: Mapping[Group, float] = MappingProxyType({}),
    ) -> tuple[LossOutput, dict[Group, balance.GroupStats]]:
        """Reverse KL of a step, or a part of it, and what each group taught. What is left out is told of the whole step, in every part alike.

        weights  what a group's positions count for; 1 where none is given
        Refused where nothing the student said in this step can be learned from. A part of which that is so costs nothing and has no positions:
        the others go on without it.
        """
        import torch

        from persea.losses import LossOutput

        everything, left_out, lengths = self._parse_answers(step, 0, 1)
        spoken = self._render_for_teachers(everything, left_out)
        if not spoken:
            raise RefusedError(
                f"of {len(lengths)} answers of the student none can be learned from ({dict(left_out)})",
                where=f"train, step {step}",
                remedy="raise training.on_policy.start_step, so that it can answer before it is heard, or max_new_tokens",
            )
        if parts > 1:
            spoken = self._render_for_teachers(self._parse_answers(step, part, parts)[0], Counter())
        heard_from = len(lengths)
        terms = {
            "rollout_tokens": float(np.mean(lengths)),
            "rollouts_left_out": sum(left_out.values()) / heard_from,
            **{f"left_out_{why}": n / heard_from for why, n in sorted(left_out.items())},
        }
        answers = [own for members in spoken.values() for own, _ in members] or [PLACEHOLDER_TOKENS]
        ids_BS, mask_BS, learn_BS = torch.zeros(
            (3, len(answers), max(map(len, answers))), dtype=torch.int64
        )
        for b, own in enumerate(answers):
            ids_BS[b, : len(own)], mask_BS[b, : len(own)], learn_BS[b, : len(own)] = (
                torch.from_numpy(own.ids_T),
                1,
                torch.from_numpy(own.loss_mask_T),
            )
        row_L, at_L = learn_BS.nonzero(as_tuple=True)
        hidden_LD, head = self.student.hidden_and_head(
            ids_BS, mask_BS, row_L, at_L - 1
        )  # once: processes must run a model equally often
        targets_L = ids_BS[row_L, at_L].to(hidden_LD.device)
        masked = any(
            self.scorers[group.teacher].event_map.student_mask is not None for group in spoken
        )
        found = candidates_from_hidden(hidden_LD, head) if masked else None
        ends = np.cumsum(
            [
                0,
                *(
                    sum(int(own.loss_mask_T.sum()) for own, _ in members)
                    for members in spoken.values()
                ),
            ]
        ).tolist()
        taught, outs = dict[Group, OnPolicyLoss](), dict[Group, LossOutput]()
        for (group, some), first, last in zip(spoken.items(), ends[:-1], ends[1:], strict=True):
            one = build_on_policy_loss(
                self.scorers[group.teacher],
                some,
                self.config.objective,
                found and found.slice_positions(first, last),
            )
            if one.num_terms:
                taught[group] = one
                outs[group] = one.loss_fn(
                    hidden_LD[first:last][one.position_P],
                    head,
                    targets_L[first:last][one.position_P],
                )
        if not taught:
            return LossOutput(_zero_loss(hidden_LD, head), terms, 0), {}
        total = sum(one.num_terms for one in taught.values())
        weight = {group: weights.get(group, 1.0) for group in taught}
        told = {group: taught[group].group_stats(out, weight[group]) for group, out in outs.items()}
        loss = torch.stack(
            [
                out.loss * (weight[group] * taught[group].num_terms / total)
                for group, out in outs.items()
            ]
        ).sum()
        mean = sum(one.loss_sum for one in told.values()) / total
        return LossOutput(
            loss, {"reverse" if self.config.objective == "events" else "chunk": mean} | terms, total
        ), told

    def state(self) -> bytes:
        """Answers in flight, with the step that drew them; empty where there are none."""
        r = self._in_flight
        return (
            b""
            if r is None
            else json.dumps(
                {"number": r.index, "step": r.step, "ids": [i.tolist() for i in r.ids]}
            ).encode()
        )

    def restore(self, states: tuple[bytes, ...]) -> None:
        """Every process draws the same answers, so the first one's state is everybody's."""
        found = json.loads(states[0]) if states and states[0] else None
        self._in_flight = found and RolloutBatch(
            found["number"], found["step"], tuple(np.array(i, np.int32) for i in found["ids"])
        )

    def _parse_answers(
        self, step: int, part: int, parts: int
    ) -> tuple[list[RolloutAnswer], Counter[str], list[int]]:
        """What a step learns from, why the others are left out, and how many tokens each answer has."""
        number, place = divmod(
            math.floor((step - self.config.start_step) * self.config.share),
            self.config.rollouts // self.batch_size,
        )
        if place == 0 and (self._in_flight is None or self._in_flight.step != step):
            self._in_flight = RolloutBatch(number, step, tuple(self._generate(number, step)))
        flying = self._in_flight
        if flying is None or flying.index != number:
            raise DataError(
                f"answers of round {number} are not in flight at step {step}",
                where="train",
                remedy="resume from a checkpoint of this run: it holds them",
            )
        if step - flying.step > self.config.max_staleness_steps:
            raise RefusedError(
                f"answers drawn at step {flying.step} are stale at step {step}: at most {self.config.max_staleness_steps} steps old",
                where="train",
                remedy="raise training.on_policy.max_staleness_steps, or lower rollouts",
            )
        begin = place * self.batch_size
        mine = range(
            begin + self.batch_size * part // parts, begin + self.batch_size * (part + 1) // parts
        )
        found = [
            parse_rollout(
                self._prompt_at(number, k),
                self.student.renderer,
                flying.ids[k],
                self.config,
                self.max_tokens,
            )
            for k in mine
        ]
        return (
            [one for one in found if isinstance(one, RolloutAnswer)],
            Counter(one for one in found if isinstance(one, str)),
            [len(flying.ids[k]) for k in mine],
        )

    def _prompt_at(self, batch_index: int, k: int) -> RolloutPrompt:
        epoch, at = divmod(batch_index * self.config.rollouts + k, len(self.prompts))
        return self.prompts[
            int(np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.prompts))[at])
        ]

    def _generate(self, batch_index: int, step: int) -> list[npt.NDArray[np.int32]]:
        from persea.teachers.engines.transformers import TransformersEngine

        voice, model = self.student.renderer, self.student.model
        asked: list[npt.NDArray[np.int32]] = []
        for k in range(self.config.rollouts):
            try:
                asked.append(
                    voice.render_prompt(self._prompt_at(batch_index, k).conversation).ids_T
                )
            except DataError:
                asked.append(np.empty(0, np.int32))  # told as unasked
        some = [k for k, ids in enumerate(asked) if len(ids)]
        training = model.training
        model.eval()
        seed = int(np.random.default_rng([self.seed, step, 2]).integers(1 << 62))
        said = TransformersEngine(
            model, len(voice.vocabulary), self.config.rollouts
        ).generate_rollouts(
            [asked[k] for k in some],
            voice.stop_ids,
            self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=seed,
        )
        model.train(training)
        answers = dict(zip(some, said, strict=True))
        return [answers.get(k, np.empty(0, np.int32)) for k in range(self.config.rollouts)]

    def _render_for_teachers(
        self, answers: Sequence[RolloutAnswer], skipped: Counter[str]
    ) -> dict[Group, list[tuple[RenderedTokens, RenderedTokens]]]:
        """By teacher and skill, each answer in the student's own tokens and in the teacher's; what a teacher cannot say is counted as left out."""
        spoken: dict[Group, list[tuple[RenderedTokens, RenderedTokens]]] = {}
        for one in answers:
            teacher = self.scorers[one.rollout_prompt.teacher].teacher
            try:
                theirs = teacher.renderer.render(
                    replace(
                        one.conversation, effort=one.rollout_prompt.prompt.effort or teacher.effort
                    )
                )
            except DataError:
                theirs = None
            if theirs is None or 0 < teacher.max_context_tokens < len(theirs):
                skipped["teacher"] += 1
                continue
            spoken.setdefault(
                Group(one.rollout_prompt.teacher, one.rollout_prompt.prompt.skill, on_policy=True),
                [],
            ).append((one.tokens, theirs))
        return spoken


def _zero_loss(hidden_LD: torch.Tensor, head: LMHead) -> torch.Tensor:
    """0, in which every output of a forward is: each backward must reach every weight."""
    import torch

    return torch.stack(
        [
            side.sum().float() * 0
            for side in (hidden_LD, head.weight_VD, head.bias_V)
            if side is not None
        ]
    ).sum()


def build_rollouts(
    assignments: Iterable[tuple[Prompt, str]],
    student: StudentModel,
    load_teacher: Callable[[str], Teacher],
    event_maps: Mapping[str, EventMap],
    config: OnPolicySection,
    batch_size: int,
    seed: int,
    max_tokens: int,
) -> Rollouts:
    """Each prompt with the teacher that the cast gives it (capture.assigned), all of these open at once."""
    tasks = tuple(RolloutPrompt(prompt, name) for prompt, name in assignments)
    pairs = {
        name: TeacherScorer(load_teacher(name), event_maps[name], MIN_CANDIDATE_PROB)
        for name in dict.fromkeys(task.teacher for task in tasks)
    }
    return Rollouts(student, tasks, pairs, config, batch_size, seed, max_tokens)
