"""Synthetic distributions over a 152k-token vocabulary: their size, and a lower bound.

The stages `synthetic` and `bound` of bench/cache.py. Rows have the entropy of long reasoning
(nearly certain) or of web text (broad).
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persea.cache import unit as cache
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason, Text
from persea.distributions import (
    LOGPROB_STEP_NATS,
    DistributionKind,
    SparseDistributions,
    min_entries_within_kl,
)
from persea.teachers.teacher import Answer
from persea.tokenization.tokens import RenderedTokens

WEB_TOKENS = 236e9
V = 151_936
SEEN = 1 / (np.arange(1, V + 1) + 2.7) ** 1.05
SEEN /= SEEN.sum()
PLACE = np.random.default_rng(99).permutation(V)  # rank -> id
OF_ID = SEEN[np.argsort(PLACE)]
RARER = np.cumsum(SEEN**0.8 / (SEEN**0.8).sum())  # tokens in tails are rarer than tokens in text
REGIMES = {
    "reasoning": (1.65, 0.8, 0.6, 0.0006, 0.09),
    "text": (0.5, 0.5, 0.35, 0.02, 0.4),
}  # spread of the exponent, and the unexplained mass


def ids_of(rng: np.random.Generator, shape: Any) -> np.ndarray:
    return PLACE[np.minimum(np.searchsorted(RARER, rng.random(shape)), V - 1)]


@dataclass(frozen=True)
class Positions:
    """K distinct candidates per position with probabilities, ids ascending.

    The remaining mass is spread over the vocabulary.
    """

    ids_NK: np.ndarray
    p_NK: np.ndarray
    left_N: np.ndarray
    real_N: np.ndarray
    rng: np.random.Generator


def positions(regime: str, n: int, seed: int, k: int = 256) -> Positions:
    rng = np.random.default_rng(seed)
    centre, width, floor, rest, scale = REGIMES[regime]
    steep = (np.exp(rng.normal(centre, width, n)) + floor)[:, None]
    w_NK = np.exp(-steep * np.log(np.arange(1, k + 1)[None]) + rng.normal(0, 0.5, (n, k)))
    w_NK /= w_NK.sum(1, keepdims=True)
    left_N = np.minimum(rest * rng.gamma(0.5, 2, n) * (1 - w_NK.max(1)) / scale, 0.5)
    ids_NK = ids_of(rng, (n, k))
    order = np.argsort(
        ids_NK - w_NK / 2, 1
    )  # of an id that was drawn twice, the likelier copy comes first and is kept
    ids_NK, w_NK = np.take_along_axis(ids_NK, order, 1), np.take_along_axis(w_NK, order, 1)
    w_NK[:, 1:][ids_NK[:, 1:] == ids_NK[:, :-1]] = 0
    p_NK = w_NK * ((1 - left_N) / w_NK.sum(1))[:, None]
    at_N = (p_NK.cumsum(1) < rng.random((n, 1))).sum(1)
    real_N = np.where(at_N < k, ids_NK[np.arange(n), np.minimum(at_N, k - 1)], ids_of(rng, n))
    return Positions(ids_NK, p_NK, left_N, real_N, rng)


def as_rows(
    at: Positions,
    kept_NK: np.ndarray,
    values_NK: np.ndarray,
    extra_N: np.ndarray,
    tau: float,
    kind: DistributionKind,
) -> tuple[RenderedTokens, SparseDistributions]:
    n = len(at.p_NK)
    row, k = np.nonzero(kept_NK)
    keys = np.concatenate(
        [
            row << 20 | at.ids_NK[row, k],
            np.repeat(np.arange(n), extra_N) << 20 | ids_of(at.rng, int(extra_N.sum())),
        ]
    )
    keys, first = np.unique(keys, return_index=True)
    probs = np.concatenate([values_NK[row, k], np.full(int(extra_N.sum()), tau)])[first]
    row, ids = keys >> 20, keys & ((1 << 20) - 1)
    mine_NK = at.ids_NK == at.real_N[:, None]
    p_N = np.maximum(
        np.where(mine_NK.any(1), (at.p_NK * mine_NK).sum(1), 0), at.left_N * OF_ID[at.real_N]
    ).clip(1e-12, 1)
    exact = (ids == at.real_N[row]) & (probs != tau)
    p_N[row[exact]] = probs[exact]
    widths = np.random.default_rng(1).integers(1, 8, V)[at.real_N]
    ends = np.cumsum(widths)
    tokens = RenderedTokens(
        at.real_N.astype(np.int32),
        (ends - widths).astype(np.int32),
        ends.astype(np.int32),
        np.ones(n, np.bool_),
    )
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n))])
    return tokens, SparseDistributions(
        offsets,
        ids.astype(np.int32),
        probs.astype(np.float32),
        np.log(p_N).astype(np.float32),
        kind,
    )


def sampled_rows(at: Positions, tau: float) -> tuple[RenderedTokens, SparseDistributions]:
    """Sample as sample_distributions does, the mass over the vocabulary last."""
    head = at.p_NK >= tau
    steps = np.concatenate([np.where(head, 0, at.p_NK / tau), at.left_N[:, None] / tau], 1).cumsum(
        1
    ) + at.rng.random((len(head), 1))
    whole = np.floor(steps)
    before = np.concatenate([np.zeros((len(head), 1)), whole[:, :-1]], 1)
    took = whole > before
    extra_N = (whole[:, -1] - before[:, -1]).astype(np.int64)
    return as_rows(
        at,
        head | took[:, :-1],
        np.where(head, at.p_NK, np.float32(tau)),
        extra_N,
        tau,
        DistributionKind.SAMPLED,
    )


def top_rows(
    at: Positions, kl: float, coarser: bool = True
) -> tuple[RenderedTokens, SparseDistributions]:
    """Select as topk_within_kl does.

    The mass over the vocabulary follows the token frequencies and is never named.
    """
    order = np.argsort(-at.p_NK, 1, kind="stable")
    ids_NK, p_NK = np.take_along_axis(at.ids_NK, order, 1), np.take_along_axis(at.p_NK, order, 1)
    often_NK = OF_ID[ids_NK] * (p_NK > 0)
    lost_N = np.where(p_NK > 0, p_NK * np.log(np.maximum(p_NK, 1e-300) / OF_ID[ids_NK]), 0).sum(
        1
    ) + at.left_N * np.log(np.maximum(at.left_N, 1e-300))
    count_N, bins_NK = min_entries_within_kl(
        p_NK, often_NK, (ids_NK == at.real_N[:, None]) & (p_NK > 0), np.ones(len(p_NK)), lost_N, kl
    )
    if not count_N.all():
        raise AssertionError("a row whose candidates are not enough")
    back = np.argsort(order, 1)
    kept_NK = np.take_along_axis(np.arange(p_NK.shape[1]) < count_N[:, None], back, 1)
    values_NK = (
        np.exp(np.take_along_axis(bins_NK, back, 1) * -LOGPROB_STEP_NATS) if coarser else at.p_NK
    )
    return as_rows(
        at, kept_NK, values_NK, np.zeros(len(p_NK), np.int64), 1e-9, DistributionKind.TOPK
    )


def unit_bytes(
    cached: list[tuple[RenderedTokens, SparseDistributions]], kind: DistributionKind, tau: float
) -> int:
    """Return the bytes of a cache unit that holds these rows and no text."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Answer(
            "",
            "t",
            "s",
            "",
            Conversation.from_question("").with_answer(Text("")),
            FinishReason.STOP,
        )
        cache.write_unit(
            Path(folder),
            "u",
            [CachedAnswer(answer, t, r) for t, r in cached],
            {},
            tau=tau,
            kind=kind,
        )
        return int(cache.read_record(Path(folder), "u")["bytes"])


