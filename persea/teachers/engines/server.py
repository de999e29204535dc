"""Common parts of engines behind a server: handshake, fingerprint, and the check of the model.

The model is verified before every batch of requests, and again after a batch in which a connection
was lost, so that answers of two models never mix.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self, cast

import numpy as np

from persea.errors import OtherModelError, TeacherError
from persea.teachers.engines import (
    DEFAULT_MAX_FINGERPRINT_DRIFT_NATS,
    Engine,
    EngineFailure,
    Sampling,
)
from persea.teachers.engines.http_client import HttpClient, Request
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    require_list,
    require_object,
)

# Temperature and number of the draws that show whether a server samples. 1 is allowed everywhere.
HANDSHAKE_TEMPERATURE = 1.0
NUM_HANDSHAKE_DRAWS = 4
HANDSHAKE_TOKENS = 32  # tokens of an answer of the handshake
# Text in the reason of a failed handshake -> remedy, where the usual one says too little.
KNOWN_FAILURE_REMEDIES = {
    "greater than max allowed": "start `vllm serve` with a higher --max-logprobs, or lower "
    "`top_logprobs:` of the endpoint",
    "truncated its distributions": "start `vllm serve` with --logprobs-mode raw_logprobs: "
    "processed log-probabilities are cut by top-k and top-p",
    "maximum context length": "start `vllm serve` with a higher --max-model-len: it needs one "
    "token more than the longest text",
}


@dataclass(frozen=True)
class ServerFingerprint:
    """Identifies the model behind a server.

    Attributes:
        model: Name that the server reports.
        handshake_logprobs: Log-probabilities in nats of the supervised tokens of the handshake
            conversation, rounded to 4 digits; () for a chat route, which returns none.
        answers: Digests of a chat route's greedy answers to fixed questions; () for a server that
            answers the same question differently from one time to the next.
        nonce: Random text of the first handshake where nothing else identifies the model: answers
            of another run are then never taken for this one's. "" otherwise.
    """

    model: str
    handshake_logprobs: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()
    nonce: str = ""

    def refuse_other_model(
        self,
        other: ServerFingerprint,
        where: str,
        max_drift: float = DEFAULT_MAX_FINGERPRINT_DRIFT_NATS,
    ) -> None:
        """Check that another fingerprint is of the same model.

        Args:
            other: The fingerprint seen now.
            where: Teacher and URL, for the message.
            max_drift: Largest mean absolute difference in nats that one model may show.

        Raises:
            OtherModelError: The names, the number of log-probabilities or their values differ, or
                an answer that both have.
        """
        same_size = len(self.handshake_logprobs) == len(other.handshake_logprobs)
        drift = 0.0
        if self.handshake_logprobs and same_size:
            differences = np.subtract(self.handshake_logprobs, other.handshake_logprobs)
            drift = float(np.abs(differences).mean())
        same_answers = all(a == b for a, b in zip(self.answers, other.answers, strict=False))
        if self.model == other.model and same_size and drift <= max_drift and same_answers:
            return
        change = f"its log-probabilities moved by {drift:.2f} nats"
        if self.model != other.model:
            change = f"{other.model!r} answers, it was {self.model!r}"
        elif not same_answers:
            change = "it answers a fixed question in other words"
        raise OtherModelError(
            f"another model is there now: {change}",
            where=where,
            remedy="start the server with the model that answered before, "
            "or give this run another --out",
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; a part of a teacher's identity, so keys must not change."""
        value: dict[str, Any] = {"model": self.model, "logs": list(self.handshake_logprobs)}
        return (
            value
            | ({"answers": list(self.answers)} if self.answers else {})
            | ({"nonce": self.nonce} if self.nonce else {})
        )

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ServerFingerprint:
        """Read the result of `to_json`."""
        return ServerFingerprint(
            str(value["model"]),
            tuple(float(x) for x in value["logs"]),
            tuple(str(a) for a in value.get("answers", ())),
            str(value.get("nonce", "")),
        )


