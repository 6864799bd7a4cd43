"""The Triton kernels for attention on CUDA devices: ``icw_int8kv_triton::attention``, for decode and prefill.

The operator and its fake implementation exist as soon as this module is imported, with or without Triton and a GPU, so
that graphs that hold it can be traced and printed anywhere. The kernels are in `icw_compile.kernels.attention_triton`,
which is imported at the first call; Triton compiles each variant at its first call (about a second) and keeps it in
its own cache on disk.

Shapes, in the letters of `icw_compile.kernels.inductor`: ``B`` batch, ``Hq`` query heads, ``H`` key/value heads, ``T``
query tokens, ``S`` cached tokens, ``D`` head size of queries and keys, ``Dv`` head size of values.

``attention(query[B, Hq, T, D], key_qdata[B, H, S, D], key_scale[B, H, S, 1], value_qdata[B, H, S, Dv],
value_scale[B, H, S, 1], attn_mask, is_causal, scale, softcap, sinks=None, splits=0, key_codes=None, value_codes=None,
spans=None, key_exact=None, key_position=None, value_exact=None, value_position=None) -> [B, Hq, T, Dv]``
    The function, the arguments and the semantics of ``icw_int8kv::attention``, with one licence: a position that a mask
    takes out (``False``, or minus infinity), or whose weight is zero, contributes nothing even if its scale is not
    finite, for its rows may never be read. ``query`` is bfloat16, float16 or float32; scales and sinks are of any
    floating dtype; ``attn_mask`` is ``None``, boolean or of any floating dtype, 4-dimensional, and broadcasts to ``[B,
    Hq, T, S]`` by its strides. Any strides will do, except that the channels of stored tensors are contiguous. With
    ``key_codes``, uint8 ``[B, H, S, 2]``, the keys are packed as `icw_compile.formats.int4` has them, uint8 ``[B, H, S,
    D / 2]``; with ``value_codes`` the values are. ``D`` and ``Dv`` are at most 256, of packed rows multiples of 8, and
    such rows begin where a word of 32 bits does. With ``key_exact``, of a float dtype ``[B, H, K, D]``, row
    ``key_position[k]`` (int64; none if it is no position of ``S``) is ``key_exact[:, :, k]`` in the query's dtype, and
    not what is stored of it, and the values likewise. Of two such rows of a position the first counts, and a row that
    reads a value that is not finite is NaN in every channel. The result is contiguous, in the query's dtype. ``splits``
    is for tests: how many programs share the positions, 0 for as many as suit the device. Raises ValueError for shapes
    and dtypes that do not fit, and `KernelUnavailableError` without Triton.
``mask_spans(attn_mask[b, h, t, S or 1], S) -> int64[b, h, t, 4 + W]``
    A boolean mask as the kernel reads it. Of each row the first position that it reads, the one behind the last, and
    how many it reads, ``S, 0, 0`` if none; how much of what all sequences read, from the first to the last, those up
    to this one do, in units of ``2**-20``; then the mask itself, 64 positions in each of ``W`` words, of which the
    kernel reads those of blocks that are not read whole. ``spans`` is this, for layers that share a mask; without it,
    it is worked out at each call.

They are operators of torch's dispatcher and not `torch.library.triton_op`s, which Inductor would look into: there is
nothing in it to fuse, the number of splits is worked out from the lengths of the call and not from symbols, and the
launch that runs in a compiled graph is the one that the tests run. Nothing it does depends on the content of a tensor,
so that a CUDA graph can hold it; it allocates from torch's pools only. What follows from the layout of its tensors
alone, checks and tiles and splits, is worked out once for all calls of that layout.
"""

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icw_compile.errors import KernelUnavailableError
from icw_compile.kernels.inductor import ATTENTION_ARGUMENTS
from icw_compile.kernels.interface import AttentionCall, AttentionKernel, declines_rows

__all__ = [
    "KERNEL",
    "MAX_HEAD_DIM",
    "Tiles",
    "attention",
    "attention_triton",
    "choose_splits",
    "choose_tiles",
    "expanded",
    "load",
    "mask_spans",
    "padded",
    "processors",
    "shares",
    "why_not_on",
]

