"""Storage that grows like a vector, and who may write where in it.

A `Room` is what the parts of a growing tensor lie in: ``[batch, heads, capacity, size]``, of which the tensor shows
the first rows. Appending writes behind them and gives a longer tensor on the same room, so that a step costs its new
rows and not the cache. The shorter tensor stays valid, as the input of ``cat`` does.

Each tensor on a room holds a `Claim`. Tensors that an append parted are independent of each other, as the input and
the result of ``cat`` are; a view and what it views are not. One rule keeps that true: *a room holds either one tensor
and its views, or several independent tensors without views*. Where an operation would break it, its operand first
moves to a room of its own (`icw_compile.cache.tensor.QuantizedKV`).
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["MIN_SPARE", "Claim", "Growth", "Room", "capacity_for", "growth", "reset_growth"]

#: Compiled code takes it that there are spare rows, so that a head never touches the next.
MIN_SPARE = 2


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


def capacity_for(rows: int) -> int:
    """Rows to make room for where ``rows`` are needed: geometric, a quarter more once there are 1,024 of them."""
    return rows + max(256, rows // 4)


class Claim:
    """That a tensor lives on a room; it ends with the tensor.

    Args:
        room: where.
        rows: how many rows of the room, from the first, the tensor and what it is a view of reach.
        owner: the same object for a tensor and its views; left out, a new one.
        is_view: the tensor is not just the first rows of the room.
    """

    __slots__ = ("__weakref__", "is_view", "owner", "room", "rows")

    def __init__(self, room: "Room", rows: int, owner: object = None, is_view: bool = False) -> None:
        self.room = room
        self.rows = rows
        self.owner = owner or object()
        self.is_view = is_view
        room.claims.append(weakref.ref(self, room.claims.remove))

    def others(self) -> "list[Claim]":
        """The claims of the other tensors on this room."""
        live = (reference() for reference in self.room.claims)
        return [claim for claim in live if claim is not None and claim is not self]

    def may_extend(self) -> bool:
        """Whether the rows behind this tensor's may be written without another tensor's noticing."""
        if self.is_view:
            return False
        return all(other.owner is not self.owner and other.rows <= self.rows for other in self.others())

    def of_view(self, rows: int | None) -> "Claim":
        """The claim of a view: of the first ``rows`` rows, or of another kind (``None``)."""
        if rows is None or self.is_view:
            return Claim(self.room, self.rows, self.owner, is_view=True)
        return Claim(self.room, rows, self.owner)


class Room:
    """Storage ``[batch, heads, capacity, size]`` for each part of a growing tensor.

    Args:
        parts: the storage of each part, contiguous.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self.capacity: int = self.parts[0].shape[2]
        self.claims: list[weakref.ref[Claim]] = []
        _rooms.add(self)

    @classmethod
    def copy_of(cls, parts: Sequence[Tensor], capacity: int) -> "Room":
        """A room of ``capacity`` rows whose first ones are those of ``parts``."""
        rows = parts[0].shape[2]
        room = cls([part.new_empty((*part.shape[:2], capacity, part.shape[3])) for part in parts])
        for new, part in zip(room.parts, parts, strict=True):
            new[:, :, :rows].copy_(part)
        _growth.moves += 1
        _growth.bytes_copied += sum(part.nbytes for part in parts)
        return room

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def first(self, rows: int) -> list[Tensor]:
        """The first ``rows`` rows of each part, as tensors that autograd does not see as views.

        Dynamo would guard on the shape of what they are views of.
        """
        return [
            part.new_empty(0).set_(part.untyped_storage(), 0, (*part.shape[:2], rows, part.shape[3]), part.stride())
            for part in self.parts
        ]


_rooms: "weakref.WeakSet[Room]" = weakref.WeakSet()
_growth = Growth()


def growth() -> Growth:
    """The present `Growth` of this process."""
    spare = 0
    for room in _rooms:
        used = max((claim.rows for reference in room.claims if (claim := reference()) is not None), default=0)
        spare += room.nbytes // max(room.capacity, 1) * (room.capacity - used)
    return Growth(_growth.moves, _growth.bytes_copied, spare)


def reset_growth() -> None:
    """Start counting anew."""
    _growth.moves = _growth.bytes_copied = 0
