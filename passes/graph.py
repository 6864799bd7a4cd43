"""The graph that passes work on, and what they know about it: its key/value storage, its signature, its sites."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from icw_compile.compat.fx import (
    FakeLayout,
    evaluating,
    expression_of,
    is_fake,
    is_operator,
    schema_of,
    statically_known_true,
    storage_of,
)
from icw_compile.formats import Format, Stored, make_format
from icw_compile.kernels.interface import AttentionKernel
from icw_compile.passes.nodes import args_of, first_write, root_of

__all__ = [
    "Endpoint",
    "FusedAttention",
    "Grown",
    "Input",
    "KVGraph",
    "Kept",
    "Latent",
    "Output",
    "Site",
    "Skipped",
    "Storage",
    "layout_of",
]

Role = Literal["key", "value"]


@dataclass
class Site:
    """One key or value storage of the graph, and what was done to it.

    ``name`` is where the storage lives (``past_key_values.layers[0].keys``) or the layer that created it; ``layer``
    is the module path of the attention that uses it. ``shape`` is ``[batch, kv_heads, tokens, head_dim]``, symbolic
    sizes as text. ``equalized``: outlier channels are shifted. ``float_tokens`` are kept in the model's dtype besides,
    which takes ``float_tokens_bytes`` for each sequence. ``lowering`` is how its attention is computed, and
    ``declined`` why not by a kernel.
    """

    name: str
    role: Role | None = None
    layer: str = ""
    cache: str = ""
    shape: tuple[int | str, ...] = ()
    dtype: str = ""
    format: str = ""
    writes: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    lowering: str = ""
    declined: str = ""
    float_bytes_per_token: int = 0
    bytes_per_token: int = 0
    equalized: bool = False
    float_tokens: int = 0
    float_tokens_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Skipped:
    """Something that looks like a key/value cache and was left as it is."""

    layer: str
    what: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Input:
    """A stored input of the original graph in terms of the rewritten one's placeholders.

    Attributes:
        parts: the names of the placeholders that take its parts, as its buffers.
        length: the placeholder that takes its number of tokens, unless that is a constant or known already.
        appended: the rows that the graph appends to it in place (a number, or the placeholder that carries it). The
            placeholders then take buffers with as many rows free behind its own.
        tells: what is appended may decide anew how the rows are stored: it is not stored already.
        written: the graph writes into rows that are there already.
        token_by_token: all that it writes there is single tokens: how they are stored is decided before.
        adopted: the format in which it is to be stored, where the caller holds a float tensor: it is replaced in
            ``owner``, which is how Dynamo names the caller's place for it.
        shows: another stored input, and the token of it from which on this one shows some of it: the graph reads and
            writes it as a view of that one.
        turned: it is a full window, of which the graph writes the newest row over the oldest one. How often all such
            inputs were turned before is `KVGraph.turns`.
    """

    parts: tuple[str, ...]
    length: str | None = None
    appended: int | str = 0
    tells: bool = True
    written: bool = False
    token_by_token: bool = False
    adopted: Format | None = None
    owner: str = ""
    shows: tuple[str, int] | None = None
    turned: bool = False


@dataclass(frozen=True)
class Grown:
    """What becomes of an input with appended rows: all of it, or its last ``rows``.

    ``others`` are the parts that are no rows and that the graph makes anew: name -> position among its outputs.
    """

    input: str
    rows: int | None = None
    others: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """One output of the original graph in terms of the rewritten one's: the ``position`` of an ordinary one.

    A stored one is ``stored``, whose parts are positions, or, where it is an input that grew in place, ``grown``.
    ``grows``: it may grow, once it has room. A view that has to be made anew, of the input or the other output ``of``,
    is made by ``again``, which takes what the graph returned; ``of`` is ``None`` where that would be of neither.
    """

    position: int = -1
    stored: Stored | None = None
    grown: Grown | None = None
    grows: bool = False
    of: str | int | None = None
    again: Callable[[Sequence[Any]], Callable[[Any], Any]] | None = None


@dataclass
class Storage:
    """A value of the graph as it is stored, and the site that it belongs to.

    ``as_it_came``: the graph computes it in floats besides, and what reads it reads those: a prompt attends to its own
    keys and values as they came.
    """

    stored: Stored
    site: Site
    grows: bool = False
    as_it_came: bool = False


@dataclass
class FusedAttention:
    """One ``icw_int8kv::attention``, and what its keys and values are stored as."""

    node: Node
    key: Storage
    value: Storage


@dataclass(frozen=True)
class Latent:
    """What latent attention (MLA) caches of each token: one vector for the keys and values of all heads, and one for
    where it stands.

    Attributes:
        states: ``[B, 1, S, R]``, which the model caches as keys.
        positions: ``[B, 1, S, P]``, the rotary channels of all heads' keys, which it caches as values.
        readers: what reads them besides attention.
        is_absorbed: whether attention reads the states themselves, and not keys and values that are made of them.
    """

    states: Node
    positions: Node
    readers: tuple[Node, ...]
    is_absorbed: bool


@dataclass(frozen=True)
class Kept:
    """What is known of a node that stands in the graph as Dynamo spelled it (``meta["kept"]``): no operator of ATen.

    ``written`` and ``viewed`` count the nodes among its arguments: into which it may write, and which what it returns
    may be a view of.
    """

    written: frozenset[int]
    viewed: frozenset[int]


@dataclass(frozen=True)
class Endpoint:
    """Where the caller keeps a cache tensor: what Dynamo knows of an input, or of an attribute that an output becomes.

    Attributes:
        name: ``past_key_values.layers[3].keys``, or the same with ``new`` in front for a cache made in the graph.
        layer: index of the cache layer.
        role: ``"key"`` or ``"value"``.
        source: how Dynamo names the place, as an expression of the caller's variables; empty for what the graph makes.
        is_sliding: whether the layer is a sliding window.
        is_last: whether it is the last layer of its cache.
    """

    name: str
    layer: int
    role: Role
    source: str = ""
    is_sliding: bool = False
    is_last: bool = False


def _no_kernel(device_type: str) -> AttentionKernel | str:
    return ""


class KVGraph:
    """A pre-dispatch ATen graph with key/value storage in it.

    Args:
        module: the graph. Every node that computes a tensor carries a fake one in ``meta["val"]``.
        fake_mode: the mode of those fake tensors; ``None`` when they need none.
        stored: the placeholders that stand for a stored tensor, each with the fake tensors of its buffers. In
            the graph such a placeholder is an ordinary float tensor until the ``storage`` pass takes it apart.
        growing: those of them that have spare rows behind their own.
        endpoints: where the caller keeps what placeholders take.
        returned_to: the same of outputs, by position.
        adoptable: the placeholders of float tensors that their owner would let us replace by stored ones.

    Attributes:
        format_for: ``(dtype, role, device, in_eight_bits=...)`` -> the format of storage that this graph makes. Storage
            that there is already stays as its maker wanted it.
        skip_layers: the layers whose cache stays float: indices, ``"first"``, ``"last"``, ``"sliding"``.
        eight_bit_layers: those that are stored in 8 bits in any case, named alike.
        idioms: rules of the caller's for ``canonicalize``: ``(graph, node)`` -> what stands for the node, or ``None``.
        why_it_ends: why the graph ends before the frame does, in words; empty if it does not.
        find_kernel: device type -> the attention kernel there, or why there is none (empty: none is wanted). Set it to
            offer kernels to the ``lower`` pass.
        sites: the key/value storages found, in graph order.
        skipped: what looks like one and stays float.
        asked_float: storage that stays float because the caller wants it to.
        input_names: the placeholders of the graph as captured: the signature that the caller sees.
        shown: the name of a stored placeholder -> that of the one that it is a view of here, and from which token on.
        inputs: placeholder name -> the `Input` that takes its place, of the inputs that are passed in as parts.
        turns: the name of the placeholder that takes how often windows are turned, int64 ``[1]``; empty without any.
        outputs: the original outputs in terms of the present ones.
        storage: found by the ``storage`` pass for ``propagate``: the node that stands for a storage -> what it is.
        grown: found by the same: position of an output -> the input that it is, grown in place.
        decoded: made by ``propagate`` for ``reads``: the node that decodes a stored value -> what it decodes.
        came: made by the same: a node that computes a stored value as it came -> what it is as it is stored.
        attentions: made by ``reads`` for ``lower``.
        latents: found by ``latent``: an attention -> the `Latent` that it reads, or that its keys and values are of.
    """

    view = torch.ops.aten.reshape.default
    takes_effect = True
    is_eager = False

    def __init__(
        self,
        module: GraphModule,
        fake_mode: Any = None,
        stored: dict[Node, Stored] | None = None,
        growing: frozenset[Node] = frozenset(),
        endpoints: Mapping[Node, Endpoint] | None = None,
        returned_to: Mapping[int, Endpoint] | None = None,
        adoptable: frozenset[Node] = frozenset(),
    ) -> None:
        self.module = module
        self.fake_mode = fake_mode
        self.stored = stored or {}
        self.growing = growing
        self.endpoints = endpoints or {}
        self.returned_to = returned_to or {}
        self.adoptable = adoptable
        self.format_for: Callable[..., Format] = lambda dtype, role, device, *, in_eight_bits=False: make_format(dtype)
        self.skip_layers: frozenset[int | str] = frozenset()
        self.eight_bit_layers: frozenset[int | str] = frozenset()
        self.idioms: tuple[Callable[[KVGraph, Node], Node | None], ...] = ()
        self.why_it_ends = ""
        self.find_kernel: Callable[[str], AttentionKernel | str] = _no_kernel
        self.sites: list[Site] = []
        self.skipped: list[Skipped] = []
        self.asked_float: list[Skipped] = []
        self.input_names = tuple(node.name for node in module.graph.find_nodes(op="placeholder"))
        self.shown: dict[str, tuple[str, int]] = {}
        self.inputs: dict[str, Input] = {}
        self.turns = ""
        self.outputs = [Output(i) for i in range(len(self.output_nodes))]
        self.storage: dict[Node, Storage] = {}
        self.grown: dict[int, Grown] = {}
        self.decoded: dict[Node, Storage] = {}
        self.came: dict[Node, Storage] = {}
        self.attentions: list[FusedAttention] = []
        self.latents: dict[Node, Latent] = {}
        self._results: dict[Any, Any] = {}

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph

    @property
    def output_nodes(self) -> tuple[Any, ...]:
        """What the graph returns, one entry for each output."""
        returned = self.graph.output_node().args[0]
        return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Insert nodes before ``node``; they inherit its layer and its stack trace."""
        self._origin = node
        with self.graph.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: Node) -> Iterator[None]:
        """Insert nodes behind ``node``, in the order in which they are added; they inherit the same."""
        self._origin = node
        with self.graph.inserting_before(node.next):
            yield

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Add a node that calls ``target``, with its fake result; a tuple result gives a node for each element.

        Args may be nodes or constants, lists of them included. Call it inside `before`.
        """
        node = self._call_function(target, args, kwargs, _short_name(target))
        for name in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if name in self._origin.meta:
                node.meta[name] = self._origin.meta[name]
        value = node.meta["val"] = self._result(target, *torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"]))
        if not isinstance(value, (tuple, list)):
            return node
        elements = []
        names = schema_of(target).returns
        for i, element in enumerate(value):
            item_name = names[i] if len(names) == len(value) else None
            item = self._call_function(operator.getitem, (node, i), {}, item_name)
            item.meta = {**node.meta, "val": element}
            elements.append(item)
        return tuple(elements)

    def _result(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``target`` returns for fake arguments.

        An operation of ours is a dozen of torch's, symbolic sizes are slow to work out, and each layer asks for the
        same: those results are made from the layout of the first.
        """
        if self.fake_mode is None or not _follows_from_layout(target):
            return self._run(target, args, kwargs)
        tensors: list[torch.Tensor] = []
        layouts = _layouts(args, tensors), _layouts(tuple(kwargs.items()), tensors)
        memories = [storage_of(each) for each in tensors]
        key = (target, layouts, tuple(map(memories.index, memories)))
        if key not in self._results:

            def result(value: Any) -> Any:
                if not is_fake(value):
                    return value
                memory = storage_of(value)
                return _Result(FakeLayout(value), memories.index(memory) if memory in memories else None)

            self._results[key] = _each(self._run(target, args, kwargs), result)

        def another(made: Any) -> Any:
            if not isinstance(made, _Result):
                return made
            return made.layout.another(None if made.memory is None else tensors[made.memory])

        return _each(self._results[key], another)

    def _run(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with evaluating(self.fake_mode):
            return target(*args, **kwargs)

    def number(self, size: int | torch.SymInt) -> int | Node | None:
        """``size`` as an argument of a node: itself, or the placeholder that carries it; ``None`` if there is none."""
        if isinstance(size, int):
            return size
        for node in self.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and statically_known_true(value == size):
                return node
        return None

    def size(self, operand: Node, dim: int) -> Any:
        """A size of an operand as an argument of a node: a number, or a node that computes it."""
        size = self.tensor(operand).shape[dim]
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, operand, dim)

    def _call_function(self, target: Any, args: Any, kwargs: Any, name: str | None) -> Node:
        return self.graph.create_node("call_function", target, args, kwargs, name)

    def tensor(self, operand: Any) -> torch.Tensor:
        """The fake tensor of a node; with `call`, this makes the graph an `icw_compile.formats.Evaluator`."""
        return operand.meta["val"]

    def is_new(self, operand: Node) -> bool:
        """Whether it is zeros that the graph makes and does not write before it goes on from here."""
        made = operand.target is torch.ops.aten.zeros.default
        return made and first_write({operand}, operand.next, self._origin) is None

    def same(self, a: Node, b: Node) -> bool:
        """Whether two nodes are one part of one storage, written into in between or not, or copies of it as it is."""
        return _written(self._uncopied(a)) is _written(self._uncopied(b))

    def _uncopied(self, node: Node) -> Node:
        """What ``node`` is a copy of, if nothing was written into either since."""
        while node.target is torch.ops.aten.clone.default:
            source = args_of(node)[0]
            if first_write({root_of(source), node}, node.next, self._origin) is not None:
                break
            node = source
        return node

    def decode(self, value: Storage, dtype: torch.dtype | None = None) -> Node:
        """Add the nodes that compute what is stored; the last of them is found in ``decoded``."""
        stored = value.stored
        node: Node = stored.format.decode(self, stored, dtype or stored.dtype)
        self.decoded[node] = value
        return node

    def readable(self) -> str:
        """The graph as Python text, with shapes and dtypes."""
        return self.module.print_readable(print_output=False, include_stride=False)


