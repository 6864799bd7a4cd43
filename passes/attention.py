"""Recognise attention, in each form in which transformers spells it.

======  ============================================================================================
form    spelling
======  ============================================================================================
sdpa    ``scaled_dot_product_attention(query, key, value, mask, ...)``
eager   ``matmul(dropout(softmax(scores)), value)``, where ``scores`` is ``matmul(query, key^T)``, multiplied by
        numbers, soft-capped (``cap * tanh(x / cap)``), added to masks and position biases (ALiBi), filled with a very
        negative number where a boolean mask says so, or of no less than one, in any order that softmax does not tell
        apart, less their largest or not; with GPT-OSS's sinks,
        ``matmul(softmax(cat([scores, sinks], -1))[..., :-1], value)``, or with those of Granite,
        ``matmul(softmax(scores), value) * sigmoid(logsumexp(scores) - sinks)``, which is the same
merged  the same with ``bmm`` and ``baddbmm``, on tensors ``[B * heads, length, size]`` (BLOOM), or of the scores alone
        (GPT-NeoX Japanese)
======  ============================================================================================

In all, key and value may have been through ``repeat_kv``: ``unsqueeze, expand, reshape`` of ``[B, H, S, D]`` to
``[B, H * groups, S, D]``. Dropout is not part of the match: a cache is for inference, and the backend refuses a graph
in which dropout is active.
"""

import operator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from icw_compile.compat.fx import statically_known_true
from icw_compile.passes.nodes import args_of, arguments, first_write, root_of

__all__ = [
    "Attention",
    "Bias",
    "is_whole_slice",
    "match_attention",
    "repeats_heads",
    "strip_casts",
    "strip_merge",
    "strip_repeat_kv",
]

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten._to_copy.default)
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
#: To which a conversion rounds, and no more. The 8-bit floats have no infinity, or too few numbers.
_ROUNDED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: A score at or below this is masked: whatever it was added to or replaces does not count.
_MASKED = -1e4


class Bias(NamedTuple):
    """What is added to the scores: ``factor * node``, which broadcasts to ``[B, heads, T, S]``.

    With ``filler``, ``node`` is boolean: the scores are that very negative number where it is ``fills``. A boolean
    ``node`` without filler is a mask of torch's own attention. Beside merged scores, ``[B * heads, T, S]``, its first
    dimension is merged as well, or 1.
    """

    node: Node
    factor: float = 1.0
    filler: float | None = None
    fills: bool = True


@dataclass(frozen=True)
class Attention:
    """One attention: ``node`` computes it from ``query``, ``key`` and ``value``, each ``[B, heads, length, size]``.

    ``merged``: they are ``[B * heads, length, size]``, and so is ``node``; the key alone may be so. ``apart`` is
    ``[B, heads]`` where their scores were taken apart, as for a mask. ``sinks`` is ``[heads]``.
    """

    node: Node
    form: str
    query: Node
    key: Node
    value: Node
    scale: float
    biases: tuple[Bias, ...] = ()
    is_causal: bool = False
    softcap: float | None = None
    sinks: Node | None = None
    merged: bool = False
    apart: tuple[Any, ...] | None = None


def match_attention(node: Node) -> Attention | None:
    """The attention that ``node`` is the result of, or ``None``."""
    if node.target is aten.scaled_dot_product_attention.default:
        found = _match_sdpa(node)
    elif node.target in (aten.matmul.default, aten.bmm.default):
        found = None if _rescaled(node) else _match_eager(node)
    elif node.target is aten.mul.Tensor:
        found = _match_rescaled(node)
    else:
        return None
    if found is None:
        return None
    rank = 3 if found.merged else 4
    if any(_rank(operand) != rank for operand in (found.query, found.value)):
        return None
    query, value = found.query.meta["val"].shape, found.value.meta["val"].shape
    if not _has_shape(node, (*query[:-1], value[-1])) or not statically_known_true(query[0] == value[0]):
        return None  # something is broadcast, or heads are not where they seem
    return found if all(_rank(bias.node) <= 4 for bias in found.biases) else None


