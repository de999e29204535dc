"""The student beside every teacher and its own base, on every skill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from persea.audition import ask
from persea.chat import Effort
from persea.measure import Item, Result, Score, Skill
from persea.teacher import Teacher


@dataclass(frozen=True)
class Evaluation:
    """scores: over all and per language; bits_per_byte: speaker -> skill (and "all") -> bits, on held-out reference answers."""

    student: str
    base: str
    teachers: tuple[str, ...]
    effort: Effort
    scores: tuple[Score, ...]
    bits_per_byte: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        return {"student": self.student, "base": self.base, "teachers": list(self.teachers), "effort": self.effort,
                "scores": [s.to_json() for s in self.scores], "bits_per_byte": {k: dict(v) for k, v in self.bits_per_byte.items()}}


def bits_per_byte(speaker: Teacher, items: Sequence[Item]) -> tuple[float, int]:
    """(bits, bytes) a speaker spends on the reference answers in its own voice: content tokens and the stop token.

    Per byte and not per token, so that tokenizers compare. Markers of a template between content are left out, and so are items that
    its template cannot say; where it can say none, (0, 0).
    """
    bits, size = 0.0, 0
    conversations = [i.answered for i in items if speaker.can_say(i.answered)]
    for tokens, logprobs_NW in speaker.score(conversations):
        learned = np.flatnonzero(tokens.learn_T)
        content = tokens.starts_T[learned] >= 0
        picked = logprobs_NW[torch.arange(len(learned)), torch.from_numpy(tokens.ids_T[learned]).long()].numpy()
        bits -= float(picked[content].astype(np.float64).sum()) / math.log(2)
    size = sum(len(p.text.encode()) for c in conversations for p in c.messages[-1].parts)
    return bits, size


def evaluate(speakers: Sequence[Teacher], skills: Sequence[tuple[Skill, Sequence[Item]]], max_new_tokens: int,
             done: Callable[[str, str], None] = lambda speaker, skill: None
             ) -> tuple[tuple[Score, ...], dict[str, dict[str, float]], dict[str, list[Result]]]:
    """Every speaker on every skill's items: scores, bits per byte, and each speaker's results."""
    scores: list[Score] = []
    spent: dict[str, dict[str, float]] = {}
    results: dict[str, list[Result]] = {}
    for speaker in speakers:
        bits_all, bytes_all = 0.0, 0
        spent[speaker.name], results[speaker.name] = {}, []
        for skill, items in skills:
            some, mine = ask(speaker, skill, items, max_new_tokens)
            scores += mine
            results[speaker.name] += some
            bits, size = bits_per_byte(speaker, items)
            if size:
                spent[speaker.name][skill.name] = bits / size
            bits_all, bytes_all = bits_all + bits, bytes_all + size
            done(speaker.name, skill.name)
        if bytes_all:
            spent[speaker.name]["all"] = bits_all / bytes_all
    return tuple(scores), spent, results
