"""Tracing with fakes and proxies, graphs of ATen operators, and what an operator's schema says of its arguments.

Read and run in torch 2.11, 2.13 and 2.14, unless a function says otherwise.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node, Proxy
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.nn import Module
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "Argument",
    "FakeLayout",
    "Schema",
    "become_equal",
    "bound_symbols",
    "by_its_name",
    "carry_item",
    "current_node",
    "current_tracer",
    "eliminate_dead_code",
    "empty_fake",
    "evaluating",
    "expression_of",
    "free_symbols",
    "inner_tensors",
    "invoke_subgraph",
    "is_fake",
    "is_higher_order",
    "is_larger_here",
    "is_operator",
    "is_traced",
    "is_wrapper_subclass",
    "last_node",
    "node_of",
    "noted_for",
    "outside_of_trace",
    "proxy_of",
    "proxy_of_graph",
    "rename",
    "schema_of",
    "statically_known_true",
    "storage_of",
    "trace_pre_dispatch",
    "track",
    "tree_leaves",
    "tree_map",
    "true_here",
    "values_of",
    "version_of",
    "viewed_values",
    "with_inner_tensors",
    "without_torch_function",
    "written_values",
]

# Tracing


def trace_pre_dispatch(function: Callable[..., Any], inputs: Sequence[Any]) -> GraphModule:
    """The graph of ATen operators that ``function(*inputs)`` calls, before autograd or decompositions see them.

    Writes stay in place, views stay views, ``reshape`` and ``scaled_dot_product_attention`` stay one node.
    Every node has its fake result in ``meta["val"]``. ``torch.fx.experimental.proxy_tensor.make_fx``.
    """
    return proxy_tensor.make_fx(function, pre_dispatch=True)(*inputs)


def current_node(interpreter: Interpreter, node: Node) -> AbstractContextManager[None]:
    """While this is entered, what is traced has the layer and the stack trace of ``node``.

    For an interpreter that runs a node in a way of its own; `Interpreter.run_node` does it for itself, and both only
    within ``torch.fx.traceback.preserve_node_meta()``. ``Interpreter._set_current_node``.
    """
    return interpreter._set_current_node(node)


def current_tracer() -> Any:
    """The tracer of the `trace_pre_dispatch` that is running. ``proxy_tensor.get_proxy_mode().tracer``.

    Raises:
        RuntimeError: nothing is being traced.
    """
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        raise RuntimeError("nothing is being traced")
    return mode.tracer


def is_traced() -> bool:
    """Whether what runs is noted down as a graph. ``proxy_tensor.get_proxy_mode()``."""
    return proxy_tensor.get_proxy_mode() is not None


@contextmanager
def outside_of_trace() -> Iterator[None]:
    """While this is entered, what runs leaves nothing in the trace.

    ``proxy_tensor.disable_proxy_modes_tracing``, and ``_temp_remove_pre_dispatch_torch_function_mode`` for what leaves
    a node without a tensor, as ``torch.set_grad_enabled`` does.
    """
    with proxy_tensor.disable_proxy_modes_tracing(), proxy_tensor._temp_remove_pre_dispatch_torch_function_mode():
        yield


def without_torch_function() -> AbstractContextManager[None]:
    """While this is entered, no ``__torch_function__`` sees what is asked of a tensor, that of a trace included.

    ``torch._C.DisableTorchFunction``.
    """
    return torch._C.DisableTorchFunction()


def proxy_of(value: Tensor | torch.SymInt | torch.SymFloat | torch.SymBool, tracer: Any) -> Any:
    """The proxy of a tensor or a symbolic number that ``tracer`` has traced; of a number that is known, the number.

    ``proxy_tensor.get_proxy_slot``, ``fetch_sym_proxy``.

    Raises:
        RuntimeError: it does not know the tensor or number.
    """
    if isinstance(value, Tensor):
        return proxy_tensor.get_proxy_slot(value, tracer).proxy
    return proxy_tensor.fetch_sym_proxy(tracer)(value)


def node_of(value: Tensor, tracer: Any) -> Node | None:
    """The node that ``tracer`` knows a tensor as; ``None`` if it knows its numbers as well, or does not know it.

    ``proxy_tensor.get_proxy_slot``.
    """
    known = proxy_tensor.get_proxy_slot(value, tracer, None)
    return None if known is None or known.constant is not None else known.proxy.node


def proxy_of_graph(graph: Module, name: str, tracer: Any) -> Proxy:
    """The proxy of a graph that an operator takes: the traced module gets it as its attribute ``name``.

    ``Tracer.root``.
    """
    tracer.root.add_module(name, graph)
    return tracer.create_proxy("get_attr", name, (), {})


def track(value: Any, proxy: Proxy, tracer: Any) -> None:
    """Let the trace go on from ``value``, tensors or a tuple of them, as what ``proxy`` gives.

    ``proxy_tensor.track_tensor_tree``.
    """
    with without_torch_function():  # it asks a tensor for much, and each time would be seen
        proxy_tensor.track_tensor_tree(value, proxy, constant=None, tracer=tracer)


def is_fake(value: Any) -> TypeGuard[FakeTensor]:
    """Whether it is a tensor without data. ``torch._subclasses.FakeTensor``."""
    return isinstance(value, FakeTensor)


class FakeLayout:
    """The layout of a fake, to make many others of; no trace, mode or Python kernel sees them made.

    In a tenth of the time that an operation on fakes takes, and a fifth of that of working out anew how much memory
    symbolic sizes need. ``torch._subclasses.FakeTensor``.

    Args:
        fake: whose layout it is.
        mode: the fake mode of those that are made; that of ``fake`` if left out.

    Attributes:
        is_static: no size or stride is symbolic.
    """

    def __init__(self, fake: FakeTensor, mode: FakeTensorMode | None = None) -> None:
        self._mode, self._device, self._dtype = mode or fake.fake_mode, fake.fake_device, fake.dtype
        self._size, self._stride, self._offset = fake.size(), fake.stride(), fake.storage_offset()
        self.is_static = all(isinstance(each, int) for each in (*self._size, *self._stride))
        self._elements: int | torch.SymInt | None = None

    def another(self, memory: Tensor | None = None) -> FakeTensor:
        """A fake of this layout, with memory of its own or in that of another."""
        with Unseen():
            if memory is not None:
                made = _meta((0,), self._dtype).set_(memory.untyped_storage(), 0, (0,), (1,))
                made = made.as_strided(self._size, self._stride, self._offset)
            elif self.is_static:
                made = torch.empty_strided(self._size, self._stride, dtype=self._dtype, device="meta")
            else:
                if self._elements is None:
                    steps = zip(self._size, self._stride, strict=True)
                    self._elements = 1 + sum((size - 1) * stride for size, stride in steps)
                made = _meta((self._elements,), self._dtype).as_strided(self._size, self._stride)
            return FakeTensor(self._mode, made, self._device)


def _meta(size: Sequence[int | torch.SymInt], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def empty_fake(
    like: FakeTensor,
    size: Sequence[int | torch.SymInt],
    stride: Sequence[int | torch.SymInt] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> FakeTensor:
    """A fake of another size on the device of ``like``, contiguous without ``stride``, made as `FakeLayout` does."""
    dtype = dtype or like.dtype
    with Unseen():
        made = _meta(size, dtype) if stride is None else torch.empty_strided(size, stride, dtype=dtype, device="meta")
        return FakeTensor(like.fake_mode, made, like.fake_device)


def noted_for(fake: Any) -> dict[Any, Any]:
    """What is noted down for as long as the mode of this fake lives, and the symbols of its fakes with it.

    An attribute of ``FakeTensor.fake_mode``.
    """
    notes: dict[Any, Any] = fake.fake_mode.__dict__.setdefault("_icw_compile_notes", {})
    return notes


@contextmanager
def evaluating(mode: FakeTensorMode | None) -> Iterator[None]:
    """While this is entered, operations give fakes of ``mode``, as where they are traced, and record no gradient.

    With the dispatcher in Python, as in traces: some operators in C++ take no symbols, such as the padding of masks for
    attention on CUDA. ``torch._dispatch.python.enable_python_dispatcher``.
    """
    with mode or nullcontext(), torch.no_grad(), enable_python_dispatcher():
        yield


class Unseen:
    """While this is entered, what is done to plain tensors is done: no trace, mode or Python kernel is asked.

    ``torch._C.DisableTorchFunction``, ``_DisableTorchDispatch``, ``_DisablePythonDispatcher``,
    ``_ExcludeDispatchKeyGuard``.
    """

    # A class, and no generator: it is entered for each node of a graph.
    def __enter__(self) -> None:
        pre_dispatch = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch)
        self._guards = (
            torch._C.DisableTorchFunction(),
            torch._C._DisableTorchDispatch(),
            torch._C._DisablePythonDispatcher(),
            torch._C._ExcludeDispatchKeyGuard(pre_dispatch),
        )
        for each in self._guards:
            each.__enter__()

    def __exit__(self, *raised: Any) -> None:
        for each in reversed(self._guards):
            each.__exit__(*raised)


def is_wrapper_subclass(value: Any) -> bool:
    """Whether it is a tensor made of other tensors, as quantized weights, a DTensor and ours are.

    ``torch.utils._python_dispatch.is_traceable_wrapper_subclass``.
    """
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


def inner_tensors(subclass: Any) -> dict[str, Any]:
    """What a wrapper subclass is made of, by name. ``__tensor_flatten__``."""
    return {name: getattr(subclass, name) for name in subclass.__tensor_flatten__()[0]}


def with_inner_tensors(subclass: Any, inner: dict[str, Any]) -> Tensor:
    """A tensor like this one that is made of ``inner``. ``__tensor_unflatten__``."""
    context = subclass.__tensor_flatten__()[1]
    return type(subclass).__tensor_unflatten__(inner, context, subclass.size(), subclass.stride())


def storage_of(tensor: Tensor) -> int:
    """A number that tensors have in common which share memory, while one of them lives: of fakes as well.

    ``UntypedStorage._cdata``.
    """
    return tensor.untyped_storage()._cdata


def version_of(tensor: Tensor) -> int:
    """How often something was written into the memory of a tensor, of a fake as well. ``Tensor._version``."""
    return tensor._version


def carry_item(old: Tensor, new: Tensor) -> None:
    """Let ``new.item()`` be the number that ``old.item()`` is, for two fakes of one scalar.

    So it is with a Python number that Dynamo passes as a tensor: the symbol is known before the call.
    ``FakeTensor.item_memo``.
    """
    if (number := getattr(old, "item_memo", None)) is not None:
        new.item_memo = number  # type: ignore[attr-defined]


# Graphs


def rename(node: Node, name: str) -> None:
    """Call a node ``name``, or that with a number behind it if it is taken; of a placeholder the argument as well.

    ``Node._rename``.
    """
    node._rename(name)
    if node.op == "placeholder":
        node.target = node.name


def last_node(graph: Graph) -> Node:
    """Behind which the next one comes; of a graph without any the root, whose ``op`` is ``"root"``. ``Graph._root``."""
    return graph._root.prev


def eliminate_dead_code(graph: Graph, *, keep_random: bool, keep: Callable[[Node], bool] = lambda node: False) -> bool:
    """Erase what nothing reads and what has no effect; returns whether there was any.

    Drawing random numbers is an effect, on what is drawn next, if ``keep_random``: attention counts as random, for its
    dropout. What ``keep`` says stays. ``Node.is_impure(impure_random=)``,
    ``Graph.eliminate_dead_code(is_impure_node=)``.
    """
    # What is read stays in any case, and `is_impure` takes its time: most nodes need not be asked.
    return graph.eliminate_dead_code(
        lambda node: bool(node.users) or keep(node) or node.is_impure(impure_random=keep_random)
    )


def is_operator(target: Any) -> TypeGuard[OpOverload]:
    """Whether a node's target is an operator with a schema. ``torch._ops.OpOverload``."""
    return isinstance(target, OpOverload)


