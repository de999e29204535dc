"""Distil with TRL's SFTTrainer on persea's dataset and loss.

The same small capture and student as in transformers_trainer.py. SFTTrainer takes a
`datasets.Dataset`: `DistillDataset.to_hf_dataset()` gives one with the index of each example, and
`collate_fn` turns the indices into batches. Needs `pip install trl`.

    python examples/trl_sft_trainer.py [STEPS]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers_trainer import SAPLINGS, capture

from persea.cache.reader import open_cache_reader
from persea.losses import EventKL
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher
from persea.training.dataset import DistillDataset

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100


class DistillSFTTrainer(trl.SFTTrainer):
    """An SFTTrainer whose loss is persea's event KL."""

    distill_loss: EventKL
    vocab_size: int

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
        trainer = DistillSFTTrainer(
            model=load_model(student_source, student_renderer, "student").float(),
            processing_class=transformers.AutoTokenizer.from_pretrained(student_source.model),
            train_dataset=dataset.to_hf_dataset(),
            data_collator=dataset.collate_fn,
            args=trl.SFTConfig(
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
                bf16=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
        )
        trainer.distill_loss = EventKL(dataset.event_maps["qwen"], event_weight=0.7)
        trainer.vocab_size = len(student_renderer.vocabulary)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")


if __name__ == "__main__":
    main()
