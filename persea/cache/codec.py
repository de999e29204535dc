"""Codec: tokens and rows as entropy-coded streams, a block of answers each, under tables that the unit they lie in counts.

Ids are the cost of a cache (84 % of the bytes in the best format so far), so: the realised token, usually the row's largest entry,
costs no id; tail entries cost no value (it is tau); how many there are follows from the head's mass to within one; ids that are
left are coded under how often each stands in this unit. Log-probabilities of the head are rounded to multiples of STEP, which moves
none by more than 1e-3 nats. Everything that steers decoding is computed in integers or by plain float64 products, so that a unit
decodes to the same bits on every machine. The coder is `constriction`'s ANS (Bamler 2022, after Duda 2014).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.cache.entropy_coding import Columns, Decoded, Ints, Table, Tables, Taken, Words, encoded, joined
from persea.chat.messages import Tokens
from persea.distributions import STEP, RowKind, Rows
from persea.errors import DataError

TOLERANCE = STEP / 2 + 1e-6  # no log-probability moves by more than 0.00098
ONE = 1 << 30   # probability 1 in integers
NONE, ZERO = -1, -2  # a realised log-probability the teacher did not give; one of minus infinity
CONTEXTS = 16
LEFT = (ONE * np.array([.001, .002, .004, .008, .016, .03, .06, .1, .2, .3, .4, .5, .7, .9, .999])).astype(np.int64)  # mass beside the realised token


@lru_cache(maxsize=8)
def _exp(bins: int) -> npt.NDArray[np.float64]:
    """exp(-STEP * bin) of the first `bins` bins, by products alone: numpy's exp differs by a bit from machine to machine."""
    factor = np.full(bins, float((-Decimal(STEP)).exp()))
    factor[0] = 1.0
    return np.multiply.accumulate(factor)


def _bins(logs: npt.NDArray[np.floating]) -> Ints:
    return np.rint(logs.astype(np.float64) / -STEP).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Layout:
    """What a stream is read with, the same for a whole unit.

    kind    of all rows; tau of those of kind SAMPLED
    tables  column -> its table; a column coded under several contexts has one each, "tail.0", "tail.1"
    extents_U  bytes of content a token usually covers, for each value of "token.0"; -1 = none, it is a marker
    """

    kind: RowKind
    tau: float
    tables: Tables
    extents_U: Ints

    @cached_property
    def _extents_W(self) -> Ints:
        ids_U = self.tables["token.0"].values_U if len(self.extents_U) else np.empty(0, np.int64)
        extents_W = np.full(int(ids_U.max(initial=-1)) + 1, -1, np.int64)
        extents_W[ids_U] = self.extents_U
        return extents_W

    def extents(self, ids_T: Ints) -> Ints:
        extents: Ints = self._extents_W[ids_T]
        return extents


# --- what is coded, in which order; packing and unpacking both walk it ---


def _walk(column: Columns, layout: Layout, count: int) -> dict[str, Ints]:
    """Every column of a block of `count` answers, laid end to end; a context is computed from columns that came before."""
    out: dict[str, Ints] = {}

    def take(name: str, contexts: Ints) -> Ints:
        out[name] = column(name, contexts)
        return out[name]

    def plain(name: str, count: int) -> Ints:
        return take(name, np.zeros(count, np.int64))

    length = int(plain("length", count).sum())
    ids_T = plain("token", length)
    usual_T = layout.extents(ids_T)
    place_T = take("place", (usual_T < 0).astype(np.int64))
    take("extent", usual_T[place_T != 2] * 0)
    plain("start", int((place_T == 3).sum()))
    learn_T = np.cumsum(plain("learn", length)) % 2
    n = int(learn_T.sum())
    head_N = plain("first", n)                        # bin of the realised token, +1; 0 where it is no entry of the head
    surprise = plain("realised", int((head_N == 0).sum()))
    if layout.kind is RowKind.WORDS:
        return out
    kept = take("kept", np.clip(surprise * STEP, -1, CONTEXTS - 2).astype(np.int64) + 1)  # is the realised token an entry of the tail
    whole_H, left_H = _realised(int(head_N.max(initial=0)))
    first_N, left_N = whole_H[head_N], left_H[head_N]
    others_N = take("others", left_N)
    row_O = np.repeat(np.arange(n), others_N)
    values_O = take("value", left_N[row_O])
    plain("head", len(row_O))
    if layout.kind is not RowKind.SAMPLED:
        return out
    rest_N = ONE - first_N - np.bincount(row_O, weights=_whole(values_O), minlength=n).astype(np.int64)
    base_N, part_N = _expected(rest_N, layout.tau)
    more_N = take("more", part_N)
    tails_N = base_N + more_N
    tails_N[head_N == 0] -= kept
    out["tails"] = tails_N
    plain("tail", int(tails_N.sum()))
    return out


