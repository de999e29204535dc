"""A transformers model in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from persea.errors import TeacherError

LOGITS_AT_ONCE = 1 << 26  # elements of one forward's logits (256 MiB in float32): one Gemma row of 262k has room for 256 positions


@dataclass(frozen=True, eq=False)
class LocalEngine:
    """A causal model; `vocabulary` = ids that mean something. Logits past it are padding of the matrix and are cut off."""

    model: PreTrainedModel
    vocabulary: int
    batch: int = 64

    @torch.inference_mode()
    def generate(self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int) -> list[npt.NDArray[np.int32]]:
        """Greedy, batched by length, left padded, KV-cached. See Engine."""
        answers: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        device = self.model.device
        settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0],
                                    suppress_tokens=list(range(self.vocabulary, self._rows())) or None)
        self.model.generation_config = GenerationConfig()  # else a repetition penalty that comes with the model is added to `settings`
        for begin in range(0, len(order), self.batch):
            chosen = order[begin:begin + self.batch]
            width = max(len(prompts[i]) for i in chosen)
            ids = torch.full((len(chosen), width), stop_ids[0])
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(prompts[i]):] = torch.from_numpy(prompts[i])
                mask[row, width - len(prompts[i]):] = 1
            out = self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings,
                                      logits_processor=LogitsProcessorList([_finite]))
            for row, i in enumerate(chosen):
                answers[i] = _until_stop(out[row, width:].cpu().numpy().astype(np.int32), stop_ids)
        return answers

    def score(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[torch.Tensor]:
        """The pieces of each sequence laid end to end. See Engine."""
        begun: dict[int, list[torch.Tensor]] = {}
        done = 0
        for number, some_NW in self.pieces(sequences, learn):
            begun.setdefault(number, []).append(some_NW)
            while done in begun and sum(map(len, begun[done])) == int(learn[done].sum()):
                yield torch.cat(begun.pop(done))
                done += 1

    @torch.inference_mode()
    def pieces(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[tuple[int, torch.Tensor]]:
        """Teacher-forced, in order, right padded, as many sequences at once as LOGITS_AT_ONCE allows; where one alone is too long for
        it, position by position behind a cache of keys and values. See Engine."""
        begin = 0
        while begin < len(sequences):
            end, width = begin, 0
            while end < len(sequences) and end - begin < self.batch:
                wider = max(width, len(sequences[end]))
                if end > begin and wider * (end - begin + 1) * self._rows() > LOGITS_AT_ONCE:
                    break
                end, width = end + 1, wider
            ids = torch.zeros((end - begin, width), dtype=torch.int64, device=self.model.device)
            mask = torch.zeros_like(ids)
            for row, sequence in enumerate(sequences[begin:end]):
                ids[row, :len(sequence)] = torch.from_numpy(sequence)
                mask[row, :len(sequence)] = 1
            for first, logits in self._logits(ids, mask):
                for row, wanted in enumerate(learn[begin:end]):
                    at = np.flatnonzero(wanted) - 1 - first
                    here = torch.from_numpy(at[(at >= 0) & (at < logits.shape[1])])
                    if len(here) or (first == 0 and not len(at)):
                        yield begin + row, self._logprobs(logits[row, here], f"sequence {begin + row}")
            begin = end

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits of one batch: (first position, [sequences, some positions, rows of the matrix])."""
        at_once = max(1, LOGITS_AT_ONCE // (len(ids) * self._rows()))
        if ids.shape[1] <= at_once:
            yield 0, self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return
        past = None
        for first in range(0, ids.shape[1], at_once):
            upto = min(first + at_once, ids.shape[1])
            out = self.model(input_ids=ids[:, first:upto], attention_mask=mask[:, :upto], past_key_values=past, use_cache=True)
            past = out.past_key_values
            yield first, out.logits

    def _logprobs(self, logits_NR: torch.Tensor, where: str) -> torch.Tensor:
        logprobs = torch.log_softmax(logits_NR[:, :self.vocabulary].float(), dim=-1)
        if not torch.isfinite(logprobs).all():
            raise TeacherError("log-probabilities that are not finite", where=where, remedy="the weights are broken, or need another dtype")
        return logprobs.cpu()

    def _rows(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])


def _finite(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The scores, or an error: the largest of NaNs is no answer. A suppressed token's is -inf."""
    if not (scores < float("inf")).all():
        raise TeacherError("logits that are not finite", where="generate", remedy="the weights are broken, or need another dtype")
    return scores


def _until_stop(ids: npt.NDArray[np.int32], stop_ids: Sequence[int]) -> npt.NDArray[np.int32]:
    """Up to and including the first stop id; what generate() pads behind it is no answer."""
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[:stops[0] + 1] if len(stops) else ids
