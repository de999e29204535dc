"""Add rows to a model for the new tokens of its tokenizer, and save it as a student.

The rows of a new token are the means of the rows of its old tokens. That is .27 bits a byte worse
than before without training, and .08 better after training on 433 kB of text (docs/results.md,
point 11).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from persea.chat.families import CONTROL_MARKERS
from persea.errors import DataError, RefusedError, StorageError
from persea.models.identity import fingerprint
from persea.models.licence_text import copy_licence_files
from persea.models.loading import (
    ModelSource,
    download_model,
    load_tokenizer,
    read_weights,
)
from persea.models.tokenizer_files import copy_tokenizer_files
from persea.storage import open_atomic_folder
from persea.tokenization.vocabulary import Vocabulary, load_vocabulary
from persea.vocab_extension.learn_merges import (
    Merge,
    TokenizationCost,
    count_words,
    extend_tokenizer_spec,
    learn_merges,
    measure_tokenization_cost,
    old_ids_of_new_tokens,
    read_merge_training_texts,
    refuse_changed_tokens,
    refuse_unextendable_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ProgressCallback = Callable[[str, float, str], None]
"""Called with the stage, the fraction of it that is done in [0, 1], and a short message."""


@dataclass(frozen=True)
class VocabExtension:
    """A tokenizer with more tokens, and the data that its model needs for them.

    Attributes:
        model: Name of the model's folder or repository.
        source: The model.
        old_vocabulary: The vocabulary before.
        tokenizer_spec: Content of the new tokenizer.json.
        merges: The learned merges, in order.
        old_ids_by_new_id: New id -> the ids that its bytes had before.
        num_embedding_rows: Rows of embedding and head, before and after.
        costs: Tokens of the held-out lines, before and after, for each text.
    """

    model: str
    source: ModelSource
    old_vocabulary: Vocabulary
    tokenizer_spec: Mapping[str, Any] = field(repr=False)
    merges: tuple[Merge, ...] = field(repr=False)
    old_ids_by_new_id: Mapping[int, Sequence[int]] = field(repr=False)
    num_embedding_rows: tuple[int, int]
    costs: tuple[TokenizationCost, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the content of extension.json."""
        texts = [
            {
                **asdict(c),
                "file": Path(c.file).name,
                "bytes_per_token_before": round(c.bytes / c.tokens_before, 3),
                "bytes_per_token_after": round(c.bytes / c.tokens_after, 3),
            }
            for c in self.costs
        ]
        return {
            "model": self.model,
            "tokens": len(self.old_ids_by_new_id),
            "merges": len(self.merges),
            "first_id": min(self.old_ids_by_new_id),
            "rows_before": self.num_embedding_rows[0],
            "rows_after": self.num_embedding_rows[1],
            "texts": texts,
        }


