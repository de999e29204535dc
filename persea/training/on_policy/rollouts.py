"""On-policy distillation: the student answers prompts, and its teachers score the answers.

The student samples answers from its own distribution, many at once. Each answer is rendered in its
teacher's template. Where both tokenizers begin a token at the same byte, the loss is the reverse KL
over common events (Agarwal et al. 2024, over events). The positions are the tokens that the student
sampled, not those its tokenizer would choose. A run of tokens without bytes (the end of thinking)
is compared as a whole (teacher_scores.py). Positions without a common boundary have no loss: the
cross-entropy of a sample has no gradient in the mean.

For teachers that give only log-probabilities, `objective: span_likelihood` compares the likelihood
of each span between two common boundaries (losses/span_likelihood.py). On the student's own answers
the gradient of half the squared difference is minus the advantage (teacher's minus student's) times
the gradient of the span's log-probability: the policy gradient of reverse KL.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea.config.schema import OnPolicySection
from persea.data.prompts import Prompt
from persea.distributions import DistributionKind
from persea.errors import DataError, RecipeError, RefusedError
from persea.losses import LossOutput
from persea.tokenization.tokens import RenderedTokens
from persea.training import loss_balancing as balance
from persea.training.loss_balancing import Group
from persea.training.on_policy.candidates import candidates_from_hidden, mean_entropy
from persea.training.on_policy.loss import OnPolicyLoss, build_on_policy_loss
from persea.training.on_policy.rollout_answers import (
    RolloutAnswer,
    RolloutPrompt,
    parse_rollout,
)
from persea.training.on_policy.sampling import OwnSampler, RolloutSampler, split_batch
from persea.training.on_policy.teacher_scores import TeacherScorer
from persea.training.on_policy.tripwires import ENDED, ENTROPY, LENGTH, Tripwires, TripwireVerdict

if TYPE_CHECKING:
    import torch

    from persea.alignment.event_map import EventMap
    from persea.losses import LMHead, LossOutput
    from persea.teachers.teacher import Teacher
    from persea.training.student import StudentModel

MAX_ENTROPY_POSITIONS = 256  # of a step: the logits of a real vocabulary cost time
PROMPT_SEED = 1  # last number of the seed of the order of prompts; 2 = of sampling (sampling.py)
# input of a process without an answer of its own: every process must run the model
PLACEHOLDER_TOKENS = RenderedTokens(
    np.zeros(2, np.int32),
    np.array([0, 1], np.int32),
    np.array([1, 2], np.int32),
    np.array([False, True]),
)


@dataclass(frozen=True)
class RolloutBatch:
    """Answers that were sampled together.

    Attributes:
        index: number of the batch of rollouts.
        step: training step whose weights sampled the answers, the oldest if there are several.
        ids: token ids of each answer; empty if its prompt cannot be rendered.
        weights: digest of these weights, of answers that workers sampled; "" = of this process.
    """

    index: int
    step: int
    ids: tuple[npt.NDArray[np.int32], ...]
    weights: str = ""


@dataclass(eq=False)
class Rollouts:
    """The source of on-policy steps.

    `config.rollouts` answers are sampled at the first step that needs them; each step uses
    `batch_size` of them. The samples of a step depend on the seed, the step and the student's
    weights alone. `state` is the part for a checkpoint.

    Attributes:
        student: the student; it samples answers and is trained on them.
        prompts: prompts with their teachers.
        scorers: scorer of each teacher.
        config: the recipe's section `training.on_policy`.
        batch_size: answers a step.
        seed: seed of prompt order and sampling.
        max_tokens: longest conversation, in student tokens.
        sampler: samples the answers.

    Raises:
        RecipeError: if a teacher's distributions are not of the kind that the objective needs.
    """

    student: StudentModel
    prompts: tuple[RolloutPrompt, ...]
    scorers: Mapping[str, TeacherScorer]
    config: OnPolicySection
    batch_size: int
    seed: int
    max_tokens: int
    sampler: RolloutSampler = field(default_factory=OwnSampler)
    _in_flight: RolloutBatch | None = None
    _tripwires: Tripwires = field(init=False)

    def __post_init__(self) -> None:
        self._tripwires = Tripwires(self.config)
        for name, scorer in self.scorers.items():
            kind = scorer.teacher.engine.capabilities.kind
            if kind is DistributionKind.TEXT_ONLY or (
                kind is not DistributionKind.FULL and self.config.objective == "events"
            ):
                raise RecipeError(
                    f"{name} gives distributions of kind {kind.value}, "
                    "and reverse KL over events needs whole distributions"
                    if kind is not DistributionKind.TEXT_ONLY
                    else f"{name} gives only text: it cannot score the student's answers",
                    where="training.on_policy.objective",
                    remedy="train on captured answers, or use a teacher whose weights are local"
                    + (
                        ""
                        if kind is DistributionKind.TEXT_ONLY
                        else "; or `objective: span_likelihood`"
                    ),
                )

    def is_due(self, step: int) -> bool:
        """Return whether a step is on-policy: from `start_step` on, an even `share` of steps."""
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
        """Compute the loss of a step, or of a part of it.

        A part without a usable answer has loss 0 and no positions; the other parts go on without
        it. The metrics of left-out answers are those of the whole step, the same in every part.

        Args:
            step: the training step.
            part: which part of the step's answers, from 0.
            parts: number of parts.
            weights: weight of each group; 1 where a group has none.

        Returns:
            The loss, and the statistics of each group.

        Raises:
            RefusedError: if no answer of the whole step can be trained on.
        """
        import torch

        everything, left_out, lengths = self._parse_answers(step, 0, 1)
        answers = self._render_for_teachers(everything, left_out)
        if not answers:
            raise RefusedError(
                f"of {len(lengths)} answers of the student none can be trained on "
                f"({dict(left_out)})",
                where=f"train, step {step}",
                remedy="raise training.on_policy.start_step, so that the student can answer before "
                "its answers are used, or max_new_tokens",
            )
        if parts > 1:
            own_part = self._parse_answers(step, part, parts)[0]
            answers = self._render_for_teachers(own_part, Counter())
        metrics = {
            LENGTH: float(np.mean(lengths)),
            ENDED: self._ended_share(step),
            "rollouts_left_out": sum(left_out.values()) / len(lengths),
            **{f"left_out_{why}": n / len(lengths) for why, n in sorted(left_out.items())},
        }
        # one forward pass: all processes must run the model equally often
        hidden_LD, head, labels_L = self._hidden_states(answers)
        losses, outs = self._group_losses(answers, hidden_LD, head, labels_L)
        if answers and self.config.tripwire_steps:
            metrics[ENTROPY] = mean_entropy(hidden_LD, head, MAX_ENTROPY_POSITIONS)
        if not losses:
            return LossOutput(_zero_loss(hidden_LD, head), _to_tensors(metrics), 0), {}
        total = sum(one.num_terms for one in losses.values())
        weight = {group: weights.get(group, 1.0) for group in losses}
        stats = {
            group: losses[group].group_stats(out, weight[group]) for group, out in outs.items()
        }
        loss = torch.stack(
            [
                out.loss * (weight[group] * losses[group].num_terms / total)
                for group, out in outs.items()
            ]
        ).sum()
        mean = sum(one.loss_sum for one in stats.values()) / total
        name = "reverse_kl" if self.config.objective == "events" else "span_likelihood"
        return LossOutput(loss, _to_tensors({name: mean} | metrics), total), stats

    def _hidden_states(
        self, answers: Mapping[Group, list[tuple[RenderedTokens, RenderedTokens]]]
    ) -> tuple[torch.Tensor, LMHead, torch.Tensor]:
        """Return hidden states and labels of all supervised positions, group by group."""
        import torch

        own = [tokens for members in answers.values() for tokens, _ in members]
        own = own or [PLACEHOLDER_TOKENS]
        ids_BS, mask_BS, loss_mask_BS = torch.zeros(
            (3, len(own), max(map(len, own))), dtype=torch.int64
        )
        for b, tokens in enumerate(own):
            ids_BS[b, : len(tokens)] = torch.from_numpy(tokens.ids_T)
            mask_BS[b, : len(tokens)] = 1
            loss_mask_BS[b, : len(tokens)] = torch.from_numpy(tokens.loss_mask_T)
        row_L, position_L = loss_mask_BS.nonzero(as_tuple=True)
        hidden_LD, head = self.student.hidden_and_head(ids_BS, mask_BS, row_L, position_L - 1)
        return hidden_LD, head, ids_BS[row_L, position_L].to(hidden_LD.device)

    def _group_losses(
        self,
        answers: Mapping[Group, list[tuple[RenderedTokens, RenderedTokens]]],
        hidden_LD: torch.Tensor,
        head: LMHead,
        labels_L: torch.Tensor,
    ) -> tuple[dict[Group, OnPolicyLoss], dict[Group, LossOutput]]:
        """Return the loss of each group that has a common boundary or span."""
        is_masked = any(
            self.scorers[group.teacher].event_map.student_mask is not None for group in answers
        )
        candidates = (
            candidates_from_hidden(hidden_LD, head, self.config.min_candidate_prob)
            if is_masked and self.config.min_candidate_prob
            else None
        )
        losses, outs, first = dict[Group, OnPolicyLoss](), dict[Group, LossOutput](), 0
        for group, members in answers.items():
            last = first + sum(int(own.loss_mask_T.sum()) for own, _ in members)
            one = build_on_policy_loss(
                self.scorers[group.teacher],
                members,
                self.config.objective,
                candidates and candidates.slice_positions(first, last),
            )
            if one.num_terms:
                losses[group] = one
                outs[group] = one.loss_fn(
                    hidden_LD[first:last][one.position_P],
                    head,
                    labels_L[first:last][one.position_P],
                )
            first = last
        return losses, outs

    def observe(self, terms: Mapping[str, float]) -> TripwireVerdict:
        """Compare the metrics of a step, over all processes, with the first on-policy steps."""
        return self._tripwires.observe(terms)

    def _ended_share(self, step: int) -> float:
        """Return the share of the step's answers that end with a stop token."""
        batch, begin = self._in_flight, self._first_answer(step)
        assert batch is not None  # the answers of the step were parsed
        stops = self.student.renderer.stop_ids
        answers = batch.ids[begin : begin + self.batch_size]
        return sum(len(ids) > 0 and int(ids[-1]) in stops for ids in answers) / len(answers)

    def state(self) -> bytes:
        """Return the sampled answers that are not used up, with the step that sampled them.

        The state of the tripwires is beside them.
        """
        r = self._in_flight
        if r is None:
            return b""
        return json.dumps(
            {
                "number": r.index,
                "step": r.step,
                "weights": r.weights,
                "ids": [i.tolist() for i in r.ids],
                "tripwires": self._tripwires.to_json(),
            }
        ).encode()

    def restore(self, states: tuple[bytes, ...]) -> None:
        """Restore sampled answers. All processes sample the same, so the first state serves all."""
        saved = json.loads(states[0]) if states and states[0] else None
        self._in_flight = saved and RolloutBatch(
            saved["number"],
            saved["step"],
            tuple(np.array(i, np.int32) for i in saved["ids"]),
            saved.get("weights", ""),
        )
        self._tripwires.restore((saved or {}).get("tripwires", {}))

    def _parse_answers(
        self, step: int, part: int, parts: int
    ) -> tuple[list[RolloutAnswer], Counter[str], list[int]]:
        """Return the usable answers of a step, why the others are left out, and all lengths."""
        number, index = self._batch_and_index(step)
        if index == 0 and (self._in_flight is None or self._in_flight.step != step):
            self._in_flight = self._sample(number, step)
        batch = self._in_flight
        if batch is None or batch.index != number:
            raise DataError(
                f"the sampled answers of batch {number} are missing at step {step}",
                where="train",
                remedy="resume from a checkpoint of this run, which holds them",
            )
        if step - batch.step > self.config.max_staleness_steps:
            raise RefusedError(
                f"answers sampled at step {batch.step} are too old at step {step}: "
                f"at most {self.config.max_staleness_steps} steps are allowed",
                where="train",
                remedy="raise training.on_policy.max_staleness_steps, or lower rollouts",
            )
        begin = self._first_answer(step)
        chosen = range(
            begin + self.batch_size * part // parts, begin + self.batch_size * (part + 1) // parts
        )
        parsed = [
            parse_rollout(
                self._prompt_at(number, k),
                self.student.renderer,
                batch.ids[k],
                self.config,
                self.max_tokens,
            )
            for k in chosen
        ]
        return (
            [one for one in parsed if isinstance(one, RolloutAnswer)],
            Counter(one for one in parsed if isinstance(one, str)),
            [len(batch.ids[k]) for k in chosen],
        )

    def _batch_and_index(self, step: int) -> tuple[int, int]:
        """Return the number of the step's batch of rollouts, and which part of it the step uses."""
        return divmod(
            math.floor((step - self.config.start_step) * self.config.share),
            self.config.rollouts // self.batch_size,
        )

    def _first_answer(self, step: int) -> int:
        """Return the first answer of the batch that the step uses."""
        return self._batch_and_index(step)[1] * self.batch_size

    def _prompt_at(self, batch_index: int, k: int) -> RolloutPrompt:
        """Return the prompt of the k-th answer of a batch; each epoch has its own order."""
        epoch, at = divmod(batch_index * self.config.rollouts + k, len(self.prompts))
        return self.prompts[int(prompt_order(self.seed, epoch, len(self.prompts))[at])]

    def _sample(self, batch_index: int, step: int) -> RolloutBatch:
        """Sample the answers of a batch; empty where the prompt cannot be rendered."""
        renderer = self.student.renderer
        prompts: dict[int, npt.NDArray[np.int32]] = {}
        for k in range(self.config.rollouts):
            with suppress(DataError):  # parse_rollout counts the prompt as left out
                conversation = self._prompt_at(batch_index, k).conversation
                prompts[k] = renderer.render_prompt(conversation).ids_T
        units = split_batch(list(prompts.values()), renderer.stop_ids, self.config, self.seed, step)
        sampled = self.sampler.sample(self.student, units)
        ids = (answer for one in sampled for answer in one.ids)
        answers = dict(zip(prompts, ids, strict=True))
        return RolloutBatch(
            batch_index,
            min((one.step for one in sampled), default=step),
            tuple(answers.get(k, np.empty(0, np.int32)) for k in range(self.config.rollouts)),
            next((one.weights for one in sampled), ""),
        )

    def _render_for_teachers(
        self, answers: Sequence[RolloutAnswer], skipped: Counter[str]
    ) -> dict[Group, list[tuple[RenderedTokens, RenderedTokens]]]:
        """Return (student tokens, teacher tokens) of each answer by group.

        Answers that a teacher's template or context cannot hold are counted in `skipped`.
        """
        rendered: dict[Group, list[tuple[RenderedTokens, RenderedTokens]]] = {}
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
            group = Group(
                one.rollout_prompt.teacher, one.rollout_prompt.prompt.skill, on_policy=True
            )
            rendered.setdefault(group, []).append((one.tokens, theirs))
        return rendered


