"""vLLM in this process, where this environment has one (docs/engines.md): rows of kind TOPK_REST, named as by its server.

Not run on a machine of this project: written against vLLM 0.33's own source, tested with a stand-in for its three classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import MissingRequirementError, TeacherError
from persea.teachers.engines import GREEDY, EngineCapabilities, EngineFailure, Sampling
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    to_sparse_distributions,
)
from persea.teachers.engines.wire_formats import parse_vllm_prompt_logprobs


@dataclass(frozen=True, eq=False)
class VllmEngine:
    """See Engine and Namer. llm: a vllm.LLM; vocabulary: ids that mean something."""

    llm: Any
    vocab_size: int
    num_top_logprobs: int = 20
    sampling: Sampling = GREEDY

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(DistributionKind.TOPK, self.num_top_logprobs)

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[npt.NDArray[np.int32]]:
        """See Engine."""
        s = self.sampling
        drawn: dict[str, Any] = {"top_p": s.top_p, "seed": s.seed} if s.temperature else {}
        outputs = self._run_llm(
            prompts,
            max_tokens=max_new_tokens,
            temperature=s.temperature,
            stop_token_ids=list(stop_ids),
            ignore_eos=True,
            **drawn,
        )
        return [np.array(out.outputs[0].token_ids, np.int32) for out in outputs]

    def compute_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[Any]:
        """Raises TeacherError: a whole vocabulary of Python objects at every position fits nowhere."""
        raise TeacherError(
            "whole distributions are asked of vLLM, which names the likeliest tokens alone",
            where="vllm",
            remedy="use `named`",
        )

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """See Namer."""
        outputs = self._run_llm(
            sequences, max_tokens=1, temperature=0.0, prompt_logprobs=self.num_top_logprobs
        )
        for ids_T, learn_T, out in zip(sequences, loss_masks, outputs, strict=True):
            told = [
                None
                if place is None
                else {str(i): {"logprob": one.logprob} for i, one in place.items()}
                for place in out.prompt_logprobs
            ]
            try:
                yield to_sparse_distributions(
                    parse_vllm_prompt_logprobs(list(out.prompt_token_ids), told),
                    ids_T,
                    learn_T,
                    self.num_top_logprobs,
                    self.vocab_size,
                )
            except MalformedResponseError as error:
                yield EngineFailure(str(error))

    def _run_llm(self, prompts: Sequence[npt.NDArray[np.int32]], **params: Any) -> list[Any]:
        settings = import_module("vllm").SamplingParams(detokenize=False, **params)
        return (
            list(
                self.llm.generate(
                    [{"prompt_token_ids": p.tolist()} for p in prompts], settings, use_tqdm=False
                )
            )
            if prompts
            else []
        )


def load_vllm_engine(
    model: str, revision: str, vocab_size: int, sampling: Sampling, num_top_logprobs: int = 20
) -> VllmEngine:
    """A model in this process. Raises EnvironmentLacks where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise MissingRequirementError(
            "vLLM is not installed in this environment",
            where="teachers: engine: vllm",
            remedy="install it beside persea as docs/engines.md says, or run `vllm serve` and give the teacher an `endpoint:`",
        )
    llm = import_module("vllm").LLM(
        model=model,
        revision=revision or None,
        max_logprobs=num_top_logprobs,
        enable_prefix_caching=False,
        logprobs_mode="raw_logprobs",
    )
    return VllmEngine(llm, vocab_size, num_top_logprobs, sampling)
