"""Find the graph's key/value storage and give it its int8 parts.

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

    # before: one that grows, passed in         # after: the caller passes it with room for the new rows
    previous = placeholder                     qdata, scale, spare = placeholders
                                               new_qdata, new_scale = quantize_per_head(new)
                                               copy_(slice(qdata, 2, start), new_qdata)
                                               copy_(slice(scale, 2, start), new_scale)
    keys = cat([previous, new], -2)            keys = dequantize_per_head(qdata, scale)

The ``dequantize_per_head`` node only *stands for* the storage: nothing reads it in the end. ``propagate`` carries the
parts to every operation that can use them, and replaces the rest. What looks like storage and is not taken is
recorded with its reason. Meaning is preserved up to the quantization of what is written.
"""

import operator
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from icw_compile.formats.ops import scale_dtype_for
from icw_compile.formats.rows import RULES, Quantized, dequantize, keep_written, quantize_like
from icw_compile.passes.attention import Attention, match_attention
from icw_compile.passes.graph import Input, KVGraph, Role, Site, Skipped, aliases, is_mutation, layer_of

__all__ = ["find_storage"]

aten = torch.ops.aten

#: The end of a slice that takes all there is.
_END = 2**63 - 1
_ZEROS = (aten.zeros.default, aten.new_zeros.default)
#: Operations through which a value stays recognisably the same keys or values, besides those of `RULES`.
_SAME_VALUES = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.chunk.default,
    aten.split.Tensor,
    operator.getitem,
)
#: Where transformers' caches keep keys and values.
_CACHE_LAYER = r"\.layers\[\d+\]\.(keys|values)$"
#: What an attention that `match_attention` does not know is made of.
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)


def find_storage(graph: KVGraph) -> int:
    """Run the pass; returns the number of storages taken."""
    uses = _AttentionUses(graph)
    taken: set[Node] = set()
    skipped: set[Node] = set()
    for node in list(graph.graph.nodes):
        if node in graph.quantized:
            _take_input(graph, node, uses)
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
    graph.quantized = {}
    graph.skipped += uses.unquantized(taken | skipped) or _left_float(graph, taken | skipped)
    return len(taken)


def _is_storage(graph: KVGraph, node: Node, uses: "_AttentionUses") -> bool:
    """Whether this is float storage that can become int8."""
    if node in graph.adoptable and _is_written_storage(node, uses):
        return True
    if node.target in _ZEROS:
        return _is_created_storage(graph, node, uses)
    return node.target is aten.cat.default and _is_grown_storage(graph, node, uses)


def _stays_float(graph: KVGraph, node: Node, uses: "_AttentionUses") -> bool:
    """Whether the caller wants this storage to stay float (``icw.skip_layers``); recorded if so."""
    name = _name_of(node, uses)
    index = _layer_index(name)
    if index is None or not graph.skip_layers:
        return False
    kinds: set[int | str] = {index}
    if index == 0:
        kinds.add("first")
    if index == max((_layer_index(layer_of(attention.node)) or 0 for attention in uses.attentions), default=None):
        kinds.add("last")
    if index in graph.sliding_layers:
        kinds.add("sliding")
    if not kinds & graph.skip_layers:
        return False
    value = node.meta["val"]
    size = int(value.shape[1] * value.shape[3] * value.dtype.itemsize)
    graph.asked_float.append(Skipped("", name, f"icw.skip_layers: {size:,} bytes per token"))
    return True


def _name_of(storage: Node, uses: "_AttentionUses", source: str | None = None) -> str:
    """Where storage lives, or the layer that uses it."""
    if source := source or storage.meta.get("source_name"):
        return source
    use = uses.of(storage)
    return f"{layer_of(use[0].node)} {use[1]}s" if use else storage.name


def _layer_index(name: str) -> int | None:
    """``past_key_values.layers[3].keys``, ``model.layers.3.self_attn``: 3."""
    found = re.search(r"\b(?:layers|h|blocks|block)\W(\d+)", name)
    return None if found is None else int(found[1])


