"""A tensor that is made of the parts of a format, and that may grow in the spare rows of its storage."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from icw_compile.cache.growth import MIN_SPARE, Claim, Room, capacity_for
from icw_compile.cache.turned import Window, straighten
from icw_compile.compat.dynamo import let_vary
from icw_compile.compat.flex import let_flex_attention_take
from icw_compile.compat.fx import schema_of
from icw_compile.formats import AXES, Format, Stored
from icw_compile.formats.base import decode
from icw_compile.formats.evaluate import EAGER
from icw_compile.formats.kept import forget_rows

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Layout", "TensorOfParts", "refuse_other_memory", "views_like_their_base"]


class Layout(NamedTuple):
    """What a `QuantizedKV` is besides its parts; Dynamo guards on it.

    ``axes`` and ``is_view`` are as in `icw_compile.formats.Stored`. ``grows``: its parts go on behind its rows, to the
    end of the storage that it may grow into.
    """

    format: Format
    axes: str = AXES
    is_view: bool = False
    grows: bool = False


class TensorOfParts(Tensor):
    """A float tensor to everything else; `icw_compile.QuantizedKV` says what operations do to it."""

    #: Parts as they are stored, by name; of a growing tensor with the spare rows behind its own.
    _names: tuple[str, ...]
    _layout: Layout
    _claim: Claim | None
    #: Of a view of one that keeps rows: what it is a view of, and whether the rows that it keeps are a copy.
    _root: TensorOfParts | None = None
    _lags: bool = False
    #: Such views, by weak references.
    _lagging: tuple[weakref.ref[TensorOfParts], ...] = ()
    #: What `_settled` had for its memory when `_is_settled` was found.
    _noted: object = None
    _window: Window | None = None

    @classmethod
    def _make(
        cls,
        parts: Sequence[Tensor],
        layout: Layout,
        size: Sequence[Any] | None = None,
        stride: Sequence[Any] | None = None,
        claim: Claim | None = None,
    ) -> Self:
        """A tensor of these parts. Without ``size`` that of the first part; without ``stride`` its as well."""
        let_flex_attention_take(cls, cls.dequantize)  # once, before Dynamo can meet one
        first = parts[0]
        if size is None:
            channels = layout.format.channels(EAGER, Stored(layout.format, tuple(parts), layout.axes))
            size = (*first.shape[:-1], channels)
            packed = channels // max(first.shape[-1], 1)
            stride = [step * packed for step in first.stride()[:-1]] + [1] if packed > 1 else first.stride()
        self: Self = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=layout.format.dtype, device=first.device
        )
        self._names = _names_of(layout.format)
        for name, part in zip(self._names, parts, strict=True):
            setattr(self, name, part)
        self._layout = layout
        self._claim = claim
        if claim is not None:
            claim.tensor = weakref.ref(self)
        return self

    @classmethod
    def of(cls, value: Stored, claim: Claim | None = None, stride: Sequence[int] | None = None) -> Self:
        """The tensor made of these parts; ``claim`` and ``stride`` are those of a view of a growing tensor."""
        layout = Layout(value.format, value.axes, value.is_view)
        made = cls._make(value.parts, layout, claim=claim)
        if stride is None or made.stride() == tuple(stride):
            return made
        return cls._make(value.parts, layout, size=made.shape, stride=stride, claim=claim)

    @classmethod
    def _on(cls, claim: Claim, value: Stored, stride: Sequence[int] | None = None) -> Self:
        """The tensor that shows the rows of ``claim``, and the parts of ``value`` that are no rows."""
        rows = iter(claim.room.from_row(claim.start))
        parts = [next(rows) if spec.has_rows else part for spec, part in zip(value.format.parts, value.parts)]
        head = claim.room.parts[0].shape
        channels = value.format.channels(EAGER, value)
        size = (head[0], head[1], claim.end - claim.start, channels)
        return cls._make(parts, Layout(value.format, grows=True), size, stride, claim)

    @classmethod
    def growing(cls, value: Stored) -> Self:
        """A tensor that alone owns the storage of its contiguous parts ``[batch, kv_heads, tokens, ...]``."""
        rows = list(value.rows.values())
        tokens = rows[0].shape[2]
        if all(part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes for part in rows):
            room = Room(rows)
        else:  # they are a slice of what was made, which nothing else shows
            room = Room.copy_of(rows, tokens, capacity_for(tokens))
        return cls._on(room.claim(0, tokens), value)

    @property
    def format(self) -> Format:
        """How it is stored."""
        return self._layout.format

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The parts with the spare rows behind its own, if it grows; as they lie in memory (`window`)."""
        return tuple(getattr(self, name) for name in self._names)

    @property
    def data(self) -> Tensor:
        """This tensor, as autograd does not see it; another cannot be assigned.

        Raises:
            NotImplementedError: on assignment.
        """
        return super().data

    @data.setter
    def data(self, other: Tensor) -> None:
        refuse_other_memory()

    def __copy__(self) -> Tensor:
        return self.detach()

    @property
    def _is_settled(self) -> bool:
        """Whether it is known that no write of one token will change how it is stored.

        Of this tensor, until it or another in the same memory is written otherwise.
        """
        return self._noted is not None and self._noted is _settled.get(self.buffers[0].untyped_storage())

    @_is_settled.setter
    def _is_settled(self, value: bool) -> None:
        first = self.buffers[0]
        if type(first) is not Tensor:  # of fakes nothing is known
            return
        if value:
            self._noted = _settled.setdefault(first.untyped_storage(), object())
        else:
            _settled.pop(first.untyped_storage(), None)

    @property
    def window(self) -> Window:
        """Its rows as those of a window that may be turned."""
        if self._window is None:
            self._window = Window.of(list(self.whole.rows.values()))
        return self._window

    def straighten(self) -> None:
        """Put its tokens in order, if it shows a window that is turned."""
        straighten(getattr(self, self._names[0]))

    @property
    def value(self) -> Stored:
        """All that it is made of, the tokens in order."""
        self.straighten()
        layout = self._layout
        stored = Stored(layout.format, self.buffers, layout.axes, layout.is_view)
        if not layout.grows:
            return stored
        tokens = self.shape[2]
        return stored.with_parts(**{name: part[:, :, :tokens] for name, part in stored.rows.items()})

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The stored tensors: ``qdata``, ``scale`` and, if there are any, ``shift``, ``exact`` and ``position``."""
        return self.value.parts

    @property
    def whole(self) -> Stored:
        """Its buffers as a value, that of a longer tensor if it grows; of a turned window not in order."""
        return Stored(self._layout.format, self.buffers, self._layout.axes)

    @property
    def grows(self) -> bool:
        """Whether spare rows may follow its own in its buffers."""
        return self._layout.grows

    def dequantize(self) -> Tensor:
        """The values as an ordinary float tensor, of this tensor's dtype."""
        values: Tensor = decode(EAGER, self.value)
        return values

    def reserve(
        self, rows: int, *, capacity: int | None = None, tells: bool = True
    ) -> tuple[Claim, tuple[Tensor, ...]]:
        """Room for ``rows`` more behind this tensor's, for a tensor independent of it.

        They are in spare storage where no other tensor has taken them. Otherwise the whole moves to a larger storage
        (of ``capacity`` rows), and this tensor moves along, so that the old storage is freed, if it was the only one
        there.

        Where the rows that there are were too few to decide how they are stored, they move to a storage of their own,
        where that is decided anew: this tensor stays as it is. Rows that are stored already (``tells=False``) decide
        nothing.

        Returns:
            the claim to this tensor's rows and the new ones, and the parts, those that have rows with all that follow.
        """
        self.straighten()
        claim, like, total = self._claim, self.whole, self.shape[2] + rows
        tells = tells and like.format.tells(self.shape[2], rows)
        if not tells and claim is not None and (extended := claim.room.extend(claim, rows)) is not None:
            return extended, self.buffers
        if tells and rows == 1:  # of more, the write itself knows what they tell
            like = like.with_parts(**like.format.told(EAGER, like, None, self.shape[2]))
        room = Room.copy_of(list(like.rows.values()), self.shape[2], capacity or capacity_for(total), grows=not tells)
        if not tells and claim is not None and not claim.is_view and not claim.others():
            self._move_to(room)
        else:  # only tensors of one room share what the tokens share
            shared = {s.name: part for s, part in zip(like.format.parts, like.parts) if not s.has_rows}
            like = like.with_parts(**{name: part.clone() for name, part in shared.items()})
        return room.claim(0, total), like.with_parts(**dict(zip(like.rows, room.parts, strict=True))).parts

    def grown(self, claim: Claim, parts: tuple[Tensor, ...], *, rows: int | None = None) -> Self:
        """What a reservation of this tensor becomes: all its rows, or the last ``rows`` of them.

        It is moved to a larger storage if hardly any rows are left for the next. Runs at every step, for each part of
        every layer: it makes no more than it has to.
        """
        room = claim.room
        if rows is not None and claim.end - rows > claim.start:
            claim = room.claim(claim.end - rows, claim.end)
            moved = iter(room.from_row(claim.start))
            specs = self._layout.format.parts
            parts = tuple(next(moved) if spec.has_rows else part for spec, part in zip(specs, parts, strict=True))
        batch, heads, _, channels = self.shape
        layout = self._layout if self._layout.grows else Layout(self._layout.format, grows=True)
        made: Self = torch.Tensor._make_wrapper_subclass(
            type(self), (batch, heads, claim.end - claim.start, channels), dtype=self.dtype, device=self.device
        )
        made.__dict__.update(zip(self._names, parts, strict=True))
        made._names, made._layout, made._claim = self._names, layout, claim
        claim.tensor = weakref.ref(made)
        if rows is None:
            let_vary(made, 2)
        return made if room.capacity - claim.end >= MIN_SPARE else made.with_spare()

    def with_spare(self) -> Self:
        """This tensor, which grows, moved to a larger storage if hardly any rows are left for the next."""
        claim = self._claim
        assert claim is not None
        if claim.room.capacity - claim.end < MIN_SPARE:
            tokens = claim.end - claim.start
            self._move_to(Room.copy_of(list(self.whole.rows.values()), tokens, capacity_for(tokens)))
        return self

    def _move_to(self, room: Room) -> None:
        self._place(room.claim(0, self.shape[2]))

    def _place(self, claim: Claim) -> None:
        claim.tensor = weakref.ref(self)
        self._claim = claim
        names = (f"_{name}" for name in self.whole.rows)
        for name, part in zip(names, claim.room.from_row(claim.start), strict=True):
            setattr(self, name, part)

    def note_view(self, view: TensorOfParts) -> None:
        """That ``view`` is one of this tensor, which keeps rows and does not grow."""
        kept = zip(view.whole.kept.values(), self.whole.kept.values(), strict=True)
        view._root = root = self if self._root is None else self._root
        view._lags = self._lags or any(
            new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr() for new, old in kept
        )
        if view._lags:
            root._lagging = (*(each for each in root._lagging if each() is not None), weakref.ref(view))

    def settle(self) -> None:
        """Decide anew how rows are stored, if that is due before one token is written by compiled code.

        On an accelerator, the first calls wait for it to know.
        """
        if self._is_settled:
            return
        value = self.value
        if value.format.is_settled(value):
            self._is_settled = True
        else:
            value.format.settle_stored(value)

    def before_write(self) -> None:
        """Make sure that a write into this tensor reaches it and its views, and them alone.

        What it is a view of, and its views, would not follow in which rows they keep besides: they forget those, and
        what is stored stands for them.

        Raises:
            NotImplementedError: rows are kept, and what this is a view of is not known.
        """
        if self.whole.kept and type(self.buffers[0]) is Tensor:  # no fake, whose views a graph knows
            if self._layout.is_view and self._root is None and self._claim is None:
                raise NotImplementedError(
                    "icw_int8kv: a cache with icw.sink_tokens or icw.recent_tokens is written as a whole; this writes "
                    "into a view of one that is not known, and the rows that it keeps would not follow."
                )
            for tensor in self._relatives():
                forget_rows(tensor.whole)
        self.separate()

    def _relatives(self) -> list[TensorOfParts]:
        """Its views that count kept rows otherwise; of a view what it is a view of and those of that, and itself."""
        claim, root = self._claim, self if self._root is None else self._root
        shown = [] if claim is None else [each.tensor() for each in claim.others() if each.owner is claim.owner]
        found = [*shown, *(view() for view in root._lagging), *((self, root) if self._layout.is_view else ())]
        return [tensor for tensor in found if tensor is not None]

    def separate(self) -> None:
        """Make sure that a write into this tensor reaches it and its views alone, not what grew out of it."""
        claim = self._claim
        if claim is not None and any(other.owner is not claim.owner for other in claim.others()):
            if claim.is_view:
                raise NotImplementedError("icw_int8kv: a view of a cache is written whose storage another one shares.")
            tokens = self.shape[2]
            self._move_to(Room.copy_of(list(self.whole.rows.values()), tokens, self.buffers[0].shape[2]))
            for spec, name in zip(self._layout.format.parts, self._names, strict=True):
                if not spec.has_rows:
                    setattr(self, name, getattr(self, name).clone())

    def _compact(self) -> None:
        """Leave the spare rows, with all views of this tensor: it is contiguous, as what it stands for is."""
        claim = self._claim
        assert claim is not None
        family = [claim, *claim.others()]
        first, last = min(each.start for each in family), max(each.end for each in family)
        tensors = [each.tensor() for each in family]
        if any(each.is_view for each in family) or None in tensors or (first, last) != (claim.start, claim.end):
            raise NotImplementedError(
                "icw_int8kv: `view` of a cache with spare rows, of which there are views: use `reshape`, which copies."
            )
        room = Room([part[:, :, first:last].clone() for part in claim.room.parts])
        for each, tensor in zip(family, tensors, strict=True):
            assert tensor is not None
            tensor._place(room.claim(each.start - first, each.end - first, each.owner))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored parts with their spare rows (``nbytes`` counts the float tensor that they stand for)."""
        specs = zip(self._layout.format.parts, self.buffers, strict=True)
        own = sum(part.nbytes for spec, part in specs if self._claim is None or not spec.has_rows)
        return own if self._claim is None else own + self._claim.room.nbytes

    @property
    def spare_rows(self) -> int:
        """Rows that lie free, or are taken by tensors that grew out of this one, behind its own."""
        return 0 if self._claim is None else self._claim.room.capacity - self._claim.end

    def __tensor_flatten__(self) -> tuple[list[str], Layout]:
        return list(self._names), self._layout


#: By the memory of the first part: an object until what is stored there is to be looked at anew.
_settled: weakref.WeakKeyDictionary[torch.UntypedStorage, object] = weakref.WeakKeyDictionary()


@functools.cache
def _names_of(layout: Format) -> tuple[str, ...]:
    return tuple(f"_{part.name}" for part in layout.parts)


def refuse_other_memory(*args: Any, **kwargs: Any) -> NoReturn:
    """In place of ``set_`` and ``.data =``. Raises: NotImplementedError."""
    raise NotImplementedError(
        "icw_int8kv: a quantized cache cannot take over the memory of another tensor, nor lend it its own (`set_`, "
        "`.data =`). Copy the values, as by `keys.copy_(other)`, or assign the other tensor where the cache holds this."
    )


def views_like_their_base(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """A ``__torch_dispatch__`` whose views in inference mode are inference tensors only if what they view is one.

    torch takes no other for a view.
    """

    @functools.wraps(dispatch)
    def dispatch_as_base(
        cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema = schema_of(func)
        if torch.is_inference_mode_enabled() and schema.gives_views and not schema.is_mutable:
            with torch.inference_mode(args[0].is_inference()), torch.no_grad():
                return dispatch(cls, func, types, args, kwargs)
        return dispatch(cls, func, types, args, kwargs)

    return dispatch_as_base