def _whole(bins: Ints) -> Ints:
    """Probabilities of bins, in ONEs."""
    if not len(bins):
        return bins
    size = 1 << max(12, int(bins.max()).bit_length())
    whole: Ints = (_exp(size)[bins] * ONE).astype(np.int64)
    return whole


@lru_cache(maxsize=64)
def _realised(highest: int) -> tuple[Ints, Ints]:
    """Of a realised token's column "first": its probability in ONEs, and a context, the mass it leaves to others."""
    whole_H = np.concatenate([[0], _whole(np.arange(highest))])
    return whole_H, np.searchsorted(LEFT, ONE - whole_H)


def _expected(rest_N: Ints, tau: float) -> tuple[Ints, Ints]:
    """How many tail entries the mass that the head left makes, rounded down, and a context: the part that was rounded away."""
    each = int(tau * ONE)
    rest_N = np.maximum(rest_N, 0)
    return rest_N // each, rest_N % each * CONTEXTS // each


# --- one capture <-> columns ---


def _columns(block: Sequence[tuple[Tokens, Rows]], kind: RowKind, tau: float, where: str) -> dict[str, Ints]:
    """What `_walk` asks for, but for extents, which need the whole unit."""
    ids_T, starts_T, ends_T, learn_T = (joined([getattr(t, field) for t, _ in block]) for field in ("ids_T", "starts_T", "ends_T", "learn_T"))
    tokens = Tokens(ids_T, starts_T, ends_T, learn_T.astype(np.bool_))
    ids_M, probs_M, realised_N = (joined([getattr(r, field) for _, r in block]) for field in ("ids_M", "probs_M", "realised_N"))
    sizes_N = joined([np.diff(r.offsets_N1) for _, r in block])
    rows = Rows(np.concatenate([[0], np.cumsum(sizes_N)]), ids_M, probs_M, realised_N, kind)
    if any(r.kind is not kind for _, r in block):
        raise DataError(f"rows that are not {kind}", where=where, remedy="a unit holds rows of one kind")
    if any(len(r) != int(t.learn_T.sum()) for t, r in block):
        raise DataError("not a row for each learned token", where=where, remedy="a row belongs to each learned token")
    learned_N = tokens.ids_T[tokens.learn_T].astype(np.int64)
    known = {"length": np.array([len(t) for t, _ in block], np.int64), "token": tokens.ids_T.astype(np.int64)}
    known |= _places(tokens) | {"learn": np.abs(np.diff(tokens.learn_T.astype(np.int64), prepend=0))}
    row_M = np.repeat(np.arange(len(rows)), np.diff(rows.offsets_N1))
    ids_M = ids_M.astype(np.int64)
    if not (np.isfinite(probs_M) & (probs_M > 0) & (probs_M <= 1 + STEP)).all():
        raise DataError("an entry that is no probability", where=where, remedy="entries are in (0, 1]")
    order = np.argsort(row_M << 32 | ids_M, kind="stable")
    if (order != np.arange(len(order))).any() or (np.diff(row_M << 32 | ids_M) == 0).any():
        raise DataError("entries of a row that do not rise", where=where, remedy="sort each row by token id; a token stands in it once")
    tail_M = (probs_M == np.float32(tau)) if rows.kind is RowKind.SAMPLED else np.zeros(len(ids_M), np.bool_)
    real_M = ids_M == learned_N[row_M]
    bins_M = np.maximum(_bins(np.log(np.maximum(probs_M, np.float32(1e-45)).astype(np.float64))), 0)
    first_N = np.zeros(len(rows), np.int64)
    mine = real_M & ~tail_M
    first_N[row_M[mine]] = bins_M[mine] + 1
    logs_N = rows.realised_N
    if not (np.abs(logs_N[row_M[mine]] - np.log(probs_M[mine])) <= STEP).all():
        raise DataError("a realised log-probability that is not its own entry's", where=where, remedy="both come from one distribution")
    kept_N = np.zeros(len(rows), np.int64)
    kept_N[row_M[real_M & tail_M]] = 1
    others, tails = ~real_M & ~tail_M, ~real_M & tail_M
    rest_N = ONE - np.bincount(row_M[~tail_M], weights=_whole(bins_M[~tail_M]), minlength=len(rows)).astype(np.int64)
    base_N = _expected(rest_N, tau)[0] if kind is RowKind.SAMPLED else np.zeros(len(rows), np.int64)
    surprise_N = np.where(np.isnan(logs_N), NONE, np.where(np.isneginf(logs_N), ZERO, np.maximum(_bins(np.nan_to_num(logs_N, neginf=0)), 0)))
    known |= {
        "first": first_N, "realised": surprise_N[first_N == 0], "kept": kept_N[first_N == 0],
        "others": np.bincount(row_M[others], minlength=len(rows)), "value": bins_M[others], "head": ids_M[others],
        "more": np.bincount(row_M[tail_M], minlength=len(rows)) - base_N, "tail": ids_M[tails]}
    return known


