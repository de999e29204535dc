"""Engine for vLLM in this process (docs/engines.md).

Distributions are of kind TOPK, as from a vLLM server, or FULL with `max_logprobs: -1`. Run with
vLLM 0.32 on a CPU; not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import MissingRequirementError, RecipeError, TeacherError
from persea.models.loading import loadable_name
from persea.teachers.engines import (
    DEFAULT_TOP_LOGPROBS,
    FULL_DISTRIBUTIONS,
    GREEDY,
    Engine,
    EngineCapabilities,
    EngineFailure,
    EngineOptions,
    Sampling,
)
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    refuse_equal_probabilities,
    to_sparse_distributions,
)
from persea.teachers.engines.token_server import HANDSHAKE_TEXT
from persea.teachers.engines.wire_formats import is_supervised, parse_vllm_prompt_logprobs

if TYPE_CHECKING:
    import torch

WHOLE_VOCABULARY = -1  # vLLM's own value


@dataclass(frozen=True, eq=False)
class VllmEngine(Engine):
    """A model in vLLM.

    Attributes:
        llm: A vllm.LLM.
        vocab_size: Number of token ids of the tokenizer.
        num_top_logprobs: Tokens listed per position; WHOLE_VOCABULARY for all.
        sampling: How answers are drawn.
    """

    llm: Any
    vocab_size: int
    num_top_logprobs: int = DEFAULT_TOP_LOGPROBS
    sampling: Sampling = GREEDY

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of this engine."""
        if self.num_top_logprobs == WHOLE_VOCABULARY:
            return FULL_DISTRIBUTIONS
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
            loss_mask = loss_mask_T.tolist()
            positions = [
                {str(i): {"logprob": entry.logprob} for i, entry in position.items()}
                if position is not None and is_supervised(loss_mask, t)
                else None
                for t, position in enumerate(output.prompt_logprobs)
            ]
            try:
                yield to_sparse_distributions(
                    parse_vllm_prompt_logprobs(list(output.prompt_token_ids), positions, loss_mask),
                    ids_T,
                    loss_mask_T,
                    self.num_top_logprobs,
                    self.vocab_size,
                )
            except MalformedResponseError as error:
                yield EngineFailure(str(error))

    def compute_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[torch.Tensor]:
        """Compute the distributions of each sequence's supervised tokens. See Engine."""
        for _, rows_NW in self.iter_logprobs(sequences, loss_masks):
            yield rows_NW

    def iter_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Compute whole distributions, one sequence at a time. See Engine.

        Each position takes 12 bytes a token of the vocabulary until the sequence is done.
        """
        import torch

        for index, (ids_T, loss_mask_T) in enumerate(zip(sequences, loss_masks, strict=True)):
            with _prompt_logprob_tensors() as tensors:
                (output,) = self._run_llm(
                    [ids_T],
                    max_tokens=1,
                    temperature=0.0,
                    prompt_logprobs=WHOLE_VOCABULARY,
                    flat_logprobs=True,
                )
            if isinstance(output, EngineFailure):
                raise TeacherError(
                    output.reason,
                    where=f"sequence {index}",
                    remedy="raise `max_model_len` in engine_options, or shorten the text",
                )
            rows = np.flatnonzero(loss_mask_T)
            logprobs_NW = np.full((len(rows), self.vocab_size), -np.inf, np.float32)
            for row_W, t in zip(logprobs_NW, rows.tolist(), strict=True):
                ids, values = (
                    _listed_tensors(tensors, t)
                    if tensors
                    else _listed_numbers(output.prompt_logprobs, t)
                )
                is_token = ids < self.vocab_size  # the others are padding of the embedding matrix
                row_W[ids[is_token]] = values[is_token]
            rows_NW = torch.log_softmax(torch.from_numpy(logprobs_NW), dim=-1)
            if not torch.isfinite(rows_NW).all():
                raise TeacherError(
                    "vLLM did not list the whole vocabulary",
                    where=f"sequence {index}",
                    remedy="use `engine: local`",
                )
            yield index, rows_NW

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


@contextmanager
def _prompt_logprob_tensors() -> Iterator[list[Any]]:
    """Keep log-probabilities of prompts as the tensors that come from vLLM's workers.

    vLLM makes Python numbers of them, about 100 bytes each, and has no option against it. The list
    stays empty in a version that keeps them elsewhere.
    """
    tensors: list[Any] = []
    name = "_update_prompt_logprobs"
    processor = getattr(import_module("vllm.v1.engine.logprobs"), "LogprobsProcessor", None)
    usual = getattr(processor, name, None)
    if usual is None:
        yield tensors
        return
    setattr(processor, name, lambda self, new: tensors.append(new))
    try:
        yield tensors
    finally:
        setattr(processor, name, usual)


def _listed_tensors(
    tensors: Sequence[Any], t: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return ids and log-probabilities of the prediction of token t, from rows [T - 1, W + 1]."""
    row = t - 1
    for part in tensors:
        if row < len(part.logprobs):
            return part.logprob_token_ids[row].numpy(), part.logprobs[row].numpy()
        row -= len(part.logprobs)
    raise TeacherError(
        "vLLM returned no distribution of a token", where=f"token {t}", remedy="use `engine: local`"
    )


def _listed_numbers(flat: Any, t: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the same from vLLM's lists of all positions."""
    listed = slice(flat.start_indices[t], flat.end_indices[t])
    return np.array(flat.token_ids[listed], np.int64), np.array(flat.logprobs[listed], np.float32)


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
        engine_options: Further arguments of vllm.LLM; its `max_logprobs` replaces
            `num_top_logprobs`.

    Raises:
        MissingRequirementError: vLLM is not installed.
        RecipeError: vLLM does not know an option, or it has an impossible value.
    """
    if find_spec("vllm") is None:
        raise MissingRequirementError(
            "vLLM is not installed in this environment",
            where="teachers: engine: vllm",
            remedy="install it into persea's environment (docs/engines.md), or run `vllm serve` "
            "and give the teacher an `endpoint:`",
        )
    options = dict(engine_options or {})
    num_top_logprobs = int(options.pop("max_logprobs", num_top_logprobs))
    if num_top_logprobs < 1 and num_top_logprobs != WHOLE_VOCABULARY:
        raise RecipeError(
            f"{num_top_logprobs} tokens per position",
            where="teachers: engine_options.max_logprobs",
            remedy=f"give a number above 0, or {WHOLE_VOCABULARY} for the whole vocabulary",
        )
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
    """Load a model into vLLM, and check that its weights were loaded. See EngineSpec."""
    assert options.source is not None
    vocabulary = options.renderer.vocabulary
    engine = load_vllm_engine(
        loadable_name(options.source.model, name),
        options.source.revision,
        len(vocabulary),
        options.sampling,
        options.num_top_logprobs,
        options.engine_options,
    )
    ids_T = np.array(vocabulary.encode_alone(HANDSHAKE_TEXT), np.int32)
    listing = replace(engine, num_top_logprobs=1)
    (scored,) = listing.compute_sparse_distributions([ids_T], [np.arange(len(ids_T)) > 0])
    if isinstance(scored, EngineFailure):
        raise TeacherError(
            scored.reason, where=options.teacher_name, remedy="look at vLLM's own messages"
        )
    refuse_equal_probabilities(scored, len(vocabulary), options.teacher_name)
    return engine
