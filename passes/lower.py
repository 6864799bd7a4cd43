"""Choose how each attention over int8 is computed.

::

    # before                                # after, one query token      # after, several
    attention(query, key_qdata, ...)        attention_decode(...)         attention_prefill(...)

    # after, with a kernel for the device: on the CPU for at most 16 query tokens, on CUDA for any number
    icw_int8kv_cpu.attention(query, key_qdata, ...)   icw_int8kv_triton.attention(query, key_qdata, ...)

A kernel reads the int8 rows once for all query heads that share them. Without one, decode reads them inside the
reductions that Inductor generates; neither makes a float cache. Prefill dequantizes the one layer that it reads and
hands it to torch's attention. All compute the same function (`icw_compile.formats.ops`). Rows that are kept in the
model's dtype are masked out of the kernel's attention and merged with its output; prefill puts them in their places.
"""

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from icw_compile.passes.graph import SITE, Kernel, KVGraph, Site, Skipped, layer_of

__all__ = ["lower"]

_ops = torch.ops.icw_int8kv
_SINKS = 9  # the place of `sinks` among the arguments of attention; exact rows follow


def lower(graph: KVGraph) -> int:
    """Run the pass; returns the number of attentions lowered."""
    matches = 0
    for node in graph.graph.find_nodes(op="call_function", target=_ops.attention.default):
        sites = node.meta[SITE]
        lowering = _lower(graph, node)
        for site in sites:
            site.lowering = lowering
        matches += 1
    for node in graph.graph.find_nodes(op="call_function", target=_ops.dequantize_per_head.default):
        if SITE in node.meta:
            _report_dequantized(graph, node, node.meta[SITE])
    return matches


def _lower(graph: KVGraph, node: Node) -> str:
    query, key, value = (graph.tensor(node.args[i]) for i in (0, 1, 3))
    kernel = graph.find_kernel(query.device.type)
    reason = kernel if isinstance(kernel, str) else kernel.supports(query, key, value)
    if isinstance(kernel, Kernel) and reason is None:
        _call(graph, node, kernel.operator, kernel.with_lse)
        return kernel.name
    if not statically_known_true(query.shape[2] == 1):
        node.target = _ops.attention_prefill.default
        return f"inductor prefill ({reason})" if reason else "inductor prefill"
    _call(graph, node, _ops.attention_decode.default, _ops.attention_decode_lse.default)
    return f"inductor decode ({reason})" if reason else "inductor decode"


def _call(graph: KVGraph, node: Node, operator: Any, with_lse: Any) -> None:
    """Let ``operator`` compute the attention, or, where there are exact rows, ``with_lse`` and what merges them."""
    if len(node.args) <= _SINKS + 1:
        node.target = operator
        return
    query, key_qdata, mask, is_causal, scale, softcap = (node.args[i] for i in (0, 1, 5, 6, 7, 8))
    key_exact, value_exact, position = node.args[_SINKS + 1 :]
    with graph.before(node):
        tokens = graph.size(key_qdata, 2)
        rest = graph.call(_ops.without_rows.default, mask, position, tokens)
        output, lse = graph.call(with_lse, query, *node.args[1:5], rest, is_causal, scale, softcap, node.args[_SINKS])
        rows = (key_exact, value_exact, position, mask, is_causal, scale, softcap)
        merged = graph.call(_ops.merge_rows.default, output, lse, query, *rows, tokens)
    node.replace_all_uses_with(merged)
    graph.graph.erase_node(node)


def _report_dequantized(graph: KVGraph, node: Node, site: Site) -> None:
    """What no rule fused keeps its dequantized value: correct, slow, and said."""
    readers = ", ".join(sorted({str(user.target) for user in node.users}))
    site.reads.append(f"dequantized for {readers}")
    site.lowering = site.lowering or "dequantize"
    layer = site.layer or layer_of(node)
    graph.skipped.append(
        Skipped(layer, f"{site.role}s" if site.role else site.name, f"read by {readers}, which no rule fuses")
    )
