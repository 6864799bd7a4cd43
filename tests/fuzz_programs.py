"""Random small functions of quantized caches, with what they must give: for ``test_fuzz.py``.

`programs` draws a function line by line and runs each line at once on float tensors, which are the oracle: a line that
torch refuses is not kept, and the shapes that the next line needs are at hand. Views are torch's own views, so that a
write reaches whatever shares the memory. What is particular to a cache is one rule: after each line that writes,
every cache whose memory the line wrote into is rounded, row by row, to what int8 stores of it. Rounding what is
rounded already changes nothing, so that this equals rounding the new rows alone.

Shifted channels are followed by a *shadow*: the exponent for each element, moved by the same operations as the values.
Sources of writes are drawn on the grid that int8 stores exactly, so that most rules of storage agree on most writes.
The rest is *ambiguous*: whether a copy is still int8 after this or that operation, which rows are kept in float after
a write that no rule knows. A program with such a write is compared within the error of one more rounding
(`Program.within_one_rounding`), every other one within the order of float32 sums.

Rounding to 4 bits is no rounding the second time, so that programs of such caches are all compared within one more.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from icw_compile import QuantizedKV
from icw_compile.formats import make_format
from icw_compile.formats.equalized import TELLING
from icw_compile.kernels.interface import FEW_TOKENS
from icw_compile.lab.reference import channel_shift, quantize_dequantize

__all__ = ["WITHOUT", "CacheInput", "Program", "programs", "round_rows"]

#: What to leave out, by name, so that one fault known already does not hide the next: any form of a line that is
#: chosen with `Draw.form` below, caches that are ``kept``, ``equalized``, ``grown`` or of ``4 bits``, ``between`` for
#: lines between the two products of an attention, ``integer_bias``, ``merged_bias``, ``dynamic``, ``cut`` for views
#: that reach into rows, ``returned`` for views of caches as results, ``float`` for functions of no cache.
WITHOUT = frozenset(filter(None, os.environ.get("ICW_FUZZ_WITHOUT", "").split(",")))


# The rules of storage, in plain torch.


def round_rows(x: Tensor, shift: Tensor | None = None, bits: int = 8) -> Tensor:
    """What ``bits`` with a float32 scale for each row store of ``x``, with the exponent ``shift`` for each element.

    No bits are all of it.
    """
    if x.numel() == 0 or not bits:
        return x
    if bits == 4:
        return quantize_dequantize(x, shift, bits)
    factor = torch.ones_like(x) if shift is None else torch.exp2(shift)
    rows = x / factor
    scale = rows.abs().amax(-1, keepdim=True) / 127.0
    return (rows / torch.where(scale > 0, scale, 1.0)).round().clamp(-127, 127) * scale * factor


def settle_more(
    rows: Tensor, shift: Tensor, new: Tensor, bits: int, is_kept: Tensor | None = None, exact: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``rows[B, H, T, D]`` that are stored, and ``shift[B, H, 1, D]``, once it is known that ``new`` rows follow.

    They settle it once more where they were few: one, or up to `TELLING` that are now more. Those that are kept tell
    what they are, ``exact``, and not what is stored of them.
    """
    length, more = rows.shape[2], new.shape[2]
    if length != 1 and not 0 < length <= TELLING < length + more:
        return rows, shift
    # What reads back as zero lies within half a step of it.
    half = (rows / torch.exp2(shift)).abs().amax(-1, keepdim=True) / 254.0 * torch.exp2(shift)
    seen, values = torch.where(rows == 0, half, rows), rows
    if is_kept is not None and exact is not None:
        seen, values = (torch.where(is_kept, exact, each) for each in (seen, values))
    if more > 1:
        seen = torch.cat([seen, new], -2)
    told = ((channel_shift(seen, 1) + 1) / 2).floor() if seen.shape[2] == 1 else channel_shift(seen)
    changed = (told != shift).any(-1, keepdim=True)
    return torch.where(changed, round_rows(values, told.expand_as(values), bits), rows), told


# Custom operations: what writes where is known from their schemas alone.


@torch.library.custom_op("icw_fuzz::put_first", mutates_args={"cache"})
def put_first(cache: Tensor, new: Tensor) -> None:
    cache.copy_(new.expand_as(cache))


@torch.library.custom_op("icw_fuzz::put_second", mutates_args={"cache"})
def put_second(new: Tensor, cache: Tensor) -> None:
    cache.copy_(new.expand_as(cache))


@torch.library.custom_op("icw_fuzz::put_and_double", mutates_args={"cache"})
def put_and_double(new: Tensor, cache: Tensor, factor: float = 2.0) -> Tensor:
    cache.copy_(new.expand_as(cache))
    return new * factor


@put_and_double.register_fake
def _(new: Tensor, cache: Tensor, factor: float = 2.0) -> Tensor:
    return torch.empty_like(new)


@torch.library.custom_op("icw_fuzz::scale_both", mutates_args={"a", "b"})
def scale_both(a: Tensor, b: Tensor, factor: float) -> None:
    a.mul_(factor)
    b.mul_(factor)


@torch.library.custom_op("icw_fuzz::read_only", mutates_args=())
def read_only(cache: Tensor) -> Tensor:
    return cache * 2.0


@read_only.register_fake
def _(cache: Tensor) -> Tensor:
    return torch.empty_like(cache)


NAMESPACE = {
    "torch": torch,
    "sdpa": torch.nn.functional.scaled_dot_product_attention,
    "softmax": torch.nn.functional.softmax,
    "put_first": put_first,
    "put_second": put_second,
    "put_and_double": put_and_double,
    "scale_both": scale_both,
    "read_only": read_only,
}


# A program.


