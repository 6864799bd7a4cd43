"""What ``make notebooks`` notices: `notebooks/conftest.py`. It runs the notebooks themselves."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
jupytext = pytest.importorskip("jupytext")
pytest.importorskip("nbmake")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
V4 = nbformat.v4


@pytest.fixture(scope="module")
def conftest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_conftest", NOTEBOOKS / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(source: str = "print(1)", *, stdout: str = "1\n", stderr: str = "", svg: str = "<svg/>") -> Any:
    outputs = [V4.new_output("stream", text=stdout)]
    if stderr:
        outputs.append(V4.new_output("stream", name="stderr", text=stderr))
    outputs.append(V4.new_output("display_data", {"image/svg+xml": svg, "image/png": stdout}))
    return V4.new_notebook(cells=[V4.new_code_cell(source, outputs=outputs)])


@pytest.mark.parametrize(
    ("run", "script", "why"),
    [
        (notebook(), "print(1)", None),
        (notebook(stdout="2\n"), "print(1)", "stale"),
        (notebook(svg="<svg>1</svg>"), "print(1)", "stale"),
        (notebook(stderr="warning"), "print(1)", "stale"),
        (notebook(), "print(2)", "not in step"),
    ],
)
def test_what_is_noticed(conftest: ModuleType, tmp_path: Path, run: Any, script: str, why: str | None) -> None:
    jupytext.write(notebook(script), tmp_path / "01.py", fmt="py:percent")
    if why is None:
        conftest._compare(notebook(), run, tmp_path / "01.ipynb")
        return
    with pytest.raises(conftest.NotebookFailedException) as raised:
        conftest._compare(notebook(), run, tmp_path / "01.ipynb")
    assert raised.value.args[0].error.summary.startswith(why)


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_what_is_committed_was_run_from_beginning_to_end(file: Path) -> None:
    committed = nbformat.read(file, 4)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    streams = {output.name for cell in code for output in cell.outputs if output.output_type == "stream"}
    assert streams <= {"stdout"} and not any(o.output_type == "error" for cell in code for o in cell.outputs)
    assert file.with_suffix(".py").exists()
