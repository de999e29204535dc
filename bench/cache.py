"""What the cache costs and what it is worth: bytes a position, the student's bits a byte, and positions a second.

    python bench/cache.py [student] [synthetic] [bound] [speed] [feed]   (make bench-cache, about 15 minutes; one part leaves the others' figures)

Five parts. `student`: a small model's distributions over whole conversations teach a smaller one from each form of cache, three
seeds. `synthetic`: rows of 152k-token vocabularies as long reasoning (nearly certain) and as web text (broad), made without a model.
`bound`: what naming tokens costs at least in those. `speed`: CPU seconds of one thread. `feed`: from the capture to the student's
batches, beside the training step, and memory. Writes bench/results/cache.json.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persea import cache
from persea.cache import Capture
from persea.chat import Conversation, Finish, Text, Tokens
from persea.engines.local import LocalEngine
from persea.measure import Split
from persea.models import Source, open_model, open_voice, sprout
from persea.rows import STEP, RowKind, Rows, fewest, sample_rows
from persea.skills import SKILLS
from persea.teacher import Answer

ROOT = Path(__file__).resolve().parent.parent
TAU = 0.02  # the recipe's default
SHARE, STEPS, BATCH, SEEDS = 0.7, 400, 16, 3
WEB_TOKENS = 236e9


# --- forms of a cache: dense probabilities -> rows ---


def sampled(tau: float) -> Callable[[torch.Tensor, np.ndarray, str], Rows]:
    return lambda logs_NW, real_N, seed: sample_rows(logs_NW, real_N, tau, seed)


def drawn(draws: int) -> Callable[[torch.Tensor, np.ndarray, str], Rows]:
    """RS-KD: so many draws with replacement, each weighing 1/draws."""

    def rows(logs_NW: torch.Tensor, real_N: np.ndarray, seed: str) -> Rows:
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        ids_ND = torch.multinomial(logs_NW.exp(), draws, replacement=True, generator=generator)
        dense_NW = torch.zeros_like(logs_NW).scatter_add_(1, ids_ND, torch.full(ids_ND.shape, 1 / draws))
        return _sparse(dense_NW, dense_NW > 0, real_N)

    return rows


def top(k: int, renormalised: bool) -> Callable[[torch.Tensor, np.ndarray, str], Rows]:
    def rows(logs_NW: torch.Tensor, real_N: np.ndarray, seed: str) -> Rows:
        p_NW = logs_NW.exp()
        kept_NW = torch.zeros_like(p_NW, dtype=torch.bool).scatter_(1, logs_NW.topk(k, -1).indices, True)
        if renormalised:
            p_NW = p_NW / torch.where(kept_NW, p_NW, 0).sum(-1, keepdim=True)
        return _sparse(p_NW.clamp(max=1), kept_NW, real_N)

    return rows


def _sparse(p_NW: torch.Tensor, kept_NW: torch.Tensor, real_N: np.ndarray) -> Rows:
    row_M, id_M = kept_NW.nonzero(as_tuple=True)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_M.numpy(), minlength=len(p_NW)))])
    realised = p_NW[range(len(p_NW)), real_N].clamp(min=1e-30).log().float().numpy()
    return Rows(offsets, id_M.int().numpy(), p_NW[row_M, id_M].float().numpy(), realised, RowKind.TOPK_REST)


FORMS = {"sampled .01": sampled(0.01), "sampled .02": sampled(0.02), "sampled .05": sampled(0.05), "sampled .1": sampled(0.1),
         "sampled .2": sampled(0.2), "50 draws": drawn(50), "12 draws": drawn(12), "top-16 renormalised": top(16, True),
         "top-4 renormalised": top(4, True), "top-4 and rest": top(4, False)}


def tau_of(form: str) -> float:
    return float(form.split()[1]) if form.startswith("sampled") else 1e-9


def unit_bytes(spoken: list[tuple[Tokens, Rows]], kind: RowKind, tau: float) -> int:
    """Bytes of a unit that holds these and no text."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Answer("", "t", "s", "", Conversation.ask("").answered(Text("")), Finish.STOP)
        cache.write_unit(Path(folder), "u", [Capture(answer, t, r) for t, r in spoken], {}, tau=tau, kind=kind)
        return int(cache.read_record(Path(folder), "u")["bytes"])


