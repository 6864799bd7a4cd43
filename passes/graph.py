"""The graph that passes work on, and what they know about it: its key/value storage, its signature, its sites."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch._dynamo.source import ConstantSource
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, statically_known_true
from torch.utils._pytree import tree_map

from icw_compile.formats.rows import NOTHING, Quantized

__all__ = [
    "SITE",
    "Input",
    "KVGraph",
    "Kernel",
    "Output",
    "Site",
    "Skipped",
    "aliases",
    "arguments",
    "is_mutation",
    "layer_of",
]

Role = Literal["key", "value"]

#: ``meta`` key of a ``dequantize_per_head`` node: the `Site` whose rows it reads.
SITE = "icw_site"

#: What Inductor takes a size of `KVGraph.new_size` to be where it has to choose.
_SIZE_HINT = 256


@dataclass
class Site:
    """One key or value storage of the graph, and what was done to it.

    ``name`` is where the storage lives (``past_key_values.layers[0].keys``) or the layer that created it; ``layer``
    is the module path of the attention that uses it. ``shape`` is ``[batch, kv_heads, tokens, head_dim]``, symbolic
    sizes as text. ``equalized``: outlier channels are shifted. ``float_tokens`` are kept in the model's dtype besides,
    which takes ``float_tokens_bytes`` for each sequence.
    """

    name: str
    role: Role | None = None
    layer: str = ""
    cache: str = ""
    shape: tuple[int | str, ...] = ()
    dtype: str = ""
    writes: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    lowering: str = ""
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
    """A quantized input of the original graph in terms of the rewritten one's placeholders.

    ``parts`` are the names of the placeholders that take its parts. Where the graph appends rows to it, they take the
    grown tensor, ``rows`` longer (a number, or the placeholder that carries it); ``spare`` is then the placeholder for
    the rows that are still free behind it, and ``length`` that for its length before, unless that is a constant.
    ``written`` says that the graph writes into rows that are there already. Where the caller holds a float tensor, to
    be replaced by a quantized one at the call, ``adopted`` is what that one is like.
    """

    parts: tuple[str, ...]
    rows: int | str = 0
    spare: str | None = None
    length: str | None = None
    written: bool = False
    adopted: Quantized | None = None


@dataclass(frozen=True)
class Output:
    """One output of the original graph in terms of the rewritten one's: the ``position`` of an ordinary one.

    A quantized one is ``quantized``, whose parts are positions, or, if it is an input that was appended to, the name of
    that ``input``.
    """

    position: int = -1
    quantized: Quantized | None = None
    input: str | None = None


class Kernel(NamedTuple):
    """An attention kernel: a name for the report, an operator with ``icw_int8kv::attention``'s arguments.

    It knows nothing of exact rows; ``with_lse`` is the same operator but that it returns
    the logarithm of the sum of the exponentials of the scores as well, float32 ``[B, Hq, T]``.

    ``supports(query, key_qdata, value_qdata)`` is ``None`` for tensors that it takes, else the reason why not (empty:
    it is not meant for them).
    """

    name: str
    operator: Any
    with_lse: Any
    supports: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], str | None]


def _no_kernel(device_type: str) -> Kernel | str:
    return ""


class KVGraph:
    """A pre-dispatch ATen graph with key/value storage in it.

    Args:
        module: the graph. Every node that computes a tensor carries a fake one in ``meta["val"]``.
        fake_mode: the mode of those fake tensors; ``None`` when they need none.
        quantized: the placeholders that stand for a quantized tensor, each with the fake tensors of its parts. In
            the graph such a placeholder is an ordinary float tensor until the ``storage`` pass takes it apart.
        sliding_layers: indices of the cache layers that are sliding windows, for the report.
        adoptable: the placeholders of float tensors that their owner would let us replace by quantized ones.

    Attributes:
        equalized: the roles, ``"key"`` and ``"value"``, of which storage that this graph makes int8 shifts outlier
            channels. Storage that is int8 already is as its maker wanted it.
        keep: the rows that such storage keeps in the model's dtype.
        skip_layers: the layers whose cache stays float: indices, ``"first"``, ``"last"``, ``"sliding"``.
        find_kernel: device type -> the attention kernel there, or why there is none (empty: none is wanted). Set it to
            offer kernels to the ``lower`` pass.
        sites: the key/value storages found, in graph order.
        skipped: what looks like one and stays float.
        asked_float: storage that stays float because the caller wants it to.
        input_names: the placeholders of the graph as captured: the signature that the caller sees.
        inputs: placeholder name -> the `Input` that takes its place, of the inputs that are passed in as parts.
        outputs: the original outputs in terms of the present ones.
        storage: the ``dequantize_per_head`` node that stands for a storage -> its parts and its site.
    """

    view = torch.ops.aten.reshape.default

    def __init__(
        self,
        module: GraphModule,
        fake_mode: Any = None,
        quantized: dict[Node, Quantized] | None = None,
        sliding_layers: frozenset[int] = frozenset(),
        adoptable: frozenset[Node] = frozenset(),
    ) -> None:
        self.module = module
        self.fake_mode = fake_mode
        self.quantized = quantized or {}
        self.sliding_layers = sliding_layers
        self.adoptable = adoptable
        self.equalized: frozenset[Role] = frozenset()
        self.keep = NOTHING
        self.skip_layers: frozenset[int | str] = frozenset()
        self.find_kernel: Callable[[str], Kernel | str] = _no_kernel
        self.sites: list[Site] = []
        self.skipped: list[Skipped] = []
        self.asked_float: list[Skipped] = []
        self.input_names = tuple(node.name for node in module.graph.find_nodes(op="placeholder"))
        self.inputs: dict[str, Input] = {}
        self.outputs = [Output(i) for i in range(len(self.output_nodes))]
        self.storage: dict[Node, tuple[Quantized, Site]] = {}
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
        for i, element in enumerate(value):
            name = target._schema.returns[i].name
            item = self._call_function(operator.getitem, (node, i), {}, name)
            item.meta = {**node.meta, "val": element}
            elements.append(item)
        return tuple(elements)

    def _result(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``target`` returns for fake arguments.

        An operation of ours is a dozen of torch's, whose symbolic shapes are slow to work out, and each layer asks for
        the same: those results are made from the layout of the first.
        """
        with self.fake_mode or nullcontext(), torch.no_grad():
            if self.fake_mode is None or getattr(target, "namespace", "") != "icw_int8kv":
                return target(*args, **kwargs)
            key = (target, _layout(args), _layout(tuple(kwargs.items())))
            if key not in self._results:
                self._results[key] = target(*args, **kwargs)
            return tree_map(_another, self._results[key])

    def number(self, size: int | torch.SymInt) -> int | Node | None:
        """``size`` as an argument of a node: itself, or the placeholder that carries it; ``None`` if there is none."""
        if isinstance(size, int):
            return size
        for node in self.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and statically_known_true(value == size):
                return node
        return None

    def same_size(self, size: torch.SymInt) -> torch.SymInt | None:
        """``size`` to be given to a placeholder of its own; ``None`` if it is no plain symbol.

        Dynamo may know a size by several symbols that turned out to be equal, and Inductor looks for the one that all
        of them were replaced by among the inputs.
        """
        symbol = size.node.expr
        if not symbol.is_symbol:
            return None
        return self.fake_mode.shape_env.create_symintnode(symbol, hint=size.node.hint)

    def new_size(self, name: str) -> torch.SymInt | None:
        """A size that the compiled code learns at each call, at least 2; ``None`` where sizes cannot be symbolic.

        It is no size of any tensor that Dynamo guards on.
        """
        shape_env = getattr(self.fake_mode, "shape_env", None)
        if shape_env is None:
            return None
        source = ConstantSource(name)
        symbol = shape_env.create_symbol(_SIZE_HINT, source, dynamic_dim=DimDynamic.DYNAMIC)
        return shape_env.create_symintnode(symbol, hint=_SIZE_HINT, source=source)

    def size(self, operand: Node, dim: int) -> Any:
        """A size of an operand as an argument of a node: a number, or a node that computes it."""
        size = self.tensor(operand).shape[dim]
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, operand, dim)

    def _call_function(self, target: Any, args: Any, kwargs: Any, name: str | None) -> Node:
        return self.graph.create_node("call_function", target, args, kwargs, name)

    def tensor(self, operand: Any) -> torch.Tensor:
        """The fake tensor of a node; with `call`, this makes the graph an `icw_compile.formats.rows.Evaluator`."""
        return operand.meta["val"]

    def same(self, a: Node | None, b: Node | None) -> bool:
        """Whether two nodes are one part of one storage, written into in between or not."""
        return _written(a) is _written(b)

    def is_whole(self, part: Node) -> bool:
        """Whether a node is a storage, and no view of some of it."""
        return part.op == "placeholder" or part.target is torch.ops.aten.zeros.default

    def readable(self) -> str:
        """The graph as Python text, with shapes and dtypes."""
        return self.module.print_readable(print_output=False, include_stride=False)


