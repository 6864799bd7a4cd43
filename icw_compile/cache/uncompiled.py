"""Attention in uncompiled code over an int8 cache: it dequantizes the whole cache at every step, and says so once.

An uncompiled prompt is no such case (`icw_compile.static_cache` is meant for it), nor is a value that is looked at,
saved, sliced or reordered. What counts is a query of one token that meets keys or values, at the same line of the same
module, step after step.
"""

import sys
import threading
import warnings
import weakref
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from icw_compile.errors import UnquantizedCacheWarning

__all__ = ["forget_reads", "note_read", "quiet"]

aten = torch.ops.aten

#: Attention, and the products that it is made of: a query or scores first, then keys or values.
_READS = frozenset(
    getattr(aten, name).default
    for name in (
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
        "matmul",
        "bmm",
    )
    if hasattr(aten, name)
)
#: Steps after which it is no accident.
_STEPS = 3

_Place = tuple[CodeType, int]
_lock = threading.Lock()
_by_module: "weakref.WeakKeyDictionary[nn.Module, dict[_Place, int]]" = weakref.WeakKeyDictionary()
_elsewhere: dict[_Place, int] = {}


class _Quiet(threading.local):
    #: Whether the cause has been said already for what runs now in this thread.
    now = False


quiet = _Quiet()


def note_read(func: Any, args: tuple[Any, ...]) -> None:
    """Called for each operation that runs on the dequantized values of a `QuantizedKV` outside of compiled code.

    Args:
        func: the operation.
        args: its arguments, the second one perhaps a `QuantizedKV`.
    """
    if func not in _READS or quiet.now or len(args) < 2:
        return
    query, stored = args[:2]
    qdata = getattr(stored, "qdata", None)
    if type(query) is not Tensor or type(qdata) is not Tensor or query.dim() < 3 or query.shape[-2] != 1:
        return
    place, module = _caller()
    with _lock:
        steps = _elsewhere if module is None else _by_module.setdefault(module, {})
        steps[place] = count = steps.get(place, 0) + 1
        if count != _STEPS or _said_for(type(module)):
            return
    code, line = place
    where = "" if module is None else f" of {type(module).__name__}"
    warnings.warn(
        "icw_int8kv: attention reads an int8 cache in code that is not compiled, and dequantizes all of it at every "
        f"step: `{code.co_name}`{where} ({code.co_filename}:{line}).\n  Remedy: compile the model that reads the cache "
        'with backend="icw_int8kv"; if it is, torch.compile has not compiled this part of it (a graph break, '
        "torch.compiler.disable, torch.compiler.set_stance, or a limit: run with TORCH_LOGS=graph_breaks,recompiles).",
        UnquantizedCacheWarning,
        stacklevel=2,
    )


_said: set[type] = set()


def _said_for(kind: type) -> bool:
    """Whether it was said for another module of this class: not once for each layer."""
    if kind in _said:
        return True
    if kind is not type(None):
        _said.add(kind)
    return False


def _caller() -> tuple[_Place, nn.Module | None]:
    """The line that computes attention, outside of torch and of this package, and the module that it does it for."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "icw_compile"):
        frame = frame.f_back
    owners = (frame.f_locals.get(name) for name in ("self", "module"))
    module = next((owner for owner in owners if isinstance(owner, nn.Module)), None)
    return (frame.f_code, frame.f_lineno), module


def forget_reads() -> None:
    """Start counting anew."""
    with _lock:
        _by_module.clear()
        _elsewhere.clear()
        _said.clear()
