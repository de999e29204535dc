"""Parse the student's sampled answers: which can be trained on, and their tokens over the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from persea.chat.messages import Conversation, FinishReason, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.config.schema import OnPolicySection
from persea.data.prompts import Prompt
from persea.errors import DataError
from persea.tokenization.tokens import RenderedTokens


@dataclass(frozen=True)
class RolloutPrompt:
    """A prompt, and the name of its teacher."""

    prompt: Prompt
    teacher: str

    @property
    def conversation(self) -> Conversation:
        """The conversation at the prompt's thinking effort; a direct answer if it has none."""
        return replace(self.prompt.conversation, effort=self.prompt.effort or ThinkingEffort.NONE)


@dataclass(frozen=True)
class RolloutAnswer:
    """An answer of the student that can be trained on.

    Attributes:
        rollout_prompt: prompt and teacher.
        tokens: prompt and answer as the student sampled it.
        conversation: the parsed answer.
        finish: how the answer ended.
    """

    rollout_prompt: RolloutPrompt
    tokens: RenderedTokens
    conversation: Conversation
    finish: FinishReason


def has_repetition_loop(
    ids: Sequence[int], min_repeats: int = 4, max_period: int = 64, min_tokens: int = 12
) -> bool:
    """Return whether an answer ends in a loop; a stop token at its end is ignored.

    Such answers are left out because teachers do not correct them: they give the fifth repetition a
    high probability too.

    Args:
        ids: token ids of the answer.
        min_repeats: repetitions in a row that count as a loop.
        max_period: longest repeated stretch, in tokens.
        min_tokens: least tokens of a loop: "ha ha ha ha" is no loop.
    """
    for tail in (ids, ids[:-1]):
        for period in range(1, min(max_period, len(tail) // min_repeats) + 1):
            n = max(period * min_repeats, min_tokens)
            if n <= len(tail) and all(
                tail[-k] == tail[-k - period] for k in range(1, n - period + 1)
            ):
                return True
    return False


def place_sampled_tokens(
    renderer: ChatRenderer,
    conversation: Conversation,
    prompt: RenderedTokens,
    ids: npt.NDArray[np.int32],
) -> RenderedTokens | None:
    """Place the sampled tokens over the bytes of the rendered conversation.

    A tokenizer splits a text in one way; a model that samples may split it in many. The rendering
    gives the bytes, the sampled ids give the tokens.

    Args:
        renderer: the student's renderer.
        conversation: the conversation with the parsed answer.
        prompt: the rendered prompt.
        ids: sampled token ids.

    Returns:
        Prompt tokens and sampled tokens, or None if the tokens cannot be placed: another
        tokenization within markers, or bytes that the template does not write.
    """
    whole, first, stops = (
        renderer.render(conversation),
        len(prompt),
        len(ids) > 0 and int(ids[-1]) in renderer.stop_ids,
    )
    if not np.array_equal(whole.ids_T[:first], prompt.ids_T):
        return None
    last = len(ids) - stops
    # the stop token of the rendering
    end = first + int(np.argmax(np.isin(whole.ids_T[first:], renderer.stop_ids)))
    lengths_W = renderer.vocabulary.lengths_W
    if np.array_equal(whole.ids_T[first:end], ids[:last]):
        starts_T, ends_T = whole.starts_T[first:end], whole.ends_T[first:end]
    else:
        body = slice(first, end)
        is_plain = (whole.starts_T[body] >= 0).all() and (
            whole.ends_T[body] - whole.starts_T[body] == lengths_W[whole.ids_T[body]]
        ).all()
        sampled, rendered = (
            b"".join(renderer.vocabulary.bytes_W[i] or b"\0\0control" for i in side.tolist())
            for side in (ids[:last], whole.ids_T[body])
        )
        if (
            not is_plain
            or sampled != rendered
            or (whole.starts_T[body][1:] != whole.ends_T[body][:-1]).any()
            or last == 0
        ):
            return None
        ends_T = (whole.starts_T[first] + np.cumsum(lengths_W[ids[:last]])).astype(np.int32)
        starts_T = (ends_T - lengths_W[ids[:last]]).astype(np.int32)
    stop = np.full(int(stops), whole.starts_T[end], np.int32)
    loss_mask_T = np.arange(first + len(ids)) >= first
    return RenderedTokens(
        np.concatenate([prompt.ids_T, ids]).astype(np.int32),
        np.concatenate([whole.starts_T[:first], starts_T, stop]),
        np.concatenate([whole.ends_T[:first], ends_T, stop]),
        loss_mask_T,
    )


def parse_rollout(
    rollout_prompt: RolloutPrompt,
    renderer: ChatRenderer,
    ids: npt.NDArray[np.int32],
    config: OnPolicySection,
    max_tokens: int,
) -> RolloutAnswer | str:
    """Parse a sampled answer; return the answer, or the reason why it is left out.

    Reasons: prompt (the student's template cannot write the prompt), malformed (by the student's
    template), length (cut off, and `truncated` is drop, or cut within a character), loop (ends in a
    repetition), placement (the tokens cannot be placed over the bytes), unrenderable (the student's
    template cannot write the answer), too_long (more than max_tokens).
    """
    if not len(ids):
        return "prompt"
    prompt = rollout_prompt.conversation
    parts, finish = renderer.parse(ids.tolist(), prompt.effort, prompt.tools)
    if finish is FinishReason.MALFORMED:
        return "malformed"
    if finish is FinishReason.LENGTH and (config.truncated == "drop" or not parts):
        return "length"
    if has_repetition_loop(
        ids.tolist(), config.min_loop_repeats, config.max_loop_period, config.min_loop_tokens
    ):
        return "loop"
    conversation = prompt.with_answer(*parts)
    try:
        tokens = place_sampled_tokens(renderer, conversation, renderer.render_prompt(prompt), ids)
    except DataError:
        return "unrenderable"
    if tokens is None:
        return "placement"
    return (
        "too_long"
        if len(tokens) > max_tokens
        else RolloutAnswer(rollout_prompt, tokens, conversation, finish)
    )
