"""Engine for a transformers model in this process: batched generation and full distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from persea.distributions import DistributionKind, SparseDistributions
from persea.distributions.blocks import BlockedLogits, LogitBuffer, blocks_of_logits
from persea.distributions.lm_head import LMHead
from persea.distributions.sparse import slice_distributions
from persea.errors import RefusedError, TeacherError
from persea.models.cached_states import cache_input, cache_of, find_cache_use
from persea.models.hidden_states import LogitScaling, find_logit_scaling, run_without_head
from persea.teachers.engines import (
    GREEDY,
    Engine,
    EngineCapabilities,
    EngineFailure,
    EngineOptions,
    GeneratedTokens,
    Reducer,
    Sampling,
)
from persea.teachers.engines.batched_answers import generate_batched
from persea.teachers.engines.token_sampling import (
    BROKEN_WEIGHTS_REMEDY,
    require_finite_logits,
    sample_token,
    seeded_generator,
)

# Bytes of logits that exist at once. More positions at once make a head of 262k tokens faster in
# bfloat16 (512 take little longer than 256), but not in float32. Another value moves results in
# their last digits only.
MAX_LOGIT_BYTES = {"cpu": 1 << 28}
MAX_LOGIT_BYTES_ELSEWHERE = 1 << 29
MAX_TOKENS_PER_FORWARD = 2048  # padding included; a longer sequence is computed in pieces
LOCAL_CAPABILITIES = EngineCapabilities(DistributionKind.FULL, has_local_model=True)


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
        free_buffers: Memory of logits on a CPU that no call uses now.
    """

    model: PreTrainedModel
    vocab_size: int
    batch_size: int = 64
    sampling: Sampling = GREEDY
    on_progress: Callable[[float], None] = lambda share: None
    free_buffers: list[LogitBuffer] = field(default_factory=list, repr=False)

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
        """Generate one answer per prompt, in a continuous batch. See Engine.

        Each answer depends on its prompt and the seed only.
        """
        return [one.ids_T for one in self._generate(prompts, stop_ids, max_new_tokens, None)]

    @torch.no_grad()
    def generate_with_distributions(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        reducer: Reducer,
    ) -> list[GeneratedTokens]:
        """Generate as `generate` does, and keep the distributions. See Engine."""
        return self._generate(prompts, stop_ids, max_new_tokens, reducer)

    def _generate(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        reducer: Reducer | None,
    ) -> list[GeneratedTokens]:
        batched = generate_batched(self, prompts, stop_ids, max_new_tokens, reducer)
        if batched is not None:
            return batched
        # The cache of a state-space model cannot be joined: transformers generates whole batches.
        # Answers with a temperature, and those of a model without right steps, come one by one.
        has_steps = find_cache_use(self.model, self.vocab_size).steps
        if has_steps and not self.sampling.temperature:
            answers = self.generate_rollouts(
                prompts, stop_ids, max_new_tokens, temperature=0.0, seed=0
            )
            return [GeneratedTokens(ids_T) for ids_T in answers]
        drawn = []
        for prompt in prompts:
            ids = list(self.stream(prompt, stop_ids, max_new_tokens, self.sampling))
            drawn.append(GeneratedTokens(np.array(ids, np.int32)))
            self.on_progress(len(drawn) / len(prompts))
        return drawn

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

        Sequences keep their order. The head runs at supervised positions only.
        """
        for blocks, index_N, _ in self._iter_blocks(sequences, loss_masks, range(len(sequences))):
            logprobs_NW = blocks.logits_NW[:, : self.vocab_size].float()
            logprobs_NW -= blocks.log_total_N[:, None].float()
            for index, begin, end in _runs(index_N):
                yield index, logprobs_NW[begin:end].cpu()
        for index, mask_T in enumerate(loss_masks):
            if not mask_T.any():
                yield index, torch.empty(0, self.vocab_size)

    @torch.inference_mode()
    def reduce_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
        reducer: Reducer,
    ) -> Iterator[tuple[int, SparseDistributions | EngineFailure]]:
        """Reduce distributions in blocks of rows, the longest sequences first. See Engine."""
        targets = [
            ids_T[mask_T].astype(np.int64)
            for ids_T, mask_T in zip(sequences, loss_masks, strict=True)
        ]
        order = sorted(range(len(sequences)), key=lambda k: -len(sequences[k]))
        # Nothing refers to logits once they are reduced.
        buffer = self.free_buffers.pop() if self.free_buffers else LogitBuffer()
        for blocks, index_N, row_N in self._iter_blocks(sequences, loss_masks, order, buffer):
            target_N = np.array(
                [targets[k][n] for k, n in zip(index_N, row_N, strict=True)], np.int64
            )
            reduced = reducer.reduce(blocks, index_N, row_N, target_N)
            for index, begin, end in _runs(index_N):
                yield index, slice_distributions(reduced, begin, end)
        if self.model.device.type == "cpu":  # a GPU's allocator keeps memory itself
            self.free_buffers.append(buffer)
        nothing = np.empty(0, np.int64)
        for index in (k for k, target_N in enumerate(targets) if not len(target_N)):
            blocks = blocks_of_logits(torch.empty(0, self.vocab_size))
            yield index, reducer.reduce(blocks, nothing, nothing, nothing)

    def _iter_blocks(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
        order: Sequence[int],
        buffer: LogitBuffer | None = None,
    ) -> Iterator[tuple[BlockedLogits, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield (logits, index of the sequence, number among its supervised tokens) of positions.

        Each logit is computed once, by the head at supervised positions from hidden states. Where
        the head is not known, the model's own logits of all positions are made.
        """
        head = self._lm_head()
        for batch in self._batches([len(sequences[k]) for k in order], head):
            chosen = [order[k] for k in batch]
            positions = [np.flatnonzero(loss_masks[k]) - 1 for k in chosen]
            for first, output_BTX in self._iter_outputs([sequences[k] for k in chosen], head):
                rows, places, numbers = [], [], []
                for row, at in enumerate(positions):
                    (number,) = ((at >= first) & (at < first + output_BTX.shape[1])).nonzero()
                    rows.append(np.full(len(number), row))
                    places.append(at[number] - first)
                    numbers.append(number)
                row_N, place_N, number_N = map(np.concatenate, (rows, places, numbers))
                output_NX = output_BTX[torch.from_numpy(row_N), torch.from_numpy(place_N)]
                index_N = np.array(chosen, np.int64)[row_N]
                dtype = torch.float32 if head is None else head.stored_dtype(output_NX)
                elements = _max_logit_elements(output_NX.device, dtype)
                step = max(1, elements // self._logits_width())
                for begin in range(0, len(output_NX), step):
                    span = slice(begin, begin + step)
                    blocks = (
                        blocks_of_logits(output_NX[span, : self.vocab_size])
                        if head is None
                        else head.blocked_logits(output_NX[span].to(head.weight_VD.device), buffer)
                    )
                    _require_finite_blocks(blocks, index_N[span])
                    yield blocks, index_N[span], number_N[span]

    def _batches(self, lengths: Sequence[int], head: LMHead | None) -> Iterator[range]:
        """Yield sequences that share a forward pass; one that exceeds the limit is alone."""
        limit = MAX_TOKENS_PER_FORWARD
        if head is None:
            limit = min(limit, _max_logit_elements(self.model.device) // self._logits_width())
        begin = 0
        while begin < len(lengths):
            end, width = begin + 1, lengths[begin]
            while end < min(len(lengths), begin + self.batch_size):
                width = max(width, lengths[end])
                if width * (end - begin + 1) > limit:
                    break
                end += 1
            yield range(begin, end)
            begin = end

    def _iter_outputs(
        self, sequences: Sequence[npt.NDArray[np.int32]], head: LMHead | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first position, hidden states or logits [B, T, X]) of a batch, right padded.

        A long sequence is computed in pieces behind a cache, unless the model's running state makes
        other logits of them.
        """
        width = max(map(len, sequences))
        ids_BT, mask_BT = torch.zeros(
            (2, len(sequences), width), dtype=torch.int64, device=self.model.device
        )
        for row, sequence in enumerate(sequences):
            ids_BT[row, : len(sequence)], mask_BT[row, : len(sequence)] = (
                torch.from_numpy(sequence),
                1,
            )
        step = MAX_TOKENS_PER_FORWARD // len(sequences)
        if head is None:
            elements = len(sequences) * self._logits_width()
            step = max(1, min(step, _max_logit_elements(self.model.device) // elements))
        if step < width and not find_cache_use(self.model, self.vocab_size).pieces:
            step = width
        past = None
        for first in range(0, width, step):
            end = min(first + step, width)
            inputs: dict[str, Any] = {"input_ids": ids_BT[:, first:end], "use_cache": step < width}
            if past is not None or not bool(mask_BT.all()):
                inputs["attention_mask"] = mask_BT[:, :end]
            inputs |= cache_input(self.model, past)
            if head is None:
                output = self.model(**inputs)
                yield first, output.logits
            else:
                hidden_BTD, output = run_without_head(self.model, **inputs)
                yield first, hidden_BTD
            past = cache_of(output) if step < width else None

    def _lm_head(self) -> LMHead | None:
        """Return the head; None where it is not known, offloaded, or no plain linear layer."""
        linear = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if type(linear) is not torch.nn.Linear or linear.weight.is_meta:
            return None
        scaling = _scaling_of(self.model, self.vocab_size)
        if scaling is None:
            return None
        return LMHead(linear.weight, self.vocab_size, linear.bias, scaling.scale, scaling.softcap)

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
        has_steps = find_cache_use(self.model, self.vocab_size).steps
        past = None
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                output = self.model(
                    input_ids=ids,
                    **cache_input(self.model, past),
                    use_cache=has_steps,
                    logits_to_keep=1,
                )
                past = cache_of(output) if has_steps else None
                logits_W = output.logits[0, -1, : self.vocab_size].float()
                require_finite_logits(logits_W)
                token = sample_token(logits_W.cpu(), sampling, generator)
                new = torch.tensor([[token]], device=self.model.device)
                ids = new if has_steps else torch.cat([ids, new], 1)
            yield token
            if token in stop_ids:
                return

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


_SCALINGS: WeakKeyDictionary[PreTrainedModel, LogitScaling | None] = WeakKeyDictionary()


def _scaling_of(model: PreTrainedModel, vocab_size: int) -> LogitScaling | None:
    """Return the scaling of a model's logits, found once a model; None if it is not known."""
    if model not in _SCALINGS:
        try:
            _SCALINGS[model] = find_logit_scaling(model, vocab_size, "teacher")
        except RefusedError:
            _SCALINGS[model] = None
    return _SCALINGS[model]


def _max_logit_elements(device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    return MAX_LOGIT_BYTES.get(device.type, MAX_LOGIT_BYTES_ELSEWHERE) // dtype.itemsize


def _runs(index_N: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Yield (value, begin, end) of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(index_N)) + 1).tolist(), len(index_N)]
    for begin, end in pairwise(edges):
        if begin < end:
            yield int(index_N[begin]), begin, end


def _require_finite_blocks(blocks: BlockedLogits, index_N: npt.NDArray[np.int64]) -> None:
    """Check that every logit is finite. The largest of each block is in the total already."""
    is_finite_N = torch.isfinite(blocks.min_N) & torch.isfinite(blocks.log_total_N)
    if not bool(is_finite_N.all()):
        row = int((~is_finite_N).nonzero()[0])
        raise TeacherError(
            "log-probabilities that are not finite",
            where=f"sequence {index_N[row]}",
            remedy=BROKEN_WEIGHTS_REMEDY,
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
