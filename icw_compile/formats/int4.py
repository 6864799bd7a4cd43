"""Rows of 4 bits, each half of a row with one of 256 tables of its own.

Two channels share a byte: channel ``d`` of the first half of a row in the low bits, channel ``d`` of the second half in
the high ones. A row has a scale; each half has a byte that names a table of 16 whole numbers, in multiples of the
scale. Of the byte, the high bits say how far apart these numbers are, from all of what the row needs down to a third;
the low bits where their middle is, in halves of a step from zero. So a half that is smaller, or off center, has its
levels where its values are. `docs/quality.md` compares this with other codes of as many bytes.

``level(index, code) = ((2 * index - 15 + middle) * width * 11 + 32) >> 6``, with ``middle = (code & 15) - 8`` and
    ``width = 32 - i - max(i - 8, 0)`` for ``i = code >> 4``. From -126 to 121.
``quantize_halves(x[..., D], scale_dtype) -> (packed uint8[..., D / 2], scale[..., 1], codes uint8[..., 2])``
    The scale is the smallest in whose multiples the whole row lies in the widest table. Of each half 15 tables are
    tried, those that are as wide as it is or a little less, and the nearest one is taken. All of that is in whole
    numbers, so that every device finds the same. A zero row has scale 0; a row with a NaN or an infinity has a
    non-finite scale.
``halves_to_levels(packed[..., D / 2], codes[..., 2]) -> int8[..., D]``
    The numbers of which the scale is a multiple: a row of 8 bits, to whatever reads one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icw_compile.formats.base import Evaluator, Part, Stored
from icw_compile.formats.int8 import dequantize_per_head
from icw_compile.formats.scaled import ScaledRows

__all__ = ["Int4Rows", "halves_to_levels", "quantize_halves"]

aten = torch.ops.aten
_ops = torch.ops.icw_int8kv

#: A level is ``(2 * index - 15 + middle) * width`` of these, and 64 of them are one scale.
_UNIT = 11
#: A row reaches from -126 scales (index 0, middle -8) to 121 (index 15, middle 7), and spans 165 (15 steps).
_REACH, _SPAN = 121.0, 165.0
#: Tables that are tried: this many widths, and for each the nearest middle and its two neighbors.
_WIDTHS, _MIDDLES = 5, 3


def quantize_halves(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    values = x.float().unflatten(-1, (2, -1))
    least, most = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    needed = torch.maximum((most - least) / _SPAN, torch.maximum(most, -least) / _REACH)
    scale = needed.amax(dim=-2, keepdim=True).to(scale_dtype)
    inverse = torch.where(scale > 0, 64.0 / scale.float(), 0.0)
    units = (values * inverse).round().clamp(-16384.0, 16384.0)
    units = torch.where(units == units, units, 0.0).to(torch.int32)
    index, codes = _nearest(units)
    low, high = index.unbind(dim=-2)
    return (low | (high << 4)).to(torch.uint8), scale.squeeze(-2), codes


def _nearest(units: Tensor) -> tuple[Tensor, Tensor]:
    """The indices ``[..., 2, D / 2]`` and the codes ``[..., 2]`` that are nearest to ``units``, in 64ths of a scale."""
    least, most = units.amin(dim=-1, keepdim=True), units.amax(dim=-1, keepdim=True)
    largest = torch.maximum(most, -least)
    width = torch.maximum(_up(most - least, 30 * _UNIT), _up(largest, 22 * _UNIT)).clamp(10, 32)
    first = torch.where(width >= 24, 32 - width, 8 + (24 - width) // 2)
    # All tables at once, along an axis in front of the channels.
    tried = torch.arange(_WIDTHS * _MIDDLES, dtype=torch.int32, device=units.device).unsqueeze(-1)
    widths = (first.unsqueeze(-2) + tried // _MIDDLES).clamp(max=15)
    step = _width(widths) * (2 * _UNIT)
    middles = _divided((least + most).unsqueeze(-2) + step // 2, step) + tried % _MIDDLES - _MIDDLES // 2
    middles = middles.clamp(-8, 7)
    near = _level(_index(units.unsqueeze(-2), step, middles), step, middles) * 64 - units.unsqueeze(-2)
    near = near.clamp(-2047, 2047)
    error = (near * near).sum(dim=-1, keepdim=True)
    # The first of those with the smallest error.
    found = (error * 16 + tried).amin(dim=-2) & 15
    widths, middles = (each.gather(-2, found.unsqueeze(-2)).squeeze(-2) for each in (widths, middles))
    index = _index(units, _width(widths) * (2 * _UNIT), middles)
    return index, (widths * 16 + middles + 8).squeeze(-1).to(torch.uint8)


def _width(i: Tensor) -> Tensor:
    return 32 - i - (i - 8).clamp(min=0)


def _up(a: Tensor, b: int) -> Tensor:
    """``a / b``, rounded up."""
    return (a + (b - 1)) // b


def _divided(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, rounded down. Exact: the half keeps the quotient from the next whole number."""
    return torch.floor((a.float() + 0.5) / b.float()).to(torch.int32)


