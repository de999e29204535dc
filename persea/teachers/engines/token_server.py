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
from persea.chat.renderer import Voice
from persea.distributions import RowKind, Rows
from persea.errors import TeacherError
from persea.teachers.engines import GREEDY, Abilities, Failed, Sampling
from persea.teachers.engines.http_client import Job, Line
from persea.teachers.engines.response_validation import Malformed, a_list, an_object, as_ids, matrix, rows_of
from persea.teachers.engines.wire_formats import TOKENS, Dialect, candidates

PROBE = Conversation.ask("What is 17 + 25?").answered(Text("17 + 25 = 42."))
SPELT = "Xin chào, 你好, 17 + 25 = 42.\n"
DRIFT = 0.1  # nats, mean over the probe, that the same weights may differ by: batches and kernels of half precision move a token by .01 to .05


@dataclass(frozen=True)
class Fingerprint:
    """Which model answers. logs: of the probe's learned tokens, rounded; () of a chat route, which tells none."""

    model: str
    logs: tuple[float, ...] = ()

    def refuse_another(self, other: Fingerprint, where: str) -> None:
        """Raises TeacherError where another model answers than did."""
        drift = float(np.abs(np.subtract(self.logs, other.logs)).mean()) if self.logs and len(self.logs) == len(other.logs) else 0.0
        if self.model != other.model or len(self.logs) != len(other.logs) or drift > DRIFT:
            moved = f"its log-probabilities moved by {drift:.2f} nats"
            what = f"{other.model!r} answers, it was {self.model!r}" if self.model != other.model else moved
            raise TeacherError(f"another model is there now: {what}", where=where,
                               remedy="start the server with the model that answered before, or give this run another --out")

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "logs": list(self.logs)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Fingerprint:
        return Fingerprint(str(value["model"]), tuple(float(x) for x in value["logs"]))


def served_model(line: Line, wanted: str) -> str:
    """The model a server has: the wanted one, or its only one. Raises TeacherError where it has not, or has several."""
    def read(said: Any) -> list[str]:
        models = [an_object(m, "a model").get("id") for m in a_list(an_object(said, "the answer").get("data"), "data")]
        if not all(isinstance(m, str) for m in models):
            raise Malformed("a model without a name")
        return [str(m) for m in models]

    models = line.one(Job("/v1/models", None, read))
    if (wanted and wanted not in models) or (not wanted and len(models) != 1):
        raise TeacherError(f"the server has {', '.join(models[:5]) or 'no model'}" + (f", not {wanted}" if wanted else ""),
                           where=f"{line.name}, {line.url}", remedy="name one of them as `served:` of the endpoint")
    return wanted or models[0]


