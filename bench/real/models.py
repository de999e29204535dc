"""Teacher and student: folders of real models, their tokenizers, and mixed-precision training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from bench.objectives.vocabularies import Speaker, no_template
from persea.chat.families import CONTROL_MARKERS
from persea.chat.families.gemma import GEMMA
from persea.chat.families.qwen import QWEN
from persea.chat.family import Family
from persea.chat.renderer import ChatRenderer
from persea.tokenization.vocabulary import load_vocabulary

# Plain documents: the family is only needed for the token that ends a text.
TEACHER_FAMILY = replace(GEMMA, name="gemma-text", stop_tokens=("<eos>",))
STUDENT_FAMILY = replace(QWEN, name="smollm2-text", stop_tokens=("<|endoftext|>",))
TEACHER_START, STUDENT_START = "<bos>", "<|endoftext|>"


def speaker(spec: str, name: str, family: Family, start: str) -> Speaker:
    """Return a tokenizer (the content of tokenizer.json) with the token before every text."""
    backend = Tokenizer.from_str(spec)
    vocabulary = load_vocabulary(backend, name, CONTROL_MARKERS)
    return Speaker(
        ChatRenderer(family, vocabulary, no_template, ""), vocabulary.control_token_ids[start]
    )


def teacher_speaker(folder: Path) -> Speaker:
    return speaker(
        (folder / "tokenizer.json").read_text(), "gemma3-270m", TEACHER_FAMILY, TEACHER_START
    )


def student_speaker(spec: str) -> Speaker:
    return speaker(spec, "smollm2-135m", STUDENT_FAMILY, STUDENT_START)


def pruned(model: Any, layers: int) -> Any:
    """Return the model with some of its layers, evenly spaced, the first and the last too."""
    own = model.model.layers
    at = torch.linspace(0, len(own) - 1, layers).round().int().tolist()
    model.model.layers = torch.nn.ModuleList([own[k] for k in at])
    for k, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = k
    model.config.num_hidden_layers = layers
    return model


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


@dataclass(frozen=True)
class Packed:
    """Texts one after another in one row; each sees only itself. S positions, each with a label."""

    ids_S: torch.Tensor
    place_S: torch.Tensor
    text_S: torch.Tensor
    labels_S: torch.Tensor


def pack(texts: Sequence[Sequence[int]], start: int, end: int) -> Packed:
    """Return start + ids as inputs and ids + end as labels of every text."""
    return Packed(
        torch.tensor([i for ids in texts for i in (start, *ids)]),
        torch.tensor([k for ids in texts for k in range(len(ids) + 1)]),
        torch.tensor([b for b, ids in enumerate(texts) for _ in range(len(ids) + 1)]),
        torch.tensor([i for ids in texts for i in (*ids, end)]),
    )


def states(model: Any, packed: Packed) -> torch.Tensor:
    """Return the hidden states [S, D] before each label."""
    text_S, n = packed.text_S, len(packed.text_S)
    sees_SS = (text_S[:, None] == text_S[None]) & torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, n, n, dtype=model.dtype).masked_fill(~sees_SS, -torch.inf)
    if torch.is_autocast_enabled("cpu"):
        mask = mask.bfloat16()
    hidden: torch.Tensor = model.model(
        input_ids=packed.ids_S[None], position_ids=packed.place_S[None], attention_mask=mask
    ).last_hidden_state[0]
    return hidden


class Trainee:
    """A student in bfloat16 with float32 master weights and AdamW, or in float32 throughout.

    With `autocast` the weights are float32 and their products bfloat16, as in persea's
    `precision: bfloat16`. The rows of the embedding from `first_new` on learn at `faster` times the
    learning rate.
    """

    def __init__(
        self,
        model: Any,
        half: bool,
        first_new: int | None = None,
        faster: float = 1.0,
        autocast: bool = False,
    ) -> None:
        self.autocast = autocast
        self.model, self.half, self.first_new, self.faster = model, half, first_new, faster
        self.own = [p for p in model.parameters() if p.requires_grad]
        self.masters = (
            [p.detach().float().clone().requires_grad_(True) for p in self.own]
            if half
            else self.own
        )
        embedding = model.get_input_embeddings().weight
        self.embedding = next(
            m for m, own in zip(self.masters, self.own, strict=True) if own is embedding
        )
        for p in self.masters:
            p.grad = torch.zeros_like(p)
        if half:
            model.to(torch.bfloat16)
        matrices = [p for p in self.masters if p.ndim > 1]
        vectors = [p for p in self.masters if p.ndim == 1]
        self.adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=(0.9, 0.98),
            fused=True,
        )

    def logits(self, packed: Packed) -> torch.Tensor:
        """Return float32 logits [S, V]."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            hidden_SD = states(self.model, packed)
            weight: torch.Tensor = self.model.get_input_embeddings().weight
            return (hidden_SD @ weight.T).float()

    def step(self, loss: torch.Tensor, rate: float) -> float:
        """Take one step; return the norm of the gradient."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self.half:
            for master, own in zip(self.masters, self.own, strict=True):
                assert own.grad is not None and master.grad is not None
                master.grad.copy_(own.grad)
                own.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self._update()
        if self.half:
            with torch.no_grad():
                for master, own in zip(self.masters, self.own, strict=True):
                    own.copy_(master)
        else:
            self.adam.zero_grad()
        return float(norm)

    def _update(self) -> None:
        if self.first_new is None or self.faster == 1.0:
            self.adam.step()
            return
        with torch.no_grad():
            rows = self.embedding[self.first_new :]  # a view
            before = rows.clone()
            self.adam.step()
            rows.copy_(before + self.faster * (rows - before))


def rate_at(step: int, steps: int, top: float) -> float:
    """Warm up linearly over a tenth of the steps, then fall along a cosine to a tenth."""
    warm = max(1, steps // 10)
    return top * min(1.0, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


@torch.no_grad()
def bits(
    model: Any, who: Speaker, texts: Sequence[str], at_once: int = 1024
) -> list[tuple[float, float]]:
    """Return the bits of each text, without and with its end.

    The head multiplies in float32, whatever the model's type.
    """
    ids = who.vocabulary.encode_batch(list(texts))
    end = who.renderer.stop_ids[0]
    weight = model.get_input_embeddings().weight.float()
    groups: list[list[int]] = [[]]
    for k in sorted(range(len(ids)), key=lambda k: len(ids[k])):
        if groups[-1] and sum(len(ids[j]) + 1 for j in groups[-1]) + len(ids[k]) > at_once:
            groups.append([])
        groups[-1].append(k)
    out = [(0.0, 0.0)] * len(ids)
    for some in groups:
        packed = pack([ids[k] for k in some], who.start, end)
        logits_SV = states(model, packed).float() @ weight.T
        lost_S = torch.nn.functional.cross_entropy(logits_SV, packed.labels_S, reduction="none")
        lost_S = lost_S / math.log(2)
        for b, k in enumerate(some):
            mine = lost_S[packed.text_S == b]
            out[k] = (float(mine[:-1].sum()), float(mine.sum()))
    return out


def tokenizer_text(folder: Path) -> str:
    return json.dumps(json.loads((folder / "tokenizer.json").read_text()))
