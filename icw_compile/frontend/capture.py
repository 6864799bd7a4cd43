"""From the graph that Dynamo hands to a backend to the pre-dispatch ATen graph that the passes work on, and back."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx.traceback
from torch.fx import GraphModule, Node

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.compat import dynamo
from icw_compile.compat.fx import (
    FakeLayout,
    become_equal,
    by_its_name,
    carry_item,
    inner_tensors,
    is_fake,
    rename,
    storage_of,
    with_inner_tensors,
)
from icw_compile.frontend.endpoints import input_endpoints, output_endpoints
from icw_compile.frontend.overlap import join_overlapping
from icw_compile.frontend.retrace import Retrace, is_foreign
from icw_compile.passes.graph import Endpoint, KVGraph
from icw_compile.passes.nodes import aliases, is_mutation

__all__ = ["NotCapturedError", "capture", "example_inputs", "forward_dynamo_metadata", "may_have_a_cache"]


class NotCapturedError(Exception):
    """A graph cannot be retraced, and has to be compiled as it is; the message says why."""


#: What attention is made of: functions and methods of torch that Dynamo leaves in its graph.
_ATTENTION = ("scaled_dot_product_attention", "flex_attention", "softmax")


def may_have_a_cache(dynamo_graph: GraphModule) -> bool:
    """Whether the graph is worth a look: it takes a stored tensor, or it has attention in it, and no gradients."""
    for node in dynamo_graph.graph.nodes:
        if node.op == "placeholder" and isinstance(dynamo.example_value(node), QuantizedKV):
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op in ("call_function", "call_method") and any(each in str(name) for each in _ATTENTION):
            return True
    return works_on_a_cache()


def works_on_a_cache() -> bool:
    """Whether the frame that is being compiled reads a layer of a transformers cache: Dynamo guards on its state."""
    return any(re.search(_CACHE_ATTRIBUTE, name) for name in dynamo.guarded_sources())


#: Where a layer of a transformers cache keeps its state.
_CACHE_ATTRIBUTE = r"\.layers\[\d+\]\.\w+$"


def capture(dynamo_graph: GraphModule) -> KVGraph:
    """Retrace Dynamo's graph into pre-dispatch ATen, where each operation has one spelling.

    In-place writes stay visible, sizes stay symbolic, and a `QuantizedKV` input is traced as the plain float tensor
    that it stands for. ``dynamo_graph`` is left as it is. Costs about 1 ms for each node that is like no other.

    Raises:
        NotCapturedError: the graph holds something that cannot be retraced.
    """
    fake_mode = dynamo.fake_mode()
    if fake_mode is None:
        raise RuntimeError(
            "icw_int8kv compiles graphs that torch.compile captured; call it as a torch.compile backend."
        )
    placeholders = dynamo_graph.graph.find_nodes(op="placeholder")
    constants = _tensor_attributes(dynamo_graph)
    examples = [dynamo.example_value(node) for node in placeholders]
    inputs_at, outputs_at = input_endpoints(placeholders), output_endpoints()
    _count_alike(zip(placeholders, examples, strict=True), inputs_at)
    with fake_mode, torch.fx.traceback.preserve_node_meta(), torch.no_grad():
        # Dynamo's own example values belong to a fake mode that it has done with.
        inputs = _fresh([*examples, *constants.values()])
        # `Interpreter` carries each node's layer and stack trace over to what it is traced into.
        module = Retrace(dynamo_graph, list(constants), inputs).trace()
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(value, torch.Tensor):
            carry_item(value, node.meta["val"])  # the trace notes a copy
    _install(module, constants)
    for node in module.graph.find_nodes(op="get_attr"):
        if is_fake(getattr(module, node.target, None)):
            # As under `vmap`: a value of the trace that no node computes.
            raise NotCapturedError(f"retracing loses track of a tensor that `{next(iter(node.users))}` reads")
    stored, growing, adoptable = {}, set(), set()
    ours: dict[Node, QuantizedKV] = {}
    endpoints: dict[Node, Endpoint] = {}
    news = module.graph.find_nodes(op="placeholder")
    for old, new, example in zip(placeholders, news, examples, strict=True):
        rename(new, _readable_name(old.name))
        new.meta["dynamo_placeholder"] = old
        new.meta["source_name"] = source_name(old)
        if old in inputs_at:
            endpoints[new] = inputs_at[old]
        if isinstance(example, QuantizedKV):
            ours[new] = example
            with fake_mode:
                stored[new] = example.whole.of_parts(_fresh(example.buffers))
            if example.grows:
                growing.add(new)
        elif old in inputs_at and type(dynamo.caller_value(old)) is torch.Tensor:
            adoptable.add(new)
    module.recompile()
    returned: Any = dynamo_graph.graph.output_node().args[0]
    returned_to = {i: outputs_at[node] for i, node in enumerate(returned) if node in outputs_at}
    graph = KVGraph(module, fake_mode, stored, frozenset(growing), endpoints, returned_to, frozenset(adoptable))
    join_overlapping(graph, ours)
    return graph


def _count_alike(inputs: Iterable[tuple[Node, Any]], endpoints: Mapping[Node, Endpoint]) -> None:
    """Let what layers count alike be known to be the same number: growing tensors' lengths, and tokens that were seen.

    To Dynamo, each has a length and each part a capacity of its own, each layer of a sliding window a number of tokens
    besides, and all that is then worked out for a layer would be another thing for the next. Those of the same kind of
    layer are alike because a cache takes each token in all of its layers.
    """
    known: dict[tuple[Any, ...], Any] = {}
    for node, example in inputs:
        if isinstance(example, torch.SymInt):
            if (counted := _OF_A_LAYER.fullmatch(source_name(node))) is not None:
                become_equal(example, known.setdefault(counted.groups(), example))
            continue
        if not isinstance(example, QuantizedKV) or not example.grows:
            continue
        is_sliding = node in endpoints and endpoints[node].is_sliding
        become_equal(example.shape[2], known.setdefault((is_sliding, "length"), example.shape[2]))
        for part in example.whole.rows.values():
            become_equal(part.shape[2], known.setdefault((is_sliding, "capacity"), part.shape[2]))


#: What a cache layer holds: ``past_key_values.layers[3].cumulative_length``.
_OF_A_LAYER = re.compile(r"(.*\.layers\[)\d+(\]\.\w+)")


def _tensor_attributes(dynamo_graph: GraphModule) -> dict[str, torch.Tensor]:
    """The tensors that nodes of the graph get from the module: parameters that are to be frozen, and constants."""
    found = {}
    for node in dynamo_graph.graph.find_nodes(op="get_attr"):
        value: Any = dynamo_graph
        for name in str(node.target).split("."):
            value = getattr(value, name)
        if isinstance(value, torch.Tensor):
            found[str(node.target)] = value
    return found


def _install(module: GraphModule, constants: dict[str, torch.Tensor]) -> None:
    """Make attributes of the last placeholders again: what Dynamo's graph gets from its module."""
    if not constants:
        return
    placeholders = module.graph.find_nodes(op="placeholder")[-len(constants) :]
    for node, (target, value) in zip(placeholders, constants.items(), strict=True):
        name = re.sub(r"\W", "_", target)
        if isinstance(value, torch.nn.Parameter):
            module.register_parameter(name, value)
        else:
            module.register_buffer(name, value)
        with module.graph.inserting_before(node):
            attribute = module.graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        module.graph.erase_node(node)
    module.recompile()