def cost(spoken: list[tuple[Tokens, Rows]], kind: RowKind, tau: float) -> dict[str, float]:
    """Bytes a position with and without the tokens: what the same unit costs beyond one that holds words only."""
    n = sum(len(r) for _, r in spoken)
    words = [(t, Rows(np.zeros(len(r) + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32),
                      np.full(len(r), np.nan, np.float32), RowKind.WORDS)) for t, r in spoken]
    whole, bare = unit_bytes(spoken, kind, tau), unit_bytes(words, RowKind.WORDS, tau)
    return {"entries": round(sum(len(r.ids_M) for _, r in spoken) / n, 2), "rows": round((whole - bare) / n, 2), "all": round(whole / n, 2)}


# --- a student of a sapling ---


@dataclass(frozen=True)
class Said:
    """A conversation, all of whose tokens but the first are learned, and the teacher's distribution of each."""

    tokens: Tokens
    logs_NW: torch.Tensor
    bytes: int


def conversations(name: str, split: Split, n: int) -> list[Said]:
    """n of each skill, without distributions yet."""
    voice = open_voice(Source(str(ROOT / "saplings" / name)), name)
    whole = [i.answered for skill in SKILLS for i in skill.items(split, n, 0)]
    out = []
    for c in whole:
        t = voice.render(c)
        out.append(Said(Tokens(t.ids_T, t.starts_T, t.ends_T, np.arange(len(t)) > 0), torch.empty(len(t) - 1, len(voice.vocabulary)),
                        sum(len(p.text.encode()) for p in c.parts())))
    return [out[k] for k in np.random.default_rng(0).permutation(len(out))]


@torch.no_grad()
def scored(model: Any, some: list[Said]) -> list[Said]:
    width = some[0].logs_NW.shape[1]
    return [replace(s, logs_NW=torch.log_softmax(model(input_ids=torch.from_numpy(s.tokens.ids_T[None]).long()).logits[0, :-1, :width], -1))
            for s in some]


def loss_of(model: Any, some: list[Said], rows: list[Rows | None] | None) -> torch.Tensor:
    """share * events + the rest cross-entropy, as losses.composed with the same vocabulary on both sides. rows: none = cross-entropy
    alone; None of a conversation = its full distributions."""
    width = max(len(s.tokens) for s in some)
    ids, mask = torch.zeros((len(some), width), dtype=torch.int64), torch.zeros((len(some), width), dtype=torch.int64)
    for b, s in enumerate(some):
        ids[b, :len(s.tokens)] = torch.from_numpy(s.tokens.ids_T)
        mask[b, :len(s.tokens)] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits
    q_NW = torch.cat([torch.log_softmax(logits[b, :len(s.tokens) - 1, :s.logs_NW.shape[1]], -1) for b, s in enumerate(some)])
    real_N = torch.cat([torch.from_numpy(s.tokens.ids_T[1:]).long() for s in some])
    ce_N = -q_NW[range(len(real_N)), real_N]
    if rows is None:
        return ce_N.mean()
    p_NW = torch.cat([s.logs_NW.exp() if r is None else densely(r, s.logs_NW.shape[1]) for s, r in zip(some, rows, strict=True)])
    return (-SHARE * (p_NW * q_NW).sum(-1) + (1 - SHARE * p_NW.sum(-1)) * ce_N).mean()


def densely(rows: Rows, width: int) -> torch.Tensor:
    out = torch.zeros(len(rows), width)
    row = np.repeat(np.arange(len(rows)), np.diff(rows.offsets_N1))
    out[row, rows.ids_M.astype(np.int64)] = torch.from_numpy(rows.probs_M)
    return out