def is_higher_order(target: Any) -> bool:
    """Whether a node's target is an operator that takes graphs. ``torch._ops.HigherOrderOperator``."""
    return isinstance(target, HigherOrderOperator)


def invoke_subgraph() -> Any:
    """The operator that calls a graph which is compiled once, whoever else calls it.

    ``(module, name, *operands)``, with a name for each such graph. ``torch.ops.higher_order.invoke_subgraph``, to which
    ``torch.compiler.nested_compile_region`` leads.
    """
    return torch.ops.higher_order.invoke_subgraph


# Sizes


def statically_known_true(condition: Any) -> bool:
    """Whether a condition on symbolic sizes holds for all that they may be; never adds a guard.

    ``torch.fx.experimental.symbolic_shapes.statically_known_true``.
    """
    return symbolic_shapes.statically_known_true(condition)


def true_here(condition: Any) -> bool:
    """Whether a condition on symbolic sizes holds, with a guard that it does or does not.

    Taken as true where it depends on data. ``torch.fx.experimental.symbolic_shapes.guard_or_true``.
    """
    return symbolic_shapes.guard_or_true(condition)


def become_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal in the call that is being compiled, with a guard that they are, if they are.

    From then on a symbol of one is that of the other. ``SymNode.hint``, ``SymInt.__eq__``.
    """
    hints = [each.node.hint if isinstance(each, torch.SymInt) else each for each in (a, b)]
    return None not in hints and hints[0] == hints[1] and bool(a == b)


def is_larger_here(size: int | torch.SymInt, bound: int) -> bool:
    """Whether a size is more than ``bound`` in the call that is being compiled, with a guard that it is, if it is.

    If it is not, nothing is guarded. ``SymNode.hint``, ``SymInt.__gt__``.
    """
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return hint is not None and hint > bound and bool(size > bound)


def expression_of(size: torch.SymInt | torch.SymFloat) -> Any:
    """What a symbolic number is, as a value that can be compared and hashed. ``SymInt.node.expr``."""
    return size.node.expr


def by_its_name(size: torch.SymInt) -> torch.SymInt:
    """A number that was found to be equal to another, under the symbol that both are known by now.

    Compilers name what is passed in by the symbol that it came with, and all else by the other. If that one came with
    nothing that is passed in, its name has no value. ``SymNode._expr``, ``ShapeEnv.create_symintnode``.
    """
    known, shape_env = size.node.expr, size.node.shape_env
    if known == size.node._expr or not known.is_Symbol or shape_env is None:
        return size
    named = shape_env.create_symintnode(known, hint=size.node.hint)
    assert isinstance(named, torch.SymInt)
    return named


def bound_symbols(values: Iterable[Any]) -> set[Any]:
    """The symbols that are known where these are passed in: numbers, and sizes and strides of tensors."""
    found = set()
    for value in values:
        if isinstance(value, torch.SymInt):
            found.add(expression_of(value))
        elif isinstance(value, Tensor):
            sizes = (*value.shape, *value.stride())
            found.update(expression_of(size) for size in sizes if isinstance(size, torch.SymInt))
    return {each for each in found if each.is_Symbol}


def free_symbols(value: Any) -> set[Any]:
    """The symbols in what tensors, numbers and lists of them are. ``torch.fx.experimental.symbolic_shapes``."""
    return set(symbolic_shapes.free_symbols(value))


# Nested values


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """``function`` of each leaf of nested lists, tuples and dictionaries. ``torch.utils._pytree.tree_map``."""
    return _pytree.tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dictionaries. ``torch.utils._pytree.tree_leaves``."""
    return [tree] if isinstance(tree, Tensor) else _pytree.tree_leaves(tree)


