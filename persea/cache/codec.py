"""Encode tokens and sparse distributions of a unit as entropy-coded streams, and decode them.

Token ids are most of a cache's bytes (84 % in the best format measured). The columns avoid them:
- the target token, usually the largest entry of its distribution, costs no id;
- tail entries cost no value, which is tau;
- the number of tail entries follows from the mass of the head to within one;
- other ids are coded by how often each occurs in the unit.
Log-probabilities of the head are rounded to multiples of LOGPROB_STEP_NATS, which changes none by
more than 1e-3 nats. Everything that steers decoding is computed in integers or by float64 products,
so a unit decodes to the same bits on every machine. Coder: ANS (Bamler 2022, after Duda 2014).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.cache.entropy_coding import (
    ArrayColumns,
    ColumnSource,
    EncodedStream,
    FrequencyTable,
    FrequencyTables,
    StreamColumns,
    concat_or_empty,
    encode_columns,
)
from persea.cache.quantization import (
    CODEC_RELATIVE_TOLERANCE,
    CODEC_TOLERANCE_NATS,
    FIXED_POINT_ONE,
    LOGPROB_MISSING,
    LOGPROB_NEG_INF,
    NUM_CODING_CONTEXTS,
    SMALLEST_PROBABILITY,
    bin_probabilities,
    exp_table,
    expected_tail_count,
    quantize_logprobs,
    target_probability_tables,
)
from persea.distributions import LOGPROB_STEP_NATS, DistributionKind, SparseDistributions
from persea.errors import DataError
from persea.tokenization.tokens import IntArray, RenderedTokens


@dataclass(frozen=True, eq=False)
class UnitLayout:
    """Everything that decodes the blocks of a unit.

    Attributes:
        kind: Kind of all distributions in the unit.
        tau: Probability of a tail entry, for kind SAMPLED.
        tables: Table name -> frequency table. A column with several contexts has a table for each:
            "tail.0", "tail.1".
        byte_lengths_U: The most frequent length in bytes of each token of the table "token.0";
            -1 = a marker without bytes.
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
        """Return the most frequent length in bytes of each token; -1 = a marker."""
        extents: IntArray = self._byte_lengths_W[ids_T]
        return extents


# --- the columns and their order: the encoder and the decoder both run this code ---


def _code_block(
    column_source: ColumnSource, layout: UnitLayout, num_answers: int
) -> dict[str, IntArray]:
    """Return every column of a block, concatenated over its answers.

    The context of a value is computed from columns that were coded before it.
    """
    out: dict[str, IntArray] = {}

    def take(name: str, contexts: IntArray) -> IntArray:
        out[name] = column_source(name, contexts)
        return out[name]

    def plain(name: str, count: int) -> IntArray:
        return take(name, np.zeros(count, np.int64))

    length = int(plain("length", num_answers).sum())
    ids_T = plain("token", length)
    usual_bytes_T = layout.byte_lengths(ids_T)
    place_T = take("place", (usual_bytes_T < 0).astype(np.int64))
    take("extent", usual_bytes_T[place_T != 2] * 0)
    plain("start", int((place_T == 3).sum()))
    loss_mask_T = np.cumsum(plain("learn", length)) % 2
    n = int(loss_mask_T.sum())
    head_N = plain("first", n)  # bin of the target token + 1; 0 if it is no entry of the head
    logprob_bins = plain("realised", int((head_N == 0).sum()))
    if layout.kind is DistributionKind.TEXT_ONLY:
        return out
    target_in_tail = take(
        "kept",
        np.clip(logprob_bins * LOGPROB_STEP_NATS, -1, NUM_CODING_CONTEXTS - 2).astype(np.int64) + 1,
    )
    prob_H, context_H = target_probability_tables(int(head_N.max(initial=0)))
    first_N, context_N = prob_H[head_N], context_H[head_N]
    others_N = take("others", context_N)
    row_O = np.repeat(np.arange(n), others_N)
    values_O = take("value", context_N[row_O])
    plain("head", len(row_O))
    if layout.kind is not DistributionKind.SAMPLED:
        return out
    rest_N = (
        FIXED_POINT_ONE
        - first_N
        - np.bincount(row_O, weights=bin_probabilities(values_O), minlength=n).astype(np.int64)
    )
    base_N, part_N = expected_tail_count(rest_N, layout.tau)
    more_N = take("more", part_N)
    tails_N = base_N + more_N
    tails_N[head_N == 0] -= target_in_tail
    out["tails"] = tails_N
    plain("tail", int(tails_N.sum()))
    return out