def example_inputs(graph: KVGraph) -> list[Any]:
    """The fake inputs of the graph's present placeholders."""
    return [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]


def forward_dynamo_metadata(dynamo_graph: GraphModule, graph: KVGraph) -> None:
    """Give the rewritten graph what AOTAutograd reads of a Dynamo graph.

    That is the compile id, each placeholder's source (to deduplicate inputs) and which inputs have a fixed address
    (for CUDA graphs): those that Dynamo was told of, and a cache that does not grow. A CUDA graph does not copy these
    and may write into them; should one move after all, it is recorded anew. A number that is known to be another one
    brings that one's name: where the cache was taken apart, nothing else may.
    """
    fixed = _fixed_inputs(graph)
    dynamo.hand_over_module(dynamo_graph, graph.module)
    parts = {graph.turns, *(name for taken in graph.inputs.values() for name in (*taken.parts, taken.length))}
    for node in graph.graph.find_nodes(op="placeholder"):
        old = node.meta.pop("dynamo_placeholder", None)
        if old is None:
            raise AssertionError(f"placeholder {node} does not come from the captured graph")
        # The parts of a quantized tensor have no source of their own.
        dynamo.hand_over_placeholder(old, node, has_source=node.name not in parts)
        if node in fixed:
            dynamo.fix_address(node)
        if isinstance(node.meta["val"], torch.SymInt):
            node.meta["val"] = by_its_name(node.meta["val"])


