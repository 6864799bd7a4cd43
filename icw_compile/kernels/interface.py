"""What an attention kernel is told of a call, and what it says of itself.

A kernel says at compile time, of the whole call, what it does not take: the reason is a sentence for the report, and
never empty. What it takes it computes, on every tensor that the fakes stand for.

Shapes, in the letters of `icw_compile.kernels.inductor`: ``B`` batch, ``Hq`` query heads, ``H`` key/value heads, ``T``
query tokens, ``S`` cached tokens, ``D`` head size of queries and keys, ``Dv`` head size of values.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from icw_compile.compat.fx import statically_known_true

__all__ = ["FEW_TOKENS", "AttentionCall", "AttentionKernel", "StoredRows", "declines_rows", "unfit_tensor"]

#: Query tokens that still are a decode step: their attention reads what is stored, and a kernel does so row by row.
#: More are a prompt, which attends to its own keys and values as they came.
FEW_TOKENS = 16


@dataclass(frozen=True)
class StoredRows:
    """The keys or the values of a call, as they are stored.

    Attributes:
        format: the name of the format, ``"int8"`` or ``"int4"``.
        parts: what the attention reads, by name. Of int8: ``qdata``, int8 ``[B, H, S, D]``, and ``scale``, of a float
            dtype, ``[B, H, S, 1]``. Of int4: ``packed``, uint8 ``[B, H, S, D / 2]``, ``scale``, and ``codes``, uint8
            ``[B, H, S, 2]``. A part that the graph deals with itself, as the shift of the channels with which it
            multiplies the query, is none of these.
        kept: the rows that are kept in the model's dtype and take the place of stored ones. None, or ``exact``, of a
            float dtype ``[B, H, K, D]``, and ``position``, int64 ``[K]``: which positions they are, -1 for none.
    """

    format: str
    parts: Mapping[str, Tensor]
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def channels(self) -> Any:
        """Of a row: ``D`` or ``Dv``."""
        return next(iter(self.parts.values())).shape[-1] * (2 if self.format == "int4" else 1)

    @classmethod
    def int8(cls, qdata: Tensor, scale: Tensor) -> "StoredRows":
        return cls("int8", {"qdata": qdata, "scale": scale})


@dataclass(frozen=True)
class AttentionCall:
    """One attention over stored rows. All tensors may be fake, and all sizes symbolic.

    Attributes:
        query: ``[B, Hq, T, D]``, of a float dtype.
        key: rows of ``D`` channels.
        value: rows of ``Dv`` channels.
        attn_mask: ``None``, boolean (``False``: not read) or additive; four dimensions that broadcast to
            ``[B, Hq, T, S]``.
        is_causal: query token ``t`` reads positions up to ``t``.
        scale: of the products.
        softcap: ``tanh(score / softcap) * softcap`` before the mask.
        sinks: ``None``, or one more score for each query head, which has no value: ``[Hq]``.
    """

    query: Tensor
    key: StoredRows
    value: StoredRows
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: Any = 1.0
    softcap: Any = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class AttentionKernel:
    """A kernel.

    Attributes:
        name: for the report.
        option: the value of ``icw.attention`` that asks for it.
        devices: the device types that it runs on.
        load: make it ready to run, built if need be. Raises `KernelUnavailableError`.
        begin: start to build what `load` would have to wait for, and return at once: whether that is under way.
        declines: why it does not take a call, a sentence that is never empty; ``None`` if it does. Does not load it.
        operator: ``icw_int8kv::attention``'s arguments to ``[B, Hq, T, Dv]`` in the query's dtype. The first two parts
            of keys and values take the place of decoded ones; others follow by name, as ``key_codes``, and so do the
            rows that are kept, ``key_exact`` and ``key_position``, and the same of values.
        mask_spans: ``None``, or what it takes as ``spans``, of a boolean mask and ``S``: it is worked out once for all
            layers that share the mask.
        divides_kept: whether it takes ``key_shift`` beside ``key_exact``, uint8 ``[B, H, 1, D]``: rows that are kept as
            they came, whose channels it divides by two to these powers, and the same of values.
    """

    name: str
    option: str
    devices: tuple[str, ...]
    load: Callable[[], None]
    declines: Callable[[AttentionCall], str | None]
    operator: Any
    mask_spans: Any = None
    divides_kept: bool = False
    begin: Callable[[], bool] = lambda: False


_QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Of scales, sinks and additive masks. The 8-bit floats are floating point too.
_FLOAT_DTYPES = (*_QUERY_DTYPES, torch.float64)


#: The parts of each format that a kernel may read, the rows first: dtypes and the size of the last dimension, of a head
#: size ``D``.
_PARTS: dict[str, dict[str, tuple[tuple[torch.dtype, ...], Callable[[Any], Any]]]] = {
    "int8": {"qdata": ((torch.int8,), lambda size: size), "scale": (_FLOAT_DTYPES, lambda size: 1)},
    "int4": {
        "packed": ((torch.uint8,), lambda size: size // 2),
        "scale": (_FLOAT_DTYPES, lambda size: 1),
        "codes": ((torch.uint8,), lambda size: 2),
    },
}
#: What the parts that are no rows are called in a reason.
_NAMES = {"scale": "scales", "codes": "codes"}


def declines_rows(
    call: AttentionCall, devices: Iterable[str], formats: Iterable[str] = ("int8",), *, keeps_rows: bool = False
) -> str | None:
    """Why a call is not one of stored rows that fit together, on one of ``devices``; ``None`` if it is.

    What all kernels ask for; ``keeps_rows`` is for those that take kept rows. Sizes that are symbolic are taken to fit,
    as what was traced with them did.
    """
    query = call.query
    if query.device.type not in devices:
        return f"the query is on {query.device.type}, and the kernel is for {' and '.join(devices)}"
    if query.dim() != 4:
        return f"the query has {query.dim()} dimensions, and not 4"
    if query.dtype not in _QUERY_DTYPES:
        return f"queries of dtype {query.dtype} are not supported"
    batch, query_heads, tokens, head_dim = query.shape
    for name, stored in (("keys", call.key), ("values", call.value)):
        if stored.format not in formats:
            return f"the {name} are stored as {stored.format}, and the kernel reads {' and '.join(formats)}"
        if unread := sorted(stored.parts.keys() ^ _PARTS[stored.format].keys()):
            return f"the {name} are not {stored.format} rows: {', '.join(unread)}"
    first = next(iter(call.key.parts.values()))
    if first.dim() != 4:
        return f"the keys have {first.dim()} dimensions, and not 4"
    heads, length = first.shape[1:3]
    for name, stored, size in (("keys", call.key, head_dim), ("values", call.value, None)):
        for of, (dtypes, last) in _PARTS[stored.format].items():
            tensor = stored.parts[of]
            # Values have a head size of their own, which their rows say.
            channels = tensor.shape[-1] if size is None and of == next(iter(stored.parts)) else last(size)
            shape = (batch, heads, length, channels)
            what = f"the {_NAMES[of]} of the {name}" if of in _NAMES else f"the {name}"
            if reason := unfit_tensor(what, tensor, shape, dtypes, query.device):
                return reason
            if of != "scale" and not statically_known_true(tensor.stride(3) == 1):
                return f"the channels of the {name} are not contiguous"
        if stored.kept and (reason := _unfit_kept(name, stored, (batch, heads), query.device, keeps_rows)):
            return reason
    if statically_known_true(heads == 0) or statically_known_true(query_heads % heads != 0):
        return f"{query_heads} query heads cannot be grouped on {heads} key/value heads"
    if call.sinks is not None and (
        reason := unfit_tensor("sinks", call.sinks, (query_heads,), _FLOAT_DTYPES, query.device)
    ):
        return reason
    if call.attn_mask is None:
        return None
    full = (batch, query_heads, tokens, length)
    return unfit_tensor("attn_mask", call.attn_mask, full, (torch.bool, *_FLOAT_DTYPES), query.device, broadcast=True)


def _unfit_kept(
    name: str, stored: StoredRows, sequences: tuple[Any, Any], device: torch.device, keeps_rows: bool
) -> str | None:
    if not keeps_rows:
        return f"some {name} are kept in the model's dtype, and the kernel reads stored ones only"
    exact, position = stored.kept["exact"], stored.kept["position"]
    if reason := unfit_tensor(f"the positions of kept {name}", position, position.shape[:1], (torch.int64,), device):
        return reason
    shape = (*sequences, position.shape[0], stored.channels)
    return unfit_tensor(f"the kept {name}", exact, shape, _FLOAT_DTYPES, device)


def unfit_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[Any, ...],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    *,
    broadcast: bool = False,
) -> str | None:
    """Why ``tensor`` is known not to be of this shape, one of these dtypes and on this device; ``None`` if it may be.

    A size of 1 fits any other with ``broadcast``.
    """
    if tensor.dtype not in dtypes:
        return f"unsupported dtype of {name}: {tensor.dtype}"
    if tensor.device != device:
        return f"{name} on {tensor.device} with a query on {device}"
    differs = tensor.dim() != len(shape) or any(
        statically_known_true(size != of) and not (broadcast and statically_known_true(size == 1))
        for size, of in zip(tensor.shape, shape, strict=True)
    )
    if not differs:
        return None
    relation = "does not broadcast to" if broadcast else "is not"
    return f"{name} of shape {list(tensor.shape)}, which {relation} {list(shape)}"
