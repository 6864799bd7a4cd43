"""Quantized caches made before the first compiled call, and the size of any cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.compat.transformers import StaticLayer, heads_of_rank, initialize, layer_sizes
from icw_compile.formats import Format, make_format, recent_tokens_for

__all__ = ["cache_bytes", "static_cache"]


def static_cache(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    batch_size: int,
    max_cache_len: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    bits: int = 8,
    key_bits: int | None = None,
    value_bits: int | None = None,
    equalize: bool = True,
    sink_tokens: int = 0,
    recent_tokens: int | None = None,
) -> StaticCache:
    """A transformers `StaticCache` whose layers already hold quantized zeros.

    Layers that keep no keys and values are as transformers makes them: those that read another layer's, and those of
    linear attention, whose states have one size for all lengths.

    Use it to allocate the cache once: to reuse it with ``reset()``, to start with a prefill that is not compiled, or
    to know beforehand that it fits.

    Args:
        model_or_config: the model that will use it, or its configuration. A model that is split over several processes
            gets a cache for the heads of this one.
        batch_size: sequences in the batch.
        max_cache_len: tokens that a full-attention layer holds; a sliding layer holds at most its window.
        dtype: the dtype of the model: float32, bfloat16 or float16. Taken from the model or configuration if left out.
        device: where to put it. Taken from the model if left out, else the CPU.
        bits: of each stored number, 8 or 4; ``key_bits`` and ``value_bits`` the same of the keys or the values alone.
        equalize: shift outlier channels; see `QuantizedKV`.
        sink_tokens, recent_tokens: how many of the first tokens, and of the last, are kept in ``dtype`` besides. If
            left out, the last 128 of what is stored in 4 bits, and of 8 bits the last 32 on the CPU.

    Raises:
        TypeError: the dtype is not one of the three.
        ValueError: other numbers of bits, a model that keeps keys and values in no layer, or heads that do not divide
            among ranks.
    """
    if isinstance(model_or_config, PreTrainedModel):
        config = model_or_config.config
        dtype = dtype or model_or_config.dtype
        device = device or model_or_config.device
    else:
        config = model_or_config
    device = torch.device(device or "cpu")
    config = config.get_text_config(decoder=True)
    dtype = dtype or config.dtype or torch.get_default_dtype()
    cache = StaticCache(config, max_cache_len=max_cache_len)
    layouts = [
        make_format(
            dtype,
            bits=each,
            equalize=equalize,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens_for(each, device) if recent_tokens is None else recent_tokens,
        )
        for each in (key_bits or bits, value_bits or bits)
    ]
    own = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, StaticLayer)}
    if not own:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
        raise ValueError(f"{config.model_type} keeps keys and values in no layer: its cache is of {kinds}")
    sizes = layer_sizes(model_or_config)
    for i, layer in own.items():
        states = [
            torch.empty(batch_size, heads_of_rank(model_or_config, heads), 0, size, dtype=dtype, device=device)
            for heads, size in sizes[i]
        ]
        _initialize(layer, states, layouts)
    return cache


def _initialize(layer: StaticLayer, states: Sequence[Tensor], layouts: Sequence[Format]) -> None:
    """Let transformers set up the layer, with `QuantizedKV` in place of the float tensors that it makes."""
    device = states[0].device
    counters = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}
    initialize(layer, *(torch.empty_like(each, device="meta") for each in states))  # no float storage is made
    layer.device = device
    for name, like, layout in zip(("keys", "values"), states, layouts, strict=True):
        setattr(layer, name, QuantizedKV.empty(getattr(layer, name).shape, layout, like.device))
    for name, value in counters.items():
        value = value.to(device)
        torch._dynamo.mark_static_address(value)
        setattr(layer, name, value)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that ``cache`` holds, as stored: a `QuantizedKV` counts its parts."""
    return sum(_tensor_bytes(getattr(layer, name, None)) for layer in cache.layers for name in ("keys", "values"))


def _tensor_bytes(tensor: Any) -> int:
    if tensor is None:
        return 0
    return tensor.stored_bytes if isinstance(tensor, QuantizedKV) else tensor.nbytes
