"""Four bits: the format and its C++ against their definition, the kernel and whole models against a reference."""

import io
import itertools
from typing import Any

import pytest
import torch
from attention_cases import keep_some
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CLOSE_LOGITS, EAGER, MODELS, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

import icw_compile
from icw_compile import QuantizedKV
from icw_compile.formats import make_format
from icw_compile.formats.int4 import halves_to_levels, quantize_halves
from icw_compile.kernels import cpu
from icw_compile.lab.reference import dynamic_reference_cache, four_bits, reference_cache
from icw_compile.options import split_options

_ops = torch.ops.icw_int8kv
needs_library = pytest.mark.skipif(not cpu.is_available(), reason="no C++ compiler")


def levels(code: int) -> list[int]:
    """The table of a code, as the module defines it."""
    i, middle = code >> 4, (code & 15) - 8
    width = 32 - i - max(i - 8, 0)
    return [((2 * index - 15 + middle) * width * 11 + 32) >> 6 for index in range(16)]


def test_tables() -> None:
    packed = torch.arange(16).to(torch.uint8) * 17  # the same index in both halves
    for code in range(256):
        found = halves_to_levels(packed, torch.tensor([code, 255 - code], dtype=torch.uint8))
        assert found.dtype == torch.int8 and found.tolist() == levels(code) + levels(255 - code)
    assert min(map(min, map(levels, range(256)))) == -126 and max(map(max, map(levels, range(256)))) == 121


