"""What a stored value is, and what an operation does to it: one file for each format and wrapper, and one of rules."""

import torch

from icw_compile.formats.base import AXES, Evaluator, Format, Part, Stored, Wrapper
from icw_compile.formats.equalized import Equalized
from icw_compile.formats.int8 import Int8Rows
from icw_compile.formats.kept import KeepsRows

__all__ = [
    "AXES",
    "FORMATS",
    "Equalized",
    "Evaluator",
    "Format",
    "Int8Rows",
    "KeepsRows",
    "Part",
    "Stored",
    "Wrapper",
    "make_format",
]

#: Every format and wrapper.
FORMATS = (Int8Rows, Equalized, KeepsRows)


def make_format(dtype: torch.dtype, *, equalize: bool = False, sink_tokens: int = 0, recent_tokens: int = 0) -> Format:
    """The format for keys or values of ``dtype``.

    Args:
        dtype: float32, bfloat16 or float16.
        equalize: divide channels that are outliers.
        sink_tokens, recent_tokens: how many of the first rows, and of those written last, to keep in ``dtype`` besides.

    Raises:
        TypeError: for another ``dtype``.
    """
    made: Format = Int8Rows(dtype)
    if equalize:
        made = Equalized(made)
    return KeepsRows(made, sink_tokens, recent_tokens) if sink_tokens or recent_tokens else made
