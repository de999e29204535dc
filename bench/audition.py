"""Check that the audition picks the right teachers, and count the questions it needs.

    python bench/audition.py [seeds] [items]

Answers are generated once: every teacher of the quickstart answers `items` audition questions of
each of its tasks. Then each seed replays the whole race over these answers in its own order. The
right cast is the one that the same rule chooses from all items together. A fourth teacher answers
at random with answers to other questions and must never get a share. Writes
bench/results/audition.json; takes minutes, nearly all of them for the answers.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from persea.config.recipe import load_recipe
from persea.evaluation.answering import answer_items, single_model_loader
from persea.evaluation.audition import build_cast
from persea.evaluation.racing import TaskRace, interleave_languages, race_teachers
from persea.models.loading import set_threads
from persea.pipeline.run_context import RunContext
from persea.tasks import intervals
from persea.tasks.task import ItemResult, Split, Task, TaskItem, grade_answers

ROOT = Path(__file__).resolve().parent.parent
BAD = "deliberately-bad"


def answer_all(
    items: int,
) -> tuple[
    list[tuple[Task, tuple[TaskItem, ...]]],
    dict[tuple[str, str], dict[str, ItemResult]],
    RunContext,
]:
    """Return the quickstart's tasks with their audition questions, and every teacher's graded
    answers.
    """
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"audition.items={items}"])
    context = RunContext(recipe, ROOT / "runs" / "bench-audition")
    set_threads(recipe.threads)
    skills = context.held_out_items(Split.AUDITION)
    load = single_model_loader(
        lambda name: context.models.load_teacher(name, recipe.audition.batch_size)
    )
    answers = {}
    for name in context.models.renderers:
        speaker = context.models.evaluated_model(name, recipe.audition.batch_size, (), load)
        for skill, some in skills:
            results, _ = answer_items(
                speaker, speaker.efforts[0], skill, some, recipe.capture.max_new_tokens
            )
            answers[name, skill.name] = {r.item.prompt.id: r for r in results}
            print(
                f"{name:16} {skill.name:12} {share_right(results):.3f} of {len(results)}",
                flush=True,
            )
    for skill, some in skills:
        answered = [
            r for name in context.models.renderers for r in answers[name, skill.name].values()
        ]
        drawn = random.Random(0).choices(answered, k=len(some))
        results = grade_answers(skill, some, [(r.answer, r.finish) for r in drawn])
        answers[BAD, skill.name] = {r.item.prompt.id: r for r in results}
        print(
            f"{BAD:16} {skill.name:12} {share_right(results):.3f} of {len(results)}",
            flush=True,
        )
    return skills, answers, context


def share_right(results: Sequence[ItemResult]) -> float:
    """Return the mean score."""
    return sum(r.value for r in results) / len(results)


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    items = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    skills, answers, context = answer_all(items)
    teachers = [*context.models.renderers, BAD]
    efforts = {
        t: context.models.measured_efforts(t, ())[0]
        if t in context.models.renderers
        else next(iter(context.models.measured_efforts(n, ())[0] for n in context.models.renderers))
        for t in teachers
    }

    def ask(name: str, skill: Task, some: Sequence[TaskItem]) -> list[ItemResult]:
        return [answers[name, skill.name][i.prompt.id] for i in some]

    whole = []
    for skill, some in skills:
        order = interleave_languages(some, 0)
        answered = {t: ask(t, skill, order) for t in teachers}
        course = TaskRace(
            skill.name,
            order,
            {t: [r.value for r in mine] for t, mine in answered.items()},
            answered,
        )
        course.update_eliminated(len(order))
        whole.append(course)
    truth = build_cast(whole, efforts, {}, context.recipe.audition.min_score).parts
    runs = []
    for seed in range(seeds):
        courses = race_teachers(teachers, skills, seed, ask)
        found = build_cast(courses, efforts, {}, context.recipe.audition.min_score).parts
        asked = sum(len(v) for c in courses for v in c.scores.values())
        names = {p: [t for t, _ in mine] for p, mine in found.items()}
        runs.append(
            {
                "seed": seed,
                "right": {
                    p: names.get(p) == [t for t, _ in mine]
                    for p, mine in truth.items()
                    if "/" not in p
                },
                "parts": names,
                "asked": asked,
                "share": round(asked / sum(len(s) * len(teachers) for _, s in skills), 4),
                "bad": any(t == BAD for part in found.values() for t, _ in part),
            }
        )
        print(seed, runs[-1]["parts"], runs[-1]["share"], flush=True)
    outcome = {
        "seeds": seeds,
        "items": items,
        "teachers": teachers,
        "bets": intervals.BETTING_STAKES,
        "truth": {p: [t for t, _ in mine] for p, mine in truth.items()},
        "all_right": sum(all(r["right"].values()) for r in runs),
        "bad_teacher_cast": sum(r["bad"] for r in runs),
        "share_mean": round(sum(r["share"] for r in runs) / seeds, 4),
        "share_most": max(r["share"] for r in runs),
        "runs": runs,
    }
    print(json.dumps({k: v for k, v in outcome.items() if k != "runs"}, indent=1))
    (ROOT / "bench" / "results" / "audition.json").write_text(json.dumps(outcome, indent=1) + "\n")


if __name__ == "__main__":
    main()
