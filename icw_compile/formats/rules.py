"""What an operation does to a stored value: the one table behind the passes and behind ``QuantizedKV``.

An operation that moves data along an axis does the same to each part that has the axis, exactly; a part that lacks it
is the same for all of it. An operation that writes encodes just what is new. Every rule is written once, over an
`icw_compile.formats.base.Evaluator`, and knows no format.

A rule returns the resulting `Stored` (a tuple of them for an operation that returns several), or ``None`` where these
arguments reach inside a row (a slice of the channels, a transpose of them), or would part the tokens from what they
share: then the caller falls back on the decoded value.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from icw_compile.compat.fx import statically_known_true
from icw_compile.formats.base import Evaluator, Part, Stored

__all__ = ["RULES", "append", "can_join", "decode", "encode_like"]

aten = torch.ops.aten

#: The end of a slice that takes all there is.
_END = 2**63 - 1

Rule = Callable[..., "Stored | tuple[Stored, ...] | None"]


def decode(run: Evaluator, x: Stored) -> Any:
    """The value that ``x`` stands for."""
    return x.format.decode(run, x, x.dtype)


def encode_like(run: Evaluator, value: Any, into: Stored) -> dict[str, Any]:
    """``value``, stored already or not, as rows for the storage ``into``."""
    if isinstance(value, Stored):
        if value.format == into.format and value.axes == into.axes and _shares_like(run, value, into):
            return value.rows
        value = decode(run, value)
    return into.format.encode(run, value, into)


def _shares_like(run: Evaluator, a: Stored, b: Stored) -> bool:
    """Whether what the tokens share is the same in both."""
    specs = zip(a.format.parts, a.parts, b.parts, strict=True)
    return all(run.same(x, y) for spec, x, y in specs if spec.is_aligned and not ({"T", "K"} & set(spec.axes)))


def _axis(x: Stored, dim: int, extra: int = 0) -> str:
    """The axis of a dimension, which may count from the end; one dimension more for an operation that adds one."""
    return x.axes[dim % (len(x.axes) + extra)]


def _all_have(x: Stored, axis: str) -> bool:
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
) -> Stored:
    """``act`` on each part that has a dimension for each of the value's; the others stay, a copy of them for a copy.

    ``tokens`` is the operation, if it acts along the tokens: what has these in another form follows on its own.
    """
    parts = {}
    for part, value in x.named.items():
        spec = next(p for p in x.format.parts if p.name == part)
        if spec.is_aligned and not (tokens is not None and "K" in spec.axes):
            parts[part] = act(spec, value)
        else:
            parts[part] = value if is_view else run.call(aten.clone.default, value)
    if tokens is not None:
        parts |= x.format.move_tokens(run, x, *tokens)
    return replace(x.with_parts(**parts), axes=x.axes if axes is None else axes, is_view=is_view)


# Moves.


def _same(target: Any, *, is_view: bool) -> Rule:
    """Every part alike."""

    def rule(run: Evaluator, x: Stored, **kwargs: Any) -> Stored:
        parts = x.of_parts(run.call(target, part, **kwargs) for part in x.parts)
        return replace(parts, is_view=x.is_view and is_view)

    return rule


def _to_dtype(run: Evaluator, x: Stored, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Stored | None:
    return x if dtype == x.dtype and not any(args) and not kwargs else None


def _slice(run: Evaluator, x: Stored, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Stored | None:
    axis = _axis(x, dim)
    if axis == "D":
        return None
    if start in (None, 0) and end in (None, _END) and step == 1:
        specs = zip(x.format.parts, x.parts, strict=True)
        return x.of_parts(run.call(aten.slice.Tensor, part, dim) if spec.is_aligned else part for spec, part in specs)

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.slice.Tensor, part, dim, start, end, step) if spec.has(axis) else part

    return _each(run, x, act, tokens=(aten.slice.Tensor, (dim, start, end, step)) if axis == "T" else None)


def _narrow(run: Evaluator, x: Stored, dim: int, start: Any, length: Any) -> Stored | None:
    axis = _axis(x, dim)
    if axis == "D" or (axis == "T" and x.kept):
        return None

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.narrow.default, part, dim, start, length) if spec.has(axis) else part

    return _each(run, x, act)


def _select(run: Evaluator, x: Stored, dim: int, index: Any) -> Stored | None:
    axis, at = _axis(x, dim), dim % len(x.axes)
    if axis == "D" or (axis == "T" and x.kept):
        return None

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.select.int, part, dim, index if spec.has(axis) else 0)

    return _each(run, x, act, axes=x.axes[:at] + x.axes[at + 1 :])


def _split(target: Any) -> Rule:
    """``split``, ``chunk`` and the like along ``dim``: several views."""

    def rule(run: Evaluator, x: Stored, sizes: Any, dim: int = 0) -> tuple[Stored, ...] | None:
        axis = _axis(x, dim)
        if axis == "D" or (axis == "T" and x.kept):
            return None
        pieces = {
            spec.name: run.call(target, part, sizes, dim) if spec.has(axis) else None
            for spec, part in zip(x.format.parts, x.parts, strict=True)
        }

        def piece(i: int) -> Stored:
            def act(spec: Part, part: Any) -> Any:
                of_part = pieces[spec.name]
                return part if of_part is None else of_part[i]

            return _each(run, x, act)

        first: Any = pieces[x.format.parts[0].name]
        return tuple(piece(i) for i in range(len(first)))

    return rule


def _unbind(run: Evaluator, x: Stored, dim: int = 0) -> tuple[Stored, ...] | None:
    axis, size = _axis(x, dim), run.tensor(x.parts[0]).shape[dim]
    if axis == "D" or not isinstance(size, int):
        return None
    pieces = [_select(run, x, dim, i) for i in range(size)]
    return None if None in pieces else tuple(piece for piece in pieces if piece is not None)


def _index_select(run: Evaluator, x: Stored, dim: int, index: Any) -> Stored | None:
    axis = _axis(x, dim)
    if axis == "D":
        return None

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.index_select.default, part, dim, index) if spec.has(axis) else _copied(run, part)

    tokens = (aten.index_select.default, (dim, index)) if axis == "T" else None
    return _each(run, x, act, is_view=False, tokens=tokens)


def _copied(run: Evaluator, part: Any) -> Any:
    return run.call(aten.clone.default, part)


def _unsqueeze(run: Evaluator, x: Stored, dim: int) -> Stored | None:
    at = dim % (len(x.axes) + 1)
    if at == len(x.axes):
        return None

    def act(spec: Part, part: Any) -> Any:
        return run.call(aten.unsqueeze.default, part, dim)

    return _each(run, x, act, axes=f"{x.axes[:at]}.{x.axes[at:]}")


def _squeeze(run: Evaluator, x: Stored, dim: int) -> Stored | None:
    at = dim % len(x.axes)
    if x.axes[at] in "TD":
        return None
    if not statically_known_true(run.tensor(x.parts[0]).shape[at] == 1):
        return None
    return _each(run, x, lambda spec, part: run.call(aten.squeeze.dim, part, dim), axes=x.axes[:at] + x.axes[at + 1 :])


def _transpose(run: Evaluator, x: Stored, dim0: int, dim1: int) -> Stored | None:
    order = list(range(len(x.axes)))
    a, b = dim0 % len(order), dim1 % len(order)
    order[a], order[b] = order[b], order[a]
    return _reorder(run, x, order, lambda part: run.call(aten.transpose.int, part, dim0, dim1))


def _permute(run: Evaluator, x: Stored, dims: Sequence[int]) -> Stored | None:
    order = [dim % len(x.axes) for dim in dims]
    return _reorder(run, x, order, lambda part: run.call(aten.permute.default, part, dims))


def _reorder(run: Evaluator, x: Stored, order: Sequence[int], move: Callable[[Any], Any]) -> Stored | None:
    axes = "".join(x.axes[dim] for dim in order)
    if axes[-1] != "D" or (x.kept and axes[-2] != "T"):
        return None
    return _each(run, x, lambda spec, part: move(part), axes=axes)


def _over_dims(target: Any) -> Rule:
    """``roll(x, shifts, dims)`` and ``flip(x, dims)``: the last argument names the dimensions."""

    def rule(run: Evaluator, x: Stored, *args: Any) -> Stored | None:
        *others, dims = args
        if len(args) != len(target._schema.arguments) - 1 or not dims or any(_axis(x, dim) == "D" for dim in dims):
            return None
        along_tokens = [_axis(x, dim) == "T" for dim in dims]
        if any(along_tokens) and not all(along_tokens) and x.kept:
            return None

        def act(spec: Part, part: Any) -> Any:
            chosen = [i for i, dim in enumerate(dims) if spec.has(_axis(x, dim))]
            if not chosen:
                return _copied(run, part)
            return run.call(target, part, *([each[i] for i in chosen] for each in (*others, dims)))

        return _each(run, x, act, is_view=False, tokens=(target, args) if any(along_tokens) else None)

    return rule


def _to_shape(target: Any) -> Rule:
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
            return run.call(move, part, [*leading, run.tensor(part).shape[-1]])

        return _each(run, x, act, axes=axes)

    return rule


def _repeat(run: Evaluator, x: Stored, repeats: Sequence[int]) -> Stored | None:
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


def _repeat_interleave(run: Evaluator, x: Stored, repeats: int, dim: int | None = None, **kwargs: Any) -> Stored | None:
    if dim is None or (axis := _axis(x, dim)) == "D":
        return None

    def act(spec: Part, part: Any) -> Any:
        if not spec.has(axis):
            return _copied(run, part)
        return run.call(aten.repeat_interleave.self_int, part, repeats, dim, **(kwargs if spec.has_rows else {}))

    tokens = (aten.repeat_interleave.self_int, (repeats, dim)) if axis == "T" else None
    return _each(run, x, act, is_view=False, tokens=tokens)


def _index(run: Evaluator, x: Stored, indices: Sequence[Any]) -> Stored | None:
    used = _dims_used(run, indices)
    if used >= len(x.axes):
        return None
    if "T" in x.axes[:used]:
        if indices_of_tokens(run, x, indices) is None:
            # Among others, or of several dimensions.
            if not _all_have(x, "T"):
                return None
            rank = run.tensor(run.call(aten.index.Tensor, x.parts[0], indices)).dim()
            axes = "." * (rank - 1) + "D"
            return _each(
                run, x, lambda spec, part: run.call(aten.index.Tensor, part, indices), axes=axes, is_view=False
            )

        def act(spec: Part, part: Any) -> Any:
            return run.call(aten.index.Tensor, part, indices) if spec.has("T") else _copied(run, part)

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


def _dims_used(run: Evaluator, indices: Sequence[Any]) -> int:
    """How many dimensions are indexed. A boolean index takes up as many as it has."""
    used = 0
    for index in indices:
        boolean = index is not None and run.tensor(index).dtype in (torch.bool, torch.uint8)
        used += run.tensor(index).dim() if boolean else 1
    return used


def _cat(run: Evaluator, tensors: Sequence[Any], dim: int = 0) -> Stored | None:
    like = next(t for t in tensors if isinstance(t, Stored))
    axis, tensors = _axis(like, dim), [_promoted(run, t, like) for t in tensors]
    if axis == "D" or any(not _is_like(run, t, like) for t in tensors):
        return None
    if axis == "T" or _all_have(like, "T"):
        rows = [encode_like(run, t, like) for t in tensors]
    elif all(isinstance(t, Stored) and t.format == like.format for t in tensors):
        rows = [t.named for t in tensors]
    else:  # what a float tensor would share along its tokens is not known
        return None
    parts = {}
    for spec, part in zip(like.format.parts, like.parts, strict=True):
        if spec.has(axis) and spec.is_aligned:
            parts[spec.name] = run.call(aten.cat.default, [each[spec.name] for each in rows], dim)
        else:
            parts[spec.name] = _copied(run, part)
    result = replace(like.with_parts(**parts), is_view=False)
    if not like.kept:
        return result
    if axis == "T" and len(tensors) == 2 and isinstance(tensors[0], Stored):
        return result.with_parts(**appended(run, like, tensors[1], _tokens(run, like)))
    return result.with_parts(**like.format.move_tokens(run, result, aten.cat.default, (tensors, dim)))


def _promoted(run: Evaluator, t: Any, like: Stored) -> Any:
    """``t`` in the dtype of ``like``, if that is the wider one: what `torch.cat` of both does, as under autocast."""
    if isinstance(t, Stored) or run.tensor(t).dtype == like.dtype or not can_join(run.tensor(t).dtype, like.dtype):
        return t
    return run.call(aten.to.dtype, t, like.dtype)


def can_join(new: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether `torch.cat` of rows of these dtypes has the second one."""
    return torch.promote_types(new, dtype) == dtype


