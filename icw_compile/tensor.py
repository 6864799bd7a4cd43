"""`QuantizedKV`: the tensor that a cache layer holds in place of its float keys or values."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from icw_compile.ops import dequantize_per_head, quantize_per_head, scale_dtype_for
from icw_compile.rows import RULES, Quantized

__all__ = ["QuantizedKV"]

aten = torch.ops.aten


class QuantizedKV(Tensor):
    """Keys or values of one cache layer, stored as int8 with one scale per head and token.

    To everything else it is the float tensor that it stands for, of shape ``[batch, kv_heads, tokens, head_dim]``.
    Operations that move rows (``slice``, ``index_select``, ``repeat_interleave``, ``roll``, ``clone``, ``to(device)``,
    ...) act on the stored parts exactly and give another `QuantizedKV`; writes of rows (``index_copy_``, ``copy_``,
    ``cat``, ...) quantize only what is new; everything else computes on the dequantized values, and an in-place
    operation of that kind quantizes its result again. A view that cuts through head_dim (``x[..., :8]``,
    ``x.transpose(2, 3)``) is a dequantized copy: writing into it does not reach the cache.

    Args:
        qdata: int8, ``[batch, kv_heads, tokens, head_dim]``, in ``[-127, 127]``.
        scale: ``[batch, kv_heads, tokens, 1]``; bfloat16 for 16-bit values, float32 for float32 ones.
        dtype: the float dtype that the tensor presents: float32, bfloat16 or float16.

    Raises:
        TypeError: for another ``dtype``.
    """

    qdata: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> "QuantizedKV":
        scale_dtype_for(dtype)
        self: QuantizedKV = torch.Tensor._make_wrapper_subclass(
            cls,
            qdata.shape,
            strides=qdata.stride(),
            storage_offset=qdata.storage_offset(),
            dtype=dtype,
            device=qdata.device,
        )
        self.qdata = qdata
        self.scale = scale
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def quantize(cls, x: Tensor) -> "QuantizedKV":
        """Quantize the float tensor ``x[..., head_dim]``, one scale for each row.

        Raises:
            TypeError: if ``x`` is not float32, bfloat16 or float16.
        """
        return cls(*quantize_per_head(x, scale_dtype_for(x.dtype)), x.dtype)

    @classmethod
    def zeros(cls, size: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None) -> "QuantizedKV":
        """A tensor of zeros: of shape ``size``, no float storage is made for it."""
        qdata = torch.zeros(tuple(size), dtype=torch.int8, device=device)
        scale = torch.zeros((*size[:-1], 1), dtype=scale_dtype_for(dtype), device=device)
        return cls(qdata, scale, dtype)

    def dequantize(self) -> Tensor:
        """The values as an ordinary float tensor, of this tensor's dtype."""
        return dequantize_per_head(self.qdata, self.scale, self.dtype)

    def tolist(self) -> Any:
        """The values as nested lists of Python numbers."""
        return self.dequantize().tolist()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored parts (``nbytes`` counts the float tensor that they stand for)."""
        return sum(getattr(self, name).nbytes for name in self.__tensor_flatten__()[0])

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["qdata", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], dtype: torch.dtype, outer_size: Any, outer_stride: Any
    ) -> "QuantizedKV":
        return QuantizedKV(parts["qdata"], parts["scale"], dtype)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        scale_dtype = str(self.scale.dtype).removeprefix("torch.")
        return (
            f"QuantizedKV(shape={tuple(self.shape)}, dtype={dtype}, device='{self.device}', "
            f"stored=int8 + {scale_dtype} scale per head and token)"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OWN:
            return _OWN[func](*args, **kwargs)
        rule = RULES.get(func)
        if rule is not None:
            parts = rule(_EAGER, *_to_parts(args), **_to_parts(kwargs))
            if parts is not None:
                result = args[0] if func._schema.is_mutable else cls(*parts)
                return return_and_correct_aliasing(func, args, kwargs, result)
        return _on_values(func, args, kwargs)


class _Eager:
    """The `icw_compile.rows.Evaluator` that runs each operation."""

    def call(self, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def tensor(self, operand: Tensor) -> Tensor:
        return operand


_EAGER = _Eager()


def _to_parts(value: Any) -> Any:
    if isinstance(value, QuantizedKV):
        return Quantized(value.qdata, value.scale, value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_to_parts(v) for v in value)
    if isinstance(value, dict):
        return {name: _to_parts(v) for name, v in value.items()}
    return value


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on dequantized values; where it writes into an operand, quantize that operand's new values."""
    values: dict[int, tuple[QuantizedKV, Tensor]] = {}

    def dequantized(value: Any) -> Any:
        if isinstance(value, QuantizedKV):
            return values.setdefault(id(value), (value, value.dequantize()))[1]
        if isinstance(value, (list, tuple)):
            return type(value)(dequantized(v) for v in value)
        return value

    plain_args = dequantized(args)
    plain_kwargs = {name: dequantized(value) for name, value in kwargs.items()}
    result = func(*plain_args, **plain_kwargs)
    if not func._schema.is_mutable:
        return result
    written = [
        plain_args[i] if i < len(plain_args) else plain_kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    for original, value in values.values():
        if any(w is value for w in written):
            original.copy_(value)
            if result is value:
                result = original
    return result


def _to_copy(
    x: QuantizedKV,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> Tensor:
    """``x.to(...)``: stays quantized on another device or in another supported dtype, else becomes a float tensor."""
    try:
        scale_dtype = scale_dtype_for(dtype or x.dtype)
    except TypeError:
        return aten._to_copy.default(x.dequantize(), dtype=dtype, device=device, non_blocking=non_blocking, **kwargs)
    if x.scale.dtype == torch.float32 and scale_dtype != torch.float32:
        # Rounding the scales would move every value: round the values instead.
        x = QuantizedKV.quantize(x.dequantize().to(dtype))
    qdata = aten._to_copy.default(x.qdata, device=device, non_blocking=non_blocking)
    scale = aten._to_copy.default(x.scale, dtype=scale_dtype, device=device, non_blocking=non_blocking)
    return QuantizedKV(qdata, scale, dtype or x.dtype)


def _pin_memory(x: QuantizedKV, device: Any = None) -> QuantizedKV:
    return QuantizedKV(x.qdata.pin_memory(device), x.scale.pin_memory(device), x.dtype)


#: Operations that say where or in which dtype a tensor lives: they have no counterpart in a graph of plain tensors.
_OWN: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _to_copy,
    aten._pin_memory.default: _pin_memory,
    aten.is_pinned.default: lambda x, device=None: x.qdata.is_pinned(device),
    aten.dequantize.self: lambda x: dequantize_per_head(x.qdata, x.scale, x.dtype),
}

# `torch.load(..., weights_only=True)` reads tensors of this class.
torch.serialization.add_safe_globals([QuantizedKV])
