"""What an operation does to a quantized value: the one table behind the passes and behind ``QuantizedKV``.

A quantized value is its parts, int8 rows and one scale per row. An operation that only moves rows (``slice`` of
tokens, ``roll``, ``index_select`` of the batch, ...) does the same to each part, exactly; an operation that writes
rows quantizes just what is new. Every rule is written once, over an *evaluator*: for eager tensors
(`icw_compile.tensor`) it runs the operation, for a graph (`icw_compile.passes.propagate`) it adds a node.

A rule returns the resulting parts, or ``None`` where these arguments reach inside a row (``slice`` of head_dim, a
transpose of it): then the caller falls back to the dequantized value.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from icw_compile.ops import scale_dtype_for

__all__ = ["RULES", "Evaluator", "Quantized"]

aten = torch.ops.aten


class Quantized(NamedTuple):
    """The parts of one quantized value, as tensors or as graph nodes.

    ``qdata`` is int8 ``[..., head_dim]``, ``scale`` is ``[..., 1]``, and the value that they stand for has ``dtype``.
    """

    qdata: Any
    scale: Any
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[Any, ...]:
        return (self.qdata, self.scale)

    def of(self, parts: Sequence[Any]) -> "Quantized":
        """Another value of this dtype, made of ``parts`` in the order of `parts`."""
        qdata, scale = parts
        return Quantized(qdata, scale, self.dtype)


class Evaluator(Protocol):
    """How a rule runs an operation, and how it sees the metadata of an operand."""

    #: The operation that gives parts another shape. Spare rows may lie between the heads of a part, where there are
    #: none between those of the tensor that it stands for, so that ``view`` will not always do.
    view: Any

    def call(self, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...

    def tensor(self, operand: Any) -> torch.Tensor:
        """The tensor, or the fake tensor, behind an operand: for its shape and dtype."""
        ...


Rule = Callable[..., "Quantized | None"]


def _quantize(run: Evaluator, value: Any, like: Quantized) -> Quantized:
    if isinstance(value, Quantized):
        return value
    parts = run.call(torch.ops.icw_int8kv.quantize_per_head.default, value, scale_dtype_for(like.dtype))
    return like.of(parts)


def _is_last(run: Evaluator, x: Quantized, dim: int, extra: int = 0) -> bool:
    rank = run.tensor(x.qdata).dim() + extra
    return dim % rank == rank - 1


def _same(target: Any) -> Rule:
    """``op(x)``: nothing but the rows themselves."""

    def rule(run: Evaluator, x: Quantized, **kwargs: Any) -> Quantized | None:
        return x.of([run.call(target, part, **kwargs) for part in x.parts])

    return rule


def _to_dtype(run: Evaluator, x: Quantized, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Quantized | None:
    """``x.to(dtype)`` is ``x`` where that is its dtype already."""
    return x if dtype == x.dtype and not any(args) and not kwargs else None


def _along(target: Any, *, adds_dim: bool = False) -> Rule:
    """``op(x, dim, ...)`` that moves whole rows along ``dim``."""

    def rule(run: Evaluator, x: Quantized, dim: int = 0, *args: Any) -> Quantized | None:
        if _is_last(run, x, dim, extra=int(adds_dim)):
            return None
        return x.of([run.call(target, part, dim, *args) for part in x.parts])

    return rule


def _transpose(run: Evaluator, x: Quantized, dim0: int, dim1: int) -> Quantized | None:
    if _is_last(run, x, dim0) or _is_last(run, x, dim1):
        return None
    return x.of([run.call(aten.transpose.int, part, dim0, dim1) for part in x.parts])


def _permute(run: Evaluator, x: Quantized, dims: Sequence[int]) -> Quantized | None:
    if not _is_last(run, x, dims[-1]):
        return None
    return x.of([run.call(aten.permute.default, part, dims) for part in x.parts])


def _over_dims(target: Any) -> Rule:
    """``roll(x, shifts, dims)`` and ``flip(x, dims)``: the last argument names the dimensions."""

    def rule(run: Evaluator, x: Quantized, *args: Any) -> Quantized | None:
        dims = args[-1]
        if len(args) != len(target._schema.arguments) - 1 or not dims or any(_is_last(run, x, d) for d in dims):
            return None
        return x.of([run.call(target, part, *args) for part in x.parts])

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
        return x.of([run.call(move, x.qdata, [*leading, last]), run.call(move, x.scale, [*leading, 1])])

    return rule


def _repeat(run: Evaluator, x: Quantized, repeats: Sequence[int]) -> Quantized | None:
    if repeats[-1] != 1:
        return None
    return x.of([run.call(aten.repeat.default, part, repeats) for part in x.parts])


def _repeat_interleave(
    run: Evaluator, x: Quantized, repeats: int, dim: int | None = None, **kwargs: Any
) -> Quantized | None:
    if dim is None or _is_last(run, x, dim):
        return None
    return x.of([run.call(aten.repeat_interleave.self_int, part, repeats, dim, **kwargs) for part in x.parts])


def _index(run: Evaluator, x: Quantized, indices: Sequence[Any]) -> Quantized | None:
    if not _indexes_rows(run, x, indices):
        return None
    return x.of([run.call(aten.index.Tensor, part, indices) for part in x.parts])


def _indexes_rows(run: Evaluator, x: Quantized, indices: Sequence[Any]) -> bool:
    """Whether advanced indices stop before head_dim. A boolean index takes up as many dimensions as it has."""
    used = 0
    for index in indices:
        boolean = index is not None and run.tensor(index).dtype in (torch.bool, torch.uint8)
        used += run.tensor(index).dim() if boolean else 1
    return used < run.tensor(x.qdata).dim()


def _cat(run: Evaluator, tensors: Sequence[Any], dim: int = 0) -> Quantized | None:
    quantized = [t for t in tensors if isinstance(t, Quantized)]
    like = quantized[0]
    rank = run.tensor(like.qdata).dim()
    if _is_last(run, like, dim):
        return None
    for t in tensors:
        if isinstance(t, Quantized):
            if t.dtype != like.dtype:
                return None
        elif run.tensor(t).dim() != rank or run.tensor(t).dtype != like.dtype:
            return None
    parts = zip(*[_quantize(run, t, like).parts for t in tensors], strict=True)
    return like.of([run.call(aten.cat.default, list(part), dim) for part in parts])


def _index_copy_(run: Evaluator, x: Any, dim: int, index: Any, source: Any) -> Quantized | None:
    if not isinstance(x, Quantized) or _is_last(run, x, dim):
        return None
    new = _rows_to_write(run, x, source)
    if new is None:
        return None
    written = zip(x.parts, new.parts, strict=True)
    return x.of([run.call(aten.index_copy_.default, old, dim, index, part) for old, part in written])


def _index_put_(
    run: Evaluator, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False
) -> Quantized | None:
    if not isinstance(x, Quantized) or accumulate or not _indexes_rows(run, x, indices):
        return None
    new = _rows_to_write(run, x, values)
    if new is None:
        return None
    written = zip(x.parts, new.parts, strict=True)
    return x.of([run.call(aten.index_put_.default, old, indices, part) for old, part in written])


def _copy_(run: Evaluator, x: Any, source: Any, non_blocking: bool = False) -> Quantized | None:
    if not isinstance(x, Quantized):
        return None
    new = _rows_to_write(run, x, source)
    if new is None:
        return None
    written = zip(x.parts, new.parts, strict=True)
    return x.of([run.call(aten.copy_.default, old, part) for old, part in written])


def _rows_to_write(run: Evaluator, x: Quantized, source: Any) -> Quantized | None:
    """``source`` quantized, if it comes in whole rows of the same head_dim (and not broadcast along it)."""
    if isinstance(source, Quantized):
        return source if source.dtype == x.dtype else None
    rows, values = run.tensor(x.qdata), run.tensor(source)
    if values.dim() == 0 or not values.is_floating_point():
        return None
    return _quantize(run, source, x) if statically_known_true(values.shape[-1] == rows.shape[-1]) else None


def _zero_(run: Evaluator, x: Quantized) -> Quantized | None:
    return x.of([run.call(aten.zero_.default, part) for part in x.parts])


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
    aten.select.int: _along(aten.select.int),
    aten.narrow.default: _along(aten.narrow.default),
    aten.index_select.default: _along(aten.index_select.default),
    aten.unsqueeze.default: _along(aten.unsqueeze.default, adds_dim=True),
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
