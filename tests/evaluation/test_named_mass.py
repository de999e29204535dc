"""What listed tokens keep: mass by language, and whole events only."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from persea.chat.messages import Conversation, Text
from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import RefusedError
from persea.evaluation.compatibility import ConversationSample
from persea.evaluation.named_mass import measure_named_mass, refuse_low_named_mass
from persea.teachers.engines import EngineCapabilities, EngineFailure
from tests.teachers.engines.test_transformers import opened

# Event 0 has the tokens 10 and 11, event 1 the token 12; 13 has none.
EVENT_MAP: Any = SimpleNamespace(
    teacher_event_W=np.array([-1] * 10 + [0, 0, 1, -1], np.int32), num_events=2
)


class Listing:
    """Lists the tokens 10, 12 and 13 everywhere, and fails at every third text."""

    capabilities = EngineCapabilities(DistributionKind.TOPK, 3)
    scored = 0

    def compute_sparse_distributions(
        self, sequences: Any, masks: Any
    ) -> Iterator[SparseDistributions | EngineFailure]:
        for mask_T in masks:
            self.scored += 1
            if self.scored % 3 == 0:
                yield EngineFailure("busy")
                continue
            n = int(mask_T.sum())
            yield SparseDistributions(
                np.arange(n + 1) * 3,
                np.tile(np.array([10, 12, 13], np.int32), n),
                np.tile(np.array([0.5, 0.25, 0.125], np.float32), n),
                np.zeros(n, np.float32),
                DistributionKind.TOPK,
            )


def sample(skill: str, language: str, count: int) -> ConversationSample:
    conversations = tuple(
        Conversation.from_question(f"q{k}").with_answer(Text(f"{skill} {k}")) for k in range(count)
    )
    return ConversationSample(skill, language, conversations, tuple(map(str, range(count))))


def test_the_mass_of_whole_events_is_told_by_language_and_refused_below_the_limit() -> None:
    teacher: Any = SimpleNamespace(name="far", renderer=opened("qwen-sapling")[0], engine=Listing())
    samples = [sample("a", "ko", 3), sample("b", "ko", 40), sample("a", "th", 2)]
    korean, thai = measure_named_mass(teacher, EVENT_MAP, samples)
    assert (korean.language, korean.conversations, korean.failed) == ("ko", 11, 5)
    assert (thai.language, thai.conversations + thai.failed) == ("th", 2)
    assert (korean.listed_mass, korean.top_logprobs) == (0.875, 3)
    assert korean.event_mass == 0.375  # token 11 is not listed, so the mass of event 0 is not whole
    assert korean.positions > 20
    refuse_low_named_mass([korean, thai], 0.375)
    with pytest.raises(RefusedError, match=r"3 listed tokens of far keep 38% .* in ko .*--max-log"):
        refuse_low_named_mass([korean, thai], 0.4)


def test_a_server_that_scores_nothing_has_no_mass() -> None:
    class Failing(Listing):
        scored = 2

    teacher: Any = SimpleNamespace(name="far", renderer=opened("qwen-sapling")[0], engine=Failing())
    assert measure_named_mass(teacher, EVENT_MAP, [sample("a", "ko", 1)]) == []
