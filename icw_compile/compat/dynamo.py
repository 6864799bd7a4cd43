"""What Dynamo knows while it calls a backend: where each input comes from, and where each output goes.

Read and run in torch 2.11, 2.13 and 2.14, unless a function says otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.source import AttrSource, ConstantSource, GetItemSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.lists import ListVariable
from torch._dynamo.variables.tensor import TensorVariable
from torch._guards import Source, TracingContext
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "DATA",
    "Owner",
    "Stored",
    "attribute_of",
    "caller_value",
    "clear_counters",
    "example_value",
    "fake_mode",
    "fix_address",
    "graph_breaks",
    "guard_once",
    "guarded_sources",
    "hand_over_module",
    "hand_over_placeholder",
    "keep_fakes_as_dynamo",
    "let_vary",
    "recompile_limit",
    "source_name",
    "stored_attributes",
]


#: What Dynamo puts into its graph for ``x.data``. ``torch._C._autograd._get_data_attr``, in
#: ``torch._dynamo.variables.tensor.TensorVariable.method_attr_data``.
DATA: Any = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]


def fake_mode() -> FakeTensorMode | None:
    """The mode of the fake tensors that this compilation goes on with; ``None`` outside of a backend.

    It is not that of the nodes' `example_value`, which Dynamo is done with. ``torch._guards.TracingContext.fake_mode``.
    """
    context = TracingContext.try_get()
    return None if context is None else context.fake_mode


def guarded_sources() -> tuple[str, ...]:
    """The names of all that Dynamo guards on so far, such as ``L['cache'].layers[0].keys``, each once, in no order.

    Empty outside of a backend. ``TracingContext.guards_context.dynamo_guards`` and ``Guard.originating_source.name``.
    """
    context = TracingContext.try_get()
    guards = () if context is None else context.guards_context.dynamo_guards
    return tuple({guard.originating_source.name for guard in guards})


def let_vary(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo take this size as one that varies in the first graph that it makes of the tensor.

    ``torch._dynamo.maybe_mark_dynamic``, which would do the same to the tensors that this one is made of, and which
    takes longer. Dynamo guards on it: a graph made of a tensor without it is none for a tensor with it.
    ``Tensor._dynamo_weak_dynamic_indices``.
    """
    tensor.__dict__["_dynamo_weak_dynamic_indices"] = {dim}
    tensor.__dict__["_has_dynamo_dim_marking"] = True


def guard_once() -> int:
    """Let Dynamo state once what it knows of the sizes of the graph's inputs; returns how many inputs it had twice.

    It lists a tensor that is made of others, and each of those besides, up to two times, and makes guards of each
    entry: Python code, which is compiled, and run before each call. What a list entry says that another says as well,
    of the same fake at the same source, is dropped. ``ShapeEnv.tracked_fakes``, each with a ``fake`` and a ``source``;
    ``ShapeEnv.produce_guards_verbose`` reads them once the backend is through.
    """
    mode = fake_mode()
    tracked: Any = None if mode is None or mode.shape_env is None else mode.shape_env.tracked_fakes
    if not tracked:
        return 0
    stated = {
        (AttrSource(each.source, name), id(getattr(each.fake, name)))
        for each in tracked
        if is_traceable_wrapper_subclass(each.fake)
        for name in each.fake.__tensor_flatten__()[0]
    }
    kept = []
    for each in tracked:
        statement = each.source, id(each.fake)
        # What a tensor is made of may itself be made of others: its entry alone speaks of those.
        if statement not in stated or is_traceable_wrapper_subclass(each.fake):
            kept.append(each)
            stated.add(statement)
    repeated = len(tracked) - len(kept)
    tracked[:] = kept
    return repeated


def example_value(node: Node, default: Any = None) -> Any:
    """What Dynamo worked out that the node returns: a fake tensor, a number, a tuple of them.

    Its fake mode is not `fake_mode`. ``node.meta["example_value"]``.
    """
    return node.meta.get("example_value", default)


