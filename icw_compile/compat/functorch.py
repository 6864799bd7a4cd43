"""functorch's transforms (`torch.vmap`, `torch.func.grad`) as they stand in a graph: calls that enter and leave levels.

Read and run in torch 2.13, unless a function says otherwise.
"""

from typing import Any

from torch import Tensor
from torch._C import _functorch

__all__ = ["inside_transform", "is_transform", "tensor_of_level"]


def is_transform(target: Any) -> bool:
    """Whether a node's target is one of the functions that a transform is made of, such as ``_vmap_increment_nesting``.

    By its module: ``torch._functorch``, ``torch._C._functorch``.
    """
    return str(getattr(target, "__module__", "")).startswith(("torch._functorch", "torch._C._functorch"))


def inside_transform() -> bool:
    """Whether what runs now is inside of a transform. ``torch._C._functorch.peek_interpreter_stack``."""
    return _functorch.peek_interpreter_stack() is not None


def tensor_of_level(tensor: Tensor) -> Tensor | None:
    """What a tensor of a transform is made of; ``None`` if it is no such tensor.

    ``torch._C._functorch.is_functorch_wrapped_tensor``, ``get_unwrapped``.
    """
    return _functorch.get_unwrapped(tensor) if _functorch.is_functorch_wrapped_tensor(tensor) else None
