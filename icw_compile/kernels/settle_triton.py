"""The Triton kernels behind `icw_compile.kernels.settle`. Imports Triton.

``look`` reads the rows of a head, shared among programs, and ``settle`` puts together what each of them saw. It has all
channels in its registers, and sorts them for their medians.
"""

import triton
import triton.language as tl

from icw_compile.formats import equalized

__all__ = ["look", "settle"]

OUTLIER = tl.constexpr(equalized.OUTLIER)
MAX_SHIFT = tl.constexpr(float(equalized.MAX_SHIFT))
NEGLIGIBLE = tl.constexpr(equalized.NEGLIGIBLE)


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
):
    """Grid ``(batch * heads, splits)``: every ``splits``-th block of rows, and of what is written."""
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
        part = tl.abs(tl.load(x + at, mask=there, other=0).to(tl.float32))
        most = tl.max(part, 1)
        counts = (most > 0) & (tl.sum((part < float("inf")).to(tl.int32), 1) == PADDED)
        part /= tl.where(counts, most, 1.0)[:, None]
        tells = counts[:, None] & (part >= NEGLIGIBLE)
        one = tells.to(tl.float32)
        size = tl.log2(tl.where(tells, part, 1.0))
        size -= (tl.sum(size, 1) / tl.maximum(tl.sum(one, 1), 1.0))[:, None]
        total += size * one
        rows += one
        largest = tl.maximum(largest, tl.where(tells, size, -float("inf")))
    seen += (tl.program_id(0) * splits + split).to(tl.int64) * CHANNELS + channel
    each = tl.num_programs(0).to(tl.int64) * splits * CHANNELS
    tl.store(seen, tl.sum(total, 0), mask=channel < CHANNELS)
    tl.store(seen + each, tl.max(largest, 0), mask=channel < CHANNELS)
    tl.store(seen + 2 * each, tl.sum(rows, 0), mask=channel < CHANNELS)
    written += batch * stride_written_batch + head * stride_written_head
    found = tl.zeros([WRITTEN], tl.int32)
    for start in range(split * WRITTEN, stored * WIDTH, splits * WRITTEN):
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
    usual /= tl.maximum(rows, 1.0)
    above = tl.minimum(_above_median(usual, rows > 0, PADDED), _above_median(largest, rows > 0, PADDED))
    is_outlier = (above >= OUTLIER) & (rows > 1)
    told = tl.where(is_outlier, tl.minimum(tl.floor(above), MAX_SHIFT), 0.0).to(tl.uint8)
    is_filled = tl.max(tl.load(filled + tl.program_id(0) * splits + split, mask=split < splits, other=0), 0) > 0
    held = tl.load(shift + batch * stride_batch + head * stride_head + channel * stride_channel, mask=exists, other=0)
    to = settled + tl.program_id(0).to(tl.int64) * CHANNELS + channel
    tl.store(to, tl.where(is_filled, held, told), mask=exists)
