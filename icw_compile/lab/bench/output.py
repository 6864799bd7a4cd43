"""What a benchmark prints and writes: tables, and plots of time and memory against context."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from icw_compile.lab.bench.measure import Spread
from icw_compile.lab.bench.model import CONTENDERS, ContextResult, Measured, contender
from icw_compile.lab.bench.operator import OPERATOR_CONTENDERS, OperatorResult
from icw_compile.lab.bench.startup import DepthResult, Start

__all__ = ["context_notes", "context_table", "depth_table", "operator_table", "plot_contexts", "plot_depths", "times"]


def context_table(result: ContextResult) -> Table:
    """One context: a row for each contender. Ratios are over the fastest float contender, pair by pair."""
    how = "prompt run through the model" if result.prefilled else "caches filled with random numbers"
    table = Table(title=f"{result.context:,} tokens ({how})", title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("cache MiB", "rise MiB", "peak MiB", "prefill s", "decode ms per token", "over the fastest float"):
        table.add_column(column, justify="right")
    fastest = result.fastest_stock
    for name, measured in result.measured.items():
        if measured.failed:
            table.add_row(name, *[""] * 5, measured.failed, style="red")
            continue
        decode, prefill = measured.decode_seconds, measured.prefill_seconds
        over = times(result.decode_ratio(name, fastest)) if fastest and decode else ""
        table.add_row(
            name,
            _mebibytes(measured.cache_bytes),
            _mebibytes(measured.rise_bytes),
            _mebibytes(measured.peak_bytes),
            _spread(Spread.of(prefill), 1.0, 2) if prefill else "",
            _spread(Spread.of(decode), 1e3, 2) if decode else "",
            "fastest float" if name == fastest else over,
            style="bold" if contender(name).is_int8 else None,
        )
    return table


def context_notes(result: ContextResult) -> list[str]:
    """What the table of one context leaves to calculate: prompts, and memory against the calculated saving."""
    if result.refused:
        return [f"{result.context:,} tokens: not run: {result.refused}"]
    saving = result.float_cache_bytes - result.int8_cache_bytes
    notes = disturbance(result.other_load)
    notes += [
        f"static cache, by calculation: {_mebibytes(result.float_cache_bytes)} MiB in float, "
        f"{_mebibytes(result.int8_cache_bytes)} in int8, saving {_mebibytes(saving)}; "
        f"{result.float_cache_bytes / result.int8_cache_bytes:.3f} times the context in the same bytes"
    ]
    notes += [
        f"{name}: CUDA graphs recorded {measured.cuda_graphs.recorded}, replayed {measured.cuda_graphs.replayed} times"
        for name, measured in result.measured.items()
        if measured.cuda_graphs.recorded
    ]
    compared = [
        ("int8-static", "stock-static"),
        ("int8-dynamic", "stock-dynamic"),
        ("int8-dynamic", "eager"),
        ("int8-static", "int8-static-float-weights"),
    ]
    compared += [(name, name.partition(" ")[0]) for name in result.measured if " " in name]
    for ours, theirs in compared:
        if ours not in result.measured or theirs not in result.measured:
            continue
        parts = []
        if result.measured[ours].prefill_seconds and result.measured[theirs].prefill_seconds:
            parts.append(f"prefill {times(result.prefill_ratio(ours, theirs))}")
        if result.measured[ours].decode_seconds and result.measured[theirs].decode_seconds:
            parts.append(f"decode {times(result.decode_ratio(ours, theirs))}")
        if (share := result.saved_share(ours, theirs)) is not None:
            parts.append(f"{share:.0%} of that saving in the rise")
        if parts:
            notes.append(f"{ours} over {theirs}: {', '.join(parts)}")
    return notes


def disturbance(other_load: float) -> list[str]:
    """A warning, if other processes took so much of the machine that times mean little."""
    if other_load < 0.05:
        return []
    return [f"[red]disturbed[/]: other processes took {other_load:.0%} of the CPU while this was timed"]


def operator_table(result: OperatorResult) -> Table:
    """One case of ``--op attention``: a row for each contender."""
    table = Table(title=f"{result.case}, batch {result.batch}", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("GB/s", justify="right")
    table.add_column("over int8", justify="right")
    table.add_column("what")
    for name, what in OPERATOR_CONTENDERS.items():
        if name in result.failed:
            table.add_row(name, "", "", "", f"does not run: {result.failed[name]}", style="red")
            continue
        spread = Spread.of(result.seconds[name])
        is_int8 = name.startswith("int8") or name == "bytes"
        read = (result.int8_bytes if is_int8 else result.float_bytes) * (0.25 if name == "int8, quarter" else 1.0)
        table.add_row(
            name,
            _spread(spread, 1e3, 2 if spread.median >= 1e-4 else 4),
            f"{read / spread.median / 1e9:.1f}",
            times(result.times_ours(name)),
            f"{what} ({result.kernel})" if name == "int8" else what,
            style="bold" if name == "int8" else None,
        )
    table.caption = "\n".join([f"a quarter full over full: {times(result.quarter)}", *disturbance(result.other_load)])
    return table


def depth_table(result: DepthResult) -> Table:
    """One depth of ``--startup``: a row for each contender. Ratios are over stock with the same kind of cache."""
    table = Table(title=f"{result.layers} layers: seconds to the third token", title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("cold", "over stock", "of it Inductor", "warm", "over stock", "of it capture and passes"):
        table.add_column(column, justify="right")

    def part(starts: list[Start], *names: str) -> str:
        if not starts[0].parts:
            return ""
        return f"{Spread.of([sum(start.parts[name] for name in names) for start in starts]).median:.2f}"

    for name, error in result.failed.items():
        table.add_row(name, "", error, style="red")
    for name, cold in result.cold.items():
        warm = result.warm[name]
        over = [result.over_stock(starts, name) for starts in (result.cold, result.warm)]
        ratios = ["" if each is None else times(each) for each in over]
        totals = [_spread(Spread.of([start.total for start in starts]), 1.0, 1) for starts in (cold, warm)]
        table.add_row(
            name,
            *(totals[0], ratios[0], part(cold, "compile_seconds")),
            *(totals[1], ratios[1], part(warm, "capture_seconds", "passes_seconds")),
            style="bold" if CONTENDERS[name].is_int8 else None,
        )
    table.caption = "\n".join(disturbance(result.other_load))
    return table


def plot_contexts(
    results: Sequence[ContextResult], title: str, file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Decode latency, prefill latency and rise of memory against context; the suffix of ``file`` says which format.

    Args:
        metadata: what else the file says of itself; which names there are is up to the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """

    def value(measured: Measured, what: str) -> float | None:
        if what == "rise_bytes":
            return None if measured.rise_bytes is None else measured.rise_bytes / 2**20
        taken: list[float] = getattr(measured, what)
        return Spread.of(taken).median * 1e3 if taken else None

    panels = {
        "decode_seconds": "decode, ms per token",
        "prefill_seconds": "prefill, ms",
        "rise_bytes": "memory of the run, MiB",
    }
    drawn = {
        what: label
        for what, label in panels.items()
        if any(value(m, what) for r in results for m in r.measured.values())
    }
    figure, panel_axes = _panels(len(drawn), title)
    for axes, (what, label) in zip(panel_axes, drawn.items(), strict=True):
        for i, name in enumerate(dict.fromkeys([*CONTENDERS, *(name for r in results for name in r.measured)])):
            points = [(r.context, value(r.measured[name], what)) for r in results if name in r.measured]
            points = [(context, y) for context, y in points if y is not None]
            if points:
                axes.plot(*zip(*points), "o-" if contender(name).is_int8 else ".--", color=f"C{i}", label=name)
        axes.set(xscale="log", xlabel="context, tokens", title=label)
        axes.set_ylim(bottom=0)
        contexts = [r.context for r in results]
        axes.set_xticks(contexts, [f"{c:,}" for c in contexts], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110, metadata=dict(metadata or {}))


