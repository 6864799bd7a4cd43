"""The reference that the backend must equal: float caches that store what the int8 cache would read back.

Independent of the rest of the package on purpose: plain torch and transformers' own cache layers, no operation of
ours. The tests, the sweep over model types and anyone who doubts a number compare with it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

__all__ = ["dynamic_reference_cache", "quantize_dequantize", "reference_cache"]


def quantize_dequantize(x: Tensor) -> Tensor:
    """What the cache stores of ``x``: int8 with a scale for each row of the last dimension. No operation of ours."""
    scale_dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    scale = (x.float().abs().max(dim=-1, keepdim=True).values / 127.0).to(scale_dtype).float()
    steps = torch.round(x.float() / torch.where(scale > 0, scale, torch.ones_like(scale))).clamp(-127.0, 127.0)
    return (steps * scale).to(x.dtype)


class _ReferenceFull(StaticLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(quantize_dequantize(key_states), quantize_dequantize(value_states), *args, **kwargs)


class _ReferenceSliding(StaticSlidingWindowLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        overflows = self.cumulative_length_int == 0 and key_states.shape[-2] > self.max_cache_len
        if not overflows:
            new = quantize_dequantize(key_states), quantize_dequantize(value_states)
            return super().update(*new, *args, **kwargs)
        # Attention sees the prompt itself, which is not in the cache: only its tail is.
        states = super().update(key_states, value_states, *args, **kwargs)
        self.keys.copy_(quantize_dequantize(self.keys))
        self.values.copy_(quantize_dequantize(self.values))
        return states


def reference_cache(model: PreTrainedModel, max_cache_len: int) -> StaticCache:
    """A float `StaticCache` in which every stored key and value has been quantized and dequantized."""
    cache = StaticCache(model.config, max_cache_len=max_cache_len)
    cache.layers = [
        _ReferenceSliding(max_cache_len, layer.max_cache_len)
        if isinstance(layer, StaticSlidingWindowLayer)
        else _ReferenceFull(max_cache_len)
        for layer in cache.layers
    ]
    return cache


class _ReferenceDynamic(DynamicLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(quantize_dequantize(key_states), quantize_dequantize(value_states), *args, **kwargs)


class _ReferenceDynamicSliding(_ReferenceDynamic, DynamicSlidingWindowLayer):
    pass


def dynamic_reference_cache(model: PreTrainedModel) -> DynamicCache:
    """A float `DynamicCache` in which every key and value has been quantized and dequantized."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _ReferenceDynamicSliding(layer.sliding_window)
        if isinstance(layer, DynamicSlidingWindowLayer)
        else _ReferenceDynamic()
        for layer in cache.layers
    ]
    return cache