def cost(
    cached: list[tuple[RenderedTokens, SparseDistributions]], kind: DistributionKind, tau: float
) -> dict[str, float]:
    """Return bytes per position with and without the tokens, beyond a text-only unit."""
    n = sum(len(r) for _, r in cached)
    words = [
        (
            t,
            SparseDistributions(
                np.zeros(len(r) + 1, np.int64),
                np.empty(0, np.int32),
                np.empty(0, np.float32),
                np.full(len(r), np.nan, np.float32),
                DistributionKind.TEXT_ONLY,
            ),
        )
        for t, r in cached
    ]
    whole, bare = unit_bytes(cached, kind, tau), unit_bytes(words, DistributionKind.TEXT_ONLY, tau)
    return {
        "entries": round(sum(len(r.ids_M) for _, r in cached) / n, 2),
        "rows": round((whole - bare) / n, 2),
        "all": round(whole / n, 2),
    }


def synthetic(answers: int = 64, length: int = 4096) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for regime in REGIMES:
        made = [positions(regime, length, 1000 + k) for k in range(answers)]
        first = made[0]
        entropy = -np.where(
            first.p_NK > 0, first.p_NK * np.log(np.maximum(first.p_NK, 1e-30)), 0
        ).sum(1)
        here: dict[str, Any] = {
            "entropy_nats": round(float(entropy.mean()), 2),
            "median": round(float(np.median(entropy)), 2),
            "top1": round(float(first.p_NK.max(1).mean()), 3),
            "positions": answers * length,
        }
        none = np.zeros(length, np.int64)
        for tau in (0.01, 0.02, 0.05, 0.1):
            here[f"sampled {tau:g}"] = paid = cost(
                [sampled_rows(at, tau) for at in made], DistributionKind.SAMPLED, tau
            )
            paid["terabytes"] = round(WEB_TOKENS * paid["all"] / 1e12, 2)
            print(regime, tau, paid, flush=True)
        for least in (0.1, 0.03, 0.01, 0.003, 0.001):
            kl = []
            for at in made:
                lost = np.where(at.p_NK < least, at.p_NK, 0)
                rest = np.maximum(lost.sum(1) + at.left_N, 1e-12)
                spread = lost * np.log(np.maximum(lost, 1e-30) / (rest[:, None] * OF_ID[at.ids_NK]))
                kl.append(
                    (
                        np.where(lost > 0, spread, 0).sum(1)
                        + at.left_N * np.log(np.maximum(at.left_N, 1e-12) / rest)
                    ).mean()
                )
            cached = [
                as_rows(at, at.p_NK >= least, at.p_NK, none, 1e-9, DistributionKind.TOPK)
                for at in made
            ]
            here[f"all from {least:g}"] = cost(cached, DistributionKind.TOPK, 1e-9) | {
                "kl": round(float(np.mean(kl)), 4)
            }
            print(regime, least, here[f"all from {least:g}"], flush=True)
        for target, coarser in ((0.1, True), (0.03, True), (0.01, True), (0.01, False)):
            form = f"at most {target:g}" + ("" if coarser else ", finest values")
            here[form] = cost(
                [top_rows(at, target, coarser) for at in made], DistributionKind.TOPK, 1e-9
            ) | {"kl_at_most": target}
            print(regime, form, here[form], flush=True)
        unique = np.mean([(1 - (1 - at.p_NK) ** 50).sum(1) + 50 * at.left_N for at in made])
        here["50 draws, 25 bits a unique token"] = {
            "entries": round(float(unique), 2),
            "rows": round(float(unique) * 25 / 8, 2),
        }
        for k in (16, 64):
            here[f"top-{k}, float16 and int32"] = {"entries": k, "rows": 6.0 * k}
        result[regime] = here
    return result


