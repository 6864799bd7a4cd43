"""What may be a view or a copy becomes the one that it is: later passes, and schemas, then say the truth.

::

    before                                     after
    b = to(a, float32)         # a is float32  (a in its place)
    b = type_as(a, like)       # of its dtype  (a in its place)
    b = to(a, float64)                         b = _to_copy(a, dtype=float64)
    b = contiguous(a)          # a has gaps    b = clone(a, memory_format=contiguous_format)
    b = reshape(a, [...])      # a has gaps    c = clone(a, memory_format=contiguous_format); b = reshape(c, [...])

Which it is, is what tracing found, for the shapes and dtypes that the graph is guarded on. Values stay as they are.
"""

from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import statically_known_true, storage_of
from icw_compile.passes.graph import KVGraph

__all__ = ["canonicalize"]

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default)
_RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.ravel.default, aten.reshape_as.default)


def canonicalize(graph: KVGraph) -> int:
    """Run the pass; returns the number of operations that were replaced."""
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.target not in (*_CASTS, *_RESHAPES, aten.contiguous.default) or "kept" in node.meta:
            continue
        source, result = node.args[0].meta["val"], node.meta["val"]
        if storage_of(source) != storage_of(result):
            copy = _copy(graph, node)
        elif _same_layout(source, result):
            copy = node.args[0]
        else:
            continue
        if copy is not None:
            node.replace_all_uses_with(copy)
            graph.graph.erase_node(node)
            replaced += 1
    return replaced


def _copy(graph: KVGraph, node: Node) -> Any:
    source, result = node.args[0], node.meta["val"]
    with graph.before(node):
        if node.target is aten.contiguous.default:
            return graph.call(aten.clone.default, source, memory_format=torch.contiguous_format)
        if node.target in _RESHAPES:
            copied = graph.call(aten.clone.default, source, memory_format=torch.contiguous_format)
            return graph.call(node.target, copied, *node.args[1:], **node.kwargs)
        return graph.call(aten._to_copy.default, source, dtype=result.dtype, device=result.device)


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether these, of one storage, are the same view of it."""
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    pairs = zip((*a.shape, *a.stride(), a.storage_offset()), (*b.shape, *b.stride(), b.storage_offset()), strict=True)
    return all(statically_known_true(x == y) for x, y in pairs)
