"""Requests of several clients on one model: passes never overlap, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from persea.errors import TeacherError
from persea.serve.scheduler import ModelScheduler, run_together
from persea.teachers.engines import Sampling
from persea.teachers.engines.transformers import TransformersEngine
from tests.teachers.engines.test_transformers import asked, engine, opened

NAME = "llama-sapling"


async def whole(scheduler: ModelScheduler, prompt: Any, new: int = 8) -> list[int]:
    stream = scheduler.generate(list(prompt), (), new, Sampling())
    return [i async for tokens in stream for i in tokens]


def test_a_client_that_goes_leaves_the_batch_and_passes_never_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [p.tolist() for p in asked(opened(NAME)[0])[:3]]
    expected = list(engine(NAME).stream(np.array(prompts[0]), (), 8, Sampling()))
    running, most, lock = 0, 0, threading.Lock()
    model = opened(NAME)[1]
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        try:
            return forward(*args, **kwargs)
        finally:
            running -= 1

    monkeypatch.setattr(model, "forward", watched)

    async def play() -> None:
        scheduler = ModelScheduler(engine(NAME))
        leaving = scheduler.generate(prompts[1], (), 2000, Sampling())
        await anext(leaving)
        others = [asyncio.create_task(whole(scheduler, prompts[0]))]
        scored = asyncio.create_task(scheduler.compute_logprobs(prompts[2]))
        await anext(leaving)
        await leaving.aclose()
        assert await others[0] == expected
        assert (await scored).shape[0] == len(prompts[2]) - 1
        begin = time.monotonic()
        while scheduler._running and time.monotonic() < begin + 30:
            await asyncio.sleep(0.01)
        assert scheduler._running == [] and scheduler._batch.members == []

    asyncio.run(play())
    assert (running, most) == (0, 1)


def test_texts_are_scored_together_and_the_faulty_one_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [p.tolist() for p in asked(opened(NAME)[0])[:3]]
    compute: Callable[..., Any] = TransformersEngine.compute_logprobs
    sizes: list[int] = []

    def refusing(self: TransformersEngine, sequences: Any, masks: Any) -> Any:
        sizes.append(len(sequences))
        if any(s[0] == 9 for s in sequences):
            raise TeacherError("not finite", where="here")
        return compute(self, sequences, masks)

    monkeypatch.setattr(TransformersEngine, "compute_logprobs", refusing)

    async def play() -> list[Any]:
        scheduler = ModelScheduler(engine(NAME))
        works = [scheduler.compute_logprobs(ids) for ids in [*prompts, [9, 8]]]
        return await asyncio.gather(*works, return_exceptions=True)

    *rows, error = asyncio.run(play())
    assert isinstance(error, TeacherError)
    assert sizes == [4, 1, 1, 1, 1]
    for ids, found in zip(prompts, rows, strict=True):
        ids_T = np.array(ids, np.int32)
        (expected,) = compute(engine(NAME), [ids_T], [np.arange(len(ids)) > 0])
        assert torch.allclose(found, expected, atol=1e-4)


def test_an_unforeseen_error_reaches_everyone_and_the_next_request_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = asked(opened(NAME)[0])[0].tolist()

    async def play() -> None:
        scheduler = ModelScheduler(engine(NAME))
        with monkeypatch.context() as patch:
            patch.setattr(scheduler._batch, "step", lambda: 1 / 0)
            found = await asyncio.gather(
                whole(scheduler, prompt), whole(scheduler, prompt), return_exceptions=True
            )
            assert [type(e) for e in found] == [ZeroDivisionError] * 2
        assert len(await whole(scheduler, prompt)) == 8
        assert await whole(scheduler, prompt, 0) == []

    asyncio.run(play())


def test_the_first_error_ends_the_other_parts_of_a_request() -> None:
    ended: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("first")

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("other")

    async def play() -> None:
        with pytest.raises(ValueError, match="first"):
            await run_together([fails(), waits()])
        await asyncio.sleep(0)

    asyncio.run(play())
    assert ended == ["other"]
