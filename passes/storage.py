"""Find the graph's key/value storage and give it its stored parts.

::

    # before: a cache passed in                # after
    keys = placeholder                         keys_qdata, keys_scale = placeholders
                                               keys = dequantize_per_head(keys_qdata, keys_scale)

    # before: a cache created by this graph    # after
    keys = zeros([1, 8, 4096, 128])            qdata, scale = zeros(int8), zeros([1, 8, 4096, 1])
                                               keys = dequantize_per_head(qdata, scale)

    # before: a cache that grows                # after, where the previous one was still float
    keys = cat([previous, new], -2)            grown = cat([previous, new], -2)
                                               qdata, scale = quantize_per_head(grown)
                                               keys = dequantize_per_head(qdata, scale)

One that grows and is passed in is written in place: `icw_compile.passes.append`.

A cache is known by where the caller keeps it (`icw_compile.passes.graph.Endpoint`). Outside of transformers' caches it
is what a recognised attention reads and the graph writes or returns. The node that decodes a storage only *stands for*
it: nothing reads it in the end. ``propagate`` carries the parts to every operation that can use them, and replaces the
rest. But a prompt, more query tokens than a few, reads its own keys and values *as they came*: there the floats stay,
what was stored before is decoded for them, and the parts are only written. What looks like storage and is not taken is
recorded with its reason. Meaning is preserved up to the quantization of what is written.
"""

import operator
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import statically_known_true, true_here
from icw_compile.formats import Format, Stored
from icw_compile.formats.base import decode
from icw_compile.formats.evaluate import SHAPES
from icw_compile.formats.rules import RULES
from icw_compile.formats.writes import encode_like
from icw_compile.kernels.interface import FEW_TOKENS
from icw_compile.passes.append import Append, may_tell, write_append
from icw_compile.passes.attention import Attention, match_attention, repeats_heads, strip_casts
from icw_compile.passes.graph import Grown, Input, KVGraph, Role, Site, Skipped, Storage
from icw_compile.passes.nodes import (
    aliases,
    args_of,
    arguments,
    called,
    is_mutation,
    layer_of,
    root_of,
    viewed_by,
    written_by,
)

__all__ = ["find_storage"]

aten = torch.ops.aten

_ZEROS = (aten.zeros.default, aten.new_zeros.default)
#: Operations through which a value stays recognisably the same keys or values, besides those of `RULES`.
_SAME_VALUES = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    operator.getitem,
)
_UNREAD = "no attention was found that reads it; it stays float"
#: What an attention that `match_attention` does not know is made of.
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)


def find_storage(graph: KVGraph) -> int:
    """Run the pass; returns the number of storages taken."""
    uses = _AttentionUses(graph)
    taken: set[Node] = set()
    skipped: set[Node] = set()
    holders = _held(graph)
    for node in list(graph.graph.nodes):
        if node in graph.stored:
            _take_input(graph, node, uses)
        elif node in holders and (_endpoint(graph, node) is not None or _is_storage(graph, node, uses)):
            graph.skipped.append(holders[node])
            skipped.add(node)
            continue
        elif not _is_storage(graph, node, uses):
            continue
        elif _stays_float(graph, node, uses):
            skipped.add(node)
            continue
        elif node in graph.adoptable:
            _adopt_input(graph, node, uses)
        elif node.target in _ZEROS:
            _take_zeros(graph, node, uses)
        else:
            _take_grown(graph, node, uses)
        taken.add(node)
    graph.stored = {}
    graph.skipped += uses.unquantized(taken | skipped)
    graph.skipped += _left_float(graph, taken | skipped, uses)
    return len(taken)


def _held(graph: KVGraph) -> dict[Node, Skipped]:
    """What a kept node may write into or show again, up to where its memory comes from: why it stays as it is."""
    found = {}
    for node in graph.graph.nodes:
        if "kept" not in node.meta:
            continue
        reason = f"`{called(node)}`, which is not taken apart, may write into it or keep a view of it; it stays float"
        for each in (*written_by(node), *viewed_by(node)):
            root = root_of(each)
            found[root] = Skipped(layer_of(node), root.meta.get("source_name", root.name), reason)
    return found


