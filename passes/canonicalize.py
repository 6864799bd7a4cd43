"""One spelling of what has several; what may be a view or a copy becomes the one that it is.

::

    before                                     after
    b = to(a, float32)         # a is float32  (a in its place)
    b = type_as(a, like)       # of its dtype  (a in its place)
    b = to(a, float64)                         b = _to_copy(a, dtype=float64)
    b = contiguous(a)          # a has gaps    b = clone(a, memory_format=contiguous_format)
    b = reshape(a, [...])      # a has gaps    c = clone(a, memory_format=contiguous_format); b = reshape(c, [...])
    s = einsum("bhtd,bhsd->bhts", [q, k])      t = transpose(k, -1, -2); s = matmul(q, t)
    o = einsum("bhts,bhsd->bhtd", [w, v])      o = matmul(w, v)

A view or a copy is what tracing found, for the shapes and dtypes that the graph is guarded on: schemas then say the
truth. Values stay as they are.
"""

import torch
from torch.fx import Node

from icw_compile.compat.fx import statically_known_true, storage_of
from icw_compile.passes.graph import KVGraph, args_of

__all__ = ["canonicalize"]

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default)
_RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.ravel.default, aten.reshape_as.default)


def canonicalize(graph: KVGraph) -> int:
    """Run the pass; returns the number of operations that were replaced."""
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.target is aten.einsum.default and (product := _product(graph, node)) is not None:
            _replace(graph, node, product)
            replaced += 1
        if node.target not in (*_CASTS, *_RESHAPES, aten.contiguous.default) or "kept" in node.meta:
            continue
        source, result = args_of(node)[0].meta["val"], node.meta["val"]
        if storage_of(source) != storage_of(result):
            copy = _copy(graph, node)
        elif _same_layout(source, result):
            copy = args_of(node)[0]
        else:
            continue
        _replace(graph, node, copy)
        replaced += 1
    return replaced


def _replace(graph: KVGraph, node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    graph.graph.erase_node(node)


def _product(graph: KVGraph, node: Node) -> Node | None:
    """The matrix product that an ``einsum`` of two four-dimensional tensors is, over their last two dimensions."""
    equation, operands = args_of(node)[0].replace(" ", ""), args_of(node)[1]
    terms = equation.replace("->", ",").split(",")
    if len(operands) != 2 or len(terms) != 3 or any(len(set(term)) != 4 or "." in term for term in terms):
        return None
    first, second, result = terms
    batch, row, summed = first[:2], first[2], first[3]
    column = result[3]
    if result != batch + row + column or column in first:
        return None
    if second not in (batch + column + summed, batch + summed + column):
        return None
    left, right = operands
    with graph.before(node):
        if second.endswith(summed):
            right = graph.call(aten.transpose.int, right, -1, -2)
        product: Node = graph.call(aten.matmul.default, left, right)
    return product


def _copy(graph: KVGraph, node: Node) -> Node:
    source, result = args_of(node)[0], node.meta["val"]
    with graph.before(node):
        if node.target is aten.contiguous.default:
            return graph.call(aten.clone.default, source, memory_format=torch.contiguous_format)
        if node.target in _RESHAPES:
            copied = graph.call(aten.clone.default, source, memory_format=torch.contiguous_format)
            return graph.call(node.target, copied, *args_of(node)[1:], **node.kwargs)
        return graph.call(aten._to_copy.default, source, dtype=result.dtype, device=result.device)


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether these, of one storage, are the same view of it."""
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    pairs = zip((*a.shape, *a.stride(), a.storage_offset()), (*b.shape, *b.stride(), b.storage_offset()), strict=True)
    return all(statically_known_true(x == y) for x, y in pairs)
