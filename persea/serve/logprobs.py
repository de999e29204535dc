"""Log-probabilities as servers spell them: vLLM's prompt_logprobs and candidate arrays, OpenAI's echoed completions."""

from __future__ import annotations

import base64
import io
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from persea.chat.renderer import Voice
from persea.errors import DataError


def spelled(voice: Voice, token: int, as_id: bool) -> str:
    """A token as text: `token_id:N`, its control name, its characters, or, of half a character, OpenAI's `bytes:\\xe4`."""
    if as_id:
        return f"token_id:{token}"
    raw = voice.vocabulary.bytes_W[token]
    if raw is None:
        return voice.vocabulary.control_names.get(token, f"<hole {token}>")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def likeliest(row_W: torch.Tensor, top: int) -> list[tuple[int, float]]:
    """The `top` likeliest tokens, likeliest first."""
    values, ids = row_W.topk(min(top, len(row_W)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def prompt_logprobs(voice: Voice, ids: Sequence[int], rows: torch.Tensor, top: int) -> list[dict[str, Any] | None]:
    """vLLM's shape: nothing for the first token, then id -> log-probability, rank and text, of the likeliest and of the token itself."""
    told: list[dict[str, Any] | None] = [None]
    for token, row_W in zip(ids[1:], rows, strict=True):
        entries = dict(likeliest(row_W, top)) if top else {}
        entries.setdefault(token, float(row_W[token]))
        told.append({str(i): {"logprob": x, "rank": 1 + int((row_W > x).sum()), "decoded_token": spelled(voice, i, False)}
                     for i, x in entries.items()})
    return told


def candidates(rows: torch.Tensor, wanted: Sequence[Sequence[int]], start: int) -> str:
    """base64 .npy, float32 [rows asked, ids asked]: row r for the place of token start + r + 1; -1 asks for nothing and gets -inf.

    Raises DataError for rows of different lengths, past the prompt's end, or with ids out of range."""
    lengths = {len(row) for row in wanted}
    if len(lengths) != 1 or 0 in lengths or start + len(wanted) > len(rows):
        raise DataError(f"{len(wanted)} rows of candidates from row {start} on, the prompt has {len(rows)}", where="prompt_logprob_token_ids",
                        remedy="rows of one length, padded with -1, none past the prompt's last but one token")
    ids: npt.NDArray[np.int64] = np.array(wanted, np.int64)
    if ids.max() >= rows.shape[1]:
        raise DataError(f"id {ids.max()} lies outside the vocabulary of {rows.shape[1]:,} tokens", where="prompt_logprob_token_ids",
                        remedy="the ids come from another tokenizer")
    picked = rows[start:start + len(ids)].gather(1, torch.from_numpy(np.maximum(ids, 0))).numpy().astype(np.float32)
    picked[ids < 0] = -np.inf
    file = io.BytesIO()
    np.save(file, picked, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def echoed(voice: Voice, ids: Sequence[int], rows: torch.Tensor, top: int, first: int, as_id: bool) -> dict[str, Any]:
    """OpenAI's `logprobs` of the tokens from `first` on; the very first of a text has none.

    text_offset: how many whole characters stand before a token; control tokens write none, half a character counts where it is whole."""
    characters = getincrementaldecoder("utf-8")("replace")
    tokens, own, tops, offsets, at = [], list[float | None](), list[dict[str, float] | None](), list[int](), 0
    for t, token in enumerate(ids):
        text = spelled(voice, token, as_id)
        if t >= first:
            tokens.append(text)
            offsets.append(at)
            own.append(float(rows[t - 1, token]) if t else None)
            entries = likeliest(rows[t - 1], top) if t and top else []
            tops.append({spelled(voice, i, as_id): x for i, x in entries} if t else None)
        at += len(characters.decode(voice.vocabulary.bytes_W[token] or b""))
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}
