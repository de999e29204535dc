"""Engine for vLLM in this process (docs/engines.md). Distributions are of kind TOPK, as from a vLLM
server.

Written against the source of vLLM 0.33 and tested with stand-ins for its classes; not run on a GPU
yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import MissingRequirementError, RecipeError
from persea.models.loading import loadable_name
from persea.teachers.engines import (
    DEFAULT_TOP_LOGPROBS,
    GREEDY,
    Engine,
    EngineCapabilities,
    EngineFailure,
    EngineOptions,
    Sampling,
)
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    to_sparse_distributions,
)
from persea.teachers.engines.wire_formats import parse_vllm_prompt_logprobs


@dataclass(frozen=True, eq=False)
class VllmEngine(Engine):
    """A model in vLLM.

    Attributes:
        llm: A vllm.LLM.
        vocab_size: Number of token ids of the tokenizer.
        num_top_logprobs: Tokens listed per position.
        sampling: How answers are drawn.
    """

    llm: Any
    vocab_size: int
    num_top_logprobs: int = DEFAULT_TOP_LOGPROBS
    sampling: Sampling = GREEDY

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of this engine."""
        return EngineCapabilities(DistributionKind.TOPK, self.num_top_logprobs)

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[npt.NDArray[np.int32] | EngineFailure]:
        """Generate one answer per prompt. See Engine."""
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
        return [
            output
            if isinstance(output, EngineFailure)
            else np.array(output.outputs[0].token_ids, np.int32)
            for output in outputs
        ]

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """Compute top-k distributions of the supervised tokens. See Engine."""
        outputs = self._run_llm(
            sequences, max_tokens=1, temperature=0.0, prompt_logprobs=self.num_top_logprobs
        )
        for ids_T, loss_mask_T, output in zip(sequences, loss_masks, outputs, strict=True):
            if isinstance(output, EngineFailure):
                yield output
                continue
            positions = [
                None
                if position is None
                else {str(i): {"logprob": entry.logprob} for i, entry in position.items()}
                for position in output.prompt_logprobs
            ]
            try:
                yield to_sparse_distributions(
                    parse_vllm_prompt_logprobs(list(output.prompt_token_ids), positions),
                    ids_T,
                    loss_mask_T,
                    self.num_top_logprobs,
                    self.vocab_size,
                )
            except MalformedResponseError as error:
                yield EngineFailure(str(error))

    def _run_llm(
        self, prompts: Sequence[npt.NDArray[np.int32]], **params: Any
    ) -> list[Any | EngineFailure]:
        """Run a batch. vLLM refuses a whole batch for one prompt that is too long.

        Then each prompt is run on its own, and the ones that are refused are failures.
        """
        settings = import_module("vllm").SamplingParams(detokenize=False, **params)
        if not prompts:
            return []
        inputs = [{"prompt_token_ids": p.tolist()} for p in prompts]
        try:
            return list(self.llm.generate(inputs, settings, use_tqdm=False))
        except ValueError as error:  # vLLM's validation errors are ValueErrors
            if len(prompts) == 1:
                return [EngineFailure(f"vLLM refuses the prompt: {error}")]
        return [result for prompt in prompts for result in self._run_llm([prompt], **params)]


def load_vllm_engine(
    model: str,
    revision: str,
    vocab_size: int,
    sampling: Sampling,
    num_top_logprobs: int = DEFAULT_TOP_LOGPROBS,
    engine_options: Mapping[str, Any] | None = None,
) -> VllmEngine:
    """Load a model into vLLM in this process.

    Args:
        model: Folder or hub id.
        revision: Revision of a hub model; "" for the latest.
        vocab_size: Number of token ids of the tokenizer.
        sampling: How answers are drawn.
        num_top_logprobs: Tokens listed per position.
        engine_options: Further arguments of vllm.LLM.

    Raises:
        MissingRequirementError: vLLM is not installed.
        RecipeError: vLLM does not know an option.
    """
    if find_spec("vllm") is None:
        raise MissingRequirementError(
            "vLLM is not installed in this environment",
            where="teachers: engine: vllm",
            remedy="install it into persea's environment (docs/engines.md), or run `vllm serve` "
            "and give the teacher an `endpoint:`",
        )
    options = dict(engine_options or {})
    fixed = {
        "model": model,
        "revision": revision or None,
        "max_logprobs": num_top_logprobs,
        "enable_prefix_caching": False,
        "logprobs_mode": "raw_logprobs",
    }
    if taken := sorted(fixed.keys() & options):
        raise RecipeError(
            f"persea itself sets {', '.join(taken)}",
            where="teachers: engine_options",
            remedy="delete it there",
        )
    try:
        llm = import_module("vllm").LLM(**fixed, **options)
    except TypeError as error:  # an unknown argument
        raise RecipeError(
            f"vLLM does not take these options: {error}",
            where="teachers: engine_options",
            remedy="use the names of vllm.LLM's arguments",
        ) from error
    return VllmEngine(llm, vocab_size, num_top_logprobs, sampling)


def open_engine(name: str, options: EngineOptions) -> VllmEngine:
    """Load a model into vLLM. See EngineSpec."""
    assert options.source is not None
    return load_vllm_engine(
        loadable_name(options.source.model, name),
        options.source.revision,
        len(options.renderer.vocabulary),
        options.sampling,
        options.num_top_logprobs,
        options.engine_options,
    )
