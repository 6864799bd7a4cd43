"""Recognise attention, in each form in which transformers spells it.

======  ============================================================================================
form    spelling
======  ============================================================================================
sdpa    ``scaled_dot_product_attention(query, key, value, mask, ...)``
eager   ``matmul(dropout(softmax(mask + softcap(scale * matmul(query, key^T)))), value)``
======  ============================================================================================

In both, key and value may have been through ``repeat_kv``: ``unsqueeze, expand, reshape`` of ``[B, H, S, D]`` to
``[B, H * groups, S, D]``. Dropout is not part of the match: a cache is for inference, and the backend refuses a graph
in which dropout is active.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from icw_compile.passes.graph import arguments

__all__ = ["Attention", "match_attention", "strip_repeat_kv"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One attention: ``node`` computes it from ``query``, ``key`` and ``value``, each ``[B, heads, length, size]``."""

    node: Node
    form: str
    query: Node
    key: Node
    value: Node
    attn_mask: Node | None
    is_causal: bool
    scale: float
    softcap: float | None = None


def match_attention(node: Node) -> Attention | None:
    """The attention that ``node`` is the result of, or ``None``."""
    if node.target is aten.scaled_dot_product_attention.default:
        found = _match_sdpa(node)
    elif node.target is aten.matmul.default:
        found = _match_eager(node)
    else:
        return None
    if found is None or any(_rank(operand) != 4 for operand in (found.query, found.key, found.value)):
        return None
    if found.attn_mask is not None and _rank(found.attn_mask) != 4:
        return None
    return found


def strip_repeat_kv(node: Node) -> Node:
    """The ``[B, H, S, D]`` tensor that ``repeat_kv`` expanded into ``node``, or ``node`` itself.

    ``repeat_kv`` orders the copies of a head next to each other, so that dropping it leaves grouped-query attention.
    """
    if node.target is aten.repeat_interleave.self_int:
        return node.args[0] if arguments(node)["dim"] in (1, -3) and _rank(node) == 4 else node
    expanded = _operand(node, aten.reshape.default, aten.view.default, aten._unsafe_view.default)
    if expanded is not None and expanded.target is aten.clone.default:
        expanded = expanded.args[0]
    unsqueezed = _operand(expanded, aten.expand.default)
    while unsqueezed is not None and _is_whole_slice(unsqueezed):
        unsqueezed = unsqueezed.args[0]
    if unsqueezed is None or unsqueezed.target is not aten.unsqueeze.default or unsqueezed.args[1] != 2:
        return node
    base = unsqueezed.args[0]
    shape, base_shape = node.meta["val"].shape, base.meta["val"].shape
    groups = expanded.meta["val"].shape[2]
    expected = (base_shape[0], base_shape[1] * groups, *base_shape[2:])
    same = len(shape) == 4 and all(statically_known_true(a == b) for a, b in zip(shape, expected, strict=True))
    return base if same else node


def _match_sdpa(node: Node) -> Attention | None:
    a = arguments(node)
    scale = _number(a["scale"]) if a["scale"] is not None else _default_scale(a["query"])
    if scale is None:
        return None
    return Attention(node, "sdpa", a["query"], a["key"], a["value"], a["attn_mask"], a["is_causal"], scale)


def _match_eager(node: Node) -> Attention | None:
    weights, value = node.args
    while weights.target in (aten.dropout.default, aten.to.dtype, aten._to_copy.default):
        weights = weights.args[0]
    if weights.target not in (aten.softmax.int, aten._softmax.default) or weights.args[1] not in (-1, 3):
        return None
    scores, attn_mask = weights.args[0], None
    matched = _match_scores(scores)
    if matched is None and scores.target is aten.add.Tensor and not scores.kwargs:
        for candidate, other in (scores.args, scores.args[::-1]):
            if isinstance(candidate, Node) and isinstance(other, Node):
                matched = _match_scores(candidate)
                attn_mask = other
                if matched is not None:
                    break
    if matched is None:
        return None
    query, key, scale, softcap = matched
    form = "eager" if softcap is None else "eager, softcap"
    return Attention(node, form, query, key, value, attn_mask, False, scale, softcap)


def _match_scores(node: Node) -> tuple[Node, Node, float, float | None] | None:
    """``cap * tanh(scale * query @ key^T / cap)``, with scale and cap each optional."""
    softcap = None
    inner, cap = _times_number(node)
    if inner.target is aten.tanh.default:
        divided, divisor = _times_number(inner.args[0])
        if abs(cap * divisor - 1.0) > 1e-9:
            return None
        softcap, node = cap, divided
    product, scale = _times_number(node)
    if product.target is not aten.matmul.default:
        return None
    query, transposed = product.args
    if transposed.target is not aten.transpose.int or {d % 4 for d in transposed.args[1:]} != {2, 3}:
        return None
    return query, transposed.args[0], scale, softcap


def _times_number(node: Node) -> tuple[Node, float]:
    """``node`` as ``(inner, factor)`` where it is ``inner * factor`` or ``inner / divisor`` with a plain number."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or (number := _number(node.args[1])) is None:
        return node, 1.0
    return node.args[0], number if node.target is aten.mul.Tensor else 1.0 / number


def _number(value: Any) -> float | None:
    """A plain number; a symbolic one (``dynamic=True``) is taken as the constant that it is, with a guard."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    return float(value) if isinstance(value, (int, float, torch.SymFloat)) else None


def _default_scale(query: Node) -> float | None:
    head_dim = query.meta["val"].shape[-1]
    return head_dim**-0.5 if isinstance(head_dim, int) else None


def _operand(node: Node | None, *targets: Any) -> Node | None:
    return node.args[0] if node is not None and node.target in targets else None


def _is_whole_slice(node: Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    return all(
        statically_known_true(a == b)
        for a, b in zip(node.meta["val"].shape, node.args[0].meta["val"].shape, strict=True)
    )


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1