@dataclass(frozen=True)
class _Result:
    """The layout of a result, and which of the tensors among the arguments it shares memory with."""

    layout: FakeLayout
    memory: int | None


def _follows_from_layout(target: Any) -> bool:
    """Whether the layout of all that it is given says what a call returns, and in whose memory."""
    return is_operator(target) and not set(_TAGS) & set(target.tags)


#: Operators with one of these return what is not known from layouts, or give what they take another one.
_TAGS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)


def _short_name(target: Any) -> str | None:
    return schema_of(target).name if is_operator(target) else None


def layout_of(value: Any) -> Any:
    """Arguments as a key: all that the shape, the strides and the dtype of a result can depend on."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, _sizes(value.shape), _sizes(value.stride())
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return expression_of(value)
    if isinstance(value, (bool, float)):
        return type(value), repr(value)  # True and 1.0 are not 1, and 0.0 is not -0.0
    return tuple(map(layout_of, value)) if isinstance(value, (list, tuple)) else value


def _sizes(sizes: Iterable[int | torch.SymInt]) -> tuple[Any, ...]:
    return tuple(size if type(size) is int else layout_of(size) for size in sizes)


def _layouts(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The same with the offsets of the tensors in it, which are added to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return layout_of(value), layout_of(value.storage_offset())
    return tuple(_layouts(each, tensors) for each in value) if isinstance(value, (list, tuple)) else layout_of(value)


def _each(values: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of each result of a call, or of the one."""
    return type(values)(map(function, values)) if isinstance(values, (list, tuple)) else function(values)


def _written(node: Node | None) -> Node | None:
    """What ``node`` is after a ``copy_`` into all of it."""
    while node is not None and node.target is torch.ops.aten.copy_.default:
        node = args_of(node)[0]
    return node
