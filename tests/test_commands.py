"""The command line: every example of a ``--help`` runs as printed, ``--json`` parses, and only answers are printed."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from icw_compile.lab.cli import app
from icw_compile.lab.terminal import answers, progress

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
#: What takes more than a few seconds -> the function behind it, and what it returns.
HEAVY: dict[str, tuple[str, Any]] = {
    "demo": ("icw_compile.lab.demo.run_demo", None),
    "eval": ("icw_compile.lab.evaluation.run_eval", []),
    "bench": ("icw_compile.lab.bench.run_model_bench", 0),
    "sweep": ("icw_compile.lab.sweep.run_sweep", 0),
}


def example(command: str) -> list[str]:
    """The arguments of the example, from the help as a terminal of 80 columns shows it."""
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    (line,) = re.findall(r"^ *Example: (icw-compile .*?) *$", result.stdout, re.MULTILINE)
    program, name, *arguments = shlex.split(line)
    assert (program, name) == ("icw-compile", command) and arguments
    return arguments


def files_of(arguments: list[str]) -> list[str]:
    return [value for option, value in pairwise(arguments) if option == "--json"]


def test_every_command_has_an_example_and_takes_json() -> None:
    assert COMMANDS == ["demo", "eval", "bench", "explain", "plan", "check", "sweep"]
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options, command.name
        assert example(command.name)


@pytest.mark.parametrize(
    "command", [name if name not in HEAVY else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_the_example_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = example(command)
    result = CliRunner().invoke(app, [command, *arguments], catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout
    for file in files_of(arguments):
        text = Path(file).read_text()
        assert [json.loads(line) for line in text.splitlines()] if file.endswith(".jsonl") else json.loads(text)


@pytest.mark.parametrize("command", HEAVY)
def test_the_example_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would run, if it is not run here."""
    path, returned = HEAVY[command]
    module, _, name = path.rpartition(".")
    calls: list[dict[str, Any]] = []

    def instead(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return returned

    monkeypatch.setattr(importlib.import_module(module), name, instead)
    arguments = example(command)
    result = CliRunner().invoke(app, [command, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (kwargs,) = calls
    assert [str(kwargs["json_file"])] == (files_of(arguments) or ["None"])


def test_only_the_answer_on_standard_output() -> None:
    command = [sys.executable, "-c", "from icw_compile.lab.cli import app; app()", "plan", *example("plan")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "llama, bfloat16, dynamic cache, one rank" and "largest context in 24GiB" in done.stdout
    assert "\x1b" not in done.stdout and all(len(line) <= 140 for line in lines)


def test_progress_is_on_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    console = answers(30)
    with progress() as bar:
        bar.add_task("working", total=1)
        console.print("an answer of more than thirty columns")
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "an answer of more than thirty",
        "columns",
    ]
