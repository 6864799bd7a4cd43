"""``icw-compile check``: is the backend right on this machine, and how fast? Stages, in the order of what they settle.

`icw_compile.lab.check.right` asks whether answers are right, on any device; `icw_compile.lab.check.gpu` measures a
GPU: its ceilings, and what attention, decode steps, prompts and `generate` reach of them. A stage gives rows, one JSON
object each, as it finds them: what was stopped leaves what it has. A row with ``failed`` in it says that something is
wrong; a stage that measures does not fail for being slow.

No stage takes much more than three minutes: it is stopped between rows. Where a stage fails, those that would measure
something wrong are not run, and that is said.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from icw_compile.lab.bench.measure import environment
from icw_compile.lab.check import gpu, right
from icw_compile.lab.check.right import Row, Target

__all__ = ["SECONDS", "STAGES", "Stage", "choose_stages", "run_check"]

#: What a stage may take: it is stopped behind the row that goes beyond.
SECONDS = 180.0


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: what it is called on the command line.
        what: the question that it answers.
        run: gives rows.
        needs_gpu: it runs on CUDA devices alone.
        unless: the stages whose failure makes this one meaningless.
    """

    name: str
    what: str
    run: Callable[[Target], Iterator[Row]]
    needs_gpu: bool = False
    unless: tuple[str, ...] = ()


_WRONG = ("environment", "kernel", "model")

#: In the order in which they run.
STAGES: tuple[Stage, ...] = (
    Stage("environment", "Is there a device, and an attention kernel for it?", right.environment),
    Stage("kernel", "Does the kernel give what float64 gives, twice the same?", right.kernel, unless=("environment",)),
    Stage("model", "Does a model give what a plain-torch cache of the same rounding gives?", right.model,
          unless=("environment", "kernel")),
    Stage("ceiling", "What bandwidth, products and launches does the card reach?", gpu.ceiling, True, _WRONG),
    Stage("decode", "What share of that bandwidth does decode attention reach?", gpu.decode, True,
          (*_WRONG, "ceiling")),
    Stage("graphs", "Are CUDA graphs replayed, and not recorded again at each step?", gpu.graphs, True, _WRONG),
    Stage("step", "What does a decode step take, beside stock torch.compile?", gpu.step, True, _WRONG),
    Stage("prefill", "What does a prompt take?", gpu.prefill, True, _WRONG),
    # Where recordings grow with the steps, that is what would be measured.
    Stage("generate", "How many tokens a second does the README's command give?", gpu.generate, True,
          (*_WRONG, "graphs")),
)  # fmt: skip


def choose_stages(names: Sequence[str], device: str) -> list[Stage]:
    """The stages of these names, or all that the device allows, in their order.

    Raises:
        ValueError: an unknown name, or a stage that needs a GPU for another device.
    """
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]!r} is no stage; there are: {', '.join(known)}")
    on_gpu = torch.device(device).type == "cuda"
    if wrong := [name for name in names if known[name].needs_gpu and not on_gpu]:
        raise ValueError(f"the stage {wrong[0]!r} needs a GPU: --device cuda")
    return [stage for stage in STAGES if (stage.name in names if names else on_gpu or not stage.needs_gpu)]


def run_check(
    names: Sequence[str], *, device: str, compiler: str, json_file: Path | None, stages: Sequence[Stage] | None = None
) -> int:
    """Run stages, print a line for each row, and write the rows as JSON lines; returns the exit code.

    Args:
        names: of the stages; empty for all that the device allows.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        compiler: what compiles the rewritten graphs, ``"inductor"`` or ``"eager"``.
        json_file: where rows go, each as soon as it is there; what it held is overwritten.
        stages: what to run instead of `STAGES`; for tests.

    Returns:
        0, or 1 if a stage failed, or was not run because another one did.

    Raises:
        ValueError: as `choose_stages`, or there is no such device.
    """
    target = Target(torch.device(device), compiler)
    if target.device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here")
    chosen = list(choose_stages(names, device) if stages is None else stages)
    console = Console(highlight=False, soft_wrap=True)
    failed: set[str] = set()
    with nullcontext() if json_file is None else json_file.open("w", encoding="utf-8") as file:
        _write(file, {"stage": "", **environment(target.device), "stages": [stage.name for stage in chosen]})
        for stage in chosen:
            console.print(f"{stage.name}: {stage.what}", style="bold")
            if broken := [name for name in stage.unless if name in failed]:
                _say(console, file, stage, {"skipped": f"{broken[0]} failed"})
                failed.add(stage.name)
            elif not _run(console, file, stage, target):
                failed.add(stage.name)
    return int(bool(failed))


def _run(console: Console, file: TextIO | None, stage: Stage, target: Target) -> bool:
    """Whether a stage found nothing wrong."""
    started, good = time.perf_counter(), True
    rows = stage.run(target)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # it is the row: what comes behind may still tell something
            row, rows = {"failed": f"{type(error).__name__}: {error}"[:500]}, iter(())
        seconds = time.perf_counter() - started
        if row is None:
            break
        good = good and "failed" not in row
        _say(console, file, stage, row)
        if seconds > SECONDS:
            _say(console, file, stage, {"stopped": f"after {seconds:.0f} s; what was to follow is left out"})
            break
    _say(console, file, stage, {"done": "ok" if good else "FAILED", "seconds": round(seconds, 1)})
    return good


def _say(console: Console, file: TextIO | None, stage: Stage, row: Row) -> None:
    said = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in row.items())
    style = "red" if "failed" in row or row.get("done") == "FAILED" else "yellow" if "skipped" in row else None
    console.print(f"  {said}", style=style, markup=False)
    _write(file, {"stage": stage.name, **row})


def _write(file: TextIO | None, row: dict[str, Any]) -> None:
    if file is not None:
        file.write(json.dumps(row) + "\n")
        file.flush()


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
