"""The calling convention: a caller that holds `QuantizedKV` tensors, a compiled function that takes their parts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from icw_compile.cache.adopt import adopt, find_held_elsewhere
from icw_compile.cache.decoded import DecodedView
from icw_compile.cache.tensor import QuantizedKV
from icw_compile.cache.turned import turn, turns_of
from icw_compile.compat.dynamo import let_vary
from icw_compile.formats import AXES, Stored
from icw_compile.passes import Input, KVGraph, Output

__all__ = ["bind"]


def bind(graph: KVGraph, compiled: Callable[..., Sequence[Any]]) -> Callable[..., list[Any]]:
    """Wrap ``compiled``, which has the rewritten graph's signature, into the signature of the captured graph.

    Args:
        graph: the rewritten graph.
        compiled: takes the rewritten graph's inputs and returns its outputs.

    A stored input keeps the position of its tensor for its first part, and its other parts follow after all
    inputs. Where the graph appends rows to one, it is given room for them first, and a tensor that shows them is
    returned. This runs at every call: nothing in it looks at an ordinary input or output.
    """
    at = {name: position for position, name in enumerate(graph.input_names)}
    inputs = [(at[name], each, at.get(str(each.appended))) for name, each in graph.inputs.items()]
    adopted = [(position, each) for position, each, _ in inputs if each.adopted is not None]
    shown = [(position, at[each.shows[0]], each.shows[1]) for position, each, _ in inputs if each.shows is not None]
    outputs = [(each, at.get(each.grown.input, -1) if each.grown is not None else -1) for each in graph.outputs]
    plain_outputs = all(output.position >= 0 and output.again is None for output in graph.outputs)
    stored = [output.stored for output in graph.outputs]
    windows = [position for position, each, _ in inputs if each.turned]
    anew = [(i, each, at.get(str(each.of))) for i, each in enumerate(graph.outputs) if each.again is not None]
    kept = [i for i, value in enumerate(stored) if value is not None and value.is_view and value.kept]
    views = [i for i in kept if graph.outputs[i].again is None]

    def call(*args: Any) -> list[Any]:
        passed = list(args)
        for position, whole, start in shown:
            _check_shows(args[position], args[whole], start)
        if adopted:
            held = find_held_elsewhere({each.owner: args[position] for position, each in adopted}, passed)
            for position, each in adopted:
                assert each.adopted is not None
                passed[position] = adopt(args[position], each.owner, each.adopted, held)
        viewed = [None if source is None else passed[source] for _, _, source in anew]
        reserved: dict[int, Any] = {}
        for position, each, rows_at in inputs:
            _unwrap(passed, args, position, each, rows_at, reserved)
        if windows:
            turning = [args[position].window for position in windows]
            turns = turns_of(turning)
            passed.append(torch.full((1,), turns, dtype=torch.int64, device=turning[0].device))
        returned = compiled(*passed)
        if windows:
            turn(turning, turns)
        if plain_outputs:
            return list(returned)
        results: list[Any] = [
            returned[each.position]
            if each.position >= 0
            else _grown(each, reserved[source], returned)
            if each.grown is not None
            else _wrap(each, returned, args)
            if each.again is None
            else None  # below, when all others are there
            for each, source in outputs
        ]
        for (position, output, _), given in zip(anew, viewed, strict=True):
            whole_of = results[output.of] if isinstance(output.of, int) else given
            results[position] = _view(output, results[position], whole_of, returned)
        for position in views:
            _note_view(results[position], results)
        return results

    return call


def _check_shows(tensor: QuantizedKV, whole: QuantizedKV, start: int) -> None:
    """Raises: RuntimeError, if ``tensor`` does not show the rows of ``whole`` from ``start`` on."""
    part, other = tensor.buffers[0], whole.buffers[0]
    if part.data_ptr() != other.data_ptr() + start * other.stride(2) * other.itemsize:
        raise RuntimeError(
            "icw_int8kv: two key/value tensors shared memory when this graph was compiled, and share it in another way "
            "now, or not at all. Compile the function once for each of the two ways, or anew (torch.compiler.reset())."
        )


def _unwrap(
    passed: list[Any], args: Sequence[Any], position: int, each: Input, rows_at: int | None, reserved: dict[int, Any]
) -> None:
    """Put the parts of one stored input where the compiled function takes them."""
    tensor = passed[position]
    if each.appended:
        rows: Any = each.appended if rows_at is None else args[rows_at]
        claim, parts = tensor.reserve(rows, capacity=tensor.buffers[0].shape[2], tells=each.tells)
        reserved[position] = (tensor, claim, parts)
    else:
        if each.written:
            tensor.before_write()
            if each.token_by_token:
                tensor.settle()
            else:
                tensor._is_settled = False
        if not each.turned:
            tensor.straighten()
        parts = tensor.buffers
    passed[position] = parts[0]
    passed += parts[1:]
    if each.length is not None:
        passed.append(tensor.shape[2])


def _grown(output: Output, reserved: Any, returned: Sequence[Any]) -> QuantizedKV:
    assert output.grown is not None
    tensor, claim, parts = reserved
    if output.grown.others:
        made = {name: returned[part] for name, part in output.grown.others.items()}
        parts = tuple(made.get(spec.name, part) for spec, part in zip(tensor.format.parts, parts, strict=True))
    grown: QuantizedKV = tensor.grown(claim, parts, rows=output.grown.rows)
    return grown


def _wrap(output: Output, returned: Sequence[Any], args: Sequence[Any]) -> QuantizedKV:
    """A tensor made of parts that the graph returns: it grows if they are a cache that does, and are no view."""
    assert output.stored is not None
    value = output.stored.of_parts(returned[part] for part in output.stored.parts)
    owner = next((x for x in args if isinstance(x, QuantizedKV) and _shares_storage(x, value)), None)
    can_grow = output.grows and value.axes == AXES
    if owner is not None and (can_grow or owner.whole.kept):
        # A view of what was passed in: what is written to either is seen in both.
        claim = owner._claim
        made = QuantizedKV.of(value, claim if claim is None else claim.of_view(None))
        if claim is None and owner.whole.kept:
            owner.note_view(made)
        return made
    if not can_grow:
        return QuantizedKV.of(value)
    made = QuantizedKV.growing(value).with_spare()
    let_vary(made, 2)
    return made


def _view(output: Output, value: Tensor | None, whole: QuantizedKV | None, returned: Sequence[Any]) -> Any:
    """A view of ``whole``, as uncompiled code gives it; ``value`` is what it shows, where that is not stored."""
    assert output.again is not None
    view_of = output.again(returned)
    if value is not None:
        return _decoded(value, whole, view_of)
    made = view_of(whole)
    if isinstance(made, QuantizedKV) and made is not whole:
        made = made.without_base()
        if made.grows:
            let_vary(made, 2)
    return made


def _decoded(value: Tensor, whole: QuantizedKV | None, view_of: Callable[[Any], Any]) -> DecodedView:
    """``value``, of which nothing is lost that is written: it reaches ``whole``, or is refused if there is none."""
    if whole is None:
        return DecodedView(value, lambda: value, lambda: None)

    def stored() -> Any:
        view = view_of(whole)
        return view._stored() if isinstance(view, DecodedView) else view

    return DecodedView(value, lambda: view_of(whole.dequantize()), stored)


def _note_view(view: QuantizedKV, results: Sequence[Any]) -> None:
    """Tell a cache that the graph made, and returns besides, of a view of it whose kept rows have to follow."""
    if view._root is None and view._claim is None:
        others = (each for each in results if isinstance(each, QuantizedKV) and not each._layout.is_view)
        if (whole := next((each for each in others if _shares_storage(each, view.value)), None)) is not None:
            whole.note_view(view)


def _shares_storage(tensor: QuantizedKV, value: Stored) -> bool:
    mine = {part.untyped_storage().data_ptr() for part in tensor.buffers if isinstance(part, torch.Tensor)}
    return any(part.untyped_storage().data_ptr() in mine for part in value.rows.values())
