"""Estimates of a run's cost before it starts: disk, memory, and seconds.

Disk follows from shapes and is exact to some percent. Memory and seconds are rough: each constant
below says how it was measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persea.data.prompts import Prompt
from persea.models.placement import compute_device
from persea.models.sizes import ModelSize
from persea.pipeline.remote_teachers import is_remote

if TYPE_CHECKING:
    from persea.chat.renderer import ChatRenderer
    from persea.config.schema import StudentSection, TrainingSection
    from persea.pipeline.run_context import RunContext

BYTES_PER_PARAMETER = 4  # float32
ADAM_COPIES = 3  # a checkpoint holds each trained weight and its two Adam moments
TRAINING_COPIES = 4  # in memory: weight, gradient, and two moments
# Measured on SmolLM2-135M (30 layers, hidden 576): 360 tokens of a step need 0.9 GB more than its
# weights, gradients and moments.
ACTIVATION_FLOATS = 34  # for each token, layer and hidden unit
PROCESS_BYTES = 600_000_000  # Python, torch and transformers
LOGIT_BYTES = 800_000_000  # three copies of TransformersEngine's largest block of logits
# Shares of the speed of a large matrix product. Measured on two cores: a capture of Gemma 3 270M
# (2 operations a weight and token) reaches .2 of it, since 262,144 probabilities a token are
# normalised and sampled; a training step of SmolLM2-135M (6 operations) .5.
CAPTURE_EFFICIENCY, TRAINING_EFFICIENCY = 0.2, 0.5
CALIBRATION_S = 0.3
CALIBRATION_WIDTH = 1024
SAMPLED_PROMPTS = 64  # whose length stands for that of all


@dataclass(frozen=True)
class StageCost:
    """A rough cost of a stage.

    Attributes:
        seconds: Seconds on this machine; None = unknown, such as behind a server.
        memory_bytes: Peak memory; None = unknown.
        tokens: Tokens that the stage computes.
        is_upper_bound: Whether answers that are not there yet count with their greatest length.
    """

    seconds: float | None
    memory_bytes: int | None
    tokens: int
    is_upper_bound: bool = False

    def describe(self) -> str:
        """Return the cost in words."""
        parts = [f"{'at most ' if self.is_upper_bound else ''}{self.tokens:,} tokens"]
        if self.memory_bytes is not None:
            parts.append(f"about {self.memory_bytes / 1e9:.1f} GB of memory")
        if self.seconds is not None:
            parts.append(f"about {format_duration(self.seconds)}")
        return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Return a duration to one or two digits: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def measure_matmul_speed() -> tuple[float, str]:
    """Return this machine's operations a second in a large matrix product, and the device.

    Takes CALIBRATION_S; the best of several products counts, so that other work disturbs it less.
    """
    import torch

    device = compute_device().type
    width = CALIBRATION_WIDTH
    a = torch.ones((width, width), device=device)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < CALIBRATION_S or best == float("inf"):
        before = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - before)
    return 2 * width**3 / best, device


def checkpoint_bytes(size: ModelSize, student: StudentSection) -> int:
    """Return the size of one checkpoint: the trained weights, all or LoRA's, and their moments."""
    num_trained = size.num_parameters
    if student.lora:
        num_trained = size.num_adapter_parameters(student.lora.rank, student.lora.targets)
    return BYTES_PER_PARAMETER * ADAM_COPIES * num_trained


