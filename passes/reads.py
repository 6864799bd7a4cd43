"""Make attention read the int8 parts.

::

    # before                                                  # after
    keys = dequantize_per_head(key_qdata, key_scale)          output = attention(query, key_qdata, key_scale,
    values = dequantize_per_head(value_qdata, value_scale)                       value_qdata, value_scale, mask, ...)
    output = scaled_dot_product_attention(query, keys, values, mask)

The attention may be fused or spelled out (`icw_compile.passes.attention`). ``repeat_kv`` in front of it, which
``propagate`` has carried to the parts, is dropped: ``icw_int8kv::attention`` shares a head among its group. The result
is the same up to the order of floating-point operations.
"""

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from icw_compile.passes.attention import match_attention, strip_repeat_kv
from icw_compile.passes.graph import SITE, KVGraph, is_mutation

__all__ = ["fuse_reads"]

aten = torch.ops.aten
_dequantize = torch.ops.icw_int8kv.dequantize_per_head.default


def fuse_reads(graph: KVGraph) -> int:
    """Run the pass; returns the number of attentions that read int8."""
    matches = 0
    for node in list(graph.graph.nodes):
        found = match_attention(node)
        if found is None or found.key.target is not _dequantize or found.value.target is not _dequantize:
            continue
        repeated = [*found.key.args[:2], *found.value.args[:2]]
        parts = [strip_repeat_kv(part) for part in repeated]
        if any(copy is not part and _written_between(part, copy, node) for part, copy in zip(parts, repeated)):
            continue
        form = found.form + (" + repeat_kv" if parts[0] is not repeated[0] else "")
        with graph.before(node):
            fused = graph.call(
                torch.ops.icw_int8kv.attention.default,
                found.query,
                *parts,
                found.attn_mask,
                found.is_causal,
                found.scale,
                found.softcap,
            )
        fused.meta[SITE] = tuple(operand.meta[SITE] for operand in (found.key, found.value))
        for site in fused.meta[SITE]:
            site.reads.append(form)
        node.replace_all_uses_with(_in_layout_of(graph, node, fused))
        matches += 1
    return matches


def _in_layout_of(graph: KVGraph, node: Node, fused: Node) -> Node:
    """``fused`` in the memory layout that ``node`` has where the two can differ: ``[B, T, heads, size]``.

    torch's kernels return their heads behind the tokens, and what was captured after them may ``view`` that.
    """
    expected, given = node.meta["val"], fused.meta["val"]
    if statically_known_true(given.shape[2] == 1) or not expected.transpose(1, 2).is_contiguous():
        return fused
    with graph.before(node):
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
