"""``torch.compile(model, backend="icw_int8kv")``: capture, rewrite, compile, bind."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch.fx import GraphModule, Node

from icw_compile import watch
from icw_compile.cache.binding import bind
from icw_compile.formats import ops
from icw_compile.frontend.capture import (
    NotCapturedError,
    capture,
    example_inputs,
    forward_dynamo_metadata,
    source_name,
    works_on_a_cache,
)
from icw_compile.frontend.families import family_of
from icw_compile.kernels import find_kernel
from icw_compile.layers import check_skipped_layers, layers_to_skip, model_name
from icw_compile.options import Options, split_options
from icw_compile.passes import PASSES, Kernel, KVGraph, Skipped, run_passes
from icw_compile.passes.graph import arguments, layer_of
from icw_compile.report import GraphReport, next_name, record

__all__ = ["icw_int8kv"]

aten = torch.ops.aten

#: Inductor's option that `mode="reduce-overhead"` stands for.
_CUDA_GRAPHS = "triton.cudagraphs"


def icw_int8kv(
    dynamo_graph: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: called by ``torch.compile`` with each graph that it captures.

    A graph with no key/value cache goes to Inductor as it is. In any other the cache becomes int8.

    Args:
        dynamo_graph: the captured graph.
        inputs: its example inputs.
        mode: Inductor's ``mode``, as given to ``torch.compile``.
        options: Inductor's options, as given to ``torch.compile``, and ours: `icw_compile.options.Options`.

    Raises:
        ValueError: an unknown ``icw.`` option or a wrong value.
        TypeError: the cache has a dtype that cannot be quantized.
        RuntimeError: gradients are recorded, or the model is in training mode.
        UnquantizedCacheError: a cache stays float, with ``icw.strict``.
    """
    ours, inductor_options = split_options(options, mode)
    watch.compiling(ours)
    started = time.perf_counter()
    try:
        graph = capture(dynamo_graph)
    except NotCapturedError as error:
        reason = f"{error}, and is compiled as it is"
        return _compile_unchanged(dynamo_graph, inputs, reason, ours, inductor_options)
    report = GraphReport(next_name(), model=model_name(), nodes=len(graph.graph.nodes))

    def timed_find_kernel(device_type: str) -> Kernel | str:
        asked = time.perf_counter()
        try:
            return find_kernel(device_type, ours.attention)
        finally:
            report.kernel_seconds += time.perf_counter() - asked

    graph.find_kernel = timed_find_kernel
    graph.equalized, graph.keep, graph.skip_layers = ours.equalized, ours.keep, layers_to_skip(ours)
    report.family, report.expected_sites = _family(graph)
    dropout = next(filter(_drops_out, graph.graph.nodes), None)
    captured = time.perf_counter()
    results = run_passes(graph, PASSES)
    rewritten = time.perf_counter()

    report.passes = {result.name: result.matches for result in results}
    report.sites, report.skipped, report.asked_float = graph.sites, graph.skipped, graph.asked_float
    report.capture_seconds, report.passes_seconds = captured - started, rewritten - captured - report.kernel_seconds
    watch.complain(report.skipped, ours)
    check_skipped_layers(ours, graph.sites)
    if graph.sites:
        _check_inference(dynamo_graph, dropout)
        forward_dynamo_metadata(dynamo_graph, graph)
        if _asks_for_cuda_graphs(ours, inductor_options) and (reason := _why_no_cuda_graphs(graph)):
            report.no_cuda_graphs = reason
            inductor_options = {**inductor_options, _CUDA_GRAPHS: False}
        compiled = watch.counted(bind(graph, _compile(graph.module, example_inputs(graph), ours, inductor_options)))
    else:
        compiled = _compile(dynamo_graph, inputs, ours, inductor_options)
    report.compile_seconds = time.perf_counter() - rewritten
    record(report)
    return compiled