def strip_casts(node: Node) -> Node:
    """What ``node`` is rounded from, to another dtype of floating point, or ``node`` itself."""
    while node.target in _CASTS and node.meta["val"].dtype in _ROUNDED:
        node = args_of(node)[0]
    return node


def strip_merge(node: Node) -> Node:
    """The ``[B, H, S, D]`` tensor that was reshaped to ``node``, ``[B * H, S, D]``, or ``node`` itself."""
    if node.target not in _RESHAPES or _rank(node) != 3 or _rank(args_of(node)[0]) != 4:
        return node
    base = args_of(node)[0]
    return base if _has_shape(node, (node.meta["val"].shape[0], *base.meta["val"].shape[2:])) else node


def strip_repeat_kv(node: Node) -> Node:
    """The ``[B, H, S, D]`` tensor that ``repeat_kv`` expanded into ``node``, or ``node`` itself.

    ``repeat_kv`` orders the copies of a head next to each other, so that dropping it leaves grouped-query attention.
    """
    if node.target is aten.repeat_interleave.self_int:
        return args_of(node)[0] if arguments(node)["dim"] in (1, -3) and _rank(node) == 4 else node
    expanded = _operand(node, *_RESHAPES)
    if expanded is not None and expanded.target is aten.clone.default:
        expanded = args_of(expanded)[0]
    unsqueezed = _operand(expanded, aten.expand.default)
    while unsqueezed is not None and is_whole_slice(unsqueezed):
        unsqueezed = args_of(unsqueezed)[0]
    if unsqueezed is None or unsqueezed.target is not aten.unsqueeze.default or args_of(unsqueezed)[1] != 2:
        return node
    base = args_of(unsqueezed)[0]
    assert expanded is not None
    (batch, heads, *rest), groups = base.meta["val"].shape, expanded.meta["val"].shape[2]
    return base if _has_shape(node, (batch, heads * groups, *rest)) else node


def repeats_heads(node: Node) -> bool:
    """Whether ``node`` went through ``repeat_kv``, and was merged maybe."""
    merged = strip_merge(node)
    return strip_repeat_kv(merged) is not merged


def _match_sdpa(node: Node) -> Attention | None:
    a = arguments(node)
    scale = _number(a["scale"]) if a["scale"] is not None else _default_scale(a["query"])
    if scale is None or _rank(a["key"]) != 4 or (a["attn_mask"] is not None and _rank(a["attn_mask"]) != 4):
        return None
    biases = () if a["attn_mask"] is None else (Bias(a["attn_mask"]),)
    return Attention(node, "sdpa", a["query"], a["key"], a["value"], scale, biases, a["is_causal"])


def _match_eager(node: Node) -> Attention | None:
    dropped, scores = _normalized(node)
    if scores is None:
        return None
    scores, sinks = _strip_shift(scores), None
    if dropped:
        scores, sinks = _split_sinks(scores)
        if sinks is None:
            return None
    found = _match_scores(scores)
    if found is not None and found.merged and node.target is aten.matmul.default:
        found = _unmerged(found, args_of(node)[1])
    if found is None or found.merged != (node.target is aten.bmm.default):
        return None
    form = "eager" + (", softcap" if found.softcap is not None else "") + (", sinks" if sinks is not None else "")
    return replace(found, node=node, form=form, value=args_of(node)[1], sinks=sinks)


