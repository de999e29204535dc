"""Ground truth (bench/worlds.py, tabular.py, tunstall.py): exactness, floors of every method, detection, fixed points, sampling."""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import replace
from itertools import pairwise

import bias
import numpy as np
import pytest
import torch
import tunstall
import worlds
from baselines import Shared, strict
from tabular import (
    Mask,
    baseline,
    byte_kl,
    chunk,
    descend,
    events,
    exact_mask,
    exact_weights,
    gradient,
    iterate,
    no_mask,
    push,
    random_logits,
    shared_columns,
    stack,
)
from worlds import WORLDS, World, chunks, markov

from persea.align import boundaries, spans
from persea.bridge import Bridge
from persea.losses import Targets, composed, event_logprobs, standing, targets
from persea.rows import sample_rows

AGREE = ("same", "nested", "long")  # worlds whose event maps agree; crossing .0042 and words .0026 do not everywhere
trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL's own code: pip install 'persea[bench]'")


@functools.cache
def whole(name: str) -> World:
    return worlds.world(name)


@functools.cache
def short(name: str) -> World:
    return worlds.world(name, markov(longest=bias.SHORT))


# ---- T0: both models are exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_both_models_say_the_law(name: str):
    world = whole(name)
    assert len(world.law) == 5460
    assert sum(world.law.values()) == pytest.approx(1, abs=1e-12)
    for model in (world.t, world.s):
        assert max(abs(model.logprob(text) - math.log(p)) for text, p in world.law.items()) < 1e-12
        assert max(abs(sum(row.values()) - 1) for row in model.next.values()) < 1e-12
    for b in world.boundaries:
        assert sum(b.joint.values()) == pytest.approx(1, abs=1e-12)
        assert float(b.p_W @ b.leak_W) == pytest.approx(b.b_T, abs=1e-12)
        assert float(b.q_V @ b.leak_V) == pytest.approx(b.b_S, abs=1e-12)
        assert min(b.leak_W.min(), b.leak_V.min()) >= 0
        assert max(b.leak_W.max(), b.leak_V.max()) <= 1 + 1e-12


@pytest.mark.parametrize("name", WORLDS)
def test_every_student_position_stands_somewhere(name: str):
    """At a common boundary or inside a teacher token; together they are all positions, once."""
    world = whole(name)
    mass = dict.fromkeys(world.s.next, 0.0)
    for place in (*world.boundaries, *world.insides):
        mass[place.student] += place.mass
    assert max(abs(m - world.s.mass[prefix]) for prefix, m in mass.items()) < 1e-12
    assert all(place.p_W.sum() > 0 for place in world.insides)


def test_another_law_is_another_world():
    """The counting has nothing of Markov in it: any weights over any strings."""
    rng = np.random.default_rng(3)
    law = dict(zip(list(markov(longest=3)), rng.dirichlet(np.full(84, 0.3)).tolist(), strict=True))
    law = {text: p for text, p in law.items() if p > 0}
    world = worlds.world("nested", law)
    assert max(abs(world.t.logprob(text) - math.log(p)) for text, p in law.items()) < 1e-9
    floors = bias.floors(world, {"exact": exact_weights})
    assert floors["first byte exact"] < 1e-9
    assert floors["chunk exact"] < 1e-9
    assert floors["events exact"] <= floors["maps disagree"] + 1e-12


# ---- T1: floors ---------------------------------------------------------------------------------------------------------

