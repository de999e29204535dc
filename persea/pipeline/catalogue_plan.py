"""Plan a recipe whose models are not on this machine, from the catalogue of published models.

No tokenizer is opened and nothing is asked of the hub, so the plan of any size takes seconds. Its
counts of tokens are those of `plan.expect`, or four bytes a token.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from persea.config.recipe import Recipe
from persea.config.schema import TEXT_ONLY_MODEL, ModelRef, TrainingSection
from persea.config.size_defaults import apply_size_defaults, resolve_steps
from persea.errors import RecipeError
from persea.models.facts import ModelFacts, find_facts, is_at_hand, read_catalogue
from persea.pipeline import cost
from persea.pipeline.census import PartCount, count_parts, sample_part
from persea.pipeline.cost_lines import (
    CostLine,
    captured_bytes,
    compare_ways,
    count_units,
    fleet_lines,
    fleet_rates,
    mean_sequence,
    teacher_tokens,
    total_failures,
)
from persea.pipeline.hardware import Fleet
from persea.pipeline.licence_gate import licence_verdict
from persea.pipeline.model_refs import model_source
from persea.pipeline.plan import TO_DO, WAITS, RunPlan, StagePlan
from persea.pipeline.stage_keys import STAGE_NAMES
from persea.pipeline.workload import SkillWork, skill_work, teacher_shares


def _is_hub_model(ref: ModelRef) -> bool:
    return ref.model not in ("random", TEXT_ONLY_MODEL) and not is_at_hand(ref.model)


def is_planned_by_catalogue(recipe: Recipe) -> bool:
    """Return whether a model of the recipe is not on this machine, and the catalogue has it.

    A model that neither has is asked of the hub, as a run does.
    """
    refs: list[ModelRef] = [recipe.student, *recipe.teachers]
    far = [ref.model for ref in refs if _is_hub_model(ref)]
    return bool(far) and all(model in read_catalogue() for model in far)


def plan_by_catalogue(recipe: Recipe, fleet: Fleet | None, price: float | None) -> RunPlan:
    """Plan a recipe from the catalogue.

    Args:
        recipe: The recipe.
        fleet: Accelerators; None = no hours, only tokens and bytes.
        price: Price of an accelerator for an hour; None = unknown.

    Raises:
        RecipeError: The size of a part of the corpus is not known.
        RefusedError: A model does not fit on the accelerators.
    """
    student = find_facts(model_source(recipe.student))
    teachers = {
        t.name: facts
        for t in recipe.teachers
        if not t.reference and (facts := find_facts(model_source(t)))
    }
    if student is None:
        raise RecipeError(
            "its size is not known", where="student.model", remedy="download its configuration"
        )
    recipe, _ = apply_size_defaults(recipe, student.parameters, student.context)
    works = _count_works(recipe)
    recipe = recipe.model_copy(update={"training": _in_steps(recipe, works)})
    trained = _trained_parameters(recipe, student)
    if fleet is None:
        lines = _lines_without_hardware(recipe, works, teachers, student, trained)
        ways = []
    else:
        lines = fleet_lines(recipe, works, student, teachers, fleet, trained, price)
        rates = fleet_rates(recipe, mean_sequence(works), student, teachers, fleet, trained)
        ways = compare_ways(recipe, works, {n: f.is_moe for n, f in teachers.items()}, rates)
    free = shutil.disk_usage(cost.existing_ancestor(Path("runs").absolute())).free
    return RunPlan(
        tuple(_stages(recipe, works)),
        sum(w.prompts for w in works),
        sum(line.disk_bytes for line in lines),
        free,
        {},
        _notes(recipe, fleet),
        licences=licence_verdict(recipe, None),
        lines=tuple(lines),
        ways=tuple(ways),
        hardware=fleet.name if fleet else "",
        units=count_units(recipe, works),
        failures=total_failures(lines) if fleet else None,
    )


def _count_works(recipe: Recipe) -> list[SkillWork]:
    """Return how much there is of each skill.

    Raises:
        RecipeError: A part of the corpus is not on this machine, and `plan.expect` has no number.
    """
    expected = recipe.plan.expect if recipe.plan else {}
    counts = count_parts(recipe)
    works = []
    for skill in recipe.skills:
        own = [c for c in counts if c.part.skill == skill]
        stated = expected[skill].prompts if skill in expected else None
        count = stated if stated is not None else _counted(own, recipe)
        is_known = skill in expected and expected[skill].prompt_tokens is not None
        sample = () if is_known else tuple(p for c in own for p in sample_part(c.part, recipe))
        work = skill_work(skill, count, sample, None, recipe, teacher_shares(recipe, skill))
        if any(c.part.texts for c in own) and not work.scored and not sample:
            tokens = work.answer_tokens
            work = replace(
                work, prompts=0, scored=count, scored_tokens=tokens, is_upper_bound=False
            )
        works.append(work)
    return works


def _counted(counts: list[PartCount], recipe: Recipe) -> int:
    for count in counts:
        if count.rows is None:
            k = recipe.corpus.index(count.part)
            raise RecipeError(
                "its prompts are not on this machine, so that they cannot be counted",
                where=f"corpus.{k}",
                remedy=f"write `plan: {{expect: {{{count.part.skill}: {{prompts: 1000000, "
                "prompt_tokens: 200, answer_tokens: 800}}}`",
            )
    return sum(count.rows or 0 for count in counts)


def _in_steps(recipe: Recipe, works: list[SkillWork]) -> TrainingSection:
    return resolve_steps(recipe.training, sum(w.prompts + w.scored for w in works))


def _trained_parameters(recipe: Recipe, student: ModelFacts) -> int:
    lora = recipe.student.lora
    if lora is None:
        return student.parameters
    matrices = 7 if "all-linear" in lora.targets else len(lora.targets)
    return 2 * matrices * lora.rank * student.hidden * student.layers


def _lines_without_hardware(
    recipe: Recipe,
    works: list[SkillWork],
    teachers: Mapping[str, ModelFacts],
    student: ModelFacts,
    trained: int,
) -> list[CostLine]:
    """Return tokens and bytes: without a machine there are no hours."""
    lines = []
    for name, facts in teachers.items():
        written, read = teacher_tokens(works, name)
        if written + read:
            stored = sum(captured_bytes(recipe, w) * w.shares.get(name, 0.0) for w in works)
            lines.append(
                CostLine(
                    "capture",
                    name,
                    round(written),
                    round(read),
                    None,
                    None,
                    facts.weight_bytes,
                    round(stored),
                    facts.weight_bytes,
                    None,
                    is_upper_bound=any(w.is_upper_bound for w in works if name in w.shares),
                )
            )
    tokens = min(mean_sequence(works), recipe.training.max_length)
    tokens *= recipe.training.batch_size * recipe.training.steps
    lines.append(
        CostLine(
            "train",
            "student",
            0,
            round(tokens),
            None,
            None,
            16 * trained + 4 * max(0, student.parameters - trained),
            3 * 12 * trained + 2 * student.parameters,
            student.weight_bytes,
            None,
        )
    )
    return lines


def _stages(recipe: Recipe, works: list[SkillWork]) -> list[StagePlan]:
    prompts, scored = sum(w.prompts for w in works), sum(w.scored for w in works)
    stored = sum(captured_bytes(recipe, w) for w in works)
    captured = [f"{prompts:,} answers"] if prompts else []
    captured += [f"{scored:,} given texts"] if scored else []
    learned = sum(w.learned_tokens for w in works)
    training = recipe.training
    names = sum(not t.reference for t in recipe.teachers)
    work = {
        "check": f"{names} tokenizer pairs",
        "audition": f"at most {recipe.audition.items:,} questions a skill by {names} teachers",
        "capture": f"{' and '.join(captured)}, {learned / 1e9:,.3g} billion tokens, "
        f"{count_units(recipe, works):,} units, about {stored / 1e12:.3g} TB",
        "train": f"{training.steps:,} steps of {training.batch_size} conversations",
        "evaluate": f"at most {recipe.evaluation.items:,} questions a task",
        "lineage": "one record",
        "report": "one page",
    }
    first = ("check", "audition")
    return [StagePlan(s, TO_DO if s in first else WAITS, work[s]) for s in STAGE_NAMES]


def _notes(recipe: Recipe, fleet: Fleet | None) -> tuple[str, ...]:
    refs: list[ModelRef] = [recipe.student, *recipe.teachers]
    far = ", ".join(dict.fromkeys(r.model for r in refs if _is_hub_model(r)))
    notes = [
        f"not on this machine: {far}; sizes are the catalogue's (docs/plan.md), tokens are "
        "`plan.expect`'s or a quarter of the bytes, and no disk is refused"
    ]
    if fleet is None:
        notes.append("no hours without accelerators: give --hardware, such as 8xH200")
    else:
        notes.append(
            f"hours on {fleet.name}: docs/plan.md names the source of each speed; servers were "
            "measured without log-probabilities, so that a capture takes longer. Audition and "
            "evaluation are not in them"
        )
    return tuple(notes)
