"""The baselines of bench/ against their formulas and against what they reduce to; TRL's own runs
where it is installed.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baselines import (
    Sequence,
    Shared,
    bpm,
    chunk_likelihood,
    chunk_logprobs,
    composed,
    gold,
    gold_loss,
    longest_prefix,
    sft,
    shared,
    strict,
    uld,
)
from hypothesis import given
from hypothesis import strategies as st
from worlds import toy

seeds = st.integers(0, 2**32 - 1)
trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL's own code: pip install 'persea[bench]'"
)


def rows(seed: int, n: int, width: int) -> torch.Tensor:
    return torch.softmax(
        2 * torch.from_numpy(np.random.default_rng(seed).standard_normal((n, width))), -1
    )


def identity(width: int) -> Shared:
    return Shared(torch.arange(width), torch.arange(width))


def forward_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(-1)


# --- composition ---


@given(seed=seeds, share=st.sampled_from([0.0, 0.3, 1.0]))
def test_every_position_has_weight_one(seed: int, share: float):
    rng = np.random.default_rng(seed)
    ce = torch.from_numpy(rng.random(9)).requires_grad_()
    where = torch.from_numpy(np.sort(rng.permutation(9)[:4]))
    divergence = torch.from_numpy(rng.random(4)).requires_grad_()
    loss = composed(divergence, where, ce, share)
    d = dict(zip(where.tolist(), divergence.tolist(), strict=True))
    want = (
        sum(share * d[n] + (1 - share) * c if n in d else c for n, c in enumerate(ce.tolist())) / 9
    )
    assert loss.item() == pytest.approx(want)
    loss.backward()
    assert ce.grad.sum().item() + divergence.grad.sum().item() == pytest.approx(1.0)


def test_sft_is_cross_entropy():
    logits, targets = rows(0, 5, 7).log(), torch.tensor([0, 6, 2, 2, 5])
    torch.testing.assert_close(sft(logits, targets), -logits[torch.arange(5), targets])


# --- the same vocabulary on both sides: the ordinary divergence ---


@given(seed=seeds)
def test_one_vocabulary_reduces_to_kl(seed: int):
    p, q = rows(seed, 4, 11), rows(seed + 1, 4, 11)
    torch.testing.assert_close(strict(q.log() + 3, p, identity(11)), forward_kl(p, q))
    torch.testing.assert_close(strict(q.log(), p, identity(11), reverse=True), forward_kl(q, p))
    torch.testing.assert_close(bpm(q.log(), p, torch.arange(11)), forward_kl(p, q))
    for equal in (
        strict(p.log(), p, identity(11)),
        uld(p.log(), p),
        bpm(p.log(), p, torch.arange(11)),
    ):
        assert equal.abs().max() < 1e-12


# --- each one's formula ---


def test_strict_renormalises_shared_tokens():
    p, q = (
        torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 0.6, 0.4]]),
        torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]),
    )
    both = Shared(torch.tensor([0, 1]), torch.tensor([2, 0]))
    want = 0.625 * np.log(0.625 / 0.75) + 0.375 * np.log(0.375 / 0.25)
    torch.testing.assert_close(
        strict(q.log(), p, both), torch.tensor([want, 0.0], dtype=torch.float32)
    )  # the second row has no shared mass
    top = strict(
        q.log(), p[:, :3] + 0.1, Shared(torch.arange(3), torch.arange(3)), top=2
    )  # the student's two likeliest
    want = [
        sum(x * np.log(x / y) for x, y in zip(*pair, strict=True))
        for pair in (((4 / 7, 3 / 7), (2 / 3, 1 / 3)),)
    ]
    assert top[0].item() == pytest.approx(want[0], abs=1e-6)
    with pytest.raises(ValueError, match="infinite"):
        strict(q.log(), p, Shared(torch.tensor([1, 2, 3]), torch.arange(3)), reverse=True)


@given(seed=seeds)
def test_uld_ignores_token_identity(seed: int):
    rng = np.random.default_rng(seed)
    p, q = rows(seed, 3, 13), rows(seed + 1, 3, 9)
    want = np.abs(
        np.sort(p.numpy())[:, ::-1] - np.pad(np.sort(q.numpy())[:, ::-1], ((0, 0), (0, 4)))
    ).sum(-1)
    np.testing.assert_allclose(uld(q.log(), p).numpy(), want, rtol=1e-10)
    torch.testing.assert_close(uld(q[:, rng.permutation(9)].log(), p), uld(q.log(), p))


def test_longest_prefix_by_bytes():
    teacher = toy((("a", "b"), ("ab", "c"), ("c", "c")), False, "teacher")
    student = toy((("b", "c"), ("a", "b"), ("c", "a")), False, "student")
    id_t = {b: i for i, b in enumerate(teacher.vocabulary.bytes_W)}
    id_s = {b: i for i, b in enumerate(student.vocabulary.bytes_W)}
    root = longest_prefix(teacher, student)
    for w, u in ((b"abc", b"ab"), (b"ab", b"ab"), (b"cc", b"c"), (b"b", b"b"), (b"\xff", b"\xff")):
        assert root[id_t[w]] == id_s[u]
    assert root[teacher.stop_ids[0]] == student.stop_ids[0]
    inner = longest_prefix(teacher, student, b"a")
    assert inner[id_t[b"abc"]] == id_s[b"bc"]
    assert inner[id_t[b"ab"]] == id_s[b"b"]
    assert {int(w) for w in (inner >= 0).nonzero()} == {id_t[b"abc"], id_t[b"ab"]}
    both = shared(teacher, student)
    assert len(both.teacher_K) == 256 + 1 + 1  # single bytes, "ab", the stop token
    for w, u in zip(both.teacher_K.tolist(), both.student_K.tolist(), strict=True):
        assert teacher.vocabulary.bytes_W[w] == student.vocabulary.bytes_W[u]


def test_bpm_moves_mass_and_drops_tokens_without_prefix():
    p, q = (
        torch.tensor([[0.2, 0.3, 0.1, 0.4], [0.0, 0.0, 1.0, 0.0]]),
        torch.tensor([[0.5, 0.25, 0.25]] * 2),
    )
    got = bpm(q.log(), p, torch.tensor([0, 0, -1, 2]))
    want = 5 / 9 * np.log(5 / 9 / 0.5) + 4 / 9 * np.log(4 / 9 / 0.25)
    torch.testing.assert_close(got, torch.tensor([want, 0.0], dtype=torch.float32))


# --- chunks ---


def test_chunk_logprobs_are_sums():
    logits, targets = rows(1, 6, 5).log(), torch.tensor([0, 1, 2, 3, 4, 0])
    got = chunk_logprobs(logits, targets, torch.tensor([0, 0, -1, 1, 3, 3]), 4)
    each = logits[torch.arange(6), targets]
    torch.testing.assert_close(
        got, torch.stack([each[0] + each[1], each[3], torch.zeros_like(each[0]), each[4] + each[5]])
    )


@given(seed=seeds, temperature=st.sampled_from([1.0, 10.0, 100.0]))
def test_chunk_likelihood_is_a_binary_kl(seed: int, temperature: float):
    rng = np.random.default_rng(seed)
    student, teacher = (torch.from_numpy(-rng.exponential(3, 20) - 1e-3) for _ in range(2))
    p, q = ((x / temperature).exp() for x in (teacher, student))
    want = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(
        chunk_likelihood(student, teacher, temperature=temperature), want, rtol=1e-6, atol=1e-9
    )
    gap = student - teacher  # the correction that cancels it
    assert (
        chunk_likelihood(student, teacher, temperature=temperature, correction_C=gap).abs().max()
        < 1e-9
    )
    leaning = student.clone().requires_grad_()
    chunk_likelihood(leaning, teacher, temperature=temperature).sum().backward()
    assert torch.equal(leaning.grad.sign(), gap.sign()), (
        "a chunk the student finds less likely than the teacher is pulled up"
    )


def test_certain_chunks_and_invalid_chunks():
    assert chunk_likelihood(torch.zeros(1), torch.zeros(1)).item() == 0
    with pytest.raises(ValueError, match="above 1"):
        chunk_likelihood(
            torch.tensor([-1.0]), torch.tensor([-1.0]), correction_C=torch.tensor([1.5])
        )


# --- TRL's own ---


class Strings:
    """The part of a tokenizer that TRL uses."""

    def __init__(self, *tokens: str):
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {t: i for i, t in enumerate(self.tokens)}


def one(logits_TV: torch.Tensor, ids: list[int], ends: list[int]) -> Sequence:
    """One prompt token, then the answer; the last token ends the turn."""
    learned = torch.tensor([False] + [True] * (len(ids) - 1))
    return Sequence(
        logits_TV,
        torch.tensor(ids),
        learned,
        torch.tensor([0, 0, *ends[:-1]]),
        torch.tensor([0, *ends]),
    )


@trl
@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_gold_is_zero_for_two_equal_models(merge: str):
    tokens = Strings("a", "b", "c", "$")
    side = one(rows(3, 5, 4).log(), [0, 1, 2, 1, 3], [1, 2, 3, 3])
    assert gold_loss(gold(tokens, tokens, merge=merge), side, side).item() == pytest.approx(
        0, abs=1e-7
    )


@trl
def test_gold_compares_the_expected_rows():
    """Extended ULD, merging and the shift, against a short reference implementation."""
    P, Q = rows(5, 4, 4), rows(6, 5, 5)
    t, s = (
        one(P.log(), [0, 1, 2, 3], [2, 3, 3]),
        one(Q.log(), [0, 1, 2, 3, 4], [1, 2, 3, 3]),
    )  # "ab" "c" against "a" "b" "c"
    for merge, pairs in (
        ("bayesian", ((P[0], Q[1] * Q[0, 1]), (P[1], Q[2]))),
        ("observed", ((P[1], Q[1] * Q[2, 2]), (P[2], Q[3]))),
    ):
        want = (
            sum(
                (F.pad(p.sort(descending=True).values, (0, 1)) - q.sort(descending=True).values)
                .abs()
                .sum()
                for p, q in pairs
            )
            / 2
        )
        got = gold_loss(gold(Strings(*"abc$"), Strings(*"abcd$"), merge=merge, hybrid=False), s, t)
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
