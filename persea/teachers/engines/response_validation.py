"""Validation of server responses: every value is checked before it becomes a distribution.

Servers return wrong tokens, truncated distributions and sentinel values without an error; all of
them are refused here.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from itertools import pairwise
from math import exp, isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.distributions import (
    MASS_TOLERANCE,
    SparseDistributions,
    distributions_from_top_logprobs,
)
from persea.errors import TeacherError
from persea.storage import parse_strict_json

# A log-probability may exceed 0 by the rounding of float32.
POSITIVE_LOGPROB_TOLERANCE_NATS = 1e-6
RETRYABLE_STATUS_CODES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# vLLM and SGLang write -9999 for minus infinity: the server truncated its distributions.
LOGPROB_SENTINEL_THRESHOLD = -9000.0
# Ratio of the likeliest token anywhere in a text to a uniform distribution, for any trained model.
MIN_LIKELIHOOD_RATIO = 2.0
# Two values of one token in one answer may differ by the rounding of float16.
REPEATED_LOGPROB_TOLERANCE_NATS = 1e-3


class MalformedResponseError(ValueError):
    """A server's answer is malformed or impossible, for the reason in the message.

    The request may be repeated.
    """


class RejectedRequestError(Exception):
    """The server rejected a request, or cannot answer it rightly; repeating it is useless."""


@dataclass(frozen=True)
class RawPromptLogprobs:
    """A server's log-probabilities of a prompt of T tokens, unchecked.

    Attributes:
        ids: Token ids.
        target_logprobs: Log-probability of each token; None for the first.
        top_logprobs: Most likely (id, log-probability) pairs per position; empty for the first.
    """

    ids: list[Any]
    target_logprobs: list[Any]
    top_logprobs: list[list[tuple[Any, Any]]]


def require_object(value: Any, label: str) -> dict[str, Any]:
    """Return a JSON object, or raise MalformedResponseError."""
    if not isinstance(value, dict):
        raise MalformedResponseError(f"{label} is not an object: {_shorten_repr(value)}")
    return value


def require_list(value: Any, label: str) -> list[Any]:
    """Return a JSON list, or raise MalformedResponseError."""
    if not isinstance(value, list):
        raise MalformedResponseError(
            f"{label} is missing"
            if value is None
            else f"{label} is not a list: {_shorten_repr(value)}"
        )
    return value


def require_token_id(value: Any, vocab_size: int, label: str) -> int:
    """Return a token id, or raise MalformedResponseError. A bool is not a number."""
    if type(value) is not int or not 0 <= value < vocab_size:
        raise MalformedResponseError(
            f"{label}: {_shorten_repr(value)} is not a token id below {vocab_size:,}"
        )
    return value


def require_logprob(value: Any, label: str) -> float:
    """Return a natural log-probability, finite and at most 0, or raise MalformedResponseError."""
    if type(value) not in (int, float) or not isfinite(value):
        raise MalformedResponseError(f"{label}: {_shorten_repr(value)} is not a log-probability")
    if value > POSITIVE_LOGPROB_TOLERANCE_NATS:
        raise MalformedResponseError(f"{label}: a log-probability of {value:g} is above 0")
    if value <= LOGPROB_SENTINEL_THRESHOLD:
        raise MalformedResponseError(
            f"{label}: {value:g} means minus infinity: the server truncated its distributions; "
            "configure it to return raw log-probabilities"
        )
    return min(0.0, float(value))


def parse_json(body: bytes | str) -> Any:
    """Parse JSON; NaN and Infinity are refused."""
    try:
        return parse_strict_json(body)
    except (ValueError, RecursionError) as error:
        start = body[:60] if isinstance(body, str) else body[:60].decode(errors="replace")
        raise MalformedResponseError(f"not JSON: {start!r}") from error


def to_sparse_distributions(
    prompt_logprobs: RawPromptLogprobs,
    ids_T: npt.NDArray[np.int32],
    loss_mask_T: npt.NDArray[np.bool_],
    num_top_logprobs: int,
    vocab_size: int,
) -> SparseDistributions:
    """Convert a server's log-probabilities to distributions of kind TOPK.

    Args:
        prompt_logprobs: The server's values.
        ids_T: Token ids that were sent.
        loss_mask_T: Supervised tokens; one row each.
        num_top_logprobs: Tokens K to list per position.
        vocab_size: Number of token ids of the tokenizer.

    Returns:
        N distributions of K tokens.

    Raises:
        MalformedResponseError: The answer is about other tokens, or the values at a position are
            not the most likely tokens of a distribution.
    """
    for label, values in (
        ("ids", prompt_logprobs.ids),
        ("log-probabilities", prompt_logprobs.target_logprobs),
        ("positions with candidates", prompt_logprobs.top_logprobs),
    ):
        if len(values) != len(ids_T):
            raise MalformedResponseError(f"{len(values)} {label} for {len(ids_T)} tokens")
    for t, (returned, sent) in enumerate(zip(prompt_logprobs.ids, ids_T.tolist(), strict=True)):
        if type(returned) is not int or returned != sent:
            raise MalformedResponseError(
                f"position {t}: the answer is about token {_shorten_repr(returned)}, "
                f"{sent} was sent"
            )
    supervised = np.flatnonzero(loss_mask_T)
    shape = (len(supervised), num_top_logprobs)
    ids_NK, logprob_NK = np.empty(shape, np.int64), np.empty(shape)
    target_logprob_N = np.empty(len(supervised))
    for n, t in enumerate(supervised.tolist()):
        where = f"position {t}"
        target_logprob_N[n] = require_logprob(prompt_logprobs.target_logprobs[t], where)
        ids_NK[n], logprob_NK[n] = _require_top_logprobs(
            prompt_logprobs.top_logprobs[t], num_top_logprobs, vocab_size, where
        )
        _require_consistent_target(
            int(ids_T[t]), float(target_logprob_N[n]), ids_NK[n], logprob_NK[n], where
        )
    return distributions_from_top_logprobs(ids_NK, logprob_NK, ids_T[supervised], target_logprob_N)


def refuse_equal_probabilities(
    distributions: SparseDistributions, vocab_size: int, where: str
) -> None:
    """Check that a model prefers some tokens to others.

    vLLM 0.32 serves gpt-oss models with tied embeddings with a head that it never fills: all tokens
    are equally likely, at every position, and nothing else looks wrong.

    Args:
        distributions: At least one distribution of a conversation.
        vocab_size: Number of token ids.
        where: Teacher, for the message.

    Raises:
        TeacherError: No token has twice the probability of a uniform distribution anywhere.
    """
    best = float(distributions.probs_M.max(initial=0.0))
    if len(distributions) and best * vocab_size < MIN_LIKELIHOOD_RATIO:
        raise TeacherError(
            f"the model gives all {vocab_size:,} tokens the same probability: parts of its weights "
            "were not loaded",
            where=where,
            remedy="look at the log of the program that loads the model, or use `engine: local`",
        )


def _require_top_logprobs(
    top_logprobs: list[tuple[Any, Any]], num_top_logprobs: int, vocab_size: int, where: str
) -> tuple[list[int], list[float]]:
    """Check the most likely tokens of a position, and return ids and log-probabilities."""
    if len(top_logprobs) < num_top_logprobs:
        raise MalformedResponseError(
            f"{where}: {len(top_logprobs)} tokens are listed, {num_top_logprobs} were requested"
        )
    ids = [require_token_id(i, vocab_size, where) for i, _ in top_logprobs[:num_top_logprobs]]
    logprobs = [require_logprob(x, where) for _, x in top_logprobs[:num_top_logprobs]]
    if len(set(ids)) < num_top_logprobs:
        raise MalformedResponseError(f"{where}: a token is listed twice")
    if any(b > a + POSITIVE_LOGPROB_TOLERANCE_NATS for a, b in pairwise(logprobs)):
        raise MalformedResponseError(f"{where}: the listed tokens are not in order of likelihood")
    mass = sum(map(exp, logprobs))
    if mass > 1 + MASS_TOLERANCE:
        raise MalformedResponseError(f"{where}: the listed probabilities sum to {mass:.4f}")
    return ids, logprobs


def _require_consistent_target(
    token: int,
    target_logprob: float,
    ids_K: npt.NDArray[np.int64],
    logprob_K: npt.NDArray[np.float64],
    where: str,
) -> None:
    """Check the target's log-probability against the most likely tokens of its position."""
    at = np.flatnonzero(ids_K == token)
    if len(at) and abs(logprob_K[at[0]] - target_logprob) > REPEATED_LOGPROB_TOLERANCE_NATS:
        raise MalformedResponseError(
            f"{where}: its token has {target_logprob:g} and, among the listed, {logprob_K[at[0]]:g}"
        )
    if not len(at) and target_logprob > logprob_K[-1] + REPEATED_LOGPROB_TOLERANCE_NATS:
        raise MalformedResponseError(
            f"{where}: its token is more likely than the last listed token, and is not listed"
        )


