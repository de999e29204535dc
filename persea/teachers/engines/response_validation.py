"""What a server says of log-probabilities, believed only where it could be true. Servers lie: every value is looked at before it is a row."""

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
from persea.storage import parse_strict_json

POSITIVE_LOGPROB_TOLERANCE_NATS = (
    1e-6  # a log-probability may lie above 0 by a float32's rounding, and by no more
)
LOGPROB_SENTINEL_THRESHOLD = -9000.0  # -9999 stands for minus infinity in JSON (vLLM, SGLang): the server changed its distributions before it told them
REPEATED_LOGPROB_TOLERANCE_NATS = (
    1e-3  # nats by which two statements about one token may differ: a JSON of float16 values
)


class MalformedResponseError(ValueError):
    """An answer that cannot be true, or is none; why, in plain words. It may be asked again."""


@dataclass(frozen=True)
class RawPromptLogprobs:
    """What a server said of a prompt's T tokens, unchecked: for each, its id, its log-probability (None of the first), and the likeliest
    tokens there with theirs (empty for the first).
    """

    ids: list[Any]
    target_logprobs: list[Any]
    top_logprobs: list[list[tuple[Any, Any]]]


def require_object(value: Any, label: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedResponseError(f"{label} is no object: {_shorten_repr(value)}")
    return value


def require_list(value: Any, label: str) -> list[Any]:
    if not isinstance(value, list):
        raise MalformedResponseError(
            f"{label} is missing"
            if value is None
            else f"{label} is no list: {_shorten_repr(value)}"
        )
    return value


def require_token_id(value: Any, vocab_size: int, label: str) -> int:
    """A token id; bool is no number."""
    if type(value) is not int or not 0 <= value < vocab_size:
        raise MalformedResponseError(
            f"{label}: {_shorten_repr(value)} is no id of a vocabulary of {vocab_size:,} tokens"
        )
    return value


def require_logprob(value: Any, label: str) -> float:
    """A natural log-probability: finite, at most 0."""
    if type(value) not in (int, float) or not isfinite(value):
        raise MalformedResponseError(f"{label}: {_shorten_repr(value)} is no log-probability")
    if value > POSITIVE_LOGPROB_TOLERANCE_NATS:
        raise MalformedResponseError(f"{label}: a log-probability of {value:g} is above 0")
    if value <= LOGPROB_SENTINEL_THRESHOLD:
        raise MalformedResponseError(
            f"{label}: {value:g} stands for minus infinity: the server cut its distributions; ask it for raw log-probabilities"
        )
    return min(0.0, float(value))


def parse_json(body: bytes | str) -> Any:
    """JSON without NaN and Infinity."""
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
    """Rows of kind TOPK_REST of the learned tokens.

    ids_T, learn_T  what was asked about; top  tokens named at each position; width  the vocabulary's size
    Raises Malformed where the answer is about other tokens, or a position's statement is no head of a distribution.
    """
    for what, values in (
        ("ids", prompt_logprobs.ids),
        ("log-probabilities", prompt_logprobs.target_logprobs),
        ("positions with candidates", prompt_logprobs.top_logprobs),
    ):
        if len(values) != len(ids_T):
            raise MalformedResponseError(f"{len(values)} {what} for {len(ids_T)} tokens")
    for t, (said, asked) in enumerate(zip(prompt_logprobs.ids, ids_T.tolist(), strict=True)):
        if type(said) is not int or said != asked:
            raise MalformedResponseError(
                f"position {t}: the server speaks of token {_shorten_repr(said)}, asked was {asked}"
            )
    learned = np.flatnonzero(loss_mask_T)
    ids_NK, logs_NK = (
        np.empty((len(learned), num_top_logprobs), np.int64),
        np.empty((len(learned), num_top_logprobs)),
    )
    realised_N = np.empty(len(learned))
    for n, t in enumerate(learned.tolist()):
        realised_N[n] = require_logprob(prompt_logprobs.target_logprobs[t], f"position {t}")
        ids_NK[n], logs_NK[n] = _require_top_logprobs(
            prompt_logprobs.top_logprobs[t], num_top_logprobs, vocab_size, f"position {t}"
        )
        _require_consistent_target(
            int(ids_T[t]), float(realised_N[n]), ids_NK[n], logs_NK[n], f"position {t}"
        )
    return distributions_from_top_logprobs(ids_NK, logs_NK, ids_T[learned], realised_N)


def _require_top_logprobs(
    top_logprobs: list[tuple[Any, Any]], num_top_logprobs: int, vocab_size: int, where: str
) -> tuple[list[int], list[float]]:
    """The `top` likeliest tokens and their log-probabilities."""
    if len(top_logprobs) < num_top_logprobs:
        raise MalformedResponseError(
            f"{where}: {len(top_logprobs)} tokens are named, {num_top_logprobs} were asked for"
        )
    ids = [require_token_id(i, vocab_size, where) for i, _ in top_logprobs[:num_top_logprobs]]
    logs = [require_logprob(x, where) for _, x in top_logprobs[:num_top_logprobs]]
    if len(set(ids)) < num_top_logprobs:
        raise MalformedResponseError(f"{where}: a token is named twice")
    if any(later > earlier + POSITIVE_LOGPROB_TOLERANCE_NATS for earlier, later in pairwise(logs)):
        raise MalformedResponseError(f"{where}: the likeliest tokens do not come likeliest first")
    mass = sum(map(exp, logs))
    if mass > 1 + MASS_TOLERANCE:
        raise MalformedResponseError(f"{where}: the named tokens have a mass of {mass:.4f}")
    return ids, logs


def _require_consistent_target(
    token: int,
    target_logprob: float,
    ids_K: npt.NDArray[np.int64],
    logs_K: npt.NDArray[np.float64],
    where: str,
) -> None:
    at = np.flatnonzero(ids_K == token)
    if len(at) and abs(logs_K[at[0]] - target_logprob) > REPEATED_LOGPROB_TOLERANCE_NATS:
        raise MalformedResponseError(
            f"{where}: its token has {target_logprob:g} and, among the likeliest, {logs_K[at[0]]:g}"
        )
    if not len(at) and target_logprob > logs_K[-1] + REPEATED_LOGPROB_TOLERANCE_NATS:
        raise MalformedResponseError(
            f"{where}: its token is likelier than the least of the likeliest and not among them"
        )


def decode_candidate_logprobs(
    text: Any, shape: tuple[int, int], padded_RK: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """A base64 .npy of log-probabilities of this shape; padded places hold minus infinity, all others a log-probability."""
    if not isinstance(text, str):
        raise MalformedResponseError("the candidates' log-probabilities are missing")
    try:
        values = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (ValueError, EOFError, binascii.Error, OSError) as error:
        raise MalformedResponseError(
            f"the candidates' log-probabilities are no array: {error}"
        ) from error
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.shape != shape:
        raise MalformedResponseError(
            f"the candidates' log-probabilities are {getattr(values, 'shape', '?')} numbers, asked were {shape}"
        )
    real = values[~padded_RK]
    if not (
        np.isfinite(real)
        & (real <= POSITIVE_LOGPROB_TOLERANCE_NATS)
        & (real > LOGPROB_SENTINEL_THRESHOLD)
    ).all():
        raise MalformedResponseError("a candidate's value is no log-probability")
    return np.minimum(values, 0).astype(np.float32)


def require_token_ids(value: Any, vocab_size: int, label: str) -> list[int]:
    return [require_token_id(i, vocab_size, label) for i in require_list(value, label)]


def refuse_error_body(body: Any) -> None:
    """Raises Malformed for an error that comes as an answer."""
    if isinstance(body, dict) and (body.get("error") or body.get("object") == "error"):
        error = body.get("error") or body
        raise MalformedResponseError(
            f"an error instead of an answer: {_shorten_repr(error.get('message', error) if isinstance(error, dict) else error)}"
        )


def _shorten_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
