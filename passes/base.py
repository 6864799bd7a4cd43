"""What every pass needs, done once: count its matches, clean up after it, show the graph before and after."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from icw_compile.compat.fx import eliminate_dead_code
from icw_compile.passes.graph import KVGraph

__all__ = ["Pass", "PassResult", "run_passes"]


@dataclass(frozen=True)
class Pass:
    """A named rewrite: ``apply`` changes the graph in place and returns the number of matches."""

    name: str
    apply: Callable[[KVGraph], int]


@dataclass(frozen=True)
class PassResult:
    """What one pass did: its matches, its time, and the graph's text before and after if it was asked for."""

    name: str
    matches: int
    seconds: float = 0.0
    before: str | None = None
    after: str | None = None


def run_passes(
    graph: KVGraph,
    passes: Sequence[Pass],
    *,
    keep_text: bool = False,
    look: Callable[[KVGraph], None] = lambda graph: None,
) -> list[PassResult]:
    """Run ``passes`` in order.

    After a pass that matched, the graph is linted, and dead nodes are removed. If any did, it is recompiled in the end.
    ``keep_text`` keeps the readable text before and after each pass, and ``look`` is called after each.
    """
    results: list[PassResult] = []
    for each in passes:
        before = graph.readable() if keep_text else None
        started = time.perf_counter()
        matches = each.apply(graph)
        if matches:
            _clean_up(graph)
        seconds = time.perf_counter() - started
        results.append(PassResult(each.name, matches, seconds, before, graph.readable() if keep_text else None))
        look(graph)
    if any(result.matches for result in results):
        graph.module.recompile()
    return results


def _clean_up(graph: KVGraph) -> None:
    """Lint, and remove what nothing reads. Parts that the next pass is to carry on are not read yet.

    Attention counts as random for its dropout; a replaced one is dead all the same.
    """
    parts = {part for storage in graph.storage.values() for part in storage.stored.parts}
    eliminate_dead_code(graph.graph, keep_random=False, keep=lambda node: "kept" in node.meta or node in parts)
