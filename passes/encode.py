"""Encode new rows in one operation, which a compiler does not look into.

::

    # before                                        # after, on the CPU, with its C++ kernel
    divided = divide_channels(states, shift)        qdata, scale = quantize_divided(states, shift)
    qdata, scale = quantize_per_head(divided)

The result is the same. Inductor would work out, generate and compile these dozen operations anew for the keys and the
values of each layer, and what it makes of them is no faster.
"""

import torch
from torch import Tensor

from icw_compile.compat.fx import statically_known_true
from icw_compile.passes.graph import KVGraph
from icw_compile.passes.nodes import arguments

__all__ = ["encode_at_once"]

_ops = torch.ops.icw_int8kv


def encode_at_once(graph: KVGraph) -> int:
    """Run the pass; returns the number of encodings that are one operation now."""
    _load_for_writes(graph)
    replaced = 0
    for node in graph.graph.find_nodes(op="call_function", target=_ops.quantize_per_head.default):
        values = arguments(node)["x"]
        if graph.tensor(values).device.type != "cpu" or isinstance(graph.find_kernel("cpu"), str):
            continue
        shift = None
        if values.target is _ops.divide_channels.default:
            values, shift = arguments(values)["x"], arguments(values)["shift"]
        if not _fit(graph.tensor(values), None if shift is None else graph.tensor(shift)):
            continue
        with graph.before(node):
            short_scale = arguments(node)["scale_dtype"] == torch.bfloat16
            parts = graph.call(_ops.quantize_divided.default, values, shift, short_scale)
        for user in list(node.users):
            user.replace_all_uses_with(parts[user.args[1]])
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        replaced += 1
    return replaced


def _load_for_writes(graph: KVGraph) -> None:
    """Ask for the kernel where its library has an operation of a write: a prompt may have no attention of ours."""
    written = (_ops.settle_shift.default, _ops.quantize_halves_cpu.default)
    writes = (node for node in graph.graph.nodes if node.target in written)
    for device in sorted({graph.tensor(node.args[0]).device.type for node in writes}):
        graph.find_kernel(device)


def _fit(values: Tensor, shift: Tensor | None) -> bool:
    """Whether these are ``[..., T, D]`` and ``[..., 1, D]``, the rest of which is as large or 1, as known of any size.

    Rows that are written at an index may come without the dimensions that broadcast.
    """
    if shift is None:
        return values.dim() >= 2
    if values.dim() != shift.dim() or values.dim() < 2:
        return False
    *heads, (_, one), (channels, size) = zip(values.shape, shift.shape, strict=True)
    return (
        statically_known_true(one == 1)
        and statically_known_true(channels == size)
        and all(statically_known_true(b == 1) or statically_known_true(a == b) for a, b in heads)
    )
