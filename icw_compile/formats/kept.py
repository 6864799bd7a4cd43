"""Rows that are kept in the model's dtype besides: the first ones, and those written last.

``keep_rows(exact[..., K, D], position[K], values[..., T, D], index[T], sinks) -> (exact, position)``
    The rows that are kept after ``values`` are written to the rows ``index``, none if they are in another order than
    ascending, or with gaps: the first ``sinks`` of ``K`` are the rows 0, 1, ..., the others the last ones written, each
    in the place of the oldest. ``position`` says which row each one is, -1 that it is none. What was kept of rows from
    ``index[0]`` on is gone.
``place_rows(rows[..., T, D], exact[..., K, D], position[K]) -> [..., T, D]``
    ``rows``, of which row ``position[e]`` is ``exact[..., e, D]`` for each ``e`` whose position is one of them.
``place_kept(rows[..., L, D], exact[..., K, D], position[K], at[L]) -> [..., L, D]``
    The same of ``rows`` that are the rows ``at`` of them all.
``slice_position(position, S, start, end)``, ``roll_position(position, S, by)``
    Where these rows of ``S`` are after a slice of the tokens, or a roll.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from icw_compile.compat.fx import statically_known_true
from icw_compile.formats.base import Evaluator, Part, Stored, Wrapper
from icw_compile.formats.moves import END

__all__ = ["KeepsRows", "forget_rows", "keep_rows", "place_rows"]

aten = torch.ops.aten
_ops = torch.ops.icw_int8kv


def keep_rows(exact: Tensor, position: Tensor, values: Tensor, index: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
    tokens, recent = values.shape[-2], exact.shape[-2] - sinks
    if tokens == 0:
        return exact.clone(), position.clone()
    first = index.narrow(0, 0, 1)
    if sinks == 0 and statically_known_true(tokens == 1):
        # In a decode step one row is written, and the others stay where they are.
        position = torch.where(position < first, position, -1)
        oldest = position.argmin(dim=0, keepdim=True)
        row = values.to(exact.dtype).expand_as(exact.narrow(-2, 0, 1))
        return exact.index_copy(-2, oldest, row), position.index_copy(0, oldest, index)
    # Rows in another order, or with gaps: none is known to be the last, and the rows that are stored stand for all.
    in_order = (index - first == torch.arange(tokens, device=index.device)).all()
    position = torch.where((position < first) & in_order, position, -1)
    # The last rows go, oldest first, to the places without a row and to those with the oldest. Places are compared in
    # pairs: they are few, and a sort would be an operation of its own.
    place, held = torch.arange(sinks + recent, device=index.device), position.narrow(0, sinks, recent)
    own = place.narrow(0, sinks, recent)
    older = (held < held.unsqueeze(-1)) | ((held == held.unsqueeze(-1)) & (own < own.unsqueeze(-1)))
    oldest = older.sum(dim=-1) + torch.sym_max(tokens - recent, 0)
    source = torch.cat([place.narrow(0, 0, sinks) - first, oldest])
    written = (source >= 0) & (source < tokens) & in_order
    source = source.clamp(0, tokens - 1)
    row = index.index_select(0, source)
    written = written & ((row >= sinks) | (place < sinks))
    fresh = values.index_select(-2, source).to(exact.dtype)
    return torch.where(written.unsqueeze(-1), fresh, exact), torch.where(written, row, position)


def place_rows(rows: Tensor, exact: Tensor, position: Tensor) -> Tensor:
    return place_kept(rows, exact, position, torch.arange(rows.shape[-2], device=rows.device))


def place_kept(rows: Tensor, exact: Tensor, position: Tensor, at: Tensor) -> Tensor:
    taken = (position.unsqueeze(-1) == at) & (at >= 0)
    slot = taken.to(torch.int32).argmax(dim=0)
    return torch.where(taken.any(dim=0).unsqueeze(-1), exact.index_select(-2, slot).to(rows.dtype), rows)


def slice_position(position: Tensor, tokens: int, start: int | None, end: int | None) -> Tensor:
    start = 0 if start is None else start
    end = tokens if end is None else end
    start = torch.sym_max(start + tokens, 0) if start < 0 else start
    end = end + tokens if end < 0 else end
    inside = (position >= start) & (position < end)
    return torch.where(inside, position - start, -1)


def roll_position(position: Tensor, tokens: int, by: int) -> Tensor:
    return torch.where(position >= 0, (position + by) % tokens, -1)


def forget_rows(x: Stored) -> None:
    """Keep none of the rows that are kept besides: what is stored stands for them."""
    x["position"].fill_(-1)


@dataclass(frozen=True)
class KeepsRows(Wrapper):
    """Adds ``exact`` and ``position``: the first ``sinks`` rows, and the last ``recent`` ones that were written.

    They are read as they came. An operation that scatters the tokens forgets them, and the rows of the inner format,
    which are always there, stand for them.
    """

    sinks: int
    recent: int

    def __str__(self) -> str:
        return f"{self.wrapped}, keeps {self.sinks}+{self.recent}"

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.wrapped.parts, Part("exact", "BHKD"), Part("position", "K"))

    def empty(self, run: Evaluator, size: Sequence[Any], device: torch.device) -> Stored:
        inner = self.wrapped.empty(run, size, device)
        kept = self.sinks + self.recent
        exact = run.call(aten.zeros.default, [*size[:-2], kept, size[-1]], dtype=self.dtype, device=device)
        position = run.call(aten.full.default, [kept], -1, dtype=torch.int64, device=device)
        return replace(inner, format=self, parts=(*inner.parts, exact, position))

    def decode(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Any:
        return run.call(_ops.place_rows.default, super().decode(run, x, dtype), x["exact"], x["position"])

    def cast(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Stored:
        converted = super().cast(run, x, dtype)
        return converted.with_parts(exact=run.call(aten.to.dtype, x["exact"], dtype))

    def settle_more(self, run: Evaluator, into: Stored, source: Any, kept: Sequence[Any] = ()) -> Stored:
        return super().settle_more(run, into, source, tuple(into.kept.values()))

    def settle_stored(self, into: Stored, kept: Sequence[Any] = ()) -> Stored:
        return super().settle_stored(into, tuple(into.kept.values()))

    def told(self, run: Evaluator, into: Stored, source: Any, length: Any, kept: Sequence[Any] = ()) -> dict[str, Any]:
        return super().told(run, into, source, length, tuple(into.kept.values()))

    def keep(self, run: Evaluator, into: Stored, values: Any, index: Any) -> dict[str, Any]:
        kept = run.call(_ops.keep_rows.default, into["exact"], into["position"], values, index, self.sinks)
        return {**super().keep(run, into, values, index), **dict(zip(("exact", "position"), kept, strict=True))}

    def move_tokens(self, run: Evaluator, x: Stored, target: Any, args: Sequence[Any]) -> dict[str, Any]:
        return {**super().move_tokens(run, x, target, args), **self._moved(run, x, target, args)}

    def _moved(self, run: Evaluator, x: Stored, target: Any, args: Sequence[Any]) -> dict[str, Any]:
        tokens = run.size(x.parts[0], x.token_dim + len(x.axes))
        if target is aten.slice.Tensor:
            _, start, end, step = args
            if step == 1:
                end = None if end == END else end
                at = run.call(_ops.slice_position.default, x["position"], tokens, start, end)
                return {"exact": x["exact"], "position": at}
        if target is aten.roll.default:
            at = run.call(_ops.roll_position.default, x["position"], tokens, sum(args[0]))
            return {"exact": run.call(aten.clone.default, x["exact"]), "position": at}
        return {
            "exact": run.call(aten.zeros_like.default, x["exact"]),
            "position": run.call(aten.full_like.default, x["position"], -1),
        }

    def forget(self, run: Evaluator, x: Stored) -> Stored:
        forgotten = super().forget(run, x)
        return forgotten.with_parts(position=run.call(aten.fill_.Scalar, x["position"], -1))

    def bytes_per_sequence(self, heads: int, head_dim: int) -> int:
        kept = (self.sinks + self.recent) * heads * head_dim * self.dtype.itemsize
        return kept + super().bytes_per_sequence(heads, head_dim)

    def checked(self, parts: Sequence[Tensor], size: Sequence[int]) -> None:
        *inner, exact, position = parts
        super().checked(inner, size)
        kept = self.sinks + self.recent
        if exact.dtype != self.dtype or tuple(exact.shape) != (*size[:-2], kept, size[-1]):
            expected = [*size[:-2], kept, size[-1]]
            raise ValueError(f"exact must be {self.dtype} {expected}, not {exact.dtype} {list(exact.shape)}")
        if position.dtype != torch.int64 or tuple(position.shape) != (kept,):
            raise ValueError(f"position must be int64 [{kept}], not {position.dtype} {list(position.shape)}")


_OPERATIONS: tuple[tuple[str, Callable[..., Tensor | tuple[Tensor, Tensor]]], ...] = (
    (
        "keep_rows(Tensor exact, Tensor position, Tensor values, Tensor index, int sinks) "
        "-> (Tensor exact, Tensor position)",
        keep_rows,
    ),
    ("place_rows(Tensor rows, Tensor exact, Tensor position) -> Tensor", place_rows),
    ("place_kept(Tensor rows, Tensor exact, Tensor position, Tensor at) -> Tensor", place_kept),
    ("slice_position(Tensor position, SymInt tokens, SymInt? start, SymInt? end) -> Tensor", slice_position),
    ("roll_position(Tensor position, SymInt tokens, SymInt by) -> Tensor", roll_position),
)
for _schema, _function in _OPERATIONS:
    _name, _, _arguments = _schema.partition("(")
    torch.library.define(f"icw_int8kv::{_name}", f"({_arguments}")
    torch.library.impl(f"icw_int8kv::{_name}", "CompositeImplicitAutograd", _function)
