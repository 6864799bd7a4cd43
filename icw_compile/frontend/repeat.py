"""What a call of Dynamo's graph becomes, for the next call that is alike: the layers of a model are traced once.

::

    # layer 0, traced                             # layer 1: the same operators on its own operands, not traced
    x = torch.nn.functional.linear(a, w)          y = torch.nn.functional.linear(b, v)
    -> x = aten.linear(a, w)                      -> y = aten.linear(b, v)

Two calls are alike if they call the same with the same numbers, on tensors of the same layout, an operand that comes
several times, or shares memory with another, doing so in both, and nothing in between changed what calls do, as
autocast does. Only what depends on nothing else is repeated: operators whose results have sizes that follow from their
operands, and that write into nothing but these.
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, Proxy

from icw_compile.compat.fx import (
    FakeLayout,
    current_tracer,
    expression_of,
    is_fake,
    is_operator,
    node_of,
    outside_of_trace,
    storage_of,
    track,
    tree_leaves,
    without_torch_function,
)
from icw_compile.passes.graph import layout_of
from icw_compile.passes.nodes import written_by

__all__ = ["Repeats"]

#: Values that calls take and that are compared with their type: ``True`` is no ``1``.
_CONSTANTS = (
    int,
    bool,
    str,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
#: What a node knows that is its own, and no business of the call that it repeats.
_OF_ITS_OWN = ("val", "from_node")
#: Operators with one of these return what is not known from the layout of their operands, or give these another one.
_TAGS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)


class _NotAlike(Exception):
    """A call that no other is taken to be like."""


@dataclass(frozen=True)
class _Operand:
    """The tensor that a call takes in this place, counted by what the graph knows it as."""

    index: int


@dataclass(frozen=True)
class _Made:
    """The node of this index among those of a call."""

    index: int


@dataclass(frozen=True)
class _Renamed:
    """The operand of this index, which the graph knows as a node that was made: ``to`` of the dtype that it has."""

    operand: int
    made: _Made


@dataclass(frozen=True)
class _Value:
    """The layout of what a node returns, and whose memory it lies in: `_Operand`, `_Made`, or ``None`` for its own."""

    layout: FakeLayout
    memory: Any


@dataclass(frozen=True)
class _Step:
    """A node: its arguments in terms of `_Operand` and `_Made`, its result of `_Value`, and what else it knows.

    ``carried`` are the names of what the node has from that of Dynamo; ``written`` the operands that it writes into.
    """

    target: Callable[..., Any]
    args: Any
    kwargs: Any
    name: str
    value: Any
    meta: dict[str, Any]
    carried: tuple[str, ...]
    written: tuple[int, ...]


@dataclass(frozen=True)
class _Expansion:
    """What a call was traced into: its nodes, and its result in terms of `_Operand` and `_Made`.

    ``is_symbolic``: the size of something in it is.
    """

    steps: tuple[_Step, ...]
    result: Any
    is_symbolic: bool


@dataclass(frozen=True)
class Call:
    """A call of Dynamo's graph that may be like another: what it is alike by, and its operands."""

    key: Any
    tensors: tuple[Tensor, ...]
    nodes: tuple[Node, ...]


