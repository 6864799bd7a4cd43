"""Choose how each attention over int8 is computed.

::

    # before                                # after, one query token      # after, several
    attention(query, key_qdata, ...)        attention_decode(...)         attention_prefill(...)

Decode reads the int8 rows inside its reductions and never makes a float cache. Prefill dequantizes the one layer that
it reads and hands it to torch's attention kernels. All three compute the same function (`icw_compile.ops`).
"""

import torch
from icw_compile.passes.graph import SITE, KVGraph, Site, Skipped, layer_of
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["lower"]

_ops = torch.ops.icw_int8kv


def lower(graph: KVGraph) -> int:
    """Run the pass; returns the number of attentions lowered."""
    matches = 0
    for node in graph.graph.find_nodes(op="call_function", target=_ops.attention.default):
        one_token = statically_known_true(graph.tensor(node.args[0]).shape[2] == 1)
        name, node.target = (
            ("decode", _ops.attention_decode.default) if one_token else ("prefill", _ops.attention_prefill.default)
        )
        for site in node.meta[SITE]:
            site.lowering = f"inductor {name}"
        matches += 1
    for node in graph.graph.find_nodes(op="call_function", target=_ops.dequantize_per_head.default):
        if SITE in node.meta:
            _report_dequantized(graph, node, node.meta[SITE])
    return matches


def _report_dequantized(graph: KVGraph, node: Node, site: Site) -> None:
    """What no rule fused keeps its dequantized value: correct, slow, and said."""
    readers = ", ".join(sorted({str(user.target) for user in node.users}))
    site.reads.append(f"dequantized for {readers}")
    site.lowering = site.lowering or "dequantize"
    layer = site.layer or layer_of(node)
    graph.skipped.append(
        Skipped(layer, f"{site.role}s" if site.role else site.name, f"read by {readers}, which no rule fuses")
    )
