"""``make notebooks``: nbmake runs each notebook once; what it printed must be what is committed.

Compared are the source, with that of the paired script, and all output that is text: what is printed, tables, drawings
(SVG). Plots (PNG) are not, which depend on fonts. Nothing may be printed on the error stream. The file stays as it is:
``make write-notebooks`` writes it.
"""

import difflib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbmake.nb_result import NotebookError, NotebookResult
from nbmake.pytest_items import NotebookFailedException, NotebookItem

TEXT = ("text/plain", "text/html", "text/markdown", "text/latex", "image/svg+xml")


def pytest_configure(config: pytest.Config) -> None:
    config.option.overwrite = True  # the only way to get at what nbmake has run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    if not isinstance(item, NotebookItem):
        return (yield)
    committed = item.path.read_bytes()
    try:
        yield
        _compare(nbformat.reads(committed.decode(), 4), nbformat.read(item.path, 4), item.path)
    finally:
        item.path.write_bytes(committed)


def _compare(committed: Any, run: Any, file: Path) -> None:
    script = jupytext.read(file.with_suffix(".py"))
    for i, (cell, paired) in enumerate(zip(committed.cells, script.cells, strict=True)):
        _same(cell.source, paired.source, i, run, f"not in step with {file.with_suffix('.py').name}")
    for i, (cell, again) in enumerate(zip(committed.cells, run.cells, strict=True)):
        if cell.cell_type == "code":
            _same(_text(cell), _text(again), i, run, "stale: `make write-notebooks`")


def _same(expected: str, found: str, index: int, run: Any, why: str) -> None:
    if expected != found:
        lines = difflib.unified_diff(expected.splitlines(), found.splitlines(), "committed", "found", lineterm="")
        said = "\n".join([f"cell {index} is {why}", *lines])
        raise NotebookFailedException(NotebookResult(run, NotebookError(why, said, index)))


def _text(cell: Any) -> str:
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text if output.name == "stdout" else f"on the error stream: {output.text}")
        else:
            parts += [output.data[kind] for kind in TEXT if kind in output.get("data", {})]
    return "".join(parts)
