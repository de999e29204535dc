"""Measure the cache: bytes per position, the student's bits per byte, and positions per second.

    python bench/cache.py [student] [synthetic] [bound] [speed] [feed]     (make bench-cache)

About 15 minutes; running one part keeps the figures of the others.

`student`: a small model's distributions over whole conversations train a smaller model from each
cache format, three seeds. `synthetic`: rows of 152k-token vocabularies, generated without a model,
with the entropy of long reasoning (nearly certain) and of web text (broad). `bound`: a lower bound
on the cost of naming tokens in those rows. `speed`: CPU seconds of one thread. `feed`: from the
capture to the student's batches, beside the training step, and memory. Writes
bench/results/cache.json.
"""

from __future__ import annotations

import json
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
from tails import REGIMES, bound, cost, positions, sampled_rows, synthetic

from persea.cache import unit as cache
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason, Text
from persea.distributions import DistributionKind, SparseDistributions, sample_distributions
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.models.random_init import random_init
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Answer
from persea.tokenization.tokens import RenderedTokens

ROOT = Path(__file__).resolve().parent.parent
TAU = 0.02  # the recipe's default
SHARE, STEPS, BATCH, SEEDS = 0.7, 400, 16, 3


# --- forms of a cache: dense probabilities -> rows ---


def sampled(tau: float) -> Callable[[torch.Tensor, np.ndarray, str], SparseDistributions]:
    return lambda logs_NW, real_N, seed: sample_distributions(logs_NW, real_N, tau, seed)


def drawn(draws: int) -> Callable[[torch.Tensor, np.ndarray, str], SparseDistributions]:
    """RS-KD: this many draws with replacement, each with weight 1/draws."""

    def rows(logs_NW: torch.Tensor, real_N: np.ndarray, seed: str) -> SparseDistributions:
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        ids_ND = torch.multinomial(logs_NW.exp(), draws, replacement=True, generator=generator)
        dense_NW = torch.zeros_like(logs_NW).scatter_add_(
            1, ids_ND, torch.full(ids_ND.shape, 1 / draws)
        )
        return _sparse(dense_NW, dense_NW > 0, real_N)

    return rows


def top(
    k: int, renormalised: bool
) -> Callable[[torch.Tensor, np.ndarray, str], SparseDistributions]:
    def rows(logs_NW: torch.Tensor, real_N: np.ndarray, seed: str) -> SparseDistributions:
        p_NW = logs_NW.exp()
        kept_NW = torch.zeros_like(p_NW, dtype=torch.bool).scatter_(
            1, logs_NW.topk(k, -1).indices, True
        )
        if renormalised:
            p_NW = p_NW / torch.where(kept_NW, p_NW, 0).sum(-1, keepdim=True)
        return _sparse(p_NW.clamp(max=1), kept_NW, real_N)

    return rows


def _sparse(p_NW: torch.Tensor, kept_NW: torch.Tensor, real_N: np.ndarray) -> SparseDistributions:
    row_M, id_M = kept_NW.nonzero(as_tuple=True)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_M.numpy(), minlength=len(p_NW)))])
    realised = p_NW[range(len(p_NW)), real_N].clamp(min=1e-30).log().float().numpy()
    return SparseDistributions(
        offsets,
        id_M.int().numpy(),
        p_NW[row_M, id_M].float().numpy(),
        realised,
        DistributionKind.TOPK,
    )


FORMS = {
    "sampled .01": sampled(0.01),
    "sampled .02": sampled(0.02),
    "sampled .05": sampled(0.05),
    "sampled .1": sampled(0.1),
    "sampled .2": sampled(0.2),
    "50 draws": drawn(50),
    "12 draws": drawn(12),
    "top-16 renormalised": top(16, True),
    "top-4 renormalised": top(4, True),
    "top-4 and rest": top(4, False),
}


def tau_of(form: str) -> float:
    return float(form.split()[1]) if form.startswith("sampled") else 1e-9


# --- a student of a sapling ---


@dataclass(frozen=True)
class ScoredConversation:
    """A conversation, supervised on all tokens but the first, with the teacher's distributions."""

    tokens: RenderedTokens
    logs_NW: torch.Tensor
    bytes: int


