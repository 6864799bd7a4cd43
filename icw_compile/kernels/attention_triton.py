"""The Triton kernels behind `icw_compile.kernels.gpu`: attention over a key/value cache of 8 or 4 bits. Imports Triton.

What they compute is ``icw_int8kv::attention`` (`icw_compile.kernels.inductor`); how:

* A *row* is one (query token, query head of the group) pair, tokens outermost. A program takes a tile of rows of one
  key/value head, so that decode and prefill are one kernel with different tiles, and each int8 row is loaded and
  converted once for all query heads that share it.
* Split-KV ("flash decoding"): where the tiles alone do not fill the device, ``split`` programs share a tile. They take
  every ``splits``-th block of positions, not a contiguous part each: a cache that is filled to a quarter keeps all
  of them busy. Each yields (largest score, sum, weighted values) for each row, and `merge` combines them.
* Integers up to 256 are exact in bfloat16, up to 2048 in float16: the int8 rows become an operand of ``tl.dot``
  without error. The scales of the keys multiply the scores, those of the values the weights. A float16 model's weights
  go into ``tl.dot`` as a sum of two bfloat16 numbers: float16 has no room for a weight times any scale. Float32 takes
  three products of TF32 numbers, which give back its precision.
* Rows of 4 bits become rows of 8 after they are loaded, each of keys and values: what follows does not know which they
  were. The two channels of a byte lie side by side then, and the query is read, the output written, in that order.
* Blocks that no row of the tile may read, by a boolean mask or causally, are skipped before their rows or scales are
  loaded. Those that every row reads whole run in a loop without a test in it, whose loads Triton pipelines. A boolean
  mask without holes, as of what is cached, a window or padding, is known by where its rows begin and end, and is not
  read; of one with holes, and of an additive one, all blocks are read in part.
* Sinks are where the softmax starts: a first score that has no value.

Lengths are not specialised: a cache that grows compiles nothing anew.
"""

import torch
import triton
import triton.language as tl

from icw_compile.compat.triton import is_interpreting

__all__ = ["attend", "merge"]

