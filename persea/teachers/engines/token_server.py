"""A teacher behind a server that takes and gives token ids: vLLM, SGLang, `persea serve`. What it really gives is proven before it teaches.

The handshake: which model is there; a text, to see that it tokenizes as the teacher's own tokenizer does; a scored conversation, to see
that log-probabilities come for every position, by id, and could be true. Every later connection asks the same conversation again, and
another model is refused. The bytes of tokens come from the teacher's own tokenizer, never from the server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import TeacherError
from persea.teachers.engines import GREEDY, EngineCapabilities, EngineFailure, Sampling
from persea.teachers.engines.http_client import HttpClient, Request
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    decode_candidate_logprobs,
    require_list,
    require_object,
    require_token_ids,
    to_sparse_distributions,
)
from persea.teachers.engines.wire_formats import (
    TOKENS_FORMAT,
    WireFormat,
    build_candidate_logprobs_request,
)

HANDSHAKE_CONVERSATION = Conversation.from_question("What is 17 + 25?").with_answer(
    Text("17 + 25 = 42.")
)
HANDSHAKE_TEXT = "Xin chào, 你好, 17 + 25 = 42.\n"
MAX_FINGERPRINT_DRIFT_NATS = 0.1  # nats, mean over the probe, that the same weights may differ by: batches and kernels of half precision move a token by .01 to .05


@dataclass(frozen=True)
class ServerFingerprint:
    """Which model answers. logs: of the probe's learned tokens, rounded; () of a chat route, which tells none."""

    model: str
    handshake_logprobs: tuple[float, ...] = ()

    def refuse_other_model(self, other: ServerFingerprint, where: str) -> None:
        """Raises TeacherError where another model answers than did."""
        drift = (
            float(np.abs(np.subtract(self.handshake_logprobs, other.handshake_logprobs)).mean())
            if self.handshake_logprobs
            and len(self.handshake_logprobs) == len(other.handshake_logprobs)
            else 0.0
        )
        if (
            self.model != other.model
            or len(self.handshake_logprobs) != len(other.handshake_logprobs)
            or drift > MAX_FINGERPRINT_DRIFT_NATS
        ):
            moved = f"its log-probabilities moved by {drift:.2f} nats"
            what = (
                f"{other.model!r} answers, it was {self.model!r}"
                if self.model != other.model
                else moved
            )
            raise TeacherError(
                f"another model is there now: {what}",
                where=where,
                remedy="start the server with the model that answered before, or give this run another --out",
            )

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "logs": list(self.handshake_logprobs)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ServerFingerprint:
        return ServerFingerprint(str(value["model"]), tuple(float(x) for x in value["logs"]))


def resolve_served_model(client: HttpClient, requested_name: str) -> str:
    """The model a server has: the wanted one, or its only one. Raises TeacherError where it has not, or has several."""

    def read(said: Any) -> list[str]:
        models = [
            require_object(m, "a model").get("id")
            for m in require_list(require_object(said, "the answer").get("data"), "data")
        ]
        if not all(isinstance(m, str) for m in models):
            raise MalformedResponseError("a model without a name")
        return [str(m) for m in models]

    models = client.send(Request("/v1/models", None, read))
    if (requested_name and requested_name not in models) or (
        not requested_name and len(models) != 1
    ):
        raise TeacherError(
            f"the server has {', '.join(models[:5]) or 'no model'}"
            + (f", not {requested_name}" if requested_name else ""),
            where=f"{client.name}, {client.url}",
            remedy="name one of them as `served_model_name:` of the endpoint",
        )
    return requested_name or models[0]