def _is_storage(graph: KVGraph, node: Node, uses: "_AttentionUses") -> bool:
    """Whether this is float storage that can become stored parts."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or not value.is_floating_point():
        return False
    if uses.of(node) is None and not (_endpoint(graph, node) is not None and _meets_a_product(node)):
        return False
    views = list(aliases(node))
    is_written = any(map(is_mutation, views))
    if node.op == "placeholder":
        return node in graph.adoptable and is_written
    returned = set(graph.output_nodes)
    if not any(view in returned for view in views):
        return False
    if node.target in _ZEROS:
        return is_written
    # `cat([previous, new], -2)` of a cache that is float so far, which is empty or was filled before.
    dim = args_of(node)[1] if node.target is aten.cat.default and len(args_of(node)) > 1 else 0
    if node.target is not aten.cat.default or dim not in (-2, 2):
        return False
    return not any(previous in graph.storage for previous in _same_values(args_of(node)[0]))


def _endpoint(graph: KVGraph, node: Node) -> Any:
    """Where the caller keeps this storage, or what becomes of it; ``None`` if that is not known."""
    if node in graph.endpoints:
        return graph.endpoints[node]
    if not graph.returned_to:
        return None
    views = set(aliases(node))
    return next(
        (end for i, value in enumerate(graph.output_nodes) if value in views and (end := graph.returned_to.get(i))),
        None,
    )


def _stays_float(graph: KVGraph, node: Node, uses: "_AttentionUses") -> bool:
    """Whether the caller wants this storage to stay float (``icw.skip_layers``); recorded if so."""
    if not _is_of(graph, node, uses, graph.skip_layers):
        return False
    value = node.meta["val"]
    size = int(value.shape[1] * value.shape[3] * value.dtype.itemsize)
    name = _name_of(graph, node, uses)
    graph.asked_float.append(Skipped("", name, f"icw.skip_layers: {size:,} bytes per token"))
    return True


def _is_of(graph: KVGraph, node: Node, uses: "_AttentionUses", layers: frozenset[int | str]) -> bool:
    """Whether this is storage of one of these layers: indices, ``"first"``, ``"last"``, ``"sliding"``."""
    if not layers:
        return False
    end = _endpoint(graph, node)
    index = end.layer if end is not None else _layer_index(_name_of(graph, node, uses))
    if index is None:
        return False
    kinds: set[int | str] = {index}
    if index == 0:
        kinds.add("first")
    last = max((_layer_index(layer_of(attention.node)) or 0 for attention in uses.attentions), default=None)
    if end.is_last if end is not None else index == last:
        kinds.add("last")
    if end is not None and end.is_sliding:
        kinds.add("sliding")
    return bool(kinds & layers)


def _name_of(graph: KVGraph, storage: Node, uses: "_AttentionUses") -> str:
    """Where storage lives, or the layer that uses it."""
    if source := storage.meta.get("source_name"):
        return str(source)
    use = uses.of(storage)
    return f"{layer_of(use[0].node)} {use[1]}s" if use else storage.name


def _layer_index(name: str) -> int | None:
    """``model.layers.3.self_attn``: 3."""
    found = re.search(r"\b(?:layers|h|blocks|block)\W(\d+)", name)
    return None if found is None else int(found[1])


def _left_float(graph: KVGraph, taken: set[Node], uses: "_AttentionUses") -> list[Skipped]:
    """The float keys and values of a cache layer that are inputs, and that no attention was seen to read."""
    reason = graph.why_it_ends or _UNREAD
    used = {source for node in taken for source in node.all_input_nodes}
    parts = {name for each in graph.inputs.values() for name in each.parts}
    left = []
    for node, end in graph.endpoints.items():
        value = node.meta.get("val")
        if node in used | taken or node.name in parts or not isinstance(value, torch.Tensor):
            continue
        if value.dim() == 4 and value.is_floating_point() and uses.of(node) is None:
            left.append(Skipped("", end.name, reason))
    return left


class _AttentionUses:
    """Which attention reads which value, and as what."""

    def __init__(self, graph: KVGraph) -> None:
        self.attentions = [a for node in graph.graph.nodes if (a := match_attention(node)) is not None]
        self.readers: dict[Node, tuple[Attention, Role]] = {}
        self._ancestors: list[tuple[Attention, Role, list[Node]]] = []
        for attention in self.attentions:
            operands: tuple[tuple[Role, Node], ...] = (("key", attention.key), ("value", attention.value))
            if (latent := graph.latents.get(attention.node)) is not None:
                operands = (("key", latent.states), ("value", latent.positions))
            for role, operand in operands:
                ancestors = list(_same_values(operand))
                self._ancestors.append((attention, role, ancestors))
                for node in ancestors:
                    self.readers.setdefault(node, (attention, role))

    def of(self, storage: Node) -> tuple[Attention, Role] | None:
        """The attention that reads ``storage``, or that reads the very states which are written into it.

        The second is a prompt that overflows a sliding window: attention uses the states themselves, and the cache
        keeps their tail.
        """
        if storage in self.readers:
            return self.readers[storage]
        for write in aliases(storage):
            written = set(written_by(write))
            for source in write.all_input_nodes if written else ():
                for node in _same_values(source) if source not in written else ():
                    if node in self.readers:
                        return self.readers[node]
        return None

    def as_they_come(self, storage: Node) -> bool:
        """Whether ``storage`` is read by a prompt, which attends to its own keys and values as they came."""
        use = self.of(storage)
        return use is not None and true_here(use[0].query.meta["val"].shape[-2] > FEW_TOKENS)

    def forms(self, storage: Node) -> list[str]:
        """How each attention that reads ``storage`` is spelled."""
        readers = [attention for attention, _, ancestors in self._ancestors if storage in ancestors]
        return [each.form + " + repeat_kv" * repeats_heads(strip_casts(each.key)) for each in readers]

    def unquantized(self, taken: set[Node]) -> list[Skipped]:
        """The attentions that read something like a cache which was not taken, with the reason."""
        found = []
        for attention, role, ancestors in self._ancestors:
            if taken.intersection(ancestors):
                continue
            reason = next((r for node in ancestors if (r := _why_not(node))), None)
            if reason is not None:
                found.append(Skipped(layer_of(attention.node), f"{role}s", reason))
        return found


def _same_values(node: object) -> Iterable[Node]:
    """``node`` and what its values were moved or written from, nearest first."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop(0)
        if isinstance(current, (list, tuple)):
            pending += current
        elif isinstance(current, Node) and current not in seen:
            seen.add(current)
            yield current
            if current.target in RULES or current.target in _SAME_VALUES:
                pending += args_of(current)


