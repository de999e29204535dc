"""Dequantise the weights of a GGUF file with transformers, and prove that nothing is lost.

transformers skips tensors and metadata of a GGUF file that it does not know, without a warning. So
each metadata value of the architecture must stand in the configuration that comes out, and the
number of weights must be that of the file; otherwise the file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from persea.errors import DataError, StorageError
from persea.models.gguf_header import GgufHeader
from persea.models.gguf_progress import read_percent

Step: TypeAlias = Callable[[str, float], None]

SAFETENSORS_REMEDY = "give the model's folder of safetensors"
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 and later: transformers' `rope_type: llama3`, without its factor
LLAMA3_ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Gemma's attention is scaled by the width of a head, except in its 27 B models (llama.cpp,
# src/models/gemma2*.cpp and gemma3*.cpp).
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
HARMLESS_KEYS = ("tensor_data_layout", "rope.scaling.finetuned", "vocab_size")
HARMLESS_VALUES: Mapping[str, Any] = {
    "rope.scaling.type": "none",
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
}
# metadata key without the architecture -> attribute of the configuration
CONFIG_NAMES: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
    "expert_count": "num_experts",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.dimension_count": "head_dim",
    "rope.dimension_count_swa": "head_dim",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_theta_of_sliding_layers",
    "attention.sliding_window_pattern": "sliding_layers",
}


def convert_weights(
    header: GgufHeader, file: Path, folder: Path, dtype: str, step: Step, where: str
) -> None:
    """Write configuration and dequantised weights of a GGUF file to a folder.

    Args:
        header: The file's header.
        file: The file, in a folder that holds nothing else.
        folder: The folder to write to.
        dtype: "float32" or "bfloat16".
        step: Progress callback.
        where: The place for error messages.

    Raises:
        DataError: transformers cannot load the file, or not completely.
        StorageError: The weights cannot be written.
    """
    from safetensors import SafetensorError

    step("weights", 0.05)
    model, loading_info = _load(header, file, dtype, step, where)
    lost = {k: v for k, v in loading_info.items() if v}
    if lost:
        kind, names = next(iter(lost.items()))
        raise _incomplete(header, f"{kind.replace('_', ' ')}: {sorted(map(str, names))[0]}", where)
    _restore_rope(header, model.config, file, where)
    _refuse_unread_metadata(header, model.config, where)
    ignored = sum(math.prod(t.shape) for t in header.tensors if t.name == ROPE_FACTORS)
    in_file, loaded = header.num_weights - ignored, sum(p.numel() for p in model.parameters())
    if in_file != loaded:
        raise _incomplete(header, f"{loaded:,} of {in_file:,} weights", where)
    step("write", 0.8)
    # transformers refuses to save what it calls quantised; these weights no longer are
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    try:
        with read_percent(lambda share: step("write", 0.8 + 0.1 * share)):
            model.save_pretrained(folder)
    except SafetensorError as error:
        raise StorageError(f"cannot write the weights: {error}") from error


def weight_notes(header: GgufHeader) -> list[str]:
    """Return what persea adds to transformers' reading of the weights, for people."""
    if any(t.name == ROPE_FACTORS for t in header.tensors):
        return ["the scaling of its rotary frequencies is Llama 3's"]
    return []


def _load(
    header: GgufHeader, file: Path, dtype: str, step: Step, where: str
) -> tuple[Any, Mapping[str, Any]]:
    import torch
    import transformers

    # Where it exists, the option keeps transformers from leaving the weights packed.
    options = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    try:
        config = transformers.AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        _complete_config(header, config)
        with read_percent(lambda share: step("weights", 0.1 + 0.7 * share)):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent,
                config=config,
                gguf_file=file.name,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
        model, loading_info = loaded
        return model, loading_info
    except MemoryError as error:
        raise DataError(
            f"not enough memory to dequantise {header.path.name}",
            where=where,
            remedy="a machine with more memory, or " + SAFETENSORS_REMEDY,
        ) from error
    except Exception as error:  # transformers raises a dozen kinds here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"transformers cannot load {header.path.name}, a GGUF file of the architecture "
            f"{header.architecture!r}: {reason}",
            where=where,
            remedy=SAFETENSORS_REMEDY,
        ) from error


def _incomplete(header: GgufHeader, detail: str, where: str) -> DataError:
    return DataError(
        f"transformers does not load {header.path.name}, of the architecture "
        f"{header.architecture!r}, completely: {detail}",
        where=where,
        remedy=SAFETENSORS_REMEDY,
    )