# mean total variation at the truth, chunks in nats; the last three: with the best 0/1 masks there are
FLOORS = {
    "same": dict.fromkeys(("strict", "uld", "bpm", "longest common prefix", "first byte raw", "chunk raw", "events 0/1 masks",
                           "first byte 0/1 masks", "chunk 0/1 masks"), 0.0),
    "nested": {"strict": .0307, "uld": .0277, "bpm": .0334, "longest common prefix": .0146, "events raw": .0146, "first byte raw": .0120,
               "chunk raw": .0319, "events 0/1 masks": 0.0, "first byte 0/1 masks": 0.0, "chunk 0/1 masks": 0.0},
    "crossing": {"strict": .0432, "uld": .0382, "bpm": .0509, "longest common prefix": .0280, "events raw": .0280, "first byte raw": .0253,
                 "chunk raw": .0497, "events 0/1 masks": .0054, "first byte 0/1 masks": .0011, "chunk 0/1 masks": .0023},
    "words": {"strict": .0948, "uld": .0545, "bpm": .0808, "longest common prefix": .0589, "events raw": .0588, "first byte raw": .0576,
              "chunk raw": .1118, "events 0/1 masks": .0026, "first byte 0/1 masks": 0.0, "chunk 0/1 masks": 0.0},
    "long": {"strict": .2167, "uld": .1111, "bpm": .1646, "longest common prefix": .1085, "events raw": .1085, "first byte raw": .1085,
             "chunk raw": .1977, "events 0/1 masks": .0062, "first byte 0/1 masks": .0062, "chunk 0/1 masks": .0137},
}


@pytest.mark.parametrize("name", WORLDS)
def test_floors(name: str):
    got = bias.floors(whole(name), bias.MASKS)
    for method, floor in FLOORS[name].items():
        assert got[method] == pytest.approx(floor, abs=1e-4), method
    assert got["first byte exact"] < 1e-9
    assert got["chunk exact"] < 1e-9
    assert got["events exact"] <= got["maps disagree"] + 1e-12
    assert got["events 0/1 masks"] <= .007
    assert got["maps disagree"] == pytest.approx(0.0 if name in AGREE else {"crossing": .00423, "words": .00256}[name], abs=1e-5)
    if name in AGREE:
        assert got["events exact"] < 1e-12
    if name != "same":
        assert got["events raw"] > .014, "this table would not see a bias"


# ---- T2: detection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_a_tilted_student_is_seen(name: str):
    found = bias.detection(name, exact_weights, longest=bias.SHORT)
    assert found["composed"] >= .95, "ranks students as the byte KL does"
    if name in ("same", "nested", "crossing"):  # in words and long much lies inside events, where only the text speaks
        assert found["events"] >= .95
    if name in AGREE:
        assert found["monotone"] == 1.0
        assert abs(found["floor"]) < 1e-12
        assert found["smallest_composed"] > 1e-5


# ---- T3: where an objective sends a student -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_expected_gradient_at_the_truth(name: str, share: float):
    """Members cut down, not renormalised: zero for every share where maps agree. Renormalised, or unmasked, it is not."""
    world = short(name)
    by_mask = {mask: stack(world, mask) for mask in (no_mask, exact_mask, exact_weights)}
    pushes = {mask: push(events(s, share), s) for mask, s in by_mask.items()}
    twice = push(events(by_mask[exact_weights], share, renormalised=True), by_mask[exact_weights])
    if name in AGREE:
        assert pushes[exact_weights] < 1e-14
    if name not in ("same", "nested"):  # nested: the student's every token keeps the teacher's boundaries
        assert twice > 0.06 * share
        assert twice > 2 * pushes[exact_weights]
    if name != "same":
        assert pushes[no_mask] > 0.1 * share
        assert pushes[exact_mask] < pushes[no_mask] / 6


STAYS = {"crossing": 5.5e-4, "words": 8.9e-4}  # where the maps disagree: byte KL of the fixed point, nats a string


@pytest.mark.parametrize("name", WORLDS)
def test_a_perfect_student_stays_and_another_arrives(name: str):
    s = stack(short(name), exact_weights)
    assert byte_kl(s, random_logits(s, 1)) > 0.5
    for begin in (s.truth_logits, random_logits(s, 1)):
        end = byte_kl(s, iterate(events(s), s, begin, 60))
        if name in AGREE:
            assert abs(end) < 1e-6
        else:
            assert end == pytest.approx(STAYS[name], rel=0.05)
    assert byte_kl(s, descend(events(s), s, s.truth_logits, 30)) < (1e-12 if name in AGREE else 2 * STAYS[name])


# nats of byte KL a string after 200 steps of one descent from the truth; at least this much for what is biased
DRIFTS = {"strict": .005, "uld": .03, "bpm": .02, "raw": .003}


