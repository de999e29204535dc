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

from persea.distributions import RowKind, Rows
from persea.errors import EnvironmentLacks, TeacherError
from persea.teachers.engines import GREEDY, Abilities, Failed, Sampling
from persea.teachers.engines.response_validation import Malformed, rows_of
from persea.teachers.engines.wire_formats import by_id


@dataclass(frozen=True, eq=False)
class VllmEngine:
    """See Engine and Namer. llm: a vllm.LLM; vocabulary: ids that mean something."""

    llm: Any
    vocabulary: int
    top: int = 20
    sampling: Sampling = GREEDY

    @property
    def abilities(self) -> Abilities:
        return Abilities(RowKind.TOPK_REST, self.top)

    def generate(self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int) -> list[npt.NDArray[np.int32]]:
        """See Engine."""
        s = self.sampling
        drawn: dict[str, Any] = {"top_p": s.top_p, "seed": s.seed} if s.temperature else {}
        outputs = self._asked(prompts, max_tokens=max_new_tokens, temperature=s.temperature, stop_token_ids=list(stop_ids), ignore_eos=True, **drawn)
        return [np.array(out.outputs[0].token_ids, np.int32) for out in outputs]

    def score(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[Any]:
        """Raises TeacherError: a whole vocabulary of Python objects at every position fits nowhere."""
        raise TeacherError("whole distributions are asked of vLLM, which names the likeliest tokens alone", where="vllm", remedy="use `named`")

    def named(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[Rows | Failed]:
        """See Namer."""
        outputs = self._asked(sequences, max_tokens=1, temperature=0.0, prompt_logprobs=self.top)
        for ids_T, learn_T, out in zip(sequences, learn, outputs, strict=True):
            told = [None if place is None else {str(i): {"logprob": one.logprob} for i, one in place.items()} for place in out.prompt_logprobs]
            try:
                yield rows_of(by_id(list(out.prompt_token_ids), told), ids_T, learn_T, self.top, self.vocabulary)
            except Malformed as error:
                yield Failed(str(error))

    def _asked(self, prompts: Sequence[npt.NDArray[np.int32]], **params: Any) -> list[Any]:
        settings = import_module("vllm").SamplingParams(detokenize=False, **params)
        return list(self.llm.generate([{"prompt_token_ids": p.tolist()} for p in prompts], settings, use_tqdm=False)) if prompts else []


def open_vllm(model: str, revision: str, vocabulary: int, sampling: Sampling, top: int = 20) -> VllmEngine:
    """A model in this process. Raises EnvironmentLacks where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise EnvironmentLacks("vLLM is not installed in this environment", where="teachers: engine: vllm",
                               remedy="install it beside persea as docs/engines.md says, or run `vllm serve` and give the teacher an `endpoint:`")
    llm = import_module("vllm").LLM(model=model, revision=revision or None, max_logprobs=top, enable_prefix_caching=False,
                                    logprobs_mode="raw_logprobs")
    return VllmEngine(llm, vocabulary, top, sampling)