# Splits that `merge` reads at a time.
CHUNK = tl.constexpr(16)
# Triton's interpreter keeps bfloat16 as 16-bit integers, and multiplies those.
INTERPRETED = tl.constexpr(is_interpreting())
IS_PTX = tl.constexpr(torch.version.hip is None and not is_interpreting())
# Of float32 products. Triton's backend for AMD has no products of three TF32 numbers, and multiplies float32 as it is.
PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")


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
def _rows(
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
    """int8 ``[BLOCK, PADDED]``: rows from ``start``, their channels in the order of `_channels`."""
    if codes is None:
        return _loaded(base, start, stride, length, SIZE, PADDED, BLOCK, CHECKED)
    else:
        words = _loaded(base, start, stride, length, SIZE // 8, PADDED // 8, BLOCK, CHECKED)
        both = _numbers(codes, start, stride_codes, length, BLOCK, CHECKED).to(tl.int32)[:, None]
        step, first = _table(both & 255)
        high_step, high_first = _table((both >> 8) & 255)
        even = _merged(_levels(words, 0, step, first), _levels(words, 4, high_step, high_first))
        odd = _merged(_levels(words, 8, step, first), _levels(words, 12, high_step, high_first))
        four = tl.interleave(even, odd)
        upper = tl.join((four >> 8).to(tl.int8), (four >> 24).to(tl.int8))
        return tl.reshape(tl.join(tl.join(four.to(tl.int8), (four >> 16).to(tl.int8)), upper), (BLOCK, PADDED))


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
def _multiply(left, rows, accumulator):
    """``accumulator + left @ rows`` for a float tile and an int8 one, which becomes ``left``'s dtype without error."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), rows.to(tl.float32), accumulator, input_precision=PRECISION)
    return tl.dot(left, rows.to(left.dtype), accumulator, input_precision=PRECISION)


@triton.jit
def _step(
    query,
    largest,
    total,
    accumulator,
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
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """One block of positions in the online softmax: the new ``largest, total, accumulator``.

    ``taken[ROWS, BLOCK]`` says which positions a row may read; without ``CHECKED`` it may read all. ``bias``, the
    additive mask, is of that shape or ``None``.
    """
    keys = _rows(key, key_codes, start, stride_key, stride_key_codes, length, HEAD_DIM, PADDED_HEAD_DIM, BLOCK, CHECKED)
    key_scales = _numbers(key_scale, start, stride_key_scale, length, BLOCK, CHECKED).to(tl.float32)
    value_scales = _numbers(value_scale, start, stride_value_scale, length, BLOCK, CHECKED).to(tl.float32)

    scores = _multiply(query, tl.trans(keys), None) * (key_scales * scale)[None, :]
    if softcap is not None:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
    if bias is not None:
        scores += bias
    if CHECKED:
        scores = tl.where(taken, scores, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    decay = tl.exp(largest - shift)
    weights = tl.exp(scores - shift[:, None])
    total = total * decay + tl.sum(weights, 1)
    weights *= value_scales[None, :]
    if CHECKED:
        weights = tl.where(taken, weights, 0.0)  # a scale that is not finite may lie where nothing is read
    # Not before: Triton takes them to the registers here, where those of the keys are free again.
    values = _rows(
        value, value_codes, start, stride_value, stride_value_codes, length, VALUE_DIM, PADDED_VALUE_DIM, BLOCK, CHECKED
    )
    accumulator *= decay[:, None]
    if query.dtype == tl.float32:
        return new_largest, total, _multiply(weights, values, accumulator)
    high = weights.to(tl.bfloat16)
    accumulator = _multiply(high, values, accumulator)
    if query.dtype == tl.float16:
        accumulator = _multiply((weights - high.to(tl.float32)).to(tl.bfloat16), values, accumulator)
    return new_largest, total, accumulator


@triton.jit(
    do_not_specialize=[
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
        "stride_mask_batch",
        "stride_mask_head",
        "stride_mask_token",
        "stride_spans_batch",
        "stride_spans_head",
        "stride_spans_token",
    ]
)
def attend(
    query,  # [batch, query heads, tokens, HEAD_DIM]: float32, bfloat16 or float16
    key,  # int8 [batch, heads, length, HEAD_DIM], as is `value` with VALUE_DIM; packed: int32 [..., HEAD_DIM / 8]
    key_scale,  # [batch, heads, length], as is `value_scale`
    key_codes,  # None, or of packed rows int16 [batch, heads, length], as is `value_codes`: a byte for each half
    value,
    value_scale,
    value_codes,
    mask,  # None, or [batch, query heads, tokens, length] by its strides: uint8, or additive
    spans,  # of a mask of uint8: int32 [batch, query heads, tokens, 3] by its strides, see `mask_spans`
    sinks,  # None or [query heads]
    output,  # [batch, query heads, tokens, VALUE_DIM], with a state: float32 [..., tokens, splits, VALUE_DIM]
    state,  # None for one split, else float32 [batch, query heads, tokens, splits, 2]
    lse,  # None, or float32 [batch, query heads, tokens] for one split
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
    stride_mask_batch,
    stride_mask_head,
    stride_mask_token,
    stride_mask,
    stride_spans_batch,
    stride_spans_head,
    stride_spans_token,
    heads,
    tokens,
    length,
    scale,
    softcap,  # None or a number
    GROUP: tl.constexpr,  # query heads of one key/value head
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(batch * heads * tiles, splits)``: the tile's attention over every ``splits``-th block of positions."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(tokens * GROUP, ROWS)
    # Causally, the last tile has the most to read: it starts first.
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)

    row = tile * ROWS + tl.arange(0, ROWS)
    valid = row < tokens * GROUP
    token = row // GROUP
    query_head = head * GROUP + row % GROUP
    channel = _channels(key_codes, HEAD_DIM, PADDED_HEAD_DIM)
    query += batch * stride_query_batch + query_head * stride_query_head + token.to(tl.int64) * stride_query_token
    rows = tl.load(
        query[:, None] + channel[None, :] * stride_query_channel,
        mask=valid[:, None] & (tl.arange(0, PADDED_HEAD_DIM) < HEAD_DIM)[None, :],
        other=0,
    )
    key += batch * stride_key_batch + head * stride_key_head
    key_scale += batch * stride_key_scale_batch + head * stride_key_scale_head
    value += batch * stride_value_batch + head * stride_value_head
    value_scale += batch * stride_value_scale_batch + head * stride_value_scale_head
    if key_codes is not None:
        key_codes += batch * stride_key_codes_batch + head * stride_key_codes_head
    if value_codes is not None:
        value_codes += batch * stride_value_codes_batch + head * stride_value_codes_head

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        largest = tl.load(sinks + query_head, mask=valid & (split == 0), other=-float("inf")).to(tl.float32)
        total = tl.where(largest == -float("inf"), 0.0, 1.0)
    accumulator = tl.zeros([ROWS, PADDED_VALUE_DIM], tl.float32)

    # Of the blocks from first_block to last_block, every row reads those whole that are ``whole`` from first_whole on.
    begin, end, whole_begin, whole_end = 0, length, 0, length
    if IS_CAUSAL:
        end = tl.minimum(end, (tl.minimum(tile * ROWS + ROWS, tokens * GROUP) - 1) // GROUP + 1)
        whole_end = tl.minimum(whole_end, tile * ROWS // GROUP + 1)
    if mask is not None and spans is None:
        whole_end = 0
    if spans is not None:
        span = spans + batch * stride_spans_batch + query_head * stride_spans_head
        span += token.to(tl.int64) * stride_spans_token
        low, high = tl.load(span, mask=valid, other=0), tl.load(span + 1, mask=valid, other=0)
        count = tl.load(span + 2, mask=valid, other=0)
        has_holes = tl.max((count != tl.maximum(high - low, 0)).to(tl.int32)) != 0
        begin = tl.where(has_holes, 0, tl.min(tl.where(valid, low, length)))
        end = tl.where(has_holes, end, tl.minimum(end, tl.max(high)))
        whole_begin = tl.max(low)
        whole_end = tl.where(has_holes, 0, tl.minimum(whole_end, tl.min(tl.where(valid, high, length))))
    first_block, last_block = begin // BLOCK, tl.cdiv(end, BLOCK)
    first_whole = tl.cdiv(whole_begin, BLOCK)
    whole = tl.maximum(whole_end // BLOCK - first_whole, 0)
    for index in range(split, whole, splits):
        largest, total, accumulator = _step(
            rows,
            largest,
            total,
            accumulator,
            None,
            None,
            (first_whole + index) * BLOCK,
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
            HEAD_DIM,
            VALUE_DIM,
            PADDED_HEAD_DIM,
            PADDED_VALUE_DIM,
            BLOCK,
            CHECKED=False,
        )
    partial = tl.maximum(last_block - first_block - whole, 0)
    for index in range(split + tl.cdiv(tl.maximum(whole - split, 0), splits) * splits, whole + partial, splits):
        block = first_block + index - whole
        block += tl.where((whole > 0) & (block >= first_whole), whole, 0)
        position = block * BLOCK + tl.arange(0, BLOCK)
        taken = valid[:, None] & (position < length)[None, :]
        if IS_CAUSAL:
            taken &= position[None, :] <= token[:, None]
        bias = None
        if mask is not None:
            row_mask = mask + batch * stride_mask_batch + query_head * stride_mask_head
            row_mask += token.to(tl.int64) * stride_mask_token
            if spans is not None:
                taken &= (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
            read = taken if spans is None else taken & has_holes
            entries = tl.load(row_mask[:, None] + position.to(tl.int64)[None, :] * stride_mask, mask=read, other=0)
            if spans is not None:
                taken &= (entries != 0) | (has_holes == 0)
            else:
                bias = entries.to(tl.float32)
                taken &= bias != -float("inf")
        if tl.max(taken.to(tl.int32)) != 0:
            largest, total, accumulator = _step(
                rows,
                largest,
                total,
                accumulator,
                taken,
                bias,
                block * BLOCK,
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
                HEAD_DIM,
                VALUE_DIM,
                PADDED_HEAD_DIM,
                PADDED_VALUE_DIM,
                BLOCK,
                CHECKED=True,
            )

    at = ((batch * heads * GROUP + query_head) * tokens + token) * (1 if state is None else splits)
    if state is None:
        accumulator = accumulator / tl.where(total == 0, 1.0, total)[:, None]
        if lse is not None:
            tl.store(lse + at, largest + tl.log(total), mask=valid)
    else:
        at += split
        tl.store(state + at * 2, largest, mask=valid)
        tl.store(state + at * 2 + 1, total, mask=valid)
    value_channel = _channels(value_codes, VALUE_DIM, PADDED_VALUE_DIM)
    tl.store(
        output + at[:, None] * VALUE_DIM + value_channel[None, :],
        accumulator.to(output.dtype.element_ty),
        mask=valid[:, None] & (tl.arange(0, PADDED_VALUE_DIM) < VALUE_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["splits"])
def merge(
    partial,  # float32 [rows, splits, VALUE_DIM], what `attend` gave as its output
    state,  # float32 [rows, splits, 2]
    output,  # [rows, VALUE_DIM]
    lse,  # None, or float32 [rows]: the logarithm of the sum of exponentials
    splits,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
):
    """Grid ``(rows,)``: the softmax over all splits of a row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED_VALUE_DIM)
    # Of one element, not scalars: they are carried through the loop.
    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([PADDED_VALUE_DIM], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        inside = split < splits
        at = row * splits + split
        each_largest = tl.load(state + at * 2, mask=inside, other=-float("inf"))
        each_total = tl.load(state + at * 2 + 1, mask=inside, other=0)
        each = tl.load(
            partial + at[:, None] * VALUE_DIM + channel[None, :],
            mask=inside[:, None] & (channel < VALUE_DIM)[None, :],
            other=0,
        )
        new_largest = tl.maximum(largest, tl.max(each_largest, 0))
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        decay, weights = tl.exp(largest - shift), tl.exp(each_largest - shift)
        total = total * decay + tl.sum(each_total * weights, 0)
        accumulator = accumulator * decay + tl.sum(each * weights[:, None], 0)
        largest = new_largest
    accumulator = accumulator / tl.where(total == 0, 1.0, total)
    if lse is not None:
        tl.store(lse + row + tl.arange(0, 1), largest + tl.log(total))
    tl.store(output + row * VALUE_DIM + channel, accumulator.to(output.dtype.element_ty), mask=channel < VALUE_DIM)
