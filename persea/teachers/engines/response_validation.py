"""What a server says of log-probabilities, believed only where it could be true. Servers lie: every value is looked at before it is a row."""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from itertools import pairwise
from math import exp, isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.distributions import MASS, Rows, named_rows

SLACK = 1e-6  # a log-probability may lie above 0 by a float32's rounding, and by no more
SENTINEL = -9000.0  # -9999 stands for minus infinity in JSON (vLLM, SGLang): the server changed its distributions before it told them
SAME = 1e-3  # nats by which two statements about one token may differ: a JSON of float16 values


class Malformed(ValueError):
    """An answer that cannot be true, or is none; why, in plain words. It may be asked again."""


@dataclass(frozen=True)
class Positions:
    """What a server said of a prompt's T tokens, unchecked: for each, its id, its log-probability (None of the first), and the likeliest
    tokens there with theirs (empty for the first).
    """

    ids: list[Any]
    realised: list[Any]
    named: list[list[tuple[Any, Any]]]


def an_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{what} is no object: {_short(value)}")
    return value


def a_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Malformed(f"{what} is missing" if value is None else f"{what} is no list: {_short(value)}")
    return value


def an_id(value: Any, width: int, what: str) -> int:
    """A token id; bool is no number."""
    if type(value) is not int or not 0 <= value < width:
        raise Malformed(f"{what}: {_short(value)} is no id of a vocabulary of {width:,} tokens")
    return value


def a_log(value: Any, what: str) -> float:
    """A natural log-probability: finite, at most 0."""
    if type(value) not in (int, float) or not isfinite(value):
        raise Malformed(f"{what}: {_short(value)} is no log-probability")
    if value > SLACK:
        raise Malformed(f"{what}: a log-probability of {value:g} is above 0")
    if value <= SENTINEL:
        raise Malformed(f"{what}: {value:g} stands for minus infinity: the server cut its distributions; ask it for raw log-probabilities")
    return min(0.0, float(value))


def parsed(body: bytes | str) -> Any:
    """JSON without NaN and Infinity."""
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        start = body[:60] if isinstance(body, str) else body[:60].decode(errors="replace")
        raise Malformed(f"not JSON: {start!r}") from error


def _no_constant(name: str) -> None:
    raise ValueError(name)


def rows_of(positions: Positions, ids_T: npt.NDArray[np.int32], learn_T: npt.NDArray[np.bool_], top: int, width: int) -> Rows:
    """Rows of kind TOPK_REST of the learned tokens.

    ids_T, learn_T  what was asked about; top  tokens named at each position; width  the vocabulary's size
    Raises Malformed where the answer is about other tokens, or a position's statement is no head of a distribution.
    """
    for what, values in (("ids", positions.ids), ("log-probabilities", positions.realised), ("positions with candidates", positions.named)):
        if len(values) != len(ids_T):
            raise Malformed(f"{len(values)} {what} for {len(ids_T)} tokens")
    for t, (said, asked) in enumerate(zip(positions.ids, ids_T.tolist(), strict=True)):
        if type(said) is not int or said != asked:
            raise Malformed(f"position {t}: the server speaks of token {_short(said)}, asked was {asked}")
    learned = np.flatnonzero(learn_T)
    ids_NK, logs_NK = np.empty((len(learned), top), np.int64), np.empty((len(learned), top))
    realised_N = np.empty(len(learned))
    for n, t in enumerate(learned.tolist()):
        realised_N[n] = a_log(positions.realised[t], f"position {t}")
        ids_NK[n], logs_NK[n] = _head(positions.named[t], top, width, f"position {t}")
        _agrees(int(ids_T[t]), float(realised_N[n]), ids_NK[n], logs_NK[n], f"position {t}")
    return named_rows(ids_NK, logs_NK, ids_T[learned], realised_N)


def _head(named: list[tuple[Any, Any]], top: int, width: int, where: str) -> tuple[list[int], list[float]]:
    """The `top` likeliest tokens and their log-probabilities."""
    if len(named) < top:
        raise Malformed(f"{where}: {len(named)} tokens are named, {top} were asked for")
    ids = [an_id(i, width, where) for i, _ in named[:top]]
    logs = [a_log(x, where) for _, x in named[:top]]
    if len(set(ids)) < top:
        raise Malformed(f"{where}: a token is named twice")
    if any(later > earlier + SLACK for earlier, later in pairwise(logs)):
        raise Malformed(f"{where}: the likeliest tokens do not come likeliest first")
    mass = sum(map(exp, logs))
    if mass > 1 + MASS:
        raise Malformed(f"{where}: the named tokens have a mass of {mass:.4f}")
    return ids, logs


def _agrees(token: int, realised: float, ids_K: npt.NDArray[np.int64], logs_K: npt.NDArray[np.float64], where: str) -> None:
    at = np.flatnonzero(ids_K == token)
    if len(at) and abs(logs_K[at[0]] - realised) > SAME:
        raise Malformed(f"{where}: its token has {realised:g} and, among the likeliest, {logs_K[at[0]]:g}")
    if not len(at) and realised > logs_K[-1] + SAME:
        raise Malformed(f"{where}: its token is likelier than the least of the likeliest and not among them")


def matrix(text: Any, shape: tuple[int, int], padded_RK: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """A base64 .npy of log-probabilities of this shape; padded places hold minus infinity, all others a log-probability."""
    if not isinstance(text, str):
        raise Malformed("the candidates' log-probabilities are missing")
    try:
        values = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (ValueError, EOFError, binascii.Error, OSError) as error:
        raise Malformed(f"the candidates' log-probabilities are no array: {error}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.shape != shape:
        raise Malformed(f"the candidates' log-probabilities are {getattr(values, 'shape', '?')} numbers, asked were {shape}")
    real = values[~padded_RK]
    if not (np.isfinite(real) & (real <= SLACK) & (real > SENTINEL)).all():
        raise Malformed("a candidate's value is no log-probability")
    return np.minimum(values, 0).astype(np.float32)


def as_ids(value: Any, width: int, what: str) -> list[int]:
    return [an_id(i, width, what) for i in a_list(value, what)]


def refuse_error(body: Any) -> None:
    """Raises Malformed for an error that comes as an answer."""
    if isinstance(body, dict) and (body.get("error") or body.get("object") == "error"):
        error = body.get("error") or body
        raise Malformed(f"an error instead of an answer: {_short(error.get('message', error) if isinstance(error, dict) else error)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
