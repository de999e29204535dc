"""persea cache: what the teachers said, as it lies on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import AsJson, app
from persea.errors import DataError

cache_app = typer.Typer(
    no_args_is_help=True,
    help="What the teachers said, as it lies on disk: a run folder, or its capture/.",
)
app.add_typer(cache_app, name="cache", rich_help_panel="After a run")
CachePath = Annotated[
    Path, typer.Argument(help="A run folder, or its capture/.", show_default=False)
]


@cache_app.command("info")
def cache_info(folder: CachePath, as_json: AsJson = False) -> None:
    """Units, answers, positions and bytes, in all and by teacher. Reads the commit records only."""
    from persea.cache.maintenance import find_cache_folder, summarize_cache

    told = summarize_cache(find_cache_folder(folder))
    if as_json:
        typer.echo(json.dumps(told, indent=1))
        return
    from persea.pipeline.progress import print_table

    names = ("units", "answers", "tokens", "positions", "entries", "bytes")
    rows = [*told["teachers"].items(), ("in all", told)]
    print_table(
        ("teacher", *names),
        [(name, *(f"{counts.get(n, 0):,}" for n in names)) for name, counts in rows],
    )
    kinds = ", ".join(
        " ".join([r["kind"], *(f"({key} {r[key]:g})" for key in ("tau", "kl") if key in r)])
        for r in told["rows"]
    )
    typer.echo(
        f"rows: {kinds}; {told.get('bytes_per_position', 0)} bytes a position, text and tokens included"
    )


@cache_app.command("verify")
def cache_verify(folder: CachePath, as_json: AsJson = False) -> None:
    """Read and unpack every byte; tell everything that is not as it was written (exit 3)."""
    from persea.cache.maintenance import committed_units, find_cache_folder, verify_cache

    where = find_cache_folder(folder)
    found = verify_cache(where)
    wrong = [f for f in found if not f.is_harmless]
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {
                        "where": str(f.path),
                        "what": f.message,
                        "remedy": f.remedy,
                        "harmless": f.is_harmless,
                    }
                    for f in found
                ],
                indent=1,
            )
        )
    else:
        for f in found:
            typer.echo(f"{f.path}: {f.message} -> {f.remedy}")
        typer.echo(f"{len(committed_units(where))} units, {len(wrong)} findings")
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(committed_units(where))} units or records are not as they were written",
            where=str(where),
            remedy="each is named above with its remedy",
        )


@cache_app.command("export")
def cache_export(
    folder: CachePath,
    to: Annotated[Path, typer.Argument(help="The Parquet file to write.", show_default=False)],
) -> None:
    """The whole cache as one Parquet file, a row an answer; every byte is checked on the way."""
    from persea.cache.maintenance import export_parquet, find_cache_folder

    typer.echo(f"{to}: {export_parquet(find_cache_folder(folder), to):,} answers")


@cache_app.command("merge")
def cache_merge(
    into: Annotated[Path, typer.Argument(help="The folder to copy into.", show_default=False)],
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders, or their capture/.", show_default=False)
    ],
) -> None:
    """Copy the units of several caches into one folder; every byte is checked on the way, what stands there already stays."""
    from persea.cache.maintenance import find_cache_folder, merge_caches

    typer.echo(
        f"{into}: {merge_caches(into, [find_cache_folder(folder) for folder in folders]):,} new units"
    )
