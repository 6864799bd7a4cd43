"""The Triton kernels behind `icw_compile.kernels.gpu`: attention over a key/value cache of 8 or 4 bits. Imports Triton.

What they compute is ``icw_int8kv::attention`` (`icw_compile.kernels.inductor`); how:

* A *row* is one (query token, query head of the group) pair, tokens outermost. A program takes a tile of rows of one
  key/value head, so that decode and prefill are one kernel with different tiles, and each int8 row is loaded and
  converted once for all query heads that share it.
* Split-KV ("flash decoding"): where the tiles alone do not fill the device, ``split`` programs share a tile. They take
  every ``splits``-th block of positions, not a contiguous part each: a cache that is filled to a quarter keeps all
  of them busy. Each yields (largest score, sum, weighted values) for each row, and `merge` combines them. Where a mask
  lets each sequence of a batch read positions of its own, as left padding does, more of them share a longer one.
* The scales of the keys multiply the scores, those of the values the weights. The int8 rows of keys are multiplied as
  they are, by queries of three int8 digits; of up to eight rows, two digits fill the sixteen rows of a matrix product.
  Rows of values become float16 without error; the weights are float16 too, and for their sake the softmax is relative
  to the largest score times a value's scale. Float32 models take three products of TF32 numbers, which give back its
  precision.
* Rows of 4 bits become rows of 8 after they are loaded, each of keys and values: what follows does not know which they
  were. The two channels of a byte lie side by side then, and the query is read, the output written, in that order.
* Blocks that no row of the tile may read, by a boolean mask or causally, are skipped before their rows or scales are
  loaded. Those that every row reads whole run in a loop without a test in it, whose loads Triton pipelines. A boolean
  mask without holes, as of what is cached, a window or padding, is known by where its rows begin and end, and is read
  for the blocks at the ends; of one with holes, and of an additive one, all blocks are read in part.
* Rows that are kept in the model's dtype take the place of what is stored of them, where a block has any: scores and
  weighted values of such a block are of two products each. The blocks that are read whole end where kept rows begin,
  at both ends, and so their loop knows nothing of them.
* Sinks are one more score, which has no value, when all others are known.

Lengths are not specialised, but for whether heads have an even number of scales: a cache that grows compiles nothing
anew.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from icw_compile.compat.triton import is_interpreting
from icw_compile.kernels import launch

__all__ = ["attend", "merge"]

# Kept rows whose positions are compared at a time.
KEPT = tl.constexpr(64)
INTERPRETS = tl.constexpr(is_interpreting())
IS_PTX = tl.constexpr(torch.version.hip is None and not is_interpreting())
# Of float32 products. Triton's backend for AMD has no products of three TF32 numbers, and multiplies float32 as it is.
PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")
# The bytes of four channels to two pairs of float16, the even and the odd ones: 1024 + 128 + x has x + 128 in its last
# eight bits. Instructions that convert take four times as long.
HALVES = tl.constexpr("""{
    .reg .b32 shifted, even, odd, origin;
    mov.b32 origin, 0x64806480;
    xor.b32 shifted, $2, 0x80808080;
    prmt.b32 even, shifted, 0x64, 0x4240;
    prmt.b32 odd, shifted, 0x64, 0x4341;
    sub.f16x2 $0, even, origin;
    sub.f16x2 $1, odd, origin;
}""")
# Waits for the kernel ahead once a number, which is not negative, is known: a wait without a condition comes first of
# all, and what is worked out before it in the source is worked out behind.
WAIT = tl.constexpr("""{
    .reg .pred known;
    setp.ge.s64 known, $1, 0;
    @known griddepcontrol.wait;
    mov.b64 $0, $1;
}""")
ORIGIN = tl.constexpr(0x4B400000)  # the bits of 1.5 * 2**23, to which an integer adds itself
LOG2_E = tl.constexpr(math.log2(math.e))
# Of `mask_spans`: the numbers in front of the mask's words, of which the share is the last, and its bits.
HEADER = tl.constexpr(launch.SPANS_HEADER)
SHARE_BITS = tl.constexpr(launch.SHARE_BITS)


@triton.jit
def _loaded(
    base, start, stride, length, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr
):
    """``[BLOCK, PADDED]``: rows of numbers from ``start``; zeros behind ``length``, if it is checked, and ``SIZE``."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + row * stride + column
    if CHECKED:
        return tl.load(pointers, mask=(start + row < length) & (column < SIZE), other=0)
    if SIZE != PADDED:
        return tl.load(pointers, mask=column < SIZE, other=0)
    return tl.load(pointers)


