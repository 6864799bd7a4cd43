"""The reference that the backend must equal: float caches that store what the int8 cache would read back.

Independent of the rest of the package on purpose: plain torch and transformers' own cache layers, no operation of
ours. The tests, the sweep over model types and anyone who doubts a number compare with it.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer

__all__ = ["dynamic_reference_cache", "quantize_dequantize", "reference_cache", "store_quantized"]

_NAMES = ("keys", "values")


def quantize_dequantize(x: Tensor) -> Tensor:
    """What the cache stores of ``x``: int8 with a scale for each row of the last dimension. No operation of ours."""
    scale_dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    scale = (x.float().abs().max(dim=-1, keepdim=True).values / 127.0).to(scale_dtype).float()
    steps = torch.round(x.float() / torch.where(scale > 0, scale, torch.ones_like(scale))).clamp(-127.0, 127.0)
    return (steps * scale).to(x.dtype)


def _storing_quantized(stock: Any, names: Collection[str]) -> Any:
    """The cache layer class ``stock``, but those of its keys and values that ``names`` has are quantized first."""

    def quantized(states: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [quantize_dequantize(x) if name in names else x for name, x in zip(_NAMES, states, strict=True)]

    class Reference(stock):
        _layer_type = None  # stay out of transformers' table of layers

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            window = isinstance(self, StaticSlidingWindowLayer)
            if not (window and self.cumulative_length_int == 0 and key_states.shape[-2] > self.max_cache_len):
                return super().update(*quantized((key_states, value_states)), *args, **kwargs)
            # Attention sees a prompt longer than a static window as it came; only its tail is in the cache.
            states = super().update(key_states, value_states, *args, **kwargs)
            for held, stored in zip((self.keys, self.values), quantized((self.keys, self.values)), strict=True):
                held.copy_(stored)
            return states

    return Reference


def reference_cache(
    model: PreTrainedModel, max_cache_len: int, stored: Mapping[int, Collection[str]] | None = None
) -> StaticCache:
    """A float `StaticCache` in which every stored key and value has been quantized and dequantized.

    Layers whose state is no keys and values (convolutions, linear attention) are the stock ones. ``stored``, if given,
    says which to quantize: the index of a layer -> ``"keys"``, ``"values"`` or both.
    """
    return store_quantized(StaticCache(model.config, max_cache_len=max_cache_len), stored)


def dynamic_reference_cache(
    model: PreTrainedModel, stored: Mapping[int, Collection[str]] | None = None
) -> DynamicCache:
    """A float `DynamicCache` in which every key and value has been quantized and dequantized; ``stored`` as above."""
    return store_quantized(DynamicCache(config=model.config), stored)


def store_quantized(cache: Any, stored: Mapping[int, Collection[str]] | None = None) -> Any:
    """Make a float cache a reference from now on: what it holds is quantized and dequantized, and what it is given."""
    for i, layer in enumerate(cache.layers):
        names = _NAMES if stored is None else stored.get(i, ())
        if isinstance(layer, (DynamicLayer, StaticLayer)) and names:
            layer.__class__ = _storing_quantized(type(layer), names)
            for name in names:
                if (held := getattr(layer, name)) is not None:
                    setattr(layer, name, quantize_dequantize(held))
    return cache
