"""The learning rate of a student by its size, where the recipe gives none."""

from __future__ import annotations

# Full training: 3e-3 up to 2 M weights, then falling with their number to the power .85, not below
# 1e-5. Measured: 3e-3 suits the bundled models of 0.4 M; of 5e-5, 1e-4 and 3e-4 the first two are
# good for SmolLM2-135M and the last is too high, and the rule gives 8.4e-5. LoRA: ten times as
# much, the usual ratio, and at most 3e-3.
LARGEST_RATE, SMALLEST_RATE = 3e-3, 1e-5
PARAMETERS_AT_LARGEST_RATE = 2_000_000
EXPONENT = 0.85
LORA_FACTOR = 10.0
WARNING_FACTOR = 10.0  # a given rate that is so many times too high or too low is warned of


def default_learning_rate(num_parameters: int, is_lora: bool = False) -> float:
    """Return the peak learning rate for a student, two digits.

    Args:
        num_parameters: Weights of the student, not of its adapters; 0 = unknown, taken for a
            billion.
        is_lora: Whether low-rank adapters are trained.

    Example:
        >>> from persea.training.learning_rate import default_learning_rate
        >>> default_learning_rate(424_000), default_learning_rate(134_515_008)
        (0.003, 8.4e-05)
    """
    size = num_parameters or 1_000_000_000
    scale = min(1.0, PARAMETERS_AT_LARGEST_RATE / size) ** EXPONENT
    rate = max(SMALLEST_RATE, LARGEST_RATE * scale)
    return float(f"{min(LARGEST_RATE, rate * LORA_FACTOR) if is_lora else rate:.1e}")


def describe_unusual_rate(given: float, num_parameters: int, is_lora: bool = False) -> str:
    """Return a warning about a learning rate far from the default of that size; "" = none."""
    usual = default_learning_rate(num_parameters, is_lora)
    if not num_parameters or 1 / WARNING_FACTOR <= given / usual <= WARNING_FACTOR:
        return ""
    word = "high" if given > usual else "low"
    return (
        f"training.learning_rate {given:g} is {word} for a student of "
        f"{num_parameters / 1e6:,.1f} M weights -> delete the line for {usual:g}, the default of "
        "this size"
    )
