"""Recipe sections of the training: loss, optimiser, batches, and on-policy distillation."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, model_validator

from persea.config.optimization import OptimizerName, SavedDtype, WeightDecayOn
from persea.config.section import BY_SIZE, MAX_COUNT, RecipeSection, check_contradictions


class LRSchedule(StrEnum):
    """Shape of the learning rate after the warm-up.

    COSINE: half a cosine from the peak to the minimum.
    LINEAR: a straight line from the peak to the minimum.
    CONSTANT: the peak.
    WSD: warm-up, stable, linear decay (Hu et al. 2024, MiniCPM, arXiv 2404.06395). Only the last
    stretch depends on the number of steps, so a run can be made longer without a new start.
    """

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    WSD = "wsd"


class LossBalancing(StrEnum):
    """Weight of a position: NONE = all equal, DEVIATION = by the scale of its group's losses."""

    NONE = "none"
    DEVIATION = "deviation"


class OnPolicySection(RecipeSection):
    """Training on the student's own answers, scored by the teachers."""

    start_step: int = Field(
        ge=0,
        le=MAX_COUNT,
        description="first on-policy step; before it the student learns from the teachers' "
        "answers, because it must be able to answer first",
    )
    share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the steps from then on that use the student's own answers",
    )
    rollouts: int = Field(
        default=64,
        ge=1,
        le=MAX_COUNT,
        description="answers sampled at once; each on-policy step uses `batch_size` of them",
    )
    rollouts_per_unit: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="answers of a unit of work: where `executor:` has several workers, they sample "
        "the units of `rollouts` side by side; another number draws other answers. null = all, in "
        "the process of the training",
    )
    max_staleness_steps: int = Field(
        default=8,
        ge=0,
        le=MAX_COUNT,
        description="oldest answer that may be trained on, in steps since it was sampled",
    )
    max_new_tokens: int = Field(
        default=64,
        ge=1,
        le=MAX_COUNT,
        description="longest answer, in the student's tokens",
        json_schema_extra=BY_SIZE,
    )
    temperature: float = Field(
        default=1.0, gt=0, le=2, description="sampling temperature; 1 is the student's distribution"
    )
    objective: Literal["events", "span_likelihood"] = Field(
        default="events",
        description="events = reverse KL at every common boundary; span_likelihood = compare the "
        "likelihoods of the text between two common boundaries",
    )
    truncated: Literal["keep", "drop"] = Field(
        default="keep",
        description="answers cut off at `max_new_tokens`: keep = train on them, drop = leave them "
        "out",
    )
    min_candidate_prob: float = Field(
        default=1e-4,
        ge=0,
        lt=1,
        description="tokens of at least this probability are tested for impossibility at a common "
        "boundary; 0 = all tokens, which takes seconds a boundary",
    )
    min_loop_repeats: int = Field(
        default=4,
        ge=2,
        le=MAX_COUNT,
        description="repetitions in a row after which an answer counts as a loop and is left out",
    )
    max_loop_period: int = Field(
        default=64, ge=1, le=MAX_COUNT, description="longest repeated stretch, in tokens"
    )
    min_loop_tokens: int = Field(
        default=12,
        ge=1,
        le=MAX_COUNT,
        description="least tokens of a loop: 'ha ha ha ha' is no loop",
    )
    tripwire_steps: int = Field(
        default=10,
        ge=0,
        le=MAX_COUNT,
        description="the training ends with exit code 4 where the means of so many latest "
        "on-policy steps leave the limits below, as fractions of the means of so many first ones; "
        "0 = never",
    )
    min_length_ratio: float = Field(
        default=0.25, ge=0, le=1, description="least mean length of the student's answers"
    )
    max_length_ratio: float = Field(
        default=4.0, ge=1, description="largest mean length of the student's answers"
    )
    min_ended_ratio: float = Field(
        default=0.5, ge=0, le=1, description="least share of answers that end by themselves"
    )
    min_entropy_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="least entropy of the student's distributions along its answers",
    )
    max_entropy_ratio: float = Field(
        default=4.0,
        ge=1,
        description="largest entropy of the student's distributions along its answers",
    )


