"""What the kernel tests share: tensors, masks, and the reference that every kernel must equal."""

import itertools

import torch

from icw_compile.formats import int4, int8
from icw_compile.formats.kept import place_rows
from icw_compile.formats.scaled import scale_dtype_for
from icw_compile.kernels import inductor


def make(batch, query_heads, heads, tokens, length, head_dim, value_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    scale_dtype = scale_dtype_for(dtype)
    key = random(batch, heads, length, head_dim) * 2
    value = random(batch, heads, length, value_dim) * torch.rand(length, 1, generator=generator).to(dtype)
    query = random(batch, query_heads, tokens, head_dim)
    return [query, *int8.quantize_per_head(key, scale_dtype), *int8.quantize_per_head(value, scale_dtype)]


def in_four_bits(tensors, roles):
    """The rows of ``roles`` packed: what a kernel takes, its other arguments, and the same numbers as int8 rows."""
    packed, levels, codes = list(tensors), list(tensors), {}
    for role in roles:
        at = {"key": 1, "value": 3}[role]
        rows = int8.dequantize_per_head(*tensors[at : at + 2], torch.float32)
        packed[at], packed[at + 1], codes[f"{role}_codes"] = int4.quantize_halves(rows, tensors[at + 1].dtype)
        levels[at], levels[at + 1] = int4.halves_to_levels(packed[at], codes[f"{role}_codes"]), packed[at + 1]
    return packed, codes, levels


def decode(tensors):
    """The keys and the values, float32."""
    return [int8.dequantize_per_head(*tensors[i : i + 2], torch.float32) for i in (1, 3)]


def keep_some(decoded, dtype, most=6, roles=("key", "value"), seed=0):
    """Up to ``most`` random rows of these roles as they are kept: a kernel's arguments, and keys and values with them.

    Some places have no row, or one that is further back than there are; keys and values share some rows.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, placed = {}, list(decoded)
    length = decoded[0].shape[2]
    for i, role in enumerate(("key", "value")):
        if role not in roles:
            continue
        rows = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[: most - i]
        position = torch.cat([rows, torch.tensor([-1, length, length + 3])])
        position = position[torch.randperm(len(position), generator=generator)]
        shape = (*decoded[i].shape[:2], len(position), decoded[i].shape[3])
        exact = torch.randn(shape, generator=generator).to(dtype)
        kept |= {f"{role}_exact": exact, f"{role}_position": position}
        placed[i] = place_rows(decoded[i], exact, position)
    return kept, placed


def reference(tensors, mask=None, is_causal=False, scale=None, softcap=None, sinks=None, placed=None):
    """``placed``: the keys and the values, if they are others than those of ``tensors``."""
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    query, (key, value) = tensors[0], placed or decode(tensors)
    mask = None if mask is None else mask if mask.dtype == torch.bool else mask.float()
    return inductor.grouped_attention(query.float(), key, value, mask, is_causal, scale, softcap, sinks)


def masks(batch, query_heads, tokens, length):
    generator = torch.Generator().manual_seed(1)

    def boolean(*shape):
        return torch.rand(shape, generator=generator) > 0.4

    full = (batch, query_heads, tokens, length)
    for dims in itertools.product((False, True), repeat=3):
        shape = [size if keep else 1 for size, keep in zip(full[:3], dims, strict=True)] + [length]
        mask = boolean(*shape)
        yield "boolean", mask
        yield "additive", torch.randn(shape, generator=generator).masked_fill(~mask, -torch.inf)
        yield "finfo.min", torch.zeros(shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    mask = boolean(batch, 1, tokens, length)
    yield "all dead but finfo.min", torch.full((1, 1, tokens, length), torch.finfo(torch.float32).min)
    yield "bfloat16", torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
    yield "float16", torch.zeros(mask.shape, dtype=torch.float16).masked_fill(~mask, torch.finfo(torch.float16).min)
    yield "float64", torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    yield "quarter", (torch.arange(length) < length // 4).view(1, 1, 1, -1)
    yield "window", ((torch.arange(length) > length // 3) & (torch.arange(length) < length // 2)).view(1, 1, 1, -1)
    yield "transposed", boolean(length, tokens, query_heads, batch).permute(3, 2, 1, 0)
    yield "every second", boolean(batch, 1, tokens, 2 * length)[..., ::2]
    yield "expanded", boolean(1, 1, tokens, 1).logical_or(torch.tensor(True)).expand(batch, query_heads, tokens, length)
    yield "one column", torch.full((1, 1, 1, 1), 0.5)
    empty = boolean(batch, 1, tokens, length)
    empty[:, :, 0] = False
    yield "empty row", empty
    yield "empty", torch.zeros(1, 1, 1, length, dtype=torch.bool)
    yield "empty additive", torch.full((1, 1, 1, length), -torch.inf)


def log_sums(tensors, mask=None, is_causal=False, scale=None, softcap=None, sinks=None):
    """The logarithm of the sum of exponentials of each row's scores, float32 ``[B, Hq, T]``."""
    query, key_qdata, key_scale = tensors[0].float(), *tensors[1:3]
    key = int8.dequantize_per_head(key_qdata, key_scale, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return scores.logsumexp(-1)
