"""The teacher's side of every text: computed once, kept on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.objectives.examples import Teacher, plain
from bench.objectives.vocabularies import Speaker
from bench.real.models import load, pack, states, teacher_speaker
from persea.cache.codec import encode_unit
from persea.cache.sparsifier import REST_SMOOTHING_COUNT
from persea.distributions import (
    DistributionKind,
    SparseDistributions,
    concat_distributions,
    sample_distributions,
    topk_within_kl,
)

TAU = 0.02  # persea's default
AT_ONCE = 1024  # tokens of one pass
ROWS = 64  # positions whose whole distributions exist at a time


@dataclass(frozen=True)
class Scored:
    """One text in the teacher's tokens. T tokens and the end: T + 1 distributions.

    Attributes:
        ids: T token ids.
        states_TD: Hidden state before each token and before the end, float32, [T + 1, D].
        realised_T: Natural log-probability of each token and of the end.
        drawn: Sampled distributions before each token and before the end.
    """

    ids: tuple[int, ...]
    states_TD: torch.Tensor
    realised_T: torch.Tensor
    drawn: SparseDistributions


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class RealTeacher:
    """Gemma 3 270M with its cache."""

    folder: Path
    cache: Path
    name: str = "gemma"

    @cached_property
    def speaker(self) -> Speaker:
        return teacher_speaker(self.folder)

    @cached_property
    def model(self) -> Any:
        return load(self.folder, torch.float32).eval().requires_grad_(False)

    @cached_property
    def head(self) -> Teacher:
        """The teacher as the methods of bench.objectives see it."""
        return Teacher(self.speaker, self.model)

    def scored(self, texts: Sequence[str]) -> list[Scored]:
        """Return every text's scores; those not in the cache are computed and kept."""
        paths = [self.cache / f"{digest(t)}.pt" for t in texts]
        todo = [k for k, path in enumerate(paths) if not path.is_file()]
        self.cache.mkdir(parents=True, exist_ok=True)
        ids = self.speaker.vocabulary.encode_batch([texts[k] for k in todo])
        at = 0
        while at < len(todo):
            n, begun = 1, time.process_time()
            while at + n < len(todo) and sum(map(len, ids[at : at + n + 1])) <= AT_ONCE:
                n += 1
            for k, own, one in zip(
                todo[at : at + n],
                ids[at : at + n],
                self._score(ids[at : at + n], texts),
                strict=True,
            ):
                drawn = sampled(self.head, one, own, f"{TAU} {texts[k]}")
                realised = torch.from_numpy(drawn.target_logprob_N)
                partial = paths[k].with_suffix(".part")
                torch.save(Scored(tuple(own), one, realised, drawn), partial)
                partial.rename(paths[k])
            # by text, so that every run that uses it can count its capture
            each = (time.process_time() - begun) / n
            for k in todo[at : at + n]:
                paths[k].with_suffix(".seconds").write_text(f"{each}")
            at += n
            print(f"teacher: {at} of {len(todo)} texts", flush=True)
        return [torch.load(path, weights_only=False) for path in paths]

    def capture_seconds(self, texts: Sequence[str]) -> float:
        """Return the CPU seconds that scoring the texts took when it was done."""
        paths = (self.cache / f"{digest(t)}.seconds" for t in texts)
        return sum(float(path.read_text()) for path in paths if path.is_file())

    @torch.no_grad()
    def _score(self, ids: Sequence[Sequence[int]], texts: Sequence[str]) -> list[torch.Tensor]:
        packed = pack(ids, self.speaker.start, self.speaker.renderer.stop_ids[0])
        hidden_SD = states(self.model, packed)
        return [hidden_SD[packed.text_S == b].clone() for b in range(len(ids))]

    def redrawn(
        self, scored: Sequence[Scored], texts: Sequence[str], entries: str, temperature: float
    ) -> list[Scored]:
        """Return the scores with distributions that are kept in another way.

        Args:
            scored: The scores of each text.
            texts: The texts; their digests seed the samples.
            entries: 'sampled TAU', 'top K', 'kl NATS' as persea's cache keeps them; '' = as usual.
            temperature: The logits are divided by it.
        """
        kind, value = (entries or f"sampled {TAU}").split()
        counts_W = np.bincount(
            np.concatenate([one.ids for one in scored]), minlength=len(self.speaker.vocabulary)
        )
        smoothed_W = counts_W + REST_SMOOTHING_COUNT
        out = []
        for one, text in zip(scored, texts, strict=True):
            targets = np.array([*one.ids, self.speaker.renderer.stop_ids[0]])
            parts = []
            for a in range(0, len(targets), ROWS):
                with torch.no_grad():
                    logs_NW = self.head.logprobs(one.states_TD[a : a + ROWS])
                    logs_NW = torch.log_softmax(logs_NW / temperature, -1)
                wanted = targets[a : a + ROWS]
                if kind == "sampled":
                    seed = f"{entries} {temperature} {text}"
                    parts.append(sample_distributions(logs_NW, wanted, float(value), seed, a))
                elif kind == "kl":
                    parts.append(
                        topk_within_kl(
                            logs_NW, wanted, float(value), smoothed_W / smoothed_W.sum(), text
                        )
                    )
                else:
                    parts.append(top(logs_NW, wanted, int(value)))
            out.append(replace(one, drawn=concat_distributions(parts)))
        return out


