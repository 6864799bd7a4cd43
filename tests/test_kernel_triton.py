"""The Triton kernels against ``icw_int8kv::attention``, the pure-torch reference.

On a CUDA device these are the kernels themselves. Without one they run in Triton's interpreter (`conftest.py` switches
it on), and are compiled for two architectures, which needs no device; what only a GPU can show is skipped.
"""

from dataclasses import replace

import pytest
import torch
from attention_cases import decode, in_four_bits, keep_some, make, masks, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from support import graphs, relative_distance, run, tiny_model, tokens
from torch._dynamo.utils import counters

import icw_compile
from icw_compile.errors import KernelUnavailableError
from icw_compile.formats import int8
from icw_compile.formats.int4 import halves_to_levels
from icw_compile.formats.kept import place_rows
from icw_compile.kernels import AttentionCall, StoredRows, find_kernel, gpu, launch
from icw_compile.lab.reference import reference_cache

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from machine_code import compile_for

from icw_compile.kernels.attention_triton import _sharing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
if DEVICE == "cpu":
    torch.library.impl("icw_int8kv_triton::attention", "CPU", gpu.attention_triton)

#: Relative norm of the difference from float32: rounding of the weights and of the output. Triton's interpreter cuts
#: bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.bfloat16: 2.5e-3 if DEVICE == "cuda" else 2**-7, torch.float16: 4e-4, torch.float32: 3e-6}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
#: Of plain decode and prompts float16 is alike; masks, 4 bits and tensors of other layouts have it as well.
FEWER_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
#: What is stored in 4 bits. The rest of the file is about rows of 8 where it says nothing else.
FOUR_BITS = (("key", "value"), ("key",), ("value",))
BITS = pytest.mark.parametrize("four_bits", FOUR_BITS, ids=("44", "48", "84"))


@triton.jit
def deal(shares, found, batch, BATCHES: tl.constexpr):
    """Grid ``(slots,)``: what each has of `_sharing`."""
    slot = tl.program_id(0)
    sequence, split, splits = _sharing(shares, 1, slot, batch, tl.num_programs(0), BATCHES)
    tl.store(found + 3 * slot, sequence)
    tl.store(found + 3 * slot + 1, split)
    tl.store(found + 3 * slot + 2, splits)


def there(tensor):
    """A tensor on the device as it lies here: by the same strides, and as far into its memory."""
    if tensor is None:
        return None
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return memory.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def kernel(tensors, mask=None, is_causal=False, scale=None, softcap=None, sinks=None, splits=0, **codes):
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    tensors, codes = [there(x) for x in tensors], {name: there(x) for name, x in codes.items()}
    others = (there(mask), is_causal, scale, softcap, there(sinks), splits)
    return torch.ops.icw_int8kv_triton.attention(*tensors, *others, **codes).cpu()


def reference_there(tensors, mask=None, *others, sinks=None, placed=None, **named):
    """What `reference` gives, worked out on the device, which takes less time where that is a GPU."""
    others = [there(x) if isinstance(x, torch.Tensor) else x for x in others]
    placed = None if placed is None else [there(x) for x in placed]
    named |= {"sinks": there(sinks)} if sinks is not None else {}
    return reference([there(x) for x in tensors], there(mask), *others, placed=placed, **named).cpu()


def check(tensors, *args, tolerance=None, splits=0, four_bits=(), keep=None, **kwargs):
    """``keep``: besides the rows of `keep_some`, what it takes."""
    tensors, codes, rows = in_four_bits(tensors, four_bits)
    kept, placed = keep_some(decode(rows), tensors[0].dtype, **keep) if keep else ({}, None)
    expected = reference_there(rows, *args, **kwargs, placed=placed)
    actual = kernel(tensors, *args, **kwargs, splits=splits, **codes, **kept)
    assert actual.dtype == tensors[0].dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    assert actual.isfinite().all()
    error = (actual.float() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= (tolerance or TOLERANCE[tensors[0].dtype]), error.item()


@FEWER_DTYPES
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (128, 64), (40, 72), (30, 13)]
)
def test_decode(dtype, head_dim, value_dim):
    check(make(1, 8, 2, 1, 150, head_dim, value_dim, dtype), splits=2)
    check(make(2, 4, 4, 3, 65, head_dim, value_dim, dtype))
    check(make(1, 4, 1, 16, 70, head_dim, value_dim, dtype), splits=2)  # 64 rows in the tile


@FEWER_DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 128, pytest.param(256, marks=pytest.mark.slow)])
def test_prefill(dtype, head_dim):
    check(make(1, 6, 2, 83, 83, head_dim, head_dim, dtype), is_causal=True)
    check(make(1, 4, 4, 67, 131, head_dim, head_dim, dtype), torch.rand(1, 1, 67, 131) > 0.5)
    check(make(1, 4, 1, 40, 90, head_dim, head_dim, dtype), splits=3)


@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 128, 257])
def test_lengths(length):
    for splits in (1, 2, 5):
        check(make(1, 4, 2, 1, length, 64, 64, torch.float32), splits=splits)
        check(make(1, 4, 2, 3, length, 64, 64, torch.float32), is_causal=True, splits=splits)


@pytest.mark.parametrize(("count", "dtype"), [(1, torch.bfloat16), (3, torch.float32)], ids=str)
def test_masks(count, dtype):
    tensors = make(2, 4, 2, count, 150, 64, 64, dtype)
    for index, (name, mask) in enumerate(masks(2, 4, count, 150)):
        try:
            check(tensors, mask, splits=(1, 3)[index % 2])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("splits", [1, 3])
def test_causal_softcap_and_sinks(splits):
    sinks = torch.tensor([-torch.inf, -200.0, 0.0, 1.5, 200.0, 3.0, -1.0, 8.0])
    for length in (4, 200):
        tensors = make(1, 8, 2, 5, length, 64, 64, torch.float32)
        mask = torch.rand(1, 1, 5, length, generator=torch.Generator().manual_seed(1)) > 0.3
        mask[:, :, 2] = False
        check(tensors, is_causal=True, splits=splits)
        check(tensors, None, False, 1.0, 20.0, splits=splits)
        check(tensors, mask, True, 0.2, 5.0, splits=splits)
        check(tensors, sinks=sinks, splits=splits)
        check(tensors, mask, True, 0.2, 5.0, sinks, splits=splits)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
def test_empty_rows_are_zero(splits, sinks):
    tensors = make(1, 4, 2, 2, 200, 64, 64, torch.bfloat16)
    mask = torch.ones(1, 1, 2, 200, dtype=torch.bool)
    mask[:, :, 1] = False
    output = kernel(tensors, mask, sinks=sinks, splits=splits)
    assert (output[:, :, 1] == 0).all()
    assert (output[:, :, 0] != 0).any()


