"""The check: measure whether each teacher's tokenizer and template suit the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.evaluation.check_sampling import measure_weights
from persea.evaluation.compatibility import (
    TEXT_FILES_SKILL,
    check_pair,
    refuse_incompatible,
)
from persea.evaluation.named_mass import measure_named_mass, refuse_low_named_mass
from persea.evaluation.unwritable import find_unwritable_tokens, refuse_unwritable_texts
from persea.pipeline.model_refs import is_small_local_model, model_source
from persea.pipeline.remote_teachers import is_remote

if TYPE_CHECKING:
    from persea.config.schema import TeacherSection
    from persea.evaluation.check_sampling import MeasuredSample
    from persea.evaluation.compatibility import PairCompatibility, TemplateLikelihood
    from persea.evaluation.named_mass import NamedMass
    from persea.evaluation.unwritable import UnwritableTexts, UnwritableTokens
    from persea.pipeline.run_context import RunContext
    from persea.tokenization.tokens import RenderedTokens
    from persea.vocab_extension.resize_model import ProgressCallback


def check_teachers(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Measure whether each teacher's tokenizer and template suit the student.

    Compares the two tokenizations of every skill's reference answers and of the recipe's texts.

    Raises:
        RefusedError: A pair is outside the limits of the `check` section.
    """
    settings = context.recipe.check
    teachers = [t for t in context.recipe.teachers if not t.reference]
    progress("check", 0.0, "opening the tokenizers")
    student_tokens = [s.render(context.models.student_renderer) for s in context.check_samples]
    pairs: list[PairCompatibility] = []
    likelihoods: list[TemplateLikelihood] = []
    measured: list[MeasuredSample] = []
    named: list[NamedMass] = []
    for k, teacher in enumerate(teachers):

        def teacher_progress(share: float, words: str, k: int = k) -> None:
            progress("check", (k + share) / len(teachers), words)

        # the weights live in this call only: one teacher in memory at a time
        found = _check_teacher(context, teacher, student_tokens, teacher_progress)
        pairs += found[0]
        likelihoods += found[1]
        measured += found[2]
        named += _measure_named_mass(context, teacher, teacher_progress)
        info = context.models.family_info.get(teacher.name, {"family": "text only", "note": ""})
        note = ", see its note in check.json" if info["note"] else ""
        progress("check", (k + 1) / len(teachers), f"{teacher.name} ({info['family']}{note})")
    student = context.models.student_renderer.vocabulary
    unwritable_tokens = [
        one
        for t in teachers
        for one in find_unwritable_tokens(
            t.name,
            context.models.renderers[t.name].vocabulary,
            student,
            context.models.event_maps[t.name],
        )
    ]
    storage.write_json(
        folder / "check.json",
        {
            "pairs": [p.to_json() for p in pairs],
            "likelihoods": [likelihood.to_json() for likelihood in likelihoods],
            "measured": [one.to_json() for one in measured],
            "families": context.models.family_info,
        }
        | nonempty("unwritable_texts", context.unwritable_texts)
        | nonempty("unwritable_tokens", unwritable_tokens)
        | nonempty("named_mass", named),
    )
    refuse_low_named_mass(named, settings.min_named_mass)
    refuse_unwritable_texts(context.unwritable_texts, settings.max_unwritable_share)
    refuse_incompatible(
        pairs,
        likelihoods,
        settings.min_common_share,
        settings.max_disagreement,
        settings.max_template_excess,
    )


def _measure_named_mass(
    context: RunContext, teacher: TeacherSection, progress: Callable[[float, str], None]
) -> list[NamedMass]:
    """Measure what the listed tokens of a teacher behind a server keep of its probability."""
    endpoint = teacher.endpoint
    if not context.recipe.check.min_named_mass or endpoint is None or not endpoint.top_logprobs:
        return []
    progress(0.5, f"{teacher.name}: scoring reference answers")
    return measure_named_mass(
        context.models.load_teacher(teacher.name, context.recipe.audition.batch_size),
        context.models.event_maps[teacher.name],
        [
            s
            for s in context.check_samples
            if s.is_supported_by(context.models.renderers[teacher.name])
        ],
    )


def nonempty(
    key: str,
    found: Sequence[UnwritableTexts] | Sequence[UnwritableTokens] | Sequence[NamedMass],
) -> dict[str, Any]:
    """Return the records under a key of the file; no key for none, as most vocabularies have."""
    return {key: [one.to_json() for one in found]} if found else {}


def _check_teacher(
    context: RunContext,
    teacher: TeacherSection,
    student_tokens: Sequence[list[RenderedTokens]],
    progress: Callable[[float, str], None],
) -> tuple[list[PairCompatibility], list[TemplateLikelihood], list[MeasuredSample]]:
    """Compare one teacher with the student; loads its weights if they are small and local."""
    settings, models, name = context.recipe.check, context.models, teacher.name
    renderer = models.renderers[name]
    progress(0.0, f"{name}: opening the event map")
    event_map = models.event_maps[name]
    load_weights = settings.measure_likelihood and not is_remote(teacher)
    if settings.measure_likelihood is None and not is_remote(teacher):
        load_weights = is_small_local_model(model_source(teacher), settings.max_likelihood_bytes)
    samples = [
        (sample, tokens)
        for sample, tokens in zip(context.check_samples, student_tokens, strict=True)
        if sample.is_supported_by(renderer)
    ]
    weights = None
    if load_weights:
        progress(0.0, f"{name}: loading the weights")
        weights = measure_weights(
            models.load_teacher(name, context.recipe.audition.batch_size),
            event_map,
            [sample for sample, _ in samples if sample.skill != TEXT_FILES_SKILL],
            settings.max_measured_logits,
            context.recipe.seed,
            settings.min_counted_probability,
            progress,
            # plain text has no template to compare with none
            with_template=not renderer.is_text,
        )
    pairs = [
        check_pair(
            name,
            renderer,
            models.student_renderer,
            event_map,
            sample,
            tokens,
            weights.retained_mass if weights and sample.skill != TEXT_FILES_SKILL else None,
            weights.chosen_of(sample) if weights else None,
        )
        for sample, tokens in samples
    ]
    return (pairs, weights.likelihoods, [weights.measured]) if weights else (pairs, [], [])
