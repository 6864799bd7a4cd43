"""New rows are encoded in one operation on the CPU: its C++ kernel, and what the pass replaces by it."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from graphs import HEAD_DIM, HEADS, counts, kv, run, trace
from torch import Tensor

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.formats.equalized import quantize_divided
from icw_compile.kernels import cpu
from icw_compile.passes import PASSES, KVGraph, run_passes

OPERATOR = torch.ops.icw_int8kv.quantize_divided.default
ENCODE = PASSES[-1:]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels apart": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads behind tokens": lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2),
}

needs_kernel = pytest.mark.skipif(not cpu.is_available(), reason="no C++ compiler")


def states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows of random norms; some are zeros, hold what is no number, or are too small for their scale."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 30 * torch.rand(shape[:-1], generator=generator).unsqueeze(-1)
    flat = x.view(-1, shape[-1])
    for row, value in ((3, 0.0), (5, torch.nan), (7, torch.inf), (9, 1e-39)):
        if row < len(flat):
            flat[row, 1 if value != value or value > 1 else slice(None)] = value
    return x.to(dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 64), (2, 3, 70, 17), (1, 2, 200, 128), (2, 1, 0, 8), (12, 8), (3, 5, 8)])
def test_the_kernel_does_what_plain_torch_does(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    cpu.load()
    x = LAYOUTS[layout](states(*shape, dtype=dtype))
    shift = torch.randint(0, 8, (*shape[:-2], 1, shape[-1]), dtype=torch.uint8)
    for args in ((x, None, True), (x, shift, True), (x, shift, False), (x, shift[..., :1].expand_as(shift), False)):
        for actual, expected in zip(OPERATOR(*args), quantize_divided(*args), strict=True):
            assert actual.dtype == expected.dtype and actual.is_contiguous() and expected.is_contiguous()
            assert torch.equal(actual.float().nan_to_num(-1), expected.float().nan_to_num(-1))


@needs_kernel
def test_threads_do_not_change_the_result() -> None:
    cpu.load()
    args, before = (
        (states(2, 5, 300, 64), torch.full((2, 5, 1, 64), 2, dtype=torch.uint8), True),
        torch.get_num_threads(),
    )
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.cat([part.float().nan_to_num(-1).flatten() for part in OPERATOR(*args)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernel
@pytest.mark.parametrize(
    ("x", "shift", "message"),
    [
        (torch.ones(4), None, r"\[\.\.\., T, D\]"),
        (torch.ones(2, 4, dtype=torch.int32), None, "unsupported dtype of x"),
        (torch.ones(2, 4), torch.ones(1, 4), "must be uint8"),
        (torch.ones(2, 4), torch.ones(1, 3, dtype=torch.uint8), "shift must be"),
        (torch.ones(3, 2, 4), torch.ones(2, 1, 4, dtype=torch.uint8), "dimension 0 of shift is 2 and not 3"),
    ],
)
def test_errors(x: Tensor, shift: Tensor | None, message: str) -> None:
    cpu.load()
    with pytest.raises(RuntimeError, match=message):
        OPERATOR(x, shift, True)


WITHOUT_THE_KERNEL = """
import torch, icw_compile
print(torch.ops.icw_int8kv.quantize_divided(torch.tensor([[254.0, 2.0]]), None, True))
"""


def test_plain_torch_without_the_kernel() -> None:
    process = subprocess.run([sys.executable, "-c", WITHOUT_THE_KERNEL], capture_output=True, text=True, check=True)
    assert "[[127,   1]]" in process.stdout and "[[2.]]" in process.stdout


def test_registration() -> None:
    shift = torch.ones(1, 2, 1, 16, dtype=torch.uint8)
    torch.library.opcheck(OPERATOR, (states(1, 2, 20, 16).nan_to_num(1, 1), shift, True))
    torch.library.opcheck(OPERATOR, (states(9, 16, dtype=torch.bfloat16).nan_to_num(1, 1).t(), None, False))


def write(keys: Tensor, new: Tensor, position: Tensor) -> Tensor:
    return keys.index_copy_(2, position, new)


def written(quantized: QuantizedKV, write: Callable[..., Tensor] = write, new: Tensor | None = None) -> KVGraph:
    graph = trace(write, kv(), kv(1) if new is None else new, torch.tensor([3]), quantized=[0])
    fakes = quantized.whole.of_parts(graph.fake_mode.from_tensor(part) for part in quantized.buffers)
    graph.stored = dict.fromkeys(graph.stored, fakes)
    run_passes(graph, PASSES[:-1])
    return graph


@needs_kernel
@pytest.mark.parametrize("equalize", [False, True])
def test_one_operation_for_the_rows_that_are_written(equalize: bool) -> None:
    graph = written(QuantizedKV.quantize(kv(), equalize=equalize))
    before = counts(graph)
    assert before["quantize_per_head"] == 1 and before.get("divide_channels", 0) == int(equalize)
    graph.find_kernel = lambda device: cpu.KERNEL
    assert run_passes(graph, ENCODE)[0].matches == 1
    after = counts(graph)
    assert after["quantize_divided"] == 1 and not {"quantize_per_head", "divide_channels"} & set(after)
    assert run_passes(graph, ENCODE)[0].matches == 0


@needs_kernel
def test_the_rows_are_the_same() -> None:
    inputs = kv(), kv(1), torch.tensor([3])
    results = []
    for kernel in ("", cpu.KERNEL):
        cpu.load()
        graph = written(QuantizedKV.quantize(inputs[0]))
        graph.find_kernel = lambda device, kernel=kernel: kernel  # type: ignore[misc]
        run_passes(graph, ENCODE)
        assert ("quantize_divided" in counts(graph)) == (kernel != "")
        results.append(run(graph, QuantizedKV.quantize(inputs[0]), *inputs[1:]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_that_broadcast() -> None:
    """Rows without the dimensions of a batch have a shift for each head, which is one too many for the operation."""

    def write_at(keys: Tensor, new: Tensor, position: Tensor) -> Tensor:
        keys[:, :, position] = new
        return keys

    graph = written(QuantizedKV.quantize(kv(), equalize=True), write_at, kv(1)[0])
    graph.find_kernel = lambda device: cpu.KERNEL
    assert counts(graph)["divide_channels"] == 1
    assert run_passes(graph, ENCODE)[0].matches == 0


def test_where_there_is_no_kernel() -> None:
    """Inductor fuses the many operations there; one in plain torch would be slower."""
    graph = written(QuantizedKV.quantize(kv(), equalize=True))
    graph.find_kernel = lambda device: "as asked"
    assert run_passes(graph, ENCODE)[0].matches == 0 and counts(graph)["quantize_per_head"] == 1


def test_on_another_device() -> None:
    asked = []

    def function(x: Tensor) -> Tensor:
        return torch.ops.icw_int8kv.quantize_per_head.default(x, torch.bfloat16)[0]

    graph = KVGraph(torch.fx.symbolic_trace(function))
    for node in graph.graph.nodes:
        node.meta["val"] = torch.ones(1, HEADS, 1, HEAD_DIM, device="meta")
    graph.find_kernel = lambda device: asked.append(device) or cpu.KERNEL
    assert run_passes(graph, ENCODE)[0].matches == 0 and not asked
