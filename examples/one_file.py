"""A whole distillation in one file: two teachers, one student, a plain PyTorch loop.

    python examples/one_file.py [steps [questions for each teacher]]

Two saplings with tokenizers and chat formats of their own (Qwen, Gemma) teach a Llama sapling.
No recipe and no run folder; `persea.distill` does the same with caching, resuming and a report.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import persea
from persea.cache.unit import CachedAnswer
from persea.chat.messages import FinishReason
from persea.distributions import sample_distributions
from persea.models.loading import ModelSource, load_model
from persea.tasks.generated import CODE_TASK, LANGUAGES_TASK
from persea.tasks.task import Split
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher

SAPLINGS = Path(__file__).resolve().parent.parent / "saplings"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
QUESTIONS = int(sys.argv[2]) if len(sys.argv) > 2 else 400


class Answers(list[CachedAnswer]):
    """Cached answers in memory; `persea.open_cache` reads them from a run folder."""

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order of the answers in an epoch."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))


def load(name: str) -> Teacher:
    """Load a sapling: tokenizer, chat format and weights."""
    renderer, source = persea.load_renderer(str(SAPLINGS / name)), ModelSource(str(SAPLINGS / name))
    engine = TransformersEngine(load_model(source, renderer, name), len(renderer.vocabulary))
    return Teacher(name, renderer, engine)


torch.manual_seed(0)
student, cache, event_maps = load("llama-sapling"), Answers(), {}

# 1. Each teacher answers questions in its own chat format. Keep its distribution at every token,
#    sampled to a few entries without bias (tau: the mean KL to the full one is at most 0.01 nats).
for name, task in (("qwen-sapling", LANGUAGES_TASK), ("gemma-sapling", CODE_TASK)):
    teacher = load(name)
    event_maps[name] = persea.event_map(teacher=teacher.renderer, student=student.renderer)
    print(f"{name}: {event_maps[name].num_events} events in common")
    prompts = [item.prompt for item in task.items(Split.TRAIN, QUESTIONS, seed=0)]
    answers = teacher.answer(prompts, max_new_tokens=64)
    answers = [one for one in answers if one.finish is FinishReason.STOP]
    scores = teacher.compute_logprobs([one.conversation for one in answers])
    for answer, (tokens, logprobs_NW) in zip(answers, scores, strict=True):
        labels_N = tokens.ids_T[tokens.loss_mask_T]
        rows = sample_distributions(logprobs_NW, labels_N, tau=0.01, seed=answer.prompt_id)
        cache.append(CachedAnswer(answer, tokens, rows))

# 2. Align both tokenizers by bytes and train: KL over common events where both start a token at
#    the same byte, cross-entropy elsewhere.
dataset = persea.DistillDataset(cache, student=student.renderer, event_maps=event_maps)
loss_fn = persea.losses.EventKL(event_weight=0.7)
model = student.engine.model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS, pct_start=0.1)
for step in range(STEPS):
    batch = dataset.batch(step)
    logits_BSV = model(input_ids=batch.ids_BS, attention_mask=batch.mask_BS).logits
    logits_NV = logits_BSV[batch.row_N, batch.position_N, : len(student.renderer.vocabulary)]
    out = loss_fn(logits_NV, batch.labels_N, batch.targets)
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 50 == 0 or step == STEPS - 1:
        metrics = "  ".join(f"{name} {value:.3f}" for name, value in out.metrics.items())
        print(f"step {step:4d}  loss {out.loss.item():.3f}  {metrics}")

# 3. The student answers held-out questions.
model.eval()
for task in (LANGUAGES_TASK, CODE_TASK):
    items = task.items(Split.TEST, min(50, QUESTIONS), seed=0)
    answers = student.answer([item.prompt for item in items], max_new_tokens=64)
    pairs = zip(items, answers, strict=True)
    right = sum(task.grade(i, a.conversation.messages[-1]) == "right" for i, a in pairs)
    print(f"{task.name}: {right}/{len(items)}  e.g. {answers[0].text!r}")
