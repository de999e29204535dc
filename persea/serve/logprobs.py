"""Log-probabilities in the formats of servers: vLLM's prompt_logprobs and candidate arrays,
OpenAI's echoed completions.
"""

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
    """Return a token as text.

    Args:
        renderer: The model's chat renderer.
        token: Token id.
        as_id: Return `token_id:N`.

    Returns:
        The name of a control token, the characters of other tokens, or, for a part of a character,
        OpenAI's form `bytes:` with hexadecimal escapes.
    """
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
    """Return the most likely (id, log-probability) pairs of a row [W], most likely first."""
    values, ids = logprobs_W.topk(min(num_top_logprobs, len(logprobs_W)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def build_prompt_logprobs(
    renderer: ChatRenderer,
    ids: Sequence[int],
    logprobs: torch.Tensor,
    num_top_logprobs: int,
    detokenize: bool = True,
) -> list[dict[str, Any] | None]:
    """Build vLLM's `prompt_logprobs`.

    Args:
        renderer: The model's chat renderer.
        ids: Prompt token ids, T of them.
        logprobs: Natural-log probabilities [T - 1, W].
        num_top_logprobs: Tokens to list per position; the prompt's own token is always listed.
        detokenize: Name tokens by text too; as in vLLM, `decoded_token` is None otherwise.

    Returns:
        None for the first token, then {id: {logprob, rank, decoded_token}}.
    """
    positions: list[dict[str, Any] | None] = [None]
    targets_N = torch.tensor(list(ids[1:]), dtype=torch.long)
    target_logprobs_N1 = logprobs.gather(1, targets_N[:, None])
    target_ranks = (1 + (logprobs > target_logprobs_N1).sum(1)).tolist()
    values, top_ids = logprobs.topk(min(num_top_logprobs, logprobs.shape[1]), dim=1)
    names: dict[int, str | None] = {}
    for token, target, rank, top_values, tops in zip(
        ids[1:],
        target_logprobs_N1[:, 0].tolist(),
        target_ranks,
        values.tolist(),
        top_ids.tolist(),
        strict=True,
    ):
        entries = {i: (x, 1 + top_values.index(x)) for i, x in zip(tops, top_values, strict=True)}
        entries.setdefault(token, (target, rank))
        for i in entries:
            if i not in names:
                names[i] = format_token(renderer, i, False) if detokenize else None
        positions.append(
            {
                str(i): {"logprob": x, "rank": rank, "decoded_token": names[i]}
                for i, (x, rank) in entries.items()
            }
        )
    return positions


def encode_candidate_logprobs(
    logprobs: torch.Tensor, candidate_ids: Sequence[Sequence[int]], first_row: int
) -> str:
    """Encode log-probabilities of given candidates as a .npy file in base64.

    Args:
        logprobs: Natural-log probabilities [T - 1, W].
        candidate_ids: Rows of ids of one length K; row r is for the place of token
            first_row + r + 1. -1 is padding and gets -inf.
        first_row: First row of `logprobs`.

    Returns:
        float32 [rows, K] in base64.

    Raises:
        DataError: Rows differ in length or exceed the prompt, or ids are out of range.
    """
    lengths = {len(row) for row in candidate_ids}
    if len(lengths) != 1 or 0 in lengths or first_row + len(candidate_ids) > len(logprobs):
        raise DataError(
            f"{len(candidate_ids)} rows of candidates from row {first_row} on do not fit the "
            f"{len(logprobs)} rows of the prompt",
            where="prompt_logprob_token_ids",
            remedy="send rows of one length, padded with -1, none past the prompt",
        )
    ids: npt.NDArray[np.int64] = np.array(candidate_ids, np.int64)
    if ids.max() >= logprobs.shape[1]:
        raise DataError(
            f"id {ids.max()} is outside the vocabulary of {logprobs.shape[1]:,} tokens",
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


def build_chat_logprobs(
    renderer: ChatRenderer, ids: Sequence[int], logprobs: torch.Tensor, num_top_logprobs: int
) -> list[dict[str, Any]]:
    """Build OpenAI's `logprobs.content` of a chat answer.

    Args:
        renderer: The model's chat renderer.
        ids: Generated token ids, N of them, with the stop token if there is one.
        logprobs: Natural-log probabilities [N, W].
        num_top_logprobs: Tokens to list per position.

    Returns:
        For each token its text, bytes (none for a control token) and log-probability, and the most
        likely tokens.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": format_token(renderer, token, False),
            "bytes": list(renderer.vocabulary.bytes_W[token] or b""),
            "logprob": logprob,
        }

    return [
        entry(token, float(row_W[token]))
        | {
            "top_logprobs": [
                entry(i, x)
                for i, x in (top_k_logprobs(row_W, num_top_logprobs) if num_top_logprobs else [])
            ]
        }
        for token, row_W in zip(ids, logprobs, strict=True)
    ]


def build_completion_logprobs(
    renderer: ChatRenderer,
    ids: Sequence[int],
    logprobs: torch.Tensor,
    num_top_logprobs: int,
    first_position: int,
    as_id: bool,
) -> dict[str, Any]:
    """Build OpenAI's `logprobs` of a completion.

    Args:
        renderer: The model's chat renderer.
        ids: Token ids of prompt and answer, T of them.
        logprobs: Natural-log probabilities [T - 1, W].
        num_top_logprobs: Tokens to list per position.
        first_position: First token to report; the first token of a text has no log-probability.
        as_id: Name tokens by id, see `format_token`.

    Returns:
        OpenAI's object. `text_offset` counts whole characters before a token: control tokens have
        none, and a character counts at the token that completes it.
    """
    decoder = getincrementaldecoder("utf-8")("replace")
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    num_characters = 0
    for t, token in enumerate(ids):
        if t >= first_position:
            tokens.append(format_token(renderer, token, as_id))
            text_offset.append(num_characters)
            token_logprobs.append(float(logprobs[t - 1, token]) if t else None)
            k = num_top_logprobs if t else 0
            entries = top_k_logprobs(logprobs[t - 1], k) if k else []
            top = {format_token(renderer, i, as_id): x for i, x in entries}
            top_logprobs.append(top if t else None)
        num_characters += len(decoder.decode(renderer.vocabulary.bytes_W[token] or b""))
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": text_offset,
    }
