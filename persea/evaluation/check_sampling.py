"""The conversations on which `check` runs a teacher's weights: a sample of bounded cost."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from persea.alignment.event_map import EventMap
from persea.chat.renderer import ChatRenderer
from persea.evaluation.compatibility import (
    ConversationSample,
    TemplateLikelihood,
    measure_template_likelihood,
)
from persea.evaluation.retained_mass import (
    MIN_COUNTED_PROBABILITY,
    RetainedMassFunction,
    make_retained_mass,
)
from persea.teachers.teacher import Teacher

PASSES = 3  # forward passes over an answer: in the template, without it, and for the retained mass


@dataclass(frozen=True)
class MeasuredSample:
    """Which conversations a teacher's weights are run on.

    Attributes:
        teacher: Name of the teacher.
        chosen: For each sample, the indexes of the chosen conversations, ascending.
        positions: Supervised positions of the chosen conversations.
        positions_available: Supervised positions of all conversations.
        seed: Seed of the choice.
    """

    teacher: str
    chosen: tuple[tuple[int, ...], ...]
    positions: int
    positions_available: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, without the indexes."""
        return {k: v for k, v in asdict(self).items() if k != "chosen"}

    @property
    def num_conversations(self) -> int:
        """Number of chosen conversations."""
        return sum(map(len, self.chosen))


def choose_measured(
    teacher_name: str,
    samples: Sequence[ConversationSample],
    renderer: ChatRenderer,
    max_logits: int,
    seed: int,
) -> MeasuredSample:
    """Choose conversations until their cost reaches a limit.

    The cost counts logits, tokens x vocabulary x PASSES, and not seconds, so the choice is the same
    on every machine. Samples take turns, so that each skill and language has about as many
    conversations; each has at least one, the shortest of it if the limit is lower than that.

    Args:
        teacher_name: Name for the result.
        samples: Conversations by skill and language.
        renderer: The teacher's renderer.
        max_logits: The limit.
        seed: Seed of the order in which each sample's conversations are taken.
    """
    tokens = [
        [(len(t), int(t.loss_mask_T.sum())) for t in sample.render(renderer)] for sample in samples
    ]
    max_tokens = max_logits // (PASSES * len(renderer.vocabulary))
    if sum(n for some in tokens for n, _ in some) <= max_tokens:
        chosen = [set(range(len(some))) for some in tokens]
    else:
        orders = [list(range(len(some))) for some in tokens]
        for sample, order in zip(samples, orders, strict=True):
            random.Random(f"{seed} {sample.skill} {sample.language}").shuffle(order)
        chosen = _take_turns(orders, [[n for n, _ in some] for some in tokens], max_tokens)
    return MeasuredSample(
        teacher_name,
        tuple(tuple(sorted(some)) for some in chosen),
        sum(tokens[k][i][1] for k, some in enumerate(chosen) for i in some),
        sum(n for some in tokens for _, n in some),
        seed,
    )


def _take_turns(
    orders: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], max_tokens: int
) -> list[set[int]]:
    """Take one conversation of each sample after another while they fit, at least one of each."""
    chosen: list[set[int]] = [set() for _ in orders]
    for turn in range(max(map(len, orders), default=0)):
        for k, order in enumerate(orders):
            if turn < len(order) and lengths[k][order[turn]] <= max_tokens:
                chosen[k].add(order[turn])
                max_tokens -= lengths[k][order[turn]]
    return [
        some or ({min(order, key=n.__getitem__)} if order else set())
        for some, order, n in zip(chosen, orders, lengths, strict=True)
    ]


def chosen_conversations(
    samples: Sequence[ConversationSample], measured: MeasuredSample
) -> list[ConversationSample]:
    """Return the samples with the chosen conversations only."""
    return [
        ConversationSample(
            sample.skill,
            sample.language,
            tuple(sample.conversations[i] for i in some),
            tuple(sample.labels[i] for i in some),
        )
        for sample, some in zip(samples, measured.chosen, strict=True)
    ]


@dataclass(frozen=True)
class MeasuredWeights:
    """What a teacher's weights say about a sample.

    Attributes:
        measured: The conversations they were run on.
        likelihoods: Bits per byte with and without the chat template.
        retained_mass: Measures the retained mass.
        samples: The samples that `measured` chose from.
    """

    measured: MeasuredSample
    likelihoods: list[TemplateLikelihood]
    retained_mass: RetainedMassFunction
    samples: Sequence[ConversationSample]

    def chosen_of(self, sample: ConversationSample) -> tuple[int, ...]:
        """Return the indexes of the chosen conversations of a sample; () = not measured."""
        found = [k for k, one in enumerate(self.samples) if one is sample]
        return self.measured.chosen[found[0]] if found else ()


def measure_weights(
    teacher: Teacher,
    event_map: EventMap,
    samples: Sequence[ConversationSample],
    max_logits: int,
    seed: int,
    min_counted_probability: float = MIN_COUNTED_PROBABILITY,
    progress: Callable[[float, str], None] = lambda share, words: None,
    *,
    with_template: bool = True,
) -> MeasuredWeights:
    """Measure a teacher's likelihoods, and prepare the measurement of its retained mass.

    Args:
        teacher: The teacher; its engine must have full distributions.
        event_map: Event map to the student.
        samples: Conversations with reference answers.
        max_logits: See `choose_measured`.
        seed: See `choose_measured`.
        min_counted_probability: See `make_retained_mass`.
        progress: Called with the fraction done, and words, after each answer.
        with_template: Whether the teacher has a chat template, whose cost is measured. Documents
            have none in any case.
    """
    measured = choose_measured(teacher.name, samples, teacher.renderer, max_logits, seed)
    answered = [s for s in chosen_conversations(samples, measured) if not s.is_documents]
    answered = answered if with_template else []
    total = measured.num_conversations + sum((PASSES - 1) * len(s.conversations) for s in answered)
    passes = 0

    def count(num_passes: int, what: str) -> None:
        nonlocal passes
        passes += num_passes
        words = f"{teacher.name}: {what}, {measured.positions:,} of"
        words += f" {measured.positions_available:,} positions"
        progress(min(1.0, passes / max(1, total)), words)

    count(0, "likelihood")
    likelihoods = measure_template_likelihood(
        teacher, answered, partial(count, PASSES - 1, "likelihood")
    )
    mass = make_retained_mass(
        teacher, event_map, min_counted_probability, partial(count, 1, "retained mass")
    )
    return MeasuredWeights(measured, likelihoods, mass, samples)


def describe_measured(measured: Mapping[str, Any]) -> str:
    """Return what the weights were run on, in words."""
    if measured["positions"] == measured["positions_available"]:
        return f"{measured['teacher']}: measured on all {measured['positions']:,} positions"
    return (
        f"{measured['teacher']}: likelihood and retained mass measured on "
        f"{measured['positions']:,} of {measured['positions_available']:,} positions, a sample "
        f"with seed {measured['seed']} (more: check.max_measured_logits)"
    )
