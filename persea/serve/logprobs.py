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

from persea.chat.renderer import ChatRenderer
from persea.errors import DataError


def format_token(renderer: ChatRenderer, token: int, as_id: bool) -> str:
    """A token as text: `token_id:N`, its control name, its characters, or, of half a character, OpenAI's `bytes:\\xe4`."""
    if as_id:
        return f"token_id:{token}"
    raw = renderer.vocabulary.bytes_W[token]
    if raw is None:
        return renderer.vocabulary.control_names.get(token, f"<hole {token}>")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def top_k_logprobs(logprobs_W: torch.Tensor, num_top_logprobs: int) -> list[tuple[int, float]]:
    """The `top` likeliest tokens, likeliest first."""
    values, ids = logprobs_W.topk(min(num_top_logprobs, len(logprobs_W)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def build_prompt_logprobs(
    renderer: ChatRenderer, ids: Sequence[int], logprobs: torch.Tensor, num_top_logprobs: int
) -> list[dict[str, Any] | None]:
    """VLLM's shape: nothing for the first token, then id -> log-probability, rank and text, of the likeliest and of the token itself."""
    told: list[dict[str, Any] | None] = [None]
    for token, row_W in zip(ids[1:], logprobs, strict=True):
        entries = dict(top_k_logprobs(row_W, num_top_logprobs)) if num_top_logprobs else {}
        entries.setdefault(token, float(row_W[token]))
        told.append(
            {
                str(i): {
                    "logprob": x,
                    "rank": 1 + int((row_W > x).sum()),
                    "decoded_token": format_token(renderer, i, False),
                }
                for i, x in entries.items()
            }
        )
    return told


def encode_candidate_logprobs(
    logprobs: torch.Tensor, candidate_ids: Sequence[Sequence[int]], first_row: int
) -> str:
    """base64 .npy, float32 [rows asked, ids asked]: row r for the place of token start + r + 1; -1 asks for nothing and gets -inf.

    Raises DataError for rows of different lengths, past the prompt's end, or with ids out of range.
    """
    lengths = {len(row) for row in candidate_ids}
    if len(lengths) != 1 or 0 in lengths or first_row + len(candidate_ids) > len(logprobs):
        raise DataError(
            f"{len(candidate_ids)} rows of candidates from row {first_row} on, the prompt has {len(logprobs)}",
            where="prompt_logprob_token_ids",
            remedy="rows of one length, padded with -1, none past the prompt's last but one token",
        )
    ids: npt.NDArray[np.int64] = np.array(candidate_ids, np.int64)
    if ids.max() >= logprobs.shape[1]:
        raise DataError(
            f"id {ids.max()} lies outside the vocabulary of {logprobs.shape[1]:,} tokens",
            where="prompt_logprob_token_ids",
            remedy="the ids come from another tokenizer",
        )
    picked = (
        logprobs[first_row : first_row + len(ids)]
        .gather(1, torch.from_numpy(np.maximum(ids, 0)))
        .numpy()
        .astype(np.float32)
    )
    picked[ids < 0] = -np.inf
    file = io.BytesIO()
    np.save(file, picked, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def build_completion_logprobs(
    renderer: ChatRenderer,
    ids: Sequence[int],
    logprobs: torch.Tensor,
    num_top_logprobs: int,
    first_position: int,
    as_id: bool,
) -> dict[str, Any]:
    """OpenAI's `logprobs` of the tokens from `first` on; the very first of a text has none.

    text_offset: how many whole characters stand before a token; control tokens write none, half a character counts where it is whole.
    """
    characters = getincrementaldecoder("utf-8")("replace")
    tokens, own, tops, offsets, at = (
        [],
        list[float | None](),
        list[dict[str, float] | None](),
        list[int](),
        0,
    )
    for t, token in enumerate(ids):
        text = format_token(renderer, token, as_id)
        if t >= first_position:
            tokens.append(text)
            offsets.append(at)
            own.append(float(logprobs[t - 1, token]) if t else None)
            entries = (
                top_k_logprobs(logprobs[t - 1], num_top_logprobs) if t and num_top_logprobs else []
            )
            tops.append({format_token(renderer, i, as_id): x for i, x in entries} if t else None)
        at += len(characters.decode(renderer.vocabulary.bytes_W[token] or b""))
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}