def conversations(name: str, split: Split, n: int) -> list[ScoredConversation]:
    """Return n conversations of each task, without distributions yet."""
    renderer = load_renderer(ModelSource(str(ROOT / "saplings" / name)), name)
    whole = [
        i.reference_conversation for skill in GENERATED_TASKS for i in skill.items(split, n, 0)
    ]
    out = []
    for c in whole:
        t = renderer.render(c)
        out.append(
            ScoredConversation(
                RenderedTokens(t.ids_T, t.starts_T, t.ends_T, np.arange(len(t)) > 0),
                torch.empty(len(t) - 1, len(renderer.vocabulary)),
                sum(len(p.text.encode()) for p in c.parts()),
            )
        )
    return [out[k] for k in np.random.default_rng(0).permutation(len(out))]


@torch.no_grad()
def scored(model: Any, some: list[ScoredConversation]) -> list[ScoredConversation]:
    width = some[0].logs_NW.shape[1]
    return [
        replace(
            s,
            logs_NW=torch.log_softmax(
                model(input_ids=torch.from_numpy(s.tokens.ids_T[None]).long()).logits[
                    0, :-1, :width
                ],
                -1,
            ),
        )
        for s in some
    ]


def loss_of(
    model: Any, some: list[ScoredConversation], rows: list[SparseDistributions | None] | None
) -> torch.Tensor:
    """Return share * events + (1 - share) * cross-entropy, as event_kl_loss with one vocabulary.

    rows: None = cross-entropy alone; None for a conversation = its full distributions.
    """
    width = max(len(s.tokens) for s in some)
    ids, mask = (
        torch.zeros((len(some), width), dtype=torch.int64),
        torch.zeros((len(some), width), dtype=torch.int64),
    )
    for b, s in enumerate(some):
        ids[b, : len(s.tokens)] = torch.from_numpy(s.tokens.ids_T)
        mask[b, : len(s.tokens)] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits
    q_NW = torch.cat(
        [
            torch.log_softmax(logits[b, : len(s.tokens) - 1, : s.logs_NW.shape[1]], -1)
            for b, s in enumerate(some)
        ]
    )
    real_N = torch.cat([torch.from_numpy(s.tokens.ids_T[1:]).long() for s in some])
    ce_N = -q_NW[range(len(real_N)), real_N]
    if rows is None:
        return ce_N.mean()
    p_NW = torch.cat(
        [
            s.logs_NW.exp() if r is None else densely(r, s.logs_NW.shape[1])
            for s, r in zip(some, rows, strict=True)
        ]
    )
    return (-SHARE * (p_NW * q_NW).sum(-1) + (1 - SHARE * p_NW.sum(-1)) * ce_N).mean()


def densely(rows: SparseDistributions, width: int) -> torch.Tensor:
    out = torch.zeros(len(rows), width)
    row = np.repeat(np.arange(len(rows)), np.diff(rows.offsets_N1))
    out[row, rows.ids_M.astype(np.int64)] = torch.from_numpy(rows.probs_M)
    return out


