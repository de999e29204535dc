"""Examples of real captures: alignment, events and masks of Gemma 3 270M's texts for SmolLM2-135M.

The texts are scored by a process of its own (`python row_targets.py MODELS FILE`). An arm makes the
examples of all of them with nothing known of the tokenizers' contexts, or again and again.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persea.alignment import token_order
from persea.alignment.event_map import load_event_map
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason
from persea.distributions import sample_distributions
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Answer, Teacher
from persea.training.example import ExampleMaker

LANGUAGES, TEXTS, LINES, TAU = ("ind", "tha", "vie", "eng"), 6, 3, 0.02


def documents() -> list[str]:
    folder = Path(os.environ["PERSEA_DATA"]) / "parallel"
    return [
        " ".join(lines[k * LINES : (k + 1) * LINES])
        for language in LANGUAGES
        for lines in [(folder / f"ntrex.{language}.txt").read_text().splitlines()]
        for k in range(TEXTS)
    ]


def capture(models: Path, file: Path) -> None:
    """Let Gemma score the documents."""
    source = ModelSource(str(models / "gemma3-270m"))
    renderer = load_renderer(source, "gemma")
    engine = TransformersEngine(load_model(source, renderer, "gemma"), len(renderer.vocabulary), 4)
    teacher = Teacher("gemma", renderer, engine)
    talks = [Conversation.from_document(text) for text in documents()]
    answers = []
    for k, (talk, (tokens, logprobs)) in enumerate(
        zip(talks, teacher.compute_logprobs(talks), strict=True)
    ):
        kept = sample_distributions(logprobs, tokens.ids_T[tokens.loss_mask_T], TAU, f"targets {k}")
        answer = Answer(f"text-{k}", "gemma", "texts", "", talk, FinishReason.STOP)
        answers.append(CachedAnswer(answer, tokens, kept))
    file.write_bytes(pickle.dumps(answers))


def prepare(arm: str, models: Path, folder: Path) -> Callable[[int], Any]:
    file = folder / "answers.pickle"
    subprocess.run([sys.executable, __file__, str(models), str(file)], check=True)
    answers = pickle.loads(file.read_bytes())
    teacher, student = (
        load_renderer(ModelSource(str(models / name)), name) for name in ("gemma3-270m", "smollm2")
    )
    known = {"gemma": load_event_map(teacher, student)}

    def work(number: int) -> dict[str, float]:
        events = known
        if arm == "persea":
            token_order._TOKEN_ORDERS.clear()
            events = {"gemma": load_event_map(teacher, student)}
        maker = ExampleMaker.create(student, events, False, "auto")
        examples = [maker.make(answer) for answer in answers]
        return {
            "student_tokens": sum(int(one.tokens.loss_mask_T.sum()) for one in examples),
            "teacher_tokens": sum(int(a.tokens.loss_mask_T.sum()) for a in answers),
        }

    return work


if __name__ == "__main__":
    capture(Path(sys.argv[1]), Path(sys.argv[2]))
