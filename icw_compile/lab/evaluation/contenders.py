"""What is compared: each contender is a model to call and a cache to call it with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, QuantizedCache, StaticCache

from icw_compile.compat.transformers import StaticLayer, unregistered

__all__ = ["FLOAT", "FLOAT_COMPILED", "HQQ", "HQQ_4", "QUANTO_4", "Contender", "contenders", "fp8_cache", "has_hqq"]

FLOAT = "float"
FLOAT_COMPILED = "float, compiled"
HQQ = "HQQ 8-bit, last 128 tokens float"
HQQ_4 = "HQQ 4-bit, last 128 tokens float"
QUANTO_4 = "quanto 4-bit, last 128 tokens float"
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass
class Contender:
    """A row of the table.

    Attributes:
        name: what the row is called.
        call: the model, compiled or not.
        make_cache: a new empty cache that holds the given number of tokens.
        options: what a row of ours was compiled with.
    """

    name: str
    call: Callable[..., Any]
    make_cache: Callable[[int], Cache]
    options: Mapping[str, Any] | None = None


def contenders(model: PreTrainedModel, settings: Sequence[Mapping[str, Any]], others: bool = True) -> list[Contender]:
    """The float cache, which the rest is compared with; ours with each of the settings; the others.

    Those are: the float cache of the model as ``torch.compile`` has it, whose distance comes from what it does not
    round; HQQ, if installed, in 4 bits as well if a setting has them, and then quanto's 4 bits too; and fp8. All rows
    share one model: Dynamo keeps what it compiles for one backend from another.
    """

    def static(length: int) -> StaticCache:
        return StaticCache(model.config, max_cache_len=length)

    rows = [Contender(FLOAT, model, static)]
    for options in settings:
        name = " ".join(["icw_int8kv", *(f"{key}={value}" for key, value in options.items())])
        # Static shapes: a decode step of several tokens whose number is symbolic would get the lowering of a prefill.
        compiled = torch.compile(model, backend="icw_int8kv", dynamic=False, options=dict(options) or None)
        rows.append(Contender(name, compiled, static, options))
    if not others:
        return rows
    rows.append(Contender(FLOAT_COMPILED, torch.compile(model, dynamic=False), static))
    has_four = any(options.get(f"icw.{n}") == 4 for options in settings for n in ("bits", "key_bits", "value_bits"))
    if has_hqq():
        # Groups along the head of each token, as transformers' guide has it for this backend.
        hqq = partial(_quantized, "hqq", model, 1)
        rows.append(Contender(HQQ, model, partial(hqq, 8)))
        if has_four:
            rows.append(Contender(HQQ_4, model, partial(hqq, 4)))
    if has_four and find_spec("optimum") is not None and find_spec("optimum.quanto") is not None:
        rows.append(Contender(QUANTO_4, model, partial(_quantized, "quanto", model, 0, 4)))  # its own default axis
    rows.append(Contender("fp8 per tensor", model, lambda length: fp8_cache(model, length)))
    return rows


def _quantized(backend: str, model: PreTrainedModel, axis: int, bits: int, length: int) -> Cache:
    return QuantizedCache(backend, model.config, nbits=bits, axis_key=axis, axis_value=axis)


def has_hqq() -> bool:
    """Whether transformers' `QuantizedCache` finds its 8-bit backend."""
    return find_spec("hqq") is not None


def fp8_cache(model: PreTrainedModel, max_cache_len: int) -> StaticCache:
    """A float `StaticCache` that holds what a float8_e4m3fn cache with one scale per tensor would read back.

    Keys and values of a layer have one scale each, set by the amplitude of the first write (the prefill); what exceeds
    it later saturates, as in serving software that calibrates once. For models that are not compiled.
    """
    cache = StaticCache(model.config, max_cache_len=max_cache_len)
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.__class__ = _storing_fp8(type(layer))
    return cache


def _storing_fp8(stock: Any) -> Any:
    stock = unregistered(stock)

    class FP8Layer(stock):
        scales: tuple[Tensor, ...] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            states = (key_states, value_states)
            if self.scales is None:
                self.scales = tuple(x.float().abs().amax().clamp(min=1e-12) / _LARGEST for x in states)
            stored = [_round_trip(x, scale) for x, scale in zip(states, self.scales, strict=True)]
            return super().update(*stored, *args, **kwargs)

    return FP8Layer


def _round_trip(x: Tensor, scale: Tensor) -> Tensor:
    quantized = (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return (quantized.float() * scale).to(x.dtype)
