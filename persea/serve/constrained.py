"""Constrained answers: each token is drawn among those that keep the answer valid JSON.

llguidance turns a JSON schema into the set of allowed tokens after each prefix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError, MissingRequirementError

if TYPE_CHECKING:
    import torch

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(eq=False)
class JsonConstraint:
    """The state of one answer's grammar.

    Attributes:
        matcher: llguidance's matcher.
        stop_ids: Tokens that end an answer; allowed where the JSON is complete.
        eos_id: The stop token that the matcher knows.
    """

    matcher: Any
    stop_ids: tuple[int, ...]
    eos_id: int

    def allow(self, logits_W: torch.Tensor) -> torch.Tensor:
        """Return the logits [W] with -inf at every token that would make the answer invalid."""
        import torch

        allowed_W = np.frombuffer(self.matcher.compute_logit_bias(), np.uint8)[: len(logits_W)] > 0
        allowed_W = allowed_W.copy()
        allowed_W[list(self.stop_ids)] = allowed_W[self.eos_id]
        if not allowed_W.any():  # the grammar is complete, or cannot go on: the answer ends
            allowed_W[self.eos_id] = True
        return logits_W.masked_fill(~torch.from_numpy(allowed_W), float("-inf"))

    def accept(self, token: int) -> None:
        """Advance by a drawn token."""
        if token not in self.stop_ids and not self.matcher.is_stopped():
            self.matcher.consume_token(token)


@dataclass(frozen=True, eq=False)
class ConstraintFactory:
    """Makes constraints for one model.

    Attributes:
        renderer: The model's chat renderer.
    """

    renderer: ChatRenderer

    def make(self, schema: Mapping[str, Any], conversation: Conversation) -> JsonConstraint:
        """Return the constraint of an answer to a conversation.

        Args:
            schema: JSON schema of the answer.
            conversation: The conversation that is answered.

        Raises:
            DataError: The schema is none, or the model's answers do not begin with their text, such
                as those of gpt-oss, whose channels come first.
            MissingRequirementError: llguidance is missing.
        """
        self._refuse_other_beginning(conversation)
        from llguidance import LLMatcher

        tokenizer = self._tokenizer
        try:
            # compact: a small model would write white space until its tokens are used up
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_flexible": False}
            )
            matcher = LLMatcher(tokenizer, grammar)
        except ValueError as error:
            raise _bad_schema(str(error)) from error
        if problem := matcher.get_error():
            raise _bad_schema(problem)
        stop_ids = self.renderer.stop_ids
        return JsonConstraint(matcher, tuple(stop_ids), stop_ids[0])

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise MissingRequirementError(
                "response_format needs llguidance",
                where="response_format",
                remedy="pip install 'persea[serve]'",
            ) from error
        return LLTokenizer(TokenizerWrapper(_TokenBytes(self.renderer)))

    def _refuse_other_beginning(self, conversation: Conversation) -> None:
        assert self._tokenizer  # says first that the package is missing
        tokens = self.renderer.render(conversation.with_answer(Text("{}")))
        answer: npt.NDArray[np.int32] = tokens.starts_T[tokens.loss_mask_T]
        if answer[0] < 0:
            raise DataError(
                "this model's answers begin with control tokens, which no schema allows",
                where="response_format",
                remedy="leave it out, and ask for JSON in the prompt",
            )


class _TokenBytes:
    """A tokenizer as llguidance reads it: the bytes of each token, and which are control tokens."""

    def __init__(self, renderer: ChatRenderer) -> None:
        vocabulary = renderer.vocabulary
        control = {i for i in vocabulary.control_token_ids.values() if i < len(vocabulary)}
        names = {i: name for name, i in vocabulary.control_token_ids.items()}
        self.eos_token_id = renderer.stop_ids[0]
        self.bos_token_id = None
        # 0xff marks a control token for llguidance: no text contains that byte
        self.tokens = [
            b"\xff" + names.get(i, f"<{i}>").encode() if i in control or value is None else value
            for i, value in enumerate(vocabulary.bytes_W)
        ]
        self.special_token_ids = sorted(control)
        self._encode = vocabulary.encode

    def __call__(self, text: bytes | str) -> Sequence[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return list(map(int, self._encode(text)))


def _bad_schema(problem: str) -> DataError:
    return DataError(
        f"no schema that an answer can follow: {problem.splitlines()[0]}",
        where="response_format.json_schema.schema",
        remedy="send a JSON schema; https://github.com/guidance-ai/llguidance lists what it knows",
    )