class LossTerm(RecipeSection):
    """One loss of a weighted sum. The names are those of `persea.losses.LOSSES`."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9_]*$", description="name of the loss, such as event_kl"
    )
    weight: float = Field(default=1.0, gt=0, le=MAX_COUNT, description="factor of the loss")


class TrainingSection(RecipeSection):
    """Loss, optimiser and batches. docs/results.md, points 5 and 7, decided the loss defaults."""

    steps: int = Field(
        default=1500,
        ge=1,
        le=MAX_COUNT,
        description="optimiser steps; not given = `num_train_epochs`, or by the student's size",
        json_schema_extra=BY_SIZE,
    )
    num_train_epochs: float | None = Field(
        default=None,
        gt=0,
        le=MAX_COUNT,
        description="passes over the corpus, instead of `steps`",
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        le=MAX_COUNT,
        description="conversations a step, over all devices and all `gradient_accumulation_steps`",
        json_schema_extra=BY_SIZE,
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="peak learning rate; not given = by the number of the student's weights, see "
        "docs/train.md",
    )
    warmup_steps: int = Field(
        default=50,
        ge=0,
        le=MAX_COUNT,
        description="steps until the peak learning rate; not given = `warmup_ratio`, or by the "
        "student's size",
        json_schema_extra=BY_SIZE,
    )
    warmup_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the steps until the peak learning rate, instead of `warmup_steps`",
    )
    event_weight: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="weight of the event loss at common boundaries; cross-entropy has the rest",
    )
    partial_tokens: bool = Field(
        default=False,
        description="use a teacher's distribution also for student tokens that begin inside a "
        "teacher token; false = cross-entropy alone there",
    )
    objective: Literal["events", "sft"] = Field(
        default="events",
        description="events = the teachers' distributions and their text; sft = their text alone "
        "(supervised fine-tuning)",
    )
    loss: tuple[LossTerm, ...] = Field(
        default=(),
        description="weighted sum of losses instead of `objective` and `event_weight`, such as "
        "[{name: event_kl, weight: 0.7}, {name: cross_entropy, weight: 0.3}]",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32",
        description="of matrix products; weights and optimiser moments are float32 in both; auto "
        "= bfloat16 where the processor or GPU has instructions for it, else float32",
        json_schema_extra=BY_SIZE,
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, about a third more "
        "time",
        json_schema_extra=BY_SIZE,
    )
    packing: bool = Field(
        default=False,
        description="put several short conversations into one row, without attention between "
        "them, instead of padding",
    )
    optim: OptimizerName = Field(
        default=OptimizerName.ADAMW,
        description="optimiser: adamw_torch, adamw_torch_fused, adamw_8bit (needs bitsandbytes and "
        "a GPU), or muon (matrices of the layers; AdamW steps the other weights)",
        json_schema_extra=BY_SIZE,
    )
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="the optimiser's decay")
    weight_decay_on: WeightDecayOn = Field(
        default=WeightDecayOn.MATRICES,
        description="weights that decay: matrices = all but norms and biases; all = every weight",
    )
    torch_compile: bool = Field(
        default=False,
        description="compile the student's forward pass; needs a C++ compiler, and some minutes "
        "at the first steps",
    )
    save_dtype: SavedDtype = Field(
        default=SavedDtype.AUTO,
        description="type of the saved weights: auto = the type that its base is stored in",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=MAX_COUNT, description="gradients are clipped to this norm"
    )
    max_length: int = Field(
        default=512,
        ge=8,
        le=MAX_COUNT,
        description="longest conversation, in student tokens; longer ones are left out",
        json_schema_extra=BY_SIZE,
    )
    checkpoint_every: int = Field(
        default=200, ge=1, le=MAX_COUNT, description="steps between checkpoints"
    )
    log_every: int = Field(
        default_factory=lambda seen: min(10, max(1, seen.get("steps", 0) // 100)),
        ge=1,
        le=MAX_COUNT,
        description="steps between lines of the log (default: a hundredth of the steps, at most "
        "10)",
    )
    lr_scheduler_type: LRSchedule = Field(
        default=LRSchedule.COSINE,
        description="learning rate after the warm-up: cosine, linear, constant, or wsd (stable, "
        "then linear decay)",
    )
    cooldown: float | None = Field(
        default_factory=lambda seen: 0.2 if seen["lr_scheduler_type"] == "wsd" else None,
        gt=0,
        le=1,
        validate_default=True,
        description="share of the steps in which it decays; only with `lr_scheduler_type: wsd`",
    )
    gradient_accumulation_steps: int = Field(
        default=1,
        ge=1,
        le=MAX_COUNT,
        description="parts that a batch is split into, one after another, to need less memory; "
        "`batch_size` is the sum of all parts",
        json_schema_extra=BY_SIZE,
    )
    eval_steps: int = Field(
        default=0,
        ge=0,
        le=MAX_COUNT,
        description="steps between validation losses; 0 = no validation",
    )
    validation_share: float | None = Field(
        default_factory=lambda seen: 0.05 if seen["eval_steps"] else None,
        gt=0,
        le=0.5,
        validate_default=True,
        description="share of the examples for validation, in whole batches; only with "
        "`eval_steps`",
    )
    shuffle_window_blocks: int = Field(
        default=64,
        ge=1,
        le=MAX_COUNT,
        description="blocks of about 4,096 captured tokens that are shuffled together in an epoch",
    )
    store_examples: bool = Field(
        default=True,
        description="keep the training examples in `examples/` of the run folder, about 4 times the"
        " captures, so that later starts and other processes read them",
    )
    max_skipped_steps: int = Field(
        default=3,
        ge=0,
        le=MAX_COUNT,
        description="steps that may be skipped because loss or gradient is not finite, before the "
        "training fails",
    )
    loss_balancing: LossBalancing = Field(
        default=LossBalancing.NONE,
        description="weight of a position: none = all equal; deviation = by the scale of its "
        "teacher's and skill's losses, so that none dominates",
    )
    balance_half_life_steps: float = Field(
        default=50,
        gt=0,
        le=MAX_COUNT,
        description="loss balancing: steps after which a step's losses count for half",
    )
    balance_max_ratio: float = Field(
        default=2.0,
        ge=1,
        le=MAX_COUNT,
        description="loss balancing: largest weight of a group relative to equal weights, and the "
        "inverse of the smallest",
    )
    balance_prior_tokens: float = Field(
        default=200,
        ge=0,
        le=MAX_COUNT,
        description="loss balancing: tokens at the overall scale that every group starts with",
    )
    min_learning_rate_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="last learning rate as a share of the peak",
    )
    adam_beta1: float = Field(
        default=0.9, ge=0, lt=1, description="AdamW: decay of the mean of gradients"
    )
    adam_beta2: float = Field(
        default=0.98, ge=0, lt=1, description="AdamW: decay of the mean of squared gradients"
    )
    adam_epsilon: float = Field(
        default=1e-8, gt=0, le=1, description="AdamW: added to the root of that mean"
    )
    report_to: Literal["tensorboard", "trackio", "wandb"] | None = Field(
        default=None, description="tracker that receives the metrics too"
    )
    on_policy: OnPolicySection | None = Field(
        default=None, description="train on the student's own answers too; not given = never"
    )

    @model_validator(mode="after")
    def _check_unused_keys(self) -> Self:
        return check_contradictions(
            self,
            (
                self.lr_scheduler_type is not LRSchedule.WSD and self.cooldown is not None,
                ("cooldown",),
                f"given, but `lr_scheduler_type` is {self.lr_scheduler_type}",
                "write `lr_scheduler_type: wsd`, or delete `cooldown:`",
            ),
            (
                not self.eval_steps and self.validation_share is not None,
                ("validation_share",),
                "given, but `eval_steps` is 0",
                "write `eval_steps: 100`, or delete `validation_share:`",
            ),
            (
                self.gradient_accumulation_steps > self.batch_size,
                ("gradient_accumulation_steps",),
                f"{self.gradient_accumulation_steps} parts of a batch of {self.batch_size}",
                "at most one a conversation",
            ),
            *(
                (
                    {exact, relative} <= self.model_fields_set
                    and getattr(self, relative) is not None,
                    (relative,),
                    f"given together with `{exact}`",
                    f"delete `{relative}:` or `{exact}:`",
                )
                for exact, relative in (
                    ("steps", "num_train_epochs"),
                    ("warmup_steps", "warmup_ratio"),
                )
            ),
        )

    @model_validator(mode="after")
    def _check_rollout_age(self) -> Self:
        on = self.on_policy
        if on is None:
            return self
        oldest = math.ceil((on.rollouts / self.batch_size - 1) / on.share)
        return check_contradictions(
            self,
            (
                on.start_step >= self.steps and self.num_train_epochs is None,
                ("on_policy", "start_step"),
                f"{on.start_step}, but there are {self.steps} steps",
                "fewer, or more `steps`",
            ),
            (
                on.rollouts % self.batch_size > 0,
                ("on_policy", "rollouts"),
                f"{on.rollouts} is not a multiple of `batch_size`, {self.batch_size}",
                "a multiple of it",
            ),
            (
                oldest > on.max_staleness_steps,
                ("on_policy", "max_staleness_steps"),
                f"{on.max_staleness_steps}, but the last of {on.rollouts} answers is {oldest} "
                "steps old when used",
                "a larger `max_staleness_steps`, fewer `rollouts`, or a larger `batch_size` or "
                "`share`",
            ),
        )

    @property
    def loss_terms(self) -> tuple[tuple[str, float], ...]:
        """Name and weight of each loss, also where `objective` and `event_weight` give them."""
        if self.loss:
            return tuple((term.name, term.weight) for term in self.loss)
        if self.objective == "sft" or not self.event_weight:
            return (("cross_entropy", 1.0),)
        terms = (("event_kl", self.event_weight), ("cross_entropy", 1 - self.event_weight))
        return tuple((name, weight) for name, weight in terms if weight)

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        uses_targets = any(name != "cross_entropy" for name, _ in self.loss_terms)
        given = self.model_fields_set & {"objective", "event_weight"} if self.loss else set()
        names = [term.name for term in self.loss]
        return check_contradictions(
            self,
            (
                self.partial_tokens and self.objective == "sft",
                ("partial_tokens",),
                "given, but `objective` is sft",
                "write `objective: events`, or delete `partial_tokens:`",
            ),
            (
                self.partial_tokens and bool(self.loss) and not uses_targets,
                ("partial_tokens",),
                "given, but `loss` has no loss of the teachers' distributions",
                "add event_kl, or delete `partial_tokens:`",
            ),
            (
                bool(given),
                ("loss",),
                f"given together with {' and '.join(f'`{key}`' for key in sorted(given))}",
                f"delete {' and '.join(f'`{key}:`' for key in sorted(given))}; the weights of "
                "`loss` replace them",
            ),
            (
                len(set(names)) < len(names),
                ("loss",),
                "a loss is named twice",
                "add the weights and name it once",
            ),
        )
