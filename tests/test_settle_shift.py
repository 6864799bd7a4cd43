"""The statistic of the shifts as one operation: its kernels against plain torch, and what compilers see of it."""

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support import relative_distance, tiny_model, tokens
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache, StaticCache

import icw_compile
from icw_compile import QuantizedKV
from icw_compile.formats import equalized, make_format
from icw_compile.formats.equalized import MAX_SHIFT, NEGLIGIBLE, settle_shift
from icw_compile.formats.int8 import Int8Rows
from icw_compile.kernels import cpu
from icw_compile.kernels import settle as gpu

OPERATOR = torch.ops.icw_int8kv.settle_shift.default
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

#: Triton's run in its interpreter where there is no GPU (`conftest.py`).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]

needs_cpp = pytest.mark.skipif(not cpu.is_available(), reason="no C++ compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def triton(*args: Tensor) -> Tensor:
    call = gpu.settle_shift_triton if DEVICE == "cpu" else OPERATOR
    return call(*map(there, args)).cpu()


@pytest.fixture(params=[pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)])
def operator(request: pytest.FixtureRequest) -> Operator:
    """A kernel for ``icw_int8kv::settle_shift``, of tensors on the CPU."""
    if request.param == "triton":
        return triton
    cpu.load()
    return OPERATOR


def there(x: Tensor) -> Tensor:
    """A tensor on the device, by the same strides."""
    return x if DEVICE == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows of random norms, a fifth of whose channels are outliers."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-2, 9, shape[-1:], generator=generator)
    factors = torch.where(torch.rand(shape[-1:], generator=generator) < 0.2, torch.exp2(exponents.float()), 1.0)
    norms = torch.rand(shape[:-1], generator=generator).unsqueeze(-1)
    return (torch.randn(shape, generator=generator) * factors * norms).to(dtype)


