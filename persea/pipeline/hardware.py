"""Accelerators and how fast models run on them: ceilings, measured speeds, and shares of ceilings.

Every figure comes from hardware.json, with its source and its day.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from persea.config.yaml_source import suggest_choice
from persea.errors import RecipeError, RefusedError
from persea.models.facts import ModelFacts

HARDWARE_FILE = Path(__file__).with_name("hardware.json")
USABLE_MEMORY = 0.9  # vLLM's default share; the rest is for activations and the driver
SEQUENCES_AT_ONCE = 256  # that the share of the written tokens was derived with
MAX_GPUS_PER_REPLICA = 8  # of one machine
MIN_KV_SEQUENCES = 8  # fewer sequences beside the weights would leave an accelerator idle
# Bytes a trained weight: itself, its gradient and two Adam moments, in float32.
TRAINED_BYTES = 16
GPUS_OF_A_REPLICA = (1, 2, 4, 8)


@dataclass(frozen=True)
class Gpu:
    """An accelerator.

    Attributes:
        name: Its name.
        memory_bytes: Memory.
        bytes_per_second: Bandwidth of the memory.
        flops_16bit: Operations a second in 16 bits, without sparsity.
        flops_8bit: The same in 8 bits; 0 = it has none.
        source: Where the figures come from.
        date: Day of the source.
    """

    name: str
    memory_bytes: int
    bytes_per_second: float
    flops_16bit: float
    flops_8bit: float
    source: str
    date: str


@dataclass(frozen=True)
class Fleet:
    """Accelerators of one kind.

    Attributes:
        gpu: The accelerator.
        count: How many.
    """

    gpu: Gpu
    count: int

    @property
    def name(self) -> str:
        """The fleet as the recipe writes it: 8xH200."""
        return f"{self.count}x{self.gpu.name}"


@dataclass(frozen=True)
class ServedSpeed:
    """Speed of a model on accelerators.

    Attributes:
        gpus_per_replica: Accelerators that hold one copy of the weights.
        written_per_second: Tokens that one accelerator writes a second.
        read_per_second: Tokens that one accelerator reads, or scores, a second.
        memory_bytes: Bytes on each accelerator of a copy.
        basis: How the speeds were got.
    """

    gpus_per_replica: int
    written_per_second: float
    read_per_second: float
    memory_bytes: int
    basis: str


@cache
def read_hardware() -> dict[str, Any]:
    """Return the content of hardware.json."""
    content: dict[str, Any] = json.loads(HARDWARE_FILE.read_text(encoding="utf-8"))
    return content


@cache
def known_gpus() -> dict[str, Gpu]:
    """Return name -> accelerator, for each name and alias in lower case."""
    found = {}
    for row in read_hardware()["gpus"]:
        fields = {key: value for key, value in row.items() if key != "aliases"}
        for name in (row["name"], *row["aliases"]):
            found[name.lower()] = Gpu(**fields)
    return found


def efficiency(name: str) -> float:
    """Return a measured share or rate of hardware.json: written, read, trained, mtbf_gpu_hours."""
    return float(read_hardware()["efficiencies"][name]["value"])


def parse_fleet(text: str, where: str = "--hardware") -> Fleet:
    """Return the fleet that a text names, such as 8xH200.

    Raises:
        RecipeError: It names no count, or an accelerator that hardware.json does not have.

    Example:
        >>> fleet = parse_fleet("8xH200")
        >>> fleet.count, fleet.gpu.memory_bytes
        (8, 141000000000)
    """
    match = re.fullmatch(r"([1-9][0-9]{0,6})x([A-Za-z0-9._-]+)", text)
    names = sorted({gpu.name for gpu in known_gpus().values()})
    if match is None:
        raise RecipeError(
            f"{text!r} names no accelerators",
            where=where,
            remedy=f"write a count, x, and one of {', '.join(names)}: 8xH200",
        )
    gpu = known_gpus().get(match[2].lower())
    if gpu is None:
        raise RecipeError(
            f"no accelerator {match[2]!r} in the table",
            where=where,
            remedy=suggest_choice(match[2], names),
        )
    return Fleet(gpu, int(match[1]))


def gpus_of_replica(facts: ModelFacts, gpu: Gpu, quantize: str, context: float) -> int | None:
    """Return the fewest accelerators that hold a copy of a model; None = more than a machine has.

    Args:
        facts: The model.
        gpu: The accelerator.
        quantize: The recipe's `quantize` of the model.
        context: Tokens of a sequence.
    """
    needed = facts.loaded_bytes(quantize) + MIN_KV_SEQUENCES * facts.kv_bytes(context)
    for count in GPUS_OF_A_REPLICA:
        if needed <= count * gpu.memory_bytes * USABLE_MEMORY:
            return count
    return None


def refuse_unfit_teacher(
    facts: ModelFacts, fleet: Fleet, quantize: str, context: float, where: str
) -> int:
    """Return the accelerators of one copy of a model.

    Raises:
        RefusedError: The fleet cannot hold one copy. The remedy is the nearest thing that can.
    """
    count = gpus_of_replica(facts, fleet.gpu, quantize, context)
    if count is not None and count <= fleet.count:
        return count
    needed = facts.loaded_bytes(quantize)
    remedies = []
    if count is not None:
        remedies.append(f"--hardware {count}x{fleet.gpu.name}")
    else:
        larger = min(
            (
                (found * gpu.memory_bytes, f"{found}x{gpu.name}")
                for gpu in set(known_gpus().values())
                if (found := gpus_of_replica(facts, gpu, quantize, context))
            ),
            default=None,
        )
        remedies += [f"--hardware {larger[1]}"] if larger else []
    if quantize == "none":
        smaller = gpus_of_replica(facts, fleet.gpu, "4bit", context)
        if smaller is not None and smaller <= fleet.count:
            remedies.append("`quantize: 4bit` of this teacher")
    room = fleet.count * fleet.gpu.memory_bytes
    raise RefusedError(
        f"its weights take {needed / 1e9:,.0f} GB, and {fleet.name} has {room / 1e9:,.0f} GB, "
        f"{USABLE_MEMORY:.0%} of it usable",
        where=where,
        remedy=" or ".join(remedies) or "name a smaller model",
    )


def served_speed(
    facts: ModelFacts, fleet: Fleet, quantize: str, context: float, where: str
) -> ServedSpeed:
    """Return the speed of a model behind a server on a fleet.

    A speed that was measured for this model is scaled by the ceilings of the accelerators; any
    other is the share of its ceilings that the measured models reach.

    Args:
        facts: The model.
        fleet: The accelerators.
        quantize: The recipe's `quantize` of the model.
        context: Mean tokens of a sequence.
        where: Place in the recipe, for messages.

    Raises:
        RefusedError: The fleet cannot hold one copy of the model.
    """
    fewest = refuse_unfit_teacher(facts, fleet, quantize, context, where)
    measured = _measured_row(facts.name)
    if measured is not None and fewest <= int(measured["num_gpus"]) <= fleet.count:
        return _scaled_speed(facts, fleet.gpu, quantize, context, measured)
    counts = [c for c in GPUS_OF_A_REPLICA if fewest <= c <= fleet.count]
    return max(
        (_share_of_ceilings(facts, fleet.gpu, count, quantize, context) for count in counts),
        key=lambda speed: (speed.written_per_second, -speed.gpus_per_replica),
    )


def _sequences_and_memory(
    facts: ModelFacts, gpu: Gpu, count: int, quantize: str, context: float
) -> tuple[float, float]:
    """Return the sequences that one copy writes at once, and its bytes."""
    weights = facts.loaded_bytes(quantize)
    a_sequence = max(1.0, facts.kv_bytes(context))
    room = count * gpu.memory_bytes * USABLE_MEMORY - weights
    sequences = max(1.0, min(SEQUENCES_AT_ONCE, room / a_sequence))
    return sequences, weights + sequences * a_sequence


def _share_of_ceilings(
    facts: ModelFacts, gpu: Gpu, count: int, quantize: str, context: float
) -> ServedSpeed:
    """Return the speed of one copy: the share of the ceilings that measured models reach."""
    sequences, num_bytes = _sequences_and_memory(facts, gpu, count, quantize, context)
    step_s = max(
        num_bytes / (count * gpu.bytes_per_second),
        sequences * facts.operations_per_token / (count * gpu.flops_16bit),
    )
    return ServedSpeed(
        count,
        efficiency("written") * sequences / step_s / count,
        _read_speed(facts, gpu),
        round(num_bytes / count),
        f"{efficiency('written'):.0%} of {gpu.name}'s ceilings in writing, "
        f"{efficiency('read'):.0%} in reading",
    )


def _scaled_speed(
    facts: ModelFacts, gpu: Gpu, quantize: str, context: float, measured: dict[str, Any]
) -> ServedSpeed:
    """Return a measured speed, scaled by the ceilings of another accelerator."""
    other, count = known_gpus()[measured["gpu"].lower()], int(measured["num_gpus"])
    _, num_bytes = _sequences_and_memory(facts, gpu, count, quantize, context)
    read = float(measured["read_per_gpu"]) * gpu.flops_16bit / other.flops_16bit
    basis = f"measured on {count}x{other.name} ({measured['date']})"
    if gpu != other:
        basis += f", scaled to {gpu.name} by bandwidth and operations"
    return ServedSpeed(
        count,
        float(measured["written_per_gpu"]) * gpu.bytes_per_second / other.bytes_per_second,
        read or _read_speed(facts, gpu),
        round(num_bytes / count),
        basis,
    )


def _read_speed(facts: ModelFacts, gpu: Gpu) -> float:
    return efficiency("read") * gpu.flops_16bit / facts.operations_per_token


def _measured_row(name: str) -> dict[str, Any] | None:
    rows: list[dict[str, Any]] = read_hardware()["measured"]
    return next((row for row in rows if row["model"] == name), None)


def training_operations(facts: ModelFacts, trained_parameters: int) -> float:
    """Return the operations of a training step for one token.

    Four a weight for the forward pass and the gradient of its input, two a trained weight for its
    own gradient.
    """
    return 4.0 * facts.active_parameters + 2.0 * min(trained_parameters, facts.active_parameters)


def refuse_unfit_student(
    facts: ModelFacts, trained_parameters: int, fleet: Fleet, activation_bytes: float
) -> int:
    """Return the bytes that a training needs on each accelerator, its state spread over all.

    Raises:
        RefusedError: They do not fit. The remedy is the nearest fleet that holds them.
    """
    frozen = max(0, facts.parameters - trained_parameters)
    state = TRAINED_BYTES * trained_parameters + BYTES_FROZEN * frozen
    usable = fleet.gpu.memory_bytes * USABLE_MEMORY
    needed = state / fleet.count + activation_bytes
    if needed <= usable:
        return round(needed)
    room = usable - activation_bytes
    count = -(-state // max(1.0, room)) if room > 0 else 0
    remedies = [f"--hardware {count:.0f}x{fleet.gpu.name}"] if count else []
    if trained_parameters == facts.parameters:
        remedies.append("`adapt: lora`")
    if room <= 0:
        remedies.append("more `training.gradient_accumulation_steps:`")
    raise RefusedError(
        f"its training needs {needed / 1e9:,.0f} GB on each of {fleet.name}, "
        f"{usable / 1e9:,.0f} GB are usable",
        where="student.model",
        remedy=" or ".join(remedies),
    )


BYTES_FROZEN = 4  # a weight that is not trained, in float32


def expected_failures(gpu_hours: float) -> float:
    """Return how many accelerators fail in so many hours, at the measured rate."""
    return gpu_hours / efficiency("mtbf_gpu_hours")
