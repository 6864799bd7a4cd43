"""How the Triton kernels of attention are launched: what follows from the layout of the tensors of a call alone.

The tiles that suit the shape, how many programs share the positions, strides, and what does not fit. It is worked out
once for all calls of a layout; it needs no Triton. Letters and shapes are those of `icw_compile.kernels.gpu`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

__all__ = [
    "IN_A_WORD",
    "MAX_HEAD_DIM",
    "MAX_SPLITS",
    "PLANS",
    "SHARE_BITS",
    "SPANS_HEADER",
    "Layout",
    "Plan",
    "Tiles",
    "choose_splits",
    "choose_tiles",
    "expanded",
    "padded",
    "plan_call",
    "processors",
]

#: Largest head size: beyond it a tile does not fit in the shared memory of a multiprocessor.
MAX_HEAD_DIM = 256
#: Packed channels in the 32 bits that the kernel reads at a time.
IN_A_WORD = 8
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


class Layout(NamedTuple):
    """What is known of a tensor without looking at what is in it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Layouts(NamedTuple):
    """Those of the tensors of a call."""

    query: Layout
    key_qdata: Layout
    key_scale: Layout
    key_codes: Layout | None
    value_qdata: Layout
    value_scale: Layout
    value_codes: Layout | None
    attn_mask: Layout | None
    sinks: Layout | None
    spans: Layout | None
    key_exact: Layout | None
    key_position: Layout | None
    value_exact: Layout | None
    value_position: Layout | None


class Plan(NamedTuple):
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
def plan_call(layouts: tuple[Any, ...], device: torch.device, is_causal: bool, splits: int) -> Plan:
    """The plan for `_Layouts` of `Layout`, as plain tuples, which are made in half of the time.

    Raises:
        ValueError: for what the kernels would read wrongly.
    """
    of = _Layouts(*(None if each is None else Layout(*each) for each in layouts))  # type: ignore[arg-type]
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
    return Plan(
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


def _in_words(of: Layout, width: int) -> tuple[int, ...]:
    """The strides but for the channels', where ``width`` of these are one number."""
    return tuple(stride // width for stride in of.stride[:3])


def expanded(shape: Sequence[int], stride: Sequence[int], full: Sequence[int]) -> tuple[int, ...]:
    """The strides after ``expand``."""
    return tuple(0 if size != of else step for size, step, of in zip(shape, stride, full))


def _keeps(name: str, exact: Layout | None, position: Layout | None, shape: tuple[int, int, int]) -> bool:
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


def _check_rows(name: str, qdata: Layout, scale: Layout, codes: Layout | None, shape: tuple[int, ...]) -> None:
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
