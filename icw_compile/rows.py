"""What an operation does to a quantized value: the one table behind the passes and behind ``QuantizedKV``.

A quantized value is its parts, int8 rows and one scale per row, and for some the shift of each channel. An operation
that only moves rows (``slice`` of tokens, ``roll``, ``index_select`` of the batch, ...) does the same to each part,
exactly; an operation that writes rows quantizes just what is new. Every rule is written once, over an *evaluator*: for
eager tensors (`icw_compile.tensor`) it runs the operation, for a graph (`icw_compile.passes.propagate`) it adds a node.

A rule returns the resulting parts, or ``None`` where these arguments reach inside a row (``slice`` of head_dim, a
transpose of it), or would part the tokens from the shift that they share: then the caller falls back to the dequantized
value.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from icw_compile.ops import scale_dtype_for

__all__ = ["RULES", "Evaluator", "Quantized", "dequantize", "quantize_like"]

aten = torch.ops.aten
_ops = torch.ops.icw_int8kv


class Quantized(NamedTuple):
    """The parts of one quantized value, as tensors or as graph nodes.

    ``qdata`` is int8 ``[..., tokens, head_dim]``, ``scale`` is ``[..., tokens, 1]``, and the value that they stand for
    has ``dtype``. ``shift`` is int8 ``[..., 1, head_dim]``, the same for all tokens, or ``None``: the channels were
    divided by ``2 ** shift`` before they were quantized. With a shift, tokens are always the last dimension but one.
    """

    qdata: Any
    scale: Any
    dtype: torch.dtype
    shift: Any = None

    @property
    def rows(self) -> tuple[Any, Any]:
        """The parts that have a row for each token."""
        return self.qdata, self.scale

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.rows if self.shift is None else (*self.rows, self.shift)

    def of(self, rows: Sequence[Any], shift: Any = None) -> "Quantized":
        """Another value of this dtype."""
        qdata, scale = rows
        return Quantized(qdata, scale, self.dtype, shift)


class Evaluator(Protocol):
    """How a rule runs an operation, and how it sees the metadata of an operand."""

    #: The operation that gives parts another shape. Spare rows may lie between the heads of a part, where there are
    #: none between those of the tensor that it stands for, so that ``view`` will not always do.
    view: Any

    def call(self, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...

    def tensor(self, operand: Any) -> torch.Tensor:
        """The tensor, or the fake tensor, behind an operand: for its shape and dtype."""
        ...

    def same(self, a: Any, b: Any) -> bool:
        """Whether two operands are known to hold the same."""
        ...

    def is_whole(self, part: Any) -> bool:
        """Whether a part is known to be all of its storage, and no view of some of it."""
        ...


Rule = Callable[..., "Quantized | None"]


def dequantize(run: Evaluator, x: Quantized) -> Any:
    """The value that ``x`` stands for."""
    shift = () if x.shift is None else (x.shift,)
    return run.call(_ops.dequantize_per_head.default, x.qdata, x.scale, x.dtype, *shift)


def quantize_like(run: Evaluator, value: Any, like: Quantized) -> Quantized:
    """``value``, which may be quantized already, as rows for ``like``: with its shift and its dtype of scales."""
    if isinstance(value, Quantized):
        if run.same(value.shift, like.shift):
            return value
        value = dequantize(run, value)
    shift = () if like.shift is None else (like.shift,)
    rows = run.call(_ops.quantize_per_head.default, value, scale_dtype_for(like.dtype), *shift)
    return like.of(rows, like.shift)


def _rank(run: Evaluator, x: Quantized) -> int:
    return run.tensor(x.qdata).dim()


def _is_last(run: Evaluator, x: Quantized, dim: int, extra: int = 0) -> bool:
    rank = _rank(run, x) + extra
    return dim % rank == rank - 1


def _is_tokens(run: Evaluator, x: Quantized, dim: int, extra: int = 0) -> bool:
    """Whether ``dim`` is that of the tokens, along which there is but one shift."""
    rank = _rank(run, x) + extra
    return x.shift is not None and dim % rank == rank - 2


def _same(target: Any) -> Rule:
    """``op(x)``: nothing but the rows themselves."""

    def rule(run: Evaluator, x: Quantized, **kwargs: Any) -> Quantized | None:
        rows = [run.call(target, part, **kwargs) for part in x.rows]
        return x.of(rows, None if x.shift is None else run.call(target, x.shift, **kwargs))

    return rule


def _to_dtype(run: Evaluator, x: Quantized, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Quantized | None:
    """``x.to(dtype)`` is ``x`` where that is its dtype already."""
    return x if dtype == x.dtype and not any(args) and not kwargs else None


def _along(target: Any, *, changes_rank: int = 0) -> Rule:
    """``op(x, dim, ...)`` that moves whole rows along ``dim``."""

    def rule(run: Evaluator, x: Quantized, dim: int = 0, *args: Any) -> Quantized | None:
        extra = max(changes_rank, 0)
        tokens = _is_tokens(run, x, dim, extra)
        if _is_last(run, x, dim, extra) or (tokens and changes_rank):
            return None
        rows = [run.call(target, part, dim, *args) for part in x.rows]
        shift = x.shift if x.shift is None or tokens else run.call(target, x.shift, dim, *args)
        return x.of(rows, shift)

    return rule


def _transpose(run: Evaluator, x: Quantized, dim0: int, dim1: int) -> Quantized | None:
    if any(_is_last(run, x, dim) or _is_tokens(run, x, dim) for dim in (dim0, dim1)):
        return None
    return _each(run, x, aten.transpose.int, dim0, dim1)


def _permute(run: Evaluator, x: Quantized, dims: Sequence[int]) -> Quantized | None:
    if not _is_last(run, x, dims[-1]) or (x.shift is not None and not _is_tokens(run, x, dims[-2])):
        return None
    return _each(run, x, aten.permute.default, dims)


def _each(run: Evaluator, x: Quantized, target: Any, *args: Any) -> Quantized:
    """``op(x, ...)`` that does the same to every part."""
    rows = [run.call(target, part, *args) for part in x.rows]
    return x.of(rows, None if x.shift is None else run.call(target, x.shift, *args))


def _over_dims(target: Any) -> Rule:
    """``roll(x, shifts, dims)`` and ``flip(x, dims)``: the last argument names the dimensions."""

    def rule(run: Evaluator, x: Quantized, *args: Any) -> Quantized | None:
        dims = args[-1]
        if len(args) != len(target._schema.arguments) - 1 or not dims or any(_is_last(run, x, d) for d in dims):
            return None
        of_tokens = [_is_tokens(run, x, d) for d in dims]
        if not any(of_tokens):
            return _each(run, x, target, *args)
        if not all(of_tokens):
            return None
        return x.of([run.call(target, part, *args) for part in x.rows], x.shift)

    return rule


def _to_shape(target: Any) -> Rule:
    """``view``, ``reshape`` and ``expand`` to ``sizes`` that keep whole rows."""

    def rule(run: Evaluator, x: Quantized, sizes: Sequence[Any]) -> Quantized | None:
        head_dim, last = run.tensor(x.qdata).shape[-1], sizes[-1]
        if not isinstance(last, int) or not isinstance(head_dim, int):
            return None
        if last != head_dim and not (last == -1 and target is aten.expand.default):
            return None
        leading = list(sizes[:-1])
        move = run.view if target is aten.view.default else target
        qdata = run.call(move, x.qdata, [*leading, last])
        if x.shift is None:
            return x.of([qdata, run.call(move, x.scale, [*leading, 1])])
        before, after = run.tensor(x.qdata).shape, run.tensor(qdata).shape
        if len(after) < 2 or not (target is aten.expand.default or statically_known_true(before[-2] == after[-2])):
            return None
        shift = run.call(move, x.shift, [*leading[:-1], 1, last])
        return x.of([qdata, run.call(move, x.scale, [*leading, 1])], shift)

    return rule


def _repeat(run: Evaluator, x: Quantized, repeats: Sequence[int]) -> Quantized | None:
    if repeats[-1] != 1:
        return None
    rows = [run.call(aten.repeat.default, part, repeats) for part in x.rows]
    shift = None if x.shift is None else run.call(aten.repeat.default, x.shift, [*repeats[:-2], 1, 1])
    return x.of(rows, shift)


def _repeat_interleave(
    run: Evaluator, x: Quantized, repeats: int, dim: int | None = None, **kwargs: Any
) -> Quantized | None:
    if dim is None or _is_last(run, x, dim):
        return None
    rows = [run.call(aten.repeat_interleave.self_int, part, repeats, dim, **kwargs) for part in x.rows]
    shift = x.shift
    if shift is not None and not _is_tokens(run, x, dim):
        shift = run.call(aten.repeat_interleave.self_int, shift, repeats, dim)
    return x.of(rows, shift)


def _index(run: Evaluator, x: Quantized, indices: Sequence[Any]) -> Quantized | None:
    if not _indexes_rows(run, x, indices):
        return None
    rows = [run.call(aten.index.Tensor, part, indices) for part in x.rows]
    if x.shift is None:
        return x.of(rows)
    if _dims_used(run, indices) <= _rank(run, x) - 2:
        return x.of(rows, run.call(aten.index.Tensor, x.shift, indices))
    picks_tokens = all(index is None for index in indices[:-1]) and run.tensor(indices[-1]).dim() == 1
    return x.of(rows, x.shift) if picks_tokens else None


def _indexes_rows(run: Evaluator, x: Quantized, indices: Sequence[Any]) -> bool:
    """Whether advanced indices stop before head_dim."""
    return _dims_used(run, indices) < _rank(run, x)


def _dims_used(run: Evaluator, indices: Sequence[Any]) -> int:
    """How many dimensions are indexed. A boolean index takes up as many as it has."""
    used = 0
    for index in indices:
        boolean = index is not None and run.tensor(index).dtype in (torch.bool, torch.uint8)
        used += run.tensor(index).dim() if boolean else 1
    return used


def _cat(run: Evaluator, tensors: Sequence[Any], dim: int = 0) -> Quantized | None:
    quantized = [t for t in tensors if isinstance(t, Quantized)]
    like = quantized[0]
    if _is_last(run, like, dim):
        return None
    for t in tensors:
        if isinstance(t, Quantized):
            if t.dtype != like.dtype:
                return None
        elif run.tensor(t).dim() != _rank(run, like) or run.tensor(t).dtype != like.dtype:
            return None
    shift = like.shift
    if shift is None or _is_tokens(run, like, dim):
        parts = [quantize_like(run, t, like) for t in tensors]
    else:
        if len(quantized) < len(tensors) or any(t.shift is None for t in quantized):
            return None
        parts = quantized
        shift = run.call(aten.cat.default, [t.shift for t in quantized], dim)
    rows = zip(*[part.rows for part in parts], strict=True)
    return like.of([run.call(aten.cat.default, list(row), dim) for row in rows], shift)


def _index_copy_(run: Evaluator, x: Any, dim: int, index: Any, source: Any) -> Quantized | None:
    if not isinstance(x, Quantized) or _is_last(run, x, dim) or not _fits(run, x, source):
        return None
    if _is_tokens(run, x, dim):
        x = _settle_shift(run, x, source)
    return _write(run, aten.index_copy_.default, x, (dim, index), source)


def _index_put_(
    run: Evaluator, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False
) -> Quantized | None:
    if not isinstance(x, Quantized) or accumulate or not _indexes_rows(run, x, indices) or not _fits(run, x, values):
        return None
    # Indexing may move dimensions: only a shift that is the same in front of the rows fits what is written.
    if x.shift is not None and any(index is not None for index in indices[: _rank(run, x) - 2]):
        return None
    return _write(run, aten.index_put_.default, x, (indices,), values)


def _copy_(run: Evaluator, x: Any, source: Any, non_blocking: bool = False) -> Quantized | None:
    if not isinstance(x, Quantized) or not _fits(run, x, source):
        return None
    return _write(run, aten.copy_.default, _settle_shift(run, x, source), (), source)


def _fits(run: Evaluator, x: Quantized, source: Any) -> bool:
    """Whether ``source`` comes in whole rows of the same head_dim (and not broadcast along it)."""
    if isinstance(source, Quantized):
        return source.dtype == x.dtype
    rows, values = run.tensor(x.qdata), run.tensor(source)
    if values.dim() == 0 or not values.is_floating_point():
        return False
    return statically_known_true(values.shape[-1] == rows.shape[-1])


def _write(run: Evaluator, target: Any, x: Quantized, where: Sequence[Any], source: Any) -> Quantized:
    written = zip(x.rows, quantize_like(run, source, x).rows, strict=True)
    return x.of([run.call(target, old, *where, new) for old, new in written], x.shift)


def _settle_shift(run: Evaluator, x: Quantized, source: Any) -> Quantized:
    """The first write of more than one token says which channels are outliers: later ones find a shift that stays.

    "First" is known where the write is run, from the scales: they are 0 as long as nothing was written.
    """
    if x.shift is None or not run.is_whole(x.qdata):
        return x
    if isinstance(source, Quantized):
        if source.shift is None or run.same(source.shift, x.shift):
            return x
        new = source.shift
    else:
        shape = run.tensor(source).shape
        if len(shape) != _rank(run, x) or statically_known_true(shape[-2] <= 1):
            return x
        new = run.call(_ops.channel_shift.default, source)
    empty = run.call(aten.all.dim, run.call(aten.eq.Scalar, x.scale, 0), -2, True)
    settled = run.call(aten.where.self, empty, new, x.shift)
    return x._replace(shift=run.call(aten.copy_.default, x.shift, settled))


def _zero_(run: Evaluator, x: Quantized) -> Quantized | None:
    # Zeros are zeros with any shift, and the next first write settles another.
    return x.of([run.call(aten.zero_.default, part) for part in x.rows], x.shift)


def _fill_(run: Evaluator, x: Quantized, value: Any) -> Quantized | None:
    return _zero_(run, x) if isinstance(value, (int, float)) and value == 0 else None


#: operation -> what it does to a quantized value. The operands that are quantized arrive as `Quantized`.
RULES: dict[Any, Rule] = {
    # Moves: every part alike.
    aten.alias.default: _same(aten.alias.default),
    aten.detach.default: _same(aten.detach.default),
    aten.clone.default: _same(aten.clone.default),
    aten.contiguous.default: _same(aten.contiguous.default),
    aten.to.dtype: _to_dtype,
    aten.slice.Tensor: _along(aten.slice.Tensor),
    aten.select.int: _along(aten.select.int, changes_rank=-1),
    aten.narrow.default: _along(aten.narrow.default),
    aten.index_select.default: _along(aten.index_select.default),
    aten.unsqueeze.default: _along(aten.unsqueeze.default, changes_rank=1),
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.roll.default: _over_dims(aten.roll.default),
    aten.flip.default: _over_dims(aten.flip.default),
    aten.expand.default: _to_shape(aten.expand.default),
    aten.view.default: _to_shape(aten.view.default),
    aten.reshape.default: _to_shape(aten.reshape.default),
    aten._unsafe_view.default: _to_shape(aten._unsafe_view.default),
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.index.Tensor: _index,
    aten.cat.default: _cat,
    # Writes: only what is new is quantized.
    aten.index_copy_.default: _index_copy_,
    aten.index_put_.default: _index_put_,
    aten.copy_.default: _copy_,
    aten.zero_.default: _zero_,
    aten.fill_.Scalar: _fill_,
}
