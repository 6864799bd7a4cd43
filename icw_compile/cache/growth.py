"""Storage that grows like a vector, and who may write where in it.

A `Room` is what the rows of a growing tensor lie in: ``[batch, heads, capacity, size]``, of which the tensor shows some
that follow each other. Appending writes behind them and gives a longer tensor on the same room, so that a step costs
its new rows and not the cache. A window that slides shows the last rows of it, and moves to the front of a new room
when it reaches the end. The shorter tensor stays valid, as the input of ``cat`` does.

Each tensor on a room holds a `Claim`. Tensors that an append parted are independent of each other, as the input and
the result of ``cat`` are; a view and what it views are not. One rule keeps that true: *a room holds either one tensor
and its views, or several independent tensors without views*. Where an operation would break it, its operand first
moves to a room of its own (`icw_compile.cache.tensor.QuantizedKV`). A room may be used by several threads.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MIN_SPARE",
    "Claim",
    "Growth",
    "Room",
    "capacity_after",
    "capacity_for",
    "growth",
    "is_batchwise",
    "reset_growth",
    "rows_of_slice",
]

aten = torch.ops.aten

#: What compiled code returns has at least this many spare rows: the next step finds room without asking.
MIN_SPARE = 64


@dataclass
class Growth:
    """What growing has cost in this process, since `icw_compile.reset_report`.

    Attributes:
        moves: how often a tensor moved to a larger room.
        bytes_copied: bytes of the rows that were copied on the way.
        spare_bytes: bytes of the free rows in all rooms that exist now.
    """

    moves: int = 0
    bytes_copied: int = 0
    spare_bytes: int = 0


def capacity_for(rows: int, largest: Callable[[Any, Any], Any] = max) -> int:
    """Rows to make room for where ``rows`` are needed: geometric, a quarter more once there are 1,024 of them.

    A multiple of 64, so that kernels find every head of a part at an aligned address. With ``largest=sympy.Max``,
    ``rows`` may be a symbol.
    """
    capacity: int = (rows + largest(256, rows // 4)) // 64 * 64
    return capacity


def capacity_after(tokens: int, first: int, kept: int | None = None) -> int:
    """Rows of the room that a tensor is in after ``tokens`` tokens: ``first`` in one call, the others one by one.

    Args:
        tokens: at least 1.
        first: at least 1; more than ``tokens`` are as many as those.
        kept: how many of the last ones the tensor shows, those of a sliding window; ``None`` for all.

    It moves where `MIN_SPARE` would no longer be left. At most ``capacity_for`` of the rows that it shows.
    """
    seen = min(first, tokens)
    end = seen if kept is None else min(seen, kept)
    capacity = capacity_for(end)
    while end != kept:  # then every move is to as much room again
        steps = capacity - MIN_SPARE - end + 1
        if seen + steps > tokens:
            break
        seen += steps
        end = seen if kept is None else min(seen, kept)
        capacity = capacity_for(end)
    return capacity


def _nothing() -> None:
    return None


class Claim:
    """That a tensor lives on a room; it ends with the tensor. `Room.claim` and `Room.extend` make one.

    Attributes:
        room: where.
        start, end: the rows of the room that the tensor shows, or that what it is a view of shows.
        owner: the same object for a tensor and its views.
        is_view: the tensor is not just rows that follow each other.
        tensor: the tensor, by a weak reference.
    """

    __slots__ = ("__weakref__", "end", "is_view", "owner", "room", "start", "tensor")

    def __init__(self, room: "Room", start: int, end: int, owner: object, is_view: bool) -> None:
        self.room = room
        self.start = start
        self.end = end
        self.owner = owner
        self.is_view = is_view
        self.tensor: Callable[[], Any] = _nothing

    def others(self) -> "list[Claim]":
        """The claims of the other tensors on this room."""
        return [claim for claim in self.room.claims() if claim is not self]

    def of_view(self, rows: range | None) -> "Claim":
        """The claim of a view: of these of the tensor's rows, or of another kind (``None``)."""
        if rows is None or self.is_view:
            return self.room.claim(self.start, self.end, self.owner, is_view=True)
        return self.room.claim(self.start + rows.start, self.start + rows.stop, self.owner)


