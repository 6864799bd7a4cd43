"""``icw-compile bench``: time and memory of the int8 cache beside what one would use otherwise.

`icw_compile.lab.bench.model` runs whole models, `icw_compile.lab.bench.operator` one attention,
`icw_compile.lab.bench.startup` the start of a process;
`icw_compile.lab.bench.measure` is how, `icw_compile.lab.bench.output` what is printed, and ``results`` holds what was
measured, one file for each command.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from icw_compile.lab.bench.measure import Spread, bandwidth, environment
from icw_compile.lab.bench.model import Settings, choose_contenders, measure_context, units
from icw_compile.lab.bench.operator import CASES, OPERATOR_CONTENDERS, run_case
from icw_compile.lab.bench.output import (
    context_notes,
    context_table,
    depth_table,
    operator_table,
    plot_contexts,
    plot_depths,
)
from icw_compile.lab.bench.startup import contenders_to_start, measure_depth
from icw_compile.lab.terminal import answers, progress, teller

__all__ = ["Settings", "run_model_bench", "run_operator_bench", "run_startup_bench"]


def run_model_bench(
    settings: Settings,
    contexts: Sequence[int],
    *,
    options: Sequence[str] = (),
    json_file: Path | None,
    plot: Path | None,
) -> int:
    """Measure a model at each context, print tables, write the files; returns the exit code.

    Args:
        options: run ours once for each of them, as `icw_compile.lab.terminal.parse_options` reads them.

    1 if a contender failed or a context did not fit in memory, else 0.

    Raises:
        ValueError: an unknown contender or model size.
    """
    settings = replace(settings, contenders=choose_contenders(settings.contenders, settings.weights, options))
    about = environment(torch.device(settings.device))
    console = answers(160)
    shape = f"{settings.model}{f', {settings.layers} layers' if settings.layers else ''}"
    if settings.weights != "float":
        shape += f", {settings.weights} weights"
    title = f"{shape}, batch {settings.batch}, {settings.dtype}; {about['device']}, torch {about['torch']}"
    console.print(title, highlight=False)
    results = []
    with progress() as bar:
        task = bar.add_task("", total=units(settings, contexts))
        for context in contexts:
            result = measure_context(settings, context, teller(bar, task, f"{context:,} tokens"))
            results.append(result)
            if not result.refused:
                console.print(context_table(result))
            for note in context_notes(result):
                console.print(note, highlight=False)
            if json_file is not None:  # after each context: a run that is stopped leaves what it has
                data = {**about, "settings": asdict(settings), "contexts": [each.to_dict() for each in results]}
                _write(json_file, data)
    if plot is not None and any(result.measured for result in results):
        plot_contexts(results, title, plot)
    failed = any(measured.failed for result in results for measured in result.measured.values())
    return int(failed or any(result.refused for result in results))


def run_operator_bench(*, batch: int, device: str, dtype: str, rounds: int, json_file: Path | None) -> int:
    """Measure each case of one attention, print tables, write the file; returns the exit code, 0."""
    where = torch.device(device)
    about = environment(where)
    console = answers(160)
    title = f"one decode attention, {dtype}; {about['device']}, torch {about['torch']}"
    if where.type == "cuda":
        about["copy_bytes_per_second"] = bandwidth(where)
        title += f"; copies move {about['copy_bytes_per_second'] / 1e9:,.0f} GB/s"
    console.print(title, highlight=False)
    results = []
    with progress() as bar:
        task = bar.add_task("", total=len(CASES) * len(OPERATOR_CONTENDERS) * rounds)
        for case in CASES:
            bar.update(task, description=str(case))
            result = run_case(
                case, batch=batch, dtype=getattr(torch, dtype), device=where, rounds=rounds,
                advance=lambda: bar.advance(task),
            )  # fmt: skip
            results.append(result)
            console.print(operator_table(result))
            bar.advance(task, len(result.failed) * rounds)
    if json_file is not None:
        cases: list[dict[str, Any]] = [
            {
                **asdict(result),
                "median_quartiles": {name: Spread.of(taken) for name, taken in result.seconds.items()},
                "over_int8": {name: result.times_ours(name) for name in result.seconds},
                "quarter_over_full": result.quarter,
            }
            for result in results
        ]
        _write(json_file, {**about, "dtype": dtype, "rounds": rounds, "cases": cases})
    return 0


def run_startup_bench(settings: Settings, depths: Sequence[int], *, json_file: Path | None, plot: Path | None) -> int:
    """Measure the start of models of so many layers, print tables, write the files; returns the exit code.

    1 if a contender failed, else 0.

    Raises:
        ValueError: a contender that cannot be started.
    """
    settings = replace(settings, contenders=contenders_to_start(settings.contenders))
    about = environment(torch.device(settings.device))
    console = answers(160)
    title = f"start of a small Llama, {settings.dtype}; {about['device']}, torch {about['torch']}"
    console.print(title, highlight=False)
    results = []
    with progress() as bar:
        task = bar.add_task("", total=len(depths) * settings.prefill_rounds * len(settings.contenders))
        for depth in depths:
            results.append(measure_depth(settings, depth, teller(bar, task, f"{depth} layers")))
            console.print(depth_table(results[-1]))
            if json_file is not None:  # after each depth: a run that is stopped leaves what it has
                _write(json_file, {**about, "settings": asdict(settings), "depths": [asdict(each) for each in results]})
    if plot is not None:
        plot_depths(results, title, plot)
    return int(any(result.failed for result in results))


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=1) + "\n")
