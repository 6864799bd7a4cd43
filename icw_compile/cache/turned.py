"""Full windows whose rows stay where they are: a step writes the newest row over the oldest one.

The tokens of a sliding window are in order, and a model that adds one to a full window moves all others. The ``ring``
pass (`icw_compile.passes.ring`) leaves them: the window is then *turned*. After ``turns`` steps its token ``t`` is in
row ``(t + turns) % W``, which only a compiled step of that kind knows how to read. Whatever else reads or writes the
memory, through the tensor or any view of it, straightens it first.

How often a window is turned is a number in Python, found by its memory, which views of it share. It is not asked for
where no Python of ours runs: by another process, in the replay of a CUDA graph that a user records, in what another
compiler makes of a function that takes a `QuantizedKV` apart. There the rows are moved after all, behind each step.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from icw_compile.compat.fx import Unseen
from icw_compile.compat.watch import CompilingBackend, compiling_backend

__all__ = ["Window", "claim_compile", "keep_straight", "note_fakes", "straighten", "turn", "turns_of"]


class Window:
    """The rows of a cache tensor, and how often they are turned; it keeps no memory alive.

    Args:
        rows: the parts that have rows, ``[batch, kv_heads, W, ...]``.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows = [(weakref.ref(part.untyped_storage()), part.dtype, _place(part)) for part in rows]
        self.tokens, self.device, self.turns = rows[0].shape[2], rows[0].device, 0
        #: All windows in this memory; at most one is turned.
        self.family = _families.setdefault(rows[0].untyped_storage(), [])

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> "Window":
        """The window with these rows."""
        made = cls(rows)
        for each in made.family:
            if each.rows == made.rows:
                return each
        made.family.append(made)
        return made

    def move(self, by: int) -> None:
        """Move each row so far to the front, and those that would leave to the end."""
        for of_storage, dtype, place in self.rows:
            if (storage := of_storage()) is not None:
                # A tensor of its own: those of inference mode could be written nowhere else.
                with Unseen(), torch.no_grad():
                    part = torch.empty(0, dtype=dtype, device=self.device).set_(storage, *place)
                    part.copy_(part.roll(-by, 2))

    def straighten(self) -> None:
        """Put the tokens back in order.

        Raises:
            RuntimeError: a CUDA graph is recorded, each replay of which would move them again.
        """
        with _lock:
            if self.turns % self.tokens:
                if _is_recorded(self.device):
                    raise RuntimeError(
                        "icw_int8kv: the first thing that this CUDA graph does to a full window is to move its rows, "
                        "and each replay would do it again. Read the cache before you record, as by `layer.keys[:]`."
                    )
                self.move(self.turns)
            self.turns = 0

    def stays_turned(self) -> bool:
        """Whether all who may look at the memory would know how often it is turned."""
        if _others.made or _others.begun or _is_recorded(self.device):
            return False
        storage = self.rows[0][0]()
        return self.device.type == "cuda" or (storage is not None and not storage.is_shared())


def _place(part: Tensor) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    """Where a tensor is in its memory."""
    return part.storage_offset(), tuple(part.shape), part.stride()


def _is_recorded(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


#: By the memory of the first part.
_families: "weakref.WeakKeyDictionary[torch.UntypedStorage, list[Window]]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@dataclass
class _Others:
    """What is known of graphs that take a `QuantizedKV` apart and are none of ours.

    ``made``: there is one. ``begun``: compiles in which another backend may make one.
    """

    made: bool = False
    begun: set[CompilingBackend] = field(default_factory=set)


_others = _Others()


def straighten(part: Tensor) -> None:
    """Put the tokens back in order, if this is of the first part of a turned window, or of a view of it."""
    if _families and type(part) is Tensor:  # fakes are never turned
        for window in _families.get(part.untyped_storage(), ()):
            if window.turns:
                window.straighten()


def _straighten_all() -> None:
    for family in list(_families.values()):
        for window in family:
            window.straighten()


def turns_of(windows: Sequence[Window]) -> int:
    """How often all of these windows are turned; where it is not as often, they are straightened."""
    turns = windows[0].turns
    if any(window.turns != turns or len(window.family) > 1 for window in windows):
        for each in [each for window in windows for each in window.family]:
            each.straighten()
        return 0
    return turns


def turn(windows: Sequence[Window], turns: int) -> None:
    """Note that all of these windows, which were turned so often, were turned once more."""
    for window in windows:
        if window.stays_turned():
            window.turns = turns + 1
        else:
            window.move(1)


def keep_straight() -> None:
    """From here on no window stays turned: a graph that is none of ours takes a `QuantizedKV` apart."""
    if not _others.made:  # once: this is asked at each operation of a trace
        _others.made = True
        _straighten_all()


def note_fakes() -> None:
    """Called where Dynamo makes a fake of a `QuantizedKV`, for a graph that takes it."""
    backend = compiling_backend()
    if backend is not None and backend.module != "icw_compile.backend":
        _others.begun.add(backend)
        _straighten_all()


def claim_compile() -> None:
    """Called by our backend: what is being compiled becomes a graph of ours."""
    if _others.begun and (backend := compiling_backend()) is not None:
        _others.begun.discard(backend)