# --- what naming tokens costs at least ---


def bound(answers: int = 8, length: int = 4096) -> dict[str, Any]:
    """Return a lower bound, in bytes per position, on naming the tokens alone, without their
    values.

    Tokens of these rows are drawn independently from RARER, so whatever a code conditions on (rows
    before, the text, values, contexts), a set of k tokens costs sum -log2 RARER(token) - log2 k!
    bits; where each token needs its own value, log2 k! more. The realised token is free, because
    the text names it. A row's KL is that of `topk_within_kl` with exact values.
    """
    p_W = np.diff(RARER, prepend=0)
    cost_W = np.empty(V)
    cost_W[PLACE] = -np.log2(p_W)
    orders_K = np.array([math.lgamma(k + 1) / math.log(2) for k in range(300)])
    result: dict[str, Any] = {"bits_a_token": round(float((p_W * -np.log2(p_W)).sum()), 2)}
    for regime in REGIMES:
        curves = [_curves(positions(regime, length, 1000 + k), cost_W) for k in range(answers)]
        kl_NK, bits_NK, others_NK = (np.concatenate(column) for column in zip(*curves, strict=True))
        result[regime] = {}
        for kl in (0.1, 0.03, 0.01):
            each_N = (kl_NK <= kl).argmax(1)
            for form, cost_NK in (
                ("named", bits_NK - orders_K[others_NK]),
                ("named, each with its value", bits_NK),
            ):
                for how, at_N in (
                    ("each row", each_N),
                    ("the mean", _allotted(cost_NK, kl_NK, kl)),
                ):
                    chosen = np.arange(len(at_N)), at_N
                    result[regime][f"{how} at most {kl:g}, {form}"] = {
                        "other_tokens": round(float(others_NK[chosen].mean()), 2),
                        "ids_at_least": round(float(cost_NK[chosen].mean()) / 8, 2),
                    }
        print(regime, json.dumps(result[regime], indent=1), flush=True)
    return result


