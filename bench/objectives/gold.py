"""GOLD by TRL's own code as one more method.

Needs `pip install 'persea[bench]'`; its loops over spans are slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from bench import baselines
from bench.objectives.examples import Batch, Lesson
from bench.objectives.methods import Pair, Setting
from bench.objectives.models import padded
from bench.objectives.vocabularies import Speaker


class Strings:
    """The token strings of a cut vocabulary as its real tokenizer spells them: GOLD matches
    strings.
    """

    def __init__(self, speaker: Speaker) -> None:
        self.vocabulary = speaker.vocabulary.backend.get_vocab(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.vocabulary)


@lru_cache
def loss_of(pair: Pair) -> Any:
    return baselines.gold(Strings(pair.teacher.speaker), Strings(pair.student))


def with_last(batch: Batch) -> Batch:
    """Return the batch with the row behind every window's last token: TRL's default merge reads
    it.
    """
    learn_BS = batch.learn_BS.clone()
    learn_BS[torch.arange(len(learn_BS)), batch.learn_BS.sum(1)] = True
    return Batch(batch.ids_BS, learn_BS, batch.labels_N, batch.groups)


def side(logits_TV: torch.Tensor, ids: list[int], one: Any, start: int) -> baselines.Sequence:
    starts, ends = (
        torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(x).long()])
        for x in (one.starts_T, one.ends_T)
    )
    learned = torch.ones(len(ids) + 1, dtype=torch.bool)
    learned[0] = False
    return baselines.Sequence(logits_TV, torch.tensor([start, *ids]), learned, starts, ends)


def gold(
    logits_MV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting
) -> torch.Tensor:
    """Return share x GOLD + (1 - share) x cross-entropy, both a mean over the batch's positions.

    logits_MV of `with_last(batch)`: M = supervised positions and one more per window. GOLD applies
    to every span.
    """
    sizes = batch.learn_BS.sum(1)  # tokens and the start token
    firsts = sizes.cumsum(0) - sizes
    keep = torch.ones(len(logits_MV), dtype=torch.bool)
    keep[firsts + sizes - 1] = False
    ce = F.cross_entropy(logits_MV[keep], batch.labels_N)
    students = (
        firsts - torch.arange(len(firsts))
    ).tolist()  # index in batch.labels_N of each window's first supervised position
    total = torch.zeros(())
    for group in batch.groups:
        pair = pairs[group.who]
        rows = spoken(pair, group.examples)
        for one, first, teacher_TV in zip(group.examples, group.first_student, rows, strict=True):
            b = students.index(first)
            own_TV = logits_MV[int(firsts[b]) : int(firsts[b] + sizes[b])]
            student = side(own_TV, one.student.ids_T.tolist(), one.student, pair.student.start)
            teacher = side(
                teacher_TV, one.spoken.ids_T.tolist(), one.spoken, pair.teacher.speaker.start
            )
            total = total + baselines.gold_loss(loss_of(pair), student, teacher) * len(one.student)
    return setting.share * total / len(batch.labels_N) + (1 - setting.share) * ce


def spoken(pair: Pair, some: tuple[Lesson, ...]) -> list[torch.Tensor]:
    """Return the teacher's logits of each window, start token and last row included."""
    teacher = pair.teacher
    ids_BS, _ = padded([one.spoken.ids_T.tolist() for one in some], teacher.speaker.start)
    with torch.no_grad():
        logits_BSW = teacher.model(input_ids=ids_BS).logits
    return [logits_BSW[b, : len(one.spoken) + 1] for b, one in enumerate(some)]
