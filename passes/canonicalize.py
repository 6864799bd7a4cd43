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
    b = slice(repeat_kv(a), 2, 0, 9)           b = repeat_interleave(slice(a, 2, 0, 9), groups, 1)

What else has another spelling is the caller's to say: ``graph.idioms`` are asked first, about every operation.

A view or a copy is what tracing found, for the shapes and dtypes that the graph is guarded on: schemas then say the
truth. Values stay as they are.
"""

import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import statically_known_true, storage_of
from icw_compile.passes.attention import strip_repeat_kv
from icw_compile.passes.graph import KVGraph
from icw_compile.passes.nodes import args_of, arguments, first_write, root_of

__all__ = ["canonicalize"]

aten = torch.ops.aten

_RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.ravel.default, aten.reshape_as.default)
#: What may give what it was given, or a view of it, and may copy.
_MAY_COPY = frozenset(
    (
        *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default),
        *(aten.contiguous.default, *_RESHAPES),
    )
)


def canonicalize(graph: KVGraph) -> int:
    """Run the pass; returns the number of operations that were replaced."""
    replaced = 0
    for node in list(graph.graph.nodes):
        if (by := _canonical(graph, node)) is not None:
            if by not in node.all_input_nodes:
                by.meta["val"] = node.meta["val"]  # the memory of which later views were found to be
            node.replace_all_uses_with(by)
            graph.graph.erase_node(node)
            replaced += 1
    return replaced


def _canonical(graph: KVGraph, node: Node) -> Node | None:
    """What stands for ``node``, or ``None`` if it stays."""
    if node.op != "call_function":
        return None
    for idiom in graph.idioms:
        if (by := idiom(graph, node)) is not None:
            return _checked(node, by, idiom)
    if node.target is aten.einsum.default:
        return _product(graph, node)
    if node.target is aten.slice.Tensor:
        return _repeated_slice(graph, node)
    if node.target not in _MAY_COPY or "kept" in node.meta:
        return None
    source: Node = args_of(node)[0]
    if storage_of(source.meta["val"]) != storage_of(node.meta["val"]):
        return _copy(graph, node)
    return source if _same_layout(source.meta["val"], node.meta["val"]) else None


def _checked(node: Node, by: Node, idiom: Callable[[KVGraph, Node], Node | None]) -> Node:
    """What a rule of the caller's gave, if it can stand for ``node``."""
    was, made = node.meta["val"], by.meta["val"]
    if _kind(was) != _kind(made) or not all(map(statically_known_true, map(operator.eq, was.shape, made.shape))):
        name = getattr(idiom, "__name__", str(idiom))
        raise ValueError(f"{name} puts {made} in the place of `{node}`, which is {was}: it takes its dtype and shape")
    return by


def _kind(value: Any) -> tuple[Any, ...]:
    return (value.dtype, value.dim()) if isinstance(value, torch.Tensor) else (type(value),)


def _product(graph: KVGraph, node: Node) -> Node | None:
    """The matrix product that an ``einsum`` of two four-dimensional tensors is, over their last two dimensions."""
    equation, operands = args_of(node)[0].replace(" ", ""), args_of(node)[1]
    terms = equation.replace("->", ",").split(",")
    if (
        len(operands) != 2
        or len(terms) != 3
        or any(not len(term) == len(set(term)) == 4 or "." in term for term in terms)
    ):
        return None
    first, second, result = terms
    batch, row, summed = first[:2], first[2], first[3]
    column = result[3]
    if result != batch + row + column or column in first:
        return None
    if second not in (batch + column + summed, batch + summed + column):
        return None
    left, right = operands
    sizes = [graph.tensor(x).shape[term.index(summed)] for x, term in ((left, first), (right, second))]
    if not statically_known_true(sizes[0] == sizes[1]):
        return None  # one of them is broadcast
    with graph.before(node):
        if second.endswith(summed):
            right = graph.call(aten.transpose.int, right, -1, -2)
        product: Node = graph.call(aten.matmul.default, left, right)
    return product


def _repeated_slice(graph: KVGraph, node: Node) -> Node | None:
    """Some tokens of repeated heads, as the repeated heads of some tokens: attention then finds them so."""
    a = arguments(node)
    repeated = a["self"]
    heads = strip_repeat_kv(repeated)
    if heads is repeated or a["dim"] not in (2, -2):
        return None
    sizes = [graph.tensor(each).shape[1] for each in (repeated, heads)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    first = repeated  # of all that it is made by
    while args_of(first)[0] is not heads:
        first = args_of(first)[0]
    # The heads are a copy: it is written by nothing, and what it is of is the same still.
    if first_write({root_of(repeated)}, first) or first_write({root_of(heads)}, first, node):
        return None
    with graph.before(node):
        tokens = graph.call(aten.slice.Tensor, heads, a["dim"], a["start"], a["end"], a["step"])
        repeats: Node = graph.call(aten.repeat_interleave.self_int, tokens, sizes[0] // sizes[1], 1)
        return repeats


def _copy(graph: KVGraph, node: Node) -> Node:
    source, result = args_of(node)[0], node.meta["val"]
    with graph.before(node):
        if node.target is aten.contiguous.default:
            return graph.call(aten.clone.default, source, memory_format=torch.contiguous_format)
        if node.target in _RESHAPES:
            copied = graph.call(aten.clone.default, source, memory_format=torch.contiguous_format)
            with graph.fake_mode or nullcontext():
                copied.meta["val"] = result.view(source.meta["val"].shape)
            return graph.call(node.target, copied, *args_of(node)[1:], **node.kwargs)
        return graph.call(aten._to_copy.default, source, dtype=result.dtype, device=result.device)


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether these, of one storage, are the same view of it."""
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    pairs = zip((*a.shape, *a.stride(), a.storage_offset()), (*b.shape, *b.stride(), b.storage_offset()), strict=True)
    return all(statically_known_true(x == y) for x, y in pairs)
