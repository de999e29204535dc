"""The loss modules: the same numbers as the functions, from logits and from hidden states, and sums
of losses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from persea.errors import DataError, RecipeError
from persea.losses import (
    LOSSES,
    BatchTargets,
    CrossEntropy,
    Divergence,
    EventDivergence,
    EventKL,
    EventTargets,
    HiddenStates,
    ImpossibleTokens,
    LMHead,
    Loss,
    LossOutput,
    SpanLikelihood,
    SpanTargets,
    TeacherDistributions,
    TokenLoss,
    WeightedLosses,
    build_batch_targets,
    build_event_targets,
    build_loss,
    cross_entropy,
    divergence_loss,
    event_divergence_loss,
    event_kl_loss,
    span_likelihood_loss,
)
from tests.losses.test_losses import case, random_bridge

N, D, V = 5, 6, 23


def event_map_and_targets(seed: int = 0) -> tuple[object, EventTargets]:
    """A random event map, and targets of one teacher at positions 0 and 2."""
    rng = np.random.default_rng(seed)
    event_map = random_bridge(rng, 12, V, 5)
    row_M = np.repeat([0, 2], 12)
    probs_M = rng.dirichlet(np.full(12, 0.5), 2).ravel().astype(np.float32)
    return event_map, build_event_targets(event_map, row_M, np.tile(np.arange(12), 2), probs_M)


def hidden_states(requires_grad: bool = True) -> HiddenStates:
    torch.manual_seed(3)
    weight = torch.randn(V, D, requires_grad=requires_grad)
    return HiddenStates(torch.randn(N, D, requires_grad=requires_grad), LMHead(weight, V))


LABELS = torch.tensor([1, 4, 0, 22, 7])


def gradients(out: LossOutput, states: HiddenStates) -> tuple[torch.Tensor, torch.Tensor]:
    out.loss.backward()
    hidden_grad, weight_grad = states.hidden_ND.grad, states.head.weight_VD.grad
    assert hidden_grad is not None and weight_grad is not None
    return hidden_grad, weight_grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["event_kl", "cross_entropy", "sum", "event_divergence"])
def test_logits_and_hidden_states_give_the_same_loss_and_gradient(
    name: str, weighted: bool
) -> None:
    event_map, targets = event_map_and_targets()
    whole = TeacherDistributions(torch.randn(N, 12).log_softmax(-1))
    loss_fn: Loss = {
        "event_kl": EventKL(event_map, 0.7),
        "cross_entropy": CrossEntropy(),
        "sum": WeightedLosses([(EventKL(event_map), 0.5), (_Plain(), 2.0)]),
        "event_divergence": EventDivergence(event_map, Divergence.REVERSE),
    }[name]
    given = whole if name == "event_divergence" else [build_batch_targets(event_map, targets, N)]
    weight_N = torch.rand(N) + 0.5 if weighted else None
    one, other = hidden_states(), hidden_states()
    chunked = loss_fn(one, LABELS, given, weight_N)
    full = loss_fn(other.head.logits(other.hidden_ND), LABELS, given, weight_N)
    assert chunked.num_tokens == full.num_tokens == N
    torch.testing.assert_close(chunked.loss, full.loss)
    torch.testing.assert_close(chunked.token_loss_N, full.token_loss_N)
    assert chunked.metrics.keys() == full.metrics.keys()
    for key, value in chunked.metrics.items():
        torch.testing.assert_close(value, full.metrics[key])
    torch.testing.assert_close(gradients(chunked, one), gradients(full, other))


class _Plain(TokenLoss):
    """Another loss: the probability that is missing from the label."""

    name = "plain"

    def token_losses(
        self, logits_CV: torch.Tensor, labels_C: torch.Tensor, targets: object
    ) -> torch.Tensor:
        return 1 - logits_CV.softmax(-1).gather(1, labels_C[:, None]).squeeze(1)


def test_each_module_gives_the_functions_own_numbers() -> None:
    c = case(1)
    targets = [one.targets for one in c.teachers]
    want = event_kl_loss(c.logits_NV, c.labels_N, targets, 0.7)
    out = EventKL(event_weight=0.7)(c.logits_NV, c.labels_N, targets)
    assert torch.equal(out.loss, want.loss) and out.metrics == want.metrics
    plain = CrossEntropy()(c.logits_NV, c.labels_N)
    torch.testing.assert_close(plain.loss, cross_entropy(c.logits_NV, c.labels_N).loss)
    assert plain.metrics.keys() == {"cross_entropy"}
    teacher_NV = torch.randn_like(c.logits_NV).log_softmax(-1)
    for divergence in Divergence:
        want = divergence_loss(c.logits_NV, teacher_NV, divergence)
        out = EventDivergence(divergence=divergence)(
            c.logits_NV, None, TeacherDistributions(teacher_NV)
        )
        assert torch.equal(out.loss, want.loss) and out.metrics == want.metrics
    event_map, _ = event_map_and_targets()
    logits_NV, teacher_NW = torch.randn(N, V), torch.randn(N, 12).log_softmax(-1)
    out = EventDivergence(event_map)(logits_NV, None, TeacherDistributions(teacher_NW))
    assert torch.equal(out.loss, event_divergence_loss(logits_NV, teacher_NW, event_map).loss)
    spans = SpanTargets(*map(torch.tensor, ([0, 0, 1], [0, 1, 2], [0, 2], [2, -1], [-2.0, -1.0])))
    impossible = ImpossibleTokens(torch.tensor([0, 2]), torch.tensor([3, 9]))
    out = SpanLikelihood()(logits_NV, LABELS, (spans, impossible))
    assert torch.equal(out.loss, span_likelihood_loss(logits_NV, LABELS, spans, impossible).loss)


def test_targets_over_events_need_the_map() -> None:
    event_map, targets = event_map_and_targets()
    logits_NV = torch.randn(N, V)
    batch_targets = build_batch_targets(event_map, targets, N)
    assert torch.equal(
        EventKL(event_map)(logits_NV, LABELS, [targets]).loss,
        EventKL()(logits_NV, LABELS, [batch_targets]).loss,
    )
    with pytest.raises(DataError, match="targets over events without an event map"):
        EventKL()(logits_NV, LABELS, [targets])
    with pytest.raises(RecipeError, match=r"event_weight is 1\.5"):
        EventKL(event_weight=1.5)


@pytest.mark.parametrize(
    "terms",
    [
        [("event_kl", 0.7), ("cross_entropy", 0.3)],
        [("cross_entropy", 1 - 0.7), ("event_kl", 0.7)],
        [("event_kl", 1.4), ("cross_entropy", 0.6)],
    ],
)
def test_event_kl_and_cross_entropy_are_one_pass_with_the_same_bits(
    terms: list[tuple[str, float]],
) -> None:
    event_map, targets = event_map_and_targets()
    batch_targets: list[BatchTargets] = [build_batch_targets(event_map, targets, N)]
    loss_fn = build_loss(terms)
    assert isinstance(loss_fn, WeightedLosses) and len(loss_fn.terms) == 1
    total = 2.0 if terms[0][1] == 1.4 else 1.0
    one, other = hidden_states(), hidden_states()
    out = loss_fn(one, LABELS, batch_targets)
    want = EventKL(event_weight=0.7)(other, LABELS, batch_targets)
    assert torch.equal(out.loss, want.loss * total)
    for mine, theirs in zip(gradients(out, one), gradients(want, other), strict=True):
        torch.testing.assert_close(mine, theirs * total, rtol=0, atol=0 if total == 1 else 1e-6)
    # and the sum is what it says
    parts = [
        weight * build_loss([(name, 1.0)])(hidden_states(False), LABELS, batch_targets).loss
        for name, weight in terms
    ]
    torch.testing.assert_close(out.loss.detach(), sum(parts))


def test_names_are_unique_and_only_losses_of_captures_can_be_listed() -> None:
    assert len({one.name for one in LOSSES}) == len(LOSSES)
    assert not [p for one in LOSSES for p in one().parameters()]
    for name in ("event_divergence", "span_likelihood", "typo"):
        with pytest.raises(
            RecipeError, match=f"training.loss: no loss {name!r} .* -> known: cross_entropy"
        ):
            build_loss([(name, 1.0)])


@pytest.mark.parametrize("make", [lambda: EventKL(), lambda: CrossEntropy(), lambda: _Plain()])
def test_a_loss_reads_no_value_from_the_device(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Loss]
) -> None:
    """float() of a CUDA tensor waits for the device; the loop reads metrics once, where it logs."""
    event_map, targets = event_map_and_targets()
    batch_targets = [build_batch_targets(event_map, targets, N)]

    def read(self: torch.Tensor) -> float:
        raise AssertionError("a value was read")

    monkeypatch.setattr(torch.Tensor, "__float__", read)
    monkeypatch.setattr(torch.Tensor, "item", read)
    for given in (hidden_states(), torch.randn(N, V)):
        out = make()(given, LABELS, batch_targets)
        assert all(isinstance(value, torch.Tensor) for value in out.metrics.values())
        assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    """A model that transformers loaded in bfloat16 gives such logits."""
    c = case(3)
    half_NV = torch.as_tensor(c.logits_NV).to(dtype)
    targets = [t.targets for t in c.teachers]
    out = EventKL(event_weight=0.7)(half_NV, c.labels_N, targets)
    expected = EventKL(event_weight=0.7)(half_NV.float(), c.labels_N, targets)
    assert out.loss.dtype is torch.float32 and torch.equal(out.loss, expected.loss)