# Schemas


@dataclass(frozen=True)
class Argument:
    """One argument of an operator.

    Attributes:
        is_written: the operator writes into the tensor given here, or into each of the tensors of a list.
        is_viewed: a result may be this tensor or a view of it.
        has_default, default: what it is if it is left out.
    """

    name: str
    is_written: bool
    is_viewed: bool
    has_default: bool
    default: Any


@dataclass(frozen=True)
class Schema:
    """What an operator takes and returns.

    Attributes:
        name: without overload and namespace, such as ``index_copy_``.
        arguments: in order.
        returns: the names of the results, empty where they have none.
        is_mutable: it writes into an argument.
        gives_views: a result may be an argument, or a view of one.
    """

    name: str
    arguments: tuple[Argument, ...]
    returns: tuple[str, ...]
    is_mutable: bool
    gives_views: bool


@functools.cache
def schema_of(operator: OpOverload) -> Schema:
    """``OpOverload._schema``, ``Argument.alias_info``.

    ``Tensor(a!)`` is written; ``Tensor(a)`` is viewed by the result ``Tensor(a)``. Of a list of views, as ``split``
    returns, and of ``Tensor(a!)[]``, the letter is lost: it may be of any argument, and each element is written.
    """
    schema = operator._schema
    returned = [_letters(each.alias_info) for each in schema.returns if each.alias_info is not None]
    arguments = []
    for argument in schema.arguments:
        alias = argument.alias_info
        arguments.append(
            Argument(
                argument.name,
                is_written=alias is not None and alias.is_write,
                is_viewed=alias is not None and any(not each or each & _letters(alias) for each in returned),
                has_default=argument.has_default_value(),
                default=argument.default_value if argument.has_default_value() else None,
            )
        )
    name = schema.name.split("::")[1]
    returns = tuple(result.name for result in schema.returns)
    return Schema(name, tuple(arguments), returns, schema.is_mutable, bool(returned))


def _letters(alias: Any) -> set[str]:
    return set(alias.before_set) | set(alias.after_set)


def values_of(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those that are left out with their defaults."""
    schema = schema_of(operator)
    values = {argument.name: argument.default for argument in schema.arguments if argument.has_default}
    values.update(zip((argument.name for argument in schema.arguments), args, strict=False))
    values.update(kwargs)
    return values


def written_values(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call writes into, the elements of lists one by one: ``out=`` and ``_foreach_*_`` included."""
    return _chosen(operator, args, kwargs, lambda argument: argument.is_written)


def viewed_values(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What the results of a call may be, or be views of."""
    return _chosen(operator, args, kwargs, lambda argument: argument.is_viewed)


def _chosen(
    operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], chooses: Callable[[Argument], bool]
) -> list[Any]:
    found: list[Any] = []
    for i, argument in enumerate(schema_of(operator).arguments):
        if chooses(argument):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return found