def _left_float(graph: KVGraph, taken: set[Node]) -> list[Skipped]:
    """The float keys and values of a cache layer that are inputs, and that no attention was seen to read."""
    reason = "no attention was found that reads it, as a latent cache is not read as keys and values; it stays float"
    used = {source for node in taken for source in node.all_input_nodes}
    parts = {name for each in graph.inputs.values() for name in each.parts}
    return [
        Skipped("", name, reason)
        for node in graph.graph.find_nodes(op="placeholder")
        if re.search(_CACHE_LAYER, name := node.meta.get("source_name", ""))
        and node not in used | taken
        and node.name not in parts
        and node.meta["val"].dim() == 4
        and node.meta["val"].is_floating_point()
    ]


class _AttentionUses:
    """Which attention reads which value, and as what."""

    def __init__(self, graph: KVGraph) -> None:
        self.attentions = [a for node in graph.graph.nodes if (a := match_attention(node)) is not None]
        self.readers: dict[Node, tuple[Attention, Role]] = {}
        self._ancestors: list[tuple[Attention, Role, list[Node]]] = []
        for attention in self.attentions:
            for role, operand in (("key", attention.key), ("value", attention.value)):
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
            if is_mutation(write):
                for source in write.args[1:]:
                    for node in _same_values(source):
                        if node in self.readers:
                            return self.readers[node]
        return None

    def read(self, storage: Node) -> bool:
        """Whether attention reads ``storage``: one that we know, or a product with the values in it."""
        if self.of(storage) is not None:
            return True
        pending, seen = [storage], {storage}
        while pending:
            for user in pending.pop().users:
                if user.target in _PRODUCTS:
                    return True
                if user not in seen and (user.target in RULES or user.target in _SAME_VALUES):
                    seen.add(user)
                    pending.append(user)
        return False

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
                pending += current.args


def _is_created_storage(graph: KVGraph, node: Node, uses: _AttentionUses) -> bool:
    value = node.meta["val"]
    if value.dim() != 4 or not value.is_floating_point():
        return False
    returned = set(graph.output_nodes)
    views = list(aliases(node))
    return any(v in returned for v in views) and any(map(is_mutation, views)) and uses.read(node)


def _is_written_storage(node: Node, uses: _AttentionUses) -> bool:
    """Whether this float input is a cache that was filled before the first compiled call, and is written in place."""
    return any(map(is_mutation, aliases(node))) and uses.read(node)


def _is_grown_storage(graph: KVGraph, node: Node, uses: _AttentionUses) -> bool:
    """Whether this is ``cat([previous, new], -2)`` of a DynamicCache that is not quantized yet.

    The previous tensor is the empty one of a new cache, or was filled with floats before the first compiled call. One
    that is quantized already is an input, which is taken as such.
    """
    value, dim = node.meta["val"], node.args[1] if len(node.args) > 1 else 0
    if value.dim() != 4 or not value.is_floating_point() or dim not in (-2, 2):
        return False
    returned = set(graph.output_nodes)
    if not any(view in returned for view in aliases(node)) or not uses.read(node):
        return False
    return not any(previous in graph.storage for previous in _same_values(node.args[0]))


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


def _adopt_input(graph: KVGraph, node: Node, uses: _AttentionUses) -> None:
    value = node.meta["val"]
    with graph.fake_mode:
        qdata = torch.empty(value.shape, dtype=torch.int8, device=value.device)
        scale = torch.empty((*value.shape[:-1], 1), dtype=scale_dtype_for(value.dtype), device=value.device)
        shift = qdata.new_empty(_shift_size(value.shape)) if _is_equalized(graph, node, uses) else None
        kept = graph.keep.nothing_yet(value.shape, value.dtype, value.device)
    exact, position = kept
    fakes = Quantized(qdata, scale, value.dtype, shift, exact, position, graph.keep.sinks)
    graph.quantized[node] = fakes
    _take_input(graph, node, uses, note=", quantized here")
    graph.inputs[node.name] = replace(graph.inputs[node.name], adopted=fakes)


def _is_equalized(graph: KVGraph, node: Node, uses: _AttentionUses) -> bool:
    use = uses.of(node)
    return use[1] in graph.equalized if use is not None else graph.equalized == {"key", "value"}


def _shift_size(size: Sequence[Any]) -> list[Any]:
    return [*size[:-2], 1, size[-1]]


