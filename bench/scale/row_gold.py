"""The first epoch of a cross-tokenizer step: persea's capture and step, or TRL's GOLD loss.

Gemma 3 270M teaches SmolLM2-135M the four documents of row_step. persea captures them, makes the
examples and takes a step; another epoch is the step alone (row_step). The other arm runs both
models in each step, as TRL's GOLD trainer does, and TRL's own loss on both models' logits; the
trainer itself refuses this pair of tokenizers. AdamW, clipping; float32, or all products in
bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import baselines
from bench.scale.row_step import BATCH, RATE, documents
from persea.alignment import token_order
from persea.alignment.event_map import load_event_map
from persea.cache.capture import capture_teacher, plan_units
from persea.cache.reader import open_cache_reader
from persea.chat.messages import Conversation
from persea.data.prompts import Prompt
from persea.evaluation.audition import Cast
from persea.losses import event_kl_loss_from_hidden
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher
from persea.training.dataset import build_dataset
from persea.training.student import ComputeOptions, load_student


class Strings:
    """A tokenizer as GOLD asks it: token strings and their ids."""

    def __init__(self, vocabulary: Any) -> None:
        self.ids = vocabulary.backend.get_vocab(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)


def prepare(arm: str, models: Path, folder: Path) -> Callable[[int], Any]:
    arm, _, precision = arm.partition(", in ")
    half = precision == "bfloat16"
    sources = [
        ModelSource(str(models / "gemma3-270m"), precision=precision or "auto"),
        ModelSource(str(models / "smollm2")),
    ]
    of_teacher, of_student = (load_renderer(one, one.model) for one in sources)
    teacher_model = load_model(sources[0], of_teacher, "gemma")
    student = load_student(sources[1], of_student, None, options=ComputeOptions(bf16=half))
    weights = student.trainable_parameters
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=True)
    talks = [Conversation.from_document(text) for text in documents()]
    engine = TransformersEngine(teacher_model, len(of_teacher.vocabulary), BATCH)
    teacher = Teacher("gemma", of_teacher, engine)
    student.model.train()

    def captured(number: int) -> Any:
        cast = Cast({"texts": (("gemma", 1.0),)}, ())
        prompts = [Prompt(f"{number} {k}", talk, "texts", "") for k, talk in enumerate(talks)]
        units = plan_units(prompts, cast, {"gemma": "weights"}, 64, {"n": number})
        capture_teacher(
            units, teacher, folder, max_new_tokens=8, seed=0, tau=0.02, use_given_answers=True
        )
        cache = open_cache_reader(folder, [unit.name for unit in units])
        token_order._TOKEN_ORDERS.clear()  # what masks found out is not known yet
        events = {"gemma": load_event_map(of_teacher, of_student)}
        feed = build_dataset(
            [(cache, 1.0)], of_student, events, batch_size=BATCH, seed=0, max_length=512
        )
        return feed.batch(0)

    def persea(number: int) -> torch.Tensor:
        batch = captured(number)
        states = student.hidden_and_head(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N)
        return event_kl_loss_from_hidden(*states, batch.labels_N, batch.targets, 0.7).loss

    gold = baselines.gold(Strings(of_teacher.vocabulary), Strings(of_student.vocabulary))

    def side(renderer: Any, model: Any, talk: Conversation) -> baselines.Sequence:
        tokens = renderer.render(talk)
        ids_T = torch.from_numpy(tokens.ids_T).long()
        learned_T = torch.from_numpy(tokens.loss_mask_T)
        size_T = torch.from_numpy(renderer.vocabulary.lengths_W[tokens.ids_T]).long()
        end_T = size_T.cumsum(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        return baselines.Sequence(logits_TV, ids_T, learned_T, end_T - size_T, end_T)

    def trl(number: int) -> torch.Tensor:
        total = torch.zeros(())
        for talk in talks:
            with torch.no_grad():
                theirs = side(of_teacher, teacher_model, talk)
            total = total + baselines.gold_loss(gold, side(of_student, student.model, talk), theirs)
        return total / len(talks)

    loss = trl if arm.startswith("TRL") else persea

    def work(number: int) -> dict[str, float]:
        found = loss(number)
        found.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": round(float(found.detach()), 3)}

    return work