def _places(tokens: Tokens) -> dict[str, Ints]:
    """Where tokens begin: 0 where the one before ended, 1 one byte later (a new part), 2 nowhere (a marker), 3 elsewhere."""
    starts_T, ends_T = tokens.starts_T.astype(np.int64), tokens.ends_T.astype(np.int64)
    marker_T = (starts_T == -1) & (ends_T == -1)
    content = ~marker_T
    before = np.concatenate([[0], ends_T[content][:-1]]) if content.any() else np.empty(0, np.int64)
    gap = starts_T[content] - before
    place_T = np.full(len(starts_T), 2, np.int64)
    place_T[content] = np.where((gap == 0) | (gap == 1), gap, 3)
    return {"place": place_T, "start": starts_T[place_T == 3], "covers": (ends_T - starts_T)[content]}


def _tokens(out: Mapping[str, Ints], usual_T: Ints) -> Tokens:
    ids_T, place_T = out["token"], out["place"]
    learn_T = (np.cumsum(out["learn"]) % 2).astype(np.bool_)
    starts_T, ends_T = np.full(len(ids_T), -1, np.int64), np.full(len(ids_T), -1, np.int64)
    content = place_T != 2
    covers, gap = out["extent"] + usual_T[content], place_T[content]
    reached = np.cumsum(covers + (gap == 1))
    elsewhere = gap == 3  # what follows counts from there
    shifts = np.concatenate([[0], out["start"] - (reached - covers)[elsewhere]])
    ends_T[content] = reached + shifts[np.cumsum(elsewhere)]
    starts_T[content] = ends_T[content] - covers
    return Tokens(ids_T.astype(np.int32), starts_T.astype(np.int32), ends_T.astype(np.int32), learn_T)


def _rows(out: Mapping[str, Ints], layout: Layout) -> Rows:
    learned_N, kind = out["token"][np.cumsum(out["learn"]) % 2 == 1], layout.kind
    first_N, n = out["first"], len(learned_N)
    surprise_N = first_N - 1
    surprise_N[first_N == 0] = out["realised"]
    realised_N = (surprise_N * -STEP).astype(np.float32)
    realised_N[surprise_N == NONE] = np.nan
    realised_N[surprise_N == ZERO] = -np.inf
    if kind is RowKind.WORDS:
        return Rows(np.zeros(n + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), realised_N, kind)
    every = np.arange(n)
    at_head, absent = every[first_N > 0], every[first_N == 0]
    row = [at_head, np.repeat(every, out["others"])]
    ids = [learned_N[at_head], out["head"]]
    bins = np.concatenate([first_N[at_head] - 1, out["value"]])
    probs = [_exp(1 << max(12, int(bins.max(initial=0)).bit_length()))[bins]]
    if kind is RowKind.SAMPLED:
        kept = absent[out["kept"] > 0]
        row += [kept, np.repeat(every, out["tails"])]
        ids += [learned_N[kept], out["tail"]]
        probs.append(np.full(len(kept) + len(out["tail"]), layout.tau))
    row_M, ids_M = np.concatenate(row), np.concatenate(ids)
    order = np.argsort(row_M << 32 | ids_M)
    offsets_N1 = np.concatenate([[0], np.cumsum(np.bincount(row_M, minlength=n))])
    return Rows(offsets_N1.astype(np.int64), ids_M[order].astype(np.int32), np.concatenate(probs)[order].astype(np.float32), realised_N, kind)


# --- a unit ---


