"""Decoder layers that are alike, as one graph that is called for each: compilers then see it once.

::

    # before                                       # after
    h1 = add(h0, ...)     # layer 0, 80 nodes      h1, = invoke_subgraph(layer, "icw_layer_1f0a", h0, w0, k0, v0)
    h2 = add(h1, ...)     # layer 1, 80 nodes      h2, = invoke_subgraph(layer, "icw_layer_1f0a", h1, w1, k1, v1)

It is a nested compile region, as ``torch.compiler.nested_compile_region`` makes them where a model asks for it: what is
compiled no longer grows with the number of layers. Layers are alike if the same operators are called in the same order
with the same numbers, on tensors of the same layout, in whatever parameters and caches these lie.

A region writes into its layer's cache. Inductor has what is written in mind inside of a region and not outside, so that
a layer becomes one only if nothing outside of it knows what it writes into: no other node, and no other input that
shares the memory.
"""

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from icw_compile.compat.fx import (
    bound_symbols,
    expression_of,
    free_symbols,
    invoke_subgraph,
    is_fake,
    is_operator,
    storage_of,
    tree_leaves,
)
from icw_compile.passes.graph import layout_of
from icw_compile.passes.nodes import drops_out, layer_of, root_of, written_by

__all__ = ["share_layers"]

#: A layer is in a list of layers: ``model.layers.3`` of ``model.layers.3.mlp.experts.0``.
_LAYER = re.compile(r"((?:.*?\.)?\d+)(\.|$)")
#: What is random, but for training only.
_MAY_DROP_OUT = (torch.ops.aten.dropout.default, torch.ops.aten.scaled_dot_product_attention.default)


def share_layers(module: GraphModule) -> int:
    """Make of layers that are alike calls of one graph; returns how many are calls now."""
    inputs = _Inputs.of(module.graph)
    alike: dict[Any, list[_Layer]] = {}
    for nodes in _layers(module.graph):
        layer = _Layer(nodes, inputs)
        if layer.may_be_called and (key := layer.key) is not None:
            alike.setdefault(key, []).append(layer)
    calls: list[tuple[_Layer, str, list[int]]] = []
    for key, layers in alike.items():
        returned = sorted(set[int]().union(*(layer.returned for layer in layers)))
        if len(layers) > 1 and layers[0].can_return(returned):
            name = f"icw_layer_{hashlib.sha256(repr((key, returned)).encode()).hexdigest()[:16]}"
            module.add_submodule(name, layers[0].as_module(returned))
            calls += ((layer, name, returned) for layer in layers)
    replaced: dict[Node, Node] = {}
    for layer, name, returned in calls:
        _call(module.graph, layer, name, returned, replaced)
    if calls:
        module.graph.lint()
        module.recompile()
    return len(calls)


def _layers(graph: Graph) -> Iterator[list[Node]]:
    """The nodes of each layer, as far as they follow upon each other."""
    run: list[Node] = []
    between: list[Node] = []  # of no module: sizes, and what stands for several modules
    path = ""
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        found = _LAYER.match(module) if (module := layer_of(node)) else None
        here = found[1] if found else ""
        if here and here == path:
            run += [*between, node]
            between = []
        elif run and not module and node.op != "output":
            between.append(node)
        else:
            if run:
                yield run
            run, between, path = [node] if here else [], [], here