def plot_depths(results: Sequence[DepthResult], title: str, file: Path) -> None:
    """Seconds to the third token against the number of layers, cold and warm.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, (cold, warm) = _panels(2, title)
    for axes, what in ((cold, "cold"), (warm, "warm")):
        for i, (name, each) in enumerate(CONTENDERS.items()):
            points = [(r.layers, [s.total for s in starts]) for r in results if (starts := getattr(r, what).get(name))]
            if points:
                layers, medians = zip(*((depth, Spread.of(taken).median) for depth, taken in points), strict=True)
                axes.plot(layers, medians, "o-" if each.is_int8 else ".--", color=f"C{i}", label=name)
        axes.set(xlabel="layers", title=f"{what}, seconds to the third token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    cold.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def _panels(count: int, title: str) -> tuple[Any, Sequence[Any]]:
    """A figure with a row of so many axes."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'icw-compile[plot]'") from error
    figure = Figure(figsize=(4.5 * count, 4), layout="constrained")
    figure.suptitle(title, fontsize=9, wrap=True)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def times(spread: Spread) -> str:
    """A ratio with its quartiles."""
    return f"{spread.median:.3f}x ({spread.lower:.3f}-{spread.upper:.3f})"


def _spread(spread: Spread, factor: float, digits: int) -> str:
    median, lower, upper = (f"{value * factor:.{digits}f}" for value in spread)
    return f"{median} ({lower}-{upper})"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f}"
