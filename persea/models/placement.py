"""Fewer bits a weight, and main memory beside a GPU's, for teachers that fit no other way; or why this machine cannot."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from persea.errors import MissingRequirementError

QUANTIZATION_PACKAGES = {
    "8bit": ("bitsandbytes",),
    "4bit": ("bitsandbytes",),
    "mxfp4": ("triton", "kernels"),
}  # beside transformers, which would load
# an MXFP4 model in 16 bits, four times as large, where one of them is missing: refused here instead


def placement_kwargs(quantize: str, offload: bool, where: str) -> dict[str, Any]:
    """What `from_pretrained` is told beside the rest; {} where a model is loaded as it is stored, in one place.

    quantize  "" or "none", 8bit, 4bit, mxfp4
    Raises EnvironmentLacks where the machine has no GPU, too old a one, or not the package it takes.
    """
    import torch

    quantize = "" if quantize == "none" else quantize
    asked = f"quantize: {quantize}" if quantize else "offload: true"
    if not quantize and not offload:
        return {}
    if not torch.cuda.is_available():
        raise MissingRequirementError(
            f"{asked} needs a CUDA GPU, and there is none",
            where=where,
            remedy="capture on a machine that has one, or delete it: on a CPU the weights are loaded whole",
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
            f"{asked} needs {' and '.join(missing)}",
            where=where,
            remedy=f"pip install {' '.join(missing)}",
        )
    if quantize == "mxfp4" and torch.cuda.get_device_capability() < (7, 5):
        raise MissingRequirementError(
            "quantize: mxfp4 needs a GPU of compute capability 7.5 or more",
            where=where,
            remedy="quantize: 4bit, or a newer GPU",
        )
    told: dict[str, Any] = {"device_map": "auto" if offload else {"": torch.cuda.current_device()}}
    if quantize:
        from transformers import BitsAndBytesConfig, Mxfp4Config

        told["quantization_config"] = {
            "8bit": lambda: BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=offload
            ),
            "4bit": lambda: BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            ),
            "mxfp4": Mxfp4Config,
        }[quantize]()
    return told