def _normalized(node: Node) -> tuple[bool, Node | None]:
    """What ``matmul(softmax(scores), value)`` takes the softmax of, and whether the last of its columns is dropped."""
    weights, dropped = strip_casts(args_of(node)[0]), False
    while weights.target in (aten.dropout.default, aten.slice.Tensor, *_RESHAPES):
        if weights.target is aten.slice.Tensor:
            if dropped or not _drops_last(weights):
                return False, None
            dropped = True
        elif weights.target in _RESHAPES and not _keeps_tokens(weights):
            return False, None
        weights = strip_casts(args_of(weights)[0])
    last = _rank(weights) - 1
    if weights.target not in (aten.softmax.int, aten._softmax.default) or args_of(weights)[1] not in (-1, last):
        return False, None
    return dropped, args_of(weights)[0]


def _unmerged(found: Attention, value: Node) -> Attention | None:
    """The same with the heads of the query apart, where the scores alone were of heads and batch in one dimension."""
    query = strip_merge(found.query)
    if found.apart is None or any(_rank(bias.node) == 3 for bias in found.biases):
        return None  # of merged heads, or of heads: that is not known here
    same = all(_rank(x) == 4 and _has_shape(x, (*found.apart, *x.meta["val"].shape[2:])) for x in (query, value))
    return replace(found, query=query, merged=False, apart=None) if same else None


def _match_rescaled(node: Node) -> Attention | None:
    """``output * sigmoid(logsumexp(scores) - sinks)``, where ``output`` is an attention of the same scores."""
    for output, factor in (args_of(node), args_of(node)[::-1]):
        if not isinstance(output, Node) or not isinstance(factor, Node) or output.target is not aten.matmul.default:
            continue
        scores, sinks = _split_share(factor)
        normalized = _normalized(output)[1]
        if sinks is None or normalized is None or scores is not _strip_shift(normalized) or len(output.users) > 1:
            continue
        found = _match_eager(output)
        if found is not None and found.sinks is None:
            return replace(found, node=node, form=f"{found.form}, sinks", sinks=sinks)
    return None


def _split_share(node: Node) -> tuple[Node, Node | None]:
    """``sigmoid(logsumexp(scores, -1) - sinks)``, ``[B, heads, T, 1]``, as the scores and the sinks ``[heads]``.

    It is what sinks leave of an attention without them: ``sum(exp(scores)) / (sum(exp(scores)) + exp(sinks))``.
    """
    share = strip_casts(node)
    if share.target is not aten.unsqueeze.default or args_of(share)[1] not in (-1, 3):
        return node, None
    share = strip_casts(args_of(share)[0])
    if share.target is not aten.sigmoid.default:
        return node, None
    difference = strip_casts(args_of(share)[0])
    if difference.target is not aten.sub.Tensor or difference.kwargs or _rank(difference) != 3:
        return node, None
    total, sinks = args_of(difference)
    total = strip_casts(total)
    if total.target is not aten.logsumexp.default or args_of(total)[1] not in ([-1], [3]) or args_of(total)[2:]:
        return node, None
    return args_of(total)[0], _of_each_head(sinks, total.meta["val"]) if isinstance(sinks, Node) else None


def _rescaled(node: Node) -> bool:
    """Whether ``node`` is an attention that is multiplied by the share that its sinks leave it, and nothing else."""
    return any(user.target is aten.mul.Tensor and _match_rescaled(user) is not None for user in node.users)


