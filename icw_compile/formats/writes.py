"""What operations that write do to a stored value: only what is new is encoded (`icw_compile.formats.rules`)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from icw_compile.compat.fx import statically_known_true
from icw_compile.formats.base import Evaluator, Stored, decode
from icw_compile.formats.moves import all_have, axis_of, copied, dims_used, indices_of_tokens

aten = torch.ops.aten


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


def cat(run: Evaluator, tensors: Sequence[Any], dim: int = 0) -> Stored | None:
    like = next(t for t in tensors if isinstance(t, Stored))
    axis, tensors = axis_of(like, dim), [_promoted(run, t, like) for t in tensors]
    if axis == "D" or any(not _is_like(run, t, like, dim) for t in tensors):
        return None
    if axis == "T" or all_have(like, "T"):
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
            parts[spec.name] = copied(run, part)
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


def _is_like(run: Evaluator, t: Any, like: Stored, dim: int) -> bool:
    """Whether `torch.cat` along ``dim`` takes both: a shift would broadcast what has fewer heads."""
    if isinstance(t, Stored):
        return t.dtype == like.dtype and t.axes == like.axes
    value = run.tensor(t)
    return value.dtype == like.dtype and not _differs(value.shape, _size(run, like), dim)


def _size(run: Evaluator, x: Stored) -> tuple[Any, ...]:
    return (*run.tensor(x.parts[0]).shape[:-1], x.format.channels(run, x))


def _differs(size: Sequence[Any], other: Sequence[Any], dim: int) -> bool:
    """Whether sizes are known to differ elsewhere than in ``dim``."""
    if len(size) != len(other):
        return True
    sizes = enumerate(zip(size, other, strict=True))
    return any(i != dim % len(size) and statically_known_true(a != b) for i, (a, b) in sizes)


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


def append(run: Evaluator, x: Stored, source: Any, start: Any, rows: int | Any, *, tells: bool = False) -> Stored:
    """``x`` after ``source`` was written to its ``rows`` rows from ``start`` on, which are there.

    The rows are written in place; what is kept besides is new. ``tells``: `Format.tells` of rows that are several, or
    it may be so.
    """
    source = _promoted(run, source, x)
    if tells and not isinstance(source, Stored):
        told = x.format.told(run, x, source, start)
        for name in x.rows.keys() & told.keys():
            first = run.tensor(told[name]).shape[x.token_dim]
            run.call(aten.copy_.default, run.call(aten.narrow.default, x[name], x.token_dim, 0, first), told.pop(name))
        x = x.with_parts(**told)
    for name, new in encode_like(run, source, x).items():
        place = run.call(aten.narrow.default, x[name], x.token_dim, start, rows)
        run.call(aten.copy_.default, place, new)
    return x.with_parts(**appended(run, x, source, start))


def index_copy_(run: Evaluator, x: Any, dim: int, index: Any, source: Any) -> Stored | None:
    if not isinstance(x, Stored) or not _fits(run, x, source):
        return None
    axis = axis_of(x, dim)
    if axis == "D" or (axis != "T" and not all_have(x, "T")):
        return None
    if not isinstance(source, Stored) and _differs(run.tensor(source).shape, _size(run, x), dim):
        return None  # an error
    if axis == "T":
        x = x.format.settle_more(run, x, source)
    written = _write(run, aten.index_copy_.default, x, (dim, index), source)
    return _keep_at(run, written, source, index if axis == "T" else None)


def index_put_(run: Evaluator, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Stored | None:
    if not isinstance(x, Stored) or accumulate or not _fits(run, x, values):
        return None
    used = dims_used(run, indices)
    if used >= len(x.axes):
        return None
    at = None
    if not all_have(x, "T"):
        # Indexing may move dimensions: only what is shared by the rows that are written fits them.
        if (index := indices_of_tokens(run, x, indices)) is None:
            return None
        if run.tensor(index).dtype not in (torch.bool, torch.uint8):
            at = run.call(aten.remainder.Scalar, index, _tokens(run, x))  # -1 is the last
    return _keep_at(run, _write(run, aten.index_put_.default, x, (indices,), values), values, at)


def copy_(run: Evaluator, x: Any, source: Any, non_blocking: bool = False) -> Stored | None:
    if not isinstance(x, Stored) or not _fits(run, x, source):
        return None
    if not isinstance(source, Stored) and len(run.tensor(source).shape) > len(x.axes):
        return None
    written = _write(run, aten.copy_.default, x.format.settle(run, x, source), (), source)
    if not x.kept or x.is_view:
        return written
    if isinstance(source, Stored) and source.format == x.format:
        return _set(run, written, source.kept)
    return _keep_all(run, written, source)


def _keep_at(run: Evaluator, x: Stored, source: Any, index: Any) -> Stored:
    """``x`` after ``source`` was written to its rows ``index``; ``None`` where these are not known. As `_keep_all`."""
    if not x.kept or x.is_view:
        return x
    if index is None:
        return x.format.forget(run, x)
    values = decode(run, source) if isinstance(source, Stored) else source
    # An assignment to a subscript leaves out the sizes of 1 in front: one row of one head is of one dimension.
    *others, tokens, _ = (1,) * (len(x.axes) - run.tensor(values).dim()) + tuple(run.tensor(values).shape)
    has_all = statically_known_true(tokens == run.tensor(index).shape[0])
    if not has_all and not statically_known_true(tokens == 1):
        return x.format.forget(run, x)
    if not has_all or any(statically_known_true(size == 1) for size in others):
        heads = [run.size(x["exact"], dim) for dim in range(len(x.axes) - 2)]
        values = run.call(aten.expand.default, values, [*heads, run.size(index, 0), -1])
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
    return _keep_all(run, _write(run, aten.copy_.default, x, (), values), values)


def _keep_all(run: Evaluator, x: Stored, source: Any) -> Stored:
    """``x`` after ``source`` was written to all of its rows.

    A view keeps none: rows that are kept besides are those of the whole, and were forgotten before.
    """
    if not x.kept or x.is_view:
        return x
    whole = run.call(aten.arange.default, _tokens(run, x), device=run.tensor(x.parts[0]).device)
    return _keep_at(run, x, source, whole)


def zero_(run: Evaluator, x: Any) -> Stored | None:
    if not isinstance(x, Stored):
        return None
    # Zeros are zeros with any shift, and the next first write settles another.
    return x.format.forget(
        run, x.with_parts(**{name: run.call(aten.zero_.default, part) for name, part in x.rows.items()})
    )


def fill_(run: Evaluator, x: Any, value: Any) -> Stored | None:
    return zero_(run, x) if isinstance(value, (int, float)) and value == 0 else None