@triton.jit
def _numbers(base, start, stride, length, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """``[BLOCK]``: the scales, or the codes, of the rows from ``start``."""
    row = tl.arange(0, BLOCK)
    pointers = base + tl.cast(start, tl.int64) * stride + row * stride
    if CHECKED:
        return tl.load(pointers, mask=start + row < length, other=0)
    return tl.load(pointers)


@triton.jit
def _table(code):
    """int32: ``step`` and ``first`` of `_levels` for the table that ``code`` names (`icw_compile.formats.int4`)."""
    i = code >> 4
    width = 32 - i - tl.maximum(i - 8, 0)
    first = ((code & 15) - 23) * (44 * width) + 128
    # For both halves of a word. Where the lower one is negative it borrows one from the upper, which is a multiple of
    # four: two more, and its upper byte stays what it is.
    return 88 * width, first * 0x10001 + 0x20000


@triton.jit
def _levels(words, BIT: tl.constexpr, step, first):
    """int32: the levels of the 4 bits from ``BIT`` and ``BIT + 16`` of each word, in the upper bytes of its halves.

    ``step`` and ``first`` are four times those of the definition: ``>> 6`` is to leave the lower bytes out.
    """
    return ((words >> BIT) & 0x000F000F) * step + first


@triton.jit
def _merged(low, high):
    """int32: the four levels of two words of `_levels`, a byte each, by turns."""
    if IS_PTX:  # One instruction; of the other spelling, LLVM makes an extraction of each byte.
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7351;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return ((low >> 8) & 0x00FF00FF) | (high & -0x00FF0100)


@triton.jit
def _fours(
    base,
    codes,
    start,
    stride,
    stride_codes,
    length,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """int32 ``[BLOCK, PADDED / 4]``: of packed rows from ``start``, four levels each, in the order of `_channels`."""
    words = _loaded(base, start, stride, length, SIZE // 8, PADDED // 8, BLOCK, CHECKED)
    both = _numbers(codes, start, stride_codes, length, BLOCK, CHECKED).to(tl.int32)[:, None]
    step, first = _table(both & 255)
    high_step, high_first = _table((both >> 8) & 255)
    even = _merged(_levels(words, 0, step, first), _levels(words, 4, high_step, high_first))
    odd = _merged(_levels(words, 8, step, first), _levels(words, 12, high_step, high_first))
    return tl.interleave(even, odd)


@triton.jit
def _keys(
    base,
    codes,
    start,
    stride,
    stride_codes,
    length,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """int8 ``[PADDED, BLOCK]``: the rows from ``start``, their channels in the order of `_channels`."""
    if codes is None:
        rows = _loaded(base, start, stride, length, SIZE, PADDED, BLOCK, CHECKED)
    else:
        four = _fours(base, codes, start, stride, stride_codes, length, SIZE, PADDED, BLOCK, CHECKED)
        upper = tl.join((four >> 8).to(tl.int8), (four >> 24).to(tl.int8))
        rows = tl.reshape(tl.join(tl.join(four.to(tl.int8), (four >> 16).to(tl.int8)), upper), (BLOCK, PADDED))
    return tl.trans(rows)


@triton.jit
def _values(
    base,
    codes,
    start,
    stride,
    stride_codes,
    length,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Two of ``DTYPE`` ``[BLOCK, PADDED / 2]``: the even and the odd channels of the rows from ``start``, exactly.

    They come in pairs, for the hardware transposes what is of 16 bits and not what is of 8.
    """
    if codes is None:
        pairs = _loaded(base, start, stride, length, (SIZE + 1) // 2, PADDED // 2, BLOCK, CHECKED)
    else:
        four = _fours(base, codes, start, stride, stride_codes, length, SIZE, PADDED, BLOCK, CHECKED)
        pairs = tl.reshape(tl.join(four.to(tl.int16), (four >> 16).to(tl.int16)), (BLOCK, PADDED // 2))
    return _halves(pairs, DTYPE)


@triton.jit
def _halves(pairs, DTYPE: tl.constexpr):
    """The lower and the upper int8 of each int16 as float16 or float32."""
    if IS_PTX and DTYPE == tl.float16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            HALVES, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        return pairs.to(tl.int8).to(DTYPE), (pairs >> 8).to(DTYPE)


@triton.jit
def _channels(codes, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """``[PADDED]``: the channels of a tile of `_rows`.

    A packed byte has one of each half of the row, and of the four bytes of a word the second and the third are swapped.
    """
    column = tl.arange(0, PADDED)
    if codes is None:
        return column
    else:
        return column // 8 * 4 + column // 2 % 2 * 2 + column // 4 % 2 + column % 2 * (SIZE // 2)


@triton.jit
def _digits(rows):
    """int8 ``[ROWS, D]`` three times and float32 ``[ROWS]``: rows as ``(65536 * high + 256 * middle + low) * unit``.

    They are rounded to 24 bits of the largest. The unit of a row that is not finite is NaN.
    """
    rows = rows.to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(rows), 1), 2.0**-100) / (127 * 65536)
    low = tl.floor(rows / unit[:, None] + 0.5).to(tl.int32)
    middle = (low + 128) >> 8
    high = (middle + 128) >> 8
    return high.to(tl.int8), middle.to(tl.int8), low.to(tl.int8), unit + tl.sum(rows * 0, 1)


@triton.jit
def _stacked_digits(rows):
    """int8 ``[2 * ROWS, D]`` twice and float32 ``[ROWS]``: `_digits` of ``rows``, which come twice.

    Of the first, the upper half are the high digits and the lower half the middle ones; the second has the low ones
    and, in its lower half, zeros.
    """
    high, middle, low, unit = _digits(rows)
    HALF: tl.constexpr = rows.shape[0] // 2
    is_upper = (tl.arange(0, 2 * HALF) < HALF)[:, None]
    return tl.where(is_upper, high, middle), tl.where(is_upper, low, 0), tl.max(tl.reshape(unit, (2, HALF)), 0)


@triton.jit
def _plus_origin(integers):
    """float32: ``integers``, at most 2**22, to which the bits of 1.5 * 2**23 were added."""
    return integers.to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _products(query, middle, low, keys):
    """float32 ``[ROWS, BLOCK]``: queries times keys.

    Queries are float32, without ``low``, or of digits: `_digits`, or, without ``middle``, `_stacked_digits`. Products
    of digits are exact, their sum is rounded as sums of float32 are.
    """
    if low is None:
        return tl.dot(query, keys.to(tl.float32), input_precision=PRECISION)
    else:
        TALL: tl.constexpr = query.shape[0]
        origin = tl.full([TALL, keys.shape[1]], ORIGIN, tl.int32)
        upper = _plus_origin(tl.dot(query, keys, origin, out_dtype=tl.int32))
        lower = _plus_origin(tl.dot(low, keys, origin, out_dtype=tl.int32))
        if middle is None:  # A thread has the numbers of a row and of that eight rows below: it adds what it has.
            unit = tl.where(tl.arange(0, TALL) < TALL // 2, 65536.0, 256.0)
            return tl.sum(tl.reshape(upper * unit[:, None] + lower, (2, TALL // 2, keys.shape[1])), 0)
        else:
            return (upper * 256 + _plus_origin(tl.dot(middle, keys, origin, out_dtype=tl.int32))) * 256 + lower


@triton.jit
def _exponent(scales):
    """float32: the binary exponents of ``scales``, none below -64."""
    biased = (scales.to(tl.int32, bitcast=True) >> 23 & 255) + ORIGIN
    return tl.maximum(biased.to(tl.float32, bitcast=True) - (12582912.0 + 127), -64)


@triton.jit
def _even(offset, IS_EVEN: tl.constexpr):
    """``offset``, of which the compiler knows that it is even: asynchronous copies are of four bytes or more."""
    if IS_EVEN:
        return offset // 2 * 2
    else:
        return offset


@triton.jit
def _uniform(number):
    """``number``, which is the same in all threads: said so that the compiler keeps it once for all of them."""
    if IS_PTX:  # Not pure: it stays where all threads come by.
        return tl.inline_asm_elementwise(
            "redux.sync.min.s32 $0, $1, -1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return number


@triton.jit
def _when_ahead_is_done(number):
    """int64 ``number``, at least 0, that was worked out before the kernel ahead was done, when it is."""
    return tl.inline_asm_elementwise(WAIT, "=l,l", [number], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _behind(share, sequence, spare):
    """int32: the slot behind those of ``sequence``: one is each sequence's, ``spare`` others go by shares."""
    return (sequence + 1 + (share * spare >> SHARE_BITS)).to(tl.int32)


@triton.jit
def _sharing(shares, stride, slot, batch, slots, BATCHES: tl.constexpr):
    """The sequence that the program in ``slot`` reads, which of its programs that is, and how many it has."""
    sequence = tl.arange(0, BATCHES)
    share = tl.load(shares + sequence.to(tl.int64) * stride, mask=sequence < batch, other=0)
    behind = tl.where(sequence < batch, _behind(share, sequence, slots - batch), slots)
    is_before = behind <= slot
    first = _uniform(tl.max(tl.where(is_before, behind, 0)))
    last = _uniform(tl.min(tl.where(is_before, slots, behind)))
    return _uniform(tl.sum(is_before.to(tl.int32))), _uniform(slot - first), last - first


@triton.jit
def _kept(position, start, kept, length):
    """int32 ``[KEPT]``: which position each of the rows from ``start`` is kept of, -1 of none."""
    at = start + tl.arange(0, KEPT)
    row = tl.load(position + at, mask=at < kept, other=-1)
    return tl.where((row >= 0) & (row < length), row, -1).to(tl.int32)


@triton.jit
def _without_kept(begin, end, position, kept, length, middle):
    """``begin`` and ``end`` of positions of which no row is kept: those below ``middle`` lie before, others behind."""
    for start in range(0, kept, KEPT):
        row = _kept(position, start, kept, length)
        begin = tl.maximum(begin, _uniform(tl.max(tl.where(row < middle, row + 1, 0))))
        end = tl.minimum(end, _uniform(tl.min(tl.where(row >= tl.maximum(middle, 0), row, length))))
    return begin, end


@triton.jit
def _places(position, kept, length, start, BLOCK: tl.constexpr):
    """int32 ``[BLOCK]``: which of the kept rows each position from ``start`` is, the first of several, or -1."""
    wanted = start + tl.arange(0, BLOCK)
    place = tl.zeros([BLOCK], tl.int32) + kept
    for first in range(0, kept, KEPT):
        row = _kept(position, first, kept, length)
        at = first + tl.arange(0, KEPT)
        place = tl.minimum(place, tl.min(tl.where(row[None, :] == wanted[:, None], at[None, :], kept), 1))
    return tl.where(place < kept, place, -1)


@triton.constexpr_function
def _exact_dtype(dtype):
    """Of products with kept rows, for queries of ``dtype``: Triton's interpreter has no arithmetic of bfloat16."""
    return tl.float32 if INTERPRETS and dtype == tl.bfloat16 else dtype


@triton.jit
def _exact(base, places, stride, FIRST: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """``[BLOCK, PADDED]``: of the kept rows at ``places`` the ``SIZE`` channels from ``FIRST``; zeros of no row."""
    column = tl.arange(0, PADDED)[None, :]
    pointers = base + places.to(tl.int64)[:, None] * stride + FIRST + column
    return tl.load(pointers, mask=(places >= 0)[:, None] & (column < SIZE), other=0).to(DTYPE)


@triton.jit
def _exact_scores(
    query,
    key_exact,
    places,
    stride_channel,
    stride,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
):
    """float32 ``[ROWS, BLOCK]``: products of the rows of queries at the pointers ``query`` with kept keys."""
    DTYPE: tl.constexpr = _exact_dtype(query.dtype.element_ty)
    column = tl.arange(0, PADDED_HEAD_DIM)[None, :]
    rows = tl.load(query[:, None] + column * stride_channel, mask=column < HEAD_DIM, other=0)
    keys = _exact(key_exact, places, stride, 0, HEAD_DIM, PADDED_HEAD_DIM, DTYPE)
    return tl.dot(rows.to(DTYPE), tl.trans(keys), input_precision=PRECISION)


@triton.jit
def _weighted(weights, values, broken, sums):
    """``sums + weights @ values``, in which a number of ``values`` that is not finite counts as zero.

    And float32 ``broken``, to which such numbers of a row add NaN. Of weights in bfloat16, what is rounded off is added
    as well: they are as exact as those of stored rows.
    """
    zeros = values * 0
    broken += tl.sum(zeros.to(tl.float32), 1)
    values = tl.where(zeros == 0, values, 0.0)
    rounded = weights.to(values.dtype)
    sums = tl.dot(rounded, values, sums, input_precision=PRECISION)
    if values.dtype == tl.bfloat16:
        sums = tl.dot((weights - rounded.to(tl.float32)).to(values.dtype), values, sums)
    return sums, broken


@triton.jit
def _exact_values(
    weights,
    even,
    odd,
    value_exact,
    places,
    stride,
    IS_PACKED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``even`` and ``odd`` with the weighted values of kept rows, their channels in the order of `_channels`.

    A row that is not finite makes NaN of all channels of who reads it, and of no other: float32 ``[ROWS, 1]`` to add.
    """
    HALF: tl.constexpr = PADDED_VALUE_DIM // 2
    broken = tl.zeros([BLOCK], tl.float32)
    if IS_PACKED:
        for odd_half in tl.static_range(2):
            half = _exact(value_exact, places, stride, VALUE_DIM // 2 * odd_half, VALUE_DIM // 2, HALF, DTYPE)
            half = tl.permute(tl.reshape(half, (BLOCK, HALF // 4, 2, 2)), (0, 1, 3, 2))
            half = tl.reshape(half, (BLOCK, HALF))
            if odd_half == 0:
                even, broken = _weighted(weights, half, broken, even)
            else:
                odd, broken = _weighted(weights, half, broken, odd)
    else:
        rows = _exact(value_exact, places, stride, 0, VALUE_DIM, PADDED_VALUE_DIM, DTYPE)
        even_values, odd_values = tl.split(tl.reshape(rows, (BLOCK, HALF, 2)))
        even, broken = _weighted(weights, even_values, broken, even)
        odd, broken = _weighted(weights, odd_values, broken, odd)
    read = tl.sum(tl.where(weights == 0, 0.0, broken[None, :]), 1)[:, None]
    return even + read, odd + read


@triton.jit
def _output(numbers, DTYPE: tl.constexpr):
    """``numbers`` in ``DTYPE``. As what is stored reads back, a rounded scale makes no infinity of finite ones."""
    if DTYPE == tl.float16:  # noqa: SIM300
        finite = tl.minimum(tl.maximum(numbers, -65504.0), 65504.0)
        numbers = tl.where(tl.abs(numbers) < float("inf"), finite, numbers)
    return numbers.to(DTYPE)


@triton.jit
def _step(
    query,
    middle,
    low,
    largest,
    total,
    even,
    odd,
    taken,
    bias,
    start,
    length,
    scale,
    softcap,
    key,
    key_scale,
    key_codes,
    value,
    value_scale,
    value_codes,
    stride_key,
    stride_key_scale,
    stride_key_codes,
    stride_value,
    stride_value_scale,
    stride_value_codes,
    query_rows,
    exact_scale,
    key_exact,
    key_places,
    value_exact,
    value_places,
    stride_query_channel,
    stride_key_exact,
    stride_value_exact,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """One block of positions in the online softmax: the new ``largest, total, even, odd``.

    Scores are in units of ``log(2) * UNIT``. ``largest`` is of the scores times the value's scale, so that the weights
    of values, below 2**15, are as float16 what they are as float32. ``taken[ROWS, BLOCK]`` says which positions a row
    may read; without ``CHECKED`` it may read all. ``bias``, the additive mask, is of that shape or ``None``. Without
    ``key_places`` no key is kept, and without ``value_places`` no value.
    """
    keys = _keys(key, key_codes, start, stride_key, stride_key_codes, length, HEAD_DIM, PADDED_HEAD_DIM, BLOCK, CHECKED)
    key_scales = _numbers(key_scale, start, stride_key_scale, length, BLOCK, CHECKED).to(tl.float32)
    value_scales = _numbers(value_scale, start, stride_value_scale, length, BLOCK, CHECKED).to(tl.float32)

    scores = _products(query, middle, low, keys) * key_scales[None, :] * scale[:, None]
    if key_places is not None:  # noqa: SIM102 - to the compiler, a constant
        if tl.max(key_places) >= 0:
            exact = _exact_scores(
                query_rows,
                key_exact,
                key_places,
                stride_query_channel,
                stride_key_exact,
                HEAD_DIM,
                PADDED_HEAD_DIM,
            )
            scores = tl.where((key_places >= 0)[None, :], exact * exact_scale, scores)
    if value_places is not None:
        value_scales = tl.where(value_places >= 0, 1.0, value_scales)
    if softcap is not None:
        scores = softcap * (LOG2_E / UNIT) * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
    if bias is not None:
        scores += bias
    if CHECKED:
        scores = tl.where(taken, scores, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores + ((_exponent(value_scales) - 14) / UNIT)[None, :], 1))
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    decay = tl.exp2((largest - shift) * UNIT)
    weights = tl.exp2((scores - shift[:, None]) * UNIT)
    total = total * decay[:, None] + weights
    if CHECKED:  # a scale that is not finite may lie where nothing is read
        weights = tl.where(weights == 0, 0.0, weights * value_scales[None, :])
    else:
        weights *= value_scales[None, :]
    if value_places is not None:
        even *= decay[:, None]
        odd *= decay[:, None]
        if tl.max(value_places) >= 0:
            even, odd = _exact_values(
                tl.where((value_places >= 0)[None, :], weights, 0.0),
                even,
                odd,
                value_exact,
                value_places,
                stride_value_exact,
                value_codes is not None,
                VALUE_DIM,
                PADDED_VALUE_DIM,
                BLOCK,
                _exact_dtype(query_rows.dtype.element_ty),
            )
            weights = tl.where((value_places >= 0)[None, :], 0.0, weights)
    DTYPE: tl.constexpr = tl.float32 if low is None else tl.float16
    weights = weights.to(DTYPE)
    # Not before: Triton takes them to the registers here, where those of the keys are free again.
    even_values, odd_values = _values(
        value,
        value_codes,
        start,
        stride_value,
        stride_value_codes,
        length,
        VALUE_DIM,
        PADDED_VALUE_DIM,
        BLOCK,
        CHECKED,
        DTYPE,
    )
    if value_places is None:
        even *= decay[:, None]
        odd *= decay[:, None]
    even = tl.dot(weights, even_values, even, input_precision=PRECISION)
    odd = tl.dot(weights, odd_values, odd, input_precision=PRECISION)
    return new_largest, total, even, odd


@triton.jit(
    do_not_specialize=[
        "sequences",
        "tokens",
        "length",
        "stride_key_scale_batch",
        "stride_key_scale_head",
        "stride_key_codes_batch",
        "stride_key_codes_head",
        "stride_value_scale_batch",
        "stride_value_scale_head",
        "stride_value_codes_batch",
        "stride_value_codes_head",
        "stride_bias_batch",
        "stride_bias_head",
        "stride_bias_token",
        "stride_spans_batch",
        "stride_spans_head",
        "stride_spans_token",
    ]
)
def attend(
    query,  # [batch, query heads, tokens, HEAD_DIM]: float32, bfloat16 or float16
    key,  # int8 [batch, heads, length, HEAD_DIM]; packed: int32 [..., HEAD_DIM / 8]
    key_scale,  # [batch, heads, length], as is `value_scale`
    key_codes,  # None, or of packed rows int16 [batch, heads, length], as is `value_codes`: a byte for each half
    value,  # int16 [batch, heads, length, VALUE_DIM / 2, rounded up]; packed: int32 [..., VALUE_DIM / 8]
    value_scale,
    value_codes,
    bias,  # None, or the additive mask [batch, query heads, tokens, length] by its strides
    spans,  # None, or of a boolean mask int64 [batch, query heads, tokens, HEADER + words] by its strides: `mask_spans`
    sinks,  # None or [query heads]
    key_exact,  # None, or of keys that are kept [batch, heads, kept keys, HEAD_DIM], as is `value_exact`
    key_position,  # of them, int64 [kept keys]: the positions that they are, -1 for none
    value_exact,
    value_position,
    output,  # [batch, query heads, tokens, VALUE_DIM], with a state: float32 [query heads, tokens, slots, VALUE_DIM]
    state,  # None for one split, else float32 [query heads, tokens, slots, 2], with batch * splits slots
    stride_query_batch,
    stride_query_head,
    stride_query_token,
    stride_query_channel,
    stride_key_batch,
    stride_key_head,
    stride_key,
    stride_key_scale_batch,
    stride_key_scale_head,
    stride_key_scale,
    stride_key_codes_batch,
    stride_key_codes_head,
    stride_key_codes,
    stride_value_batch,
    stride_value_head,
    stride_value,
    stride_value_scale_batch,
    stride_value_scale_head,
    stride_value_scale,
    stride_value_codes_batch,
    stride_value_codes_head,
    stride_value_codes,
    stride_bias_batch,
    stride_bias_head,
    stride_bias_token,
    stride_bias,
    stride_spans_batch,
    stride_spans_head,
    stride_spans_token,
    stride_key_exact_batch,
    stride_key_exact_head,
    stride_key_exact,
    stride_value_exact_batch,
    stride_value_exact_head,
    stride_value_exact,
    sequences,
    tokens,
    length,
    kept_keys,
    kept_values,
    scale,
    softcap,  # None or a number
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one key/value head
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    ONE_TILE: tl.constexpr,  # of a head
    IN_PAIRS: tl.constexpr,  # of no head do the scales and codes begin within a pair of them
    IS_CAUSAL: tl.constexpr,
    OVERLAPS: tl.constexpr,  # it is launched before what comes ahead is done, and `merge` before this is
    BATCHES: tl.constexpr,  # 0, or a power of two no less than the batch: sequences get slots by their shares
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(batch * heads * tiles, splits)``: the tile's attention over every ``splits``-th block of positions.

    With ``BATCHES``, for one tile of a head, the slots of all sequences are dealt out by what each reads.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    tiles = 1 if ONE_TILE else tl.cdiv(tokens * GROUP, ROWS)
    if OVERLAPS:
        gdc_wait()
    # Causally, the last tile has the most to read: it starts first.
    tile = tiles - 1 - tl.program_id(0) % tiles
    sequence = tl.program_id(0) // tiles // HEADS
    head = (tl.program_id(0) // tiles % HEADS).to(tl.int64)
    if BATCHES > 0:
        shares = spans + head * GROUP * stride_spans_head + (HEADER - 1)
        slot, slots = sequence * splits + split, sequences * splits
        sequence, split, splits = _sharing(shares, stride_spans_batch, slot, sequences, slots, BATCHES)
    batch = sequence.to(tl.int64)

    # Rows behind the last one compute what it does, and store nothing.
    row = tl.minimum(tile * ROWS + tl.arange(0, ROWS), tokens * GROUP - 1)
    token = row // GROUP
    query_head = head * GROUP + row % GROUP
    query += batch * stride_query_batch
    # A tile that is half as high as a matrix product has room in it for two digits of its rows.
    IS_STACKED: tl.constexpr = ROWS < 16 and query.dtype.element_ty != tl.float32
    TALL: tl.constexpr = ROWS * 2 if IS_STACKED else ROWS
    tall = tl.minimum(tile * ROWS + tl.arange(0, TALL) % ROWS, tokens * GROUP - 1)
    at = (head * GROUP + tall % GROUP) * stride_query_head + (tall // GROUP).to(tl.int64) * stride_query_token
    rows = tl.load(
        query + at[:, None] + _channels(key_codes, HEAD_DIM, PADDED_HEAD_DIM)[None, :] * stride_query_channel,
        mask=(tl.arange(0, PADDED_HEAD_DIM) < HEAD_DIM)[None, :],
        other=0,
    )
    query += query_head * stride_query_head + token.to(tl.int64) * stride_query_token
    key += batch * stride_key_batch + head * stride_key_head
    value += batch * stride_value_batch + head * stride_value_head
    key_scale += _even(batch * stride_key_scale_batch + head * stride_key_scale_head, IN_PAIRS)
    value_scale += _even(batch * stride_value_scale_batch + head * stride_value_scale_head, IN_PAIRS)
    if key_codes is not None:
        key_codes += _even(batch * stride_key_codes_batch + head * stride_key_codes_head, IN_PAIRS)
    if value_codes is not None:
        value_codes += _even(batch * stride_value_codes_batch + head * stride_value_codes_head, IN_PAIRS)

    # Of the blocks from first_block to last_block, every row reads those whole that are ``whole`` from first_whole on.
    begin, end, whole_begin, whole_end = 0, length, 0, length
    if IS_CAUSAL:
        end = tl.minimum(end, (tl.minimum(tile * ROWS + ROWS, tokens * GROUP) - 1) // GROUP + 1)
        whole_end = tl.minimum(whole_end, tile * ROWS // GROUP + 1)
    if bias is not None:
        whole_end = 0
    if spans is not None:
        spans += batch * stride_spans_batch + head * GROUP * stride_spans_head
        span = row % GROUP * stride_spans_head + token * stride_spans_token
        first = tl.load(spans + span).to(tl.int32)
        behind = tl.load(spans + 1 + span).to(tl.int32)
        count = tl.load(spans + 2 + span).to(tl.int32)
        has_holes = tl.max((count != tl.maximum(behind - first, 0)).to(tl.int32)) != 0
        begin, end = _uniform(tl.min(first)), tl.minimum(end, _uniform(tl.max(behind)))
        whole_begin = _uniform(tl.max(first))
        whole_end = tl.minimum(whole_end, _uniform(tl.where(has_holes, 0, tl.min(behind))))
    if key_exact is not None:
        key_exact += batch * stride_key_exact_batch + head * stride_key_exact_head
        whole_begin, whole_end = _without_kept(
            whole_begin, whole_end, key_position, kept_keys, length, (begin + end) // 2
        )
    if value_exact is not None:
        value_exact += batch * stride_value_exact_batch + head * stride_value_exact_head
        whole_begin, whole_end = _without_kept(
            whole_begin, whole_end, value_position, kept_values, length, (begin + end) // 2
        )
    first_block, last_block = begin // BLOCK, tl.cdiv(end, BLOCK)
    first_whole = tl.cdiv(whole_begin, BLOCK)
    whole = tl.maximum(whole_end // BLOCK - first_whole, 0)

    middle, low = None, None
    row_scale = tl.full([ROWS], scale, tl.float32)
    if query.dtype.element_ty != tl.float32:
        if IS_STACKED:
            rows, low, unit = _stacked_digits(rows)
        else:
            rows, middle, low, unit = _digits(rows)
        row_scale *= unit
    # An additive mask may be of the largest numbers that there are, and is left in its unit.
    UNIT: tl.constexpr = 1.0 if bias is None else LOG2_E
    exact_scale = tl.cast(scale, tl.float32)
    if softcap is None:
        row_scale *= LOG2_E / UNIT
        exact_scale *= LOG2_E / UNIT
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    even = tl.zeros([ROWS, PADDED_VALUE_DIM // 2], tl.float32)
    odd = tl.zeros([ROWS, PADDED_VALUE_DIM // 2], tl.float32)

    for index in range(split, whole, splits):
        largest, total, even, odd = _step(
            rows,
            middle,
            low,
            largest,
            total,
            even,
            odd,
            None,
            None,
            (first_whole + index) * BLOCK,
            length,
            row_scale,
            softcap,
            key,
            key_scale,
            key_codes,
            value,
            value_scale,
            value_codes,
            stride_key,
            stride_key_scale,
            stride_key_codes,
            stride_value,
            stride_value_scale,
            stride_value_codes,
            query,
            exact_scale,
            None,
            None,
            None,
            None,
            stride_query_channel,
            stride_key_exact,
            stride_value_exact,
            HEAD_DIM,
            VALUE_DIM,
            PADDED_HEAD_DIM,
            PADDED_VALUE_DIM,
            BLOCK,
            UNIT,
            CHECKED=False,
        )
    # The last programs have the fewest blocks so far. Most have none of these, and no time for loads ahead of a loop.
    begin = first_block + splits - 1 - split
    for index in tl.range(begin, last_block - whole, splits, num_stages=1):
        block = index + tl.where(index >= first_whole, whole, 0)
        column = tl.arange(0, BLOCK)
        position = block * BLOCK + column
        is_read = True
        if spans is not None:
            # 64 positions in a word. Behind the length it has zeros.
            word = tl.load(spans + (HEADER + block * BLOCK // 64) + span) >> (block * BLOCK % 64)
            taken = (word[:, None] >> column[None, :]) & 1 != 0
            is_read = _uniform(tl.max((word != 0).to(tl.int32))) != 0
        else:
            taken = (position < length)[None, :]
        if IS_CAUSAL:
            taken &= position[None, :] <= token[:, None]
        added = None
        if bias is not None:
            row_bias = bias + batch * stride_bias_batch + query_head * stride_bias_head
            row_bias += token.to(tl.int64) * stride_bias_token
            added = tl.load(row_bias[:, None] + position.to(tl.int64)[None, :] * stride_bias, mask=taken, other=0)
            added = added.to(tl.float32)
            taken &= added != -float("inf")
            is_read = tl.max(taken.to(tl.int32)) != 0
        if is_read:
            key_places, value_places = None, None
            if key_exact is not None:
                key_places = _places(key_position, kept_keys, length, block * BLOCK, BLOCK)
            if value_exact is not None:
                value_places = _places(value_position, kept_values, length, block * BLOCK, BLOCK)
            largest, total, even, odd = _step(
                rows,
                middle,
                low,
                largest,
                total,
                even,
                odd,
                taken,
                added,
                block * BLOCK,
                length,
                row_scale,
                softcap,
                key,
                key_scale,
                key_codes,
                value,
                value_scale,
                value_codes,
                stride_key,
                stride_key_scale,
                stride_key_codes,
                stride_value,
                stride_value_scale,
                stride_value_codes,
                query,
                exact_scale,
                key_exact,
                key_places,
                value_exact,
                value_places,
                stride_query_channel,
                stride_key_exact,
                stride_value_exact,
                HEAD_DIM,
                VALUE_DIM,
                PADDED_HEAD_DIM,
                PADDED_VALUE_DIM,
                BLOCK,
                UNIT,
                CHECKED=True,
            )
    if OVERLAPS:
        gdc_launch_dependents()
    accumulator, total = tl.interleave(even, odd), tl.sum(total, 1)
    largest *= UNIT / LOG2_E
    if sinks is not None:
        sink = tl.where(split == 0, tl.load(sinks + query_head).to(tl.float32), -float("inf"))
        last = tl.maximum(largest, sink)
        shift = tl.where(last == -float("inf"), 0.0, last)
        decay = tl.exp(largest - shift)
        accumulator *= decay[:, None]
        total = total * decay + tl.exp(sink - shift)
        largest = last
    row = tile * ROWS + tl.arange(0, ROWS)
    valid = row < tokens * GROUP
    at = head * GROUP * tokens + (row % GROUP * tokens + row // GROUP)
    if state is None:
        accumulator = accumulator / tl.where(total == 0, 1.0, total)[:, None]
        at += batch * HEADS * GROUP * tokens
    else:
        slot = tl.program_id(0) // tiles // HEADS * tl.num_programs(1) + tl.program_id(1)
        at = at * sequences * tl.num_programs(1) + slot
        tl.store(state + at * 2, largest, mask=valid)
        tl.store(state + at * 2 + 1, total, mask=valid)
    value_channel = _channels(value_codes, VALUE_DIM, PADDED_VALUE_DIM)
    tl.store(
        output + at[:, None] * VALUE_DIM + value_channel[None, :],
        _output(accumulator, output.dtype.element_ty),
        mask=valid[:, None] & (tl.arange(0, PADDED_VALUE_DIM) < VALUE_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["stride_spans_batch", "stride_spans_head", "tokens", "batch", "splits"])
def merge(
    partial,  # float32 [query heads, tokens, slots, VALUE_DIM], what `attend` gave as its output
    state,  # float32 [query heads, tokens, slots, 2]
    spans,  # as `attend` has them, or None: each sequence has as many slots
    output,  # [batch, query heads, tokens, VALUE_DIM]
    stride_spans_batch,
    stride_spans_head,
    tokens,
    batch,
    splits,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, no less than the slots of a sequence
    CHANNELS: tl.constexpr,
):
    """Grid ``(batch * query heads * tokens, VALUE_DIM / CHANNELS)``: some channels of the softmax over a row's slots.

    All that it reads is asked for at once: what it takes is the time that memory takes to answer.
    """
    rows, slots = tl.num_programs(0) // batch, batch * splits
    sequence, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    first = sequence * splits
    if spans is not None:  # They were there before `attend` began.
        head = row // tokens // GROUP * GROUP
        shares = spans + tl.cast(head, tl.int64) * stride_spans_head + (HEADER - 1)
        shares += tl.cast(sequence, tl.int64) * stride_spans_batch
        behind = _behind(tl.load(shares), sequence, slots - batch)
        before = tl.load(shares - stride_spans_batch, mask=sequence > 0, other=0)
        first = _behind(before, sequence - 1, slots - batch)
        splits = behind - first
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS)
    inside, exists = split < splits, channel < VALUE_DIM
    begin = row.to(tl.int64) * slots + first
    if OVERLAPS:
        begin = _when_ahead_is_done(begin)
    state += begin * 2
    partial += begin * VALUE_DIM
    largest = tl.load(state + split * 2, mask=inside, other=-float("inf"))
    total = tl.load(state + split * 2 + 1, mask=inside, other=0)
    each = tl.load(
        partial + split[:, None] * VALUE_DIM + channel[None, :], mask=inside[:, None] & exists[None, :], other=0
    )
    last = tl.max(largest, 0)
    weights = tl.exp(largest - tl.where(last == -float("inf"), 0.0, last))
    total = tl.sum(total * weights, 0)
    accumulator = tl.sum(each * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    at = tl.program_id(0).to(tl.int64) * VALUE_DIM + channel
    tl.store(output + at, _output(accumulator, output.dtype.element_ty), mask=exists)