def _config_value(config: Any, name: str) -> Any:
    """Return a value of a configuration as GGUF metadata states it."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = isinstance(rope.get("full_attention"), dict)
    if name == "rope_theta":
        return (rope["full_attention"] if by_layer_type else rope).get("rope_theta")
    if name == "rope_theta_of_sliding_layers":
        return rope.get("sliding_attention", {}).get("rope_theta") if by_layer_type else None
    if name == "sliding_layers":
        return [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
    if name == "head_dim" and getattr(config, name, None) is None:
        return config.hidden_size // config.num_attention_heads
    return getattr(config, name, None)


def _refuse_unread_metadata(header: GgufHeader, config: Any, where: str) -> None:
    """Raise if a metadata value of the architecture does not stand in the configuration.

    Raises:
        DataError: A value is missing there, or another.
    """
    prefix = f"{header.architecture}."
    for key, value in header.metadata.items():
        name = key.removeprefix(prefix)
        if name == key or name in HARMLESS_KEYS or HARMLESS_VALUES.get(name) == value:
            continue
        read = _config_value(config, CONFIG_NAMES[name]) if name in CONFIG_NAMES else None
        if name == "attention.sliding_window_pattern" and isinstance(value, int) and read:
            value = [(k + 1) % value > 0 for k in range(len(read))]
        same = (
            math.isclose(value, read, rel_tol=1e-6)
            if isinstance(value, float) and isinstance(read, int | float)
            else value == read
        )
        if not same:
            raise DataError(
                f"{header.path.name} has {key} = {value!r}, which transformers "
                + ("does not read" if read is None else f"reads as {read!r}"),
                where=where,
                remedy=SAFETENSORS_REMEDY,
            )


def _complete_config(header: GgufHeader, config: Any) -> None:
    """Set what transformers does not take from the file: the width of a head, Gemma's scale."""
    head_dim = header.metadata.get(f"{header.architecture}.attention.key_length")
    if head_dim is not None and hasattr(config, "head_dim"):
        config.head_dim = int(head_dim)
    if header.architecture in GEMMA_27B_LAYERS:
        is_27b = config.num_hidden_layers == GEMMA_27B_LAYERS[header.architecture]
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        )


def _restore_rope(header: GgufHeader, config: Any, file: Path, where: str) -> None:
    """Write Llama 3's scaled rotary frequencies, which transformers drops, to the configuration.

    Raises:
        DataError: The factors in the file are no such scaling.
    """
    if all(t.name != ROPE_FACTORS for t in header.tensors):
        return
    from gguf import GGUFReader

    stored = next(t for t in GGUFReader(file).tensors if t.name == ROPE_FACTORS)
    factors_H = np.asarray(stored.data, np.float64)
    head_dim = int(_config_value(config, "head_dim"))
    theta = float(_config_value(config, "rope_theta"))
    largest = round(float(factors_H.max()))
    if np.all(factors_H == 1):
        return
    expected_H = llama3_rope_factors(head_dim, theta, largest)
    if factors_H.shape != expected_H.shape or not np.allclose(factors_H, expected_H, rtol=1e-3):
        raise DataError(
            f"{header.path.name} scales its rotary frequencies in a way that is not Llama 3's",
            where=where,
            remedy=SAFETENSORS_REMEDY,
        )
    config.rope_parameters = {**LLAMA3_ROPE, "rope_theta": theta, "factor": float(largest)}


def llama3_rope_factors(head_dim: int, theta: float, factor: float) -> npt.NDArray[np.float64]:
    """Return the divisors of the rotary frequencies of Llama 3.1 and later.

    Args:
        head_dim: Width of a head.
        theta: Base of the frequencies.
        factor: Divisor of the lowest frequencies.

    Returns:
        float64 [head_dim / 2].
    """
    low, high = float(LLAMA3_ROPE["low_freq_factor"]), float(LLAMA3_ROPE["high_freq_factor"])
    context = float(LLAMA3_ROPE["original_max_position_embeddings"])
    wavelengths_H = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth_H = (context / wavelengths_H - low) / (high - low)
    between_H = 1 / ((1 - smooth_H) / factor + smooth_H)
    return np.where(
        wavelengths_H < context / high,
        1.0,
        np.where(wavelengths_H > context / low, factor, between_H),
    )
