"""What was compiled, and what became of each key/value cache in it."""

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from icw_compile.cache.growth import Growth, growth, reset_growth
from icw_compile.cache.uncompiled import forget_reads
from icw_compile.kernels import AS_ASKED
from icw_compile.passes import Site, Skipped
from icw_compile.pipeline import Rewritten

__all__ = ["GraphReport", "Report", "report", "reset_report"]


@dataclass
class GraphReport:
    """One compiled graph.

    Attributes:
        name: ``graph 0``, ``graph 1``, ... in the order of compilation.
        model: the class of the module that was compiled, if it was one.
        family: the model type whose code the graph came from, if it is one of `icw_compile.frontend.families`.
        expected_sites: the key/value storages that a graph with this many layers of that family has.
        sites: each key or value storage that lives as int8, and how it is written and read.
        skipped: what looks like a cache and stays float, or is read through a dequantized copy, and why.
        asked_float: the storage that the options leave float.
        no_cuda_graphs: why this graph does not run as a CUDA graph, where the options ask for that or, on a CUDA
            device, say nothing of it; empty otherwise.
        shared_layers: the layers that are one graph with others, compiled once and called for each.
        passes: matches of each pass.
        pass_seconds: the time that each took.
        nodes: nodes of the captured graph.
        capture_seconds, passes_seconds, compile_seconds: the time that capture, the passes and Inductor took.
        kernel_seconds: the time to load the attention kernel, and to wait for it where it is still being built then.
    """

    name: str
    family: str = ""
    expected_sites: int | None = None
    sites: list[Site] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    asked_float: list[Skipped] = field(default_factory=list)
    no_cuda_graphs: str = ""
    shared_layers: int = 0
    model: str = ""
    passes: dict[str, int] = field(default_factory=dict)
    pass_seconds: dict[str, float] = field(default_factory=dict)
    nodes: int = 0
    capture_seconds: float = 0.0
    passes_seconds: float = 0.0
    compile_seconds: float = 0.0
    kernel_seconds: float = 0.0

    @classmethod
    def of(cls, name: str, rewritten: Rewritten) -> "GraphReport":
        """What there is to say of a graph before it is compiled."""
        graph = rewritten.graph
        return cls(
            name,
            family=rewritten.family,
            expected_sites=rewritten.expected_sites,
            sites=graph.sites,
            skipped=graph.skipped,
            asked_float=graph.asked_float,
            passes={result.name: result.matches for result in rewritten.passes},
            pass_seconds={result.name: result.seconds for result in rewritten.passes},
            nodes=rewritten.nodes,
            capture_seconds=rewritten.capture_seconds,
            passes_seconds=rewritten.passes_seconds,
            kernel_seconds=rewritten.kernel_seconds,
        )

    @property
    def float_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in the float cache, all sites together."""
        return sum(site.float_bytes_per_token for site in self.sites)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes as it is stored, scales included, all sites together."""
        return sum(site.bytes_per_token for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model,
            "family": self.family,
            "expected_sites": self.expected_sites,
            "sites": [site.to_dict() for site in self.sites],
            "skipped": [skipped.to_dict() for skipped in self.skipped],
            "asked_float": [skipped.to_dict() for skipped in self.asked_float],
            "no_cuda_graphs": self.no_cuda_graphs,
            "shared_layers": self.shared_layers,
            "passes": dict(self.passes),
            "pass_seconds": dict(self.pass_seconds),
            "nodes": self.nodes,
            "float_bytes_per_token": self.float_bytes_per_token,
            "bytes_per_token": self.bytes_per_token,
            "capture_seconds": self.capture_seconds,
            "passes_seconds": self.passes_seconds,
            "compile_seconds": self.compile_seconds,
            "kernel_seconds": self.kernel_seconds,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = f"{self.name}: {len(self.sites)}"
        if self.expected_sites is not None:
            title += f" of {self.expected_sites}"
        stored = (
            " and ".join(sorted({site.format.split()[0] for site in self.sites if site.format}, reverse=True)) or "int8"
        )
        title += f" key/value sites in {stored}" + (f", {self.family}" if self.family else "")
        if self.sites:
            yield _sites_table(title, self.sites)
            saved = self.bytes_per_token / self.float_bytes_per_token
            equalized = sum(site.equalized for site in self.sites)
            yield (
                f"  bytes per token: {self.float_bytes_per_token:,} float, {self.bytes_per_token:,} {stored} "
                f"({saved:.3f}x); channels equalized in {equalized} of {len(self.sites)}"
            )
            if kept := [site for site in self.sites if site.float_tokens]:
                yield (
                    f"  kept in {kept[0].dtype} besides: {kept[0].float_tokens} tokens in {len(kept)} of "
                    f"{len(self.sites)}, {sum(site.float_tokens_bytes for site in kept):,} bytes per sequence"
                )
        else:
            yield title
        for asked in self.asked_float:
            yield f"  float as asked: {asked.what}: {asked.reason}"
        for skipped in self.skipped:
            yield f"  [yellow]not int8[/]: {skipped.layer} {skipped.what}: {skipped.reason}"
        if self.no_cuda_graphs:
            yield f"  no CUDA graph: {self.no_cuda_graphs}"
        ours = self.capture_seconds + self.passes_seconds
        share = f" ({ours / self.compile_seconds:.0%} of it)" if self.compile_seconds >= 0.01 else ""
        kernel = f"; kernel {self.kernel_seconds:.2f} s" if self.kernel_seconds >= 0.005 else ""
        yield (
            f"  {self.nodes:,} nodes; capture {self.capture_seconds:.2f} s, passes {self.passes_seconds:.2f} s, "
            f"Inductor {self.compile_seconds:.2f} s{share}{kernel}"
            + (f"; {self.shared_layers} layers alike compiled once" if self.shared_layers else "")
        )


class Report:
    """Every graph that the backend compiled since the start or the last `reset_report`.

    ``print(report)`` gives a table, `to_dict` plain data.

    Attributes:
        graphs: what was compiled, in order.
        growth: what growing caches have copied, and the spare rows that they hold now.
    """

    def __init__(self, graphs: Sequence[GraphReport], growth: Growth) -> None:
        self.graphs = tuple(graphs)
        self.growth = growth

    def to_dict(self) -> dict[str, Any]:
        return {"graphs": [graph.to_dict() for graph in self.graphs], "growth": asdict(self.growth)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.graphs:
            yield 'no graph was compiled with backend="icw_int8kv"'
        several = len({graph.model for graph in self.graphs}) > 1
        for graph in self.graphs:
            if several:
                yield f"[bold]{graph.model or 'a function'}[/]"
            yield graph
        if self.growth.moves:
            yield (
                f"growing caches: {self.growth.moves:,} moves to larger storage, {self.growth.bytes_copied:,} bytes "
                f"copied; {self.growth.spare_bytes:,} bytes spare now"
            )

    def __str__(self) -> str:
        console = Console(width=140, color_system=None, force_jupyter=False)  # or a notebook shows it, emptily, besides
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    __repr__ = __str__


def _sites_table(title: str, sites: Iterable[Site]) -> Table:
    """A row for each kind of site; sites that differ in their layer and role alone share one."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("sites", "cache", "shape", "written by", "read by", "lowering"):
        table.add_column(column, overflow="fold")
    rows: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        row: tuple[str, ...] = (
            site.cache,
            f"{site.dtype} {list(site.shape)}",
            ", ".join(site.writes),
            ", ".join(site.reads) or "states, not cache",
            f"{site.lowering} ({site.declined})" if site.declined not in ("", AS_ASKED) else site.lowering,
        )
        rows.setdefault(row, []).append(site)
    for row, alike in rows.items():
        table.add_row(_label(alike), *row)
    return table


def _label(sites: Sequence[Site]) -> str:
    """``keys, values of 8 layers: model.layers.0.self_attn ...``"""
    roles = ", ".join(dict.fromkeys(f"{site.role}s" for site in sites if site.role))
    layers = list(dict.fromkeys(site.layer or site.name for site in sites))
    return f"{roles} of {layers[0]}" if len(layers) == 1 else f"{roles} of {len(layers)} layers, {layers[0]} ..."


_lock = threading.Lock()
_graphs: list[GraphReport] = []
_numbers = itertools.count()
_resets: list[Callable[[], None]] = [reset_growth, forget_reads]


def record(graph: GraphReport) -> None:
    with _lock:
        _graphs.append(graph)


def next_name() -> str:
    """The name of a new graph; no other has it, in whatever threads models are compiled."""
    return f"graph {next(_numbers)}"


def report() -> Report:
    """What ``backend="icw_int8kv"`` compiled in this process, graph by graph.

    Returns:
        a `Report`: print it for a table; ``to_dict()`` gives plain data.
    """
    with _lock:
        return Report(_graphs, growth())


def on_reset(call: Callable[[], None]) -> None:
    """Call ``call`` at each `reset_report`."""
    _resets.append(call)


def reset_report() -> None:
    """Forget the graphs compiled so far, what growing caches have cost, and what was said once already."""
    global _numbers
    with _lock:
        _graphs.clear()
        _numbers = itertools.count()
    for call in _resets:
        call()