class Repeats:
    """The calls of one graph, while it is traced."""

    def __init__(self) -> None:
        self._expansions: dict[Any, _Expansion | None] = {}
        #: What the trace does not know, inputs and what repeated calls returned: the tensor and its node.
        self._unknown: dict[int, tuple[Tensor, Node]] = {}
        self._era = 0

    def take(self, value: Any, proxy: Proxy) -> None:
        """Let ``proxy`` be what the graph takes as ``value``.

        Most inputs are only met by calls that are repeated. The trace is told at once of all that has more to it than
        numbers: symbols, another class, a number that is known.
        """
        with without_torch_function():
            is_plain = is_fake(value) and FakeLayout(value).is_static and getattr(value, "item_memo", None) is None
        if is_plain:
            proxy.node.meta["val"] = value
            self._unknown[id(value)] = value, proxy.node
        else:
            with outside_of_trace():
                track(value, proxy, proxy.tracer)

    def call_of(self, node: Node, args: Any, kwargs: Any) -> Call | None:
        """What makes this call alike to others; ``None`` if nothing does."""
        tensors: dict[Node, Tensor] = {}
        try:
            with without_torch_function():
                key = (node.op, node.target, self._era, self._frozen(args, tensors), self._frozen(kwargs, tensors))
                memories = [storage_of(tensor) for tensor in tensors.values()]
            hash(key)
        except (_NotAlike, TypeError):  # what cannot be hashed cannot be compared
            return None
        shared = tuple(map(memories.index, memories))
        return Call((key, shared), tuple(tensors.values()), tuple(tensors))

    def again(self, node: Node, call: Call) -> Any:
        """The result of a call that was seen before, and is in the graph now; ``NotImplemented`` for a new one."""
        expansion = self._expansions.get(call.key)
        if expansion is None:
            return NotImplemented
        graph = current_tracer().graph
        made: list[Node] = []
        # What is done to symbolic sizes is seen by the trace as well.
        with outside_of_trace() if expansion.is_symbolic else nullcontext():
            for step in expansion.steps:
                args, kwargs = _with_nodes((step.args, step.kwargs), call.nodes, made)
                new = graph.create_node("call_function", step.target, args, kwargs, step.name)
                new.meta = {**step.meta, **{name: node.meta[name] for name in step.carried if name in node.meta}}
                new.meta["val"] = _each(step.value, (_Value,), partial(_another, call.tensors, made))
                made.append(new)
                for operand in step.written:  # what is known of its numbers holds no more
                    torch.autograd.graph.increment_version(call.tensors[operand])

        def result_of(found: Any) -> Any:
            if isinstance(found, _Operand):
                return call.tensors[found.index]
            if isinstance(found, _Renamed):
                tensor = call.tensors[found.operand]
                self._unknown[id(tensor)] = tensor, made[found.made.index]
                return tensor
            new = made[found.index]
            self._unknown[id(new.meta["val"])] = new.meta["val"], new
            return new.meta["val"]

        return _each(expansion.result, (_Operand, _Made, _Renamed), result_of)

    def make_known(self, values: Any) -> None:
        """Tell the trace of tensors that it is about to meet, as it has not seen them made."""
        tracer = current_tracer()
        for value in tree_leaves(values):
            if (found := self._unknown.pop(id(value), None)) is not None:
                with outside_of_trace():
                    track(value, tracer.proxy(found[1]), tracer)

    def learn(self, node: Node, call: Call | None, last: Node, result: Any) -> None:
        """Note what a call was traced into: the nodes behind ``last``."""
        leaves = tree_leaves(result)
        if not leaves or any(not isinstance(leaf, (Tensor, torch.SymInt, int)) for leaf in leaves):
            self._era += 1  # it may have changed what others do
        if call is None or call.key in self._expansions:
            return
        try:
            self._expansions[call.key] = self._expansion(node, call, last, result)
        except _NotAlike:
            self._expansions[call.key] = None

    def _expansion(self, node: Node, call: Call, last: Node, result: Any) -> _Expansion:
        if not tree_leaves(result):
            raise _NotAlike  # it is called for what else it does
        places: dict[Node, Any] = {each: _Operand(i) for i, each in enumerate(call.nodes)}

        def placed(each: Node) -> Any:
            if each in places:
                return places[each]
            if isinstance(each.meta.get("val"), torch.SymInt):
                return each  # whatever comes from there is that number
            raise _NotAlike

        def operand_of(each: Node) -> int:
            if not isinstance(place := places.get(each), _Operand):
                raise _NotAlike
            return place.index

        memories: dict[int, Any] = {}

        def placed_value(value: Any, at: _Made) -> _Value:
            found = _Value(FakeLayout(value), memories.get(storage_of(value)))
            memories.setdefault(storage_of(value), at)
            return found

        for operand, tensor in enumerate(call.tensors):
            memories.setdefault(storage_of(tensor), _Operand(operand))
        steps: list[_Step] = []
        new = last.next
        while new.op != "root":
            if not _is_repeatable(new):
                raise _NotAlike
            written = tuple(map(operand_of, written_by(new)))
            args, kwargs = _each((new.args, new.kwargs), (Node,), placed)
            carried = tuple(name for name in new.meta if name in node.meta and name not in _OF_ITS_OWN)
            meta = {name: value for name, value in new.meta.items() if name not in _OF_ITS_OWN}
            at = places[new] = _Made(len(steps))
            value = _each(new.meta["val"], (Tensor,), partial(placed_value, at=at))
            step = _Step(new.target, args, kwargs, new.name, value, meta, carried, written)  # type: ignore[arg-type]
            steps.append(step)
            new = new.next
        if any(_layout_of(tensor) != layout for tensor, layout in zip(call.tensors, _layouts(call.key), strict=True)):
            raise _NotAlike  # it gave an operand another layout

        def returned(value: Any) -> Any:
            if not isinstance(value, Tensor):
                raise _NotAlike
            of = places.get(self._node_of(value))
            operand = next((i for i, tensor in enumerate(call.tensors) if tensor is value), None)
            if of is None or (isinstance(of, _Operand) and of.index != operand):
                raise _NotAlike
            return of if operand is None or isinstance(of, _Operand) else _Renamed(operand, of)

        found = _each(result, (object,), returned)
        renamed = {each.operand for each in tree_leaves(found) if isinstance(each, _Renamed)}
        for i, (tensor, of_old) in enumerate(zip(call.tensors, call.nodes, strict=True)):
            if i not in renamed and self._node_of(tensor) is not of_old:
                raise _NotAlike
        values = [each for step in steps for each in tree_leaves(step.value)]
        is_symbolic = any(not isinstance(each, _Value) or not each.layout.is_static for each in values)
        return _Expansion(tuple(steps), found, is_symbolic)

    def _node_of(self, value: Tensor) -> Node:
        if (found := self._unknown.get(id(value))) is not None:
            return found[1]
        node = node_of(value, current_tracer())
        if node is None:
            raise _NotAlike
        return node

    def _frozen(self, value: Any, tensors: dict[Node, Tensor]) -> Any:
        """``value`` as something to compare; the tensors in it are added to ``tensors``."""
        if isinstance(value, Tensor):
            if not is_fake(value) or value.layout != torch.strided or value.is_complex() or value.is_neg():
                raise _NotAlike
            node = self._node_of(value)
            if tensors.setdefault(node, value) is not value:
                raise _NotAlike
            return _Taken(list(tensors).index(node), _layout_of(value))
        if isinstance(value, torch.SymInt):
            return torch.SymInt, expression_of(value)
        if isinstance(value, _CONSTANTS):
            return type(value), value
        if isinstance(value, float):
            return float, repr(value)  # 0.0 is not -0.0
        if isinstance(value, slice):
            return slice, self._frozen((value.start, value.stop, value.step), tensors)
        if isinstance(value, (list, tuple)):
            return type(value), tuple(self._frozen(each, tensors) for each in value)
        if isinstance(value, dict):
            return dict, tuple((name, self._frozen(each, tensors)) for name, each in value.items())
        raise _NotAlike


