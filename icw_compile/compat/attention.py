"""torch's own attention kernels. Read and run in torch 2.13."""

import torch
from torch import Tensor

__all__ = ["attention_with_lse"]


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """torch's attention for the CPU, and the logarithm of the sums of exponentials that its rows were divided by.

    ``torch.ops.aten._scaled_dot_product_flash_attention_for_cpu``, which ``scaled_dot_product_attention`` calls there.

    Args:
        query: ``[B, H, T, D]`` on the CPU, of float32, bfloat16 or float16, as ``key`` and ``value`` ``[B, H, S, D]``.
        is_causal: row ``i`` sees the tokens up to ``i``.

    Returns:
        ``[B, H, T, D]`` and, in float32, ``[B, H, T]``.
    """
    # It takes channels for contiguous, and does not look.
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    output, lse = flash(query, key, value, 0.0, is_causal, scale=scale)
    return output, lse
