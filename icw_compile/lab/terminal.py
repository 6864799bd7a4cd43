"""Where commands print: the answer on standard output, and how far they are on the error stream."""

import sys

from rich.console import Console
from rich.progress import Progress, ProgressColumn

__all__ = ["answers", "progress"]


def answers(width: int) -> Console:
    """Standard output; a file or a log, which has no width of its own, gets ``width`` columns."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def progress(*columns: str | ProgressColumn) -> Progress:
    """A bar that is gone when it is done.

    In a terminal, what is printed meanwhile stands above it. What is printed into a file goes there.
    """
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty())
