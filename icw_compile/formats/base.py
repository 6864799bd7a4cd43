"""What a stored value is: parts with named axes, and how values become parts and come back.

A `Format` is written down once. Its parts are tensors whose axes are named after those of the value that they stand
for: ``B`` and ``H`` (and whatever else stands in front), ``T`` tokens, ``D`` channels. A part that is the same for all
tokens has no ``T``, one that is the same for all channels no ``D``: it is stored with a size of 1 there. ``K`` are rows
that are kept besides, in the place of ``T``. An operation that moves data along an axis acts on the parts that have
that axis, and on no others (`icw_compile.formats.rules`).

::

    int8 rows            qdata: B H T D    scale: B H T 1
    int4 rows            packed: B H T D   scale: B H T 1   codes: B H T 1   (two channels in a byte)
    shifted channels     ... of the inner format, shift: B H 1 D
    rows kept besides    ... of the inner format, exact: B H K D, position: K

Everything is written over an *evaluator*: for eager tensors (`icw_compile.cache.tensor`) it runs an operation, for a
graph (`icw_compile.passes.graph`) it adds a node. So a format, and a rule, is written once for both.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

__all__ = ["AXES", "Evaluator", "Format", "Part", "Stored", "Wrapper", "decode"]

aten = torch.ops.aten

#: The axes of a key or value cache, in order.
AXES = "BHTD"


class Part(NamedTuple):
    """One stored tensor: its name, and an axis for each of its dimensions, ``1`` for one that it lacks."""

    name: str
    axes: str

    def has(self, axis: str) -> bool:
        """Whether it has the axis of this letter. Axes without a name are in front, as ``B`` is."""
        return (axis if axis in "TD" else "B") in self.axes

    @property
    def is_kept(self) -> bool:
        """Whether it has the tokens in another form: some of them are kept besides."""
        return "K" in self.axes

    @property
    def has_rows(self) -> bool:
        """Whether it has a row for each token."""
        return "T" in self.axes

    @property
    def is_aligned(self) -> bool:
        """Whether it has a dimension for each of the value's."""
        return "B" in self.axes


