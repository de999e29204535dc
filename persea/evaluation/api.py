"""Check, audition and evaluate as Python functions, without a recipe.

Models are given as folders in Hugging Face form, GGUF files, hub ids, run folders (then their
student), or as a `Teacher` with an engine of its own. Answers are kept in PERSEA_HOME and reused,
as in a run.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from persea.alignment.event_map import load_event_map
from persea.chat.messages import ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.config.evaluation_sections import MAX_MEASURED_LOGITS
from persea.errors import DataError, RefusedError
from persea.evaluation.answering import EvaluatedModel, answer_items, single_model_loader
from persea.evaluation.audition import Cast, build_cast
from persea.evaluation.check_sampling import measure_weights
from persea.evaluation.compatibility import (
    MAX_TEMPLATE_EXCESS_BITS_PER_BYTE,
    TEXT_FILES_SKILL,
    PairCompatibility,
    TemplateLikelihood,
    check_pair,
    read_texts,
    reference_samples,
    refuse_incompatible,
)
from persea.evaluation.evaluate import EvaluationAnswers, compare_student, evaluate_model
from persea.evaluation.racing import DEFAULT_RACE_SETTINGS, RaceSettings, race_teachers
from persea.evaluation.retained_mass import MIN_COUNTED_PROBABILITY
from persea.evaluation.unwritable import (
    MAX_UNWRITABLE_SHARE,
    leave_out_unwritable,
    refuse_unwritable_texts,
)
from persea.models.identity import fingerprint
from persea.models.loading import load_renderer, resolve_model_source
from persea.storage import digest_json
from persea.tasks.generated import GENERATED_TASKS, find_generated_task
from persea.tasks.task import ItemResult, PairedComparison, Score, Split, Task, TaskItem
from persea.teachers.engines import EngineOptions, find_engine
from persea.teachers.teacher import Teacher


@dataclass(frozen=True)
class CompatibilityResult:
    """The result of `check`.

    Attributes:
        pairs: How the tokens of teacher and student align, per task and language.
        likelihoods: Bits per byte with and without the teacher's chat template; empty unless its
            weights were loaded.
        problem: Why the teacher is not usable for the student; "" if it is.
    """

    pairs: tuple[PairCompatibility, ...]
    likelihoods: tuple[TemplateLikelihood, ...]
    problem: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        scores: Score of each model and task, over all items and per language.
        bits_per_byte: Model -> task -> bits per byte of the reference answers.
        comparisons: First model minus each other model on the same items, with intervals.
        results: (model, effort, task) -> graded answers.
    """

    scores: tuple[Score, ...]
    bits_per_byte: Mapping[str, Mapping[str, float]]
    comparisons: tuple[PairedComparison, ...]
    results: Mapping[tuple[str, ThinkingEffort, str], tuple[ItemResult, ...]]


