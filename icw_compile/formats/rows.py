"""What an operation does to a quantized value: the one table behind the passes and behind ``QuantizedKV``.

A quantized value is its parts, int8 rows and one scale per row, and for some the shift of each channel, and some rows
that are kept in the float dtype as well. An operation that only moves rows (``slice`` of tokens, ``roll``,
``index_select`` of the batch, ...) does the same to each part, exactly; an operation that writes rows quantizes just
what is new. Every rule is written once, over an *evaluator*: for eager tensors (`icw_compile.cache.tensor`) it runs the
operation, for a graph (`icw_compile.passes.propagate`) it adds a node.

A rule returns the resulting parts, or ``None`` where these arguments reach inside a row (``slice`` of head_dim, a
transpose of it), or would part the tokens from the shift that they share: then the caller falls back to the dequantized
value.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from icw_compile.formats.ops import scale_dtype_for

__all__ = [
    "NOTHING",
    "PARTS",
    "ROWS",
    "RULES",
    "Evaluator",
    "Keep",
    "Quantized",
    "dequantize",
    "keep_written",
    "quantize_like",
]

aten = torch.ops.aten
_ops = torch.ops.icw_int8kv

#: The end of a slice that takes all there is.
_END = 2**63 - 1


#: The names of the parts of a `Quantized`, of those that have a row for each token and of the others.
ROWS = ("qdata", "scale")
PARTS = (*ROWS, "shift", "exact", "position")


class Quantized(NamedTuple):
    """The parts of one quantized value, as tensors or as graph nodes.

    ``qdata`` is int8 ``[..., tokens, head_dim]``, ``scale`` is ``[..., tokens, 1]``, and the value that they stand for
    has ``dtype``. ``shift`` is int8 ``[..., 1, head_dim]``, the same for all tokens, or ``None``: the channels were
    divided by ``2 ** shift`` before they were quantized. ``exact``, ``[..., kept, head_dim]`` of ``dtype``, are the
    rows that are kept as they came, ``position``, int64 ``[kept]``, says which rows they are, -1 that they are none,
    and the first ``sinks`` of them are for the first rows of all. With either, tokens are always the last dimension
    but one.
    """

    qdata: Any
    scale: Any
    dtype: torch.dtype
    shift: Any = None
    exact: Any = None
    position: Any = None
    sinks: int = 0

    @property
    def rows(self) -> tuple[Any, Any]:
        """The parts that have a row for each token."""
        return self.qdata, self.scale

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that there are, by name: ``qdata`` and ``scale`` first."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    def of_parts(self, parts: Iterable[Any]) -> "Quantized":
        """The same value made of other parts, in the order of `parts`."""
        return self._replace(**dict(zip(self.parts, parts, strict=True)))

    def of(self, rows: Sequence[Any], **others: Any) -> "Quantized":
        """The same value of other rows, and of other parts by name."""
        qdata, scale = rows
        return self._replace(qdata=qdata, scale=scale, **others)

    @property
    def is_plain(self) -> bool:
        """Whether it is rows and scales and nothing else."""
        return self.shift is None and self.exact is None


class Keep(NamedTuple):
    """How many rows are kept in the float dtype: the first ``sinks``, and the last ``recent``."""

    sinks: int = 0
    recent: int = 0

    @classmethod
    def as_in(cls, value: Quantized) -> "Keep":
        """As many as a quantized tensor keeps."""
        return NOTHING if value.exact is None else cls(value.sinks, value.exact.shape[-2] - value.sinks)

    def size(self, size: Sequence[Any]) -> list[Any]:
        """The shape of the kept rows of a tensor of shape ``size``."""
        return [*size[:-2], self.sinks + self.recent, size[-1]]

    def nothing_yet(
        self, size: Sequence[int], dtype: torch.dtype, device: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Room for the kept rows of a tensor of shape ``size``, and their positions, all -1; ``None`` if none are."""
        if not any(self):
            return None, None
        exact = torch.zeros(self.size(size), dtype=dtype, device=device)
        return exact, torch.full((self.sinks + self.recent,), -1, dtype=torch.int64, device=device)


#: No rows are kept.
NOTHING = Keep()