@pytest.mark.parametrize("name", ["nested", "crossing", "words", "long"])
def test_what_is_biased_drifts(name: str):
    world = short(name)
    s = stack(world, no_mask)
    for method, least in DRIFTS.items():
        objective = events(s) if method == "raw" else baseline(s, world, method)
        assert byte_kl(s, descend(objective, s, s.truth_logits, 200, 0.2)) > least, method
    raw, debiased = (chunk(s, world, temperature=1.0, exact=exact) for exact in (False, True))
    assert push(raw, s) > 0.03
    assert push(debiased, s) < 1e-14
    assert byte_kl(s, descend(debiased, s, s.truth_logits, 30)) < 1e-12
    assert byte_kl(s, descend(raw, s, s.truth_logits, 200, 0.2)) > 1e-3


def test_the_control_of_the_drifts():
    """One tokenizer on both sides: every method lets the perfect student be, so the drifts above are the methods' own."""
    world = short("same")
    s = stack(world, no_mask)
    for method in ("strict", "bpm"):
        assert push(baseline(s, world, method), s) < 1e-12
    # ULD has a kink at the truth, where rounding decides the sign: descent with a falling rate ends there again
    assert byte_kl(s, descend(baseline(s, world, "uld"), s, s.truth_logits, 200, 0.05)) < 1e-6


# ---- persea's own objective on these worlds -------------------------------------------------------------------------------


def exactly(bridge: Bridge, row_M: torch.Tensor, ids_M: torch.Tensor, probs_M: torch.Tensor) -> Targets:
    """Entries in double precision."""
    said = targets(bridge, standing(bridge, row_M.numpy(), ids_M.numpy(), probs_M.numpy()), 0)
    return replace(said, probs_M=probs_M)


def positions(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Targets]:
    """(row, target, weight, what the teacher says) of every learned position there is: boundaries first, then the rest."""
    s = stack(world, no_mask)
    at_C, target_C = s.both_CV.nonzero(as_tuple=True)
    at_R, target_R = s.rest_RV.nonzero(as_tuple=True)
    weight_N = torch.cat([s.mass_C[at_C] * s.both_CV[at_C, target_C], s.rest_RV[at_R, target_R]])
    p_NW = s.p_CW[at_C]
    row_M, ids_M = p_NW.nonzero(as_tuple=True)
    said = exactly(world.bridge, row_M, ids_M, p_NW[row_M, ids_M])
    return torch.cat([s.row_C[at_C], at_R]), torch.cat([target_C, target_R]), weight_N, said


@pytest.mark.parametrize("name", WORLDS)
def test_the_plain_objective_is_perseas(name: str):
    """events() here and persea.losses.composed have the same expected gradient, at the truth and elsewhere."""
    world = short(name)
    s = stack(world, no_mask)
    row_N, target_N, weight_N, said = positions(world)
    assert weight_N.sum().item() == pytest.approx(s.mass_R.sum().item())
    for logits_RV in (s.truth_logits, random_logits(s, 4)):
        logits_NV = logits_RV[row_N].requires_grad_()
        composed(logits_NV, target_N, [said], 0.7).loss.backward()
        got = torch.zeros_like(logits_RV).index_add(0, row_N, logits_NV.grad * weight_N[:, None] * len(row_N))
        torch.testing.assert_close(got, gradient(events(s), logits_RV), rtol=1e-7, atol=1e-9)


# ---- T6: sampled rows -----------------------------------------------------------------------------------------------------

DRAWS = 3000


