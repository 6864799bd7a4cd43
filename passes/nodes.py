"""What a node of the graph is given, writes into and shows again, by the schema of what it calls."""

import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from icw_compile.compat.fx import is_operator, schema_of, values_of, viewed_values, written_values

__all__ = [
    "aliases",
    "args_of",
    "arguments",
    "called",
    "drops_out",
    "first_write",
    "is_mutation",
    "layer_of",
    "root_of",
    "viewed_by",
    "written_by",
]


def is_mutation(node: Node) -> bool:
    """Whether the node writes into one of its operands."""
    if (kept := node.meta.get("kept")) is not None:
        return bool(kept.written)
    return is_operator(node.target) and schema_of(node.target).is_mutable


def _arguments_at(node: Node, positions: Collection[int]) -> list[Node]:
    """Nodes among the arguments of a kept node."""
    operands: list[Node] = []
    torch.fx.map_arg((node.args, node.kwargs), operands.append)
    return [each for i, each in enumerate(operands) if i in positions]


def written_by(node: Node) -> list[Node]:
    """The operands that the node writes into, as its schema says: any of its arguments, in lists as well."""
    if (kept := node.meta.get("kept")) is not None:
        return _arguments_at(node, kept.written)
    if not is_operator(node.target):
        return []
    return _nodes(written_values(node.target, node.args, node.kwargs))


def viewed_by(node: Node) -> list[Node]:
    """The operands that what the node returns may be a view of, or be, as its schema says."""
    if (kept := node.meta.get("kept")) is not None:
        return _arguments_at(node, kept.viewed)
    if node.target is operator.getitem:
        return _nodes(node.args[:1])
    return _nodes(viewed_values(node.target, node.args, node.kwargs)) if is_operator(node.target) else []


def _nodes(values: Iterable[Any]) -> list[Node]:
    return [each for each in values if isinstance(each, Node)]


def aliases(storage: Node) -> Iterator[Node]:
    """``storage``, then the nodes that are views of it or write into it, each as its schema says."""
    pending, seen = [storage], {storage}
    while pending:
        current = pending.pop(0)
        yield current
        for user in current.users:
            if user not in seen and (current in viewed_by(user) or current in written_by(user)):
                seen.add(user)
                pending.append(user)


def root_of(node: Node) -> Node:
    """What ``node`` is a view of, directly or through other views and in-place writes."""
    while viewed := viewed_by(node):
        node = viewed[0]
    return node


def first_write(roots: Collection[Node], start: Node, end: Node | None = None) -> Node | None:
    """The first node from ``start`` on, and before ``end``, that writes into what one of ``roots`` stands for."""
    node = start
    while node is not end and node.op != "root":
        if is_mutation(node) and any(root_of(each) in roots for each in written_by(node)):
            return node
        node = node.next
    return None


def args_of(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a node. ``Node.args`` are of a type that says all that they might be."""
    return node.args


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults filled in."""
    assert is_operator(node.target)
    return values_of(node.target, node.args, node.kwargs)


def drops_out(node: Node) -> bool:
    """Whether a node drops out, as in training."""
    if node.target is torch.ops.aten.dropout.default:
        return bool(arguments(node)["train"]) and arguments(node)["p"] != 0
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return bool(arguments(node)["dropout_p"] != 0)
    return False


def called(node: Node) -> str:
    """What the node calls, for a message: ``aten.matmul.default``, ``linear``, ``cond``."""
    target = node.target
    return target if isinstance(target, str) else str(target) if is_operator(target) else target.__name__


def layer_of(node: Node) -> str:
    """The path of the module that a node came from, such as ``model.layers.0.self_attn``; empty if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed([entry[0] for entry in stack.values()]), "")
    # Dynamo spells the root as an access into a frame's locals: L['self'].model...
    return path.partition("].")[2] if path.startswith("L[") else path
