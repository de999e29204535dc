"""Rows for a student's new tokens, mapped from the teacher's rows for the same tokens.

A linear map from the teacher's rows to the student's is fitted on the tokens that both vocabularies
have, and applied to the teacher's rows of the new tokens. Embedding and head are fitted apart where
the student has both. Rows mapped by ridge regression start worse than means of the pieces' rows and
end better: with 12 kB of text a language SmolLM2-135M has 1.639 bits per byte with rows from
Gemma 3 270M and 1.716 with means (`bench/results/real.jsonl`, `docs/results.md`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from persea.errors import DataError, RefusedError
from persea.models.loading import ModelSource, download_model
from persea.vocab_extension.architecture import load_meta_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

RowMethod = Literal["ridge", "orthogonal"]
ROW_METHODS: tuple[RowMethod, ...] = ("ridge", "orthogonal")
RIDGE_PENALTY = 0.1  # times the mean variance of the teacher's rows
MIN_SHARED_TOKENS = 256  # fewer determine no map


@dataclass(frozen=True)
class TeacherRows:
    """Which rows of a teacher become rows of a student.

    Attributes:
        teacher: The teacher.
        method: How its rows are mapped.
        shared_ids: (student's id, teacher's id) of tokens that both have, to fit the map on.
        ids_by_new_id: New id -> the teacher's tokens; the mean of their rows is mapped.
    """

    teacher: ModelSource
    method: RowMethod
    shared_ids: tuple[tuple[int, int], ...] = field(repr=False)
    ids_by_new_id: Mapping[int, Sequence[int]] = field(repr=False)


@dataclass(frozen=True, eq=False)
class RowMap:
    """An affine map of embedding rows. E = the teacher's width, D = the student's.

    Attributes:
        mean_E: Mean of the teacher's rows that it was fitted on.
        mean_D: Mean of the student's.
        matrix_ED: The linear part, with the scale that gives mapped rows the student's mean norm.
    """

    mean_E: torch.Tensor
    mean_D: torch.Tensor
    matrix_ED: torch.Tensor

    def apply(self, rows_NE: torch.Tensor) -> torch.Tensor:
        """Return the mapped rows, float32 [N, D]."""
        return (rows_NE.float() - self.mean_E) @ self.matrix_ED + self.mean_D


def fit_row_map(
    teacher_rows_NE: torch.Tensor, student_rows_ND: torch.Tensor, method: RowMethod = "ridge"
) -> RowMap:
    """Fit a map from a teacher's embedding rows to a student's.

    A regression shrinks what it predicts, so mapped rows are scaled to the mean norm of the
    student's.

    Args:
        teacher_rows_NE: The teacher's rows of N tokens that both have.
        student_rows_ND: The student's rows of the same tokens.
        method: "ridge": the map of the least squared error with a penalty; "orthogonal": the
            rotation (or projection) of the least squared error.

    Reference:
        The orthogonal map is the solution of the orthogonal Procrustes problem, Schoenemann 1966.

    Example:
        >>> import torch
        >>> from persea.vocab_extension.map_embeddings import fit_row_map
        >>> x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        >>> rotation = torch.linalg.qr(x[:4])[0]
        >>> fitted = fit_row_map(x, x @ rotation, "orthogonal")
        >>> torch.allclose(fitted.matrix_ED, rotation, atol=1e-4)
        True
    """
    import torch

    x_NE, y_ND = teacher_rows_NE.float(), student_rows_ND.float()
    mean_E, mean_D = x_NE.mean(0), y_ND.mean(0)
    x_NE, y_ND = x_NE - mean_E, y_ND - mean_D
    if method == "ridge":
        gram_EE = x_NE.T @ x_NE
        gram_EE += RIDGE_PENALTY * gram_EE.diagonal().mean() * torch.eye(len(gram_EE))
        matrix_ED = torch.linalg.solve(gram_EE, x_NE.T @ y_ND)
    else:
        left, _, right = torch.linalg.svd(x_NE.T @ y_ND, full_matrices=False)
        matrix_ED = left @ right
    scale = y_ND.norm(dim=1).mean() / (x_NE @ matrix_ED).norm(dim=1).mean()
    return RowMap(mean_E, mean_D, matrix_ED * scale)


def set_mapped_rows(
    student_rows: torch.Tensor, teacher_rows: torch.Tensor, plan: TeacherRows
) -> None:
    """Overwrite the new rows of one matrix by rows mapped from the teacher's.

    Args:
        student_rows: The student's embedding or head [V, D], changed in place.
        teacher_rows: The teacher's embedding or head [W, E], of any floating type.
        plan: Which rows.
    """
    import torch

    with torch.no_grad():
        of_student, of_teacher = map(list, zip(*plan.shared_ids, strict=True))
        fitted = fit_row_map(teacher_rows[of_teacher], student_rows[of_student], plan.method)
        means_NE = torch.stack(
            [teacher_rows[list(ids)].float().mean(0) for ids in plan.ids_by_new_id.values()]
        )
        new = torch.tensor(list(plan.ids_by_new_id))
        student_rows[new] = fitted.apply(means_NE).to(student_rows.dtype)


def map_teacher_rows(model: PreTrainedModel, plan: TeacherRows) -> None:
    """Give a model's new tokens rows mapped from its teacher's, in embedding and head.

    The bias of a head keeps its values.

    Args:
        model: The student, with rows for its new tokens, changed in place.
        plan: Which rows.

    Raises:
        DataError: The teacher's matrices cannot be read.
        RefusedError: The teacher's matrices are quantized.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    of_embedding, of_head = read_token_matrices(plan.teacher, plan.teacher.model)
    set_mapped_rows(embedding.weight, of_embedding, plan)
    if head.weight is not embedding.weight:
        set_mapped_rows(head.weight, of_head, plan)