@dataclass(frozen=True, eq=False)
class EndpointEngine:
    """See Engine and Namer. Rows are of kind TOPK_REST: `top` tokens each, named exactly."""

    line: Line
    voice: Voice
    dialect: Dialect
    served: str
    top: int
    sampling: Sampling = GREEDY
    first: list[Fingerprint] = field(default_factory=list)

    @property
    def abilities(self) -> Abilities:
        return Abilities(RowKind.TOPK_REST, self.top)

    def prove(self) -> Fingerprint:
        """The handshake. Raises TeacherError, with the reason, for a server that does not give what is asked of it."""
        own = self.voice.vocabulary.encode(SPELT)
        spelled = self._proven(Job(self.dialect.spelling_path, self.dialect.spelling(self.served, SPELT), self.dialect.spelled))
        if own not in (spelled, spelled[1:]):
            raise TeacherError(f"the server tokenizes {SPELT[:12]!r}... to {spelled[:6]}, the teacher's tokenizer to {own[:6]}",
                               where=f"{self.line.name}, {self.line.url}", remedy="`model:` must name the folder or hub id that the server runs")
        found = self._fingerprint()
        self.first.append(found)
        return found

    def again(self) -> None:
        """Raises TeacherError where another model answers now."""
        self.first[0].refuse_another(self._fingerprint(), f"{self.line.name}, {self.line.url}")

    def _fingerprint(self) -> Fingerprint:
        probe = self.voice.render(PROBE)
        rows = self._proven(self._scored(probe.ids_T, probe.learn_T))
        return Fingerprint(self.served, tuple(round(float(x), 4) for x in rows.realised_N))

    def _proven(self, job: Job[Any]) -> Any:
        try:
            return self.line.one(job)
        except TeacherError as error:
            raise TeacherError(f"the handshake failed: {error.what}", where=error.where,
                               remedy="see docs/engines.md for what each server gives; `protocol: chat` takes words alone") from error

    def generate(self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
                 ) -> list[npt.NDArray[np.int32] | Failed]:
        """See Engine."""
        def job(prompt: npt.NDArray[np.int32]) -> Job[npt.NDArray[np.int32]]:
            body = self.dialect.saying(self.served, prompt.tolist(), stop_ids, max_new_tokens, self.sampling)
            return Job(self.dialect.path, body, lambda events: self._said(events, stop_ids, max_new_tokens), lambda ids: len(prompt) + len(ids),
                       lambda event: bool(self.dialect.said(event)))

        return self._asked([job(p) for p in prompts])

    def _said(self, events: list[Any], stop_ids: Sequence[int], most: int) -> npt.NDArray[np.int32]:
        ids = as_ids(self.dialect.joined(events), len(self.voice.vocabulary), "an answer")
        ended = next((reason for event in events if (reason := self.dialect.ended(event))), "")
        stops = [k for k, i in enumerate(ids) if i in stop_ids]
        if ended not in ("stop", "length") or len(ids) > most or (stops and stops[0] < len(ids) - 1) or (ended == "stop" and not stops):
            raise Malformed(f"{len(ids)} tokens that ended with {ended or 'nothing'!r}, stop tokens at {stops}: asked were {most} at most, "
                            "and the stop token with them")
        return np.array(ids, np.int32)

    def score(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[Any]:
        """Raises TeacherError: a server names the likeliest tokens alone."""
        raise TeacherError("whole distributions are asked of a server, which names the likeliest tokens alone", where=self.line.name,
                           remedy="use `named`")

    def named(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[Rows | Failed]:
        """See Namer."""
        yield from self._asked([self._scored(ids, learned) for ids, learned in zip(sequences, learn, strict=True)])

    def _scored(self, ids_T: npt.NDArray[np.int32], learn_T: npt.NDArray[np.bool_]) -> Job[Rows]:
        def read(said: Any) -> Rows:
            return rows_of(self.dialect.scored(said, ids_T.tolist()), ids_T, learn_T, self.top, len(self.voice.vocabulary))

        return Job(self.dialect.path, self.dialect.scoring(self.served, ids_T.tolist(), self.top), read, lambda rows: len(ids_T))

    def candidates(self, sequences: Sequence[npt.NDArray[np.int32]], wanted: Sequence[npt.NDArray[np.int32]]
                   ) -> list[npt.NDArray[np.float32] | Failed]:
        """Log-probabilities of certain tokens: wanted[s] is [tokens - 1, K], row t for the place of token t + 1, -1 = none (-inf).

        Only with protocol tokens; raises TeacherError elsewhere."""
        if self.dialect is not TOKENS:
            raise TeacherError(f"candidates per position are asked, protocol {self.dialect.name} has none", where=self.line.name,
                               remedy="use `protocol: tokens`")

        def job(ids: npt.NDArray[np.int32], rows: npt.NDArray[np.int32]) -> Job[npt.NDArray[np.float32]]:
            def read(said: Any) -> npt.NDArray[np.float32]:
                answer = an_object(said, "the answer")
                if as_ids(answer.get("prompt_token_ids"), len(self.voice.vocabulary), "prompt_token_ids") != ids.tolist():
                    raise Malformed("the server speaks of other tokens than were asked")
                return matrix(answer.get("prompt_token_id_logprobs"), (rows.shape[0], rows.shape[1]), rows < 0)

            return Job(self.dialect.path, candidates(self.served, ids.tolist(), rows.tolist()), read, lambda found: len(ids))

        return self._asked([job(ids, rows) for ids, rows in zip(sequences, wanted, strict=True)])

    def _asked(self, jobs: Sequence[Job[Any]]) -> list[Any]:
        """Answers of one model: whoever is there before, after, and after every connection that broke, is the one that was."""
        if not jobs:
            return []
        self.again()
        breaks = self.line.breaks
        answers = self.line.ask(jobs)
        if self.line.breaks > breaks:
            self.again()
        return answers