@dataclass
class CacheInput:
    """How to make the `QuantizedKV` that a function is given: of which rows, and with how many appended to it."""

    values: Tensor
    appended: int = 0
    equalize: bool = False
    sinks: int = 0
    recent: int = 0
    bits: int = 8
    #: No cache at all: a float tensor of that shape, with which nothing may be done that is not done without us.
    stays_float: bool = False

    @property
    def shift(self) -> Tensor:
        return self._stored()[1]

    def rounded(self) -> Tensor:
        return self.values.clone() if self.stays_float else self._stored()[0]

    def _stored(self) -> tuple[Tensor, Tensor]:
        """What is stored of the rows, one after the other, and the shift: few rows settle none that stays."""
        first = self.values[:, :, : self.values.shape[2] - self.appended]
        shift = channel_shift(first) if self.equalize else torch.zeros_like(self.values[:, :, :1])
        rows = round_rows(first, shift.expand_as(first), self.bits)
        for at in range(first.shape[2], self.values.shape[2]):
            row = self.values[:, :, at : at + 1]
            if self.equalize:
                index = torch.arange(at).view(-1, 1)
                is_kept = (index < self.sinks) | (index >= at - self.recent)
                rows, shift = settle_more(rows, shift, row, self.bits, is_kept, self.values[:, :, :at])
            rows = torch.cat([rows, round_rows(row, shift, self.bits)], -2)
        return rows, shift

    def make(self) -> Tensor:
        if self.stays_float:
            return self.values.clone()
        length = self.values.shape[2] - self.appended
        layout = make_format(
            torch.float32, bits=self.bits, equalize=self.equalize, sink_tokens=self.sinks, recent_tokens=self.recent
        )
        made: Tensor = QuantizedKV.encode(self.values[:, :, :length], layout)
        for row in range(self.appended):
            made = torch.cat([made, self.values[:, :, length + row : length + row + 1]], dim=-2)
        return made

    def __str__(self) -> str:
        of = f"{tuple(self.values.shape)}"
        if self.stays_float:
            return f"float32 {of}"
        more = [f"{self.appended} rows appended"] * bool(self.appended) + ["equalized"] * self.equalize
        kept = [f"keeps {self.sinks} + {self.recent} rows"] * bool(self.sinks or self.recent)
        return f"QuantizedKV {of} {', '.join([*more, *kept, *['4 bits'] * (self.bits == 4)])}".rstrip()


@dataclass
class Store:
    """Something that int8 stores: its float values, the exponents of their channels, whether a caller's cache."""

    values: Tensor
    shift: Tensor
    is_input: bool
    keeps: bool = False
    stays_float: bool = False
    #: How far its elements were moved at most by all that was rounded so far: by so much may one be off that was not.
    moved: float = 0.0

    def shares(self, other: Tensor) -> bool:
        return self.values.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@dataclass
