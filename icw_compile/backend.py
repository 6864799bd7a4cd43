"""``torch.compile(model, backend="icw_int8kv")``: rewrite, compile, bind."""

import functools
import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from icw_compile import formats, kernels, watch
from icw_compile.cache.binding import bind
from icw_compile.cache.tensor import QuantizedKV
from icw_compile.cache.turned import claim_compile, keep_straight
from icw_compile.compat.dynamo import example_value, guard_once, keep_fakes_as_dynamo
from icw_compile.compat.fx import free_symbols, storage_of
from icw_compile.compat.inductor import (
    CUDA_GRAPHS,
    cache_key_tag,
    copied,
    inductor,
    leaves_cuda_graphs_open,
    rounded_as_eager,
    takes_regions,
    uses_cuda_graphs,
)
from icw_compile.errors import KernelUnavailableError
from icw_compile.frontend.capture import (
    NotCapturedError,
    example_inputs,
    may_have_a_cache,
    source_name,
    works_on_a_cache,
)
from icw_compile.frontend.retrace import is_foreign
from icw_compile.layers import check_listed_layers, listed_layers, model_name
from icw_compile.options import LAYER_OPTIONS, Options, split_options
from icw_compile.passes import KVGraph, Skipped
from icw_compile.passes.nodes import layer_of
from icw_compile.pipeline import rewrite
from icw_compile.regions import share_layers
from icw_compile.report import GraphReport, next_name, record

__all__ = ["icw_int8kv"]


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
        RuntimeError: gradients are recorded, or the model is in training mode, and its cache is int8 already.
        UnquantizedCacheError: a cache stays float, with ``icw.strict``.
    """
    ours, inductor_options = split_options(options, mode)
    watch.compiling(ours)
    claim_compile()
    try:
        return _compile_graph(dynamo_graph, inputs, ours, inductor_options, wait_for_kernel=False)
    except _NotBuiltError:  # rare: there is a compiler, and it does not compile the kernel
        return _compile_graph(dynamo_graph, inputs, ours, inductor_options, wait_for_kernel=True)


class _NotBuiltError(Exception):
    """A kernel that a graph calls, and that was being built, is not to be had."""


def _compile_graph(
    dynamo_graph: GraphModule,
    inputs: Sequence[Any],
    ours: Options,
    inductor_options: dict[str, Any],
    *,
    wait_for_kernel: bool,
) -> Callable[..., Any]:
    """Compile a graph; without ``wait_for_kernel``, while the kernel that it calls is built.

    Raises:
        _NotBuiltError: the kernel is not to be had after all.
    """
    if not may_have_a_cache(dynamo_graph):
        return _compile_unchanged(dynamo_graph, inputs, _unread(""), ours, inductor_options)
    try:
        listed = {option: listed_layers(ours, option) for option in LAYER_OPTIONS}
        with _rare_collections():
            rewritten = rewrite(
                dynamo_graph, ours, listed, why_it_ends=watch.why_graph_ends(), wait_for_kernel=wait_for_kernel
            )
    except NotCapturedError as error:
        skipped = _unread(f"{error}, and is compiled as it is")
        return _compile_unchanged(dynamo_graph, inputs, skipped, ours, inductor_options)
    graph = rewritten.graph
    if graph.sites and (training := _why_training(dynamo_graph, rewritten.dropout)):
        if any(taken.adopted is None for taken in graph.inputs.values()):
            raise RuntimeError(f"icw_int8kv: {training}. The int8 key/value cache that it is given is for inference.")
        skipped = [Skipped("", site.name, training) for site in graph.sites]
        return _compile_unchanged(dynamo_graph, inputs, skipped, ours, inductor_options)
    guard_once()
    report = GraphReport.of(next_name(), rewritten)
    report.model = model_name()
    if not wait_for_kernel:  # else it was said already
        watch.complain(report.skipped, ours)
        check_listed_layers(ours, graph.sites)
    started = time.perf_counter()
    if graph.sites:
        inductor_options, report.no_cuda_graphs, apart = _with_cuda_graphs(graph, ours, inductor_options)
        if _takes_regions(graph, ours, inductor_options):
            report.shared_layers = share_layers(graph.module)
        if _is_on_cpu(graph):
            inductor_options = rounded_as_eager(inductor_options)
        compiled = _compile(graph.module, example_inputs(graph), ours, inductor_options)
        if apart is not None:
            compiled = copied(compiled, *apart)
        compiled = watch.counted(bind(graph, compiled))
    else:
        compiled = _compile_captured(dynamo_graph, inputs, ours, inductor_options)
    done = time.perf_counter()
    report.compile_seconds = done - started
    if rewritten.kernel is not None:
        try:
            rewritten.kernel.load()
        except KernelUnavailableError as error:
            if ours.attention != "auto":
                raise
            raise _NotBuiltError from error
        report.kernel_seconds += time.perf_counter() - done
    record(report)
    return compiled


def _compile_captured(
    dynamo_graph: GraphModule, inputs: Sequence[Any], options: Options, inductor_options: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a graph that was not rewritten."""
    if any(isinstance(example_value(node), QuantizedKV) for node in dynamo_graph.graph.find_nodes(op="placeholder")):
        keep_straight()  # torch takes it apart
    return _compile(dynamo_graph, inputs, options, inductor_options)


