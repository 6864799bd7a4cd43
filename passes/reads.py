"""Make attention read the int8 parts.

::

    # before                                                  # after
    keys = dequantize_per_head(key_qdata, key_scale)          output = attention(query, key_qdata, key_scale,
    values = dequantize_per_head(value_qdata, value_scale)                       value_qdata, value_scale, mask, ...)
    output = scaled_dot_product_attention(query, keys, values, mask)

Where channels were shifted, the query is multiplied for the keys, and the output for the values. The attention may be
fused or spelled out (`icw_compile.passes.attention`). ``repeat_kv`` in front of it, which
``propagate`` has carried to the parts, is dropped: ``icw_int8kv::attention`` shares a head among its group. All masks
and biases become one tensor. The result is the same up to the order of floating-point operations.
"""

from collections.abc import Sequence

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from icw_compile.passes.attention import (
    Attention,
    Bias,
    match_attention,
    strip_casts,
    strip_merge,
    strip_repeat_kv,
)
from icw_compile.passes.graph import SITE, KVGraph, is_mutation

__all__ = ["fuse_reads"]

aten = torch.ops.aten
_ops = torch.ops.icw_int8kv
_dequantize = _ops.dequantize_per_head.default


def fuse_reads(graph: KVGraph) -> int:
    """Run the pass; returns the number of attentions that read int8."""
    matches = 0
    for node in list(graph.graph.nodes):
        found = match_attention(node)
        if found is None:
            continue
        stored = [strip_casts(operand) for operand in (found.key, found.value)]
        if any(operand.target is not _dequantize for operand in stored):
            continue
        repeated = [part for operand in stored for part in operand.args[:2]]
        shifts, exacts, positions = ([_argument(operand, i) for operand in stored] for i in (3, 4, 5))
        if (exacts[0] is None) != (exacts[1] is None):
            continue
        unmerged = [strip_merge(part) for part in repeated]
        parts = [strip_repeat_kv(part) for part in unmerged]
        if any(graph.tensor(part).dim() != 4 for part in parts):
            continue
        if any(copy is not part and _written_between(part, copy, node) for part, copy in zip(parts, repeated)):
            continue
        with graph.before(node):
            exact = _exact(graph, exacts, shifts, positions[0])
            fused = _fuse(graph, found, parts, shifts, exact, heads=graph.tensor(unmerged[0]).shape[1])
        form = found.form + (" + repeat_kv" if unmerged[0] is not parts[0] else "")
        for operand in stored:
            operand.meta[SITE].reads.append(form)
        node.replace_all_uses_with(fused)
        matches += 1
    return matches


def _argument(node: Node, position: int) -> Node | None:
    return node.args[position] if len(node.args) > position else None


def _exact(
    graph: KVGraph, exacts: Sequence[Node | None], shifts: Sequence[Node | None], position: Node | None
) -> tuple[Node, ...]:
    """The rows that keys and values keep as they came, in the terms of the int8 ones: with shifted channels."""
    if position is None:
        return ()
    rows = []
    for exact, shift in zip(exacts, shifts, strict=True):
        rows.append(_unrepeated(exact))
        if shift is not None:
            divided_by = graph.call(aten.neg.default, _unrepeated(shift))
            rows[-1] = graph.call(_ops.scale_channels.default, rows[-1], divided_by)
    return (*rows, position)


def _unrepeated(part: Node) -> Node:
    return strip_repeat_kv(strip_merge(part))


def _fuse(
    graph: KVGraph,
    found: Attention,
    parts: Sequence[Node],
    shifts: Sequence[Node | None],
    exact: Sequence[Node],
    heads: int,
) -> Node:
    """``found`` in one operation, in the shape, the dtype and the memory layout of what it replaces.

    ``heads`` are those of keys and values where they meet the query, and ``shifts`` their shifts there.
    """
    query = _unshifted(graph, found.query, shifts[0])
    if found.merged:
        query = graph.call(aten.unflatten.int, query, 0, [-1, heads])
    last = () if found.sinks is None and not exact else (found.sinks, *exact)
    mask = _one_mask(graph, found.biases, heads)
    fused = graph.call(_ops.attention.default, query, *parts, mask, found.is_causal, found.scale, found.softcap, *last)
    fused.meta[SITE] = tuple(strip_casts(operand).meta[SITE] for operand in (found.key, found.value))
    dtype = found.node.meta["val"].dtype
    result = fused if graph.tensor(fused).dtype == dtype else graph.call(aten.to.dtype, fused, dtype)
    if found.merged:
        return _unshifted(graph, graph.call(aten.flatten.using_ints, result, 0, 1), shifts[1])
    result = _unshifted(graph, result, shifts[1])
    return _in_layout_of(graph, found.node, result)


def _unshifted(graph: KVGraph, x: Node, shift: Node | None) -> Node:
    """``x``, a query or an output, with what the keys or values were divided by."""
    if shift is None:
        return x
    value = graph.tensor(x)
    groups = value.shape[1] // graph.tensor(shift).shape[1] if value.dim() == 4 else 1
    if groups > 1:
        shift = graph.call(aten.repeat_interleave.self_int, shift, groups, 1)
    return graph.call(_ops.scale_channels.default, x, shift)


def _one_mask(graph: KVGraph, biases: Sequence[Bias], heads: int) -> Node | None:
    """All that is added to the scores, in one tensor of four dimensions."""
    total = None
    for bias in biases:
        node = bias.node
        if bias.filler is not None:
            filled = (bias.filler, 0.0) if bias.fills else (0.0, bias.filler)
            node = graph.call(aten.where.Scalar, node, *filled)
        elif bias.factor != 1.0:
            node = graph.call(aten.mul.Tensor, node, bias.factor)
        if bias.merged:
            node = graph.call(aten.unflatten.int, node, 0, [-1, heads])
        while graph.tensor(node).dim() < 4:
            node = graph.call(aten.unsqueeze.default, node, 0)
        total = node if total is None else graph.call(aten.add.Tensor, total, node)
    return total


def _in_layout_of(graph: KVGraph, node: Node, fused: Node) -> Node:
    """``fused`` in the memory layout that ``node`` has where the two can differ: ``[B, T, heads, size]``.

    torch's kernels return their heads behind the tokens, and what was captured after them may ``view`` that.
    """
    expected, given = node.meta["val"], fused.meta["val"]
    if statically_known_true(given.shape[2] == 1) or not expected.transpose(1, 2).is_contiguous():
        return fused
    swapped = graph.call(aten.transpose.int, fused, 1, 2)
    return graph.call(aten.transpose.int, graph.call(aten.contiguous.default, swapped), 1, 2)


def _written_between(part: Node, copy: Node, reader: Node) -> bool:
    """Whether storage that ``part`` is a view of is written after ``copy`` was taken of it and before ``reader``."""
    root = _root(part)
    node = copy.next
    while node is not reader:
        if is_mutation(node) and _root(node.args[0]) is root:
            return True
        node = node.next
    return False


def _root(node: Node) -> Node:
    """What ``node`` is a view of, directly or through other views and in-place writes."""
    while isinstance(node.target, torch._ops.OpOverload) and node.target._schema.arguments:
        if node.target._schema.arguments[0].alias_info is None:
            break
        node = node.args[0]
    return node
