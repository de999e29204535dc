"""How servers are asked for tokens and log-probabilities by token ids, and where in their answers these stand.

    tokens       vLLM's /inference/v1/generate: ids in, ids out, candidate ids per position
    completions  /v1/completions with echo, logprobs and token ids (vLLM's extensions of OpenAI's route)
    sglang       SGLang's /generate
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persea.teachers.engines import Sampling
from persea.teachers.engines.response_validation import Malformed, Positions, a_list, an_object


@dataclass(frozen=True)
class Dialect:
    """Requests as bodies, answers as unchecked values.

    saying    (served model, prompt ids, stop ids, most new tokens, sampling) -> body of a streamed answer
    said      an event -> token ids in it; new ones, or all so far where `joined` knows
    joined    all events -> the answer's ids
    ended     an event -> "stop", "length" or another reason; "" where it goes on
    scoring   (served model, ids, tokens to name) -> body
    scored    answer -> Positions
    spelling  (served model, text) -> body that makes the server tokenize; spelled: answer -> ids, a BOS before them or not
    """

    name: str
    path: str
    saying: Callable[[str, Sequence[int], Sequence[int], int, Sampling], dict[str, Any]]
    said: Callable[[Any], list[Any]]
    joined: Callable[[list[Any]], list[Any]]
    ended: Callable[[Any], str]
    scoring: Callable[[str, Sequence[int], int], dict[str, Any]]
    scored: Callable[[Any, Sequence[int]], Positions]
    spelling_path: str
    spelling: Callable[[str, str], dict[str, Any]]
    spelled: Callable[[Any], list[Any]]


def choice(said: Any) -> dict[str, Any]:
    """The one choice of an answer or event; {} where an event brings none (usage)."""
    choices = a_list(an_object(said, "the answer").get("choices"), "choices")
    if len(choices) > 1:
        raise Malformed(f"{len(choices)} choices, asked was one")
    return an_object(choices[0], "a choice") if choices else {}


def _drawn(sampling: Sampling) -> dict[str, Any]:
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed} if sampling.temperature else {"temperature": 0.0}


def _delta(event: Any) -> list[Any]:
    return a_list(choice(event).get("token_ids") or [], "token_ids")


def _laid(events: list[Any]) -> list[Any]:
    return [i for event in events for i in _delta(event)]


def _finish(event: Any) -> str:
    reason = choice(event).get("finish_reason")
    return reason if isinstance(reason, str) else ""


# --- vLLM's token route ---


def _tokens_saying(served: str, ids: Sequence[int], stops: Sequence[int], most: int, sampling: Sampling) -> dict[str, Any]:
    params = {"max_tokens": most, "stop_token_ids": list(stops), "ignore_eos": True, "detokenize": False, **_drawn(sampling)}
    return {"model": served, "token_ids": list(ids), "sampling_params": params, "stream": True}


def _tokens_scoring(served: str, ids: Sequence[int], top: int) -> dict[str, Any]:
    params = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "prompt_logprobs": top}
    return {"model": served, "token_ids": list(ids), "sampling_params": params, "return_token_ids": True}


def _tokens_scored(said: Any, asked: Sequence[int]) -> Positions:
    answer = an_object(said, "the answer")
    ids = a_list(answer.get("prompt_token_ids"), "prompt_token_ids")
    return by_id(ids, a_list(answer.get("prompt_logprobs"), "prompt_logprobs"))


def by_id(ids: list[Any], told: list[Any]) -> Positions:
    """vLLM's shape: for each position an object token id -> {"logprob": ...}, the likeliest and the token itself; none for the first."""
    realised: list[Any] = []
    named: list[list[tuple[Any, Any]]] = []
    for t, position in enumerate(told):
        if t == 0 and position is None:
            realised.append(None)
            named.append([])
            continue
        entries = [(_number(key), an_object(value, f"position {t}").get("logprob")) for key, value in an_object(position, f"position {t}").items()]
        if len({i for i, _ in entries}) < len(entries):
            raise Malformed(f"position {t}: a token is named twice")
        token = ids[t] if t < len(ids) else None
        own = [x for i, x in entries if i == token]
        realised.append(own[0] if own else None)
        named.append(sorted(entries, key=_likeliest))
    return Positions(ids, realised, named)


def _number(key: str) -> int:
    digits = key.removeprefix("token_id:")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise Malformed(f"the server names tokens by their text ({key[:40]!r}), in which half characters are lost, and not by their ids")
    return int(digits)


def _likeliest(entry: tuple[Any, Any]) -> float:
    """Order of an object's entries, which have none; what is no number comes last and is refused when it is read."""
    value = entry[1]
    return -value if type(value) in (int, float) and value == value else float("inf")


