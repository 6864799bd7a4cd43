"""Make every attention over a stored cache one operation.

::

    # before                                                  # after
    keys = dequantize_per_head(key_qdata, key_scale)          keys = dequantize_per_head(key_qdata, key_scale)
    values = dequantize_per_head(value_qdata, value_scale)    values = dequantize_per_head(value_qdata, value_scale)
    output = scaled_dot_product_attention(                    output = attention(query, keys, values, mask, ...)
        query, repeat_kv(keys), repeat_kv(values), mask)

The attention may be fused or spelled out (`icw_compile.passes.attention`). ``repeat_kv`` in front of it, which
``propagate`` has carried to the parts, is dropped: ``icw_int8kv::attention`` shares a head among its group. All masks
and biases become one tensor. The result is the same up to the order of floating-point operations. A read is never moved
past a write. What is stored, and how an attention reads it, is none of its business: that is ``lower``'s.
"""

from functools import partial

import torch
from torch.fx import Node

from icw_compile.compat.fx import statically_known_true, true_here
from icw_compile.passes.attention import (
    Attention,
    match_attention,
    repeats_heads,
    strip_casts,
    strip_merge,
    strip_repeat_kv,
)
from icw_compile.passes.graph import FusedAttention, KVGraph, Storage
from icw_compile.passes.nodes import args_of, first_write, root_of

__all__ = ["changes_meanwhile", "fuse_reads", "in_layout_of", "one_mask"]

aten = torch.ops.aten
_ops = torch.ops.icw_int8kv


def fuse_reads(graph: KVGraph) -> int:
    """Run the pass; returns the number of attentions that are one operation now."""
    fused = 0
    for node in list(graph.graph.nodes):
        found = match_attention(node)
        if found is None or changes_meanwhile(found):
            continue
        operands = [strip_casts(operand) for operand in (found.key, found.value)]
        if all(operand in graph.came for operand in operands):
            fused += _share_heads(graph, found, operands)
            continue
        if any(operand not in graph.decoded for operand in operands):
            continue
        repeated = [graph.decoded[operand] for operand in operands]
        unrepeated = [_unrepeated(graph, each) for each in repeated]
        key, value = unrepeated
        if (
            key is None
            or value is None
            or not _fit(graph, key, value)
            or any(map(partial(_written_since, node), operands, repeated, (key, value)))
        ):
            continue
        heads = _heads(graph, repeated[0].stored.parts[0])
        if not _are_apart_as(heads, found):
            continue
        with graph.before(node):
            made, replacement = _fuse(graph, found, graph.decode(key), graph.decode(value), heads)
        form = found.form + (" + repeat_kv" if repeats_heads(repeated[0].stored.parts[0]) else "")
        form += ", latent" if node in graph.latents else ""
        for site in {id(each.site): each.site for each in repeated}.values():  # of latents it is one
            site.reads.append(form)
        node.replace_all_uses_with(replacement)
        graph.attentions.append(FusedAttention(made, key, value))
        fused += 1
    return fused


def _share_heads(graph: KVGraph, found: Attention, operands: list[Node]) -> bool:
    """Let the heads of keys and values as they came, if they were repeated, be shared by each group of query heads."""
    key, value = (strip_repeat_kv(strip_merge(operand)) for operand in operands)
    heads = [graph.tensor(each).shape[1] for each in (key, value) if graph.tensor(each).dim() == 4]
    if not any(map(repeats_heads, operands)) or len(heads) < 2 or not statically_known_true(heads[0] == heads[1]):
        return False
    for operand, each in zip(operands, (key, value), strict=True):
        first = operand
        while first is not each and args_of(first)[0] is not each:
            first = args_of(first)[0]
        if first_write({root_of(each), root_of(operand)}, first, found.node) is not None:
            return False
    shared = _heads(graph, operands[0])
    if not _are_apart_as(shared, found):
        return False
    with graph.before(found.node):
        replacement = _fuse(graph, found, key, value, shared)[1]
    found.node.replace_all_uses_with(replacement)
    return True


def _fit(graph: KVGraph, key: Storage, value: Storage) -> bool:
    """Whether both are stored with as many heads, as one may have been repeated in a way that is not recognised.

    And with as many tokens, which is not known of those that a mask picks.
    """
    heads, tokens = zip(*(graph.tensor(each.stored.parts[0]).shape[1:3] for each in (key, value)), strict=True)
    return statically_known_true(heads[0] == heads[1]) and not true_here(tokens[0] != tokens[1])


def _heads(graph: KVGraph, repeated: Node) -> int:
    """The heads of keys or values, or of a part of them, where they meet the query."""
    heads: int = graph.tensor(strip_merge(repeated)).shape[1]
    return heads


def _are_apart_as(heads: int, found: Attention) -> bool:
    """Whether merged scores, where they were taken apart, were so into these heads."""
    return found.apart is None or statically_known_true(found.apart[1] == heads)