def pack(blocks: Sequence[Sequence[tuple[Tokens, Rows]]], kind: RowKind, tau: float, where: str) -> tuple[Layout, list[Words]]:
    """The unit's layout and a stream for each block of (tokens, rows), proven by unpacking it again.

    Raises DataError for rows it cannot keep: of another kind, no probabilities, ids that do not rise.
    """
    known = [_columns(block, kind, tau, f"{where}, block {k}") for k, block in enumerate(blocks)]
    tokens_U = Table.count(joined([c["token"] for c in known]))
    layout = Layout(kind, tau, {"token.0": tokens_U}, _usual(tokens_U.values_U, known))
    parts: list[list[tuple[str, Ints]]] = []
    for columns, block in zip(known, blocks, strict=True):
        columns["extent"] = columns["covers"] - layout.extents(columns["token"])[columns["place"] != 2]
        parts.append([])
        _walk(Taken(columns, parts[-1]), layout, len(block))
    values: dict[str, list[Ints]] = {}
    for some in parts:
        for name, column in some:
            values.setdefault(name, []).append(column)
    layout = Layout(kind, tau, {name: Table.count(joined(columns)) for name, columns in sorted(values.items())}, layout.extents_U)
    streams = [encoded([(layout.tables[name], column) for name, column in some]) for some in parts]
    for stream, block in zip(streams, blocks, strict=True):
        _prove(block, unpack(stream, layout, len(block)))
    return layout, streams


def unpack(stream: Words, layout: Layout, count: int) -> list[tuple[Tokens, Rows]]:
    """The block of `count` answers as it was packed, the head's log-probabilities rounded to STEP."""
    source = Decoded.of(stream, layout.tables)
    out = _walk(source, layout, count)
    source.close()
    tokens, rows = _tokens(out, layout.extents(out["token"])), _rows(out, layout)
    ends, learned = np.cumsum(out["length"]), np.concatenate([[0], np.cumsum(tokens.learn_T)])
    some = []
    for begin, end in zip((ends - out["length"]).tolist(), ends.tolist(), strict=True):
        first, last = int(learned[begin]), int(learned[end])
        offsets_N1 = rows.offsets_N1[first:last + 1]
        entries = slice(int(offsets_N1[0]), int(offsets_N1[-1]))
        some.append((Tokens(tokens.ids_T[begin:end], tokens.starts_T[begin:end], tokens.ends_T[begin:end], tokens.learn_T[begin:end]),
                     Rows(offsets_N1 - offsets_N1[0], rows.ids_M[entries], rows.probs_M[entries], rows.realised_N[first:last], layout.kind)))
    return some


def _usual(values_U: Ints, known: Sequence[Mapping[str, Ints]]) -> Ints:
    """What a token covers most often: of a tie the least."""
    ids_T, covers_T = joined([c["token"] for c in known]), joined([c["place"] for c in known])
    covers_T = np.where(covers_T == 2, -1, 0)
    covers_T[covers_T == 0] = joined([c["covers"] for c in known])
    keys, counts = np.unique(ids_T << 33 | covers_T + (1 << 32), return_counts=True)
    ids, covers = keys >> 33, (keys & (1 << 33) - 1) - (1 << 32)
    rising = np.lexsort((-covers, counts))  # of each token, the last written is the most frequent
    usual_U = np.full(len(values_U), -1, np.int64)
    usual_U[np.searchsorted(values_U, ids[rising])] = covers[rising]
    return usual_U


def _prove(block: Sequence[tuple[Tokens, Rows]], back: Sequence[tuple[Tokens, Rows]]) -> None:
    """What was packed comes back, or it is a bug of ours and nothing is published."""
    def whole(some: Sequence[tuple[Tokens, Rows]], k: int, field: str) -> npt.NDArray[Any]:
        return joined([getattr(one[k], field) for one in some])

    fields = ((0, "ids_T"), (0, "starts_T"), (0, "ends_T"), (0, "learn_T"), (1, "offsets_N1"), (1, "ids_M"))
    same = [len(t) for t, _ in block] == [len(t) for t, _ in back] and all(
        np.array_equal(whole(block, k, field), whole(back, k, field)) for k, field in fields)
    if not (same and np.allclose(np.log(whole(block, 1, "probs_M")), np.log(whole(back, 1, "probs_M")), rtol=1e-6, atol=TOLERANCE)
            and np.allclose(whole(block, 1, "realised_N"), whole(back, 1, "realised_N"), rtol=1e-6, atol=TOLERANCE, equal_nan=True)):
        raise AssertionError("a unit that does not unpack to what was packed")