def source_name(placeholder: Node) -> str:
    """The name of where the caller keeps this input, such as ``L['cache'].layers[0].keys``; empty if unknown.

    ``placeholder._dynamo_source.name``.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    return "" if source is None else source.name


def caller_value(placeholder: Node) -> Any:
    """What the caller passes here in the call that is being compiled; ``None`` if Dynamo does not say.

    A real tensor: do not keep it. ``placeholder.meta["grapharg"].example``.
    """
    argument = placeholder.meta.get("grapharg")
    return None if argument is None else argument.example


@dataclass(frozen=True)
class Owner:
    """An object that a frame reads or writes attributes of.

    Attributes:
        source: the name of where the caller keeps it, such as ``L['cache'].layers[0]``; empty if the frame made it.
        cls: its class; ``None`` where Dynamo does not say.
        value: the caller's own object, not to be kept; ``None`` if the frame made it, or Dynamo does not say.
        held_by: the list that it is an element of: the name of its source, ``L['cache'].layers``; of a list that the
            frame made for an attribute of an object that it made, ``new DynamicCache.layers`` (a second one's with
            ``#2``); empty if it is in no list that is known.
        index: its place in that list.
        siblings: how many elements that list has, this one included; ``None`` if Dynamo does not say.
    """

    source: str
    cls: type | None
    value: object = field(default=None, compare=False, repr=False)
    held_by: str = ""
    index: int | None = None
    siblings: int | None = None


@dataclass(frozen=True)
class Stored:
    """After the graph has run, the frame stores the result of ``node`` to an attribute of ``owner``."""

    owner: Owner
    attribute: str
    node: Node


def stored_attributes(owner_class: type) -> list[Stored]:
    """Which tensors of the graph being compiled go to attributes of objects of ``owner_class``.

    For the objects that were passed in, and for those that the frame makes, in no particular order. Empty outside of a
    backend. ``InstructionTranslator.current_tx().output.side_effects``.
    """
    effects = _side_effects()
    if effects is None:
        return []
    return [
        Stored(_owner(effects, variable), name, value.unwrap().as_proxy().node)
        for variable, attributes in effects.store_attr_mutations.items()
        if issubclass(_class_of(variable) or type(None), owner_class)
        for name, value in attributes.items()
        if isinstance(value.unwrap(), TensorVariable)
    ]


def attribute_of(placeholder: Node) -> tuple[Owner, str] | None:
    """The object that this input is an attribute of, and the attribute's name; ``None`` if it is none.

    ``placeholder._dynamo_source``, an ``AttrSource``; the object by its source among Dynamo's variables.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    effects = _side_effects()
    if not isinstance(source, AttrSource) or effects is None:
        return None
    for variable in effects.id_to_variable.values():
        if variable.source == source.base:
            return _owner(effects, variable), source.member
    return Owner(source.base.name, None, None, *_place(source.base)), source.member


def _side_effects() -> Any:
    try:
        return InstructionTranslator.current_tx().output.side_effects
    except AttributeError:  # no frame is being traced
        return None


def _class_of(variable: VariableTracker) -> type | None:
    return getattr(variable, "value_type", None)


def _owner(effects: Any, variable: VariableTracker) -> Owner:
    source = _nameable(variable.source)
    if source is None:
        place, value = _list_with(effects, variable), None
    else:
        place, value = _place(source), getattr(variable, "value", None)
    siblings = next((len(each.items) for name, each in _lists(effects) if place[0] and name == place[0]), None)
    return Owner("" if source is None else source.name, _class_of(variable), value, *place, siblings)


def _nameable(source: Source | None) -> Source | None:
    """The source, if what it names is the caller's: an object that the frame made may have a temporary one."""
    try:
        return source if source is not None and source.name else None
    except NotImplementedError:
        return None


def _place(source: Source) -> tuple[str, int | None]:
    if isinstance(source, GetItemSource) and isinstance(source.index, int):
        return source.base.name, source.index
    return "", None


def _list_with(effects: Any, variable: VariableTracker) -> tuple[str, int | None]:
    """The list that has ``variable`` as an element, by name, and its index there."""
    for name, candidate in _lists(effects):
        for index, item in enumerate(candidate.items):
            if item.unwrap() is variable:
                return name, index
    return "", None


def _lists(effects: Any) -> Iterator[tuple[str, ListVariable]]:
    """The lists that the frame knows, with their names: those of the caller, and attributes of new objects."""
    for variable in effects.id_to_variable.values():
        source = _nameable(variable.source)
        if isinstance(variable, ListVariable) and source is not None:
            yield source.name, variable
    seen: dict[str, int] = {}
    for variable, attributes in effects.store_attr_mutations.items():
        owner = _nameable(variable.source)
        owner_name = owner.name if owner else f"new {getattr(_class_of(variable), '__name__', 'object')}"
        for attribute, value in attributes.items():
            if isinstance(value.unwrap(), ListVariable):
                name = f"{owner_name}.{attribute}"
                seen[name] = seen.get(name, 0) + 1
                yield name if seen[name] == 1 else f"{name}#{seen[name]}", value.unwrap()


def hand_over_placeholder(old: Node, new: Node, *, has_source: bool = True) -> None:
    """Give a placeholder of a rewritten graph what AOTAutograd reads of the one that Dynamo made.

    That is its source, by which inputs are deduplicated and aliases found, and what Dynamo was told of the tensor.
    Without ``has_source`` the new one is known to have none. ``_dynamo_source`` and ``meta["tensor_dict"]``.
    """
    new._dynamo_source = getattr(old, "_dynamo_source", None) if has_source else None
    if "tensor_dict" in old.meta:
        new.meta["tensor_dict"] = dict(old.meta["tensor_dict"])


def keep_fakes_as_dynamo(module: GraphModule) -> None:
    """Move the placeholders' fakes from where ``torch.export`` has them to where Dynamo has them.

    Inductor's C++ wrapper takes a graph with the former for an exported one, in which no number is symbolic.
    ``node.meta["example_value"]`` in place of ``["val"]``; ``torch._inductor.compile_fx``.
    """
    for node in module.graph.find_nodes(op="placeholder"):
        if "val" in node.meta:
            node.meta["example_value"] = node.meta.pop("val")


def hand_over_module(old: GraphModule, new: GraphModule) -> None:
    """Give a rewritten graph what AOTAutograd reads of the one that Dynamo made: call it once the new one is complete.

    That is the compile id, and a source for each parameter and buffer: those that Dynamo installed have one, a constant
    of the new graph, such as ``torch.tensor([-1])``, gets one. ``GraphModule.meta``, ``_param_name_to_source``.
    """
    new.meta.update(old.meta)
    sources: dict[str, Any] = dict(getattr(old, "_param_name_to_source", {}))
    for name, _ in (*new.named_buffers(), *new.named_parameters()):
        sources.setdefault(name, ConstantSource(name))
    new._param_name_to_source = sources  # type: ignore[assignment]


def fix_address(placeholder: Node) -> None:
    """Say that the tensor passed here stays where it is, so that a CUDA graph does not copy it.

    Should it move after all, the CUDA graph is recorded anew. What ``torch._dynamo.mark_static_address`` says of a
    tensor: ``meta["tensor_dict"]["_dynamo_static_input_type"]``.
    """
    placeholder.meta.setdefault("tensor_dict", {})["_dynamo_static_input_type"] = "unguarded"


def graph_breaks() -> int:
    """Graph breaks since `clear_counters`. ``torch._dynamo.utils.counters``."""
    return sum(counters["graph_break"].values())


def clear_counters() -> None:
    """Forget what Dynamo has counted. ``torch._dynamo.utils.counters``."""
    counters.clear()


@contextmanager
def recompile_limit(limit: int, *, fail: bool = False) -> Iterator[None]:
    """Let code be compiled anew ``limit`` times in this block, and raise if that is not enough with ``fail``.

    Beyond its limit Dynamo runs the code uncompiled and warns in a log. ``torch._dynamo.config.recompile_limit``,
    ``fail_on_recompile_limit_hit``.
    """
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=fail):
        yield
