"""persea extend: add tokens to a student for scripts that it spells byte by byte."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persea.cli.options import BEFORE_PANEL, AsJson, app, refuse_other_versions
from persea.errors import RecipeError

if TYPE_CHECKING:
    from persea.vocab_extension.resize_model import VocabExtension


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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the gain; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add tokens to a student for scripts that it spells byte by byte. See docs/extend.md.

    Writes a model folder to use as `student.model`.
    """
    _refuse_bad_out(out, dry_run)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from persea.models.loading import resolve_model_source
    from persea.pipeline.model_refs import silence_transformers
    from persea.pipeline.progress import progress_bars
    from persea.vocab_extension.resize_model import extend_vocabulary, write_extended_model

    silence_transformers()
    refuse_other_versions(Path(model), "train")
    source, _ = resolve_model_source(model, "extend")
    with progress_bars(quiet=as_json) as progress:
        extension = extend_vocabulary(source, texts, tokens, progress)
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
    _show_extension(extension, tokens)
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


def _show_extension(extension: VocabExtension, num_requested: int) -> None:
    from persea.pipeline.progress import print_table

    print_table(
        ("text", "held-out lines", "bytes a token", "after", "tokens"),
        [
            (
                Path(c.file).name,
                f"{c.lines:,}",
                f"{c.bytes / c.tokens_before:.2f}",
                f"{c.bytes / c.tokens_after:.2f}",
                f"{c.tokens_after / c.tokens_before - 1:+.0%}",
            )
            for c in extension.costs
        ],
    )
    num_new, first_id = len(extension.old_ids_by_new_id), min(extension.old_ids_by_new_id)
    few = f" of {num_requested:,}: no other pair occurs twice" if num_new < num_requested else ""
    rows_before, rows_after = extension.num_embedding_rows
    typer.echo(
        f"{num_new:,} new tokens{few}, from id {first_id:,} on; embedding rows: "
        f"{rows_before:,} -> {rows_after:,}"
    )
