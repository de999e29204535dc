"""The order of work on the served model: one forward pass at a time, shared by all requests.

Requests wait in the event loop. As long as there is work, passes of the model follow each other in
one thread of their own: the prompts of new answers, texts to score, and one token of every answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from persea.errors import TeacherError
from persea.serve.constrained import JsonConstraint
from persea.teachers.engines import Sampling
from persea.teachers.engines.batching import ContinuousBatch, Generation
from persea.teachers.engines.transformers import TransformersEngine

T = TypeVar("T")
MAX_LOGPROB_ELEMENTS = 1 << 28  # of the texts that are scored together; 1 GiB of float32
# Tokens are delivered together if they come faster than this: 40 events a second for each answer.
DELIVERY_INTERVAL_S = 0.025


@dataclass(eq=False)
class _Answer:
    """An answer on its way to a client.

    Attributes:
        generation: The answer.
        num_delivered: Tokens that the client may have.
        is_over: Whether these are all of them.
        changed: Set when either changes.
    """

    generation: Generation
    num_delivered: int = 0
    is_over: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Scoring:
    """A text whose log-probabilities were requested."""

    ids: Sequence[int]
    result: asyncio.Future[torch.Tensor]
    rows: torch.Tensor | None = None
    error: Exception | None = None


class ModelScheduler:
    """Runs the requests of all clients on one model.

    Args:
        engine: Runs the weights.
    """

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self._batch = ContinuousBatch(engine)
        self._thread = ThreadPoolExecutor(1, "model")
        self._waiting: deque[_Answer] = deque()
        self._running: list[_Answer] = []
        self._scorings: deque[_Scoring] = deque()
        self._task: asyncio.Task[None] | None = None
        self._delivered_at = 0.0

    async def generate(
        self,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        constraint: JsonConstraint | None = None,
    ) -> AsyncGenerator[list[int], None]:
        """Generate an answer beside all others, and yield its tokens as they come.

        Closing the generator takes the answer out of the batch.

        Raises:
            TeacherError: The model failed.
        """
        if max_new_tokens < 1:
            return
        answer = _Answer(Generation(prompt, stop_ids, max_new_tokens, sampling, constraint))
        self._waiting.append(answer)
        self._start()
        sent = 0
        try:
            while sent < answer.num_delivered or not answer.is_over:
                await answer.changed.wait()
                answer.changed.clear()
                tokens = answer.generation.ids[sent : answer.num_delivered]
                sent += len(tokens)
                if tokens:
                    yield tokens
            if answer.generation.error is not None:
                raise answer.generation.error
        finally:
            answer.generation.is_cancelled = True

    async def compute_logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Compute natural-log probabilities [T - 1, W]: row t is the prediction of token t + 1.

        Texts that are requested at the same time are computed together.

        Raises:
            TeacherError: The model failed.
        """
        scoring = _Scoring(ids, asyncio.get_running_loop().create_future())
        self._scorings.append(scoring)
        self._start()
        return await scoring.result

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting or self._running or self._scorings:
            admitted, scorings = self._admit(), self._take_scorings()
            try:
                await loop.run_in_executor(self._thread, self._work, admitted, scorings)
            except Exception as error:  # nobody may wait for ever
                self._batch = ContinuousBatch(self._engine)
                for answer in self._running:
                    answer.generation.error = error
            self._deliver(scorings)

    def _admit(self) -> list[_Answer]:
        """Take as many waiting answers as fit into the batch."""
        admitted: list[_Answer] = []
        while self._waiting:
            generation = self._waiting[0].generation
            if not generation.is_cancelled and not self._batch.has_room(
                generation, [a.generation for a in admitted]
            ):
                break
            answer = self._waiting.popleft()
            if not generation.is_cancelled:
                admitted.append(answer)
        self._running += admitted
        return admitted

    def _take_scorings(self) -> list[_Scoring]:
        """Take waiting texts whose log-probabilities fit into the memory limit together."""
        taken: list[_Scoring] = []
        elements = 0
        while self._scorings:
            elements += len(self._scorings[0].ids) * self._engine.vocab_size
            if taken and elements > MAX_LOGPROB_ELEMENTS:
                break
            scoring = self._scorings.popleft()
            if not scoring.result.cancelled():
                taken.append(scoring)
        return taken

    def _work(self, admitted: Sequence[_Answer], scorings: Sequence[_Scoring]) -> None:
        """Run in the model's thread: new prompts, texts to score, one token of every answer."""
        self._batch.step()
        self._batch.add([a.generation for a in admitted])
        self._score(scorings)

    def _score(self, scorings: Sequence[_Scoring]) -> None:
        """Score texts together; if that fails, each alone, so that the faulty one fails alone."""
        if not scorings:
            return
        sequences = [np.array(s.ids, np.int32) for s in scorings]
        masks = [np.arange(len(ids_T)) > 0 for ids_T in sequences]
        try:
            for scoring, rows in zip(
                scorings, self._engine.compute_logprobs(sequences, masks), strict=True
            ):
                scoring.rows = rows
        except Exception as error:
            if len(scorings) > 1:
                for scoring in scorings:
                    self._score([scoring])
            else:
                scorings[0].error = error

    def _deliver(self, scorings: Sequence[_Scoring]) -> None:
        """Hand results to the requests that wait for them."""
        for scoring in scorings:
            if scoring.result.cancelled():
                continue
            if scoring.rows is None:
                error = scoring.error or TeacherError(
                    "the model returned no log-probabilities", where="serve"
                )
                scoring.result.set_exception(error)
            else:
                scoring.result.set_result(scoring.rows)
        now = time.monotonic()
        is_due = now - self._delivered_at >= DELIVERY_INTERVAL_S
        self._delivered_at = now if is_due else self._delivered_at
        for answer in self._running:
            answer.is_over = answer.generation.is_finished
            if (is_due or answer.is_over) and answer.num_delivered < len(answer.generation.ids):
                answer.num_delivered = len(answer.generation.ids)
                answer.changed.set()
            if answer.is_over:
                answer.changed.set()
        self._running = [a for a in self._running if not a.is_over]


async def run_together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run parts of one request at once; the first error ends the others, and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
