"""``icw_int8kv::settle_shift`` (`icw_compile.formats.equalized`) on CUDA devices: two Triton kernels.

Plain torch takes some twenty-five kernels for it, most of which go through the states of a prompt once more, for the
keys and the values of each layer. These read them once. The kernels are in `icw_compile.kernels.settle_triton`, which
is imported at the first call; what they do not take, and where there is no Triton, plain torch computes as before.
"""

import importlib.util

import torch
from torch import Tensor

from icw_compile.formats import equalized
from icw_compile.kernels.gpu import expanded, padded, processors, why_not_on

__all__ = ["MAX_CHANNELS", "settle_shift", "settle_shift_triton"]

#: As many as a program has in its registers.
MAX_CHANNELS = 256
#: Programs that share a head, at most, and for each multiprocessor of the device.
MAX_SPLITS, PROGRAMS = 64, 4
#: Numbers of a program at a time, of the states and of what is written.
NUMBERS, WRITTEN = 2048, 1024


def settle_shift(x: Tensor, written: Tensor, shift: Tensor) -> Tensor:
    """``icw_int8kv::settle_shift`` on CUDA tensors."""
    takes = x.dim() == written.dim() == shift.dim() == 4 and x.is_floating_point() and shift.dtype == torch.uint8
    if takes and 0 < shift.shape[3] <= MAX_CHANNELS and importlib.util.find_spec("triton") and not why_not_on(x.device):
        return settle_shift_triton(x, written, shift)
    return equalized.settle_shift(x, written, shift)


def settle_shift_triton(x: Tensor, written: Tensor, shift: Tensor) -> Tensor:
    """The same of 4 dimensions and `MAX_CHANNELS` channels at most; on any device where Triton interprets."""
    from icw_compile.kernels.settle_triton import look, settle

    batch, heads, _, channels = shift.shape
    tokens, (stored, width) = x.shape[2], written.shape[2:]
    full = (batch, heads)
    fits = all(size in (1, of) for each in (x, written) for size, of in zip(each.shape, full))
    if not fits or x.shape[3] != channels or shift.shape[2] != 1:
        shapes = ", ".join(str(list(each.shape)) for each in (x, written, shift))
        raise ValueError(f"icw_int8kv::settle_shift: x, written and shift do not fit: {shapes}")
    settled = torch.empty((batch, heads, 1, channels), dtype=torch.uint8, device=shift.device)
    if not settled.numel():
        return settled
    block = max(8, NUMBERS // padded(channels))
    most = min(MAX_SPLITS, -(-PROGRAMS * processors(x.device) // (batch * heads)))
    splits = max(1, min(most, max(tokens // block, stored * width // WRITTEN)))
    seen = torch.empty((3, batch * heads, splits, channels), dtype=torch.float32, device=x.device)
    filled = torch.empty((batch * heads, splits), dtype=torch.int32, device=x.device)
    sizes = {"CHANNELS": channels, "PADDED": padded(channels)}
    with torch.cuda.device_of(x):
        look[(batch * heads, splits)](
            x,
            written,
            seen,
            filled,
            *expanded(x.shape[:2], x.stride()[:2], full),
            *x.stride()[2:],
            *expanded(written.shape[:2], written.stride()[:2], full),
            *written.stride()[2:],
            heads,
            tokens,
            stored,
            **sizes,
            WIDTH=width,
            BLOCK=block,
            WRITTEN=WRITTEN,
        )
        settle[(batch * heads,)](
            seen,
            filled,
            shift,
            settled,
            *shift.stride()[:2],
            shift.stride(3),
            heads,
            splits,
            **sizes,
            SPLITS=1 << (splits - 1).bit_length(),
        )
    return settled


torch.library.impl("icw_int8kv::settle_shift", "CUDA", settle_shift)
