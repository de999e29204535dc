"""The three matrix products of a language-model head, by the faster of torch's two CPU libraries.

torch multiplies float32 matrices with MKL, which uses only AVX2 on processors not made by Intel.
torch's oneDNN generates code for the processor at hand. On an AMD EPYC with AVX-512, hidden size
512 and 128,256 tokens, a product of 256 positions takes 0.18-0.25 CPU s instead of 0.33-0.55, and
small heads gain as much. On an Intel Xeon the three products of MKL take .77 of oneDNN's time. Both
libraries multiply and add in float32. oneDNN is used if the processor has AVX-512 and is not made
by Intel, and torch.backends.mkldnn.enabled is set; on other processors it was not measured.

oneDNN compiles and keeps a routine for every shape: 0.6 MiB and a millisecond each. The number of
positions differs from batch to batch, so it is rounded up to one of eight sizes per power of two
(`padded_rows`), with rows of zeros.

Where products in bfloat16 are asked for, a CPU rounds the factors of float32 matrices to bfloat16
and adds and returns float32 (`rounding_factors`).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

# Rows of the weight processed at a time: their product is added from the cache of one core.
STRIP_ROWS = 2048


def can_use_onednn(like_XY: torch.Tensor) -> bool:
    """Return whether matrices like this one are multiplied by oneDNN."""
    if (
        like_XY.dtype is not torch.float32
        or like_XY.device.type != "cpu"
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
    ):
        return False
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)  # type: ignore[no-untyped-call]


@cache
def is_made_by_intel() -> bool:
    """Return whether the processor is Intel's."""
    info = Path("/proc/cpuinfo")
    return "GenuineIntel" in (info.read_text() if info.is_file() else platform.processor())


def is_onednn_faster(like_XY: torch.Tensor) -> bool:
    """Return whether oneDNN multiplies the matrices of a training step."""
    return can_use_onednn(like_XY) and not is_made_by_intel()


@contextmanager
def rounding_factors(is_on: bool) -> Iterator[None]:
    """Let a CPU round the factors of float32 products to bfloat16; sums stay float32.

    A processor without instructions for bfloat16 multiplies in float32.
    """
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    if is_on:
        products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def padded_rows(count: int, like_XY: torch.Tensor) -> int:
    """Return the padded number of rows: at least `count`, at most an eighth more from 128 on."""
    return (
        -(-count // _row_multiple(count)) * _row_multiple(count)
        if is_onednn_faster(like_XY)
        else count
    )


def max_padded_rows(count: int, like_XY: torch.Tensor) -> int:
    """Return the largest number of rows that `padded_rows` keeps within `count`; at least 1."""
    return (
        max(1, count // _row_multiple(count) * _row_multiple(count))
        if is_onednn_faster(like_XY)
        else count
    )


def _row_multiple(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length() >> 4)


def project_to_logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, out_CV: torch.Tensor
) -> None:
    """Write hidden weight^T to `out_CV`."""
    if not is_onednn_faster(hidden_CD):
        torch.mm(hidden_CD, weight_VD.T, out=out_CV)
        return
    for part in _row_strips(weight_VD):
        out_CV[:, part] = _matmul_transposed(hidden_CD, weight_VD[part])


def project_strip(hidden_CD: torch.Tensor, weight_SD: torch.Tensor) -> torch.Tensor:
    """Return hidden weight^T of some rows of a weight, a new tensor [C, S].

    It is float32 on a GPU, elsewhere of the type of the hidden states. A strip of STRIP_ROWS rows
    is as quick with MKL as with oneDNN on a processor without AVX-512 (Zen 3, 128 and 256
    positions), and 1.2 to 1.4 times as quick as the whole weight at once.
    """
    if can_use_onednn(hidden_CD) and weight_SD.dtype is torch.float32:
        return _matmul_transposed(hidden_CD, weight_SD)
    if hidden_CD.device.type == "cuda" and hidden_CD.dtype is not torch.float32:
        return torch.mm(hidden_CD, weight_SD.T, out_dtype=torch.float32)
    return torch.nn.functional.linear(hidden_CD, weight_SD.to(hidden_CD.dtype))


def project_to_hidden(grad_CV: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Return grad weight, [C, D]."""
    return (
        _matmul_transposed(grad_CV, weight_VD.T)
        if is_onednn_faster(grad_CV)
        else torch.mm(grad_CV, weight_VD)
    )


def accumulate_weight_gradient(
    out_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, is_first: bool
) -> None:
    """Add grad^T hidden to `out_VD`, or overwrite `out_VD` for the first chunk.

    In half precision the product is made for a part of the vocabulary at a time, so that sums over
    chunks are float32.
    """
    quick = is_onednn_faster(grad_CV)
    if grad_CV.dtype == out_VD.dtype and not quick:
        out_VD.addmm_(grad_CV.T, hidden_CD, beta=0 if is_first else 1)
        return
    for part in _row_strips(out_VD, STRIP_ROWS if quick else 8 * STRIP_ROWS):
        added_PD = (
            _matmul_transposed(grad_CV[:, part].T, hidden_CD.T)
            if quick
            else torch.mm(grad_CV[:, part].T, hidden_CD)
        )
        if is_first:
            out_VD[part] = added_PD
        else:
            out_VD[part] += added_PD


def _matmul_transposed(left_XY: torch.Tensor, right_ZY: torch.Tensor) -> torch.Tensor:
    """Return left right^T."""
    product_XZ: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        left_XY, right_ZY, None, "none", [], ""
    )
    return product_XZ


def _row_strips(weight_VD: torch.Tensor, size: int = STRIP_ROWS) -> Iterator[slice]:
    return (slice(begin, begin + size) for begin in range(0, len(weight_VD), size))
