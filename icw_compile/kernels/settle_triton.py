"""The Triton kernels behind `icw_compile.kernels.settle`. Imports Triton.

``look`` reads the rows of a head, shared among programs, and ``settle`` or ``settle_again`` puts together what each of
them saw. That has all channels in its registers, and sorts them for their medians.
"""

import triton
import triton.language as tl

from icw_compile.formats import equalized
from icw_compile.formats.int8 import QMAX as QMAX_OF_INT8

__all__ = ["look", "settle", "settle_again"]

ORIGIN = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds to integers, and to the even one of two
QMAX = tl.constexpr(float(QMAX_OF_INT8))
OUTLIER = tl.constexpr(equalized.OUTLIER)
MAX_SHIFT = tl.constexpr(float(equalized.MAX_SHIFT))
NEGLIGIBLE = tl.constexpr(equalized.NEGLIGIBLE)


@triton.jit
def _sizes(part, PADDED: tl.constexpr):
    """Of rows ``part[R, PADDED]`` of magnitudes: their sizes, and 1.0 where there is one, both ``[R, PADDED]``."""
    most = tl.max(part, 1)
    counts = (most > 0) & (tl.sum((part < float("inf")).to(tl.int32), 1) == PADDED)
    part /= tl.where(counts, most, 1.0)[:, None]
    tells = counts[:, None] & (part >= NEGLIGIBLE)
    one = tells.to(tl.float32)
    size = tl.log2(tl.where(tells, part, 1.0))
    return size - (tl.sum(size, 1) / tl.maximum(tl.sum(one, 1), 1.0))[:, None], one


@triton.jit(do_not_specialize=["heads", "tokens", "stored"])
def look(
    x,  # [batch, heads, tokens, CHANNELS], floats
    written,  # [batch, heads, stored, WIDTH], numbers
    seen,  # float32 [3, batch * heads, splits, CHANNELS]: of each channel the sum of its sizes, the largest, how many
    filled,  # int32 [batch * heads, splits]: whether there is anything but zeros in `written`
    stride_batch,
    stride_head,
    stride_row,
    stride_channel,
    stride_written_batch,
    stride_written_head,
    stride_written_row,
    stride_written_last,
    heads,
    tokens,
    stored,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two, no less than CHANNELS
    BLOCK: tl.constexpr,
    WRITTEN: tl.constexpr,
    FROM: tl.constexpr,
):
    """Grid ``(batch * heads, splits)``: every ``splits``-th block of rows, and of what is written from row FROM on."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    x += batch * stride_batch + head * stride_head
    channel = tl.arange(0, PADDED)
    # Of each place of a block: rows of several warps are put together once, behind the loop.
    total = tl.zeros([BLOCK, PADDED], tl.float32)
    rows = tl.zeros([BLOCK, PADDED], tl.float32)
    largest = tl.full([BLOCK, PADDED], -float("inf"), tl.float32)
    for start in range(split * BLOCK, tokens, splits * BLOCK):
        row = start + tl.arange(0, BLOCK)
        there = (row < tokens)[:, None] & (channel < CHANNELS)[None, :]
        at = row.to(tl.int64)[:, None] * stride_row + channel[None, :] * stride_channel
        size, one = _sizes(tl.abs(tl.load(x + at, mask=there, other=0).to(tl.float32)), PADDED)
        total += size * one
        rows += one
        largest = tl.maximum(largest, tl.where(one > 0, size, -float("inf")))
    seen += (tl.program_id(0) * splits + split).to(tl.int64) * CHANNELS + channel
    each = tl.num_programs(0).to(tl.int64) * splits * CHANNELS
    tl.store(seen, tl.sum(total, 0), mask=channel < CHANNELS)
    tl.store(seen + each, tl.max(largest, 0), mask=channel < CHANNELS)
    tl.store(seen + 2 * each, tl.sum(rows, 0), mask=channel < CHANNELS)
    written += batch * stride_written_batch + head * stride_written_head
    found = tl.zeros([WRITTEN], tl.int32)
    for start in range(FROM * WIDTH + split * WRITTEN, stored * WIDTH, splits * WRITTEN):
        number = start + tl.arange(0, WRITTEN)
        at = (number // WIDTH).to(tl.int64) * stride_written_row + number % WIDTH * stride_written_last
        found |= (tl.load(written + at, mask=number < stored * WIDTH, other=0) != 0).to(tl.int32)
    tl.store(filled + tl.program_id(0) * splits + split, tl.max(found, 0))


@triton.jit
def _above_median(sizes, counts, PADDED: tl.constexpr):
    """``sizes[PADDED]`` over the lower median of those that count."""
    place = (tl.sum(counts.to(tl.int32), 0) - 1) // 2
    inside = tl.arange(0, PADDED) == place
    return sizes - tl.sum(tl.where(inside, tl.sort(tl.where(counts, sizes, float("inf"))), 0.0), 0)


@triton.jit
def _told(total, largest, rows, than, PADDED: tl.constexpr):
    """The shifts ``[PADDED]``, float32, of channels of which more ``than`` so many rows tell something."""
    usual = total / tl.maximum(rows, 1.0)
    above = tl.minimum(_above_median(usual, rows > 0, PADDED), _above_median(largest, rows > 0, PADDED))
    return tl.where((above >= OUTLIER) & (rows > than), tl.minimum(tl.floor(above), MAX_SHIFT), 0.0)


@triton.jit
def _power(exponent):
    """``2 ** exponent`` of an integer, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["heads", "splits"])
