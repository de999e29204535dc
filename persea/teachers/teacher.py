"""Teacher: a Family on an Engine. It answers in words and scores in log-probabilities; a student being measured is one too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from persea.chat.messages import ContentPart, Conversation, FinishReason, ThinkingEffort
from persea.tokenization.tokens import RenderedTokens
from persea.chat.renderer import ChatRenderer
from persea.data.prompts import Prompt
from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import DataError, TeacherError
from persea.teachers.engines import ChatEngine, Engine, EngineFailure, SparseEngine

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answer:
    """What a teacher said to a prompt. The conversation ends with the answer; only STOP answers are whole.

    mode  the effort that the prompt was to be asked at; None = the teacher's own
    why   nothing could be got of it, for this reason: REFUSED; without a reason, its template cannot say the prompt, or its server's filter did
          not let it
    """

    prompt_id: str
    teacher: str
    skill: str
    language: str
    conversation: Conversation
    finish: FinishReason
    effort: ThinkingEffort | None = None
    failure_reason: str = ""

    @property
    def text(self) -> str:
        return self.conversation.messages[-1].text

    def to_json(self) -> dict[str, Any]:
        """Without `mode` where there is none: records from before modes were known keep their bytes."""
        told = {
            "prompt_id": self.prompt_id,
            "teacher": self.teacher,
            "skill": self.skill,
            "language": self.language,
            "conversation": self.conversation.to_json(),
            "finish": self.finish.value,
        }
        return told if self.effort is None else told | {"mode": self.effort.value}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Answer:
        return Answer(
            value["prompt_id"],
            value["teacher"],
            value["skill"],
            value["language"],
            Conversation.from_json(value["conversation"]),
            FinishReason(value["finish"]),
            ThinkingEffort(value["mode"]) if "mode" in value else None,
        )


@dataclass(frozen=True, eq=False)
class Teacher:
    """A voice and the engine that runs its weights.

    fingerprint  what makes these weights: digest of a folder, id and revision of a hub model
    context      the most tokens its positions reach; 0 where its configuration says none
    longest      tokens of its longest answer, whatever it is asked for; 0 = as it is asked
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
        """Whether it tells no log-probabilities: its words are all there is."""
        return (
            isinstance(self.engine, SparseEngine)
            and self.engine.capabilities.kind is DistributionKind.TEXT_ONLY
        )

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
        """One answer a prompt, in order, each at its prompt's effort or else at this teacher's, in its own template.

        A prompt that its template or tokenizer cannot say has an empty answer that ends REFUSED: tools, asked of a family without them.
        """
        asked = [self.build_conversation(p) for p in prompts]
        most = self.max_answer_tokens or max_new_tokens
        if isinstance(self.engine, ChatEngine):
            said = self.engine.chat(asked, most)
        else:
            dressed = [self._render_prompt(c) for c in asked]
            heard = iter(
                self.engine.generate(
                    [d for d in dressed if not isinstance(d, EngineFailure)],
                    self.renderer.stop_ids,
                    most,
                )
            )
            said = [
                self._parse_answer(d if isinstance(d, EngineFailure) else next(heard), c)
                for d, c in zip(dressed, asked, strict=True)
            ]
        answers = []
        for prompt, conversation, one in zip(prompts, asked, said, strict=True):
            parts, finish, why = (
                ((), FinishReason.REFUSED, one.reason)
                if isinstance(one, EngineFailure)
                else (*one, "")
            )
            answers.append(
                Answer(
                    prompt.id,
                    self.name,
                    prompt.skill,
                    prompt.language,
                    conversation.with_answer(*parts),
                    finish,
                    prompt.effort,
                    why,
                )
            )
        return answers

    def build_conversation(self, prompt: Prompt) -> Conversation:
        """The prompt as this teacher is asked it."""
        return replace(
            prompt.conversation, effort=self.effort if prompt.effort is None else prompt.effort
        )

    def _render_prompt(self, conversation: Conversation) -> npt.NDArray[np.int32] | EngineFailure:
        try:
            return self.renderer.render_prompt(conversation).ids_T
        except DataError:
            return EngineFailure(
                ""
            )  # nobody's failure: counted as refused where it is measured, quarantined with the reason where it is captured

    def _parse_answer(
        self, ids: npt.NDArray[np.int32] | EngineFailure, conversation: Conversation
    ) -> tuple[tuple[ContentPart, ...], FinishReason] | EngineFailure:
        return (
            ids
            if isinstance(ids, EngineFailure)
            else self.renderer.parse(ids.tolist(), conversation.effort, conversation.tools)
        )

    def can_render(self, conversation: Conversation) -> bool:
        """Whether this voice can say a whole conversation, its answer included."""
        try:
            self.renderer.render(conversation)
        except DataError:
            return False
        return True

    def compute_logprobs(
        self, conversations: Sequence[Conversation]
    ) -> Iterator[tuple[RenderedTokens, torch.Tensor]]:
        """Each conversation's tokens in this voice, and log-probabilities [learned tokens, vocabulary] (see Engine.score)."""
        tokens = [self.renderer.render(c) for c in conversations]
        yield from zip(
            tokens,
            self.engine.compute_logprobs(
                [t.ids_T for t in tokens], [t.loss_mask_T for t in tokens]
            ),
            strict=True,
        )

    def compute_target_logprobs(
        self, conversations: Sequence[Conversation]
    ) -> Iterator[tuple[RenderedTokens, npt.NDArray[np.float32]]]:
        """Each conversation's tokens in this voice, and the log-probability of each learned token, however little else the engine tells.

        Raises TeacherError where it tells none (`is_mute`), or not of this conversation.
        """
        tokens = [self.renderer.render(c) for c in conversations]
        ids, learn = [t.ids_T for t in tokens], [t.loss_mask_T for t in tokens]
        if not isinstance(self.engine, SparseEngine):
            for one, logprobs_NW in zip(
                tokens, self.engine.compute_logprobs(ids, learn), strict=True
            ):
                learned = one.ids_T[one.loss_mask_T]
                yield one, logprobs_NW[np.arange(len(learned)), learned].numpy()
            return
        for one, rows in zip(
            tokens, self.engine.compute_sparse_distributions(ids, learn), strict=True
        ):
            if not isinstance(rows, SparseDistributions) or np.isnan(rows.target_logprob_N).any():
                raise TeacherError(
                    rows.reason
                    if isinstance(rows, EngineFailure)
                    else "it tells no log-probabilities",
                    where=self.name,
                    remedy="docs/engines.md says what each server gives",
                )
            yield one, rows.target_logprob_N
