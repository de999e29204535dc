"""Unigram and prefix-space tokenizers in event maps, masks and partial tokens: exact worlds."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from bias import keeps, mean_tv
from tabular import no_mask, persea_mask
from trait_worlds import LIMIT, trait_world
from worlds import World, markov

from persea.alignment.event_map import build_event_map, load_event_map
from persea.alignment.token_order import UNRESTRICTED_CONTEXT
from persea.distributions import SparseDistributions
from persea.tokenization.unigram import UnigramLattice
from tests.alignment.test_event_map import check_properties, renderer_of
from tests.alignment.test_partial_tokens import begins_commonly, projector_of
from tests.tokenization.traits import byte_level_bpe, sentencepiece_bpe, unigram

SMALL = 5  # the longest string: 1,364 strings


@cache
def small_world(name: str) -> World:
    return trait_world(name, markov(longest=SMALL))


@pytest.mark.parametrize(
    "name",
    [
        "two Unigrams",
        "prefix space teaches BPE",
        "BPE teaches prefix space",
        "prefix space teaches BPE, words",
    ],
)
def test_the_bias_that_masks_leave(name: str):
    world = trait_world(name)
    maps = world.event_map.teacher_event_W.tolist(), world.event_map.student_event_V.tolist()
    masked = mean_tv(world, maps, keeps(world, persea_mask))
    assert masked <= LIMIT
    assert mean_tv(world, maps, keeps(world, no_mask)) > 4 * masked


@pytest.mark.parametrize(
    "name",
    [
        "two Unigrams",
        "BPE teaches Unigram",
        "Unigram teaches BPE, words",
        "prefix space teaches BPE, words",
        "prefix space teaches Unigram",
    ],
)
def test_no_token_that_follows_is_masked(name: str):
    world = small_world(name)
    removed = 0
    for b, (kept_W, kept_V) in zip(world.boundaries, keeps(world, persea_mask), strict=True):
        assert not ((kept_W == 0) & (b.both_p_W > 0)).any()
        assert not ((kept_V == 0) & (b.both_q_V > 0)).any()
        removed += int((kept_W == 0).sum() + (kept_V == 0).sum())
    assert removed > 20


# Mean total variation between the projected and the true distribution of the next event.
PARTIAL_FLOORS = {"Unigram teaches BPE": 0.0, "BPE teaches Unigram": 0.0}


@pytest.mark.parametrize("name", PARTIAL_FLOORS)
def test_partial_tokens(name: str):
    world = small_world(name)
    projector, events = projector_of(world.full_event_map), world.full_event_map.student_event_V
    total = lost = 0.0
    for inside in world.insides:
        if not begins_commonly(world, inside):
            continue
        ids = np.flatnonzero(inside.p_W)
        rows = SparseDistributions(
            np.array([0, len(ids)]),
            world.columns_W[ids].astype(np.int32),
            inside.p_W[ids].astype(np.float32),
            np.zeros(1, np.float32),
        )
        context = (
            projector.student_order.context_ids(np.array(inside.student), [len(inside.student)])
            if inside.student
            else np.array([UNRESTRICTED_CONTEXT])
        )
        found = projector.project(rows, np.array([0]), [inside.emitted], context)
        follows = world.columns_V[inside.q_V > 0]
        assert not np.isin(follows, found.token_D).any(), "a token that follows was excluded"
        q: dict[int, float] = defaultdict(float)
        for v, x in zip(world.columns_V.tolist(), inside.q_V.tolist(), strict=True):
            q[int(events[v])] += x
        mass = found.probs_M.sum()
        p = np.bincount(found.event_M, found.probs_M, world.full_event_map.num_events)
        difference = sum(abs(p[e] / mass - q[e] / sum(q.values())) for e in range(len(p)))
        lost += inside.mass * difference / 2
        total += inside.mass
    assert total > 0.01
    assert lost / total == pytest.approx(PARTIAL_FLOORS[name], abs=5e-4)


TOKENIZERS = {
    "unigram": lambda: unigram("metaspace first"),
    "unigram without bytes": lambda: unigram("prepend", fallback=False, size=200),
    "prefix space": lambda: sentencepiece_bpe("prepend"),
    "byte-level": lambda: byte_level_bpe(prefix=True),
}


@pytest.mark.parametrize("teacher", TOKENIZERS)
@pytest.mark.parametrize("student", ["unigram", "byte-level"])
def test_event_maps_have_their_properties(teacher: str, student: str):
    if teacher == student:
        return
    one, two = (
        renderer_of(TOKENIZERS[name](), name, stops=("<|end|>",)) for name in (teacher, student)
    )
    check_properties(build_event_map(one, two), one, two)


def test_a_stored_map_of_unigram_has_the_same_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    one, two = (renderer_of(TOKENIZERS[name](), name) for name in ("unigram", "byte-level"))
    built, loaded = (load_event_map(one, two) for _ in range(2))
    assert np.array_equal(built.teacher_event_W, loaded.teacher_event_W)
    for mask, again in (
        (built.teacher_mask, loaded.teacher_mask),
        (built.student_mask, loaded.student_mask),
    ):
        assert mask and again
        ids = np.array(mask.other.vocabulary.encode("the cat sat on"))
        for k in range(1, len(ids)):
            contexts = [int(m.other.context_ids(ids, [k])[0]) for m in (mask, again)]
            assert np.array_equal(
                mask.impossible_tokens(contexts[0]), again.impossible_tokens(contexts[1])
            )
    assert built.student_mask
    assert isinstance(built.student_mask.other.derivations, UnigramLattice)