def read_token_matrices(source: ModelSource, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a model's embedding and head from its files, without its other weights.

    Args:
        source: The model.
        where: The place for error messages.

    Returns:
        (embedding [W, E], head [W, E]) in the stored type; the same tensor twice if they are tied.

    Raises:
        DataError: The files lack them.
        RefusedError: They are stored in an integer type.
    """
    folder = download_model(source, where)
    model = load_meta_model(ModelSource(str(folder)), where)
    names = {module: name for name, module in model.named_modules()}
    files = _files_of_tensors(folder, where)
    embedding = _read_matrix(files, f"{names[model.get_input_embeddings()]}.weight", where)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or model.config.get_text_config().tie_word_embeddings:
        return embedding, embedding
    return embedding, _read_matrix(files, f"{names[head]}.weight", where)


def _files_of_tensors(folder: Path, where: str) -> dict[str, Path]:
    """Return name -> file of the tensors of a model folder."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in files.items()}
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"cannot read its weights: {error}",
            where=where,
            remedy="give a teacher with model.safetensors",
        ) from error


def _read_matrix(files: Mapping[str, Path], name: str, where: str) -> torch.Tensor:
    """Read the tensor of a name, or the only one whose name ends alike.

    A file may have other names in front: a model of text and pictures has `language_model.`.
    """
    from safetensors import SafetensorError, safe_open

    ending = ".".join(name.split(".")[-2:])
    alike = [name] if name in files else [n for n in files if f".{n}".endswith(f".{ending}")]
    if len(alike) != 1:
        raise DataError(
            f"its files have {len(alike)} tensors called {ending}",
            where=where,
            remedy="give --rows means, which needs no rows of the teacher",
        )
    try:
        with safe_open(files[alike[0]], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(alike[0])
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"cannot read {alike[0]}: {error}", where=where, remedy="fetch the model again"
        ) from error
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise RefusedError(
            f"its {alike[0]} is quantized ({tensor.dtype})",
            where=where,
            remedy="give --rows means, or the model that it was quantized from",
        )
    return tensor


def refuse_few_shared_tokens(plan: TeacherRows, where: str) -> None:
    """Raise if a map would be fitted on too few tokens.

    Raises:
        RefusedError: Fewer than MIN_SHARED_TOKENS.
    """
    if len(plan.shared_ids) < MIN_SHARED_TOKENS:
        raise RefusedError(
            f"student and teacher share {len(plan.shared_ids):,} tokens of two or more bytes; "
            f"{MIN_SHARED_TOKENS} are needed to map rows",
            where=where,
            remedy="give --rows means",
        )