def trained(
    train: list[ScoredConversation],
    rows: list[SparseDistributions | None] | None,
    seed: int,
    steps: int,
    hidden: int = 64,
    layers: int = 2,
) -> Any:
    model = random_init(
        "llama",
        train[0].logs_NW.shape[1],
        {"hidden": hidden, "layers": layers, "heads": 2, "seed": seed},
    )
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        some = rng.choice(len(train), BATCH, replace=False).tolist()
        optimiser.zero_grad()
        loss_of(
            model, [train[k] for k in some], None if rows is None else [rows[k] for k in some]
        ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model


@torch.no_grad()
def bits(model: Any, held: list[ScoredConversation]) -> float:
    nats = sum(
        float(loss_of(model, held[k : k + 64], None))
        * sum(len(s.logs_NW) for s in held[k : k + 64])
        for k in range(0, len(held), 64)
    )
    return float(nats / np.log(2) / sum(s.bytes for s in held))


def gradients(
    model: Any,
    train: list[ScoredConversation],
    rows: list[SparseDistributions | None],
    batches: list[list[int]],
) -> torch.Tensor:
    out = []
    for some in batches:
        model.zero_grad()
        loss_of(model, [train[k] for k in some], [rows[k] for k in some]).backward()
        out.append(
            torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        )
    return torch.stack(out)


def student(name: str = "qwen-sapling") -> dict[str, Any]:
    """Train students from each cache format.

    A teacher of 3 layers that saw 3,600 conversations, a student of 2 that sees 300 of them. Every
    token is supervised, so that rows are broad. (A sapling itself was only trained on answers: its
    distributions over questions are useless to a student.)
    """
    teacher = trained(conversations(name, Split.TRAIN, 1200), None, 5, 900, 128, 3)
    train, held = (
        scored(teacher, conversations(name, Split.TRAIN, 100)),
        conversations(name, Split.TEST, 50),
    )
    n = sum(len(s.logs_NW) for s in train)
    entropy = -sum(float((s.logs_NW.exp() * s.logs_NW).sum()) for s in train) / n
    forms: dict[str, tuple[list[SparseDistributions | None] | None, dict[str, float]]] = {
        "no teacher": (None, {}),
        "full": ([None] * len(train), {}),
    }
    for form, make in FORMS.items():
        rows = [
            make(s.logs_NW, s.tokens.ids_T[1:].astype(np.int64), f"{form} {k}")
            for k, s in enumerate(train)
        ]
        kind = DistributionKind.SAMPLED if form.startswith("sampled") else DistributionKind.TOPK
        forms[form] = (
            list(rows),
            cost([(s.tokens, r) for s, r in zip(train, rows, strict=True)], kind, tau_of(form)),
        )
    rng = np.random.default_rng(9)
    batches = [rng.choice(len(train), BATCH, replace=False).tolist() for _ in range(40)]
    midway = trained(train, None, 7, STEPS // 2)
    true = gradients(midway, train, [None] * len(train), batches)
    spread = float(((true - true.mean(0)) ** 2).sum(-1).mean())
    result: dict[str, Any] = {}
    for form, (rows_, paid) in forms.items():
        seeds = [bits(trained(train, rows_, seed, STEPS), held) for seed in range(SEEDS)]
        result[form] = paid | {
            "bits_per_byte": [round(b, 4) for b in seeds],
            "mean": round(statistics.mean(seeds), 4),
        }
        if rows_ is not None and form != "full":
            found = gradients(midway, train, rows_, batches)
            result[form] |= {
                "gradient_variance": round(
                    float(((found - found.mean(0)) ** 2).sum(-1).mean()) / spread, 3
                ),
                "gradient_bias": round(
                    float((found.mean(0) - true.mean(0)).norm() / true.mean(0).norm()), 4
                ),
            }
        print(f"{form:20}", result[form], flush=True)
    for row in result.values():
        row["over_full"] = round(row["mean"] / result["full"]["mean"] - 1, 4)
    return {
        "teacher_bits_per_byte": round(bits(teacher, held), 4),
        "vocabulary": train[0].logs_NW.shape[1],
        "positions": n,
        "entropy_nats": round(entropy, 3),
        "steps": STEPS,
        "forms": result,
    }


# --- speed ---


def speed() -> dict[str, Any]:
    """Measure CPU seconds of one thread: packing and reading, and capture beside a forward pass."""
    from persea.cache.reader import open_cache_reader

    result: dict[str, Any] = {}
    for regime in REGIMES:
        cached = [sampled_rows(positions(regime, 4096, k), 0.05) for k in range(32)]
        answer = Answer(
            "",
            "t",
            "s",
            "",
            Conversation.from_question("").with_answer(Text("")),
            FinishReason.STOP,
        )
        with tempfile.TemporaryDirectory() as folder:
            begin = time.process_time()
            cache.write_unit(
                Path(folder), "u", [CachedAnswer(answer, t, r) for t, r in cached], {}, tau=0.05
            )
            packed = time.process_time() - begin
            best = float("inf")
            for _ in range(7):
                read = open_cache_reader(Path(folder), ["u"])
                begin = time.process_time()
                for k in read.epoch_order(0, 0).tolist():
                    read[k]
                best = min(best, time.process_time() - begin)
        n = 4096 * len(cached)
        result[regime] = {
            "pack_positions_per_second": round(n / packed),
            "read_positions_per_second": round(n / best),
        }
        print(regime, result[regime], flush=True)
    for name in ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling"):
        result[name] = {"capture_over_forward": capture_over_forward(name)}
        print(name, result[name], flush=True)
    return result


def given(
    name: str, engine: TransformersEngine, whole: list[Conversation], tokens: list[RenderedTokens]
) -> Iterator[CachedAnswer]:
    """Score given answers with the sapling; each is short enough for one piece."""
    for k, logs_NW in engine.iter_logprobs(
        [t.ids_T for t in tokens], [t.loss_mask_T for t in tokens]
    ):
        rows = sample_distributions(logs_NW, tokens[k].ids_T[tokens[k].loss_mask_T], TAU, str(k))
        yield CachedAnswer(
            Answer(str(k), name, "s", "", whole[k], FinishReason.STOP), tokens[k], rows
        )


def capture_over_forward(name: str) -> float:
    """Return the cost of scoring, sampling and packing over that of the forward passes alone."""
    source = ModelSource(str(ROOT / "saplings" / name))
    renderer = load_renderer(source, name)
    engine = TransformersEngine(load_model(source, renderer, name), len(renderer.vocabulary))
    whole = [
        i.reference_conversation
        for skill in GENERATED_TASKS
        for i in skill.items(Split.TRAIN, 128, 0)
    ]
    tokens = [renderer.render(c) for c in whole]
    ratios = []
    for _ in range(5):
        begin = time.process_time()
        with torch.inference_mode():
            for k in range(0, len(tokens), 64):
                width = max(len(t) for t in tokens[k : k + 64])
                ids, mask = torch.zeros((2, len(tokens[k : k + 64]), width), dtype=torch.int64)
                for row, t in enumerate(tokens[k : k + 64]):
                    ids[row, : len(t)], mask[row, : len(t)] = torch.from_numpy(t.ids_T), 1
                engine.model(input_ids=ids, attention_mask=mask)
        forward = time.process_time() - begin
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            cache.write_unit(
                Path(folder), "u", list(given(name, engine, whole, tokens)), {}, tau=TAU
            )
        ratios.append((time.process_time() - begin) / forward)
    return round(statistics.median(ratios), 3)


def table(result: dict[str, Any]) -> str:
    """Return the tables of docs/cache.md."""
    lines = [
        "| a 152k-token vocabulary, synthetic | entries | bytes per position | with tokens "
        "| 236 billion tokens |",
        "|---|---|---|---|---|",
    ]
    for regime, rows in result["synthetic"].items():
        lines += [
            f"| {regime}, {form} | {r['entries']} | {r['rows']} | {r.get('all', '-')} "
            f"| {r['terabytes']} TB |"
            if "terabytes" in r
            else f"| {regime}, {form} | {r['entries']} | {r['rows']} | {r.get('all', '-')} | - |"
            for form, r in rows.items()
            if isinstance(r, dict) and not {"kl", "kl_at_most"} & r.keys()
        ]
    lines += [
        "",
        "| entries from p on, rest left over | entries | bytes per position "
        "| KL, the rest spread by frequency |",
        "|---|---|---|---|",
    ]
    for regime, rows in result["synthetic"].items():
        lines += [
            f"| {regime}, {form[9:]} | {r['entries']} | {r['rows']} | {r['kl']} |"
            for form, r in rows.items()
            if isinstance(r, dict) and "kl" in r
        ]
    lines += [
        "",
        "| the fewest entries, KL of each row | entries | bytes per position | with tokens |",
        "|---|---|---|---|",
    ]
    for regime, rows in result["synthetic"].items():
        lines += [
            f"| {regime}, {form} | {r['entries']} | {r['rows']} | {r['all']} |"
            for form, r in rows.items()
            if isinstance(r, dict) and "kl_at_most" in r
        ]
    lines += [
        "",
        "| a student trained on | entries | bytes per position | bits per byte, 3 seeds "
        "| over full | gradient's variance | bias |",
        "|---|---|---|---|---|---|---|",
    ]
    for form, r in result["student"]["forms"].items():
        lines.append(
            f"| {form} | {r.get('entries', '-')} | {r.get('rows', '-')} "
            f"| {r['mean']:.3f} ({min(r['bits_per_byte']):.3f}-{max(r['bits_per_byte']):.3f}) "
            f"| {r['over_full']:+.1%} | {r.get('gradient_variance', '-')} "
            f"| {r.get('gradient_bias', '-')} |"
        )
    bits = result["bound"]["bits_a_token"]
    lines += [
        "",
        f"| ids at least, {bits} bits a token | tokens beside the realised | bytes per position |",
        "|---|---|---|",
    ]
    for regime in REGIMES:
        lines += [
            f"| {regime}, {form} | {r['other_tokens']} | {r['ids_at_least']} |"
            for form, r in result["bound"][regime].items()
        ]
    lines += ["", "| CPU, one thread | |", "|---|---|"]
    for name, r in [*result["speed"].items(), *result["feed"].items()]:
        lines += [f"| {name}: {what.replace('_', ' ')} | {value:,} |" for what, value in r.items()]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    from feed import feed

    path = ROOT / "bench" / "results" / "cache.json"
    parts = {
        "student": student,
        "synthetic": synthetic,
        "bound": bound,
        "speed": speed,
        "feed": feed,
    }
    wanted = sys.argv[1:] or list(parts)
    result = (
        (json.loads(path.read_text()) if path.is_file() else {})
        | {"torch": torch.__version__}
        | {name: parts[name]() for name in wanted}
    )
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
