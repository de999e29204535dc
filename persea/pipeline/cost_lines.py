"""One line of cost for each stage and model, on this machine or on a fleet of accelerators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from persea.config.recipe import Recipe
from persea.models.facts import ModelFacts
from persea.pipeline.hardware import (
    Fleet,
    ServedSpeed,
    efficiency,
    expected_failures,
    refuse_unfit_student,
    served_speed,
    training_operations,
)
from persea.pipeline.model_refs import STUDENT
from persea.pipeline.workload import SkillWork

# Bytes of a stored position with its token, and threshold: docs/cache.md, a vocabulary of 152,000
# tokens. An answer that the teacher wrote is as certain as "reasoning" there.
WRITTEN_BYTES = {0.01: 11.68, 0.02: 8.9, 0.05: 6.36, 0.1: 5.08}
GIVEN_BYTES = {0.01: 52.88, 0.02: 34.31, 0.05: 19.61, 0.1: 13.09}
TOPK_WRITTEN_BYTES, TOPK_GIVEN_BYTES = 53.0, 316.0  # `distributions: topk` at max_kl .01
ANSWER_TEXT_BYTES = 1.6  # of a token's text, four bytes that zlib packs
ACTIVATION_BYTES = 2 * 34  # a token, layer and hidden unit, in 16 bits (persea.pipeline.cost)
CHECKPOINTED_BYTES = 2 * 2  # with gradient checkpointing
TOKENS_OF_A_UNIT = 1 << 20


@dataclass(frozen=True)
class CostLine:
    """The cost of one stage for one model.

    Attributes:
        stage: The stage.
        model: The model; "" = all.
        tokens_written: Tokens that it generates.
        tokens_read: Tokens that it reads, scores or is trained on.
        seconds: Seconds by the clock; None = unknown, such as behind a server.
        gpu_hours: Accelerators times hours; None = unknown.
        memory_bytes: Peak memory, of one accelerator on a fleet; None = unknown.
        disk_bytes: Bytes that it adds to the disk.
        network_bytes: Bytes that cross the network: weights, and a cache that is not local.
        money: gpu_hours times the price; None = no price is given.
        cpu_seconds: Seconds of this process on all cores, where they were measured.
        is_upper_bound: Whether answers count with the most that they may have.
        basis: How the time was got.
    """

    stage: str
    model: str
    tokens_written: int
    tokens_read: int
    seconds: float | None
    gpu_hours: float | None
    memory_bytes: int | None
    disk_bytes: int
    network_bytes: int
    money: float | None
    cpu_seconds: float | None = None
    is_upper_bound: bool = False
    basis: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Way:
    """One way to use a teacher, and its accelerator hours.

    Attributes:
        teacher: The teacher.
        kind: "dense", or "MoE" if a token uses a part of its weights.
        cached: Teacher once, then training from the cache.
        online: Teacher reads the same answers in every step of the training.
        on_policy: Student answers each prompt, the teacher reads the answers, the student learns.
        step_ratio: Cost of an online step over that of a cached one.
    """

    teacher: str
    kind: str
    cached: float
    online: float
    on_policy: float
    step_ratio: float


def bytes_per_position(recipe: Recipe, *, given: bool) -> float:
    """Return the bytes of a captured position with its text.

    Args:
        recipe: The recipe.
        given: Whether the text is given, and not the teacher's own.
    """
    if recipe.capture.distributions == "topk":
        return (TOPK_GIVEN_BYTES if given else TOPK_WRITTEN_BYTES) + ANSWER_TEXT_BYTES
    table = GIVEN_BYTES if given else WRITTEN_BYTES
    threshold = recipe.capture.sampling_threshold or 0.02
    nearest = max((t for t in table if t <= threshold), default=min(table))
    return table[nearest] + ANSWER_TEXT_BYTES


def captured_bytes(recipe: Recipe, work: SkillWork) -> float:
    """Return the bytes of a skill's captured answers and texts."""
    return work.prompts * work.answer_tokens * bytes_per_position(
        recipe, given=False
    ) + work.scored * work.scored_tokens * bytes_per_position(recipe, given=True)


