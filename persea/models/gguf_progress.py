"""Show how far the conversion of a GGUF file is, on stderr."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PERCENT = re.compile(r"(\d+)%\|")  # of tqdm's bar


@contextmanager
def conversion_progress(title: str) -> Iterator[Callable[[str, float], None]]:
    """Yield a callback (step, fraction done) that draws a bar; elsewhere one line is printed.

    Args:
        title: What is converted.
    """
    console = Console(file=sys.stderr)  # this stream, also while `read_percent` redirects it
    if not console.is_terminal:
        console.print(title, highlight=False, markup=False, soft_wrap=True)
        yield lambda step, fraction: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(title, total=1.0)

        def draw(step: str, fraction: float) -> None:
            bars.update(task, completed=fraction, description=f"{title}: {step}")

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
