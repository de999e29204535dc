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

from persea.cache.entropy_coding import (
    ArrayColumns,
    ColumnSource,
    EncodedStream,
    FrequencyTable,
    FrequencyTables,
    IntArray,
    StreamColumns,
    concat_or_empty,
    encode_columns,
)
from persea.distributions import LOGPROB_STEP_NATS, DistributionKind, SparseDistributions
from persea.errors import DataError
from persea.tokenization.tokens import RenderedTokens

CODEC_TOLERANCE_NATS = LOGPROB_STEP_NATS / 2 + 1e-6  # no log-probability moves by more than 0.00098
FIXED_POINT_ONE = 1 << 30  # probability 1 in integers
LOGPROB_MISSING, LOGPROB_NEG_INF = (
    -1,
    -2,
)  # a realised log-probability the teacher did not give; one of minus infinity
NUM_CODING_CONTEXTS = 16
REMAINING_MASS_EDGES = (
    FIXED_POINT_ONE
    * np.array(
        [0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.999]
    )
).astype(np.int64)  # mass beside the realised token


@lru_cache(maxsize=8)
def _exp_table(num_bins: int) -> npt.NDArray[np.float64]:
    """exp(-STEP * bin) of the first `bins` bins, by products alone: numpy's exp differs by a bit from machine to machine."""
    factor = np.full(num_bins, float((-Decimal(LOGPROB_STEP_NATS)).exp()))
    factor[0] = 1.0
    return np.multiply.accumulate(factor)


def _quantize_logprobs(logprobs: npt.NDArray[np.floating]) -> IntArray:
    return np.rint(logprobs.astype(np.float64) / -LOGPROB_STEP_NATS).astype(np.int64)


@dataclass(frozen=True, eq=False)
class UnitLayout:
    """What a stream is read with, the same for a whole unit.

    kind    of all rows; tau of those of kind SAMPLED
    tables  column -> its table; a column coded under several contexts has one each, "tail.0", "tail.1"
    extents_U  bytes of content a token usually covers, for each value of "token.0"; -1 = none, it is a marker
    """

    kind: DistributionKind
    tau: float
    tables: FrequencyTables
    byte_lengths_U: IntArray

    @cached_property
    def _byte_lengths_W(self) -> IntArray:
        ids_U = (
            self.tables["token.0"].values_U if len(self.byte_lengths_U) else np.empty(0, np.int64)
        )
        extents_W = np.full(int(ids_U.max(initial=-1)) + 1, -1, np.int64)
        extents_W[ids_U] = self.byte_lengths_U
        return extents_W

    def byte_lengths(self, ids_T: IntArray) -> IntArray:
        extents: IntArray = self._byte_lengths_W[ids_T]
        return extents


# --- what is coded, in which order; packing and unpacking both walk it ---


def _code_block(
    column_source: ColumnSource, layout: UnitLayout, num_answers: int
) -> dict[str, IntArray]:
    """Every column of a block of `count` answers, laid end to end; a context is computed from columns that came before."""
    out: dict[str, IntArray] = {}

    def take(name: str, contexts: IntArray) -> IntArray:
        out[name] = column_source(name, contexts)
        return out[name]

    def plain(name: str, count: int) -> IntArray:
        return take(name, np.zeros(count, np.int64))

    length = int(plain("length", num_answers).sum())
    ids_T = plain("token", length)
    usual_T = layout.byte_lengths(ids_T)
    place_T = take("place", (usual_T < 0).astype(np.int64))
    take("extent", usual_T[place_T != 2] * 0)
    plain("start", int((place_T == 3).sum()))
    learn_T = np.cumsum(plain("learn", length)) % 2
    n = int(learn_T.sum())
    head_N = plain("first", n)  # bin of the realised token, +1; 0 where it is no entry of the head
    surprise = plain("realised", int((head_N == 0).sum()))
    if layout.kind is DistributionKind.TEXT_ONLY:
        return out
    kept = take(
        "kept",
        np.clip(surprise * LOGPROB_STEP_NATS, -1, NUM_CODING_CONTEXTS - 2).astype(np.int64) + 1,
    )  # is the realised token an entry of the tail
    whole_H, left_H = _target_probability_tables(int(head_N.max(initial=0)))
    first_N, left_N = whole_H[head_N], left_H[head_N]
    others_N = take("others", left_N)
    row_O = np.repeat(np.arange(n), others_N)
    values_O = take("value", left_N[row_O])
    plain("head", len(row_O))
    if layout.kind is not DistributionKind.SAMPLED:
        return out
    rest_N = (
        FIXED_POINT_ONE
        - first_N
        - np.bincount(row_O, weights=_bin_probabilities(values_O), minlength=n).astype(np.int64)
    )
    base_N, part_N = _expected_tail_count(rest_N, layout.tau)
    more_N = take("more", part_N)
    tails_N = base_N + more_N
    tails_N[head_N == 0] -= kept
    out["tails"] = tails_N
    plain("tail", int(tails_N.sum()))
    return out


