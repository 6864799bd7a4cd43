"""Attention in operations of torch, as Inductor compiles it; what stands for an attention before it is lowered.

Shapes, in the letters used below: ``B`` batch, ``Hq`` query heads, ``H`` key/value heads, ``T`` query tokens, ``S``
cached tokens, ``D`` head size of queries and keys, ``Dv`` head size of values.

``attention(query[B, Hq, T, D], key[B, H, S, D], value[B, H, S, Dv], attn_mask, is_causal, scale, softcap, sinks=None)
-> [B, Hq, T, Dv]``
    Softmax attention; grouped heads are never expanded. ``attn_mask`` is boolean (``True`` takes part) or additive and
    broadcasts to ``[B, Hq, T, S]``; ``is_causal`` aligns the triangle at the upper left, as
    ``torch.nn.functional.scaled_dot_product_attention`` does; ``softcap`` is Gemma 2's ``cap * tanh(x / cap)``;
    ``sinks[Hq]`` is GPT-OSS's one more score for each query head, which takes its share of the softmax and has no
    value. A row that the boolean mask leaves empty gives zeros. Every recognised attention over a stored cache becomes
    this one, on the decoded keys and values: the ``lower`` pass gives it a kernel that reads what is stored, or leaves
    it, and then one layer is decoded for torch's own attention kernels.
``attention_decode(query[B, Hq, 1, D], key_rows[B, H, S, D], key_scale[B, H, S, 1], value_rows[B, H, S, Dv],
value_scale[B, H, S, 1], attn_mask, is_causal, scale, softcap, sinks=None) -> [B, Hq, 1, Dv]``, ``attention_decode_lse``
    The same of one query token and rows with a scale each, of any dtype (`Format.scaled_rows`). They are read inside
    two reductions: there is no decoded intermediate. The second returns besides ``lse``, float32 ``[B, Hq, T]``: the
    logarithm of the sum of exponentials of scores, sinks included.
``unite_positions(a[K], b[L]) -> [K + L]``
    The rows ``a`` and then ``b``, -1 in place of those of ``b`` that are in ``a``.
``without_rows(attn_mask, position[E], S) -> [..., S]`` and
``merge_rows(output[B, Hq, T, Dv], lse[B, Hq, T], query, key[B, H, E, D], value[B, H, E, Dv], position[E], attn_mask,
is_causal, scale, softcap, S) -> [B, Hq, T, Dv]``
    Around ``attention_decode_lse``, which knows nothing of kept rows: the mask that takes them out, and its output
    together with their attention.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icw_compile.kernels.interface import FEW_TOKENS

__all__ = [
    "ATTENTION_ARGUMENTS",
    "attention",
    "attention_decode_lse",
    "merge_rows",
    "without_rows",
]

#: What every attention over rows with a scale each takes, here and in the kernels.
ATTENTION_ARGUMENTS = (
    "Tensor query, Tensor key_qdata, Tensor key_scale, Tensor value_qdata, Tensor value_scale, "
    "Tensor? attn_mask, bool is_causal, float scale, float? softcap, Tensor? sinks=None"
)


def _in_its_own_dtypes(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(tensor, ...)`` outside of autocast: float32 is what its sums are exact in."""

    @functools.wraps(function)
    def call(first: Tensor, *arguments: Any) -> Any:
        device = first.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(first, *arguments)
        with torch.autocast(device, enabled=False):
            return function(first, *arguments)

    return call


@_in_its_own_dtypes
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        tokens = query.shape[2]
        if attn_mask.dtype.itemsize > query.dtype.itemsize and isinstance(tokens, int) and tokens <= FEW_TOKENS:
            # Of a few tokens it may be a part of the scores that was computed before, and not only a mask.
            q, k, v = (each.to(attn_mask.dtype) for each in (query, key, value))
            return grouped_attention(q, k, v, attn_mask, is_causal, scale, softcap, sinks).to(query.dtype)
        attn_mask = attn_mask.to(query.dtype)
    key, value = key.to(query.dtype), value.to(query.dtype)
    if softcap is not None or sinks is not None or key.shape[-1] != value.shape[-1]:
        # torch's fused kernels have none of these, and outside them it expands grouped heads.
        return grouped_attention(query, key, value, attn_mask, is_causal, scale, softcap, sinks)
    groups = query.shape[1] // key.shape[1]
    if attn_mask is not None and groups > 1 and query.device.type != "cpu":
        return _folded_attention(query, key, value, attn_mask, scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=bool(groups > 1)
    )