def trained(train: list[Said], rows: list[Rows | None] | None, seed: int, steps: int, hidden: int = 64, layers: int = 2) -> Any:
    model = sprout("llama", train[0].logs_NW.shape[1], {"hidden": hidden, "layers": layers, "heads": 2, "seed": seed})
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        some = rng.choice(len(train), BATCH, replace=False).tolist()
        optimiser.zero_grad()
        loss_of(model, [train[k] for k in some], None if rows is None else [rows[k] for k in some]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model


@torch.no_grad()
def bits(model: Any, held: list[Said]) -> float:
    nats = sum(float(loss_of(model, held[k:k + 64], None)) * sum(len(s.logs_NW) for s in held[k:k + 64]) for k in range(0, len(held), 64))
    return float(nats / np.log(2) / sum(s.bytes for s in held))


def gradients(model: Any, train: list[Said], rows: list[Rows | None], batches: list[list[int]]) -> torch.Tensor:
    out = []
    for some in batches:
        model.zero_grad()
        loss_of(model, [train[k] for k in some], [rows[k] for k in some]).backward()
        out.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    return torch.stack(out)


def student(name: str = "qwen-sapling") -> dict[str, Any]:
    """A teacher of 3 layers that saw 3,600 conversations, a student of 2 that sees 300 of them; every token is learned, so that rows are broad.

    (A sapling itself only learned to answer: of the questions its distributions say nothing a student should learn.)
    """
    teacher = trained(conversations(name, Split.TEACH, 1200), None, 5, 900, 128, 3)
    train, held = scored(teacher, conversations(name, Split.TEACH, 100)), conversations(name, Split.TEST, 50)
    n = sum(len(s.logs_NW) for s in train)
    entropy = -sum(float((s.logs_NW.exp() * s.logs_NW).sum()) for s in train) / n
    forms: dict[str, tuple[list[Rows | None] | None, dict[str, float]]] = {"no teacher": (None, {}), "full": ([None] * len(train), {})}
    for form, make in FORMS.items():
        rows = [make(s.logs_NW, s.tokens.ids_T[1:].astype(np.int64), f"{form} {k}") for k, s in enumerate(train)]
        kind = RowKind.SAMPLED if form.startswith("sampled") else RowKind.TOPK_REST
        forms[form] = (list(rows), cost([(s.tokens, r) for s, r in zip(train, rows, strict=True)], kind, tau_of(form)))
    rng = np.random.default_rng(9)
    batches = [rng.choice(len(train), BATCH, replace=False).tolist() for _ in range(40)]
    midway = trained(train, None, 7, STEPS // 2)
    true = gradients(midway, train, [None] * len(train), batches)
    spread = float(((true - true.mean(0)) ** 2).sum(-1).mean())
    result: dict[str, Any] = {}
    for form, (rows_, paid) in forms.items():
        seeds = [bits(trained(train, rows_, seed, STEPS), held) for seed in range(SEEDS)]
        result[form] = paid | {"bits_per_byte": [round(b, 4) for b in seeds], "mean": round(statistics.mean(seeds), 4)}
        if rows_ is not None and form != "full":
            found = gradients(midway, train, rows_, batches)
            result[form] |= {"gradient_variance": round(float(((found - found.mean(0)) ** 2).sum(-1).mean()) / spread, 3),
                             "gradient_bias": round(float((found.mean(0) - true.mean(0)).norm() / true.mean(0).norm()), 4)}
        print(f"{form:20}", result[form], flush=True)
    for row in result.values():
        row["over_full"] = round(row["mean"] / result["full"]["mean"] - 1, 4)
    return {"teacher_bits_per_byte": round(bits(teacher, held), 4), "vocabulary": train[0].logs_NW.shape[1], "positions": n,
            "entropy_nats": round(entropy, 3), "steps": STEPS, "forms": result}


# --- synthetic rows of a large vocabulary ---

V = 151_936
SEEN = 1 / (np.arange(1, V + 1) + 2.7) ** 1.05
SEEN /= SEEN.sum()
PLACE = np.random.default_rng(99).permutation(V)        # rank -> id
OF_ID = SEEN[np.argsort(PLACE)]
RARER = np.cumsum(SEEN**0.8 / (SEEN**0.8).sum())        # what stands in tails is rarer than what is written
REGIMES = {"reasoning": (1.65, 0.8, 0.6, 0.0006, 0.09), "text": (0.5, 0.5, 0.35, 0.02, 0.4)}  # spread of the exponent, and the unexplained mass


def ids_of(rng: np.random.Generator, shape: Any) -> np.ndarray:
    return PLACE[np.minimum(np.searchsorted(RARER, rng.random(shape)), V - 1)]


@dataclass(frozen=True)
class Positions:
    """K candidates of each position with their probabilities, ids rising, each once; the mass that is left lies over the vocabulary."""

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
    order = np.argsort(ids_NK - w_NK / 2, 1)  # of an id that was drawn twice the likelier comes first, and stays
    ids_NK, w_NK = np.take_along_axis(ids_NK, order, 1), np.take_along_axis(w_NK, order, 1)
    w_NK[:, 1:][ids_NK[:, 1:] == ids_NK[:, :-1]] = 0
    p_NK = w_NK * ((1 - left_N) / w_NK.sum(1))[:, None]
    at_N = (p_NK.cumsum(1) < rng.random((n, 1))).sum(1)
    real_N = np.where(at_N < k, ids_NK[np.arange(n), np.minimum(at_N, k - 1)], ids_of(rng, n))
    return Positions(ids_NK, p_NK, left_N, real_N, rng)


def as_rows(at: Positions, kept_NK: np.ndarray, values_NK: np.ndarray, extra_N: np.ndarray, tau: float, kind: RowKind) -> tuple[Tokens, Rows]:
    n = len(at.p_NK)
    row, k = np.nonzero(kept_NK)
    keys = np.concatenate([row << 20 | at.ids_NK[row, k], np.repeat(np.arange(n), extra_N) << 20 | ids_of(at.rng, int(extra_N.sum()))])
    keys, first = np.unique(keys, return_index=True)
    probs = np.concatenate([values_NK[row, k], np.full(int(extra_N.sum()), tau)])[first]
    row, ids = keys >> 20, keys & ((1 << 20) - 1)
    mine_NK = at.ids_NK == at.real_N[:, None]
    p_N = np.maximum(np.where(mine_NK.any(1), (at.p_NK * mine_NK).sum(1), 0), at.left_N * OF_ID[at.real_N]).clip(1e-12, 1)
    exact = (ids == at.real_N[row]) & (probs != tau)
    p_N[row[exact]] = probs[exact]
    widths = np.random.default_rng(1).integers(1, 8, V)[at.real_N]
    ends = np.cumsum(widths)
    tokens = Tokens(at.real_N.astype(np.int32), (ends - widths).astype(np.int32), ends.astype(np.int32), np.ones(n, np.bool_))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n))])
    return tokens, Rows(offsets, ids.astype(np.int32), probs.astype(np.float32), np.log(p_N).astype(np.float32), kind)


