"""The reference that the backend must equal: float caches that store what the int8 cache would read back.

Independent of the rest of the package on purpose: plain torch and transformers' own cache layers, no operation of
ours. The tests, the sweep over model types and anyone who doubts a number compare with it.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer

__all__ = ["dynamic_reference_cache", "quantize_dequantize", "reference_cache"]


def quantize_dequantize(x: Tensor) -> Tensor:
    """What the cache stores of ``x``: int8 with a scale for each row of the last dimension. No operation of ours."""
    scale_dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    scale = (x.float().abs().max(dim=-1, keepdim=True).values / 127.0).to(scale_dtype).float()
    steps = torch.round(x.float() / torch.where(scale > 0, scale, torch.ones_like(scale))).clamp(-127.0, 127.0)
    return (steps * scale).to(x.dtype)


def _storing_quantized(stock: Any) -> Any:
    """The cache layer class ``stock``, but what a layer is given is quantized and dequantized first."""

    class Reference(stock):
        _layer_type = None  # stay out of transformers' table of layers

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            new = quantize_dequantize(key_states), quantize_dequantize(value_states)
            return super().update(*new, *args, **kwargs)

    return Reference


def _storing_quantized_window(stock: Any) -> Any:
    """The same for a static window, whose attention sees a prompt longer than it as it came."""

    class Reference(_storing_quantized(stock)):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            overflows = self.cumulative_length_int == 0 and key_states.shape[-2] > self.max_cache_len
            if not overflows:
                return super().update(key_states, value_states, *args, **kwargs)
            # Attention sees the prompt itself, which is not in the cache: only its tail is.
            states = stock.update(self, key_states, value_states, *args, **kwargs)
            self.keys.copy_(quantize_dequantize(self.keys))
            self.values.copy_(quantize_dequantize(self.values))
            return states

    return Reference


def reference_cache(model: PreTrainedModel, max_cache_len: int, layers: Collection[int] | None = None) -> StaticCache:
    """A float `StaticCache` in which every stored key and value has been quantized and dequantized.

    Layers whose state is no keys and values (convolutions, linear attention) are the stock ones. ``layers``, if given,
    are the indices of those to quantize.
    """
    return _quantizing(StaticCache(model.config, max_cache_len=max_cache_len), layers)


def dynamic_reference_cache(model: PreTrainedModel, layers: Collection[int] | None = None) -> DynamicCache:
    """A float `DynamicCache` in which every key and value has been quantized and dequantized; ``layers`` as above."""
    return _quantizing(DynamicCache(config=model.config), layers)


def _quantizing(cache: Any, layers: Collection[int] | None) -> Any:
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, (DynamicLayer, StaticLayer)) and (layers is None or i in layers):
            window = isinstance(layer, StaticSlidingWindowLayer)
            layer.__class__ = (_storing_quantized_window if window else _storing_quantized)(type(layer))
    return cache
