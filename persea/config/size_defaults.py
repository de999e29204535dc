"""Defaults that follow the student's size and the skills, where a recipe sets nothing.

The keys are marked `BY_SIZE` in the sections; their static defaults are those of students of less
than ten million weights, such as the bundled ones. docs/reference/defaults.md shows the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persea.chat.messages import ThinkingEffort
from persea.config.optimization import OptimizerName
from persea.config.section import BY_SIZE, RecipeSection

if TYPE_CHECKING:
    from persea.config.recipe import Recipe
    from persea.config.training_sections import TrainingSection

UNKNOWN_SIZE = 1_000_000_000  # a student whose size is not known yet is taken for a billion weights
TINY_BELOW = 10_000_000
MIN_LENGTH, PROMPT_TOKENS, LENGTH_STEP = 2048, 1024, 512
MAX_ROLLOUT_TOKENS = 512
# Longest answer at once, in tokens, and what a thought adds to it.
TOKENS_BY_SKILL = {"languages": 256, "safety": 256, "tools": 512, "code": 1024, "reasoning": 1024}
TOKENS_OF_OTHER_SKILLS = 512
TOKENS_BY_EFFORT = {
    ThinkingEffort.NONE: 0,
    ThinkingEffort.LOW: 1024,
    ThinkingEffort.MEDIUM: 4096,
    ThinkingEffort.HIGH: 8192,
}
# A given value is warned of if it is so many times smaller than the default, or larger.
FAR_TOO_FEW_TOKENS = 4
MANY_BYTES_A_WEIGHT = 16  # full training: weight, gradient and two moments in float32
LORA_FROM = 2_000_000_000


@dataclass(frozen=True)
class SizeClass:
    """Defaults of the students of a size.

    Attributes:
        below: Students of fewer weights than this; None = all larger ones.
        batch_size: Conversations of a step.
        conversations_at_once: Conversations in memory at once; the batch is split into such parts.
        num_train_epochs: Passes over the corpus.
        warmup_ratio: Share of the steps until the peak learning rate.
        precision: Of matrix products.
        gradient_checkpointing: Whether activations are recomputed.
        adapt: "full" or "lora".
    """

    below: int | None
    batch_size: int
    conversations_at_once: int
    num_train_epochs: float
    warmup_ratio: float
    precision: str
    gradient_checkpointing: bool
    adapt: str


SIZE_CLASSES: tuple[SizeClass, ...] = (
    SizeClass(1_000_000_000, 32, 8, 3, 0.05, "auto", False, "full"),
    SizeClass(LORA_FROM, 64, 8, 3, 0.05, "bfloat16", True, "full"),
    SizeClass(None, 64, 4, 3, 0.05, "bfloat16", True, "lora"),
)


def size_class(num_parameters: int) -> SizeClass | None:
    """Return the class of a student; None for one of less than ten million weights.

    Args:
        num_parameters: Weights of the student; 0 = unknown, taken for a billion.
    """
    size = num_parameters or UNKNOWN_SIZE
    if size < TINY_BELOW:
        return None
    return next(c for c in SIZE_CLASSES if c.below is None or size < c.below)


def default_answer_tokens(skills: Iterable[str], efforts: Iterable[ThinkingEffort]) -> int:
    """Return the longest answer that the skills and thinking efforts need.

    Example:
        >>> default_answer_tokens(["languages", "code"], [ThinkingEffort.NONE])
        1024
    """
    longest = max((TOKENS_BY_SKILL.get(s, TOKENS_OF_OTHER_SKILLS) for s in skills), default=0)
    return longest + max((TOKENS_BY_EFFORT[e] for e in efforts), default=0)


def given_keys(section: RecipeSection) -> set[str]:
    """Return the keys of a section that the recipe itself sets."""
    return set(section.model_fields_set)


def unset_size_keys(section: RecipeSection) -> set[str]:
    """Return the keys of a section whose default follows the student's size, and that are unset."""
    return {
        key
        for key, field in type(section).model_fields.items()
        if field.json_schema_extra == BY_SIZE and key not in section.model_fields_set
    }


def has_size_defaults(recipe: Recipe) -> bool:
    """Return whether the recipe leaves a key to the student's size."""
    sections: list[RecipeSection] = [
        recipe.student,
        recipe.capture,
        recipe.training,
        recipe.evaluation,
    ]
    if recipe.training.on_policy:
        sections.append(recipe.training.on_policy)
    return any(map(unset_size_keys, sections))


