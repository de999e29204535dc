"""Engines: where a teacher's weights run, in this process or behind a server.

All engines implement one protocol, `Engine`, and declare what they support in `EngineCapabilities`.
Callers look at the capabilities, never at the class. `ENGINES` lists every engine;
docs/new_engine.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import numpy as np
import numpy.typing as npt

from persea.chat.messages import ContentPart, Conversation, FinishReason, ThinkingEffort
from persea.config.schema import TeacherSection
from persea.config.yaml_source import suggest_choice
from persea.distributions import DistributionKind, SparseDistributions
from persea.distributions.blocks import BlockedLogits, blocks_of_logprobs
from persea.distributions.sparse import rows_per_chunk
from persea.errors import RecipeError, TeacherError

if TYPE_CHECKING:
    import torch

    from persea.chat.renderer import ChatRenderer
    from persea.models.loading import ModelSource
    from persea.teachers.engines.http_client import HttpClient

DEFAULT_TOP_LOGPROBS = 20  # also the default of `endpoint.top_logprobs`; vLLM's own limit is 20
DEFAULT_MAX_FINGERPRINT_DRIFT_NATS = 0.1  # half-precision kernels and batch sizes move it .01-.05


@dataclass(frozen=True)
class EngineCapabilities:
    """Capabilities of an engine.

    Attributes:
        kind: Distributions it returns. FULL: log-probabilities over the whole vocabulary, by
            `iter_logprobs` and `compute_logprobs`. TOPK and TEXT_ONLY: by
            `compute_sparse_distributions`.
        num_top_logprobs: Tokens listed per position; 0 unless `kind` is TOPK.
        takes_token_ids: Whether `generate` works. If False, only `chat` does: the server renders
            the conversation itself.
        has_local_model: Whether the weights are a torch module in this process, so that `model`
            and `stream` exist (see TransformersEngine).
    """

    kind: DistributionKind
    num_top_logprobs: int = 0
    takes_token_ids: bool = True
    has_local_model: bool = False

    @property
    def has_full_distributions(self) -> bool:
        """Whether whole distributions are available."""
        return self.kind is DistributionKind.FULL

    @property
    def is_text_only(self) -> bool:
        """Whether no log-probabilities are available at all."""
        return self.kind is DistributionKind.TEXT_ONLY


FULL_DISTRIBUTIONS = EngineCapabilities(DistributionKind.FULL)


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        temperature: 0 takes the most likely token at each step.
        top_p: Sample from the fewest most likely tokens whose probabilities reach this sum.
        seed: Seed of the random draw, combined with the prompt.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class EngineFailure:
    """The result for one prompt that failed, with the reason in plain words."""

    reason: str


@dataclass(frozen=True, eq=False)
class GeneratedTokens:
    """A generated answer.

    Attributes:
        ids_T: int32, with the stop token where one was generated.
        distributions: The distribution that each token was drawn from, at temperature 1; None if
            they were not wanted, or the engine does not have them.
    """

    ids_T: npt.NDArray[np.int32]
    distributions: SparseDistributions | None = None


class Reducer(Protocol):
    """Reduces whole distributions to stored entries, where an engine makes them."""

    def reduce(
        self,
        blocks: BlockedLogits,
        index_N: npt.NDArray[np.int64],
        row_N: npt.NDArray[np.int64],
        target_N: npt.NDArray[np.int64],
    ) -> SparseDistributions:
        """Reduce some positions, of one sequence or of several.

        Args:
            blocks: Their logits, on the engine's device; only entries leave it.
            index_N: Number of each position's sequence.
            row_N: Number of the position among its sequence's supervised tokens.
            target_N: The supervised token.
        """
        ...


class Engine(Protocol):
    """Generates answers and computes log-probabilities.

    An engine overrides the methods that its capabilities promise; the others raise TeacherError.
    """

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of this engine."""
        ...

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> Sequence[npt.NDArray[np.int32] | EngineFailure]:
        """Generate one answer per prompt, in order.

        Args:
            prompts: Token ids, one int32 array [T] per prompt.
            stop_ids: Tokens that end an answer.
            max_new_tokens: Longest answer, in tokens.

        Returns:
            Generated ids, with the stop token where one was generated.
        """
        _refuse(self, "cannot continue token ids", "use `chat`")

    def generate_with_distributions(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        reducer: Reducer,
    ) -> Sequence[GeneratedTokens | EngineFailure]:
        """Generate as `generate` does, and reduce the distribution that each token is drawn from.

        An engine that has no distributions while it generates returns tokens alone, so that they
        are scored afterwards.

        Args:
            prompts: Token ids, one int32 array [T] per prompt.
            stop_ids: Tokens that end an answer.
            max_new_tokens: Longest answer, in tokens.
            reducer: Reduces the distributions; the number of a position's sequence is that of its
                prompt, the number of its token that within the answer.
        """
        return [
            answer if isinstance(answer, EngineFailure) else GeneratedTokens(answer)
            for answer in self.generate(prompts, stop_ids, max_new_tokens)
        ]

    def reporting(self, on_progress: Callable[[float], None]) -> Engine:
        """Return this engine, calling `on_progress` with the share of each `generate` that is done.

        An engine that cannot tell returns itself.
        """
        return self

    def chat(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> Sequence[tuple[tuple[ContentPart, ...], FinishReason] | EngineFailure]:
        """Answer one conversation each, in order, for engines that take no token ids.

        Returns:
            Content parts and the finish reason.
        """
        _refuse(self, "has no chat route", "use `generate`")

    def iter_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the rows of `compute_logprobs` in blocks, to bound memory.

        Yields:
            (index of the sequence, its next rows [n, W]). The rows of a sequence come in order;
            the rows of different sequences may interleave. A sequence without supervised tokens
            yields one empty block.
        """
        _refuse(self, "has no full distributions", "use `compute_sparse_distributions`")

    def compute_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[torch.Tensor]:
        """Compute the distributions that the supervised tokens were drawn from.

        Args:
            sequences: Token ids, int32 [T] each.
            loss_masks: True for supervised tokens, bool [T] each.

        Yields:
            Natural-log probabilities, float32 [N, W]: row n is the prediction of the n-th
            supervised token, made at the token before it.

        Raises:
            TeacherError: The engine has no full distributions.
        """
        _refuse(self, "has no full distributions", "use `compute_sparse_distributions`")

    def reduce_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
        reducer: Reducer,
    ) -> Iterator[tuple[int, SparseDistributions | EngineFailure]]:
        """Yield the sparse distributions of the supervised tokens, whatever the engine returns.

        Whole distributions are reduced by `reducer`, a few positions at a time; the lists of a
        server are as they came. An engine that computes logits itself may override this to reduce
        them where they are.

        Yields:
            (index of the sequence, its next distributions), as in `iter_logprobs`.

        Raises:
            DataError: The log-probabilities of a position are no distribution.
        """
        if not self.capabilities.has_full_distributions:
            yield from enumerate(self.compute_sparse_distributions(sequences, loss_masks))
            return
        done = [0] * len(sequences)
        for index, logprobs_NW in self.iter_logprobs(sequences, loss_masks):
            target_N = sequences[index][loss_masks[index]].astype(np.int64)
            chunk = rows_per_chunk(logprobs_NW)
            for begin in range(0, max(1, len(logprobs_NW)), chunk):
                span = slice(begin, begin + chunk)
                blocks = blocks_of_logprobs(logprobs_NW, span, f"sequence {index}", True)
                row_N = np.arange(done[index], done[index] + len(blocks))
                index_N = np.full(len(row_N), index)
                yield index, reducer.reduce(blocks, index_N, row_N, target_N[row_N])
                done[index] += len(row_N)

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """Compute distributions of kind `capabilities.kind`, one row per supervised token."""
        _refuse(self, "has full distributions only", "use `compute_logprobs`")


def _refuse(engine: Engine, reason: str, remedy: str) -> NoReturn:
    raise TeacherError(
        f"this engine {reason}",
        where=type(engine).__name__,
        remedy=f"{remedy}; docs/engines.md lists what each engine supports",
    )


@dataclass(frozen=True)
class EngineOptions:
    """Options to open any engine; each engine uses a part of them.

    Attributes:
        teacher_name: Name of the teacher, for messages.
        renderer: The teacher's own tokenizer and chat template.
        sampling: How answers are drawn.
        source: Where the weights come from; None behind a server.
        batch_size: Sequences in one forward pass.
        client: Connection to the server; None in this process.
        served_model_name: Name of the model at the server; "" if it serves only one.
        num_top_logprobs: Tokens listed per position where distributions are not full.
        send_effort: Whether a chat route is sent the thinking effort.
        handshake_effort: Thinking effort of the handshake of a chat route.
        max_fingerprint_drift: Mean difference in nats at which two fingerprints are two models.
        engine_options: Further arguments of the library that runs the weights.
    """

    teacher_name: str
    renderer: ChatRenderer
    sampling: Sampling = GREEDY
    source: ModelSource | None = None
    batch_size: int = 64
    client: HttpClient | None = None
    served_model_name: str = ""
    num_top_logprobs: int = DEFAULT_TOP_LOGPROBS
    send_effort: bool = False
    handshake_effort: ThinkingEffort = ThinkingEffort.NONE
    max_fingerprint_drift: float = DEFAULT_MAX_FINGERPRINT_DRIFT_NATS
    engine_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSpec:
    """One engine of the list.

    Attributes:
        name: The value of `engine:` in a recipe, or of `endpoint.protocol:` for a server.
        module: Module of this package with `open_engine(name, options) -> Engine`; imported when
            an engine is opened, since torch and HTTP clients are slow to import.
        is_server: Whether the weights are behind a server.
    """

    name: str
    module: str
    is_server: bool = False

    def open(self, options: EngineOptions) -> Engine:
        """Open the engine. Raises what its module raises."""
        module = import_module(f"persea.teachers.engines.{self.module}")
        return cast(Engine, module.open_engine(self.name, options))


ENGINES = (
    EngineSpec("local", "transformers"),
    EngineSpec("vllm", "vllm"),
    EngineSpec("tokens", "token_server", is_server=True),
    EngineSpec("completions", "token_server", is_server=True),
    EngineSpec("sglang", "token_server", is_server=True),
    EngineSpec("llamacpp", "llamacpp_server", is_server=True),
    EngineSpec("chat", "chat_server", is_server=True),
)


def find_engine(name: str) -> EngineSpec:
    """Return the engine of that name.

    Raises:
        TeacherError: There is no such engine.
    """
    for spec in ENGINES:
        if spec.name == name:
            return spec
    raise TeacherError(
        f"unknown engine {name!r}",
        where="engine",
        remedy=f"known engines: {', '.join(s.name for s in ENGINES)}",
    )


def refuse_unknown_engines(teachers: Sequence[TeacherSection], where: str) -> None:
    """Check the names of a recipe's engines and protocols against `ENGINES`.

    Raises:
        RecipeError: Names no engine has; one line per name.
    """
    errors = []
    for k, teacher in enumerate(teachers):
        key, name = "engine", teacher.engine
        if teacher.endpoint is not None:
            key, name = "endpoint.protocol", teacher.endpoint.protocol
        known = [s.name for s in ENGINES if s.is_server == (teacher.endpoint is not None)]
        if name not in known:
            errors.append(
                RecipeError(
                    f"unknown {key.rpartition('.')[2]} {name!r}",
                    where=f"{where}: teachers.{k}.{key}",
                    remedy=suggest_choice(name, known),
                )
            )
    if errors:
        raise errors[0] if len(errors) == 1 else RecipeError("\n".join(map(str, errors)))
