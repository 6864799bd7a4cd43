"""Channels that are outliers, divided by a power of two before they are stored.

Outlier channels, as the key projection bias of Qwen2 makes, would leave the others of their row few levels. What reads
the stored rows multiplies the query (for keys), or the output (for values), instead; a power of two costs no accuracy.

``channel_shift(x[..., T, D]) -> uint8[..., 1, D]``
    The shifts that bring outlier channels down to the others: the exponent of the largest power of two, at most 7, by
    which a channel exceeds the median channel, both in its geometric mean over the tokens and in its largest value; 0
    below a factor of three. Sizes are relative to the geometric mean of their row, as each row has a scale of its own:
    one token of a huge norm, or with outliers of its own, changes little. Zeros, which any shift stores exactly, count
    nowhere, and neither does what 8 bits read back as zero whatever is divided, nor a row that is not finite.
``settle_shift(x[..., T, D], written[..., S, *], shift[..., 1, D]) -> uint8[..., 1, D]``
    `channel_shift` of each head of which all of ``written`` is zero, ``shift`` for the others. One operation for
    compilers, which would take half as long again to look into it. Plain torch, but on the CPU a C++ kernel, once
    `icw_compile.kernels.cpu` is loaded, that looks at ``x`` only where it has to, and on CUDA devices Triton's
    (`icw_compile.kernels.settle`).
``settle_again(x[..., T, D] or None, rows, written[..., S, *], shift[..., 1, D], kept, length, inner) -> shift, *rows``
    What `settle_shift` gives, or, where too few rows are stored to go by, the shift that they and ``x`` tell, and the
    first `TELLING` of ``rows``, the parts of the format ``inner``, encoded anew with it. One operation.
``quantize_divided(x[..., T, D], shift[..., 1, D] or None, short_scale) -> (int8[..., T, D], scale[..., T, 1])``
    `quantize_per_head` of what `divide_channels` gives, with scales of bfloat16 or else float32. As `settle_shift`, one
    operation for compilers, with a C++ kernel.
``multiply_channels(x[..., D], shift, dtype=None)``, ``divide_channels(x[..., D], shift, dtype=None) -> [..., D]``
    ``x * 2 ** shift`` and ``x / 2 ** shift``, in ``dtype``, that of ``x`` if left out. What is finite stays finite.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from icw_compile.compat.fx import statically_known_true
from icw_compile.formats.base import Evaluator, Format, Part, Stored, Wrapper
from icw_compile.formats.evaluate import EAGER
from icw_compile.formats.int8 import QMAX, quantize_per_head, rows_for, to_finite
from icw_compile.formats.kept import place_rows

__all__ = ["MAX_SHIFT", "TELLING", "Equalized", "channel_shift", "divide_channels", "multiply_channels"]

aten = torch.ops.aten
_ops = torch.ops.icw_int8kv

#: A channel is an outlier from this multiple of the median channel on, as an exponent of two.
OUTLIER = math.log2(3.0)
#: Largest exponent of `channel_shift`.
MAX_SHIFT = 7
#: Of the largest of its row, what is below this part is within half a step of zero, whatever is divided.
NEGLIGIBLE = 2.0 ** -(MAX_SHIFT + 8)
#: A shift that no more rows than these have settled is settled once more.
TELLING = 16


def channel_shift(x: Tensor, least: int = 2) -> Tensor:
    if x.shape[-2] < least:  # one token says nothing about the next
        return x.new_zeros((*x.shape[:-2], 1, x.shape[-1]), dtype=torch.uint8)
    magnitude = x.float().abs()
    part = magnitude / magnitude.amax(dim=-1, keepdim=True)  # NaN in rows of zeros and those that are not finite, or 0
    tells = part >= NEGLIGIBLE
    size = torch.where(tells, torch.log2(part), 0.0)
    size = size - size.sum(dim=-1, keepdim=True) / tells.sum(dim=-1, keepdim=True).clamp(min=1)
    rows = tells.sum(dim=-2, keepdim=True)
    usual = torch.where(tells, size, 0.0).sum(dim=-2, keepdim=True) / rows
    largest = torch.where(tells, size, -torch.inf).amax(dim=-2, keepdim=True)
    above = torch.minimum(_above_median(usual, rows > 0), _above_median(largest, rows > 0))
    shifts = (above >= OUTLIER) & (rows >= least)
    return torch.where(shifts, above.floor().clamp(max=MAX_SHIFT), 0.0).to(torch.uint8)


def settle_shift(x: Tensor, written: Tensor, shift: Tensor) -> Tensor:
    empty = (written == 0).all(dim=(-2, -1), keepdim=True)
    return torch.where(empty, channel_shift(x), shift).contiguous()


#: The formats that `Equalized` ones wrapped, by their names: an operation of a graph takes no object.
_inner: dict[str, Format] = {}


def name_inner(format_: Format) -> str:
    """By which `settle_again` is told of a format."""
    _inner[str(format_)] = format_
    return str(format_)


def inner_format(name: str) -> Format:
    """What `name_inner` gave this name."""
    return _inner[name]


def settle_again(
    x: Tensor | None,
    rows: Sequence[Tensor],
    written: Tensor,
    shift: Tensor,
    kept: Sequence[Tensor],
    length: int | None,
    inner: str,
) -> list[Tensor]:
    format_, first = inner_format(inner), [part[..., :TELLING, :] for part in rows]
    if length is None:
        if x is not None:
            shift = _ops.settle_shift(x, written, shift)
        if written.shape[-2] <= TELLING:
            return [shift.clone(), *(part.clone() for part in first)]
        is_row = written[..., :TELLING, :].ne(0).any(dim=-1, keepdim=True)
        stored = is_row.sum(dim=-2, keepdim=True)
        few = written[..., TELLING:, :].eq(0).all(dim=(-2, -1), keepdim=True)
    else:
        is_row = (torch.arange(first[0].shape[-2], device=shift.device) < length).unsqueeze(-1)
        is_row = is_row.expand(*first[0].shape[:-1], 1)
        stored = is_row.sum(dim=-2, keepdim=True).clamp(max=length)
        few = torch.full_like(stored, length <= TELLING, dtype=torch.bool)
    tells = few & ((stored == 1) | ((stored > 0) & (stored + (1 if x is None else x.shape[-2]) > TELLING)))
    if (x is None or shift.device.type == "cpu") and not tells.any():  # of no graph that a GPU would have to wait in
        return [shift.clone(), *(part.clone() for part in first)]
    value = Stored(format_, tuple(first), "." * (shift.dim() - 2) + "TD")
    divided = format_.decode(EAGER, value, torch.float32)
    values = multiply_channels(divided, shift)
    # What reads back as zero lies within half a step of it.
    half = multiply_channels(divided.abs().amax(dim=-1, keepdim=True) / (2 * QMAX), shift)
    seen = torch.where(divided == 0, half, values)
    if kept:
        values, seen = (place_rows(each, *kept) for each in (values, seen))
    seen = torch.where(is_row, seen, 0.0)
    if x is not None:
        seen = torch.cat([seen, x.float().expand(*seen.shape[:-2], -1, -1)], dim=-2)
    told = _ops.settle_shift(seen, written.new_zeros((1,) * written.dim()), shift)
    # A single row may be an odd one: half of what it tells costs no channel more than half of its bits.
    is_one = stored == 1
    if x is not None:
        most = x.float().abs().amax(dim=-1, keepdim=True)
        is_one = is_one & ~((most > 0) & (most < torch.inf)).any(dim=-2, keepdim=True)
    of_one = (channel_shift(seen[..., : first[0].shape[-2], :], 1) + 1) // 2  # it is one of those that are stored
    told = torch.where(tells, torch.where(is_one, of_one, told), shift)
    anew = format_.encode(EAGER, divide_channels(values, told, torch.float32), value)
    changed = is_row & (told != shift).any(dim=-1, keepdim=True)
    encoded = [torch.where(changed, new, old) for new, old in zip(anew.values(), first, strict=True)]
    return [told.contiguous(), *(part.contiguous() for part in encoded)]


def quantize_divided(x: Tensor, shift: Tensor | None, short_scale: bool) -> tuple[Tensor, Tensor]:
    values = x if shift is None else divide_channels(x, shift, torch.float32)
    qdata, scale = quantize_per_head(values, torch.bfloat16 if short_scale else torch.float32)
    return qdata.contiguous(), scale.contiguous()


def _above_median(x: Tensor, counts: Tensor) -> Tensor:
    # Sorted, not `nanmedian`, which is not deterministic on CUDA and raises there where that is asked for.
    middle = (counts.sum(dim=-1, keepdim=True) - 1) // 2
    return x - torch.where(counts, x, torch.inf).sort(dim=-1).values.gather(-1, middle.clamp(min=0))


def multiply_channels(x: Tensor, shift: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return to_finite(x.float() * torch.exp2(shift.float()), dtype or x.dtype)


def divide_channels(x: Tensor, shift: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return (x.float() * torch.exp2(-shift.float())).to(dtype or x.dtype)


@dataclass(frozen=True)
class Equalized(Wrapper):
    """Adds ``shift``, uint8, the exponent for each head and channel.

    The first write settles it, from its tokens if they are several. One of no more than `TELLING` rows tells little: a
    second write after a single token, and the one that makes it more rows than that, settle it anew, from the rows
    that are stored and from its own if they are several, and the rows that are stored are encoded anew. What is stored
    is known where the write is run: rows into which nothing was written read as zeros. A graph leaves a write of one
    token to whoever calls it (`settle_stored`), so that a step has nothing to do with all that.
    """

    def __str__(self) -> str:
        return f"{self.wrapped}, equalized"

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.wrapped.parts, Part("shift", "BH1D"))

    def empty(self, run: Evaluator, size: Sequence[Any], device: torch.device) -> Stored:
        inner = self.wrapped.empty(run, size, device)
        shift = run.call(aten.zeros.default, [*size[:-2], 1, size[-1]], dtype=torch.uint8, device=device)
        return replace(inner, format=self, parts=(*inner.parts, shift))

    def encode(self, run: Evaluator, values: Any, into: Stored) -> dict[str, Any]:
        divided = run.call(_ops.divide_channels.default, values, into["shift"], torch.float32)
        return self.wrapped.encode(run, divided, into.inner)

    def as_stored(self, run: Evaluator, values: Any, like: Stored) -> Any:
        # A float16 number divided by 2 ** 7 may be less than float16 holds.
        dtype = run.tensor(values).dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype
        divided = run.call(_ops.divide_channels.default, values, like["shift"], dtype)
        return super().as_stored(run, divided, like)

    def decode(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Any:
        divided = self.wrapped.decode(run, x.inner, torch.float32)
        return run.call(_ops.multiply_channels.default, divided, x["shift"], dtype)

    def settle(self, run: Evaluator, into: Stored, source: Any) -> Stored:
        into = super().settle(run, into, source)
        if into.is_view or into.axes[-2:] != "TD" or not run.takes_effect:
            return into
        if isinstance(source, Stored):
            if source.format != into.format or run.same(source["shift"], into["shift"]):
                return into
            settled = run.call(aten.where.self, self.is_empty(run, into), source["shift"], into["shift"])
        else:
            shape = run.tensor(source).shape
            if len(shape) != len(into.axes) or statically_known_true(shape[-2] <= 1):
                return into
            settled = run.call(_ops.settle_shift.default, source, self.written(into), into["shift"])
        return into.with_parts(shift=run.call(aten.copy_.default, into["shift"], settled))

    def tells(self, length: Any, rows: Any) -> bool:
        few = length == 1 or 0 < length <= TELLING < length + rows
        return few or super().tells(length, rows)

    def settle_more(self, run: Evaluator, into: Stored, source: Any, kept: Sequence[Any] = ()) -> Stored:
        into = super().settle_more(run, into, source, kept)
        if into.is_view or into.axes[-2:] != "TD" or not run.takes_effect:
            return into
        written = self.written(into)
        if isinstance(source, Stored) or run.is_new(written):
            return self.settle(run, into, source)
        shape = run.tensor(source).shape
        if len(shape) != len(into.axes):
            return into
        if statically_known_true(shape[-2] <= 1):
            return self.settle_stored(into, kept) if run.is_eager else into
        return self._placed(run, into, self.told(run, into, source, None, kept))

    def settle_stored(self, into: Stored, kept: Sequence[Any] = ()) -> Stored:
        into = super().settle_stored(into, kept)
        return self._placed(EAGER, into, self.told(EAGER, into, None, None, kept))

    def is_settled(self, value: Stored) -> bool:
        written = self.written(value)
        if written.shape[-2] <= TELLING:
            return super().is_settled(value)
        # Of every sequence, but not of every head: one that stores zeros, such as a pruned one, would never be.
        is_long = written[..., TELLING, :].ne(0).flatten(1).any(dim=1).all()
        return bool(is_long) and super().is_settled(value)

    def told(self, run: Evaluator, into: Stored, source: Any, length: Any, kept: Sequence[Any] = ()) -> dict[str, Any]:
        rows = into.rows
        stored = (list(rows.values()), self.written(into), into["shift"], list(kept))
        settled = run.call(_ops.settle_again.default, source, *stored, length, name_inner(self.wrapped))
        return {**super().told(run, into, source, length, kept), **dict(zip(("shift", *rows), settled, strict=True))}

    def _placed(self, run: Evaluator, into: Stored, told: dict[str, Any]) -> Stored:
        """``into`` with what was ``told`` written into its storage."""
        shift = run.call(aten.copy_.default, into["shift"], told["shift"])
        for name, part in into.rows.items():
            place = run.call(aten.slice.Tensor, part, into.token_dim, 0, TELLING)
            run.call(aten.copy_.default, place, told[name])
        return into.with_parts(shift=shift)

    def into_query(self, run: Evaluator, query: Any, keys: Stored) -> Any:
        return super().into_query(run, _multiplied(run, query, keys), keys)

    def into_output(self, run: Evaluator, output: Any, values: Stored) -> Any:
        return _multiplied(run, super().into_output(run, output, values), values)

    def bytes_per_sequence(self, heads: int, head_dim: int) -> int:
        return heads * head_dim + super().bytes_per_sequence(heads, head_dim)

    def checked(self, parts: Sequence[Tensor], size: Sequence[int]) -> None:
        *inner, shift = parts
        super().checked(inner, size)
        if shift.dtype != torch.uint8 or tuple(shift.shape) != (*size[:-2], 1, size[-1]):
            expected = [*size[:-2], 1, size[-1]]
            raise ValueError(f"shift must be uint8 {expected}, not {shift.dtype} {list(shift.shape)}")


def _register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name, _, rest = schema.partition("(")
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
    torch.library.define(f"icw_int8kv::{name}", f"({rest}", tags=tags)
    torch.library.impl(f"icw_int8kv::{name}", "CompositeExplicitAutograd", function)
    torch.library.register_fake(f"icw_int8kv::{name}", fake)


_register(
    "settle_shift(Tensor x, Tensor written, Tensor shift) -> Tensor",
    settle_shift,
    lambda x, written, shift: shift.new_empty(shift.shape),
)
_register(
    "settle_again(Tensor? x, Tensor[] rows, Tensor written, Tensor shift, Tensor[] kept, SymInt? length, str inner) "
    "-> Tensor[]",
    settle_again,
    lambda x, rows, written, shift, kept, length, inner: [
        shift.new_empty(shift.shape),
        *(part.new_empty((*part.shape[:-2], min(part.shape[-2], TELLING), part.shape[-1])) for part in rows),
    ],
)
_register(
    "quantize_divided(Tensor x, Tensor? shift, bool short_scale) -> (Tensor qdata, Tensor scale)",
    quantize_divided,
    lambda x, shift, short_scale: rows_for(x, torch.bfloat16 if short_scale else torch.float32),
)


def _multiplied(run: Evaluator, x: Any, stored: Stored) -> Any:
    """``x``, a query or an output ``[B, Hq, T, D]``, with what the keys or values were divided by."""
    shift, value = stored["shift"], run.tensor(x)
    if (groups := int(value.shape[1] // run.tensor(shift).shape[1])) > 1:  # with a guard, where heads are symbolic
        shift = run.call(aten.repeat_interleave.self_int, shift, groups, 1)
    # A float16 query times 2 ** 7 may be more than float16 holds.
    dtype = torch.float32 if value.dtype == torch.float16 else value.dtype
    return run.call(_ops.multiply_channels.default, x, shift, dtype)


for _function in (multiply_channels, divide_channels):
    _name = f"icw_int8kv::{_function.__name__}"
    torch.library.define(_name, "(Tensor x, Tensor shift, ScalarType? dtype=None) -> Tensor")
    torch.library.impl(_name, "CompositeImplicitAutograd", _function)
