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
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    RawPromptLogprobs,
    require_list,
    require_object,
)


@dataclass(frozen=True)
class WireFormat:
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
    build_generate_request: Callable[
        [str, Sequence[int], Sequence[int], int, Sampling], dict[str, Any]
    ]
    parse_event_token_ids: Callable[[Any], list[Any]]
    join_event_token_ids: Callable[[list[Any]], list[Any]]
    parse_finish_reason: Callable[[Any], str]
    build_logprobs_request: Callable[[str, Sequence[int], int], dict[str, Any]]
    parse_logprobs_response: Callable[[Any, Sequence[int]], RawPromptLogprobs]
    tokenize_path: str
    build_tokenize_request: Callable[[str, str], dict[str, Any]]
    parse_tokenize_response: Callable[[Any], list[Any]]


def single_choice(response: Any) -> dict[str, Any]:
    """The one choice of an answer or event; {} where an event brings none (usage)."""
    choices = require_list(require_object(response, "the answer").get("choices"), "choices")
    if len(choices) > 1:
        raise MalformedResponseError(f"{len(choices)} choices, asked was one")
    return require_object(choices[0], "a choice") if choices else {}


def _sampling_fields(sampling: Sampling) -> dict[str, Any]:
    return (
        {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        if sampling.temperature
        else {"temperature": 0.0}
    )


def _choice_token_ids(event: Any) -> list[Any]:
    return require_list(single_choice(event).get("token_ids") or [], "token_ids")


def _concatenate_choice_token_ids(events: list[Any]) -> list[Any]:
    return [i for event in events for i in _choice_token_ids(event)]


def _choice_finish_reason(event: Any) -> str:
    reason = single_choice(event).get("finish_reason")
    return reason if isinstance(reason, str) else ""


# --- vLLM's token route ---


def _tokens_generate_request(
    served_model_name: str,
    ids: Sequence[int],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> dict[str, Any]:
    params = {
        "max_tokens": max_new_tokens,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
        "detokenize": False,
        **_sampling_fields(sampling),
    }
    return {
        "model": served_model_name,
        "token_ids": list(ids),
        "sampling_params": params,
        "stream": True,
    }


def _tokens_logprobs_request(
    served_model_name: str, ids: Sequence[int], num_top_logprobs: int
) -> dict[str, Any]:
    params = {
        "max_tokens": 1,
        "temperature": 0.0,
        "detokenize": False,
        "prompt_logprobs": num_top_logprobs,
    }
    return {
        "model": served_model_name,
        "token_ids": list(ids),
        "sampling_params": params,
        "return_token_ids": True,
    }


def _parse_tokens_logprobs(response: Any, prompt_ids: Sequence[int]) -> RawPromptLogprobs:
    answer = require_object(response, "the answer")
    ids = require_list(answer.get("prompt_token_ids"), "prompt_token_ids")
    return parse_vllm_prompt_logprobs(
        ids, require_list(answer.get("prompt_logprobs"), "prompt_logprobs")
    )


def parse_vllm_prompt_logprobs(ids: list[Any], prompt_logprobs: list[Any]) -> RawPromptLogprobs:
    """VLLM's shape: for each position an object token id -> {"logprob": ...}, the likeliest and the token itself; none for the first."""
    realised: list[Any] = []
    named: list[list[tuple[Any, Any]]] = []
    for t, position in enumerate(prompt_logprobs):
        if t == 0 and position is None:
            realised.append(None)
            named.append([])
            continue
        entries = [
            (_parse_token_id(key), require_object(value, f"position {t}").get("logprob"))
            for key, value in require_object(position, f"position {t}").items()
        ]
        if len({i for i, _ in entries}) < len(entries):
            raise MalformedResponseError(f"position {t}: a token is named twice")
        token = ids[t] if t < len(ids) else None
        own = [x for i, x in entries if i == token]
        realised.append(own[0] if own else None)
        named.append(sorted(entries, key=_descending_logprob_key))
    return RawPromptLogprobs(ids, realised, named)


def _parse_token_id(key: str) -> int:
    digits = key.removeprefix("token_id:")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise MalformedResponseError(
            f"the server names tokens by their text ({key[:40]!r}), in which half characters are lost, and not by their ids"
        )
    return int(digits)


def _descending_logprob_key(entry: tuple[Any, Any]) -> float:
    """Order of an object's entries, which have none; what is no number comes last and is refused when it is read."""
    value = entry[1]
    return -value if type(value) in (int, float) and value == value else float("inf")


def build_candidate_logprobs_request(
    served_model_name: str, ids: Sequence[int], candidate_ids: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Body that asks for the log-probabilities of certain tokens: row t holds those for token t + 1; -1 = none."""
    body = _tokens_logprobs_request(served_model_name, ids, 0)
    body["sampling_params"] |= {
        "prompt_logprob_token_ids": [list(row) for row in candidate_ids],
        "prompt_logprob_start": 0,
    }
    return body


# --- OpenAI's completions, with vLLM's ids ---


def _completions_generate_request(
    served_model_name: str,
    ids: Sequence[int],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> dict[str, Any]:
    return {
        "model": served_model_name,
        "prompt": list(ids),
        "max_tokens": max_new_tokens,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        **_sampling_fields(sampling),
    }


def _completions_logprobs_request(
    served_model_name: str, ids: Sequence[int], num_top_logprobs: int
) -> dict[str, Any]:
    return {
        "model": served_model_name,
        "prompt": list(ids),
        "max_tokens": 0,
        "temperature": 0.0,
        "echo": True,
        "logprobs": num_top_logprobs,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }


def _parse_completions_logprobs(response: Any, prompt_ids: Sequence[int]) -> RawPromptLogprobs:
    logs = single_choice(response).get("logprobs")
    if logs is None:
        raise MalformedResponseError("the server dropped the log-probabilities")
    logs = require_object(logs, "logprobs")
    n = len(
        prompt_ids
    )  # a server that cannot generate nothing says a token more, behind the prompt
    ids = [
        _parse_token_id(token) if isinstance(token, str) else token
        for token in require_list(logs.get("tokens"), "logprobs.tokens")
    ][:n]
    realised, tops = (
        require_list(logs.get("token_logprobs"), "token_logprobs")[:n],
        require_list(logs.get("top_logprobs"), "top_logprobs")[:n],
    )
    told: list[list[tuple[Any, Any]]] = []
    for t, position in enumerate(tops):
        entries = (
            []
            if t == 0 and position is None
            else [
                (_parse_token_id(k), x)
                for k, x in require_object(position, f"position {t}").items()
            ]
        )
        told.append(sorted(entries, key=_descending_logprob_key))
    return RawPromptLogprobs(ids, realised, told)


def _completions_tokenize_request(served_model_name: str, text: str) -> dict[str, Any]:
    return {
        "model": served_model_name,
        "prompt": text,
        "max_tokens": 1,
        "temperature": 0.0,
        "add_special_tokens": False,
        "return_token_ids": True,
    }


def _parse_completions_tokenize(response: Any) -> list[Any]:
    return require_list(single_choice(response).get("prompt_token_ids"), "prompt_token_ids")


# --- SGLang ---


def _sglang_generate_request(
    served_model_name: str,
    ids: Sequence[int],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> dict[str, Any]:
    params = {
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": list(stop_ids),
        "skip_special_tokens": False,
        **_sampling_fields(sampling),
    }
    params.pop("seed", None)
    drawn = {"sampling_seed": sampling.seed} if sampling.temperature else {}
    return {"input_ids": list(ids), "sampling_params": params | drawn, "stream": True}


def _sglang_event_token_ids(event: Any) -> list[Any]:
    return require_list(require_object(event, "an event").get("output_ids"), "output_ids")


def _join_sglang_token_ids(events: list[Any]) -> list[Any]:
    """SGLang streams all ids so far, or only the new ones where it was started so; its own count tells which."""
    if not events:
        return []
    count = require_object(
        require_object(events[-1], "an event").get("meta_info"), "meta_info"
    ).get("completion_tokens")
    last, laid = (
        _sglang_event_token_ids(events[-1]),
        [i for event in events for i in _sglang_event_token_ids(event)],
    )
    found = next((ids for ids in (last, laid) if len(ids) == count), None)
    if found is None:
        raise MalformedResponseError(f"{len(laid)} ids were streamed, the server counts {count}")
    return found


def _sglang_finish_reason(event: Any) -> str:
    reason = require_object(require_object(event, "an event").get("meta_info"), "meta_info").get(
        "finish_reason"
    )
    return str(reason.get("type")) if isinstance(reason, Mapping) else ""


def _sglang_logprobs_request(
    served_model_name: str, ids: Sequence[int], num_top_logprobs: int
) -> dict[str, Any]:
    return {
        "input_ids": list(ids),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": num_top_logprobs,
    }


def _require_logprob_entries(value: Any, label: str) -> list[list[Any]]:
    triples = [require_list(t, label) for t in require_list(value, label)]
    if any(len(t) < 2 for t in triples):
        raise MalformedResponseError(f"{label} without [log-probability, id]")
    return triples


def _parse_sglang_logprobs(response: Any, prompt_ids: Sequence[int]) -> RawPromptLogprobs:
    meta = require_object(require_object(response, "the answer").get("meta_info"), "meta_info")
    own = _require_logprob_entries(meta.get("input_token_logprobs"), "input_token_logprobs")
    tops = require_list(meta.get("input_top_logprobs"), "input_top_logprobs")
    named = [
        []
        if top is None
        else [(t[1], t[0]) for t in _require_logprob_entries(top, f"position {k}")]
        for k, top in enumerate(tops)
    ]
    return RawPromptLogprobs([t[1] for t in own], [t[0] for t in own], named)


def _sglang_tokenize_request(served_model_name: str, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def _parse_sglang_tokenize(response: Any) -> list[Any]:
    meta = require_object(require_object(response, "the answer").get("meta_info"), "meta_info")
    return [
        t[1]
        for t in _require_logprob_entries(meta.get("input_token_logprobs"), "input_token_logprobs")
    ]


TOKENS_FORMAT = WireFormat(
    "tokens",
    "/inference/v1/generate",
    _tokens_generate_request,
    _choice_token_ids,
    _concatenate_choice_token_ids,
    _choice_finish_reason,
    _tokens_logprobs_request,
    _parse_tokens_logprobs,
    "/v1/completions",
    _completions_tokenize_request,
    _parse_completions_tokenize,
)
COMPLETIONS_FORMAT = WireFormat(
    "completions",
    "/v1/completions",
    _completions_generate_request,
    _choice_token_ids,
    _concatenate_choice_token_ids,
    _choice_finish_reason,
    _completions_logprobs_request,
    _parse_completions_logprobs,
    "/v1/completions",
    _completions_tokenize_request,
    _parse_completions_tokenize,
)
SGLANG_FORMAT = WireFormat(
    "sglang",
    "/generate",
    _sglang_generate_request,
    _sglang_event_token_ids,
    _join_sglang_token_ids,
    _sglang_finish_reason,
    _sglang_logprobs_request,
    _parse_sglang_logprobs,
    "/generate",
    _sglang_tokenize_request,
    _parse_sglang_tokenize,
)
WIRE_FORMATS = (TOKENS_FORMAT, COMPLETIONS_FORMAT, SGLANG_FORMAT)