def _meets_a_product(storage: Node) -> bool:
    """Whether it, moved but not changed, is multiplied: what an attention that no rule knows is made of."""
    pending, seen = [storage], {storage}
    while pending:
        for user in pending.pop().users:
            if user.target in _PRODUCTS:
                return True
            if user not in seen and (user.target in RULES or user.target in _SAME_VALUES):
                seen.add(user)
                pending.append(user)
    return False


def _why_not(node: Node) -> str | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or not value.is_floating_point():
        return None
    if node.op == "placeholder" and any(is_mutation(alias) for alias in aliases(node)):
        return (
            f"`{node.name}` is a float cache that was filled before the first compiled call, and no cache layer of "
            "transformers holds it; compile the prefill as well, or build the cache with icw_compile.static_cache(...)"
        )
    return None


def _is_of_one_token(write: Node) -> bool:
    """Whether it writes one row of each head."""
    if write.target is not aten.index_copy_.default:
        return False
    a = arguments(write)
    return a["dim"] in (2, -2) and statically_known_true(a["source"].meta["val"].shape[-2] == 1)


def _adopt_input(graph: KVGraph, node: Node, uses: _AttentionUses) -> None:
    value = node.meta["val"]
    layout = _format_for(graph, node, uses)
    with graph.fake_mode:
        fakes = layout.empty(SHAPES, value.shape, value.device)
    graph.stored[node] = fakes
    _take_input(graph, node, uses, note=", quantized here", adopted=layout)


