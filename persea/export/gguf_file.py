"""Write a student as one GGUF file, and prove it by reading the file back.

The metadata and tensor names are those that llama.cpp reads
(https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py): Llama's query and key
rows are reordered for its rotary embedding, Gemma's norms hold weight + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from persea import storage
from persea.errors import DataError, MissingRequirementError, RefusedError, StorageError
from persea.export.forms import GgufPrecision
from persea.export.gguf_vocabulary import HF_REMEDY, gguf_vocabulary, has_space_prefix

# transformers' model type -> architecture of llama.cpp
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
GEMMA_FULL_EVERY = 6  # llama.cpp's gemma3: every sixth layer attends to the whole text
GEMMA_SLIDING_THETA = 10000.0
Q8_BLOCK = 32
SKIPPED_TENSORS = ("rotary_emb.inv_freq",)
PROBES = (
    "The quick brown fox, 1234567 and 3.14!\n\nIt's   spaced\tout.",
    "Xin chào thế giới — こんにちは世界。สวัสดีครับ 你好 안녕하세요",
    "def f(x):\n    return {'a': x ** 2}\n\n\n# ½ 🥑 <b>&amp;</b>",
    " leading and trailing ",
)


@dataclass(frozen=True)
class GgufFile:
    """A written file.

    Attributes:
        path: The file.
        architecture: llama.cpp's architecture.
        precision: How matrices are stored.
        num_tensors: Number of tensors.
    """

    path: Path
    architecture: str
    precision: GgufPrecision
    num_tensors: int


def write_gguf(
    student: Path,
    path: Path,
    name: str,
    precision: GgufPrecision = GgufPrecision.AUTO,
    licence: str = "",
) -> GgufFile:
    """Write a student's weights, tokenizer and chat template as one GGUF file.

    The file is written whole or not at all. Its tokenizer is rebuilt from the file and compared
    with the student's own before the file is published.

    Args:
        student: Folder of the student: safetensors, config.json, tokenizer.json.
        path: The file to write.
        name: Name of the model in the metadata.
        precision: How matrices are stored; vectors are always float32.
        licence: Licence in the metadata; "" = none.

    Raises:
        RefusedError: llama.cpp has no form for the architecture or the tokenizer.
        DataError: The folder lacks a file.
        MissingRequirementError: The package gguf is missing.
        StorageError: The file cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingRequirementError(
            "GGUF files need the package gguf", where=str(path), remedy="pip install 'persea[gguf]'"
        ) from error
    from transformers import AutoConfig

    for needed in ("config.json", "tokenizer.json"):
        if not (student / needed).is_file():
            raise DataError(
                f"the student has no {needed}", where=str(student), remedy="run train again"
            )
    config: Any = AutoConfig.from_pretrained(student, trust_remote_code=False)
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise RefusedError(
            f"no GGUF export for {config.model_type}; it is known for {', '.join(ARCHITECTURES)}",
            where=str(student),
            remedy=HF_REMEDY,
        )
    _refuse_unwritable(config, student)
    precision = _stored_precision(student, precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    try:
        writer = gguf.GGUFWriter(partial, architecture, use_temp_file=True)
        writer.add_name(name)
        if licence:
            writer.add_license(licence)
        _add_hyperparameters(writer, config, precision)
        _add_tokenizer(writer, config, student)
        count = sum(1 for _ in _add_tensors(writer, config, student, architecture, precision))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _verify_tokenizer(partial, student)
        storage.sync_file(partial)
        storage.DISK.replace(path, partial)
    except OSError as error:
        raise StorageError(
            f"cannot write: {error.strerror}", where=str(path), remedy="free space, then run again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return GgufFile(path, architecture, precision, count)


def _refuse_unwritable(config: Any, student: Path) -> None:
    """Raise if llama.cpp would compute something else than transformers for this configuration."""
    problem = ""
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "llama3", "linear"):
        problem = f"rotary embeddings of the type {rope['rope_type']}"
    elif config.model_type == "gemma3_text":
        full = [kind == "full_attention" for kind in config.layer_types]
        sliding = (config.rope_parameters or {}).get("sliding_attention") or {}
        if full != [(k + 1) % GEMMA_FULL_EVERY == 0 for k in range(config.num_hidden_layers)]:
            problem = "another order of sliding and full layers than every sixth full"
        elif config.query_pre_attn_scalar != config.head_dim:
            problem = "an attention scale other than the width of a head"
        elif sliding.get("rope_theta", GEMMA_SLIDING_THETA) != GEMMA_SLIDING_THETA:
            problem = "another rotary base of the sliding layers than 10,000"
        elif config.final_logit_softcapping or config.attn_logit_softcapping:
            problem = "a soft cap of logits"
    elif getattr(config, "mlp_bias", False):
        problem = "biases in the feed-forward layers"
    elif getattr(config, "use_sliding_window", False):
        problem = "sliding windows"
    if problem:
        raise RefusedError(
            f"llama.cpp's {ARCHITECTURES[config.model_type]} has no form for {problem}",
            where=str(student / "config.json"),
            remedy=HF_REMEDY,
        )


def _rope(config: Any) -> Mapping[str, Any]:
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return dict(parameters.get("full_attention", parameters))


def _stored_precision(student: Path, precision: GgufPrecision) -> GgufPrecision:
    """Return the precision to store: `auto` is that of the largest tensor."""
    if precision is not GgufPrecision.AUTO:
        return precision
    dtypes = {str(t.dtype) for _, t in _iter_weights(student, only_first=True)}
    names = {"torch.bfloat16": GgufPrecision.BF16, "torch.float16": GgufPrecision.F16}
    return names.get(dtypes.pop(), GgufPrecision.F32)


def _add_hyperparameters(writer: Any, config: Any, precision: GgufPrecision) -> None:
    import gguf

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    kinds = gguf.LlamaFileType
    writer.add_file_type(
        {
            GgufPrecision.F32: kinds.ALL_F32,
            GgufPrecision.F16: kinds.MOSTLY_F16,
            GgufPrecision.BF16: kinds.MOSTLY_BF16,
            GgufPrecision.Q8_0: kinds.MOSTLY_Q8_0,
        }[precision]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, config: Any, student: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    vocabulary = gguf_vocabulary(student, config.vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(has_space_prefix(student))
    tokenizer: Any = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
    bos = tokenizer.bos_token_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(bos is not None and tokenizer("a").input_ids[:1] == [bos])
    writer.add_add_eos_token(False)
    stop_ids = _stop_ids(student, GenerationConfig)
    if tokenizer.eos_token_id is not None or stop_ids:
        writer.add_eos_token_id(
            tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stop_ids[0]
        )
    other = [i for i in stop_ids if i != tokenizer.eos_token_id]
    if other:
        writer.add_eot_token_id(other[0])
    for name in ("unk", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None and token_id < config.vocab_size:
            getattr(writer, f"add_{name}_token_id")(token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _stop_ids(student: Path, generation_config: Any) -> list[int]:
    if not (student / "generation_config.json").is_file():
        return []
    eos = generation_config.from_pretrained(student).eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, list) else [eos]


def _iter_weights(student: Path, *, only_first: bool = False) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in sorted(student.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, tensors.get_tensor(name)
                if only_first:
                    return


def _add_tensors(
    writer: Any, config: Any, student: Path, architecture: str, precision: GgufPrecision
) -> Iterator[str]:
    import gguf

    kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    if _rope(config).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_rope_factors(config))
        yield "rope_freqs.weight"
    for name, tensor in _iter_weights(student):
        if name.endswith(SKIPPED_TENSORS):
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise RefusedError(
                f"llama.cpp's {architecture} has no tensor for {name}",
                where=str(student),
                remedy=HF_REMEDY,
            )
        values = _ggml_values(name, tensor.float().numpy(), config)
        stored = _tensor_type(values, precision)
        writer.add_tensor(new_name, gguf.quants.quantize(values, stored), raw_dtype=stored)
        yield new_name


def _tensor_type(values: npt.NDArray[np.float32], precision: GgufPrecision) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if values.ndim < 2 or precision is GgufPrecision.F32:
        return kinds.F32
    if precision is GgufPrecision.Q8_0:
        return kinds.Q8_0 if values.shape[-1] % Q8_BLOCK == 0 else kinds.F16
    return kinds.F16 if precision is GgufPrecision.F16 else kinds.BF16


def _ggml_values(
    name: str, values: npt.NDArray[np.float32], config: Any
) -> npt.NDArray[np.float32]:
    """Return a tensor as llama.cpp's graph of the architecture expects it."""
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return values + 1
    if config.model_type == "llama":
        heads = config.num_attention_heads
        if ".q_proj." in name:
            return _reorder_rotary(values, heads)
        if ".k_proj." in name:
            return _reorder_rotary(values, config.num_key_value_heads or heads)
    return values


def _reorder_rotary(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Interleave the two halves of each head: llama.cpp rotates neighbours, transformers halves."""
    half = values.shape[0] // num_heads // 2
    halves = values.reshape(num_heads, 2, half, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _llama3_rope_factors(config: Any) -> npt.NDArray[np.float32]:
    """Return the factors that Llama 3.1 divides its rotary frequencies by, one for each pair."""
    rope = _rope(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    factors = []
    for k in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (k / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def _verify_tokenizer(path: Path, student: Path) -> None:
    """Rebuild the tokenizer from the written file, and compare it with the student's own.

    Raises:
        RefusedError: They split a probing text differently.
    """
    from tokenizers import Tokenizer

    from persea.models.gguf_header import read_header
    from persea.models.gguf_tokenizer import build_tokenizer

    rebuilt = build_tokenizer(read_header(path, str(student)), str(student))
    own = Tokenizer.from_file(str(student / "tokenizer.json"))
    for probe in PROBES:
        ids = own.encode(probe, add_special_tokens=False).ids
        if rebuilt.encode(probe, add_special_tokens=False).ids != ids:
            raise RefusedError(
                "llama.cpp would split texts otherwise than the student's tokenizer, such as "
                f"{probe!r}",
                where=str(student / "tokenizer.json"),
                remedy=HF_REMEDY,
            )
