"""Show how far the conversion of a GGUF file is, on stderr."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

PERCENT = re.compile(r"(\d+)%\|")  # of tqdm's bar


@contextmanager
def conversion_progress(title: str) -> Iterator[Callable[[str, float], None]]:
    """Print a title and yield a callback (step, fraction done), which draws a bar on a terminal.

    Args:
        title: What is converted.
    """
    console = Console(file=sys.stderr)  # this stream, also while `read_percent` redirects it
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        yield lambda step, fraction: None
        return
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=1.0)

        def draw(step: str, fraction: float) -> None:
            bars.update(task, completed=fraction, description=step)

        yield draw


class _PercentReader(io.StringIO):
    """Takes the place of stderr and reads the share of tqdm's bar instead of showing it."""

    def __init__(self, report: Callable[[float], None]) -> None:
        super().__init__()
        self.report = report

    def write(self, text: str) -> int:
        for share in PERCENT.findall(text)[-1:]:
            self.report(int(share) / 100)
        return len(text)


@contextmanager
def read_percent(report: Callable[[float], None]) -> Iterator[None]:
    """Pass the share of a library's own bar, which it writes to stderr, to a callback."""
    with redirect_stderr(_PercentReader(report)):
        yield
