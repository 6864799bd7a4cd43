"""From the graph that Dynamo hands to a backend to the pre-dispatch ATen graph that the passes work on, and back.

The one place that knows torch's private capture interfaces: `TracingContext`, the metadata of Dynamo's placeholders,
and what AOTAutograd reads of it.
"""

import re
from typing import Any

import torch
import torch.fx.traceback
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from icw_compile.cache.adopt import find_owners
from icw_compile.cache.tensor import QuantizedKV
from icw_compile.frontend.flex import FLEX_ATTENTION, is_elementwise, spell_out
from icw_compile.passes import KVGraph
from icw_compile.passes.graph import aliases, is_mutation

__all__ = ["NotCapturedError", "capture", "example_inputs", "forward_dynamo_metadata", "works_on_a_cache"]


#: Where a layer of a transformers cache keeps its state.
_CACHE_ATTRIBUTE = r"\.layers\[\d+\]\.\w+$"


class NotCapturedError(Exception):
    """A graph cannot be retraced, and has to be compiled as it is; the message says why."""


def capture(dynamo_graph: GraphModule) -> KVGraph:
    """Retrace Dynamo's graph into pre-dispatch ATen, where each operation has one spelling.

    In-place writes stay visible, sizes stay symbolic, and a `QuantizedKV` input is traced as the plain float tensor
    that it stands for. ``dynamo_graph`` is left as it is. Costs about 1 ms for each node.

    Raises:
        NotCapturedError: the graph holds something that cannot be retraced.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise RuntimeError(
            "icw_int8kv compiles graphs that torch.compile captured; call it as a torch.compile backend."
        )
    fake_mode = context.fake_mode
    for node in dynamo_graph.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            _check_higher_order(dynamo_graph, node)
    placeholders = dynamo_graph.graph.find_nodes(op="placeholder")
    examples = [node.meta["example_value"] for node in placeholders]
    with fake_mode, torch.fx.traceback.preserve_node_meta(), torch.no_grad():
        # Dynamo's own example values belong to a fake mode that it has done with.
        inputs = [_fresh(example) for example in examples]
        # `Interpreter` carries each node's layer and stack trace over to what it is traced into.
        module = make_fx(lambda *args: _Retrace(dynamo_graph).run(*args), pre_dispatch=True)(*inputs)
    for node in module.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(module, node.target, None), FakeTensor):
            # As under `vmap`: a value of the trace that no node computes.
            raise NotCapturedError(f"retracing loses track of a tensor that `{next(iter(node.users))}` reads")
    quantized = {}
    news = module.graph.find_nodes(op="placeholder")
    reals = [_real(node) for node in placeholders]
    owners = find_owners(x for x in reals if type(x) is torch.Tensor and x.dim() == 4 and x.is_floating_point())
    adoptable = frozenset(new for new, real in zip(news, reals, strict=True) if id(real) in owners)
    for old, new, example in zip(placeholders, news, examples, strict=True):
        _rename(new, _readable_name(old.name))
        new.meta["dynamo_placeholder"] = old
        new.meta["source_name"] = source_name(old)
        if isinstance(example, QuantizedKV):
            with fake_mode:
                quantized[new] = example.value.of_parts(map(_fresh, example.parts))
    module.recompile()
    return KVGraph(module, fake_mode, quantized, _sliding_layers(context), adoptable)


class _Retrace(Interpreter):
    """Runs Dynamo's graph, `flex_attention` in plain operations."""

    def run_node(self, node: Node) -> Any:
        if node.target is not FLEX_ATTENTION:
            return super().run_node(node)
        with self._set_current_node(node):
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            return spell_out(*args, **kwargs, log_sum=any(user.args[1] == 1 and user.users for user in node.users))


def _check_higher_order(dynamo_graph: GraphModule, node: Node) -> None:
    operator: Any = node.target
    if operator is not FLEX_ATTENTION:
        # It calls a graph of its own, which retracing would take apart.
        raise NotCapturedError(f"the graph calls the higher-order operator `{operator.name()}`")
    score_mod: Any
    block_mask: Any
    score_mod, block_mask = node.args[3:5]
    for function in (score_mod, block_mask[-1]):
        if not is_elementwise(getattr(dynamo_graph, function.target)):
            raise NotCapturedError(f"`{function.target}` of `flex_attention` is more than arithmetic on one score")


def works_on_a_cache() -> bool:
    """Whether the graph that is being compiled reads a layer of a transformers cache: Dynamo guards on its state."""
    context = TracingContext.try_get()
    guards = context.guards_context.dynamo_guards if context is not None else ()
    return any(re.search(_CACHE_ATTRIBUTE, guard.originating_source.name) for guard in guards)


