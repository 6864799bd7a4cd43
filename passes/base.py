"""What every pass needs, done once: count its matches, clean up after it, show the graph before and after."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from icw_compile.passes.graph import KVGraph

__all__ = ["Pass", "PassResult", "run_passes"]


@dataclass(frozen=True)
class Pass:
    """A named rewrite: ``apply`` changes the graph in place and returns the number of matches."""

    name: str
    apply: Callable[[KVGraph], int]


@dataclass(frozen=True)
class PassResult:
    """What one pass did: its matches, and the graph's text before and after if it was asked for."""

    name: str
    matches: int
    before: str | None = None
    after: str | None = None


def run_passes(graph: KVGraph, passes: Sequence[Pass], *, keep_text: bool = False) -> list[PassResult]:
    """Run ``passes`` in order.

    After a pass that matched, dead nodes are removed, and the graph is linted and recompiled. ``keep_text`` keeps
    the readable text before and after each pass.
    """
    results = []
    for each in passes:
        before = graph.readable() if keep_text else None
        matches = each.apply(graph)
        if matches:
            # Attention counts as random for its dropout; a replaced one is dead all the same.
            graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure(impure_random=False))
            graph.graph.lint()
            graph.module.recompile()
        results.append(PassResult(each.name, matches, before, graph.readable() if keep_text else None))
    return results
