"""Capture by scoring: documents through Gemma 3 270M, and what is stored of its distributions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persea.cache.capture import capture_teacher, plan_units
from persea.chat.messages import Conversation
from persea.data.prompts import Prompt
from persea.evaluation.audition import Cast
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher

TEXTS, LINES = 8, 3  # documents a round, lines of a document
LANGUAGES = ("eng", "ind", "vie", "tha")
HEAD_ROWS = 256  # positions that the bare form gives to the head at once


def documents(number: int) -> list[Prompt]:
    """Return the documents of a round: lines of parallel news, cut to about 92 tokens."""
    folder = Path(os.environ["PERSEA_DATA"]) / "parallel"
    found = []
    for k in range(TEXTS):
        language = LANGUAGES[k % len(LANGUAGES)]
        lines = (folder / f"ntrex.{language}.txt").read_text().splitlines()
        at = (number * TEXTS + k) * LINES
        text = " ".join(lines[at : at + LINES])[: 400 if language != "tha" else 250]
        found.append(Prompt(f"{number} {k}", Conversation.from_document(text), "texts", language))
    return found


def prepare(arm: str, models: Path, folder: Path) -> Callable[[int], Any]:
    arm, _, precision = arm.partition(", in ")
    more = {"precision": precision} if precision else {}  # no key of earlier builds
    source = ModelSource(str(models / "gemma3-270m"), **more)
    renderer = load_renderer(source, "gemma")
    model = load_model(source, renderer, "gemma")
    teacher = Teacher("gemma", renderer, TransformersEngine(model, len(renderer.vocabulary), 8))

    def capture(number: int) -> dict[str, float]:
        cast = Cast({"texts": (("gemma", 1.0),)}, ())
        settings = {"tau": 0.02, "seed": 0}
        some = documents(number)
        units = plan_units(some, cast, {"gemma": "weights"}, 64, {**settings, "n": number})
        stored = []
        capture_teacher(
            units,
            teacher,
            folder,
            max_new_tokens=8,
            use_given_answers=True,
            on_unit=lambda unit: stored.append(unit.num_tokens),
            **settings,
        )
        return {"tokens": sum(stored)}

    @torch.inference_mode()
    def bare(number: int) -> dict[str, float]:
        rendered = [renderer.render(p.conversation) for p in documents(number)]
        longest = max(map(len, rendered))
        ids, mask = torch.zeros(2, len(rendered), longest, dtype=torch.int64)
        for row, one in enumerate(rendered):
            ids[row, : len(one)], mask[row, : len(one)] = torch.from_numpy(one.ids_T), 1
        places = [np.flatnonzero(one.loss_mask_T) - 1 for one in rendered]
        if arm == "model(...).logits":
            logits = model(input_ids=ids, attention_mask=mask).logits
            return {"tokens": sum(map(len, places)), "sum": float(logits[0, 0, 0])}
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        wanted = torch.cat([hidden[row, at] for row, at in enumerate(places)])
        total = 0.0
        for part in wanted.split(HEAD_ROWS):
            logits = torch.nn.functional.linear(part, model.lm_head.weight)
            total += float(logits[0, 0])
        return {"tokens": len(wanted), "sum": total}

    return capture if arm == "persea" else bare
