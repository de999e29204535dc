"""Wire formats: the request bodies of each kind of token server, and where its answers hold ids and
log-probabilities.

tokens       vLLM's /inference/v1/generate: ids in, ids out, log-probabilities of given candidates
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
    """Builds the requests of one protocol and extracts values, unchecked, from its answers.

    Attributes:
        name: Value of `endpoint.protocol` in a recipe.
        path: Path of generation and scoring requests.
        build_generate_request: (served model, prompt ids, stop ids, max new tokens, sampling) ->
            body of a streamed request.
        parse_event_token_ids: Event -> its token ids; new ones, or all so far.
        join_event_token_ids: All events -> the ids of the answer.
        parse_finish_reason: Event -> "stop", "length" or another reason; "" before the end.
        build_logprobs_request: (served model, ids, tokens to list per position) -> body.
        parse_logprobs_response: (answer, prompt ids, loss mask) -> log-probabilities of the
            prompt, the most likely tokens at supervised positions only.
        tokenize_path: Path of tokenization requests.
        build_tokenize_request: (served model, text) -> body that makes the server tokenize.
        parse_tokenize_response: Answer -> token ids, with or without a BOS.
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
    parse_logprobs_response: Callable[[Any, Sequence[int], Sequence[bool]], RawPromptLogprobs]
    tokenize_path: str
    build_tokenize_request: Callable[[str, str], dict[str, Any]]
    parse_tokenize_response: Callable[[Any], list[Any]]


def single_choice(response: Any) -> dict[str, Any]:
    """Return the only choice of an answer or event; {} for an event without one (usage)."""
    choices = require_list(require_object(response, "the answer").get("choices"), "choices")
    if len(choices) > 1:
        raise MalformedResponseError(f"{len(choices)} choices, one was requested")
    return require_object(choices[0], "a choice") if choices else {}


