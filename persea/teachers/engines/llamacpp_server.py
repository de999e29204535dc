"""Engine for llama.cpp's own route /completion: token ids in and out, of any GGUF model.

The route scores no given text, but it continues one: persea asks for one token after every prefix,
and makes the model choose the token of the text by a large logit bias, which changes the choice and
not the log-probabilities that come with it (llama.cpp b11549). The server keeps the prefix in its
cache, so a position costs one step of the model.

Two things of that route need care. Where a character consists of several tokens, it returns one
entry for all of them, with the log-probability of the last one; a lone first token of a character
comes without any. Its distribution is then read beside a plain letter. And the tokens of its own
answers come with their distributions at once, so that they are scored without a request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from persea.chat.renderer import ChatRenderer
from persea.distributions import DistributionKind, SparseDistributions
from persea.teachers.engines import (
    DEFAULT_MAX_FINGERPRINT_DRIFT_NATS,
    GREEDY,
    EngineCapabilities,
    EngineFailure,
    EngineOptions,
    Sampling,
)
from persea.teachers.engines.http_client import HttpClient, Request
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    RawPromptLogprobs,
    require_list,
    require_logprob,
    require_object,
    require_token_ids,
    to_sparse_distributions,
)
from persea.teachers.engines.server import (
    HANDSHAKE_TOKENS,
    ServerEngine,
    ServerFingerprint,
    resolve_served_model,
)
from persea.teachers.engines.token_server import (
    HANDSHAKE_CONVERSATION,
    HANDSHAKE_QUESTION,
    HANDSHAKE_REMEDY,
    HANDSHAKE_TEXT,
)

COMPLETION_PATH = "/completion"
# Makes a token the only possible one: logits of language models are far below it.
FORCING_LOGIT_BIAS = 1000.0
# Tokens listed where a first part of a character is looked for; if it is not among them, all are.
NUM_LISTED_FOR_PART_OF_CHARACTER = 1024
# Samplers of llama.cpp that are on by default, or may be switched on at the server: values that
# change nothing.
NEUTRAL_LLAMACPP_FIELDS = {
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "mirostat": 0,
}

# Log-probability of the token, and (id, log-probability) of the most likely ones.
_Row: TypeAlias = "tuple[Any, list[tuple[Any, Any]]]"
# Ids, the row of each where it is known, and whether no id is missing.
_Answer: TypeAlias = "tuple[list[int], list[_Row | None], bool]"


@dataclass(frozen=True, eq=False)
class LlamaCppEngine(ServerEngine):
    """A llama.cpp server. Distributions list the `num_top_logprobs` most likely tokens exactly."""

    client: HttpClient
    renderer: ChatRenderer
    served_model_name: str
    num_top_logprobs: int
    sampling: Sampling = GREEDY
    fingerprints: list[ServerFingerprint] = field(default_factory=list)
    max_fingerprint_drift: float = DEFAULT_MAX_FINGERPRINT_DRIFT_NATS
    # Digest of a sequence of ids -> row of its last token, of the answers generated last.
    _rows_of_answers: dict[bytes, _Row] = field(default_factory=dict)

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of this engine."""
        return EngineCapabilities(DistributionKind.TOPK, self.num_top_logprobs)

    def handshake(self) -> ServerFingerprint:
        """Check tokenizer, scores and sampling, and record the fingerprint.

        Raises:
            TeacherError: One of them is not as persea needs it.
        """
        expected = self.renderer.vocabulary.encode_alone(HANDSHAKE_TEXT)
        body = {"content": HANDSHAKE_TEXT, "add_special": False, "parse_special": False}
        ids = self.send_handshake(Request("/tokenize", body, _parse_tokens), HANDSHAKE_REMEDY)
        if ids != expected:
            self.refuse_handshake(
                f"the server tokenizes {HANDSHAKE_TEXT[:12]!r}... to {ids[:6]}, "
                f"the teacher's tokenizer to {expected[:6]}",
                "`model:` must name the folder, hub id or GGUF file that the server runs",
            )
        fingerprint, again = self.compute_fingerprint(), self.compute_fingerprint()
        again.refuse_other_model(
            fingerprint, f"{self.client.name}, {self.client.url}", self.max_fingerprint_drift
        )
        prompt_ids = self.renderer.render_prompt(HANDSHAKE_QUESTION).ids_T
        greedy = replace(self, sampling=GREEDY)
        for stream in (True, False):
            (answer,) = self.send_handshakes(
                [greedy._generate_request(prompt_ids, HANDSHAKE_TOKENS, stream)], HANDSHAKE_REMEDY
            )
            if answer[2]:
                break
        for token, row in zip(answer[0], answer[1], strict=True):
            if row is not None and row[0] < row[1][0][1] - self.max_fingerprint_drift:
                self.refuse_handshake(
                    f"the handshake failed: token {token} of a greedy answer has a log-probability "
                    f"of {row[0]:.2f}, another token {row[1][0][1]:.2f}: the server changes how "
                    "tokens are drawn",
                    "start llama-server without samplers of its own",
                )
        if self.sampling.temperature:
            draws = [
                replace(self, sampling=s)._generate_request(prompt_ids, HANDSHAKE_TOKENS)
                for s in self.handshake_samplings(self.sampling)
            ]
            self.refuse_equal_draws(
                [ids for ids, *_ in self.send_handshakes(draws, HANDSHAKE_REMEDY)]
            )
        self.fingerprints.append(fingerprint)
        return fingerprint

    def compute_fingerprint(self) -> ServerFingerprint:
        """Score the handshake conversation."""
        tokens = self.renderer.render(HANDSHAKE_CONVERSATION)
        (scored,) = self._score([tokens.ids_T], [tokens.loss_mask_T])
        if isinstance(scored, EngineFailure):
            self.refuse_handshake(f"the handshake failed: {scored.reason}", HANDSHAKE_REMEDY)
        return ServerFingerprint(
            self.served_model_name, tuple(round(float(x), 4) for x in scored.target_logprob_N)
        )

    # --- answers ---

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[npt.NDArray[np.int32] | EngineFailure]:
        """Generate one answer per prompt, streamed. See Engine.

        llama.cpp b11549 leaves tokens out of a stream: those before the last one of a character
        that several tokens make up. Such an answer is asked for again, not streamed.
        llama.cpp ends an answer at the end tokens of the GGUF file; one that goes on after another
        stop token is cut there.
        """
        self._rows_of_answers.clear()
        answers = self.send_verified([self._generate_request(p, max_new_tokens) for p in prompts])
        lost = [k for k, a in enumerate(answers) if not isinstance(a, EngineFailure) and not a[2]]
        if lost:
            again = [self._generate_request(prompts[k], max_new_tokens, stream=False) for k in lost]
            for k, answer in zip(lost, self.send_verified(again), strict=True):
                answers[k] = answer
        found: list[npt.NDArray[np.int32] | EngineFailure] = []
        for prompt_ids, answer in zip(prompts, answers, strict=True):
            if isinstance(answer, EngineFailure):
                found.append(answer)
                continue
            ids, rows, _ = answer
            end = next((k + 1 for k, i in enumerate(ids) if i in stop_ids), len(ids))
            digest = hashlib.blake2b(prompt_ids.astype(np.int32).tobytes())
            for token, row in zip(ids[:end], rows[:end], strict=True):
                digest.update(np.int32(token).tobytes())
                if row is not None:
                    self._rows_of_answers[digest.digest()] = row
            found.append(np.array(ids[:end], np.int32))
        return found

    def _generate_request(
        self, prompt_ids: npt.NDArray[np.int32], max_new_tokens: int, stream: bool = True
    ) -> Request[_Answer]:
        """Build a request for an answer."""
        s = self.sampling
        body = self._request_body(prompt_ids, max_new_tokens, self.num_top_logprobs) | {
            "stream": stream,
            "cache_prompt": False,  # a reused prefix rounds differently
            "temperature": s.temperature,
            "top_p": s.top_p if s.temperature else 1.0,
            "seed": s.seed,
        }
        num_prompt = len(prompt_ids)
        if not stream:
            return Request(
                COMPLETION_PATH,
                body,
                lambda whole: self._parse_answer([whole], max_new_tokens, is_streamed=False),
                lambda answer: num_prompt + len(answer[0]),
                expected_tokens=num_prompt + max_new_tokens,
                num_silent_tokens=max_new_tokens,
            )
        return Request(
            COMPLETION_PATH,
            body,
            lambda events: self._parse_answer(events, max_new_tokens, is_streamed=True),
            lambda answer: num_prompt + len(answer[0]),
            lambda event: bool(require_object(event, "an event").get("tokens")),
            lambda event: require_object(event, "an event").get("stop") is True,
            max_new_tokens + 1,
            num_prompt + max_new_tokens,
        )

    def _request_body(
        self, ids: npt.NDArray[np.int32], max_new_tokens: int, num_listed: int
    ) -> dict[str, Any]:
        return {
            "model": self.served_model_name,
            "prompt": ids.tolist(),
            "n_predict": max_new_tokens,
            "n_probs": num_listed,
            "return_tokens": True,
            **NEUTRAL_LLAMACPP_FIELDS,
        }

    def _parse_answer(self, events: list[Any], max_new_tokens: int, is_streamed: bool) -> _Answer:
        """Join the events of an answer."""
        ids: list[int] = []
        entries: list[dict[str, Any]] = []
        for event in events:
            event = require_object(event, "an event")
            ids += require_token_ids(
                event.get("tokens") or [], len(self.renderer.vocabulary), "an answer"
            )
            if not (event.get("stop") is True and entries):  # the last event repeats all of them
                entries += _require_entries(event)
        reason = require_object(events[-1] if events else {}, "an event").get("stop_type")
        if reason not in ("eos", "limit") or len(ids) > max_new_tokens:
            raise MalformedResponseError(
                f"{len(ids)} tokens that ended by {reason!r}, {max_new_tokens} were requested"
            )
        rows = self._rows_of_tokens(ids, entries)
        is_cut = len(ids) < max_new_tokens
        if reason == "eos":
            is_cut = not ids or self.renderer.vocabulary.bytes_W[ids[-1]] is not None
        if is_streamed and (rows is None or is_cut):
            return ids, [None] * len(ids), False
        if rows is None:
            raise MalformedResponseError("entries and tokens of an answer do not fit together")
        return ids, rows, True

    def _rows_of_tokens(
        self, ids: list[int], entries: list[dict[str, Any]]
    ) -> list[_Row | None] | None:
        """Return the row of each token; None where a character of several tokens has one entry.

        Returns:
            None if tokens are missing.
        """
        rows: list[_Row | None] = [None] * len(ids)
        k = 0
        for entry in entries:
            start, raw = k, b""
            try:
                expected = bytes(require_list(entry.get("bytes"), "bytes"))
            except (TypeError, ValueError) as error:
                raise MalformedResponseError("the bytes of an entry are no bytes") from error
            while k < len(ids):
                raw += self.renderer.vocabulary.bytes_W[ids[k]] or b""
                k += 1
                if ids[k - 1] == entry.get("id") and raw == expected:
                    break
            else:
                return None
            if k - start == 1:
                rows[start] = _parse_row(entry)
        return rows

    # --- given texts ---

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """Compute top-k distributions of the supervised tokens. See Engine."""
        if sequences:
            self.verify_same_model()
        yield from self._score(sequences, loss_masks)

    def _score(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> list[SparseDistributions | EngineFailure]:
        """Score texts: rows of own answers are known, the others are asked for one by one."""
        rows: dict[tuple[int, int], _Row | EngineFailure] = {}
        positions: list[tuple[int, int]] = []
        for s, (ids_T, loss_mask_T) in enumerate(zip(sequences, loss_masks, strict=True)):
            digest = hashlib.blake2b()
            for t, token in enumerate(ids_T.astype(np.int32)):
                digest.update(token.tobytes())
                if not loss_mask_T[t]:
                    continue
                known = self._rows_of_answers.get(digest.digest())
                if known is None:
                    positions.append((s, t))
                else:
                    rows[s, t] = known
        k = self.num_top_logprobs
        for num_listed in (0, NUM_LISTED_FOR_PART_OF_CHARACTER, len(self.renderer.vocabulary)):
            requests = [self._row_request(sequences[s], t, num_listed) for s, t in positions]
            answers = self.client.send_all(requests)
            rows |= {place: a for place, a in zip(positions, answers, strict=True) if a is not None}
            positions = [p for p, a in zip(positions, answers, strict=True) if a is None]
        found: list[SparseDistributions | EngineFailure] = []
        for s, (ids_T, loss_mask_T) in enumerate(zip(sequences, loss_masks, strict=True)):
            own = [rows[s, t] for t in np.flatnonzero(loss_mask_T).tolist()]
            failure = next((row for row in own if isinstance(row, EngineFailure)), None)
            if failure:
                found.append(failure)
                continue
            raw = RawPromptLogprobs(ids_T.tolist(), [None] * len(ids_T), [[] for _ in ids_T])
            for t, row in zip(np.flatnonzero(loss_mask_T).tolist(), own, strict=True):
                assert not isinstance(row, EngineFailure)
                raw.target_logprobs[t], raw.top_logprobs[t] = row
            try:
                found.append(
                    to_sparse_distributions(
                        raw, ids_T, loss_mask_T, k, len(self.renderer.vocabulary)
                    )
                )
            except MalformedResponseError as error:
                found.append(EngineFailure(str(error)))
        return found

    def _row_request(
        self, ids_T: npt.NDArray[np.int32], position: int, num_listed: int
    ) -> Request[_Row | None]:
        """Build a request for the distribution of one token of a text.

        Args:
            ids_T: Token ids of the text.
            position: Position of the token.
            num_listed: 0 = force the token itself; the answer is None if it has no entry of its
                own. Otherwise a letter is forced, so many tokens are listed, and the answer is None
                if the token is not among them.
        """
        token = int(ids_T[position])
        forced = self._plain_letter_id if num_listed else token
        body = self._request_body(ids_T[:position], 1, num_listed or self.num_top_logprobs) | {
            "stream": False,
            "cache_prompt": True,
            "temperature": 0.0,
            "logit_bias": [[forced, FORCING_LOGIT_BIAS]],
        }

        def parse(response: Any) -> _Row | None:
            answer = require_object(response, "the answer")
            if answer.get("truncated"):
                raise MalformedResponseError("the server left out a part of the prompt")
            ids = require_token_ids(answer.get("tokens"), len(self.renderer.vocabulary), "tokens")
            if ids != [forced]:
                raise MalformedResponseError(f"token {forced} was forced, {ids} came")
            entries = _require_entries(answer)
            if not entries:
                if num_listed:
                    raise MalformedResponseError("the log-probabilities are missing")
                return None
            logprob, listed = _parse_row(entries[0])
            if not num_listed:
                return logprob, listed
            own = next((x for i, x in listed if i == token), None)
            return None if own is None else (own, listed)

        return Request(
            COMPLETION_PATH, body, parse, lambda row: position + 1, expected_tokens=position + 1
        )

    @property
    def _plain_letter_id(self) -> int:
        """Return the id of a token that is a whole character."""
        return self.renderer.vocabulary.bytes_W.index(b"a")


def _parse_tokens(response: Any) -> list[Any]:
    return require_list(require_object(response, "the answer").get("tokens"), "tokens")


def _require_entries(event: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        require_object(entry, "an entry")
        for entry in require_list(
            event.get("completion_probabilities") or [], "completion_probabilities"
        )
    ]


def _parse_row(entry: dict[str, Any]) -> _Row:
    """Return a row; the rest of its values is checked when it becomes a distribution."""
    listed = [
        require_object(one, "a listed token")
        for one in require_list(entry.get("top_logprobs"), "top_logprobs")
    ]
    if not listed:
        raise MalformedResponseError("no tokens are listed at a position")
    rows = [(one.get("id"), require_logprob(one.get("logprob"), "an entry")) for one in listed]
    return require_logprob(entry.get("logprob"), "an entry"), rows


def open_engine(name: str, options: EngineOptions) -> LlamaCppEngine:
    """Connect to a llama.cpp server. See EngineSpec."""
    assert options.client is not None
    return LlamaCppEngine(
        options.client,
        options.renderer,
        resolve_served_model(options.client, options.served_model_name),
        options.num_top_logprobs,
        options.sampling,
        max_fingerprint_drift=options.max_fingerprint_drift,
    )