#: Largest head size: beyond it a tile does not fit in the shared memory of a multiprocessor.
MAX_HEAD_DIM = 256
#: Packed channels in the 32 bits that the kernel reads at a time.
IN_A_WORD = 8
#: Compute capability with bfloat16 tensor cores and asynchronous copies.
MIN_CAPABILITY = (8, 0)
#: More splits than this cost more to merge than they bring.
MAX_SPLITS = 128
#: Of `mask_spans`: the numbers in front of the mask's words, and the bits of the last of them, a share of all reading.
SPANS_HEADER, SHARE_BITS = 4, 20
#: Blocks that a program must read for its sequence to get programs by its share: with fewer there is less to gain than
#: it takes to look at the shares.
SHARED_FROM = 8
#: Programs of all sequences, for a head, of which each gets its share at most: `merge` reads all of a sequence at once.
MAX_SHARING = 1024
#: Channels that a program of `merge` gives: few, so that there are many, of one warp where it reads few splits.
MERGED_CHANNELS = 16

#: Kept at a time: how calls are launched, by the layout of their tensors. Layers of a step have the same, and a cache
#: that grows has another at each step.
PLANS = 256
#: Of a multiprocessor, from sm_80 on.
REGISTERS = 65536

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tiles(NamedTuple):
    """How `attend` is compiled: query rows and cached positions of a tile, warps, stages of its pipelined loop.

    ``registers`` is at most how many a thread has.
    """

    rows: int
    block: int
    warps: int
    stages: int
    registers: int

    def programs(self) -> int:
        """How many of them a multiprocessor has registers for."""
        return REGISTERS // (32 * self.warps * self.registers)


def declines(call: AttentionCall) -> str | None:
    """Why the kernels do not take this call, or ``None`` if they do: `AttentionKernel.declines`."""
    if reason := declines_rows(call, KERNEL.devices, ("int8", "int4"), keeps_rows=True):
        return reason
    for name, stored in (("keys", call.key), ("values", call.value)):
        size = stored.channels
        if not isinstance(size, int):
            return f"the {name} have a symbolic number of channels"
        if size > MAX_HEAD_DIM:
            return f"the {name} have {size} channels: the kernel is for at most {MAX_HEAD_DIM}"
        if stored.format == "int4" and size % IN_A_WORD != 0:
            return f"the {name} have {size} channels: the kernel reads packed ones {IN_A_WORD} at a time"
    return why_not_on(call.query.device)


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on a CUDA device, or ``None`` if they do."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return f"the kernel needs compute capability {need}, and {torch.cuda.get_device_name(device)} has {have}"
    return None


