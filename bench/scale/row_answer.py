"""Capture by answering: SmolLM2-135M-Instruct answers chat prompts, and what is stored of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from persea.cache.capture import capture_teacher, plan_units
from persea.cache.unit import read_record
from persea.chat.messages import Conversation
from persea.data.prompts import Prompt
from persea.evaluation.audition import Cast
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher

NEW_TOKENS, BATCH = 48, 8
QUESTIONS = (
    "What is the capital of France? Answer in one word.",
    "Name three fruits.",
    "Say hello.",
    "What do bees make? One short sentence.",
    "What is the opposite of cold? One word.",
    "Name a country in Asia.",
    "Which animal barks?",
    "What colour is the sky on a clear day?",
)


def prompts(number: int) -> list[Prompt]:
    """Return four short questions and four with a text of one to four lines of news."""
    path = Path(os.environ["PERSEA_DATA"]) / "parallel" / "ntrex.eng.txt"
    lines = path.read_text().splitlines()
    found = []
    for k in range(BATCH):
        text = QUESTIONS[(number + k) % len(QUESTIONS)]
        if k % 2:
            at = (number * BATCH + k) * 4
            news = " ".join(lines[at : at + (k + 1) // 2 + 1])[: 250 * ((k + 1) // 2)]
            text = f"Give this text a short title.\n\n{news}"
        found.append(Prompt(f"{number} {k}", Conversation.from_question(text), "chat", "en"))
    return found


def prepare(arm: str, models: Path, folder: Path) -> Callable[[int], Any]:
    arm, _, precision = arm.partition(", in ")
    more = {"precision": precision} if precision else {}  # no key of earlier builds
    source = ModelSource(str(models / "smollm2"), **more)
    renderer = load_renderer(source, "smol")
    model = load_model(source, renderer, "smol")
    teacher = Teacher("smol", renderer, TransformersEngine(model, len(renderer.vocabulary), BATCH))

    def capture(number: int) -> dict[str, float]:
        cast = Cast({"chat": (("smol", 1.0),)}, ())
        settings = {"tau": 0.02, "seed": 0, "max_new_tokens": NEW_TOKENS}
        units = plan_units(
            prompts(number), cast, {"smol": "weights"}, 64, {**settings, "n": number}, NEW_TOKENS
        )
        capture_teacher(units, teacher, folder, **settings)
        record = read_record(folder, units[0].name)
        return {"kept": record["answers"], "tokens": record["tokens"]}

    @torch.inference_mode()
    def bare(number: int) -> dict[str, float]:
        asked = [
            renderer.render_prompt(teacher.build_conversation(p)).ids_T for p in prompts(number)
        ]
        longest = max(map(len, asked))
        ids, mask = torch.zeros(2, len(asked), longest, dtype=torch.int64)
        for row, one in enumerate(asked):
            ids[row, longest - len(one) :], mask[row, longest - len(one) :] = (
                torch.from_numpy(one),
                1,
            )
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(renderer.stop_ids),
            pad_token_id=renderer.stop_ids[0],
        )
        return {"shortest": min(map(len, asked)), "longest": longest, "columns": output.shape[1]}

    return bare if arm == "model.generate" else capture