def sampled_rows(at: Positions, tau: float) -> tuple[Tokens, Rows]:
    """As rows.sample_rows does, the mass over the vocabulary last."""
    head = at.p_NK >= tau
    steps = np.concatenate([np.where(head, 0, at.p_NK / tau), at.left_N[:, None] / tau], 1).cumsum(1) + at.rng.random((len(head), 1))
    whole = np.floor(steps)
    before = np.concatenate([np.zeros((len(head), 1)), whole[:, :-1]], 1)
    took = whole > before
    extra_N = (whole[:, -1] - before[:, -1]).astype(np.int64)
    return as_rows(at, head | took[:, :-1], np.where(head, at.p_NK, np.float32(tau)), extra_N, tau, RowKind.SAMPLED)


def top_rows(at: Positions, kl: float, coarser: bool = True) -> tuple[Tokens, Rows]:
    """As rows.top_rows does: the mass over the vocabulary lies there as frequency does, and is never named."""
    order = np.argsort(-at.p_NK, 1, kind="stable")
    ids_NK, p_NK = np.take_along_axis(at.ids_NK, order, 1), np.take_along_axis(at.p_NK, order, 1)
    often_NK = OF_ID[ids_NK] * (p_NK > 0)
    lost_N = np.where(p_NK > 0, p_NK * np.log(np.maximum(p_NK, 1e-300) / OF_ID[ids_NK]), 0).sum(1) + at.left_N * np.log(np.maximum(at.left_N, 1e-300))
    count_N, bins_NK = fewest(p_NK, often_NK, (ids_NK == at.real_N[:, None]) & (p_NK > 0), np.ones(len(p_NK)), lost_N, kl)
    if not count_N.all():
        raise AssertionError("a row whose candidates are not enough")
    back = np.argsort(order, 1)
    kept_NK = np.take_along_axis(np.arange(p_NK.shape[1]) < count_N[:, None], back, 1)
    values_NK = np.exp(np.take_along_axis(bins_NK, back, 1) * -STEP) if coarser else at.p_NK
    return as_rows(at, kept_NK, values_NK, np.zeros(len(p_NK), np.int64), 1e-9, RowKind.TOPK_REST)


