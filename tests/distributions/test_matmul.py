"""A head's products are those of float64, whichever library makes them, in one strip of the
vocabulary or in many.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persea.distributions import matmul as products
from persea.distributions.matmul import (
    STRIP_ROWS,
    accumulate_weight_gradient,
    can_use_onednn,
    max_padded_rows,
    padded_rows,
    project_to_hidden,
    project_to_logits,
    rounding_factors,
)
from persea.losses import Divergence, LMHead, divergence_loss_from_hidden

SIZES = st.sampled_from([1, 7, STRIP_ROWS, STRIP_ROWS + 1, 2 * STRIP_ROWS + 5])
HAS_ONEDNN = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often oneDNN is asked, counted from now on."""
    times, real = [0], products._matmul_transposed

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        times[0] += 1
        return real(left, right)

    monkeypatch.setattr(products, "_matmul_transposed", counted)
    return times


@given(
    seed=st.integers(0, 2**31),
    C=st.integers(1, 9),
    V=SIZES,
    D=st.integers(1, 33),
    quick=st.booleans(),
    first=st.booleans(),
    turned=st.booleans(),
)
def test_products_are_exact_to_float32(
    seed: int, C: int, V: int, D: int, quick: bool, first: bool, turned: bool
):
    generator = torch.Generator().manual_seed(seed)
    hidden_CD, pull_CV = (
        torch.randn(C, D, generator=generator),
        torch.randn(C, V, generator=generator),
    )
    weight_VD = (
        torch.randn(D, V, generator=generator).T
        if turned
        else torch.randn(V, D, generator=generator)
    )
    into_CV, into_VD = (
        torch.full((C, V), torch.nan),
        torch.full((V, D), torch.nan if first else 0.5),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "is_onednn_faster", lambda like_XY: quick and HAS_ONEDNN)
        project_to_logits(hidden_CD, weight_VD, into_CV)
        back_CD = project_to_hidden(pull_CV, weight_VD)
        accumulate_weight_gradient(into_VD, pull_CV, hidden_CD, first)
    before = 0.0 if first else 0.5
    for got, want, terms in (
        (into_CV, hidden_CD.double() @ weight_VD.double().T, D),
        (back_CD, pull_CV.double() @ weight_VD.double(), V),
        (into_VD, pull_CV.double().T @ hidden_CD.double() + before, C),
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=4e-7 * terms**0.5 * 8)


@pytest.mark.skipif(not HAS_ONEDNN, reason="a processor without AVX-512")
def test_onednn_is_asked_where_it_is_quicker_and_nowhere_else(monkeypatch: pytest.MonkeyPatch):
    times = asked(monkeypatch)
    monkeypatch.setattr(products, "is_made_by_intel", lambda: False)
    x, w = torch.randn(3, 4), torch.randn(STRIP_ROWS + 1, 4)
    project_to_logits(x, w, torch.empty(3, len(w)))
    assert times == [2]  # two strips
    project_to_hidden(torch.randn(3, len(w)), w)
    accumulate_weight_gradient(torch.zeros(len(w), 4), torch.randn(3, len(w)), x, is_first=False)
    assert times == [5]
    project_to_logits(x.double(), w.double(), torch.empty(3, len(w), dtype=torch.float64))
    with monkeypatch.context() as intel:
        intel.setattr(products, "is_made_by_intel", lambda: True)
        project_to_logits(x, w, torch.empty(3, len(w)))
        assert times == [5] and padded_rows(129, x) == max_padded_rows(129, x) == 129
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    project_to_logits(x, w, torch.empty(3, len(w)))
    assert times == [5]


def test_other_processors_and_precisions_keep_to_torch(monkeypatch: pytest.MonkeyPatch):
    assert not can_use_onednn(torch.zeros(1, dtype=torch.float64)) and not can_use_onednn(
        torch.zeros(1, dtype=torch.bfloat16)
    )
    assert not can_use_onednn(torch.zeros(1, device="meta"))
    assert can_use_onednn(torch.zeros(1)) == HAS_ONEDNN
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not can_use_onednn(torch.zeros(1))