def run_ptx(code, **registers):
    """The few instructions of PTX that inline assembly here is of, on 32-bit numbers by name."""
    numpy = pytest.importorskip("numpy")
    known = {f"${i}": register for i, register in enumerate(registers.values())}

    def read(name):
        return known[name] if name in known else int(name, 0)

    def halves(word):
        return numpy.array([word], dtype=numpy.uint32).view(numpy.float16)

    for line in code.strip("{} \n").split(";"):
        operation, *names = line.replace(",", " ").split() or [""]
        if operation in ("", ".reg"):
            continue
        to, *operands = names
        values = [read(name) for name in operands]
        if operation == "mov.b32":
            known[to] = values[0]
        elif operation == "xor.b32":
            known[to] = values[0] ^ values[1]
        elif operation == "sub.f16x2":
            known[to] = int((halves(values[0]) - halves(values[1])).view(numpy.uint32)[0])
        else:
            assert operation == "prmt.b32"
            both = (values[0] | values[1] << 32).to_bytes(8, "little")
            known[to] = int.from_bytes(bytes(both[values[2] >> 4 * i & 15] for i in range(4)), "little")
    return known


def test_conversion_of_every_byte():
    """What a GPU runs, instruction by instruction; the interpreter has another spelling of it."""
    from icw_compile.kernels.attention_triton import HALVES

    for byte in range(256):
        others = [(byte * factor + 17) % 256 for factor in (3, 5, 7)]
        for place in range(4):
            four = torch.tensor([*others[:place], byte, *others[place:]], dtype=torch.uint8)
            known = run_ptx(HALVES.value, even=0, odd=0, pairs=four.view(torch.int32).item() & 0xFFFFFFFF)
            found = torch.tensor([known["$0"], known["$1"]], dtype=torch.uint32).view(torch.float16)
            assert found.tolist() == four.view(torch.int8)[[0, 2, 1, 3]].tolist()


def test_every_byte_and_the_largest_products():
    every = torch.arange(-128, 128).to(torch.int8)
    for dtype in TOLERANCE:
        tensors = make(1, 4, 2, 1, 256, 256, 256, dtype)
        for at, channel in enumerate(range(0, 256, 64)):
            tensors[3][..., channel : channel + 64] = every.roll(at * 7)[:, None]
        check(tensors, splits=4)
        tensors[1].fill_(-128)
        tensors[1][:, :, ::3] = 127
        tensors[0].fill_(1.0)  # of the largest high digit, and no other
        tensors[2] /= 256
        check(tensors, splits=4)


@pytest.mark.parametrize("count", [1, 3, 8], ids="{} tokens".format)
def test_one_large_channel(count):
    """Of a query, whose digits are relative to it: of 2, 6 and 16 rows."""
    for dtype, size in ((torch.bfloat16, 300.0), (torch.float16, 30.0), (torch.float16, 2000.0)):
        for of_keys in (0, 1):
            tensors = make(1, 4, 2, count, 200, 64, 64, dtype)
            tensors[0][..., 5] = size
            tensors[1][..., 5] = of_keys
            check(tensors)


@pytest.mark.parametrize("count", [1, 16], ids="{} tokens".format)
def test_every_digit(count):
    """Also where one of them is at its end and carries: of numbers a little above and below what the others hold."""
    tensors = make(1, 1, 1, count, 64, 64, 64, torch.float16)
    largest, unit = 127 * 65536, 2.0**-20
    places = [
        sign * (base + off) * unit
        for base in (128, 32768, 127 * 256)
        for off in (-129, -1, 0, 1, 129)
        for sign in (1, -1)
    ]
    tensors[0] = torch.zeros_like(tensors[0])
    tensors[0][..., 0] = largest * unit
    tensors[0][..., 1 : 1 + len(places)] = torch.tensor(places)
    tensors[1][..., 0] = 0
    check(tensors, scale=20.0)


def test_scales_of_values_far_apart():
    """The largest belongs to a position of no weight, or of one that another row does not read."""
    for dtype in (torch.bfloat16, torch.float16):
        tensors = make(1, 4, 2, 2, 200, 64, 64, dtype)
        tensors[4] = torch.full_like(tensors[4], 1e-3)
        tensors[4][:, :, 70] = 1e3
        mask = torch.ones(1, 1, 2, 200, dtype=torch.bool)
        mask[:, :, 0, 70] = False
        expected, actual = reference(tensors, mask), kernel(tensors, mask)
        for token in range(2):
            error = (actual[:, :, token].float() - expected[:, :, token]).norm() / expected[:, :, token].norm()
            assert error <= TOLERANCE[dtype]


def test_strides():
    tensors = make(2, 8, 4, 2, 220, 64, 64, torch.float32)
    query, key, key_scale, value, value_scale = tensors
    # Spare rows behind each head, every second position, heads behind the positions, a slice of the heads.
    check([query, key[:, :, 20:133], key_scale[:, :, 20:133], value[:, :, 7:120], value_scale[:, :, 7:120]], splits=2)
    check([query, *(t[:, :, ::2] for t in tensors[1:])])
    check([t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors])
    check([query[:, ::2], *(t[:, 1:3] for t in tensors[1:])])
    check([query[..., :32], key[..., 17:49], key_scale, value[..., 3:60], value_scale])
    check([query, *(t[:, :1].expand(-1, 4, -1, -1) for t in tensors[1:])])
    check([query.transpose(2, 3).contiguous().transpose(2, 3), *tensors[1:]])
    check(tensors, sinks=torch.randn(16)[::2])


@DTYPES
def test_scales_of_any_magnitude(dtype):
    for magnitude in (1e-12, 1e12) if dtype == torch.float32 else (1e-4, 100.0):
        tensors = make(1, 8, 2, 1, 150, 64, 64, dtype)
        tensors[0], tensors[2] = tensors[0] * magnitude, tensors[2] / magnitude
        tensors[4] = tensors[4] * magnitude
        # 1e-4 takes float16 queries and outputs into its denormal numbers.
        check(tensors, tolerance=2e-2 if dtype == torch.float16 else None)


def test_one_value_row_dwarfs_the_others():
    tensors = make(1, 8, 2, 1, 150, 64, 64, torch.float16)
    tensors[4][:, :, 17] *= 1000
    mask = torch.zeros(1, 1, 1, 150)
    mask[..., 17] = -20.0
    check(tensors, mask)