def synthetic(answers: int = 64, length: int = 4096) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for regime in REGIMES:
        made = [positions(regime, length, 1000 + k) for k in range(answers)]
        first = made[0]
        entropy = -np.where(first.p_NK > 0, first.p_NK * np.log(np.maximum(first.p_NK, 1e-30)), 0).sum(1)
        here: dict[str, Any] = {"entropy_nats": round(float(entropy.mean()), 2), "median": round(float(np.median(entropy)), 2),
                                "top1": round(float(first.p_NK.max(1).mean()), 3), "positions": answers * length}
        none = np.zeros(length, np.int64)
        for tau in (0.01, 0.02, 0.05, 0.1):
            here[f"sampled {tau:g}"] = paid = cost([sampled_rows(at, tau) for at in made], RowKind.SAMPLED, tau)
            paid["terabytes"] = round(WEB_TOKENS * paid["all"] / 1e12, 2)
            print(regime, tau, paid, flush=True)
        for least in (0.1, 0.03, 0.01, 0.003, 0.001):
            kl = []
            for at in made:
                lost = np.where(at.p_NK < least, at.p_NK, 0)
                rest = np.maximum(lost.sum(1) + at.left_N, 1e-12)
                spread = lost * np.log(np.maximum(lost, 1e-30) / (rest[:, None] * OF_ID[at.ids_NK]))
                kl.append((np.where(lost > 0, spread, 0).sum(1) + at.left_N * np.log(np.maximum(at.left_N, 1e-12) / rest)).mean())
            spoken = [as_rows(at, at.p_NK >= least, at.p_NK, none, 1e-9, RowKind.TOPK_REST) for at in made]
            here[f"all from {least:g}"] = cost(spoken, RowKind.TOPK_REST, 1e-9) | {"kl": round(float(np.mean(kl)), 4)}
            print(regime, least, here[f"all from {least:g}"], flush=True)
        for target, coarser in ((0.1, True), (0.03, True), (0.01, True), (0.01, False)):
            form = f"at most {target:g}" + ("" if coarser else ", finest values")
            here[form] = cost([top_rows(at, target, coarser) for at in made], RowKind.TOPK_REST, 1e-9) | {"kl_at_most": target}
            print(regime, form, here[form], flush=True)
        unique = np.mean([(1 - (1 - at.p_NK) ** 50).sum(1) + 50 * at.left_N for at in made])
        here["50 draws, 25 bits a unique token"] = {"entries": round(float(unique), 2), "rows": round(float(unique) * 25 / 8, 2)}
        for k in (16, 64):
            here[f"top-{k}, float16 and int32"] = {"entries": k, "rows": 6.0 * k}
        result[regime] = here
    return result


# --- what naming tokens costs at least ---


