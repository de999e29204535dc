"""Engine for servers that take and return token ids: vLLM, SGLang, `persea serve`.

The handshake checks three things before the server is trusted: which model it serves; that the
server tokenizes a text as the teacher's own tokenizer does; that it returns plausible
log-probabilities, by token id, for every position of a scored conversation. Later connections
score that conversation again, and another model is refused. The bytes of tokens come from the
teacher's own tokenizer, never from the server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import TeacherError
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
    decode_candidate_logprobs,
    refuse_equal_probabilities,
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
from persea.teachers.engines.wire_formats import (
    TOKENS_FORMAT,
    WIRE_FORMATS,
    WireFormat,
    build_candidate_logprobs_request,
)

# Changing either of the two asks every server for a new handshake: stored fingerprints stop
# matching.
HANDSHAKE_QUESTION = Conversation.from_question("What is 17 + 25?")
HANDSHAKE_CONVERSATION = HANDSHAKE_QUESTION.with_answer(Text("17 + 25 = 42."))
HANDSHAKE_TEXT = "Xin chào, 你好, 17 + 25 = 42.\n"
HANDSHAKE_REMEDY = (
    "docs/engines.md lists what each server supports; `protocol: chat` needs no log-probabilities"
)


@dataclass(frozen=True, eq=False)
class TokenServerEngine(ServerEngine):
    """A server that takes token ids. Distributions list the `num_top_logprobs` most likely tokens
    exactly.
    """

    client: HttpClient
    renderer: ChatRenderer
    wire_format: WireFormat
    served_model_name: str
    num_top_logprobs: int
    sampling: Sampling = GREEDY
    fingerprints: list[ServerFingerprint] = field(default_factory=list)
    max_fingerprint_drift: float = DEFAULT_MAX_FINGERPRINT_DRIFT_NATS

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of this engine."""
        return EngineCapabilities(DistributionKind.TOPK, self.num_top_logprobs)

    def handshake(self) -> ServerFingerprint:
        """Check the tokenizer and the log-probabilities, and record the fingerprint."""
        expected = self.renderer.vocabulary.encode_alone(HANDSHAKE_TEXT)
        ids = self.send_handshake(
            Request(
                self.wire_format.tokenize_path,
                self.wire_format.build_tokenize_request(self.served_model_name, HANDSHAKE_TEXT),
                self.wire_format.parse_tokenize_response,
            ),
            HANDSHAKE_REMEDY,
        )
        if expected not in (ids, ids[1:]):  # with or without a BOS
            raise TeacherError(
                f"the server tokenizes {HANDSHAKE_TEXT[:12]!r}... to {ids[:6]}, "
                f"the teacher's tokenizer to {expected[:6]}",
                where=f"{self.client.name}, {self.client.url}",
                remedy="`model:` must name the folder or hub id that the server runs",
            )
        fingerprint = self.compute_fingerprint()
        self._refuse_unstable_scores(fingerprint)
        self._refuse_changed_sampling()
        self.fingerprints.append(fingerprint)
        return fingerprint

    def _refuse_unstable_scores(self, fingerprint: ServerFingerprint) -> None:
        """Check that the same conversation, scored twice at once, gets the same values."""
        tokens = self.renderer.render(HANDSHAKE_CONVERSATION)
        request = self._build_logprobs_request(tokens.ids_T, tokens.loss_mask_T)
        expected_N = np.array(fingerprint.handshake_logprobs)
        for scored in self.send_handshakes([request, request], HANDSHAKE_REMEDY):
            drift = float(np.abs(scored.target_logprob_N - expected_N).mean())
            if drift > self.max_fingerprint_drift:
                self.refuse_handshake(
                    f"the handshake failed: the same text, scored again, differs by {drift:.2f} "
                    "nats",
                    "switch the server's prefix cache off; docs/engines.md lists the options",
                )

    def _refuse_changed_sampling(self) -> None:
        """Check that a greedy answer consists of most likely tokens, and that draws differ.

        Servers that apply another temperature, penalties or a top-k of their own are refused.
        """
        prompt_ids = self.renderer.render_prompt(HANDSHAKE_QUESTION).ids_T
        greedy = replace(self, sampling=GREEDY)
        (answer,) = self.send_handshakes(
            [greedy._build_generate_request(prompt_ids, HANDSHAKE_TOKENS)], HANDSHAKE_REMEDY
        )
        ids_T = np.concatenate([prompt_ids, answer])
        is_generated_T = np.arange(len(ids_T)) >= len(prompt_ids)
        scored: SparseDistributions = self.send_handshake(
            self._build_logprobs_request(ids_T, is_generated_T), HANDSHAKE_REMEDY
        )
        refuse_equal_probabilities(
            scored, len(self.renderer.vocabulary), f"{self.client.name}, {self.client.url}"
        )
        for n in range(len(scored)):
            start, end = scored.offsets_N1[n : n + 2]
            best = float(np.log(scored.probs_M[start:end].max()))
            if scored.target_logprob_N[n] < best - self.max_fingerprint_drift:
                self.refuse_handshake(
                    f"the handshake failed: token {n} of a greedy answer has a log-probability of "
                    f"{scored.target_logprob_N[n]:.2f}, another token {best:.2f}: the server "
                    "changes how tokens are drawn",
                    "start vLLM with --generation-config vllm and without penalties of its own",
                )
        if self.sampling.temperature:
            draws = [
                replace(self, sampling=s)._build_generate_request(prompt_ids, HANDSHAKE_TOKENS)
                for s in self.handshake_samplings(self.sampling)
            ]
            answers = self.send_handshakes(draws, HANDSHAKE_REMEDY)
            self.refuse_equal_draws([a.tolist() for a in answers])

    def compute_fingerprint(self) -> ServerFingerprint:
        """Score the handshake conversation."""
        tokens = self.renderer.render(HANDSHAKE_CONVERSATION)
        distributions: SparseDistributions = self.send_handshake(
            self._build_logprobs_request(tokens.ids_T, tokens.loss_mask_T), HANDSHAKE_REMEDY
        )
        return ServerFingerprint(
            self.served_model_name,
            tuple(round(float(x), 4) for x in distributions.target_logprob_N),
        )

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[npt.NDArray[np.int32] | EngineFailure]:
        """Generate one answer per prompt, streamed. See Engine."""
        return self.send_verified(
            [self._build_generate_request(p, max_new_tokens, stop_ids) for p in prompts]
        )

    def _build_generate_request(
        self,
        prompt_ids: npt.NDArray[np.int32],
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
    ) -> Request[npt.NDArray[np.int32]]:
        """Build a streamed request; no `stop_ids` are the renderer's."""
        stop_ids = self.renderer.stop_ids if stop_ids is None else stop_ids
        body = self.wire_format.build_generate_request(
            self.served_model_name, prompt_ids.tolist(), stop_ids, max_new_tokens, self.sampling
        )
        return Request(
            self.wire_format.path,
            body,
            lambda events: self._parse_generated_ids(events, stop_ids, max_new_tokens),
            lambda ids: len(prompt_ids) + len(ids),
            lambda event: bool(self.wire_format.parse_event_token_ids(event)),
            lambda event: bool(self.wire_format.parse_finish_reason(event)),
            max_new_tokens + 1,
            len(prompt_ids) + max_new_tokens,
        )

    def _parse_generated_ids(
        self, events: list[Any], stop_ids: Sequence[int], max_new_tokens: int
    ) -> npt.NDArray[np.int32]:
        """Join a stream's ids; the answer must end as requested."""
        ids = require_token_ids(
            self.wire_format.join_event_token_ids(events),
            len(self.renderer.vocabulary),
            "an answer",
        )
        reasons = (self.wire_format.parse_finish_reason(event) for event in events)
        finish_reason = next((reason for reason in reasons if reason), "")
        stops = [k for k, i in enumerate(ids) if i in stop_ids]
        if (
            finish_reason not in ("stop", "length")
            or len(ids) > max_new_tokens
            or (stops and stops[0] < len(ids) - 1)
            or (finish_reason == "stop" and not stops)
        ):
            raise MalformedResponseError(
                f"{len(ids)} tokens with finish reason {finish_reason or None!r}, stop tokens at "
                f"{stops}: at most {max_new_tokens} were requested, including the stop token"
            )
        return np.array(ids, np.int32)

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """Compute top-k distributions of the supervised tokens. See Engine."""
        yield from self.send_verified(
            [
                self._build_logprobs_request(ids_T, loss_mask_T)
                for ids_T, loss_mask_T in zip(sequences, loss_masks, strict=True)
            ]
        )

    def _build_logprobs_request(
        self, ids_T: npt.NDArray[np.int32], loss_mask_T: npt.NDArray[np.bool_]
    ) -> Request[SparseDistributions]:
        def parse(response: Any) -> SparseDistributions:
            return to_sparse_distributions(
                self.wire_format.parse_logprobs_response(
                    response, ids_T.tolist(), loss_mask_T.tolist()
                ),
                ids_T,
                loss_mask_T,
                self.num_top_logprobs,
                len(self.renderer.vocabulary),
            )

        return Request(
            self.wire_format.path,
            self.wire_format.build_logprobs_request(
                self.served_model_name, ids_T.tolist(), self.num_top_logprobs
            ),
            parse,
            lambda distributions: len(ids_T),
            expected_tokens=len(ids_T),
        )

    def compute_candidate_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        candidate_ids: Sequence[npt.NDArray[np.int32]],
    ) -> list[npt.NDArray[np.float32] | EngineFailure]:
        """Compute log-probabilities of given candidate tokens at every position.

        Args:
            sequences: Token ids, int32 [T] each.
            candidate_ids: One array [T - 1, K] per sequence; row t is for the place of token
                t + 1. -1 is padding.

        Returns:
            One float32 array [T - 1, K] per sequence; -inf at padding.

        Raises:
            TeacherError: The protocol is not `tokens`.
        """
        if self.wire_format is not TOKENS_FORMAT:
            raise TeacherError(
                f"protocol {self.wire_format.name} has no log-probabilities of given candidates",
                where=self.client.name,
                remedy="use `protocol: tokens`",
            )
        return self.send_verified(
            [
                self._build_candidates_request(ids_T, candidates_RK)
                for ids_T, candidates_RK in zip(sequences, candidate_ids, strict=True)
            ]
        )

    def _build_candidates_request(
        self, ids_T: npt.NDArray[np.int32], candidates_RK: npt.NDArray[np.int32]
    ) -> Request[npt.NDArray[np.float32]]:
        def parse(response: Any) -> npt.NDArray[np.float32]:
            answer = require_object(response, "the answer")
            returned_ids = require_token_ids(
                answer.get("prompt_token_ids"), len(self.renderer.vocabulary), "prompt_token_ids"
            )
            if returned_ids != ids_T.tolist():
                raise MalformedResponseError("the answer is about other tokens than the request")
            rows, columns = candidates_RK.shape
            return decode_candidate_logprobs(
                answer.get("prompt_token_id_logprobs"), (rows, columns), candidates_RK < 0
            )

        return Request(
            self.wire_format.path,
            build_candidate_logprobs_request(
                self.served_model_name, ids_T.tolist(), candidates_RK.tolist()
            ),
            parse,
            lambda logprobs: len(ids_T),
            expected_tokens=len(ids_T),
        )


def open_engine(name: str, options: EngineOptions) -> TokenServerEngine:
    """Connect to a server that uses the wire format of that name. See EngineSpec."""
    assert options.client is not None
    return TokenServerEngine(
        options.client,
        options.renderer,
        next(f for f in WIRE_FORMATS if f.name == name),
        resolve_served_model(options.client, options.served_model_name),
        options.num_top_logprobs,
        options.sampling,
        max_fingerprint_drift=options.max_fingerprint_drift,
    )