@pytest.mark.parametrize("text", ["vendor_id : GenuineIntel", "vendor_id : AuthenticAMD"])
def test_the_maker_is_read_from_the_system(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(products, "Path", lambda name: tmp_path / "cpuinfo")
    assert products.is_made_by_intel.__wrapped__() == ("Intel" in text)
    monkeypatch.setattr(products, "Path", lambda name: tmp_path / "none")
    monkeypatch.setattr(platform, "processor", lambda: text)
    assert products.is_made_by_intel.__wrapped__() == ("Intel" in text)


def test_rounded_factors_give_the_product_of_bfloat16_or_float32_and_nothing_else() -> None:
    """A processor without bfloat16 keeps to float32; either way the sums are float32."""
    generator = torch.Generator().manual_seed(0)
    x_CD, w_VD = (torch.randn(n, 512, generator=generator) for n in (64, 300))
    plain_CV, rounded_CV = torch.empty(2, 64, 300)
    with rounding_factors(True):
        project_to_logits(x_CD, w_VD, rounded_CV)
    project_to_logits(x_CD, w_VD, plain_CV)
    exact = x_CD.double() @ w_VD.double().T
    of_rounded = x_CD.bfloat16().double() @ w_VD.bfloat16().double().T
    torch.testing.assert_close(plain_CV.double(), exact, rtol=1e-5, atol=1e-4)
    errors = [float((rounded_CV.double() - one).abs().max()) for one in (exact, of_rounded)]
    assert min(errors) < 1e-4, errors  # far below what a rounded sum would be off (about .1)


def test_rounding_ends_with_its_block_even_after_an_error() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with pytest.raises(ValueError), rounding_factors(True):
        assert setting.fp32_precision == "bf16"
        raise ValueError
    assert setting.fp32_precision == before
    with rounding_factors(False):
        assert setting.fp32_precision == before
    torch.get_float32_matmul_precision()  # raises if settings contradict each other


def test_half_precision_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    pulls, hiddens = (
        torch.randn(64, 2, 30, generator=generator).bfloat16(),
        torch.randn(64, 2, 5, generator=generator).bfloat16(),
    )
    into_VD = torch.empty(30, 5)
    for k, (pull_CV, hidden_CD) in enumerate(zip(pulls, hiddens, strict=True)):
        accumulate_weight_gradient(into_VD, pull_CV, hidden_CD, is_first=k == 0)
    want = torch.einsum("kcv,kcd->vd", pulls.double(), hiddens.double())
    assert (
        (into_VD.double() - want).abs().max() < 0.15
    )  # each of 64 products is rounded to 8 bits; a sum kept in them would be off by .5 and more


@given(count=st.integers(1, 100_000))
def test_there_are_few_numbers_of_rows(count: int):
    """Eight in an octave from 128 on, multiples of 16 below: oneDNN keeps a routine for each."""
    like = torch.zeros(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "is_onednn_faster", lambda like_XY: True)
        rows = padded_rows(count, like)
        assert count <= rows < count + max(16, count / 8 + 1) and rows % 16 == 0
        assert padded_rows(rows, like) == rows
        few = max_padded_rows(count, like)
        assert 1 <= few <= count and (few == padded_rows(few, like) or count < 16)
        assert few > count - max(16, count / 8 + 1)
        patch.setattr(products, "is_onednn_faster", lambda like_XY: False)
        assert padded_rows(count, like) == max_padded_rows(count, like) == count
    double = torch.zeros(1, dtype=torch.float64)
    assert padded_rows(count, double) == max_padded_rows(count, double) == count


@pytest.mark.skipif(not HAS_ONEDNN, reason="a processor without AVX-512")
def test_batches_of_ever_other_sizes_ask_for_few_shapes(monkeypatch: pytest.MonkeyPatch):
    shapes, real = set[tuple[torch.Size, torch.Size]](), products._matmul_transposed

    def seen(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        shapes.add((left.shape, right.shape))
        return real(left, right)

    monkeypatch.setattr(products, "_matmul_transposed", seen)
    monkeypatch.setattr(products, "is_made_by_intel", lambda: False)
    weight, theirs = torch.randn(50, 4, requires_grad=True), torch.randn(50, 4)
    for n in range(100, 257):
        hidden = torch.randn(n, 4, requires_grad=True)
        divergence_loss_from_hidden(
            hidden,
            LMHead(weight, 50),
            (torch.randn(n, 4), LMHead(theirs, 50)),
            divergence=Divergence.FORWARD,
        ).loss.backward()
    assert len(shapes) == 3 * len({padded_rows(n, weight) for n in range(100, 257)}) <= 36
