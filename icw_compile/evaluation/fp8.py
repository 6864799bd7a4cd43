"""The cache that most serving software offers beside a 16-bit one: float8 with one scale per tensor."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

__all__ = ["fp8_cache"]

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class _PerTensorFP8:
    """Mixed into a static layer: what it is given is stored as float8_e4m3fn, and read back in the model's dtype.

    Keys and values have one scale each, set by the amplitude of the first write (the prefill); what exceeds it later
    saturates, as in serving software that calibrates once.
    """

    _layer_type = None  # stay out of transformers' table of layers
    scales: tuple[Tensor, ...] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        states = (key_states, value_states)
        if self.scales is None:
            self.scales = tuple(x.float().abs().amax().clamp(min=1e-12) / _LARGEST for x in states)
        stored = [_round_trip(x, scale) for x, scale in zip(states, self.scales, strict=True)]
        return super().update(*stored, *args, **kwargs)  # type: ignore[misc]


def _round_trip(x: Tensor, scale: Tensor) -> Tensor:
    quantized = (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return (quantized.float() * scale).to(x.dtype)


def fp8_cache(model: PreTrainedModel, max_cache_len: int) -> StaticCache:
    """A float `StaticCache` that holds what a per-tensor float8_e4m3fn cache would read back; for eager models."""
    cache = StaticCache(model.config, max_cache_len=max_cache_len)
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.__class__ = type("FP8Layer", (_PerTensorFP8, type(layer)), {})
    return cache
