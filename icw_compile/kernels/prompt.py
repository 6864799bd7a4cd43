"""Attention of a prompt on the CPU, which reads no more of a boolean mask, and of the keys, than it has to.

A prompt on a static cache has a mask of all rows of the cache. torch's kernel computes every score, those that the mask
takes out as well, and turns the mask into floats for it: for a first prompt twice the work, and twice the mask's memory
besides. What the mask says is looked at once for all layers, and where it is known what it says, the kernel is told so.

In bfloat16 on a processor with AVX-512 VNNI, bfloat16 and no AMX, the kernel is our own, ``icw_int8kv_cpu::prompt``:
torch's takes three times as long there. Otherwise it is torch's.

``mask_extent(attn_mask[B, Hm, T, S]) -> int64 [2]``
    For a boolean mask: how many tokens ``E`` there are up to the last that any row sees; and 1 if the rows see exactly
    the tokens up to their own, which are the last ``T`` of those, else 0: a prompt without padding, and no window.
``prompt_attention(query[B, Hq, T, D], key[B, H, S, D], value[B, H, S, D], attn_mask, extent, scale) -> [B, Hq, T, D]``
    `icw_compile.kernels.inductor.attention` with this mask, of which ``extent`` is what `mask_extent` gives, or,
    without both, for ``S == T``, causal attention. Laid out as ``[B, T, Hq, D]``, as torch's kernel does it. Behind
    many tokens, without padding, no score is computed in vain: for torch's kernel, those of the tokens before the
    prompt, for which all query heads of a group are rows of one head, and those of its own are put together.
"""

from typing import Any

import torch
from torch import Tensor

from icw_compile.compat.attention import attention_with_lse
from icw_compile.kernels import cpu
from icw_compile.kernels.inductor import attention

__all__ = ["mask_extent", "prompt_attention"]

#: Rows of a mask that are looked at together.
_ROWS = 256
#: Tokens before a prompt from which on torch's kernel takes less time twice, without a mask, than once with one.
_MANY = 4096


def mask_extent(attn_mask: Tensor) -> Tensor:
    rows = attn_mask.shape[-2]
    seen = attn_mask.any(dim=(0, 1, 2)).nonzero()
    end = int(seen[-1]) + 1 if len(seen) else 1
    pieces = zip(attn_mask.split(_ROWS, dim=-2), range(end - rows, end, _ROWS), strict=True)
    is_causal = end >= rows and all(_is_causal(piece, own) for piece, own in pieces)
    return torch.tensor([end, int(is_causal)], device=attn_mask.device)


def _is_causal(rows: Tensor, first: int) -> bool:
    own = torch.arange(first, first + rows.shape[-2], device=rows.device).unsqueeze(-1)
    return bool((rows == (torch.arange(rows.shape[-1], device=rows.device) <= own)).all())


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, extent: Tensor | None, scale: float
) -> Tensor:
    is_causal = True
    if attn_mask is not None and extent is not None:
        end, is_causal = extent.tolist()
        key, value, attn_mask = key.narrow(2, 0, end), value.narrow(2, 0, end), attn_mask.narrow(-1, 0, end)
    before = key.shape[2] - query.shape[2]
    if _is_ours(query, key, value):
        ours = torch.ops.icw_int8kv_cpu.prompt.default
        return ours(query, key, value, None if is_causal else attn_mask, is_causal, scale).transpose(1, 2)
    if is_causal and before == 0:
        output = attention(query, key, value, None, True, scale, None)
    elif is_causal and before >= _MANY:
        output = _behind(query, key, value, before, scale)
    else:
        output = attention(query, key, value, attn_mask, False, scale, None)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _is_ours(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and key.stride(3) == value.stride(3) == 1
        and cpu.is_for_prompts(query.shape[3])
    )


def _behind(query: Tensor, key: Tensor, value: Tensor, before: int, scale: float) -> Tensor:
    """Causal attention of the last tokens, with ``before`` others in front of them."""
    batch, query_heads, tokens, size = query.shape
    heads = key.shape[1]
    # Each row of these sees all of them, so that it does not matter whose row it is.
    folded = query.reshape(batch, heads, query_heads // heads * tokens, size)
    old, old_lse = attention_with_lse(folded, key[:, :, :before], value[:, :, :before], is_causal=False, scale=scale)
    own = [x[:, :, before:].repeat_interleave(query_heads // heads, dim=1) for x in (key, value)]
    new, new_lse = attention_with_lse(query, *own, is_causal=True, scale=scale)
    share = torch.sigmoid(new_lse - old_lse.reshape(new_lse.shape)).unsqueeze(-1)
    return torch.lerp(old.reshape(query.shape).float(), new.float(), share).to(query.dtype)


def _empty_output(query: Tensor, *others: Any) -> Tensor:
    batch, heads, tokens, size = query.shape
    return query.new_empty((batch, tokens, heads, size)).transpose(1, 2)


for _schema, _function, _fake in (
    (
        "mask_extent(Tensor attn_mask) -> Tensor",
        mask_extent,
        lambda attn_mask: attn_mask.new_empty((2,), dtype=torch.int64),
    ),
    (
        "prompt_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? extent, float scale) "
        "-> Tensor",
        prompt_attention,
        _empty_output,
    ),
):
    _name, _, _arguments = _schema.partition("(")
    torch.library.define(f"icw_int8kv::{_name}", f"({_arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"icw_int8kv::{_name}", "CompositeExplicitAutograd", _function)
    torch.library.register_fake(f"icw_int8kv::{_name}", _fake)
