"""Measure student, base, teachers and reference models on the recipe's held-out texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from persea import storage
from persea.errors import DataError
from persea.evaluation.text_bits import (
    DocumentBits,
    TextReader,
    TextWindows,
    measure_document_bits,
    split_documents,
)
from persea.evaluation.text_report import TextReport, compare_on_texts, document_records
from persea.pipeline.model_refs import BASE, STUDENT

if TYPE_CHECKING:
    from persea.evaluation.answering import EvaluatedModel
    from persea.pipeline.run_context import RunContext
    from persea.teachers.teacher import Teacher

TEXTS_FILE, TEXT_DOCUMENTS_FILE = "texts.json", "texts.jsonl"
NO_START_REASON = "it has no token before a document, so its first bytes have no probability"
TEXT_ONLY_REASON = "its engine returns no log-probabilities"


def evaluate_texts(
    context: RunContext,
    folder: Path,
    load: Callable[[str], Teacher],
    progress: Callable[[float, str], None],
) -> TextReport:
    """Measure every model on the held-out texts; write texts.json and texts.jsonl.

    Args:
        context: The recipe and its run folder.
        folder: Folder of the stage.
        load: Loads the model of a name.
        progress: Called with (share done, text).

    Raises:
        DataError: No document can be read by all models.
    """
    texts = prepare_texts(context, load)
    bits: dict[str, DocumentBits] = {}

    def model_progress(k: int, fraction: float, message: str) -> None:
        progress((k + fraction) / len(texts.measured), message)

    for k, (name, model) in enumerate(texts.measured.items()):
        bits[name] = measure_document_bits(model, texts.windows, partial(model_progress, k))
    report = compare_on_texts(
        texts.windows,
        bits,
        STUDENT,
        BASE,
        context.models.teacher_names,
        texts.unmeasured,
    )
    storage.write_json(folder / TEXTS_FILE, report.to_json())
    storage.write_json_lines(folder / TEXT_DOCUMENTS_FILE, document_records(texts.windows, bits))
    return report


@dataclass(frozen=True)
class PreparedTexts:
    """The held-out texts as all models read them.

    Attributes:
        windows: The documents, split where all models can read on.
        measured: Name -> model, of those that are measured.
        unmeasured: Name -> why a model is not.
    """

    windows: TextWindows
    measured: dict[str, EvaluatedModel]
    unmeasured: dict[str, str]


def prepare_texts(context: RunContext, load: Callable[[str], Teacher]) -> PreparedTexts:
    """Split the held-out texts for all models. See `evaluate_texts`.

    Raises:
        DataError: No document can be read by all models, or the student by none.
    """
    settings, models = context.recipe.evaluation, context.models
    names = [STUDENT, BASE, *models.renderers]
    evaluated: dict[str, EvaluatedModel] = {
        name: models.evaluated_model(name, settings.batch_size, (), load) for name in names
    }
    renderers = {name: models.renderers.get(name, models.student_renderer) for name in names}
    unmeasured = {name: TEXT_ONLY_REASON for name in names if evaluated[name].is_text_only}
    for name, renderer in renderers.items():
        if not renderer.document_tokens.prefix_ids:
            unmeasured.setdefault(name, NO_START_REASON)
    if STUDENT in unmeasured:
        raise DataError(
            f"the student cannot be measured on texts: {unmeasured[STUDENT]}",
            where="evaluation.texts",
            remedy="delete `evaluation.texts:`, or choose a student with a token that begins or "
            "ends a document",
        )
    measured = [name for name in names if name not in unmeasured]
    readers = [TextReader(renderers[name], models.max_positions(name)) for name in measured]
    windows = split_documents(context.held_out_texts, readers, settings.max_window_tokens)
    if not windows.documents:
        name, reason = next(iter(windows.left_out.items()))
        raise DataError(
            f"no document can be read by all models: {reason}",
            where=f"evaluation.texts, {name}",
            remedy="give texts that every tokenizer can represent",
        )
    return PreparedTexts(windows, {name: evaluated[name] for name in measured}, unmeasured)