def top(logprobs_NW: torch.Tensor, targets_N: np.ndarray, k: int) -> SparseDistributions:
    """Return the k most likely tokens of each position, and the rest as mass."""
    ids_NK = logprobs_NW.topk(k, -1).indices.sort(-1).values
    rows_N = torch.arange(len(targets_N))
    return SparseDistributions(
        np.arange(len(targets_N) + 1, dtype=np.int64) * k,
        ids_NK.reshape(-1).numpy().astype(np.int32),
        logprobs_NW.gather(-1, ids_NK).exp().reshape(-1).numpy(),
        logprobs_NW[rows_N, torch.from_numpy(targets_N)].numpy(),
        DistributionKind.TOPK,
    )


def bytes_per_position(scored: Sequence[Scored], speaker: Speaker, entries: str) -> float:
    """Return what persea's cache takes for the distributions and tokens of texts."""
    kind, value = (entries or f"sampled {TAU}").split()
    tau = float(value) if kind == "sampled" else TAU
    block = []
    for one in scored:
        end = int(one.drawn.offsets_N1[-2])
        block.append(
            (
                plain(one.ids, speaker),
                SparseDistributions(
                    one.drawn.offsets_N1[:-1],
                    one.drawn.ids_M[:end],
                    one.drawn.probs_M[:end],
                    one.drawn.target_logprob_N[:-1],
                    one.drawn.kind,
                ),
            )
        )
    _, streams = encode_unit([block], scored[0].drawn.kind, tau, "bench")
    return sum(s.nbytes for s in streams) / sum(len(one.ids) for one in scored)


@torch.no_grad()
def sampled(
    teacher: Teacher, states_TD: torch.Tensor, ids: Sequence[int], seed: str
) -> SparseDistributions:
    """Sample distributions as persea's capture does, before each token and before the end."""
    targets = np.array([*ids, teacher.speaker.renderer.stop_ids[0]])
    parts = [
        sample_distributions(
            teacher.logprobs(states_TD[a : a + ROWS]), targets[a : a + ROWS], TAU, seed, a
        )
        for a in range(0, len(targets), ROWS)
    ]
    sizes = np.concatenate([np.diff(p.offsets_N1) for p in parts])
    return SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.concatenate([p.ids_M for p in parts]),
        np.concatenate([p.probs_M for p in parts]),
        np.concatenate([p.target_logprob_N for p in parts]),
    )


def bits_per_byte(found: Sequence[Scored], sizes: Sequence[int]) -> float:
    """Return the teacher's bits per byte, ends not counted."""
    nats = sum(-float(one.realised_T[:-1].sum()) for one in found)
    return nats / float(np.log(2)) / sum(sizes)


__all__ = ["RealTeacher", "Scored", "bits_per_byte", "plain", "sampled"]
