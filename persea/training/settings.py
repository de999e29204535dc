"""Settings of the training loop, made from a recipe's section `training`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from persea.config.optimization import OptimizerName, WeightDecayOn
from persea.config.schema import LossBalancing, LRSchedule, TrainingSection
from persea.training import loss_balancing as balance
from persea.training.loss_balancing import Group, GroupScale, GroupStats
from persea.training.lr_schedule import MIN_LEARNING_RATE_RATIO, learning_rate_at_step


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of the loop. The defaults of a recipe are those of the section `training`.

    Attributes:
        steps: number of optimiser steps.
        learning_rate: peak learning rate.
        warmup_steps: steps of the linear warm-up.
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of metrics.jsonl.
        seed: seed of all random generators.
        max_skipped_steps: steps that may be skipped because loss or gradient is not finite.
        schedule: shape of the learning rate.
        cooldown_share: share of the steps in which WSD falls.
        micro_batches: parts in which a process works through its share of a batch.
        evaluate_every: steps between held-out losses; 0 = never.
        loss_balancing: whether groups are weighted by the scale of their losses.
        balance_half_life_steps: see `loss_balancing.update_scales`.
        balance_max_ratio: see `loss_balancing.group_weights`.
        balance_prior_tokens: see `loss_balancing.group_weights`.
        min_learning_rate_ratio: last learning rate relative to the peak.
        adam_betas: AdamW's decay of the mean gradient and of the mean squared gradient.
        adam_epsilon: AdamW's epsilon.
        optim: name of the optimiser.
        weight_decay_on: weights that decay.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    checkpoint_every: int
    log_every: int
    seed: int
    max_skipped_steps: int
    schedule: LRSchedule = LRSchedule.COSINE
    cooldown_share: float = 0.0
    micro_batches: int = 1
    evaluate_every: int = 0
    loss_balancing: LossBalancing = LossBalancing.NONE
    balance_half_life_steps: float = balance.HALF_LIFE_STEPS
    balance_max_ratio: float = balance.MAX_WEIGHT_RATIO
    balance_prior_tokens: float = balance.PRIOR_TOKENS
    min_learning_rate_ratio: float = MIN_LEARNING_RATE_RATIO
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_epsilon: float = 1e-8
    optim: OptimizerName = OptimizerName.ADAMW
    weight_decay_on: WeightDecayOn = WeightDecayOn.MATRICES

    @classmethod
    def from_section(
        cls, section: TrainingSection, seed: int, learning_rate: float
    ) -> TrainingSettings:
        """Return the settings of a recipe's section `training`.

        Args:
            section: The section.
            seed: Seed of all random generators.
            learning_rate: The section's learning rate, or the default of the student's size.
        """
        return cls(
            steps=section.steps,
            learning_rate=learning_rate,
            warmup_steps=section.warmup_steps,
            weight_decay=section.weight_decay,
            max_grad_norm=section.max_grad_norm,
            checkpoint_every=section.checkpoint_every,
            log_every=section.log_every,
            seed=seed,
            max_skipped_steps=section.max_skipped_steps,
            schedule=section.lr_scheduler_type,
            cooldown_share=section.cooldown or 0.0,
            micro_batches=section.gradient_accumulation_steps,
            evaluate_every=section.eval_steps,
            loss_balancing=section.loss_balancing,
            balance_half_life_steps=section.balance_half_life_steps,
            balance_max_ratio=section.balance_max_ratio,
            balance_prior_tokens=section.balance_prior_tokens,
            min_learning_rate_ratio=section.min_learning_rate_ratio,
            adam_betas=(section.adam_beta1, section.adam_beta2),
            adam_epsilon=section.adam_epsilon,
            optim=section.optim,
            weight_decay_on=section.weight_decay_on,
        )

    def learning_rate_at_step(self, step: int) -> float:
        """Return the learning rate of a step."""
        return learning_rate_at_step(
            step,
            total_steps=self.steps,
            peak_learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            cooldown_share=self.cooldown_share,
            min_ratio=self.min_learning_rate_ratio,
        )

    def update_scales(
        self, scales: Mapping[Group, GroupScale], group_stats: Mapping[Group, GroupStats]
    ) -> Mapping[Group, GroupScale]:
        """Return the scales after a step; unchanged without loss balancing."""
        if self.loss_balancing is LossBalancing.NONE:
            return scales
        return balance.update_scales(scales, group_stats, self.balance_half_life_steps)