@dataclass(frozen=True)
class _Inputs:
    """What a graph is given: the placeholders that bring numbers, and how many share which memory."""

    numbers: Mapping[Any, Node]
    sharing: Mapping[int, int]

    @classmethod
    def of(cls, graph: Graph) -> "_Inputs":
        numbers: dict[Any, Node] = {}
        sharing: Counter[int] = Counter()
        for node in (*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr")):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                numbers.setdefault(expression_of(value), node)
            elif isinstance(value, Tensor):
                sharing[storage_of(value)] += 1
        return cls(numbers, sharing)


@dataclass(frozen=True)
class _Operand:
    """An argument in a key: the node of this index in the layer, or the one that it takes in this place."""

    index: int
    is_made: bool


class _Layer:
    """The nodes of one layer, and what they have to do with the others."""

    def __init__(self, nodes: list[Node], inputs: _Inputs) -> None:
        self.nodes = nodes
        self._inputs = inputs
        self._index = {node: i for i, node in enumerate(nodes)}

    @cached_property
    def taken(self) -> list[Node]:
        """What it takes from outside: tensors and numbers, and every symbol that is not the size of one of these."""
        operands = (self._operand(each) for node in self.nodes for each in node.all_input_nodes)
        found = list(dict.fromkeys(each for each in operands if each not in self._index))
        values = [node.meta.get("val") for node in (*found, *self.nodes)]
        bound = bound_symbols([node.meta.get("val") for node in found])
        numbers = self._inputs.numbers
        missing = sorted((each for each in free_symbols(values) if each not in bound), key=str)
        return [*found, *(numbers[each] for each in missing if each in numbers)]

    def _operand(self, node: Node) -> Node:
        """What a node of the layer has as an operand: from outside the same for the same number."""
        value = node.meta.get("val")
        if node in self._index or not isinstance(value, torch.SymInt):
            return node
        return self._inputs.numbers.get(expression_of(value), node)

    @cached_property
    def returned(self) -> set[int]:
        """Which of its nodes are used outside, but for those that `passed`."""
        used = {i for i, node in enumerate(self.nodes) if any(user not in self._index for user in node.users)}
        return used - self.passed.keys()

    @cached_property
    def passed(self) -> dict[int, Node]:
        """The nodes that are all of an input that was written into, and that the graph returns as it is."""
        found = {}
        for i, node in enumerate(self.nodes):
            outside = [user for user in node.users if user not in self._index]
            if outside and all(user.op == "output" for user in outside) and written_by(node):
                root = root_of(node)
                if root.op == "placeholder" and _layouts(root) == _layouts(node):
                    found[i] = root
        return found

    @property
    def may_be_called(self) -> bool:
        """Whether it can be called as a graph of its own, alone and without a trace outside."""
        return (
            all(map(_is_plain, self.nodes))
            and all(_is_plain_value(node.meta.get("val")) for node in self.taken)
            and self._knows_its_symbols()
            and self.can_return(sorted(self.returned))
            and all(map(self._is_its_own, self._written()))
        )

    def _knows_its_symbols(self) -> bool:
        given = bound_symbols([node.meta["val"] for node in self.taken])
        return all(each in given for each in free_symbols([node.meta["val"] for node in (*self.taken, *self.nodes)]))

    def _written(self) -> set[Node]:
        """What it writes into of what it takes."""
        roots = {root_of(each) for node in self.nodes for each in written_by(node)}
        return roots - self._index.keys()

    def _is_its_own(self, node: Node) -> bool:
        """Whether nothing else in the graph knows the memory of ``node``."""
        if node.op != "placeholder" or any(user not in self._index for user in node.users):
            return False
        return self._inputs.sharing[storage_of(node.meta["val"])] == 1

    def can_return(self, indices: list[int]) -> bool:
        """Whether these nodes are tensors, each in memory of its own."""
        values = [self.nodes[i].meta["val"] for i in indices]
        if not all(isinstance(value, Tensor) for value in values):
            return False
        given = [storage_of(value) for node in self.taken if isinstance(value := node.meta["val"], Tensor)]
        memories = [storage_of(value) for value in values]
        return len(set(memories)) == len(memories) and not set(memories) & set(given)

    @property
    def key(self) -> Any:
        """What layers are alike by; ``None`` if it cannot be compared."""
        places: dict[Node, Any] = {node: _Operand(i, False) for i, node in enumerate(self.taken)}
        places.update({node: _Operand(i, True) for node, i in self._index.items()})

        def called(node: Node) -> Any:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda each: places[self._operand(each)])
            return node.target, layout_of(args), layout_of(tuple(kwargs.items())), _layouts(node)

        key = (
            tuple(map(called, self.nodes)),
            tuple(map(_layouts, self.taken)),
            self._shared_memory(),
            tuple(self.passed),
        )
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _shared_memory(self) -> tuple[int, ...]:
        memories = [storage_of(v) if isinstance(v := node.meta["val"], Tensor) else node for node in self.taken]
        return tuple(map(memories.index, memories))

    def as_module(self, returned: list[int]) -> GraphModule:
        """The layer as a graph that takes `taken` and returns these nodes."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        for i, node in enumerate(self.taken):
            copies[node] = graph.placeholder(f"taken_{i}")
            copies[node].meta = {"val": node.meta["val"]}

        for node in self.nodes:
            copies[node] = graph.node_copy(node, lambda each: copies[self._operand(each)])
        graph.output(tuple(copies[self.nodes[i]] for i in returned))
        return GraphModule({}, graph)


def _is_plain(node: Node) -> bool:
    """Whether a node calls an operator, or computes with sizes, on what `_is_plain_value` says, and is no more."""
    if node.op != "call_function" or "kept" in node.meta:
        return False
    value = node.meta.get("val")
    if not is_operator(node.target):
        is_known = node.target is operator.getitem or isinstance(value, torch.SymInt)
    elif node.target in _MAY_DROP_OUT:
        is_known = not drops_out(node)
    else:
        is_known = torch.Tag.nondeterministic_seeded not in node.target.tags
    return is_known and all(map(_is_plain_value, tree_leaves(value)))


def _is_plain_value(value: Any) -> bool:
    return isinstance(value, torch.SymInt) or (is_fake(value) and value.layout == torch.strided)


def _layouts(node: Node) -> Any:
    value = node.meta["val"]
    offsets = [each.storage_offset() for each in tree_leaves(value) if isinstance(each, Tensor)]
    return layout_of(value), layout_of(offsets)


def _call(graph: Graph, layer: _Layer, name: str, returned: list[int], replaced: dict[Node, Node]) -> None:
    """Put a call in the place of the nodes of a layer; ``replaced``: what stands for nodes that are gone."""
    with graph.inserting_before(layer.nodes[-1].next):
        module = graph.get_attr(name)
        taken = [replaced.get(node, node) for node in layer.taken]
        call = graph.call_function(invoke_subgraph(), (module, name, *taken))
        call.meta["val"] = tuple(layer.nodes[i].meta["val"] for i in returned)
        for position, i in enumerate(returned):
            node = layer.nodes[i]
            replaced[node] = graph.call_function(operator.getitem, (call, position))
            replaced[node].meta = dict(node.meta)
            node.replace_all_uses_with(replaced[node])
    for i, root in layer.passed.items():
        layer.nodes[i].replace_all_uses_with(root)
    for node in reversed(layer.nodes):
        graph.erase_node(node)