# Sent with every request: vLLM's OpenAI routes apply the model's generation_config.json to fields
# that are not sent.
NEUTRAL_VLLM_FIELDS: Mapping[str, Any] = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def _sampling_fields(sampling: Sampling) -> dict[str, Any]:
    return (
        {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        if sampling.temperature
        else {"temperature": 0.0, "top_p": 1.0}
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
        **NEUTRAL_VLLM_FIELDS,
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


def _parse_tokens_logprobs(
    response: Any, prompt_ids: Sequence[int], loss_mask: Sequence[bool]
) -> RawPromptLogprobs:
    answer = require_object(response, "the answer")
    ids = require_list(answer.get("prompt_token_ids"), "prompt_token_ids")
    return parse_vllm_prompt_logprobs(
        ids, require_list(answer.get("prompt_logprobs"), "prompt_logprobs"), loss_mask
    )


def parse_vllm_prompt_logprobs(
    ids: list[Any], prompt_logprobs: list[Any], loss_mask: Sequence[bool]
) -> RawPromptLogprobs:
    """Read vLLM's prompt_logprobs: per position an object {token id: {"logprob": ...}}.

    It holds the most likely tokens and the prompt's own token; the first position is null. Only
    supervised positions are read.
    """
    target_logprobs: list[Any] = []
    top_logprobs: list[list[tuple[Any, Any]]] = []
    for t, position in enumerate(prompt_logprobs):
        if not is_supervised(loss_mask, t) or (t == 0 and position is None):
            target_logprobs.append(None)
            top_logprobs.append([])
            continue
        entries = [
            (_parse_token_id(key), require_object(value, f"position {t}").get("logprob"))
            for key, value in require_object(position, f"position {t}").items()
        ]
        if len({i for i, _ in entries}) < len(entries):
            raise MalformedResponseError(f"position {t}: a token is listed twice")
        token = ids[t] if t < len(ids) else None
        own = [x for i, x in entries if i == token]
        target_logprobs.append(own[0] if own else None)
        top_logprobs.append(sorted(entries, key=_descending_logprob_key))
    return RawPromptLogprobs(ids, target_logprobs, top_logprobs)


def is_supervised(loss_mask: Sequence[bool], t: int) -> bool:
    """Positions past the mask count as supervised: their number is checked later."""
    return t >= len(loss_mask) or loss_mask[t]


def _parse_token_id(key: str) -> int:
    digits = key.removeprefix("token_id:")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise MalformedResponseError(
            f"tokens are listed by text ({key[:40]!r}) instead of id; text loses half characters"
        )
    return int(digits)


def _descending_logprob_key(entry: tuple[Any, Any]) -> float:
    """Sort key of JSON entries, which have no order; non-numbers come last."""
    value = entry[1]
    return -value if type(value) in (int, float) and value == value else float("inf")


def build_candidate_logprobs_request(
    served_model_name: str, ids: Sequence[int], candidate_ids: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Build the body that requests log-probabilities of given tokens.

    Row t of `candidate_ids` is for the place of token t + 1; -1 is padding.
    """
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
        **NEUTRAL_VLLM_FIELDS,
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


def _parse_completions_logprobs(
    response: Any, prompt_ids: Sequence[int], loss_mask: Sequence[bool]
) -> RawPromptLogprobs:
    logs = single_choice(response).get("logprobs")
    if logs is None:
        raise MalformedResponseError("the server dropped the log-probabilities")
    logs = require_object(logs, "logprobs")
    n = len(prompt_ids)  # some servers cannot generate zero tokens, and append one to the prompt
    ids = [
        _parse_token_id(token) if isinstance(token, str) else token
        for token in require_list(logs.get("tokens"), "logprobs.tokens")
    ][:n]
    target_logprobs = require_list(logs.get("token_logprobs"), "token_logprobs")[:n]
    positions = require_list(logs.get("top_logprobs"), "top_logprobs")[:n]
    top_logprobs: list[list[tuple[Any, Any]]] = []
    for t, position in enumerate(positions):
        entries = (
            []
            if not is_supervised(loss_mask, t) or (t == 0 and position is None)
            else [
                (_parse_token_id(k), x)
                for k, x in require_object(position, f"position {t}").items()
            ]
        )
        top_logprobs.append(sorted(entries, key=_descending_logprob_key))
    return RawPromptLogprobs(ids, target_logprobs, top_logprobs)


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
        **NEUTRAL_VLLM_FIELDS,
        "top_k": -1,  # SGLang's value for all tokens
        **_sampling_fields(sampling),
    }
    params.pop("seed", None)
    if sampling.temperature:
        params["sampling_seed"] = sampling.seed
    return {"input_ids": list(ids), "sampling_params": params, "stream": True}


def _sglang_event_token_ids(event: Any) -> list[Any]:
    return require_list(require_object(event, "an event").get("output_ids"), "output_ids")


def _join_sglang_token_ids(events: list[Any]) -> list[Any]:
    """Join SGLang's events: they hold all ids so far or, with a server option, only new ones.

    The server's own token count decides which.
    """
    if not events:
        return []
    count = require_object(
        require_object(events[-1], "an event").get("meta_info"), "meta_info"
    ).get("completion_tokens")
    cumulative = _sglang_event_token_ids(events[-1])
    concatenated = [i for event in events for i in _sglang_event_token_ids(event)]
    for ids in (cumulative, concatenated):
        if len(ids) == count:
            return ids
    raise MalformedResponseError(
        f"{len(concatenated)} ids were streamed, the server counts {count}"
    )


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


def _parse_sglang_logprobs(
    response: Any, prompt_ids: Sequence[int], loss_mask: Sequence[bool]
) -> RawPromptLogprobs:
    meta = require_object(require_object(response, "the answer").get("meta_info"), "meta_info")
    own = _require_logprob_entries(meta.get("input_token_logprobs"), "input_token_logprobs")
    tops = require_list(meta.get("input_top_logprobs"), "input_top_logprobs")
    top_logprobs = [
        []
        if top is None or not is_supervised(loss_mask, k)
        else [(t[1], t[0]) for t in _require_logprob_entries(top, f"position {k}")]
        for k, top in enumerate(tops)
    ]
    return RawPromptLogprobs([t[1] for t in own], [t[0] for t in own], top_logprobs)


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