def _compile(
    module: GraphModule, inputs: Sequence[Any], options: Options, inductor_options: dict[str, Any]
) -> Callable[..., Any]:
    if options.compiler == "eager":
        return module.forward
    inductor = _inductor(options, inductor_options)
    # torch's on-disk caches are keyed by the graph before decomposition, in which our operations are mere names.
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag} {_cache_tag()}"):
        return inductor(module, inputs)


def _inductor(options: Options, inductor_options: dict[str, Any]) -> Any:
    # Private, and the only way to get torch.compile's own reading and checking of `mode` and `options`.
    return torch._TorchCompileInductorWrapper(options.mode, inductor_options, None)


def _asks_for_cuda_graphs(options: Options, inductor_options: dict[str, Any]) -> bool:
    if options.compiler == "eager":
        return False
    config = _inductor(options, inductor_options).config
    return bool(config.get(_CUDA_GRAPHS, torch._inductor.config.triton.cudagraphs))


def _why_no_cuda_graphs(graph: KVGraph) -> str:
    """Why the graph cannot run as a CUDA graph; empty if it can.

    What a CUDA graph returns lies in memory that the next call of the model takes for something else.
    """
    if any(taken.spare is not None for taken in graph.inputs.values()):
        return "its cache grows, and each length would be recorded as a CUDA graph of its own"
    if any(output.position < 0 for output in graph.outputs):
        return "it makes the cache, which would not outlive the memory of a CUDA graph"
    if any(taken.adopted is not None for taken in graph.inputs.values()):
        return "it quantizes a float cache, once for each cache"
    return ""


def _cache_tag() -> str:
    source = Path(ops.__file__).read_bytes()
    return f"icw-compile {version('icw-compile')} {hashlib.sha256(source).hexdigest()[:16]}"


def _compile_unchanged(
    dynamo_graph: GraphModule, inputs: Sequence[Any], reason: str, options: Options, inductor_options: dict[str, Any]
) -> Callable[..., Any]:
    report = GraphReport(next_name(), model=model_name(), nodes=len(dynamo_graph.graph.nodes))
    if works_on_a_cache():
        report.skipped = [Skipped("", "what this graph writes to the cache", reason)]
        watch.complain(report.skipped, options)
    started = time.perf_counter()
    compiled = _compile(dynamo_graph, inputs, options, inductor_options)
    report.compile_seconds = time.perf_counter() - started
    record(report)
    return compiled


def _check_inference(dynamo_graph: GraphModule, dropout: Node | None) -> None:
    """Refuse to train through an int8 cache: nothing flows back through rounding."""
    if dropout is not None:
        raise RuntimeError(
            f"icw_int8kv: the model is in training mode (dropout is active in {layer_of(dropout) or dropout.name}). "
            "An int8 key/value cache is for inference: call model.eval()."
        )
    if not torch.is_grad_enabled():
        return
    for node in dynamo_graph.graph.find_nodes(op="placeholder"):
        if getattr(node.meta["example_value"], "requires_grad", False):
            raise RuntimeError(
                f"icw_int8kv: gradients are being recorded ({source_name(node) or node.name} requires grad). An int8 "
                "key/value cache is for inference: call the model under torch.no_grad() or torch.inference_mode()."
            )


def _drops_out(node: Node) -> bool:
    if node.target is aten.dropout.default:
        return bool(arguments(node)["train"]) and arguments(node)["p"] != 0
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(arguments(node)["dropout_p"] != 0)
    return False


def _family(graph: KVGraph) -> tuple[str, int | None]:
    """The model type that the graph's modules belong to, and the number of sites that it should have."""
    attentions: dict[str, str] = {}
    for node in graph.graph.nodes:
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            class_path = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
            if class_path.endswith("Attention"):
                attentions[path] = class_path
    families = {family for class_path in attentions.values() if (family := family_of(class_path))}
    if len(families) != 1:
        return "", None
    family = families.pop()
    return family.model_type, family.sites_per_layer * len(attentions)
