"""The named operations of the ``icw_int8kv`` namespace: what a rewritten graph is spelled in.

All of them are ``CompositeImplicitAutograd``: a graph, a test or a notebook shows one readable node, and
AOTAutograd decomposes that node into plain ATen, so that Inductor fuses it with what surrounds it and the writes
into the cache stay in place.

Shapes, in the letters used below: ``B`` batch, ``Hq`` query heads, ``H`` key/value heads, ``T`` query tokens, ``S``
cached tokens, ``D`` head size of queries and keys, ``Dv`` head size of values.

``quantize_per_head(x[..., D], scale_dtype, shift=None) -> (qdata int8[..., D], scale[..., 1])``
    Symmetric, one scale per row: ``scale = amax(|x|) / 127``, ``qdata = round(x / scale)`` in ``[-127, 127]``, where
    the division is by the scale *as stored*. A zero row has scale 0; a row with a NaN or an infinity has a
    non-finite scale and reads back as non-finite in every channel. With ``shift``, which broadcasts to ``x``, the
    channels are divided by ``2 ** shift`` first.
``dequantize_per_head(qdata[..., D], scale[..., 1], dtype, shift=None, exact=None, position=None) -> [..., D]``
    The reverse. Row ``position[e]`` is ``exact[..., e, D]`` instead, for each ``e`` whose position is one of the rows.
``keep_rows(exact[..., E, D], position[E], values[..., T, D], index[T], sinks) -> (exact, position)``
    The rows that are kept in the model's dtype after ``values`` are written to the rows ``index`` (ascending, with no
    gap): the first ``sinks`` of ``E`` are the rows 0, 1, ..., the others the last ones written, oldest first.
    ``position`` says which row each one is, -1 that it is none. What was kept of rows from ``index[0]`` on is gone.
``slice_position(position, S, start, end)``, ``roll_position(position, S, by)``
    Where these rows of ``S`` are after a slice of the tokens, or a roll.
``channel_shift(x[..., T, D]) -> int8[..., 1, D]``
    The shifts that bring outlier channels down to the others: the exponent of the largest power of two, at most 7, by
    which a channel exceeds the median channel, both in its geometric mean over the tokens and in its largest value; 0
    below a factor of three. Sizes are relative to the geometric mean of their row, as each row has a scale of its own:
    one token of a huge norm, or with outliers of its own, changes little. Rows of zeros, and rows
    that are not finite, do not count. A power of two costs no accuracy where the cache is read.
``scale_channels(x[..., D], shift) -> [..., D]``
    ``x * 2 ** shift``, in the dtype of ``x``: what makes up for shifted keys in the query, and for shifted values in
    the output.
``attention(query[B, Hq, T, D], key_qdata[B, H, S, D], key_scale[B, H, S, 1], value_qdata[B, H, S, Dv],
value_scale[B, H, S, 1], attn_mask, is_causal, scale, softcap, sinks=None, key_exact=None, value_exact=None,
position=None) -> [B, Hq, T, Dv]``
    Softmax attention over a quantized cache; grouped heads are never expanded. ``attn_mask`` is boolean (``True``
    takes part) or additive and broadcasts to ``[B, Hq, T, S]``; ``is_causal`` aligns the triangle at the upper left,
    as ``torch.nn.functional.scaled_dot_product_attention`` does; ``softcap`` is Gemma 2's ``cap * tanh(x / cap)``;
    ``sinks[Hq]`` is GPT-OSS's one more score for each query head, which takes its share of the softmax and has no
    value. ``key_exact[B, H, E, D]`` and ``value_exact[B, H, E, Dv]`` stand in for the rows ``position[E]``. A row
    that the boolean mask leaves empty gives zeros. This spelling is the reference and what passes match on.
``attention_decode``, ``attention_decode_lse``, ``attention_prefill``
    The same function with the same arguments, but that only prefill takes exact rows, as the ``lower`` pass chooses:
    ``attention_decode`` (``T`` = 1) reads the int8 rows inside two reductions and has no dequantized intermediate;
    ``attention_prefill`` dequantizes the one layer that it reads and gives it to torch's own attention kernels.
``without_rows(attn_mask, position[E], S) -> [..., S]`` and
``merge_rows(output[B, Hq, T, Dv], lse[B, Hq, T], query, key_exact, value_exact, position, attn_mask, is_causal, scale,
softcap, S) -> [B, Hq, T, Dv]``
    Around a kernel that knows nothing of exact rows: the mask that takes them out, and its output together with their
    attention. ``lse`` is the kernel's logarithm of the sum of exponentials of scores, sinks included.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ATTENTION_ARGUMENTS",
    "QMAX",
    "attention",
    "channel_shift",
    "dequantize_per_head",
    "keep_rows",
    "merge_rows",
    "quantize_per_head",
    "scale_channels",
    "scale_dtype_for",
    "without_rows",
]

#: Largest magnitude of a quantized value. -128 is left out, so that the range is symmetric.
QMAX = 127

#: A channel is an outlier from this multiple of the median channel on, as an exponent of two.
OUTLIER = math.log2(3.0)
#: Largest exponent of `channel_shift`: a float16 query may be multiplied by 2 ** MAX_SHIFT.
MAX_SHIFT = 7

#: The dtypes of keys and values that can be quantized, and the dtype in which the scales of each are stored.
SCALE_DTYPES: dict[torch.dtype, torch.dtype] = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.bfloat16,
}

#: What every attention takes, here and in `icw_compile.kernels`.
ATTENTION_ARGUMENTS = (
    "Tensor query, Tensor key_qdata, Tensor key_scale, Tensor value_qdata, Tensor value_scale, "
    "Tensor? attn_mask, bool is_causal, float scale, float? softcap, Tensor? sinks=None"
)
#: What attention takes besides, where some rows of keys and values are kept in the model's dtype.
EXACT_ARGUMENTS = "Tensor? key_exact=None, Tensor? value_exact=None, Tensor? position=None"


def scale_dtype_for(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the scales of ``dtype`` keys and values are stored.

    Raises:
        TypeError: ``dtype`` is not one that the int8 cache supports.
    """
    try:
        return SCALE_DTYPES[dtype]
    except KeyError:
        supported = ", ".join(str(d).removeprefix("torch.") for d in SCALE_DTYPES)
        raise TypeError(
            f"icw_int8kv cannot quantize a key/value cache of dtype {dtype}: the supported dtypes are {supported}. "
            "Load the model in one of them, for example with `dtype=torch.bfloat16`."
        ) from None


