"""Rows of 8 bits with a scale each.

``quantize_per_head(x[..., D], scale_dtype) -> (qdata int8[..., D], scale[..., 1])``
    Symmetric, one scale per row: ``scale = amax(|x|) / 127``, ``qdata = round(x / scale)`` in ``[-127, 127]``, where
    the division is by the scale *as stored*. A zero row has scale 0; a row with a NaN or an infinity has a
    non-finite scale and reads back as non-finite in every channel.
``dequantize_per_head(qdata[..., D], scale[..., 1], dtype) -> [..., D]``
    The reverse. A finite row stays finite in float16: its largest number is the bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icw_compile.formats.base import Evaluator, Part, Stored
from icw_compile.formats.scaled import ScaledRows

__all__ = [
    "QMAX",
    "Int8Rows",
    "dequantize_per_head",
    "quantize_per_head",
    "rows_for",
    "to_finite",
]

aten = torch.ops.aten
_ops = torch.ops.icw_int8kv

#: Largest magnitude of a quantized value. -128 is left out, so that the range is symmetric.
QMAX = 127


def quantize_per_head(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = x.float()
    amax = values.abs().amax(dim=-1, keepdim=True)
    scale = (amax / QMAX).to(scale_dtype)
    steps = (values / scale.float()).round().clamp(-QMAX, QMAX)
    # NaN, as of 0 / 0 and inf / inf, has no integer: the scale alone carries "non-finite", as 0 * inf and 0 * NaN do.
    return torch.where(steps == steps, steps, 0.0).to(torch.int8), scale


def rows_for(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for what `quantize_per_head` gives."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=scale_dtype)


def dequantize_per_head(qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return to_finite(qdata.float() * scale.float(), dtype)


def to_finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 ``x`` in ``dtype``: what is finite stays so, where a scale was rounded up beyond float16."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        x = torch.where(x.isfinite(), x.clamp(-largest, largest), x)
    return x.to(dtype)


@dataclass(frozen=True)
class Int8Rows(ScaledRows):
    """``qdata``, int8, and ``scale``."""

    @property
    def name(self) -> str:
        return "int8"

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("qdata", "BHTD"), Part("scale", "BHT1"))

    def empty(self, run: Evaluator, size: Sequence[Any], device: torch.device) -> Stored:
        qdata = run.call(aten.zeros.default, list(size), dtype=torch.int8, device=device)
        scale = run.call(aten.zeros.default, [*size[:-1], 1], dtype=self.scale_dtype, device=device)
        return Stored(self, (qdata, scale))

    def encode(self, run: Evaluator, values: Any, into: Stored) -> dict[str, Any]:
        qdata, scale = run.call(_ops.quantize_per_head.default, values, self.scale_dtype)
        return {"qdata": qdata, "scale": scale}

    def decode(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Any:
        return run.call(_ops.dequantize_per_head.default, *x.parts, dtype)

    def scaled_rows(self, run: Evaluator, x: Stored) -> tuple[Any, Any] | None:
        return x["qdata"], x["scale"]

    def bytes_per_token(self, heads: int, head_dim: int) -> int:
        return heads * (head_dim + self.scale_dtype.itemsize)

    def checked(self, parts: Sequence[Tensor], size: Sequence[int]) -> None:
        qdata, scale = parts
        if qdata.dtype != torch.int8 or tuple(qdata.shape) != tuple(size):
            raise ValueError(f"qdata must be int8 {list(size)}, not {qdata.dtype} {list(qdata.shape)}")
        if scale.dtype != self.scale_dtype or tuple(scale.shape) != (*size[:-1], 1):
            raise ValueError(
                f"scale must be {self.scale_dtype} {[*size[:-1], 1]}, not {scale.dtype} {list(scale.shape)}"
            )


torch.library.define(
    "icw_int8kv::quantize_per_head", "(Tensor x, ScalarType scale_dtype) -> (Tensor qdata, Tensor scale)"
)
torch.library.impl("icw_int8kv::quantize_per_head", "CompositeImplicitAutograd", quantize_per_head)
torch.library.define("icw_int8kv::dequantize_per_head", "(Tensor qdata, Tensor scale, ScalarType dtype) -> Tensor")
torch.library.impl("icw_int8kv::dequantize_per_head", "CompositeImplicitAutograd", dequantize_per_head)
