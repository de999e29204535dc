"""A head's three matrix products, by the quicker of torch's two libraries for them.

torch multiplies float32 matrices by MKL, which on processors that are not Intel's keeps to AVX2. torch's oneDNN writes its loops for the
processor at hand: on an AMD EPYC with AVX-512, 512 wide, 128,256 tokens, a product of 256 positions takes .18 to .25 CPU s instead of .33 to
.55, and small heads gain as much. Both multiply and add in float32. oneDNN is asked where the processor has AVX-512 and torch has not been
told to leave it (torch.backends.mkldnn.enabled); on others it was not measured.

oneDNN compiles a routine for every shape, and keeps it: .6 MiB and a millisecond each. Batches have ever other numbers of positions, so these
are rounded up to one of eight in an octave (`rows_for`), with rows of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

STRIP_ROWS = 2048  # rows of the weight at once: what is made of them is added or laid down from a core's own cache, and needs no room to speak of


def can_use_onednn(like_XY: torch.Tensor) -> bool:
    """Whether matrices like this one are multiplied by oneDNN."""
    if (
        like_XY.dtype is not torch.float32
        or like_XY.device.type != "cpu"
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
    ):
        return False
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)  # type: ignore[no-untyped-call]


def padded_rows(count: int, like_XY: torch.Tensor) -> int:
    """How many rows the products of `count` rows are made with: at least as many, at most an eighth more from 128 on."""
    return (
        -(-count // _row_multiple(count)) * _row_multiple(count)
        if can_use_onednn(like_XY)
        else count
    )


def max_padded_rows(count: int, like_XY: torch.Tensor) -> int:
    """The most rows, of which `rows_for` makes no more than `count`; at least one."""
    return (
        max(1, count // _row_multiple(count) * _row_multiple(count))
        if can_use_onednn(like_XY)
        else count
    )


def _row_multiple(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length() >> 4)


def project_to_logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, out_CV: torch.Tensor
) -> None:
    """Into = hidden weight^T."""
    if not can_use_onednn(hidden_CD):
        torch.mm(hidden_CD, weight_VD.T, out=out_CV)
        return
    for part in _row_strips(weight_VD):
        out_CV[:, part] = _matmul_transposed(hidden_CD, weight_VD[part])


def project_to_hidden(grad_CV: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Pull weight, [C, D]."""
    return (
        _matmul_transposed(grad_CV, weight_VD.T)
        if can_use_onednn(grad_CV)
        else torch.mm(grad_CV, weight_VD)
    )


def accumulate_weight_gradient(
    out_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, is_first: bool
) -> None:
    """Into += pull^T hidden; the first time into is overwritten.

    Half precision goes a part of the vocabulary at a time, so that sums over chunks are float32's.
    """
    quick = can_use_onednn(grad_CV)
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
    """Left right^T."""
    product_XZ: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        left_XY, right_ZY, None, "none", [], ""
    )
    return product_XZ


def _row_strips(weight_VD: torch.Tensor, size: int = STRIP_ROWS) -> Iterator[slice]:
    return (slice(begin, begin + size) for begin in range(0, len(weight_VD), size))
