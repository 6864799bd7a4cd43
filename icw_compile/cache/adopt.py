"""Float caches that were filled before the first compiled call: make them int8 where they live.

``generate(..., compile_config=CompileConfig(backend="icw_int8kv"))`` fills a `StaticCache` with an uncompiled prefill.
No graph can change the dtype of a tensor that its caller owns, but the owner can be given another tensor: it is a cache
layer of transformers, whose ``keys`` and ``values`` become `QuantizedKV`. Which layer, Dynamo says when the graph is
compiled, as an expression of the caller's variables; at a call they are those of the frame that calls.
"""

import gc
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.compat.transformers import CacheLayerMixin
from icw_compile.formats import Format

__all__ = ["adopt", "find_held_elsewhere"]


def adopt(tensor: Tensor, place: str, layout: Format, held_elsewhere: Collection[int] = ()) -> QuantizedKV:
    """Quantize a float cache tensor, give the result to its owner, and free the float storage.

    It is freed at once, before the next layer is adopted, unless something else holds the tensor: that keeps its
    floats, and does not see what is written to the cache from now on.

    Args:
        tensor: what the compiled function was given.
        place: where the caller keeps it, such as ``L['cache'].layers[0].keys``.
        layout: how to store it.
        held_elsewhere: ``id`` of the tensors that something else holds (`find_held_elsewhere`).

    Raises:
        RuntimeError: the caller does not keep it there.
    """
    owner, name = _find_owner(tensor, place)
    quantized = QuantizedKV.encode(tensor, layout)
    setattr(owner, name, quantized)
    if id(tensor) not in held_elsewhere:
        nothing = tensor.new_full((1,), torch.nan)
        with torch.inference_mode():  # a tensor made there can be changed only there; any other, anywhere
            tensor.set_(nothing.untyped_storage(), 0, tensor.shape, (0,) * tensor.dim())
    return quantized


def find_held_elsewhere(tensors: Mapping[str, Tensor], passed: Sequence[Any]) -> set[int]:
    """``id`` of the tensors that another cache layer holds, as a shallow copy does, or a list.

    Variables of the calls that are under way, and what a compiler keeps of them, are not looked at.

    Args:
        tensors: where the caller keeps each -> it.
        passed: a list that holds them as well, of this call.
    """
    owners = [_find_owner(tensor, place)[0] for place, tensor in tensors.items()]
    if gc.get_freeze_count():  # what holds them may be among what is not looked at any more
        return {id(tensor) for tensor in tensors.values()}
    own = {id(each) for owner in owners for each in (owner, vars(owner))}
    held = set()
    for holder in gc.get_referrers(*tensors.values()):
        if isinstance(holder, list) and holder is not passed:
            held |= {id(each) for each in holder}
        elif isinstance(holder, (dict, CacheLayerMixin)) and id(holder) not in own:
            attributes = holder if isinstance(holder, dict) else vars(holder)
            held |= {id(attributes.get(name)) for name in ("keys", "values")}
    return held


def _find_owner(tensor: Tensor, place: str) -> tuple[Any, str]:
    """The object that holds ``tensor``, and as which attribute: ``place`` among the variables of a calling frame."""
    path, _, name = place.rpartition(".")
    frame = sys._getframe(1)
    while frame is not None:
        try:
            owner = eval(path, {"L": frame.f_locals, "G": frame.f_globals})  # torch's own expression, as in its guards
        except (AttributeError, IndexError, KeyError, NameError, TypeError, SyntaxError):
            owner = None
        if owner is not None and getattr(owner, name, None) is tensor:
            return owner, name
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(
        "icw_int8kv: a float cache tensor came from a cache layer when the graph was compiled, and comes from none "
        "now. Keep keys and values in a transformers cache, or build the cache with icw_compile.static_cache(...)."
    )
