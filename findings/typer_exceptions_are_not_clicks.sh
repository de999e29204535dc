#!/usr/bin/env bash
# typer 0.29.2: the exceptions that typer raises are not click's, even where click is installed.
#
# Guess: a command line built with typer is handled by `except click.ClickException` / `click.UsageError`,
# as it was for years (typer depended on click and re-exported its exceptions).
# Seen: typer carries its own copy of click (typer._click). An unknown option raises
# typer._click.exceptions.NoSuchOption, which `except click.ClickException` does not catch, and
# `isinstance(error, click.UsageError)` is False. typer itself no longer requires click.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check typer==0.29.2 click==8.5.1
"$dir/env/bin/python" - <<'PY'
from importlib.metadata import requires, version

import click
import typer

app = typer.Typer()


@app.command()
def main(name: str = "x") -> None:
    """Do nothing."""


needs = [r for r in requires("typer") or () if r.split()[0].startswith("click")]
print("typer", version("typer"), "click", version("click"), "typer requires click:", needs)
caught = ""
try:
    app(["--nothing"], standalone_mode=False)
except click.ClickException:
    caught = "by click's class"
except Exception as error:
    caught = f"only as {type(error).__module__}.{type(error).__name__}"
    assert not isinstance(error, click.ClickException)
print("caught", caught)
assert caught == "only as typer._click.exceptions.NoSuchOption"
assert not issubclass(typer.BadParameter, click.UsageError)
assert not issubclass(typer.Exit, click.exceptions.Exit)
assert needs == []
PY