class Evaluator(Protocol):
    """How an operation is run, and how the metadata of an operand is seen."""

    #: The operation that gives parts another shape. Spare rows may lie between the heads of a part, where there are
    #: none between those of the tensor that it stands for, so that ``view`` will not always do.
    view: Any
    #: Whether what it runs is carried out, in the end: it is not where only shapes are worked out.
    takes_effect: bool
    #: Whether what it runs is done at once, and operands are tensors that can be looked at.
    is_eager: bool

    def call(self, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...

    def tensor(self, operand: Any) -> torch.Tensor:
        """The tensor, or the fake tensor, behind an operand: for its shape and dtype."""
        ...

    def size(self, operand: Any, dim: int) -> Any:
        """A size of an operand, to be given to an operation."""
        ...

    def is_new(self, operand: Any) -> bool:
        """Whether an operand is known to be storage that was just made, and into which nothing was written."""
        ...

    def same(self, a: Any, b: Any) -> bool:
        """Whether two operands are known to hold the same."""
        ...


@dataclass(frozen=True)
class Stored:
    """One stored value: its format, and its parts as tensors or as graph nodes.

    Attributes:
        format: what it is.
        parts: one for each of ``format.parts``.
        axes: a letter for each dimension of the value: ``T``, ``D``, and anything else in front. ``D`` is the last.
        is_view: it shows some of a storage, or shows it otherwise: what is written through it is written there.
    """

    format: "Format"
    parts: tuple[Any, ...]
    axes: str = AXES
    is_view: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.parts[[part.name for part in self.format.parts].index(name)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the value."""
        return self.format.dtype

    @property
    def named(self) -> dict[str, Any]:
        """The parts by name."""
        return {part.name: value for part, value in zip(self.format.parts, self.parts, strict=True)}

    @property
    def rows(self) -> dict[str, Any]:
        """The parts that have a row for each token, by name."""
        return {part.name: value for part, value in zip(self.format.parts, self.parts, strict=True) if part.has_rows}

    @property
    def kept(self) -> dict[str, Any]:
        """The parts that have some tokens in another form, by name."""
        return {part.name: value for part, value in zip(self.format.parts, self.parts, strict=True) if part.is_kept}

    @property
    def inner(self) -> "Stored":
        """What a wrapper wraps."""
        inner = self.format.inner
        return replace(self, format=inner, parts=self.parts[: len(inner.parts)])

    def of_parts(self, parts: Iterable[Any]) -> "Stored":
        """The same value made of other parts, in the same order."""
        parts = tuple(parts)
        assert len(parts) == len(self.parts)
        return replace(self, parts=parts)

    def with_parts(self, **parts: Any) -> "Stored":
        """The same value with other parts of these names."""
        return self.of_parts(parts.get(name, part) for name, part in self.named.items())

    @property
    def token_dim(self) -> int:
        """The dimension of the tokens, counted from the end; an error if there is none any more."""
        return self.axes.index("T") - len(self.axes)


@dataclass(frozen=True)
class Format(ABC):
    """How keys or values of one float dtype are stored. Its text (``str``) is its name, and says all of it."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """What is stored. The first part has all axes of the value."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the values that it stands for."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the innermost format is called: what a kernel says that it reads."""

    @property
    def inner(self) -> "Format":
        """The format that this one wraps."""
        raise TypeError(f"{self} wraps no format")

    @property
    def layers(self) -> tuple["Format", ...]:
        """This format, and those that it wraps, from the outside in."""
        return (self,)

    def channels(self, run: Evaluator, x: Stored) -> Any:
        """The size of the value's last axis."""
        return run.tensor(x.parts[0]).shape[-1]

    @abstractmethod
    def empty(self, run: Evaluator, size: Sequence[Any], device: torch.device) -> Stored:
        """Storage for a value of shape ``size``, into which nothing was written: it reads as zeros."""

    @abstractmethod
    def encode(self, run: Evaluator, values: Any, into: Stored) -> dict[str, Any]:
        """Float ``values`` as rows for the storage ``into``: a part of each name that has rows."""

    @abstractmethod
    def decode(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Any:
        """The value that ``x`` stands for, in ``dtype``."""

    def scaled_rows(self, run: Evaluator, x: Stored) -> tuple[Any, Any] | None:
        """A number for each channel, and what all of its row is multiplied by; ``None`` if it is not stored so.

        For attention that reads rows inside of its own sums. Of the rows as the innermost format has them.
        """
        return None

    @abstractmethod
    def written(self, x: Stored) -> Any:
        """A part of ``x``, with rows, that is all zeros as long as nothing was written."""

    def is_empty(self, run: Evaluator, x: Stored) -> Any:
        """Whether nothing was written to ``x``, whose last axes are ``TD``: bool ``[..., 1, 1]``."""
        return run.call(aten.all.dims, run.call(aten.eq.Scalar, self.written(x), 0), [-2, -1], True)

    @abstractmethod
    def cast(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Stored:
        """``x`` as values of another dtype. Raises TypeError where that cannot be stored."""

    def settle(self, run: Evaluator, into: Stored, source: Any) -> Stored:
        """``into``, ready for a write of ``source`` along the tokens: where the first write decides something."""
        return into

    def tells(self, length: Any, rows: Any) -> bool:
        """Whether what `settle` decided for ``length`` rows is decided anew when ``rows`` more are written."""
        return False

    def settle_more(self, run: Evaluator, into: Stored, source: Any, kept: Sequence[Any] = ()) -> Stored:
        """The same where ``source`` is rows beside those that are there, which may have been too few to decide.

        ``kept``: the parts of a wrapper that has rows as they came.
        """
        return into

    def settle_stored(self, into: Stored, kept: Sequence[Any] = ()) -> Stored:
        """What `settle_more` does for one token of tensors, of which nothing is known but that it will be written."""
        return into

    def is_settled(self, value: Stored) -> bool:
        """Whether `settle_stored` has nothing to do for these tensors, whatever is written to more rows."""
        return True

    def told(self, run: Evaluator, into: Stored, source: Any, length: Any, kept: Sequence[Any] = ()) -> dict[str, Any]:
        """The parts that `settle_more` would change, as they become, the first rows of those that have any.

        Args:
            source: the rows to be written, ``None`` for one of which nothing is known.
            length: how many rows there are; ``None``: those that are no zeros.
        """
        return {}

    def keep(self, run: Evaluator, into: Stored, values: Any, index: Any) -> dict[str, Any]:
        """The parts that are not rows, after ``values`` were written to the rows ``index``, ascending with no gap."""
        return {}

    def as_stored(self, run: Evaluator, values: Any, like: Stored) -> Any:
        """Float ``values[..., D]`` as the base format would be given them for the storage ``like``, losing nothing."""
        return values

    def into_query(self, run: Evaluator, query: Any, keys: Stored) -> Any:
        """``query[B, Hq, T, D]`` for a product with the keys as the base format stores them."""
        return query

    def into_output(self, run: Evaluator, output: Any, values: Stored) -> Any:
        """The attention over the values, where ``output[B, Hq, T, D]`` is that over what the base format stores."""
        return output

    def move_tokens(self, run: Evaluator, x: Stored, target: Any, args: Sequence[Any]) -> dict[str, Any]:
        """The parts that have ``K``, after the operation ``target(x, *args)`` along the tokens."""
        return {}

    def forget(self, run: Evaluator, x: Stored) -> Stored:
        """``x``, whose kept rows are none from now on: its storage is written."""
        return x

    @abstractmethod
    def bytes_per_token(self, heads: int, head_dim: int) -> int:
        """Bytes that each token takes."""

    def bytes_per_sequence(self, heads: int, head_dim: int) -> int:
        """Bytes that each sequence takes besides, however long it is."""
        return 0

    @abstractmethod
    def checked(self, parts: Sequence[torch.Tensor], size: Sequence[int]) -> None:
        """Raise ValueError unless these tensors are the parts of a value of shape ``size``."""


@dataclass(frozen=True)
class Wrapper(Format):
    """A format that adds something to another: parts, or what happens on the way in and out."""

    wrapped: Format

    @property
    def name(self) -> str:
        return self.wrapped.name

    @property
    def inner(self) -> Format:
        return self.wrapped

    @property
    def dtype(self) -> torch.dtype:
        return self.wrapped.dtype

    @property
    def layers(self) -> tuple[Format, ...]:
        return (self, *self.wrapped.layers)

    def channels(self, run: Evaluator, x: Stored) -> Any:
        return self.wrapped.channels(run, x.inner)

    def encode(self, run: Evaluator, values: Any, into: Stored) -> dict[str, Any]:
        return self.wrapped.encode(run, values, into.inner)

    def decode(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Any:
        return self.wrapped.decode(run, x.inner, dtype)

    def scaled_rows(self, run: Evaluator, x: Stored) -> tuple[Any, Any] | None:
        return self.wrapped.scaled_rows(run, x.inner)

    def cast(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Stored:
        inner = self.wrapped.cast(run, x.inner, dtype)
        return replace(
            inner, format=replace(self, wrapped=inner.format), parts=(*inner.parts, *x.parts[len(inner.parts) :])
        )

    def written(self, x: Stored) -> Any:
        return self.wrapped.written(x.inner)

    def settle(self, run: Evaluator, into: Stored, source: Any) -> Stored:
        settled = self.wrapped.settle(run, into.inner, source)
        return into.of_parts((*settled.parts, *into.parts[len(settled.parts) :]))

    def tells(self, length: Any, rows: Any) -> bool:
        return self.wrapped.tells(length, rows)

    def settle_more(self, run: Evaluator, into: Stored, source: Any, kept: Sequence[Any] = ()) -> Stored:
        settled = self.wrapped.settle_more(run, into.inner, source, kept)
        return into.of_parts((*settled.parts, *into.parts[len(settled.parts) :]))

    def settle_stored(self, into: Stored, kept: Sequence[Any] = ()) -> Stored:
        settled = self.wrapped.settle_stored(into.inner, kept)
        return into.of_parts((*settled.parts, *into.parts[len(settled.parts) :]))

    def is_settled(self, value: Stored) -> bool:
        return self.wrapped.is_settled(value.inner)

    def told(self, run: Evaluator, into: Stored, source: Any, length: Any, kept: Sequence[Any] = ()) -> dict[str, Any]:
        return self.wrapped.told(run, into.inner, source, length, kept)

    def keep(self, run: Evaluator, into: Stored, values: Any, index: Any) -> dict[str, Any]:
        return self.wrapped.keep(run, into.inner, values, index)

    def as_stored(self, run: Evaluator, values: Any, like: Stored) -> Any:
        return self.wrapped.as_stored(run, values, like.inner)

    def into_query(self, run: Evaluator, query: Any, keys: Stored) -> Any:
        return self.wrapped.into_query(run, query, keys.inner)

    def into_output(self, run: Evaluator, output: Any, values: Stored) -> Any:
        return self.wrapped.into_output(run, output, values.inner)

    def move_tokens(self, run: Evaluator, x: Stored, target: Any, args: Sequence[Any]) -> dict[str, Any]:
        return self.wrapped.move_tokens(run, x.inner, target, args)

    def forget(self, run: Evaluator, x: Stored) -> Stored:
        inner = self.wrapped.forget(run, x.inner)
        return x.of_parts((*inner.parts, *x.parts[len(inner.parts) :]))

    def bytes_per_token(self, heads: int, head_dim: int) -> int:
        return self.wrapped.bytes_per_token(heads, head_dim)

    def bytes_per_sequence(self, heads: int, head_dim: int) -> int:
        return self.wrapped.bytes_per_sequence(heads, head_dim)

    def checked(self, parts: Sequence[torch.Tensor], size: Sequence[int]) -> None:
        self.wrapped.checked(parts[: len(self.wrapped.parts)], size)


def decode(run: Evaluator, x: Stored) -> Any:
    """The value that ``x`` stands for."""
    return x.format.decode(run, x, x.dtype)