def _is_like(run: Evaluator, t: Any, like: Stored) -> bool:
    if isinstance(t, Stored):
        return t.dtype == like.dtype and t.axes == like.axes
    value = run.tensor(t)
    return value.dim() == len(like.axes) and value.dtype == like.dtype


def _tokens(run: Evaluator, x: Stored) -> Any:
    """The number of tokens as an operand."""
    return run.size(x.parts[0], x.axes.index("T"))


def appended(run: Evaluator, x: Stored, source: Any, start: Any) -> dict[str, Any]:
    """The parts of ``x`` that are no rows, once ``source`` is written from row ``start`` on."""
    if not x.kept:
        return {}
    values = decode(run, source) if isinstance(source, Stored) else source
    index = run.call(aten.arange.default, run.size(values, x.axes.index("T")), device=run.tensor(values).device)
    return x.format.keep(run, x, values, run.call(aten.add.Tensor, index, start))


def append(run: Evaluator, x: Stored, source: Any, start: Any, rows: int | Any) -> Stored:
    """``x`` after ``source`` was written to its ``rows`` rows from ``start`` on, which are there.

    The rows are written in place; what is kept besides is new.
    """
    source = _promoted(run, source, x)
    for name, new in encode_like(run, source, x).items():
        place = run.call(aten.narrow.default, x[name], x.token_dim, start, rows)
        run.call(aten.copy_.default, place, new)
    return x.with_parts(**appended(run, x, source, start))


