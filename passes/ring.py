"""Let the rows of a full window stay where they are: a step writes the newest one over the oldest.

::

    # before: a step of a full window of W tokens             # after, the t-th step of this kind
    moved = roll(qdata, [-1], [2])                            oldest = remainder(turns, W)
    moved = index_put_(moved, [None, None, [-1]], new)        keys = index_copy_(qdata, 2, oldest, new)
    keys = copy_(qdata, moved)                                order = remainder(arange(W) - turns - 1, W)
    output = attention(query, keys, ..., mask)                output = attention(query, keys, ...,
                                                                                 index_select(mask, 3, order))

The same for every part that has rows, of keys and values. To attention, the order of the tokens is nothing: it goes by
the mask, whose columns are turned, and so are the positions of rows that are kept besides. ``turns`` is an input, one
number for the graph: how often the windows were turned before (`icw_compile.cache.turned`). A window is turned only if
nothing of the graph but attention over it, by a kernel, sees its rows.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import evaluating, is_fake, statically_known_true
from icw_compile.kernels import KERNELS
from icw_compile.passes.attention import is_whole_slice
from icw_compile.passes.graph import KVGraph
from icw_compile.passes.nodes import aliases, args_of, arguments, first_write, is_mutation, root_of

__all__ = ["turn_windows"]

aten = torch.ops.aten

#: What attends to rows, and its arguments that are rows.
_ATTENTION = {torch.ops.icw_int8kv.attention_decode.default, *(kernel.operator for kernel in KERNELS)}
_ROWS = [f"{role}_{part}" for role in ("key", "value") for part in ("qdata", "rows", "scale", "codes")]
#: What gives a constant of the model as it is.
_AS_IT_IS = (
    aten.lift_fresh_copy.default,
    aten.detach_.default,
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.to.device,
    aten._to_copy.default,
)


@dataclass(frozen=True)
class _Step:
    """What the graph does to a part that has rows: it moves them, writes the last one, and puts all in their place."""

    part: Node
    roll: Node
    put: Node
    copy: Node
    tokens: int


def turn_windows(graph: KVGraph) -> int:
    """Run the pass; returns the number of keys and values whose rows stay where they are."""
    windows = {name: steps for name in graph.inputs if (steps := _steps(graph, name))}
    found = -1
    while found != len(windows):
        found = len(windows)
        rows = {step.copy for steps in windows.values() for step in steps}
        windows = {name: steps for name, steps in windows.items() if all(_is_only_read(each, rows) for each in steps)}
    if not windows:
        return 0
    first = next(iter(windows.values()))[0].part
    device = graph.tensor(first).device  # there is one number for all windows
    windows = {name: steps for name, steps in windows.items() if graph.tensor(steps[0].part).device == device}
    turned = _Turned(graph, first)
    readers: dict[Node, int] = {}
    for name, steps in windows.items():
        graph.inputs[name] = replace(graph.inputs[name], turned=True)
        for step in steps:
            readers.update(dict.fromkeys(_users(step.copy), step.tokens))
            with graph.before(step.copy):
                oldest, heads = turned.oldest(step.tokens), [graph.size(step.part, dim) for dim in (0, 1)]
                new = graph.call(aten.expand.default, arguments(step.put)["values"], [*heads, -1, -1])
                step.copy.replace_all_uses_with(graph.call(aten.index_copy_.default, step.part, 2, oldest, new))
            graph.graph.erase_node(step.copy)
            for node in sorted(aliases(step.roll), reverse=True):
                graph.graph.erase_node(node)
        for site in graph.sites:
            if site.name == steps[0].part.meta.get("source_name"):
                site.writes = ["ring"]
    for reader, tokens in readers.items():
        turned.read(reader, tokens)
    return len(windows)


def _steps(graph: KVGraph, name: str) -> list[_Step] | None:
    """What happens to each part of an input that has rows, if that is a step of a full window."""
    taken, shown = graph.inputs[name], {whole for whole, _ in graph.shown.values()}
    if not taken.written or taken.adopted is not None or taken.shows is not None or name in shown:
        return None
    steps = []
    for node in graph.graph.find_nodes(op="placeholder"):
        if node.name in taken.parts and any(user.target is aten.roll.default for user in _users(node)):
            if (step := _step(graph, node)) is None:
                return None
            steps.append(step)
    return steps


def _step(graph: KVGraph, part: Node) -> _Step | None:
    users, size = _users(part), graph.tensor(part).shape
    if [user.target for user in users] != [aten.roll.default, aten.copy_.default]:
        return None
    roll, copy = users
    users = _users(roll)
    put = users[0]
    if put.target is not aten.index_put_.default or {*users, *_users(put)} != {put, copy}:
        return None
    moved, written, copied = arguments(roll), arguments(put), arguments(copy)
    new = graph.tensor(written["values"])
    if (
        len(size) == 4
        and isinstance(size[2], int)
        and (list(moved["shifts"]), [dim % 4 for dim in moved["dims"]]) == ([-1], [2])
        and (_whole(written["self"]), written["accumulate"]) == (roll, False)
        and (_whole(copied["self"]), _whole(copied["src"]) in (roll, put)) == (part, True)
        and new.dtype == graph.tensor(part).dtype
        and _broadcasts(new.shape, (*size[:2], 1, size[3]))
        and [each is None for each in written["indices"]] == [True, True, False]
        and _is_number(graph, written["indices"][2], (-1, size[2] - 1))
    ):
        return _Step(part, roll, put, copy, size[2])
    return None


def _users(node: Node) -> list[Node]:
    """Those of a node and of views that are it, in order."""
    return sorted({each for user in node.users for each in ([user] if _whole(user) is user else _users(user))})


def _whole(node: Node) -> Node:
    """What ``node`` is a view of that is all of it, as stands in graphs of symbolic sizes; or itself."""
    while node.target is aten.alias.default or is_whole_slice(node):
        node = args_of(node)[0]
    return node


def _broadcasts(shape: Sequence[Any], to: Sequence[Any]) -> bool:
    """Whether it is known to: a batch of one may have been left out."""
    sizes = zip(reversed(shape), reversed(to))
    return len(shape) <= len(to) and all(
        statically_known_true(a == 1) or statically_known_true(a == b) for a, b in sizes
    )


def _is_number(graph: KVGraph, node: Node, numbers: Collection[int]) -> bool:
    """Whether a tensor is a constant, of one element, and one of these numbers."""
    while node.target in _AS_IT_IS:
        if any(is_mutation(each) and each.target is not aten.detach_.default for each in aliases(node)):
            return False
        node = node.all_input_nodes[0]
    value = getattr(graph.module, str(node.target), None) if node.op == "get_attr" else None
    if not isinstance(value, torch.Tensor) or is_fake(value) or value.numel() != 1:
        return False
    return not any(map(is_mutation, aliases(node))) and int(value) in numbers


def _is_only_read(step: _Step, rows: Collection[Node]) -> bool:
    """Whether nothing sees the part but attention, all of whose rows are among ``rows``, by their mask alone."""
    readers = _users(step.copy)
    for reader in readers:
        if reader.target not in _ATTENTION:
            return False
        operands = {name: _whole(each) if isinstance(each, Node) else each for name, each in arguments(reader).items()}
        read = [operands.pop(name) for name in _ROWS if operands.get(name) is not None]
        if operands["is_causal"] or step.copy in operands.values() or not all(each in rows for each in read):
            return False
    return bool(readers)


class _Turned:
    """How often the windows are turned, as an input of the graph, and what follows from it, once for all layers."""

    def __init__(self, graph: KVGraph, part: Node) -> None:
        self.graph = graph
        *_, last = graph.graph.find_nodes(op="placeholder")
        with graph.graph.inserting_after(last):
            self.turns = graph.graph.placeholder("turns")
        with evaluating(graph.fake_mode):
            value = torch.zeros(1, dtype=torch.int64, device=graph.tensor(part).device)
        self.turns.meta = {"val": value, "dynamo_placeholder": part.meta.get("dynamo_placeholder")}
        graph.turns = self.turns.name
        self._made: dict[Any, Node] = {}

    def oldest(self, tokens: int) -> Node:
        """The row of the oldest token, which the newest one takes: int64 ``[1]``."""
        return self._once(self.turns, "oldest", tokens, lambda: self._call(aten.remainder.Scalar, self.turns, tokens))

    def read(self, reader: Node, tokens: int) -> None:
        """Let an attention find each token in the row in which it is after the step."""
        operands = arguments(reader)
        mask, spans = operands["attn_mask"], operands.get("spans")
        if mask is not None and self.graph.tensor(mask).shape[-1] != 1:
            turned = self._once(mask, "mask", tokens, lambda: self._mask(mask, tokens), reader)
            reader.replace_input_with(mask, turned)
            if spans is not None:
                rest = spans.args[1:]
                again = self._once(turned, "spans", tokens, lambda: self._call(spans.target, turned, *rest), reader)
                reader.replace_input_with(spans, again)
        for name in ("key_position", "value_position"):
            if (position := operands.get(name)) is not None:
                with self.graph.before(reader):
                    reader.replace_input_with(position, self._position(position, tokens))

    def _mask(self, mask: Node, tokens: int) -> Any:
        """The column of each row."""
        row = self._call(aten.arange.default, tokens, device=self.graph.tensor(self.turns).device)
        token = self._call(aten.sub.Tensor, self._call(aten.sub.Tensor, row, self.turns), 1)
        return self._call(aten.index_select.default, mask, -1, self._call(aten.remainder.Scalar, token, tokens))

    def _position(self, position: Node, tokens: int) -> Any:
        """The row of each token that is kept besides, -1 for none."""
        row = self._call(aten.add.Tensor, self._call(aten.add.Tensor, position, self.turns), 1)
        is_one = self._call(aten.ge.Scalar, position, 0)
        return self._call(aten.where.ScalarOther, is_one, self._call(aten.remainder.Scalar, row, tokens), -1)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return self.graph.call(target, *args, **kwargs)

    def _once(self, of: Node, what: str, tokens: int, make: Callable[[], Any], reader: Node | None = None) -> Node:
        """What is made of ``of``, right behind it: for all readers, unless it is written into before they read."""
        if reader is not None and first_write({root_of(of)}, of.next, reader) is not None:
            with self.graph.before(reader):
                return make()
        key = of, what, tokens
        if key not in self._made:
            with self.graph.after(max(of, self.turns)):
                self._made[key] = make()
        return self._made[key]