def _bin_probabilities(bins: IntArray) -> IntArray:
    """Probabilities of bins, in ONEs."""
    if not len(bins):
        return bins
    size = 1 << max(12, int(bins.max()).bit_length())
    whole: IntArray = (_exp_table(size)[bins] * FIXED_POINT_ONE).astype(np.int64)
    return whole


@lru_cache(maxsize=64)
def _target_probability_tables(num_bins: int) -> tuple[IntArray, IntArray]:
    """Of a realised token's column "first": its probability in ONEs, and a context, the mass it leaves to others."""
    whole_H = np.concatenate([[0], _bin_probabilities(np.arange(num_bins))])
    return whole_H, np.searchsorted(REMAINING_MASS_EDGES, FIXED_POINT_ONE - whole_H)


def _expected_tail_count(remaining_mass_N: IntArray, tau: float) -> tuple[IntArray, IntArray]:
    """How many tail entries the mass that the head left makes, rounded down, and a context: the part that was rounded away."""
    each = int(tau * FIXED_POINT_ONE)
    remaining_mass_N = np.maximum(remaining_mass_N, 0)
    return remaining_mass_N // each, remaining_mass_N % each * NUM_CODING_CONTEXTS // each


# --- one capture <-> columns ---


def _block_columns(
    block: Sequence[tuple[RenderedTokens, SparseDistributions]],
    kind: DistributionKind,
    tau: float,
    where: str,
) -> dict[str, IntArray]:
    """What `_walk` asks for, but for extents, which need the whole unit."""
    ids_T, starts_T, ends_T, learn_T = (
        concat_or_empty([getattr(t, field) for t, _ in block])
        for field in ("ids_T", "starts_T", "ends_T", "loss_mask_T")
    )
    tokens = RenderedTokens(ids_T, starts_T, ends_T, learn_T.astype(np.bool_))
    ids_M, probs_M, realised_N = (
        concat_or_empty([getattr(r, field) for _, r in block])
        for field in ("ids_M", "probs_M", "target_logprob_N")
    )
    sizes_N = concat_or_empty([np.diff(r.offsets_N1) for _, r in block])
    rows = SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes_N)]), ids_M, probs_M, realised_N, kind
    )
    if any(r.kind is not kind for _, r in block):
        raise DataError(
            f"rows that are not {kind}", where=where, remedy="a unit holds rows of one kind"
        )
    if any(len(r) != int(t.loss_mask_T.sum()) for t, r in block):
        raise DataError(
            "not a row for each learned token",
            where=where,
            remedy="a row belongs to each learned token",
        )
    learned_N = tokens.ids_T[tokens.loss_mask_T].astype(np.int64)
    known = {
        "length": np.array([len(t) for t, _ in block], np.int64),
        "token": tokens.ids_T.astype(np.int64),
    }
    known |= _start_columns(tokens) | {
        "learn": np.abs(np.diff(tokens.loss_mask_T.astype(np.int64), prepend=0))
    }
    row_M = np.repeat(np.arange(len(rows)), np.diff(rows.offsets_N1))
    ids_M = ids_M.astype(np.int64)
    if not (np.isfinite(probs_M) & (probs_M > 0) & (probs_M <= 1 + LOGPROB_STEP_NATS)).all():
        raise DataError(
            "an entry that is no probability", where=where, remedy="entries are in (0, 1]"
        )
    order = np.argsort(row_M << 32 | ids_M, kind="stable")
    if (order != np.arange(len(order))).any() or (np.diff(row_M << 32 | ids_M) == 0).any():
        raise DataError(
            "entries of a row that do not rise",
            where=where,
            remedy="sort each row by token id; a token stands in it once",
        )
    tail_M = (
        (probs_M == np.float32(tau))
        if rows.kind is DistributionKind.SAMPLED
        else np.zeros(len(ids_M), np.bool_)
    )
    real_M = ids_M == learned_N[row_M]
    bins_M = np.maximum(
        _quantize_logprobs(np.log(np.maximum(probs_M, np.float32(1e-45)).astype(np.float64))), 0
    )
    first_N = np.zeros(len(rows), np.int64)
    mine = real_M & ~tail_M
    first_N[row_M[mine]] = bins_M[mine] + 1
    logs_N = rows.target_logprob_N
    if not (np.abs(logs_N[row_M[mine]] - np.log(probs_M[mine])) <= LOGPROB_STEP_NATS).all():
        raise DataError(
            "a realised log-probability that is not its own entry's",
            where=where,
            remedy="both come from one distribution",
        )
    kept_N = np.zeros(len(rows), np.int64)
    kept_N[row_M[real_M & tail_M]] = 1
    others, tails = ~real_M & ~tail_M, ~real_M & tail_M
    rest_N = FIXED_POINT_ONE - np.bincount(
        row_M[~tail_M], weights=_bin_probabilities(bins_M[~tail_M]), minlength=len(rows)
    ).astype(np.int64)
    base_N = (
        _expected_tail_count(rest_N, tau)[0]
        if kind is DistributionKind.SAMPLED
        else np.zeros(len(rows), np.int64)
    )
    surprise_N = np.where(
        np.isnan(logs_N),
        LOGPROB_MISSING,
        np.where(
            np.isneginf(logs_N),
            LOGPROB_NEG_INF,
            np.maximum(_quantize_logprobs(np.nan_to_num(logs_N, neginf=0)), 0),
        ),
    )
    known |= {
        "first": first_N,
        "realised": surprise_N[first_N == 0],
        "kept": kept_N[first_N == 0],
        "others": np.bincount(row_M[others], minlength=len(rows)),
        "value": bins_M[others],
        "head": ids_M[others],
        "more": np.bincount(row_M[tail_M], minlength=len(rows)) - base_N,
        "tail": ids_M[tails],
    }
    return known