# Writes.


def _index_copy_(run: Evaluator, x: Any, dim: int, index: Any, source: Any) -> Stored | None:
    if not isinstance(x, Stored) or not _fits(run, x, source):
        return None
    _refuse_views_that_keep(run, x)
    axis = _axis(x, dim)
    if axis == "D" or (axis != "T" and not _all_have(x, "T")):
        return None
    if axis == "T":
        x = x.format.settle(run, x, source)
    written = _write(run, aten.index_copy_.default, x, (dim, index), source)
    return _keep_at(run, written, source, index if axis == "T" else None)


def _index_put_(run: Evaluator, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Stored | None:
    if not isinstance(x, Stored) or accumulate or not _fits(run, x, values):
        return None
    _refuse_views_that_keep(run, x)
    used = _dims_used(run, indices)
    if used >= len(x.axes):
        return None
    at = None
    if not _all_have(x, "T"):
        # Indexing may move dimensions: only what is shared by the rows that are written fits them.
        if (index := indices_of_tokens(run, x, indices)) is None:
            return None
        if run.tensor(index).dtype not in (torch.bool, torch.uint8):
            at = run.call(aten.remainder.Scalar, index, _tokens(run, x))  # -1 is the last
    return _keep_at(run, _write(run, aten.index_put_.default, x, (indices,), values), values, at)


def _copy_(run: Evaluator, x: Any, source: Any, non_blocking: bool = False) -> Stored | None:
    if not isinstance(x, Stored) or not _fits(run, x, source):
        return None
    if not isinstance(source, Stored) and len(run.tensor(source).shape) > len(x.axes):
        return None
    _refuse_views_that_keep(run, x)
    written = _write(run, aten.copy_.default, x.format.settle(run, x, source), (), source)
    if not x.kept:
        return written
    if isinstance(source, Stored) and source.format == x.format:
        return _set(run, written, source.kept)
    return _keep_all(run, written, source)


def _keep_at(run: Evaluator, x: Stored, source: Any, index: Any) -> Stored:
    """``x`` after ``source`` was written to its rows ``index``; ``None`` where these are not known."""
    if not x.kept:
        return x
    values = decode(run, source) if isinstance(source, Stored) else source
    rows = run.tensor(values).shape
    if index is None or len(rows) < 2 or not statically_known_true(rows[-2] == run.tensor(index).shape[0]):
        return x.format.forget(run, x)
    heads = [run.size(x["exact"], dim) for dim in range(len(x.axes) - 2)]
    if len(rows) < len(x.axes) or any(statically_known_true(size == 1) for size in rows[:-2]):
        values = run.call(aten.expand.default, values, [*heads, -1, -1])
    return _set(run, x, x.format.keep(run, x, values, index))


def _set(run: Evaluator, x: Stored, parts: dict[str, Any]) -> Stored:
    """Write these into the storage that ``x`` has for them."""
    return x.with_parts(**{name: run.call(aten.copy_.default, x[name], part) for name, part in parts.items()})


def _fits(run: Evaluator, x: Stored, source: Any) -> bool:
    """Whether ``source`` comes in whole rows of the same channels (and not broadcast along them)."""
    if isinstance(source, Stored):
        return source.dtype == x.dtype and source.axes == x.axes
    if not isinstance(source, torch.fx.Node) and not isinstance(source, torch.Tensor):
        return False
    values = run.tensor(source)
    if values.dim() == 0 or not values.is_floating_point():
        return False
    return statically_known_true(values.shape[-1] == x.format.channels(run, x))


def _write(run: Evaluator, target: Any, x: Stored, where: Sequence[Any], source: Any) -> Stored:
    rows = encode_like(run, source, x)
    return x.with_parts(**{name: run.call(target, x[name], *where, new) for name, new in rows.items()})


def overwrite(run: Evaluator, x: Stored, values: Any) -> Stored:
    """Encode all of ``values`` again into the storage of ``x``: after an operation that no rule carries out."""
    _refuse_views_that_keep(run, x)
    return _keep_all(run, _write(run, aten.copy_.default, x, (), values), values)


def _keep_all(run: Evaluator, x: Stored, source: Any) -> Stored:
    """``x`` after ``source`` was written to all of its rows."""
    if not x.kept:
        return x
    whole = run.call(aten.arange.default, _tokens(run, x), device=run.tensor(x.parts[0]).device)
    return _keep_at(run, x, source, whole)


def _refuse_views_that_keep(run: Evaluator, x: Stored) -> None:
    """Rows that are kept besides are those of the whole: a write into a view would leave them as they were."""
    if x.is_view and x.kept and run.takes_effect:
        raise NotImplementedError(
            "icw_int8kv: a cache with icw.sink_tokens or icw.recent_tokens is written as a whole; this writes into "
            "a view of it, and the rows that it keeps would not follow."
        )


def _zero_(run: Evaluator, x: Any) -> Stored | None:
    if not isinstance(x, Stored):
        return None
    _refuse_views_that_keep(run, x)
    # Zeros are zeros with any shift, and the next first write settles another.
    return x.format.forget(
        run, x.with_parts(**{name: run.call(aten.zero_.default, part) for name, part in x.rows.items()})
    )


def _fill_(run: Evaluator, x: Any, value: Any) -> Stored | None:
    return _zero_(run, x) if isinstance(value, (int, float)) and value == 0 else None


#: operation -> what it does to a stored value. The operands that are stored arrive as `Stored`.
RULES: dict[Any, Rule] = {
    # Every part alike.
    aten.alias.default: _same(aten.alias.default, is_view=True),
    aten.detach.default: _same(aten.detach.default, is_view=True),
    aten.clone.default: _same(aten.clone.default, is_view=False),
    aten.contiguous.default: _same(aten.contiguous.default, is_view=True),
    aten.to.dtype: _to_dtype,
    # Views along an axis: the parts that have it. Kept rows follow a slice of the tokens, and no other.
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.split.Tensor: _split(aten.split.Tensor),
    aten.split_with_sizes.default: _split(aten.split_with_sizes.default),
    aten.chunk.default: _split(aten.chunk.default),
    aten.unbind.int: _unbind,
    # Views that reorder axes, add one, or merge those in front of the tokens.
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.expand.default: _to_shape(aten.expand.default),
    aten.view.default: _to_shape(aten.view.default),
    aten.reshape.default: _to_shape(aten.reshape.default),
    aten._unsafe_view.default: _to_shape(aten._unsafe_view.default),
    # Copies along an axis: the parts that have it. Kept rows follow a roll and an append, and are forgotten otherwise.
    aten.index_select.default: _index_select,
    aten.roll.default: _over_dims(aten.roll.default),
    aten.flip.default: _over_dims(aten.flip.default),
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.index.Tensor: _index,
    aten.cat.default: _cat,
    # Writes: only what is new is encoded.
    aten.index_copy_.default: _index_copy_,
    aten.index_put_.default: _index_put_,
    aten.copy_.default: _copy_,
    aten.zero_.default: _zero_,
    aten.fill_.Scalar: _fill_,
}