@dataclass(frozen=True, eq=False)
class TokenServerEngine:
    """See Engine and Namer. Rows are of kind TOPK_REST: `top` tokens each, named exactly."""

    client: HttpClient
    renderer: ChatRenderer
    wire_format: WireFormat
    served_model_name: str
    num_top_logprobs: int
    sampling: Sampling = GREEDY
    fingerprints: list[ServerFingerprint] = field(default_factory=list)

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(DistributionKind.TOPK, self.num_top_logprobs)

    def handshake(self) -> ServerFingerprint:
        """The handshake. Raises TeacherError, with the reason, for a server that does not give what is asked of it."""
        own = self.renderer.vocabulary.encode(HANDSHAKE_TEXT)
        spelled = self._send_handshake(
            Request(
                self.wire_format.tokenize_path,
                self.wire_format.build_tokenize_request(self.served_model_name, HANDSHAKE_TEXT),
                self.wire_format.parse_tokenize_response,
            )
        )
        if own not in (spelled, spelled[1:]):
            raise TeacherError(
                f"the server tokenizes {HANDSHAKE_TEXT[:12]!r}... to {spelled[:6]}, the teacher's tokenizer to {own[:6]}",
                where=f"{self.client.name}, {self.client.url}",
                remedy="`model:` must name the folder or hub id that the server runs",
            )
        found = self._compute_fingerprint()
        self.fingerprints.append(found)
        return found

    def verify_same_model(self) -> None:
        """Raises TeacherError where another model answers now."""
        self.fingerprints[0].refuse_other_model(
            self._compute_fingerprint(), f"{self.client.name}, {self.client.url}"
        )

    def _compute_fingerprint(self) -> ServerFingerprint:
        probe = self.renderer.render(HANDSHAKE_CONVERSATION)
        rows = self._send_handshake(self._build_logprobs_request(probe.ids_T, probe.loss_mask_T))
        return ServerFingerprint(
            self.served_model_name, tuple(round(float(x), 4) for x in rows.realised_N)
        )

    def _send_handshake(self, request: Request[Any]) -> Any:
        try:
            return self.client.send(request)
        except TeacherError as error:
            raise TeacherError(
                f"the handshake failed: {error.message}",
                where=error.where,
                remedy="see docs/engines.md for what each server gives; `protocol: chat` takes words alone",
            ) from error

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[npt.NDArray[np.int32] | EngineFailure]:
        """See Engine."""

        def job(prompt: npt.NDArray[np.int32]) -> Request[npt.NDArray[np.int32]]:
            body = self.wire_format.build_generate_request(
                self.served_model_name, prompt.tolist(), stop_ids, max_new_tokens, self.sampling
            )
            return Request(
                self.wire_format.path,
                body,
                lambda events: self._parse_generated_ids(events, stop_ids, max_new_tokens),
                lambda ids: len(prompt) + len(ids),
                lambda event: bool(self.wire_format.parse_event_token_ids(event)),
            )

        return self._send_verified([job(p) for p in prompts])

    def _parse_generated_ids(
        self, events: list[Any], stop_ids: Sequence[int], max_new_tokens: int
    ) -> npt.NDArray[np.int32]:
        ids = require_token_ids(
            self.wire_format.join_event_token_ids(events),
            len(self.renderer.vocabulary),
            "an answer",
        )
        ended = next(
            (reason for event in events if (reason := self.wire_format.parse_finish_reason(event))),
            "",
        )
        stops = [k for k, i in enumerate(ids) if i in stop_ids]
        if (
            ended not in ("stop", "length")
            or len(ids) > max_new_tokens
            or (stops and stops[0] < len(ids) - 1)
            or (ended == "stop" and not stops)
        ):
            raise MalformedResponseError(
                f"{len(ids)} tokens that ended with {ended or 'nothing'!r}, stop tokens at {stops}: asked were {max_new_tokens} at most, "
                "and the stop token with them"
            )
        return np.array(ids, np.int32)

    def compute_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[Any]:
        """Raises TeacherError: a server names the likeliest tokens alone."""
        raise TeacherError(
            "whole distributions are asked of a server, which names the likeliest tokens alone",
            where=self.client.name,
            remedy="use `named`",
        )

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """See Namer."""
        yield from self._send_verified(
            [
                self._build_logprobs_request(ids, learned)
                for ids, learned in zip(sequences, loss_masks, strict=True)
            ]
        )

    def _build_logprobs_request(
        self, ids_T: npt.NDArray[np.int32], loss_mask_T: npt.NDArray[np.bool_]
    ) -> Request[SparseDistributions]:
        def read(said: Any) -> SparseDistributions:
            return to_sparse_distributions(
                self.wire_format.parse_logprobs_response(said, ids_T.tolist()),
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
            read,
            lambda rows: len(ids_T),
        )

    def compute_candidate_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        candidate_ids: Sequence[npt.NDArray[np.int32]],
    ) -> list[npt.NDArray[np.float32] | EngineFailure]:
        """Log-probabilities of certain tokens: wanted[s] is [tokens - 1, K], row t for the place of token t + 1, -1 = none (-inf).

        Only with protocol tokens; raises TeacherError elsewhere.
        """
        if self.wire_format is not TOKENS_FORMAT:
            raise TeacherError(
                f"candidates per position are asked, protocol {self.wire_format.name} has none",
                where=self.client.name,
                remedy="use `protocol: tokens`",
            )

        def job(
            ids: npt.NDArray[np.int32], rows: npt.NDArray[np.int32]
        ) -> Request[npt.NDArray[np.float32]]:
            def read(said: Any) -> npt.NDArray[np.float32]:
                answer = require_object(said, "the answer")
                if (
                    require_token_ids(
                        answer.get("prompt_token_ids"),
                        len(self.renderer.vocabulary),
                        "prompt_token_ids",
                    )
                    != ids.tolist()
                ):
                    raise MalformedResponseError(
                        "the server speaks of other tokens than were asked"
                    )
                return decode_candidate_logprobs(
                    answer.get("prompt_token_id_logprobs"), (rows.shape[0], rows.shape[1]), rows < 0
                )

            return Request(
                self.wire_format.path,
                build_candidate_logprobs_request(
                    self.served_model_name, ids.tolist(), rows.tolist()
                ),
                read,
                lambda found: len(ids),
            )

        return self._send_verified(
            [job(ids, rows) for ids, rows in zip(sequences, candidate_ids, strict=True)]
        )

    def _send_verified(self, requests: Sequence[Request[Any]]) -> list[Any]:
        """Answers of one model: whoever is there before, after, and after every connection that broke, is the one that was."""
        if not requests:
            return []
        self.verify_same_model()
        breaks = self.client.num_lost_connections
        answers = self.client.send_all(requests)
        if self.client.num_lost_connections > breaks:
            self.verify_same_model()
        return answers
