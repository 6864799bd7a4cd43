"""See what the backend does to a model, without compiling anything."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule

from icw_compile.cache.binding import bind
from icw_compile.frontend.capture import capture
from icw_compile.kernels import find_kernel
from icw_compile.options import Options
from icw_compile.passes import PASSES, PassResult, Site, Skipped, run_passes

__all__ = ["ExplainedGraph", "Explanation", "explain"]


@dataclass(frozen=True)
class ExplainedGraph:
    """One captured graph: its text as captured, what each pass did to it, and the key/value sites."""

    captured: str
    passes: tuple[PassResult, ...]
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]

    @property
    def rewritten(self) -> str:
        return self.passes[-1].after or ""

    def __str__(self) -> str:
        steps = [f"# captured\n{self.captured}"]
        steps += [f"# after {p.name}: {p.matches} matches\n{p.after}" for p in self.passes if p.matches]
        return "\n".join(steps)


@dataclass(frozen=True)
class Explanation:
    """The graphs of one call: more than one if there were graph breaks."""

    graphs: tuple[ExplainedGraph, ...]

    def __str__(self) -> str:
        return "\n".join(f"# graph {i}\n{graph}" for i, graph in enumerate(self.graphs))


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Capture and rewrite the graphs of ``model(*args, **kwargs)``, and compile nothing.

    The rewritten graphs are run as they are, on copies of the arguments: a cache that is passed in stays untouched.

    Args:
        model: a module or function.
        args, kwargs: what to call it with, for example ``input_ids`` and ``past_key_values``.

    Returns:
        the text of each graph as captured and after each pass.
    """
    graphs: list[ExplainedGraph] = []

    def backend(dynamo_graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = capture(dynamo_graph)
        graph.find_kernel = find_kernel
        graph.equalized = Options().equalized
        captured = graph.readable()
        results = run_passes(graph, PASSES, keep_text=True)
        graphs.append(ExplainedGraph(captured, tuple(results), tuple(graph.sites), tuple(graph.skipped)))
        return bind(graph, graph.module.forward)

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo keeps compiled graphs with the code object: a new one sees nothing of earlier calls, and leaves nothing.
    fresh = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    args, kwargs = copy.deepcopy((args, kwargs))
    with torch.no_grad():
        torch.compile(fresh, backend=backend)(*args, **kwargs)
    return Explanation(tuple(graphs))
