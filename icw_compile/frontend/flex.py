"""``flex_attention`` spelled out in operations that the passes know.

Dynamo captures it as a higher-order operator with a graph for the mask and one for the change of each score. Both are
evaluated here on all positions at once, which leaves attention with a dense mask: the passes make that read int8, as
they do where a model's attention is spelled that way.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from icw_compile.compat.dynamo import example_value

__all__ = ["is_elementwise", "spell_out"]


def is_elementwise(module: GraphModule) -> bool:
    """Whether a captured ``mask_mod`` or ``score_mod`` may be called with all positions at once, broadcast.

    That is so where each of its values is a scalar: made of scalars alone, or of a tensor indexed in all dimensions.
    """
    called = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    return all(
        node.op in ("call_function", "call_method") and getattr(example_value(node), "ndim", 0) == 0 for node in called
    )


def spell_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: GraphModule,
    block_mask: Sequence[Any],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_buffers: Sequence[Any] = (),
    mask_mod_buffers: Sequence[Any] = (),
    *,
    log_sum: bool,
) -> tuple[Tensor, Tensor | None, None]:
    """What the higher-order operator of these arguments returns: output, log-sum-exp, no largest scores.

    Args:
        query, key, value: ``[B, Hq, T, D]``, ``[B, H, S, D]``, ``[B, H, S, Dv]``.
        score_mod: ``(score, b, h, q, kv, *buffers) -> score``, elementwise.
        block_mask: its last element is ``mask_mod(b, h, q, kv, *buffers) -> bool``, elementwise.
        scale: of the products.
        kernel_options: how a kernel would do it; not used.
        log_sum: whether the second result is wanted, float32 ``[B, Hq, T]``.
    """
    sizes = (*query.shape[:3], key.shape[2])
    positions = [
        torch.arange(size, device=query.device).view([-1 if i == dim else 1 for i in range(4)])
        for dim, size in enumerate(sizes)
    ]
    mask = torch.as_tensor(block_mask[-1](*positions, *mask_mod_buffers), device=query.device)
    mask = mask.view([1] * (4 - mask.dim()) + list(mask.shape)).expand(-1, -1, sizes[2], sizes[3])
    groups = sizes[1] // key.shape[1]
    changes = any(node.op not in ("placeholder", "output") for node in score_mod.graph.nodes)
    if not changes and not log_sum:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=groups > 1)
        return output, None, None
    key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if changes:
        scores = score_mod(scores, *positions, *score_mod_buffers)
    scores = torch.where(mask, scores, -torch.inf)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    # A row without any position gives zeros.
    output = torch.where(mask.any(-1, keepdim=True), torch.matmul(weights, value), 0.0)
    return output, torch.logsumexp(scores, dim=-1) if log_sum else None, None