@pytest.mark.parametrize("which", [2, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("splits", [1, 3])
def test_non_finite_rows(which, bad, splits):
    tensors = make(1, 4, 2, 2, 200, 64, 64, torch.bfloat16)
    tensors[which][:, 1, 150] = bad
    tensors[which - 1][:, 1, 150] = 0
    output = kernel(tensors, splits=splits)
    assert output[:, :2].isfinite().all()
    assert output[:, 2:].isnan().all()
    # Masked for the first token only.
    mask = torch.ones(1, 1, 2, 200, dtype=torch.bool)
    mask[:, :, 0, 150] = False
    output = kernel(tensors, mask, splits=splits)
    assert output[:, :, 0].isfinite().all()
    assert output[:, 2:, 1].isnan().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="watches the loads of Triton's interpreter")
def test_blocks_that_no_row_may_read_are_not_read(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    read = []
    load = InterpreterBuilder.create_masked_load

    def spy(self, pointers, mask, *args):
        read.append(torch.from_numpy((pointers.data * mask.data).astype("int64").ravel()))
        return load(self, pointers, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", spy)
    tensors = make(1, 2, 1, 2, 640, 64, 64, torch.float32)
    position = torch.arange(640).view(1, 1, 1, -1)
    window = (position >= 200) & (position < 300)
    for arguments in ((window, False), (window | (position >= 630), False), (None, True)):
        read.clear()
        kernel(tensors, *arguments, splits=2)
        addresses = torch.cat(read)
        mask = arguments[0] if arguments[0] is not None else position < 2
        blocks = mask.view(10, 64).any(1)  # tiles of these shapes are 32 or 64 positions wide
        for part in tensors[1:]:
            offset = (addresses - part.data_ptr()) // part.stride(2) // part.element_size()
            rows = offset[(offset >= 0) & (offset < 640)].unique()
            assert len(rows) and blocks[rows // 64].all()


@BITS
@DTYPES
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(64, 64), (80, 80), (128, 128), (256, 256), (128, 64), (40, 72), (16, 8)]
)
def test_four_bits(head_dim, value_dim, dtype, four_bits):
    check(make(1, 8, 2, 1, 150, head_dim, value_dim, dtype), splits=2, four_bits=four_bits)
    check(make(1, 4, 2, 35, 67, head_dim, value_dim, dtype), is_causal=True, four_bits=four_bits)


@st.composite
def calls(draw):
    """Tensors, arguments, numbers of bits and kept rows, of any shape that is cheap to interpret."""
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    batch, heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    count = draw(st.sampled_from([1, 1, 1, 2, 3, 7, 16]))
    length = draw(st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 97, 131]))
    sizes = [8 * draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 10, 16])) for _ in range(2)]
    seed = draw(st.integers(0, 2**31))
    tensors = make(batch, group * heads, heads, count, length, *sizes, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    kind = draw(st.sampled_from(["", "boolean", "additive", "span", "ragged", "causal"]))
    mask = torch.rand(batch, 1, count, length, generator=generator) > 0.4 if kind in ("boolean", "additive") else None
    if kind == "additive":
        mask = torch.randn(mask.shape, generator=generator).masked_fill(~mask, -torch.inf)
    elif kind == "span":
        first, last = sorted(draw(st.integers(0, length)) for _ in range(2))
        mask = ((torch.arange(length) >= first) & (torch.arange(length) < last)).view(1, 1, 1, -1)
    elif kind == "ragged":
        mask = spans(seed, batch, 1, 1, length)
    sinks = torch.randn(group * heads, generator=generator) if draw(st.booleans()) else None
    softcap = draw(st.sampled_from([None, None, 3.0]))
    arguments = (mask, kind == "causal", sizes[0] ** -0.5, softcap, sinks)
    roles = draw(st.sampled_from([(), *FOUR_BITS]))
    keep = {"most": draw(st.sampled_from([1, 5, 70])), "roles": roles, "seed": seed} if roles else None
    return tensors, arguments, draw(st.sampled_from(FOUR_BITS)), draw(st.sampled_from([1, 2, 3])), keep


def check_any_call(call):
    tensors, arguments, four_bits, splits, keep = call
    check(tensors, *arguments, splits=splits, four_bits=four_bits, keep=keep)


@settings(max_examples=30, derandomize=True, database=None, deadline=None)
@given(calls())
def test_four_bits_in_any_call(call):
    check_any_call(call)


@pytest.mark.slow
@settings(max_examples=300, database=None, deadline=None)
@given(calls())
def test_four_bits_in_many_calls(call):
    check_any_call(call)


def test_every_index_of_every_table():
    """The numbers themselves: each token reads one position, as it is."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1)
    codes = torch.cat([codes, 255 - codes], -1)
    packed = (torch.arange(16) * 16 + torch.arange(15, -1, -1)).to(torch.uint8).expand(1, 1, 256, 16).contiguous()
    scale = torch.ones(1, 1, 256, 1)
    tensors = [torch.zeros(1, 1, 256, 32), packed, scale, packed, scale]
    output = kernel(tensors, torch.eye(256).bool().view(1, 1, 256, 256), key_codes=codes, value_codes=codes)
    assert torch.equal(output, halves_to_levels(packed, codes).float())


def test_strides_in_four_bits():
    (query, *stored), codes, rows = in_four_bits(make(2, 8, 4, 2, 220, 64, 64, torch.float32), FOUR_BITS[0])
    # Spare rows behind each head, every second position, heads behind the positions, a slice of the heads, one head.
    for move in (
        lambda x: x[:, :, 20:133],
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[:, 1:3],
        lambda x: x[:, :1].expand(-1, 4, -1, -1),
    ):
        expected = reference([query, *map(move, rows[1:])])
        actual = kernel([query, *map(move, stored)], **{name: move(x) for name, x in codes.items()})
        assert relative_distance(actual, expected) < TOLERANCE[torch.float32]


@BITS
def test_non_finite_rows_in_four_bits(four_bits):
    tensors, codes, _ = in_four_bits(make(1, 4, 2, 2, 200, 64, 64, torch.bfloat16), four_bits)
    for role in four_bits:
        broken = list(tensors)
        at = {"key": 2, "value": 4}[role]
        broken[at] = tensors[at].clone()
        broken[at][:, 1, 150] = torch.nan
        output = kernel(broken, **codes)
        assert output[:, :2].isfinite().all() and output[:, 2:].isnan().all()
        # Masked for the first token only.
        mask = torch.ones(1, 1, 2, 200, dtype=torch.bool)
        mask[:, :, 0, 150] = False
        output = kernel(broken, mask, **codes)
        assert output[:, :, 0].isfinite().all() and output[:, 2:, 1].isnan().all()


def test_packed_rows_that_do_not_fit():
    tensors, codes, _ = in_four_bits(make(1, 4, 2, 1, 100, 64, 64, torch.bfloat16), FOUR_BITS[0])
    query, key, key_scale, value, value_scale = tensors
    for changed, named, message in (
        ([query, key, key_scale, value, value_scale], {"value_codes": codes["value_codes"]}, r"\[1, 2, 100, 64\], not"),
        ([query, key.view(torch.int8), *tensors[2:]], codes, "key_qdata must be uint8, not torch.int8"),
        ([query[..., :32], *tensors[1:]], codes, r"key_qdata must be of shape \[1, 2, 100, 16\]"),
        (tensors, {**codes, "key_codes": codes["key_codes"][..., :1]}, r"key_codes must be of shape \[1, 2, 100, 2\]"),
        (tensors, {**codes, "key_codes": codes["key_codes"].int()}, "key_codes must be uint8, not torch.int32"),
        ([query[..., :63], *tensors[1:]], codes, "63 channels: the kernel reads packed ones 8 at a time"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(changed, **named)


@pytest.mark.parametrize("splits", [1, 3])
def test_largest_numbers_of_float16(splits):
    """A scale that is rounded up makes no infinity of them: they are as they read back."""
    tensors = make(1, 4, 2, 1, 300, 64, 64, torch.float16)
    tensors[3:5] = int8.quantize_per_head(torch.full((1, 2, 300, 64), 65504.0), torch.bfloat16)
    assert decode(tensors)[1].max() > 65520
    assert (kernel(tensors, splits=splits) == 65504).all()
    tensors[4][:, :, 7] = torch.inf
    assert not kernel(tensors, splits=splits).isfinite().any()


#: Of which rows are kept: in both of them, in one of them.
ROLES = pytest.mark.parametrize("roles", [("key", "value"), ("key",), ("value",)], ids=("both", "keys", "values"))


@ROLES
@BITS
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(64, 64), (80, 40), pytest.param(128, 128, marks=pytest.mark.slow)]
)
def test_kept_rows(head_dim, value_dim, four_bits, roles):
    """In any order, with gaps, some of keys or of values alone; among them places without a row."""
    for index, dtype in enumerate(TOLERANCE):
        tensors = make(1, 4, 2, (1, 5, 1)[index], 170, head_dim, value_dim, dtype, index)
        for splits, most in ((1, 100), (3, 7)):
            check(tensors, splits=splits, four_bits=four_bits, keep={"most": most, "roles": roles, "seed": splits})


@pytest.mark.parametrize(
    "roles",
    [
        ("key", "value"),
        pytest.param(("key",), marks=pytest.mark.slow),
        pytest.param(("value",), marks=pytest.mark.slow),
    ],
    ids=("both", "keys", "values"),
)
def test_kept_rows_under_masks(roles):
    tensors = make(2, 4, 2, 3, 100, 64, 64, torch.float32)
    for seed, (name, mask) in enumerate(masks(2, 4, 3, 100)):
        keep = {"most": (5, 70)[seed % 2], "roles": roles, "seed": seed}
        others = (mask.dtype == torch.bool, 0.2, 5.0, torch.randn(4)) if seed % 3 else ()
        try:
            check(tensors, mask, *others, splits=(1, 2)[seed // 2 % 2], four_bits=FOUR_BITS[seed % 3], keep=keep)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("length", [1, 300, *(pytest.param(each, marks=pytest.mark.slow) for each in (64, 700))])
def test_sinks_and_recent_rows_are_kept(length, splits):
    """As a cache has them: the first ones and the last, more than there are rows, or so many places and no row yet."""
    for four_bits, (first, last) in zip(FOUR_BITS, ((0, 128), (4, 128), (5, 70)), strict=True):
        for recent in (length, length - 100):
            rows = torch.cat([torch.arange(first), torch.arange(recent - last, recent)])
            position = torch.where(rows < recent, rows.clamp(min=-1), -1)[torch.randperm(first + last)]
            for count, is_causal in ((1, False), (2, True)):
                tensors, codes, levels = in_four_bits(make(1, 4, 2, count, length, 64, 64, torch.float32), four_bits)
                kept, placed = {}, decode(levels)
                for at, role in enumerate(("key", "value")):
                    exact = torch.randn(1, 2, len(position), 64)
                    kept |= {f"{role}_exact": exact, f"{role}_position": position}
                    placed[at] = place_rows(placed[at], exact, position)
                expected = reference(levels, None, is_causal, placed=placed)
                actual = kernel(tensors, None, is_causal, splits=splits, **codes, **kept)
                assert relative_distance(actual, expected) < TOLERANCE[torch.float32]


def test_all_rows_are_kept():
    """What is stored is not read then, and may be anything."""
    for four_bits in FOUR_BITS:
        tensors, codes, rows = in_four_bits(make(1, 4, 2, 2, 150, 64, 64, torch.float32), four_bits)
        position = torch.randperm(150)
        exact = [torch.randn(1, 2, 150, 64) for _ in range(2)]
        placed = [place_rows(torch.zeros(1, 2, 150, 64), each, position) for each in exact]
        kept = dict(zip(("key_exact", "value_exact"), exact, strict=True))
        kept |= {"key_position": position, "value_position": position}
        expected = reference(rows, placed=placed)
        tensors[2], tensors[4] = torch.full_like(tensors[2], torch.nan), torch.full_like(tensors[4], torch.inf)
        for splits in (1, 3):
            actual = kernel(tensors, splits=splits, **codes, **kept)
            assert relative_distance(actual, expected) < TOLERANCE[torch.float32]


def test_no_row_is_kept():
    """Places without one, and none: to the bit what there is without them."""
    tensors, codes, _ = in_four_bits(make(1, 4, 2, 2, 150, 64, 64, torch.bfloat16), FOUR_BITS[0])
    expected = kernel(tensors, splits=2, **codes)
    for position in (torch.tensor([-1, -1, 150, 2**40]), torch.tensor([], dtype=torch.int64)):
        exact = torch.full((1, 2, len(position), 64), torch.nan, dtype=torch.bfloat16)
        kept = {"key_exact": exact, "key_position": position, "value_exact": exact, "value_position": position}
        assert torch.equal(kernel(tensors, splits=2, **codes, **kept), expected)


def test_the_first_of_two_kept_rows_of_a_position():
    tensors = make(1, 2, 2, 1, 150, 64, 64, torch.float32)
    position, exact = torch.tensor([-1, 7, 140, 7]), torch.randn(1, 2, 4, 64)
    placed = [place_rows(rows, exact, position) for rows in decode(tensors)]
    kept = {"key_exact": exact, "key_position": position, "value_exact": exact, "value_position": position}
    assert relative_distance(kernel(tensors, **kept), reference(tensors, placed=placed)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_kept_row_that_is_not_finite(bad, splits):
    """It reaches who reads it, and nobody else."""
    tensors, codes, _ = in_four_bits(make(1, 4, 2, 2, 600, 64, 64, torch.bfloat16), FOUR_BITS[0])
    mask = torch.ones(1, 1, 2, 600, dtype=torch.bool)
    mask[:, :, 0, 500] = False
    for role in ("key", "value"):
        exact = torch.randn(1, 2, 3, 64)
        exact[:, 1, 2] = bad
        kept = {f"{role}_exact": exact, f"{role}_position": torch.tensor([9, -1, 500])}
        output = kernel(tensors, mask, splits=splits, **codes, **kept)
        assert output[:, :2].isfinite().all() and output[:, 2:, 0].isfinite().all()
        assert output[:, 2:, 1].isnan().all()


@DTYPES
def test_kept_rows_of_another_magnitude(dtype):
    """Than what is stored, in another dtype and by other strides."""
    tensors = make(1, 4, 2, 2, 150, 64, 64, dtype)
    for factor in (1e-2, 50.0):
        kept, _ = keep_some(decode(tensors), torch.float32, 40)
        kept["value_exact"] = (kept["value_exact"] * factor).to(dtype).float()
        kept["key_exact"] = kept["key_exact"].to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
        placed = [
            place_rows(rows, kept[f"{role}_exact"].float(), kept[f"{role}_position"])
            for role, rows in zip(("key", "value"), decode(tensors), strict=True)
        ]
        actual = kernel(tensors, splits=2, **kept)
        assert relative_distance(actual, reference(tensors, placed=placed)) < TOLERANCE[dtype]


def test_kept_rows_that_do_not_fit():
    tensors = make(1, 4, 2, 1, 100, 64, 32, torch.bfloat16)
    position = torch.tensor([3, -1])
    exact = torch.zeros(1, 2, 2, 64)
    for kept, message in (
        ({"key_exact": exact}, "key_exact and key_position go together"),
        ({"value_position": position}, "value_exact and value_position go together"),
        ({"key_exact": exact[:, :, :1], "key_position": position}, r"key_exact must be of floats \[1, 2, 2, 64\]"),
        ({"value_exact": exact, "value_position": position}, r"value_exact must be of floats \[1, 2, 2, 32\]"),
        ({"key_exact": exact.int(), "key_position": position}, "of floats .*, not torch.int32"),
        ({"key_exact": exact, "key_position": position.int()}, r"key_position must be int64 \[K\], not torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(tensors, **kept)


def spans(draw, *shape):
    """A boolean mask ``shape`` without holes: each row reads nothing, all, or from some position to another."""
    *rows, length = shape
    ends = torch.randint(-3, length + 3, (2, *rows, 1), generator=torch.Generator().manual_seed(draw)).clamp(0, length)
    position = torch.arange(length)
    return (position >= ends.amin(0)) & (position < ends.amax(0))


@pytest.mark.parametrize("splits", [1, 3])
def test_masks_without_holes(splits):
    for seed, rows in enumerate(((1, 1, 1), (2, 1, 1), (2, 1, 3), (2, 4, 1), (2, 4, 3))):
        tensors = make(2, 4, 2, 3, 300, 64, 64, torch.float32, seed)
        mask = spans(seed, *rows, 300)
        check(tensors, mask, splits=splits)
        check(tensors, mask, True, splits=splits, four_bits=FOUR_BITS[0])
        one = mask.clone()
        one[-1, -1, -1, 100:110] ^= True  # one row has a hole, the others have none
        check(tensors, one, splits=splits)


def test_spans_take_the_place_of_a_mask():
    tensors = make(1, 4, 2, 2, 300, 64, 64, torch.float32)
    mask = spans(5, 1, 1, 2, 300)
    expected = kernel(tensors, mask)
    assert expected.isfinite().all()
    assert torch.equal(kernel(tensors, ~mask, spans=gpu.mask_spans(mask, 300).to(DEVICE)), expected)


def test_spans_of_masks():
    for mask, length in (
        (torch.zeros(1, 1, 1, 5).bool(), 5),
        (torch.ones(1, 1, 1, 1).bool(), 70),
        (spans(3, 2, 3, 2, 128), 128),
        (torch.rand(2, 1, 3, 200, generator=torch.Generator().manual_seed(1)) > 0.9, 200),
    ):
        found = gpu.mask_spans(mask, length)
        assert found.shape == (*mask.shape[:3], launch.SPANS_HEADER + -(-length // 64))
        for row, (first, behind, count, share, *words) in zip(
            mask.expand(-1, -1, -1, length).flatten(0, 2), found.flatten(0, 2).tolist()
        ):
            assert 0 < share <= 2**20
            read = row.nonzero().flatten().tolist()
            assert (first, behind, count) == ((read[0], read[-1] + 1, len(read)) if read else (length, 0, 0))
            assert [64 * i + j for i, word in enumerate(words) for j in range(64) if word >> j & 1] == read
        assert (found[-1, :, :, 3] == 2**20).all()


@pytest.mark.slow
def test_spans_of_masks_compiled():
    """Inductor computes them, in one graph for all lengths."""
    compiled = torch.compile(gpu.mask_spans, dynamic=True, fullgraph=True)
    for shape, length in (((1, 1, 1, 70), 70), ((2, 1, 3, 200), 200), ((2, 4, 1, 128), 128), ((1, 1, 2, 1), 65)):
        for share in (0.02, 0.5, 1.0):
            mask = torch.rand(shape, generator=torch.Generator().manual_seed(length), device="cpu") < share
            assert torch.equal(compiled(mask.to(DEVICE), length).cpu(), gpu.mask_spans(mask, length))


def ragged(*reads, length):
    """A mask ``[batch, 1, 1, length]``: of the last positions each sequence reads so many."""
    return torch.arange(length).view(1, 1, 1, -1) >= length - torch.tensor(reads).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("heads", "count", "reads", "splits"),
    [
        ((4, 2), 1, (260, 20), 4),
        ((4, 2), 1, (20, 260), 4),
        ((2, 2), 1, (1, 0, 260, 260, 64), 3),
        ((8, 1), 1, (250, 0), 2),
        ((4, 4), 3, (33, 260, 200), 5),
        ((4, 2), 2, (0, 0), 3),
        ((2, 1), 1, (260, *[9] * 16), 2),  # more sequences than half a warp has threads
        ((2, 1), 1, (260, *[1] * 3), 10),  # 37 programs could be one sequence's
    ],
    ids=str,
)
def test_ragged_batches(heads, count, reads, splits):
    tensors = make(len(reads), *heads, count, 260, 64, 32, torch.float32, len(reads))
    mask, sinks = ragged(*reads, length=260), torch.randn(heads[0])
    check(tensors, mask, splits=splits)
    check(tensors, mask, is_causal=True, splits=splits, sinks=sinks, four_bits=FOUR_BITS[0], keep={})
    check(tensors, spans(splits, len(reads), heads[0], count, 260), splits=splits, sinks=sinks)


@st.composite
def batches(draw):
    """How many positions each sequence reads, and programs for each if they read alike."""
    same = draw(st.booleans())
    size, most = draw(st.sampled_from([2, 3, 7, 16, 19])), draw(st.sampled_from([1, 70, 5000, 2**20]))
    return [draw(st.integers(0, most))] * size if same else draw(
        st.lists(st.integers(0, most), min_size=size, max_size=size)
    ), draw(st.integers(2, 9))


@settings(max_examples=30, derandomize=True, database=None, deadline=None)
@given(batches())
def test_programs_by_shares(batch):
    """Each sequence has its programs, as many as the others if they are alike; none reads much more than its part."""
    reads, splits = batch
    count, slots = len(reads), len(reads) * splits
    share = gpu.shares(torch.tensor(reads)).to(DEVICE)
    found = torch.empty(slots, 3, dtype=torch.int32, device=DEVICE)
    deal[(slots,)](share, found, count, BATCHES=max(16, 1 << (count - 1).bit_length()))
    programs = [found[found[:, 0] == sequence] for sequence in range(count)]
    for _, split, of in map(torch.unbind, programs, [1] * count):
        assert split.tolist() == list(range(len(split))) and (of == len(split)).all() and len(split) > 0
    assert sum(map(len, programs)) == slots
    if len(set(reads)) == 1:
        assert {len(each) for each in programs} == {splits}
    each = max(read / len(of) for read, of in zip(reads, programs))
    assert each <= max(sum(reads), count) / (slots - count) + 1


def test_which_batches_have_programs_by_shares(monkeypatch):
    """Where sequences may differ, all that a head reads at once is one tile, and there is something to gain."""
    monkeypatch.setattr(launch, "processors", lambda device: 132)

    def planned(batch, heads, length, count=1, rows=None, dtype=torch.bool):
        stored = [
            torch.empty(batch, heads, length, size, dtype=kind, device="meta")
            for size, kind in ((128, torch.int8), (1, torch.bfloat16))
        ]
        query = torch.empty(batch, 4 * heads, count, 128, dtype=torch.bfloat16, device="meta")
        mask = None if rows is None else torch.empty(rows, 1, 1, length, dtype=dtype, device="meta")
        tensors = [query, *stored, None, *stored, None, mask, *[None] * 6]
        layouts = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors)
        plan = launch.plan_call(layouts, torch.device("meta"), False, 0)
        return plan.splits, plan.constants["BATCHES"], plan.merge_constants["SPLITS"]

    assert planned(8, 8, 32_768, rows=8) == (6, 16, 64)
    assert planned(8, 8, 32_768, count=2, rows=8) == (6, 16, 64)
    assert planned(20, 8, 32_768, rows=20)[1:] == (32, 256)
    for batch, heads, length in ((8, 8, 32_768), (64, 8, 8192), (1, 8, 32_768)):
        assert planned(batch, heads, length)[1] == 0, "no mask"
        assert planned(batch, heads, length, rows=1)[1] == 0, "all sequences read alike"
        assert planned(batch, heads, length, rows=batch, dtype=torch.bfloat16)[1] == 0, "an additive mask"
        assert planned(batch, heads, length, count=64, rows=batch)[1] == 0, "a prompt"
    assert planned(8, 8, 1024, rows=8)[1] == 0, "a program has few blocks"
    # One for each would run at once, and that of a long sequence as long as if it were alone.
    assert planned(64, 8, 8192) == (1, 0, 16) and planned(64, 8, 8192, rows=64) == (2, 64, 128)
    assert planned(256, 8, 8192, rows=256)[:2] == (1, 0), "not all run at once"


def test_empty_cache_and_batch():
    tensors = make(1, 4, 2, 1, 8, 64, 64, torch.bfloat16)
    for mask in (None, torch.ones(1, 1, 1, 0, dtype=torch.bool)):
        assert (kernel([tensors[0], *(t[:, :, :0] for t in tensors[1:])], mask) == 0).all()
    assert kernel([t[:0] for t in tensors]).shape == (0, 4, 1, 64)


@pytest.mark.parametrize(
    ("change", "message"),
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
    with pytest.raises(ValueError, match=message):
        kernel(tensors, scale=0.1)


def test_arguments_that_do_not_fit():
    tensors = make(1, 4, 2, 1, 100, 64, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="does not broadcast"):
        kernel(tensors, torch.ones(1, 1, 1, 99, dtype=torch.bool))
    with pytest.raises(ValueError, match="unsupported dtype of attn_mask"):
        kernel(tensors, torch.ones(1, 1, 1, 100, dtype=torch.int32))
    with pytest.raises(ValueError, match="spans are those of a boolean mask"):
        kernel(tensors, torch.zeros(1, 1, 1, 100), spans=torch.zeros(1, 1, 1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"sinks must be of shape \[4\]"):
        kernel(tensors, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="at most 256"):
        kernel(make(1, 1, 1, 1, 8, 320, 64, torch.bfloat16))


def test_calls_are_planned_once_for_a_layout():
    """And what a plan of before gives is what a new one gives, also where a tensor begins elsewhere."""
    query, key, key_scale, value, value_scale = make(2, 4, 2, 1, 140, 64, 64, torch.bfloat16)
    odd = torch.zeros(value.numel() + 1, dtype=torch.int8)[1:].view(value.shape).copy_(value)
    mask = torch.ones(2, 1, 1, 140, dtype=torch.bool)
    mask[1, ..., :30] = False
    calls = [
        ((query, key, key_scale, value, value_scale), None),
        ((query, key, key_scale, odd, value_scale), None),  # of the same layout
        ((query, key, key_scale, value, value_scale), mask),
        ((query, key, key_scale, value, value_scale), mask[1:]),  # the other strides of a mask
        ((query, key, key_scale, value, value_scale), mask.float().log()),
        (tuple(x[:, :, :100] for x in (query, key, key_scale, value, value_scale)), None),
        ((torch.cat([query, query], -1)[..., :64], key, key_scale, value, value_scale), None),
        ((query.float(), key, key_scale, value, value_scale), None),
    ]
    launch.plan_call.cache_clear()
    for _ in range(2):
        for tensors, one in calls:
            found = kernel(list(tensors), one, splits=2)
            assert relative_distance(found, reference(tensors, one)) < TOLERANCE[query.dtype]
    info = launch.plan_call.cache_info()
    assert (info.misses, info.hits, info.maxsize) == (len(calls) - 1, len(calls) + 1, launch.PLANS)
    for _ in range(2):  # what does not fit is refused each time
        with pytest.raises(ValueError, match="cannot be grouped"):
            kernel([query[:, :3], key, key_scale, value, value_scale])


def test_operator_registration():
    tensors = make(1, 4, 2, 2, 100, 64, 32, torch.float32)
    mask = torch.rand(1, 1, 2, 100, device=DEVICE) > 0.5
    for four_bits, keep in (((), {}), (("key", "value"), {}), (("value",), {"roles": ("value",)})):
        stored, codes, rows = in_four_bits(tensors, four_bits)
        kept = keep_some(decode(rows), torch.float32, **keep)[0] if keep else {}
        named = {name: x.to(DEVICE) for name, x in (codes | kept).items()}
        torch.library.opcheck(gpu.attention, (*(x.to(DEVICE) for x in stored), mask, False, 0.1, None), named)


def test_compiles_with_symbolic_length():
    @torch.compile(dynamic=True, fullgraph=True)
    def step(*tensors):
        return torch.ops.icw_int8kv_triton.attention(*tensors, None, True, 0.1, None) + 1

    for length in (20, 33):
        tensors = [x.to(DEVICE) for x in make(1, 4, 2, length, length, 64, 64, torch.float32)]
        assert torch.equal(step(*tensors), torch.ops.icw_int8kv_triton.attention(*tensors, None, True, 0.1, None) + 1)
    assert counters["stats"]["unique_graphs"] == 1


def test_splits():
    """They fill the device, share the blocks evenly, and never outnumber them."""

    def splits(tiles, blocks, programs=4):
        return launch.choose_splits(tiles=tiles, blocks=blocks, processors=132, programs=programs)

    # Each is the fastest that was measured on an H200, within six in a hundred of that, or (6) between the two fastest.
    assert [splits(8, blocks) for blocks in (64, 128, 512, 2048)] == [32, 32, 32, 49]
    assert (splits(128, 512), splits(64, 128)) == (3, 6)
    assert splits(8, 5) == 5 and splits(8, 1) == 1
    assert splits(1, 10_000) <= launch.MAX_SPLITS
    assert splits(8, 0) == 1
    assert splits(132, 512, programs=1) == splits(264, 512, programs=2) == 1
    for blocks in range(1, 300):
        for programs in (1, 2, 3, 4):
            found = splits(8, blocks, programs)
            assert -(-blocks // found) * (found - 1) < blocks
            assert 8 * found <= 132 * programs, "all run at a time"


def test_programs_of_a_multiprocessor():
    """Decode of 8 bits leaves room for four."""
    tiles = launch.choose_tiles(4, 128, torch.bfloat16)
    assert (tiles.rows, tiles.registers, tiles.programs()) == (8, 128, 4)
    assert launch.choose_tiles(4, 128, torch.bfloat16, is_packed=True).programs() == 3


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (torch.bfloat16, (8, 8)),
        pytest.param(torch.float32, (8, 8), marks=pytest.mark.slow),
        (torch.float32, (8, 4)),
        (torch.float32, (4, 4)),
    ],
    ids=str,
)
def test_whole_model(dtype, bits, everywhere):
    """Prefill and decode through the backend."""
    model = tiny_model("gemma2", attention="eager", dtype=dtype).to(DEVICE)
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True, options={"icw.compiler": "eager"})
    ids, chunks = tokens(13).to(DEVICE), (10, 1, 2)
    stored = dict(zip(("key_bits", "value_bits"), bits, strict=True)) | {"recent_tokens": 6 if bits == (4, 4) else 0}
    logits = run(step, icw_compile.static_cache(model, 1, 32, **stored), ids, chunks)
    assert {site.lowering for graph in graphs() for site in graph.sites} == {"triton kernel"}
    distance = relative_distance(logits, run(model, reference_cache(model, 32, **stored), ids, chunks))
    assert distance < (2e-3 if dtype == torch.float32 else 5e-2)


@pytest.fixture
def everywhere(monkeypatch):
    """On the CPU, the pass takes the kernel as it does on a GPU."""
    if DEVICE == "cpu":
        anything = replace(gpu.KERNEL, declines=lambda call: None)
        monkeypatch.setattr("icw_compile.pipeline.find_kernel", lambda device_type, choice, **how: anything)


def padded_by(*pads, length=14):
    """A mask of padding ``[sequences, length]``: the tokens to take no notice of, at the left."""
    return torch.stack([torch.arange(length) >= pad for pad in pads]).long()


@pytest.mark.parametrize(
    ("name", "heads", "padding"),
    [
        pytest.param("llama", 2, None, marks=pytest.mark.slow),  # as `test_whole_model`
        pytest.param("llama", 2, padded_by(0, 5, 3), marks=pytest.mark.slow),  # as those below
        ("llama", 1, padded_by(4)),
        ("llama", 2, padded_by(0, 14)),  # a sequence of padding alone reads nothing
        ("llama", 2, padded_by(0, 5).index_fill(1, torch.tensor([7]), 0)),  # holes
        ("mistral", 2, padded_by(0, 5)),  # a sliding window
    ],
)
@torch.no_grad()
def test_masks_of_whole_models(name, heads, padding, everywhere):
    """A static cache, whose every mask is boolean: the logits of the reference."""
    model = tiny_model(name, kv_heads=heads).to(DEVICE)
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True, options={"icw.compiler": "eager"})
    sequences = 1 if padding is None else len(padding)
    ids = torch.cat([tokens(14)] * sequences).to(DEVICE)
    caches = icw_compile.static_cache(model, sequences, 70), reference_cache(model, 70)
    logits = [[], []]
    for start, end in ((0, 10), (10, 11), (11, 14)):
        given = None if padding is None else padding[:, :end].to(DEVICE)
        for found, run_one, cache in zip(logits, (step, model), caches, strict=True):
            found.append(run_one(ids[:, start:end], past_key_values=cache, attention_mask=given).logits)
    actual, expected = (torch.cat(each, dim=1) for each in logits)
    kept = slice(None) if padding is None else padding.bool()
    assert relative_distance(actual[kept], expected[kept]) < 2e-3
    assert actual.isfinite().all()
    assert {site.lowering for graph in graphs() for site in graph.sites} == {"triton kernel"}


def test_choosing_the_kernel():
    assert find_kernel("cuda") is gpu.KERNEL
    assert find_kernel("cuda", "triton") == find_kernel("cuda")
    assert find_kernel("cuda", "inductor") == "as asked"
    assert "no kernel for xpu" in find_kernel("xpu")
    for device, choice in (("cpu", "triton"), ("xpu", "triton"), ("cuda", "cpu")):
        with pytest.raises(KernelUnavailableError, match=f"the model is on {device}"):
            find_kernel(device, choice)


def test_without_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton, which is not installed" in find_kernel("cuda")
    for call in (lambda: find_kernel("cuda", "triton"), lambda: kernel(make(1, 1, 1, 1, 8, 64, 64, torch.float32))):
        with pytest.raises(KernelUnavailableError, match="Triton, which is not installed"):
            call()


def test_declines(monkeypatch):
    """On fake CUDA tensors, with symbolic lengths and numbers of query tokens: the whole call, and always a text."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    gpu.why_not_on.cache_clear()
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):
        length, tokens = (shape_env.create_unbacked_symint() for _ in range(2))

        def empty(*shape, dtype=torch.bfloat16, device="cuda"):
            return torch.empty(shape, dtype=dtype, device=device)

        def declined(query=None, key_dim=64, value_dim=64, value=None, **others):
            query = empty(2, 4, tokens, 64) if query is None else query
            key, value = (
                StoredRows.int8(empty(2, 2, length, size, dtype=torch.int8), empty(2, 2, length, 1))
                if rows is None
                else rows
                for size, rows in ((key_dim, None), (value_dim, value))
            )
            reason = gpu.declines(AttentionCall(query, key, value, **others))
            assert reason != ""
            return reason

        assert declined() is None
        assert declined(attn_mask=empty(2, 1, tokens, length, dtype=torch.bool), softcap=3.0) is None
        assert declined(attn_mask=empty(1, 1, 1, length), sinks=empty(4), is_causal=True) is None
        assert "dtype of attn_mask: torch.int64" in declined(attn_mask=empty(1, 1, 1, length, dtype=torch.int64))
        assert "does not broadcast" in declined(attn_mask=empty(tokens, length))
        assert "320 channels" in declined(empty(2, 4, tokens, 320), key_dim=320)
        assert "320 channels" in declined(value_dim=320)
        assert "torch.float64" in declined(empty(2, 4, tokens, 64, dtype=torch.float64))
        assert "on cpu, and the kernel is for cuda" in declined(empty(2, 4, tokens, 64, device="cpu"))
        assert "attn_mask on cpu" in declined(attn_mask=empty(1, 1, 1, length, device="cpu"))
        across = torch.empty_strided((2, 2, length, 64), (1024, 512, 1, 8), dtype=torch.int8, device="cuda")
        assert "not contiguous" in declined(value=StoredRows.int8(across, empty(2, 2, length, 1)))
        packed = {"packed": empty(2, 2, length, 32, dtype=torch.uint8), "scale": empty(2, 2, length, 1)}
        packed["codes"] = empty(2, 2, length, 2, dtype=torch.uint8)
        assert declined(value=StoredRows("int4", packed)) is None
        large = {**packed, "packed": empty(2, 2, length, 160, dtype=torch.uint8)}
        assert "320 channels" in declined(value=StoredRows("int4", large))
        rest = {**packed, "packed": empty(2, 2, length, 50, dtype=torch.uint8)}
        assert "100 channels: the kernel reads packed ones 8" in declined(value=StoredRows("int4", rest))
        assert "not int4 rows: codes" in declined(value=StoredRows("int4", dict(list(packed.items())[:2])))
        assert "stored as fp8, and the kernel reads int8 and int4" in declined(value=StoredRows("fp8", {}))
        assert "sinks of shape" in declined(sinks=empty(3))
        gpu.why_not_on.cache_clear()
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
        assert "needs compute capability 8.0, and a GPU has 7.5" in declined()
    gpu.why_not_on.cache_clear()


