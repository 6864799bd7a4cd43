"""`QuantizedKV`: the tensor that a cache layer holds in place of its float keys or values."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from icw_compile.cache.decoded import decoded_view
from icw_compile.cache.growth import Room, is_batchwise, rows_of_slice
from icw_compile.cache.parts import Layout, TensorOfParts, refuse_other_memory, views_like_their_base
from icw_compile.cache.shapes import call_of_shapes
from icw_compile.cache.turned import keep_straight, note_fakes
from icw_compile.cache.uncompiled import note_read
from icw_compile.compat.fx import empty_fake, is_fake, is_traced, schema_of, tree_leaves, tree_map, written_values
from icw_compile.formats import AXES, FORMATS, Format, Stored, make_format
from icw_compile.formats.evaluate import EAGER, SHAPES
from icw_compile.formats.kept import forget_rows
from icw_compile.formats.rules import RULES
from icw_compile.formats.writes import append, overwrite

__all__ = ["QuantizedKV"]

aten = torch.ops.aten


#: Parts that a tensor may have: ``None`` where it has none.
_OPTIONAL = ("shift", "exact", "position")


class QuantizedKV(TensorOfParts):
    """Keys or values of one cache layer, stored as int8 with one scale per head and token.

    To everything else it is the float tensor that it stands for, of shape ``[batch, kv_heads, tokens, head_dim]``.
    Operations that move rows (``slice``, ``index_select``, ``repeat_interleave``, ``roll``, ``clone``, ``to(device)``,
    ...) act on the stored parts exactly and give another `QuantizedKV`; writes of rows (``index_copy_``, ``copy_``,
    ``cat``, ...) quantize only what is new; everything else computes on the dequantized values, and an in-place
    operation of that kind quantizes its result again. A view that cuts through head_dim (``x[..., :8]``,
    ``x.transpose(2, 3)``) is a dequantized copy: writing into it does not reach the cache.

    Channels that are outliers would leave the others of their row few levels. With a ``shift``, each is divided by a
    power of two before it is quantized; what reads int8 multiplies the query, or the output, instead. The first write
    into an empty tensor settles the shift, and if it is of few tokens, a later one does so anew
    (`icw_compile.formats.equalized`).

    The first rows, and the last ones, may be kept in the float dtype besides (``exact``, ``position``, ``sinks``):
    they are read as they came. Operations that scatter the tokens forget them, and their int8 rows are read.

    ``cat([x, new], -2)`` grows like a vector: ``new`` is written behind ``x``, in spare rows of its storage, wherever
    no other tensor can notice (`icw_compile.cache.growth`).

    Args:
        qdata: int8, ``[batch, kv_heads, tokens, head_dim]`` (`icw_compile.formats.int8`).
        scale: ``[batch, kv_heads, tokens, 1]``; bfloat16 for 16-bit values, float32 for float32 ones.
        dtype: the float dtype that the tensor presents: float32, bfloat16 or float16.
        shift: ``[batch, kv_heads, 1, head_dim]``, exponents of the powers of two, 0 to 7; left out, there are none.
        exact: ``[batch, kv_heads, kept, head_dim]`` of ``dtype``: the rows that are kept; left out, there are none.
        position: int64 ``[kept]``: the index of each kept row, -1 for none.
        sinks: how many of them are for the first rows; the others are for the last.

    Raises:
        TypeError: for another ``dtype``.
        ValueError: the tensors do not belong together: shapes or dtypes are others.
    """

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
    ) -> "QuantizedKV":
        kept = 0 if exact is None else exact.shape[-2] - sinks
        layout = make_format(dtype, equalize=shift is not None, sink_tokens=sinks, recent_tokens=kept)
        # Version 0.1.0 stored the exponents as signed bytes.
        shift = shift if shift is None else shift.to(torch.uint8)
        parts = tuple(part for part in (qdata, scale, shift, exact, position) if part is not None)
        layout.checked(parts, qdata.shape)
        return cls.of(Stored(layout, parts, "." * (qdata.dim() - 2) + "TD" if qdata.dim() != 4 else AXES))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def quantize(
        cls, x: Tensor, *, equalize: bool = False, sink_tokens: int = 0, recent_tokens: int = 0
    ) -> "QuantizedKV":
        """Quantize the float tensor ``x[..., tokens, head_dim]``, one scale for each row.

        Args:
            x: float32, bfloat16 or float16.
            equalize: shift its outlier channels.
            sink_tokens, recent_tokens: how many of its first and last rows to keep as they are besides. Rows of zeros
                at the end count as not written yet.

        Raises:
            TypeError: ``x`` has another dtype.
        """
        layout = make_format(x.dtype, equalize=equalize, sink_tokens=sink_tokens, recent_tokens=recent_tokens)
        return cls.encode(x, layout)

    @classmethod
    def encode(cls, x: Tensor, layout: Format) -> "QuantizedKV":
        """The float tensor ``x[..., tokens, head_dim]`` in another format; rows of zeros at the end are not written."""
        value = cls.empty(x.shape, layout, x.device).value
        value = layout.settle(EAGER, value, x)
        value = value.with_parts(**layout.encode(EAGER, x, value))
        if value.kept and x.shape[-2]:
            written = (x != 0).movedim(-2, 0).flatten(1).any(dim=1)
            if filled := int((written * torch.arange(1, len(written) + 1, device=x.device)).amax()):
                index = torch.arange(filled, device=x.device)
                value = value.with_parts(**layout.keep(EAGER, value, x[..., :filled, :], index))
        return cls.of(value)

    @classmethod
    def zeros(
        cls,
        size: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        equalize: bool = False,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
    ) -> "QuantizedKV":
        """A tensor of zeros: of shape ``size``, no float storage is made for it.

        With ``equalize``, what is first written to it settles a shift. ``sink_tokens`` and ``recent_tokens`` say how
        many of the rows that are written to it stay in ``dtype``.
        """
        layout = make_format(dtype, equalize=equalize, sink_tokens=sink_tokens, recent_tokens=recent_tokens)
        return cls.empty(size, layout, torch.get_default_device() if device is None else torch.device(device))

    @classmethod
    def empty(cls, size: Sequence[int], layout: Format, device: torch.device) -> "QuantizedKV":
        """A tensor of shape ``size`` into which nothing was written: it reads as zeros."""
        value = layout.empty(EAGER, tuple(size), device)
        return cls.of(value if len(size) == 4 else replace(value, axes="." * (len(size) - 2) + "TD"))

    def __getattr__(self, name: str) -> Any:
        if f"_{name}" in self.__dict__.get("_names", ()):
            return self.value[name]
        if name in _OPTIONAL:
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def share_memory_(self) -> "QuantizedKV":
        """Move the stored parts to memory that other processes see."""
        self.straighten()
        for part in self.buffers:
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether other processes see the stored parts."""
        return all(part.is_shared() for part in self.buffers)

    def tolist(self) -> Any:
        """The values as nested lists of Python numbers."""
        return self.dequantize().tolist()

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], layout: Layout, outer_size: Any, outer_stride: Any
    ) -> "QuantizedKV":
        if any(map(is_fake, parts.values())):
            note_fakes()
        return QuantizedKV._make(list(parts.values()), layout, outer_size, outer_stride)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"QuantizedKV(shape={tuple(self.shape)}, dtype={dtype}, device='{self.device}', stored={self.format})"

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        if isinstance(part, QuantizedKV) and part._is_view() and all(type(each) is Tensor for each in part.buffers):
            return part.without_base()
        return part

    def without_base(self) -> "QuantizedKV":
        """The same view, which autograd does not know for one.

        It would keep what a cropped cache is a view of alive, and Dynamo would guard on the shape of that.
        """
        with torch.inference_mode(self.is_inference()):
            made = QuantizedKV._make(self.buffers, self._layout, self.shape, self.stride(), self._claim)
        if self._root is not None:
            self._root.note_view(made)
        return made

    def repeat_interleave(  # type: ignore[override]
        self, repeats: Any, dim: int | None = None, *, output_size: int | None = None
    ) -> Tensor:
        """As that of a tensor: whole sequences with their room to grow, and no view of what torch makes on the way."""
        if dim not in (0, -self.dim()):
            return super().repeat_interleave(repeats, dim, output_size=output_size)
        sequences = torch.arange(self.shape[0], device=self.device)
        return self.index_select(0, sequences.repeat_interleave(repeats, output_size=output_size))

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: BufferError, since there is no memory of floats to hand out."""
        raise BufferError("a QuantizedKV has no memory of floats to share: hand out .dequantize() instead.")

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedKV":
        copied: Any = self.clone()
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        value = self.value  # without spare rows
        saved = value.format, tuple(part.contiguous() for part in value.parts), value.axes
        try:
            _rebuild(*saved)
        except ValueError:  # a view whose parts could not be checked when they are loaded: saved as its values
            return self.dequantize().__reduce_ex__(protocol)
        return _rebuild, saved

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # Dynamo compiles what runs where a graph breaks: not this
    @views_like_their_base
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_traced():
            keep_straight()
        if func in _OWN:
            return _OWN[func](*args, **kwargs)
        if func is aten.cat.default and (grown := _append(*args, **kwargs)) is not None:
            return grown
        rule = RULES.get(func)
        if rule is None:
            return _on_values(func, args, kwargs)
        x = args[0]
        claim = x._claim if isinstance(x, QuantizedKV) else None
        run = EAGER if isinstance(x, QuantizedKV) and _is_real(x) else SHAPES
        if not isinstance(x, QuantizedKV):  # a list of them, or a float tensor that one is written to
            run = EAGER if all(_is_real(each) for each in _all_of(args)) else SHAPES
        if run is SHAPES and _gives_rows_by_value(func, args):
            return _on_values(func, args, kwargs)  # Dynamo would ask a part of the result for its length
        if claim is not None and not claim.is_view and is_batchwise(func, *args[1:]):
            return x._batchwise(rule, args, kwargs)
        shapes = call_of_shapes(func, args, kwargs) if run is SHAPES and not is_traced() else None
        if shapes is not None and (known := shapes.again()) is not None:
            return return_and_correct_aliasing(func, args, kwargs, known)
        schema = schema_of(func)
        if schema.is_mutable and isinstance(x, QuantizedKV) and _is_write_of_shapes(func, args, kwargs):
            func(*tree_map(_float_shape, args), **tree_map(_float_shape, kwargs))  # it may not fit
            if shapes is not None:
                shapes.learn(x)
            return return_and_correct_aliasing(func, args, kwargs, x)
        touches = schema.is_mutable or schema.gives_views  # it writes into x, or gives a view of it
        if schema.is_mutable and isinstance(x, QuantizedKV):
            x.before_write()
            x._is_settled = False
            claim = x._claim
        elif claim is not None and touches:
            x.separate()
            claim = x._claim
            if func is aten.view.default and not x.value.parts[0].is_contiguous():
                x._compact()
                claim = x._claim
        results = rule(run, *_to_stored(args), **_to_stored(kwargs))
        if results is None:
            return _on_values(func, args, kwargs)
        if schema.is_mutable:
            return return_and_correct_aliasing(func, args, kwargs, x)
        if touches and (claim is not None or (isinstance(x, QuantizedKV) and x.grows)):
            made = x._views(func, args, kwargs, results)
        elif isinstance(results, tuple):
            made = [cls.of(each) for each in results]
        else:
            made = cls.of(results)
        if touches and run is EAGER and claim is None and x.whole.kept:
            for view in made if isinstance(made, list) else [made]:
                x.note_view(view)
        if shapes is not None:
            shapes.learn(made)
        return return_and_correct_aliasing(func, args, kwargs, made)

    def _views(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> Any:
        """The tensors of what a view of a growing tensor gives, with the strides of what they stand for."""
        claim = self._claim  # a fake has none
        as_float = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        views = func(as_float, *args[1:], **kwargs)
        if isinstance(results, tuple):
            return [self.of(each, claim and claim.of_view(None), view.stride()) for each, view in zip(results, views)]
        rows = None if claim is None or claim.is_view else rows_of_slice(func, args)
        if claim is None or rows is None:
            return self.of(results, claim and claim.of_view(None), views.stride())
        return self._on(claim.of_view(rows), results, views.stride())

    def _batchwise(self, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "QuantizedKV":
        """An operation on whole sequences, done to the spare rows as well: the result keeps room to grow."""
        moved = rule(EAGER, self.whole, *args[1:], **kwargs)
        room = Room(list(moved.rows.values()))
        return self._on(room.claim(0, self.shape[2]), moved)


def _rebuild(layout: Format, parts: tuple[Tensor, ...], axes: str) -> QuantizedKV:
    """A saved tensor. Its file may come from anywhere: the parts are checked against each other."""
    if not isinstance(layout, Format) or not isinstance(axes, str) or not all(type(part) is Tensor for part in parts):
        raise ValueError("this file holds no QuantizedKV")
    if len(parts) != len(layout.parts) or len(axes) != parts[0].dim() or axes[-1] != "D" or axes.count("T") != 1:
        raise ValueError("the parts of a saved QuantizedKV do not belong together")
    channels = layout.channels(EAGER, Stored(layout, parts, axes))
    layout.checked(parts, (*parts[0].shape[:-1], channels))
    return QuantizedKV.of(Stored(layout, parts, axes))


def _append(tensors: Sequence[Any], dim: int = 0) -> QuantizedKV | None:
    """``cat([x, new, ...], -2)`` where ``new`` is whole rows for ``x``, written behind it; else ``None``."""
    x = tensors[0]
    if type(x) is not QuantizedKV or x._layout.axes != AXES or dim not in (-2, 2):
        return None
    if not _is_real(x) and not (_is_shape(x) and not x.whole.kept and len(_all_of(tensors)) == 1):
        return None
    expected = (x.dtype, x.device, x.shape[:2], x.shape[3:])
    if any((new.dtype, new.device, new.shape[:2], new.shape[3:]) != expected for new in tensors[1:]):
        return None
    more = sum(new.shape[2] for new in tensors[1:])
    if not _is_real(x):
        return _longer(x, x.shape[2] + more)
    tells = not any(isinstance(new, QuantizedKV) for new in tensors[1:]) and len(tensors) == 2
    claim, parts = x.reserve(more, tells=tells)
    value = Stored(x.format, parts)
    start = x.shape[2]
    tells = tells and more > 1 and x.format.tells(start, more)
    for new in tensors[1:]:
        value = append(EAGER, value, _to_stored(new), start, new.shape[2], tells=tells)
        start += new.shape[2]
    return QuantizedKV._on(claim, value)


def _longer(x: QuantizedKV, tokens: Any) -> QuantizedKV:
    """The shape of ``x[B, H, T, D]`` with so many tokens."""
    value = x.whole
    parts = [
        empty_fake(part, (*part.shape[:2], tokens, *part.shape[3:]) if spec.has_rows else part.shape)
        for spec, part in zip(value.format.parts, value.parts, strict=True)
    ]
    return QuantizedKV.of(value.of_parts(parts))


def _all_of(value: Any) -> list[QuantizedKV]:
    """Every `QuantizedKV` among arguments, in lists as well."""
    return [x for x in tree_leaves(value) if isinstance(x, QuantizedKV)]


def _is_real(x: QuantizedKV) -> bool:
    """Whether its values can be looked at: they are no fakes, and are not being traced."""
    return all(type(part) is Tensor for part in x.buffers)


def _is_shape(x: QuantizedKV) -> bool:
    """Whether it is a fake of which nothing is noted down, as Dynamo's are: only shapes and layouts are asked for."""
    return all(map(is_fake, x.buffers)) and not is_traced()


