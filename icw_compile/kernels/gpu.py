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
alone, checks and tiles and splits, is worked out once for all calls of it: `icw_compile.kernels.launch`.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from icw_compile.errors import KernelUnavailableError
from icw_compile.kernels.inductor import ATTENTION_ARGUMENTS
from icw_compile.kernels.interface import AttentionCall, AttentionKernel, declines_rows
from icw_compile.kernels.launch import IN_A_WORD, MAX_HEAD_DIM, SHARE_BITS, plan_call

__all__ = [
    "KERNEL",
    "attention",
    "attention_triton",
    "load",
    "mask_spans",
    "shares",
    "why_not_on",
]

#: Compute capability with bfloat16 tensor cores and asynchronous copies.
MIN_CAPABILITY = (8, 0)


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
    plan = plan_call(layouts, query.device, is_causal, splits)
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