#: What is compiled: `machine_code.compile_for`.
QUICK = [
    ("bfloat16", 32, 8, 1, 4096, (128, 128), (8, 8), None, False, None, False, 8),
    ("bfloat16", 32, 8, 1, 4096, (128, 128), (8, 8), "bool", False, None, False, 8),
    ("bfloat16", 32, 8, 1, 4096, (128, 128), (4, 4), "bool", False, None, False, 8),
    ("bfloat16", 32, 8, 1, 4096, (128, 128), (8, 8), "ragged", False, None, False, 70),
    ("float32", 4, 4, 5, 500, (80, 72), (4, 8), "ragged", True, None, True, 3, 128, "both"),
    ("bfloat16", 32, 8, 512, 512, (128, 128), (8, 8), None, True, None, False, 1),
    ("float16", 8, 4, 1, 500, (256, 256), (8, 4), "float16", False, 50.0, True, 3),
    ("float32", 4, 4, 5, 500, (80, 72), (8, 8), "float32", True, None, False, 1),
    ("float32", 4, 4, 5, 500, (80, 72), (4, 8), "float32", True, None, False, 1),
    ("bfloat16", 32, 8, 1, 4096, (128, 128), (4, 4), "bool", False, None, False, 8, 128, "both"),
    ("float16", 8, 4, 512, 512, (256, 256), (8, 4), None, True, None, True, 1, 132, "packed"),
    ("bfloat16", 4, 1, 512, 512, (64, 64), (4, 4), None, True, None, True, 1, 128, "both"),
]
SLOW = [
    (dtype, 4, 1, length, 512, (size, size), bits, mask, mask is None, None, mask is None, splits, *kept)
    for dtype in ("bfloat16", "float16", "float32")
    for size in (64, 96, 128, 256)
    for length in (4, 8, 16, 512)
    for mask, splits in ((None, 1), ("bool", 4), ("float32", 4))
    for bits, *kept in (((8, 8),), ((4, 4),), ((4, 4), 128, "both"))
]


