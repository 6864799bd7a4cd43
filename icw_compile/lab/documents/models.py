"""Regions of architectures, from what ``icw-compile sweep`` wrote, a file for each of its tasks."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from icw_compile.lab.documents.page import Region, details, grid, restore
from icw_compile.lab.sweep import STATUSES, TOLERANCE, Run, Swept, markdown
from icw_compile.lab.tiny import TASKS

__all__ = ["REGIONS"]

Data = Sequence[Mapping[str, Any]]


def sweep_file(task: str) -> str:
    return f"icw_compile/lab/results/sweep-{task}.json"


def swept(data: Data, task: str) -> list[Swept]:
    """What a file holds of one task."""
    return [
        restore(Swept, each, runs={kind: restore(Run, run) for kind, run in each["runs"].items()})
        for each in data
        if each["task"] == task
    ]


def types(data: Data, *, task: str) -> str:
    """The model types of each status, best first, and every row of the sweep folded away."""
    results = swept(data, task)
    rows = []
    for status, meaning in STATUSES.items():
        if found := [result.model_type for result in results if result.status == status]:
            rows.append((f"{status}: {meaning}", f"{len(found)}", ", ".join(found)))
    said = f"{len(results)} model types; logits within {TOLERANCE:g} of the reference, relatively, in float32:"
    table = grid(("", "types", ""), rows)
    return f"{said}\n\n{table}\n\n{details('every type: attention, both caches, layers, distance', markdown(results))}"


def short(data: Data) -> str:
    """A sentence for the README."""
    results = swept(data, "text")
    int8 = sum(result.status == "int8" for result in results)
    wrong = sum(result.status in ("wrong", "failed") for result in results)
    return (
        f"Of the {len(results)} types of causal language models that transformers knows, {int8} store and read every "
        f"key and value as int8; {wrong} give a wrong answer or fail where stock `torch.compile` does not: "
        "[Architectures](docs/models.md)."
    )


REGIONS = {
    "models-short": Region((sweep_file("text"),), short),
    **{f"models-{task}": Region((sweep_file(task),), partial(types, task=task)) for task in TASKS},
}
