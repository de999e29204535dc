"""How many tokens each stage reads and writes: prompts by skill, and the teachers of each skill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persea.config.plan_section import ExpectedSkillSection
from persea.data.prompts import Prompt
from persea.errors import DataError
from persea.pipeline.calibration import Calibration

if TYPE_CHECKING:
    from persea.chat.renderer import ChatRenderer
    from persea.config.recipe import Recipe
    from persea.pipeline.run_context import RunContext

SAMPLED_PROMPTS = 64  # of each skill, whose lengths stand for all of the skill
BYTES_PER_TOKEN = 4.0  # of English text, where no tokenizer is on this machine
NOTHING_EXPECTED = ExpectedSkillSection()


@dataclass(frozen=True)
class SkillWork:
    """What is captured of one skill.

    Attributes:
        skill: The skill.
        prompts: Prompts that teachers answer.
        scored: Texts and given answers, which teachers only read.
        prompt_tokens: Mean tokens of a prompt, with its template's.
        answer_tokens: Mean tokens of an answer.
        scored_tokens: Mean tokens of a scored text.
        scored_bytes: Mean bytes of a scored text.
        is_upper_bound: Whether answers count with the most that they may have.
        shares: Teacher -> share of the prompts that it answers.
    """

    skill: str
    prompts: int
    scored: int
    prompt_tokens: float
    answer_tokens: float
    scored_tokens: float
    scored_bytes: float
    is_upper_bound: bool
    shares: Mapping[str, float]

    @property
    def learned_tokens(self) -> float:
        """Tokens that the student learns from: answers and scored texts."""
        return self.prompts * self.answer_tokens + self.scored * self.scored_tokens

    @property
    def sequence_tokens(self) -> float:
        """Mean tokens of a conversation or text."""
        whole = self.prompts * (self.prompt_tokens + self.answer_tokens)
        whole += self.scored * (self.scored_tokens + self.prompt_tokens * bool(self.prompts))
        return whole / max(1, self.prompts + self.scored)


def count_tokens(text: str, renderer: ChatRenderer | None) -> float:
    """Return the tokens of a text; without a tokenizer a quarter of its bytes."""
    if renderer is None:
        return len(text.encode(errors="replace")) / BYTES_PER_TOKEN
    return float(len(renderer.vocabulary.encode(text)))


def skill_work(
    skill: str,
    count: int,
    sample: Sequence[Prompt],
    renderer: ChatRenderer | None,
    recipe: Recipe,
    shares: Mapping[str, float],
    calibration: Calibration | None = None,
) -> SkillWork:
    """Measure what is captured of a skill, from a sample of its prompts.

    Args:
        skill: The skill.
        count: Its prompts and texts.
        sample: Some of them, evenly spaced.
        renderer: Tokenizer that counts; None = a quarter of the bytes.
        recipe: The recipe: limits of answers, and what `plan.expect` says.
        shares: Teacher -> share of the skill.
        calibration: Lengths of answers that were measured.
    """
    expected = (recipe.plan.expect if recipe.plan else {}).get(skill, NOTHING_EXPECTED)
    is_given = recipe.capture.answers == "given"
    limit = max(
        (
            t.generation.max_new_tokens or recipe.capture.max_new_tokens
            for t in recipe.teachers
            if t.name in shares
        ),
        default=recipe.capture.max_new_tokens,
    )
    asked_lengths: list[float] = []
    scored_lengths: list[float] = []
    scored_sizes: list[float] = []
    for prompt in sample:
        text = " ".join(part.text for part in prompt.conversation.parts())
        if prompt.conversation.is_document:
            scored_lengths.append(count_tokens(text, renderer))
            scored_sizes.append(len(text.encode(errors="replace")))
        else:
            asked_lengths.append(count_tokens(text, renderer))
            if is_given:
                scored_lengths.append(count_tokens(prompt.given_text, renderer))
                scored_sizes.append(len(prompt.given_text.encode(errors="replace")))
    num_documents = len(sample) - len(asked_lengths)
    has_scored = is_given or num_documents > 0
    scored = count if is_given else round(count * num_documents / len(sample)) if has_scored else 0
    measured = calibration.answer_tokens(skill, tuple(shares)) if calibration else None
    answer = expected.answer_tokens or measured or float(limit)
    scored_tokens = expected.answer_tokens or _mean(scored_lengths)
    prompt_tokens = expected.prompt_tokens
    if prompt_tokens is None:
        prompt_tokens = _mean(asked_lengths)
    return SkillWork(
        skill,
        count - scored,
        scored,
        prompt_tokens,
        min(answer, float(limit)),
        scored_tokens,
        _mean(scored_sizes) or scored_tokens * BYTES_PER_TOKEN,
        scored < count and expected.answer_tokens is None and measured is None,
        shares,
    )


def teacher_shares(recipe: Recipe, skill: str) -> dict[str, float]:
    """Return teacher -> share of a skill: the pinned one, or all alike until the audition."""
    pinned = recipe.audition.pinned.get(skill)
    names = [pinned] if pinned else [t.name for t in recipe.teachers if not t.reference]
    return dict.fromkeys(names, 1 / len(names))


def context_shares(context: RunContext) -> dict[str, dict[str, float]]:
    """Return skill -> teacher -> share of its prompts: the cast's, if there is one.

    Until the audition, the teachers that support all efforts of a skill have equal shares.
    """
    recipe, models = context.recipe, context.models
    try:
        parts = context.cast.parts
    except DataError:  # the audition has not run
        parts = {}
    found = {}
    for skill in recipe.skills:
        of_skill = [p for name, p in parts.items() if name.partition("/")[0] == skill]
        if of_skill:
            totals: dict[str, float] = {}
            for part in of_skill:
                for name, share in part:
                    totals[name] = totals.get(name, 0.0) + share / len(of_skill)
            found[skill] = totals
            continue
        efforts = {e for part in recipe.corpus if part.skill == skill for e in part.effort_shares}
        able = {
            name
            for name in teacher_shares(recipe, skill)
            if all(models.can_answer_at(name, effort) for effort in efforts)
        } or set(teacher_shares(recipe, skill))
        found[skill] = {name: 1 / len(able) for name in models.teacher_names if name in able}
    return found


def even_sample(prompts: Sequence[Prompt], most: int = SAMPLED_PROMPTS) -> Sequence[Prompt]:
    """Return at most so many prompts, evenly spaced."""
    return prompts[:: max(1, len(prompts) // most)][:most]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