def bound(answers: int = 8, length: int = 4096) -> dict[str, Any]:
    """Bytes a position that no code can go below on average, for naming tokens alone, values not counted.

    Tokens of these rows are drawn one by one from RARER and independent of all else, so whatever a code knows (rows before it, the text,
    values, contexts) a set of k tokens costs sum -log2 RARER(token) - log2 k! bits; if their values differ, and each must have its own,
    log2 k! more. The realised token is free, the text names it. A row's KL is that of `rows.top_rows`, values exact.
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
            for form, cost_NK in (("named", bits_NK - orders_K[others_NK]), ("named, each with its value", bits_NK)):
                for how, at_N in (("each row", each_N), ("the mean", _allotted(cost_NK, kl_NK, kl))):
                    chosen = np.arange(len(at_N)), at_N
                    result[regime][f"{how} at most {kl:g}, {form}"] = {
                        "other_tokens": round(float(others_NK[chosen].mean()), 2), "ids_at_least": round(float(cost_NK[chosen].mean()) / 8, 2)}
        print(regime, json.dumps(result[regime], indent=1), flush=True)
    return result


def _curves(at: Positions, cost_W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row with its 0 to K likeliest tokens named: KL, bits to name them one after the other, and how many beside the realised."""
    order = np.argsort(-at.p_NK, 1, kind="stable")
    ids_NK, p_NK = np.take_along_axis(at.ids_NK, order, 1), np.take_along_axis(at.p_NK, order, 1)
    there_NK = p_NK > 0
    often_NK = np.where(there_NK, OF_ID[ids_NK], 0)
    against_NK = np.where(there_NK, p_NK * np.log(np.where(there_NK, p_NK, 1) / OF_ID[ids_NK]), 0)
    lost_N = against_NK.sum(1) + at.left_N * np.log(np.maximum(at.left_N, 1e-300))
    left_NK, unnamed_NK = np.maximum(1 - p_NK.cumsum(1), 1e-15), np.maximum(1 - often_NK.cumsum(1), 1e-300)
    kl_NK = np.concatenate([lost_N[:, None], lost_N[:, None] - against_NK.cumsum(1) - left_NK * np.log(left_NK / unnamed_NK)], 1).clip(0)
    other_NK = ids_NK != at.real_N[:, None]
    bits_NK, others_NK = (np.pad(column.cumsum(1), ((0, 0), (1, 0))) for column in (cost_W[ids_NK] * other_NK, other_NK))
    return kl_NK, bits_NK, others_NK


def _allotted(cost_NK: np.ndarray, kl_NK: np.ndarray, kl: float) -> np.ndarray:
    """How many each row names where the mean KL may be `kl` and the cost is least: one price a nat for all rows, found by halving."""
    low, high = 1e-3, 1e7
    for _ in range(60):
        price = math.sqrt(low * high)
        at_N = (cost_NK + price * kl_NK).argmin(1)
        low, high = (price, high) if kl_NK[np.arange(len(at_N)), at_N].mean() > kl else (low, price)
    return at_N


# --- speed ---


def speed() -> dict[str, Any]:
    """CPU seconds of one thread: packing and reading both regimes, and capture over a plain forward pass on the saplings."""
    from persea.reader import open_reader

    result: dict[str, Any] = {}
    for regime in REGIMES:
        spoken = [sampled_rows(positions(regime, 4096, k), 0.05) for k in range(32)]
        answer = Answer("", "t", "s", "", Conversation.ask("").answered(Text("")), Finish.STOP)
        with tempfile.TemporaryDirectory() as folder:
            begin = time.process_time()
            cache.write_unit(Path(folder), "u", [Capture(answer, t, r) for t, r in spoken], {}, tau=0.05)
            packed = time.process_time() - begin
            best = float("inf")
            for _ in range(7):
                read = open_reader(Path(folder), ["u"])
                begin = time.process_time()
                for k in read.order(0, 0).tolist():
                    read[k]
                best = min(best, time.process_time() - begin)
        n = 4096 * len(spoken)
        result[regime] = {"pack_positions_per_second": round(n / packed), "read_positions_per_second": round(n / best)}
        print(regime, result[regime], flush=True)
    for name in ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling"):
        result[name] = {"capture_over_forward": capture_over_forward(name)}
        print(name, result[name], flush=True)
    return result


def given(name: str, engine: LocalEngine, whole: list[Conversation], tokens: list[Tokens]) -> Iterator[Capture]:
    """Given answers as the sapling scores them; each is short enough to come in one piece."""
    for k, logs_NW in engine.pieces([t.ids_T for t in tokens], [t.learn_T for t in tokens]):
        rows = sample_rows(logs_NW, tokens[k].ids_T[tokens[k].learn_T], TAU, str(k))
        yield Capture(Answer(str(k), name, "s", "", whole[k], Finish.STOP), tokens[k], rows)