def _index(units: Tensor, step: Tensor, middle: Tensor) -> Tensor:
    """The nearest of 16 numbers that are ``step`` units apart."""
    return _divided(units + (16 - middle) * (step // 2), step).clamp(0, 15)


def _level(index: Tensor, step: Tensor, middle: Tensor) -> Tensor:
    return ((2 * index - 15 + middle) * (step // 2) + 32) >> 6


def halves_to_levels(packed: Tensor, codes: Tensor) -> Tensor:
    both = torch.stack([packed & 15, packed >> 4], dim=-2).to(torch.int32)
    codes = codes.to(torch.int32).unsqueeze(-1)
    levels = _level(both, _width(codes >> 4) * (2 * _UNIT), (codes & 15) - 8)
    return levels.flatten(-2).to(torch.int8)


def dequantize_halves(packed: Tensor, scale: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_per_head(halves_to_levels(packed, codes), scale, dtype)


@dataclass(frozen=True)
class Int4Rows(ScaledRows):
    """``packed``, two channels in a byte, ``scale``, and ``codes``, a byte for each half."""

    @property
    def name(self) -> str:
        return "int4"

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("packed", "BHTD"), Part("scale", "BHT1"), Part("codes", "BHT1"))

    def channels(self, run: Evaluator, x: Stored) -> Any:
        return 2 * run.tensor(x["packed"]).shape[-1]

    def empty(self, run: Evaluator, size: Sequence[Any], device: torch.device) -> Stored:
        if size[-1] % 2 != 0:
            raise NotImplementedError(f"icw_int8kv: 4 bits take heads of an even size, and not of {size[-1]} channels.")
        packed = run.call(aten.zeros.default, [*size[:-1], size[-1] // 2], dtype=torch.uint8, device=device)
        scale = run.call(aten.zeros.default, [*size[:-1], 1], dtype=self.scale_dtype, device=device)
        codes = run.call(aten.zeros.default, [*size[:-1], 2], dtype=torch.uint8, device=device)
        return Stored(self, (packed, scale, codes))

    def encode(self, run: Evaluator, values: Any, into: Stored) -> dict[str, Any]:
        on_cpu = run.tensor(values).device.type == "cpu"
        quantize = _ops.quantize_halves_cpu if on_cpu else _ops.quantize_halves
        packed, scale, codes = run.call(quantize.default, values, self.scale_dtype)
        return {"packed": packed, "scale": scale, "codes": codes}

    def decode(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Any:
        return run.call(_ops.dequantize_halves.default, *x.parts, dtype)

    def scaled_rows(self, run: Evaluator, x: Stored) -> tuple[Any, Any] | None:
        return run.call(_ops.halves_to_levels.default, x["packed"], x["codes"]), x["scale"]

    def bytes_per_token(self, heads: int, head_dim: int) -> int:
        return heads * (head_dim // 2 + self.scale_dtype.itemsize + 2)

    def checked(self, parts: Sequence[Tensor], size: Sequence[int]) -> None:
        packed, scale, codes = parts
        for name, part, dtype, channels in (
            ("packed", packed, torch.uint8, size[-1] // 2),
            ("scale", scale, self.scale_dtype, 1),
            ("codes", codes, torch.uint8, 2),
        ):
            if part.dtype != dtype or tuple(part.shape) != (*size[:-1], channels):
                expected = [*size[:-1], channels]
                raise ValueError(f"{name} must be {dtype} {expected}, not {part.dtype} {list(part.shape)}")


def _fake_quantize(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    *rows, channels = x.shape
    parts = ((channels // 2, torch.uint8), (1, scale_dtype), (2, torch.uint8))
    packed, scale, codes = (torch.empty((*rows, size), dtype=dtype, device=x.device) for size, dtype in parts)
    return packed, scale, codes


_RESULT = "(Tensor packed, Tensor scale, Tensor codes)"
torch.library.define("icw_int8kv::quantize_halves", f"(Tensor x, ScalarType scale_dtype) -> {_RESULT}")
torch.library.impl("icw_int8kv::quantize_halves", "CompositeImplicitAutograd", quantize_halves)
# The same as one operation, which the library of the CPU kernel has in C++.
torch.library.define(
    "icw_int8kv::quantize_halves_cpu",
    f"(Tensor x, ScalarType scale_dtype) -> {_RESULT}",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
torch.library.impl(
    "icw_int8kv::quantize_halves_cpu",
    "CompositeExplicitAutograd",
    lambda x, scale_dtype: tuple(part.contiguous() for part in quantize_halves(x, scale_dtype)),
)
torch.library.register_fake("icw_int8kv::quantize_halves_cpu", _fake_quantize)
torch.library.define("icw_int8kv::halves_to_levels", "(Tensor packed, Tensor codes) -> Tensor")
torch.library.impl("icw_int8kv::halves_to_levels", "CompositeImplicitAutograd", halves_to_levels)
torch.library.define(
    "icw_int8kv::dequantize_halves", "(Tensor packed, Tensor scale, Tensor codes, ScalarType dtype) -> Tensor"
)
torch.library.impl("icw_int8kv::dequantize_halves", "CompositeImplicitAutograd", dequantize_halves)