# --- a block <-> columns ---


def _block_columns(
    block: Sequence[tuple[RenderedTokens, SparseDistributions]],
    kind: DistributionKind,
    tau: float,
    where: str,
) -> dict[str, IntArray]:
    """Return the columns of a block, except "extent", which needs the whole unit.

    Raises:
        DataError: The distributions cannot be stored.
    """
    ids_T, starts_T, ends_T, loss_mask_T = (
        concat_or_empty([getattr(t, field) for t, _ in block])
        for field in ("ids_T", "starts_T", "ends_T", "loss_mask_T")
    )
    tokens = RenderedTokens(ids_T, starts_T, ends_T, loss_mask_T.astype(np.bool_))
    ids_M, probs_M, target_logprob_N = (
        concat_or_empty([getattr(r, field) for _, r in block])
        for field in ("ids_M", "probs_M", "target_logprob_N")
    )
    sizes_N = concat_or_empty([np.diff(r.offsets_N1) for _, r in block])
    rows = SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes_N)]), ids_M, probs_M, target_logprob_N, kind
    )
    if any(r.kind is not kind for _, r in block):
        raise DataError(
            f"distributions that are not {kind}",
            where=where,
            remedy="write distributions of one kind into a unit",
        )
    if any(len(r) != int(t.loss_mask_T.sum()) for t, r in block):
        raise DataError(
            "the number of distributions is not the number of learned tokens",
            where=where,
            remedy="give one distribution for each learned token",
        )
    target_N = tokens.ids_T[tokens.loss_mask_T].astype(np.int64)
    columns = {
        "length": np.array([len(t) for t, _ in block], np.int64),
        "token": tokens.ids_T.astype(np.int64),
    }
    columns |= _start_columns(tokens) | {
        "learn": np.abs(np.diff(tokens.loss_mask_T.astype(np.int64), prepend=0))
    }
    row_M = np.repeat(np.arange(len(rows)), np.diff(rows.offsets_N1))
    ids_M = ids_M.astype(np.int64)
    if not (np.isfinite(probs_M) & (probs_M > 0) & (probs_M <= 1 + LOGPROB_STEP_NATS)).all():
        raise DataError("an entry is no probability", where=where, remedy="entries are in (0, 1]")
    order = np.argsort(row_M << 32 | ids_M, kind="stable")
    if (order != np.arange(len(order))).any() or (np.diff(row_M << 32 | ids_M) == 0).any():
        raise DataError(
            "the token ids of a distribution do not rise",
            where=where,
            remedy="sort each distribution by token id; each token occurs once",
        )
    tail_M = (
        (probs_M == np.float32(tau))
        if rows.kind is DistributionKind.SAMPLED
        else np.zeros(len(ids_M), np.bool_)
    )
    is_target_M = ids_M == target_N[row_M]
    bins_M = np.maximum(
        quantize_logprobs(np.log(np.maximum(probs_M, SMALLEST_PROBABILITY).astype(np.float64))), 0
    )
    first_N = np.zeros(len(rows), np.int64)
    target_in_head = is_target_M & ~tail_M
    first_N[row_M[target_in_head]] = bins_M[target_in_head] + 1
    logprob_N = rows.target_logprob_N
    if not (
        np.abs(logprob_N[row_M[target_in_head]] - np.log(probs_M[target_in_head]))
        <= LOGPROB_STEP_NATS
    ).all():
        raise DataError(
            "the log-probability of a target token differs from its entry",
            where=where,
            remedy="take both from one distribution",
        )
    target_in_tail_N = np.zeros(len(rows), np.int64)
    target_in_tail_N[row_M[is_target_M & tail_M]] = 1
    others, tails = ~is_target_M & ~tail_M, ~is_target_M & tail_M
    rest_N = FIXED_POINT_ONE - np.bincount(
        row_M[~tail_M], weights=bin_probabilities(bins_M[~tail_M]), minlength=len(rows)
    ).astype(np.int64)
    base_N = (
        expected_tail_count(rest_N, tau)[0]
        if kind is DistributionKind.SAMPLED
        else np.zeros(len(rows), np.int64)
    )
    logprob_bin_N = np.where(
        np.isnan(logprob_N),
        LOGPROB_MISSING,
        np.where(
            np.isneginf(logprob_N),
            LOGPROB_NEG_INF,
            np.maximum(quantize_logprobs(np.nan_to_num(logprob_N, neginf=0)), 0),
        ),
    )
    columns |= {
        "first": first_N,
        "realised": logprob_bin_N[first_N == 0],
        "kept": target_in_tail_N[first_N == 0],
        "others": np.bincount(row_M[others], minlength=len(rows)),
        "value": bins_M[others],
        "head": ids_M[others],
        "more": np.bincount(row_M[tail_M], minlength=len(rows)) - base_N,
        "tail": ids_M[tails],
    }
    return columns


