"""The region of a model on several devices, from what ``icw-compile plan`` wrote: a file for each row of the table."""

from collections.abc import Mapping
from typing import Any

from icw_compile.lab.bench.shapes import SHAPES
from icw_compile.lab.documents.page import Region, grid

__all__ = ["REGIONS"]

Data = Mapping[str, Any]

#: (weights, bits of keys and values, sequences).
ROWS = (
    ("float", "8", 1), ("float", "8-4", 1), ("float", "4", 1), ("float", "8", 8), ("float", "4", 8), ("int8", "8", 8),
    ("int4", "8", 1), ("int4", "8", 8), ("int4", "4", 8),
)  # fmt: skip
#: The options of a file's plan -> what its cache is called.
CACHES = {"": "int8", "icw.value_bits=4": "int8 keys, 4-bit values", "icw.bits=4": "4 bits"}


def plan_file(weights: str, bits: str, batch: int) -> str:
    return f"icw_compile/lab/results/plan-llama-3.1-70b-{weights}-{bits}-{batch}.json"


def ranks(*files: Data) -> str:
    """What each rank holds, reads and sends."""
    first = files[0]
    settings = first["settings"]
    header = (
        "weights", "sequences", "cache", "its bytes", "over float", "read in a step", "over float",
        f"longest context in {settings['memory']}", f"most sequences of {settings['tokens']:,} tokens",
    )  # fmt: skip
    floats = {(file["settings"]["weights"], file["settings"]["batch"]): file for file in files}
    rows = [_row(file, "float", settings["dtype"]) for file in floats.values()]
    rows += [_row(file, "stored", CACHES[file["settings"]["options"]]) for file in files]
    rows.sort(key=lambda row: (list(_WEIGHTS.values()).index(row[0]), int(row[1])))
    sent = {file["settings"]["batch"]: file["estimated_bytes_sent_in_a_step"] for file in files}
    said = ", ".join(f"{bytes_ / 1024**2:.2f} MiB for a batch of {batch}" for batch, bytes_ in sorted(sent.items()))
    weights = {file["settings"]["weights"]: file["estimated_weight_bytes"] for file in files}
    held = ", ".join(f"{_gibibytes(bytes_)} {_WEIGHTS[kind]}" for kind, bytes_ in weights.items())
    return (
        f"{SHAPES[settings['model']].source} on {settings['ranks']} ranks, {settings['tokens']:,} tokens, a "
        f"{settings['cache']} cache. All figures are of one rank; weights, and what is read and sent, are estimates. "
        f"Its weights take {held}. In a decode step it sends {said}, in {first['exchanges_in_a_step']} exchanges, "
        f"whatever the cache holds.\n\n{grid(header, rows, right=True)}"
    )


#: How weights are called.
_WEIGHTS = {"float": "bfloat16", "int8": "int8", "int4": "int4"}


def _row(file: Data, kind: str, cache: str) -> tuple[str, ...]:
    settings, float_, this = file["settings"], file["float"], file[kind]
    ratios = [this[name] / float_[name] for name in ("cache_bytes", "estimated_bytes_read_in_a_step")]
    return (
        _WEIGHTS[settings["weights"]], f"{settings['batch']}", cache,
        _gibibytes(this["cache_bytes"]), f"{ratios[0]:.3f}x",
        _gibibytes(this["estimated_bytes_read_in_a_step"]), f"{ratios[1]:.2f}x",
        f"{this['largest_context']:,}", f"{this['largest_batch']:,}",
    )  # fmt: skip


def _gibibytes(count: int) -> str:
    return f"{count / 1024**3:,.2f} GiB"


REGIONS = {"plan-ranks": Region(tuple(plan_file(*row) for row in ROWS), ranks)}
