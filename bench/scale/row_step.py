"""One training step of SmolLM2-135M: events of Gemma 3 270M, or cross-entropy by other libraries.

The same four documents of about 220 tokens for all arms, AdamW, clipping; float32, or products in
bfloat16 with float32 weights and moments. The documents
are captured and projected by a process of its own (`python row_step.py MODELS FILE`), so that the
memory of the teacher does not count as a step's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from persea.alignment.event_map import load_event_map
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason
from persea.config.schema import TrainingSection
from persea.config.size_defaults import unset_size_keys
from persea.distributions import sample_distributions
from persea.losses import event_kl_loss_from_hidden
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Answer, Teacher
from persea.training.dataset import build_dataset
from persea.training.student import ComputeOptions, load_student

LANGUAGES, LINES, BATCH, TAU = ("ind", "vie", "eng", "ind"), 4, 4, 0.02
MAX_CHARACTERS = {"ind": 500, "vie": 420, "eng": 1000}
RATE = 1e-5
# the default of a student of this size in this build, of transformers and TRL; not of earlier ones
FUSED = "optim" in unset_size_keys(TrainingSection())


def documents() -> list[str]:
    folder = Path(os.environ["PERSEA_DATA"]) / "parallel"
    found = []
    for k, language in enumerate(LANGUAGES):
        lines = (folder / f"ntrex.{language}.txt").read_text().splitlines()
        found.append(" ".join(lines[k * 9 : k * 9 + LINES * 2])[: MAX_CHARACTERS[language]])
    return found


class Listed(tuple[CachedAnswer, ...]):
    """Cached answers in memory."""

    __slots__ = ()

    def epoch_order(self, seed: int, epoch: int) -> Any:
        return torch.arange(len(self)).numpy()


def make_batch(models: Path, file: Path) -> None:
    """Let Gemma score the documents, and write the student's batch."""
    source = ModelSource(str(models / "gemma3-270m"))
    renderer = load_renderer(source, "gemma")
    student = load_renderer(ModelSource(str(models / "smollm2")), "student")
    engine = TransformersEngine(load_model(source, renderer, "gemma"), len(renderer.vocabulary), 4)
    teacher = Teacher("gemma", renderer, engine)
    talks = [Conversation.from_document(text) for text in documents()]
    answers = []
    for k, (talk, (tokens, logprobs)) in enumerate(
        zip(talks, teacher.compute_logprobs(talks), strict=True)
    ):
        targets_T = tokens.ids_T[tokens.loss_mask_T]
        kept = sample_distributions(logprobs, targets_T, TAU, f"step {k}")
        answer = Answer(f"text-{k}", "gemma", "texts", "", talk, FinishReason.STOP)
        answers.append(CachedAnswer(answer, tokens, kept))
    events = {"gemma": load_event_map(renderer, student)}
    feed = build_dataset(
        [(Listed(answers), 1.0)], student, events, batch_size=BATCH, seed=0, max_length=512
    )
    torch.save(feed.batch(0), file)


def prepare(arm: str, models: Path, folder: Path) -> Callable[[int], Any]:
    arm, _, precision = arm.partition(", in ")
    half = precision == "bfloat16"
    file = folder / "batch.pt"
    subprocess.run([sys.executable, __file__, str(models), str(file)], check=True)
    batch = torch.load(file, weights_only=False)
    source = ModelSource(str(models / "smollm2"))
    options = {"options": ComputeOptions(bf16=True)} if half else {}
    student = load_student(source, load_renderer(source, "student"), None, **options)
    model, weights = student.model, student.trainable_parameters
    labels_BS = torch.full_like(batch.ids_BS, -100)
    labels_BS[batch.row_N, batch.position_N + 1] = batch.labels_N
    figures = {"tokens": int(batch.mask_BS.sum()), "learned": len(batch.labels_N)}
    inputs = {
        "input_ids": batch.ids_BS,
        "attention_mask": batch.mask_BS.long(),
        "labels": labels_BS,
    }

    def events() -> torch.Tensor:
        states = student.hidden_and_head(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N)
        return event_kl_loss_from_hidden(*states, batch.labels_N, batch.targets, 0.7).loss

    def plain() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss: torch.Tensor = model(**inputs, use_cache=False).loss
        return loss

    backward: Callable[[], Any]
    if arm == "TRL SFT":
        trainer = sft_trainer(model, folder, half)
        backward = lambda: trainer.training_step(trainer.model, dict(inputs))  # noqa: E731
    else:
        loss = events if arm == "persea" else plain
        backward = lambda: loss().backward()  # noqa: E731
    model.train()
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=FUSED)

    def work(number: int) -> dict[str, float]:
        backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return figures

    return work


def sft_trainer(model: Any, folder: Path, half: bool) -> Any:
    """Return TRL's SFTTrainer of a model; its own collator and data set are not used."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=str(folder / "sft"),
        report_to=[],
        use_cpu=True,
        bf16=half,
        gradient_checkpointing=False,
        per_device_train_batch_size=BATCH,
        max_length=None,
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": [[1, 2, 3]] * BATCH}),
        processing_class=tokenizer_of(model),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by its training loop
    return trainer


def tokenizer_of(model: Any) -> Any:
    """Return a small tokenizer: the data set has ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{k}>": k for k in range(8)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<1>", pad_token="<2>", unk_token="<0>"
    )


if __name__ == "__main__":
    make_batch(Path(sys.argv[1]), Path(sys.argv[2]))
