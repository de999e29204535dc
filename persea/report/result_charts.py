"""Charts and tables of one run's results for the page: scores, gaps, training curves and shares."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from persea.report import svg
from persea.report.run_files import SHARE_KINDS, EvaluationRecord, LoggedStep, RunFiles
from persea.report.skill_comparison import SkillComparison, scores_by_language
from persea.tasks.task import Score

# Loss terms whose curves come first.
LEADING_LOSS_TERMS = ("event_kl", "events", "cross_entropy")


def _score_dot(evaluation: EvaluationRecord, score: Score) -> svg.Dot:
    mark = evaluation.mark(score.model_name)
    return svg.Dot(score.model_name, mark, score.value, score.low, score.high)


def skill_dot_plots(
    evaluation: EvaluationRecord, comparisons: Sequence[SkillComparison]
) -> list[tuple[str, Markup]]:
    """Return (skill, SVG of every model's score and interval) for each skill."""
    plots = []
    for k, comparison in enumerate(comparisons):
        dots = [_score_dot(evaluation, s) for s in comparison.scores]
        band = (comparison.best_teacher.low, comparison.best_teacher.high)
        plot = svg.dot_plot(f"skill-{k}", comparison.skill, dots, band)
        plots.append((comparison.skill, Markup(plot)))
    return plots


def overview_charts(
    evaluation: EvaluationRecord, comparisons: Sequence[SkillComparison]
) -> tuple[Markup, Markup, dict[str, Markup]]:
    """Return the overview charts of an evaluation.

    Returns:
        The matrix of skills and models; the gaps between base and best teacher; skill -> matrix of
        languages and models, for skills with several languages.
    """
    columns = [(name, evaluation.mark(name)) for name in evaluation.asked_models]
    matrix = svg.heatmap(
        "all",
        "scores by skill and model",
        columns,
        [(c.skill, [s.value for s in c.scores]) for c in comparisons],
    )
    gaps = svg.gap_chart(
        "gaps",
        "gap between base and best teacher",
        [
            (
                c.skill,
                _score_dot(evaluation, c.base),
                _score_dot(evaluation, c.student),
                _score_dot(evaluation, c.best_teacher),
                c.gap_closed,
            )
            for c in comparisons
        ],
    )
    by_language = {}
    for k, (skill, table) in enumerate(scores_by_language(evaluation).items()):
        rows = [
            (
                language,
                [
                    scores[name].value if name in scores and scores[name].n else None
                    for name in evaluation.asked_models
                ],
            )
            for language, scores in table.items()
        ]
        chart = svg.heatmap(f"languages-{k}", f"{skill} by language", columns, rows)
        by_language[skill] = Markup(chart)
    return Markup(matrix), Markup(gaps), by_language


def unique_steps(files: RunFiles) -> list[LoggedStep]:
    """Return the logged steps in order; a step that a resumed run repeated counts once, with its
    last values.
    """
    return sorted(
        {line.step: line for line in files.logged_steps or ()}.values(), key=lambda line: line.step
    )


def training_charts(
    files: RunFiles,
) -> tuple[list[tuple[str, Markup]], dict[str, dict[str, float]]]:
    """Return the charts of the training.

    Returns:
        (title, SVG) of each loss term, of the total loss, and of the teachers' shares of positions,
        loss and gradient; and teacher -> kind -> mean share.
    """
    evaluation, steps = files.evaluation, unique_steps(files)
    if not steps:
        return [], {}
    charts = [
        (title, svg.line_chart(f"curve-{k}", title, points))
        for k, (title, points) in enumerate(_loss_curves(steps).items())
    ]
    means: dict[str, dict[str, float]] = {name: {} for name in evaluation.teachers}
    for kind in SHARE_KINDS:
        shares = []
        for line in steps:
            of_step = line.teacher_shares(kind) or (line.share if kind == "positions" else {})
            if of_step:
                shares.append((line.step, of_step))
        if not shares:
            continue
        title = f"share of {kind}"
        bars = svg.stacked_bars(
            f"share-{kind}",
            title,
            svg.bin_shares(shares, evaluation.teachers),
            [(t, evaluation.mark(t)) for t in evaluation.teachers],
        )
        charts.append((title, bars))
        (total,) = svg.bin_shares(shares, evaluation.teachers, max_bins=1)
        for name, share in zip(evaluation.teachers, total.shares, strict=True):
            means[name][kind] = share
    return [(title, Markup(chart)) for title, chart in charts], means


def _loss_curves(steps: Sequence[LoggedStep]) -> dict[str, list[tuple[int, float]]]:
    """Return title -> points: each loss term, and the total loss last."""
    leading = {term: k for k, term in enumerate(LEADING_LOSS_TERMS)}
    terms = sorted(
        {t for line in steps for t in line.terms}, key=lambda t: (leading.get(t, len(leading)), t)
    )
    curves = {
        t.replace("_", " "): [(line.step, line.terms[t]) for line in steps if t in line.terms]
        for t in terms
    }
    curves["total loss"] = [(line.step, line.loss) for line in steps]
    return curves


def mean_group_shares(files: RunFiles) -> list[tuple[str, str, dict[str, float]]]:
    """Return (teacher, skill, mean shares and mean weight), the largest share of the gradient
    first.

    A share is the mean over the steps that log it, 0 in steps whose batch does not hold the group.
    A weight is the mean over the steps whose batch holds it.
    """
    steps = unique_steps(files)
    groups = dict.fromkeys(
        (teacher, skill)
        for line in steps
        for teacher, parts in line.groups.items()
        for skill in parts
    )
    rows = []
    for teacher, skill in groups:
        parts = [
            line.groups[teacher][skill] for line in steps if skill in line.groups.get(teacher, {})
        ]
        row = {"weight": sum(part.weight for part in parts) / len(parts)}
        for kind in SHARE_KINDS:
            if num_logged := sum(bool(line.teacher_shares(kind)) for line in steps):
                row[kind] = sum(getattr(part, kind) or 0.0 for part in parts) / num_logged
        rows.append((teacher, skill, row))
    return sorted(rows, key=lambda row: -row[2].get("gradient", row[2]["positions"]))