def _unrepeated(graph: KVGraph, value: Storage) -> Storage | None:
    """What is stored of ``[B, H, S, D]`` keys or values, of which this is each head several times, and merged."""
    stored = value.stored
    specs = stored.format.parts
    parts = [
        strip_repeat_kv(strip_merge(part)) if spec.is_aligned else part
        for spec, part in zip(specs, stored.parts, strict=True)
    ]
    aligned = [graph.tensor(part) for spec, part in zip(specs, parts, strict=True) if spec.is_aligned]
    heads = aligned[0].shape[:2] if aligned[0].dim() == 4 else None
    if heads is None or any(each.dim() != 4 or each.shape[:2] != heads for each in aligned):
        return None
    return Storage(type(stored)(stored.format, tuple(parts)), value.site, value.grows)


def _fuse(graph: KVGraph, found: Attention, key: Node, value: Node, heads: int) -> tuple[Node, Node]:
    """``found`` in one operation, and that in the shape, the dtype and the memory layout of what it replaces."""
    query = found.query
    if found.merged:
        query = graph.call(aten.unflatten.int, query, 0, [-1, heads])
    sinks = () if found.sinks is None else (found.sinks,)
    mask = one_mask(graph, found, heads)
    operands = (query, key, value, mask)
    fused = graph.call(_ops.attention.default, *operands, found.is_causal, found.scale, found.softcap, *sinks)
    dtype = found.node.meta["val"].dtype
    result = fused if graph.tensor(fused).dtype == dtype else graph.call(aten.to.dtype, fused, dtype)
    if found.merged:
        return fused, graph.call(aten.flatten.using_ints, result, 0, 1)
    return fused, in_layout_of(graph, found.node, result)


def one_mask(graph: KVGraph, found: Attention, heads: int) -> Node | None:
    """All that is added to the scores, in one tensor of four dimensions."""
    total = None
    for bias in found.biases:
        node = bias.node
        value = graph.tensor(node)
        if not value.is_floating_point() and value.dtype != torch.bool:
            node = graph.call(aten.to.dtype, node, torch.float32)  # a table of relative positions
        if bias.filler is not None:
            filled = (bias.filler, 0.0) if bias.fills else (0.0, bias.filler)
            node = graph.call(aten.where.Scalar, node, *filled)
        elif bias.factor != 1.0:
            node = graph.call(aten.mul.Tensor, node, bias.factor)
        shape = graph.tensor(node).shape
        if found.merged and len(shape) == 3 and not statically_known_true(shape[0] == 1):
            node = graph.call(aten.unflatten.int, node, 0, [-1, heads])
        while graph.tensor(node).dim() < 4:
            node = graph.call(aten.unsqueeze.default, node, 0)
        total = node if total is None else graph.call(aten.add.Tensor, total, node)
    return total


def in_layout_of(graph: KVGraph, node: Node, fused: Node) -> Node:
    """``fused`` in the memory layout that ``node`` has where the two can differ: ``[B, T, heads, size]``.

    torch's kernels return their heads behind the tokens, and what was captured after them may ``view`` that.
    """
    expected, given = node.meta["val"], fused.meta["val"]
    if statically_known_true(given.shape[2] == 1) or not expected.transpose(1, 2).is_contiguous():
        return fused
    swapped = graph.call(aten.transpose.int, fused, 1, 2)
    return graph.call(aten.transpose.int, graph.call(aten.contiguous.default, swapped), 1, 2)


def _written_since(reader: Node, decoded: Node, repeated: Storage, unrepeated: Storage) -> bool:
    """Whether what is decoded, or a copy of it for each head, is written after it was made and before ``reader``."""
    parts = unrepeated.stored.parts
    roots = {root_of(part) for part in (*parts, *repeated.stored.parts)}
    node = decoded
    for part, copy in zip(parts, repeated.stored.parts, strict=True):
        while copy is not part:
            node, copy = min(node, copy), copy.args[0]
    return first_write(roots, node, reader) is not None


def changes_meanwhile(found: Attention) -> bool:
    """Whether something that the attention is made of is written before its end, where one operation would read it."""
    ends = {found.query, strip_casts(found.key), strip_casts(found.value), *(bias.node for bias in found.biases)}
    if found.sinks is not None:
        ends.add(found.sinks)
    inside, pending = {found.node}, [found.node]
    while pending:
        pending += (new := {each for each in pending.pop().all_input_nodes if each not in ends | inside})
        inside |= new
    made: list[Node] = []  # of the ends; the rest are numbers
    for node in sorted(inside):
        if not ends.isdisjoint(node.all_input_nodes):
            made.append(node)
            ends.add(node)
    return first_write({root_of(each) for each in ends}, made[0], found.node) is not None
