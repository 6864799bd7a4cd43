"""What an uncompiled view of a quantized cache is where the parts have no such view: its values, to be read only."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from icw_compile.compat.fx import schema_of, tree_map, written_values

__all__ = ["DecodedView", "read_only"]


class DecodedView(Tensor):
    """What a `QuantizedKV` gives in place of a view that it cannot give: its values, to be read only.

    It shows what is written to the cache later, as a view does. A write into it is refused: it would be lost.

    Args:
        values: what it shows now.
        again: makes ``values`` anew.
    """

    _again: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, values: Tensor, again: Callable[[], Tensor]) -> "DecodedView":
        self: DecodedView = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=values.device,
        )
        self._again = again
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def values_now(self) -> Tensor:
        """What it shows, as an ordinary tensor."""
        return self._again()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"DecodedView({self.values_now!r})"

    def tolist(self) -> Any:
        return self.values_now.tolist()

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as for a QuantizedKV
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, DecodedView) for value in written_values(func, args, kwargs)):
            raise NotImplementedError(
                f"icw_int8kv: `{func}` writes into part of a row of a quantized cache, or into a view of it that "
                "has to be a copy: the write would be lost. Write whole rows of head_dim, into the cache itself."
            )

        def again() -> Any:
            plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
            return func(*plain_args, **plain_kwargs)

        return read_only(func, again(), again)


def _plain(value: Any) -> Any:
    return value.values_now if isinstance(value, DecodedView) else value


def _element(several: Callable[[], Any], index: int) -> Any:
    return several()[index]


def read_only(func: Any, result: Any, again: Callable[[], Any]) -> Any:
    """``result``, guarded against writes where ``func`` returns views of what it was given."""
    if not schema_of(func).gives_views:
        return result
    if isinstance(result, (list, tuple)):
        return [DecodedView(each, functools.partial(_element, again, i)) for i, each in enumerate(result)]
    return DecodedView(result, again) if type(result) is Tensor else result