def teacher_tokens(works: Iterable[SkillWork], name: str) -> tuple[float, float]:
    """Return the tokens that a teacher writes, and those it reads: prompts, and all it scores."""
    written = read = 0.0
    for work in works:
        share = work.shares.get(name, 0.0)
        written += share * work.prompts * work.answer_tokens
        read += share * work.prompts * (2 * work.prompt_tokens + work.answer_tokens)
        read += share * work.scored * (work.scored_tokens + work.prompt_tokens)
    return written, read


def fleet_lines(
    recipe: Recipe,
    works: Sequence[SkillWork],
    student: ModelFacts,
    teachers: Mapping[str, ModelFacts],
    fleet: Fleet,
    trained_parameters: int,
    price: float | None,
) -> list[CostLine]:
    """Return the costs of capture and training on a fleet, behind servers such as vLLM.

    Args:
        recipe: The recipe; its training counts in steps.
        works: What is captured.
        student: Facts of the student.
        teachers: Teacher -> its facts.
        fleet: The accelerators.
        trained_parameters: Weights that are trained.
        price: Price of an accelerator for an hour; None = unknown.

    Raises:
        RefusedError: A model does not fit. The remedy is the nearest thing that does.
    """
    lines = []
    for name, facts in teachers.items():
        ref = next(t for t in recipe.teachers if t.name == name)
        written, read = teacher_tokens(works, name)
        if not written + read:
            continue
        context = max(w.sequence_tokens for w in works if name in w.shares)
        speed = served_speed(facts, fleet, ref.quantize, context, f"teachers.{name}")
        stored = sum(captured_bytes(recipe, w) * w.shares.get(name, 0.0) for w in works)
        line = _served_line("capture", name, written, read, facts, speed, fleet, stored, price)
        upper = any(w.is_upper_bound for w in works if name in w.shares)
        lines.append(replace(line, is_upper_bound=upper))
    lines.append(_training_line(recipe, works, student, fleet, trained_parameters, price))
    return lines


