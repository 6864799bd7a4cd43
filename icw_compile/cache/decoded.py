"""What an uncompiled view of a quantized cache is where the parts have no such view: its values."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from icw_compile.cache.parts import TensorOfParts, views_like_their_base
from icw_compile.compat.fx import schema_of, tree_map, written_values

__all__ = ["DecodedView", "decoded_view"]


class DecodedView(Tensor):
    """What a `QuantizedKV` gives in place of a view that it cannot give: its values.

    It shows what is written to the cache later, as a view does. A write into it goes to the same view of what is
    stored, where there is one without the rows that are kept besides; else it is refused, for it would be lost.

    Args:
        values: what it shows now.
        again: makes ``values`` anew.
        stored: gives the view to write into, or something else if there is none.
    """

    _again: Callable[[], Tensor]
    _stored: Callable[[], Any]

    @staticmethod
    def __new__(cls, values: Tensor, again: Callable[[], Tensor], stored: Callable[[], Any]) -> "DecodedView":
        self: DecodedView = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=values.device,
        )
        self._again, self._stored = again, stored
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

    def numpy(self, **kwargs: Any) -> Any:
        return self.values_now.numpy(**kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.values_now.__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.values_now.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values_now.__reduce_ex__(protocol)

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as for a QuantizedKV
    @views_like_their_base
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = [each for each in written_values(func, args, kwargs) if isinstance(each, DecodedView)]
        if written:
            # What is read is read before rows are forgotten.
            read = tree_map(lambda each: each if any(each is one for one in written) else _plain(each), (args, kwargs))
            targets = {id(each): each._stored() for each in written}
            if not all(isinstance(each, TensorOfParts) for each in targets.values()):
                raise NotImplementedError(
                    f"icw_int8kv: `{func}` writes into part of a row of a quantized cache, or into a view of it that "
                    "has to be a copy: the write would be lost. Write whole rows of head_dim, into the cache itself."
                )
            stored_args, stored_kwargs = tree_map(lambda each: targets.get(id(each), each), read)
            result = func(*stored_args, **stored_kwargs)
            return None if result is None else return_and_correct_aliasing(func, args, kwargs, result)

        def again() -> Any:
            plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
            return func(*plain_args, **plain_kwargs)

        def stored() -> Any:
            stored_args, stored_kwargs = tree_map(_of_stored, (args, kwargs))
            return func(*stored_args, **stored_kwargs)

        return decoded_view(func, again(), again, stored)


def _plain(value: Any) -> Any:
    return value.values_now if isinstance(value, DecodedView) else value


def _of_stored(value: Any) -> Any:
    return value._stored() if isinstance(value, DecodedView) else value


def _element(several: Callable[[], Any], index: int) -> Any:
    return several()[index]


def decoded_view(func: Any, result: Any, again: Callable[[], Any], stored: Callable[[], Any]) -> Any:
    """``result`` as `DecodedView`, where ``func`` returns views of what it was given."""
    if not schema_of(func).gives_views:
        return result
    if isinstance(result, (list, tuple)):
        return [
            DecodedView(each, functools.partial(_element, again, i), functools.partial(_element, stored, i))
            for i, each in enumerate(result)
        ]
    return DecodedView(result, again, stored) if type(result) is Tensor else result
