"""Pre-flight checks of data and models: what a later stage would refuse, before a teacher is asked.

Each check is cheap against the stage that it protects: prompts are tokenized from a sample, and of
weights only the headers are read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persea.data.prompts import Prompt
from persea.errors import DataError, RecipeError, RefusedError
from persea.models.identity import fingerprint
from persea.pipeline import cost
from persea.pipeline.model_refs import BASE, model_source
from persea.pipeline.remote_teachers import endpoint_key, is_remote

if TYPE_CHECKING:
    from persea.chat.renderer import ChatRenderer
    from persea.pipeline.run_context import RunContext

SAMPLED_PROMPTS = 128  # of each skill whose tokens are counted
ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the head
# Upper bounds a captured token, measured in docs/cache.md: broad text of a 152k vocabulary costs
# 34 bytes at a sampling threshold of .02 without its text (reasoning 9), and 316 with
# `distributions: topk` at max_kl .01 (reasoning 53).
SAMPLED_BYTES_PER_TOKEN = 40
TOPK_BYTES_PER_TOKEN = 400
# 156 bytes a token where sampled distributions of a 262k vocabulary take 40; see docs/cache.md
EXAMPLE_BYTES_PER_CAPTURED_BYTE = 4


@dataclass(frozen=True)
class LongPrompts:
    """Prompts of a skill that a model cannot take.

    Attributes:
        skill: The skill.
        num_sampled: Prompts that were tokenized.
        num_long: Those among them that are too long.
        longest: Tokens of the longest.
    """

    skill: str
    num_sampled: int
    num_long: int
    longest: int


def refuse_unknown_lora_targets(context: RunContext) -> None:
    """Raise if the student has no matrix of a name in `student.lora.targets`.

    Raises:
        RecipeError: It has none. The message lists the names of its matrices.
    """
    student, size = context.recipe.student, context.models.student_size
    if student.lora is None or size is None:
        return
    names = {
        parts[-2]
        for name, shape in size.shapes
        if len(shape) == 2 and len(parts := name.split(".")) > 1
    }
    unknown = [t for t in student.lora.targets if t != ALL_LINEAR and t not in names]
    if unknown:
        layers = sorted(names - {"embed_tokens", "lm_head", "wte", "token_embd", "output"})
        raise RecipeError(
            f"the student has no matrix named {' or '.join(unknown)}",
            where="student.lora.targets",
            remedy=f"it has {', '.join(layers)}",
        )


def refuse_missing_keys(context: RunContext) -> None:
    """Raise if the environment variable of a server's key is not set.

    Raises:
        MissingRequirementError: It is not set, or no header can carry its value.
    """
    for teacher in context.recipe.teachers:
        if teacher.endpoint is not None:
            endpoint_key(teacher.name, teacher.endpoint)


def describe_equal_models(context: RunContext) -> list[str]:
    """Return a line for each teacher that is the student's base, or another teacher again."""
    seen: dict[str, str] = {}
    lines = []
    base = fingerprint(model_source(context.recipe.student), BASE)
    for teacher in context.recipe.teachers:
        if is_remote(teacher) or teacher.reference:
            continue
        identity = fingerprint(model_source(teacher), teacher.name)
        if identity == base:
            lines.append(
                f"{teacher.name} has the weights of the student: it teaches what the student "
                "already knows, such as to keep it"
            )
        elif identity in seen:
            lines.append(f"{teacher.name} has the weights of {seen[identity]}")
        seen.setdefault(identity, teacher.name)
    return lines


