"""The evaluators of tensors: eager ones, the fakes that stand for them while a compiler traces, and sizes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["EAGER", "SHAPES", "SIZES", "Allocation"]

aten = torch.ops.aten


class _Eager:
    """The `icw_compile.formats.Evaluator` that runs each operation."""

    view = aten.view.default
    takes_effect = True
    is_eager = True

    def call(self, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def tensor(self, operand: Tensor) -> Tensor:
        return operand

    def size(self, operand: Tensor, dim: int) -> int:
        return operand.shape[dim]

    def is_new(self, operand: Tensor) -> bool:
        return False

    def same(self, a: Tensor, b: Tensor) -> bool:
        if a is b:
            return True
        # The values of a fake tensor, or of one that is being traced, are not to be looked at.
        return type(a) is Tensor and type(b) is Tensor and torch.equal(a, b)


class _Shapes(_Eager):
    """The same for fake tensors, as a compiler traces them: a view is of any layout, and a write is not carried out."""

    view = aten.reshape.default
    takes_effect = False
    is_eager = False


class Allocation(NamedTuple):
    """What stands for a tensor that would be made: sizes that may be symbols, and a dtype."""

    size: tuple[Any, ...]
    dtype: torch.dtype


class _Sizes(_Shapes):
    """For `icw_compile.formats.Format.empty` alone: no tensor is made, and the sizes may be symbols of sympy."""

    def call(self, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Allocation:
        if target not in (aten.zeros.default, aten.full.default, aten.empty.memory_format):
            raise NotImplementedError(f"{target} makes no new storage: a format's `empty` calls zeros, full or empty")
        return Allocation(tuple(args[0]), kwargs["dtype"])


#: Runs each operation.
EAGER = _Eager()
#: Works out shapes.
SHAPES = _Shapes()
#: Gives an `Allocation` for each tensor that a format would make.
SIZES = _Sizes()