def load() -> None:
    """Make sure that the kernels can be compiled here.

    Raises:
        KernelUnavailableError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise KernelUnavailableError(
            "The CUDA attention kernels need Triton, which is not installed: torch's CUDA builds for Linux come with "
            "it; elsewhere install `triton`."
        )


#: Head size, rounded up -> the tiles for it, by rows. Chosen by what the compiled kernels of sm_80 and sm_90 need: no
#: register goes to memory but in those of 64 rows where some are kept besides, and all are within the 99 KiB of shared
#: memory that every device from sm_80 on has. Not by timing: that takes a GPU.
_TILES = {
    64: (
        Tiles(8, 64, 4, 3, 128),
        Tiles(16, 64, 4, 3, 168),
        Tiles(32, 32, 2, 3, 255),
        Tiles(64, 64, 4, 2, 255),
        Tiles(128, 64, 8, 2, 255),
    ),
    128: (
        Tiles(8, 64, 4, 3, 128),
        Tiles(16, 64, 4, 3, 168),
        Tiles(32, 32, 4, 3, 168),
        Tiles(64, 32, 4, 3, 255),
        Tiles(128, 32, 8, 3, 255),
    ),
    256: (Tiles(8, 32, 4, 3, 160), Tiles(16, 32, 4, 3, 200), Tiles(32, 32, 8, 2, 255), Tiles(64, 32, 8, 2, 255)),
}
_FLOAT32_TILES = {
    64: (Tiles(16, 32, 4, 2, 255), Tiles(32, 32, 4, 2, 255)),
    128: (Tiles(16, 32, 4, 2, 255), Tiles(32, 32, 8, 2, 255)),
    256: (Tiles(16, 16, 4, 2, 255),),
}


def choose_tiles(
    rows: int, head_dim: int, dtype: torch.dtype, is_packed: bool = False, keeps_rows: bool = False
) -> Tiles:
    """The tiles for ``rows`` query rows of one key/value head.

    Args:
        rows: query tokens times query heads of the group.
        head_dim: the larger head size of keys and values, at most `MAX_HEAD_DIM`.
        dtype: of the query.
        is_packed: whether keys and values are of 4 bits, which takes more registers.
        keeps_rows: whether some are kept in the model's dtype, which takes even more.
    """
    table = _FLOAT32_TILES if dtype == torch.float32 else _TILES
    size = next(size for size in table if head_dim <= size)
    choices = table[size]
    if keeps_rows and dtype != torch.float32:
        choices = choices[:-1]  # Of kept rows, Triton 3.6 puts more into shared memory than there is beside its digits.
    tiles = next((tiles for tiles in choices if rows <= tiles.rows), choices[-1])
    return tiles._replace(registers=min(tiles.registers + (40 if keeps_rows else 32 if is_packed else 0), 255))


@functools.lru_cache(1024)
def choose_splits(tiles: int, blocks: int, processors: int, programs: int) -> int:
    """How many programs share a tile's positions.

    Args:
        tiles: tiles of all sequences and key/value heads.
        blocks: blocks of positions, of the whole length.
        processors: multiprocessors of the device.
        programs: how many of them one runs at a time.

    The number with which a multiprocessor is done earliest, by what was measured on an H200 with 512 to 65,536 blocks
    in all tiles: a program takes `START` of the time that memory takes for a block, itself and in `merge`, each round
    of programs `ROUND`, and fewer programs than there is room for leave memory waiting. Where the last round leaves no
    room, `merge` is not there yet when it is done: that takes `FULL`.
    """

    def took(splits: int) -> float:
        each = -(-blocks // splits)
        rounds, rest = divmod(-(-tiles * splits // processors), programs)
        taken = rounds * (programs * (each * _WAITS.get(programs, 1.0) + START) + ROUND)
        return taken + rest * (each * _WAITS.get(rest, 1.0) + START) + (ROUND if rest else FULL)

    return min(range(1, min(blocks, MAX_SPLITS) + 1), key=took, default=1)


#: In blocks: what a program takes besides, what a round of programs does, and what one does that leaves no room.
START, ROUND, FULL = 1.5, 4.0, 2.3
#: Programs that run on a multiprocessor -> what a block takes in comparison with more of them.
_WAITS = {1: 1.5, 2: 1.06}


def padded(size: int) -> int:
    """A head size as a side of a tile: a power of two, at least 32."""
    return max(32, 1 << (size - 1).bit_length())


def mask_spans(attn_mask: Tensor, length: int) -> Tensor:
    """``icw_int8kv_triton::mask_spans``: a boolean mask as the kernel reads it, int64 ``[b, h, t, 4 + words]``."""
    rows = attn_mask.shape[:3]
    mask = attn_mask.expand(*rows, length)
    position = torch.arange(length, device=mask.device)
    first = torch.where(mask, position, length).amin(dim=-1, keepdim=True)
    behind = torch.where(mask, position + 1, 0).amax(dim=-1, keepdim=True)
    count = mask.sum(dim=-1, keepdim=True)
    share = shares(behind - first)
    words = -(-length // 64)
    bits = torch.cat([mask, mask.new_zeros((*rows, words * 64 - length))], dim=-1).view(*rows, words, 64)
    place = torch.arange(64, device=mask.device)
    bit = torch.ones_like(place) << place
    return torch.cat([first, behind, count, share, torch.where(bits, bit, 0).sum(dim=-1)], dim=-1)


def shares(read: Tensor) -> Tensor:
    """Which part of ``read[b, ...]``, how many positions each sequence reads, those up to each sequence have.

    In units of ``2**-SHARE_BITS`` and rounded up, so that sequences that read alike get as many programs each.
    """
    read = read.clamp(min=1)
    return ((read.cumsum(dim=0) << SHARE_BITS) - 1) // read.sum(dim=0) + 1


def attention_triton(
    query: Tensor,
    key_qdata: Tensor,
    key_scale: Tensor,
    value_qdata: Tensor,
    value_scale: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
    splits: int = 0,
    key_codes: Tensor | None = None,
    value_codes: Tensor | None = None,
    spans: Tensor | None = None,
    key_exact: Tensor | None = None,
    key_position: Tensor | None = None,
    value_exact: Tensor | None = None,
    value_position: Tensor | None = None,
) -> Tensor:
    """``icw_int8kv_triton::attention`` on CUDA tensors, or on any where Triton interprets."""
    load()
    from icw_compile.kernels.attention_triton import attend, merge

    tensors = (
        query, key_qdata, key_scale, key_codes, value_qdata, value_scale, value_codes, attn_mask, sinks, spans,
        key_exact, key_position, value_exact, value_position,
    )  # fmt: skip
    layouts = tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors])
    plan = _plan(layouts, query.device, is_causal, splits)
    output = query.new_empty(plan.output)
    if plan.tiles == 0:
        return output
    if key_codes is not None:
        key_qdata, key_codes = key_qdata.view(torch.int32), key_codes.view(torch.int16)
    if value_codes is not None:
        value_qdata, value_codes = value_qdata.view(torch.int32), value_codes.view(torch.int16)
        value_strides = plan.value_strides
    else:
        value_qdata = _pairs(value_qdata)
        value_strides = value_qdata.stride()[:3]
    if not plan.keeps_keys:
        key_exact = key_position = None
    elif key_exact is not None and key_position is not None:
        key_exact, key_position = _with_rows(key_exact), key_position.contiguous()
    if not plan.keeps_values:
        value_exact = value_position = None
    elif value_exact is not None and value_position is not None:
        value_exact, value_position = _with_rows(value_exact), value_position.contiguous()
    if not plan.is_masked:
        spans = None
    elif spans is not None:
        spans = spans.contiguous()
    elif attn_mask is not None:
        spans = mask_spans(attn_mask, plan.length)
    if plan.splits == 1:
        partial, state = output, None
    else:
        batch, *rows, channels = plan.output
        partial = query.new_empty((*rows, batch * plan.splits, channels), dtype=torch.float32)
        state = query.new_empty((*rows, batch * plan.splits, 2), dtype=torch.float32)
    with torch.cuda.device_of(query):
        attend[(plan.tiles, plan.splits)](
            query,
            key_qdata,
            key_scale,
            key_codes,
            value_qdata,
            value_scale,
            value_codes,
            attn_mask if plan.is_biased else None,
            spans,
            None if sinks is None else sinks.contiguous(),
            key_exact,
            key_position,
            value_exact,
            value_position,
            partial,
            state,
            *plan.strides,
            *value_strides,
            *plan.more_strides,
            *((0, 0, 0) if key_exact is None else key_exact.stride()[:3]),
            *((0, 0, 0) if value_exact is None else value_exact.stride()[:3]),
            *plan.sizes,
            scale,
            softcap,
            **plan.constants,
        )
        if state is not None:
            by_share = spans if plan.constants["BATCHES"] else None
            merge[plan.merge_grid](partial, state, by_share, output, *plan.merge_sizes, **plan.merge_constants)
    return output


class _Layout(NamedTuple):
    """What is known of a tensor without looking at what is in it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Layouts(NamedTuple):
    """Those of the tensors of a call."""

    query: _Layout
    key_qdata: _Layout
    key_scale: _Layout
    key_codes: _Layout | None
    value_qdata: _Layout
    value_scale: _Layout
    value_codes: _Layout | None
    attn_mask: _Layout | None
    sinks: _Layout | None
    spans: _Layout | None
    key_exact: _Layout | None
    key_position: _Layout | None
    value_exact: _Layout | None
    value_position: _Layout | None