@pytest.mark.parametrize("cases", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
@pytest.mark.parametrize(
    ("backend", "arch", "shared_memory"),
    [
        pytest.param("cuda", 80, 99 * 1024, marks=pytest.mark.slow),  # its decode: tests/test_machine_code.py
        ("cuda", 90, 99 * 1024),
        pytest.param("hip", "gfx942", 64 * 1024, marks=pytest.mark.slow),
    ],
    ids=["sm_80", "sm_90", "gfx942"],
)
def test_compiles_for(backend, arch, shared_memory, cases, tmp_path):
    """What is launched compiles to machine code, and fits in the shared memory that every such device has."""
    compiled = compile_for(backend, arch, cases, tmp_path)
    assert [code.name for code in compiled] == [
        name for case in cases for name in ("attend", "merge")[: 1 if case[11] == 1 else 2]
    ]
    assert all(code.path.stat().st_size > 0 and code.shared <= shared_memory for code in compiled)


HEADS = [(32, 8), (32, 32), (32, 1), (12, 2), (9, 1)]


@on_gpu
@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("query_heads", "heads"), HEADS)
def test_grid(dtype, head_dim, query_heads, heads):
    for index, length in enumerate((1, 63, 257, 1030, 4096, 20_000)):
        query, *stored = make(1 + index % 2, query_heads, heads, 16, length, head_dim, head_dim, dtype, index)
        for count in (1, 5, 16):
            mask = torch.rand(1, 1, count, length) > 0.5
            check([query[:, :, :count], *stored])
            check([query[:, :, :count], *stored], mask, softcap=20.0, sinks=torch.randn(query_heads))


@on_gpu
@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_prefill_grid(dtype, head_dim):
    for count, length in ((17, 17), (300, 300), (1024, 1024), (257, 2000)):
        tensors = make(2, 8, 2, count, length, head_dim, head_dim, dtype)
        check(tensors, is_causal=True)
        check(tensors, torch.ones(count, length, dtype=torch.bool).tril(length - count).expand(1, 1, -1, -1))