def apply_size_defaults(
    recipe: Recipe, num_parameters: int, max_positions: int = 0
) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe with the defaults of the student's size, and what was set.

    Args:
        recipe: The recipe. Its hash stays.
        num_parameters: Weights of the student; 0 = unknown, taken for a billion.
        max_positions: Longest sequence that the student takes; 0 = unknown.

    Returns:
        The recipe, and dotted key -> value of each key that was set. The recipe of a student of
        less than ten million weights stays as it is.
    """
    found = size_class(num_parameters)
    if found is None:
        return recipe, {}
    tokens = _answer_tokens(recipe)
    set_here: dict[str, Any] = {}

    def fill(name: str, section: RecipeSection, values: Mapping[str, Any]) -> Any:
        unset = unset_size_keys(section)
        changes = {k: v for k, v in values.items() if k in unset or k in ADDED_KEYS}
        set_here.update({f"{name}.{k}": v for k, v in changes.items()})
        return section.model_copy(update=changes)

    student = fill("student", recipe.student, {"adapt": found.adapt})
    if student.adapt == "lora" and student.lora is None:
        from persea.config.model_sections import LoraSection

        student = student.model_copy(update={"lora": LoraSection()})
    capture = fill("capture", recipe.capture, {"max_new_tokens": tokens})
    evaluation = fill("evaluation", recipe.evaluation, {"max_new_tokens": capture.max_new_tokens})
    training = fill(
        "training",
        recipe.training,
        _training_defaults(recipe, found, capture.max_new_tokens, max_positions),
    )
    if training.on_policy:
        rollout = {"max_new_tokens": min(MAX_ROLLOUT_TOKENS, capture.max_new_tokens)}
        on_policy = fill("training.on_policy", training.on_policy, rollout)
        training = training.model_copy(update={"on_policy": on_policy})
    changes = {
        "student": student,
        "capture": capture,
        "evaluation": evaluation,
        "training": training,
    }
    return recipe.model_copy(update=changes), set_here


ADDED_KEYS = frozenset({"num_train_epochs", "warmup_ratio"})  # given instead of `steps` and warm-up


def _answer_tokens(recipe: Recipe) -> int:
    efforts = [t.effort for t in recipe.teachers if not t.reference]
    efforts += [effort for part in recipe.corpus for effort in part.effort_shares]
    asked = [part.skill for part in recipe.corpus if part.texts is None]
    return default_answer_tokens(asked or recipe.skills, efforts)


def _training_defaults(
    recipe: Recipe, found: SizeClass, answer_tokens: int, max_positions: int
) -> dict[str, Any]:
    training = recipe.training
    length = max(MIN_LENGTH, -(-(answer_tokens + PROMPT_TOKENS) // LENGTH_STEP) * LENGTH_STEP)
    batch = training.batch_size if "batch_size" in given_keys(training) else found.batch_size
    parts = -(-batch // found.conversations_at_once)
    values: dict[str, Any] = {
        "batch_size": batch,
        "gradient_accumulation_steps": parts,
        "precision": found.precision,
        "optim": OptimizerName.ADAMW_FUSED,
        "gradient_checkpointing": found.gradient_checkpointing,
        "max_length": min(length, max_positions) if max_positions else length,
    }
    given = given_keys(training)
    if not given & {"steps", "num_train_epochs"}:
        values["num_train_epochs"] = found.num_train_epochs
    if not given & {"warmup_steps", "warmup_ratio"}:
        values["warmup_ratio"] = found.warmup_ratio
    return values


def resolve_steps(training: TrainingSection, num_examples: int) -> TrainingSection:
    """Return the section with `steps` and `warmup_steps` in place of epochs and a ratio.

    Args:
        training: The section `training`.
        num_examples: Prompts and texts of the corpus.

    Returns:
        The section; unchanged if it has neither.

    Example:
        >>> from persea.config.schema import TrainingSection
        >>> section = TrainingSection(num_train_epochs=2, warmup_ratio=0.1, batch_size=8)
        >>> found = resolve_steps(section, 100)
        >>> found.steps, found.warmup_steps, found.log_every
        (25, 3, 1)
    """
    changes: dict[str, Any] = {}
    steps = training.steps
    if training.num_train_epochs is not None:
        steps = max(1, -(-round(training.num_train_epochs * num_examples) // training.batch_size))
        changes |= {"steps": steps, "num_train_epochs": None}
        if "log_every" not in training.model_fields_set:
            changes["log_every"] = min(10, max(1, steps // 100))
    if training.warmup_ratio is not None:
        changes |= {"warmup_steps": -(-round(training.warmup_ratio * steps * 10) // 10)}
        changes |= {"warmup_ratio": None}
    return training.model_copy(update=changes) if changes else training


def unusual_settings(recipe: Recipe, num_parameters: int) -> list[str]:
    """Return a warning for each given value that the student's size makes absurd.

    Args:
        recipe: The recipe as it is run.
        num_parameters: Weights of the student; 0 = unknown: no warning.
    """
    found = size_class(num_parameters) if num_parameters else None
    if found is None:
        return []
    warnings, tokens, size = [], _answer_tokens(recipe), f"{_describe_size(num_parameters)} weights"
    asks = recipe.capture.answers == "ask" and any(p.texts is None for p in recipe.corpus)
    if asks and recipe.capture.max_new_tokens * FAR_TOO_FEW_TOKENS < tokens:
        warnings.append(
            f"capture.max_new_tokens {recipe.capture.max_new_tokens} is few for "
            f"{', '.join(recipe.skills)} -> delete the line for {tokens}"
        )
    training = recipe.training
    if asks and training.max_length < recipe.capture.max_new_tokens:
        warnings.append(
            f"training.max_length {training.max_length} is less than capture.max_new_tokens "
            f"{recipe.capture.max_new_tokens}: longer answers are asked for and left out"
        )
    if recipe.student.adapt == "full" and num_parameters >= LORA_FROM:
        warnings.append(
            f"student.adapt full trains {size} in about "
            f"{num_parameters * MANY_BYTES_A_WEIGHT / 1e9:.0f} GB of memory -> `adapt: lora`"
        )
    if training.precision == "float32" and found.precision == "bfloat16":
        warnings.append(
            f"training.precision float32 is slow for {size} on a GPU -> `precision: bfloat16`"
        )
    return warnings


def describe_size_defaults(set_here: Mapping[str, Any], num_parameters: int) -> str:
    """Return one line with the values that follow the student's size; "" = none.

    Example:
        >>> describe_size_defaults({"training.batch_size": 32}, 134_515_008)
        'defaults for a student of 134.5 M weights: training.batch_size 32'
    """
    if not set_here:
        return ""
    size = f"{_describe_size(num_parameters)} weights" if num_parameters else "an unknown size"
    values = ", ".join(f"{k} {str(v).lower()}" for k, v in sorted(set_here.items()))
    return f"defaults for a student of {size}: {values}"


def _describe_size(num_parameters: int) -> str:
    if num_parameters < 1_000_000_000:
        return f"{num_parameters / 1e6:,.1f} M"
    return f"{num_parameters / 1e9:,.1f} B"


def defaults_markdown() -> str:
    """Return the table of the defaults by size, and of the longest answers, as Markdown."""
    from persea.config.schema import CaptureSection, TrainingSection

    tiny, train = CaptureSection(), TrainingSection()
    rows: list[tuple[str, ...]] = [
        (
            f"below {TINY_BELOW / 1e6:,.0f} M",
            str(train.batch_size),
            str(train.batch_size),
            f"{train.steps:,} steps",
            f"{train.warmup_steps} steps",
            train.precision,
            train.optim.value,
            "no",
            "full",
        )
    ]
    for c in SIZE_CLASSES:
        rows.append(
            (
                f"below {c.below / 1e9:,.0f} B" if c.below else "larger",
                str(c.batch_size),
                str(c.conversations_at_once),
                f"{c.num_train_epochs:g} epochs",
                f"{c.warmup_ratio:.0%}",
                c.precision,
                OptimizerName.ADAMW_FUSED.value,
                "yes" if c.gradient_checkpointing else "no",
                c.adapt,
            )
        )
    head: tuple[str, ...] = ("weights", "batch_size", "at once", "steps", "warm-up", "precision")
    head += ("optim", "gradient_checkpointing", "adapt")
    tokens = [
        *((skill, str(n)) for skill, n in TOKENS_BY_SKILL.items()),
        ("any other", str(TOKENS_OF_OTHER_SKILLS)),
        *((f"plus thinking at {e} effort", str(n)) for e, n in TOKENS_BY_EFFORT.items() if n),
        (f"a student below {TINY_BELOW / 1e6:,.0f} M, all together", str(tiny.max_new_tokens)),
    ]
    return "\n".join(
        [
            *_table(head, rows),
            "",
            *_table(("skill", "max_new_tokens"), tokens),
        ]
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