def _compile(
    module: GraphModule, inputs: Sequence[Any], options: Options, inductor_options: dict[str, Any]
) -> Callable[..., Any]:
    if options.compiler == "eager":
        return module.forward
    keep_fakes_as_dynamo(module)
    # torch's on-disk caches are keyed by the graph before decomposition, in which our operations are mere names.
    with cache_key_tag(_cache_tag()), _rare_collections():
        return inductor(options.mode, inductor_options)(module, inputs)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """While this is entered, Python looks for garbage so many times less often.

    A graph that is rewritten and compiled is many objects that stay, made in a short time. Each time there are a
    quarter more, all that Dynamo and the libraries hold is looked through, for a third of a second and for nothing.
    Afterwards what was made is among the old objects, as if it had been looked through: they are left alone until there
    are a quarter more again. Not where the process has put objects aside for good, which would come back.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(thresholds[0] * _LESS_OFTEN, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()


#: Of 22 layers, a graph that is in torch's cache is then taken from there without any collection of all objects.
_LESS_OFTEN = 50


def _takes_regions(graph: KVGraph, options: Options, inductor_options: dict[str, Any]) -> bool:
    """Whether layers that are alike are to be compiled once.

    On the CPU: CUDA graphs have to know what is written into, which Inductor does not say of what a region writes.
    """
    wanted = options.compiler != "eager" and options.regions != "none"
    return wanted and takes_regions(inductor_options) and _is_on_cpu(graph)


def _is_on_cpu(graph: KVGraph) -> bool:
    """Whether all that the graph is given is there."""
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    return all(value.device.type == "cpu" for value in values if isinstance(value, Tensor))


def _with_cuda_graphs(
    graph: KVGraph, options: Options, inductor_options: dict[str, Any]
) -> tuple[dict[str, Any], str, tuple[list[int], torch.device] | None]:
    """Inductor's options for a graph, why it is no CUDA graph, and what `copied` takes besides if it is by default.

    It does where the user asks for that, by Inductor's option or its mode, and otherwise, where the user says nothing
    of CUDA graphs, if it is a decode step on a CUDA device. Who asks knows that what a call returns is overwritten by
    the next one. Who does not keeps what was returned: it is copied.
    """
    if options.compiler == "eager":
        return inductor_options, "", None
    if uses_cuda_graphs(options.mode, inductor_options):
        reason = _why_no_cuda_graphs(graph)
        return {**inductor_options, CUDA_GRAPHS: False} if reason else inductor_options, reason, None
    device = _device_of_cache(graph)
    if not _has_cuda_graphs(device) or not leaves_cuda_graphs_open(options.mode, inductor_options):
        return inductor_options, "", None
    if reason := _why_no_cuda_graphs(graph) or _why_none_by_default(graph):
        return inductor_options, reason, None
    return {**inductor_options, CUDA_GRAPHS: True}, "", (_made_outputs(graph), device)


def _has_cuda_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _device_of_cache(graph: KVGraph) -> torch.device:
    part = next((name for taken in graph.inputs.values() for name in taken.parts), None)
    nodes = graph.graph.find_nodes(op="placeholder")
    found = next((node for node in nodes if node.name == part), None)
    return torch.device("cpu") if found is None else graph.tensor(found).device


def _why_no_cuda_graphs(graph: KVGraph) -> str:
    """Why the graph cannot run as a CUDA graph; empty if it can.

    What a CUDA graph returns lies in memory that the next call of the model takes for something else.
    """
    if any(taken.appended for taken in graph.inputs.values()):
        return "its cache grows, and each length would be recorded as a CUDA graph of its own"
    if any(output.position < 0 for output in graph.outputs):
        return "it makes the cache, which would not outlive the memory of a CUDA graph"
    if any(taken.adopted is not None for taken in graph.inputs.values()):
        return "it quantizes a float cache, once for each cache"
    sizes = set().union(*map(_symbols_of, graph.graph.find_nodes(op="placeholder")))
    if any(_symbols_of(node) - sizes for node in graph.graph.nodes):
        return (
            "it computes with symbols that are no sizes of what it is given, such as what a sliding layer counts, and "
            "each step would be recorded as a CUDA graph of its own"
        )
    return ""


def _why_none_by_default(graph: KVGraph) -> str:
    """Why a graph that could run as a CUDA graph does so only if that is asked for; empty if it does."""
    if any(site.lowering in _NO_DECODE_STEP for site in graph.sites):
        return "it is a prompt, or no decode step"
    device = _device_of_cache(graph)
    for node in graph.graph.find_nodes(op="placeholder"):
        value, name = node.meta["val"], source_name(node) or node.name
        if not isinstance(value, Tensor):
            continue
        if is_foreign(value):
            return f"{name} is a {type(value).__name__}: ask for CUDA graphs if it can be in one"
        if value.device != device:
            return f"{name} is on {value.device}, and its cache on {device}"
    if any(is_foreign(node.meta.get("val")) for node in _returned(graph)):
        return "it returns tensors of a kind of their own: ask for CUDA graphs if they can be in one"
    if any(map(_symbols_of, graph.graph.nodes)):
        return "sizes in it are symbols, or numbers that it computes with, and each would be a CUDA graph of its own"
    return ""


def _symbols_of(node: Node) -> set[Any]:
    """Those in a node's tensor, and in the numbers that it computes one of.

    Not of numbers that the graph only counts up, nor of how far apart rows of one lie.
    """
    value = node.meta.get("val")
    found: list[Any] = []
    if isinstance(value, Tensor):
        for size, stride in zip(value.shape, value.stride(), strict=True):
            found += [size] if isinstance(size, int) and size == 1 else [size, stride]
    if node.op == "call_function" and not isinstance(value, _SYMBOLIC):
        found += [operand.meta.get("val") for operand in node.all_input_nodes]
    return free_symbols([each for each in found if isinstance(each, _SYMBOLIC)])


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


#: How storage is read where a call has more tokens than a decode step, or where that is not known.
_NO_DECODE_STEP = ("as it came", "dequantize", "")


def _returned(graph: KVGraph) -> list[Node]:
    (output,) = graph.graph.find_nodes(op="output")
    return [node for node in output.args[0] if isinstance(node, Node)]


def _made_outputs(graph: KVGraph) -> list[int]:
    """The positions of the tensors that the graph returns, and that share no memory with what it is given or holds."""
    there = [node for op in ("placeholder", "get_attr") for node in graph.graph.find_nodes(op=op)]
    given = {storage_of(node.meta["val"]) for node in there if isinstance(node.meta.get("val"), Tensor)}
    (output,) = graph.graph.find_nodes(op="output")
    return [
        position
        for position, node in enumerate(output.args[0])
        if isinstance(node, Node)
        and isinstance(value := node.meta.get("val"), Tensor)
        and storage_of(value) not in given
    ]


@functools.cache
def _cache_tag() -> str:
    """What our operations depend on: what they compute, and what their fakes return."""
    digest = hashlib.sha256()
    for room in (formats, kernels):
        for source in sorted(Path(str(room.__file__)).parent.glob("*.py")):
            digest.update(source.read_bytes())
    return f"icw-compile {version('icw-compile')} {digest.hexdigest()[:16]}"


def _unread(reason: str) -> list[Skipped]:
    """What to say of a graph that was not understood: nothing if it has nothing to do with a cache."""
    return [Skipped("", "what this graph writes to the cache", reason)] if works_on_a_cache() else []


def _compile_unchanged(
    dynamo_graph: GraphModule,
    inputs: Sequence[Any],
    skipped: list[Skipped],
    options: Options,
    inductor_options: dict[str, Any],
) -> Callable[..., Any]:
    report = GraphReport(next_name(), model=model_name(), nodes=len(dynamo_graph.graph.nodes), skipped=skipped)
    watch.complain(skipped, options)
    started = time.perf_counter()
    compiled = _compile_captured(dynamo_graph, inputs, options, inductor_options)
    report.compile_seconds = time.perf_counter() - started
    record(report)
    return compiled


def _why_training(dynamo_graph: GraphModule, dropout: Node | None) -> str:
    """What says that a graph trains, which an int8 cache cannot: nothing flows back through rounding. Or ""."""
    if dropout is not None:
        where = layer_of(dropout) or dropout.name
        return f"the model is in training mode (dropout is active in {where}); for inference, call model.eval()"
    if torch.is_grad_enabled():
        for node in dynamo_graph.graph.find_nodes(op="placeholder"):
            if getattr(example_value(node), "requires_grad", False):
                return (
                    f"gradients are being recorded ({source_name(node) or node.name} requires grad); for inference, "
                    "use torch.no_grad() or torch.inference_mode(), for training use_cache=False"
                )
    return ""
