"""persea lineage: record the origin of a student, verify the record, sign and export it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from persea.cli.options import STAGE_PANEL, AsJson, app
from persea.cli.run import make_stage_command
from persea.errors import DataError

RECORD_COMMAND = "record"
MAX_SHOWN_PROBLEMS = 20


class RecordByDefaultGroup(TyperGroup):
    """`persea lineage RECIPE` is `persea lineage record RECIPE`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the default command in front of a recipe or an option."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [RECORD_COMMAND, *args]
        return super().parse_args(ctx, args)  # type: ignore[arg-type]


lineage_app = typer.Typer(
    cls=RecordByDefaultGroup,
    no_args_is_help=True,
    help="Record which models, data and recipe made the student's weights: persea lineage RECIPE. "
    "Verify, sign and export that record.",
)
app.add_typer(lineage_app, name="lineage", rich_help_panel=STAGE_PANEL)
lineage_app.command(RECORD_COMMAND)(
    make_stage_command(
        "lineage", "Record which models, data and recipe made the student's weights."
    )
)
RunFolder = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]


class ExportForm(StrEnum):
    """Form of an exported lineage record."""

    CARD = "card"
    CYCLONEDX = "cyclonedx"
    SPDX = "spdx"


@lineage_app.command("verify")
def lineage_verify(
    run: RunFolder,
    public_key: Annotated[
        Path | None,
        typer.Option("--public-key", help="Also verify the student's signature with this key."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute every digest of a run's lineage again; list all that differs (exit code 3).

    Read are the record, the student, the outputs of every stage, the captured units, the recipe,
    and the files of base, teachers and corpus where they are on this machine.
    """
    from persea.pipeline.verify_run import verify_run

    result = verify_run(run)
    if public_key is not None:
        from persea.report.signature import verify_signature

        verify_signature(run / "train" / "student", public_key)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1))
    else:
        for problem in result.problems[:MAX_SHOWN_PROBLEMS]:
            typer.echo(f"{problem.where}: {problem.message}")
        for missing in result.not_checked:
            typer.echo(f"not checked: {missing}")
        signed = ", the signature is valid" if public_key is not None else ""
        typer.echo(
            f"{result.num_checked:,} files checked, {len(result.problems):,} problems{signed}"
        )
    if result.problems:
        first = result.problems[0]
        more = len(result.problems) - 1
        raise DataError(
            f"the run differs from its lineage record: {first.message}"
            + (f", and {more:,} more" if more else ""),
            where=first.where,
            remedy="restore the files; where a change was meant, run the recipe again",
        )


@lineage_app.command("export")
def lineage_export(
    run: RunFolder,
    form: Annotated[
        ExportForm,
        typer.Option(
            "--form",
            help="card: the model card for Hugging Face; cyclonedx: CycloneDX 1.6 ML-BOM; spdx: "
            "SPDX 3.0.1.",
        ),
    ] = ExportForm.CYCLONEDX,
) -> None:
    """Print the lineage in the form of another tool."""
    from persea.report.lineage import RECORD_FILE, read_lineage
    from persea.report.lineage_exports import cyclonedx_bom, spdx_document
    from persea.storage import read_text_file

    path = run / "lineage" / RECORD_FILE
    record = read_lineage(path)
    if form is ExportForm.CARD:
        typer.echo(read_text_file(run / "report" / "README.md"), nl=False)
        return
    written = datetime.fromtimestamp(int(path.stat().st_mtime), UTC)
    document = (
        cyclonedx_bom(record) if form is ExportForm.CYCLONEDX else spdx_document(record, written)
    )
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


@lineage_app.command("sign")
def lineage_sign(
    run: RunFolder,
    key: Annotated[
        Path,
        typer.Option("--key", help="Private key in PEM, of an elliptic curve.", show_default=False),
    ],
) -> None:
    """Sign the student's folder, its lineage record included; needs persea[sign].

    The signature, train/student/model.sig, can also be verified with the package model-signing
    alone.
    """
    from persea.report.signature import sign_student

    typer.echo(str(sign_student(run / "train" / "student", key)))
