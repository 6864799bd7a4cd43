"""Let the attention of a prompt on the CPU look at its mask once, and read no more than that shows.

::

    # before                                         # after, on the CPU, for more query tokens than a few
    output = attention(query, keys, values, mask)    extent = mask_extent(mask)
    other = attention(query2, keys2, values2, mask)  output = prompt_attention(query, keys, values, mask, extent)
                                                     other = prompt_attention(query2, keys2, values2, mask, extent)

The result is the same up to the order of floating-point operations. It is for boolean masks, and for causal attention
without one, where nothing else is done to the scores; ``scaled_dot_product_attention`` over keys of a cache that are
read as they came, heads that are not shared, is taken as well (`icw_compile.kernels.prompt`).
"""

from typing import NamedTuple

import torch
from torch.fx import Node

from icw_compile.compat.fx import statically_known_true, true_here
from icw_compile.kernels.interface import FEW_TOKENS
from icw_compile.passes.attention import match_attention, strip_casts
from icw_compile.passes.graph import KVGraph
from icw_compile.passes.nodes import args_of, first_write, root_of

__all__ = ["read_prompts"]

_ops = torch.ops.icw_int8kv


class _Prompt(NamedTuple):
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float


def read_prompts(graph: KVGraph) -> int:
    """Run the pass; returns the number of attentions that look at their mask first."""
    extents: dict[Node, Node] = {}
    replaced = 0
    for node in list(graph.graph.nodes):
        found = _match(graph, node)
        if found is None or not _fits(graph, found):
            continue
        with graph.before(node):
            extent = None if found.mask is None else _extent_of(graph, found.mask, node, extents)
            *operands, scale = found
            made = graph.call(_ops.prompt_attention.default, *operands, extent, scale)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
        replaced += 1
    return replaced


def _extent_of(graph: KVGraph, mask: Node, node: Node, extents: dict[Node, Node]) -> Node:
    """What ``node`` is told of its mask: once for all that read the same. ``extents`` are those before it."""
    known = extents.get(mask)
    if known is None or first_write({root_of(mask)}, known, node) is not None:
        extents[mask] = graph.call(_ops.mask_extent.default, mask)
    return extents[mask]


def _match(graph: KVGraph, node: Node) -> _Prompt | None:
    if node.target is _ops.attention.default:
        query, key, value, mask, is_causal, scale, softcap, *sinks = args_of(node)
        plain = (mask is None) == is_causal and softcap is None and not sinks
        return _Prompt(query, key, value, mask, scale) if plain else None
    if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return None
    found = match_attention(node)
    if found is None or found.merged or len(found.biases) != int(not found.is_causal):
        return None
    if any(strip_casts(operand) not in graph.came for operand in (found.key, found.value)):
        return None
    masks = [bias.node for bias in found.biases if bias.filler is None]
    if len(masks) != len(found.biases):
        return None
    return _Prompt(found.query, found.key, found.value, masks[0] if masks else None, found.scale)


def _fits(graph: KVGraph, found: _Prompt) -> bool:
    query, key, value = (graph.tensor(each) for each in found[:3])
    mask = None if found.mask is None else graph.tensor(found.mask)
    if mask is None:
        # Which of more keys, or of fewer, a causal token sees is not said alike by all.
        fits = statically_known_true(query.shape[2] == key.shape[2])
    else:
        fits = (
            mask.dtype == torch.bool
            and mask.dim() == 4
            and statically_known_true(mask.shape[2] == query.shape[2])
            and statically_known_true(mask.shape[3] == key.shape[2])
        )
    return (
        fits
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and statically_known_true(query.shape[3] == value.shape[3])
        and true_here(query.shape[2] > FEW_TOKENS)
        and not isinstance(graph.find_kernel("cpu"), str)
    )
