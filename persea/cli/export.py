"""persea export: a trained student as others load it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import AFTER_PANEL, app, refuse_other_versions
from persea.export.forms import ExportForm, GgufPrecision


@app.command(rich_help_panel=AFTER_PANEL)
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.", show_default=False)],
    to: Annotated[
        ExportForm,
        typer.Option(
            help="hf: a model folder; adapter: the LoRA adapters alone; gguf: one file for "
            "llama.cpp; ollama: that file with a Modelfile."
        ),
    ] = ExportForm.HF,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write. Default: RUN/export/FORM.", show_default=False),
    ] = None,
    precision: Annotated[
        GgufPrecision,
        typer.Option(help="Of the matrices in a GGUF file; auto = as the student is saved."),
    ] = GgufPrecision.AUTO,
    push: Annotated[
        str,
        typer.Option(help="Upload the folder to this hub repository.", show_default=False),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder; list what --push would upload.")
    ] = False,
) -> None:
    """Export a trained student with its model card, licence notice and tokenizer."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from persea.export import student_folder as folders
    from persea.pipeline.model_refs import silence_transformers

    if push:
        folders.refuse_bad_repository(push)
    silence_transformers()
    refuse_other_versions(run, "train", "lineage", "report")
    student = folders.read_student(run)
    target = out or run / "export" / to.value
    if to in (ExportForm.HF, ExportForm.ADAPTER):
        folders.write_model_folder(student, target, only_adapter=to is ExportForm.ADAPTER)
    else:
        is_ollama = to is ExportForm.OLLAMA
        file = folders.write_gguf_folder(student, target, precision, for_ollama=is_ollama)
        typer.echo(f"{file.path.name}: {file.architecture}, {file.precision}")
    typer.echo(f"{target}: {student.name}" + (f", {student.licence}" if student.licence else ""))
    if push and dry_run:
        typer.echo("\n".join(folders.describe_push(target, push)))
    elif push:
        typer.echo(folders.push_folder(target, push))