def candidates(served: str, ids: Sequence[int], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Body that asks for the log-probabilities of certain tokens: row t holds those for token t + 1; -1 = none."""
    body = _tokens_scoring(served, ids, 0)
    body["sampling_params"] |= {"prompt_logprob_token_ids": [list(row) for row in rows], "prompt_logprob_start": 0}
    return body


# --- OpenAI's completions, with vLLM's ids ---


def _completions_saying(served: str, ids: Sequence[int], stops: Sequence[int], most: int, sampling: Sampling) -> dict[str, Any]:
    return {"model": served, "prompt": list(ids), "max_tokens": most, "stop_token_ids": list(stops), "ignore_eos": True, "stream": True,
            "return_token_ids": True, **_drawn(sampling)}


def _completions_scoring(served: str, ids: Sequence[int], top: int) -> dict[str, Any]:
    return {"model": served, "prompt": list(ids), "max_tokens": 0, "temperature": 0.0, "echo": True, "logprobs": top,
            "return_tokens_as_token_ids": True, "return_token_ids": True}


def _completions_scored(said: Any, asked: Sequence[int]) -> Positions:
    logs = choice(said).get("logprobs")
    if logs is None:
        raise Malformed("the server dropped the log-probabilities")
    logs = an_object(logs, "logprobs")
    n = len(asked)  # a server that cannot generate nothing says a token more, behind the prompt
    ids = [_number(token) if isinstance(token, str) else token for token in a_list(logs.get("tokens"), "logprobs.tokens")][:n]
    realised, tops = a_list(logs.get("token_logprobs"), "token_logprobs")[:n], a_list(logs.get("top_logprobs"), "top_logprobs")[:n]
    told: list[list[tuple[Any, Any]]] = []
    for t, position in enumerate(tops):
        entries = [] if t == 0 and position is None else [(_number(k), x) for k, x in an_object(position, f"position {t}").items()]
        told.append(sorted(entries, key=_likeliest))
    return Positions(ids, realised, told)


def _spelling(served: str, text: str) -> dict[str, Any]:
    return {"model": served, "prompt": text, "max_tokens": 1, "temperature": 0.0, "add_special_tokens": False, "return_token_ids": True}


def _spelled(said: Any) -> list[Any]:
    return a_list(choice(said).get("prompt_token_ids"), "prompt_token_ids")


# --- SGLang ---


def _sglang_saying(served: str, ids: Sequence[int], stops: Sequence[int], most: int, sampling: Sampling) -> dict[str, Any]:
    params = {"max_new_tokens": most, "stop_token_ids": list(stops), "skip_special_tokens": False, **_drawn(sampling)}
    params.pop("seed", None)
    drawn = {"sampling_seed": sampling.seed} if sampling.temperature else {}
    return {"input_ids": list(ids), "sampling_params": params | drawn, "stream": True}


def _sglang_said(event: Any) -> list[Any]:
    return a_list(an_object(event, "an event").get("output_ids"), "output_ids")


def _sglang_joined(events: list[Any]) -> list[Any]:
    """SGLang streams all ids so far, or only the new ones where it was started so; its own count tells which."""
    if not events:
        return []
    count = an_object(an_object(events[-1], "an event").get("meta_info"), "meta_info").get("completion_tokens")
    last, laid = _sglang_said(events[-1]), [i for event in events for i in _sglang_said(event)]
    found = next((ids for ids in (last, laid) if len(ids) == count), None)
    if found is None:
        raise Malformed(f"{len(laid)} ids were streamed, the server counts {count}")
    return found


def _sglang_ended(event: Any) -> str:
    reason = an_object(an_object(event, "an event").get("meta_info"), "meta_info").get("finish_reason")
    return str(reason.get("type")) if isinstance(reason, Mapping) else ""


def _sglang_scoring(served: str, ids: Sequence[int], top: int) -> dict[str, Any]:
    return {"input_ids": list(ids), "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}, "return_logprob": True, "logprob_start_len": 0,
            "top_logprobs_num": top}


def _triples(value: Any, what: str) -> list[list[Any]]:
    triples = [a_list(t, what) for t in a_list(value, what)]
    if any(len(t) < 2 for t in triples):
        raise Malformed(f"{what} without [log-probability, id]")
    return triples


def _sglang_scored(said: Any, asked: Sequence[int]) -> Positions:
    meta = an_object(an_object(said, "the answer").get("meta_info"), "meta_info")
    own = _triples(meta.get("input_token_logprobs"), "input_token_logprobs")
    tops = a_list(meta.get("input_top_logprobs"), "input_top_logprobs")
    named = [[] if top is None else [(t[1], t[0]) for t in _triples(top, f"position {k}")] for k, top in enumerate(tops)]
    return Positions([t[1] for t in own], [t[0] for t in own], named)


def _sglang_spelling(served: str, text: str) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}, "return_logprob": True, "logprob_start_len": 0}


def _sglang_spelled(said: Any) -> list[Any]:
    meta = an_object(an_object(said, "the answer").get("meta_info"), "meta_info")
    return [t[1] for t in _triples(meta.get("input_token_logprobs"), "input_token_logprobs")]


TOKENS = Dialect("tokens", "/inference/v1/generate", _tokens_saying, _delta, _laid, _finish, _tokens_scoring, _tokens_scored,
                 "/v1/completions", _spelling, _spelled)
COMPLETIONS = Dialect("completions", "/v1/completions", _completions_saying, _delta, _laid, _finish, _completions_scoring, _completions_scored,
                      "/v1/completions", _spelling, _spelled)
SGLANG = Dialect("sglang", "/generate", _sglang_saying, _sglang_said, _sglang_joined, _sglang_ended, _sglang_scoring, _sglang_scored,
                 "/generate", _sglang_spelling, _sglang_spelled)
DIALECTS = (TOKENS, COMPLETIONS, SGLANG)
