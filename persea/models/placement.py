"""Quantised weights and offloading to main memory, for teachers too large for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from persea.errors import MissingRequirementError

if TYPE_CHECKING:
    import torch

# Packages besides transformers. Without them transformers would load an MXFP4 model in 16 bits,
# four times as large, so persea refuses instead.
QUANTIZATION_PACKAGES = {
    "8bit": ("bitsandbytes",),
    "4bit": ("bitsandbytes",),
    "mxfp4": ("triton", "kernels"),
}
FOUR_BIT_TYPE = "nf4"  # the weights of bitsandbytes' 4-bit format
MIN_MXFP4_CAPABILITY = (7, 5)


def compute_device() -> torch.device:
    """Return the accelerator of this machine (CUDA, MPS, XPU ...), or the CPU."""
    import torch

    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        if found is not None:
            return found
    return torch.device("cpu")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for products in bfloat16.

    A processor without them computes such a product in several times the time of float32. GPUs are
    not asked: each that torch supports has them, or float32 is no faster there.
    """
    import torch

    has_mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if device.type != "cpu" or not has_mkldnn:
        return True  # not known to be slow
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether a training multiplies in bfloat16.

    Args:
        precision: "bfloat16", "float32", or "auto" = bfloat16 where the device has instructions
            for it. (oneDNN multiplies in bfloat16 on any processor with AVX-512, and is slower
            than in float32 without such instructions.)
        device: Where the training runs.
    """
    import torch

    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False  # not measured
    tell: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    found = tell()  # torch 2.11 does not tell
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def placement_kwargs(quantize: str, offload: bool, where: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for quantisation and offloading; {} for neither.

    Args:
        quantize: "" or "none", "8bit", "4bit", "mxfp4".
        offload: Whether weights may lie in main memory.
        where: The place for error messages.

    Raises:
        MissingRequirementError: No GPU, one that is too old, or a missing package.
    """
    import torch

    quantize = "" if quantize == "none" else quantize
    option = f"quantize: {quantize}" if quantize else "offload: true"
    if not quantize and not offload:
        return {}
    if not torch.cuda.is_available():
        raise MissingRequirementError(
            f"{option} needs a CUDA GPU, and there is none",
            where=where,
            remedy="capture on a machine with a GPU, or delete the option: a CPU loads the weights "
            "as they are stored",
        )
    missing = [
        name
        for name in (
            *QUANTIZATION_PACKAGES.get(quantize, ()),
            *(("accelerate",) if offload else ()),
        )
        if find_spec(name) is None
    ]
    if missing:
        raise MissingRequirementError(
            f"{option} needs {' and '.join(missing)}",
            where=where,
            remedy=f"pip install {' '.join(missing)}",
        )
    if quantize == "mxfp4" and torch.cuda.get_device_capability() < MIN_MXFP4_CAPABILITY:
        raise MissingRequirementError(
            "quantize: mxfp4 needs a GPU of compute capability 7.5 or more",
            where=where,
            remedy="quantize: 4bit, or a newer GPU",
        )
    kwargs: dict[str, Any] = {
        "device_map": "auto" if offload else {"": torch.cuda.current_device()}
    }
    if quantize:
        transformers: Any = import_module("transformers")
        kwargs["quantization_config"] = {
            "8bit": lambda: transformers.BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=offload
            ),
            "4bit": lambda: transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=FOUR_BIT_TYPE,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
            "mxfp4": lambda: transformers.Mxfp4Config(),
        }[quantize]()
    return kwargs
