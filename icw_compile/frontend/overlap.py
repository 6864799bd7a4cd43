"""Stored inputs that share memory: one becomes a view of the other, so that the graph shows what a write reaches.

A layer may keep its tokens in one tensor and hold views of it besides, of a part that stays and of a window. Each is an
input of its own, and what is written through one is read through another. As plain tensors they are AOTAutograd's
affair; as parts of ours, every pass has to see that they are one memory.
"""

from collections.abc import Mapping

import torch
from torch.fx import Node

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.compat.fx import storage_of, true_here
from icw_compile.formats import AXES
from icw_compile.passes.graph import KVGraph
from icw_compile.passes.nodes import aliases, is_mutation

__all__ = ["join_overlapping"]

aten = torch.ops.aten


def join_overlapping(graph: KVGraph, examples: Mapping[Node, QuantizedKV]) -> None:
    """Replace stored placeholders that show a range of tokens of another one by a view of that, if either is written.

    Which input shows which, and from which token on, is left in ``graph.shown``, for the caller to hold the next call
    to it.

    Args:
        graph: as captured; it is changed.
        examples: its stored placeholders, and Dynamo's fakes of what they take.

    Raises:
        NotImplementedError: two overlap in another way.
    """
    memories: dict[int, list[Node]] = {}
    for node, example in examples.items():
        memories.setdefault(storage_of(example.buffers[0]), []).append(node)
    for members in memories.values():
        if len(members) > 1 and any(is_mutation(each) for node in members for each in aliases(node)):
            _join(graph, {node: examples[node] for node in members})


def _join(graph: KVGraph, members: Mapping[Node, QuantizedKV]) -> None:
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    owners: list[Node] = []
    for node in sorted(members, key=lambda node: -int(members[node].shape[2])):
        starts = [(owner, _start(members[node], members[owner])) for owner in owners]
        whole = next(((owner, start) for owner, start in starts if start is not None and start >= 0), None)
        if whole is None:
            if any(start is None for _, start in starts):
                names = " and ".join(each.meta.get("source_name") or each.name for each in (node, owners[0]))
                raise NotImplementedError(
                    f"icw_int8kv: {names} share memory, and one of them is written, but neither shows a range of the "
                    "other's tokens. Give each memory of its own (`.clone()`)."
                )
            owners.append(node)
            continue
        owner, start = whole
        with graph.before(first):
            length = graph.number(members[node].shape[2])
            length = graph.size(node, 2) if length is None else length
            view = graph.call(aten.narrow.default, owner, 2, start, length)
        node.replace_all_uses_with(view, delete_user_cb=lambda user: user.target is not aten.sym_size.int)
        graph.shown[node.name] = owner.name, start


def _start(shows: QuantizedKV, whole: QuantizedKV) -> int | None:
    """From which of the tokens of ``whole`` on ``shows`` shows some of them; -1 if no token is in both.

    ``None`` if they overlap in another way.
    """
    if shows.format != whole.format or {shows._layout.axes, whole._layout.axes} != {AXES}:
        return None
    starts = set()
    for spec, part, other in zip(whole.format.parts, shows.buffers, whole.buffers, strict=True):
        distance = part.storage_offset() - other.storage_offset()
        sizes = zip(part.shape, other.shape, strict=True)
        alike = all(true_here(a == b) for dim, (a, b) in enumerate(sizes) if dim != 2 or not spec.has_rows)
        alike = alike and all(true_here(a == b) for a, b in zip(part.stride(), other.stride(), strict=True))
        if not alike or storage_of(part) != storage_of(other):
            return None
        if not spec.has_rows:
            if distance != 0:
                return None
            continue
        if distance % part.stride(2):
            return None
        starts.add(int(distance // part.stride(2)))
    start = starts.pop()
    if starts:
        return None
    if start >= 0 and true_here(start + shows.shape[2] <= whole.shape[2]):
        return start
    apart = true_here(start >= whole.shape[2]) or true_here(start + shows.shape[2] <= 0)
    return -1 if apart else None