def capture_over_forward(name: str) -> float:
    """Scoring, sampling and packing of given answers over the forward passes that they need."""
    source = Source(str(ROOT / "saplings" / name))
    voice = open_voice(source, name)
    engine = LocalEngine(open_model(source, voice, name), len(voice.vocabulary))
    whole = [i.answered for skill in SKILLS for i in skill.items(Split.TEACH, 128, 0)]
    tokens = [voice.render(c) for c in whole]
    ratios = []
    for _ in range(5):
        begin = time.process_time()
        with torch.inference_mode():
            for k in range(0, len(tokens), 64):
                width = max(len(t) for t in tokens[k:k + 64])
                ids, mask = torch.zeros((2, len(tokens[k:k + 64]), width), dtype=torch.int64)
                for row, t in enumerate(tokens[k:k + 64]):
                    ids[row, :len(t)], mask[row, :len(t)] = torch.from_numpy(t.ids_T), 1
                engine.model(input_ids=ids, attention_mask=mask)
        forward = time.process_time() - begin
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            cache.write_unit(Path(folder), "u", list(given(name, engine, whole, tokens)), {}, tau=TAU)
        ratios.append((time.process_time() - begin) / forward)
    return round(statistics.median(ratios), 3)


def table(result: dict[str, Any]) -> str:
    """Markdown, for docs/cache.md."""
    lines = ["| a 152k-token vocabulary, synthetic | entries | bytes a position | with tokens | 236 billion tokens |", "|---|---|---|---|---|"]
    for regime, rows in result["synthetic"].items():
        lines += [f"| {regime}, {form} | {r['entries']} | {r['rows']} | {r.get('all', '-')} | {r.get('terabytes', '-')} TB |".replace("- TB", "-")
                  for form, r in rows.items() if isinstance(r, dict) and not {"kl", "kl_at_most"} & r.keys()]
    lines += ["", "| entries from p on, rest left over | entries | bytes a position | KL, the rest spread by frequency |", "|---|---|---|---|"]
    for regime, rows in result["synthetic"].items():
        lines += [f"| {regime}, {form[9:]} | {r['entries']} | {r['rows']} | {r['kl']} |" for form, r in rows.items()
                  if isinstance(r, dict) and "kl" in r]
    lines += ["", "| the fewest entries, KL of each row | entries | bytes a position | with tokens |", "|---|---|---|---|"]
    for regime, rows in result["synthetic"].items():
        lines += [f"| {regime}, {form} | {r['entries']} | {r['rows']} | {r['all']} |" for form, r in rows.items()
                  if isinstance(r, dict) and "kl_at_most" in r]
    lines += ["", "| a student taught from | entries | bytes a position | bits a byte, 3 seeds | over full | gradient's variance | bias |",
              "|---|---|---|---|---|---|---|"]
    for form, r in result["student"]["forms"].items():
        lines.append(f"| {form} | {r.get('entries', '-')} | {r.get('rows', '-')} | {r['mean']:.3f} ({min(r['bits_per_byte']):.3f}-"
                     f"{max(r['bits_per_byte']):.3f}) | {r['over_full']:+.1%} | {r.get('gradient_variance', '-')} | {r.get('gradient_bias', '-')} |")
    bits = result["bound"]["bits_a_token"]
    lines += ["", f"| ids at least, {bits} bits a token | tokens beside the realised | bytes a position |", "|---|---|---|"]
    for regime in REGIMES:
        lines += [f"| {regime}, {form} | {r['other_tokens']} | {r['ids_at_least']} |" for form, r in result["bound"][regime].items()]
    lines += ["", "| CPU, one thread | |", "|---|---|"]
    for name, r in [*result["speed"].items(), *result["feed"].items()]:
        lines += [f"| {name}: {what.replace('_', ' ')} | {value:,} |" for what, value in r.items()]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    from feed import feed

    path = ROOT / "bench" / "results" / "cache.json"
    parts = {"student": student, "synthetic": synthetic, "bound": bound, "speed": speed, "feed": feed}
    wanted = sys.argv[1:] or list(parts)
    result = (json.loads(path.read_text()) if path.is_file() else {}) | {"torch": torch.__version__} | {name: parts[name]() for name in wanted}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
