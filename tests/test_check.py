"""``icw-compile check``: stages, what stops them, and what is written; the stages for any device as they run here."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from icw_compile.kernels import find_kernel, inductor
from icw_compile.lab import check
from icw_compile.lab.check import STAGES, Stage, choose_stages, right, run_check
from icw_compile.lab.check.right import Row, Target
from icw_compile.lab.cli import app

CPU = Target(torch.device("cpu"), "eager")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(stages: list[Stage], file: Path) -> tuple[int, list[tuple[Any, ...]]]:
    """The exit code, and of each stage what was said last of it."""
    code = run_check([], device="cpu", compiler="eager", json_file=file, stages=stages)
    last: dict[str, Any] = {row["stage"]: row for row in rows_of(file)[1:]}
    return code, [(name, row.get("done") or row.get("skipped")) for name, row in last.items()]


def good(target: Target) -> Iterator[Row]:
    yield {"found": 1.0}


def bad(target: Target) -> Iterator[Row]:
    yield {"failed": "wrong"}
    yield {"found": 2.0}


def raises(target: Target) -> Iterator[Row]:
    yield {"found": 1.0}
    raise RuntimeError("no such thing")


def test_a_failure_rules_out_what_is_behind_it(tmp_path: Path) -> None:
    stages = [
        Stage("first", "?", good),
        Stage("second", "?", bad, unless=("first",)),
        Stage("third", "?", good, unless=("second",)),
        Stage("fourth", "?", good, unless=("third",)),
        Stage("fifth", "?", good, unless=("first",)),
    ]
    assert run(stages, tmp_path / "rows.jsonl") == (
        1,
        [
            ("first", "ok"),
            ("second", "FAILED"),
            ("third", "second failed"),
            ("fourth", "third failed"),
            ("fifth", "ok"),
        ],
    )
    assert {"stage": "second", "found": 2.0} in rows_of(tmp_path / "rows.jsonl"), "what it found besides"
    assert run(stages[:1], tmp_path / "rows.jsonl") == (0, [("first", "ok")])


def test_an_error_is_a_row(tmp_path: Path) -> None:
    assert run([Stage("first", "?", raises), Stage("second", "?", good)], tmp_path / "rows.jsonl") == (
        1,
        [("first", "FAILED"), ("second", "ok")],
    )
    rows = rows_of(tmp_path / "rows.jsonl")
    assert {"stage": "first", "found": 1.0} in rows
    assert {"stage": "first", "failed": "RuntimeError: no such thing"} in rows


def test_a_stage_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(target: Target) -> Iterator[Row]:
        for i in range(100):
            time.sleep(0.02)
            yield {"row": i}

    monkeypatch.setattr(check, "SECONDS", 0.05)
    assert run([Stage("first", "?", slow)], tmp_path / "rows.jsonl")[0] == 0
    rows = rows_of(tmp_path / "rows.jsonl")
    assert any("stopped" in row for row in rows) and 2 <= sum("row" in row for row in rows) < 50


def test_stages() -> None:
    names = [stage.name for stage in STAGES]
    for i, stage in enumerate(STAGES):
        assert set(stage.unless) <= set(names[:i]), "what rules it out ran before"
    assert [stage.name for stage in choose_stages([], "cpu")] == ["environment", "kernel", "model"]
    assert [stage.name for stage in choose_stages([], "cuda:0")] == names
    assert [stage.name for stage in choose_stages(["model", "environment"], "cpu")] == ["environment", "model"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "nothing"], "'nothing' is no stage; there are: environment"),
        (["--stages", "decode"], "the stage 'decode' needs a GPU"),
        pytest.param(
            ["--device", "cuda"],
            "torch finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_cannot_be_checked(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 2 and said in " ".join(result.output.replace("│", " ").split())


def test_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages that need no GPU; the one with models, with two of them."""
    monkeypatch.setattr(right, "MODELS", right.MODELS[:2])
    arguments = ["check", "--compiler", "eager", "--json", str(tmp_path / "rows.jsonl")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [row["stage"] for row in rows if row.get("done") == "ok"] == ["environment", "kernel", "model"]
    assert [row["cache"] for row in rows if "model" in row] == ["static", "dynamic"]
    assert [row["calls"] for row in rows if "calls" in row] == [len(right.SHAPES) * 8] * 3, "none was declined"
    assert all(0 < row["distance"] < row["limit"] for row in rows if "distance" in row)


def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not look at its mask."""

    def careless(query: Any, *others: Any) -> Any:
        rows, (_, *rest) = others[:4], others[4:]
        return inductor.attention_decode_lse(query, *rows, None, *rest)[0]

    found = find_kernel("cpu")
    monkeypatch.setattr(right, "find_kernel", lambda device: replace(found, operator=careless))  # type: ignore[type-var]
    monkeypatch.setattr(right, "SHAPES", right.SHAPES[4:5])
    monkeypatch.setattr(right, "TOLERANCE", {torch.float32: 5e-6})
    failed = [row["failed"].split(" of ")[0] for row in right.kernel(CPU) if "failed" in row]
    assert "a window" in failed and "additive" in failed and "no mask" not in failed


def test_what_compiles_at_its_first_call_is_called_from_several_threads() -> None:
    found = find_kernel("cpu")
    calls = [call for _, call in right._calls(right.SHAPES[2], torch.bfloat16, CPU.device)]
    made, together = [], threading.Barrier(2, timeout=60)

    def operator(query: Any, *others: Any) -> Any:
        made.append(others[4])
        together.wait()  # fails where there is one thread
        return query

    right._compile_at_once(replace(found, operator=operator), calls)  # type: ignore[type-var]
    assert {id(mask) for mask in made} == {id(call["mask"]) for call in calls} and len(made) == len(calls)

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        right._compile_at_once(replace(found, operator=fails), calls)  # type: ignore[type-var]


def test_a_model_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is another function: it keeps its prompt in float."""
    monkeypatch.setattr(right, "MODELS", (("llama", "dynamic"),))
    monkeypatch.setattr(right, "dynamic_reference_cache", lambda net: right.DynamicCache(config=net.config))
    (row,) = right.model(CPU)
    assert row["failed"] == "llama, dynamic cache" and row["distance"] > row["limit"]
