"""Teacher: a chat renderer and an engine that answer prompts and score text.

An evaluated student is a `Teacher` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from persea.chat.messages import ContentPart, Conversation, FinishReason, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.data.prompts import Prompt
from persea.distributions import SparseDistributions
from persea.errors import DataError, TeacherError
from persea.teachers.engines import Engine, EngineFailure, GeneratedTokens, Reducer
from persea.tokenization.tokens import RenderedTokens

if TYPE_CHECKING:
    import torch

    from persea.distributions.blocks import BlockedLogits


IdArray: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Answer:
    """A teacher's answer to a prompt.

    Attributes:
        prompt_id: Id of the prompt.
        teacher: Name of the teacher.
        skill: Skill of the prompt.
        language: Language of the prompt.
        conversation: The prompt, ending with the answer.
        finish: How the answer ended; only STOP answers are complete.
        effort: Thinking effort that the prompt requested; None for the teacher's own.
        failure_reason: Why there is no answer, for finish REFUSED. Empty where the teacher's
            template cannot render the prompt or a server's content filter refused it.
        given: Whether the prompt brought the answer, and the teacher only scored it.
        prompt_ids_T: Token ids of the prompt that the answer was generated from; None if the
            answer came another way. Not stored.
        generated: The tokens that were generated, with their distributions if those were wanted.
            Not stored.
    """

    prompt_id: str
    teacher: str
    skill: str
    language: str
    conversation: Conversation
    finish: FinishReason
    effort: ThinkingEffort | None = None
    failure_reason: str = ""
    given: bool = False
    prompt_ids_T: npt.NDArray[np.int32] | None = field(default=None, compare=False, repr=False)
    generated: GeneratedTokens | None = field(default=None, compare=False, repr=False)

    @property
    def text(self) -> str:
        """Text of the answer, without its thinking."""
        return self.conversation.messages[-1].text

    @property
    def is_own(self) -> bool:
        """Whether the teacher wrote the text itself: no given answer and no document."""
        return not self.given and not self.conversation.is_document

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON. Keys without a value are absent, as in older caches."""
        value = {
            "prompt_id": self.prompt_id,
            "teacher": self.teacher,
            "skill": self.skill,
            "language": self.language,
            "conversation": self.conversation.to_json(),
            "finish": self.finish.value,
        }
        return (
            value
            | ({} if self.effort is None else {"mode": self.effort.value})
            | ({"given": True} if self.given else {})
        )

    @staticmethod
    def from_json(value: dict[str, Any]) -> Answer:
        """Read the result of `to_json`."""
        return Answer(
            value["prompt_id"],
            value["teacher"],
            value["skill"],
            value["language"],
            Conversation.from_json(value["conversation"]),
            FinishReason(value["finish"]),
            ThinkingEffort(value["mode"]) if "mode" in value else None,
            given=value.get("given", False),
        )