class _Plan(NamedTuple):
    """How calls of some layouts are launched.

    ``tiles``: none if there is nothing to compute. ``strides`` are those in front of the values', ``more_strides``
    those behind. ``is_masked``: by a boolean mask; ``is_biased``: by an additive one.
    """

    output: tuple[int, ...]
    length: int
    tiles: int
    splits: int
    keeps_keys: bool
    keeps_values: bool
    is_masked: bool
    is_biased: bool
    strides: tuple[int, ...]
    value_strides: tuple[int, ...]
    more_strides: tuple[int, ...]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    merge_grid: tuple[int, int]
    merge_sizes: tuple[int, ...]
    merge_constants: dict[str, Any]


@functools.lru_cache(PLANS)
def _plan(layouts: tuple[Any, ...], device: torch.device, is_causal: bool, splits: int) -> _Plan:
    """The plan for `_Layouts` of `_Layout`, as plain tuples, which are made in half of the time.

    Raises:
        ValueError: for what the kernels would read wrongly.
    """
    of = _Layouts(*(None if each is None else _Layout(*each) for each in layouts))  # type: ignore[arg-type]
    _check(of)
    batch, query_heads, tokens, head_dim = of.query.shape
    heads, length = of.key_qdata.shape[1:3]
    value_dim = of.value_qdata.shape[3] * (1 if of.value_codes is None else 2)
    keeps_keys = _keeps("key", of.key_exact, of.key_position, (batch, heads, head_dim))
    keeps_values = _keeps("value", of.value_exact, of.value_position, (batch, heads, value_dim))
    output = (batch, query_heads, tokens, value_dim)
    group = query_heads // heads
    is_packed = of.key_codes is not None and of.value_codes is not None
    chosen = choose_tiles(
        tokens * group, max(head_dim, value_dim), of.query.dtype, is_packed, keeps_keys or keeps_values
    )
    tiles_of_a_head = -(-tokens * group // chosen.rows)
    tiles = batch * heads * tiles_of_a_head if math.prod(output) else 0
    is_masked = is_biased = False
    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    span_strides: tuple[int, ...] = (0, 0, 0)
    if of.attn_mask is not None and length > 0:
        is_masked = of.attn_mask.dtype == torch.bool
        is_biased = not is_masked
        if is_biased:
            bias_strides = expanded(of.attn_mask.shape, of.attn_mask.stride, (batch, query_heads, tokens, length))
        else:
            words = SPANS_HEADER + -(-length // 64)
            shape = (*of.attn_mask.shape[:3], words) if of.spans is None else of.spans.shape
            stride = [math.prod(shape[i + 1 :]) for i in range(4)]
            span_strides = expanded(shape, stride, (batch, query_heads, tokens))
    by_share = tiles_of_a_head == 1 and span_strides[0] != 0 and batch > 1
    if splits == 0:
        blocks, many, programs = -(-length // chosen.block), processors(device), chosen.programs()
        splits = choose_splits(tiles, blocks, many, programs)
        by_share = by_share and -(-blocks // splits) >= SHARED_FROM
        if by_share and tiles <= many * programs:
            splits = max(splits, 2)  # all run at once, and that of a long sequence alone would be the last by far
    by_share = by_share and 1 < splits <= MAX_SHARING // batch
    most = batch * (splits - 1) + 1 if by_share else splits
    overlaps = _overlaps(device)
    how = {"OVERLAPS": overlaps, **({"launch_pdl": True} if overlaps else {})}
    return _Plan(
        output,
        length,
        tiles,
        splits,
        keeps_keys,
        keeps_values,
        is_masked,
        is_biased,
        (
            *of.query.stride,
            *_in_words(of.key_qdata, 1 if of.key_codes is None else 4),
            *of.key_scale.stride[:3],
            *((0, 0, 0) if of.key_codes is None else _in_words(of.key_codes, 2)),
        ),
        _in_words(of.value_qdata, 1 if of.value_codes is None else 4),
        (
            *of.value_scale.stride[:3],
            *((0, 0, 0) if of.value_codes is None else _in_words(of.value_codes, 2)),
            *bias_strides,
            *span_strides,
        ),
        (
            batch,
            tokens,
            length,
            of.key_position.shape[0] if keeps_keys and of.key_position is not None else 0,
            of.value_position.shape[0] if keeps_values and of.value_position is not None else 0,
        ),
        {
            "HEADS": heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "PADDED_HEAD_DIM": padded(head_dim),
            "PADDED_VALUE_DIM": padded(value_dim),
            "ONE_TILE": tiles_of_a_head == 1,
            "IN_PAIRS": all(
                stride % 2 == 0
                for numbers, width in ((of.key_scale, 1), (of.key_codes, 2), (of.value_scale, 1), (of.value_codes, 2))
                if numbers is not None
                for stride in _in_words(numbers, width)[:2]
            ),
            "IS_CAUSAL": is_causal,
            "BATCHES": max(16, 1 << (batch - 1).bit_length()) if by_share else 0,
            "ROWS": chosen.rows,
            "BLOCK": chosen.block,
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
            **how,
            # An option of Triton's backend for NVIDIA.
            **({} if torch.version.hip is not None else {"maxnreg": chosen.registers}),
        },
        (batch * query_heads * tokens, -(-value_dim // MERGED_CHANNELS)),
        (*span_strides[:2], tokens, batch, splits),
        # Few variants: the number of splits follows from the length, and up to 64 of them one warp reads.
        {
            "GROUP": group,
            "VALUE_DIM": value_dim,
            "SPLITS": (at_once := max(16, 1 << (most - 1).bit_length())),
            "CHANNELS": MERGED_CHANNELS,
            "num_warps": max(1, at_once // 64),
            **how,
        },
    )


def _in_words(of: _Layout, width: int) -> tuple[int, ...]:
    """The strides but for the channels', where ``width`` of these are one number."""
    return tuple(stride // width for stride in of.stride[:3])


def expanded(shape: Sequence[int], stride: Sequence[int], full: Sequence[int]) -> tuple[int, ...]:
    """The strides after ``expand``."""
    return tuple(0 if size != of else step for size, step, of in zip(shape, stride, full))


def _keeps(name: str, exact: _Layout | None, position: _Layout | None, shape: tuple[int, int, int]) -> bool:
    """Whether there is place for kept rows.

    Raises:
        ValueError: they do not fit.
    """
    if exact is None or position is None:
        if exact is not None or position is not None:
            raise ValueError(f"{name}_exact and {name}_position go together")
        return False
    batch, heads, channels = shape
    if len(position.shape) != 1 or position.dtype != torch.int64:
        raise ValueError(f"{name}_position must be int64 [K], not {position.dtype} {list(position.shape)}")
    expected = (batch, heads, position.shape[0], channels)
    if tuple(exact.shape) != expected or not exact.dtype.is_floating_point:
        raise ValueError(f"{name}_exact must be of floats {list(expected)}, not {exact.dtype} {list(exact.shape)}")
    return position.shape[0] > 0


def _with_rows(exact: Tensor) -> Tensor:
    """Kept rows whose channels are contiguous."""
    return exact if exact.stride(3) == 1 else exact.contiguous()


def _pairs(qdata: Tensor) -> Tensor:
    """int8 rows as pairs of channels, int16. Copies those that do not begin where a pair does."""
    if qdata.shape[3] % 2:
        qdata = torch.nn.functional.pad(qdata, (0, 1))
    elif any(at % 2 for at in (qdata.storage_offset(), *qdata.stride()[:3])):
        qdata = qdata.clone(memory_format=torch.contiguous_format)  # which may be contiguous, and begin at an odd byte
    return qdata.view(torch.int16)


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one that it waits for is done: from sm_90 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 where Triton interprets on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _check(of: _Layouts) -> None:
    """Refuse what the kernels would read wrongly."""
    query, key_qdata, value_qdata = of.query, of.key_qdata, of.value_qdata
    if len(query.shape) != 4:
        raise ValueError(f"query must have 4 dimensions, not {len(query.shape)}")
    if query.dtype not in DTYPES:
        raise ValueError(f"query must be one of {', '.join(map(str, DTYPES))}, not {query.dtype}")
    batch, query_heads, tokens, head_dim = query.shape
    if len(key_qdata.shape) != 4 or len(value_qdata.shape) != 4:
        raise ValueError("key_qdata and value_qdata must have 4 dimensions")
    heads, length = key_qdata.shape[1:3]
    value_dim = value_qdata.shape[3] * (1 if of.value_codes is None else 2)
    _check_rows("key", key_qdata, of.key_scale, of.key_codes, (batch, heads, length, head_dim))
    _check_rows("value", value_qdata, of.value_scale, of.value_codes, (batch, heads, length, value_dim))
    if heads == 0 or query_heads % heads:
        raise ValueError(f"{query_heads} query heads cannot be grouped on {heads} key/value heads")
    if of.sinks is not None and tuple(of.sinks.shape) != (query_heads,):
        raise ValueError(f"sinks must be of shape [{query_heads}], not {list(of.sinks.shape)}")
    mask = of.attn_mask
    if mask is not None:
        full = (batch, query_heads, tokens, length)
        if len(mask.shape) != 4 or any(size not in (1, of) for size, of in zip(mask.shape, full)):
            raise ValueError(f"attn_mask of shape {list(mask.shape)} does not broadcast to {list(full)}")
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise ValueError(f"unsupported dtype of attn_mask: {mask.dtype}")
    if of.spans is not None and (mask is None or mask.dtype != torch.bool):
        raise ValueError("spans are those of a boolean mask")


def _check_rows(name: str, qdata: _Layout, scale: _Layout, codes: _Layout | None, shape: tuple[int, ...]) -> None:
    *rows, channels = shape
    if channels > MAX_HEAD_DIM:
        raise ValueError(f"{name}_qdata has {channels} channels: the kernel is for at most {MAX_HEAD_DIM}")
    if codes is not None and channels % IN_A_WORD != 0:
        raise ValueError(f"{name}_qdata has {channels} channels: the kernel reads packed ones {IN_A_WORD} at a time")
    parts = {f"{name}_qdata": (qdata, torch.int8, channels), f"{name}_scale": (scale, scale.dtype, 1)}
    if codes is not None:
        parts[f"{name}_qdata"] = (qdata, torch.uint8, channels // 2)
        parts[f"{name}_codes"] = (codes, torch.uint8, 2)
    for part, (layout, dtype, size) in parts.items():
        if tuple(layout.shape) != (*rows, size):
            raise ValueError(f"{part} must be of shape {[*rows, size]}, not {list(layout.shape)}")
        if layout.dtype != dtype:
            raise ValueError(f"{part} must be {str(dtype).removeprefix('torch.')}, not {layout.dtype}")
        if size > 1 and layout.stride[3] != 1:
            raise ValueError(f"the channels of {part} must be contiguous")


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    arguments = (
        f"({ATTENTION_ARGUMENTS}, int splits=0, Tensor? key_codes=None, Tensor? value_codes=None, Tensor? spans=None, "
        "Tensor? key_exact=None, Tensor? key_position=None, Tensor? value_exact=None, Tensor? value_position=None)"
    )
    torch.library.define("icw_int8kv_triton::attention", f"{arguments} -> Tensor", tags=tags)
    torch.library.define("icw_int8kv_triton::mask_spans", "(Tensor attn_mask, SymInt length) -> Tensor")
    torch.library.impl("icw_int8kv_triton::mask_spans", "CompositeImplicitAutograd", mask_spans)
    torch.library.impl("icw_int8kv_triton::attention", "CUDA", attention_triton)

    def fake(
        query: Tensor,
        key_qdata: Tensor,
        key_scale: Tensor,
        value_qdata: Tensor,
        value_scale: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        splits: int = 0,
        key_codes: Tensor | None = None,
        value_codes: Tensor | None = None,
        *others: Tensor | None,
        **named: Tensor | None,
    ) -> Tensor:
        channels = value_qdata.shape[3] * (1 if value_codes is None else 2)
        return query.new_empty((*query.shape[:3], channels))

    torch.library.register_fake("icw_int8kv_triton::attention", fake)


_register()

#: The operator, as a graph calls it.
attention = torch.ops.icw_int8kv_triton.attention.default

KERNEL = AttentionKernel(
    "triton kernel",
    "triton",
    ("cuda",),
    load,
    declines,
    attention,
    torch.ops.icw_int8kv_triton.mask_spans.default,
)
