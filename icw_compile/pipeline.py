"""From Dynamo's graph to the one that is compiled: the one pipeline, behind the backend and behind `explain`."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from icw_compile.compat.transformers import KEY_PROJECTIONS
from icw_compile.frontend.capture import capture, forward_dynamo_metadata
from icw_compile.frontend.families import family_of
from icw_compile.kernels import AttentionKernel, find_kernel
from icw_compile.options import LAYER_OPTIONS, LayerOption, Options
from icw_compile.passes import PASSES, KVGraph, PassResult, run_passes
from icw_compile.passes.nodes import drops_out

__all__ = ["Rewritten", "rewrite"]


@dataclass(frozen=True)
class Rewritten:
    """What became of one graph.

    Attributes:
        graph: as it is now, with its signature and what was found.
        captured: its text as it was captured; empty if texts were not asked for.
        nodes: how many nodes it had then.
        passes: what each pass did.
        dropout: a node that drops out, as in training; ``None`` if there is none.
    family, expected_sites: the model type whose code it came from, and the storages that it should have; empty if
            that is not known.
        kernel: that the graph calls and that may still be being built: load it before the graph runs.
        capture_seconds, passes_seconds, kernel_seconds: the time that each took; finding the kernel is apart.
    """

    graph: KVGraph
    captured: str
    nodes: int
    passes: tuple[PassResult, ...]
    dropout: Node | None
    family: str
    expected_sites: int | None
    kernel: AttentionKernel | None
    capture_seconds: float
    passes_seconds: float
    kernel_seconds: float


def rewrite(
    dynamo_graph: GraphModule,
    options: Options,
    layers: Mapping[LayerOption, frozenset[int | str]] | None = None,
    *,
    why_it_ends: str = "",
    wait_for_kernel: bool = True,
    keep_text: bool = False,
    look: Callable[[KVGraph], None] = lambda graph: None,
) -> Rewritten:
    """Capture a graph and run the passes.

    Args:
        dynamo_graph: what Dynamo hands to a backend; it is left as it is.
        options: as the user gave them.
        layers: what each of the options that list layers lists, where more is known of the model than in ``options``.
        why_it_ends: why the graph ends before the frame does, in words.
        wait_for_kernel: otherwise a kernel that is being built is taken to be ready, as it most often will be.
        keep_text: keep the readable text of the graph at every step.
        look: called with the graph as captured and after each pass, to look at.

    Raises:
        NotCapturedError: the graph holds something that cannot be retraced.
        TypeError: the cache has a dtype that cannot be stored.
        KernelUnavailableError: a kernel was asked for by name that is not to be had.
    """
    started = time.perf_counter()
    graph = capture(dynamo_graph)
    family, expected_sites = _family(graph)
    dropout = next(filter(drops_out, graph.graph.nodes), None)
    nodes, captured = len(graph.graph.nodes), graph.readable() if keep_text else ""
    asking, kernel = 0.0, None

    def timed_find_kernel(device_type: str) -> AttentionKernel | str:
        nonlocal asking, kernel
        asked = time.perf_counter()
        try:
            found = find_kernel(device_type, options.attention, wait=wait_for_kernel)
            kernel = kernel if isinstance(found, str) else found
            return found
        finally:
            asking += time.perf_counter() - asked

    graph.find_kernel = timed_find_kernel
    graph.format_for, graph.why_it_ends, graph.idioms = options.format_for, why_it_ends, tuple(options.idioms)
    layers = {option: options.layers(option) for option in LAYER_OPTIONS} if layers is None else layers
    graph.skip_layers, graph.eight_bit_layers = layers["skip_layers"], layers["eight_bit_layers"]
    look(graph)
    ready = time.perf_counter()
    passes = run_passes(graph, PASSES, keep_text=keep_text, look=look)
    done = time.perf_counter()
    if graph.sites:
        forward_dynamo_metadata(dynamo_graph, graph)
    return Rewritten(
        graph,
        captured,
        nodes,
        tuple(passes),
        dropout,
        family,
        expected_sites,
        kernel,
        capture_seconds=ready - started,
        passes_seconds=done - ready - asking,
        kernel_seconds=asking,
    )


def _family(graph: KVGraph) -> tuple[str, int | None]:
    """The model type that the graph's modules belong to, and the number of sites that it should have.

    An attention that makes no keys reads those of another layer.
    """
    attentions: dict[str, str] = {}
    own: set[str] = set()
    for node in graph.graph.nodes:
        for path, class_path in _modules(node):
            module, _, name = path.rpartition(".")
            if class_path.endswith("Attention"):
                attentions[path] = class_path
            elif name in KEY_PROJECTIONS:
                own.add(module)
    families = {family for class_path in attentions.values() if (family := family_of(class_path))}
    if len(families) != 1:
        return "", None
    family = families.pop()
    return family.model_type, family.sites_per_layer * len(attentions.keys() & own)


def _modules(node: Node) -> list[tuple[str, str]]:
    """The modules that a node came from, outermost first: where each is, and what its class is called."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return [
        (path, cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}") for path, cls in stack.values()
    ]