class Evaluator(Protocol):
    """How a rule runs an operation, and how it sees the metadata of an operand."""

    #: The operation that gives parts another shape. Spare rows may lie between the heads of a part, where there are
    #: none between those of the tensor that it stands for, so that ``view`` will not always do.
    view: Any

    def call(self, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...

    def tensor(self, operand: Any) -> torch.Tensor:
        """The tensor, or the fake tensor, behind an operand: for its shape and dtype."""
        ...

    def size(self, operand: Any, dim: int) -> Any:
        """A size of an operand, to be given to an operation."""
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
    exact = (x.exact, x.position) if x.exact is not None else ()
    shift = (x.shift,) if exact or x.shift is not None else ()
    return run.call(_ops.dequantize_per_head.default, x.qdata, x.scale, x.dtype, *shift, *exact)


def quantize_like(run: Evaluator, value: Any, like: Quantized) -> Quantized:
    """``value``, which may be quantized already, as rows for ``like``: with its shift and its dtype of scales."""
    if isinstance(value, Quantized):
        if run.same(value.shift, like.shift):
            return value
        value = dequantize(run, value)
    shift = () if like.shift is None else (like.shift,)
    return like.of(run.call(_ops.quantize_per_head.default, value, scale_dtype_for(like.dtype), *shift))


def keep_written(run: Evaluator, x: Quantized, source: Any, start: Any) -> dict[str, Any]:
    """The exact rows, and their positions, once ``source`` is written from row ``start`` on; none if ``x`` has none."""
    if x.exact is None:
        return {}
    values = dequantize(run, source) if isinstance(source, Quantized) else source
    index = run.call(aten.arange.default, _tokens(run, values), device=run.tensor(x.qdata).device)
    return _kept(run, x, values, run.call(aten.add.Tensor, index, start))


def _kept(run: Evaluator, x: Quantized, values: Any, index: Any) -> dict[str, Any]:
    kept = run.call(_ops.keep_rows.default, x.exact, x.position, values, index, x.sinks)
    return dict(zip(("exact", "position"), kept, strict=True))


def _forgotten(run: Evaluator, x: Quantized) -> dict[str, Any]:
    """Exact rows for a copy of ``x`` that has none any more: the int8 ones stand for them."""
    if x.exact is None:
        return {}
    return {
        "exact": run.call(aten.zeros_like.default, x.exact),
        "position": run.call(aten.full_like.default, x.position, -1),
    }


def _tokens(run: Evaluator, part: Any) -> Any:
    """The number of tokens as an operand."""
    return run.size(part, run.tensor(part).dim() - 2)


def _rank(run: Evaluator, x: Quantized) -> int:
    return run.tensor(x.qdata).dim()


def _is_last(run: Evaluator, x: Quantized, dim: int, extra: int = 0) -> bool:
    rank = _rank(run, x) + extra
    return dim % rank == rank - 1


def _is_tokens(run: Evaluator, x: Quantized, dim: int, extra: int = 0) -> bool:
    """Whether ``dim`` is that of the tokens, which share a shift, and have their exact rows elsewhere."""
    rank = _rank(run, x) + extra
    return not x.is_plain and dim % rank == rank - 2


def _per_head(run: Evaluator, x: Quantized, move: Callable[[Any], Any]) -> dict[str, Any]:
    """What ``move``, which leaves the tokens alone, makes of the parts that have no row for each of them."""
    moved = {name: move(part) for name in ("shift", "exact") if (part := getattr(x, name)) is not None}
    if x.position is not None:  # what is written into the result is not written into x
        moved["position"] = run.call(aten.clone.default, x.position)
    return moved


def _same(target: Any) -> Rule:
    """``op(x)``: nothing but the parts themselves."""

    def rule(run: Evaluator, x: Quantized, **kwargs: Any) -> Quantized | None:
        return x.of_parts(run.call(target, part, **kwargs) for part in x.parts.values())

    return rule


def _to_dtype(run: Evaluator, x: Quantized, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Quantized | None:
    """``x.to(dtype)`` is ``x`` where that is its dtype already."""
    return x if dtype == x.dtype and not any(args) and not kwargs else None


def _along(target: Any, *, changes_rank: int = 0, moved_tokens: Callable[..., Any] | None = None) -> Rule:
    """``op(x, dim, ...)`` that moves whole rows along ``dim``.

    ``moved_tokens`` says where exact rows are then, if ``dim`` is that of the tokens. Left out, they are forgotten.
    """

    def rule(run: Evaluator, x: Quantized, dim: int = 0, *args: Any) -> Quantized | None:
        extra = max(changes_rank, 0)
        tokens = _is_tokens(run, x, dim, extra)
        if _is_last(run, x, dim, extra) or (tokens and changes_rank):
            return None
        rows = [run.call(target, part, dim, *args) for part in x.rows]
        if not tokens:
            return x.of(rows, **_per_head(run, x, lambda part: run.call(target, part, dim, *args)))
        if x.exact is None or moved_tokens is None:
            return x.of(rows, **_forgotten(run, x))
        return x.of(rows, position=moved_tokens(run, x, *args))

    return rule


def _slice_tokens(run: Evaluator, x: Quantized, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    if start in (None, 0) and end in (None, _END) and step == 1:
        return x.position
    if step != 1:
        return run.call(aten.full_like.default, x.position, -1)
    return run.call(_ops.slice_position.default, x.position, _tokens(run, x.qdata), start, end)


def _transpose(run: Evaluator, x: Quantized, dim0: int, dim1: int) -> Quantized | None:
    if any(_is_last(run, x, dim) or _is_tokens(run, x, dim) for dim in (dim0, dim1)):
        return None
    return _each(run, x, aten.transpose.int, dim0, dim1)


def _permute(run: Evaluator, x: Quantized, dims: Sequence[int]) -> Quantized | None:
    if not _is_last(run, x, dims[-1]) or not (x.is_plain or _is_tokens(run, x, dims[-2])):
        return None
    return _each(run, x, aten.permute.default, dims)


def _each(run: Evaluator, x: Quantized, target: Any, *args: Any) -> Quantized:
    """``op(x, ...)`` that does the same to every part, and nothing to the tokens."""
    rows = [run.call(target, part, *args) for part in x.rows]
    return x.of(rows, **_per_head(run, x, lambda part: run.call(target, part, *args)))


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
        rows = [run.call(target, part, *args) for part in x.rows]
        if x.exact is None or target is not aten.roll.default:
            return x.of(rows, **_forgotten(run, x))
        rolled = run.call(_ops.roll_position.default, x.position, _tokens(run, x.qdata), sum(args[0]))
        return x.of(rows, exact=run.call(aten.clone.default, x.exact), position=rolled)

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
        if not x.is_plain:
            before, after = run.tensor(x.qdata).shape, run.tensor(qdata).shape
            if len(after) < 2 or not (target is aten.expand.default or statically_known_true(before[-2] == after[-2])):
                return None
        scale = run.call(move, x.scale, [*leading, 1])
        return x.of(
            [qdata, scale],
            **_per_head(run, x, lambda part: run.call(move, part, [*leading[:-1], run.tensor(part).shape[-2], last])),
        )

    return rule


def _repeat(run: Evaluator, x: Quantized, repeats: Sequence[int]) -> Quantized | None:
    if repeats[-1] != 1:
        return None
    rows = [run.call(aten.repeat.default, part, repeats) for part in x.rows]
    others = _per_head(run, x, lambda part: run.call(aten.repeat.default, part, [*repeats[:-2], 1, 1]))
    if not x.is_plain and repeats[-2] != 1:
        others |= _forgotten(run, x._replace(exact=others.get("exact")))
    return x.of(rows, **others)


def _repeat_interleave(
    run: Evaluator, x: Quantized, repeats: int, dim: int | None = None, **kwargs: Any
) -> Quantized | None:
    if dim is None or _is_last(run, x, dim):
        return None
    rows = [run.call(aten.repeat_interleave.self_int, part, repeats, dim, **kwargs) for part in x.rows]
    if _is_tokens(run, x, dim):
        return x.of(rows, **_forgotten(run, x))
    return x.of(rows, **_per_head(run, x, lambda part: run.call(aten.repeat_interleave.self_int, part, repeats, dim)))


def _index(run: Evaluator, x: Quantized, indices: Sequence[Any]) -> Quantized | None:
    if not _indexes_rows(run, x, indices):
        return None
    rows = [run.call(aten.index.Tensor, part, indices) for part in x.rows]
    if _dims_used(run, indices) <= _rank(run, x) - 2:
        return x.of(rows, **_per_head(run, x, lambda part: run.call(aten.index.Tensor, part, indices)))
    if x.is_plain or _picks_tokens(run, indices):
        return x.of(rows, **_forgotten(run, x))
    return None


def _picks_tokens(run: Evaluator, indices: Sequence[Any]) -> bool:
    """Whether the last index is a list of tokens, and the others take all there is."""
    return all(index is None for index in indices[:-1]) and run.tensor(indices[-1]).dim() == 1


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
    tokens = _is_tokens(run, like, dim)
    if like.is_plain or tokens:
        parts = [quantize_like(run, t, like) for t in tensors]
        others = _forgotten(run, like)
        if tokens and len(tensors) == 2 and isinstance(tensors[0], Quantized):
            others = keep_written(run, like, tensors[1], _tokens(run, like.qdata))
    else:
        if len(quantized) < len(tensors) or any(t.parts.keys() != like.parts.keys() for t in quantized):
            return None
        parts = quantized
        others = {}
        if like.shift is not None:
            others["shift"] = run.call(aten.cat.default, [t.shift for t in quantized], dim)
        if like.exact is not None:  # each has its own rows
            exact = run.call(aten.cat.default, [t.exact for t in quantized], dim)
            others |= _forgotten(run, like._replace(exact=exact))
    rows = zip(*[part.rows for part in parts], strict=True)
    return like.of([run.call(aten.cat.default, list(row), dim) for row in rows], **others)


def _index_copy_(run: Evaluator, x: Any, dim: int, index: Any, source: Any) -> Quantized | None:
    if not isinstance(x, Quantized) or _is_last(run, x, dim) or not _fits(run, x, source):
        return None
    tokens = _is_tokens(run, x, dim)
    if tokens:
        x = _settle_shift(run, x, source)
    written = _write(run, aten.index_copy_.default, x, (dim, index), source)
    return _keep_at(run, written, source, index if tokens else None)


def _index_put_(
    run: Evaluator, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False
) -> Quantized | None:
    if not isinstance(x, Quantized) or accumulate or not _indexes_rows(run, x, indices) or not _fits(run, x, values):
        return None
    # Indexing may move dimensions: only a shift that is the same in front of the rows fits what is written.
    if not x.is_plain and any(index is not None for index in indices[: _rank(run, x) - 2]):
        return None
    written = _write(run, aten.index_put_.default, x, (indices,), values)
    at = None
    if x.exact is not None and _dims_used(run, indices) == _rank(run, x) - 1 and _picks_tokens(run, indices):
        at = run.call(aten.remainder.Scalar, indices[-1], _tokens(run, x.qdata))  # -1 is the last
    return _keep_at(run, written, values, at)


def _copy_(run: Evaluator, x: Any, source: Any, non_blocking: bool = False) -> Quantized | None:
    if not isinstance(x, Quantized) or not _fits(run, x, source):
        return None
    written = _write(run, aten.copy_.default, _settle_shift(run, x, source), (), source)
    if x.exact is None:
        return written
    if isinstance(source, Quantized) and source.exact is not None and _kept_alike(run, x, source):
        return _set_exact(run, written, {"exact": source.exact, "position": source.position})
    whole = run.call(aten.arange.default, _tokens(run, x.qdata), device=run.tensor(x.qdata).device)
    return _keep_at(run, written, source, whole)


def _kept_alike(run: Evaluator, x: Quantized, source: Quantized) -> bool:
    return x.sinks == source.sinks and run.tensor(x.exact).shape[-2] == run.tensor(source.exact).shape[-2]


def _keep_at(run: Evaluator, x: Quantized, source: Any, index: Any) -> Quantized:
    """``x`` after ``source`` was written to its rows ``index``; ``None`` where these are not known."""
    if x.exact is None:
        return x
    values = dequantize(run, source) if isinstance(source, Quantized) else source
    rows = run.tensor(values).shape
    if index is None or len(rows) < 2 or not statically_known_true(rows[-2] == run.tensor(index).shape[0]):
        return _forget(run, x)
    heads = [run.size(x.exact, dim) for dim in range(_rank(run, x) - 2)]
    if len(rows) < _rank(run, x) or any(statically_known_true(size == 1) for size in rows[:-2]):
        values = run.call(aten.expand.default, values, [*heads, -1, -1])
    return _set_exact(run, x, _kept(run, x, values, index))


def _forget(run: Evaluator, x: Quantized) -> Quantized:
    """``x``, without exact rows from now on."""
    return x if x.exact is None else x._replace(position=run.call(aten.fill_.Scalar, x.position, -1))


def _set_exact(run: Evaluator, x: Quantized, parts: dict[str, Any]) -> Quantized:
    """Write them into the storage that ``x`` has for them."""
    return x._replace(**{name: run.call(aten.copy_.default, getattr(x, name), part) for name, part in parts.items()})


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
    return x.of([run.call(target, old, *where, new) for old, new in written])


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
    x = x.of([run.call(aten.zero_.default, part) for part in x.rows])
    return _forget(run, x)


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
    aten.slice.Tensor: _along(aten.slice.Tensor, moved_tokens=_slice_tokens),
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