def _layout_of(tensor: Tensor) -> Any:
    return layout_of(tensor), layout_of(tensor.storage_offset())


@dataclass(frozen=True)
class _Taken:
    """A tensor in a key."""

    index: int
    layout: Any


def _layouts(key: Any) -> list[Any]:
    """The layouts of the operands of a call, in their order."""
    found: dict[int, Any] = {}
    pending = [key]
    while pending:
        each = pending.pop()
        if isinstance(each, _Taken):
            found[each.index] = each.layout
        elif isinstance(each, tuple):
            pending += each
    return [found[i] for i in sorted(found)]


def _is_repeatable(node: Node) -> bool:
    if node.op != "call_function" or "eager_input_vals" in node.meta or "kept" in node.meta:
        return False
    if is_operator(node.target):
        return "val" in node.meta and not set(_TAGS) & set(node.target.tags)  # it returns something
    return node.target is operator.getitem or isinstance(node.meta.get("val"), torch.SymInt)


def _each(tree: Any, kinds: tuple[type, ...], function: Callable[[Any], Any]) -> Any:
    """``function`` of what is of these kinds in nested lists, tuples, dictionaries and slices."""
    if isinstance(tree, (list, tuple)):
        return (list if isinstance(tree, list) else tuple)(_each(each, kinds, function) for each in tree)
    if isinstance(tree, dict):
        return {name: _each(each, kinds, function) for name, each in tree.items()}
    if isinstance(tree, slice):
        return slice(*(_each(each, kinds, function) for each in (tree.start, tree.stop, tree.step)))
    return function(tree) if isinstance(tree, kinds) else tree


def _with_nodes(tree: Any, operands: Sequence[Node], made: Sequence[Node]) -> Any:
    return _each(tree, (_Operand, _Made), lambda each: (operands if isinstance(each, _Operand) else made)[each.index])


def _another(operands: Sequence[Tensor], made: Sequence[Node], value: _Value) -> Tensor:
    """A fake of the same layout, in the memory that it is to lie in."""
    memory = value.memory
    if isinstance(memory, _Made):
        return value.layout.another(tree_leaves(made[memory.index].meta["val"])[0])
    return value.layout.another(None if memory is None else operands[memory.index])
