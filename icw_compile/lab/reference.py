"""The reference that the backend must equal: float caches that store what the int8 cache would read back.

Independent of the rest of the package on purpose: plain torch and transformers' own cache layers, no operation of
ours. The tests, the sweep over model types and anyone who doubts a number compare with it.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from icw_compile.compat.transformers import DynamicLayer, StaticLayer, StaticSlidingWindowLayer, unregistered

__all__ = [
    "FEW_TOKENS",
    "channel_shift",
    "dynamic_reference_cache",
    "four_bits",
    "quantize_dequantize",
    "reference_cache",
    "store_quantized",
]

_NAMES = ("keys", "values")
#: The largest number of 8 bits of which the range is symmetric.
_LEVELS = 2.0**7 - 1.0
#: A call of more tokens than these attends to its own keys and values as they came.
FEW_TOKENS = 16
#: The shifts that no more tokens than these have settled are settled once more.
TELLING_TOKENS = 16


def channel_shift(x: Tensor, least: int = 2) -> Tensor:
    """The exponents of the powers of two by which the cache divides the channels of ``x[..., tokens, head_dim]``.

    All 0 for fewer than ``least`` tokens.
    """
    if x.shape[-2] < least:
        return torch.zeros(*x.shape[:-2], 1, x.shape[-1])
    sizes = x.float().abs()
    sizes = sizes / sizes.amax(dim=-1, keepdim=True)
    # Each number that no shift keeps from being read back as zero tells nothing.
    logs = sizes.where(sizes >= 2.0**-15, math.nan).log2()
    logs = logs - logs.nanmean(dim=-1, keepdim=True)
    rows = logs.isfinite().sum(dim=-2, keepdim=True)
    usual = logs.nanmean(dim=-2, keepdim=True)
    largest = logs.nan_to_num(-math.inf).amax(dim=-2, keepdim=True).where(rows > 0, math.nan)
    above = torch.minimum(*(size - size.nanmedian(dim=-1, keepdim=True).values for size in (usual, largest)))
    return torch.where(
        (above >= math.log2(3.0)) & (rows >= least), above.floor().clamp(max=7.0), torch.zeros_like(above)
    )


def quantize_dequantize(x: Tensor, shift: Tensor | None = None, bits: int = 8) -> Tensor:
    """What the cache stores of ``x``, with a scale for each row of the last dimension. No operation of ours."""
    factor = 1.0 if shift is None else 2.0**shift
    rows = x.float() / factor
    scale_dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    if bits == 4:
        return (four_bits(rows, scale_dtype) * factor).to(x.dtype)
    scale = (rows.abs().max(dim=-1, keepdim=True).values / _LEVELS).to(scale_dtype).float()
    steps = torch.round(rows / torch.where(scale > 0, scale, torch.ones_like(scale))).clamp(-_LEVELS, _LEVELS)
    return (steps * scale * factor).to(x.dtype)


def four_bits(rows: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Finite float32 ``rows`` as they are read back from 4 bits: 16 levels for each half, of the nearest of 15 tables.

    A table has levels 22 * width apart, in 64ths of the row's scale, with their middle at 11 * width * middle.
    """
    halves = rows.unflatten(-1, (2, -1))
    least, most = halves.amin(-1, keepdim=True), halves.amax(-1, keepdim=True)
    scale = torch.maximum((most - least) / 165, torch.maximum(most, -least) / 121).amax(-2, keepdim=True)
    scale = scale.to(scale_dtype).float()
    units = (halves * torch.where(scale > 0, 64 / scale, 0.0)).round().double()
    least, most = units.amin(-1, keepdim=True), units.amax(-1, keepdim=True)
    needed = torch.maximum(((most - least) / 330).ceil(), (torch.maximum(most, -least) / 242).ceil())
    widths = torch.tensor([32.0 - i for i in range(9)] + [22.0 - 2 * i for i in range(7)]).double()
    first = (widths >= needed.clamp(max=32)).sum(-1, keepdim=True) - 1
    best, smallest = torch.zeros_like(units), torch.full_like(least, math.inf)
    for i in range(5):
        width = widths[(first + i).clamp(max=15)]
        for side in (-1, 0, 1):
            middle = (((least + most) / (22 * width) + 0.5).floor() + side).clamp(-8, 7)
            index = ((units / (11 * width) + 16 - middle) / 2).floor().clamp(0, 15)
            level = (((2 * index - 15 + middle) * 11 * width + 32) / 64).floor()
            error = (64 * level - units).clamp(-2047, 2047).square().sum(-1, keepdim=True)
            best, smallest = torch.where(error < smallest, level, best), torch.minimum(error, smallest)
    return (best.float() * scale).flatten(-2)


