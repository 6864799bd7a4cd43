"""Attention of a prompt on the CPU, which reads no more of a boolean mask, and of the keys, than it has to.

A prompt on a static cache has a mask of all rows of the cache. torch's kernel computes every score, those that the mask
takes out as well, and turns the mask into floats for it: for a first prompt twice the work, and twice the mask's memory
besides. What the mask says is looked at once for all layers, and where it is known what it says, the kernel is told so.

``mask_extent(attn_mask[B, Hm, T, S]) -> int64 [2]``
    For a boolean mask: how many tokens there are up to the last that any row sees; and 1 if each row sees exactly the
    tokens up to its own, as in a first prompt without padding, else 0.
``prompt_attention(query[B, Hq, T, D], key[B, H, S, D], value[B, H, S, D], attn_mask, extent, scale) -> [B, Hq, T, D]``
    `icw_compile.kernels.inductor.attention` with this mask, of which ``extent`` is what `mask_extent` gives. Laid out
    as ``[B, T, Hq, D]``, as torch's kernel does it.
"""

import torch
from torch import Tensor

from icw_compile.kernels.inductor import attention

__all__ = ["mask_extent", "prompt_attention"]

#: Rows of a mask that are looked at together.
_ROWS = 256


def mask_extent(attn_mask: Tensor) -> Tensor:
    rows = attn_mask.shape[-2]
    seen = attn_mask.any(dim=(0, 1, 2)).nonzero()
    end = int(seen[-1]) + 1 if len(seen) else 1
    is_causal = end == rows and all(map(_is_causal, attn_mask.split(_ROWS, dim=-2), range(0, rows, _ROWS)))
    return torch.tensor([end, int(is_causal)], device=attn_mask.device)


def _is_causal(rows: Tensor, first: int) -> bool:
    own = torch.arange(first, first + rows.shape[-2], device=rows.device).unsqueeze(-1)
    return bool((rows == (torch.arange(rows.shape[-1], device=rows.device) <= own)).all())


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, extent: Tensor, scale: float
) -> Tensor:
    end, is_causal = extent.tolist()
    mask = None if is_causal else attn_mask.narrow(-1, 0, end)
    output = attention(query, key.narrow(2, 0, end), value.narrow(2, 0, end), mask, bool(is_causal), scale, None)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_output(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, extent: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, size = query.shape
    return query.new_empty((batch, tokens, heads, size)).transpose(1, 2)


for _schema, _function, _fake in (
    (
        "mask_extent(Tensor attn_mask) -> Tensor",
        mask_extent,
        lambda attn_mask: attn_mask.new_empty((2,), dtype=torch.int64),
    ),
    (
        "prompt_attention(Tensor query, Tensor key, Tensor value, Tensor attn_mask, Tensor extent, float scale) "
        "-> Tensor",
        prompt_attention,
        _empty_output,
    ),
):
    _name, _, _arguments = _schema.partition("(")
    torch.library.define(f"icw_int8kv::{_name}", f"({_arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"icw_int8kv::{_name}", "CompositeExplicitAutograd", _function)
    torch.library.register_fake(f"icw_int8kv::{_name}", _fake)
