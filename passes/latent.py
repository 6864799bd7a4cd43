"""Let decode steps of latent attention (MLA) read the latents, and not keys and values that are expanded from them.

::

    # before: of all cached tokens, at each step        # after, for a few query tokens
    expanded = linear(latents, weight)                  of_keys, of_values = parts of weight
    nope, values = split(expanded)                      query = nope_query @ of_keys
    keys = cat([nope, positions of every head])         bias = scale * rotary_query @ positions^T
    output = attention(query, keys, values, mask)       output = attention(query, latents, latents, mask + bias)
                                                        output = output @ of_values^T

A model of this kind caches, of each token, one vector from which the keys and values of all heads are made, and one
with the position, which all heads share. What is made of all of them for one query takes most of the time of a step;
since it is linear, the query and the output go through the weight instead, and attention reads what is cached as
multi-query attention does, keys and values in one. The same function up to the order of floating-point operations.
A prompt, of which each token is read by many, stays as it is.

Every latent attention is recorded in ``graph.latents``, for ``storage`` to know what it reads.
"""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import eliminate_dead_code, is_wrapper_subclass, statically_known_true, true_here
from icw_compile.formats.moves import END
from icw_compile.kernels.interface import FEW_TOKENS
from icw_compile.passes.attention import Attention, Bias, match_attention
from icw_compile.passes.graph import KVGraph, Latent
from icw_compile.passes.nodes import aliases, args_of, arguments, first_write, is_mutation, root_of
from icw_compile.passes.reads import changes_meanwhile, in_layout_of, one_mask

__all__ = ["absorb"]

aten = torch.ops.aten

#: What keys and values are made by, of latents: with quantized weights, what Dynamo calls `linear` stays so.
_PROJECTIONS = (aten.linear.default, torch.nn.functional.linear)
_MAKING = (
    *(*_PROJECTIONS, aten.add.Tensor, aten.mul.Tensor, aten.dropout.default),
    *(aten.to.dtype, aten._to_copy.default),
)
_EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default, aten.new_zeros.default)


def absorb(graph: KVGraph) -> int:
    """Run the pass; returns the number of attentions over latents."""
    keys: list[Node] = []
    for node in list(graph.graph.nodes):
        attention = match_attention(node)
        expanded = None if attention is None else _match(attention)
        if attention is None or expanded is None:
            continue
        if _can_absorb(attention, expanded):
            _absorb(graph, attention, expanded)
            keys += [expanded.key] if expanded.key.target in _EMPTY else []
        else:
            graph.latents[node] = Latent(expanded.latents, expanded.positions, expanded.readers, is_absorbed=False)
    if keys:
        eliminate_dead_code(graph.graph, keep_random=False, keep=lambda node: "kept" in node.meta)
    for key in dict.fromkeys(keys):
        _erase_unread(graph, key)
    return len(graph.latents)


@dataclass(frozen=True)
class _Expanded:
    """Keys and values that are made of ``latents`` ``[B, 1, S, R]`` and ``positions`` ``[B, 1, S, P]``.

    ``weight`` is ``[heads * (nope + values), R]``: of each head, the channels of its keys but for the last ``P``, and
    those of its values; ``None`` if they are made by more than a weight. Attention reads the ``rows``, a slice, of
    what is ``made``, or all. ``readers`` are the operations that read the two, and ``key`` is the node of the keys.
    """

    latents: Node
    positions: Node
    weight: Node | None
    heads: int
    nope: int
    rows: tuple[Any, ...]
    readers: tuple[Node, ...]
    made: Node
    key: Node


def _match(attention: Attention) -> _Expanded | None:
    """What keys and values are expanded from, if they are."""
    (key, rows), (value, rows_of_values) = map(_whole, (attention.key, attention.value))
    if attention.merged or rows != rows_of_values or (parts := _parts_of(key)) is None:
        return None
    nope, rotary, placed = parts
    if max(placed) > attention.node:
        return None
    if not (_is_piece(nope, 0) and _is_piece(value, 1)) or args_of(nope)[0] is not args_of(value)[0]:
        return None
    states, sizes, dim = (*args_of(args_of(nope)[0]), 0)[:3]
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes) or dim not in (-1, 3):
        return None
    if states.target is not aten.transpose.int:
        return None
    viewed, *swapped = args_of(states)
    if {each % 4 for each in swapped} != {1, 2} or viewed.target not in (aten.view.default, aten.reshape.default):
        return None
    made = args_of(viewed)[0]
    source = _source(made)
    if source is None or rotary.target is not aten.expand.default:
        return None
    (latents, readers), positions = source, args_of(rotary)[0]
    if not all(_is_latent(each.meta.get("val")) for each in (latents, positions)):
        return None
    is_one = made.target is aten.linear.default and args_of(made)[0] is latents and len(args_of(made)) == 2
    weight = args_of(made)[1] if is_one and not made.kwargs else None
    heads = states.meta["val"].shape[1]
    batch, _, length, _ = latents.meta["val"].shape
    shapes = states.meta["val"].shape, (batch, heads, length, sum(sizes))
    if not isinstance(heads, int) or not all(map(statically_known_true, map(operator.eq, *shapes))):
        return None
    return _Expanded(latents, positions, weight, heads, sizes[0], rows, (*readers, *placed), made, key)


