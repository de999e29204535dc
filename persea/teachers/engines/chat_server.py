"""A teacher behind a chat route: conversations in, words out. Its distributions stay unknown, so it teaches by its words alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.chat.families.tool_format import as_functions, as_messages
from persea.chat.messages import Conversation, Effort, Finish, Part, Text, Thinking, ToolCall
from persea.distributions import RowKind, Rows, word_rows
from persea.errors import TeacherError
from persea.teachers.engines import GREEDY, Abilities, Failed, Sampling
from persea.teachers.engines.http_client import Job, Line
from persea.teachers.engines.response_validation import Malformed, a_list, an_object
from persea.teachers.engines.token_server import Fingerprint
from persea.teachers.engines.wire_formats import choice

ENDED = {"stop": Finish.STOP, "tool_calls": Finish.STOP, "length": Finish.LENGTH, "content_filter": Finish.REFUSED, "malformed": Finish.MALFORMED}


@dataclass(frozen=True, eq=False)
class TalkEngine:
    """See Talker and Namer (rows of kind WORDS).

    dial  whether the effort is sent as `reasoning_effort` and `chat_template_kwargs`; servers that know neither refuse them
    effort  the handshake's
    """

    line: Line
    served: str
    sampling: Sampling = GREEDY
    dial: bool = False
    effort: Effort = Effort.NONE
    first: list[Fingerprint] = field(default_factory=list)

    @property
    def abilities(self) -> Abilities:
        return Abilities(RowKind.WORDS)

    def prove(self) -> Fingerprint:
        """The handshake: a word is said, and by whom. Raises TeacherError where none is."""
        found = self._fingerprint()
        self.first.append(found)
        return found

    def again(self) -> None:
        """Raises TeacherError where another model answers now."""
        self.first[0].refuse_another(self._fingerprint(), f"{self.line.name}, {self.line.url}")

    def _fingerprint(self) -> Fingerprint:
        body = self._body(Conversation.ask("Hi", effort=self.effort), 1) | {"stream": False}
        try:
            return Fingerprint(self.line.one(Job("/v1/chat/completions", body, self._model)))
        except TeacherError as error:
            raise TeacherError(f"the handshake failed: {error.what}", where=error.where, remedy="see docs/engines.md") from error

    def _model(self, said: Any) -> str:
        model = an_object(said, "the answer").get("model")
        if not isinstance(model, str) or not model:
            raise Malformed("the answer does not say which model gave it")
        an_object(choice(said).get("message"), "message")
        return model

    def say(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[tuple[tuple[Part, ...], Finish] | Failed]:
        """See Talker."""
        if not conversations:
            return []
        breaks = self.line.breaks
        self.again()
        jobs = [Job("/v1/chat/completions", self._body(c, max_new_tokens) | {"stream": True, "stream_options": {"include_usage": True}},
                    lambda events, c=c: self._read(events, c), _cost, _brings) for c in conversations]  # type: ignore[misc]
        answers = self.line.ask(jobs)
        if self.line.breaks > breaks:
            self.again()
        return [a if isinstance(a, Failed) else a[:2] for a in answers]

    def _body(self, conversation: Conversation, most: int) -> dict[str, Any]:
        messages = as_messages(conversation)
        for said in messages:
            for call in said.get("tool_calls", ()):  # templates take an object, this route its text
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        body: dict[str, Any] = {"model": self.served, "messages": messages, "max_tokens": most, "temperature": self.sampling.temperature}
        if self.sampling.temperature:
            body |= {"top_p": self.sampling.top_p, "seed": self.sampling.seed}
        if conversation.tools:
            body["tools"] = as_functions(conversation.tools)
        if self.dial:
            body["chat_template_kwargs"] = {"enable_thinking": conversation.effort is not Effort.NONE}
            if conversation.effort is not Effort.NONE:
                body["reasoning_effort"] = conversation.effort.value
        return body

    def _read(self, events: list[Any], conversation: Conversation) -> tuple[tuple[Part, ...], Finish, int]:
        """The answer of a stream: thought, words and calls put together, how it ended, and the tokens it cost."""
        texts = {"reasoning_content": "", "content": ""}
        calls: dict[int, dict[str, str]] = {}
        ended, cost = "", 0
        for event in events:
            known = self.first[0].model if self.first else self.served
            if an_object(event, "an event").get("model") != known:
                raise Malformed(f"an answer of {event.get('model')!r}, asked was {known!r}")
            usage = event.get("usage")
            if isinstance(usage, dict) and type(usage.get("total_tokens")) is int:
                cost = usage["total_tokens"]
            told = choice(event)
            delta = an_object(told.get("delta") or {}, "delta")
            for key, other in (("reasoning_content", "reasoning"), ("content", "content")):
                more = delta.get(key) or delta.get(other) or ""
                if not isinstance(more, str):
                    raise Malformed(f"{key} is no text")
                texts[key] += more
            for call in a_list(delta.get("tool_calls") or [], "tool_calls"):
                _add(calls, call)
            ended = ended or str(told.get("finish_reason") or "")
        if ended not in ENDED:
            raise Malformed(f"the answer ended with {ended or 'nothing'!r}")
        if self.line.manners.budget and not cost:
            raise Malformed("the server does not say how many tokens it took, and its endpoint has a budget")
        if "\ufffd" in texts["content"] + texts["reasoning_content"]:
            raise Malformed("half characters: the server decodes token by token, and bytes are lost")
        parts = tuple(make(texts[key]) for key, make in (("reasoning_content", Thinking), ("content", Text)) if texts[key])
        read = tuple(ToolCall.read(c["name"], c["arguments"] or "{}") for _, c in sorted(calls.items()))
        spoken = tuple(c for c in read if c is not None)
        finish = ENDED[ended] if len(spoken) == len(read) else Finish.MALFORMED
        return (*parts, *spoken) or (Text(""),), finish, cost

    def generate(self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
                 ) -> list[npt.NDArray[np.int32] | Failed]:
        """Raises TeacherError: a chat route takes no token ids."""
        raise TeacherError("a chat route takes no token ids", where=self.line.name, remedy="use `say`")

    def score(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[Any]:
        """Raises TeacherError: a chat route tells no distribution of given words."""
        raise TeacherError("log-probabilities are asked of a chat route, which has none of given words", where=self.line.name,
                           remedy="use a server with prompt log-probabilities: docs/engines.md")

    def named(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[Rows | Failed]:
        """See Namer."""
        yield from (word_rows(int(learned.sum())) for learned in learn)


def _brings(event: Any) -> bool:
    """Whether an event brings some of the answer; a role alone, or a sign of life, is none."""
    delta = choice(event).get("delta")
    return isinstance(delta, dict) and any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _cost(answer: tuple[tuple[Part, ...], Finish, int]) -> int:
    return answer[2]


def _add(calls: dict[int, dict[str, str]], told: Any) -> None:
    """A piece of a call, by its index."""
    told = an_object(told, "a tool call")
    index, function = told.get("index", 0), an_object(told.get("function") or {}, "function")
    if type(index) is not int:
        raise Malformed("a tool call without its index")
    call = calls.setdefault(index, {"name": "", "arguments": ""})
    for key in call:
        more = function.get(key) or ""
        if not isinstance(more, str):
            raise Malformed(f"a tool call's {key} is no text")
        call[key] += more
