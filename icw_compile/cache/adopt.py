"""Float caches that were filled before the first compiled call: make them int8 where they live.

``generate(..., compile_config=CompileConfig(backend="icw_int8kv"))`` fills a `StaticCache` with an uncompiled prefill.
No graph can change the dtype of a tensor that its caller owns, but the owner can be given another tensor: it is a cache
layer of transformers, whose ``keys`` and ``values`` become `QuantizedKV`.
"""

import gc
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.formats.rows import NOTHING, Keep

__all__ = ["adopt", "find_owners"]

#: Where a cache layer keeps a tensor: the layer, and the name of its attribute.
Owner = tuple[CacheLayerMixin, str]


def find_owners(tensors: Iterable[Tensor]) -> dict[int, Owner]:
    """``id(tensor)`` -> the cache layer that holds it, for each tensor that one holds. Visits every live object."""
    wanted = {id(tensor) for tensor in tensors}
    owners: dict[int, Owner] = {}
    if not wanted:
        return owners
    for candidate in gc.get_objects():
        # Not isinstance: it may run code of a lazy proxy.
        if issubclass(type(candidate), CacheLayerMixin):
            for name in ("keys", "values"):
                held = vars(candidate).get(name)
                if id(held) in wanted:
                    owners[id(held)] = (candidate, name)
    return owners


def adopt(tensor: Tensor, owner: Owner | None, *, equalize: bool = False, keep: Keep = NOTHING) -> QuantizedKV:
    """Quantize a float cache tensor, give the result to its owner, and free the float storage.

    Whoever else still holds ``tensor`` sees NaN from now on: its memory is gone before the next layer is adopted.

    Raises:
        RuntimeError: nothing that can be given another tensor holds it.
    """
    if owner is None:
        raise RuntimeError(
            "icw_int8kv: a float cache tensor came from a cache layer when the graph was compiled, and comes from none "
            "now. Keep keys and values in a transformers cache, or build the cache with icw_compile.static_cache(...)."
        )
    quantized = QuantizedKV.quantize(tensor, equalize=equalize, keep=keep)
    layer, name = owner
    setattr(layer, name, quantized)
    nothing = tensor.new_full((1,), torch.nan)
    with torch.inference_mode():  # a tensor made there can be changed only there; any other, anywhere
        tensor.set_(nothing.untyped_storage(), 0, tensor.shape, (0,) * tensor.dim())
    return quantized
