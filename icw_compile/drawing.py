"""A picture of what a graph does with its cache: what is stored, how it is written and read, and what attends to it.

Of a layer's graph, some hundred nodes, a dozen matter here. They are found from where the cache lives: forward through
all that only moves what is stored, up to what reads it; backward to what is written; and the attention in between.
`icw_compile.explain` keeps a drawing for each step of the rewrite, as text and as SVG.
"""

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch.fx import Node

from icw_compile.compat.fx import is_operator, statically_known_true, values_of
from icw_compile.formats.rules import RULES
from icw_compile.passes.attention import match_attention
from icw_compile.passes.graph import Endpoint, KVGraph
from icw_compile.passes.nodes import args_of, is_mutation, root_of, viewed_by, written_by

__all__ = ["COLOURS", "Box", "Drawing", "draw"]

Role = Literal["storage", "write", "read", "attention", "other"]

#: role -> the colour of its boxes, and of their edge.
COLOURS: dict[Role, tuple[str, str]] = {
    "storage": ("#cfe2f3", "#2f6da8"),
    "write": ("#fbdcc0", "#c8641b"),
    "read": ("#d3ecd0", "#3b8a3f"),
    "attention": ("#e3d5f2", "#7a4bb0"),
    "other": ("#f2f2f2", "#8c8c8c"),
}
#: What an argument is called in a drawing, where that is not what operators call it.
_USES = {"self": "", "other": "", "attn_mask": "mask", **dict.fromkeys(("x", "source", "src", "tensors"), "new rows")}
_WIDTH, _HEIGHT, _GAP, _LEVEL, _TOP = 214, 42, 18, 78, 64


@dataclass(frozen=True)
class Box:
    """One operation.

    Attributes:
        name: of its node, or of what it gives if that is several things.
        call: what it calls, such as ``index_copy_``; of a placeholder ``input``.
        value: dtype and shape of what it gives.
        role: storage, write, read, attention, or something else that these are made of.
        inputs: names of other boxes of the drawing, in the order of the arguments; a read of what was written is an
            input from the write.
        arguments: as text.
        use: of something else: what it is to the box that takes it, such as ``query``, ``index`` or ``new rows``.
        returned: where the caller gets it, if the graph returns it.
    """

    name: str
    call: str
    value: str
    role: Role
    inputs: tuple[str, ...]
    arguments: str
    use: str = ""
    returned: str = ""

    def __str__(self) -> str:
        called = "" if self.call == "input" else f" = {self.call}({self.arguments})"
        return f"{self.name}: {self.value}{called}" + (f"  -> {self.returned}" if self.returned else "")


@dataclass(frozen=True)
class Drawing:
    """What one cache layer is in one graph. ``print`` it for text; a notebook shows it as a picture.

    Attributes:
        layers: indices of the cache layers that look like this; empty for caches of which the layer is not known.
        boxes: in the order of the graph.
    """

    layers: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def title(self) -> str:
        if not self.layers:
            return "the cache"
        return ("layer " if len(self.layers) == 1 else "layers ") + ", ".join(map(str, self.layers))

    def calls(self, *roles: Role) -> tuple[str, ...]:
        """What the boxes of these roles call, in order."""
        return tuple(box.call for box in self.boxes if box.role in roles)

    def __str__(self) -> str:
        return "\n".join(map(str, self.boxes))

    def __repr__(self) -> str:
        return f"<Drawing of {self.title}: {len(self.boxes)} operations>"

    def _repr_svg_(self) -> str:
        return self.svg()

    def svg(self, title: str = "") -> str:
        """The picture, as the text of an SVG file: it refers to nothing outside of itself.

        Args:
            title: in front of the layers' numbers.
        """
        return _svg(self, f"{title}, {self.title}" if title else self.title)


def draw(graph: KVGraph) -> tuple[Drawing, ...]:
    """One drawing for each kind of cache layer in a graph, as it is now: layers that look alike share one.

    Returns:
        in the order of their first layers; none if the graph has no cache.
    """
    attentions = [found for node in graph.graph.nodes if (found := _attention(node))]
    drawings: dict[tuple[int, ...], Drawing] = {}
    for layer, roots in _roots(graph).items():
        drawing = _draw_layer(attentions, roots, () if layer is None else (layer,))
        form = _form(drawing)
        if form in drawings:
            drawing = replace(drawings[form], layers=drawings[form].layers + drawing.layers)
        drawings[form] = drawing
    return tuple(drawings.values())


