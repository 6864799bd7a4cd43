"""Carry the int8 parts of storage through every write and every move of rows.

::

    # before                                        # after
    keys = dequantize_per_head(qdata, scale)
    new = index_copy_(keys, 2, position, states)    states_qdata, states_scale = quantize_per_head(states)
                                                    new_qdata = index_copy_(qdata, 2, position, states_qdata)
                                                    new_scale = index_copy_(scale, 2, position, states_scale)
    window = slice(new, 2, 0, 16)                   window_qdata = slice(new_qdata, 2, 0, 16)
                                                    window_scale = slice(new_scale, 2, 0, 16)
    other = mul(window, 3)                          window = dequantize_per_head(window_qdata, window_scale)
                                                    other = mul(window, 3)
    return (new,)                                   return (new_qdata, new_scale)

What an operation does to the parts is `icw_compile.formats.rules.RULES`. An operation without a rule gets the
dequantized value, taken right where it is used, so that it sees every write before it. Order and aliasing of writes are
preserved. Where a storage is read as it came, its operations in floats stay besides, and see the same writes. Where a
view is returned that has to be a copy, or that shows what grows, ``graph.outputs`` says how the caller makes it.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import is_operator, schema_of, storage_of
from icw_compile.formats import Stored
from icw_compile.formats.rules import RULES
from icw_compile.formats.writes import overwrite
from icw_compile.passes.graph import Grown, KVGraph, Output, Storage
from icw_compile.passes.nodes import (
    aliases,
    args_of,
    called,
    first_write,
    is_mutation,
    layer_of,
    root_of,
    viewed_by,
    written_by,
)

__all__ = ["propagate"]

aten = torch.ops.aten


def propagate(graph: KVGraph) -> int:
    """Run the pass; returns the number of operations that now act on parts."""
    # What nothing reads is not there any more.
    values = {node: graph.storage[node] for node in graph.graph.nodes if node in graph.storage}
    graph.storage = {}
    pieces: dict[Node, tuple[Stored, ...]] = {}  # of an operation that returns several
    done: set[Node] = set()  # in-place operations that stay
    for node in list(graph.graph.nodes):
        if node.target is operator.getitem and args_of(node)[0] in pieces:
            values[node] = _part_of(values[args_of(node)[0]], pieces[args_of(node)[0]][args_of(node)[1]])
            continue
        if node.op == "output" and values:
            _return_parts(graph, node, values)
            continue
        operands = [n for n in node.all_input_nodes if n in values]
        if not operands or node in values:
            continue
        source = values[operands[0]]
        _forget_kept_rows(graph, node, values)
        if (result := _apply_rule(graph, node, values)) is not None and not _parts_ways(graph, node, result, values):
            if isinstance(result, tuple):
                pieces[node] = result
                result = result[0]
            values[node] = _part_of(source, result)
            if source.as_it_came:
                _give_values(graph, node, values)
                done.update([node] if is_mutation(node) else [])
            if is_mutation(node) or node.target in (aten.cat.default, aten.roll.default):
                _note(source.site.writes, node)
        elif written := [n for n in written_by(node) if n in values]:
            _write_back(graph, node, written, values)
            done.add(node)
            for each in written:
                _note(values[each].site.writes, node)
        else:
            _refuse_writes_through(node, values)
            _read_late(graph, node, values)
            _give_values(graph, node, values)

    for node in reversed(values):
        if not node.users and node not in done:
            graph.graph.erase_node(node)
        elif values[node].as_it_came:
            graph.came[node] = values[node]
    return len(values)


def _forget_kept_rows(graph: KVGraph, node: Node, values: dict[Node, Storage]) -> None:
    """What is written into, and what shows it or is shown by it, may keep other rows besides than the write leaves.

    A view counts them otherwise, and does not hear of what another one writes: those keep none from there on, and what
    is stored stands for them. `icw_compile.cache.parts.TensorOfParts.before_write` is the same for tensors.
    """
    for target in [each for each in written_by(node) if each in values]:
        own, root = values[target].stored, root_of(target)
        others = [each.stored for other, each in values.items() if each.stored.kept and root_of(other) is root]
        kept = {storage_of(graph.tensor(other["position"])): other["position"] for other in others}
        if own.kept and not own.is_view:
            kept.pop(storage_of(graph.tensor(own["position"])))
        with graph.before(node):
            for position in kept.values():
                graph.call(aten.fill_.Scalar, position, -1)


def _part_of(source: Storage, stored: Stored) -> Storage:
    return replace(source, stored=stored)


def _apply_rule(graph: KVGraph, node: Node, values: dict[Node, Storage]) -> Stored | tuple[Stored, ...] | None:
    rule = RULES.get(node.target)
    if rule is None:
        return None
    with graph.before(node):
        result = rule(graph, *_with_parts(args_of(node), values), **_with_parts(node.kwargs, values))
        if result is None and (viewed := _written_through(node, values)) is not None:
            # A view that cannot keep rows, and is written through: those are forgotten then.
            bare = values | {viewed: _part_of(values[viewed], values[viewed].stored.inner)}
            result = rule(graph, *_with_parts(args_of(node), bare), **_with_parts(node.kwargs, bare))
        return result


def _written_through(node: Node, values: dict[Node, Storage]) -> Node | None:
    """What keeps rows and ``node`` is a view of, if that view, or one of it, is written."""
    viewed = next((each for each in viewed_by(node) if each in values), None)
    if viewed is None or not values[viewed].stored.kept or values[viewed].as_it_came:
        return None
    return None if _write_through(node) is None else viewed


def _write_through(node: Node) -> Node | None:
    """The first in-place operation on ``node``, or on a view of it."""
    return next((view for view in aliases(node) if view is not node and is_mutation(view)), None)


def _parts_ways(graph: KVGraph, node: Node, result: Stored | tuple[Stored, ...], values: dict[Node, Storage]) -> bool:
    """Whether a view has to be a copy of the parts, as over spare rows, while one of the two is written afterwards."""
    viewed = next((each for each in viewed_by(node) if each in values), None)
    made = result[0] if isinstance(result, tuple) else result
    if viewed is None or is_mutation(node):
        return False
    source, copy = (graph.tensor(each.parts[0]) for each in (values[viewed].stored, made))
    if storage_of(source) == storage_of(copy):
        return False
    return first_write({root_of(viewed)}, node.next) is not None


def _with_parts(value: Any, values: dict[Node, Storage]) -> Any:
    if isinstance(value, Node):
        return values[value].stored if value in values else value
    if isinstance(value, (list, tuple)):
        return type(value)(_with_parts(v, values) for v in value)
    if isinstance(value, dict):
        return {name: _with_parts(v, values) for name, v in value.items()}
    return value


def _give_values(graph: KVGraph, node: Node, values: dict[Node, Storage]) -> dict[Node, Node]:
    """Hand ``node`` the decoded value of each operand that is stored, and not read as it came; returns which."""
    given = {}
    for operand in node.all_input_nodes:
        if operand in values and not values[operand].as_it_came:
            with graph.before(node):
                given[operand] = graph.decode(values[operand])
            node.replace_input_with(operand, given[operand])
    return given


def _read_late(graph: KVGraph, node: Node, values: dict[Node, Storage]) -> None:
    """A view that becomes a copy is made again for those who read it after a write that it would have shown."""
    viewed = next((each for each in viewed_by(node) if each in values), None)
    if viewed is None or values[viewed].as_it_came:
        return
    write = first_write({root_of(viewed)}, node.next)
    if write is None:
        return
    views = list(aliases(node))
    for view in views:
        for reader in [user for user in view.users if user not in views and write < user]:
            with graph.before(reader):
                reader.replace_input_with(view, _view_again(graph, view, node, graph.decode(values[viewed]), viewed))


def _view_again(graph: KVGraph, view: Node, first: Node, value: Node, viewed: Node) -> Any:
    """``view``, which is ``first`` or a view of that, of ``value`` in place of ``viewed``."""
    if view.target is operator.getitem:
        return _view_again(graph, args_of(view)[0], first, value, viewed)[args_of(view)[1]]
    if "kept" in view.meta:
        raise NotImplementedError(
            f"icw_int8kv: `{called(view)}` in {layer_of(view) or 'the model'} shows a quantized cache, which is "
            "written before that is read; it can only show the values of the time when it is called."
        )
    if view is first:
        source, again = viewed, value
    else:
        source = viewed_by(view)[0]
        again = _view_again(graph, source, first, value, viewed)
    args, kwargs = torch.fx.map_arg((args_of(view), view.kwargs), lambda each: again if each is source else each)
    return graph.call(view.target, *args, **kwargs)


def _write_back(graph: KVGraph, node: Node, written: list[Node], values: dict[Node, Storage]) -> None:
    """An in-place operation without a rule: run it on the values, and store what came out in the same place."""
    viewed, after = viewed_by(node), node.next
    args, kwargs = args_of(node), node.kwargs
    operands = [each for each in node.all_input_nodes if each in values]
    given = _give_values(graph, node, values)
    if len(given) < len(operands):  # it stays, for what is read as it came, and is done to what is stored before
        others = [each for each in written_by(node) if each not in given.values() and each not in operands]
        with graph.before(node):
            given = {each: graph.decode(values[each]) for each in operands}
            copies = given | {each: graph.call(aten.clone.default, each) for each in others}
            args, kwargs = torch.fx.map_arg((args, kwargs), lambda each: copies.get(each, each))
            graph.call(node.target, *args, **kwargs)
    for operand in written:
        with graph.before(after):
            overwrite(graph, values[operand].stored, given[operand])
        if operand in viewed:
            values[node] = values[operand]


def _refuse_writes_through(node: Node, values: dict[Node, Storage]) -> None:
    """A view that cuts through head_dim, or goes over spare rows, becomes a copy: a write into it would be lost."""
    viewed = [each for each in viewed_by(node) if each in values]
    if viewed and (write := _write_through(node)) is not None:
        raise NotImplementedError(
            f"icw_int8kv: `{write.format_node()}` writes into {values[viewed[0]].site.name} through "
            f"`{called(node)}`, which has to be a copy of what is stored: the write would be lost. Write whole "
            "rows of head_dim, into the cache itself."
        )


def _return_parts(graph: KVGraph, node: Node, values: dict[Node, Storage]) -> None:
    """Return the parts of a stored output, one after the other, and say so in ``graph.outputs``."""
    returned: list[Any] = []
    outputs = []
    results = _results(graph, values)

    def place(part: Node) -> int:
        returned.append(part)
        return len(returned) - 1

    for i, value in enumerate(graph.output_nodes):
        if value not in values:
            output = Output(place(value))
            if isinstance(value, Node) and _is_a_copy(graph, node, value, values):
                output = _made_anew(graph, output, i, results, values, place)
            outputs.append(output)
            continue
        storage = values[value]
        if (grown := graph.grown.get(i)) is not None:
            others = {
                spec.name: place(part)
                for spec, part in zip(storage.stored.format.parts, storage.stored.parts, strict=True)
                if not spec.has_rows and part.op != "placeholder"
            }
            outputs.append(Output(grown=Grown(grown.input, grown.rows, others)))
        else:
            stored = storage.stored.of_parts([place(part) for part in storage.stored.parts])
            output = Output(stored=stored, grows=storage.grows)
            outputs.append(_made_anew(graph, output, i, results, values, place) if storage.grows else output)
    if returned != list(graph.output_nodes):
        node.args = (tuple(returned),)
    graph.outputs = outputs


def _path(graph: KVGraph, node: Node, values: dict[Node, Storage]) -> list[Node]:
    """``node``, what it is a view of or was before a write, then what that is, and so on: up to a storage, if any."""
    path = [node]
    while viewed := viewed_by(path[-1])[:1]:
        decoded = graph.decoded.get(viewed[0])
        if decoded is not None:
            viewed = [next(each for each, storage in values.items() if storage is decoded)]
        elif path[-1] in values and viewed[0] not in values:
            break  # a storage that is read as it came is an alias of that
        path += viewed
    return path


def _results(graph: KVGraph, values: dict[Node, Storage]) -> dict[Node, int]:
    """The stored outputs, each with what it was before it was written into, and the position of each."""
    results: dict[Node, int] = {}
    for i, value in enumerate(graph.output_nodes):
        for node in _path(graph, value, values) if value in values else ():
            results.setdefault(node, i)
            if not is_mutation(node):
                break
    return results


def _is_a_copy(graph: KVGraph, output: Node, value: Node, values: dict[Node, Storage]) -> bool:
    """Whether an output that is not stored would be a view of what is, were that not decoded."""
    path = _path(graph, value, values)
    views = path[: next((n for n, each in enumerate(path) if each in values), 0)]
    if not views or any("kept" in each.meta for each in views):
        return False
    source = viewed_by(views[-1])[0]
    with graph.before(output):
        again = _view_again(graph, value, views[-1], source, source)  # what may be a view, as of `reshape`, is it one?
    return storage_of(graph.tensor(again)) == storage_of(graph.tensor(source))


def _made_anew(
    graph: KVGraph,
    output: Output,
    i: int,
    results: Mapping[Node, int],
    values: dict[Node, Storage],
    place: Callable[[Node], int],
) -> Output:
    """``output``, the one at ``i``, with what it is a view of and how it is made of that, if that outlives the graph.

    A view of what grows does not, where that is not returned, and another view of it is: both stay where they are.
    """
    path = _path(graph, graph.output_nodes[i], values)
    end = max((n for n, each in enumerate(path) if results.get(each, i) != i), default=len(path) - 1)
    of = results[path[end]] if results.get(path[end], i) != i else _input_of(graph, values[path[-1]].stored)
    if output.stored is not None and not isinstance(of, int):
        apart = of is None and _is_shown_elsewhere(graph, i, path[-1], values, results)
        return replace(output, grows=not apart)
    if of is None and not _is_shown_elsewhere(graph, i, path[-1], values, results):
        return output
    views = [each for each in reversed(path[:end]) if not is_mutation(each)]
    calls: list[Any] = [(each.target, args_of(each)[1:], each.kwargs) for each in views]
    numbers: dict[Node, int] = {}
    torch.fx.map_arg(calls, lambda each: numbers.setdefault(each, place(each)))
    return replace(output, of=of, again=functools.partial(_again, calls, numbers))


def _is_shown_elsewhere(
    graph: KVGraph, i: int, root: Node, values: dict[Node, Storage], results: Mapping[Node, int]
) -> bool:
    """Whether a stored output shows the storage ``root``, besides the one at ``i`` and the views of that."""
    paths = [_path(graph, each, values) for each in graph.output_nodes if each in values]
    return any(path[-1] is root and all(results.get(each) != i for each in path) for path in paths)


def _input_of(graph: KVGraph, stored: Stored) -> str | None:
    """The input that a storage is, unless it is what became of it."""
    part = stored.parts[0]
    while not is_mutation(part) and (viewed := viewed_by(part)):
        part = viewed[0]
    return next((name for name, each in graph.inputs.items() if part.name in each.parts), None)


def _again(
    calls: Sequence[tuple[Any, tuple[Any, ...], Mapping[str, Any]]],
    numbers: Mapping[Node, int],
    returned: Sequence[Any],
) -> Callable[[Any], Any]:
    """What makes a view by these calls, each of what the one before gave; their other arguments were returned."""
    given = {node: returned[position] for node, position in numbers.items()}

    def view_of(value: Any) -> Any:
        for target, args, kwargs in torch.fx.map_arg(calls, given.__getitem__):
            value = target(value, *args, **kwargs)
        return value

    return view_of


def _note(forms: list[str], node: Node) -> None:
    name = schema_of(node.target).name if is_operator(node.target) else called(node)
    if name not in forms:
        forms.append(name)