@lru_cache(maxsize=2)  # a batch may lie in two epochs; 8 bytes a prompt each
def prompt_order(seed: int, epoch: int, num_prompts: int) -> npt.NDArray[np.int64]:
    """Return the order of the prompts in an epoch."""
    return np.random.default_rng([seed, epoch, PROMPT_SEED]).permutation(num_prompts)


def _zero_loss(hidden_LD: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Return 0 with a graph to every output of the forward pass.

    In distributed training each backward pass must reach every weight.
    """
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
    sampler: RolloutSampler | None = None,
) -> Rollouts:
    """Build the source of on-policy steps, with all teachers of the prompts in memory.

    Args:
        assignments: each prompt and the name of its teacher (`capture.assign_prompts`).
        student: the student.
        load_teacher: loads a teacher by name.
        event_maps: event map of each teacher.
        config: the recipe's section `training.on_policy`.
        batch_size: answers a step.
        seed: seed of prompt order and sampling.
        max_tokens: longest conversation, in student tokens.
        sampler: samples the answers; None = this process.
    """
    prompts = tuple(RolloutPrompt(prompt, name) for prompt, name in assignments)
    scorers = {
        name: TeacherScorer(load_teacher(name), event_maps[name], config.min_candidate_prob)
        for name in dict.fromkeys(one.teacher for one in prompts)
    }
    return Rollouts(
        student, prompts, scorers, config, batch_size, seed, max_tokens, sampler or OwnSampler()
    )


def _to_tensors(metrics: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Return metrics as float64 tensors."""
    import torch

    return {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
