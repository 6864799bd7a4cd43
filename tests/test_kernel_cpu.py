"""The CPU kernel against ``icw_int8kv::attention``, the pure-torch reference, on every engine that this machine has."""

import itertools
import re
import subprocess
import sys

import pytest
import torch
from attention_cases import decode, in_four_bits, keep_some, make, masks, reference

from icw_compile.formats import int8
from icw_compile.kernels import AttentionCall, StoredRows, cpu

if not cpu.is_available():
    pytest.skip("no C++ compiler", allow_module_level=True)

#: Those of this machine, by what caps them; `test_engine` reports the others as skipped.
ENGINES = {name: cpu.ENGINES.index(name) for name in cpu.engines()}
#: Relative norm of the difference from float32: rounding of the output, and for float32 that of exp and sums.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 3e-6}
HEADS = [(1, 1), (4, 4), (8, 2), (6, 2), (9, 1)]


def kernel(tensors, mask=None, is_causal=False, scale=None, softcap=None, sinks=None, engine=-1):
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.icw_int8kv_cpu.attention(*tensors, mask, is_causal, scale, softcap, sinks, engine)


def check(tensors, *args, tolerance=None, **kwargs):
    expected = reference(tensors, *args, **kwargs)
    for engine in ENGINES.values():
        actual = kernel(tensors, *args, **kwargs, engine=engine)
        assert actual.dtype == tensors[0].dtype
        assert actual.shape == expected.shape
        assert actual.is_contiguous()
        assert actual.isfinite().all()
        error = (actual.float() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error <= (tolerance or TOLERANCE[tensors[0].dtype]), (engine, error.item())


@pytest.mark.parametrize("name", cpu.ENGINES)
def test_engine(name):
    """What the library says of engines is what runs: capped, each gives the result in its own rounding."""
    if name not in ENGINES:
        pytest.skip(f"this processor, or this build, has no {name}")
    tensors = make(1, 8, 2, 2, 700, 128, 128, torch.float32)
    plain, capped = (kernel(tensors, engine=engine) for engine in (0, ENGINES[name]))
    assert torch.equal(plain, capped) == (name == "plain")
    best = list(ENGINES.values())[-1]
    assert torch.equal(kernel(tensors), kernel(tensors, engine=best))
    assert torch.equal(kernel(tensors, engine=len(cpu.ENGINES)), kernel(tensors, engine=best))
    check(tensors)


def test_engines_by_head_size():
    assert cpu.engines(128) == cpu.engines() == cpu.engines(4) == cpu.engines(256)
    without_tiles = tuple(name for name in cpu.engines() if name != "amx")
    assert cpu.engines(30) == cpu.engines(320) == cpu.engines(1024) == without_tiles
    assert cpu.engines(1025) == ("plain",)
    assert cpu.ENGINES[: len(cpu.engines())] == cpu.engines()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "head_dim,value_dim",
    [
        (64, 64),
        (80, 80),
        (96, 96),
        (128, 128),
        (256, 256),
        (128, 64),
        (40, 72),
        (192, 128),
        (30, 13),
        (320, 64),
        (6, 6),
    ],
)
def test_shapes(dtype, head_dim, value_dim):
    for index, ((query_heads, heads), tokens) in enumerate(itertools.product(HEADS, (1, 2, 5, 16))):
        length = (1, 15, 16, 63, 257, 300, 517, 1030)[index % 8]
        check(make(1 + index % 2, query_heads, heads, tokens, length, head_dim, value_dim, dtype, index))


@pytest.mark.parametrize("head_dim", [510, 512, 514, 1024, 1028])
def test_wide_heads(head_dim):
    """As latents are: one head, of which the values may be wide as well; packed, and with rows that are kept."""
    for index, (dtype, tokens) in enumerate(itertools.product(TOLERANCE, (1, 3))):
        tensors = make(2, 5, 1, tokens, 300, head_dim, head_dim - 64 * index, dtype, index)
        tensors[1][:] = torch.where(torch.rand(tensors[1].shape) < 0.5, 127, -127)  # sums as large as they can be
        check(tensors)
        packed, codes, levels = in_four_bits(tensors, ("key", "value"))
        kept, placed = keep_some(decode(levels), dtype, 5, seed=index)
        expected = reference(levels, placed=placed)
        for engine in ENGINES.values():
            arguments = (*packed, None, False, head_dim**-0.5, None, None, engine)
            actual = torch.ops.icw_int8kv_cpu.attention(*arguments, **codes, **kept)
            assert (actual.float() - expected).norm() <= 2 * TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("length", [1, 3, 17, 64, 255, 256, 257, 2047, 9000])