@_in_its_own_dtypes
def attention_decode_lse(
    query: Tensor,
    key_rows: Tensor,
    key_scale: Tensor,
    value_rows: Tensor,
    value_scale: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, query_heads, _, head_dim = query.shape
    heads, tokens = key_rows.shape[1:3]
    grouped = query.reshape(batch, heads, -1, 1, head_dim).float()
    # Elementwise product and sum, not a matmul: Inductor reads the rows inside the reduction, where a matmul
    # would need its operand as a float tensor in memory. The scale of a row leaves the sum.
    scores = (grouped * key_rows.unsqueeze(2).float()).sum(dim=-1) * key_scale.float().view(batch, heads, 1, tokens)
    scores = _masked(scores.unsqueeze(-2), attn_mask, is_causal, scale, softcap)
    weights, lse = _softmax(scores, sinks)
    weights = weights.squeeze(-2) * value_scale.float().view(batch, heads, 1, tokens)
    output = (weights.unsqueeze(-1) * value_rows.unsqueeze(2).float()).sum(dim=-2)
    return output.reshape(batch, query_heads, 1, -1).to(query.dtype), lse.reshape(batch, query_heads, 1)


def _attention_decode(*arguments: Any) -> Tensor:
    return attention_decode_lse(*arguments)[0]


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


def grouped_attention(
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
    scores = _product(query.reshape(batch, heads, groups * length, -1), key.transpose(-1, -2)).float()
    scores = _masked(scores.reshape(batch, heads, groups, length, tokens), attn_mask, is_causal, scale, softcap)
    weights = _softmax(scores, sinks)[0].to(value.dtype).reshape(batch, heads, groups * length, tokens)
    return _product(weights, value).reshape(batch, query_heads, length, -1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a[B, H, M, K] @ b[B, H, K, N]``. ``matmul`` of fake tensors fixes symbolic sizes in torch 2.11."""
    batch, heads = a.shape[:2]
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, (batch, heads))


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


def unite_positions(a: Tensor, b: Tensor) -> Tensor:
    known = (b.unsqueeze(-1) == a).any(dim=-1)
    return torch.cat([a, torch.where(known, -1, b)])


@_in_its_own_dtypes
def merge_rows(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    tokens: int,
) -> Tensor:
    batch, query_heads, length, _ = query.shape
    heads, rows = key.shape[1:3]
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
    scores = _product(grouped, key.float().transpose(-1, -2))
    scores = _masked(scores.reshape(batch, heads, -1, length, rows), mask, False, scale, softcap)
    weights, exact_lse = _softmax(scores, None)
    exact = _product(weights.reshape(batch, heads, -1, rows), value.float())
    exact = exact.reshape(batch, query_heads, length, -1)
    exact_lse = exact_lse.reshape(batch, query_heads, length)
    # Each part weighs as much as its sum, and neither if there is nothing in both.
    empty = (exact_lse == -torch.inf) & (lse == -torch.inf)
    share = torch.where(empty, 0.0, torch.sigmoid(exact_lse - lse)).unsqueeze(-1)
    apart = output.float()
    return (apart + share * (exact - apart)).to(output.dtype)


def _register() -> None:
    rows = f"({ATTENTION_ARGUMENTS})".replace("_qdata", "_rows")
    schemas: dict[str, tuple[str, Callable[..., Any]]] = {
        "attention": (
            "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale, float? softcap, "
            "Tensor? sinks=None) -> Tensor",
            attention,
        ),
        "attention_decode": (f"{rows} -> Tensor", _attention_decode),
        "attention_decode_lse": (f"{rows} -> (Tensor output, Tensor lse)", attention_decode_lse),
        "unite_positions": ("(Tensor a, Tensor b) -> Tensor", unite_positions),
        "without_rows": ("(Tensor? attn_mask, Tensor position, SymInt tokens) -> Tensor", without_rows),
        "merge_rows": (
            "(Tensor output, Tensor lse, Tensor query, Tensor key, Tensor value, Tensor position, "
            "Tensor? attn_mask, bool is_causal, float scale, float? softcap, SymInt tokens) -> Tensor",
            merge_rows,
        ),
    }
    for name, (schema, function) in schemas.items():
        torch.library.define(f"icw_int8kv::{name}", schema)
        torch.library.impl(f"icw_int8kv::{name}", "CompositeImplicitAutograd", function)


_register()