def check(
    teacher: ChatRenderer | str,
    student: ChatRenderer | str,
    *,
    tasks: Sequence[Task | str] = GENERATED_TASKS,
    texts: Mapping[str, str] | None = None,
    load_weights: bool = False,
    items: int = 64,
    max_lines: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    min_common_share: float = 0.3,
    max_disagreement: float = 0.1,
    max_unwritable_share: float = MAX_UNWRITABLE_SHARE,
    max_template_excess: float = MAX_TEMPLATE_EXCESS_BITS_PER_BYTE,
    min_counted_probability: float = MIN_COUNTED_PROBABILITY,
    max_measured_logits: int = MAX_MEASURED_LOGITS,
) -> CompatibilityResult:
    """Measure whether a teacher's tokenizer and chat template suit a student.

    Args:
        teacher: Chat renderer, folder or hub id.
        student: Chat renderer, folder or hub id.
        tasks: Tasks whose reference answers are compared, or their names.
        texts: Language -> text file (`FILE` or `FILE#key` of JSON lines) to compare besides.
        load_weights: Also load the teacher's weights, to measure its chat template and how much
            probability the boundary masks retain. Needs a folder or hub id.
        items: Items per task, at most.
        max_lines: Lines per text file, at most.
        batch_size: Sequences in one forward pass.
        seed: Seed of the items.
        min_common_share: Lowest share of student tokens at a common boundary.
        max_disagreement: Highest share of boundaries at which the events differ.
        max_unwritable_share: Highest share of texts that a vocabulary may be unable to write.
        max_template_excess: Bits per byte by which the chat template may be worse than none.
        min_counted_probability: See `make_retained_mass`.
        max_measured_logits: Bound of the work with `load_weights`, see
            `persea.evaluation.check_sampling.choose_measured`.

    Returns:
        The measurements, and the first problem found.

    Raises:
        DataError: A model or file cannot be read, or bytes cannot be located.

    Example:
        >>> import persea
        >>> found = persea.check(
        ...     "saplings/gemma-sapling", "saplings/llama-sapling", tasks=["code"], items=4
        ... )
        >>> found.problem
        ''
        >>> 0.3 < found.pairs[0].boundary_share <= 1
        True
    """
    student_renderer = open_renderer(student)
    teacher_renderer = open_renderer(teacher)
    name = name_of(teacher) if isinstance(teacher, str) else teacher.family.name
    found = [
        *reference_samples(_draw_items(tasks, Split.AUDITION, items, seed)),
        *(read_texts(language, file, max_lines) for language, file in (texts or {}).items()),
    ]
    samples, unwritable = leave_out_unwritable(
        [s for s in found if s.is_supported_by(teacher_renderer)],
        {"student": student_renderer.vocabulary, name: teacher_renderer.vocabulary},
    )
    event_map = load_event_map(teacher_renderer, student_renderer)
    likelihoods: list[TemplateLikelihood] = []
    weights = None
    if load_weights:
        if not isinstance(teacher, str):
            raise DataError(
                "a chat renderer has no weights to load",
                where="check",
                remedy="give the teacher's folder or hub id, or load_weights=False",
            )
        loaded = load_teacher(name, teacher, teacher_renderer, batch_size)
        weights = measure_weights(
            loaded,
            event_map,
            [s for s in samples if s.skill != TEXT_FILES_SKILL],
            max_measured_logits,
            seed,
            min_counted_probability,
        )
        likelihoods = weights.likelihoods
    pairs = [
        check_pair(
            name,
            teacher_renderer,
            student_renderer,
            event_map,
            sample,
            sample.render(student_renderer),
            weights.retained_mass if weights and sample.skill != TEXT_FILES_SKILL else None,
            weights.chosen_of(sample) if weights else None,
        )
        for sample in samples
    ]
    problem = ""
    try:
        refuse_unwritable_texts(unwritable, max_unwritable_share)
        refuse_incompatible(
            pairs, likelihoods, min_common_share, max_disagreement, max_template_excess
        )
    except RefusedError as error:
        problem = str(error)
    return CompatibilityResult(tuple(pairs), tuple(likelihoods), problem)


