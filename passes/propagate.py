"""Carry the int8 parts of storage through every write and every move of rows.

::

    # before                                        # after
    keys = dequantize_per_head(qdata, scale)
    new = index_copy_(keys, 2, position, states)    states_qdata, states_scale = quantize_per_head(states)
                                                    new_qdata = index_copy_(qdata, 2, position, states_qdata)
                                                    new_scale = index_copy_(scale, 2, position, states_scale)
    window = slice(new, 2, 0, 16)                   window_qdata = slice(new_qdata, 2, 0, 16)
                                                    window_scale = slice(new_scale, 2, 0, 16)
    other = mul(window, 3)                          window = dequantize_per_head(window_qdata, window_scale)
                                                    other = mul(window, 3)
    return (new,)                                   return (new_qdata, new_scale)

What an operation does to the parts is `icw_compile.formats.rows.RULES`. An operation without a rule gets the
dequantized value, taken right where it is used, so that it sees every write before it. Order and aliasing of writes are
preserved.
"""

from typing import Any

import torch
from torch.fx import Node

from icw_compile.formats.rows import RULES, Quantized, dequantize, quantize_like
from icw_compile.passes.graph import SITE, KVGraph, Output, Site, aliases, is_mutation

__all__ = ["propagate"]

aten = torch.ops.aten


def propagate(graph: KVGraph) -> int:
    """Run the pass; returns the number of operations that now act on parts."""
    values: dict[Node, tuple[Quantized, Site]] = {}
    values.update(graph.storage)
    graph.storage = {}

    for node in list(graph.graph.nodes):
        operands = [n for n in node.all_input_nodes if n in values]
        if not operands or node in values:
            continue
        site = values[operands[0]][1]
        if node.op == "output":
            _return_parts(graph, node, values)
        elif (result := _apply_rule(graph, node, values)) is not None:
            values[node] = (result, site)
            if is_mutation(node) or node.target in (aten.cat.default, aten.roll.default):
                _note(site.writes, node)
        elif is_mutation(node) and node.args[0] in operands:
            values[node] = values[node.args[0]]
            _write_back(graph, node, values)
            _note(site.writes, node)
        else:
            if node.args and node.args[0] in operands:
                _refuse_writes_through(node, site)
            _give_values(graph, node, values)

    for node in reversed(values):
        if not node.users:  # the in-place operations of `_write_back` stay
            graph.graph.erase_node(node)
    return len(values)


def _apply_rule(graph: KVGraph, node: Node, values: dict[Node, tuple[Quantized, Site]]) -> Quantized | None:
    rule = RULES.get(node.target)
    if rule is None:
        return None
    with graph.before(node):
        return rule(graph, *_with_parts(node.args, values), **_with_parts(node.kwargs, values))


def _with_parts(value: Any, values: dict[Node, tuple[Quantized, Site]]) -> Any:
    if isinstance(value, Node):
        return values[value][0] if value in values else value
    if isinstance(value, (list, tuple)):
        return type(value)(_with_parts(v, values) for v in value)
    if isinstance(value, dict):
        return {name: _with_parts(v, values) for name, v in value.items()}
    return value


def _give_values(graph: KVGraph, node: Node, values: dict[Node, tuple[Quantized, Site]]) -> None:
    """Hand ``node`` the dequantized value of each operand that is quantized."""
    for operand in node.all_input_nodes:
        if operand in values:
            parts, site = values[operand]
            with graph.before(node):
                value = dequantize(graph, parts)
            value.meta[SITE] = site
            node.replace_input_with(operand, value)


def _write_back(graph: KVGraph, node: Node, values: dict[Node, tuple[Quantized, Site]]) -> None:
    """An in-place operation without a rule: run it on the values, quantize what came out into the same storage."""
    parts = values[node.args[0]][0]
    _give_values(graph, node, values)
    with graph.before(node.next):
        for part, written in zip(parts.rows, quantize_like(graph, node, parts).rows, strict=True):
            graph.call(aten.copy_.default, part, written)
        if parts.exact is not None:  # none of them is known to be as it was
            graph.call(aten.fill_.Scalar, parts.position, -1)


def _refuse_writes_through(node: Node, site: Site) -> None:
    """A view that cuts through head_dim becomes a copy: a write into it would be lost."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(a.alias_info is not None for a in schema.arguments[:1]):
        return
    for view in aliases(node):
        if is_mutation(view):
            raise NotImplementedError(
                f"icw_int8kv: `{view.format_node()}` writes into part of a head of {site.name} through "
                f"`{node.target}`; a quantized cache is written in whole rows of head_dim."
            )


def _return_parts(graph: KVGraph, node: Node, values: dict[Node, tuple[Quantized, Site]]) -> None:
    """Return the parts of a quantized output, one after the other, and say so in ``graph.outputs``."""
    returned: list[Any] = []
    outputs = []
    appended = {taken.parts: name for name, taken in graph.inputs.items() if taken.spare}
    for value in graph.output_nodes:
        if value in values:
            parts = values[value][0]
            if (source := appended.get(tuple(part.name for part in parts.parts.values()))) is not None:
                outputs.append(Output(input=source))
                continue
            positions = range(len(returned), len(returned) + len(parts.parts))
            outputs.append(Output(quantized=parts.of_parts(positions)))
            returned += parts.parts.values()
        else:
            outputs.append(Output(len(returned)))
            returned.append(value)
    node.args = (tuple(returned),)
    graph.outputs = outputs


def _note(forms: list[str], node: Node) -> None:
    name = node.target._schema.name.removeprefix("aten::")
    if name not in forms:
        forms.append(name)
