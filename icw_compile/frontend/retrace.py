"""Run Dynamo's graph under a trace, and keep what cannot be retraced as Dynamo spelled it.

::

    # before: Dynamo's graph                      # after
    y = torch.nn.functional.linear(x, w)          y = aten.linear(x, w)
    z = torch.nn.functional.linear(y, int8_w)     z = torch.nn.functional.linear(y, int8_w)        # kept
    (u,) = cond(p, true_graph, false_graph, (z,)) (u,) = cond(p, true_graph, false_graph, (z,))    # kept

A node is *kept* if it takes or returns a tensor subclass that is not ours (a quantized weight, a DTensor), if it calls
a graph of its own, or if it is part of a functorch transform such as ``vmap``. It is run on fakes outside of the trace,
to know what it returns, and put into the new graph with its own target. AOTAutograd takes it apart later, as it does in
a graph that nobody rewrote.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node, Proxy

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.compat.dynamo import DATA, example_value
from icw_compile.compat.flex import FLEX_ATTENTION, Flex
from icw_compile.compat.functorch import inside_transform, is_transform, tensor_of_level
from icw_compile.compat.fx import (
    current_node,
    current_tracer,
    inner_tensors,
    is_higher_order,
    is_wrapper_subclass,
    last_node,
    outside_of_trace,
    proxy_of,
    proxy_of_graph,
    storage_of,
    trace_pre_dispatch,
    track,
    tree_leaves,
    tree_map,
    version_of,
)
from icw_compile.frontend.flex import is_elementwise, spell_out
from icw_compile.frontend.repeat import Repeats
from icw_compile.passes.graph import Kept

__all__ = ["Retrace", "is_foreign"]


def is_foreign(value: Any) -> bool:
    """Whether it is a tensor made of other tensors, and not one of ours."""
    return is_wrapper_subclass(value) and not isinstance(value, QuantizedKV)


class Retrace(Interpreter):
    """Runs Dynamo's graph, with the tensors that are its attributes as further inputs: ``constants`` by name.

    ``inputs`` are those of the graph, and the constants.
    """

    def __init__(self, module: GraphModule, constants: Sequence[str], inputs: Sequence[Any]) -> None:
        super().__init__(module)
        self.inputs = inputs[: len(inputs) - len(constants)]
        self.values: dict[str, Any] = dict(zip(constants, inputs[len(self.inputs) :], strict=True))
        self.graphs: dict[str, Proxy] = {}
        self.repeats = Repeats()

    def trace(self) -> GraphModule:
        """What `trace_pre_dispatch` gives, with a placeholder for each of the inputs and then of the constants."""

        def run() -> Any:
            tracer = current_tracer()
            for i, value in enumerate((*self.inputs, *self.values.values())):
                self.repeats.take(value, tracer.create_proxy("placeholder", f"arg{i}", (), {}))
            return self.run(*self.inputs)

        return trace_pre_dispatch(run, ())

    def fetch_attr(self, target: str) -> Any:
        return self.values[target] if target in self.values else super().fetch_attr(target)

    def run_node(self, node: Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == "output":
            self.repeats.make_known(args)
            return super().run_node(node)
        with current_node(self, node):
            if node.target is FLEX_ATTENTION and self._is_arithmetic(node):
                self.repeats.make_known((args, kwargs))
                return spell_out(*args, **kwargs, log_sum=Flex.of(node).log_sum)
            if self._is_kept(node):
                self.repeats.make_known((args, kwargs))
                return self._keep(node)
        if node.target is DATA:
            # Of a fake tensor, `x.data` is made where a pre-dispatch trace does not look. Without gradients it is this.
            self.repeats.make_known(args)
            return args[0].detach()
        call = self.repeats.call_of(node, args, kwargs)
        if call is not None and (result := self.repeats.again(node, call)) is not NotImplemented:
            return result
        self.repeats.make_known((args, kwargs))
        last = last_node(current_tracer().graph)
        result = super().run_node(node)
        self.repeats.learn(node, call, last, result)
        return result

    def _is_arithmetic(self, node: Node) -> bool:
        flex = Flex.of(node)
        return all(is_elementwise(self.env[function]) for function in (flex.score_mod, flex.mask_mod))

    def _is_kept(self, node: Node) -> bool:
        if is_higher_order(node.target) or is_transform(node.target) or inside_transform():
            return True
        values = [self.env[each] for each in node.all_input_nodes]
        if values and all(isinstance(value, (tuple, list)) for value in values):
            return False  # takes an element out
        return any(is_foreign(leaf) for value in (*values, example_value(node)) for leaf in tree_leaves(value))

    def _keep(self, node: Node) -> Any:
        tracer = current_tracer()
        operands: list[Any] = []  # what becomes an argument that is a node, in their order

        def proxy(value: Any) -> Any:
            made = proxy_of(value, tracer) if isinstance(value, (Tensor, *_NUMBERS)) else value
            if isinstance(made, Proxy):
                operands.append(value)
            return made

        def proxies(each: Node) -> Any:
            value = self.env[each]
            if not isinstance(value, torch.nn.Module):
                return tree_map(proxy, value)
            name = str(each.target)
            if name not in self.graphs:
                self.graphs[name] = proxy_of_graph(value, name, tracer)
            operands.append(value)
            return self.graphs[name]

        new_args, new_kwargs = torch.fx.map_arg((node.args, node.kwargs), proxies)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        versions = [_versions(operand) for operand in operands]
        with outside_of_trace():
            result = getattr(super(), node.op)(node.target, args, kwargs)
            made = tracer.create_proxy(node.op, node.target, new_args, new_kwargs, name=node.name)
            track(result, made, tracer)
        made.node.meta["kept"] = _effects(node, operands, versions, result)
        return result


#: Numbers that the trace may know by name.
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _effects(node: Node, operands: Sequence[Any], versions: Sequence[list[int]], result: Any) -> Kept:
    """What a kept node has written into, and what it returned a view of, as its run on fakes showed."""
    if is_higher_order(node.target):
        # What its graphs, or its kernel, do is not looked at. Dynamo lets none of them return what it took.
        may_write = node.target is not FLEX_ATTENTION
        written = {i for i, operand in enumerate(operands) if may_write and isinstance(operand, Tensor)}
        return Kept(frozenset(written), frozenset())
    shown: set[int] = set().union(*map(_storages, tree_leaves(result)))
    return Kept(
        frozenset(i for i, operand in enumerate(operands) if _versions(operand) != versions[i]),
        frozenset(i for i, operand in enumerate(operands) if _storages(operand) & shown),
    )


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with memory of their own that ``value`` is made of."""
    if not isinstance(value, Tensor):
        return
    if is_foreign(value):
        for inner in inner_tensors(value).values():
            yield from _plain_tensors(inner)
    elif (level_below := tensor_of_level(value)) is not None:
        yield from _plain_tensors(level_below)
    else:
        yield value


def _versions(value: Any) -> list[int]:
    return [version_of(tensor) for tensor in _plain_tensors(value)]


def _storages(value: Any) -> set[int]:
    return {storage_of(tensor) for tensor in _plain_tensors(value)}