def find_long_prompts(
    prompts: Sequence[Prompt], renderer: ChatRenderer, max_tokens: int, *, given: bool
) -> Iterator[LongPrompts]:
    """Yield the skills with prompts that leave no token for an answer, from a sample.

    Args:
        prompts: Prompts and documents; documents are split to fit, and not looked at.
        renderer: The tokenizer and template that count.
        max_tokens: Longest conversation.
        given: Whether the prompts' own answers count too.
    """
    by_skill: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if not prompt.conversation.is_document:
            by_skill.setdefault(prompt.skill, []).append(prompt)
    for skill, of_skill in by_skill.items():
        sample = of_skill[:: max(1, len(of_skill) // SAMPLED_PROMPTS)][:SAMPLED_PROMPTS]
        lengths = [n for p in sample if (n := _count_tokens(p, renderer, given)) is not None]
        num_long = sum(n > max_tokens - (not given) for n in lengths)
        if num_long:
            yield LongPrompts(skill, len(lengths), num_long, max(lengths))


def _count_tokens(prompt: Prompt, renderer: ChatRenderer, given: bool) -> int | None:
    try:
        if given:
            return len(renderer.render(prompt.conversation.with_answer(*prompt.given_parts)))
        return len(renderer.render_prompt(prompt.conversation))
    except DataError:  # the template has no form for it: capture and training count such prompts
        return None


def refuse_long_prompts(context: RunContext) -> list[str]:
    """Return a warning for each skill with prompts that are too long to be learned.

    Raises:
        RefusedError: All prompts of a skill are.
    """
    given, max_length = context.are_answers_given, context.recipe.training.max_length
    found = find_long_prompts(
        context.corpus.prompts, context.models.student_renderer, max_length, given=given
    )
    what = "with their answers " if given else ""
    warnings = []
    for one in found:
        all_of = f"{one.num_long} of {one.num_sampled} prompts of {one.skill} that were looked at"
        message = (
            f"{all_of} {what}are longer than training.max_length, {max_length} tokens "
            f"(the longest has {one.longest:,})"
        )
        if one.num_long == one.num_sampled:
            raise RefusedError(
                message,
                where="corpus",
                remedy=f"write `training: {{max_length: {one.longest + 1 + (not given) * 63}}}` or "
                "more, or shorten them",
            )
        warnings.append(f"{message}: left out of the training")
    return warnings


def captured_bytes(context: RunContext) -> int:
    """Return the bytes of the captured distributions: of given answers, or at most."""
    capture, prompts = context.recipe.capture, context.corpus.prompts
    tokens = cost.mean_tokens(
        prompts,
        context.models.student_renderer,
        capture.max_new_tokens,
        given=context.are_answers_given,
    )[1]
    is_sampled = capture.distributions == "sampled"
    a_token = SAMPLED_BYTES_PER_TOKEN if is_sampled else TOPK_BYTES_PER_TOKEN
    return round(context.num_prompts * tokens * a_token)


def example_bytes(context: RunContext) -> int:
    """Return the bytes of the stored training examples, at most."""
    is_stored = context.recipe.training.store_examples
    return EXAMPLE_BYTES_PER_CAPTURED_BYTE * captured_bytes(context) * is_stored


def missing_disk_bytes(context: RunContext) -> int:
    """Return the bytes that a run may still add to the disk.

    Stages that have finished add none; units, examples and checkpoints that an interrupted run
    left are there already.
    """
    trained = cost.training_bytes(
        context.models.student_size, context.recipe.student, context.training
    )
    folder, needed = context.folder, 0
    if not context.stages.has_record("capture"):
        needed = max(0, captured_bytes(context) - folder_bytes(folder / "capture"))
    if not context.stages.has_record("train"):
        needed += max(0, example_bytes(context) - folder_bytes(folder / "examples"))
        needed += max(0, (trained or 0) - folder_bytes(folder / "train"))
    return needed


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def smaller_settings(context: RunContext) -> list[str]:
    """Return settings that a run of this recipe would need less disk with, the mildest first."""
    capture, settings = context.recipe.capture, []
    if example_bytes(context):
        settings.append("`training: {store_examples: false}`")
    if capture.distributions == "topk":
        settings.append("`capture: {distributions: sampled}`")
    elif (capture.sampling_threshold or 0) < 0.05:
        settings.append("`capture: {sampling_threshold: 0.05}`")
    if context.recipe.student.lora is None:
        settings.append("`student: {adapt: lora}`")
    return settings


def refuse_full_disk(context: RunContext) -> None:
    """Raise if the disk of the run folder cannot hold the run.

    Raises:
        RefusedError: It cannot.
    """
    needed = missing_disk_bytes(context)
    free = shutil.disk_usage(cost.existing_ancestor(context.folder)).free
    if needed > free:
        raise RefusedError(
            f"the run needs up to {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(context.folder),
            remedy=f"free space or give another --out{_with_less_disk(context)}",
        )


def _with_less_disk(context: RunContext) -> str:
    settings = smaller_settings(context)
    return f"; less is needed with {' or '.join(settings)}" if settings else ""