class Program:
    """A function as source text, its inputs, and what it gives and leaves behind."""

    caches: dict[str, CacheInput] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    steps: list[tuple[Any, ...]] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=lambda: dict(NAMESPACE))
    shadows: dict[str, Tensor] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)
    #: Variables whose rows were cut or turned, so that a `QuantizedKV` has copies for them.
    cut: set[str] = field(default_factory=set)
    outputs: list[str] = field(default_factory=list)
    writes: int = 0
    writes_cut_rows: bool = False
    is_ambiguous: bool = False
    #: Whether a write to a cache that is given rounds something.
    rounds: bool = False
    dynamic: bool = False
    #: Of each number that a cache stores, of those that are given and of those that are made.
    bits: int = 8
    count: int = 0

    @property
    def has_caches(self) -> bool:
        return not any(cache.stays_float for cache in self.caches.values())

    @property
    def within_one_rounding(self) -> bool:
        """Whether one more rounding, or one less, is right too: a prompt reads its own keys and values as they came."""
        prompts = any(name[0] == "q" and value.shape[-2] > FEW_TOKENS for name, value in self.inputs.items())
        return self.is_ambiguous or (self.rounds and prompts) or self.bits == 4

    @property
    def largest(self) -> float:
        """Of all numbers that the function is given."""
        given = [*(cache.values for cache in self.caches.values()), *self.inputs.values()]
        return max((float(x.abs().max()) for x in given if x.is_floating_point() and x.numel()), default=0.0)

    # Building. What is done is noted, so that it can be done again without some of it.

    def new(self, prefix: str = "v") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def take(self, name: str, cache: CacheInput) -> None:
        """A cache that the function is given."""
        values = cache.rounded()
        # Its own storage: what is a view is known from there.
        self.env[name] = values.clone()
        self.caches[name] = cache
        self.shadows[name] = cache.shift.expand_as(values).clone()
        keeps = bool(cache.sinks or cache.recent)
        moved = float((values - cache.values).abs().amax()) if keeps and values.numel() else 0.0
        self.stores.append(Store(self.env[name], self.shadows[name], True, keeps, cache.stays_float, moved))

    def give(self, value: Tensor, prefix: str = "x") -> str:
        """A float input of the function."""
        name = self.new(prefix)
        self._give(name, value)
        return name

    def _give(self, name: str, value: Tensor) -> None:
        self.inputs[name] = value.clone()
        self.env[name] = value.clone()

    def do(self, what: str, *arguments: Any) -> bool:
        """Add a line of the kind ``what``; ``False``, and nothing is changed, if torch refuses it."""
        try:
            getattr(self, f"_{what}")(*arguments)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        self.steps.append((what, *arguments))
        return True

    def in_other_formats(self) -> "Program | None":
        """The same function for caches of other formats: one compiled function must tell them apart."""
        others = {
            name: replace(
                cache, appended=0, equalize=not cache.equalize and "equalized" not in WITHOUT, sinks=0, recent=0, bits=8
            )
            for name, cache in self.caches.items()
        }
        return self.without(set(), others, bits=8) if self.has_caches else None

    def without_rounding(self) -> "Program":
        """The same function of floats."""
        floats = {name: replace(cache, bits=0) for name, cache in self.caches.items()}
        other = self.without(set(), floats, bits=0)
        assert other is not None and other.outputs == self.outputs
        return other

    def without(
        self, left_out: set[int], caches: dict[str, CacheInput] | None = None, bits: int | None = None
    ) -> "Program | None":
        """The program without some of its steps, or with other caches, if that is one."""
        other = Program(dynamic=self.dynamic, bits=self.bits if bits is None else bits)
        for name, cache in (caches or self.caches).items():
            other.take(name, cache)
        for name, value in self.inputs.items():
            other._give(name, value)
        for i, step in enumerate(self.steps):
            try:
                if i not in left_out and not other.do(*step):
                    return None
            except (NameError, KeyError):
                return None
        if not other.outputs and not other.writes:
            return None
        other.drop_unused()
        return other

    def smallest(self, fails: Callable[["Program"], bool]) -> "Program":
        """A smaller program that fails: without each step, from the last one, that it fails without."""
        best = self
        at = len(best.steps) - 1
        while at >= 0:
            smaller = best.without({at})
            if smaller is not None and fails(smaller):
                best = smaller
            at = min(at - 1, len(best.steps) - 1)
        return best

    def _read(self, name: str, expression: str) -> None:
        self.env[name] = eval(expression, self.env)
        self.lines.append(f"{name} = {expression}")

    def _output(self, name: str) -> None:
        self.env[name]  # NameError in a program without it
        self.outputs.append(name)

    def _move(self, name: str, expression: str, of: str, cuts: bool) -> None:
        """``name = expression`` moves ``of``: the result is something that int8 may store. ``cuts``: through rows."""
        value = eval(expression, self.env)
        shadow = eval(expression, {**self.env, of: self.shadows[of]})
        self.env[name] = value
        self.lines.append(f"{name} = {expression}")
        cuts |= of in self.cut
        is_view = any(store.shares(value) for store in self.stores)
        if cuts and not is_view:
            return  # a float tensor
        self.shadows[name] = shadow
        if cuts:
            self.cut.add(name)
        if not is_view:
            keeps = any(store.keeps and store.shares(self.env[of]) for store in self.stores)
            self.stores.append(Store(value, shadow, False, keeps, not self.has_caches))

    def _cat(self, name: str, tensors: tuple[str, ...], dim: int, named: int) -> None:
        """``name = cat(tensors, named)`` of whole rows, where some are of caches: new ones are rounded."""
        values = [self.env[t] for t in tensors]
        shadows = [self.shadows.get(t) for t in tensors]
        like = next(shadow for shadow in shadows if shadow is not None)
        length = like.shape[2] if dim == 2 else 0
        more = sum(value.shape[2] for value in values) - length if dim == 2 else 0
        few = length == 1 or 0 < length <= TELLING < length + more
        if few and any(cache.equalize for cache in self.caches.values()):
            values[0], like = self._settled(tensors[0], values[0], torch.cat(values[1:], dim), shadows[1:])
        grown = torch.cat(values, dim)
        parts = []
        for value, shadow in zip(values, shadows, strict=True):
            if dim == 2 and like.shape[2]:  # the first cache's exponents, for each head
                parts.append(like[:, :, :1].expand(value.shape))
            else:
                parts.append(torch.zeros(value.shape) if shadow is None else shadow)
        self.env[name], self.shadows[name] = grown, torch.cat(parts, dim)
        self.lines.append(f"{name} = torch.cat([{', '.join(tensors)}], {named})")
        shares = [store for store in self.stores if any(store.shares(value) for value in values)]
        keeps = any(store.keeps for store in shares)
        store = Store(grown, self.shadows[name], not keeps, keeps, not self.has_caches)
        # A cache that is appended to rounds what is new; whether others do, or what was picked from one, is not said.
        appended = dim == 2 and tensors[0] in self.caches
        if any(shadow is not None and shadow.any() for shadow in shadows) and not appended:
            self.is_ambiguous = True
        self._round(store)
        store.is_input = False
        self.stores.append(store)

    def _settled(self, name: str, rows: Tensor, new: Tensor, others: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """The few ``rows`` of a cache, and their exponents, when ``new`` ones are appended."""
        shadow = self.shadows.get(name)
        if name not in self.caches or any(other is not None for other in others):
            raise ValueError("whether this appends to a cache is not said: it may settle exponents anew, or not")
        if not self.caches[name].equalize:
            return rows, shadow
        if self.caches[name].sinks or self.caches[name].recent:
            raise ValueError("what is kept of rows tells more than they do: `CacheInput` has that")
        if not (rows.ne(0).any(-1).all() and new.ne(0).any(-1).all()):
            raise ValueError("rows of zeros are rows that are not there")
        rows, shift = settle_more(rows, shadow[:, :, :1], new, self.bits)
        return rows, shift.expand_as(rows)

    def _write(self, line: str, targets: tuple[str, ...]) -> None:
        """A line that writes into ``targets``."""
        before = [(x, x.clone()) for x in [*(s.values for s in self.stores), *(self.env[i] for i in self.inputs)]]
        try:
            exec(line, self.env)
        except Exception:  # it may have come halfway
            for x, value in before:
                x.copy_(value)
            raise
        self.lines.append(line)
        self.writes += 1
        for name in targets:
            self.writes_cut_rows |= name in self.cut
            for store in self.stores:
                if store.shares(self.env[name]):
                    self._round(store)

    def _round(self, store: Store) -> None:
        if not store.values.numel() or store.stays_float:
            return
        exact = store.values.clone()
        rounded = round_rows(exact, store.shift, self.bits)
        store.moved += float((rounded - exact).abs().amax())
        moved = (rounded - exact).abs().amax() > 1e-5 * exact.abs().amax()
        self.rounds |= bool(moved)
        if moved and (store.keeps or not store.is_input):
            self.is_ambiguous = True
        if not exact.ne(0).any(-1).any(-1).all():
            self.is_ambiguous = True  # it is empty: the next write may settle another shift
        store.values.copy_(rounded)

    # Looking at it.

    def moved(self, name: str) -> float:
        """How far what is stored of this variable was moved by rounding, at most."""
        return max((store.moved for store in self.stores if store.shares(self.env[name])), default=0.0)

    def cachelike(self, rank: int | None = None) -> list[str]:
        return [name for name in self.shadows if rank is None or self.env[name].dim() == rank]

    def drop_unused(self) -> None:
        names = set(re.findall(r"\w+", " ".join([*self.lines, *self.outputs])))
        self.inputs = {name: value for name, value in self.inputs.items() if name in names}
        self.caches = {name: cache for name, cache in self.caches.items() if name in names}

    @property
    def source(self) -> str:
        arguments = ", ".join([*self.caches, *self.inputs])
        body = "".join(f"    {line}\n" for line in self.lines)
        return f"def f({arguments}):\n{body}    return ({''.join(name + ', ' for name in self.outputs)})\n"

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        scope = dict(NAMESPACE)
        exec(self.source, scope)
        return scope["f"]

    def arguments(self) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {name: cache.make() for name, cache in self.caches.items()}
        return {**made, **{name: value.clone() for name, value in self.inputs.items()}}

    def __str__(self) -> str:
        arguments = [f"# {name}: {cache}" for name, cache in self.caches.items()]
        arguments += [
            f"# {name}: {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
            for name, value in self.inputs.items()
        ]
        notes = ["# dynamic=True"] * self.dynamic + ["# within one rounding"] * self.within_one_rounding
        return "\n".join([*arguments, *notes, self.source])

    __repr__ = __str__

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"\n{self}")  # what hypothesis shows