def _short_name(target: Any) -> str | None:
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else None


def _layout(value: Any) -> Any:
    """Arguments as a key: all that the shape, the strides and the dtype of a result can depend on."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, _layout(value.shape), _layout(value.stride())
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, (float, torch.SymFloat)):
        return float
    return tuple(map(_layout, value)) if isinstance(value, (list, tuple)) else value


def _another(fake: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)


def _written(node: Node | None) -> Node | None:
    """What ``node`` is after a ``copy_`` into all of it."""
    while node is not None and node.target is torch.ops.aten.copy_.default:
        node = node.args[0]
    return node


def is_mutation(node: Node) -> bool:
    """Whether the node writes into one of its operands."""
    return (
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def aliases(storage: Node) -> Iterator[Node]:
    """``storage``, then the nodes that are views of it or write into it, each as its schema says."""
    pending, seen = [storage], {storage}
    while pending:
        current = pending.pop(0)
        yield current
        for user in current.users:
            if user in seen or not isinstance(user.target, torch._ops.OpOverload):
                continue
            first = user.target._schema.arguments[:1]
            if user.args[:1] == (current,) and first and first[0].alias_info is not None:
                seen.add(user)
                pending.append(user)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults filled in."""
    schema = node.target._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    values.update(zip((a.name for a in schema), node.args, strict=False))
    values.update(node.kwargs)
    return values


def layer_of(node: Node) -> str:
    """The path of the module that a node came from, such as ``model.layers.0.self_attn``; empty if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed([entry[0] for entry in stack.values()]), "")
    # Dynamo spells the root as an access into a frame's locals: L['self'].model...
    return path.partition("].")[2] if path.startswith("L[") else path
