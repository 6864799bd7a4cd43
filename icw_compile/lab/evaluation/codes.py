"""Ways to store rows in 4 bits, in plain torch, to compare at equal bytes: a cache holds what each would read back.

Every code is a function of float32 rows ``[..., D]`` to what is read back of them. Numbers that a code stores besides
its 4 bits are of bfloat16; `bits_per_number` counts them. ``equalized`` ones divide outlier channels as the cache does;
``rotated`` ones are multiplied by a Hadamard matrix before, and by it again behind, which attention would do with the
query and the output.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from icw_compile.compat.transformers import StaticLayer, unregistered
from icw_compile.lab.evaluation.contenders import Contender
from icw_compile.lab.reference import FEW_TOKENS, channel_shift, four_bits

__all__ = ["CODES", "Code", "code_contender"]


class Code(NamedTuple):
    """A code, and what it takes for each number of rows of 64."""

    read_back: Callable[[Tensor], Tensor]
    bits_per_number: float
    equalizes: bool = True


def _stored(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.where(scale == 0, 1.0, scale)


def symmetric(x: Tensor, group: int) -> Tensor:
    """Steps from -7 to 7, a scale for each group."""
    x = x.unflatten(-1, (-1, group))
    scale = _stored(x.abs().amax(-1, keepdim=True) / 7)
    return (_divided(x, scale).round().clamp(-7, 7) * scale).flatten(-2)


def q4_0(x: Tensor, group: int) -> Tensor:
    """Steps from -8 to 7, of which -8 is the group's largest number: the rule of llama.cpp's type of that name."""
    x = x.unflatten(-1, (-1, group))
    scale = _stored(x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -8)
    return (_divided(x, scale).round().clamp(-8, 7) * scale).flatten(-2)


def with_zero(x: Tensor, group: int) -> Tensor:
    """16 steps from the smallest number of each group to the largest one: a scale and a zero point."""
    x = x.unflatten(-1, (-1, group))
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = _stored((most - least) / 15), _stored(least)
    return (_divided(x - zero, scale).round().clamp(0, 15) * scale + zero).flatten(-2)


#: Levels for normal numbers over the largest of 64 of them: Lloyd's, in 127ths.
_NORMAL = (-121, -95, -75, -59, -44, -31, -18, -6, 6, 18, 31, 44, 59, 75, 95, 121)


def nonuniform(x: Tensor, group: int) -> Tensor:
    """Levels that are denser near zero, a scale for each group."""
    x, levels = x.unflatten(-1, (-1, group)), torch.tensor(_NORMAL, dtype=torch.float32, device=x.device)
    scale = _stored(x.abs().amax(-1, keepdim=True) / 127)
    at = torch.bucketize(_divided(x, scale).contiguous(), (levels[1:] + levels[:-1]) / 2)
    return (levels[at] * scale).flatten(-2)


def rotated(x: Tensor, code: Callable[[Tensor], Tensor]) -> Tensor:
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / math.sqrt(len(matrix))
    return code(x @ matrix) @ matrix


two_tables = partial(four_bits, scale_dtype=torch.bfloat16)

#: Name -> code. The first is what ``icw.bits=4`` stores.
CODES: dict[str, Code] = {
    "two tables, equalized": Code(two_tables, 4.5),
    "two tables": Code(two_tables, 4.5, False),
    "two tables, rotated": Code(partial(rotated, code=two_tables), 4.5, False),
    "a scale for each row, equalized": Code(partial(symmetric, group=64), 4.25),
    "a scale for each 32, equalized": Code(partial(symmetric, group=32), 4.5),
    "a scale and a zero, equalized": Code(partial(with_zero, group=64), 4.5),
    "a scale and a zero for each 32, equalized": Code(partial(with_zero, group=32), 5.0),
    "nonuniform, a scale for each 32, equalized": Code(partial(nonuniform, group=32), 4.5),
    "the rule of q4_0, equalized": Code(partial(q4_0, group=32), 4.5),
    "the rule of q4_0": Code(partial(q4_0, group=32), 4.5, False),
    "the rule of q4_0, rotated": Code(partial(rotated, code=partial(q4_0, group=32)), 4.5, False),
}


def code_contender(model: PreTrainedModel, name: str) -> Contender:
    """A float cache of the model, which is not compiled, that reads keys and values back from a code.

    Raises:
        ValueError: there is no such code.
    """
    if name not in CODES:
        raise ValueError(f"Unknown code {name!r}. There are: {'; '.join(CODES)}; all.")
    code = CODES[name]

    def make(length: int) -> StaticCache:
        cache = StaticCache(model.config, max_cache_len=length)
        for layer in cache.layers:
            if isinstance(layer, StaticLayer):
                layer.__class__ = _reading_back(type(layer), code)
        return cache

    return Contender(f"4 bits: {name}", model, make)


def _reading_back(stock: Any, code: Code) -> Any:
    stock = unregistered(stock)

    class Coded(stock):
        shifts: tuple[Any, ...] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            states = (key_states, value_states)
            if self.shifts is None:
                self.shifts = tuple(channel_shift(x) if code.equalizes else 0.0 for x in states)
            factors = [2.0**shift for shift in self.shifts]
            stored = [
                (code.read_back(x.float() / factor) * factor).to(x.dtype)
                for x, factor in zip(states, factors, strict=True)
            ]
            held = super().update(*stored, *args, **kwargs)
            own = key_states.shape[-2]
            if own <= FEW_TOKENS:
                return held
            # A prompt, which comes first here, attends to its own as they came.
            return tuple(torch.cat([x, h[..., own:, :]], -2) for x, h in zip(states, held, strict=True))

    return Coded
