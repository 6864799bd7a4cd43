"""A cache that grows, in place: `cat` of what is stored and a few rows, as a write behind those that are there.

::

    # before: a cache that grows, passed in      # after: its buffers, with rows to spare
    previous = placeholder                     qdata, scale, length = placeholders
                                               new_qdata, new_scale = quantize_per_head(new)
                                               copy_(narrow(qdata, 2, length, rows), new_qdata)
                                               copy_(narrow(scale, 2, length, rows), new_scale)
    keys = cat([previous, new], -2)            keys = dequantize_per_head(narrow(qdata, 2, 0, length + rows), ...)
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import is_larger_here, statically_known_true
from icw_compile.formats import Format, Stored
from icw_compile.formats.equalized import TELLING
from icw_compile.formats.moves import END
from icw_compile.formats.writes import append, can_join
from icw_compile.passes.graph import KVGraph
from icw_compile.passes.nodes import aliases, args_of, arguments, is_mutation

__all__ = ["Append", "may_tell", "write_append"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Append:
    """``cat([previous, new], -2)`` that can write ``new`` behind the rows of ``previous``, where there is room.

    Attributes:
        cat: the node.
        new: what is appended.
        rows: how many rows it has: a number, or the placeholder that carries it.
        output: the position among the outputs of what is returned of it: all of it, or its last rows.
        keep: the number of these, ``None`` for all.
    """

    cat: Node
    new: Node
    rows: int | Node
    output: int
    keep: int | None

    @classmethod
    def find(cls, graph: KVGraph, node: Node, stored: Stored) -> "Append | None":
        """The append to the input ``node``, if who holds the result cannot tell it from a copy.

        It, or its last rows, are returned once, and nothing writes into it, or into what it grew from.
        """
        cats = [
            user
            for user in node.users
            if user.target is aten.cat.default and list(args_of(user)[0][:1]) == [node] and len(args_of(user)[0]) == 2
        ]
        if len(cats) != 1:
            return None
        cat = cats[0]
        new, dim = args_of(cat)[0][1], args_of(cat)[1] if len(args_of(cat)) > 1 else 0
        value, grown = node.meta["val"], cat.meta["val"]
        if new is node or value.dim() != 4 or dim not in (-2, 2) or not can_join(new.meta["val"].dtype, value.dtype):
            return None
        views = list(aliases(cat))
        returned = [i for i, output in enumerate(graph.output_nodes) if output in views]
        if len(returned) != 1 or any(map(is_mutation, views)) or any(map(is_mutation, aliases(node))):
            return None
        keep = _is_tail(graph.output_nodes[returned[0]], cat)
        rows = graph.number(new.meta["val"].shape[2])
        if keep is False or rows is None:
            return None
        for part in stored.rows.values():
            # A guard, of sizes that Dynamo can look at: with less room another graph is compiled, which copies.
            if not grown.shape[2] <= graph.tensor(part).shape[2]:
                return None
        return cls(cat, new, rows, returned[0], keep)


def _is_tail(node: Node, cat: Node) -> Any:
    """How many of the last rows of ``cat`` the node is, ``None`` for all of them; ``False`` if it is something else."""
    total, size = cat.meta["val"].shape[2], node.meta["val"].shape[2]
    while node is not cat:
        if node.target is not aten.slice.Tensor:
            return False
        a = arguments(node)
        to_the_end = a["step"] == 1 and a["end"] in (None, END)
        if not to_the_end or not (a["start"] in (None, 0) or a["dim"] in (2, -2)):
            return False
        node = a["self"]
    if statically_known_true(size == total):
        return None
    return size if isinstance(size, int) else False


def may_tell(layout: Format, length: int | torch.SymInt, rows: int | torch.SymInt) -> bool:
    """Whether how the rows of a growing cache are stored may be decided anew by these that are appended.

    A graph that is compiled for a long cache is for no short one, so that the others have nothing to do with it.
    """
    if statically_known_true(rows == 1) or not layout.tells(1, 1):
        return False
    if isinstance(length, int) and isinstance(rows, int):
        return layout.tells(length, rows)
    return not is_larger_here(length, TELLING)


def write_append(graph: KVGraph, found: Append, stored: Stored, length: Any, tells: bool) -> Stored:
    """Write the new rows behind those that are there; what ``cat`` is then."""
    cat = found.cat
    with graph.before(cat):
        written = append(graph, stored, found.new, length, found.rows, tells=tells)
        total = cat.meta["val"].shape[2]
        end = total if isinstance(total, int) else graph.call(operator.add, length, found.rows)
        shown = {name: graph.call(aten.narrow.default, part, 2, 0, end) for name, part in stored.rows.items()}
    return written.with_parts(**shown)