def decode_candidate_logprobs(
    text: Any, shape: tuple[int, int], padded_RK: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Decode log-probabilities of candidates.

    Args:
        text: A .npy file in base64.
        shape: Expected (rows R, candidates K).
        padded_RK: True at padding, which holds minus infinity.

    Returns:
        Natural-log probabilities, float32 [R, K].

    Raises:
        MalformedResponseError: The text is no such array.
    """
    if not isinstance(text, str):
        raise MalformedResponseError("the candidates' log-probabilities are missing")
    try:
        values = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (ValueError, EOFError, binascii.Error, OSError) as error:
        raise MalformedResponseError(
            f"the candidates' log-probabilities are not an array: {error}"
        ) from error
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.shape != shape:
        raise MalformedResponseError(
            f"the candidates' log-probabilities have shape {getattr(values, 'shape', None)}, "
            f"{shape} was requested"
        )
    logprobs = values[~padded_RK]
    if not (
        np.isfinite(logprobs)
        & (logprobs <= POSITIVE_LOGPROB_TOLERANCE_NATS)
        & (logprobs > LOGPROB_SENTINEL_THRESHOLD)
    ).all():
        raise MalformedResponseError("a candidate's value is not a log-probability")
    return np.minimum(values, 0).astype(np.float32)


def require_token_ids(value: Any, vocab_size: int, label: str) -> list[int]:
    """Return a list of token ids, or raise MalformedResponseError."""
    return [require_token_id(i, vocab_size, label) for i in require_list(value, label)]


def refuse_error_body(body: Any) -> None:
    """Raise for an error that comes with status 200.

    Raises:
        RejectedRequestError: The error has a code 4xx: the request is at fault, such as a prompt
            that is too long.
        MalformedResponseError: Any other error.
    """
    if isinstance(body, dict) and (body.get("error") or body.get("object") == "error"):
        error = body.get("error") or body
        details = error if isinstance(error, dict) else {}
        reason = f"an error instead of an answer: {_shorten_repr(details.get('message', error))}"
        code = details.get("code")
        if type(code) is int and 400 <= code < 500 and code not in RETRYABLE_STATUS_CODES:
            raise RejectedRequestError(f"{reason} (code {code})")
        raise MalformedResponseError(reason)


def _shorten_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