def settle(
    seen,
    filled,
    shift,  # uint8 [batch, heads, 1, CHANNELS]
    settled,  # uint8 [batch * heads, CHANNELS]
    stride_batch,
    stride_head,
    stride_channel,
    heads,
    splits,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, no less than `splits`
):
    """Grid ``(batch * heads,)``."""
    batch, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    channel, split = tl.arange(0, PADDED), tl.arange(0, SPLITS)
    exists = channel < CHANNELS
    inside = (split < splits)[:, None] & exists[None, :]
    seen += (tl.program_id(0) * splits + split).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    each = tl.num_programs(0).to(tl.int64) * splits * CHANNELS
    usual = tl.sum(tl.load(seen, mask=inside, other=0), 0)
    largest = tl.max(tl.load(seen + each, mask=inside, other=-float("inf")), 0)
    rows = tl.sum(tl.load(seen + 2 * each, mask=inside, other=0), 0)
    told = _told(usual, largest, rows, 1.0, PADDED).to(tl.uint8)
    is_filled = tl.max(tl.load(filled + tl.program_id(0) * splits + split, mask=split < splits, other=0), 0) > 0
    held = tl.load(shift + batch * stride_batch + head * stride_head + channel * stride_channel, mask=exists, other=0)
    to = settled + tl.program_id(0).to(tl.int64) * CHANNELS + channel
    tl.store(to, tl.where(is_filled, held, told), mask=exists)