def example_inputs(graph: KVGraph) -> list[Any]:
    """The fake inputs of the graph's present placeholders."""
    return [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]


def forward_dynamo_metadata(dynamo_graph: GraphModule, graph: KVGraph) -> None:
    """Give the rewritten graph what AOTAutograd reads of a Dynamo graph.

    That is the compile id, each placeholder's source (to deduplicate inputs) and which inputs have a fixed address
    (for CUDA graphs): those that Dynamo was told of, and a cache that does not grow. A CUDA graph does not copy these
    and may write into them; should one move after all, it is recorded anew.
    """
    fixed = _fixed_inputs(graph)
    graph.module.meta.update(dynamo_graph.meta)
    sources = dict(getattr(dynamo_graph, "_param_name_to_source", {}))
    for name, _ in (*graph.module.named_buffers(), *graph.module.named_parameters()):
        sources.setdefault(name, ConstantSource(name))  # a constant of the graph, such as torch.tensor([-1])
    graph.module._param_name_to_source = sources  # type: ignore[assignment]
    parts = {name for taken in graph.inputs.values() for name in (*taken.parts, taken.spare, taken.length)}
    for node in graph.graph.find_nodes(op="placeholder"):
        old = node.meta.pop("dynamo_placeholder", None)
        if old is None:
            raise AssertionError(f"placeholder {node} does not come from the captured graph")
        # The parts of a quantized tensor have no source of their own.
        node._dynamo_source = None if node.name in parts else getattr(old, "_dynamo_source", None)
        if "tensor_dict" in old.meta:
            node.meta["tensor_dict"] = dict(old.meta["tensor_dict"])
        if node in fixed:
            # What `torch._dynamo.mark_static_address` says of a tensor.
            node.meta.setdefault("tensor_dict", {})["_dynamo_static_input_type"] = "unguarded"


def _fixed_inputs(graph: KVGraph) -> set[Node]:
    """The parts of static caches, and what else such a cache keeps and the graph counts up in place.

    transformers marks its own static tensors only where they are made outside a compiled graph.
    """
    parts = {name for taken in graph.inputs.values() if taken.spare is None for name in taken.parts}
    return {
        node
        for node in graph.graph.find_nodes(op="placeholder")
        if node.name in parts
        or (re.search(_CACHE_ATTRIBUTE, node.meta.get("source_name", "")) and any(map(is_mutation, aliases(node))))
    }


def source_name(placeholder: Node) -> str:
    """Where the caller keeps this input, such as ``past_key_values.layers[0].keys``; empty if unknown."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    # L['kwargs']['past_key_values'].layers[0].keys -> past_key_values.layers[0].keys
    name = re.sub(r"^L(?:\['(?:args|kwargs)'\])?\['?(\w+)'?\]", r"\1", source.name)
    # self._modules['norm']._parameters['weight'] -> self.norm.weight
    return re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", name)


def _real(placeholder: Node) -> Any:
    """What the caller passes here in the call that is being compiled; ``None`` if Dynamo does not say."""
    argument = placeholder.meta.get("grapharg")
    return None if argument is None else argument.example


def _fresh(example: Any) -> Any:
    """An input to trace with: a plain tensor of the same metadata, or the symbolic number itself."""
    if not isinstance(example, torch.Tensor):
        return example
    fresh = torch.empty_strided(example.size(), example.stride(), dtype=example.dtype, device=example.device)
    if (number := getattr(example, "item_memo", None)) is not None:
        # A Python number that Dynamo passes as a tensor (dynamic=True): its `item()` is a known symbol.
        fresh.item_memo = number  # type: ignore[attr-defined]
    return fresh


def _sliding_layers(context: TracingContext) -> frozenset[int]:
    """The cache layers that are sliding windows: Dynamo guards on attributes that only they have.

    A window that is not full is written exactly as a full-attention cache is; the graph does not tell them apart.
    """
    names = (guard.originating_source.name for guard in context.guards_context.dynamo_guards)
    found = (re.search(r"\.layers\[(\d+)\]\.(?:cumulative_length_int|sliding_window)$", name) for name in names)
    return frozenset(int(match[1]) for match in found if match)


def _readable_name(name: str) -> str:
    """``l_self_modules_model_modules_norm_parameters_weight_`` -> ``model_norm_weight``."""
    name = re.sub(r"^l_|_$", "", name)
    name = re.sub(r"^(self|args|kwargs)_", "", name)
    return re.sub(r"(^|_)(modules|parameters|buffers)_", r"\1", name) or "input"


def _rename(node: Node, name: str) -> None:
    node._rename(name)
    node.target = node.name