def _start_columns(tokens: RenderedTokens) -> dict[str, IntArray]:
    """Return the columns of token positions.

    "place" is 0 if a token begins where the one before it ended, 1 if it begins one byte later (a
    new part), 2 for a marker without bytes, and 3 otherwise: then "start" holds the position.
    """
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
    """Return the tokens of a decoded block."""
    ids_T, place_T = columns["token"], columns["place"]
    loss_mask_T = (np.cumsum(columns["learn"]) % 2).astype(np.bool_)
    starts_T, ends_T = np.full(len(ids_T), -1, np.int64), np.full(len(ids_T), -1, np.int64)
    content = place_T != 2
    covers, gap = columns["extent"] + usual_byte_lengths_T[content], place_T[content]
    reached = np.cumsum(covers + (gap == 1))
    elsewhere = gap == 3  # later positions are relative to these
    shifts = np.concatenate([[0], columns["start"] - (reached - covers)[elsewhere]])
    ends_T[content] = reached + shifts[np.cumsum(elsewhere)]
    starts_T[content] = ends_T[content] - covers
    return RenderedTokens(
        ids_T.astype(np.int32), starts_T.astype(np.int32), ends_T.astype(np.int32), loss_mask_T
    )


def _columns_to_distributions(
    columns: Mapping[str, IntArray], layout: UnitLayout
) -> SparseDistributions:
    """Return the sparse distributions of a decoded block."""
    target_N, kind = columns["token"][np.cumsum(columns["learn"]) % 2 == 1], layout.kind
    first_N, n = columns["first"], len(target_N)
    logprob_bin_N = first_N - 1
    logprob_bin_N[first_N == 0] = columns["realised"]
    target_logprob_N = (logprob_bin_N * -LOGPROB_STEP_NATS).astype(np.float32)
    target_logprob_N[logprob_bin_N == LOGPROB_MISSING] = np.nan
    target_logprob_N[logprob_bin_N == LOGPROB_NEG_INF] = -np.inf
    if kind is DistributionKind.TEXT_ONLY:
        return SparseDistributions(
            np.zeros(n + 1, np.int64),
            np.empty(0, np.int32),
            np.empty(0, np.float32),
            target_logprob_N,
            kind,
        )
    every = np.arange(n)
    at_head, absent = every[first_N > 0], every[first_N == 0]
    row = [at_head, np.repeat(every, columns["others"])]
    ids = [target_N[at_head], columns["head"]]
    bins = np.concatenate([first_N[at_head] - 1, columns["value"]])
    probs = [exp_table(1 << max(12, int(bins.max(initial=0)).bit_length()))[bins]]
    if kind is DistributionKind.SAMPLED:
        kept = absent[columns["kept"] > 0]
        row += [kept, np.repeat(every, columns["tails"])]
        ids += [target_N[kept], columns["tail"]]
        probs.append(np.full(len(kept) + len(columns["tail"]), layout.tau))
    row_M, ids_M = np.concatenate(row), np.concatenate(ids)
    order = np.argsort(row_M << 32 | ids_M)
    offsets_N1 = np.concatenate([[0], np.cumsum(np.bincount(row_M, minlength=n))])
    return SparseDistributions(
        offsets_N1.astype(np.int64),
        ids_M[order].astype(np.int32),
        np.concatenate(probs)[order].astype(np.float32),
        target_logprob_N,
        kind,
    )


# --- a unit ---