def _take_input(graph: KVGraph, node: Node, uses: _AttentionUses, note: str = "") -> None:
    fakes = graph.quantized[node]
    append = _find_append(graph, node)
    if append is not None:
        fakes = append.grown
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    with graph.graph.inserting_before(node):
        placeholders = [graph.graph.placeholder(f"{node.name}_qdata")]
    for part in list(fakes.parts)[1:]:
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"{node.name}_{part}")
        placeholders.append(last)
    for placeholder, fake in zip(placeholders, fakes.parts.values(), strict=True):
        placeholder.meta = {**node.meta, "val": fake}
    parts = fakes.of_parts(placeholders)
    part_names = tuple(placeholder.name for placeholder in placeholders)
    name = node.meta.get("source_name")
    if append is None:
        written = any(is_mutation(alias) for alias in aliases(node))
        graph.inputs[node.name] = Input(part_names, written=written)
        cache = "static" if written else "dynamic"
        _stand_for(graph, node, parts, uses, before=last.next, cache=cache, name=name, note=note)
        return
    extra = {}
    after = last
    for name_of, value in (("spare", append.spare), ("length", append.start)):
        if isinstance(value, torch.SymInt):
            with graph.graph.inserting_after(after):
                after = extra[name_of] = graph.graph.placeholder(f"{node.name}_{name_of}")
            after.meta = {"val": value, "dynamo_placeholder": node.meta.get("dynamo_placeholder")}
    rows = append.rows if isinstance(append.rows, int) else append.rows.name
    names = {name_of: placeholder.name for name_of, placeholder in extra.items()}
    graph.inputs[node.name] = Input(part_names, rows, **names)
    start = extra.get("length", append.start)
    with graph.before(append.cat):
        for part, written in zip(parts.rows, quantize_like(graph, append.new, parts).rows, strict=True):
            end = graph.call(aten.slice.Tensor, part, 2, start, _END)
            graph.call(aten.copy_.default, end, written)
        for part, kept in keep_written(graph, parts, append.new, start).items():
            graph.call(aten.copy_.default, getattr(parts, part), kept)
    _stand_for(graph, append.cat, parts, uses, before=append.cat, cache="dynamic", name=name)
    graph.sites[-1].writes.append("append")
    graph.graph.erase_node(node)


class _Append(NamedTuple):
    """``cat([previous, new], -2)`` that can write ``new`` behind the rows of ``previous``, where there is room.

    ``start`` and ``rows`` are the lengths of the two, ``grown`` the fake parts of the result: ``spare`` rows lie
    between the end of one head and the start of the next.
    """

    cat: Node
    new: Node
    start: int | torch.SymInt
    rows: int | Node
    spare: torch.SymInt
    grown: Quantized


def _find_append(graph: KVGraph, node: Node) -> _Append | None:
    """The append to the quantized input ``node``, if that is all the graph does with it.

    Who holds the result must not be able to tell it from a copy: it is returned whole, and nothing writes into it.
    """
    cat = next(iter(node.users)) if len(node.users) == 1 else None
    if cat is None or cat.target is not aten.cat.default or len(cat.args[0]) != 2 or cat.args[0][0] is not node:
        return None
    new, dim = cat.args[0][1], cat.args[1] if len(cat.args) > 1 else 0
    value, grown = node.meta["val"], cat.meta["val"]
    if new is node or value.dim() != 4 or dim not in (-2, 2) or new.meta["val"].dtype != value.dtype:
        return None
    views = list(aliases(cat))
    if [view for view in graph.output_nodes if view in views] != [cat] or any(map(is_mutation, views)):
        return None
    spare, rows = graph.new_size(f"{node.name}_spare"), graph.number(new.meta["val"].shape[2])
    start = value.shape[2]
    if isinstance(start, torch.SymInt):
        start = graph.same_size(start)
    if start is None or rows is None or spare is None:
        return None
    fakes = graph.quantized[node]
    batch, heads, tokens = grown.shape[:3]
    capacity = tokens + spare
    parts = []
    for part in fakes.rows:
        size = part.shape[-1]
        strides = (heads * capacity * size, capacity * size, size, 1)
        with graph.fake_mode:
            parts.append(
                torch.empty_strided((batch, heads, tokens, size), strides, dtype=part.dtype, device=part.device)
            )
    return _Append(cat, new, start, rows, spare, fakes.of(parts))