# Values.


def values(size: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def on_grid(size: Sequence[int], seed: int) -> Tensor:
    """Rows that a plain cache stores exactly."""
    return round_rows(values(size, seed)) if len(size) else values(size, seed)


class Draw:
    """What the steps below draw from."""

    def __init__(self, draw: Any, program: Program) -> None:
        self.draw = draw
        self.program = program

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high)) if high > low else low

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def form(self, *names: str) -> str:
        """One of these forms of a line, but those left out."""
        return self.one_of(*[name for name in names if name not in WITHOUT])

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def dim(self, x: Tensor) -> int:
        return self.integer(0, x.dim() - 1)

    def row_dim(self, x: Tensor) -> int:
        """A dimension in front of head_dim."""
        return self.integer(0, max(x.dim() - 2, 0))

    def indices(self, size: int, *, distinct: bool) -> list[int]:
        elements = st.integers(0, max(size - 1, 0))
        return self.draw(st.lists(elements, min_size=1, max_size=min(size, 3) or 1, unique=distinct))

    def index(self, indices: list[int]) -> str:
        """An index tensor, as a constant of the function or as an input."""
        if self.maybe():
            return f"torch.tensor({indices})"
        return self.program.give(torch.tensor(indices), "i")

    def source(self, size: Sequence[int]) -> str:
        return self.program.give(on_grid(tuple(size), self.integer(0, 3)))

    def cachelike(self, rank: int | None = None) -> str | None:
        names = self.program.cachelike(rank)
        return self.one_of(*names) if names else None


# Lines that move.