def load_meta_model(source: ModelSource, where: str) -> PreTrainedModel:
    """Load the architecture of a model without weights, on torch's meta device.

    Raises:
        DataError: The folder holds no causal model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.model, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
            return model
    except Exception as error:  # transformers raises a dozen types for a folder without a model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"cannot read its configuration: {reason}",
            where=where,
            remedy="the folder needs config.json of a causal model",
        ) from error


def count_embedding_rows(model: PreTrainedModel, vocab_size: int, where: str) -> int:
    """Return the number of rows of a model's embedding and head.

    Raises:
        RefusedError: The weights are quantized, embedding and head are no plain matrices of equal
            rows, or another part has one row a token too.
        DataError: There are fewer rows than tokens.
    """
    import torch

    embedding, head, remedy = (
        model.get_input_embeddings(),
        model.get_output_embeddings(),  # type: ignore[no-untyped-call]
        "extend a model with one embedding and one linear head",
    )
    if getattr(model.config, "quantization_config", None) is not None:
        raise RefusedError(
            "its weights are quantized: means of rows cannot be written back",
            where=where,
            remedy="extend the model that it was quantized from",
        )
    if type(head) is not torch.nn.Linear or not isinstance(embedding, torch.nn.Embedding):
        raise RefusedError(
            f"its embedding is a {type(embedding).__name__} and its head a {type(head).__name__}",
            where=where,
            remedy=remedy,
        )
    rows = len(embedding.weight)
    if len(head.weight) != rows:
        raise RefusedError(
            f"its embedding has {rows:,} rows and its head {len(head.weight):,}",
            where=where,
            remedy=remedy,
        )
    if rows < vocab_size:
        raise DataError(
            f"{rows:,} rows for a vocabulary of {vocab_size:,} tokens",
            where=where,
            remedy="tokenizer and model do not belong together",
        )
    more = [
        name
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Embedding) and m is not embedding and m.num_embeddings == rows
    ]
    if more or getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None):
        raise RefusedError(
            f"another part has one row a token too: "
            f"{more[0] if more else 'the embeddings of each layer'}",
            where=where,
            remedy=remedy,
        )
    return rows


def token_ids_in_config(config: Mapping[str, Any]) -> set[int]:
    """Return all token ids in a model's configuration, at any depth.

    Some belong to tokens that the tokenizer does not know.
    """
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= token_ids_in_config(value)
        elif re.search(r"_token_(?:ids?|index)$", str(key)):
            found |= {
                i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)
            }
    return found


def initialize_new_embeddings(
    model: PreTrainedModel, old_ids_by_new_id: Mapping[int, Sequence[int]]
) -> None:
    """Give each new id the mean of its old ids' rows.

    Changes the embedding [V, D], the head [V, D] and the head's bias [V], and adds rows if needed.
    """
    import torch

    embedding: Any = model.get_input_embeddings()
    if max(old_ids_by_new_id) >= len(embedding.weight):
        model.resize_token_embeddings(max(old_ids_by_new_id) + 1, mean_resizing=False)
        embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for rows in (embedding.weight, head.weight, head.bias):
            for i, ids in old_ids_by_new_id.items() if rows is not None else ():
                rows[i] = rows[list(ids)].float().mean(0)


def load_in_stored_dtype(source: ModelSource, where: str) -> PreTrainedModel:
    """Load a model in the dtypes of its files.

    Raises:
        DataError: The weights cannot be read.
        RefusedError: transformers does not load all weights, or loads some in another dtype.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    torch_dtypes, stored = (
        {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64},
        dict[str, str](),
    )
    try:
        for path in sorted(Path(source.model).glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (`file` is no mapping)
                    stored[name] = file.get_slice(name).get_dtype()
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"cannot read its weights: {error}", where=where, remedy="fetch the model again"
        ) from error
    stored_dtypes = {dtype for dtype in stored.values() if dtype.startswith(("F", "BF"))}
    model, loading_info = read_weights(
        source,
        where,
        dtype=torch_dtypes.get("".join(stored_dtypes), "auto"),
        output_loading_info=True,
    )
    state = model.state_dict()
    other = [
        *loading_info["missing_keys"],
        *loading_info["unexpected_keys"],
        *(
            name
            for name, dtype in stored.items()
            if dtype in stored_dtypes
            and name in state
            and state[name].dtype != torch_dtypes.get(dtype)
        ),
    ]
    if other:
        raise RefusedError(
            f"transformers does not load {len(other)} of its weights as they are stored; the first "
            f"is {other[0]}",
            where=where,
            remedy="save it with transformers in one dtype of 16 or 32 bits",
        )
    return model  # type: ignore[no-any-return]


