"""Engine for a transformers model in this process: batched generation and full distributions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from persea.distributions import DistributionKind
from persea.errors import TeacherError
from persea.teachers.engines import (
    GREEDY,
    Engine,
    EngineCapabilities,
    EngineOptions,
    Sampling,
)

# Logits of one forward pass, 256 MiB in float32: one Gemma sequence (262k tokens) has room for 256
# positions. Another value moves results in their last digits only.
MAX_LOGIT_ELEMENTS_PER_FORWARD = 1 << 26
LOCAL_CAPABILITIES = EngineCapabilities(DistributionKind.FULL, has_local_model=True)
BROKEN_WEIGHTS_REMEDY = "the weights are broken, or need another dtype"


@dataclass(frozen=True, eq=False)
class TransformersEngine(Engine):
    """A causal language model in this process.

    Attributes:
        model: The model.
        vocab_size: Number of token ids of the tokenizer. Logits past it are padding of the
            embedding matrix and are cut off.
        batch_size: Sequences in one forward pass.
        sampling: How `generate` draws answers.
        on_progress: Called with the share of a `generate` that is done, after each token.
    """

    model: PreTrainedModel
    vocab_size: int
    batch_size: int = 64
    sampling: Sampling = GREEDY
    on_progress: Callable[[float], None] = lambda share: None

    def reporting(self, on_progress: Callable[[float], None]) -> TransformersEngine:
        """Return this engine with another `on_progress`. See Engine."""
        return replace(self, on_progress=on_progress)

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of this engine."""
        return LOCAL_CAPABILITIES

    @property
    def max_context_tokens(self) -> int:
        """Number of positions of the model; 0 if its configuration has none."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or 0

    @torch.no_grad()  # not inference_mode: a student generates between two training steps
    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[npt.NDArray[np.int32]]:
        """Generate one answer per prompt, batched by length, left padded. See Engine.

        With a temperature, answers are drawn one by one, so that each depends on its prompt and
        the seed only.
        """
        if self.sampling.temperature:
            drawn = []
            for prompt in prompts:
                ids = list(self.stream(prompt, stop_ids, max_new_tokens, self.sampling))
                drawn.append(np.array(ids, np.int32))
                self.on_progress(len(drawn) / len(prompts))
            return drawn
        return self.generate_rollouts(prompts, stop_ids, max_new_tokens, temperature=0.0, seed=0)

    @torch.no_grad()
    def generate_rollouts(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float,
        seed: int,
    ) -> list[npt.NDArray[np.int32]]:
        """Generate one answer per prompt, drawing a whole batch at once.

        Args:
            prompts: Token ids, int32 [T] each.
            stop_ids: Tokens that end an answer.
            max_new_tokens: Longest answer, in tokens.
            temperature: 0 takes the most likely token. Above 0: samples from
                softmax(logits / temperature), without top-k or top-p.
            seed: The same seed, prompts and batch size draw the same answers. The global random
                state of torch is not changed.

        Returns:
            Generated ids, up to and including the stop token.

        Raises:
            TeacherError: Logits are not finite.
        """
        answers: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        device = self.model.device
        config = self._generation_config(stop_ids, max_new_tokens, temperature)
        with _default_generation_config(self.model):
            for begin in range(0, len(order), self.batch_size):
                chosen = order[begin : begin + self.batch_size]
                watched = (begin, len(chosen), len(order), max_new_tokens)
                width = max(len(prompts[i]) for i in chosen)
                ids_BT = torch.full((len(chosen), width), stop_ids[0])
                mask_BT = torch.zeros_like(ids_BT)
                for row, i in enumerate(chosen):
                    ids_BT[row, width - len(prompts[i]) :] = torch.from_numpy(prompts[i])
                    mask_BT[row, width - len(prompts[i]) :] = 1
                with torch.random.fork_rng([device] if device.type != "cpu" else []):
                    torch.manual_seed(seed + begin)
                    output = self.model.generate(  # type: ignore[operator]
                        input_ids=ids_BT.to(device),
                        attention_mask=mask_BT.to(device),
                        generation_config=config,
                        logits_processor=LogitsProcessorList([self._watch_tokens(watched)]),
                    )
                for row, i in enumerate(chosen):
                    answers[i] = _truncate_after_stop(
                        output[row, width:].cpu().numpy().astype(np.int32), stop_ids
                    )
        return answers

    def _watch_tokens(
        self, batch: tuple[int, int, int, int]
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return a processor of logits that changes none: it refuses and reports.

        Args:
            batch: Prompts before this batch, in it, and of all batches; longest answer.
        """
        before, num_prompts, num_all, max_new_tokens = batch
        done = 0

        def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            nonlocal done
            done += 1
            self.on_progress((before + num_prompts * min(1.0, done / max_new_tokens)) / num_all)
            require_finite_logits(scores)
            return scores

        return watch

    def _generation_config(
        self, stop_ids: Sequence[int], max_new_tokens: int, temperature: float
    ) -> GenerationConfig:
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(  # type: ignore[no-untyped-call]
            **sampling,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            suppress_tokens=list(range(self.vocab_size, self._logits_width())) or None,
        )

    def compute_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[torch.Tensor]:
        """Compute the distributions of each sequence's supervised tokens. See Engine."""
        blocks: dict[int, list[torch.Tensor]] = {}
        done = 0
        for index, rows_NW in self.iter_logprobs(sequences, loss_masks):
            blocks.setdefault(index, []).append(rows_NW)
            while done in blocks and sum(map(len, blocks[done])) == int(loss_masks[done].sum()):
                yield torch.cat(blocks.pop(done))
                done += 1

    @torch.inference_mode()
    def iter_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Compute distributions in blocks of rows, teacher-forced. See Engine.

        Sequences keep their order and are right padded; a batch holds as many as
        MAX_LOGIT_ELEMENTS_PER_FORWARD allows. A sequence that exceeds it alone is computed in
        pieces with a KV cache.
        """
        begin = 0
        while begin < len(sequences):
            end, width = begin, 0
            while end < len(sequences) and end - begin < self.batch_size:
                new_width = max(width, len(sequences[end]))
                num_elements = new_width * (end - begin + 1) * self._logits_width()
                if end > begin and num_elements > MAX_LOGIT_ELEMENTS_PER_FORWARD:
                    break
                end, width = end + 1, new_width
            ids_BT = torch.zeros((end - begin, width), dtype=torch.int64, device=self.model.device)
            mask_BT = torch.zeros_like(ids_BT)
            for row, sequence in enumerate(sequences[begin:end]):
                ids_BT[row, : len(sequence)] = torch.from_numpy(sequence)
                mask_BT[row, : len(sequence)] = 1
            for first, logits in self._iter_logits(ids_BT, mask_BT):
                for row, loss_mask_T in enumerate(loss_masks[begin:end]):
                    at = np.flatnonzero(loss_mask_T) - 1 - first
                    here = torch.from_numpy(at[(at >= 0) & (at < logits.shape[1])])
                    if len(here) or (first == 0 and not len(at)):
                        yield (
                            begin + row,
                            self._to_logprobs(logits[row, here], f"sequence {begin + row}"),
                        )
            begin = end

    def stream(
        self,
        prompt: npt.NDArray[np.int32],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> Iterator[int]:
        """Generate the answer to one prompt token by token; the same tokens as `generate`.

        Closing the iterator stops generation.
        """
        generator = seeded_generator(prompt, sampling)
        ids = torch.from_numpy(np.asarray(prompt, np.int64))[None].to(self.model.device)
        past = None
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                output = self.model(
                    input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1
                )
                past = output.past_key_values
                logits_W = output.logits[0, -1, : self.vocab_size].float()
                require_finite_logits(logits_W)
                token = sample_token(logits_W.cpu(), sampling, generator)
                ids = torch.tensor([[token]], device=self.model.device)
            yield token
            if token in stop_ids:
                return

    def _iter_logits(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the logits of one batch: (first position, [B, some positions, matrix rows])."""
        width = ids_BT.shape[1]
        step = max(1, MAX_LOGIT_ELEMENTS_PER_FORWARD // (len(ids_BT) * self._logits_width()))
        if width <= step:
            yield 0, self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            return
        past = None
        for first in range(0, width, step):
            end = min(first + step, width)
            output = self.model(
                input_ids=ids_BT[:, first:end],
                attention_mask=mask_BT[:, :end],
                past_key_values=past,
                use_cache=True,
            )
            past = output.past_key_values
            yield first, output.logits

    def _to_logprobs(self, logits_NW: torch.Tensor, where: str) -> torch.Tensor:
        logprobs_NW = torch.log_softmax(logits_NW[:, : self.vocab_size].float(), dim=-1)
        if not torch.isfinite(logprobs_NW).all():
            raise TeacherError(
                "log-probabilities that are not finite", where=where, remedy=BROKEN_WEIGHTS_REMEDY
            )
        return logprobs_NW.cpu()

    def _logits_width(self) -> int:
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return int(head.weight.shape[0])


@contextmanager
def _default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's own generation config aside; it is restored also after an exception.

    Otherwise a repetition penalty of the model would be added to the settings of a call. The
    config must come back because a student is saved with it.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def seeded_generator(prompt: npt.NDArray[np.int32], sampling: Sampling) -> torch.Generator:
    """Return the random generator of one answer, decided by the seed and the prompt."""
    seed = f"{sampling.seed} ".encode() + np.asarray(prompt, np.int32).tobytes()
    digest = hashlib.sha256(seed).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_token(logits_W: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Take the most likely token, or sample from the fewest that reach `top_p` together."""
    if not sampling.temperature:
        return int(logits_W.argmax())
    prob_K, id_K = torch.softmax(logits_W.double() / sampling.temperature, -1).sort(descending=True)
    prob_K[prob_K.cumsum(0) - prob_K >= sampling.top_p] = 0
    return int(id_K[torch.multinomial(prob_K, 1, generator=generator)])


def require_finite_logits(scores: torch.Tensor) -> None:
    """Check that each row of logits has a finite maximum: the argmax of NaN is no answer.

    -inf is allowed, since suppressed tokens have it, but not in a whole row.

    Raises:
        TeacherError: A row has NaN or infinity, or -inf alone.
    """
    if not ((scores < float("inf")).all() and torch.isfinite(scores.amax(dim=-1)).all()):
        raise TeacherError(
            "logits that are not finite", where="generate", remedy=BROKEN_WEIGHTS_REMEDY
        )


def _truncate_after_stop(
    ids_T: npt.NDArray[np.int32], stop_ids: Sequence[int]
) -> npt.NDArray[np.int32]:
    """Cut the padding that `generate` adds after the first stop token."""
    stops = np.flatnonzero(np.isin(ids_T, stop_ids))
    return ids_T[: stops[0] + 1] if len(stops) else ids_T


def open_engine(name: str, options: EngineOptions) -> TransformersEngine:
    """Load a model in this process. See EngineSpec."""
    from persea.models.loading import load_model

    assert options.source is not None
    return TransformersEngine(
        load_model(options.source, options.renderer, options.teacher_name),
        len(options.renderer.vocabulary),
        options.batch_size,
        options.sampling,
    )
