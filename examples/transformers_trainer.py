"""Distil with plain transformers.Trainer on persea's dataset and loss.

A small capture is made first: the Qwen sapling (a bundled test model) answers prompts, and the
distribution behind each of its tokens is kept. The student is the Llama sapling, whose tokenizer
differs. Run from the root of the repository:

    python examples/transformers_trainer.py [STEPS]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from persea.cache.reader import open_cache_reader
from persea.cache.unit import CachedAnswer, write_unit
from persea.chat.messages import FinishReason
from persea.distributions import sample_distributions
from persea.losses import EventKL, Loss
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.tasks.generated import LANGUAGES_TASK
from persea.tasks.task import Split
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher
from persea.training.dataset import DistillDataset

SAPLINGS = Path(__file__).resolve().parent.parent / "saplings"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
TAU = 0.02  # tokens below this probability are sampled


def capture(teacher: Teacher, folder: Path, num_prompts: int) -> None:
    """Let a teacher answer prompts and write a cache. `persea capture` does this for a recipe."""
    prompts = [item.prompt for item in LANGUAGES_TASK.items(Split.TRAIN, num_prompts, seed=0)]
    answers = [
        a for a in teacher.answer(prompts, max_new_tokens=48) if a.finish is FinishReason.STOP
    ]
    scored = teacher.compute_logprobs([a.conversation for a in answers])
    cached = [
        CachedAnswer(
            answer,
            tokens,
            sample_distributions(
                logprobs_NW, tokens.ids_T[tokens.loss_mask_T], TAU, seed=answer.prompt_id
            ),
        )
        for answer, (tokens, logprobs_NW) in zip(answers, scored, strict=True)
    ]
    write_unit(folder, "unit", cached, {}, tau=TAU)


class DistillTrainer(transformers.Trainer):
    """A Trainer whose loss is one of persea's: logits at supervised positions, labels, targets."""

    def __init__(self, *args: Any, loss_fn: Loss, vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distill_loss, self.vocab_size = loss_fn, vocab_size

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        batch = inputs["batch"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits_NV = outputs.logits[batch.row_N, batch.position_N, : self.vocab_size]
        out = self.distill_loss(logits_NV.float(), batch.labels_N, batch.targets)
        return (out.loss, outputs) if return_outputs else out.loss


def main() -> None:
    """Capture, then train."""
    transformers.set_seed(0)
    torch.set_num_threads(1)
    teacher_source, student_source = (
        ModelSource(str(SAPLINGS / name)) for name in ("qwen-sapling", "llama-sapling")
    )
    teacher_renderer = load_renderer(teacher_source, "teacher")
    student_renderer = load_renderer(student_source, "student")
    with tempfile.TemporaryDirectory() as folder:
        engine = TransformersEngine(
            load_model(teacher_source, teacher_renderer, "teacher"),
            len(teacher_renderer.vocabulary),
        )
        capture(Teacher("qwen", teacher_renderer, engine), Path(folder) / "capture", 200)
        cache = open_cache_reader(Path(folder) / "capture", ["unit"])
        dataset = DistillDataset(
            cache, student=student_renderer, teachers={"qwen": teacher_renderer}
        )
        print(f"{len(dataset)} examples")
        trainer = DistillTrainer(
            model=load_model(student_source, student_renderer, "student").float(),
            loss_fn=EventKL(dataset.event_maps["qwen"], event_weight=0.7),
            vocab_size=len(student_renderer.vocabulary),
            train_dataset=dataset,
            data_collator=dataset.collate_fn,
            args=transformers.TrainingArguments(
                output_dir=str(Path(folder) / "trainer"),
                max_steps=STEPS,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                logging_steps=max(1, STEPS // 5),
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                disable_tqdm=True,
                use_cpu=True,
            ),
        )
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")


if __name__ == "__main__":
    main()