def _match_scores(node: Node, factor: float = 1.0) -> Attention | None:
    """``factor * node`` as the scores of an attention whose value is not known yet."""
    inner, number = _times_number(node)
    if inner is not node:
        return _match_scores(inner, factor * number)
    target, args = node.target, args_of(node)
    if (rounded := strip_casts(node)) is not node:
        return _match_scores(rounded, factor)
    if target in _RESHAPES:
        found = _match_scores(args[0], factor) if _keeps_tokens(node) else None
        return found and _reshaped(found, node)
    if target is aten.add.Tensor and not node.kwargs:
        for inner, bias in (args, args[::-1]):
            if not isinstance(inner, Node) or not isinstance(bias, Node) or _is_boolean(bias):
                continue  # added, a truth is a one: no mask
            if not _has_shape(inner, node.meta["val"].shape):
                continue  # it is scores that are broadcast, or the bias
            if (found := _match_scores(inner, factor)) is not None:
                return replace(found, biases=(*found.biases, *_added(bias, factor, inner)))
        return None
    if target in (aten.maximum.default, aten.max.other):
        dtype = node.meta["val"].dtype
        for inner, least in (args, args[::-1]):
            floor = _number(least) if dtype in _ROUNDED else None
            if floor is not None and floor <= torch.finfo(dtype).min / 2 and floor * factor <= _MASKED:
                return _match_scores(inner, factor)  # to softmax it is nothing, with or without
        return None
    if target in (aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        keeps = target in (aten.where.self, aten.where.ScalarOther)
        (condition, inner) = args[:2] if keeps else args[1::-1]
        filler = _number(args[2])
        if filler is None or filler * factor > _MASKED or not isinstance(inner, Node):
            return None
        if not _has_shape(inner, node.meta["val"].shape):
            return None
        found = _match_scores(inner, factor)
        return found and replace(
            found, biases=(*found.biases, Bias(condition, filler=filler * factor, fills=not keeps))
        )
    if target is aten.tanh.default:
        found = _match_scores(args[0])
        if found is None or found.biases or found.softcap is not None or factor <= 0:
            return None
        return replace(found, scale=found.scale * factor, softcap=factor)
    return _match_product(node, factor)


def _reshaped(found: Attention, node: Node) -> Attention | None:
    """The same, whose scores are taken apart in ``node``, or put together again."""
    if _rank(node) == 3:
        return found if found.merged else None
    if not found.merged:
        return found
    shape = node.meta["val"].shape
    if found.apart is None:
        return replace(found, apart=tuple(shape[:2]))
    return found if _has_shape(node, (*found.apart, *shape[2:])) else None


def _match_product(node: Node, factor: float) -> Attention | None:
    """``query @ key^T``, or ``beta * bias + alpha * query @ key^T``."""
    biases: tuple[Bias, ...] = ()
    merged = node.target is not aten.matmul.default
    if node.target is aten.baddbmm.default:
        a = arguments(node)
        alpha, beta = _number(a["alpha"]), _number(a["beta"])
        if alpha is None or beta is None:
            return None
        biases = _added(a["self"], beta * factor, node) if beta else ()
        query, transposed, factor = a["batch1"], a["batch2"], alpha * factor
    elif node.target in (aten.matmul.default, aten.bmm.default):
        query, transposed = args_of(node)
    else:
        return None
    rank = _rank(query)
    if transposed.target is not aten.transpose.int or _rank(transposed) != rank:
        return None
    key, *dims = args_of(transposed)
    if {dim % rank for dim in dims} != {rank - 2, rank - 1}:
        return None
    return Attention(node, "eager", query, key, key, factor, biases, merged=merged)


def _added(bias: Node, factor: float, scores: Node) -> tuple[Bias, ...]:
    """``factor * bias`` as a bias of ``scores``, unless it is zeros, which some models make in the place of one."""
    zeros = bias.target is aten.zeros.default and first_write({bias}, bias.next) is None
    return () if zeros and _has_shape(bias, scores.meta["val"].shape) else (Bias(bias, factor),)


def _split_sinks(node: Node) -> tuple[Node, Node | None]:
    """``cat([scores, sinks], -1)``, with one sink for each head, as the scores and the sinks ``[heads]``."""
    if node.target is not aten.cat.default or len(args_of(node)[0]) != 2 or args_of(node)[1:] not in ((-1,), (3,)):
        return node, None
    scores, sinks = list(args_of(node)[0])
    return scores, _of_each_head(sinks, scores.meta["val"]) if _rank(scores) == 4 else None


def _of_each_head(node: Node, scores: torch.Tensor) -> Node | None:
    """The ``[heads]`` numbers of which ``node`` is those of each head, for ``scores``, ``[B, heads, ...]``."""
    node = strip_casts(node)
    while node.target is aten.expand.default:
        node = strip_casts(args_of(node)[0])
    heads = scores.shape[1]
    alone = (heads, *[1] * (scores.dim() - 2))
    if not _has_shape(node, alone) and not _has_shape(node, (1, *alone)):
        return None
    while node.target in (aten.unsqueeze.default, *_RESHAPES):
        node = strip_casts(args_of(node)[0])
    return node if _has_shape(node, (heads,)) else None


def _strip_shift(node: Node) -> Node:
    """``x`` where ``node`` is ``x - max(x)``, which softmax does not notice."""
    if node.target is not aten.sub.Tensor or node.kwargs or not isinstance(args_of(node)[1], Node):
        return node
    inner, largest = args_of(node)
    if largest.target is operator.getitem and args_of(largest)[1] == 0:
        largest = args_of(largest)[0]
    own = largest.target in (aten.max.dim, aten.amax.default) and args_of(largest)[0] is inner
    return inner if own and args_of(largest)[1:] in ((-1, True), ([-1], True)) else node


def _drops_last(node: Node) -> bool:
    """Whether a slice takes all but the last column: ``x[..., :-1]``."""
    a = arguments(node)
    return (a["dim"] % _rank(node), a["start"] or 0, a["end"], a["step"]) == (_rank(node) - 1, 0, -1, 1)


def _times_number(node: Node) -> tuple[Node, float]:
    """``node`` as ``(inner, factor)`` where it is ``inner * factor`` or ``inner / divisor`` with a plain number."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or (number := _number(args_of(node)[1])) is None:
        return node, 1.0
    if node.target is aten.mul.Tensor:
        return args_of(node)[0], number
    return (args_of(node)[0], 1.0 / number) if number else (node, 1.0)


def _number(value: Any) -> float | None:
    """A plain number; a symbolic one (``dynamic=True``) is taken as the constant that it is, with a guard."""
    if isinstance(value, Node):
        constant = value
        while constant.target in (aten.lift_fresh_copy.default, aten.detach_.default, aten.detach.default):
            constant = args_of(constant)[0]
        is_full = constant.target is aten.full.default and not args_of(constant)[0]
        if (constant.op == "get_attr" or is_full) and first_write({root_of(value)}, value.next) is not None:
            return None  # through a view
        if constant.op == "get_attr":  # torch.tensor(number)
            value = getattr(constant.graph.owning_module, str(constant.target))
            return float(value) if value.numel() == 1 else None
        if is_full:
            return _number(args_of(constant)[1])
        value = value.meta.get("val")
    return float(value) if isinstance(value, (int, float, torch.SymFloat)) else None


def _default_scale(query: Node) -> float | None:
    head_dim = query.meta["val"].shape[-1]
    return head_dim**-0.5 if isinstance(head_dim, int) else None


def _operand(node: Node | None, *targets: Any) -> Node | None:
    return args_of(node)[0] if node is not None and node.target in targets else None


def is_whole_slice(node: Node) -> bool:
    """Whether a node is a slice that is known to take all there is."""
    return node.target is aten.slice.Tensor and _has_shape(node, args_of(node)[0].meta["val"].shape)


def _keeps_tokens(node: Node) -> bool:
    """Whether a reshape of scores leaves each ``[T, S]`` of them as it is, and numbers heads and batch alone anew."""
    inner, shape = args_of(node)[0], node.meta["val"].shape
    return _has_shape(inner, shape) or (
        {_rank(inner), len(shape)} == {3, 4} and _has_shape(inner, (*inner.meta["val"].shape[:-2], *shape[-2:]))
    )


def _has_shape(node: Node, shape: tuple[Any, ...]) -> bool:
    given = node.meta["val"].shape
    return len(given) == len(shape) and all(map(statically_known_true, map(operator.eq, given, shape)))


def _is_boolean(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1
