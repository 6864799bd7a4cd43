"""torch's flex attention as Dynamo captures it: a higher-order operator, which takes graphs.

Read and run in torch 2.11, 2.13 and 2.14, unless a function says otherwise.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

__all__ = ["FLEX_ATTENTION", "Flex", "let_flex_attention_take"]

#: The operator. ``torch.ops.higher_order.flex_attention``.
FLEX_ATTENTION: Any = torch.ops.higher_order.flex_attention


@dataclass(frozen=True)
class Flex:
    """The two graphs of a node that calls `FLEX_ATTENTION`, and which of its results are read.

    Attributes:
        score_mod: the ``get_attr`` node of the graph that changes a score.
        mask_mod: that of the graph that says whether a position may be read.
        log_sum: whether the second result, the logarithm of the sum of exponentials, is read.
    """

    score_mod: Node
    mask_mod: Node
    log_sum: bool

    @classmethod
    def of(cls, node: Node) -> "Flex":
        """By position: ``(query, key, value, score_mod, block_mask, ...)``, ``block_mask[-1]`` is ``mask_mod``."""
        score_mod: Any
        block_mask: Any
        score_mod, block_mask = node.args[3:5]
        # (output, logsumexp, ...): `getitem` nodes
        return cls(score_mod, block_mask[-1], any(user.args[1] == 1 and user.users for user in node.users))


@functools.cache
def let_flex_attention_take(subclass: type, plain: Callable[[Any], Any]) -> None:
    """Let the operator take tensors of ``subclass``, in a trace and in eager code, as ``plain(tensor)``.

    It changes the operator for the whole process, once; call it before Dynamo sees such a tensor. For calls without
    one nothing changes. torch looks a subclass up among an operator's rules only if no fake tensor comes before it, as
    the query does in a trace; there the rule for fake tensors has to know it. ``HigherOrderOperator.py_impl``,
    ``python_key_table[FakeTensorMode]``.
    """

    def call(target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return target(*(plain(x) if isinstance(x, subclass) else x for x in args), **kwargs)

    on_fakes = FLEX_ATTENTION.python_key_table[FakeTensorMode]
    FLEX_ATTENTION.python_key_table[FakeTensorMode] = lambda *args, **kwargs: call(on_fakes, args, kwargs)
    FLEX_ATTENTION.py_impl(subclass)(lambda *args, **kwargs: call(FLEX_ATTENTION, args, kwargs))
