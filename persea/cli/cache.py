"""persea cache: look at, verify, export and merge captured answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import AFTER_PANEL, AsJson, app
from persea.errors import DataError

cache_app = typer.Typer(
    no_args_is_help=True,
    help="The teachers' captured answers and token distributions, in a run folder.",
)
app.add_typer(cache_app, name="cache", rich_help_panel=AFTER_PANEL)
CachePath = Annotated[
    Path, typer.Argument(help="A run folder, or its capture/.", show_default=False)
]


@cache_app.command("info")
def cache_info(folder: CachePath, as_json: AsJson = False) -> None:
    """Count units, answers, positions and bytes, in total and by teacher.

    Reads the commit records only.
    """
    from persea.cache.maintenance import find_cache_folder, summarize_cache

    summary = summarize_cache(find_cache_folder(folder))
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    from persea.pipeline.progress import print_table

    names = ("units", "answers", "tokens", "positions", "entries", "bytes")
    rows = [*summary["teachers"].items(), ("total", summary)]
    print_table(
        ("teacher", *names),
        [(name, *(f"{counts.get(n, 0):,}" for n in names)) for name, counts in rows],
    )
    kinds = ", ".join(
        " ".join([d["kind"], *(f"({key} {d[key]:g})" for key in ("tau", "kl") if key in d)])
        for d in summary["distributions"]
    )
    typer.echo(
        f"distributions: {kinds}; {summary.get('bytes_per_position', 0)} bytes a position, text "
        "and tokens included"
    )


@cache_app.command("verify")
def cache_verify(folder: CachePath, as_json: AsJson = False) -> None:
    """Read and decode every byte; list everything that is damaged (exit code 3)."""
    from persea.cache.maintenance import committed_units, find_cache_folder, verify_cache

    cache_folder = find_cache_folder(folder)
    problems = verify_cache(cache_folder)
    num_damaged = sum(not p.is_harmless for p in problems)
    num_units = len(committed_units(cache_folder))
    if as_json:
        records = [
            {
                "path": str(p.path),
                "message": p.message,
                "remedy": p.remedy,
                "is_harmless": p.is_harmless,
            }
            for p in problems
        ]
        typer.echo(json.dumps(records, indent=1))
    else:
        for p in problems:
            typer.echo(f"{p.path}: {p.message} -> {p.remedy}")
        typer.echo(f"{num_units} units, {num_damaged} problems")
    if num_damaged:
        raise DataError(
            f"{num_damaged} of {num_units} units or records are damaged",
            where=str(cache_folder),
            remedy="each is listed above with its remedy",
        )


@cache_app.command("export")
def cache_export(
    folder: CachePath,
    to: Annotated[Path, typer.Argument(help="The Parquet file to write.", show_default=False)],
) -> None:
    """Write the whole cache as one Parquet file with a row an answer, and verify every byte."""
    from persea.cache.maintenance import export_parquet, find_cache_folder

    typer.echo(f"{to}: {export_parquet(find_cache_folder(folder), to):,} answers")


@cache_app.command("merge")
def cache_merge(
    into: Annotated[Path, typer.Argument(help="The folder to copy into.", show_default=False)],
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders, or their capture/.", show_default=False)
    ],
) -> None:
    """Copy the units of several caches into one folder, and verify every byte.

    Units that the folder already has stay as they are.
    """
    from persea.cache.maintenance import find_cache_folder, merge_caches

    num_new = merge_caches(into, [find_cache_folder(folder) for folder in folders])
    typer.echo(f"{into}: {num_new:,} new units")


@cache_app.command("shared")
def cache_shared(
    store: Annotated[
        Path,
        typer.Option(
            "--store",
            help="The recipe's `capture.store`. Default: captures in PERSEA_HOME.",
            show_default=False,
        ),
    ] = Path(),
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete the units that no run folder shares any more.")
    ] = False,
) -> None:
    """Show the captured units that all runs share, and how many bytes only the store holds."""
    from persea.cache.shared_store import SharedStore, default_store_folder

    shared = SharedStore(store if store != Path() else default_store_folder())
    if prune:
        num_units, num_bytes = shared.prune()
        typer.echo(f"{shared.folder}: deleted {num_units:,} units, {num_bytes:,} bytes")
        return
    num_units, num_bytes, alone = shared.size()
    typer.echo(
        f"{shared.folder}: {num_units:,} units, {num_bytes:,} bytes, {alone:,} of them in no run "
        "folder on this disk"
    )
