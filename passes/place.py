"""Place rows in a cache that the graph makes, in one operation, which a compiler does not look into.

::

    # before                                        # after, on the CPU
    keys = zeros([1, 4, 128, 64])                   keys = rows_among_zeros(rows, 2, index, 128)
    keys.index_copy_(2, index, rows)                return keys
    return keys

The result is the same. What nothing reads but the caller has no place among the layers: Inductor does it in the end,
for all of them in one C++ function of thousands of lines, which a compiler takes seconds for while all else waits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import statically_known_true
from icw_compile.formats.place import ROWS_AMONG_ZEROS
from icw_compile.passes.graph import KVGraph
from icw_compile.passes.nodes import arguments, viewed_by, written_by

__all__ = ["place_rows"]

aten = torch.ops.aten


def place_rows(graph: KVGraph) -> int:
    """Run the pass; returns the number of writes that are one operation now."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    placed = 0
    for node in graph.graph.find_nodes(op="call_function", target=aten.index_copy_.default):
        into, dim, index, rows = arguments(node).values()
        if any(user.op != "output" for user in node.users) or not _is_zeros(into, node, order):
            continue
        if not _fit(graph.tensor(into), dim, graph.tensor(rows)):
            continue
        with graph.before(node):
            size = arguments(into)["size"][dim]
            node.replace_all_uses_with(graph.call(ROWS_AMONG_ZEROS, rows, dim, index, size))
        graph.graph.erase_node(node)
        placed += 1
    return placed


def _is_zeros(into: Node, write: Node, order: Mapping[Node, int]) -> bool:
    """Whether ``into`` is new and of zeros, and what else reads it does so before the write, and keeps no view."""
    return into.target is aten.zeros.default and all(
        user is write
        or (order.get(user, len(order)) < order[write] and into not in (*viewed_by(user), *written_by(user)))
        for user in into.users
    )


def _fit(into: Any, dim: int, rows: Any) -> bool:
    """Whether rows of the same dtype, and of the same size but along ``dim``, come into a tensor of the CPU."""
    return (
        into.device.type == "cpu"
        and (rows.dtype, rows.device, rows.dim()) == (into.dtype, into.device, into.dim())
        and all(
            statically_known_true(a == b)
            for i, (a, b) in enumerate(zip(rows.shape, into.shape, strict=True))
            if i != dim % into.dim()
        )
    )
