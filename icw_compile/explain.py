"""See what the backend does to a model, without compiling anything."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule

from icw_compile.cache.binding import bind
from icw_compile.drawing import Drawing, draw
from icw_compile.frontend.capture import NotCapturedError
from icw_compile.options import split_options
from icw_compile.passes import PassResult, Site, Skipped
from icw_compile.pipeline import rewrite

__all__ = ["ExplainedGraph", "Explanation", "explain"]

_numbers = itertools.count()


@dataclass(frozen=True)
class ExplainedGraph:
    """One captured graph.

    Attributes:
        captured: its text as captured.
        passes: what each pass did to it.
        sites: the key/value storages, how each is written and read.
        skipped: what stays float, or is read dequantized, and why.
        drawings: what it does with its cache, as captured and after each pass: for each kind of cache layer one.
    """

    captured: str
    passes: tuple[PassResult, ...]
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    drawings: tuple[tuple[Drawing, ...], ...] = ()

    @property
    def rewritten(self) -> str:
        return self.passes[-1].after or "" if self.passes else self.captured

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


def explain(
    model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Capture and rewrite the graphs of ``model(*args, **kwargs)``, as the backend does, and compile nothing.

    The rewritten graphs are run as they are, on copies of the arguments: a cache that is passed in stays untouched.

    Args:
        model: a module or function.
        args, kwargs: what to call it with, for example ``input_ids`` and ``past_key_values``.
        options: as for ``torch.compile``.

    Returns:
        the text of each graph as captured and after each pass, and drawings of what it does with its cache.

    Raises:
        ValueError: an unknown ``icw.`` option or a wrong value.
    """
    ours, _ = split_options(options, None)
    graphs: list[ExplainedGraph] = []

    def backend(dynamo_graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        drawings: list[tuple[Drawing, ...]] = []
        try:
            found = rewrite(dynamo_graph, ours, keep_text=True, look=lambda graph: drawings.append(draw(graph)))
        except NotCapturedError as error:
            text = dynamo_graph.print_readable(print_output=False, include_stride=False)
            graphs.append(ExplainedGraph(text, (), (), (Skipped("", "this graph", f"{error}; it is left as it is"),)))
            return dynamo_graph.forward
        graph = found.graph
        graphs.append(
            ExplainedGraph(found.captured, found.passes, tuple(graph.sites), tuple(graph.skipped), tuple(drawings))
        )
        return bind(graph, graph.module.forward) if graph.sites else dynamo_graph.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo keeps compiled graphs with the code object, and by its name and line the sizes that it has seen change: a
    # new one sees nothing of earlier calls, and leaves nothing.
    code = call.__code__.replace(co_name=f"explained_{next(_numbers)}")
    fresh = FunctionType(code, call.__globals__, closure=call.__closure__)
    args, kwargs = copy.deepcopy((args, kwargs))
    with torch.no_grad():
        torch.compile(fresh, backend=backend)(*args, **kwargs)
    return Explanation(tuple(graphs))
