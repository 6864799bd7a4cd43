"""What operations on fakes of a `QuantizedKV` return, worked out once for all layers of a model that are alike.

Dynamo runs each operation of the model on fakes, to know the shape of what it returns. On one of ours that is an
operation for each of its parts, and the layers ask for the same one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icw_compile.cache.parts import Layout, TensorOfParts
from icw_compile.compat.fx import FakeLayout, is_fake, noted_for, storage_of
from icw_compile.passes.graph import layout_of

__all__ = ["CallOfShapes", "call_of_shapes"]

#: What an operator with one of these returns does not follow from layouts.
_TAGS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)


class _NotAlike(Exception):
    """A call that no other is taken to be like."""


@dataclass(frozen=True)
class _Written:
    """The first operand, which was written into."""


@dataclass(frozen=True)
class _Made:
    """A tensor: what it is made of, and in the memory of which part of the operands each lies, if in one of them."""

    layout: Layout
    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    parts: tuple[tuple[FakeLayout, int | None], ...]


@dataclass(frozen=True)
class CallOfShapes:
    """An operation on fakes of ours.

    Attributes:
        key: what it is alike by: the operation, its numbers, the layouts of its operands, and which share memory.
        first: the first operand.
        parts: what all of its operands are made of.
    """

    key: Any
    first: TensorOfParts
    parts: tuple[Tensor, ...]

    def again(self) -> Any:
        """What it returns, if one like it was run; else ``None``."""
        made = noted_for(self.parts[0]).get(self.key)
        return [self._another(each) for each in made] if isinstance(made, list) else self._another(made)

    def learn(self, result: Any) -> None:
        """Note what it returned: tensors of ours, or the first operand, if it wrote into that."""
        memories = [storage_of(part) for part in self.parts]

        def described(made: TensorOfParts) -> Any:
            if made is self.first:
                return _Written()
            parts = [
                (FakeLayout(part), memories.index(memory) if (memory := storage_of(part)) in memories else None)
                for part in made.buffers
                if is_fake(part)
            ]
            return _Made(made._layout, tuple(made.shape), made.stride(), tuple(parts))

        several = isinstance(result, (list, tuple))
        noted_for(self.parts[0])[self.key] = list(map(described, result)) if several else described(result)

    def _another(self, made: Any) -> Any:
        if not isinstance(made, _Made):
            return self.first if isinstance(made, _Written) else None
        parts = [layout.another(None if memory is None else self.parts[memory]) for layout, memory in made.parts]
        return self.first._make(parts, made.layout, made.size, made.stride)


def call_of_shapes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> CallOfShapes | None:
    """The call, if what it returns follows from the layouts of what it is given: fakes, of which the first is ours."""
    if set(_TAGS) & set(func.tags) or not isinstance(args[0], TensorOfParts):
        return None
    parts: list[Tensor] = []
    try:
        key = func, _frozen(args, parts), _frozen(tuple(kwargs.items()), parts)
    except _NotAlike:
        return None
    memories = [storage_of(part) for part in parts]
    return CallOfShapes((key, tuple(map(memories.index, memories))), args[0], tuple(parts))


def _frozen(value: Any, parts: list[Tensor]) -> Any:
    if isinstance(value, TensorOfParts):
        if value._claim is not None or value._root is not None:
            raise _NotAlike
        inner = tuple(_frozen(part, parts) for part in value.buffers)
        return value._layout, layout_of(value.shape), layout_of(value.stride()), inner
    if isinstance(value, Tensor):
        if not is_fake(value):
            raise _NotAlike
        parts.append(value)
        return layout_of(value), layout_of(value.storage_offset())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_frozen(each, parts) for each in value)
    return layout_of(value)
