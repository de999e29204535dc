"""persea extend: add tokens to a student for scripts that it spells byte by byte."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persea.cli.options import BEFORE_PANEL, AsJson, app, refuse_other_versions
from persea.errors import RecipeError

if TYPE_CHECKING:
    from persea.vocab_extension.resize_model import VocabExtension


class Rows(StrEnum):
    """How the rows of new tokens are made."""

    RIDGE = "ridge"
    ORTHOGONAL = "orthogonal"
    MEANS = "means"


@app.command(rich_help_panel=BEFORE_PANEL)
def extend(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, a GGUF file, a hub id, or a run folder (its student).",
            show_default=False,
        ),
    ],
    texts: Annotated[
        list[str],
        typer.Option(
            help="A text file with a text a line, or FILE#key for JSON lines. Repeatable.",
            show_default=False,
        ),
    ],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write: new, or empty.", show_default=False)
    ] = None,
    teacher: Annotated[
        str,
        typer.Option(
            help="Add only tokens that this model has too, with rows mapped from its rows.",
            show_default=False,
        ),
    ] = "",
    rows: Annotated[
        Rows, typer.Option(help="Rows of new tokens: mapped from the teacher's, or means.")
    ] = Rows.RIDGE,
    join_marks: Annotated[
        bool | None,
        typer.Option(
            help="Keep combining marks (vowel signs of Thai, Khmer, Burmese) in words. Default: "
            "with --teacher.",
            show_default=False,
        ),
    ] = None,
    score: Annotated[
        bool,
        typer.Option(
            help="With --teacher, where the texts have too few pairs: count the teacher's likely "
            "tokens too. Runs the teacher over at most 64 kB of each text.",
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the gain; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add tokens to a student for scripts that it spells byte by byte. See docs/extend.md.

    With --teacher the new tokens are tokens of the teacher, which can supervise more of them.
    Writes a model folder to use as `student.model`.
    """
    if rows is not Rows.RIDGE and not teacher:
        raise RecipeError(
            f"--rows {rows.value} needs a teacher", where="extend", remedy="give --teacher MODEL"
        )
    _refuse_bad_out(out, dry_run)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from persea.models.loading import resolve_model_source
    from persea.pipeline.model_refs import silence_transformers
    from persea.pipeline.progress import progress_bars
    from persea.vocab_extension.map_embeddings import ROW_METHODS
    from persea.vocab_extension.resize_model import (
        extend_vocabulary,
        write_extended_model,
    )
    from persea.vocab_extension.teacher_tokens import open_token_teacher

    silence_transformers()
    refuse_other_versions(Path(model), "train")
    source, _ = resolve_model_source(model, "extend")
    with progress_bars(quiet=as_json) as progress:
        token_teacher = None
        if teacher:
            progress("open", 0.0, teacher)
            teacher_source, _ = resolve_model_source(teacher, "--teacher")
            method = next((m for m in ROW_METHODS if m == rows.value), None)
            token_teacher = open_token_teacher(teacher_source, method, score, teacher)
        extension = extend_vocabulary(
            source,
            texts,
            tokens,
            progress,
            token_teacher,
            bool(teacher) if join_marks is None else join_marks,
        )
        if out is not None and not dry_run:
            write_extended_model(extension, out.resolve(), progress)
    if as_json:
        record = {
            **extension.to_json(),
            "num_requested": tokens,
            "out": "" if dry_run else str(out),
        }
        typer.echo(json.dumps(record, indent=1, ensure_ascii=False))
        return
    _show_extension(
        extension,
        tokens,
        "no other pair that occurs twice is a token of the teacher"
        if teacher
        else "no other pair occurs twice",
    )
    typer.echo("nothing is written (--dry-run)" if dry_run else f"{out}: use it as student.model")


def _refuse_bad_out(out: Path | None, dry_run: bool) -> None:
    if out is None:
        if not dry_run:
            raise RecipeError(
                "no folder to write to", where="extend", remedy="give --out FOLDER, or --dry-run"
            )
        return
    if (out.is_symlink() or out.exists()) and not (out.is_dir() and not any(out.iterdir())):
        raise RecipeError(
            "it exists already", where=str(out), remedy="give a folder that is new or empty"
        )
    ancestor = next(folder for folder in out.absolute().parents if folder.exists())
    if not (ancestor.is_dir() and os.access(ancestor, os.W_OK)):
        raise RecipeError(
            f"cannot write into {ancestor}",
            where=str(out),
            remedy="give a folder that can be created",
        )


def _show_extension(extension: VocabExtension, num_requested: int, why_few: str) -> None:
    from persea.pipeline.progress import print_table

    print_table(
        ("text", "held-out lines", "tokens a byte", "after", "tokens"),
        [
            (
                Path(c.file).name,
                f"{c.lines:,}",
                f"{c.tokens_before / c.bytes:.3f}",
                f"{c.tokens_after / c.bytes:.3f}",
                f"{c.tokens_after / c.tokens_before - 1:+.0%}",
            )
            for c in extension.costs
        ],
    )
    num_new, first_id = len(extension.old_ids_by_new_id), min(extension.old_ids_by_new_id)
    few = f" of {num_requested:,}: {why_few}" if num_new < num_requested else ""
    rows_before, rows_after = extension.num_embedding_rows
    typer.echo(
        f"{num_new:,} new tokens{few}, from id {first_id:,} on; embedding rows: "
        f"{rows_before:,} -> {rows_after:,}"
    )
    if plan := extension.teacher_rows:
        typer.echo(
            f"rows of {len(plan.ids_by_new_id):,} new tokens: {plan.teacher.model}'s, mapped by "
            f"{plan.method} over {len(plan.shared_ids):,} shared tokens"
        )
    if extension.joins_marks:
        typer.echo("words hold combining marks now: texts with marks have other tokens than before")