def _form(drawing: Drawing) -> tuple[int, ...]:
    """What a drawing has in common with those of other layers: each box by what it is made of, in any order."""
    forms: dict[str, int] = {}
    for box in drawing.boxes:
        call = "" if box.call == "input" else box.call
        inputs = tuple(forms[name] for name in box.inputs)
        forms[box.name] = hash((call, box.value, box.role, inputs, bool(box.returned)))
    return tuple(sorted(forms.values()))


# What belongs to a layer


def _roots(graph: KVGraph) -> dict[int | None, dict[Node, str]]:
    """Cache layer -> the nodes that stand for its storage -> where the caller keeps them, if the graph returns them."""
    placeholders = {node.name: node for node in graph.graph.find_nodes(op="placeholder")}
    endpoints: dict[str, Endpoint] = {node.name: endpoint for node, endpoint in graph.endpoints.items()}
    stored = {node.name for node in graph.stored} | graph.inputs.keys()
    found: dict[int | None, dict[Node, str]] = {}
    for name in dict.fromkeys((*endpoints, *stored)):
        layer = endpoints[name].layer if name in endpoints else None
        parts = graph.inputs[name].parts if name in graph.inputs else (name,)
        for part in parts:
            if part in placeholders:
                found.setdefault(layer, {})[placeholders[part]] = ""
    returned = graph.output_nodes
    for i, output in enumerate(graph.outputs):
        endpoint = graph.returned_to.get(i)
        positions = output.stored.parts if output.stored is not None else (output.position,)
        if endpoint is None and output.stored is None:
            continue
        for position in positions:
            if isinstance(position, int) and position >= 0 and isinstance(returned[position], Node):
                of_layer = found.setdefault(endpoint.layer if endpoint is not None else None, {})
                of_layer[returned[position]] = _place(endpoint)
    return dict(sorted(found.items(), key=lambda item: (item[0] is None, item[0] or 0)))


class _Attention(NamedTuple):
    """The nodes that an attention consists of, the keys and values that it reads, and what others are to it."""

    nodes: set[Node]
    reads: set[Node]
    uses: dict[Node, str]


def _place(endpoint: Endpoint | None) -> str:
    if endpoint is None:
        return "the caller"
    return f"{'new ' if endpoint.name.startswith('new ') else ''}{endpoint.role}s"


@dataclass
class _Part:
    """The part of a graph that is drawn, while it is looked for."""

    storage: Collection[Node]
    uses: Mapping[Node, str]
    attention: set[Node]
    nodes: set[Node] = field(default_factory=set)

    def forward(self, starts: Iterable[Node]) -> None:
        """What moves or writes what is stored, and what reads it."""
        pending = list(starts)
        while pending:
            node = pending.pop()
            if node in self.nodes:
                continue
            self.nodes.add(node)
            if _carries(node) or node in self.storage:
                behind = self.attention & set(node.all_input_nodes)
                pending += [] if behind else [user for user in node.users if user.op != "output"]

    def backward(self, starts: Iterable[Node]) -> None:
        """What these are made of by moving and writing, up to what computes it."""
        pending = list(starts)
        while pending:
            node = pending.pop()
            self.nodes.add(node)
            if _carries(node):
                pending += [each for each in node.all_input_nodes if each not in self.nodes]


def _draw_layer(attentions: Sequence[_Attention], roots: Mapping[Node, str], layers: tuple[int, ...]) -> Drawing:
    """The drawing of one layer, of the attentions of a graph and the nodes that stand for its storage."""
    uses = {node: use for each in attentions for node, use in each.uses.items()}
    part = _Part(
        {node for node in roots if not _carries(node)}, uses, set().union(*(each.nodes for each in attentions))
    )
    part.forward(roots)
    part.backward(list(part.nodes - part.attention))
    part.attention = set()
    for each in attentions:
        read = _Part((), {}, set())
        read.backward(each.reads)
        if each.nodes & part.nodes or any(map(_carries, read.nodes & part.nodes)):
            part.attention |= each.nodes
            part.nodes |= read.nodes
    for node in part.attention:
        part.nodes |= set(node.all_input_nodes)
        part.backward(each for each in node.all_input_nodes if _is_ours(each))
    part.nodes |= part.attention
    part.nodes = {node for node in part.nodes if isinstance(_value(node), (torch.Tensor, tuple, list))}
    return Drawing(layers, _boxes(part, roots))