@triton.jit(do_not_specialize=["heads", "splits", "tokens"])
def settle_again(
    seen,
    filled,  # of rows from FIRST on
    shift,
    qdata,  # int8 [batch, heads, FIRST or more, CHANNELS]
    scale,  # [batch, heads, FIRST or more, 1]
    settled,
    qdata_anew,  # int8 [batch * heads, FIRST, CHANNELS]
    scale_anew,  # [batch * heads, FIRST]
    stride_batch,
    stride_head,
    stride_channel,
    stride_qdata_batch,
    stride_qdata_head,
    stride_qdata_row,
    stride_qdata_channel,
    stride_scale_batch,
    stride_scale_head,
    stride_scale_row,
    heads,
    splits,
    tokens,  # of `x`
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Grid ``(batch * heads,)``."""
    batch, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    channel, split, row = tl.arange(0, PADDED), tl.arange(0, SPLITS), tl.arange(0, FIRST)
    exists = channel < CHANNELS
    held = tl.load(
        shift + batch * stride_batch + head * stride_head + channel * stride_channel, mask=exists, other=0
    ).to(tl.int32)
    # The first rows that are stored, and whether they decide.
    scale += batch * stride_scale_batch + head * stride_scale_head + row * stride_scale_row
    qdata += batch * stride_qdata_batch + head * stride_qdata_head
    qdata += row[:, None] * stride_qdata_row + channel[None, :] * stride_qdata_channel
    step = tl.load(scale).to(tl.float32)
    codes = tl.load(qdata, mask=exists[None, :], other=0)
    is_row = step != 0
    stored = tl.sum(is_row.to(tl.int32), 0)
    more = tl.max(tl.load(filled + tl.program_id(0) * splits + split, mask=split < splits, other=0), 0) > 0
    tells = (stored == 1) | ((stored > 0) & (stored + tokens > FIRST))
    tells = tells & (more == 0)
    divided = codes.to(tl.float32) * step[:, None]
    values = divided * _power(held)[None, :]
    half = (tl.max(tl.abs(divided), 1) / (2 * QMAX))[:, None] * _power(held)[None, :]
    known = tl.where(divided == 0, half, tl.abs(values))
    size, one = _sizes(tl.where(is_row[:, None] & exists[None, :], known, 0.0), PADDED)
    one = tl.where(tells, one, 0.0)
    # With what `look` saw.
    inside = (split < splits)[:, None] & exists[None, :]
    seen += (tl.program_id(0) * splits + split).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    each = tl.num_programs(0).to(tl.int64) * splits * CHANNELS
    total = tl.sum(tl.load(seen, mask=inside, other=0), 0) + tl.sum(size * one, 0)
    largest = tl.max(tl.load(seen + each, mask=inside, other=-float("inf")), 0)
    largest = tl.maximum(largest, tl.max(tl.where(one > 0, size, -float("inf")), 0))
    new_rows = tl.sum(tl.load(seen + 2 * each, mask=inside, other=0), 0)
    is_one = tells & (stored == 1) & (tl.max(new_rows, 0) == 0)
    than = tl.where(is_one, 0.0, 1.0)
    told = _told(total, largest, new_rows + tl.sum(one, 0), than, PADDED).to(tl.int32)
    told = tl.where(is_one, (told + 1) // 2, told)
    is_empty = (stored == 0) & (more == 0)
    told = tl.where(tells | is_empty, told, held)
    tl.store(settled + tl.program_id(0).to(tl.int64) * CHANNELS + channel, told.to(tl.uint8), mask=exists)
    # The rows by that; one that is not finite reads as that by any.
    divided = values * _power(-told)[None, :]
    most = tl.max(tl.abs(divided), 1)
    changed = tells & is_row & (most < float("inf")) & (step == step) & (tl.max((told != held).to(tl.int32), 0) > 0)
    step_anew = tl.div_rn(most, tl.full([FIRST], QMAX, tl.float32)).to(scale_anew.dtype.element_ty)
    steps = tl.div_rn(divided, tl.broadcast_to(step_anew.to(tl.float32)[:, None], [FIRST, PADDED]))
    steps = tl.where(steps == steps, steps, 0.0)  # before a limit, which takes NaN for none on a GPU
    steps = (tl.minimum(tl.maximum(steps, -QMAX), QMAX) + ORIGIN - ORIGIN).to(tl.int8)
    first = tl.program_id(0).to(tl.int64) * FIRST + row
    tl.store(scale_anew + first, tl.where(changed, step_anew, tl.load(scale)))
    at = first[:, None] * CHANNELS + channel[None, :]
    tl.store(qdata_anew + at, tl.where(changed[:, None], steps, codes), mask=exists[None, :])