@st.composite
def rows(draw: Any) -> Tensor:
    """Rows of very different sizes, off center, constant, of one number, of zeros in one half or both."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = 2 * draw(st.sampled_from([1, 2, 3, 8, 16, 31, 32, 40, 64, 130]))
    x = torch.randn(draw(st.integers(1, 3)), 2, draw(st.integers(0, 5)), size, generator=generator)
    x = x * 2.0 ** draw(st.integers(-30, 12)) + draw(st.sampled_from([0.0, 0.0, 1.0, -30.0]))
    kind = draw(st.sampled_from(["", "", "zeros", "half", "one", "constant", "turned"]))
    if kind == "zeros":
        x[:, 0] = 0.0
    elif kind == "half":
        x[..., : size // 2] = 0.0
    elif kind == "one":
        x[..., 1:] = 0.0
    elif kind == "constant":
        x = x[..., :1].expand_as(x).contiguous()
    elif kind == "turned":
        x = x.transpose(0, 2)
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(rows())
def test_reads_back_what_the_definition_says(x: Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed, scale, codes = quantize_halves(x, dtype)
        read = halves_to_levels(packed, codes).float() * scale.float()
        finite = scale.isfinite().expand_as(read)
        assert torch.equal(read[finite], four_bits(x.float(), dtype)[finite])
        # No half is further off than half of a step of the widest table, which clips nothing but what the rounding of
        # the scale takes; a level is rounded besides.
        off = (read - x.float()).unflatten(-1, (2, -1)).square().mean(-1).sqrt()
        assert (off <= 6.6 * scale.float())[scale.isfinite().expand_as(off)].all()


def test_takes_nearly_the_best_of_all_tables() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    packed, scale, codes = quantize_halves(x, torch.float32)
    units = (x / scale).unflatten(-1, (2, -1))
    found = (halves_to_levels(packed, codes).unflatten(-1, (2, -1)) - units).square().sum(-1)
    tables = torch.tensor([levels(code) for code in range(256)])
    best = torch.stack([(units.unsqueeze(-1) - t).abs().amin(-1).square().sum(-1) for t in tables]).amin(0)
    assert (found >= best - 1e-3).all() and found.sum() < 1.03 * best.sum()


@needs_library
@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(rows(), st.sampled_from([None, float("nan"), float("inf")]))
def test_every_bit_is_that_of_torch(x: Tensor, broken: float | None) -> None:
    if broken is not None and x.numel():
        x = x.clone()
        x[0, 0, 0, -1] = broken
    cpu.load()
    for dtype in (torch.float32, torch.bfloat16):
        expected, actual = quantize_halves(x, dtype), _ops.quantize_halves_cpu(x, dtype)
        finite = expected[1].isfinite()
        assert torch.equal(finite, actual[1].isfinite())
        for one, other in zip(actual, expected, strict=True):
            assert one.shape == other.shape and one.is_contiguous()
            assert torch.equal(torch.where(finite, one, 0), torch.where(finite, other, 0))


def test_rows_that_are_not_finite_read_so() -> None:
    x = torch.randn(1, 1, 3, 8)
    x[0, 0, 1, 2], x[0, 0, 2, 7] = float("nan"), float("-inf")
    read = QuantizedKV.encode(x, make_format(torch.float32, bits=4)).dequantize()
    assert read[0, 0, 0].isfinite().all() and not read[0, 0, 1:].isfinite().any()


#: Bytes of keys and values together over those of bfloat16: bits of keys, bits of values, head size -> at most.
BYTES = {(4, 4, 128): 0.27, (4, 4, 64): 0.285, (8, 4, 128): 0.39}


@pytest.mark.parametrize(("keys", "values", "size"), BYTES)
def test_bytes(keys: int, values: int, size: int) -> None:
    stored = 0
    for bits in (keys, values):
        layout = make_format(torch.bfloat16, bits=bits)
        made = QuantizedKV.empty((1, 2, 100, size), layout, torch.device("cpu"))
        assert made.stored_bytes == 100 * layout.bytes_per_token(2, size)
        stored += made.stored_bytes
    assert stored / (2 * 2 * 100 * size * 2) <= BYTES[keys, values, size]


def test_heads_of_an_odd_size_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="even size, and not of 7 channels"):
        QuantizedKV.empty((1, 1, 4, 7), make_format(torch.float32, bits=4), torch.device("cpu"))
    with pytest.raises(ValueError, match="5 bits"):
        make_format(torch.float32, bits=5)


def test_moves_and_writes() -> None:
    """What is moved is exactly what it was, what is written is rounded once, and a saved cache is the same."""
    layout = make_format(torch.float32, bits=4, equalize=True)
    x = torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(0))
    q = QuantizedKV.encode(x, layout)
    before = q.dequantize()
    for move in (
        lambda x: x[:, :, 2:5],
        lambda x: x.index_select(0, torch.tensor([1, 0, 1])),
        lambda x: x[:, :, None].expand(2, 3, 2, 9, 16).reshape(2, 6, 9, 16),
        lambda x: x.roll(3, 2),
        lambda x: x[..., :5],
        lambda x: x.transpose(1, 2),
    ):
        assert torch.equal(torch.as_tensor(move(q) + 0.0), move(before))
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).dequantize(), before)
    new = torch.randn(2, 3, 2, 16, generator=torch.Generator().manual_seed(1))
    grown = torch.cat([q, new], 2)
    assert grown.format == layout and torch.equal(grown[:, :, :9].dequantize(), before)
    q.index_copy_(2, torch.tensor([3, 4]), new)
    assert torch.equal(q.dequantize()[:, :, 3:5], grown.dequantize()[:, :, 9:])
    assert torch.equal(q.dequantize()[:, :, 5:], before[:, :, 5:])
    assert relative_distance(q.half().dequantize(), q.dequantize()) < 0.05
    with pytest.raises(ValueError, match="codes must be"):
        layout.checked([*q.parts[:2], q.parts[2].int(), *q.parts[3:]], q.shape)


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
CALLS = [
    (*sizes, dtype)
    for sizes, dtype in itertools.product(
        [(1, 1, 1, 1, 1, 2, 2), (1, 4, 2, 1, 300, 64, 64), (2, 6, 2, 3, 517, 96, 32), (1, 3, 3, 16, 80, 128, 130)],
        [torch.float32, torch.bfloat16, torch.float16],
    )
]


@needs_library
@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize(("batch", "query_heads", "heads", "tokens_", "length", "size", "value_size", "dtype"), CALLS)
def test_kernel(
    batch: int, query_heads: int, heads: int, tokens_: int, length: int, size: int, value_size: int,
    dtype: torch.dtype, key_bits: int, value_bits: int,
) -> None:  # fmt: skip
    """Every engine, with and without a mask, on rows that lie as in a cache with room behind them."""
    generator = torch.Generator().manual_seed(size)
    query = torch.randn(batch, query_heads, tokens_, size, generator=generator).to(dtype)
    stored, decoded = [], []
    for channels, bits in ((size, key_bits), (value_size, value_bits)):
        x = torch.randn(batch, heads, length + 5, channels, generator=generator).to(dtype)
        value = QuantizedKV.encode(x, make_format(dtype, bits=bits)).value
        stored.append([part[:, :, :length] for part in value.parts])
        as_float = make_format(torch.float32, bits=bits)
        decoded.append(as_float.decode(icw_compile.formats.evaluate.EAGER, value, torch.float32)[:, :, :length])
    (keys, key_scale, *key_codes), (values, value_scale, *value_codes) = stored
    named = dict(zip(["key_codes"], key_codes)) | dict(zip(["value_codes"], value_codes))
    mask = torch.rand(batch, 1, tokens_, length, generator=generator) < 0.7
    mask[..., 0] = True
    kept, placed = keep_some(decoded, dtype)
    for attn_mask, exact in ((None, {}), (mask, {}), (None, kept), (mask, kept)):
        expected = _ops.attention(query.float(), *(placed if exact else decoded), attn_mask, False, size**-0.5, None)
        rows = (query, keys, key_scale, values, value_scale)
        for engine in range(len(cpu.engines(size))):
            actual = cpu.attention(*rows, attn_mask, False, size**-0.5, None, None, engine, **named, **exact)
            assert actual.dtype == dtype
            error = relative_distance(actual, expected)
            assert error < TOLERANCE[dtype], (engine, error)


#: One of each kind of cache, of bits, of lowering, with and without rows that are kept, runs always.
ALWAYS = (
    ("llama", "static", 4, 4, "auto", 0),
    ("llama", "dynamic", 8, 4, "auto", 6),
    ("gemma2", "made", 4, 8, "inductor", 6),
)
MODEL_CALLS = [
    pytest.param(*call, marks=() if call in ALWAYS else pytest.mark.slow)
    for call in itertools.product(
        ("llama", "gemma2"), ("static", "dynamic", "made"), (4, 8), (4, 8), ("auto", "inductor"), (0, 6)
    )
    if call[2:4] != (8, 8)
]


@pytest.mark.parametrize(("name", "kind", "key_bits", "value_bits", "attention", "recent"), MODEL_CALLS)
def test_model(name: str, kind: str, key_bits: int, value_bits: int, attention: str, recent: int) -> None:
    bits = {"key_bits": key_bits, "value_bits": value_bits}
    settings = {**bits, "recent_tokens": recent}
    model, ids, chunks = (
        tiny_model(name, attention="eager" if name == "gemma2" else "sdpa"),
        tokens(29),
        (20, 1, 1, 6, 1),
    )
    options: dict[str, Any] = {**EAGER, "icw.attention": attention, "icw.strict": True}
    if kind == "made":
        cache = icw_compile.static_cache(model, 1, 32, **settings)
    else:
        options |= {f"icw.{name}": count for name, count in settings.items()}
        cache = StaticCache(model.config, max_cache_len=32) if kind == "static" else DynamicCache(config=model.config)
    actual = run(torch.compile(model, backend="icw_int8kv", options=options), cache, ids, chunks)
    dynamic = kind == "dynamic"
    expected_cache = dynamic_reference_cache(model, **settings) if dynamic else reference_cache(model, 32, **settings)
    assert relative_distance(actual, run(model, expected_cache, ids, chunks)) <= CLOSE_LOGITS
    for layer in cache.layers:
        assert [str(x.format)[:4] for x in (layer.keys, layer.values)] == [f"int{n}" for n in bits.values()]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_through_inductor_decodes_in_four_bits(name: str) -> None:
    """Decode reads the packed rows inside its sums: no layer is decoded as a whole."""
    model = tiny_model(name, attention="eager")
    explained = icw_compile.explain(
        model,
        options={"icw.bits": 4, "icw.recent_tokens": 0, "icw.attention": "inductor"},
        input_ids=tokens(1),
        past_key_values=icw_compile.static_cache(model, 1, 64, bits=4, recent_tokens=0),
    )
    assert {site.lowering for graph in explained.graphs for site in graph.sites} == {"inductor decode"}
    assert not any("dequantize_halves" in graph.rewritten for graph in explained.graphs)


@needs_library
@pytest.mark.parametrize("kind", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_compiled_by_inductor(kind: str) -> None:
    model, ids, chunks = tiny_model(dtype=torch.bfloat16), tokens(23), (20, 1, 1, 1)
    cache = StaticCache(model.config, max_cache_len=32) if kind == "static" else DynamicCache(config=model.config)
    call = torch.compile(model, backend="icw_int8kv", options={"icw.bits": 4, "icw.recent_tokens": 4})
    actual = run(call, cache, ids, chunks)
    bits = {"key_bits": 4, "value_bits": 4, "recent_tokens": 4}
    expected_cache = dynamic_reference_cache(model, **bits) if kind == "dynamic" else reference_cache(model, 32, **bits)
    assert relative_distance(actual, run(model, expected_cache, ids, chunks)) < 0.02
    assert {site.lowering for graph in graphs() for site in graph.sites} == {"as it came", "cpu kernel"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"icw.bits": 4, "icw.eight_bit_layers": "first"}, ["88", "44", "44"]),
        ({"icw.value_bits": 4, "icw.eight_bit_layers": [1, "last"]}, ["84", "88", "88"]),
        ({"icw.bits": 4, "icw.key_bits": 8}, ["84", "84", "84"]),
        ({"icw.bits": 4, "icw.skip_layers": 1}, ["44", "", "44"]),
    ],
    ids=str,
)
def test_layers_have_bits_of_their_own(options: dict[str, Any], expected: list[str]) -> None:
    model = tiny_model(num_hidden_layers=3)
    cache = DynamicCache(config=model.config)
    run(torch.compile(model, backend="icw_int8kv", options={**EAGER, **options}), cache, tokens(6), (5, 1))
    found = [
        "".join(str(x.format)[3] for x in (layer.keys, layer.values) if isinstance(x, QuantizedKV))
        for layer in cache.layers
    ]
    assert found == expected
    (title,) = (line for line in str(icw_compile.report()).splitlines() if "graph 0" in line)
    bits = [n for n in "84" if n in "".join(expected)]
    assert f"key/value sites in {' and '.join(f'int{n}' for n in bits)}" in title


@pytest.mark.keeps_recent
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (32, 32)),
        ({"bits": 4}, (128, 128)),
        ({"value_bits": 4}, (32, 128)),
        ({"bits": 4, "recent_tokens": 0}, (0, 0)),
        ({"recent_tokens": 0}, (0, 0)),
        ({"key_bits": 4, "sink_tokens": 3}, (131, 35)),
        ({"value_bits": 4, "recent_tokens": 7}, (7, 7)),
    ],
    ids=str,
)
def test_recent_rows_where_nobody_says(options: dict[str, int], expected: tuple[int, int]) -> None:
    """The last 128 of what is stored in 4 bits, and the last 32 of 8."""
    model = tiny_model()
    made, cache = icw_compile.static_cache(model, 1, 8, **options), DynamicCache(config=model.config)
    of_backend = {f"icw.{name}": value for name, value in options.items()}
    run(torch.compile(model, backend="icw_int8kv", options={**EAGER, **of_backend}), cache, tokens(6), (5, 1))
    for layer in (*made.layers, *cache.layers):
        kept = [len(x.position) if "keeps" in str(x.format) else 0 for x in (layer.keys, layer.values)]
        assert tuple(kept) == expected


@pytest.mark.keeps_recent
def test_recent_rows_on_an_accelerator() -> None:
    """None of 8 bits."""
    dtype = torch.bfloat16
    for device, of_eight in (("cpu", 32), ("meta", 32), ("cuda", 0), ("mps", 0)):
        for options, bits in (({}, 8), ({"icw.bits": 4}, 4)):
            made = str(split_options(options, None)[0].format_for(dtype, "key", torch.device(device)))
            kept = of_eight if bits == 8 else 128
            assert made.endswith(f"keeps 0+{kept}") if kept else "keeps" not in made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"icw.bits": 5}, "it takes one of: 8, 4"),
        ({"icw.key_bits": "4"}, "it takes one of: 'auto', 8, 4"),
        ({"icw.bits": True}, "it takes one of"),
        ({"icw.eight_bit_layers": "middle"}, "'sliding'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="icw_int8kv", options=options)(tokens(4))
