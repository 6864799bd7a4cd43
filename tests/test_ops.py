"""The named operations against plain torch on random data."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import relative_distance
from torch import Tensor

from icw_compile.formats import int8 as ops
from icw_compile.formats.scaled import scale_dtype_for
from icw_compile.kernels import inductor
from icw_compile.lab.reference import quantize_dequantize

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["attention"]


def attend(
    form: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: object
) -> Tensor:
    """Quantize float keys and values and run one of the attention operations on them."""
    dtype = scale_dtype_for(query.dtype)
    parts = [*ops.quantize_per_head(key, dtype), *ops.quantize_per_head(value, dtype)]
    arguments = {"is_causal": False, "scale": query.shape[-1] ** -0.5, "softcap": None, **kwargs}
    if form == "attention":
        parts = [ops.dequantize_per_head(*parts[i : i + 2], query.dtype) for i in (0, 2)]
    return getattr(torch.ops.icw_int8kv, form)(query, *parts, mask, *arguments.values())


def expected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention as transformers' eager one spells it, in float64, on the values that the cache stores."""
    groups = query.shape[1] // key.shape[1]
    key, value = (quantize_dequantize(x).double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ value


def states(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_equals_plain_torch(dtype: torch.dtype) -> None:
    x = states((2, 3, 17, 64), dtype) * torch.logspace(-3, 3, 17).view(17, 1).to(dtype)
    qdata, scale = torch.ops.icw_int8kv.quantize_per_head(x, scale_dtype_for(dtype))
    assert (qdata.dtype, qdata.shape) == (torch.int8, x.shape)
    assert (scale.dtype, scale.shape) == (scale_dtype_for(dtype), (2, 3, 17, 1))
    assert torch.equal(torch.ops.icw_int8kv.dequantize_per_head(qdata, scale, dtype), quantize_dequantize(x))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=40),
    st.sampled_from(FLOATS),
)
def test_error_is_at_most_a_step(row: list[float], dtype: torch.dtype) -> None:
    """Half a step from rounding, and up to half of one more where a scale rounded down makes the largest clamp."""
    x = torch.tensor(row).to(dtype)
    qdata, scale = ops.quantize_per_head(x, scale_dtype_for(dtype))
    back = ops.dequantize_per_head(qdata, scale, dtype)
    assert qdata.abs().max() <= ops.QMAX
    assert back.isfinite().all()
    step = x.float().abs().max() / 127
    rounding = torch.finfo(dtype).eps * x.float().abs()
    smallest = torch.finfo(torch.float32).tiny  # below it, a step is no number any more
    assert ((back.float() - x.float()).abs() <= 1.01 * step + rounding + smallest).all()


def test_zero_row_stays_zero() -> None:
    qdata, scale = ops.quantize_per_head(torch.zeros(2, 8), torch.bfloat16)
    assert not qdata.any() and not scale.any()
    assert not ops.dequantize_per_head(qdata, scale, torch.bfloat16).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_non_finite_row_reads_back_non_finite(bad: float, dtype: torch.dtype) -> None:
    x = states((4, 8), dtype)
    x[1, 3] = bad
    back = ops.dequantize_per_head(*ops.quantize_per_head(x, scale_dtype_for(dtype)), dtype)
    assert not back[1].isfinite().any()
    assert back[[0, 2, 3]].isfinite().all()


def test_float16_never_overflows() -> None:
    x = torch.full((1, 8), torch.finfo(torch.float16).max, dtype=torch.float16)
    back = ops.dequantize_per_head(*ops.quantize_per_head(x, torch.bfloat16), torch.float16)
    assert relative_distance(back, x) < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_unsupported_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32, bfloat16, float16"):
        scale_dtype_for(dtype)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize(("query_heads", "heads"), [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (32, 48)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention(
    length: int, query_heads: int, heads: int, head_dim: int, value_dim: int, softcap: float | None
) -> None:
    query = states((2, query_heads, length, head_dim), seed=1) * 2
    key, value = states((2, heads, 37, head_dim), seed=2), states((2, heads, 37, value_dim), seed=3)
    expected = expected_attention(query, key, value, softcap=softcap)
    for form in (*FORMS, "attention_decode") if length == 1 else FORMS:
        assert relative_distance(attend(form, query, key, value, softcap=softcap), expected) < 1e-5, form


def masks(batch: int, heads: int, length: int, tokens: int) -> list[Tensor]:
    """Boolean and additive masks, shared and per head, each with a row that is empty."""
    generator = torch.Generator().manual_seed(7)
    result = []
    for batches, head_count in itertools.product((1, batch), (1, heads)):
        mask = torch.rand((batches, head_count, length, tokens), generator=generator) < 0.6
        mask[..., 0] = True
        mask[0, 0, -1] = False
        result += [mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)]
    return result


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("index", range(8))
def test_attention_masks(length: int, softcap: float | None, index: int) -> None:
    query = states((2, 8, length, 64), seed=1)
    key, value = states((2, 2, 21, 64), seed=2), states((2, 2, 21, 64), seed=3)
    mask = masks(2, 8, length, 21)[index]
    expected = expected_attention(query, key, value, mask, softcap=softcap)
    for form in (*FORMS, "attention_decode") if length == 1 else FORMS:
        actual = attend(form, query, key, value, mask, softcap=softcap)
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
        if mask.dtype == torch.bool:
            assert not actual[0, 0, -1].any(), "a row that the mask leaves empty gives zeros"


@pytest.mark.parametrize("form", [*FORMS, "attention_decode"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_causal(form: str, softcap: float | None) -> None:
    length = 1 if form == "attention_decode" else 9
    query, key, value = (
        states((1, 4, length, 64)),
        states((1, 2, 9, 64), seed=2),
        states((1, 2, 9, 64), seed=3),
    )
    expected = expected_attention(query, key, value, is_causal=True, softcap=softcap)
    assert relative_distance(attend(form, query, key, value, is_causal=True, softcap=softcap), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [*FORMS, "attention_decode"])
def test_attention_16_bit(form: str, dtype: torch.dtype) -> None:
    query, key, value = (states((2, h, t, 64), dtype, seed=t) for h, t in ((8, 1), (2, 50), (2, 51)))
    value = value[:, :, :50]
    actual = attend(form, query, key, value)
    assert actual.dtype == dtype
    assert relative_distance(actual, expected_attention(query, key, value)) < (
        1e-2 if dtype == torch.bfloat16 else 2e-3
    )


@pytest.mark.parametrize("per_head", [False, True])
def test_folded_attention_equals_the_expanded_one(per_head: bool) -> None:
    """The masked grouped-query form for devices on which torch would expand keys and values."""
    query, key, value = states((2, 8, 5, 32)), states((2, 2, 11, 32), seed=1), states((2, 2, 11, 32), seed=2)
    mask = torch.rand((2, 8 if per_head else 1, 5, 11), generator=torch.Generator().manual_seed(3)) < 0.7
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(
        query, key.repeat_interleave(4, 1), value.repeat_interleave(4, 1), attn_mask=mask
    )
    actual = inductor._folded_attention(query, key, value, mask, 32**-0.5)
    assert relative_distance(actual, expected) < 1e-6