def _attention(node: Node) -> _Attention | None:
    """The attention that ends in ``node``, if one does."""
    if node.op != "call_function":
        return None
    if is_operator(node.target) and _is_ours(node) and "attention" in str(node.target):
        query = args_of(node)[0]
        operands = values_of(node.target, node.args, node.kwargs).items()
        reads = {value for name, value in operands if name.startswith(("key", "value")) and isinstance(value, Node)}
        uses = {query: "query"} | ({args_of(query)[0]: "query"} if _is_ours(query) else {})
        return _Attention({node}, reads, uses)
    found = match_attention(node)
    if found is None:
        return None
    uses = {bias.node: "mask" for bias in found.biases} | {found.query: "query"}
    ends = {found.key, found.value, found.sinks, *uses}
    inside, pending = {node}, [node]
    while pending:
        pending += (new := {each for each in pending.pop().all_input_nodes if each not in inside | ends})
        inside |= new
    # What leads up to constants is no part of it.
    made = {each for each in inside if each is node or any(up in inside | ends for up in each.all_input_nodes)}
    return _Attention(made, {found.key, found.value}, uses)


def _is_ours(node: Node) -> bool:
    return is_operator(node.target) and str(node.target).startswith("icw_")


def _carries(node: Node) -> bool:
    """Whether it gives what it is given, moved, written or stored in another way."""
    if node.op != "call_function" or (_is_ours(node) and "attention" in str(node.target)):
        return False
    return bool(is_mutation(node) or viewed_by(node)) or node.target in RULES or _is_ours(node)


# What is said of it


def _boxes(part: _Part, roots: Mapping[Node, str]) -> tuple[Box, ...]:
    nodes = [node for node in sorted(part.nodes) if not _is_item(node)]
    items = {node: sorted(filter(_is_item, node.users)) for node in nodes}
    names = {node: ", ".join(item.name for item in items[node]) or node.name for node in nodes}
    names |= {item: names[node] for node in nodes for item in items[node]}
    boxes: dict[str, Box] = {}
    from_storage: set[str] = set()
    for node in nodes:
        inputs = tuple(dict.fromkeys(names[each] for each in _sources(node, part.nodes) if each in names))
        role = _role(node, part, bool(from_storage & set(inputs)))
        if role in ("storage", "read", "write"):
            from_storage.add(names[node])
        value = ", ".join(_type(_value(each)) for each in items[node] or [node])
        call = "input" if node.op == "placeholder" else "constant" if node.op == "get_attr" else _called(node)
        arguments = ", ".join([*map(_text, node.args), *(f"{key}={_text(x)}" for key, x in node.kwargs.items())])
        returned = ", ".join(dict.fromkeys(filter(None, (roots.get(each, "") for each in (node, *items[node])))))
        use = _use(node, part) if role == "other" else ""
        boxes[names[node]] = Box(names[node], call, value, role, inputs, arguments, use, returned)
    read = {name for box in boxes.values() for name in box.inputs}
    return tuple(box for box in boxes.values() if box.inputs or box.name in read or box.role != "other")


def _sources(node: Node, nodes: Collection[Node]) -> list[Node]:
    """Its inputs; in the place of what was written into before, the last write."""
    found = []
    for each in node.all_input_nodes:
        root = root_of(each)
        writes = [
            other
            for other in nodes
            if other < node
            and other > each
            and is_mutation(other)
            and any(root_of(w) is root for w in written_by(other))
        ]
        found.append(max(writes) if writes else each)
    return found


def _role(node: Node, part: _Part, from_storage: bool) -> Role:
    if node in part.attention:
        return "attention"
    if _is_empty(node):
        return "other"
    if node in part.storage or _called(node) in ("zeros", "empty", "full"):
        return "storage"
    if _is_ours(node):
        return "write" if _called(node).startswith(("quantize", "settle", "divide")) else "read"
    if (is_mutation(node) and from_storage) or (
        _called(node) == "cat" and (from_storage or any(map(_is_empty, node.all_input_nodes)))
    ):
        return "write"
    return "read" if from_storage and _carries(node) else "other"


def _is_empty(node: Node) -> bool:
    """Whether it is what transformers begins a growing cache with: ``[0]``, without elements."""
    value = _value(node)
    return isinstance(value, torch.Tensor) and value.dim() == 1 and statically_known_true(value.shape[0] == 0)


