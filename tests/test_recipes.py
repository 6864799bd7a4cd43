"""What `CONTRIBUTING.md` says of adding to the package, done: a format of packed bits, and a kernel.

Neither is part of the product: both are as short as they can be, and all that they need of the package is what the
recipe names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

import icw_compile.formats
import icw_compile.kernels
import icw_compile.options
from icw_compile import QuantizedKV
from icw_compile.formats import Equalized, Evaluator, Format, KeepsRows, Part, Stored
from icw_compile.kernels import AttentionCall, AttentionKernel
from icw_compile.kernels.inductor import ATTENTION_ARGUMENTS, attention_decode_lse
from icw_compile.kernels.interface import declines_rows

aten = torch.ops.aten
#: A step of 4 bits is a seventh of a row's largest value: random rows are that far off.
ROUNDING = 0.1


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.float().abs().amax(dim=-1, keepdim=True) / 7).clamp(min=1e-20)
    levels = ((x.float() / scale).round() + 8).to(torch.uint8)
    scale = torch.where(x.abs().amax(dim=-1, keepdim=True) == 0, 0.0, scale)
    return levels[..., ::2] | (levels[..., 1::2] << 4), scale


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    levels = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return ((levels.float() - 8) * scale).to(dtype)


torch.library.define("icw_test_recipes::pack", "(Tensor x) -> (Tensor packed, Tensor scale)")
torch.library.impl("icw_test_recipes::pack", "CompositeImplicitAutograd", pack)
torch.library.define("icw_test_recipes::unpack", "(Tensor packed, Tensor scale, ScalarType dtype) -> Tensor")
torch.library.impl("icw_test_recipes::unpack", "CompositeImplicitAutograd", unpack)
_ops = torch.ops.icw_test_recipes


@dataclass(frozen=True)
class PackedRows(Format):
    """Two channels in a byte, one scale for each row."""

    float_dtype: torch.dtype

    def __str__(self) -> str:
        return f"4 bits {self.float_dtype}"

    @property
    def name(self) -> str:
        return "packed"

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("packed", "BHTD"), Part("scale", "BHT1"))

    @property
    def dtype(self) -> torch.dtype:
        return self.float_dtype

    def channels(self, run: Evaluator, x: Stored) -> Any:
        return run.tensor(x.parts[0]).shape[-1] * 2

    def empty(self, run: Evaluator, size: Sequence[Any], device: torch.device) -> Stored:
        packed = run.call(aten.zeros.default, [*size[:-1], size[-1] // 2], dtype=torch.uint8, device=device)
        scale = run.call(aten.zeros.default, [*size[:-1], 1], dtype=torch.float32, device=device)
        return Stored(self, (packed, scale))

    def encode(self, run: Evaluator, values: Any, into: Stored) -> dict[str, Any]:
        return dict(zip(("packed", "scale"), run.call(_ops.pack.default, values), strict=True))

    def decode(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Any:
        return run.call(_ops.unpack.default, *x.parts, dtype)

    def written(self, x: Stored) -> Any:
        return x["scale"]

    def cast(self, run: Evaluator, x: Stored, dtype: torch.dtype) -> Stored:
        return replace(x, format=PackedRows(dtype))

    def bytes_per_token(self, heads: int, head_dim: int) -> int:
        return heads * (head_dim // 2 + 4)

    def checked(self, parts: Sequence[Tensor], size: Sequence[int]) -> None:
        assert parts[0].shape[-1] * 2 == size[-1]


FORMATS = {
    "packed": PackedRows,
    "equalized": lambda dtype: Equalized(PackedRows(dtype)),
    "keeps rows": lambda dtype: KeepsRows(Equalized(PackedRows(dtype)), 2, 3),
}


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_of_a_new_format(name: str) -> None:
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    q = QuantizedKV.encode(x, FORMATS[name](x.dtype))
    assert q.shape == x.shape and q.stride() == x.stride() and relative_distance(q, x) < ROUNDING
    for move in (
        lambda x: x[:, :, 1:5],
        lambda x: x[:, 1],
        lambda x: x.index_select(0, torch.tensor([1, 1])),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :, None].expand(2, 3, 2, 7, 8).reshape(2, 6, 7, 8),
        lambda x: x[..., :4],
    ):
        assert relative_distance(move(q), move(q.dequantize())) < 1e-6
    new = torch.randn(2, 3, 2, 8, generator=torch.Generator().manual_seed(1))
    before = q.dequantize()
    grown = torch.cat([q, new], dim=2)
    assert isinstance(grown, QuantizedKV) and grown.shape == (2, 3, 9, 8)
    if name != "keeps rows":  # what was the last row is one no longer
        assert torch.equal(grown[:, :, :7].dequantize(), before)
    assert relative_distance(grown[:, :, 7:], new) < 2 * ROUNDING


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("packed", "static"),
        ("keeps rows", "dynamic"),
        pytest.param("packed", "dynamic", marks=pytest.mark.slow),
        pytest.param("keeps rows", "static", marks=pytest.mark.slow),
        pytest.param("equalized", "static", marks=pytest.mark.slow),
        pytest.param("equalized", "dynamic", marks=pytest.mark.slow),
    ],
)
def test_model_on_a_new_format(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as uncompiled, where the tensor itself, whose moves and writes are tested above, does all of it."""
    monkeypatch.setattr(icw_compile.options, "make_format", lambda dtype, **options: FORMATS[name](dtype))
    model, ids, chunks = tiny_model(), tokens(24), (9, 1, 1, 6, 1, 1)
    layout = FORMATS[name](torch.float32)
    expected_cache = StaticCache(model.config, max_cache_len=40)
    run(model, expected_cache, ids[:, :1], (1,))
    for layer in expected_cache.layers:
        for each in ("keys", "values"):
            setattr(layer, each, QuantizedKV.empty(getattr(layer, each).shape, layout, torch.device("cpu")))
        layer.cumulative_length.zero_()
    expected = run(model, expected_cache, ids, chunks)
    torch._dynamo.reset()
    call = torch.compile(model, backend="icw_int8kv", options=EAGER)
    cache = StaticCache(model.config, max_cache_len=40) if kind == "static" else DynamicCache(config=model.config)
    actual = run(call, cache, ids, chunks)
    assert relative_distance(actual, expected) <= CLOSE_LOGITS
    assert all(layer.keys.format == layout and layer.values.format == layout for layer in cache.layers)
    declined = {site.declined for graph in graphs() for site in graph.sites}
    assert all(site.lowering == "inductor prefill" for graph in graphs() for site in graph.sites), declined