@dataclass(frozen=True, eq=False)
class _Renumbered:
    """A reducer whose sequences are some of another's: number k is number `of_K[k]` there."""

    reducer: Reducer
    of_K: npt.NDArray[np.int64]

    def reduce(
        self,
        blocks: BlockedLogits,
        index_N: npt.NDArray[np.int64],
        row_N: npt.NDArray[np.int64],
        target_N: npt.NDArray[np.int64],
    ) -> SparseDistributions:
        return self.reducer.reduce(blocks, self.of_K[index_N], row_N, target_N)


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model that answers and scores.

    Attributes:
        name: Name in reports.
        renderer: Its tokenizer and chat template.
        engine: Runs its weights.
        effort: Thinking effort of prompts that request none.
        fingerprint: Identifies the weights: digest of a folder, or id and revision on the hub.
        max_context_tokens: Positions of the model; 0 if its configuration has none.
        max_answer_tokens: Longest answer, overriding the caller's limit; 0 = the caller's.
    """

    name: str
    renderer: ChatRenderer
    engine: Engine
    effort: ThinkingEffort = ThinkingEffort.NONE
    fingerprint: str = ""
    max_context_tokens: int = 0
    max_answer_tokens: int = 0

    @property
    def is_text_only(self) -> bool:
        """Whether the engine returns no log-probabilities."""
        return self.engine.capabilities.is_text_only

    def reporting(self, on_progress: Callable[[float], None]) -> Teacher:
        """Return this teacher; it calls `on_progress` with the done share of each `answer`."""
        reporting = getattr(self.engine, "reporting", None)  # an engine of yours may have none
        return self if reporting is None else replace(self, engine=reporting(on_progress))

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, reducer: Reducer | None = None
    ) -> list[Answer]:
        """Answer prompts, each at its own thinking effort or else at the teacher's.

        Args:
            prompts: Questions; a prompt that the template cannot render gets an empty answer with
                finish REFUSED, such as tools for a family without tools.
            max_new_tokens: Longest answer, in the teacher's tokens.
            reducer: Reduces the distributions of generated tokens, for engines that have them
                while they generate; its sequences are numbered as the prompts.

        Returns:
            One answer per prompt, in order.
        """
        conversations = [self.build_conversation(p) for p in prompts]
        limit = self.max_answer_tokens or max_new_tokens
        generated: list[tuple[IdArray, GeneratedTokens] | None] = [None] * len(prompts)
        if self.engine.capabilities.takes_token_ids:
            found = self._generate(conversations, limit, reducer)
            generated = [one if isinstance(one, tuple) else None for one in found]
            results = [
                one
                if isinstance(one, EngineFailure)
                else self._parse_answer(one[1].ids_T, conversation)
                for one, conversation in zip(found, conversations, strict=True)
            ]
        else:
            results = list(self.engine.chat(conversations, limit))
        answers = []
        for prompt, conversation, result, tokens in zip(
            prompts, conversations, results, generated, strict=True
        ):
            parts: tuple[ContentPart, ...] = ()
            finish, reason = FinishReason.REFUSED, ""
            if isinstance(result, EngineFailure):
                reason = result.reason
            else:
                parts, finish = result
            answers.append(
                Answer(
                    prompt.id,
                    self.name,
                    prompt.skill,
                    prompt.language,
                    conversation.with_answer(*parts),
                    finish,
                    prompt.effort,
                    reason,
                    False,
                    *(tokens or (None, None)),
                )
            )
        return answers

    def _generate(
        self,
        conversations: Sequence[Conversation],
        max_new_tokens: int,
        reducer: Reducer | None,
    ) -> list[tuple[IdArray, GeneratedTokens] | EngineFailure]:
        """Render the prompts and generate token ids; returns prompt and answer of each."""
        rendered = [self._render_prompt(c) for c in conversations]
        at = [k for k, ids in enumerate(rendered) if not isinstance(ids, EngineFailure)]
        prompts = [ids for ids in rendered if not isinstance(ids, EngineFailure)]
        generated: Sequence[GeneratedTokens | EngineFailure]
        if reducer is None:
            generated = [
                ids if isinstance(ids, EngineFailure) else GeneratedTokens(ids)
                for ids in self.engine.generate(prompts, self.renderer.stop_ids, max_new_tokens)
            ]
        else:
            generated = self.engine.generate_with_distributions(
                prompts,
                self.renderer.stop_ids,
                max_new_tokens,
                reducer if len(at) == len(rendered) else _Renumbered(reducer, np.array(at)),
            )
        results: list[tuple[IdArray, GeneratedTokens] | EngineFailure] = [
            ids if isinstance(ids, EngineFailure) else (ids, GeneratedTokens(ids))
            for ids in rendered
        ]
        for k, prompt, one in zip(at, prompts, generated, strict=True):
            results[k] = one if isinstance(one, EngineFailure) else (prompt, one)
        return results

    def build_conversation(self, prompt: Prompt) -> Conversation:
        """Return a prompt's conversation at the effort that this teacher is asked at."""
        return replace(
            prompt.conversation, effort=self.effort if prompt.effort is None else prompt.effort
        )

    def _render_prompt(self, conversation: Conversation) -> npt.NDArray[np.int32] | EngineFailure:
        """Render a prompt. A failure here has no reason: neither the server nor the model failed.

        Evaluation counts such a prompt as refused; capture quarantines it with its own reason.
        """
        try:
            return self.renderer.render_prompt(conversation).ids_T
        except DataError:
            return EngineFailure("")

    def _parse_answer(
        self, ids_T: IdArray, conversation: Conversation
    ) -> tuple[tuple[ContentPart, ...], FinishReason]:
        return self.renderer.parse(ids_T.tolist(), conversation.effort, conversation.tools)

    def can_render(self, conversation: Conversation) -> bool:
        """Return whether this teacher's template can render a conversation with its answer."""
        try:
            self.renderer.render(conversation)
        except DataError:
            return False
        return True

    def compute_logprobs(
        self, conversations: Sequence[Conversation]
    ) -> Iterator[tuple[RenderedTokens, torch.Tensor]]:
        """Render conversations and compute full distributions of their supervised tokens.

        Yields:
            The tokens, and natural-log probabilities, float32 [N, W] (see
            Engine.compute_logprobs).
        """
        tokens = [self.renderer.render(c) for c in conversations]
        ids, loss_masks = [t.ids_T for t in tokens], [t.loss_mask_T for t in tokens]
        yield from zip(tokens, self.engine.compute_logprobs(ids, loss_masks), strict=True)

    def compute_target_logprobs(
        self, conversations: Sequence[Conversation]
    ) -> Iterator[tuple[RenderedTokens, npt.NDArray[np.float32]]]:
        """Render conversations and compute the log-probability of each supervised token.

        Works with every engine that returns log-probabilities at all.

        Yields:
            The tokens, and natural-log probabilities, float32 [N].

        Raises:
            TeacherError: The engine returns none (`is_text_only`), or failed on a conversation.
        """
        tokens = [self.renderer.render(c) for c in conversations]
        ids, loss_masks = [t.ids_T for t in tokens], [t.loss_mask_T for t in tokens]
        yield from zip(tokens, self.score_token_ids(ids, loss_masks), strict=True)

    def score_token_ids(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Compute the log-probability of each token in the mask, without any template.

        Args:
            sequences: Token ids, int32 [T] each.
            loss_masks: True for the tokens to score, bool [T] each; never the first.

        Yields:
            Natural-log probabilities, float32 [N].

        Raises:
            TeacherError: The engine returns none (`is_text_only`), or failed on a sequence.
        """
        if self.engine.capabilities.has_full_distributions:
            yield from self._score_with_full_distributions(sequences, loss_masks)
            return
        for result in self.engine.compute_sparse_distributions(sequences, loss_masks):
            if (
                not isinstance(result, SparseDistributions)
                or np.isnan(result.target_logprob_N).any()
            ):
                raise TeacherError(
                    result.reason
                    if isinstance(result, EngineFailure)
                    else "its engine returns no log-probabilities",
                    where=self.name,
                    remedy="docs/engines.md lists what each engine supports",
                )
            yield result.target_logprob_N

    def _score_with_full_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Keep one number of each row: the rows of a long text do not fit into memory together."""
        targets = [ids_T[mask_T] for ids_T, mask_T in zip(sequences, loss_masks, strict=True)]
        pieces: dict[int, list[npt.NDArray[np.float32]]] = {}
        done = 0
        for index, logprobs_NW in self.engine.iter_logprobs(sequences, loss_masks):
            mine = pieces.setdefault(index, [])
            begin = sum(map(len, mine))
            target_N = targets[index][begin : begin + len(logprobs_NW)]
            mine.append(logprobs_NW[np.arange(len(target_N)), target_N].numpy())
            while done in pieces and sum(map(len, pieces[done])) == len(targets[done]):
                yield np.concatenate(pieces.pop(done))
                done += 1
