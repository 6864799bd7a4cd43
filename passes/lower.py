"""Choose how each attention over a stored cache is computed.

::

    # before                                          # after, with a kernel for the device and the call
    keys = dequantize_per_head(key_qdata, ...)        output = icw_int8kv_cpu.attention(query, key_qdata, ...)
    values = dequantize_per_head(value_qdata, ...)
    output = attention(query, keys, values, ...)      # after, one query token: inside the reductions of Inductor
                                                      output = attention_decode(query, key_qdata, ...)

                                                      # after, otherwise: as it was, decoded for torch's kernels

A kernel reads what is stored once for all query heads that share it. Where channels were divided, the query is
multiplied for the keys and the output for the values. Rows that are kept in the model's dtype are given to a kernel as
well; those of ``attention_decode`` are masked out of it and merged with its output. All compute the same function
(`icw_compile.kernels.inductor`).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import statically_known_true
from icw_compile.formats import Stored
from icw_compile.formats.base import decode
from icw_compile.formats.equalized import Equalized
from icw_compile.formats.rules import RULES
from icw_compile.kernels.interface import AttentionCall, AttentionKernel, StoredRows
from icw_compile.passes.graph import FusedAttention, KVGraph, Skipped, Storage, layout_of
from icw_compile.passes.nodes import args_of, called, first_write, layer_of, root_of

__all__ = ["lower"]

aten = torch.ops.aten
_ops = torch.ops.icw_int8kv


_NONE: Mapping[str, Node] = MappingProxyType({})
#: A mask, and for how many tokens -> the node that works out its spans.
_Spans = dict[tuple[Node, Any], Node]


def lower(graph: KVGraph) -> int:
    """Run the pass; returns the number of attentions lowered."""
    attentions, graph.attentions = graph.attentions, []
    spans: _Spans = {}
    for attention in attentions:
        lowering, declined = _lower(graph, attention, spans)
        for value in (attention.key, attention.value):
            value.site.lowering, value.site.declined = lowering, declined
    decoded, graph.decoded = graph.decoded, {}
    for node, value in decoded.items():
        readers = [user for user in node.users if user.target is not _ops.attention.default]
        if readers:
            _report_dequantized(graph, node, readers, value)
    return len(attentions)


def _lower(graph: KVGraph, attention: FusedAttention, spans: _Spans) -> tuple[str, str]:
    """How it is computed, and why not by a kernel. ``spans`` are those of the masks of attentions before it."""
    query, call = graph.tensor(args_of(attention.node)[0]), _attention_call(graph, attention)
    kernel = graph.find_kernel(query.device.type)
    reason = kernel if isinstance(kernel, str) else kernel.declines(call)
    stored = [_base(value.stored) for value in (attention.key, attention.value)]
    if not isinstance(kernel, str) and reason is None:
        named = {
            f"{role}_{name}": part
            for role, value in zip(("key", "value"), stored, strict=True)
            for name, part in list(value.named.items())[2:]
        }
        rows = [part for value in stored for part in value.parts[:2]]
        with graph.before(attention.node):
            named |= _kept_rows(graph, attention, kernel)
            named |= _spans_of(graph, kernel, args_of(attention.node)[3], rows[0], attention.node, spans)
        _call(graph, attention, kernel.operator, rows, named)
        return kernel.name, ""
    if statically_known_true(query.shape[2] == 1):
        with graph.before(attention.node):
            scaled = [value.format.scaled_rows(graph, value) for value in stored]
        if None not in scaled:
            rows = [part for pair in scaled if pair is not None for part in pair]
            if attention.key.stored.kept or attention.value.stored.kept:
                _call_merged(graph, attention, rows)
            else:
                _call(graph, attention, _ops.attention_decode.default, rows)
            return "inductor decode", reason or ""
    return "inductor prefill", reason or ""


def _attention_call(graph: KVGraph, attention: FusedAttention) -> AttentionCall:
    """The attention as a kernel would see it."""
    query, _, _, mask, is_causal, scale, softcap, *sinks = args_of(attention.node)

    def rows(value: Storage) -> StoredRows:
        base = _base(value.stored)
        parts, kept = (
            {name: graph.tensor(part) for name, part in named.items()} for named in (base.named, value.stored.kept)
        )
        return StoredRows(base.format.name, parts, kept)

    return AttentionCall(
        graph.tensor(query),
        rows(attention.key),
        rows(attention.value),
        None if mask is None else graph.tensor(mask),
        is_causal,
        scale,
        softcap,
        graph.tensor(sinks[0]) if sinks else None,
    )


def _base(stored: Stored) -> Stored:
    """What the innermost format stores."""
    while len(stored.format.layers) > 1:
        stored = stored.inner
    return stored


def _kept_rows(graph: KVGraph, attention: FusedAttention, kernel: AttentionKernel) -> dict[str, Node]:
    """The rows that are kept besides, for a kernel that takes them beside the rows of the base format."""
    named = {}
    for role, value in (("key", attention.key.stored), ("value", attention.value.stored)):
        if not value.kept:
            continue
        named[f"{role}_position"] = value["position"]
        if kernel.divides_kept and isinstance(value.inner.format, Equalized):
            named[f"{role}_exact"], named[f"{role}_shift"] = value["exact"], value["shift"]
        else:
            named[f"{role}_exact"] = value.inner.format.as_stored(graph, value["exact"], value.inner)
    return named


def _spans_of(
    graph: KVGraph, kernel: AttentionKernel, mask: Node | None, keys: Node, node: Node, spans: _Spans
) -> dict[str, Node]:
    """What the kernel takes besides the boolean mask of ``node``: once for all attentions that read the same.

    ``spans`` are those of the masks that were met, for so many tokens of ``keys``. A mask that was written into since
    then has others.
    """
    if kernel.mask_spans is None or mask is None or graph.tensor(mask).dtype != torch.bool:
        return {}
    key = mask, layout_of(graph.tensor(keys).shape[2])
    if key not in spans or first_write({root_of(mask)}, spans[key], node) is not None:
        spans[key] = graph.call(kernel.mask_spans, mask, graph.size(keys, 2))
    return {"spans": spans[key]}


def _call(
    graph: KVGraph, attention: FusedAttention, operator: Any, rows: Sequence[Node], named: Mapping[str, Node] = _NONE
) -> None:
    """Let ``operator`` compute the attention over ``rows``, two of keys and two of values, and over ``named``."""
    node, key, value = attention.node, attention.key.stored, attention.value.stored
    query, _, _, *rest = args_of(node)
    with graph.before(node):
        output = graph.call(operator, key.format.into_query(graph, query, key), *rows, *rest, **named)
        _replace(graph, node, value.format.into_output(graph, output, value))


def _call_merged(graph: KVGraph, attention: FusedAttention, rows: Sequence[Node]) -> None:
    """Let ``attention_decode`` compute the attention over ``rows``, and merge it with that over kept ones."""
    node, key, value = attention.node, attention.key.stored, attention.value.stored
    query, _, _, mask, is_causal, scale, softcap, *sinks = args_of(node)
    rest = (is_causal, scale, softcap)
    with graph.before(node):
        position = _kept_positions(graph, key, value)
        tokens = graph.size(rows[0], 2)
        others = graph.call(_ops.without_rows.default, mask, position, tokens)
        inner_query = key.format.into_query(graph, query, key)
        output, lse = graph.call(_ops.attention_decode_lse.default, inner_query, *rows, others, *rest, *sinks)
        output = value.format.into_output(graph, output, value)
        exact = [_rows_at(graph, stored, position) for stored in (key, value)]
        _replace(
            graph,
            node,
            graph.call(_ops.merge_rows.default, output, lse, query, *exact, position, mask, *rest, tokens),
        )


def _replace(graph: KVGraph, node: Node, output: Node) -> None:
    if graph.tensor(output).dtype != graph.tensor(node).dtype:
        output = graph.call(aten.to.dtype, output, graph.tensor(node).dtype)
    node.replace_all_uses_with(output)
    graph.graph.erase_node(node)


def _kept_positions(graph: KVGraph, key: Stored, value: Stored) -> Node:
    """The rows of which the keys, or the values, are kept besides: -1 for none. Each may have rows of its own."""
    positions = [stored["position"] for stored in (key, value) if stored.kept]
    if len(positions) == 1:
        return positions[0]
    united: Node = graph.call(_ops.unite_positions.default, *positions)
    return united


def _rows_at(graph: KVGraph, stored: Stored, position: Node) -> Node:
    """The values ``[B, H, K, D]`` of the rows ``position``: as they were kept, or as they are stored."""
    inner = stored.inner if stored.kept else stored
    at = graph.call(aten.clamp.default, position, 0)
    picked = RULES[aten.index_select.default](graph, inner, 2, at)
    assert isinstance(picked, Stored)
    rows: Node = decode(graph, picked)
    if stored.kept:
        rows = graph.call(_ops.place_kept.default, rows, stored["exact"], stored["position"], position)
    return rows


def _report_dequantized(graph: KVGraph, node: Node, users: list[Node], value: Storage) -> None:
    """What no rule fused keeps its decoded value: correct, slow, and said."""
    site = value.site
    readers = ", ".join(sorted({called(user) for user in users}))
    latent = next((each for each in graph.latents.values() if set(each.readers).issuperset(users)), None)
    if latent is not None:  # that is how it is read, stored or not
        site.reads.append("added to the scores" if latent.is_absorbed else "expanded")
        site.lowering = site.lowering or ("product" if latent.is_absorbed else "dequantize")
        return
    site.reads.append(f"dequantized for {readers}")
    site.lowering = site.lowering or "dequantize"
    layer = site.layer or layer_of(node)
    what = "written by" if any(user.target is aten.copy_.default for user in users) else "read by"
    graph.skipped.append(
        Skipped(layer, f"{site.role}s" if site.role else site.name, f"{what} {readers}, which no rule fuses")
    )
