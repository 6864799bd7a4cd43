"""``settle_shift`` and ``settle_again`` (`icw_compile.formats.equalized`) on CUDA devices: two Triton kernels for each.

Plain torch takes some fifty kernels for one, and two hundred for the other, many of which go through the states of a
prompt once more, for the keys and the values of each layer. These read them once. The kernels are in
`icw_compile.kernels.settle_triton`, which is imported at the first call; what they do not take, as rows of 4 bits and
those that are kept, and where there is no Triton, plain torch computes.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from icw_compile.formats import equalized
from icw_compile.formats.equalized import TELLING
from icw_compile.formats.int8 import Int8Rows
from icw_compile.kernels.gpu import why_not_on
from icw_compile.kernels.launch import expanded, padded, processors

__all__ = ["MAX_CHANNELS", "settle_again", "settle_again_triton", "settle_shift", "settle_shift_triton"]

#: As many as a program has in its registers.
MAX_CHANNELS = 256
#: Programs that share a head, at most, and for each multiprocessor of the device.
MAX_SPLITS, PROGRAMS = 64, 4
#: Numbers of a program at a time, of the states and of what is written.
NUMBERS, WRITTEN = 2048, 1024


def settle_shift(x: Tensor, written: Tensor, shift: Tensor) -> Tensor:
    """``icw_int8kv::settle_shift`` on CUDA tensors."""
    if _takes(x, written, shift):
        return settle_shift_triton(x, written, shift)
    return equalized.settle_shift(x, written, shift)


def _takes(x: Tensor, written: Tensor, shift: Tensor) -> bool:
    fits = x.dim() == written.dim() == shift.dim() == 4 and x.is_floating_point() and shift.dtype == torch.uint8
    is_small = fits and 0 < shift.shape[3] <= MAX_CHANNELS
    return is_small and importlib.util.find_spec("triton") is not None and why_not_on(x.device) is None


def settle_again(
    x: Tensor | None,
    rows: Sequence[Tensor],
    written: Tensor,
    shift: Tensor,
    kept: Sequence[Tensor],
    length: int | None,
    inner: str,
) -> list[Tensor]:
    """``icw_int8kv::settle_again`` on CUDA tensors."""
    is_int8 = isinstance(equalized.inner_format(inner), Int8Rows) and not kept
    if is_int8 and x is not None and length is None and written.shape[-2] > TELLING and _takes(x, written, shift):
        qdata, scale = rows
        return settle_again_triton(x, qdata, scale, shift)
    return equalized.settle_again(x, rows, written, shift, kept, length, inner)


def settle_shift_triton(x: Tensor, written: Tensor, shift: Tensor) -> Tensor:
    """The same of 4 dimensions and `MAX_CHANNELS` channels at most; on any device where Triton interprets."""
    from icw_compile.kernels.settle_triton import settle

    settled = shift.new_empty(shift.shape)
    if not settled.numel():
        return settled
    seen, filled, heads, sizes = _look(x, written, shift)
    with torch.cuda.device_of(x):
        settle[heads](
            seen, filled, shift, settled, *shift.stride()[:2], shift.stride(3), shift.shape[1], filled.shape[1], **sizes
        )
    return settled


def settle_again_triton(x: Tensor, qdata: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    """The same for `Int8Rows`, of more than `TELLING` rows of which none is kept besides."""
    from icw_compile.kernels.settle_triton import settle_again

    batch, heads = shift.shape[:2]
    settled = shift.new_empty(shift.shape)
    anew = [part.new_empty((batch, heads, TELLING, part.shape[3])) for part in (qdata, scale)]
    if not settled.numel():
        return [settled, *anew]
    seen, filled, grid, sizes = _look(x, scale, shift, TELLING)
    strides = (*shift.stride()[:2], shift.stride(3), *qdata.stride(), *scale.stride()[:3])
    with torch.cuda.device_of(x):
        settle_again[grid](
            seen, filled, shift, qdata, scale, settled, *anew, *strides, heads, filled.shape[1], x.shape[2],
            **sizes, FIRST=TELLING,
        )  # fmt: skip
    return [settled, *anew]


def _look(
    x: Tensor, written: Tensor, shift: Tensor, first: int = 0
) -> tuple[Tensor, Tensor, tuple[int], dict[str, int]]:
    """What `look` saw, of ``written`` in the rows from ``first`` on; how to launch what puts that together."""
    from icw_compile.kernels.settle_triton import look

    batch, heads, _, channels = shift.shape
    tokens, (stored, width) = x.shape[2], written.shape[2:]
    fits = all(size in (1, of) for each in (x, written) for size, of in zip(each.shape, (batch, heads)))
    if not fits or x.shape[3] != channels or shift.shape[2] != 1:
        shapes = ", ".join(str(list(each.shape)) for each in (x, written, shift))
        raise ValueError(f"icw_int8kv::settle_shift: x, written and shift do not fit: {shapes}")
    block = max(8, NUMBERS // padded(channels))
    most = min(MAX_SPLITS, -(-PROGRAMS * processors(x.device) // (batch * heads)))
    splits = max(1, min(most, max(tokens // block, stored * width // WRITTEN)))
    seen = torch.empty((3, batch * heads, splits, channels), dtype=torch.float32, device=x.device)
    filled = torch.empty((batch * heads, splits), dtype=torch.int32, device=x.device)
    sizes = {"CHANNELS": channels, "PADDED": padded(channels)}
    strides = [expanded(each.shape, each.stride(), (batch, heads, *each.shape[2:])) for each in (x, written)]
    with torch.cuda.device_of(x):
        look[(batch * heads, splits)](
            x, written, seen, filled, *strides[0], *strides[1], heads, tokens, stored,
            **sizes, WIDTH=width, BLOCK=block, WRITTEN=WRITTEN, FROM=first,
        )  # fmt: skip
    # One variant for prompts of all lengths: what is not there is not loaded.
    one_for_a_head = {"SPLITS": MAX_SPLITS, "num_warps": max(4, padded(channels) // 32)}
    return seen, filled, (batch * heads,), {**sizes, **one_for_a_head}


torch.library.impl("icw_int8kv::settle_again", "CUDA", settle_again)
torch.library.impl("icw_int8kv::settle_shift", "CUDA", settle_shift)
