"""What formats of rows with a scale each have in common."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from icw_compile.formats.base import Evaluator, Format, Stored

__all__ = ["SCALE_DTYPES", "ScaledRows", "scale_dtype_for"]

aten = torch.ops.aten

#: The dtypes of keys and values that can be quantized, and the dtype in which the scales of each are stored.
SCALE_DTYPES: dict[torch.dtype, torch.dtype] = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.bfloat16,
}


def scale_dtype_for(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the scales of ``dtype`` keys and values are stored.

    Raises:
        TypeError: ``dtype`` is not one that the int8 cache supports.
    """
    try:
        return SCALE_DTYPES[dtype]
    except KeyError:
        supported = ", ".join(str(d).removeprefix("torch.") for d in SCALE_DTYPES)
        raise TypeError(
            f"icw_int8kv cannot quantize a key/value cache of dtype {dtype}: the supported dtypes are {supported}. "
            "Load the model in one of them, for example with `dtype=torch.bfloat16`."
        ) from None


@dataclass(frozen=True)
class ScaledRows(Format):
    """A format with a part ``scale`` for each row: bfloat16 for 16-bit values, float32 for float32 ones.

    Raises:
        TypeError: ``float_dtype`` is none of these.
    """

    float_dtype: torch.dtype

    def __post_init__(self) -> None:
        scale_dtype_for(self.float_dtype)

    def __str__(self) -> str:
        return f"{self.name} {str(self.float_dtype).removeprefix('torch.')}"

    @property
    def dtype(self) -> torch.dtype:
        return self.float_dtype

    @property
    def scale_dtype(self) -> torch.dtype:
        return scale_dtype_for(self.float_dtype)

    def cast(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Stored:
        other = replace(self, float_dtype=dtype)
        if other.scale_dtype in (torch.float32, self.scale_dtype):
            return replace(x.with_parts(scale=run.call(aten.to.dtype, x["scale"], other.scale_dtype)), format=other)
        # Rounding the scales would move every value: round the values instead.
        return replace(x.with_parts(**other.encode(run, self.decode(run, x, dtype), x)), format=other)

    def written(self, x: Stored) -> Any:
        return x["scale"]
