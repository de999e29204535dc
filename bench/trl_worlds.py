"""TRL's own GOLD loss on exact worlds: the rows it compares at the truth, and its bias.

Each string goes through TRL's ULDLoss whole, as its trainer would pass it: one prompt token, the
answer, byte offsets. The tokenizers are given as the columns that occur, so that the share of
matched tokens, which is GOLD's weight, is that of a real pair (.6-.9).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from baselines import Sequence, gold, gold_loss
from tabular import NOWHERE, Objective, Stack, shared_columns
from worlds import Prefix, World, starts

from persea.chat.renderer import ChatRenderer


class Columns:
    """A tokenizer in the form that TRL reads."""

    def __init__(self, names: tuple[bytes | None, ...]) -> None:
        self.names = names

    def get_vocab(self) -> dict[str, int]:
        return {"<|end|>" if name is None else repr(name): i for i, name in enumerate(self.names)}


def loss_of(world: World, merge: str, hybrid: bool = True) -> Any:
    return gold(Columns(world.bytes_W()), Columns(world.bytes_V()), merge=merge, hybrid=hybrid)


def _sequence(
    renderer: ChatRenderer, ids: Prefix, columns: dict[int, int], logits_TV: torch.Tensor
) -> Sequence:
    """Build a sequence; the row after the stop token is uniform and not supervised."""
    logits_TV = torch.cat([logits_TV, torch.zeros_like(logits_TV[:1])])
    begin = list(starts(renderer, ids))
    learned, ends = torch.tensor([False] + [True] * len(ids)), [*begin[1:], begin[-1]]
    return Sequence(
        logits_TV,
        torch.tensor([0, *(columns[i] for i in ids)]),
        learned,
        torch.tensor([0, *begin]),
        torch.tensor([0, *ends]),
    )


@dataclass(frozen=True)
class PreparedString:
    """One string: its probability, the student's rows and columns, and the teacher's side."""

    p: float
    rows: list[int]
    student: Prefix
    teacher: Sequence


def prepare(s: Stack, world: World) -> list[PreparedString]:
    columns = {int(i): n for n, i in enumerate(world.columns_W)}
    out = []
    for text, p in world.law.items():
        t, v = world.t.ids[text], world.s.ids[text]
        rows_TW = torch.from_numpy(
            np.array([world.row_W(world.t.next[t[:k]]) for k in range(len(t))])
        )
        logits_TW = torch.where(rows_TW > 0, rows_TW.clamp(min=1e-300).log(), NOWHERE)
        out.append(
            PreparedString(
                p,
                [s.number[v[:k]] for k in range(len(v))],
                v,
                _sequence(world.teacher, t, columns, logits_TW),
            )
        )
    return out


def sequences(
    strings: list[PreparedString], world: World, logits_RV: torch.Tensor
) -> Iterator[tuple[float, int, Sequence, Sequence]]:
    """Yield (probability, number of student tokens, student, teacher) of every string."""
    columns = {int(i): n for n, i in enumerate(world.columns_V)}
    for one in strings:
        yield (
            one.p,
            len(one.rows),
            _sequence(world.student, one.student, columns, logits_RV[one.rows]),
            one.teacher,
        )


def gold_objective(s: Stack, world: World, merge: str, share: float = 0.7) -> Objective:
    """Return share * TRL's mean over spans * tokens + (1 - share) * cross-entropy.

    Every token has weight one, as in all objectives here.
    """
    loss, strings = loss_of(world, merge), prepare(s, world)

    def of(logits_RV: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for p, tokens, student, teacher in sequences(strings, world, logits_RV):
            total = total + p * tokens * gold_loss(loss, student, teacher)
        log_q_RV = torch.log_softmax(logits_RV, -1)
        return share * total - (1 - share) * (s.mass_R[:, None] * s.truth_RV * log_q_RV).sum()

    return of


def gold_floor(s: Stack, world: World, merge: str) -> dict[str, float]:
    """Return GOLD's floor: its comparison and its loss at the truth.

    tv: mean total variation per span between the rows that TRL compares (matched tokens by name,
    the rest sorted; merged rows unnormalised, as TRL leaves them). loss: mean per string.
    """
    loss, both = loss_of(world, merge), shared_columns(world)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = loss._compute_hybrid_uld_loss

    def noted(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        seen.append((student, teacher))
        value: torch.Tensor = real(student, teacher)
        return value

    loss._compute_hybrid_uld_loss = noted
    rest_W = torch.ones(len(world.columns_W), dtype=torch.bool).index_fill(0, both.teacher_K, False)
    rest_V = torch.ones(len(world.columns_V), dtype=torch.bool).index_fill(0, both.student_K, False)
    width = int(max(rest_W.sum(), rest_V.sum()))
    value = distance = spans = 0.0
    with torch.no_grad():
        for p, _, student, teacher in sequences(prepare(s, world), world, s.truth_logits):
            seen.clear()
            value += p * float(gold_loss(loss, student, teacher))
            for q_GV, p_GW in seen:
                matched = (p_GW[:, both.teacher_K] - q_GV[:, both.student_K]).abs().sum()
                sorted_p, sorted_q = (
                    F.pad(x, (0, width - x.shape[1])).sort(-1, descending=True).values
                    for x in (p_GW[:, rest_W], q_GV[:, rest_V])
                )
                distance += p * float(matched + (sorted_p - sorted_q).abs().sum()) / 2
                spans += p * len(q_GV)
    return {"tv": distance / spans, "loss": value}
