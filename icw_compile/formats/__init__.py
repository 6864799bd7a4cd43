"""What a stored value is, and what an operation does to it: one file for each format and wrapper, and one of rules."""

import torch

from icw_compile.formats.base import AXES, Evaluator, Format, Part, Stored, Wrapper
from icw_compile.formats.equalized import Equalized
from icw_compile.formats.int4 import Int4Rows
from icw_compile.formats.int8 import Int8Rows
from icw_compile.formats.kept import KeepsRows

__all__ = [
    "AXES",
    "FORMATS",
    "RECENT_TOKENS",
    "Equalized",
    "Evaluator",
    "Format",
    "Int4Rows",
    "Int8Rows",
    "KeepsRows",
    "Part",
    "Stored",
    "Wrapper",
    "make_format",
    "recent_tokens_for",
]

#: Every format and wrapper.
FORMATS = (Int8Rows, Int4Rows, Equalized, KeepsRows)


#: Bits of a stored number -> the format of its rows.
_ROWS = {8: Int8Rows, 4: Int4Rows}
#: Bits -> how many of the tokens written last are kept in the model's dtype. Attention reads the latest most. 128 are
#: what the quantized caches of transformers keep; they take the divergence that 4 bits cause down by a factor of 5 to
#: 17. Of 8 bits, 32 do what 128 would (docs/quality.md).
RECENT_TOKENS = {8: 32, 4: 128}


def recent_tokens_for(bits: int, device: torch.device) -> int:
    """How many of the tokens written last are kept besides where nobody says: `RECENT_TOKENS`.

    On an accelerator none of 8 bits: there they cost a kernel registers, which has not been timed.
    """
    return RECENT_TOKENS[bits] if bits < 8 or device.type in ("cpu", "meta") else 0


def make_format(
    dtype: torch.dtype, *, bits: int = 8, equalize: bool = False, sink_tokens: int = 0, recent_tokens: int = 0
) -> Format:
    """The format for keys or values of ``dtype``.

    Args:
        dtype: float32, bfloat16 or float16.
        bits: of each number, 8 or 4.
        equalize: divide channels that are outliers.
        sink_tokens, recent_tokens: how many of the first rows, and of those written last, to keep in ``dtype`` besides.

    Raises:
        TypeError: for another ``dtype``.
        ValueError: for other ``bits``.
    """
    if bits not in _ROWS:
        raise ValueError(f"{bits!r} bits: keys and values are stored in {' or '.join(map(str, _ROWS))}")
    made: Format = _ROWS[bits](dtype)
    if equalize:
        made = Equalized(made)
    return KeepsRows(made, sink_tokens, recent_tokens) if sink_tokens or recent_tokens else made
