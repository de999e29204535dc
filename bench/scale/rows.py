"""The rows of the table: what is measured, and in which arms."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One way to do the work of a row.

    Attributes:
        name: Its title; the module's `prepare` gets it.
        module: File of this folder with `prepare(name, models, folder) -> work`, where
            `work(number)` is measured and returns figures to show. It imports persea, and nothing
            of bench.
        has_earlier_build: Whether an earlier build does it too.
    """

    name: str
    module: str
    has_earlier_build: bool = False


@dataclass(frozen=True)
class Row:
    """One row: the first arm is persea's, with which the others are compared."""

    name: str
    what: str
    arms: tuple[Arm, ...]


ROWS = (
    Row(
        "score",
        "capture by scoring: Gemma 3 270M (262,144 tokens), 8 documents of about 92 tokens",
        (
            Arm("persea", "score", has_earlier_build=True),
            Arm("hidden states, head at learned positions", "score"),
            Arm("model(...).logits", "score"),
            Arm("persea, in bfloat16", "score"),
            Arm("hidden states, head at learned positions, in bfloat16", "score"),
        ),
    ),
    Row(
        "answer",
        "capture by answering: SmolLM2-135M-Instruct, 8 prompts of 34 to 238 tokens, 48 new",
        (
            Arm("persea", "answer", has_earlier_build=True),
            Arm("model.generate", "answer"),
            Arm("persea, in bfloat16", "answer"),
            Arm("model.generate, in bfloat16", "answer"),
        ),
    ),
    Row(
        "targets",
        "examples of 24 captured texts of three sentences: alignment, events, masks",
        (
            Arm("persea", "targets", has_earlier_build=True),
            Arm("persea, contexts known", "targets", has_earlier_build=True),
        ),
    ),
    Row(
        "step",
        "training step: SmolLM2-135M-Instruct, 4 documents of about 220 tokens",
        (
            Arm("persea", "step", has_earlier_build=True),
            Arm("transformers, cross-entropy", "step"),
            Arm("TRL SFT", "step"),
        ),
    ),
    Row(
        "gold",
        "that step with Gemma 3 270M as the teacher: a step's share of the first epoch",
        (
            Arm("persea, first epoch", "gold"),
            Arm("TRL's GOLD loss, teacher in the loop", "gold"),
        ),
    ),
    Row(
        "gold in bfloat16",
        "the same with products in bfloat16",
        (
            Arm("persea, first epoch, in bfloat16", "gold"),
            Arm("TRL's GOLD loss, teacher in the loop, in bfloat16", "gold"),
        ),
    ),
    Row(
        "step in bfloat16",
        "the same step with products in bfloat16, weights and moments in float32",
        (
            Arm("persea, in bfloat16", "step"),
            Arm("transformers, cross-entropy, in bfloat16", "step"),
            Arm("TRL SFT, in bfloat16", "step"),
            Arm("persea", "step"),
        ),
    ),
)