def _is_write_of_shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether nothing is to be known of a write but that the operands fit: what is written is no fake's business."""
    return torch.Tag.inplace_view not in func.tags and all(map(_is_shape, _all_of((args, kwargs))))


def _float_shape(value: Any) -> Any:
    """For a `QuantizedKV` of fakes a fake of the float tensor that it stands for; anything else as it is."""
    if not isinstance(value, QuantizedKV):
        return value
    part: Any = value.buffers[0]
    return empty_fake(part, value.shape, value.stride(), dtype=value.dtype)


def _gives_rows_by_value(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation picks as many rows as a boolean mask is true for."""
    masks = (x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8))
    return torch.Tag.dynamic_output_shape in func.tags and next(masks, None) is not None


def _to_stored(value: Any) -> Any:
    if isinstance(value, QuantizedKV):
        return value.value
    if isinstance(value, (list, tuple)):
        return type(value)(_to_stored(v) for v in value)
    if isinstance(value, dict):
        return {name: _to_stored(v) for name, v in value.items()}
    return value


def as_float(value: Any) -> Any:
    """A `QuantizedKV` as the float tensor that it stands for; anything else as it is."""
    return value.dequantize() if isinstance(value, QuantizedKV) else value


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on dequantized values; where it writes into an operand, quantize that operand's new values."""
    note_read(func, args)
    values: dict[int, tuple[QuantizedKV, Tensor]] = {}

    def dequantized(value: Any) -> Any:
        if not isinstance(value, QuantizedKV):
            return value
        made = _float_shape(value) if _is_shape(value) else value.dequantize()
        return values.setdefault(id(value), (value, made))[1]

    plain_args, plain_kwargs = tree_map(dequantized, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if not schema_of(func).is_mutable:
        if not all(map(_is_real, _all_of((args, kwargs)))):
            return result

        def again() -> Any:
            now_args, now_kwargs = tree_map(as_float, (args, kwargs))
            return func(*now_args, **now_kwargs)

        return decoded_view(func, result, again, lambda: _view_of_stored(func, args, kwargs))
    written = written_values(func, plain_args, plain_kwargs)
    for original, value in values.values():
        if any(w is value for w in written):
            original.before_write()
            original._is_settled = False
            overwrite(EAGER if _is_real(original) else SHAPES, original.value, value)
            if result is value:
                result = original
            elif isinstance(result, (list, tuple)):
                result = type(result)(original if each is value else each for each in result)
    return result


def _view_of_stored(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives of what is stored alone, to be written: rows that are kept besides are forgotten."""

    def stored_alone(value: Any) -> Any:
        if not isinstance(value, QuantizedKV) or not value.whole.kept:
            return value
        value.before_write()
        return QuantizedKV.of(value.value.inner)

    view = func(*tree_map(stored_alone, args), **tree_map(stored_alone, kwargs))
    if all(isinstance(each, QuantizedKV) for each in tree_leaves(view)):
        for value in _all_of((args, kwargs)):
            value._is_settled = False
            if value.whole.kept:
                forget_rows(value.whole)
    return view


def _to_copy(
    x: QuantizedKV,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> Tensor:
    """``x.to(...)``: stays quantized on another device or in another supported dtype, else becomes a float tensor."""
    value = x.value
    if dtype is not None and dtype != x.dtype:
        try:
            value = value.format.cast(EAGER, value, dtype)
        except TypeError:
            values = x.dequantize()
            return aten._to_copy.default(values, dtype=dtype, device=device, non_blocking=non_blocking, **kwargs)
    moved = value.of_parts(
        aten._to_copy.default(part, device=device, non_blocking=non_blocking) for part in value.parts
    )
    return QuantizedKV.of(replace(moved, is_view=False))


def _pin_memory(x: QuantizedKV, device: Any = None) -> QuantizedKV:
    return QuantizedKV.of(x.value.of_parts(part.pin_memory(device) for part in x.parts))


#: Operations that say where or in which dtype a tensor lives: they have no counterpart in a graph of plain tensors.
_OWN: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _to_copy,
    aten._pin_memory.default: _pin_memory,
    aten.is_pinned.default: lambda x, device=None: x.buffers[0].is_pinned(device),
    aten.dequantize.self: QuantizedKV.dequantize,
    **{getattr(aten.set_, name): refuse_other_memory for name in aten.set_.overloads()},
    # The memory that a stream uses is that of the parts.
    aten.record_stream.default: lambda x, stream: [part.record_stream(stream) for part in x.buffers] and None,
}

# `torch.load(..., weights_only=True)` reads tensors of this class, those of version 0.1.0 as well.
torch.serialization.add_safe_globals([_rebuild, *FORMATS, (QuantizedKV, "icw_compile.tensor.QuantizedKV")])
