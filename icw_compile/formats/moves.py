"""What operations that move data, and write nothing, do to a stored value (`icw_compile.formats.rules`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from icw_compile.compat.fx import schema_of, statically_known_true
from icw_compile.formats.base import Evaluator, Part, Stored

aten = torch.ops.aten

#: The end of a slice that goes to the end.
END = 2**63 - 1

Rule = Callable[..., "Stored | tuple[Stored, ...] | None"]


def axis_of(x: Stored, dim: int, extra: int = 0) -> str:
    """The axis of a dimension, which may count from the end; one dimension more for an operation that adds one."""
    return x.axes[dim % (len(x.axes) + extra)]


def all_have(x: Stored, axis: str) -> bool:
    """Whether no part is the same for all of this axis, or has it in another form."""
    return all(part.has(axis) for part in x.format.parts)


def _each(
    run: Evaluator,
    x: Stored,
    act: Callable[[Part, Any], Any],
    *,
    axes: str | None = None,
    is_view: bool = True,
    tokens: tuple[Any, Sequence[Any]] | None = None,
) -> Stored | None:
    """``act`` on each part that has a dimension for each of the value's; the others stay, a copy of them for a copy.

    ``tokens`` is the operation, if it acts along the tokens: what has these in another form follows on its own. That
    works as long as the tokens are the last dimension but one.
    """
    axes = x.axes if axes is None else axes
    if x.kept and axes[-2:] != "TD":
        return None
    parts = {}
    for part, value in x.named.items():
        spec = next(p for p in x.format.parts if p.name == part)
        if spec.is_aligned and not (tokens is not None and "K" in spec.axes):
            parts[part] = act(spec, value)
        else:
            parts[part] = value if is_view else run.call(aten.clone.default, value)
    if tokens is not None:
        parts |= x.format.move_tokens(run, x, *tokens)
    return replace(x.with_parts(**parts), axes=axes, is_view=is_view)


def same(target: Any, *, is_view: bool) -> Rule:
    """Every part alike."""

    def rule(run: Evaluator, x: Stored, **kwargs: Any) -> Stored:
        parts = x.of_parts(run.call(target, part, **kwargs) for part in x.parts)
        return replace(parts, is_view=x.is_view and is_view)

    return rule


def to_dtype(run: Evaluator, x: Stored, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Stored | None:
    return x if dtype == x.dtype and not any(args) and not kwargs else None


def slice_(run: Evaluator, x: Stored, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Stored | None:
    axis = axis_of(x, dim)
    if axis == "D":
        return None
    if start in (None, 0) and end in (None, END) and step == 1:
        specs = zip(x.format.parts, x.parts, strict=True)
        return x.of_parts(run.call(aten.slice.Tensor, part, dim) if spec.is_aligned else part for spec, part in specs)

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.slice.Tensor, part, dim, start, end, step) if spec.has(axis) else part

    return _each(run, x, act, tokens=(aten.slice.Tensor, (dim, start, end, step)) if axis == "T" else None)


def narrow(run: Evaluator, x: Stored, dim: int, start: Any, length: Any) -> Stored | None:
    axis = axis_of(x, dim)
    if axis == "D" or (axis == "T" and x.kept):
        return None

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.narrow.default, part, dim, start, length) if spec.has(axis) else part

    return _each(run, x, act)


def select(run: Evaluator, x: Stored, dim: int, index: Any) -> Stored | None:
    axis, at = axis_of(x, dim), dim % len(x.axes)
    if axis == "D" or (axis == "T" and x.kept):
        return None

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.select.int, part, dim, index if spec.has(axis) else 0)

    return _each(run, x, act, axes=x.axes[:at] + x.axes[at + 1 :])


def split(target: Any) -> Rule:
    """``split``, ``chunk`` and the like along ``dim``: several views."""

    def rule(run: Evaluator, x: Stored, sizes: Any, dim: int = 0) -> tuple[Stored, ...] | None:
        axis = axis_of(x, dim)
        if axis == "D" or (axis == "T" and x.kept):
            return None
        pieces = {
            spec.name: run.call(target, part, sizes, dim) if spec.has(axis) else None
            for spec, part in zip(x.format.parts, x.parts, strict=True)
        }

        def piece(i: int) -> Stored | None:
            def act(spec: Part, part: Any) -> Any:
                of_part = pieces[spec.name]
                return part if of_part is None else of_part[i]

            return _each(run, x, act)

        first: Any = pieces[x.format.parts[0].name]
        return _all([piece(i) for i in range(len(first))])

    return rule


def _all(pieces: Sequence[Stored | None]) -> tuple[Stored, ...] | None:
    return None if None in pieces else tuple(piece for piece in pieces if piece is not None)


def unbind(run: Evaluator, x: Stored, dim: int = 0) -> tuple[Stored, ...] | None:
    axis, size = axis_of(x, dim), run.tensor(x.parts[0]).shape[dim]
    if axis == "D" or not isinstance(size, int):
        return None
    return _all([select(run, x, dim, i) for i in range(size)])


def index_select(run: Evaluator, x: Stored, dim: int, index: Any) -> Stored | None:
    axis = axis_of(x, dim)
    if axis == "D":
        return None

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.index_select.default, part, dim, index) if spec.has(axis) else copied(run, part)

    tokens = (aten.index_select.default, (dim, index)) if axis == "T" else None
    return _each(run, x, act, is_view=False, tokens=tokens)


def copied(run: Evaluator, part: Any) -> Any:
    return run.call(aten.clone.default, part)


def unsqueeze(run: Evaluator, x: Stored, dim: int) -> Stored | None:
    at = dim % (len(x.axes) + 1)
    if at == len(x.axes):
        return None

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.unsqueeze.default, part, dim)

    return _each(run, x, act, axes=f"{x.axes[:at]}.{x.axes[at:]}")


def squeeze(run: Evaluator, x: Stored, dim: int) -> Stored | None:
    at = dim % len(x.axes)
    if x.axes[at] in "TD":
        return None
    if not statically_known_true(run.tensor(x.parts[0]).shape[at] == 1):
        return None
    return _each(run, x, lambda spec, part: run.call(aten.squeeze.dim, part, dim), axes=x.axes[:at] + x.axes[at + 1 :])


def transpose(run: Evaluator, x: Stored, dim0: int, dim1: int) -> Stored | None:
    order = list(range(len(x.axes)))
    a, b = dim0 % len(order), dim1 % len(order)
    order[a], order[b] = order[b], order[a]
    return _reorder(run, x, order, lambda part: run.call(aten.transpose.int, part, dim0, dim1))


def permute(run: Evaluator, x: Stored, dims: Sequence[int]) -> Stored | None:
    order = [dim % len(x.axes) for dim in dims]
    return _reorder(run, x, order, lambda part: run.call(aten.permute.default, part, dims))


def _reorder(run: Evaluator, x: Stored, order: Sequence[int], move: Callable[[Any], Any]) -> Stored | None:
    axes = "".join(x.axes[dim] for dim in order)
    if axes[-1] != "D":
        return None
    return _each(run, x, lambda spec, part: move(part), axes=axes)


def over_dims(target: Any) -> Rule:
    """``roll(x, shifts, dims)`` and ``flip(x, dims)``: the last argument names the dimensions."""

    def rule(run: Evaluator, x: Stored, *args: Any) -> Stored | None:
        *others, dims = args
        if len(args) != len(schema_of(target).arguments) - 1 or not dims or any(axis_of(x, dim) == "D" for dim in dims):
            return None
        along_tokens = [axis_of(x, dim) == "T" for dim in dims]
        if any(along_tokens) and not all(along_tokens) and x.kept:
            return None

        def act(spec: Part, part: Any) -> Any:
            chosen = [i for i, dim in enumerate(dims) if spec.has(axis_of(x, dim))]
            if not chosen:
                return copied(run, part)
            return run.call(target, part, *([each[i] for i in chosen] for each in (*others, dims)))

        return _each(run, x, act, is_view=False, tokens=(target, args) if any(along_tokens) else None)

    return rule


def to_shape(target: Any) -> Rule:
    """``view``, ``reshape`` and ``expand`` to ``sizes`` that keep whole rows."""
    expands = target is aten.expand.default

    def rule(run: Evaluator, x: Stored, sizes: Sequence[Any], **kwargs: Any) -> Stored | None:
        channels, last = x.format.channels(run, x), sizes[-1]
        if not isinstance(last, int) or not isinstance(channels, int) or kwargs:
            return None
        if last != channels and not (last == -1 and expands):
            return None
        move = run.view if target is aten.view.default else target
        first = run.call(move, x.parts[0], [*sizes[:-1], run.tensor(x.parts[0]).shape[-1]])
        # No rows have a view of any shape, whatever their layout is. A part that has no dimension for them is there.
        is_nothing = target is aten.view.default and run.is_eager and first.numel() == 0
        others = aten.reshape.default if is_nothing else move
        before, after = run.tensor(x.parts[0]).shape, run.tensor(first).shape
        if expands:
            axes = "." * (len(after) - len(before)) + x.axes
        else:
            keeps_tokens = (
                len(after) > 1
                and len(before) > 1
                and x.axes[-2] == "T"
                and statically_known_true(before[-2] == after[-2])
            )
            axes = "." * (len(after) - 2) + "TD" if keeps_tokens else "." * (len(after) - 1) + "D"
        if "T" not in axes and not all("T" in spec.axes for spec in x.format.parts):
            return None
        if expands and "T" in axes and x.kept:
            at = axes.index("T") - len(axes)
            if not statically_known_true(before[at] == after[at]):
                return None

        def act(spec: Part, part: Any) -> Any:
            if part is x.parts[0]:
                return first
            leading = list(sizes[:-1])
            if "T" in axes and not spec.has("T"):
                leading[axes.index("T")] = run.tensor(part).shape[x.axes.index("T")]
            return run.call(others, part, [*leading, run.tensor(part).shape[-1]])

        return _each(run, x, act, axes=axes)

    return rule


def repeat(run: Evaluator, x: Stored, repeats: Sequence[int]) -> Stored | None:
    if repeats[-1] != 1:
        return None
    axes = "." * (len(repeats) - len(x.axes)) + x.axes

    def act(spec: Part, part: Any) -> Any:
        own = [count if spec.has(axis) else 1 for count, axis in zip(repeats, axes, strict=True)]
        return run.call(aten.repeat.default, part, own)

    along_tokens = "T" in axes and repeats[axes.index("T")] != 1
    tokens = (aten.repeat.default, (repeats,)) if along_tokens else None
    if tokens is not None and x.kept and any(count != 1 for count, axis in zip(repeats, axes) if axis != "T"):
        return None
    return _each(run, x, act, axes=axes, is_view=False, tokens=tokens)


def repeat_interleave(run: Evaluator, x: Stored, repeats: int, dim: int | None = None, **kwargs: Any) -> Stored | None:
    if dim is None or (axis := axis_of(x, dim)) == "D":
        return None

    def act(spec: Part, part: Any) -> Any:
        if not spec.has(axis):
            return copied(run, part)
        return run.call(aten.repeat_interleave.self_int, part, repeats, dim, **(kwargs if spec.has_rows else {}))

    tokens = (aten.repeat_interleave.self_int, (repeats, dim)) if axis == "T" else None
    return _each(run, x, act, is_view=False, tokens=tokens)


def index(run: Evaluator, x: Stored, indices: Sequence[Any]) -> Stored | None:
    used = dims_used(run, indices)
    if used >= len(x.axes):
        return None
    if "T" in x.axes[:used]:
        if indices_of_tokens(run, x, indices) is None:
            # Among others, or of several dimensions.
            if not all_have(x, "T"):
                return None
            rank = run.tensor(run.call(aten.index.Tensor, x.parts[0], indices)).dim()
            axes = "." * (rank - 1) + "D"
            return _each(
                run, x, lambda spec, part: run.call(aten.index.Tensor, part, indices), axes=axes, is_view=False
            )

        def act(spec: Part, part: Any) -> Any:
            return run.call(aten.index.Tensor, part, indices) if spec.has("T") else copied(run, part)

        return _each(run, x, act, is_view=False, tokens=(aten.index.Tensor, (indices,)))
    tail = x.axes[used:]
    moved = run.call(aten.index.Tensor, x.parts[0], indices)
    axes = "." * (run.tensor(moved).dim() - len(tail)) + tail
    return _each(
        run,
        x,
        lambda spec, part: moved if part is x.parts[0] else run.call(aten.index.Tensor, part, indices),
        axes=axes,
        is_view=False,
    )


def indices_of_tokens(run: Evaluator, x: Stored, indices: Sequence[Any]) -> Any:
    """The index, of one dimension, of advanced ``indices`` that pick tokens and nothing else; else ``None``."""
    if len(indices) != x.axes.find("T") + 1 or any(index is not None for index in indices[:-1]):
        return None
    return indices[-1] if run.tensor(indices[-1]).dim() == 1 else None


def dims_used(run: Evaluator, indices: Sequence[Any]) -> int:
    """How many dimensions are indexed. A boolean index takes up as many as it has."""
    used = 0
    for index in indices:
        boolean = index is not None and run.tensor(index).dtype in (torch.bool, torch.uint8)
        used += run.tensor(index).dim() if boolean else 1
    return used