def view_like(d: Draw, x: str) -> tuple[str, bool]:
    """An expression that moves ``x``, and whether it reaches inside rows."""
    value = d.program.env[x]
    rank = value.dim()
    dim = d.dim(value)
    size = value.shape[dim]
    cuts = dim == rank - 1
    negative = d.one_of(dim, dim - rank)
    low = d.integer(0, max(size - 1, 0))
    high = d.integer(low, size)
    form = d.form(
        "slice", "slice", "narrow", "select", "unsqueeze", "squeeze", "transpose", "merge", "split_dim", "expand",
        "split", "chunk", "unbind", "tensor_split", "detach", "contiguous", "step",
    )  # fmt: skip
    commas = ":, " * dim
    if form == "slice":
        bounds = d.one_of(f"{low}:{high}", f"{low}:", f":{high}", f":{high - size}" if high < size else ":", f"{-low}:")
        return f"{x}[{commas}{bounds}]", cuts
    if form == "step":
        return f"{x}[{commas}{low}::2]", cuts
    if form == "narrow":
        return f"{x}.narrow({negative}, {low}, {high - low})", cuts
    if form == "select":
        return d.one_of(f"{x}[{commas}{low}]", f"{x}.select({negative}, {low})"), cuts
    if form == "unsqueeze":
        return f"{x}.unsqueeze({d.integer(0, rank - 1)})", False
    if form == "squeeze":
        return f"{x}.squeeze({dim})", cuts
    if form == "transpose":
        other = d.row_dim(value) if d.integer(0, 3) else d.dim(value)
        return f"{x}.transpose({dim}, {other})", other != dim and (cuts or other == rank - 1)
    if form == "merge":
        shape = list(value.shape)
        at = d.integer(0, max(rank - 2, 0))
        if rank < 3:
            return f"{x}.detach()", False
        merged = [*shape[:at], -1, *shape[at + 2 :]]
        call = d.one_of("view", "reshape")
        expression = d.one_of(f"{x}.{call}({', '.join(map(str, merged))})", f"{x}.flatten({at}, {at + 1})")
        return expression, at == rank - 2
    if form == "split_dim":
        shape = list(value.shape)
        half = [*shape[:dim], 2, -1, *shape[dim + 1 :]]
        return f"{x}.{d.one_of('view', 'reshape')}({', '.join(map(str, half))})", cuts
    if form == "expand":
        shape = [(-1 if size != 1 or cuts_at else d.integer(1, 2)) for size, cuts_at in _with_last(value)]
        return f"{x}.expand({', '.join(map(str, shape))})", False
    if form == "split":
        sizes = d.one_of(max(size // 2, 1), [low, size - low])
        return f"{x}.split({sizes}, dim={negative})[{d.integer(0, 1)}]", cuts
    if form == "chunk":
        return f"{x}.chunk(2, dim={negative})[{d.integer(0, 1)}]", cuts
    if form == "unbind":
        return f"{x}.unbind({negative})[{low}]", cuts
    if form == "tensor_split":
        return f"torch.tensor_split({x}, {d.one_of(2, [low])}, dim={negative})[{d.integer(0, 1)}]", cuts
    return f"{x}.{form}()", False


def _with_last(value: Tensor) -> list[tuple[int, bool]]:
    return [(size, dim == value.dim() - 1) for dim, size in enumerate(value.shape)]


def copy_like(d: Draw, x: str) -> tuple[str, bool]:
    value = d.program.env[x]
    rank = value.dim()
    dim = d.row_dim(value) if d.integer(0, 4) else d.dim(value)
    size = value.shape[dim]
    cuts = dim == rank - 1
    negative = d.one_of(dim, dim - rank)
    commas = ":, " * dim
    form = d.form(
        "index_select", "index", "index", "roll", "roll", "flip", "repeat_interleave", "repeat", "clone", "repeat_kv",
        "gather_rows", "boolean", "copy_op",
    )  # fmt: skip
    if form == "index_select":
        return f"{x}.index_select({negative}, {d.index(d.indices(size, distinct=False))})", cuts
    if form == "index":
        return f"{x}[{commas}{d.index(d.indices(size, distinct=False))}]", cuts
    if form == "roll":
        return f"{x}.roll({d.integer(-2, 3)}, {d.one_of(negative, f'({negative},)')})", cuts
    if form == "flip":
        return f"{x}.flip({negative})", cuts
    if form == "repeat_interleave":
        return f"{x}.repeat_interleave(2, dim={negative})", cuts
    if form == "repeat":
        return f"{x}.repeat({', '.join(['1'] * dim + ['2'] + ['1'] * (rank - 1 - dim))})", cuts
    if form == "repeat_kv" and rank == 4:
        b, h, t, s = value.shape
        return f"{x}[:, :, None].expand({b}, {h}, 2, {t}, {s}).reshape({b}, {2 * h}, {t}, {s})", False
    if form == "gather_rows" and rank == 4 and value.shape[0] and value.shape[2]:
        b, t = value.shape[0] - 1, value.shape[2] - 1
        return f"{x}[torch.tensor([{b}, 0]), :, torch.tensor([0, {t}])]", False
    if form == "boolean":
        mask = [bool(d.integer(0, 1)) for _ in range(size)]
        return f"{x}[{commas}torch.tensor({mask})]", cuts
    if form == "copy_op":
        return d.one_of(f"{x}.to(torch.float32, copy=True)", f"{x}.float()", f"{x}.contiguous()"), False
    return f"{x}.clone()", False


def step_move(d: Draw) -> None:
    x = d.cachelike()
    if x is None or d.program.env[x].dim() < 2:
        return
    expression, cuts = (view_like if d.integer(0, 2) else copy_like)(d, x)
    if "cut" in WITHOUT and (cuts or x in d.program.cut):
        expression = f"({expression}).clone()"
    d.program.do("move", d.program.new(), expression, x, cuts)


def step_cat(d: Draw) -> None:
    """Rows, sequences or heads put together: with new ones, or with those of another cache."""
    program, x = d.program, d.cachelike(4)
    few = [name for name, cache in program.caches.items() if cache.equalize and cache.values.shape[2] <= TELLING]
    if few and d.maybe():  # which settles exponents once more
        x = d.one_of(*few)
        batch, heads, _, size = program.env[x].shape
        program.do("cat", program.new(), (x, d.source((batch, heads, d.one_of(1, 2, TELLING), size))), 2, -2)
        return
    if x is None or x in program.cut:
        return
    value = program.env[x]
    dim = d.one_of(2, 2, 2, 0, 1)
    size = list(value.shape)
    size[dim] = d.integer(1, 3)
    if d.maybe():
        whole = [o for o in program.cachelike(4) if o not in program.cut]
        other = d.one_of(*[o for o in whole if fits(program.env[o], value, dim)])
    else:
        other = d.source(size)
    tensors = (x, other) if d.integer(0, 3) else (other, x)
    program.do("cat", program.new(), tensors, dim, d.one_of(dim, dim - 4))


def fits(other: Tensor, value: Tensor, dim: int) -> bool:
    return all(i == dim or a == b for i, (a, b) in enumerate(zip(other.shape, value.shape, strict=True)))


# Lines that write.


def step_write(d: Draw) -> None:
    program, t = d.program, d.cachelike()
    if t is None:
        return
    value = program.env[t]
    rank = value.dim()
    if rank == 0 or any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        return
    dim = d.row_dim(value)
    size = value.shape[dim]
    commas = ":, " * dim
    low = d.integer(0, max(size - 1, 0))
    high = d.integer(low, size)
    forms = ["assign", "index_copy_", "index_put_", "copy_", "zero_", "mul_", "fill_", "arithmetic", "masked_fill_"]
    forms += ["scatter_", "augmented", "index_fill_", "of_itself"]
    forms += ["where"] * (program.bits == 8)  # which hangs on signs, and 4 bits round many numbers to zero
    forms += ["out", "out", "foreach", "foreach", "custom", "custom", "custom"]
    form = d.form(*forms)
    if form == "assign":
        part = value[(slice(None),) * dim + (slice(low, high),)]
        shape = list(part.shape)
        if d.integer(0, 3) == 0:
            program.do("write", f"{t}[{commas}{low}] = {d.source([*shape[:dim], *shape[dim + 1 :]])}", (t,))
            return
        if d.integer(0, 4) == 0:
            shape = shape[-1:]  # broadcast
        program.do("write", f"{t}[{commas}{low}:{high}] = {d.source(shape)}", (t,))
    elif form in ("index_copy_", "index_put_"):
        indices = d.indices(size, distinct=True)
        shape = list(value.shape)
        shape[dim] = len(indices)
        source, index = d.source(shape), d.index(indices)
        if form == "index_copy_":
            program.do("write", f"{t}.index_copy_({d.one_of(dim, dim - rank)}, {index}, {source})", (t,))
        else:
            program.do("write", f"{t}[{commas}{index}] = {source}", (t,))
    elif form == "copy_":
        others = [o for o in program.cachelike() if program.env[o].shape == value.shape]
        others = [o for o in others if not any(s.shares(program.env[o]) and s.shares(value) for s in program.stores)]
        if others and d.maybe():
            program.do("write", f"{t}.copy_({d.one_of(*others)})", (t,))
        else:
            shape = list(value.shape) if d.integer(0, 3) else [1, *value.shape[1:]]
            program.do("write", f"{t}.copy_({d.source(shape)})", (t,))
    elif form == "zero_":
        program.do("write", d.one_of(f"{t}.zero_()", f"{t}.fill_(0)", f"{t}.mul_(0.0)"), (t,))
    elif form == "mul_":
        line = d.one_of(f"{t}.mul_(2.0)", f"{t}.neg_()", f"{t}.div_(4.0)", f"torch.neg_({t})")
        program.do("write", line, (t,))
    elif form == "fill_":
        line = d.one_of(f"{t}.fill_(0.5)", f"{t}[:] = 1.5", f"{t}.fill_(torch.tensor(-2.0))")
        program.do("write", line, (t,))
    elif form == "arithmetic":
        source = d.source(value.shape if d.maybe() else value.shape[-1:])
        line = d.one_of(
            f"{t}.add_({source})", f"{t}.sub_({source}, alpha=0.5)", f"{t}.add_(1.0)", f"{t}.clamp_(min=-0.5)",
            f"{t}.lerp_({source}.expand_as({t}), 0.5)",
        )  # fmt: skip
        program.do("write", line, (t,))
    elif form == "augmented":
        part = value[(slice(None),) * dim + (slice(low, high),)]
        source = d.source(part.shape)
        line = d.one_of(f"{t}[{commas}{low}:{high}] += {source}", f"{t}[{commas}{low}:{high}] *= 2.0")
        program.do("write", line, (t,))
    elif form == "masked_fill_":
        shape = d.one_of(list(value.shape), [*value.shape[:-1], 1])
        mask = program.give(values(shape, d.integer(0, 3)) > 0.3, "m")
        program.do("write", f"{t}.masked_fill_({mask}, {d.one_of(0.0, 1.0)})", (t,))
    elif form == "index_fill_":
        indices = d.index(d.indices(size, distinct=True))
        program.do("write", f"{t}.index_fill_({dim}, {indices}, {d.one_of(0.0, 0.25)})", (t,))
    elif form == "scatter_":
        indices = d.indices(size, distinct=True)
        shape = list(value.shape)
        shape[dim] = len(indices)
        index = torch.tensor(indices).view(*[-1 if i == dim else 1 for i in range(rank)]).expand(shape).contiguous()
        at = program.give(index, "i")
        program.do("write", f"{t}.scatter_({dim}, {at}, {d.one_of(d.source(shape), '0.0')})", (t,))
    elif form == "of_itself":
        line = d.one_of(
            f"{t}.copy_({t} * 2.0)", f"{t}.copy_({t}.flip({dim}).clone())", f"{t}.copy_({t}.roll(1, {dim}))"
        )
        program.do("write", line, (t,))
    elif form == "where":
        program.do("write", f"{t}.copy_(torch.where({t} > 0, {t}, {d.source(value.shape)}))", (t,))
    elif form == "out":
        source = d.source(value.shape)
        line = d.one_of(
            f"torch.mul({source}, 2.0, out={t})", f"torch.neg({t}, out={t})", f"torch.add({source}, {t}, out={t})",
            f"torch.flip({source}, [{dim}]).abs_().neg_(); torch.abs({source}, out={t})",
            f"torch.maximum({t}, {source}, out={t})",
        )  # fmt: skip
        program.do("write", line, (t,))
    elif form == "foreach":
        others = [o for o in program.cachelike() if o != t and not overlap(program, o, t)]
        other = d.one_of(*others) if others and d.maybe() else None
        source = d.source(value.shape)
        if other is None:
            line = d.one_of(
                f"torch._foreach_mul_([{t}], 2.0)", f"torch._foreach_zero_([{t}])",
                f"torch._foreach_copy_([{t}], [{source}])", f"torch._foreach_mul_([{source}, {t}], 2.0)",
            )  # fmt: skip
            program.do("write", line, (t,))
        else:
            line = d.one_of(f"torch._foreach_mul_([{t}, {other}], 2.0)", f"torch._foreach_zero_([{other}, {t}])")
            program.do("write", line, (t, other))
    elif form == "custom":
        source = d.source(d.one_of(value.shape, value.shape[-1:]))
        others = [o for o in program.cachelike() if o != t and not overlap(program, o, t)]
        if others and d.integer(0, 2) == 0:
            other = d.one_of(*others)
            program.do("write", f"scale_both({t}, b={other}, factor=2.0)", (t, other))
            return
        line = d.one_of(
            f"put_first({t}, {source})", f"put_second({source}, {t})", f"put_second(cache={t}, new={source})",
        )  # fmt: skip
        if d.integer(0, 2) == 0:
            name = program.new()
            line = f"{name} = put_and_double({source}, {t})"
            if program.do("write", line, (t,)):
                program.do("output", name)
            return
        program.do("write", line, (t,))


def overlap(program: Program, a: str, b: str) -> bool:
    """Whether one memory is behind both, or the same more than once behind ``a``."""
    value = program.env[a]
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        return True
    return program.env[a].untyped_storage().data_ptr() == program.env[b].untyped_storage().data_ptr()


# Lines that read.


def step_read(d: Draw) -> None:
    program, x = d.program, d.cachelike()
    if x is None:
        return
    value = program.env[x]
    size = value.shape[-1] if value.dim() else 1
    forms = [f"{x} * 1.0", f"{x}.sum(-1)", f"{x}.double()"]
    if value.dim() >= 2 and value.numel():
        weight = d.source([size, 3])
        forms += [f"{x}.abs().mean()", f"{x} - {x}.mean(-1, keepdim=True)", f"{x} @ {weight}", f"{x} @ {weight}"]
        forms += [f"torch.relu({x})", f"{x}.mT @ {x}", f"read_only({x})", f"{x}.amax(-1)"]
        forms += [f"torch.nn.functional.pad({x}, (0, 0, 1, 0))", f"torch.stack([{x}, {x}]).sum(0)"]
    if "custom" in WITHOUT:
        forms = [form for form in forms if "read_only" not in form]
    name = program.new()
    if program.do("read", name, d.one_of(*forms)):
        program.do("output", name)


def step_attention(d: Draw, pending: list[Callable[[], None]]) -> None:
    """Attention over two of the caches, in one of the spellings, all at once or with other lines in between."""
    program, k = d.program, d.cachelike(4)
    if k is None:
        return
    keys = program.env[k]
    batch, heads, length, head_dim = keys.shape
    if not keys.numel() or max(batch, heads) > 8 or length > 16:
        return
    fitting = [o for o in program.cachelike(4) if fits(program.env[o], keys, 3)]
    v = d.one_of(*fitting)
    tokens, groups = d.one_of(1, 1, 2, 4, FEW_TOKENS + 1), d.one_of(1, 1, 2)
    spelling = d.form("sdpa", "sdpa", "eager", "eager", "merged", "einsum")
    query = program.give(values((batch, heads * groups, tokens, head_dim), d.integer(0, 3)), "q")
    if groups > 1 and spelling != "sdpa":
        repeat = "{0}[:, :, None].expand({1}, {2}, {5}, {3}, {4}).reshape({1}, {6}, {3}, {4})"
        repeated = []
        for each in (k, v):
            last = program.env[each].shape[-1]
            name = program.new()
            expression = repeat.format(each, batch, heads, length, last, groups, heads * groups)
            if not program.do("move", name, expression, each, False):
                return
            repeated.append(name)
        k, v = repeated
    scale = d.one_of(None, 0.25, 1.0)
    mask, mask_shape = mask_for(d, batch, heads * groups, tokens, length)
    out = program.new("o")
    if spelling == "sdpa":
        settings = [f"attn_mask={mask}"] if mask and mask_shape != "integer" else []
        settings += ["is_causal=True"] if not settings and d.integer(0, 3) == 0 else []
        settings += [f"scale={scale}"] if scale else []
        settings += ["enable_gqa=True"] if groups > 1 else []
        run_read(program, out, f"sdpa({query}, {k}, {v}{''.join(', ' + s for s in settings)})")
        return
    scores, weights = program.new("s"), program.new("p")
    if spelling == "merged":
        merged = f"reshape({batch * heads * groups}, -1, "
        first = f"torch.bmm({query}.{merged}{head_dim}), {k}.{merged}{head_dim}).transpose(1, 2))"
        second = f"torch.bmm({weights}, {v}.{merged}{program.env[v].shape[-1]}))"
        mask, mask_shape = mask_for(d, batch, heads * groups, tokens, length, merged=True)
        if mask and mask_shape == "float" and d.maybe():
            first = f"torch.baddbmm({mask}, {query}.{merged}{head_dim}), {k}.{merged}{head_dim}).mT, alpha=0.5)"
            mask = None
    elif spelling == "einsum":
        first = f"torch.einsum('bhtd,bhsd->bhts', {query}, {k})"
        second = f"torch.einsum('bhts,bhsd->bhtd', {weights}, {v})"
    else:
        first = f"{query} @ {k}.{d.one_of('transpose(2, 3)', 'mT', 'transpose(-1, -2)')}"
        second = f"{weights} @ {v}"
    middle = []
    if scale:
        middle.append(d.one_of(f"{scores} = {scores} * {scale}", f"{scores} = {scores} / {1 / scale}"))
    if d.integer(0, 5) == 0:
        middle.append(f"{scores} = torch.tanh({scores} / 2.0) * 2.0")
    if mask:
        added = mask_shape != "bool"
        filled = d.one_of(
            f"{scores}.masked_fill(~{mask}, -1e9)", f"torch.where({mask}, {scores}, torch.tensor(-1e30))",
            f"{scores}.masked_fill(~{mask}, torch.finfo({scores}.dtype).min)",
        )  # fmt: skip
        middle.append(f"{scores} = {f'{scores} + {mask}' if added else filled}")
    if spelling == "eager" and d.integer(0, 5) == 0:
        sinks = program.give(values((heads * groups,), 5), "k")
        column = f"{sinks}.reshape(1, -1, 1, 1).expand({batch}, -1, {tokens}, 1)"
        middle.append(f"{scores} = torch.cat([{scores}, {column}], dim=-1)")
        middle.append(f"{weights} = softmax({scores}, dim=-1)[..., :-1]")
    else:
        middle.append(f"{weights} = softmax({scores}, dim=-1{d.one_of('', ', dtype=torch.float32')})")
    if not run_read(program, scores, first, output=False):
        return

    def rest() -> None:
        for line in middle:
            program.do("read", *line.split(" = ", 1))
        run_read(program, out, second)

    if "between" not in WITHOUT and d.maybe():
        pending.append(rest)
    else:
        rest()


def run_read(program: Program, name: str, expression: str, *, output: bool = True) -> bool:
    done = program.do("read", name, expression)
    return done and (not output or program.do("output", name))


def mask_for(
    d: Draw, batch: int, heads: int, tokens: int, length: int, *, merged: bool = False
) -> tuple[str | None, str]:
    kind = d.one_of("none", "bool", "float", "float", "integer")
    if kind == "integer" and "integer_bias" in WITHOUT:
        kind = "float"
    if kind == "none" or (merged and (kind == "bool" or "merged_bias" in WITHOUT)):
        return None, "none"
    shape = [d.one_of(1, batch), d.one_of(1, heads), d.one_of(1, tokens), length]
    if merged:
        shape = [d.one_of(1, batch * heads), shape[2], length]
    noise = values(shape, d.integer(0, 3))
    if kind == "bool":
        mask = noise > -0.5
        mask[..., 0] = True  # a row that is masked as a whole has no meaning
        return d.program.give(mask, "m"), kind
    if kind == "integer":
        return d.program.give((noise * 3).to(d.one_of(torch.int64, torch.int32)), "m"), kind
    if d.maybe():
        noise = torch.zeros(shape).masked_fill(noise < -0.5, d.one_of(-math.inf, torch.finfo(torch.float32).min))
        noise[..., 0] = 0.0
    return d.program.give(noise, "m"), kind


@st.composite
def caches(
    draw: Any, batch: int, heads: int, head_dim: int, seed: int, length: int, kept: tuple[int, int], bits: int
) -> CacheInput:
    if draw(st.integers(0, 3)) == 3:
        length = draw(st.integers(1, 6))
    x = values((batch, heads, length, head_dim), seed)
    equalize = "equalized" not in WITHOUT and draw(st.integers(0, 3)) == 0
    if equalize and head_dim >= 8:
        for channel in draw(st.lists(st.integers(0, head_dim - 1), max_size=2, unique=True)):
            # Large scores are decided by the last step of 4 bits.
            x[..., channel] = (x[..., channel].abs() + 1.0) * draw(st.sampled_from([8.0, 40.0 if bits == 8 else 8.0]))
    appended = draw(st.integers(0, length - 1)) if "grown" not in WITHOUT else 0
    cache = CacheInput(x, appended, equalize, *kept, bits=bits)
    # What keeps rows: on the grid of its own format, so that a kept row reads as its int8 one.
    return replace(cache, values=_fixed_point(cache)) if any(kept) else cache


def _fixed_point(cache: CacheInput) -> Tensor:
    x = cache.values
    for _ in range(8):
        rounded = replace(cache, values=x).rounded()
        if torch.equal(rounded, x):
            break
        x = rounded
    return x


@st.composite
def programs(draw: Any, most: int = 7) -> Program:
    """A function of one or two caches, of up to about ``most`` lines besides those of its attentions."""
    program = Program()
    d = Draw(draw, program)
    batch, heads = d.one_of(1, 1, 2, 3), d.one_of(1, 2)
    head_dim = d.one_of(8, 8, 16, 1)
    # Now and then of no cache at all; attention over what is put together would make one.
    floats = "float" not in WITHOUT and d.integer(0, 7) == 7
    length, kept = d.integer(1, 6), (0, 0)
    if "4 bits" not in WITHOUT and head_dim > 1 and not floats and d.integer(0, 3) == 3:
        program.bits = 4
    if "kept" not in WITHOUT and d.integer(0, 5) == 5:
        kept = d.integer(0, 2), d.integer(0, 3)
    for name in ("a", "b")[: d.integer(1, 2)]:
        cache = draw(caches(batch, heads, head_dim, ord(name), length, kept, program.bits))
        program.take(name, CacheInput(cache.values, stays_float=True) if floats else cache)
    pending: list[Callable[[], None]] = []
    for _ in range(d.integer(1, most)):
        kind = d.form("write", "write", "write", "move", "move", "read", "attention", "attention", "cat", "rest")
        if kind == "rest" and not floats:
            if pending:
                pending.pop(d.integer(0, len(pending) - 1))()
        elif floats and kind in ("attention", "rest"):
            d.one_of(step_read, step_cat)(d)
        elif kind == "attention":
            step_attention(d, pending)
        else:
            {"write": step_write, "move": step_move, "read": step_read, "cat": step_cat}[kind](d)
    while pending:
        pending.pop(0)()
    for name in program.cachelike():
        is_view = any(store.is_input and store.shares(program.env[name]) for store in program.stores)
        if name in program.caches or ("returned" in WITHOUT and is_view):
            continue
        if d.integer(0, 0 if floats else 2) == 0:
            program.do("output", name)
    if not program.outputs:
        program.do("read", "last", f"{d.one_of(*program.caches)} * 1.0")
        program.do("output", "last")
    program.drop_unused()
    program.dynamic = "dynamic" not in WITHOUT and d.integer(0, 4) == 4
    return program