def _start_columns(tokens: RenderedTokens) -> dict[str, IntArray]:
    """Where tokens begin: 0 where the one before ended, 1 one byte later (a new part), 2 nowhere (a marker), 3 elsewhere."""
    starts_T, ends_T = tokens.starts_T.astype(np.int64), tokens.ends_T.astype(np.int64)
    marker_T = (starts_T == -1) & (ends_T == -1)
    content = ~marker_T
    before = np.concatenate([[0], ends_T[content][:-1]]) if content.any() else np.empty(0, np.int64)
    gap = starts_T[content] - before
    place_T = np.full(len(starts_T), 2, np.int64)
    place_T[content] = np.where((gap == 0) | (gap == 1), gap, 3)
    return {
        "place": place_T,
        "start": starts_T[place_T == 3],
        "covers": (ends_T - starts_T)[content],
    }


def _columns_to_tokens(
    columns: Mapping[str, IntArray], usual_byte_lengths_T: IntArray
) -> RenderedTokens:
    ids_T, place_T = columns["token"], columns["place"]
    learn_T = (np.cumsum(columns["learn"]) % 2).astype(np.bool_)
    starts_T, ends_T = np.full(len(ids_T), -1, np.int64), np.full(len(ids_T), -1, np.int64)
    content = place_T != 2
    covers, gap = columns["extent"] + usual_byte_lengths_T[content], place_T[content]
    reached = np.cumsum(covers + (gap == 1))
    elsewhere = gap == 3  # what follows counts from there
    shifts = np.concatenate([[0], columns["start"] - (reached - covers)[elsewhere]])
    ends_T[content] = reached + shifts[np.cumsum(elsewhere)]
    starts_T[content] = ends_T[content] - covers
    return RenderedTokens(
        ids_T.astype(np.int32), starts_T.astype(np.int32), ends_T.astype(np.int32), learn_T
    )