def quantize_per_head(x: Tensor, scale_dtype: torch.dtype, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    values = x.float()
    if shift is not None:
        values = values * torch.exp2(-shift.float())
    amax = values.abs().amax(dim=-1, keepdim=True)
    if x.dtype == torch.float16:
        # A scale that was rounded up to bfloat16 must not carry 127 * scale over float16's largest number.
        amax = torch.where(amax.isfinite(), amax.clamp(max=QMAX * 512.0), amax)
    scale = (amax / QMAX).to(scale_dtype)
    stored = scale.float()
    divisor = torch.where((stored == 0) | ~stored.isfinite(), 1.0, stored)
    rounded = (values / divisor).round().clamp(-QMAX, QMAX)
    # The conversion of NaN to an integer is undefined: the scale alone carries "non-finite", as 0 * inf and 0 * NaN.
    return torch.where(stored.isfinite(), rounded, 0.0).to(torch.int8), scale


def dequantize_per_head(
    qdata: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    shift: Tensor | None = None,
    exact: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    values = qdata.float() * scale.float()
    if shift is not None:
        values = values * torch.exp2(shift.float())
    return _placed(values.to(dtype), exact, position)


def _placed(rows: Tensor, exact: Tensor | None, position: Tensor | None) -> Tensor:
    """``rows[..., S, D]``, with the exact ones in place of some."""
    if exact is None or position is None:
        return rows
    taken = position.unsqueeze(-1) == torch.arange(rows.shape[-2], device=rows.device)
    slot = taken.to(torch.int32).argmax(dim=0)
    return torch.where(taken.any(dim=0).unsqueeze(-1), exact.index_select(-2, slot).to(rows.dtype), rows)


def keep_rows(exact: Tensor, position: Tensor, values: Tensor, index: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
    tokens, kept = values.shape[-2], exact.shape[-2] - sinks
    position = torch.where(position < index[0], position, -1)
    # The gaps first: they are the next to go.
    order = (position[sinks:] >= 0).to(torch.int8).argsort(stable=True)
    old = exact.narrow(-2, sinks, kept).index_select(-2, order)
    recent = torch.cat([old, values.to(exact.dtype)], dim=-2).narrow(-2, tokens, kept)
    recent_at = torch.cat([position[sinks:][order], torch.where(index < sinks, -1, index)]).narrow(0, tokens, kept)
    if sinks == 0:
        return recent, recent_at
    row = torch.arange(sinks, device=exact.device)
    source = row - index[0]
    written = (source >= 0) & (source < tokens)
    first = values.index_select(-2, source.clamp(0, tokens - 1)).to(exact.dtype)
    first = torch.where(written.unsqueeze(-1), first, exact.narrow(-2, 0, sinks))
    return (
        torch.cat([first, recent], dim=-2),
        torch.cat([torch.where(written, row, position[:sinks]), recent_at]),
    )


def slice_position(position: Tensor, tokens: int, start: int | None, end: int | None) -> Tensor:
    start = 0 if start is None else start
    end = tokens if end is None else end
    start = torch.sym_max(start + tokens, 0) if start < 0 else start
    end = end + tokens if end < 0 else end
    inside = (position >= start) & (position < end)
    return torch.where(inside, position - start, -1)


def roll_position(position: Tensor, tokens: int, by: int) -> Tensor:
    return torch.where(position >= 0, (position + by) % tokens, -1)


def channel_shift(x: Tensor) -> Tensor:
    if x.shape[-2] <= 1:  # one token says nothing about the next
        return torch.zeros_like(x[..., :1, :], dtype=torch.int8)
    magnitude = x.float().abs()
    row = magnitude.amax(dim=-1, keepdim=True)
    counts = row.isfinite() & (row > 0)
    rows = counts.sum(dim=-2, keepdim=True)
    size = torch.log2(magnitude.clamp(min=2.0**-40))
    size = size - size.mean(dim=-1, keepdim=True)
    usual = torch.where(counts, size, 0.0).sum(dim=-2, keepdim=True) / rows.clamp(min=1)
    largest = torch.where(counts, size, -torch.inf).amax(dim=-2, keepdim=True)
    above = torch.minimum(_above_median(usual), _above_median(largest))
    shifts = (above >= OUTLIER) & (rows > 1)
    return torch.where(shifts, above.floor().clamp(max=MAX_SHIFT), 0.0).to(torch.int8)


def _above_median(x: Tensor) -> Tensor:
    return x - x.median(dim=-1, keepdim=True).values


def scale_channels(x: Tensor, shift: Tensor) -> Tensor:
    return (x.float() * torch.exp2(shift.float())).to(x.dtype)


def attention(
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
    key_exact: Tensor | None = None,
    value_exact: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    key = dequantize_per_head(key_qdata, key_scale, torch.float32, None, key_exact, position)
    value = dequantize_per_head(value_qdata, value_scale, torch.float32, None, value_exact, position)
    return _grouped_attention(query.float(), key, value, attn_mask, is_causal, scale, softcap, sinks).to(query.dtype)


def _attention_decode_lse(
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
) -> tuple[Tensor, Tensor]:
    batch, query_heads, _, head_dim = query.shape
    heads, tokens = key_qdata.shape[1:3]
    grouped = query.reshape(batch, heads, -1, 1, head_dim).float()
    # Elementwise product and sum, not a matmul: Inductor reads the int8 rows inside the reduction, where a matmul
    # would need its operand as a float tensor in memory. The scale of a row leaves the sum.
    scores = (grouped * key_qdata.unsqueeze(2).float()).sum(dim=-1) * key_scale.float().view(batch, heads, 1, tokens)
    scores = _masked(scores.unsqueeze(-2), attn_mask, is_causal, scale, softcap)
    weights, lse = _softmax(scores, sinks)
    weights = weights.squeeze(-2) * value_scale.float().view(batch, heads, 1, tokens)
    output = (weights.unsqueeze(-1) * value_qdata.unsqueeze(2).float()).sum(dim=-2)
    return output.reshape(batch, query_heads, 1, -1).to(query.dtype), lse.reshape(batch, query_heads, 1)


def _attention_decode(*arguments: Any) -> Tensor:
    return _attention_decode_lse(*arguments)[0]


def _attention_prefill(
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
    key_exact: Tensor | None = None,
    value_exact: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    key = dequantize_per_head(key_qdata, key_scale, query.dtype, None, key_exact, position)
    value = dequantize_per_head(value_qdata, value_scale, query.dtype, None, value_exact, position)
    if softcap is not None or sinks is not None or key.shape[-1] != value.shape[-1]:
        # torch's fused kernels have none of these, and outside them it expands grouped heads.
        return _grouped_attention(query, key, value, attn_mask, is_causal, scale, softcap, sinks)
    groups = query.shape[1] // key.shape[1]
    if attn_mask is not None and groups > 1 and query.device.type != "cpu":
        return _folded_attention(query, key, value, attn_mask, scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=groups > 1
    )


def _folded_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    """Masked grouped-query attention with the query heads of a group laid out as more query tokens.

    Off the CPU, torch has no fused kernel for a mask together with ``enable_gqa``: it would expand keys and values.
    """
    batch, query_heads, length, _ = query.shape
    heads = key.shape[1]
    groups = query_heads // heads
    mask = attn_mask.expand(-1, attn_mask.shape[1], length, -1)
    if mask.shape[1] == 1:
        mask = mask.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(2, 3)
    else:
        mask = mask.unflatten(1, (heads, groups)).flatten(2, 3)
    folded = query.reshape(batch, heads, groups * length, -1)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, query_heads, length, -1)


def _grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in two matmuls on ``[B, H, groups * T, ...]``: the heads of a group share one key/value head."""
    batch, query_heads, length, _ = query.shape
    heads, tokens = key.shape[1:3]
    groups = query_heads // heads
    scores = torch.matmul(query.reshape(batch, heads, groups * length, -1), key.transpose(-1, -2)).float()
    scores = _masked(scores.reshape(batch, heads, groups, length, tokens), attn_mask, is_causal, scale, softcap)
    weights = _softmax(scores, sinks)[0].to(value.dtype).reshape(batch, heads, groups * length, tokens)
    return torch.matmul(weights, value).reshape(batch, query_heads, length, -1)


def _masked(scores: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, softcap: float | None) -> Tensor:
    """Scale, softcap and mask raw scores ``[B, H, groups, T, S]`` of float32."""
    scores = scores * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    heads, groups, length, tokens = scores.shape[1:]
    if is_causal:
        row = torch.arange(length, device=scores.device).unsqueeze(-1)
        scores = torch.where(row >= torch.arange(tokens, device=scores.device), scores, -torch.inf)
    if attn_mask is not None:
        # A head dimension of 1 is shared by all query heads; a full one is split into groups.
        shared = attn_mask.shape[1] == 1
        mask = attn_mask.unsqueeze(2) if shared else attn_mask.unflatten(1, (heads, groups))
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of ``[B, H, groups, T, S]`` over the last dimension, and the logarithm of its sum ``[B, H, groups, T]``.

    A row of minus infinities gives zeros, not NaN.
    """
    largest = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.float().view(*scores.shape[1:3], 1, 1)
        largest = torch.maximum(largest, sinks)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    weights = torch.exp(scores - shift)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - shift)
    return weights / torch.where(total == 0, 1.0, total), (shift + torch.log(total)).squeeze(-1)


def without_rows(attn_mask: Tensor | None, position: Tensor, tokens: int) -> Tensor:
    kept = (position.unsqueeze(-1) == torch.arange(tokens, device=position.device)).any(dim=0)
    if attn_mask is None:
        return (~kept).view(1, 1, 1, tokens)
    if attn_mask.dtype == torch.bool:
        return attn_mask & ~kept
    return attn_mask.masked_fill(kept, -torch.inf)


def merge_rows(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key_exact: Tensor,
    value_exact: Tensor,
    position: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    tokens: int,
) -> Tensor:
    batch, query_heads, length, _ = query.shape
    heads, rows = key_exact.shape[1:3]
    at = position.clamp(min=0, max=tokens - 1)
    taken = (position == at).view(1, 1, 1, rows)
    if is_causal:
        taken = taken & (at <= torch.arange(length, device=at.device).unsqueeze(-1))
    if attn_mask is None:
        mask = taken
    else:
        mask = attn_mask.expand(*attn_mask.shape[:3], tokens).index_select(-1, at)
        mask = mask & taken if mask.dtype == torch.bool else mask.masked_fill(~taken, -torch.inf)
    grouped = query.float().reshape(batch, heads, -1, query.shape[-1])
    scores = torch.matmul(grouped, key_exact.float().transpose(-1, -2))
    scores = _masked(scores.reshape(batch, heads, -1, length, rows), mask, False, scale, softcap)
    weights, exact_lse = _softmax(scores, None)
    exact = torch.matmul(weights.reshape(batch, heads, -1, rows), value_exact.float())
    exact = exact.reshape(batch, query_heads, length, -1)
    exact_lse = exact_lse.reshape(batch, query_heads, length)
    # Each part weighs as much as its sum, and neither if there is nothing in both.
    empty = (exact_lse == -torch.inf) & (lse == -torch.inf)
    share = torch.where(empty, 0.0, torch.sigmoid(exact_lse - lse)).unsqueeze(-1)
    return torch.lerp(output.float(), exact, share).to(output.dtype)


def _register() -> None:
    attention_schema = f"({ATTENTION_ARGUMENTS}) -> Tensor"
    exact_schema = f"({ATTENTION_ARGUMENTS}, {EXACT_ARGUMENTS}) -> Tensor"
    schemas: dict[str, tuple[str, Callable[..., Any]]] = {
        "quantize_per_head": (
            "(Tensor x, ScalarType scale_dtype, Tensor? shift=None) -> (Tensor qdata, Tensor scale)",
            quantize_per_head,
        ),
        "dequantize_per_head": (
            "(Tensor qdata, Tensor scale, ScalarType dtype, Tensor? shift=None, Tensor? exact=None, "
            "Tensor? position=None) -> Tensor",
            dequantize_per_head,
        ),
        "channel_shift": ("(Tensor x) -> Tensor", channel_shift),
        "scale_channels": ("(Tensor x, Tensor shift) -> Tensor", scale_channels),
        "keep_rows": (
            "(Tensor exact, Tensor position, Tensor values, Tensor index, int sinks) "
            "-> (Tensor exact, Tensor position)",
            keep_rows,
        ),
        "slice_position": ("(Tensor position, SymInt tokens, SymInt? start, SymInt? end) -> Tensor", slice_position),
        "roll_position": ("(Tensor position, SymInt tokens, SymInt by) -> Tensor", roll_position),
        "attention": (exact_schema, attention),
        "attention_decode": (attention_schema, _attention_decode),
        "attention_decode_lse": (f"({ATTENTION_ARGUMENTS}) -> (Tensor output, Tensor lse)", _attention_decode_lse),
        "attention_prefill": (exact_schema, _attention_prefill),
        "without_rows": ("(Tensor? attn_mask, Tensor position, SymInt tokens) -> Tensor", without_rows),
        "merge_rows": (
            "(Tensor output, Tensor lse, Tensor query, Tensor key_exact, Tensor value_exact, Tensor position, "
            "Tensor? attn_mask, bool is_causal, float scale, float? softcap, SymInt tokens) -> Tensor",
            merge_rows,
        ),
    }
    for name, (schema, function) in schemas.items():
        torch.library.define(f"icw_int8kv::{name}", schema)
        torch.library.impl(f"icw_int8kv::{name}", "CompositeImplicitAutograd", function)


_register()
