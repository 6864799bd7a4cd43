"""What commands share: how options of the backend are written, and where is printed.

The answer goes to standard output, and how far a command is to the error stream.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Say", "answers", "parse_options", "progress", "teller"]

#: What a long measurement tells of itself: how much more is done, or what it begins with.
Say = Callable[[int | str], None]


def answers(width: int) -> Console:
    """Standard output; a file or a log, which has no width of its own, gets ``width`` columns."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def progress() -> Progress:
    """A bar that is gone when it is done, with what is done at the moment and the seconds so far.

    In a terminal, what is printed meanwhile stands above it. What is printed into a file goes there.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty())


def teller(bar: Progress, task: TaskID, what: str) -> Say:
    """Show what is told in the row of ``task``, which is about ``what``."""

    def say(said: int | str) -> None:
        if isinstance(said, int):
            bar.advance(task, said)
        else:
            bar.update(task, description=f"{what}: {said}")

    return say


def parse_options(text: str) -> dict[str, Any]:
    """``"icw.attention=inductor,max_autotune=true"`` as ``torch.compile``'s options; ``""`` is none.

    Raises:
        ValueError: a part without ``=``.
    """
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"An option is written name=value, several of one row with commas; found {part!r}.")
        try:
            options[name] = json.loads(value)  # a number, true or false
        except json.JSONDecodeError:
            options[name] = value
    return options