def encode_unit(
    blocks: Sequence[Sequence[tuple[RenderedTokens, SparseDistributions]]],
    kind: DistributionKind,
    tau: float,
    where: str,
) -> tuple[UnitLayout, list[EncodedStream]]:
    """Encode a unit. Every block is decoded again and compared before this returns.

    Args:
        blocks: Blocks of (tokens, distributions of the learned tokens).
        kind: Kind of all distributions.
        tau: Probability of a tail entry, for kind SAMPLED.
        where: Name of the unit, for messages.

    Returns:
        The layout of the unit, and one stream for each block.

    Raises:
        DataError: The distributions are of another kind, hold values that are no probabilities, or
            ids that do not rise.
    """
    block_columns = [
        _block_columns(block, kind, tau, f"{where}, block {k}") for k, block in enumerate(blocks)
    ]
    tokens_U = FrequencyTable.from_values(concat_or_empty([c["token"] for c in block_columns]))
    layout = UnitLayout(
        kind, tau, {"token.0": tokens_U}, _usual_byte_lengths(tokens_U.values_U, block_columns)
    )
    parts: list[list[tuple[str, IntArray]]] = []
    for columns, block in zip(block_columns, blocks, strict=True):
        columns["extent"] = (
            columns["covers"] - layout.byte_lengths(columns["token"])[columns["place"] != 2]
        )
        parts.append([])
        _code_block(ArrayColumns(columns, parts[-1]), layout, len(block))
    values: dict[str, list[IntArray]] = {}
    for coded in parts:
        for name, column in coded:
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
        encode_columns([(layout.tables[name], column) for name, column in coded]) for coded in parts
    ]
    for stream, block in zip(streams, blocks, strict=True):
        _check_round_trip(block, decode_block(stream, layout, len(block)))
    return layout, streams


def decode_block(
    stream: EncodedStream, layout: UnitLayout, num_answers: int
) -> list[tuple[RenderedTokens, SparseDistributions]]:
    """Decode a block. Log-probabilities of the head are rounded to LOGPROB_STEP_NATS.

    Args:
        stream: The block's stream.
        layout: The layout of the unit.
        num_answers: Answers in the block.
    """
    source = StreamColumns.from_stream(stream, layout.tables)
    columns = _code_block(source, layout, num_answers)
    source.check_fully_read()
    tokens, rows = (
        _columns_to_tokens(columns, layout.byte_lengths(columns["token"])),
        _columns_to_distributions(columns, layout),
    )
    ends, learned = (
        np.cumsum(columns["length"]),
        np.concatenate([[0], np.cumsum(tokens.loss_mask_T)]),
    )
    decoded = []
    for begin, end in zip((ends - columns["length"]).tolist(), ends.tolist(), strict=True):
        first, last = int(learned[begin]), int(learned[end])
        offsets_N1 = rows.offsets_N1[first : last + 1]
        entries = slice(int(offsets_N1[0]), int(offsets_N1[-1]))
        decoded.append(
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
    return decoded


def _usual_byte_lengths(
    token_ids_U: IntArray, block_columns: Sequence[Mapping[str, IntArray]]
) -> IntArray:
    """Return the most frequent length in bytes of each token; the shortest of equal counts."""
    ids_T, covers_T = (
        concat_or_empty([c["token"] for c in block_columns]),
        concat_or_empty([c["place"] for c in block_columns]),
    )
    covers_T = np.where(covers_T == 2, -1, 0)
    covers_T[covers_T == 0] = concat_or_empty([c["covers"] for c in block_columns])
    keys, counts = np.unique(ids_T << 33 | covers_T + (1 << 32), return_counts=True)
    ids, covers = keys >> 33, (keys & (1 << 33) - 1) - (1 << 32)
    # the last write of a token is its most frequent length, and of equal counts the shortest
    rising = np.lexsort((-covers, counts))
    usual_U = np.full(len(token_ids_U), -1, np.int64)
    usual_U[np.searchsorted(token_ids_U, ids[rising])] = covers[rising]
    return usual_U


def _check_round_trip(
    block: Sequence[tuple[RenderedTokens, SparseDistributions]],
    decoded: Sequence[tuple[RenderedTokens, SparseDistributions]],
) -> None:
    """Raise AssertionError if a decoded block differs from the original: a bug in persea."""

    def concat(
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
    is_equal = [len(t) for t, _ in block] == [len(t) for t, _ in decoded] and all(
        np.array_equal(concat(block, k, field), concat(decoded, k, field)) for k, field in fields
    )
    if not (
        is_equal
        and np.allclose(
            np.log(concat(block, 1, "probs_M")),
            np.log(concat(decoded, 1, "probs_M")),
            rtol=CODEC_RELATIVE_TOLERANCE,
            atol=CODEC_TOLERANCE_NATS,
        )
        and np.allclose(
            concat(block, 1, "target_logprob_N"),
            concat(decoded, 1, "target_logprob_N"),
            rtol=CODEC_RELATIVE_TOLERANCE,
            atol=CODEC_TOLERANCE_NATS,
            equal_nan=True,
        )
    ):
        raise AssertionError("the decoded unit differs from the encoded one")
