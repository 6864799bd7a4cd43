"""Rows of a new cache: an operation that a compiler does not look into (`icw_compile.passes.place`).

``rows_among_zeros(rows, dim, index, size) -> Tensor``
    ``rows`` at the indices ``index``, int64 ``[n]``, of dimension ``dim``, which gets the given size, and zeros
    elsewhere: contiguous, in the dtype of ``rows``, which have ``n`` there. As `torch.Tensor.index_copy_` into zeros,
    and with its errors.
"""

import torch
from torch import Tensor

__all__ = ["ROWS_AMONG_ZEROS", "rows_among_zeros"]


def rows_among_zeros(rows: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    return _room(rows, dim, size).zero_().index_copy_(dim, index, rows)


def _room(rows: Tensor, dim: int, size: int) -> Tensor:
    shape = list(rows.shape)
    shape[dim] = size
    return rows.new_empty(shape)


torch.library.define(
    "icw_int8kv::rows_among_zeros",
    "(Tensor rows, int dim, Tensor index, SymInt size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
torch.library.impl("icw_int8kv::rows_among_zeros", "CompositeExplicitAutograd", rows_among_zeros)
torch.library.register_fake("icw_int8kv::rows_among_zeros", lambda rows, dim, index, size: _room(rows, dim, size))

#: The operator, as a graph calls it.
ROWS_AMONG_ZEROS = torch.ops.icw_int8kv.rows_among_zeros.default
