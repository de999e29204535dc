"""Sizes, small Llama models, and the training of teachers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bench.objectives.data import SCRIPTS, TEACHES, Window, domains_of
from bench.objectives.vocabularies import Speaker


@dataclass(frozen=True)
class Shape:
    """A Llama model with tied embedding and head."""

    hidden: int
    layers: int
    heads: int
    inner: int


@dataclass(frozen=True)
class Size:
    """The sizes of one experiment.

    Results are keyed by the size's name: larger sizes are added, never replaced.

    vocabulary    tokens kept of each real tokenizer
    steps         of a student; batch: windows per step, equally many of each domain within one
    teacher_steps of each teacher, with teacher_batch windows
    limited       training windows per domain in the regime 'limited'
    test          held-out windows per domain
    seen          training windows per domain that decide which tokens are kept
    of            the size whose vocabularies, teachers, examples and shares this one uses: only its
        student differs
    teaches       teacher -> its domains
    per_page      held-out windows of a page, at most
    met           windows per domain that every student is pretrained on by cross-entropy, other
        than those of distillation; 0 = none
    extended      tokens added to the student's vocabulary, in which its examples then are
    """

    name: str
    teacher: Shape
    student: Shape
    vocabulary: int
    steps: int
    batch: int
    teacher_steps: Mapping[str, int]
    teacher_batch: int
    limited: int
    test: int
    seen: int = 1300
    of: str = ""
    teaches: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: TEACHES)
    per_page: int = 2
    met: int = 0
    extended: int = 0

    @property
    def domains(self) -> tuple[str, ...]:
        return domains_of(self.teaches)


SIZES = {
    s.name: s
    for s in (
        Size(
            "toy",
            Shape(32, 1, 2, 64),
            Shape(32, 1, 2, 64),
            1024,
            4,
            11,
            {"A": 4, "B": 4, "C": 4},
            8,
            4,
            4,
            40,
        ),
        Size(
            "xs",
            Shape(160, 3, 4, 448),
            Shape(96, 2, 4, 256),
            8192,
            240,
            11,
            {"A": 900, "B": 600, "C": 450},
            16,
            48,
            60,
        ),
        *(
            Size(
                f"xs-{name}",
                Shape(160, 3, 4, 448),
                student,
                8192,
                240,
                11,
                {"A": 900, "B": 600, "C": 450},
                16,
                48,
                60,
                of="xs",
            )
            for name, student in (("wide", Shape(160, 3, 4, 448)), ("wider", Shape(256, 4, 4, 704)))
        ),
        *(
            Size(
                name,
                Shape(160, 3, 4, 448),
                Shape(96, 2, 4, 256),
                8192,
                240,
                8,
                {"B": 500},
                16,
                48,
                60,
                of=of,
                teaches=SCRIPTS,
                per_page=6,
                met=met,
                extended=extended,
            )
            for name, of, met, extended in (
                ("scripts", "", 0, 0),
                ("scripts-met", "scripts", 640, 0),
                ("scripts-512", "scripts", 640, 512),
                ("scripts-2048", "scripts", 640, 2048),
            )
        ),
        Size(
            "s",
            Shape(384, 6, 6, 1024),
            Shape(192, 4, 4, 512),
            16384,
            1200,
            66,
            {"A": 8000, "B": 5000, "C": 4000},
            64,
            320,
            80,
        ),
        Size(
            "m",
            Shape(768, 10, 12, 2048),
            Shape(384, 8, 6, 1024),
            16384,
            4000,
            132,
            {"A": 20000, "B": 10000, "C": 8000},
            128,
            640,
            80,
        ),
    )
}


def make(shape: Shape, vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def padded(ids: Sequence[Sequence[int]], start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids_BS with the start token before each window, right padded, and learn_BS.

    learn_BS[:, s] = position s is followed by a token.
    """
    width = max(len(i) for i in ids) + 1
    ids_BS = torch.full((len(ids), width), start)
    learn_BS = torch.zeros((len(ids), width), dtype=torch.bool)
    for b, one in enumerate(ids):
        ids_BS[b, 1 : len(one) + 1] = torch.tensor(one)
        learn_BS[b, : len(one)] = True
    return ids_BS, learn_BS


def states(model: LlamaForCausalLM, ids_BS: torch.Tensor, learn_BS: torch.Tensor) -> torch.Tensor:
    """Return hidden states [N, D] at the positions before supervised tokens.

    Right padding: a causal model needs no mask for it.
    """
    hidden: torch.Tensor = model.model(input_ids=ids_BS).last_hidden_state[learn_BS]
    return hidden


def rate(step: int, steps: int, top: float) -> float:
    """Warm up linearly over a twentieth of the steps, then follow a cosine to a tenth."""
    warm = max(1, steps // 20)
    return top * min(1.0, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
    )


def step_with(
    optimizer: torch.optim.AdamW, model: LlamaForCausalLM, loss: torch.Tensor, lr: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def order(pools: Mapping[str, Sequence[Window]], batch: int, seed: int) -> Iterator[list[Window]]:
    """Yield batches with all domains in turn; each pool is shuffled again every epoch."""
    rng, names, walks = np.random.default_rng(seed), list(pools), {d: iter(()) for d in pools}  # type: ignore[var-annotated]
    turn = 0
    while True:
        chosen = []
        for _ in range(batch):
            d = names[turn % len(names)]
            turn += 1
            k = next(walks[d], None)
            if k is None:
                walks[d] = iter(rng.permutation(len(pools[d])).tolist())
                k = next(walks[d])
            chosen.append(pools[d][k])
        yield chosen


def read_through(
    model: LlamaForCausalLM,
    speaker: Speaker,
    batches: Iterator[list[Window]],
    steps: int,
    top: float,
    who: str,
) -> int:
    """Train by plain cross-entropy; return the number of tokens."""
    adam, begun, tokens = optimizer(model, top), time.process_time(), 0
    for step, chosen in zip(range(steps), batches, strict=False):
        ids_BS, learn_BS = padded(
            speaker.vocabulary.encode_batch([w.text for w in chosen]), speaker.start
        )
        logits = states(model, ids_BS, learn_BS) @ model.lm_head.weight.T
        loss = F.cross_entropy(logits, ids_BS[:, 1:][learn_BS[:, :-1]])
        step_with(adam, model, loss, rate(step, steps, top))
        tokens += int(learn_BS.sum())
        if step % 50 == 49:
            print(
                f"{who} {step + 1}/{steps} {float(loss.detach()) / math.log(2):.3f} bits/token, "
                f"{time.process_time() - begun:.0f} s",
                flush=True,
            )
    return tokens


def train_teacher(
    speaker: Speaker, pools: Mapping[str, Sequence[Window]], size: Size, who: str, path: Path
) -> None:
    """Train by plain cross-entropy on all text of its domains; save once with the time it took."""
    model, steps, begun = (
        make(size.teacher, len(speaker.vocabulary), seed=1),
        size.teacher_steps[who],
        time.process_time(),
    )
    tokens = read_through(
        model, speaker, order(pools, size.teacher_batch, seed=1), steps, 3e-3, who
    )
    record = {
        "teacher": who,
        "size": size.name,
        "steps": steps,
        "tokens": tokens,
        "cpu_seconds": round(time.process_time() - begun),
        "parameters": sum(p.numel() for p in model.parameters()),
        "non_embedding": sum(p.numel() for p in model.model.layers.parameters()),
    }
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(record))


def open_teacher(speaker: Speaker, size: Size, path: Path) -> LlamaForCausalLM:
    model = make(size.teacher, len(speaker.vocabulary), seed=1)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval().requires_grad_(False)
