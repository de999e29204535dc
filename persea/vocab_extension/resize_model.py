"""Longer: a model given a row for each token that its tokenizer got more, and saved as a folder that a recipe names as its student.

A new token's rows are the means of its pieces' rows: .27 bits a byte worse than before as long as nothing is taught, .08 better after 433 kB of
text (docs/results.md, point 11).
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
from persea.models.loading import (
    ModelSource,
    copy_tokenizer_files,
    download_model,
    load_tokenizer,
    read_weights,
)
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

ProgressCallback = Callable[[str, float, str], None]  # stage, share done, words


@dataclass(frozen=True)
class VocabExtension:
    """A model's tokenizer with more tokens, and what its model needs for them.

    model       what its folder or repository is called
    source      its folder
    vocabulary  the tokenizer before
    spec        content of the new tokenizer.json
    merges      learned, in order
    pieces      new id -> the ids that its bytes were before
    rows        of embedding and head, before and after
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
    """The model of a folder without its weights (torch's meta device). Raises DataError for what is no causal model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.model, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers raises a dozen kinds here, each meaning: this is no causal model
        raise DataError(
            f"cannot read its configuration: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}",
            where=where,
            remedy="the folder needs config.json of a causal model",
        ) from error


def count_embedding_rows(model: PreTrainedModel, vocab_size: int, where: str) -> int:
    """How many rows embedding and head have. Raises Refused where another part has one a token too, or one of the two is no plain matrix."""
    import torch

    embedding, head, remedy = (
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        "extend a model with one embedding and one linear head",
    )
    if getattr(model.config, "quantization_config", None) is not None:
        raise RefusedError(
            "its weights are quantised: a mean of rows cannot be written back",
            where=where,
            remedy="extend the model it was made from",
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
            f"beside its embedding it has {more[0] if more else 'one of each layer'}, with rows of tokens too",
            where=where,
            remedy=remedy,
        )
    return rows


def token_ids_in_config(config: Mapping[str, Any]) -> set[int]:
    """Token ids that a model's configuration names, at any depth: one may be of a token that its tokenizer does not know."""
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
    """Give each new id [in pieces] its rows of embedding [V, D], head [V, D] and the head's bias [V]: the means of its pieces' rows."""
    import torch

    if max(old_ids_by_new_id) >= len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(max(old_ids_by_new_id) + 1, mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for rows in (model.get_input_embeddings().weight, head.weight, head.bias):
            for i, ids in old_ids_by_new_id.items() if rows is not None else ():
                rows[i] = rows[list(ids)].float().mean(0)


def load_in_stored_dtype(source: ModelSource, where: str) -> PreTrainedModel:
    """The model in the types that its weights are stored in. Raises Refused where transformers reads them otherwise, or not all of them."""
    import torch
    from safetensors import SafetensorError, safe_open

    types, stored = (
        {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64},
        dict[str, str](),
    )
    try:
        for path in sorted(Path(source.model).glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                stored.update(
                    {name: file.get_slice(name).get_dtype() for name in file.keys()}
                )  # it is no mapping
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"cannot read its weights: {error}", where=where, remedy="fetch the model again"
        ) from error
    kinds = {kind for kind in stored.values() if kind.startswith(("F", "BF"))}
    model, told = read_weights(
        source, where, dtype=types.get("".join(kinds), "auto"), output_loading_info=True
    )
    state = model.state_dict()
    other = [
        *told["missing_keys"],
        *told["unexpected_keys"],
        *(
            name
            for name, kind in stored.items()
            if kind in kinds and name in state and state[name].dtype != types.get(kind)
        ),
    ]
    if other:
        raise RefusedError(
            f"transformers does not read {len(other)} of its weights as they are stored, {other[0]} first",
            where=where,
            remedy="save it with transformers in one type of 16 or 32 bits",
        )
    return model  # type: ignore[no-any-return]


def extend_vocabulary(
    source: ModelSource, file_specs: Sequence[str], num_tokens: int, progress: ProgressCallback
) -> VocabExtension:
    """What `tokens` more tokens, learned on these text files, give; nothing is written and no weight is read.

    Raises DataError for texts or a model that cannot be read, and where no pair is seen twice; Refused for a model that cannot be extended.
    """
    texts, where = read_merge_training_texts(file_specs), source.model
    progress("open", 0.0, where)
    asked, source = source, ModelSource(str(download_model(source, where, with_weights=False)))
    tokenizer = load_tokenizer(source, where)
    old, spec = (
        load_vocabulary(tokenizer, where, CONTROL_MARKERS),
        json.loads(tokenizer.backend_tokenizer.to_str()),
    )
    refuse_unextendable_tokenizer(old, spec, where)
    model = load_meta_model(source, where)
    rows = count_embedding_rows(model, len(old), where)
    progress("open", 1.0, f"{len(old):,} tokens, {rows:,} rows")
    words = count_words(old.backend, [one.training_lines for one in texts])
    progress("learn", 0.0, f"{len(words):,} words")
    merges = learn_merges(
        old.backend,
        words,
        num_tokens,
        lambda fresh: progress("learn", fresh / num_tokens, f"{fresh:,} tokens"),
    )
    spec = extend_tokenizer_spec(
        spec,
        merges,
        1 + max((i for i in token_ids_in_config(model.config.to_dict()) if i < rows), default=-1),
    )
    new = load_vocabulary(Tokenizer.from_str(json.dumps(spec)), where, CONTROL_MARKERS)
    pieces = old_ids_of_new_tokens(old.backend, new.backend)
    if not pieces:
        raise DataError(
            "no two neighbouring tokens are seen twice, in no text",
            where=", ".join(file_specs),
            remedy="give more text",
        )
    refuse_changed_tokens(old, new, where)
    costs = tuple(measure_tokenization_cost(one, old, new) for one in texts)
    return VocabExtension(
        Path(where).resolve().name,
        asked,
        old,
        spec,
        tuple(merges),
        pieces,
        (rows, max(rows, len(new))),
        costs,
    )


def write_extended_model(
    extension: VocabExtension, out_folder: Path, progress: ProgressCallback
) -> None:
    """The extended model as a folder in Hugging Face form, published once its tokenizer, read back, is proven to be the old one and more.

    Raises StorageError where it cannot be written.
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
                "its tokenizer does not come back as it was written",
                where=where,
                remedy="extend a student of another family",
            )
    progress("write", 1.0, str(out_folder))