def _take_zeros(graph: KVGraph, node: Node, uses: _AttentionUses) -> None:
    value = node.meta["val"]
    scale_dtype = scale_dtype_for(value.dtype)
    sizes_at = node.target._schema.arguments[0].name == "self"  # new_zeros(self, size) against zeros(size)
    size = list(node.args[int(sizes_at)])
    with graph.before(node):
        qdata = graph.call(aten.zeros.default, size, dtype=torch.int8, device=value.device)
        scale = graph.call(aten.zeros.default, [*size[:-1], 1], dtype=scale_dtype, device=value.device)
        shift = None
        if _is_equalized(graph, node, uses):
            shift = graph.call(aten.zeros.default, _shift_size(size), dtype=torch.int8, device=value.device)
        exact, position = _nothing_kept_yet(graph, size, value)
    parts = Quantized(qdata, scale, value.dtype, shift, exact, position, graph.keep.sinks)
    _stand_for(graph, node, parts, uses, before=node, cache="static", note=", created here")


def _nothing_kept_yet(
    graph: KVGraph, size: Sequence[Any], value: torch.Tensor
) -> tuple[Node, Node] | tuple[None, None]:
    """Nodes for the kept rows of new storage of this size, and for their positions; none if none are kept."""
    keep = graph.keep
    if not any(keep):
        return None, None
    exact = graph.call(aten.zeros.default, keep.size(size), dtype=value.dtype, device=value.device)
    rows = [keep.sinks + keep.recent]
    return exact, graph.call(aten.full.default, rows, -1, dtype=torch.int64, device=value.device)


def _take_grown(graph: KVGraph, node: Node, uses: _AttentionUses) -> None:
    value, readers, after = node.meta["val"], set(node.users), node.next
    with graph.before(after):
        shift = None
        if _is_equalized(graph, node, uses):
            shift = graph.call(torch.ops.icw_int8kv.channel_shift.default, node)
        parts = quantize_like(graph, node, Quantized(None, None, value.dtype, shift))
        if any(graph.keep):
            size = [graph.size(node, dim) for dim in range(4)]
            exact, position = _nothing_kept_yet(graph, size, value)
            parts = parts._replace(exact=exact, position=position, sinks=graph.keep.sinks)
            parts = parts._replace(**keep_written(graph, parts, node, 0))
    _stand_for(graph, node, parts, uses, before=after, cache="dynamic", note=", quantized here", readers=readers)
    graph.sites[-1].writes.append("cat")


def _stand_for(
    graph: KVGraph,
    node: Node,
    parts: Quantized,
    uses: _AttentionUses,
    *,
    before: Node,
    cache: str,
    name: str | None = None,
    note: str = "",
    readers: Collection[Node] | None = None,
) -> None:
    """Replace ``node`` by a node that stands for the storage made of ``parts``, and record the site.

    ``readers`` are the users that get the stand-in, where some of them make the parts.
    """
    use = uses.of(node)
    with graph.before(before):
        stand_in = dequantize(graph, parts)
    value, scale = graph.tensor(parts.qdata), graph.tensor(parts.scale)
    heads, head_dim = value.shape[1], value.shape[-1]
    layer = layer_of(use[0].node) if use else ""
    name = _name_of(node, uses, name)
    index = _layer_index(name)
    sliding = index in graph.sliding_layers
    kept = 0 if parts.exact is None else graph.tensor(parts.exact).shape[-2]
    site = Site(
        name=name,
        role=use[1] if use else None,
        layer=layer,
        cache=f"{cache}{' sliding' if sliding else ''}{note}",
        shape=tuple(s if isinstance(s, int) else str(s) for s in value.shape),
        dtype=str(parts.dtype).removeprefix("torch."),
        float_bytes_per_token=int(heads * head_dim * parts.dtype.itemsize),
        bytes_per_token=int(heads * (head_dim + scale.dtype.itemsize)),
        equalized=parts.shift is not None,
        float_tokens=kept,
        float_tokens_bytes=int(heads * kept * head_dim * parts.dtype.itemsize),
    )
    graph.sites.append(site)
    graph.storage[stand_in] = (parts, site)
    node.replace_all_uses_with(stand_in, delete_user_cb=lambda user: readers is None or user in readers)
    if not node.users:
        graph.graph.erase_node(node)