def _storing_quantized(
    stock: Any, bits: Mapping[str, int], sink_tokens: int, recent_tokens: int, own_as_they_came: bool
) -> Any:
    """The cache layer class ``stock``, but those of its keys and values that ``bits`` has are read back quantized.

    The first ``sink_tokens`` and the last ``recent_tokens`` are read as they are, and with ``own_as_they_came`` those
    of the call itself, if they are more than a few.
    """

    stock = unregistered(stock)

    class Reference(stock):
        def quantized(self, name: str, states: Tensor) -> Tensor:
            if name not in bits:
                return states
            shifts = self.__dict__.setdefault("shifts", {})
            # `all_keys`: a layer that keeps its prompt in front of its window, in one tensor of both.
            new, held = channel_shift(states), getattr(self, f"all_{name}", getattr(self, name, None))
            # Of one dimension: a dynamic layer that holds nothing yet, behind a prompt that is held elsewhere or not.
            if name not in shifts or held is None or held.dim() == 1:
                shifts[name] = new
            else:
                self.settle_again(name, held, states, new)
            return quantize_dequantize(states, shifts[name], bits[name])

        def settle_again(self, name: str, held: Tensor, states: Tensor, new: Tensor) -> None:
            """After one token, and when there are more than a few: by those that are held, and by several new ones."""
            first, more, shift = held[..., :TELLING_TOKENS, :], states.shape[-2], self.shifts[name]
            is_row = torch.ones_like(first[..., :1], dtype=torch.bool)
            few = torch.full_like(shift[..., :1], held.shape[-2] <= TELLING_TOKENS, dtype=torch.bool)
            if isinstance(self, StaticLayer):
                if more > 1:  # as after a reset
                    empty = (held == 0).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
                    shift = torch.where(empty, new, shift)
                is_row = (first != 0).any(dim=-1, keepdim=True)
                few = (held[..., TELLING_TOKENS:, :] == 0).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
                few &= held.shape[-2] > TELLING_TOKENS
            rows = is_row.sum(dim=-2, keepdim=True)
            tells = few & ((rows == 1) | ((rows > 0) & (rows + more > TELLING_TOKENS)))
            keeps = sink_tokens or recent_tokens  # then what is held is what came, and others than these read as stored
            read = self.seen(name, held, 0)[..., :TELLING_TOKENS, :] if keeps else first
            # What reads back as zero lies within half a step of it.
            half = (read / 2.0**shift).abs().amax(dim=-1, keepdim=True) / (2 * _LEVELS) * 2.0**shift
            both = torch.where(is_row & (read == 0), half, read.float())
            both = torch.cat([both, states.float()], dim=-2) if more > 1 else both
            is_one = (both != 0).any(dim=-1, keepdim=True).sum(dim=-2, keepdim=True) == 1
            told = torch.where(is_one, ((channel_shift(both, 1) + 1) / 2).floor(), channel_shift(both))
            self.shifts[name] = torch.where(tells, told, shift)
            changed = is_row & (self.shifts[name] != shift).any(dim=-1, keepdim=True)
            stored = read if keeps else quantize_dequantize(read, self.shifts[name], bits[name])
            first.copy_(torch.where(changed, stored, first))

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            own = key_states.shape[-2] if own_as_they_came and key_states.shape[-2] > FEW_TOKENS else 0
            window = isinstance(self, StaticSlidingWindowLayer) and not hasattr(self, "all_keys")
            overflows = window and self.cumulative_length_int == 0 and key_states.shape[-2] > self.max_cache_len
            if sink_tokens or recent_tokens:
                self.first = key_states.shape[-2] - self.max_cache_len if overflows else getattr(self, "first", 0)
                for name, states in zip(_NAMES, (key_states, value_states), strict=True):
                    self.quantized(name, states[..., self.first if overflows else 0 :, :])  # for its shift
                held = super().update(key_states, value_states, *args, **kwargs)
                if overflows:
                    return held
                return tuple(self.seen(name, states, own) for name, states in zip(_NAMES, held, strict=True))
            if not overflows:
                # What one that grows settles anew is read so, by the call as well.
                before: Any = copy.deepcopy(self) if own and isinstance(self, StaticLayer) else None
                stored = list(map(self.quantized, _NAMES, (key_states, value_states)))
                before = copy.deepcopy(self) if own and before is None else before
                held = super().update(*stored, *args, **kwargs)
                if before is None:
                    return held
                return super(Reference, before).update(key_states, value_states, *args, **kwargs)
            # Attention sees a prompt longer than a static window as it came; only its tail is in the cache.
            states = super().update(key_states, value_states, *args, **kwargs)
            self.__dict__.pop("shifts", None)
            for name in _NAMES:
                getattr(self, name).copy_(self.quantized(name, getattr(self, name)))
            return states

        def seen(self, name: str, states: Tensor, own: int) -> Tensor:
            if name not in bits:
                return states
            rows, total = states.shape[-2], int(self.get_seq_length())
            token = torch.arange(rows, device=states.device)
            if not (isinstance(self, StaticLayer) and total <= rows):
                token = token + total - rows  # the last row is the last token
            sink = (token >= self.first) & (token < self.first + sink_tokens)
            kept = sink | ((token >= total - recent_tokens - own) & (token < total))
            stored = quantize_dequantize(states, self.shifts[name], bits[name])
            return torch.where(kept.unsqueeze(-1), states, stored)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._move(lambda shift: shift.index_select(0, beam_idx))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._move(lambda shift: shift.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._move(lambda shift: shift[indices])

        def _move(self, move: Callable[[Tensor], Tensor]) -> None:
            self.shifts = {name: move(shift) for name, shift in self.__dict__.get("shifts", {}).items()}

    return Reference


def reference_cache(
    model: PreTrainedModel,
    max_cache_len: int,
    stored: Mapping[int, Collection[str]] | None = None,
    *,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    key_bits: int = 8,
    value_bits: int = 8,
) -> StaticCache:
    """A float `StaticCache` in which every stored key and value has been quantized and dequantized.

    Layers whose state is no keys and values (convolutions, linear attention) are the stock ones. ``stored``, if given,
    says which to quantize: the index of a layer -> ``"keys"``, ``"values"`` or both. ``sink_tokens`` and
    ``recent_tokens``, at the start and at the end, are left as they are.
    """
    cache = StaticCache(model.config, max_cache_len=max_cache_len)
    return store_quantized(cache, stored, sink_tokens, recent_tokens, key_bits=key_bits, value_bits=value_bits)


def dynamic_reference_cache(
    model: PreTrainedModel,
    stored: Mapping[int, Collection[str]] | None = None,
    *,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    key_bits: int = 8,
    value_bits: int = 8,
) -> DynamicCache:
    """A float `DynamicCache` in which every key and value has been quantized and dequantized; the rest as above."""
    cache = DynamicCache(config=model.config)
    return store_quantized(cache, stored, sink_tokens, recent_tokens, key_bits=key_bits, value_bits=value_bits)


def store_quantized(
    cache: Any,
    stored: Mapping[int, Collection[str]] | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    *,
    own_as_they_came: bool = True,
    key_bits: int = 8,
    value_bits: int = 8,
) -> Any:
    """Make a float cache a reference from now on: what it holds is quantized and dequantized, and what it is given.

    ``own_as_they_came``: a call of more than a few tokens attends to its own as they came. Of a cache for
    cross-attention, these are not the tokens of the query: then it is for whoever knows how many those are.
    """

    def reference(stock: Any, names: Collection[str]) -> Any:
        bits = {name: of for name, of in zip(_NAMES, (key_bits, value_bits), strict=True) if name in names}
        return _storing_quantized(stock, bits, sink_tokens, recent_tokens, own_as_they_came)

    for i, layer in enumerate(cache.layers):
        names = _NAMES if stored is None else stored.get(i, ())
        if isinstance(layer, (DynamicLayer, StaticLayer)) and names:
            layer.__class__ = reference(type(layer), names)
            for name in names:
                held = getattr(layer, name)
                # A layer without tokens has none, or a tensor of another shape.
                if not (sink_tokens or recent_tokens) and held is not None and held.numel():
                    setattr(layer, name, layer.quantized(name, held))
    if (later := cache.layer_class_to_replicate) is not None:  # layers that are made when they are written
        cache.layer_class_to_replicate = reference(later, _NAMES)
    return cache
