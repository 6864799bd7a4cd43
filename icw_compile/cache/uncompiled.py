"""Attention in uncompiled code over an int8 cache: it dequantizes the whole cache at every step, and says so once.

An uncompiled prompt is no such case (`icw_compile.static_cache` is meant for it), nor is a value that is looked at,
saved, sliced or reordered. What counts is a query of few tokens that meets keys or values, at the same line for the
same module, step after step with no compiled graph in between.
"""

import sys
import threading
import warnings
import weakref
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from icw_compile.errors import UnquantizedCacheWarning
from icw_compile.kernels.interface import FEW_TOKENS

__all__ = ["forget_reads", "note_read", "thread"]

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
#: Steps after which it is a generation, and not a look at some logits.
_STEPS = 8


class _Thread(threading.local):
    """What is known in this thread.

    Attributes:
        runs: how many graphs of ours have run.
        is_quiet: whether the cause has been said already for what runs now.
    """

    runs = 0
    is_quiet = False


thread = _Thread()

#: Where attention is computed: a function and a line in it; how often in a row, and `_Thread.runs` then.
_Reads = dict[tuple[CodeType, int], tuple[int, int]]
_lock = threading.Lock()
_by_module: "weakref.WeakKeyDictionary[nn.Module, _Reads]" = weakref.WeakKeyDictionary()
_elsewhere: _Reads = {}
#: Classes of modules for which it was said.
_said: set[type] = set()


def note_read(func: Any, args: tuple[Any, ...]) -> None:
    """Called for each operation that runs on the dequantized values of a `QuantizedKV` outside of compiled code.

    Args:
        func: the operation.
        args: its arguments, the second one perhaps a `QuantizedKV`.
    """
    if func not in _READS or thread.is_quiet or len(args) < 2:
        return
    query, stored = args[:2]
    if type(query) is not Tensor or type(getattr(stored, "qdata", None)) is not Tensor or query.dim() < 3:
        return
    frame, module = _caller()
    whole = frame.f_locals.get("query", query)
    if (whole if isinstance(whole, Tensor) and whole.dim() == 4 else query).shape[-2] > FEW_TOKENS:
        return
    place = frame.f_code, frame.f_lineno
    with _lock:
        reads = _elsewhere if module is None else _by_module.setdefault(module, {})
        in_a_row, runs = reads.get(place, (0, thread.runs))
        in_a_row = in_a_row + 1 if runs == thread.runs else 1
        reads[place] = in_a_row, thread.runs
        if in_a_row != _STEPS or type(module) in _said:
            return
        if module is not None:
            _said.add(type(module))  # not once for each layer
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


def _caller() -> tuple[FrameType, nn.Module | None]:
    """The function that computes attention, outside of torch and of this package, and the module it does it for."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "icw_compile"):
        frame = frame.f_back
    owners = (frame.f_locals.get(name) for name in ("self", "module"))
    module = next((owner for owner in owners if isinstance(owner, nn.Module)), None)
    return frame, module


def forget_reads() -> None:
    """Start counting anew."""
    with _lock:
        _by_module.clear()
        _elsewhere.clear()
        _said.clear()