def _fixed_inputs(graph: KVGraph) -> set[Node]:
    """The parts of static caches, and what else such a cache keeps and the graph counts up in place.

    transformers marks its own static tensors only where they are made outside a compiled graph.
    """
    parts = {name for taken in graph.inputs.values() if not taken.appended for name in taken.parts}
    return {
        node
        for node in graph.graph.find_nodes(op="placeholder")
        if node.name in parts
        or (re.search(_CACHE_ATTRIBUTE, node.meta.get("source_name", "")) and any(map(is_mutation, aliases(node))))
    }


def source_name(placeholder: Node) -> str:
    """Where the caller keeps this input, such as ``past_key_values.layers[0].keys``; empty if unknown."""
    # A module is L['self'] or, from torch 2.14 on, L['args'][0].
    name = re.sub(r"^L\['args'\]\[0\](?=\._(?:modules|parameters|buffers))", "self", dynamo.source_name(placeholder))
    # L['kwargs']['past_key_values'].layers[0].keys -> past_key_values.layers[0].keys
    name = re.sub(r"^L(?:\['(?:args|kwargs)'\])?\['?(\w+)'?\]", r"\1", name)
    # self._modules['norm']._parameters['weight'] -> self.norm.weight
    return re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", name)


def _fresh(examples: Sequence[Any]) -> list[Any]:
    """Inputs to trace with: tensors of the same metadata, or the symbolic numbers themselves.

    Ours are plain tensors there, other subclasses are what they are. Those that share storage share it again, so that
    what is written to one is seen in the other.
    """
    sharing: dict[Any, list[int]] = {}
    for i, example in enumerate(examples):
        if is_fake(example):
            sharing.setdefault(storage_of(example), []).append(i)
    shared: dict[int, torch.Tensor] = {}
    for members in sharing.values():
        if len(members) > 1:
            first = examples[members[0]]
            whole = torch.empty(first.untyped_storage().nbytes(), dtype=torch.uint8, device=first.device)
            shared |= dict.fromkeys(members, whole)
    made = []
    for i, example in enumerate(examples):
        if not isinstance(example, torch.Tensor):
            made.append(example)
            continue
        size, stride = example.size(), example.stride()
        if is_foreign(example):
            inner = inner_tensors(example)
            made.append(with_inner_tensors(example, dict(zip(inner, _fresh([*inner.values()]), strict=True))))
            continue
        if is_fake(example):
            fresh: torch.Tensor = FakeLayout(example, dynamo.fake_mode()).another(shared.get(i))
        else:
            fresh = torch.empty_strided(size, stride, dtype=example.dtype, device=example.device)
        carry_item(example, fresh)
        made.append(fresh)
    return made


def _readable_name(name: str) -> str:
    """``l_self_modules_model_modules_norm_parameters_weight_`` -> ``model_norm_weight``."""
    name = re.sub(r"^l_|_$", "", name)
    name = re.sub(r"^(self|args_0(?=_modules|_parameters|_buffers)|args|kwargs)_", "", name)
    return re.sub(r"(^|_)(modules|parameters|buffers)_", r"\1", name) or "input"
