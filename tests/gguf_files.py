"""Write small GGUF files of a model and a tokenizer, as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen2": "qwen2", "gemma3_text": "gemma3"}
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
Edit = Callable[[str, np.ndarray], np.ndarray | None]


def interleave(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of Llama's query and key matrices."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The weights of a model under their GGUF names."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    enum = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        weights = parameter.detach().float().numpy()
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        if arch == "llama" and ("attn_q" in new or "attn_k" in new):
            is_q = "attn_q" in new
            heads = config.num_attention_heads if is_q else config.num_key_value_heads
            weights = interleave(weights, heads)
        if arch == "gemma3" and "norm" in new:
            weights = weights + np.float32(1)
        tensors[new] = weights
    return tensors


def metadata_of(model: Any) -> dict[str, Any]:
    """The metadata of a model's architecture, without its prefix."""
    config = model.config
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if config.model_type == "llama":
        values["rope.dimension_count"] = config.head_dim
    else:
        values |= {f"attention.{name}_length": config.head_dim for name in ("key", "value")}
    if config.model_type == "gemma3_text":
        values["attention.sliding_window"] = config.sliding_window
    return values


def tokenizer_metadata(folder: Path, pre: str) -> dict[str, Any]:
    """The metadata of a tokenizer's folder; `pre` is "" for SentencePiece."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocab = dict(spec["model"]["vocab"]) | {t["content"]: t["id"] for t in spec["added_tokens"]}
    tokens = [token for token, _ in sorted(vocab.items(), key=lambda pair: pair[1])]
    assert sorted(vocab.values()) == list(range(len(tokens)))
    types = [NORMAL] * len(tokens)
    for added in spec["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    values: dict[str, Any] = {
        "ggml.model": "gpt2" if pre else "llama",
        "ggml.pre": pre or "default",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.add_bos_token": False,
    }
    if pre:
        merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
        values["ggml.merges"] = merges
    else:
        for k, token in enumerate(tokens):
            types[k] = BYTE if token.startswith("<0x") else types[k]
        values["ggml.scores"] = [-float(k) for k in range(len(tokens))]
        values["ggml.add_space_prefix"] = False
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            values[f"ggml.{key}_token_id"] = vocab[token]
    if (folder / "chat_template.jinja").is_file():
        values["chat_template"] = (folder / "chat_template.jinja").read_text()
    return values


def write_file(
    path: Path, arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Path:
    """Write a GGUF file of these values; a tensor may be a pair of weights and a ggml type."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if key in ("general.architecture", "general.alignment") or value is None:
            continue
        _add(writer, key, value)
    for name, tensor in tensors.items():
        weights, kind = tensor if isinstance(tensor, tuple) else (tensor, Q.F32)
        if kind == Q.F32:
            writer.add_tensor(name, weights)
        else:
            writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Sequence):
        writer.add_array(key, value)
    else:
        raise TypeError(key)


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Path,
    pre: str,
    kind: Q = Q.F32,
    more: Mapping[str, Any] | None = None,
    edit: Callable[[dict[str, Any]], object] = lambda tensors: None,
) -> Path:
    """Write a model with its tokenizer.

    Args:
        path: The file.
        model: A transformers model.
        tokenizer: Folder of its tokenizer.
        pre: Name of the pre-tokenizer; "" for SentencePiece.
        kind: ggml type of the matrices.
        more: Further metadata; None leaves a key out.
        edit: Changes the tensors.
    """
    arch = ARCHITECTURES[model.config.model_type]
    tensors: dict[str, Any] = {
        name: (weights, kind) if weights.ndim > 1 else weights
        for name, weights in tensors_of(model).items()
    }
    edit(tensors)
    metadata = {f"{arch}.{k}": v for k, v in metadata_of(model).items()}
    metadata |= {f"tokenizer.{k}": v for k, v in tokenizer_metadata(tokenizer, pre).items()}
    return write_file(path, arch, metadata | dict(more or {}), tensors)