@pytest.mark.parametrize("mask", [no_mask, exact_mask], ids=["plain", "masked"])
@pytest.mark.parametrize("name", ["crossing", "words"])
def test_sampled_rows_have_the_full_rows_gradient(name: str, mask: Mask):
    """Entries outside the mask are drawn like the others and dropped after: linear in p, so unbiased. Top-k with its rest is not."""
    s = stack(short(name), mask)
    said_CW = s.p_CW > 0
    masked_C = (said_CW & (s.ok_CW == 0)).any(-1) | (mask is no_mask)
    at = int((said_CW.sum(-1) * masked_C).argmax())  # the row with most to say, some of it masked
    p_W, q_V, ok_W, ok_V = s.p_CW[at], torch.softmax(random_logits(s, 9)[s.row_C[at]], -1), s.ok_CW[at], s.ok_CV[at]
    assert (float(p_W @ ok_W) < 1 - 1e-6) == (mask is exact_mask)
    event_mass = torch.zeros(s.events, dtype=torch.float64).index_add(0, s.events_V, q_V * ok_V)
    within_V = torch.where(ok_V > 0, q_V * ok_V / event_mass[s.events_V].clamp(min=1e-300), 0.0)
    sayable_W = ok_W * (event_mass[s.events_W] > 0)

    def gradients(p_DW: torch.Tensor) -> torch.Tensor:
        """share .7, cross-entropy's target the first column: q - pull, of each draw."""
        kept_DW = p_DW * sayable_W
        kept_DE = torch.zeros(len(p_DW), s.events, dtype=torch.float64).index_add(1, s.events_W, kept_DW)
        pull = 0.7 * kept_DE[:, s.events_V] * within_V
        pull[:, 0] += 1 - 0.7 * kept_DW.sum(-1)
        return q_V - pull

    full = gradients(p_W[None])[0]
    rows = sample_rows(p_W.clamp(min=1e-30).log().expand(DRAWS, -1), np.zeros(DRAWS, np.int64), 0.4, "worlds")
    p_DW = torch.zeros(DRAWS, len(p_W), dtype=torch.float64)
    draw_M = torch.from_numpy(np.repeat(np.arange(DRAWS), np.diff(rows.offsets_N1)))
    p_DW[draw_M, torch.from_numpy(rows.ids_M).long()] = torch.from_numpy(rows.probs_M).double()
    drawn = gradients(p_DW)
    assert (drawn.std(0) > 0.01).any(), "sparse: draws differ"
    z = (drawn.mean(0) - full) / (drawn.std(0) / math.sqrt(DRAWS)).clamp(min=1e-6)
    assert z.abs().max() < 4
    best = p_W.topk(2)
    top = torch.zeros_like(p_W).index_put((best.indices,), best.values)
    renormalised, rest_to_text = gradients((top / top.sum())[None])[0], gradients(top[None])[0]
    assert (renormalised - full).abs().max() > 0.02, "renormalised top-k is biased"
    assert (rest_to_text - full).abs().max() > 0.02, "and so is top-k whose rest goes to the text"


# ---- T9: no longest string ------------------------------------------------------------------------------------------------

TEACHER, STUDENT = tunstall.Code(tunstall.code(11, "a")), tunstall.Code(tunstall.code(19, "c"))


def test_tunstall_codes_are_complete_and_differ():
    for one in (TEACHER, STUDENT):
        for after in tunstall.SOURCE:
            assert np.exp(one.row(after)).sum() == pytest.approx(1, abs=1e-12)
        assert not any(a != b and b.startswith(a) for a in one.tokens for b in one.tokens)
    only = {*TEACHER.tokens} - {*STUDENT.tokens}, {*STUDENT.tokens} - {*TEACHER.tokens}
    assert min(map(len, only)) >= 4


@functools.cache
def long_text() -> tuple[str, list[int], list[int]]:
    text = tunstall.sample(60_000, 1)
    return text, TEACHER.parse(text), STUDENT.parse(text)