class ServerEngine(Engine):
    """Base of engines behind a server.

    Attributes:
        client: Connection to the server.
        fingerprints: Fingerprints of successful handshakes; the first one is binding.
        max_fingerprint_drift: See `ServerFingerprint.refuse_other_model`.
    """

    client: HttpClient
    fingerprints: list[ServerFingerprint]
    max_fingerprint_drift: float

    @abstractmethod
    def compute_fingerprint(self) -> ServerFingerprint:
        """Ask the server for its fingerprint.

        Raises:
            TeacherError: The server does not return the needed values.
        """

    def handshake(self) -> ServerFingerprint:
        """Check the capabilities of the server, and record its fingerprint.

        Raises:
            TeacherError: The server does not return the needed values; the message has the reason.
        """
        fingerprint = self.compute_fingerprint()
        self.fingerprints.append(fingerprint)
        return fingerprint

    def verify_same_model(self) -> None:
        """Raise OtherModelError if a server runs another model than at the first handshake."""
        self.client.check_servers(lambda client: self.with_client(client)._verify_server())

    def _verify_server(self) -> None:
        self.fingerprints[0].refuse_other_model(
            self.compute_fingerprint(),
            f"{self.client.name}, {self.client.url}",
            self.max_fingerprint_drift,
        )

    def with_client(self, client: HttpClient, **changes: Any) -> Self:
        """Return this engine with another connection."""
        return self if client is self.client else replace(cast(Any, self), client=client, **changes)

    def send_verified(self, requests: Sequence[Request[Any]]) -> list[Any | EngineFailure]:
        """Send requests, and verify the model before them and after any lost connection."""
        if not requests:
            return []
        self.verify_same_model()
        lost_before = self.client.num_lost_connections
        responses = self.client.send_all(requests)
        if self.client.num_lost_connections > lost_before:
            self.verify_same_model()
        return responses

    def send_handshake(self, request: Request[Any], remedy: str) -> Any:
        """Send one request of the handshake, and mark a failure as the handshake's."""
        (response,) = self.send_handshakes([request], remedy)
        return response

    def send_handshakes(self, requests: Sequence[Request[Any]], remedy: str) -> list[Any]:
        """Send requests of the handshake at once. Raises TeacherError if one of them fails."""
        try:
            responses = self.client.send_all(requests)
        except TeacherError as error:
            raise TeacherError(
                f"the handshake failed: {error.message}",
                where=error.where,
                remedy=error.remedy or _remedy_for(error.message, remedy),
            ) from error
        for response in responses:
            if isinstance(response, EngineFailure):
                reason = f"the handshake failed: {response.reason}"
                self.refuse_handshake(reason, _remedy_for(reason, remedy))
        return responses

    def refuse_handshake(self, reason: str, remedy: str) -> NoReturn:
        """Raise TeacherError for a server that cannot be used."""
        raise TeacherError(reason, where=f"{self.client.name}, {self.client.url}", remedy=remedy)

    @staticmethod
    def handshake_samplings(sampling: Sampling) -> list[Sampling]:
        """Return the settings of the draws that must differ: one seed each."""
        return [
            replace(sampling, temperature=HANDSHAKE_TEMPERATURE, seed=seed)
            for seed in range(NUM_HANDSHAKE_DRAWS)
        ]

    def refuse_equal_draws(self, draws: Sequence[Any]) -> None:
        """Check that draws with different seeds differ, where the recipe asks for a temperature.

        Raises:
            TeacherError: All draws are equal: the server does not sample.
        """
        if all(draw == draws[0] for draw in draws):
            self.refuse_handshake(
                f"{len(draws)} draws at temperature {HANDSHAKE_TEMPERATURE:g} with different "
                "seeds are equal: the server does not sample",
                "let it sample (`transformers serve`: do_sample: true in the model's "
                "generation_config.json), or delete `generation.temperature:`",
            )


def _remedy_for(reason: str, usual: str) -> str:
    return next((known for text, known in KNOWN_FAILURE_REMEDIES.items() if text in reason), usual)


def list_served_models(client: HttpClient) -> list[str]:
    """Return the names of the server's models.

    Raises:
        TeacherError: The server has no list of models.
    """

    def parse_models(response: Any) -> list[str]:
        entries = require_list(require_object(response, "the answer").get("data"), "data")
        names = [require_object(entry, "a model").get("id") for entry in entries]
        if not all(isinstance(name, str) for name in names):
            raise MalformedResponseError("a model without a name")
        return [str(name) for name in names]

    return client.send(Request("/v1/models", None, parse_models))


def resolve_served_model(client: HttpClient, requested_name: str) -> str:
    """Return the name of the model to ask for: the requested one, or the server's only one.

    Raises:
        TeacherError: The server does not have the model, or has several and none was requested.
    """
    models = list_served_models(client)
    if requested_name in models if requested_name else len(models) == 1:
        return requested_name or models[0]
    raise TeacherError(
        f"the server has {', '.join(models[:5]) or 'no model'}"
        + (f", not {requested_name}" if requested_name else ""),
        where=f"{client.name}, {client.url}",
        remedy="name one of them as `served_model_name:` of the endpoint",
    )