def extend_vocabulary(
    source: ModelSource,
    file_specs: Sequence[str],
    num_tokens: int,
    progress: ProgressCallback,
) -> VocabExtension:
    """Learn new tokens for a model from text files. Writes nothing and reads no weights.

    Args:
        source: The model.
        file_specs: Text files, `FILE` or `FILE#key`.
        num_tokens: Tokens to add.
        progress: Called with the step, the fraction done and a message.

    Raises:
        DataError: A text or the model cannot be read, or no pair of tokens occurs twice.
        RefusedError: The model or its tokenizer cannot be extended.
    """
    texts, where = read_merge_training_texts(file_specs), source.model
    progress("open", 0.0, where)
    requested_source, source = (
        source,
        ModelSource(str(download_model(source, where, with_weights=False))),
    )
    tokenizer = load_tokenizer(source, where)
    old, spec = (
        load_vocabulary(tokenizer, where, CONTROL_MARKERS),
        json.loads(tokenizer.backend_tokenizer.to_str()),
    )
    refuse_unextendable_tokenizer(old, spec, where)
    model = load_meta_model(source, where)
    num_rows = count_embedding_rows(model, len(old), where)
    progress("open", 1.0, f"{len(old):,} tokens, {num_rows:,} rows")
    word_counts = count_words(old.backend, [one.training_lines for one in texts])
    progress("learn", 0.0, f"{len(word_counts):,} words")
    merges = learn_merges(
        old.backend,
        word_counts,
        num_tokens,
        lambda num_new: progress("learn", num_new / num_tokens, f"{num_new:,} tokens"),
    )
    spec = extend_tokenizer_spec(
        spec,
        merges,
        1
        + max((i for i in token_ids_in_config(model.config.to_dict()) if i < num_rows), default=-1),
    )
    new = load_vocabulary(Tokenizer.from_str(json.dumps(spec)), where, CONTROL_MARKERS)
    old_ids = old_ids_of_new_tokens(old.backend, new.backend)
    if not old_ids:
        raise DataError(
            "no pair of neighbouring tokens occurs twice in the texts",
            where=", ".join(file_specs),
            remedy="give more text",
        )
    refuse_changed_tokens(old, new, where)
    costs = tuple(measure_tokenization_cost(one, old, new) for one in texts)
    return VocabExtension(
        Path(where).resolve().name,
        requested_source,
        old,
        spec,
        tuple(merges),
        old_ids,
        (num_rows, max(num_rows, len(new))),
        costs,
    )


def write_extended_model(
    extension: VocabExtension, out_folder: Path, progress: ProgressCallback
) -> None:
    """Write the extended model as a Hugging Face folder.

    The folder is published when its tokenizer, read back, is proven to keep all known tokens.

    Args:
        extension: The extension.
        out_folder: The folder to write: new, or empty.
        progress: Called with the step, the fraction done and a message.

    Raises:
        StorageError: The folder cannot be written.
        RefusedError: The tokenizer does not keep all known tokens.
    """
    from safetensors import SafetensorError

    where = extension.source.model
    source = ModelSource(str(download_model(extension.source, where)))
    progress("write", 0.0, str(out_folder))
    model = load_in_stored_dtype(source, where)
    initialize_new_embeddings(model, extension.old_ids_by_new_id)
    with open_atomic_folder(out_folder) as folder:
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise StorageError(
                f"cannot write the weights: {error}",
                where=str(out_folder),
                remedy="free space, then run again",
            ) from error
        copy_tokenizer_files(Path(source.model), folder)
        copy_licence_files(Path(source.model), folder)
        (folder / "tokenizer.json").write_text(
            json.dumps(extension.tokenizer_spec, indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        record = {**extension.to_json(), "fingerprint": fingerprint(source, where)}
        (folder / "extension.json").write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        again = load_tokenizer(ModelSource(str(folder)), where)
        refuse_changed_tokens(
            extension.old_vocabulary, load_vocabulary(again, where, CONTROL_MARKERS), where
        )
        if (
            json.loads(again.backend_tokenizer.to_str())["model"]
            != extension.tokenizer_spec["model"]
        ):
            raise RefusedError(
                "its tokenizer, read back, differs from the written one",
                where=where,
                remedy="extend a student of another family",
            )
    progress("write", 1.0, str(out_folder))