def toy(*arguments: Any) -> Tensor:
    return attention_decode_lse(*arguments)[0]


torch.library.define("icw_test_recipes::toy", f"({ATTENTION_ARGUMENTS}) -> Tensor")
torch.library.impl("icw_test_recipes::toy", "CPU", toy)
torch.library.register_fake("icw_test_recipes::toy", lambda query, *others: torch.empty_like(query))


def toy_declines(call: AttentionCall) -> str | None:
    if reason := declines_rows(call, ("cpu",)):
        return reason
    return None if call.query.shape[2] == 1 else "the toy takes one query token"


TOY = AttentionKernel("toy", "toy", ("cpu",), lambda: None, toy_declines, _ops.toy.default)


@pytest.mark.parametrize(
    ("options", "lowering", "declined"),
    [
        ({}, "toy", ""),
        (
            {"icw.sink_tokens": 2, "icw.recent_tokens": 3},
            "inductor decode",
            "some keys are kept in the model's dtype, and the kernel reads stored ones only",
        ),
    ],
    ids=["all stored", "some kept"],
)
def test_model_with_a_new_kernel(
    options: dict[str, int], lowering: str, declined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what it says that it takes; the rest is computed by Inductor."""
    monkeypatch.setattr(icw_compile.kernels, "KERNELS", (TOY,))
    model, ids, chunks = tiny_model(), tokens(14), (9, 1, 1, 1, 1, 1)
    torch._dynamo.reset()
    expected = run(
        torch.compile(model, backend="icw_int8kv", options=EAGER | options),
        DynamicCache(config=model.config),
        ids,
        chunks,
    )
    torch._dynamo.reset()
    before = len(graphs())
    auto = EAGER | options | {"icw.attention": "auto"}
    actual = run(
        torch.compile(model, backend="icw_int8kv", options=auto), DynamicCache(config=model.config), ids, chunks
    )
    assert relative_distance(actual, expected) < 1e-5
    made = graphs()[before:]
    lowerings = [{site.lowering for site in graph.sites} for graph in made]
    assert lowerings[0] == {"inductor prefill"} and lowerings[-1] == {lowering}
    assert {site.declined for site in made[-1].sites} == {declined}
    assert {site.declined for site in made[0].sites} == {declined or "the toy takes one query token"}


def test_the_planner_knows_a_new_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two channels in a byte, which the planner was never told of."""
    layout = KeepsRows(Equalized(PackedRows(torch.float32)), 2, 3)
    monkeypatch.setattr(icw_compile.options, "make_format", lambda dtype, **kwargs: layout)
    expected = icw_compile.plan(tiny_model("llama")).evaluate(tokens=20, batch=3)
    made = QuantizedKV.growing(QuantizedKV.encode(torch.randn(3, 2, 20, 64), layout).value).with_spare()
    assert expected.bytes == 4 * made.stored_bytes
