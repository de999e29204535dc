"""Add rows to a model for the new tokens of its tokenizer, and save it as a student.

The rows of a new token are the means of the rows of its old tokens, or mapped from a teacher's rows
(`map_embeddings`). Means are .27 bits a byte worse than before without training, and .08 better
after training on 433 kB of text (docs/results.md, point 11).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from persea.chat.families import CONTROL_MARKERS
from persea.errors import DataError, RefusedError, StorageError
from persea.models.identity import fingerprint, model_name
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
from persea.vocab_extension.architecture import (
    count_embedding_rows,
    load_meta_model,
    token_ids_in_config,
)
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
from persea.vocab_extension.map_embeddings import (
    TeacherRows,
    map_teacher_rows,
    refuse_few_shared_tokens,
)
from persea.vocab_extension.teacher_tokens import (
    TokenTeacher,
    add_counts,
    count_expected_tokens,
    count_expected_words,
    join_marks,
    make_wanted,
    shared_token_ids,
    teacher_ids_of,
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
        joins_marks: Whether words hold combining marks that they did not hold before.
        teacher_rows: The rows that are mapped from a teacher's; None = all are means.
    """

    model: str
    source: ModelSource
    old_vocabulary: Vocabulary
    tokenizer_spec: Mapping[str, Any] = field(repr=False)
    merges: tuple[Merge, ...] = field(repr=False)
    old_ids_by_new_id: Mapping[int, Sequence[int]] = field(repr=False)
    num_embedding_rows: tuple[int, int]
    costs: tuple[TokenizationCost, ...]
    joins_marks: bool = False
    teacher_rows: TeacherRows | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of extension.json."""
        texts = [
            {
                **asdict(c),
                "file": Path(c.file).name,
                "bytes_per_token_before": round(c.bytes / c.tokens_before, 3),
                "bytes_per_token_after": round(c.bytes / c.tokens_after, 3),
                "tokens_per_byte_before": round(c.tokens_before / c.bytes, 4),
                "tokens_per_byte_after": round(c.tokens_after / c.bytes, 4),
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
            "joins_marks": self.joins_marks,
            "texts": texts,
            "teacher_rows": self.teacher_rows
            and {
                "model": model_name(self.teacher_rows.teacher.model),
                "method": self.teacher_rows.method,
                "shared_tokens": len(self.teacher_rows.shared_ids),
                "mapped_tokens": len(self.teacher_rows.ids_by_new_id),
            },
        }


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
        DataError: The weights cannot be read, or are not those of the configuration.
        RefusedError: transformers leaves out a weight, or loads one in another dtype.
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
    model, left_out = read_weights(
        source, where, dtype=torch_dtypes.get("".join(stored_dtypes), "auto")
    )
    state = model.state_dict()
    other = [
        *left_out,
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
    teacher: TokenTeacher | None = None,
    with_joined_marks: bool = False,
) -> VocabExtension:
    """Learn new tokens for a model from text files. Writes nothing.

    No weights of the model are read. Those of the teacher are read if its likely tokens are needed.

    Args:
        source: The model.
        file_specs: Text files, `FILE` or `FILE#key`.
        num_tokens: Tokens to add.
        progress: Called with the step, the fraction done and a message.
        teacher: New tokens are tokens of this model too; None = any.
        with_joined_marks: Words hold combining marks, see `join_marks`.

    Raises:
        DataError: A text or the model cannot be read, or no pair of tokens occurs twice.
        RefusedError: The model or its tokenizer cannot be extended, or shares too few tokens with
            the teacher to map rows.
    """
    texts, where = read_merge_training_texts(file_specs), source.model
    progress("open", 0.0, where)
    requested_source, source = (
        source,
        ModelSource(str(download_model(source, where, with_weights=False))),
    )
    tokenizer = load_tokenizer(source, where)
    old, old_spec = (
        load_vocabulary(tokenizer, where, CONTROL_MARKERS),
        json.loads(tokenizer.backend_tokenizer.to_str()),
    )
    refuse_unextendable_tokenizer(old, old_spec, where)
    model = load_meta_model(source, where)
    num_rows = count_embedding_rows(model, len(old), where)
    progress("open", 1.0, f"{len(old):,} tokens, {num_rows:,} rows")
    backend, spec = old.backend, old_spec
    if with_joined_marks:
        spec = join_marks(old_spec)
        backend = Tokenizer.from_str(json.dumps(join_marks(json.loads(old.backend.to_str()))))
    word_counts = count_words(backend, [one.training_lines for one in texts])
    progress("learn", 0.0, f"{len(word_counts):,} words")
    wanted = make_wanted(teacher.vocabulary) if teacher else None

    def learn() -> list[Merge]:
        return learn_merges(
            backend,
            word_counts,
            num_tokens,
            lambda num_new: progress("learn", num_new / num_tokens, f"{num_new:,} tokens"),
            *([wanted] if wanted else []),
        )

    merges = learn()
    known = old.backend.get_vocab(with_added_tokens=True)
    if teacher and teacher.scores_texts and _num_new(merges, known) < num_tokens:
        files = [one.training_lines for one in texts]
        for expected in count_expected_tokens(teacher, files, progress):
            add_counts(word_counts, count_expected_words(backend, teacher.vocabulary, expected))
        merges = learn()
    joins_marks = spec["pre_tokenizer"] != old_spec["pre_tokenizer"]
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
            "no pair of neighbouring tokens occurs twice in the texts"
            + (" and is a token of the teacher" if teacher else ""),
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
        joins_marks,
        _plan_teacher_rows(teacher, old, new, old_ids) if teacher else None,
    )


def _num_new(merges: Sequence[Merge], known: Mapping[str, int]) -> int:
    return len({a + b for a, b in merges} - known.keys())


def _plan_teacher_rows(
    teacher: TokenTeacher, old: Vocabulary, new: Vocabulary, new_ids: Iterable[int]
) -> TeacherRows | None:
    if teacher.method is None:
        return None
    plan = TeacherRows(
        teacher.source,
        teacher.method,
        shared_token_ids(old, teacher.vocabulary),
        teacher_ids_of(teacher.vocabulary, {i: new.bytes_W[i] or b"" for i in new_ids}),
    )
    refuse_few_shared_tokens(plan, teacher.source.model)
    return plan


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
    if extension.teacher_rows:
        progress("write", 0.5, f"rows of {extension.teacher_rows.teacher.model}")
        map_teacher_rows(model, extension.teacher_rows)
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
        if extension.teacher_rows:
            teacher = extension.teacher_rows.teacher
            record["teacher_rows"] |= {"fingerprint": fingerprint(teacher, teacher.model)}
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
