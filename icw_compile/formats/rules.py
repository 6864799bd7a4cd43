"""What an operation does to a stored value: the one table behind the passes and behind ``QuantizedKV``.

An operation that moves data along an axis does the same to each part that has the axis, exactly; a part that lacks it
is the same for all of it (`icw_compile.formats.moves`). An operation that writes encodes just what is new
(`icw_compile.formats.writes`). Every rule is written once, over an `icw_compile.formats.base.Evaluator`, and knows no
format.

A rule returns the resulting `Stored` (a tuple of them for an operation that returns several), or ``None`` where these
arguments reach inside a row (a slice of the channels, a transpose of them), or would part the tokens from what they
share: then the caller falls back on the decoded value.
"""

from typing import Any

import torch

from icw_compile.formats import moves, writes
from icw_compile.formats.moves import Rule

__all__ = ["RULES"]

aten = torch.ops.aten

#: operation -> what it does to a stored value. The operands that are stored arrive as `Stored`.
RULES: dict[Any, Rule] = {
    # Every part alike.
    aten.alias.default: moves.same(aten.alias.default, is_view=True),
    aten.detach.default: moves.same(aten.detach.default, is_view=True),
    aten.clone.default: moves.same(aten.clone.default, is_view=False),
    aten.contiguous.default: moves.same(aten.contiguous.default, is_view=True),
    aten.to.dtype: moves.to_dtype,
    # Views along an axis: the parts that have it. Kept rows follow a slice of the tokens, and no other.
    aten.slice.Tensor: moves.slice_,
    aten.narrow.default: moves.narrow,
    aten.select.int: moves.select,
    aten.split.Tensor: moves.split(aten.split.Tensor),
    aten.split_with_sizes.default: moves.split(aten.split_with_sizes.default),
    aten.chunk.default: moves.split(aten.chunk.default),
    aten.unbind.int: moves.unbind,
    # Views that reorder axes, add one, or merge those in front of the tokens.
    aten.unsqueeze.default: moves.unsqueeze,
    aten.squeeze.dim: moves.squeeze,
    aten.transpose.int: moves.transpose,
    aten.permute.default: moves.permute,
    aten.expand.default: moves.to_shape(aten.expand.default),
    aten.view.default: moves.to_shape(aten.view.default),
    aten.reshape.default: moves.to_shape(aten.reshape.default),
    aten._unsafe_view.default: moves.to_shape(aten._unsafe_view.default),
    # Copies along an axis: the parts that have it. Kept rows follow a roll and an append, and are forgotten otherwise.
    aten.index_select.default: moves.index_select,
    aten.roll.default: moves.over_dims(aten.roll.default),
    aten.flip.default: moves.over_dims(aten.flip.default),
    aten.repeat.default: moves.repeat,
    aten.repeat_interleave.self_int: moves.repeat_interleave,
    aten.index.Tensor: moves.index,
    aten.cat.default: writes.cat,
    # Writes: only what is new is encoded.
    aten.index_copy_.default: writes.index_copy_,
    aten.index_put_.default: writes.index_put_,
    aten.copy_.default: writes.copy_,
    aten.zero_.default: writes.zero_,
    aten.fill_.Scalar: writes.fill_,
}