def operands(x: Tensor, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """With storage of so many rows into which nothing was written, and a shift of threes."""
    written = x.new_zeros((*x.shape[:-2], rows, 1), dtype=torch.bfloat16)
    return x, written, x.new_full((*x.shape[:-2], 1, x.shape[-1]), 3, dtype=torch.uint8)


def is_near_a_threshold(x: Tensor) -> Tensor:
    """Where rounding to float32 may decide: worked out in float64."""
    part = x.float().double().abs() / x.float().double().abs().amax(-1, keepdim=True)
    logs = part.where(part >= NEGLIGIBLE, math.nan).log2()
    logs = logs - logs.nanmean(-1, keepdim=True)
    usual, largest = logs.nanmean(-2, keepdim=True), logs.nan_to_num(-math.inf).amax(-2, keepdim=True)
    largest = largest.where(usual.isfinite(), math.nan)
    above = torch.minimum(*(size - size.nanmedian(-1, keepdim=True).values for size in (usual, largest)))
    thresholds = torch.tensor([math.log2(3.0), *range(2, MAX_SHIFT + 1)], dtype=torch.float64)
    return ((above.unsqueeze(-1) - thresholds).abs() < 1e-4).any(-1)


def check(operator: Operator, *args: Tensor) -> Tensor:
    actual, expected = operator(*args), settle_shift(*args)
    assert actual.dtype == torch.uint8 and actual.shape == expected.shape == args[2].shape
    assert actual.is_contiguous() and expected.is_contiguous()
    if not torch.equal(actual, expected):
        assert ((actual == expected) | is_near_a_threshold(args[0])).all()
    return actual


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 64, 32), (1, 4, 300, 128), (2, 3, 7, 13), (1, 2, 2, 1), (1, 2, 1, 8), (1, 2, 0, 8), (0, 2, 3, 8)],
)
def test_kernel_equals_plain_torch(operator: Operator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed in range(5 if operator is OPERATOR else 2):
        shift = check(operator, *operands(states(*shape, seed=seed, dtype=dtype)))
        assert shape[-2] > 1 or not shift.any()


@needs_cpp
def test_cpp_of_other_dimensions() -> None:
    cpu.load()
    check(OPERATOR, *operands(states(9, 17)))
    check(OPERATOR, *operands(states(2, 1, 3, 20, 8)))


@needs_triton
@pytest.mark.parametrize(
    "shape", [(1, 1, 300, 32), (2, 3, 1000, 16), pytest.param((1, 2, 700, 200), marks=pytest.mark.slow), (1, 2, 2, 16)]
)
def test_programs_that_share_a_head(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "processors", lambda device: 132)
    x, written, shift = operands(states(*shape), rows=5000)
    settled = check(triton, x, written, shift)
    assert shape[-2] == 2 or settled.any()
    for head, row in ((0, 0), (0, 1500), (-1, 4999)):
        written.zero_()[-1, head, row] = -1e-30
        held = check(triton, x, written, shift)
        assert (held[-1, head] == 3).all() and (shape[1] == 1 or torch.equal(held[-1, 1 + head], settled[-1, 1 + head]))


@needs_triton
def test_written_of_two_numbers_a_row() -> None:
    x, _, shift = operands(states(1, 2, 9, 16))
    written = torch.zeros(1, 2, 3, 40, dtype=torch.uint8).transpose(2, 3)[..., :2]
    settled = check(triton, x, written, shift)
    written[0, 1, 39, 1] = 255
    held = check(triton, x, written, shift)
    assert torch.equal(held[:, 0], settled[:, 0]) and (held[:, 1] == 3).all() and not (settled == 3).all()


@needs_triton
@pytest.mark.parametrize("change", [lambda x: x[..., :4], lambda x: x[:, :2], lambda x: x.expand(3, -1, -1, -1)])
def test_what_does_not_fit_on_a_gpu(change) -> None:
    x, written, shift = operands(states(1, 3, 4, 8))
    with pytest.raises(ValueError, match="do not fit"):
        triton(change(x), written, shift)


def stored_rows(counts: list[int], *, size: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """int8 rows ``[1, heads, 30, size]`` of which each head has so many, at random places if few, and a shift."""
    rows = states(1, len(counts), 30, size, seed=seed)
    for head, count in enumerate(counts):
        rows[:, head, count:] = 0
        if 1 < count <= 8:  # as behind left padding
            rows[:, head] = rows[:, head].roll(5, dims=-2)
    value = QuantizedKV.encode(rows.to(dtype), make_format(dtype, equalize=True)).value
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(0, 4, (1, len(counts), 1, size), dtype=torch.uint8, generator=generator)
    return value["qdata"], value["scale"], shift


@needs_triton
@pytest.mark.parametrize("size", [pytest.param(8, marks=pytest.mark.slow), 40, 128])
@pytest.mark.parametrize("tokens", [1, pytest.param(2, marks=pytest.mark.slow), 20, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_settled_again_on_a_gpu(dtype: torch.dtype, tokens: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of no rows, of one, of few and of many; prompts that are long enough to decide, and that are not."""
    monkeypatch.setattr(gpu, "processors", lambda device: 132)
    inner = equalized.name_inner(Int8Rows(dtype))
    changed = 0
    for seed in range(3):
        qdata, scale, shift = stored_rows([0, 1, 2, 8, 15, 16, 17, 30], size=size, dtype=dtype, seed=seed)
        x = states(1, 8, tokens, size, seed=seed + 9, dtype=dtype)
        x = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.1, 0.0, x)
        if seed == 2:
            x[:, 1:4] = 0
        expected = equalized.settle_again(x, [qdata, scale], scale, shift, [], None, inner)
        if DEVICE == "cpu":
            actual = gpu.settle_again_triton(x, qdata, scale, shift)
        else:
            x, qdata, scale, shift = map(there, (x, qdata, scale, shift))
            actual = torch.ops.icw_int8kv.settle_again(x, [qdata, scale], scale, shift, [], None, inner)
        actual = [part.cpu() for part in actual]
        assert [part.dtype for part in actual] == [part.dtype for part in expected]
        same = (actual[0] == expected[0]).all(-1, keepdim=True)
        assert same.float().mean() > 0.85, "a threshold is near in one head at most"
        changed += int((actual[0] != shift.cpu()).any(-1).sum())
        # Triton's interpreter cuts scales in bfloat16 off where a GPU rounds them.
        heads = same.flatten()
        decoded = [(part[1].float() * part[2].float())[:, heads] for part in (actual, expected)]
        if dtype == torch.float32:
            assert torch.equal(actual[1][:, heads], expected[1][:, heads])
            assert relative_distance(*decoded) <= 1e-6
        else:
            assert relative_distance(*decoded) <= 0.01
    assert changed >= (3 if tokens == 1 else 6)


@needs_triton
def test_rows_that_are_not_finite_are_settled_again_on_a_gpu() -> None:
    qdata, scale, shift = stored_rows([8], size=16, dtype=torch.float32)
    scale[:, :, 6] = math.inf
    settled, _, anew = gpu.settle_again_triton(*map(there, (states(1, 1, 40, 16, seed=1), qdata, scale, shift)))
    assert not torch.equal(settled.cpu(), shift) and not anew[:, :, 6].isfinite().any()
    assert anew[:, :, [5, *range(7, 13)]].isfinite().all() and not anew[:, :, [*range(5), 13, 14, 15]].any()


@needs_triton
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("count", [1, 16])
def test_settled_again_by_rows_that_tell_nothing(count: int, value: float) -> None:
    """The one row that is stored is the only one that tells: half of what it says, on a GPU as in plain torch."""
    qdata, scale, shift = stored_rows([count], size=16, dtype=torch.float32)
    x = states(1, 1, 20, 16, seed=1)
    x[..., 3] = value
    if value == 0:
        x.zero_()
    inner = equalized.name_inner(Int8Rows(torch.float32))
    expected = equalized.settle_again(x, [qdata, scale], scale, shift, [], None, inner)
    actual = gpu.settle_again_triton(*map(there, (x, qdata, scale, shift)))
    for found, wanted in zip(actual, expected, strict=True):
        assert torch.equal(found.cpu(), wanted)
    assert count == 16 or expected[0].any()


@pytest.mark.parametrize("value", [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-42, 1e-30, 3e38])
def test_numbers_that_are_no_ordinary_ones(operator: Operator, value: float) -> None:
    for spoil in ((..., 3, slice(None)), (..., 4), (..., 2, 5), (..., slice(1, None), slice(None)), ...):
        x = states(2, 2, 9, 16)
        x[spoil] = value
        check(operator, *operands(x))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_scattered_zeros(operator: Operator, share: float) -> None:
    for shape in ((2, 3, 2, 8), (2, 2, 40, 16), (1, 2, 300, 64)):
        x = states(*shape)
        for tiny in (0.0, 1e-9, 1e-5):
            check(operator, *operands(torch.where(torch.rand(x.shape) < share, tiny * x, x)))


def test_layouts(operator: Operator) -> None:
    x = states(2, 3, 40, 24)
    expected = check(operator, *operands(x))
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2]
    for same in (transposed, strided, x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        assert not same.is_contiguous() and torch.equal(check(operator, *operands(same)), expected)
    _, written, shift = operands(x)
    one = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(check(operator, x[:1], written, shift), check(operator, one, written, shift))


def test_only_what_is_empty_is_settled(operator: Operator) -> None:
    x, written, shift = operands(states(2, 3, 40, 24), rows=50)
    shift = torch.stack([shift, shift + 1], dim=-1).flatten(-2)[..., ::2]
    settled = check(operator, x, written, shift)
    written[0, 1, 49], written[1, 2, 0] = 0.5, torch.nan
    held = check(operator, x, written, shift)
    assert (held[0, 1] == 3).all() and (held[1, 2] == 3).all()
    assert torch.equal(held[1, :2], settled[1, :2]) and not torch.equal(settled[0, 1], held[0, 1])


@needs_cpp
def test_threads_do_not_change_the_result() -> None:
    cpu.load()
    args, before = operands(states(2, 5, 300, 64)), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [OPERATOR(*args) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_cpp
@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda x: x[..., :4], "channels"),
        (0, lambda x: x[0], "x must have 4 dimensions"),
        (0, lambda x: x[:, :2], "dimension 1 of x is 2 and not 3"),
        (0, lambda x: x.int(), "unsupported dtype of x"),
        (1, lambda written: written[0], "written must have"),
        (2, lambda shift: shift.int(), "must be uint8"),
        (2, lambda shift: shift.repeat(1, 1, 2, 1), "must be uint8"),
    ],
)
def test_errors(position: int, change, message: str) -> None:
    cpu.load()
    args = list(operands(states(2, 3, 4, 8)))
    args[position] = change(args[position])
    with pytest.raises(RuntimeError, match=message):
        OPERATOR(*args)


WITHOUT_THE_KERNEL = """
import torch, icw_compile
x = torch.randn(1, 1, 8, 16) * torch.tensor([1.0] * 15 + [50.0])
written, shift = torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
print(torch.ops.icw_int8kv.settle_shift(x, written, shift)[..., 15].item())
"""


def test_plain_torch_without_the_kernel() -> None:
    process = subprocess.run([sys.executable, "-c", WITHOUT_THE_KERNEL], capture_output=True, text=True, check=True)
    assert 4 <= int(process.stdout) <= 6


def test_registration() -> None:
    for x in (states(1, 2, 20, 16), states(9, 16, dtype=torch.bfloat16).t()):
        torch.library.opcheck(OPERATOR, operands(x))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("length", [None, 5, 17])
def test_registration_of_what_settles_again(length: int | None, bits: int) -> None:
    stored = QuantizedKV.encode(states(1, 2, 30, 16), make_format(torch.float32, bits=bits, equalize=True)).value
    if length is None:
        stored.parts[1][:, :, 5:].zero_()
    for x in (None, states(1, 2, 20, 16, seed=1)):
        layout = equalized.name_inner(stored.format.wrapped)
        args = (x, list(stored.rows.values()), stored["scale"], stored["shift"], [], length, layout)
        torch.library.opcheck(torch.ops.icw_int8kv.settle_again.default, args)


@pytest.mark.parametrize("options", [{}, {"cpp_wrapper": True}], ids=["python", "cpp"])
def test_compiled_with_a_symbolic_length(options: dict[str, bool]) -> None:
    @torch.compile(dynamic=True, fullgraph=True, options=options)
    def write(x: Tensor, written: Tensor, shift: Tensor) -> Tensor:
        return shift.copy_(OPERATOR(x * 2, written, shift)) + 1

    for length in (100, 130):
        x, written, shift = operands(states(1, 2, length, 16, seed=length))
        expected = settle_shift(x * 2, written, shift)
        assert torch.equal(write(x, written, shift), expected + 1) and torch.equal(shift, expected)


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_in_the_graph_once_for_each_tensor_and_never_in_decode(kind: type) -> None:
    model = tiny_model(num_hidden_layers=1)
    cache = StaticCache(model.config, max_cache_len=16) if kind is StaticCache else DynamicCache(config=model.config)
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True)
    called = []
    with torch.no_grad():
        for chunk in (tokens(9), tokens(1)):
            _, code = run_and_get_code(step, chunk, past_key_values=cache)
            called.append("".join(code).count("icw_int8kv.settle_shift.default("))
            assert "icw_int8kv.settle_again" not in "".join(code)
    assert called == [2, 0]
    assert isinstance(cache.layers[0].keys, icw_compile.QuantizedKV)