def _served_line(
    stage: str,
    name: str,
    written: float,
    read: float,
    facts: ModelFacts,
    speed: ServedSpeed,
    fleet: Fleet,
    stored: float,
    price: float | None,
) -> CostLine:
    gpu_seconds = written / speed.written_per_second + read / speed.read_per_second
    replicas = max(1, fleet.count // speed.gpus_per_replica)
    hours = gpu_seconds / 3600
    return CostLine(
        stage,
        name,
        round(written),
        round(read),
        gpu_seconds / (replicas * speed.gpus_per_replica),
        hours,
        speed.memory_bytes,
        round(stored),
        round(stored + replicas * facts.weight_bytes),
        None if price is None else hours * price,
        basis=speed.basis,
    )


def _training_line(
    recipe: Recipe,
    works: Sequence[SkillWork],
    student: ModelFacts,
    fleet: Fleet,
    trained_parameters: int,
    price: float | None,
) -> CostLine:
    training, examples = recipe.training, sum(w.prompts + w.scored for w in works)
    whole = sum(w.sequence_tokens * (w.prompts + w.scored) for w in works) / max(1, examples)
    length = min(whole, float(training.max_length))
    tokens = length * training.batch_size * training.steps
    operations = training_operations(student, trained_parameters)
    gpu_seconds = tokens * operations / (fleet.gpu.flops_16bit * efficiency("trained"))
    per_gpu = max(1.0, training.batch_size / fleet.count / training.gradient_accumulation_steps)
    bytes_each = CHECKPOINTED_BYTES if training.gradient_checkpointing else ACTIVATION_BYTES
    activations = per_gpu * length * student.layers * student.hidden * bytes_each
    memory = refuse_unfit_student(student, trained_parameters, fleet, activations)
    epochs = training.steps * training.batch_size / max(1, examples)
    cache = sum(captured_bytes(recipe, w) for w in works)
    hours = gpu_seconds / 3600
    return CostLine(
        "train",
        "student",
        0,
        round(tokens),
        gpu_seconds / fleet.count,
        hours,
        memory,
        round(3 * 12 * trained_parameters + 2 * student.parameters),
        round(cache * epochs + student.weight_bytes),
        None if price is None else hours * price,
        basis=f"{efficiency('trained'):.0%} of {fleet.gpu.name}'s 16-bit peak",
    )


@dataclass(frozen=True)
class Rates:
    """Speeds of one accelerator or machine, for the comparison of ways.

    Attributes:
        written: Model -> tokens that it writes a second.
        read: Model -> tokens that it reads a second.
        trained: Tokens a second that the student is trained on.
    """

    written: Mapping[str, float]
    read: Mapping[str, float]
    trained: float


def fleet_rates(
    recipe: Recipe,
    context: float,
    student: ModelFacts,
    teachers: Mapping[str, ModelFacts],
    fleet: Fleet,
    trained_parameters: int,
) -> Rates:
    """Return the speeds of one accelerator of a fleet.

    Raises:
        RefusedError: A model does not fit.
    """
    written, read = {}, {}
    for name, facts in {STUDENT: student, **teachers}.items():
        quantize = next((t.quantize for t in recipe.teachers if t.name == name), "none")
        where = "student.model" if name == STUDENT else f"teachers.{name}"
        speed = served_speed(facts, fleet, quantize, context, where)
        written[name], read[name] = speed.written_per_second, speed.read_per_second
    peak = fleet.gpu.flops_16bit * efficiency("trained")
    return Rates(written, read, peak / training_operations(student, trained_parameters))


def mean_sequence(works: Sequence[SkillWork]) -> float:
    """Return the mean tokens of a conversation or text over all skills."""
    count = sum(w.prompts + w.scored for w in works)
    return sum(w.sequence_tokens * (w.prompts + w.scored) for w in works) / max(1, count)


def compare_ways(
    recipe: Recipe, works: Sequence[SkillWork], kinds: Mapping[str, bool], rates: Rates
) -> list[Way]:
    """Return the accelerator hours of each way to use a teacher, as if it taught all prompts.

    Args:
        recipe: The recipe; its training counts in steps.
        works: What is captured.
        kinds: Teacher -> whether a token uses a part of its weights.
        rates: Speeds of an accelerator, or of this machine.
    """
    prompts = sum(w.prompts + w.scored for w in works)
    written, whole = sum(w.prompts * w.answer_tokens for w in works), mean_sequence(works)
    seen = recipe.training.steps * recipe.training.batch_size
    trained = min(whole, recipe.training.max_length) * seen
    training = trained / rates.trained
    rollouts = written / max(1, prompts) * seen / rates.written[STUDENT]
    ways = []
    for name, is_moe in kinds.items():
        writing, scoring = written / rates.written[name], trained / rates.read[name]
        ways.append(
            Way(
                name,
                "MoE" if is_moe else "dense",
                (writing + whole * prompts / rates.read[name] + training) / 3600,
                (writing + scoring + training) / 3600,
                (rollouts + scoring + training) / 3600,
                1 + scoring / training if training else 1.0,
            )
        )
    return ways


def count_units(recipe: Recipe, works: Iterable[SkillWork]) -> int:
    """Return the units of a capture: files of at most 2^20 tokens and `prompts_per_unit`."""
    units = 0.0
    for work in works:
        for count, tokens in (
            (work.prompts, work.prompt_tokens + work.answer_tokens),
            (work.scored, work.scored_tokens),
        ):
            in_a_unit = min(recipe.capture.prompts_per_unit, TOKENS_OF_A_UNIT / max(1.0, tokens))
            units += count / max(1.0, in_a_unit)
    return round(units)


def total_failures(lines: Iterable[CostLine]) -> float:
    """Return the accelerators that are expected to fail during a run."""
    return expected_failures(sum(line.gpu_hours or 0.0 for line in lines))