def _use(node: Node, part: _Part) -> str:
    """The argument that it is of the first operation that takes it."""
    if node in part.uses:
        return part.uses[node]
    for user in sorted(each for each in node.users if each in part.nodes):
        target = user.target
        for name, value in values_of(target, user.args, user.kwargs).items() if is_operator(target) else ():
            if value is node or (isinstance(value, (list, tuple)) and node in value):
                return _USES.get(name, name)
    return ""


def _is_item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _called(node: Node) -> str:
    target = node.target
    if is_operator(target):
        namespace, _, name = target.name().partition("::")
        name = name.partition(".")[0]
        return f"{namespace}.{name}" if namespace not in ("aten", "icw_int8kv") else name
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return str(value).removeprefix("torch.") if value != 2**63 - 1 else "end"


# The picture


def _levels(drawing: Drawing) -> list[list[Box]]:
    """The boxes by rows: each below its inputs, those without just above what reads them; ordered to cross little."""
    level: dict[str, int] = {}
    for box in drawing.boxes:
        level[box.name] = 1 + max((level[name] for name in box.inputs), default=-1)
    readers: dict[str, list[Box]] = {box.name: [] for box in drawing.boxes}
    for box in drawing.boxes:
        for name in box.inputs:
            readers[name].append(box)
    for box in reversed(drawing.boxes):
        if readers[box.name]:
            level[box.name] = min(level[reader.name] for reader in readers[box.name]) - 1
    rows: list[list[Box]] = [[] for _ in range(1 + max(level.values()))]
    for box in drawing.boxes:
        rows[level[box.name]].append(box)
    place = {box.name: float(i) for row in rows for i, box in enumerate(row)}
    for sweep in range(8):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            near = {
                box.name: box.inputs if sweep % 2 == 0 else tuple(reader.name for reader in readers[box.name])
                for box in row
            }
            row.sort(key=lambda box: _mean([place[name] for name in near[box.name]], place[box.name]))
            for i, box in enumerate(row):
                place[box.name] = i - (len(row) - 1) / 2
    return rows


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _svg(drawing: Drawing, title: str) -> str:
    rows = _levels(drawing)
    width = max(max(map(len, rows)) * (_WIDTH + _GAP) + _GAP, 700)
    height = _TOP + len(rows) * _LEVEL
    at = {
        box.name: (
            width / 2 + (i - (len(row) - 1) / 2) * (_WIDTH + _GAP) - _WIDTH / 2,
            _TOP + j * _LEVEL,
        )
        for j, row in enumerate(rows)
        for i, box in enumerate(row)
    }
    said = html.escape(title)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{said}" font-family="monospace" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_GAP}" y="20" font-size="14" font-weight="bold">{said}</text>',
    ]
    for i, (role, (fill, edge)) in enumerate(COLOURS.items()):
        start = _GAP + i * 110
        parts += [
            f'<rect x="{start}" y="31" width="14" height="14" fill="{fill}" stroke="{edge}"/>',
            f'<text x="{start + 20}" y="42">{role}</text>',
        ]
    if any(box.returned for box in drawing.boxes):
        parts.append(f'<text x="{_GAP + len(COLOURS) * 110}" y="42">thick: returned</text>')
    for box in drawing.boxes:
        (x, y), edge = at[box.name], COLOURS[box.role][1]
        for name in box.inputs:
            from_x, from_y = at[name][0] + _WIDTH / 2, at[name][1] + _HEIGHT
            to_x, bend = x + _WIDTH / 2, (y - from_y) / 2
            parts.append(
                f'<path d="M{from_x:g} {from_y:g} C{from_x:g} {from_y + bend:g} {to_x:g} {y - bend:g} {to_x:g} {y:g}" '
                f'fill="none" stroke="{edge}" stroke-opacity="0.7"/>'
            )
    for box in drawing.boxes:
        (x, y), (fill, edge) = at[box.name], COLOURS[box.role]
        first = box.name.removeprefix("past_key_values_") if box.call == "input" else box.call
        if box.use:
            first += f" ({box.use})"
        parts += [
            f'<g><title>{html.escape(str(box))}</title><rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" '
            f'rx="5" fill="{fill}" stroke="{edge}" stroke-width="{3 if box.returned else 1}"/>',
            f'<text x="{x + 8:g}" y="{y + 17:g}" font-weight="bold">{html.escape(_cut(first))}</text>',
            f'<text x="{x + 8:g}" y="{y + 33:g}">{html.escape(_cut(box.value))}</text></g>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def _cut(text: str, most: int = 30) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