def _curves(at: Positions, cost_W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each row with its 0 to K likeliest tokens named: KL, bits, and number of tokens.

    The realised token is not counted.
    """
    order = np.argsort(-at.p_NK, 1, kind="stable")
    ids_NK, p_NK = np.take_along_axis(at.ids_NK, order, 1), np.take_along_axis(at.p_NK, order, 1)
    there_NK = p_NK > 0
    often_NK = np.where(there_NK, OF_ID[ids_NK], 0)
    against_NK = np.where(there_NK, p_NK * np.log(np.where(there_NK, p_NK, 1) / OF_ID[ids_NK]), 0)
    lost_N = against_NK.sum(1) + at.left_N * np.log(np.maximum(at.left_N, 1e-300))
    left_NK, unnamed_NK = (
        np.maximum(1 - p_NK.cumsum(1), 1e-15),
        np.maximum(1 - often_NK.cumsum(1), 1e-300),
    )
    kl_NK = np.concatenate(
        [
            lost_N[:, None],
            lost_N[:, None] - against_NK.cumsum(1) - left_NK * np.log(left_NK / unnamed_NK),
        ],
        1,
    ).clip(0)
    other_NK = ids_NK != at.real_N[:, None]
    bits_NK, others_NK = (
        np.pad(column.cumsum(1), ((0, 0), (1, 0)))
        for column in (cost_W[ids_NK] * other_NK, other_NK)
    )
    return kl_NK, bits_NK, others_NK


def _allotted(cost_NK: np.ndarray, kl_NK: np.ndarray, kl: float) -> np.ndarray:
    """Return how many tokens each row names at mean KL `kl` and least cost.

    One price per nat for all rows, found by bisection.
    """
    low, high = 1e-3, 1e7
    for _ in range(60):
        price = math.sqrt(low * high)
        at_N = (cost_NK + price * kl_NK).argmin(1)
        low, high = (price, high) if kl_NK[np.arange(len(at_N)), at_N].mean() > kl else (low, price)
    return at_N