def _columns_to_distributions(
    columns: Mapping[str, IntArray], layout: UnitLayout
) -> SparseDistributions:
    learned_N, kind = columns["token"][np.cumsum(columns["learn"]) % 2 == 1], layout.kind
    first_N, n = columns["first"], len(learned_N)
    surprise_N = first_N - 1
    surprise_N[first_N == 0] = columns["realised"]
    realised_N = (surprise_N * -LOGPROB_STEP_NATS).astype(np.float32)
    realised_N[surprise_N == LOGPROB_MISSING] = np.nan
    realised_N[surprise_N == LOGPROB_NEG_INF] = -np.inf
    if kind is DistributionKind.TEXT_ONLY:
        return SparseDistributions(
            np.zeros(n + 1, np.int64),
            np.empty(0, np.int32),
            np.empty(0, np.float32),
            realised_N,
            kind,
        )
    every = np.arange(n)
    at_head, absent = every[first_N > 0], every[first_N == 0]
    row = [at_head, np.repeat(every, columns["others"])]
    ids = [learned_N[at_head], columns["head"]]
    bins = np.concatenate([first_N[at_head] - 1, columns["value"]])
    probs = [_exp_table(1 << max(12, int(bins.max(initial=0)).bit_length()))[bins]]
    if kind is DistributionKind.SAMPLED:
        kept = absent[columns["kept"] > 0]
        row += [kept, np.repeat(every, columns["tails"])]
        ids += [learned_N[kept], columns["tail"]]
        probs.append(np.full(len(kept) + len(columns["tail"]), layout.tau))
    row_M, ids_M = np.concatenate(row), np.concatenate(ids)
    order = np.argsort(row_M << 32 | ids_M)
    offsets_N1 = np.concatenate([[0], np.cumsum(np.bincount(row_M, minlength=n))])
    return SparseDistributions(
        offsets_N1.astype(np.int64),
        ids_M[order].astype(np.int32),
        np.concatenate(probs)[order].astype(np.float32),
        realised_N,
        kind,
    )


# --- a unit ---


def encode_unit(
    blocks: Sequence[Sequence[tuple[RenderedTokens, SparseDistributions]]],
    kind: DistributionKind,
    tau: float,
    where: str,
) -> tuple[UnitLayout, list[EncodedStream]]:
    """The unit's layout and a stream for each block of (tokens, rows), proven by unpacking it again.

    Raises DataError for rows it cannot keep: of another kind, no probabilities, ids that do not rise.
    """
    known = [
        _block_columns(block, kind, tau, f"{where}, block {k}") for k, block in enumerate(blocks)
    ]
    tokens_U = FrequencyTable.from_values(concat_or_empty([c["token"] for c in known]))
    layout = UnitLayout(
        kind, tau, {"token.0": tokens_U}, _usual_byte_lengths(tokens_U.values_U, known)
    )
    parts: list[list[tuple[str, IntArray]]] = []
    for columns, block in zip(known, blocks, strict=True):
        columns["extent"] = (
            columns["covers"] - layout.byte_lengths(columns["token"])[columns["place"] != 2]
        )
        parts.append([])
        _code_block(ArrayColumns(columns, parts[-1]), layout, len(block))
    values: dict[str, list[IntArray]] = {}
    for some in parts:
        for name, column in some:
            values.setdefault(name, []).append(column)
    layout = UnitLayout(
        kind,
        tau,
        {
            name: FrequencyTable.from_values(concat_or_empty(columns))
            for name, columns in sorted(values.items())
        },
        layout.byte_lengths_U,
    )
    streams = [
        encode_columns([(layout.tables[name], column) for name, column in some]) for some in parts
    ]
    for stream, block in zip(streams, blocks, strict=True):
        _check_round_trip(block, decode_block(stream, layout, len(block)))
    return layout, streams