def test_lengths(length):
    check(make(2, 8, 2, 1, length, 128, 128, torch.bfloat16))
    check(make(1, 4, 1, 3, length, 64, 96, torch.float32))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masks(dtype, tokens):
    batch, query_heads, length = 2, 8, 1100
    tensors = make(batch, query_heads, 2, tokens, length, 64, 64, dtype)
    for name, mask in masks(batch, query_heads, tokens, length):
        try:
            check(tensors, mask)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("length", [7, 9000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sinks(dtype, length):
    for tokens in (1, 3):
        tensors = make(2, 8, 2, tokens, length, 64, 64, dtype)
        # From none to most of the softmax, and beyond what the cache's own scores could be scaled by.
        for sinks in (torch.randn(8), torch.randn(8).to(dtype) * 4 + 8, torch.tensor([-torch.inf, -200, 0, 200] * 2)):
            check(tensors, sinks=sinks)
            mask = torch.rand(2, 1, tokens, length, generator=torch.Generator().manual_seed(1)) > 0.5
            mask[1, :, 0] = False
            check(tensors, mask, sinks=sinks, softcap=5.0)
    with pytest.raises(RuntimeError, match=r"sinks must be \[8\]"):
        kernel(tensors, sinks=torch.zeros(4))


@pytest.mark.parametrize("length", [17, 300, 2100])  # one chunk of positions, and several
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kept_rows(dtype, length):
    """Rows that are kept of keys, of values or of both, in any order, with gaps, all of them or none."""
    for index, (roles, most) in enumerate(itertools.product(({"key"}, {"value"}, {"key", "value"}), (1, 5, 3000))):
        tokens = (1, 3)[index % 2]
        tensors = make(2, 8, 2, tokens, length, 64, 96, dtype, index)
        kept, placed = keep_some(decode(tensors), dtype, most, roles, seed=index)
        if index % 2:  # As they came, with what divides their channels.
            for role in roles:
                exact = kept[f"{role}_exact"]
                shift = torch.randint(0, 8, (*exact.shape[:2], 1, exact.shape[3]), dtype=torch.uint8)
                kept |= {f"{role}_exact": torch.ldexp(exact.float(), shift), f"{role}_shift": shift}
        for name, mask in [("none", None), *masks(2, 8, tokens, length)]:
            # Of a row that a mask kills with finite numbers nobody reads the output.
            if name == "all dead but finfo.min":
                continue
            for rest in ((False, 0.1, None, None), (mask is None, 0.2, 5.0, torch.randn(8))):
                expected = reference(tensors, mask, *rest, placed=placed)
                for engine in ENGINES.values():
                    actual = cpu.attention(*tensors, mask, *rest, engine, **kept).float()
                    error = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
                    assert error <= TOLERANCE[dtype], (name, roles, most, engine, error.item())


def test_kept_row_that_is_not_finite():
    """It reaches who reads it, and nobody else."""
    tensors = make(1, 4, 2, 2, length := 600, 64, 64, torch.bfloat16)
    mask = torch.ones(1, 1, 2, length, dtype=torch.bool)
    mask[:, :, 0, 500] = False
    for role in ("key", "value"):
        exact = torch.randn(1, 2, 3, 64)
        exact[:, 1, 2] = torch.inf
        kept = {f"{role}_exact": exact, f"{role}_position": torch.tensor([9, -1, 500])}
        for engine in ENGINES.values():
            output = cpu.attention(*tensors, mask, False, 0.2, None, None, engine, **kept)
            assert output[:, :, 0].isfinite().all() and output[:, :2].isfinite().all()
            assert not output[:, 2:, 1].isfinite().any()


def test_empty_rows_are_zero():
    tensors = make(1, 4, 2, 2, 600, 64, 64, torch.bfloat16)
    mask = torch.ones(1, 1, 2, 600, dtype=torch.bool)
    mask[:, :, 1] = False
    for engine in ENGINES.values():
        output = kernel(tensors, mask, engine=engine)
        assert (output[:, :, 1] == 0).all()
        assert (output[:, :, 0] != 0).any()


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_causal_and_softcap(tokens):
    for length in (4, 40, 700):
        tensors = make(1, 8, 2, tokens, length, 128, 128, torch.float32)
        check(tensors, is_causal=True)
        check(tensors, None, False, 1.0, 20.0)
        check(tensors, torch.rand(1, 1, tokens, length) > 0.3, True, 0.2, 5.0)


def test_strides():
    tensors = make(2, 8, 4, 2, 900, 128, 128, torch.bfloat16)
    query, key, key_scale, value, value_scale = tensors
    # A slice along the positions, every second position, heads behind the positions, a slice of the heads.
    check([query, key[:, :, 100:633], key_scale[:, :, 100:633], value[:, :, 7:540], value_scale[:, :, 7:540]])
    check([query, *(t[:, :, ::2] for t in tensors[1:])])
    check(
        [
            query.transpose(1, 2).contiguous().transpose(1, 2),
            *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[1:]),
        ]
    )
    check([query[:, ::2], *(t[:, 1:3] for t in tensors[1:])])
    check([query[..., :64], key[..., 17:81], key_scale, value[..., 3:100], value_scale])
    check([query, *(t[:, :1].expand(-1, 4, -1, -1) for t in tensors[1:])])


def test_scales_of_any_magnitude():
    for magnitude in (1e-12, 1e12):
        tensors = make(1, 8, 2, 1, 700, 128, 128, torch.float32)
        tensors[0], tensors[2] = tensors[0] * magnitude, tensors[2] / magnitude
        tensors[4] = tensors[4] * magnitude
        check(tensors)


def test_sharp_and_flat_weights():
    tensors = make(1, 8, 2, 1, 5000, 128, 128, torch.float32)
    # Float32 cannot do better than this on scores in the hundreds.
    check(tensors, scale=3.0, tolerance=1e-4)
    check(tensors, scale=1e-6)
    tensors = make(1, 8, 2, 1, 5000, 128, 128, torch.bfloat16)
    check(tensors, scale=3.0)
    check(tensors, scale=1e-6)
    # One value row dwarfs the others of its block, and has no weight.
    tensors[4][:, :, 17] *= 1000
    mask = torch.zeros(1, 1, 1, 5000)
    mask[..., 17] = -20.0
    check(tensors, mask)


def test_outlier_channels():
    """Keys and queries with channels a hundred times the others keep the small channels' part of the score."""
    tensors = make(1, 8, 2, 1, 700, 128, 128, torch.bfloat16)
    tensors[0][..., 5] = 300.0
    tensors[1][..., 5] = 0
    check(tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("times", [4, 8, 9, 16, 20, 24, 64, 1000])
@pytest.mark.parametrize("size", [64, 8, 12, 16])
def test_queries_that_reach_far(dtype, times, size):
    """One channel of some queries is this many times the others: where they take two digits, and where three.

    Keys have nothing there, so that all of the score comes from the channels that lose most. Query heads of a group
    are of every number that rows are taken in.
    """
    for group, spread in itertools.product((1, 2, 3, 7, 9, 15), (0.125, 1.0)):
        tensors = make(1, group, 1, 1, 300, size, size, dtype, seed=group)
        tensors[0][:, group // 2 :, :, 5] = times * tensors[0].abs().mean()
        tensors[1][..., 5] = 0
        check(tensors, scale=spread)


def test_negative_scales():
    tensors = make(1, 8, 2, 2, 700, 128, 128, torch.float32)
    tensors[4][:, :, 300] *= -1
    tensors[2][:, :, 400] *= -1
    check(tensors)


@pytest.mark.parametrize("which", [2, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_rows(which, bad):
    for length in (600, 9000):
        tensors = make(1, 4, 2, 2, length, 64, 64, torch.bfloat16)
        position = length - 50
        tensors[which][:, 1, position] = bad
        tensors[which - 1][:, 1, position] = 0
        for engine in ENGINES.values():
            output = kernel(tensors, engine=engine)
            assert output[:, :2].isfinite().all()
            assert not output[:, 2:].isfinite().any()
            # Masked for the first token only.
            mask = torch.ones(1, 1, 2, length, dtype=torch.bool)
            mask[:, :, 0, position] = False
            output = kernel(tensors, mask, engine=engine)
            assert output[:, :, 0].isfinite().all()
            assert not output[:, 2:, 1].isfinite().any()


def test_non_finite_query_and_mask():
    tensors = make(1, 4, 2, 2, 600, 64, 64, torch.bfloat16)
    tensors[0][0, 1, 1, 3] = torch.nan
    tensors[0][0, 2, 0, 3] = torch.inf
    mask = torch.zeros(1, 4, 2, 600)
    mask[0, 3, 0, 5] = torch.nan
    for engine in ENGINES.values():
        broken = ~kernel(tensors, mask, engine=engine).isfinite()
        expected = torch.zeros(1, 4, 2, dtype=torch.bool)
        expected[0, 1, 1] = expected[0, 2, 0] = expected[0, 3, 0] = True
        assert torch.equal(broken, expected.unsqueeze(-1).expand_as(broken))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads):
    tensors = make(1, 8, 2, 1, 20000, 64, 64, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(tensors)
        first = kernel(tensors)
        assert all(torch.equal(first, kernel(tensors)) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def test_empty_cache_and_batch():
    tensors = make(1, 4, 2, 1, 8, 64, 64, torch.bfloat16)
    output = kernel([tensors[0], *(t[:, :, :0] for t in tensors[1:])])
    assert (output == 0).all()
    assert kernel([t[:0] for t in tensors]).shape == (0, 4, 1, 64)


def test_keys_without_channels():
    """Scores are all zero: the mean of the values."""
    tensors = make(1, 4, 2, 1, 8, 4, 64, torch.float32)
    tensors[0], tensors[1] = tensors[0][..., :0], tensors[1][..., :0]
    check(tensors, scale=1.0)


def test_largest_numbers_of_float16():
    """A scale that is rounded up makes no infinity of them: they are as they read back."""
    tensors = make(1, 4, 2, 1, 20, 64, 64, torch.float16)
    tensors[3:5] = int8.quantize_per_head(torch.full((1, 2, 20, 64), 65504.0), torch.bfloat16)
    assert decode(tensors)[1].max() > 65520
    for engine in ENGINES.values():
        assert (kernel(tensors, engine=engine) == 65504).all()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.__setitem__(1, t[1][:, :, :, :32]), "key_qdata must be"),
        (lambda t: t.__setitem__(1, t[1].float()), "must be int8"),
        (lambda t: t.__setitem__(1, t[1].transpose(2, 3).contiguous().transpose(2, 3)), "contiguous"),
        (lambda t: t.__setitem__(2, t[2][:, :, 1:]), "key_scale must be"),
        (lambda t: t.__setitem__(0, t[0][:, :3]), "cannot be grouped"),
        (lambda t: t.__setitem__(0, t[0].double()), "query must be"),
        (lambda t: t.__setitem__(0, t[0][0]), "4 dimensions"),
    ],
)
def test_errors(change, message):
    tensors = make(1, 4, 2, 1, 100, 64, 64, torch.bfloat16)
    change(tensors)
    with pytest.raises(RuntimeError, match=message):
        kernel(tensors)


def test_mask_that_does_not_broadcast():
    tensors = make(1, 4, 2, 1, 100, 64, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match="does not broadcast"):
        kernel(tensors, torch.ones(1, 1, 1, 99, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="unsupported dtype of attn_mask"):
        kernel(tensors, torch.ones(1, 1, 1, 100, dtype=torch.int32))


def test_operator_registration():
    tensors = make(1, 4, 2, 2, 100, 64, 32, torch.bfloat16)
    mask = torch.rand(1, 1, 2, 100) > 0.5
    kept, _ = keep_some(decode(tensors), torch.bfloat16)
    for named in ({}, kept):
        torch.library.opcheck(cpu.attention, (*tensors, mask, False, 0.1, None), named)


def test_compiles_with_symbolic_length():
    @torch.compile(dynamic=True, fullgraph=True)
    def step(query, key, key_scale, value, value_scale):
        return kernel([query * 2, key, key_scale, value, value_scale], scale=0.1) + 1

    for length in (100, 130):
        tensors = make(1, 4, 2, 1, length, 64, 64, torch.bfloat16)
        expected = kernel([tensors[0] * 2, *tensors[1:]], scale=0.1) + 1
        assert torch.equal(step(*tensors), expected)


def call(tensors, attn_mask=None, **others):
    query, *parts = tensors
    return AttentionCall(query, StoredRows.int8(*parts[:2]), StoredRows.int8(*parts[2:]), attn_mask, **others)


def test_takes():
    tensors = make(2, 4, 2, 16, 100, 64, 32, torch.bfloat16)
    masks = (
        torch.ones(2, 4, 16, 100, dtype=torch.bool),
        torch.zeros(1, 1, 1, 100),
        torch.zeros(2, 1, 16, 1, dtype=torch.float64),
        torch.zeros(1, 4, 1, 100, dtype=torch.float16),
    )
    for mask in (None, *masks):
        for others in ({}, {"is_causal": True, "softcap": 3.0, "sinks": torch.zeros(4, dtype=torch.bfloat16)}):
            assert cpu.declines(call(tensors, mask, **others)) is None
            others = {"is_causal": False, "softcap": None, "sinks": None, **others}
            kernel(tensors, mask, **others)  # and it does take them


#: What is changed of a call that the kernel takes -> what the reason says; the operator refuses each at run time.
DECLINED = [
    (lambda t: t.__setitem__(0, t[0].double()), {}, "queries of dtype torch.float64"),
    (lambda t: t.__setitem__(0, t[0][0]), {}, "the query has 3 dimensions"),
    (lambda t: t.__setitem__(0, t[0][:, :3]), {}, "3 query heads cannot be grouped on 2"),
    (lambda t: t.__setitem__(0, t[0][..., :32]), {}, r"the keys of shape \[1, 2, 100, 64\], which is not"),
    (lambda t: t.__setitem__(1, t[1].float()), {}, "unsupported dtype of the keys: torch.float32"),
    (lambda t: t.__setitem__(1, t[1].transpose(2, 3).contiguous().transpose(2, 3)), {}, "the channels of the keys"),
    (lambda t: t.__setitem__(3, t[3].transpose(2, 3).contiguous().transpose(2, 3)), {}, "the channels of the values"),
    (lambda t: t.__setitem__(2, t[2][:, :, 1:]), {}, "the scales of the keys of shape"),
    (lambda t: t.__setitem__(4, t[4].to(torch.int32)), {}, "unsupported dtype of the scales of the values"),
    (lambda t: None, {"attn_mask": torch.zeros(1, 1, 1, 100, dtype=torch.int64)}, "dtype of attn_mask: torch.int64"),
    (lambda t: None, {"attn_mask": torch.zeros(1, 1, 1, 100, dtype=torch.uint8)}, "dtype of attn_mask: torch.uint8"),
    (lambda t: None, {"attn_mask": torch.zeros(1, 1, 1, 100).to(torch.float8_e5m2)}, "dtype of attn_mask"),
    (lambda t: None, {"attn_mask": torch.zeros(1, 100)}, "does not broadcast to"),
    (lambda t: None, {"attn_mask": torch.zeros(1, 1, 1, 99)}, "does not broadcast to"),
    (lambda t: None, {"sinks": torch.zeros(2)}, r"sinks of shape \[2\], which is not \[4\]"),
    (lambda t: None, {"sinks": torch.zeros(4, dtype=torch.int32)}, "unsupported dtype of sinks"),
]


@pytest.mark.parametrize(("change", "others", "reason"), DECLINED)
def test_declines_what_it_refuses(change, others, reason):
    tensors = make(1, 4, 2, 1, 100, 64, 64, torch.bfloat16)
    assert cpu.declines(call(tensors)) is None
    change(tensors)
    assert re.search(reason, cpu.declines(call(tensors, **others)))
    with pytest.raises(RuntimeError):
        kernel(tensors, others.get("attn_mask"), sinks=others.get("sinks"))


def test_declines_by_choice():
    tensors = make(1, 4, 2, 1, 100, 64, 64, torch.bfloat16)
    prompt = [tensors[0].expand(-1, -1, 17, -1), *tensors[1:]]
    assert cpu.declines(call(prompt)) == "a prompt: more than 16 query tokens"
    on_meta = [tensor.to("meta") for tensor in tensors]
    assert cpu.declines(call(on_meta)) == "the query is on meta, and the kernel is for cpu"
    assert "attn_mask on meta" in cpu.declines(call(tensors, torch.zeros(1, 1, 1, 100, device="meta")))
    query, key = tensors[0], StoredRows.int8(*tensors[1:3])
    packed = StoredRows("fp8", {"qdata": tensors[3], "scale": tensors[4]})
    assert "values are stored as fp8" in cpu.declines(AttentionCall(query, key, packed))
    zeros = StoredRows("int8", {**key.parts, "zero_point": tensors[2]})
    assert "keys are not int8 rows: zero_point" in cpu.declines(AttentionCall(query, zeros, key))


def test_declines_symbolic_sizes():
    """A symbolic length is taken; a symbolic number of query tokens is declined with a text of its own."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):
        length, tokens = (shape_env.create_unbacked_symint() for _ in range(2))
        rows = [torch.empty(2, 2, length, size, dtype=d) for size, d in ((64, torch.int8), (1, torch.bfloat16))]
        one, several = (torch.empty(2, 4, count, 64, dtype=torch.bfloat16) for count in (1, tokens))
        mask = torch.empty(2, 1, 1, length, dtype=torch.bool)
        assert cpu.declines(call([one, *rows, *rows], mask)) is None
        reason = cpu.declines(call([several, *rows, *rows]))
        assert reason == "a symbolic number of query tokens: the kernel is for at most 16"
        other = torch.empty(2, 1, 1, length + 1, dtype=torch.bool)
        assert "does not broadcast" in cpu.declines(call([one, *rows, *rows], other))


def prompt_case(batch, query_heads, heads, tokens, length, head_dim, value_dim, dtype, seed=0):
    """Queries and rows as projections give them, tokens before heads."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (query_heads, tokens, head_dim), (heads, length, head_dim), (heads, length, value_dim)
    return [
        torch.randn(batch, size, many, channels, generator=generator).to(dtype).transpose(1, 2)
        for many, size, channels in sizes
    ]


def check_prompt(query, key, value, mask, is_causal, scale=0.2, tolerance=None):
    tokens, length, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key_of_each, value_of_each = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = query.double() @ key_of_each.transpose(2, 3) * scale
    seen = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens) if is_causal else mask
    if seen is not None:
        scores = torch.where(seen, scores, -torch.inf) if seen.dtype == torch.bool else scores + seen
    expected = (scores.softmax(dim=-1).nan_to_num() @ value_of_each).float()
    for engine in ENGINES.values():
        made = torch.ops.icw_int8kv_cpu.prompt(query, key, value, mask, is_causal, scale, engine)
        assert made.is_contiguous() and made.dtype == query.dtype
        actual = made.transpose(1, 2)
        assert actual.shape == expected.shape
        assert actual.isfinite().all()
        error = (actual.float() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error <= (tolerance or 2 * TOLERANCE[query.dtype]), (engine, error.item())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "head_dim,value_dim", [(64, 64), (80, 80), (128, 64), (40, 72), (256, 256), (33, 47), (320, 64)]
)
def test_prompts(dtype, head_dim, value_dim):
    for index, ((query_heads, heads), tokens) in enumerate(itertools.product(HEADS, (1, 17, 150, 300))):
        length = tokens + (0, 1, 255, 256, 900)[index % 5]
        tensors = prompt_case(1 + index % 2, query_heads, heads, tokens, length, head_dim, value_dim, dtype, index)
        check_prompt(*tensors, None, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prompts_with_masks(dtype):
    for tokens, length in ((20, 20), (130, 400), (70, 1500)):
        for name, mask in masks(2, 6, tokens, length):
            if name != "all dead but finfo.min":  # Of that torch makes a mean.
                check_prompt(*prompt_case(2, 6, 2, tokens, length, 64, 96, dtype), mask, False)
    # Of a batch, some of which is padded, and rows that see nothing.
    tokens, length = 90, 700
    causal = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
    padded = torch.stack([causal, causal & (torch.arange(length) > 650)])[:, None]
    check_prompt(*prompt_case(2, 6, 2, tokens, length, 64, 64, dtype), padded, False)
    assert not padded.any(dim=-1).all()


def test_prompts_of_any_layout_and_scale():
    query, key, value = prompt_case(2, 6, 2, 50, 333, 64, 64, torch.bfloat16)
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)]
    check_prompt(*strided, None, True)
    check_prompt(query, key.expand(2, -1, -1, -1), value[:, :1].expand_as(value), None, True)
    check_prompt(query, key, value, None, True, scale=3.0)
    check_prompt(query * 1e-3, key * 1e-3, value * 1e9, None, True)
    check_prompt(*prompt_case(1, 2, 1, 30, 0, 64, 64, torch.bfloat16), None, False)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_prompt_that_is_not_finite(which, bad):
    """Who reads it gets NaN, and nobody else does: in a block that is read in pairs, and in one that is not read."""
    query, key, value = prompt_case(1, 4, 2, 300, 600, 64, 64, torch.bfloat16)
    {"query": query[:, 1, 250], "key": key[:, 1, 590], "value": value[:, 1, 590]}[which][..., 3] = bad
    for engine in ENGINES.values():
        made = torch.ops.icw_int8kv_cpu.prompt(query, key, value, None, True, 0.1, engine).transpose(1, 2)
        nan = made.isnan().any(dim=-1)
        expected = torch.zeros(1, 4, 300, dtype=torch.bool)
        if which == "query":
            expected[:, 1, 250] = True
        else:
            expected[:, 2:, 290:] = True
        assert torch.equal(nan, expected)


def test_prompts_on_any_number_of_threads():
    tensors = prompt_case(2, 8, 2, 400, 2500, 64, 64, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made = torch.ops.icw_int8kv_cpu.prompt(*tensors, None, True, 0.1)
            if threads == 1:
                first = made
            assert torch.equal(made, first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda q, k, v: (q, k[:, :, :5], v[:, :, :5]), "20 causal queries of 5 rows"),
        (lambda q, k, v: (q, k[..., :8], v), "key must be"),
        (lambda q, k, v: (q[:, :3], k, v), "cannot be grouped"),
    ],
)
def test_prompts_that_do_not_fit(change, message):
    tensors = change(*prompt_case(1, 4, 2, 20, 30, 16, 16, torch.float32))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.icw_int8kv_cpu.prompt(*tensors, None, True, 1.0)


WITHOUT_MEMORY = """
import resource, torch
from icw_compile.kernels import cpu
cpu.load()
torch.set_num_threads(2)
def call(heads):
    query = torch.zeros(64, 1, 1, 256).expand(64, heads, 1, 256)
    rows, scale = torch.zeros(64, 1, 64, 256, dtype=torch.int8), torch.ones(64, 1, 64, 1)
    return cpu.attention(query, rows, scale, rows[..., :1], scale, None, False, 1.0, None)
call(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), -1))
try:
    call(1 << 16)  # each thread would need 300 MiB, and the output 16
except (MemoryError, RuntimeError) as error:
    print(repr(error))
print(call(1).shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_too_little_memory_is_an_error():
    process = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    message, shape = process.stdout.strip().splitlines()
    kind = "MemoryError" if torch.__version__ < "2.15" else "RuntimeError"
    assert message.startswith(f"{kind}('no memory for what the threads")
    assert shape == "torch.Size([64, 1, 1, 1])"