def _source(node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """What ``node`` is made of by a projection, to which others may be added (LoRA), and what reads that on the way.

    ``None`` if it is made of several, or by no projection.
    """
    pending, seen = [node], {node}
    sources: set[Node] = set()
    readers: list[Node] = []
    while pending and len(sources) < 2:
        each = pending.pop()
        if each.target not in _MAKING:
            return None
        for operand in each.all_input_nodes[: 1 if each.target in _PROJECTIONS else None]:
            if operand.target not in _MAKING:
                sources.add(operand)
                readers.append(each)
            elif operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return (sources.pop(), tuple(readers)) if len(sources) == 1 else None


def _whole(node: Node) -> tuple[Node, tuple[Any, ...]]:
    """Keys or values, and which of their tokens ``node`` is: the start, end and step of a slice, or nothing."""
    if node.target is not aten.slice.Tensor or (a := arguments(node))["dim"] not in (2, -2):
        return node, ()
    return a["self"], (a["start"], a["end"], a["step"])


def _is_latent(value: Any) -> bool:
    """Whether it is of one head, ``[B, 1, S, channels]``."""
    return isinstance(value, torch.Tensor) and value.dim() == 4 and statically_known_true(value.shape[1] == 1)


def _is_piece(node: Node, index: int) -> bool:
    """Whether it is that one of what a split gives."""
    args = args_of(node)
    return len(args) == 2 and args[1] == index and getattr(args[0], "target", None) is aten.split_with_sizes.default


def _parts_of(key: Node) -> tuple[Node, Node, tuple[Node, ...]] | None:
    """The two that lie side by side in the keys' channels, and what puts them there."""
    if key.target is aten.cat.default:
        parts, dim = (*args_of(key), 0)[:2]
        return (parts[0], parts[1], (key,)) if len(parts) == 2 and dim in (-1, 3) else None
    if key.target not in _EMPTY:
        return None
    placed = []
    for copy in filter(is_mutation, aliases(key)):
        if copy.target is not aten.copy_.default or (view := args_of(copy)[0]).target is not aten.slice.Tensor:
            return None
        a = arguments(view)
        if a["self"] is not key or a["dim"] not in (-1, 3) or a["step"] != 1 or isinstance(a["start"], Node):
            return None
        placed.append((a["start"] or 0, view.meta["val"].shape[3], copy))
    placed.sort(key=lambda each: each[0])
    if len(placed) != 2 or placed[0][0] != 0 or placed[1][0] != placed[0][1]:
        return None
    if sum(size for _, size, _ in placed) != key.meta["val"].shape[3]:
        return None
    first, second = (copy for *_, copy in placed)
    return args_of(first)[1], args_of(second)[1], (first, second)


def _can_absorb(attention: Attention, found: _Expanded) -> bool:
    """Whether it is a decode step whose query can go through the weight."""
    query, weight = attention.query.meta["val"], found.weight
    if weight is None or is_wrapper_subclass(weight.meta["val"]) or not true_here(query.shape[2] <= FEW_TOKENS):
        return False
    if statically_known_true(query.shape[2] == 0):
        return False
    if attention.is_causal or attention.softcap is not None or attention.sinks is not None:
        return False
    if any(each.meta["val"].dtype != query.dtype for each in (found.key, found.latents, found.positions, weight)):
        return False
    (batch, one, length, _), positions = (each.meta["val"].shape for each in (found.latents, found.positions))
    rotary = found.key.meta["val"].shape[3] - found.nope
    shapes = (*query.shape[:2], *positions), (batch, found.heads, batch, one, length, rotary)
    if not all(map(statically_known_true, map(operator.eq, *shapes))):  # something is broadcast
        return False
    if torch.float64 in (query.dtype, *(bias.node.meta["val"].dtype for bias in attention.biases)):
        return False
    if changes_meanwhile(attention):
        return False
    roots = {root_of(each) for each in (found.latents, found.positions, found.made, found.key, weight)}
    written = first_write(roots, min(found.readers), attention.node)
    while written in found.readers:
        written = first_write(roots, written.next, attention.node)
    return written is None


def _absorb(graph: KVGraph, attention: Attention, found: _Expanded) -> None:
    node, query, heads = attention.node, attention.query, found.heads
    with graph.before(node):
        tokens = graph.size(query, 2)
        rank = graph.size(found.latents, 3)
        latents, positions = (
            graph.call(aten.slice.Tensor, each, 2, *found.rows) if found.rows else each
            for each in (found.latents, found.positions)
        )
        weight = graph.call(aten.reshape.default, found.weight, [heads, -1, rank])
        of_keys = graph.call(aten.slice.Tensor, weight, 1, 0, found.nope)
        of_values = graph.call(aten.slice.Tensor, weight, 1, found.nope, END)
        nope = graph.call(aten.slice.Tensor, query, 3, 0, found.nope)
        inner = _each_head(graph, nope, of_keys, tokens)
        scores, readers = _scores_of_positions(graph, attention, found, positions)
        biases = tuple(
            # What a mask of torch's own takes out is taken out of a sum by minus infinity.
            bias._replace(filler=-torch.inf, fills=False) if _is_mask(bias) else bias
            for bias in attention.biases
        )
        mask = one_mask(graph, replace(attention, biases=(*biases, Bias(scores, attention.scale))), heads)
        arguments_ = (inner, latents, latents, mask, 0.0, False)
        output = graph.call(
            aten.scaled_dot_product_attention.default, *arguments_, scale=attention.scale, enable_gqa=True
        )
        made = _each_head(graph, output, graph.call(aten.transpose.int, of_values, 1, 2), tokens)
        dtype = node.meta["val"].dtype
        if graph.tensor(made).dtype != dtype:
            made = graph.call(aten.to.dtype, made, dtype)
        node.replace_all_uses_with(in_layout_of(graph, node, made))
    graph.latents[output] = Latent(found.latents, found.positions, readers, is_absorbed=True)
    graph.graph.erase_node(node)


def _is_mask(bias: Bias) -> bool:
    return bias.filler is None and bias.node.meta["val"].dtype == torch.bool


def _each_head(graph: KVGraph, states: Node, weight: Node, tokens: Any) -> Node:
    """``states`` ``[B, H, T, N]`` through ``weight`` ``[H, N, M]``: each head through its own, ``[B, H, T, M]``.

    A row is summed in float32, which a compiler fuses into reading the weight once. More are a product of all
    sequences of a head at once, for the same reason.
    """
    shape = graph.tensor(states).shape
    if statically_known_true(shape[0] * shape[2] == 1):
        row, wide = (graph.call(aten.to.dtype, each, torch.float32) for each in (states, weight))
        column = graph.call(aten.transpose.int, row, 2, 3)
        total = graph.call(aten.sum.dim_IntList, graph.call(aten.mul.Tensor, column, wide), [2], True)
        made: Node = graph.call(aten.to.dtype, total, graph.tensor(states).dtype)
        return made
    rows = graph.call(aten.flatten.using_ints, graph.call(aten.transpose.int, states, 0, 1), 1, 2)
    product = graph.call(aten.bmm.default, rows, weight)
    swapped = graph.call(aten.transpose.int, graph.call(aten.unflatten.int, product, 1, [-1, tokens]), 0, 1)
    made = graph.call(aten.clone.default, swapped, memory_format=torch.contiguous_format)
    return made


def _scores_of_positions(
    graph: KVGraph, attention: Attention, found: _Expanded, positions: Node
) -> tuple[Node, tuple[Node, ...]]:
    """Rotary queries times the positions, float32 ``[B, H, T, S]`` and without the scale, and what reads the positions.

    In float32, for it is added to scores that are.
    """
    query = graph.call(aten.slice.Tensor, attention.query, 3, found.nope, END)
    rows = graph.call(aten.flatten.using_ints, graph.call(aten.to.dtype, query, torch.float32), 1, 2)
    read = graph.call(aten.to.dtype, positions, torch.float32)
    columns = graph.call(aten.transpose.int, graph.call(aten.squeeze.dim, read, 1), 1, 2)
    product = graph.call(aten.bmm.default, rows, columns)
    return graph.call(aten.unflatten.int, product, 1, [found.heads, -1]), (read, columns)


def _erase_unread(graph: KVGraph, key: Node) -> None:
    """Erase keys that are written, and that nothing reads any more."""
    inside = set(aliases(key))
    if all(user in inside for each in inside for user in each.users):
        for each in sorted(inside, reverse=True):
            graph.graph.erase_node(each)