def audition(
    teachers: Sequence[Teacher | str],
    tasks: Sequence[Task | str] = GENERATED_TASKS,
    *,
    items: int = 100,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    min_score: float = 0.05,
    pinned: Mapping[str, str] | None = None,
    settings: RaceSettings = DEFAULT_RACE_SETTINGS,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Cast:
    """Measure teachers on tasks, in rounds, and choose the teachers of each task.

    Args:
        teachers: Folders, hub ids or Teachers. One is in memory at a time.
        tasks: Tasks or their names.
        items: Items per task, at most; fewer where the ranking is clear sooner.
        max_new_tokens: Longest answer, in the teacher's tokens.
        batch_size: Items answered at once.
        seed: Seed of the items and their order.
        min_score: Lowest score of a teacher that teaches.
        pinned: Task -> teacher that you choose yourself.
        settings: When a race ends.
        progress: Called with (share done, text).

    Returns:
        The teachers of each task and their shares, with all scores.

    Raises:
        RefusedError: No teacher of a task reaches `min_score`.
        DataError: A model cannot be read, or two have the same name.

    Example:
        >>> import persea
        >>> cast = persea.audition(
        ...     ["saplings/gemma-sapling", "saplings/llama-sapling"], ["code"], items=10
        ... )
        >>> cast.parts["code"]
        (('gemma-sapling', 1.0),)
    """
    models = _open_models(teachers, batch_size)
    chosen = _draw_items(tasks, Split.AUDITION, items, seed)

    def answer(name: str, task: Task, some: Sequence[TaskItem]) -> Sequence[ItemResult]:
        model = models[name]
        return answer_items(model, model.efforts[0], task, some, max_new_tokens)[0]

    races = race_teachers(list(models), chosen, seed, answer, progress, settings)
    own_efforts = {name: model.efforts[0] for name, model in models.items()}
    return build_cast(races, own_efforts, pinned or {}, min_score)


def evaluate(
    models: Sequence[Teacher | str],
    tasks: Sequence[Task | str] = GENERATED_TASKS,
    *,
    items: int = 200,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Evaluation:
    """Measure models on the same held-out items.

    Args:
        models: Folders, hub ids, run folders (then their student) or Teachers. The first one is
            compared with each other one. One is in memory at a time.
        tasks: Tasks or their names.
        items: Items per task.
        max_new_tokens: Longest answer, in the model's tokens.
        batch_size: Items answered at once.
        seed: Seed of the items.
        progress: Called with (share done, text).

    Returns:
        Scores with intervals, bits per byte and paired comparisons.

    Raises:
        DataError: A model cannot be read, or two have the same name.

    Example:
        >>> import persea
        >>> found = persea.evaluate(
        ...     models=["saplings/gemma-sapling", "saplings/llama-sapling"], tasks=["code"], items=5
        ... )
        >>> [(s.model_name, s.n) for s in found.scores]
        [('gemma-sapling', 5), ('llama-sapling', 5)]
        >>> (found.comparisons[0].model_name, found.comparisons[0].other_model_name)
        ('gemma-sapling', 'llama-sapling')
    """
    opened = _open_models(models, batch_size)
    chosen = _draw_items(tasks, Split.TEST, items, seed)
    answers = EvaluationAnswers()
    for k, model in enumerate(opened.values()):

        def report(share: float, text: str, k: int = k) -> None:
            progress((k + share) / len(opened), text)

        evaluate_model(answers, model, chosen, max_new_tokens, report)
    first = next(iter(opened), "")
    return Evaluation(
        tuple(answers.iter_scores()),
        answers.bits_per_byte,
        compare_student(answers, first),
        answers.results,
    )


def open_renderer(model: ChatRenderer | str) -> ChatRenderer:
    """Return the chat renderer of a folder, GGUF file, hub id or run folder."""
    if isinstance(model, ChatRenderer):
        return model
    source, template_date = resolve_model_source(model, model)
    return load_renderer(source, model, template_date)


def load_teacher(name: str, model: str, renderer: ChatRenderer, batch_size: int) -> Teacher:
    """Load the weights of a folder, GGUF file, hub id or run folder into this process."""
    source, _ = resolve_model_source(model, name)
    options = EngineOptions(name, renderer, source=source, batch_size=batch_size)
    engine = find_engine("local").open(options)
    return Teacher(name, renderer, engine, renderer.family.lowest_effort)


def _open_models(models: Sequence[Teacher | str], batch_size: int) -> dict[str, EvaluatedModel]:
    """Return name -> model; weights are loaded when first needed, and one at a time."""
    by_name = {m.name if isinstance(m, Teacher) else name_of(m): m for m in models}
    if len(by_name) < len(models):
        raise DataError(
            "two models have the same name",
            where=", ".join(by_name),
            remedy="rename a folder, or give a Teacher with a name of its own",
        )
    renderers = {
        name: m.renderer if isinstance(m, Teacher) else open_renderer(m)
        for name, m in by_name.items()
    }

    def load(name: str) -> Teacher:
        model = by_name[name]
        if isinstance(model, Teacher):
            return model
        return load_teacher(name, model, renderers[name], batch_size)

    load_single = single_model_loader(load)
    return {
        name: _evaluated_model(name, model, renderers[name], batch_size, partial(load_single, name))
        for name, model in by_name.items()
    }


def name_of(model: str) -> str:
    """Return the name of a model in reports: the last part of its path or id."""
    return Path(model).name or model


def _evaluated_model(
    name: str,
    model: Teacher | str,
    renderer: ChatRenderer,
    batch_size: int,
    load: Callable[[], Teacher],
) -> EvaluatedModel:
    import torch

    if isinstance(model, Teacher):
        # Without a fingerprint nothing identifies the weights, and no kept answer may be reused.
        weights, effort = model.fingerprint or uuid.uuid4().hex, model.effort
    else:
        weights = fingerprint(resolve_model_source(model, name)[0], name)
        effort = renderer.family.lowest_effort
    return EvaluatedModel(
        name,
        digest_json([weights, renderer.digest, effort]),
        (effort,),
        load,
        {"batch": batch_size, "threads": torch.get_num_threads()},
        isinstance(model, Teacher) and model.is_text_only,
        not renderer.is_text,
    )


def _draw_items(
    tasks: Sequence[Task | str], split: Split, items: int, seed: int
) -> list[tuple[Task, tuple[TaskItem, ...]]]:
    found = [find_generated_task(t) if isinstance(t, str) else t for t in tasks]
    return [(task, tuple(task.items(split, items, seed))) for task in found]
