"""Pages and their regions, and Markdown of what the commands print."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

__all__ = ["Region", "details", "grid", "markdown_table", "render", "restore", "sentence"]

T = TypeVar("T")
_REGION = re.compile(r"<!-- result: ([\w-]+) -->\n.*?<!-- (end|result)", re.DOTALL)


@dataclass(frozen=True)
class Region:
    """What stands between two comments.

    Attributes:
        files: the result files that it is made of, relative to the repository.
        make: given what each of them holds, in order, returns the Markdown.
    """

    files: tuple[str, ...]
    make: Callable[..., str]

    def text(self, root: Path) -> str:
        return self.make(*(json.loads((root / file).read_text(encoding="utf-8")) for file in self.files))


def render(root: Path, text: str, regions: Mapping[str, Region]) -> str:
    """``text`` with each of its regions made anew.

    Args:
        root: where result files are looked for.
        text: a page.
        regions: by name.

    Raises:
        ValueError: an unknown region, or one without an end.
        FileNotFoundError: a result file of a region.
    """

    def again(match: re.Match[str]) -> str:
        name, end = match.groups()
        if end != "end":
            raise ValueError(f"the region {name!r} has no end")
        if name not in regions:
            raise ValueError(f"the region {name!r} is not known; there are: {', '.join(sorted(regions))}")
        made = regions[name].text(root).strip("\n")
        return f"<!-- result: {name} -->\n{made}\n<!-- end"

    made, count = _REGION.subn(again, text)
    if count != text.count("<!-- result:"):
        raise ValueError("a region has no end")
    return made


def restore(kind: Callable[..., T], data: Mapping[str, Any], **changed: Any) -> T:
    """A dataclass from what a result file says of it, which may say more: what was calculated from its fields."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in data.items() if name in names} | changed)


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], right: bool = False) -> str:
    """A Markdown table; the columns but the first are aligned to the right if asked for."""
    rule = ["---", *["---:" if right else "---"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def markdown_table(table: Table) -> str:
    """A table that a command prints, as Markdown: its title, its cells without style, its caption."""

    def plain(cell: Any) -> str:
        text = cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
        return text.replace("|", "\\|").replace("\n", " ")

    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*([plain(cell) for cell in column.cells] for column in table.columns), strict=True)
    lines = [f"| {' | '.join(row)} |" for row in ([plain(column.header) for column in table.columns], rule, *rows)]
    parts = (f"{plain(table.title)}:" if table.title else "", "\n".join(lines), plain(table.caption or ""))
    return "\n\n".join(filter(None, parts))


def sentence(text: str) -> str:
    """With a capital at its beginning."""
    return f"{text[0].upper()}{text[1:]}"


def details(summary: str, *parts: str) -> str:
    """What is folded away on a page that is looked at."""
    inside = "\n\n".join(parts)
    return f"<details><summary>{summary}</summary>\n\n{inside}\n\n</details>"
