"""A whole two-family distillation in one flat file: copy it, change what you like.

    python examples/one_file.py [steps]

Two teachers with their own tokenizers and chat formats (Qwen and Gemma saplings) teach one Llama sapling. It uses persea's
pieces and none of its machinery: no recipe, no run folder, no cache on disk.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from persea.alignment.event_map import build_event_map
from persea.alignment.spans import common_boundaries
from persea.chat.messages import FinishReason
from persea.distributions import sample_distributions
from persea.losses import (
    build_batch_targets,
    build_event_targets,
    concat_event_targets,
    event_kl_loss,
)
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.tasks.generated import CODE_TASK, LANGUAGES_TASK
from persea.tasks.task import Split
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher

SAPLINGS = Path(__file__).resolve().parent.parent / "saplings"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
BATCH, PROMPTS, TAU, EVENT_SHARE = 16, 400, 0.01, 0.7


def speaker(name: str) -> Teacher:
    """A model in its own voice: tokenizer, chat template, weights."""
    source = ModelSource(str(SAPLINGS / name))
    voice = load_renderer(source, name)
    return Teacher(
        name, voice, TransformersEngine(load_model(source, voice, name), len(voice.vocabulary))
    )


torch.manual_seed(0)
student = speaker("llama-sapling")

# 1. Ask each teacher what it is good at, in its own chat format, and keep the distribution behind every token it said.
lessons = []
for name, skill in (("qwen-sapling", LANGUAGES_TASK), ("gemma-sapling", CODE_TASK)):
    teacher = speaker(name)
    bridge = build_event_map(
        teacher.renderer, student.renderer
    )  # both vocabularies laid over the same events
    print(
        f"{name}: {len(teacher.renderer.vocabulary)} tokens, student {len(student.renderer.vocabulary)}, {bridge.num_events} events in common"
    )
    prompts = [item.prompt for item in skill.items(Split.TRAIN, PROMPTS, seed=0)]
    answers = [
        a for a in teacher.answer(prompts, max_new_tokens=64) if a.finish is FinishReason.STOP
    ]

    # 2. Lay the student's tokens over the teacher's, by bytes: where both begin a token, the teacher's row can be learned.
    for answer, (said, logprobs_NW) in zip(
        answers, teacher.compute_logprobs([a.conversation for a in answers]), strict=True
    ):
        rows = sample_distributions(
            logprobs_NW, said.ids_T[said.loss_mask_T], TAU, seed=answer.prompt_id
        )  # sparse and unbiased
        mine = student.renderer.render(answer.conversation)
        both = common_boundaries(mine, said)
        row_C = (np.cumsum(said.loss_mask_T) - 1)[both.teacher_C]
        place_C = (np.cumsum(mine.loss_mask_T) - 1)[
            both.student_C
        ]  # which learned position of the answer each boundary is
        entry_M = np.concatenate(
            [np.arange(rows.offsets_N1[row], rows.offsets_N1[row + 1]) for row in row_C]
        )
        row_M = np.repeat(place_C, np.diff(rows.offsets_N1)[row_C])
        # what stands before each boundary, in both tokenizers: it rules some tokens out
        contexts = np.zeros((2, int(mine.loss_mask_T.sum())), np.int64)
        contexts[0, place_C] = bridge.teacher_mask.other.supervised_context_ids(
            mine, both.student_C
        )
        contexts[1, place_C] = bridge.student_mask.other.supervised_context_ids(
            said, both.teacher_C
        )
        entries = build_event_targets(
            bridge,
            row_M,
            rows.ids_M[entry_M],
            rows.probs_M[entry_M],
            student_context_N=contexts[0],
            teacher_context_N=contexts[1],
        )
        lessons.append((mine, entries, bridge))

# 3. Learn: events where a common boundary stands, cross-entropy elsewhere, every position with total weight one.
model = student.engine.model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
losses = []
for step in range(STEPS):
    chosen = [lessons[i] for i in np.random.default_rng(step).choice(len(lessons), BATCH)]
    width = max(len(mine) for mine, *_ in chosen)
    ids_BS = torch.zeros((BATCH, width), dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS)
    row_N, at_N, first = [], [], []
    for b, (mine, _, _) in enumerate(chosen):
        ids_BS[b, : len(mine)] = torch.from_numpy(mine.ids_T)
        mask_BS[b, : len(mine)] = 1
        learned = np.flatnonzero(mine.loss_mask_T)
        first.append(len(row_N))
        row_N += [b] * len(learned)
        at_N += (learned - 1).tolist()
    said = [
        build_batch_targets(bridge, concat_event_targets([entries], [n]), len(row_N))
        for (_, entries, bridge), n in zip(chosen, first, strict=True)
    ]
    logits_NV = model(input_ids=ids_BS, attention_mask=mask_BS).logits[
        row_N, at_N, : len(student.renderer.vocabulary)
    ]
    out = event_kl_loss(logits_NV, ids_BS[row_N, torch.tensor(at_N) + 1], said, EVENT_SHARE)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * min(1.0, (step + 1) / 30, max(0.05, 1.5 * (STEPS - step) / STEPS))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(out.loss.item())
    if step % 50 == 0 or step == STEPS - 1:
        print(
            f"step {step:4d}  loss {out.loss.item():.3f}  "
            + "  ".join(f"{k} {v:.3f}" for k, v in out.metrics.items())
        )

# 4. Ask the student something nobody trained on.
model.eval()
for skill in (LANGUAGES_TASK, CODE_TASK):
    items = skill.items(Split.TEST, 50, seed=0)
    answers = student.answer([i.prompt for i in items], max_new_tokens=64)
    right = sum(
        skill.grade(item, answer.conversation.messages[-1]) == "right"
        for item, answer in zip(items, answers, strict=True)
    )
    print(
        f"{skill.name}: {right}/{len(items)}   e.g. {items[0].prompt.conversation.messages[-1].text!r} -> {answers[0].text!r}"
    )
