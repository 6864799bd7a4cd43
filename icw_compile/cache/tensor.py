"""`QuantizedKV`: the tensor that a cache layer holds in place of its float keys or values."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from icw_compile.cache.growth import MIN_SPARE, Claim, Room, capacity_for
from icw_compile.cache.uncompiled import note_read
from icw_compile.formats.ops import channel_shift, dequantize_per_head, keep_rows, quantize_per_head, scale_dtype_for
from icw_compile.formats.rows import NOTHING, PARTS, ROWS, RULES, Keep, Quantized, keep_written, quantize_like

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

    Channels that are outliers would leave the others of their row few levels. With a ``shift``, each is divided by a
    power of two before it is quantized; what reads int8 multiplies the query, or the output, instead. The first write
    of several tokens into an empty tensor settles the shift (`icw_compile.formats.ops.channel_shift`).

    The first rows, and the last ones, may be kept in the float dtype besides (``exact``, ``position``, ``sinks``):
    they are read as they came. Operations that scatter the tokens forget them, and their int8 rows are read.

    ``cat([x, new], -2)`` grows like a vector: ``new`` is written behind ``x``, in spare rows of its storage, wherever
    no other tensor can notice (`icw_compile.cache.growth`).

    Args:
        qdata: int8, ``[batch, kv_heads, tokens, head_dim]``, in ``[-127, 127]``.
        scale: ``[batch, kv_heads, tokens, 1]``; bfloat16 for 16-bit values, float32 for float32 ones.
        dtype: the float dtype that the tensor presents: float32, bfloat16 or float16.
        shift: int8, ``[batch, kv_heads, 1, head_dim]``, exponents of the powers of two; left out, there are none.
        exact: ``[batch, kv_heads, kept, head_dim]`` of ``dtype``: the rows that are kept; left out, there are none.
        position: int64 ``[kept]``: the index of each kept row, -1 for none.
        sinks: how many of them are for the first rows; the others are for the last.

    Raises:
        TypeError: for another ``dtype``.
    """

    qdata: Tensor
    scale: Tensor
    shift: Tensor | None
    exact: Tensor | None
    position: Tensor | None
    sinks: int
    _claim: Claim | None

    @staticmethod
    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        shift: Tensor | None = None,
        exact: Tensor | None = None,
        position: Tensor | None = None,
        sinks: int = 0,
        *,
        claim: Claim | None = None,
        stride: Sequence[int] | None = None,
    ) -> "QuantizedKV":
        scale_dtype_for(dtype)
        if stride is None and (claim is None or claim.is_view):
            stride = qdata.stride()
        # Else contiguous, as what `cat` returns: the spare rows behind each head do not show.
        self: QuantizedKV = torch.Tensor._make_wrapper_subclass(
            cls,
            qdata.shape,
            strides=stride,
            storage_offset=None if stride is None else qdata.storage_offset(),
            dtype=dtype,
            device=qdata.device,
        )
        self.qdata = qdata
        self.scale = scale
        self.shift = shift
        self.exact = exact
        self.position = position
        self.sinks = sinks
        self._claim = claim
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def quantize(cls, x: Tensor, *, equalize: bool = False, keep: Keep = NOTHING) -> "QuantizedKV":
        """Quantize the float tensor ``x[..., tokens, head_dim]``, one scale for each row.

        Args:
            x: float32, bfloat16 or float16.
            equalize: shift its outlier channels.
            keep: which rows to keep as they are besides. Rows of zeros at the end count as not written yet.

        Raises:
            TypeError: ``x`` has another dtype.
        """
        shift = channel_shift(x) if equalize else None
        rows = quantize_per_head(x, scale_dtype_for(x.dtype), shift)
        exact, position = keep.nothing_yet(x.shape, x.dtype, x.device)
        if exact is not None and position is not None:
            written = (x != 0).movedim(-2, 0).flatten(1).any(dim=1)
            filled = int((written * torch.arange(1, len(written) + 1, device=x.device)).amax()) if len(written) else 0
            if filled:
                index = torch.arange(filled, device=x.device)
                exact, position = keep_rows(exact, position, x[..., :filled, :], index, keep.sinks)
        return cls(*rows, x.dtype, shift, exact, position, keep.sinks)

    @classmethod
    def zeros(
        cls,
        size: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        equalize: bool = False,
        keep: Keep = NOTHING,
    ) -> "QuantizedKV":
        """A tensor of zeros: of shape ``size``, no float storage is made for it.

        With ``equalize``, what is first written to it settles a shift. ``keep`` says which of the rows that are written
        to it stay in ``dtype``.
        """
        qdata = torch.zeros(tuple(size), dtype=torch.int8, device=device)
        scale = torch.zeros((*size[:-1], 1), dtype=scale_dtype_for(dtype), device=device)
        shift = torch.zeros((*size[:-2], 1, size[-1]), dtype=torch.int8, device=device) if equalize else None
        return cls(qdata, scale, dtype, shift, *keep.nothing_yet(size, dtype, device), keep.sinks)

    @classmethod
    def of(cls, value: Quantized, *, claim: Claim | None = None, stride: Sequence[int] | None = None) -> "QuantizedKV":
        """The tensor made of these parts."""
        return cls(*value, claim=claim, stride=stride)

    @classmethod
    def growing(cls, value: Quantized) -> "QuantizedKV":
        """A tensor that alone owns the storage of its contiguous parts ``[batch, kv_heads, tokens, ...]``."""
        return cls._on(Room(value.rows), value.qdata.shape[2], value)

    @classmethod
    def _on(cls, room: Room, rows: int, like: Quantized) -> "QuantizedKV":
        """A new tensor that shows the first ``rows`` rows of ``room``, independent of the others there."""
        return cls.of(like.of(room.first(rows)), claim=Claim(room, rows))

    @property
    def value(self) -> Quantized:
        """All that it is made of."""
        return Quantized(self.qdata, self.scale, self.dtype, self.shift, self.exact, self.position, self.sinks)

    def reserve(self, rows: int) -> "QuantizedKV":
        """This tensor with ``rows`` more, whose content is not specified, as a tensor independent of this one.

        The new rows lie in spare storage behind this tensor's where no other tensor has taken them. Otherwise the
        whole moves to a larger storage, and this tensor moves along, so that the old storage is freed, if it was the
        only one there.
        """
        tokens = self.shape[2]
        total = tokens + rows
        claim, like = self._claim, self.value
        if claim is None or not claim.may_extend() or total + MIN_SPARE > claim.room.capacity:
            room = Room.copy_of((self.qdata, self.scale), capacity_for(total))
            if claim is not None and not claim.others():
                self._move_to(room)
            elif like.shift is not None:
                like = like._replace(shift=like.shift.clone())  # only tensors of one room share it
        else:
            room = claim.room
        if like.exact is not None:  # each tensor has its own last rows
            like = like._replace(exact=like.exact.clone(), position=like.position.clone())
        return self._on(room, total, like)

    def _move_to(self, room: Room) -> None:
        tokens = self.shape[2]
        self.qdata, self.scale = room.first(tokens)
        self._claim = Claim(room, tokens)

    def separate(self) -> None:
        """Make sure that a write into this tensor reaches it and its views alone, not what grew out of it."""
        claim = self._claim
        if claim is not None and any(other.owner is not claim.owner for other in claim.others()):
            self._move_to(Room.copy_of((self.qdata, self.scale), self.shape[2]))
            self.shift = None if self.shift is None else self.shift.clone()

    def dequantize(self) -> Tensor:
        """The values as an ordinary float tensor, of this tensor's dtype."""
        return dequantize_per_head(self.qdata, self.scale, self.dtype, self.shift, self.exact, self.position)

    def tolist(self) -> Any:
        """The values as nested lists of Python numbers."""
        return self.dequantize().tolist()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The stored tensors: ``qdata``, ``scale`` and, if there are any, ``shift``, ``exact`` and ``position``."""
        return tuple(self.value.parts.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored parts with their spare rows (``nbytes`` counts the float tensor that they stand for)."""
        own = sum(part.nbytes for name, part in self.value.parts.items() if self._claim is None or name not in ROWS)
        return own if self._claim is None else own + self._claim.room.nbytes

    @property
    def spare_rows(self) -> int:
        """Rows that lie free, or are taken by tensors that grew out of this one, behind its own."""
        return 0 if self._claim is None else self._claim.room.capacity - self.shape[2]

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, int]]:
        return list(self.value.parts), (self.dtype, self.sinks)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: tuple[torch.dtype, int], outer_size: Any, outer_stride: Any
    ) -> "QuantizedKV":
        dtype, sinks = context
        shift, exact, position = (parts.get(name) for name in PARTS[2:])
        return QuantizedKV(parts["qdata"], parts["scale"], dtype, shift, exact, position, sinks, stride=outer_stride)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        scale_dtype = str(self.scale.dtype).removeprefix("torch.")
        return (
            f"QuantizedKV(shape={tuple(self.shape)}, dtype={dtype}, device='{self.device}', "
            f"stored=int8 + {scale_dtype} scale per head and token)"
        )

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        if isinstance(part, QuantizedKV) and type(part.qdata) is Tensor and part._is_view():
            # A cropped cache: autograd would keep the longer one alive, and Dynamo would guard on its shape.
            return QuantizedKV.of(part.value, claim=part._claim, stride=part.stride())
        return part

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedKV":
        copied: Any = self.clone()
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        value = self.value
        return QuantizedKV, tuple(value.of([part.contiguous() for part in value.rows]))  # without spare rows

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OWN:
            return _OWN[func](*args, **kwargs)
        if func is aten.cat.default and (grown := _append(*args, **kwargs)) is not None:
            return grown
        rule = RULES.get(func)
        if rule is None:
            return _on_values(func, args, kwargs)
        x = args[0]
        claim = x._claim if isinstance(x, QuantizedKV) else None
        if claim is not None and not claim.is_view and _is_batchwise(func, *args[1:]):
            return x._batchwise(rule, args, kwargs)
        first = func._schema.arguments[0]
        if func._schema.is_mutable and _is_view_with_exact_rows(x):
            raise NotImplementedError(
                "icw_int8kv: a cache with icw.sink_tokens or icw.recent_tokens is written as a whole; this writes into "
                "a view of it, and the rows that it keeps would not follow."
            )
        if claim is not None and first.alias_info is not None:  # a write into x, or a view of it
            x.separate()
            claim = x._claim
            if func is aten.view.default and not claim.others() and not x.qdata.is_contiguous():
                x._move_to(Room.copy_of((x.qdata, x.scale), x.shape[2]))
                claim = x._claim
        parts = rule(_EAGER, *_to_parts(args), **_to_parts(kwargs))
        if parts is None:
            return _on_values(func, args, kwargs)
        if func._schema.is_mutable:
            result = x
        elif claim is not None and first.alias_info is not None:
            result = cls.of(parts, claim=claim.of_view(_first_rows(func, args)))
        else:
            result = cls.of(parts)
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _batchwise(self, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "QuantizedKV":
        """An operation on whole sequences, done to the spare rows as well: the result keeps room to grow."""
        assert self._claim is not None
        moved = rule(_EAGER, self.value.of(self._claim.room.parts), *args[1:], **kwargs)
        return self._on(Room(moved.rows), self.shape[2], moved)


def _append(tensors: Sequence[Any], dim: int = 0) -> QuantizedKV | None:
    """``cat([x, new, ...], -2)`` where ``new`` is whole rows for ``x``, written behind it; else ``None``."""
    x = tensors[0]
    if type(x) is not QuantizedKV or type(x.qdata) is not Tensor or x.dim() != 4 or dim not in (-2, 2):
        return None
    expected = (x.dtype, x.device, x.shape[:2], x.shape[3:])
    if any((new.dtype, new.device, new.shape[:2], new.shape[3:]) != expected for new in tensors[1:]):
        return None
    grown = x.reserve(sum(new.shape[2] for new in tensors[1:]))
    start = x.shape[2]
    for new in tensors[1:]:
        rows = quantize_like(_EAGER, _to_parts(new), x.value)
        end = start + new.shape[2]
        for name, part in keep_written(_EAGER, grown.value, _to_parts(new), start).items():
            getattr(grown, name).copy_(part)
        grown.qdata[:, :, start:end].copy_(rows.qdata)
        grown.scale[:, :, start:end].copy_(rows.scale)
        start = end
    return grown


def _is_view_with_exact_rows(x: Any) -> bool:
    if not isinstance(x, QuantizedKV) or x.exact is None or type(x.qdata) is not Tensor:
        return False
    claim = x._claim
    return claim.is_view if claim is not None else not _EAGER.is_whole(x.qdata)


def _is_batchwise(func: Any, *args: Any) -> bool:
    """Whether an operation copies or picks whole sequences of a batch, with these arguments after the first."""
    if func is aten.clone.default:
        return True
    if func is aten.index_select.default:
        return args[0] == 0
    return func is aten.index.Tensor and len(args[0]) == 1 and args[0][0].dim() == 1


def _first_rows(func: Any, args: tuple[Any, ...]) -> int | None:
    """The number of rows where a view is of the first rows of a tensor."""
    if func is not aten.slice.Tensor:
        return None
    defaults: tuple[Any, ...] = (0, None, None, 1)
    x, dim, start, end, step = args + defaults[len(args) - 1 :]
    if x.dim() != 4 or dim not in (2, -2) or step != 1:
        return None
    rows = range(x.shape[2])[start:end]
    return len(rows) if rows.start == 0 else None


class _Eager:
    """The `icw_compile.formats.rows.Evaluator` that runs each operation."""

    view = aten.view.default

    def call(self, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def tensor(self, operand: Tensor) -> Tensor:
        return operand

    def size(self, operand: Tensor, dim: int) -> int:
        return operand.shape[dim]

    def same(self, a: Tensor | None, b: Tensor | None) -> bool:
        if a is b:
            return True
        # The values of a fake tensor, or of one that is being traced, are not to be looked at.
        return type(a) is Tensor and type(b) is Tensor and torch.equal(a, b)

    def is_whole(self, part: Tensor) -> bool:
        return type(part) is Tensor and part.untyped_storage().nbytes() == part.nbytes


_EAGER = _Eager()


def _to_parts(value: Any) -> Any:
    if isinstance(value, QuantizedKV):
        return value.value
    if isinstance(value, (list, tuple)):
        return type(value)(_to_parts(v) for v in value)
    if isinstance(value, dict):
        return {name: _to_parts(v) for name, v in value.items()}
    return value


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on dequantized values; where it writes into an operand, quantize that operand's new values."""
    note_read(func, args)
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
        x = QuantizedKV.quantize(x.dequantize().to(dtype), equalize=x.shift is not None, keep=Keep.as_in(x.value))
    value = x.value
    moved = value.of_parts(
        aten._to_copy.default(part, device=device, non_blocking=non_blocking) for part in value.parts.values()
    )
    dtype = dtype or x.dtype
    exact = None if moved.exact is None else moved.exact.to(dtype)
    return QuantizedKV.of(moved._replace(scale=moved.scale.to(scale_dtype), dtype=dtype, exact=exact))


def _pin_memory(x: QuantizedKV, device: Any = None) -> QuantizedKV:
    return QuantizedKV.of(x.value.of_parts(part.pin_memory(device) for part in x.parts))


#: Operations that say where or in which dtype a tensor lives: they have no counterpart in a graph of plain tensors.
_OWN: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _to_copy,
    aten._pin_memory.default: _pin_memory,
    aten.is_pinned.default: lambda x, device=None: x.qdata.is_pinned(device),
    aten.dequantize.self: QuantizedKV.dequantize,
}

# `torch.load(..., weights_only=True)` reads tensors of this class.
torch.serialization.add_safe_globals([QuantizedKV, (QuantizedKV, "icw_compile.tensor.QuantizedKV")])
