"""A transformers model in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from persea.errors import TeacherError
from persea.teachers.engines import FULL_DISTRIBUTIONS, GREEDY, EngineCapabilities, Sampling

MAX_LOGIT_ELEMENTS_PER_FORWARD = (
    1 << 26
)  # elements of one forward's logits (256 MiB in float32): one Gemma row of 262k has room for 256 positions


@dataclass(frozen=True, eq=False)
class TransformersEngine:
    """A causal model; `vocabulary` = ids that mean something. Logits past it are padding of the matrix and are cut off."""

    model: PreTrainedModel
    vocab_size: int
    batch_size: int = 64
    sampling: Sampling = GREEDY
    capabilities: ClassVar[EngineCapabilities] = FULL_DISTRIBUTIONS

    @torch.no_grad()  # and not inference_mode: a student is asked between two steps of its training
    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[npt.NDArray[np.int32]]:
        """Batched by length, left padded, KV-cached. See Engine. Drawn answers come one by one, from chance that prompt and seed decide."""
        if self.sampling.temperature:
            drawn = [list(self.stream(p, stop_ids, max_new_tokens, self.sampling)) for p in prompts]
            return [np.array(ids, np.int32) for ids in drawn]
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
        """One answer a prompt, all of a batch drawn at once; temperature 0 = the likeliest token each time.

        temperature  above 0: drawn from the model's own distribution, softmax(logits / temperature), nothing cut off; the same seed, prompts
                     and batch draw the same, and torch's own random state is left as it was
        """
        answers: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        device = self.model.device
        how = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        settings = GenerationConfig(
            **how,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            suppress_tokens=list(range(self.vocab_size, self._logits_width())) or None,
        )
        own = self.model.generation_config
        self.model.generation_config = (
            GenerationConfig()
        )  # else a repetition penalty that comes with the model is added to `settings`
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            width = max(len(prompts[i]) for i in chosen)
            ids = torch.full((len(chosen), width), stop_ids[0])
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(prompts[i]) :] = torch.from_numpy(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            with torch.random.fork_rng([device] if device.type != "cpu" else []):
                torch.manual_seed(seed + begin)
                out = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([_require_finite_logits]),
                )
            for row, i in enumerate(chosen):
                answers[i] = _truncate_after_stop(
                    out[row, width:].cpu().numpy().astype(np.int32), stop_ids
                )
        self.model.generation_config = own  # a student is saved with it
        return answers

    def compute_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[torch.Tensor]:
        """The pieces of each sequence laid end to end. See Engine."""
        begun: dict[int, list[torch.Tensor]] = {}
        done = 0
        for number, some_NW in self.iter_logprobs(sequences, loss_masks):
            begun.setdefault(number, []).append(some_NW)
            while done in begun and sum(map(len, begun[done])) == int(loss_masks[done].sum()):
                yield torch.cat(begun.pop(done))
                done += 1

    @torch.inference_mode()
    def iter_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Teacher-forced, in order, right padded, as many sequences at once as LOGITS_AT_ONCE allows; where one alone is too long for
        it, position by position behind a cache of keys and values. See Engine.
        """
        begin = 0
        while begin < len(sequences):
            end, width = begin, 0
            while end < len(sequences) and end - begin < self.batch_size:
                wider = max(width, len(sequences[end]))
                if (
                    end > begin
                    and wider * (end - begin + 1) * self._logits_width()
                    > MAX_LOGIT_ELEMENTS_PER_FORWARD
                ):
                    break
                end, width = end + 1, wider
            ids = torch.zeros((end - begin, width), dtype=torch.int64, device=self.model.device)
            mask = torch.zeros_like(ids)
            for row, sequence in enumerate(sequences[begin:end]):
                ids[row, : len(sequence)] = torch.from_numpy(sequence)
                mask[row, : len(sequence)] = 1
            for first, logits in self._iter_logits(ids, mask):
                for row, wanted in enumerate(loss_masks[begin:end]):
                    at = np.flatnonzero(wanted) - 1 - first
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
        """What follows one prompt, token by token; the same tokens as `generate`. Closing the iterator ends it."""
        digest = hashlib.sha256(
            f"{sampling.seed} ".encode() + np.asarray(prompt, np.int32).tobytes()
        ).digest()
        chance = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        ids, past = torch.from_numpy(np.asarray(prompt, np.int64))[None].to(self.model.device), None
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                out = self.model(
                    input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1
                )
                past = out.past_key_values
                token = _sample_token(
                    _require_finite_logits(ids, out.logits[0, -1, : self.vocab_size].float()).cpu(),
                    sampling,
                    chance,
                )
                ids = torch.tensor([[token]], device=self.model.device)
            yield token
            if token in stop_ids:
                return

    def _iter_logits(
        self, ids: torch.Tensor, mask: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits of one batch: (first position, [sequences, some positions, rows of the matrix])."""
        at_once = max(1, MAX_LOGIT_ELEMENTS_PER_FORWARD // (len(ids) * self._logits_width()))
        if ids.shape[1] <= at_once:
            yield 0, self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return
        past = None
        for first in range(0, ids.shape[1], at_once):
            upto = min(first + at_once, ids.shape[1])
            out = self.model(
                input_ids=ids[:, first:upto],
                attention_mask=mask[:, :upto],
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            yield first, out.logits

    def _to_logprobs(self, logits_NR: torch.Tensor, where: str) -> torch.Tensor:
        logprobs = torch.log_softmax(logits_NR[:, : self.vocab_size].float(), dim=-1)
        if not torch.isfinite(logprobs).all():
            raise TeacherError(
                "log-probabilities that are not finite",
                where=where,
                remedy="the weights are broken, or need another dtype",
            )
        return logprobs.cpu()

    def _logits_width(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])


def _sample_token(logits_W: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The likeliest token, or one drawn from the fewest likeliest whose mass reaches top_p."""
    if not sampling.temperature:
        return int(logits_W.argmax())
    p_K, id_K = torch.softmax(logits_W.double() / sampling.temperature, -1).sort(descending=True)
    p_K[p_K.cumsum(0) - p_K >= sampling.top_p] = 0
    return int(id_K[torch.multinomial(p_K, 1, generator=generator)])


def _require_finite_logits(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The scores, or an error: the largest of NaNs is no answer. A suppressed token's is -inf."""
    if not (scores < float("inf")).all():
        raise TeacherError(
            "logits that are not finite",
            where="generate",
            remedy="the weights are broken, or need another dtype",
        )
    return scores


def _truncate_after_stop(
    ids: npt.NDArray[np.int32], stop_ids: Sequence[int]
) -> npt.NDArray[np.int32]:
    """Up to and including the first stop id; what generate() pads behind it is no answer."""
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[: stops[0] + 1] if len(stops) else ids
