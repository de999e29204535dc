"""Bias test: how far each method pushes a perfect student away from the truth, on exact toy worlds.

    make bench-bias        (python bench/bias.py; 10 to 20 minutes on one core, mostly for GOLD)

Floors: two exact models of the same distribution over byte strings, with different tokenizers, are
compared; mean total variation over common boundaries, nats over chunks. An unbiased method gives
zero. Drift: a table of logits starts at the truth and follows each loss, all composed alike (.7 of
the loss and .3 cross-entropy at common boundaries, full cross-entropy elsewhere). Detection: one
row of the Markov chain is tilted; does the loss rank the tilted students as their byte KL does?
GOLD is TRL's own code (pip install 'persea[bench]'); without TRL its columns stay empty. Writes
bench/results/bias.json.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from tabular import (
    Mask,
    Objective,
    Stack,
    baseline,
    byte_kl,
    chunk,
    descend,
    event_masses,
    events,
    exact_mask,
    exact_weights,
    iterate,
    no_mask,
    persea_mask,
    prefix_columns,
    push,
    random_logits,
    shared_columns,
    stack,
)
from worlds import ALPHABET, WORLDS, Floats, World, chunks, encode, exact, markov, tilted, world

MASKS: dict[str, Mask] = {
    "raw": no_mask,
    "persea's masks": persea_mask,
    "best masks": exact_mask,
    "exact": exact_weights,
}
SHORT = 4  # the longest string of the worlds for gradient descent: 340 strings, 341 rows

# --- floors ---


def tv(p: Floats, q: Floats) -> float:
    return float(np.abs(p - q).sum() / 2)


def common_prefix_columns(w: World) -> tuple[list[int], list[int]]:
    """Map both sides to the longest prefix that is a token of BOTH vocabularies."""
    both = {b: n for n, b in enumerate(sorted({*w.bytes_W()} & {*w.bytes_V()}, key=repr))}

    def to(raw: bytes | None) -> int:
        return (
            both[None]
            if raw is None
            else next(both[raw[:n]] for n in range(len(raw), 0, -1) if raw[:n] in both)
        )

    return [to(raw) for raw in w.bytes_W()], [to(raw) for raw in w.bytes_V()]


def first_byte_columns(w: World) -> tuple[list[int], list[int]]:
    return tuple(
        [256 if raw is None else raw[0] for raw in side] for side in (w.bytes_W(), w.bytes_V())
    )  # type: ignore[return-value]


Kept: TypeAlias = list[tuple[Floats, Floats]]  # the tokens that a mask keeps, for each boundary


def keeps(w: World, mask: Mask) -> Kept:
    return [mask(w, b) for b in w.boundaries]


def mean_tv(w: World, maps: tuple[list[int], list[int]], kept: Kept, room: int = 0) -> float:
    """Return the mean over boundaries of the total variation between both rows.

    Rows are masked, renormalised, and mapped to the same names. room: use only boundaries at least
    this far below the longest string, where a mask may assume that more text can follow.
    """
    longest = max(map(len, w.law))
    total = lost = 0.0
    size = 1 + max(max(maps[0]), max(maps[1]))
    for b, (ok_W, ok_V) in zip(w.boundaries, kept, strict=True):
        if len(w.student.vocabulary.decode(b.student)) > longest - room:
            continue
        p, q = (
            np.bincount(m, row * ok, size)
            for m, row, ok in zip(maps, (b.p_W, b.q_V), (ok_W, ok_V), strict=True)
        )
        lost += b.mass * tv(p / p.sum(), q / q.sum())
        total += b.mass
    return lost / total


def strict_tv(w: World) -> float:
    both = shared_columns(w)
    at_W, at_V = both.teacher_K.numpy(), both.student_K.numpy()
    pairs = [(b.mass, b.p_W[at_W], b.q_V[at_V]) for b in w.boundaries]
    lost = sum(m * tv(p / p.sum(), q / q.sum()) for m, p, q in pairs if p.sum() > 0 and q.sum() > 0)
    return lost / sum(m for m, _, _ in pairs)


def uld_tv(w: World) -> float:
    width = max(len(w.columns_W), len(w.columns_V))
    lost = sum(
        b.mass * tv(*(np.pad(np.sort(x)[::-1], (0, width - len(x))) for x in (b.p_W, b.q_V)))
        for b in w.boundaries
    )
    return lost / sum(b.mass for b in w.boundaries)


def chunk_nats(w: World, kept: Kept) -> float:
    """Return the mean |log P_T(chunk) - log P_S(chunk)|, corrected by the mass retained at both
    ends.
    """
    mass = [
        (float(b.p_W @ ok_W), float(b.q_V @ ok_V))
        for b, (ok_W, ok_V) in zip(w.boundaries, kept, strict=True)
    ]
    total = lost = 0.0
    for c in chunks(w):
        (t0, s0), (t1, s1) = mass[c.begin], mass[c.end] if c.end >= 0 else (1.0, 1.0)
        lost += c.weight * abs(c.teacher + math.log(t1 / t0) - c.student - math.log(s1 / s0))
        total += c.weight
    return lost / total


def floors(w: World, masks: dict[str, Mask]) -> dict[str, float]:
    event_maps, every = (
        (w.event_map.teacher_event_W.tolist(), w.event_map.student_event_V.tolist()),
        keeps(w, no_mask),
    )
    total = sum(b.mass for b in w.boundaries)
    out = {
        "strict": strict_tv(w),
        "uld": uld_tv(w),
        "bpm": mean_tv(w, (prefix_columns(w).tolist(), list(range(len(w.columns_V)))), every),
        "longest common prefix": mean_tv(w, common_prefix_columns(w), every),
    }
    for name, mask in masks.items():
        kept = keeps(w, mask)
        out[f"events {name}"] = mean_tv(w, event_maps, kept)
        out[f"events {name}, room for 3"] = mean_tv(w, event_maps, kept, 3)
        out[f"first byte {name}"] = mean_tv(w, first_byte_columns(w), kept)
        out[f"chunk {name}"] = chunk_nats(w, kept)
    out["maps disagree"] = sum(b.mass * b.disagree for b in w.boundaries) / total
    for side in ("b_T", "b_S"):
        out[side] = sum(b.mass * getattr(b, side) for b in w.boundaries) / total
    return out


# --- detection ---


def event_kl(s: Stack, logits_RV: torch.Tensor) -> float:
    """Return the mean over boundaries of KL(teacher || student) over events, masked and
    renormalised.
    """
    p_CE, q_CE = event_masses(s, torch.softmax(logits_RV, -1)[s.row_C])
    p_CE, q_CE = (x / x.sum(-1, keepdim=True) for x in (p_CE, q_CE))
    return float(
        (
            s.mass_C * (torch.xlogy(p_CE, p_CE) - torch.xlogy(p_CE, q_CE.clamp(min=1e-300))).sum(-1)
        ).sum()
        / s.mass_C.sum()
    )


def spearman(x: list[float], y: list[float]) -> float:
    a, b = (np.argsort(np.argsort(v)) - (len(v) - 1) / 2 for v in (x, y))  # no ties among these
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def tilted_student(w: World, after: str, to: int, eps: float, longest: int) -> tuple[float, World]:
    """Return the byte KL of the true distribution from the tilted one, and the tilted world."""
    law = markov(tilted(after, to, eps), longest)
    kl = sum(p * math.log(p / law[x]) for x, p in w.law.items())
    return kl, World(
        w.name, w.law, w.teacher, w.student, w.t, exact(encode(w.student, list(law)), law)
    )


def detection(
    name: str, mask: Mask, longest: int = 5, sizes: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
) -> dict[str, float]:
    """Compare every loss with the byte KL on students whose Markov rows are tilted in every way.

    Losses are those of the tilted student minus those of the perfect one. events: over boundaries
    only, so blind to differences inside events and inside teacher tokens; composed: the objective;
    floor: event loss of the perfect student; smallest: that of the least tilted one; monotone:
    share of tilts along which the composed loss rises with every size.
    """
    w = world(name, markov(longest=longest))
    s = stack(w, mask)
    whole = events(s)
    start = float(whole(s.truth_logits))
    floor, kls, alone, composed, rises = event_kl(s, s.truth_logits), [], [], [], []
    for after in ALPHABET:
        for to in range(5):
            for eps in sizes:
                kl, other = tilted_student(w, after, to, eps, longest)
                truth = torch.from_numpy(
                    np.array([other.row_V(other.s.next[prefix]) for prefix in s.number])
                )
                logits = torch.where(truth > 0, truth.clamp(min=1e-300).log(), -60.0)
                kls.append(kl)
                alone.append(event_kl(s, logits))
                composed.append(float(whole(logits)) - start)
            last = [0.0, *composed[-len(sizes) :]]
            rises.append(all(x < y for x, y in pairwise(last)))
    return {
        "events": spearman(kls, alone),
        "composed": spearman(kls, composed),
        "monotone": sum(rises) / len(rises),
        "floor": floor,
        "smallest": min(alone),
        "smallest_composed": min(composed),
    }


# --- drift ---


def objectives(
    w: World, masks: dict[str, Mask], share: float = 0.7
) -> dict[str, tuple[Stack, Objective]]:
    out: dict[str, tuple[Stack, Objective]] = {}
    s = stack(w, no_mask)
    for name in ("strict", "uld", "bpm"):
        out[name] = s, baseline(s, w, name, share)
    for temperature in (1.0, 100.0):
        for exactly in (False, True):
            name = f"chunk {'exact' if exactly else 'raw'}, temperature {temperature:g}"
            out[name] = s, chunk(s, w, temperature=temperature, exact=exactly, share=share)
    for name, mask in masks.items():
        s = stack(w, mask)
        out[f"events {name}"] = s, events(s, share)
        if name != "raw":
            out[f"events {name}, renormalised"] = s, events(s, share, renormalised=True)
    return out


def drift(s: Stack, objective: Objective) -> dict[str, float]:
    return {
        "push": push(objective, s),
        "byte_kl": byte_kl(s, descend(objective, s, s.truth_logits)),
    }


def where_it_ends(s: Stack, objective: Objective) -> dict[str, float]:
    """Return the fixed point of an event objective, from the truth and from random logits."""
    return {
        "from_truth": byte_kl(s, iterate(objective, s, s.truth_logits)),
        "from_elsewhere": byte_kl(s, iterate(objective, s, random_logits(s, 1))),
        "elsewhere": byte_kl(s, random_logits(s, 1)),
    }


# --- the table ---


def row(name: str, values: list[float], form: str = ".4f") -> str:
    return f"{name:<44}" + "".join(f"{v:>12{form}}" for v in values)


def print_floors(result: dict[str, dict[str, float]]) -> None:
    print(
        f"\n{'floors at the truth (total variation; chunks: nats)':<44}"
        + "".join(f"{n:>12}" for n in result)
    )
    for name in dict.fromkeys(k for column in result.values() for k in column):
        print(row(name, [column[name] for column in result.values()]), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with_trl = importlib.util.find_spec("trl") is not None
    if not with_trl:
        print("without GOLD: pip install 'persea[bench]'")
    else:
        from trl_worlds import gold_floor, gold_objective
    table: dict[str, dict[str, float]] = {}
    whole = {name: world(name) for name in WORLDS}
    for name, w in whole.items():
        table[name] = floors(w, MASKS)
        for merge in ("observed", "bayesian") if with_trl else ():
            table[name][f"gold {merge}"] = gold_floor(stack(w, no_mask), w, merge)["tv"]
    print_floors(table)

    print(
        f"\n{'started at the truth: byte KL, nats a string':<44}"
        + "".join(f"{n:>12}" for n in WORLDS)
    )
    short = {name: world(name, markov(longest=SHORT)) for name in WORLDS}
    pairs = {name: objectives(w, MASKS) for name, w in short.items()}
    for name, w in short.items() if with_trl else ():
        s = stack(w, no_mask)
        pairs[name] |= {
            f"gold {merge}": (s, gold_objective(s, w, merge)) for merge in ("observed", "bayesian")
        }
    drifts: dict[str, dict[str, dict[str, float]]] = {}
    for method in pairs["same"]:
        drifts[method] = {name: drift(*pairs[name][method]) for name in WORLDS}
        print(row(method, [d["byte_kl"] for d in drifts[method].values()], ".1e"), flush=True)
    print(f"\n{'push: sum of |expected gradient| at the truth':<44}")
    for method, each in drifts.items():
        print(row(method, [d["push"] for d in each.values()], ".1e"))
    print(
        "\nfixed points of the event objective, whole worlds: "
        "byte KL from the truth, from random logits"
    )
    stacks = {m: {name: stack(w, mask) for name, w in whole.items()} for m, mask in MASKS.items()}
    ends = {
        f"events {m}": {name: where_it_ends(s, events(s)) for name, s in each.items()}
        for m, each in stacks.items()
    }
    for method, each in ends.items():
        print(row(method, [d["from_truth"] for d in each.values()], ".1e"))
        print(row("  started elsewhere", [d["from_elsewhere"] for d in each.values()], ".1e"))
    print(
        "\ndetection: 80 tilted students; Spearman with the byte KL; "
        "share of tilts along which the composed loss only rises"
    )
    found = {m: {name: detection(name, mask) for name in WORLDS} for m, mask in MASKS.items()}
    for m, each in found.items():
        for what, form in (
            ("events", ".3f"),
            ("composed", ".3f"),
            ("monotone", ".2f"),
            ("floor", ".1e"),
            ("smallest", ".1e"),
        ):
            print(row(f"events {m}: {what}", [d[what] for d in each.values()], form))
    out = {
        "torch": torch.__version__,
        "gold": with_trl,
        "share": 0.7,
        "floors": table,
        "drift": drifts,
        "fixed_points": ends,
        "detection": found,
    }
    (Path(__file__).parent / "results" / "bias.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