def training_bytes(
    size: ModelSize | None, student: StudentSection, training: TrainingSection
) -> int | None:
    """Return the bytes that a training adds to the disk at its peak; None = unknown size.

    The peak is either when a checkpoint is written before the oldest is deleted, or when the
    student is saved beside the last two.
    """
    from persea.training.checkpoint import MAX_CHECKPOINTS  # imports torch

    if size is None:
        return None
    saves = -(-training.steps // training.checkpoint_every)
    one = checkpoint_bytes(size, student)
    kept = min(saves, MAX_CHECKPOINTS) * one
    return max(min(saves, MAX_CHECKPOINTS + 1) * one, kept + size.num_parameters * 4)


def existing_ancestor(path: Path) -> Path:
    """Return the nearest existing ancestor."""
    while not path.exists():
        path = path.parent
    return path


def mean_tokens(
    prompts: Sequence[Prompt], renderer: ChatRenderer, max_new_tokens: int, *, given: bool
) -> tuple[float, float]:
    """Return the mean length of a conversation and of its answer, in tokens, from a sample.

    Args:
        prompts: The corpus.
        renderer: The tokenizer and template that count.
        max_new_tokens: Length of an answer that is not there yet: the most that it can have.
        given: Whether the prompts bring their answers.
    """
    sample = prompts[:: max(1, len(prompts) // SAMPLED_PROMPTS)][:SAMPLED_PROMPTS]
    whole = answered = 0
    for prompt in sample:
        text = " ".join(part.text for part in prompt.conversation.parts())
        num_prompt = len(renderer.vocabulary.encode(text))
        if prompt.conversation.is_document:
            num_prompt, num_answer = 0, num_prompt
        elif given:
            num_answer = len(renderer.vocabulary.encode(prompt.given_text))
        else:
            num_answer = max_new_tokens
        whole, answered = whole + num_prompt + num_answer, answered + num_answer
    n = max(1, len(sample))
    return whole / n, answered / n


def has_given_texts(context: RunContext) -> bool:
    """Return whether no teacher writes an answer: all are given, or plain texts."""
    return context.are_answers_given or all(
        p.conversation.is_document for p in context.corpus.prompts
    )


def capture_cost(context: RunContext, speed: float) -> StageCost:
    """Estimate the cost of a capture that asks every teacher for an equal part of the corpus."""
    models, capture = context.models, context.recipe.capture
    prompts, names = context.corpus.prompts, context.models.teacher_names
    given = has_given_texts(context)
    tokens, seconds, memory, is_known = 0.0, 0.0, 0, True
    for name in names:
        limit = models.teacher_ref(name).generation.max_new_tokens or capture.max_new_tokens
        whole, answer = mean_tokens(prompts, models.renderers[name], limit, given=given)
        # an answer that is generated is computed once more to be scored
        own = (whole + (0 if given else answer)) * context.num_prompts / len(names)
        tokens += own
        size = models.teacher_sizes[name]
        if size is None:
            is_known = is_known and is_remote(models.teacher_ref(name))
            continue
        seconds += own * 2 * size.num_parameters / (speed * CAPTURE_EFFICIENCY)
        weights = BYTES_PER_PARAMETER * size.num_parameters
        memory = max(memory, PROCESS_BYTES + LOGIT_BYTES + weights)
    return StageCost(
        seconds if is_known and seconds else None, memory or None, round(tokens), not given
    )


def training_cost(context: RunContext, speed: float) -> StageCost:
    """Estimate the cost of the training."""
    recipe, size = context.recipe, context.models.student_size
    training, given = context.training, has_given_texts(context)
    whole, _ = mean_tokens(
        context.corpus.prompts,
        context.models.student_renderer,
        recipe.capture.max_new_tokens,
        given=given,
    )
    a_step = min(whole, training.max_length) * training.batch_size
    tokens = round(a_step * training.steps)
    if size is None:
        return StageCost(None, None, tokens, not given)
    num_trained = checkpoint_bytes(size, recipe.student) // (BYTES_PER_PARAMETER * ADAM_COPIES)
    activations = (
        a_step
        / training.gradient_accumulation_steps
        * size.layers
        * size.hidden
        * ACTIVATION_FLOATS
    )
    if training.gradient_checkpointing:
        activations /= ACTIVATION_FLOATS / 2
    memory = PROCESS_BYTES + BYTES_PER_PARAMETER * (
        size.num_parameters + (TRAINING_COPIES - 1) * num_trained + activations
    )
    operations = tokens * (4 * size.num_parameters + 2 * num_trained)
    return StageCost(operations / (speed * TRAINING_EFFICIENCY), round(memory), tokens, not given)
