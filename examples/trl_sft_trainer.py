"""Train on persea's dataset and loss with TRL's `SFTTrainer`. Needs `pip install trl`.

    persea run recipes/quickstart.yaml          (or another recipe; the teachers answer once)
    python examples/trl_sft_trainer.py runs/quickstart [steps]

SFTTrainer takes a `datasets.Dataset` only: `to_hf_dataset()` gives one of example numbers, and
`collate_fn` turns these numbers into batches.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import persea

SAPLINGS = Path(__file__).resolve().parent.parent / "saplings"
RUN = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/quickstart")
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 100
TEACHERS = ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling")


class DistillSFTTrainer(SFTTrainer):
    """An SFTTrainer whose loss is persea's event KL."""

    loss_fn = persea.losses.EventKL(event_weight=0.7)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):  # noqa: ANN001, ANN003, ANN201
        """Compute the loss at the supervised positions."""
        batch = inputs["batch"].to(inputs["input_ids"].device)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits_NV = outputs.logits[batch.row_N, batch.position_N, :VOCAB_SIZE]
        loss = self.loss_fn(logits_NV, batch.labels_N, batch.targets).loss
        return (loss, outputs) if return_outputs else loss


student = persea.load_renderer(str(SAPLINGS / "llama-sapling"))
teachers = {name: persea.load_renderer(str(SAPLINGS / name)) for name in TEACHERS}
dataset = persea.DistillDataset(persea.open_cache(RUN), student=student, teachers=teachers)
VOCAB_SIZE = len(student.vocabulary)  # the model's embedding may be padded beyond it
trainer = DistillSFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(SAPLINGS / "llama-sapling", dtype="float32"),
    processing_class=AutoTokenizer.from_pretrained(SAPLINGS / "llama-sapling"),
    train_dataset=dataset.to_hf_dataset(),
    data_collator=dataset.collate_fn,
    args=SFTConfig(
        output_dir="runs/trl_sft_trainer",
        per_device_train_batch_size=16,
        max_steps=STEPS,
        learning_rate=3e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=False,  # the default needs a GPU
        remove_unused_columns=False,  # keep the numbers of the examples
        dataset_kwargs={"skip_prepare_dataset": True},  # persea has tokenized the answers already
    ),
)
trainer.train()
trainer.save_model("runs/trl_sft_trainer/student")