class Room:
    """Storage ``[batch, heads, capacity, size]`` for each part of a growing tensor that has rows.

    Args:
        parts: the storage of each part, contiguous.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self.capacity: int = self.parts[0].shape[2]
        self._claims: list[weakref.ref[Claim]] = []
        self.lock = threading.Lock()
        for part in self.parts:
            # The capacity is a symbol of every graph from the first on: no graph is compiled because it changed.
            torch._dynamo.maybe_mark_dynamic(part, 2)
        with _lock:
            _rooms.add(self)

    @classmethod
    def copy_of(cls, parts: Sequence[Tensor], rows: int, capacity: int, *, grows: bool = True) -> "Room":
        """A room of ``capacity`` rows, the first ``rows`` of which are those of ``parts``. Growth, if it ``grows``."""
        room = cls([part.new_empty((*part.shape[:2], capacity, part.shape[3])) for part in parts])
        for new, part in zip(room.parts, parts, strict=True):
            new[:, :, :rows].copy_(part[:, :, :rows])
        with _lock:
            _growth.moves += grows
            _growth.bytes_copied += sum(part.nbytes // max(part.shape[2], 1) * rows for part in parts)
        return room

    def claim(self, start: int, end: int, owner: object = None, *, is_view: bool = False) -> Claim:
        """A claim to these rows, of a tensor of its own or, with its ``owner``, of a view."""
        claim = Claim(self, start, end, owner or object(), is_view)
        with self.lock:
            self._claims.append(weakref.ref(claim))
        return claim

    def claims(self) -> list[Claim]:
        """Those that have not ended."""
        with self.lock:
            return [claim for reference in self._claims if (claim := reference()) is not None]

    def extend(self, claim: Claim, rows: int) -> Claim | None:
        """The claim to ``rows`` more; ``None`` if there are not as many, or another tensor would notice.

        Of several threads that ask for the same rows, one gets them.
        """
        with self.lock:
            if claim.is_view or claim.end + rows > self.capacity:
                return None
            live = []
            for reference in self._claims:
                other = reference()
                if other is None:
                    continue
                live.append(reference)
                if other is not claim and (other.owner is claim.owner or other.end > claim.end):
                    return None
            extended = Claim(self, claim.start, claim.end + rows, object(), False)
            live.append(weakref.ref(extended))
            self._claims = live
            return extended

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def from_row(self, start: int) -> list[Tensor]:
        """The parts from row ``start`` on, as tensors that autograd does not see as views.

        Dynamo would guard on the shape of what they are views of.
        """
        return [
            part
            if start == 0
            else _marked(
                part.new_empty(0).set_(
                    part.untyped_storage(),
                    start * part.shape[3],
                    (*part.shape[:2], self.capacity - start, part.shape[3]),
                    part.stride(),
                )
            )
            for part in self.parts
        ]


def _marked(part: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(part, 2)
    return part


_lock = threading.Lock()
_rooms: "weakref.WeakSet[Room]" = weakref.WeakSet()
_growth = Growth()


def growth() -> Growth:
    """The present `Growth` of this process."""
    spare = 0
    with _lock:
        rooms = list(_rooms)
    for room in rooms:
        used = max((claim.end for claim in room.claims()), default=0)
        spare += room.nbytes // max(room.capacity, 1) * (room.capacity - used)
    return Growth(_growth.moves, _growth.bytes_copied, spare)


def reset_growth() -> None:
    """Start counting anew."""
    with _lock:
        _growth.moves = _growth.bytes_copied = 0


def is_batchwise(func: Any, *args: Any) -> bool:
    """Whether an operation copies or picks whole sequences of a batch, with these arguments after the first."""
    if func is aten.clone.default:
        return True
    if func is aten.index_select.default:
        return args[0] == 0
    return func is aten.index.Tensor and len(args[0]) == 1 and args[0][0].dim() == 1


def rows_of_slice(func: Any, args: tuple[Any, ...]) -> range | None:
    """The rows of a tensor that a view is of, where it is of some that follow each other."""
    if func in (aten.alias.default, aten.detach.default):
        return range(args[0].shape[2])
    if func is not aten.slice.Tensor:
        return None
    defaults: tuple[Any, ...] = (0, None, None, 1)
    x, dim, start, end, step = args + defaults[len(args) - 1 :]
    if x.dim() != 4 or dim not in (2, -2) or step != 1:
        return None
    rows = range(x.shape[2])[start:end]
    return rows if len(rows) else None