def _format_for(graph: KVGraph, node: Node, uses: _AttentionUses) -> Format:
    use = uses.of(node)
    in_eight_bits = _is_of(graph, node, uses, graph.eight_bit_layers)
    value = node.meta["val"]
    return graph.format_for(value.dtype, use[1] if use else None, value.device, in_eight_bits=in_eight_bits)


def _take_input(
    graph: KVGraph, node: Node, uses: _AttentionUses, note: str = "", adopted: Format | None = None
) -> None:
    fakes, value = graph.stored[node], node.meta["val"]
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    specs = fakes.format.parts
    with graph.graph.inserting_before(node):
        placeholders = [graph.graph.placeholder(f"{node.name}_{specs[0].name}")]

    def placeholder(name: str) -> Node:
        nonlocal last
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"{node.name}_{name}")
        return last

    placeholders += [placeholder(spec.name) for spec in specs[1:]]
    for made, fake in zip(placeholders, fakes.parts, strict=True):
        made.meta = {**node.meta, "val": fake}
    stored = fakes.of_parts(placeholders)
    names = tuple(each.name for each in placeholders)
    name = _name_of(graph, node, uses)
    if node.name in graph.shown:  # the graph has another input in its place
        graph.inputs[node.name] = Input(names, shows=graph.shown[node.name])
        graph.graph.erase_node(node)
        return
    writes = [alias for alias in aliases(node) if is_mutation(alias)]
    written, token_by_token = bool(writes), bool(writes) and all(map(_is_of_one_token, writes))
    if node not in graph.growing:
        end = graph.endpoints.get(node)
        owner = end.source if end is not None else ""
        graph.inputs[node.name] = Input(
            names, written=written, token_by_token=token_by_token, adopted=adopted, owner=owner
        )
        cache = "static" if written else "dynamic"
        before = _first_user(node) if uses.as_they_come(node) else last.next
        _stand_for(graph, node, stored, uses, before=before, cache=cache, name=name, note=note)
        return
    length: Any = graph.number(value.shape[2])
    extra = None
    if length is None:
        length = placeholder("length")
        length.meta = {"val": value.shape[2], "dynamo_placeholder": node.meta.get("dynamo_placeholder")}
        extra = length.name
    appends = Append.find(graph, node, stored)
    taken = {*graph.stored, *graph.storage}
    is_new = appends is not None and taken.isdisjoint(_same_values(appends.new))
    rows = 0 if appends is None else appends.rows
    appended = rows if isinstance(rows, int) else rows.name
    graph.inputs[node.name] = Input(names, extra, appended, is_new, written)
    if appends is not None:
        graph.grown[appends.output] = Grown(node.name, appends.keep)
        only_grows = is_new and set(node.users) == {appends.cat}  # rows may change in place: nothing else reads them
        tells = only_grows and may_tell(stored.format, value.shape[2], appends.new.meta["val"].shape[2])
        grown = write_append(graph, appends, stored, length, tells)
        floats = appends.cat if uses.as_they_come(node) else None
        before = appends.cat if floats is None else floats.next
        _stand_for(graph, appends.cat, grown, uses, before=before, cache="dynamic", name=name, floats=floats)
        graph.sites[-1].writes.append("append")
        stored = stored.with_parts(**{"shift": grown["shift"]} if tells else {})
    if appends is not None and not node.users:
        graph.graph.erase_node(node)
        return
    first = _first_user(node) if uses.as_they_come(node) else last.next
    with graph.before(first):
        shown = stored.with_parts(
            **{each: graph.call(aten.narrow.default, part, 2, 0, length) for each, part in stored.rows.items()}
        )
    _stand_for(graph, node, shown, uses, before=first, cache="dynamic", name=name, is_site=appends is None)


def _take_zeros(graph: KVGraph, node: Node, uses: _AttentionUses) -> None:
    value = node.meta["val"]
    size = list(arguments(node)["size"])
    floats = node if uses.as_they_come(node) else None
    with graph.before(node):
        stored = _format_for(graph, node, uses).empty(graph, size, value.device)
    if floats is not None:  # no longer than its layer runs
        _first_user(node).prepend(node)
    before = node if floats is None else node.next
    _stand_for(graph, node, stored, uses, before=before, cache="static", note=", created here", floats=floats)