def test_a_long_text_without_a_bias():
    text, t, s = long_text()
    teacher, student = TEACHER.laid(t), STUDENT.laid(s)
    rows_t, rows_s = ({after: one.row(after) for after in tunstall.SOURCE} for one in (TEACHER, STUDENT))

    def logprobs(rows: dict[str, np.ndarray], tokens: object) -> np.ndarray:
        return np.array([rows[text[a - 1] if a else ""][i] for a, i in zip(tokens.starts_T, tokens.ids_T, strict=True)])

    log_t, log_s = logprobs(rows_t, teacher), logprobs(rows_s, student)
    for logs, tokens in ((log_t, teacher), (log_s, student)):  # closed form, string by string
        assert logs.sum() == pytest.approx(tunstall.logprob(text[:tokens.ends_T[-1]]), rel=1e-12)
    both, between = boundaries(student, teacher), spans(student, teacher)
    assert len(both.student_C) > 5000
    sums_t, sums_s = (np.concatenate([[0], np.cumsum(x)]) for x in (log_t, log_s))
    gaps = [sums_t[b] - sums_t[a] - (sums_s[d] - sums_s[c]) for (a, b), (c, d) in zip(between.teacher_C2, between.student_C2, strict=True)]
    assert np.abs(gaps).max() < 1e-9
    # event distributions at every boundary, through the code that trains, in float32 as it trains
    bridge = tunstall.bridge(TEACHER, STUDENT)
    after = [text[a - 1] if a else "" for a in student.starts_T[both.student_C]]
    logits = torch.from_numpy(np.array([rows_s[a] for a in after], np.float32))
    p_CW = torch.from_numpy(np.exp([rows_t[a] for a in after]))
    row_M, event_M = torch.arange(len(after)).repeat_interleave(bridge.events), torch.arange(bridge.events).repeat(len(after))
    names = replace(bridge, teacher_event_W=np.arange(bridge.events, dtype=np.int32))
    q_CE = event_logprobs(logits, logits.logsumexp(-1), exactly(names, row_M, event_M, torch.ones(len(row_M)))).exp().reshape(len(after), -1)
    p_CE = torch.zeros(len(after), bridge.events, dtype=torch.float64).index_add(1, torch.from_numpy(bridge.teacher_event_W).long(), p_CW)
    assert (q_CE - p_CE).abs().max() < 1e-6
    # nothing but events: a perfect student's gradient is zero at each of them, not only on average
    logits = logits.clone().requires_grad_()
    ids_M = torch.arange(len(TEACHER.tokens)).repeat(len(after))
    said = exactly(bridge, torch.arange(len(after)).repeat_interleave(len(TEACHER.tokens)), ids_M, p_CW.flatten())
    composed(logits, torch.from_numpy(student.ids_T[both.student_C]).long(), [said], 1.0).loss.backward()
    assert logits.grad.abs().max() * len(after) < 1e-5


def test_without_a_leak_strict_is_unbiased_too():
    """So what pushes on the finite worlds is the boundary's own information, not the renormalisation as such."""
    shared = {t: (TEACHER.number[t], STUDENT.number[t]) for t in {*TEACHER.tokens} & {*STUDENT.tokens}}
    both = Shared(*(torch.tensor(side) for side in zip(*shared.values(), strict=True)))
    for after in tunstall.SOURCE:
        p, q = (torch.from_numpy(one.row(after))[None] for one in (TEACHER, STUDENT))
        assert strict(q, p.exp(), both).item() == pytest.approx(0, abs=1e-12)


def test_a_tunstall_student_that_is_wrong_is_seen():
    bridge = tunstall.bridge(TEACHER, STUDENT)
    p, q = np.exp(TEACHER.row("a")), np.exp(STUDENT.row("b"))
    p_E, q_E = np.bincount(bridge.teacher_event_W, p, bridge.events), np.bincount(bridge.student_event_V, q, bridge.events)
    assert bias.tv(p_E, q_E) > 0.3


# ---- T10: TRL's own -------------------------------------------------------------------------------------------------------

GOLD = {"same": (0.0, 0.0), "nested": (.0390, .0439), "crossing": (.0539, .0627), "words": (.1256, .1288), "long": (.2971, .3455)}


@trl
@pytest.mark.parametrize("name", WORLDS)
def test_gold_on_the_truth(name: str):
    from trl_worlds import gold_floor, gold_objective
    world = short(name)
    s = stack(world, no_mask)
    for merge, floor in zip(("observed", "bayesian"), GOLD[name], strict=True):
        assert gold_floor(s, world, merge)["tv"] == pytest.approx(floor, abs=1e-4)
        pushed = push(gold_objective(s, world, merge), s)
        assert pushed < 1e-12 if name == "same" else pushed > .015


def test_chunks_tile_every_string():
    world = whole("words")
    assert sum(c.weight * len(c.student_ids) for c in chunks(world)) == pytest.approx(sum(p * len(world.s.ids[x]) for x, p in world.law.items()))
    for text in list(world.law)[::501]:
        places = worlds.common(world, text)
        assert all(a < b for (a, _), (b, _) in pairwise(places))
        assert places[0] == (0, 0)
        assert shared_columns(world).teacher_K.tolist()