def decode_block(
    stream: EncodedStream, layout: UnitLayout, num_answers: int
) -> list[tuple[RenderedTokens, SparseDistributions]]:
    """The block of `count` answers as it was packed, the head's log-probabilities rounded to STEP."""
    source = StreamColumns.from_stream(stream, layout.tables)
    out = _code_block(source, layout, num_answers)
    source.check_fully_read()
    tokens, rows = (
        _columns_to_tokens(out, layout.byte_lengths(out["token"])),
        _columns_to_distributions(out, layout),
    )
    ends, learned = np.cumsum(out["length"]), np.concatenate([[0], np.cumsum(tokens.loss_mask_T)])
    some = []
    for begin, end in zip((ends - out["length"]).tolist(), ends.tolist(), strict=True):
        first, last = int(learned[begin]), int(learned[end])
        offsets_N1 = rows.offsets_N1[first : last + 1]
        entries = slice(int(offsets_N1[0]), int(offsets_N1[-1]))
        some.append(
            (
                RenderedTokens(
                    tokens.ids_T[begin:end],
                    tokens.starts_T[begin:end],
                    tokens.ends_T[begin:end],
                    tokens.loss_mask_T[begin:end],
                ),
                SparseDistributions(
                    offsets_N1 - offsets_N1[0],
                    rows.ids_M[entries],
                    rows.probs_M[entries],
                    rows.target_logprob_N[first:last],
                    layout.kind,
                ),
            )
        )
    return some


def _usual_byte_lengths(
    token_ids_U: IntArray, block_columns: Sequence[Mapping[str, IntArray]]
) -> IntArray:
    """What a token covers most often: of a tie the least."""
    ids_T, covers_T = (
        concat_or_empty([c["token"] for c in block_columns]),
        concat_or_empty([c["place"] for c in block_columns]),
    )
    covers_T = np.where(covers_T == 2, -1, 0)
    covers_T[covers_T == 0] = concat_or_empty([c["covers"] for c in block_columns])
    keys, counts = np.unique(ids_T << 33 | covers_T + (1 << 32), return_counts=True)
    ids, covers = keys >> 33, (keys & (1 << 33) - 1) - (1 << 32)
    rising = np.lexsort((-covers, counts))  # of each token, the last written is the most frequent
    usual_U = np.full(len(token_ids_U), -1, np.int64)
    usual_U[np.searchsorted(token_ids_U, ids[rising])] = covers[rising]
    return usual_U


def _check_round_trip(
    block: Sequence[tuple[RenderedTokens, SparseDistributions]],
    decoded: Sequence[tuple[RenderedTokens, SparseDistributions]],
) -> None:
    """What was packed comes back, or it is a bug of ours and nothing is published."""

    def whole(
        some: Sequence[tuple[RenderedTokens, SparseDistributions]], k: int, field: str
    ) -> npt.NDArray[Any]:
        return concat_or_empty([getattr(one[k], field) for one in some])

    fields = (
        (0, "ids_T"),
        (0, "starts_T"),
        (0, "ends_T"),
        (0, "loss_mask_T"),
        (1, "offsets_N1"),
        (1, "ids_M"),
    )
    same = [len(t) for t, _ in block] == [len(t) for t, _ in decoded] and all(
        np.array_equal(whole(block, k, field), whole(decoded, k, field)) for k, field in fields
    )
    if not (
        same
        and np.allclose(
            np.log(whole(block, 1, "probs_M")),
            np.log(whole(decoded, 1, "probs_M")),
            rtol=1e-6,
            atol=CODEC_TOLERANCE_NATS,
        )
        and np.allclose(
            whole(block, 1, "target_logprob_N"),
            whole(decoded, 1, "target_logprob_N"),
            rtol=1e-6,
            atol=CODEC_TOLERANCE_NATS,
            equal_nan=True,
        )
    ):
        raise AssertionError("a unit that does not unpack to what was packed")