def _take_grown(graph: KVGraph, node: Node, uses: _AttentionUses) -> None:
    value, readers, after = node.meta["val"], set(node.users), node.next
    layout = _format_for(graph, node, uses)
    with graph.before(after):
        stored = layout.empty(graph, [graph.size(node, dim) for dim in range(4)], value.device)
        stored = layout.settle(graph, stored, node)
        stored = stored.with_parts(**encode_like(graph, node, stored))
        if stored.kept:
            index = graph.call(aten.arange.default, graph.size(node, 2), device=value.device)
            stored = stored.with_parts(**layout.keep(graph, stored, node, index))
    floats = _as_it_came(graph, node, stored, after) if uses.as_they_come(node) else None
    note = ", quantized here"
    _stand_for(graph, node, stored, uses, before=after, cache="dynamic", note=note, readers=readers, floats=floats)
    graph.sites[-1].writes.append("cat")


def _as_it_came(graph: KVGraph, cat: Node, stored: Stored, before: Node) -> Node:
    """``cat([previous, new], -2)`` of what is stored of the previous rows, if there are any."""
    previous, *new = args_of(cat)[0]
    if statically_known_true(previous.meta["val"].numel() == 0):
        return cat
    with graph.before(before):
        old = graph.call(aten.narrow.default, decode(graph, stored), 2, 0, graph.size(previous, 2))
        made: Node = graph.call(aten.cat.default, [old, *new], 2)
    return made


def _first_user(node: Node) -> Node:
    return min(node.users)


def _stand_for(
    graph: KVGraph,
    node: Node,
    stored: Stored,
    uses: _AttentionUses,
    *,
    before: Node,
    cache: str,
    name: str | None = None,
    note: str = "",
    readers: Collection[Node] | None = None,
    is_site: bool = True,
    floats: Node | None = None,
) -> None:
    """Replace ``node`` by a node that stands for the storage, and record the site.

    ``readers`` are the users that get the stand-in, where some of them make the parts. ``floats`` is what they read,
    where that is not what is stored.
    """
    use, end = uses.of(node), _endpoint(graph, node)
    value = node.meta["val"]
    heads, head_dim = value.shape[1], value.shape[-1]
    kept = [graph.tensor(part).shape[-2] for part in stored.kept.values() if graph.tensor(part).dim() == value.dim()]
    site = Site(
        name=name or _name_of(graph, node, uses),
        role=use[1] if use else None if end is None else end.role,
        layer=layer_of(use[0].node) if use else "",
        cache=f"{cache}{' sliding' if end is not None and end.is_sliding else ''}{note}",
        shape=tuple(s if isinstance(s, int) else str(s) for s in value.shape),
        dtype=str(stored.dtype).removeprefix("torch."),
        format=str(stored.format),
        float_bytes_per_token=int(heads * head_dim * stored.dtype.itemsize),
        bytes_per_token=int(stored.format.bytes_per_token(heads, head_dim)),
        equalized="shift" in stored.named,
        float_tokens=kept[0] if kept else 0,
        float_tokens_bytes=int(heads * sum(kept) * head_dim * stored.dtype.itemsize),
    )
    came = floats is not None or (is_site and node.op == "placeholder" and uses.as_they_come(node))
    if came and (forms := uses.forms(node)):
        site.reads, site.lowering = forms, "as it came"
    if is_site:
        graph.sites.append(site)
    with graph.before(before):
        storage = Storage(stored, site if is_site else graph.sites[-1], cache == "dynamic", came)
        stand_in = decode(graph, stored) if floats is None else graph.call(aten.alias.default, floats)
    graph.storage[stand_in] = storage
    node.replace_all_uses_with(
        stand_in, delete_user_cb=lambda user: user is not stand_in and (readers is None or user in readers)
    )
    if not node.users:
        graph.graph.erase_node(node)
