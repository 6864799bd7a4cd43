"""`QuantizedKV` in eager code: it behaves as the float tensor that it stands for."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import compiled, relative_distance, run, tiny_model, tokens
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import StaticCache

from icw_compile import QuantizedKV, UnquantizedCacheWarning, cache_bytes, static_cache
from icw_compile.cache.tensor import as_float
from icw_compile.compat.fx import schema_of, storage_of
from icw_compile.formats.rules import RULES
from icw_compile.lab.reference import quantize_dequantize, reference_cache
from icw_compile.passes.graph import layout_of

SHAPE = (2, 3, 7, 8)


def states(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(dtype: torch.dtype = torch.float32) -> tuple[QuantizedKV, Tensor]:
    """A quantized tensor and the float tensor that it stands for."""
    x = states(dtype=dtype)
    return QuantizedKV.quantize(x), quantize_dequantize(x)


INDEX = torch.tensor([1, 0, 1])
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "slice of tokens": lambda x: x[:, :, 2:5],
    "crop": lambda x: x[..., :-3, :],
    "step": lambda x: x[:, :, ::2],
    "one head": lambda x: x[:, 1],
    "one sequence": lambda x: x[0],
    "index": lambda x: x[INDEX, ...],
    "boolean index": lambda x: x[torch.tensor([True, False])],
    "index_select": lambda x: x.index_select(0, INDEX),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=0),
    "repeat": lambda x: x.repeat(2, 1, 1, 1),
    "roll": lambda x: x.roll(-1, dims=-2),
    "flip": lambda x: x.flip(2),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x[:, :, 1:3].contiguous(),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(1, 0, 2, 3),
    "repeat_kv": lambda x: x[:, :, None].expand(2, 3, 4, 7, 8).reshape(2, 12, 7, 8),
    "view": lambda x: x.view(6, 7, 8),
    "cat": lambda x: torch.cat([x, x[:, :, :2]], dim=-2),
    "deepcopy": copy.deepcopy,
    "to device": lambda x: x.to("cpu", copy=True),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_are_exact(name: str, dtype: torch.dtype) -> None:
    quantized, values = pair(dtype)
    moved = MOVES[name](quantized)
    assert isinstance(moved, QuantizedKV)
    assert torch.equal(moved.dequantize(), MOVES[name](values))
    assert moved.dtype == dtype


#: Moves that no other shape has.
OF_THE_SHAPE = ("one head", "index", "boolean index", "index_select", "repeat_kv", "view")
#: Moves after which rows that are kept besides are not, or not all.
SCATTERED = ("step", "flip", "along the tokens", "cat")
FORMATS = [{}, {"equalize": True}, {"sink_tokens": 2}, {"sink_tokens": 1, "recent_tokens": 2, "equalize": True}]


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 7, 8), (2, 1, 7, 8)], ids=str)
def test_moves_of_every_format(shape: tuple[int, ...], how: dict[str, Any], grows: bool) -> None:
    """Values, and views where the float tensor would have views: they show what is written to it later."""
    moves = {name: move for name, move in MOVES.items() if shape == SHAPE or name not in OF_THE_SHAPE} | {
        "in front of the channels": lambda x: x.unsqueeze(3),
        "first head": lambda x: x[:, :1].contiguous(),
        "all": lambda x: x[0:].contiguous(),
        "tail": lambda x: x[:, :, 3:].contiguous(),
        "split": lambda x: x.split(4, 2)[1],
        "along the tokens": lambda x: x.repeat_interleave(2, dim=2),
        "cut": lambda x: x[..., 2:4],
    }
    for name, move in moves.items():
        x = QuantizedKV.quantize(states(shape), **how)
        if grows:
            x = torch.cat([x[:, :, :4], states(shape)[:, :, 4:]], dim=2)
        values = x.dequantize()
        moved, expected = move(x), move(values)
        if forgets := "sink_tokens" in how and name in SCATTERED:
            assert relative_distance(moved, expected) < 0.02, name
        else:
            assert torch.equal(as_float(moved), expected), name
        strides = zip(moved.shape, moved.stride(), expected.stride(), strict=True)
        assert all(a == b for size, a, b in strides if size > 1), name
        try:
            x.zero_()
        except NotImplementedError:  # of a view that has to be seen
            assert "sink_tokens" in how, name
            continue
        values.zero_()
        assert forgets or torch.equal(as_float(moved), expected), name


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, :, :2],
    "narrow": lambda x: x.narrow(2, 1, 3),
    "select": lambda x: x.select(0, 1),
    "detach": lambda x: x.detach(),
    "view": lambda x: x.view(6, 7, 8),
    "transpose": lambda x: x.transpose(1, 2),
    "split": lambda x: x.split(4, 2)[1],
    "cut": lambda x: x[..., :4],
    "view of a cut": lambda x: x[..., :4][0].transpose(0, 1),
}


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_views_in_inference_mode(name: str, how: dict[str, Any], grows: bool) -> None:
    """Of a tensor that was made outside of it, a view is none of inference mode: as of a float tensor."""
    x = QuantizedKV.quantize(states(), **how)
    if grows:
        x = QuantizedKV.growing(x.value)
    values = x.dequantize()
    with torch.inference_mode():
        view, expected = VIEWS[name](x), VIEWS[name](values)
        assert x.clone()[:, :, :2].is_inference()
    assert not view.is_inference() and not expected.is_inference()
    assert torch.equal(as_float(view), expected)
    x.index_copy_(2, torch.arange(7), torch.ones(SHAPE))
    values.fill_(1.0)
    torch.testing.assert_close(as_float(view) + 0, expected)


def test_a_write_through_a_view_in_inference_mode() -> None:
    x, values = pair()
    with torch.inference_mode():
        for each in (x, values):
            each[:, :, :2] = 0.0
            each[:, :, 2:4].mul_(2.0)
    x[:, :, 4:] = values[:, :, 4:] = 0.0
    torch.testing.assert_close(x.dequantize(), values)


@pytest.mark.parametrize(
    "write",
    [
        lambda view: view.zero_(),
        lambda view: torch.mul(torch.ones(2, 3, 7, 2), 3.0, out=view),
        lambda view: torch._foreach_mul_([torch.ones(2), view], 2.0),
        lambda view: view[0].add_(1.0),
    ],
)
def test_a_write_that_would_be_lost_is_refused(write: Callable[[Tensor], Any]) -> None:
    x, values = pair()
    with pytest.raises(NotImplementedError, match="the write would be lost"):
        write(x[..., 2:4])
    assert torch.equal(x.dequantize(), values)


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "slice of a head": lambda x: x[..., :4],
    "key transposed": lambda x: x.transpose(2, 3),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(states(), x, x),
    "matmul": lambda x: states() @ x.transpose(2, 3),
    "sum": lambda x: x.sum(dim=2),
    "arithmetic": lambda x: 2 * x - 1,
    "roll of everything": lambda x: x.roll(1),
    "cat of heads": lambda x: torch.cat([x, x], dim=-1),
    "view across heads": lambda x: x.view(2, 3, 56),
    "float64": lambda x: x.to(torch.float64),
    "isfinite": torch.isfinite,
    "zeros_like": torch.zeros_like,
}


@pytest.mark.parametrize("name", VALUES)
def test_everything_else_sees_the_values(name: str) -> None:
    quantized, values = pair()
    result = VALUES[name](quantized)
    assert not isinstance(result, QuantizedKV)
    torch.testing.assert_close(result, VALUES[name](values))


def _set_slice(x: Tensor, new: Tensor) -> None:
    x[:, :, 2:3] = new


def _set_index(x: Tensor, new: Tensor) -> None:
    x[:, :, torch.tensor([-1])] = new


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "index_copy_": lambda x, new: x.index_copy_(2, torch.tensor([3]), new),
    "index_put_": _set_index,
    "slice": _set_slice,
    "copy_ into a view": lambda x, new: x[:, :, 5:6].copy_(new),
    "copy_ of another": lambda x, new: x[:, :, :1].copy_(QuantizedKV.quantize(new)),
    "zero_": lambda x, new: x.zero_(),
    "fill_ with zero": lambda x, new: x.fill_(0),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_quantize_only_what_is_new(name: str) -> None:
    quantized, values = pair()
    new = states((2, 3, 1, 8), seed=1)
    WRITES[name](quantized, new)
    WRITES[name](values, quantize_dequantize(new))
    assert torch.equal(quantized.dequantize(), values)


@pytest.mark.parametrize("name", WRITES)
def test_a_write_of_fakes_encodes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Dynamo traces, it is only to be known that the operands fit, and that the result is what was written."""

    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a write of fakes was carried out")

    with FakeTensorMode():
        quantized, values = pair()
        new = states((2, 3, 1, 8), seed=1)
        for target in [each for each in RULES if schema_of(each).is_mutable]:
            monkeypatch.setitem(RULES, target, asked)
        WRITES[name](quantized, new)
        assert quantized.zero_() is quantized and isinstance(quantized, QuantizedKV)
        for written in (quantized, values):
            with pytest.raises((RuntimeError, IndexError)):
                written.index_copy_(2, torch.tensor([0]), states((2, 3, 2, 8)))


def shape_of(made: Any, operand: QuantizedKV) -> Any:
    """All that is to be known of fakes, and in the memory of which part of the operand each part lies."""
    if isinstance(made, (list, tuple)):
        return [shape_of(each, operand) for each in made]
    inside = made.buffers if isinstance(made, QuantizedKV) else (made,)
    memories = [storage_of(part) for part in operand.buffers]
    parts = [(layout_of(part), memories.count(storage_of(part)), part.storage_offset()) for part in inside]
    is_view = storage_of(made) == storage_of(operand)
    return type(made), getattr(made, "_layout", None), layout_of(made), is_view, made.is_inference(), parts


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_fakes_that_are_alike(how: dict[str, Any]) -> None:
    """What is taken from the fakes of another tensor is what the operation itself returns."""
    with_data = ("index", "boolean index", "index_select")
    moves = {name: move for name, move in MOVES.items() if name not in with_data} | {
        "split": lambda x: x.split(4, 2),
        "index of fakes": lambda x: x[torch.tensor([1, 0, 1])],
        "view and copy": lambda x: x[1:, :, 2:].expand(2, -1, -1, -1).clone(),
        "cut": lambda x: x[..., 2:4],
        "heads": lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 6, -1, 8),
        "write": lambda x: x.index_copy_(2, torch.tensor([1]), torch.ones(2, 3, 1, 8)),
        "write of a part": lambda x: x[:, :, 2:].copy_(torch.ones(2, 3, 5, 8)),
    }
    for name, move in moves.items():
        first_time = []
        for _ in range(2):
            with FakeTensorMode():
                x = QuantizedKV.zeros(SHAPE, torch.float32, **how)
                first_time.append(shape_of(move(x), x))
        with FakeTensorMode():
            tensors = [QuantizedKV.zeros(SHAPE, torch.float32, **how) for _ in range(2)]
            tensors[1:1] = [  # alike are neither these
                QuantizedKV.zeros(SHAPE, torch.bfloat16, **how),
                QuantizedKV.zeros(SHAPE, torch.float32, **how).permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
            ]
            first, lower, strided, again = [shape_of(move(x), x) for x in tensors]
        assert first_time == [first, again], name
        assert lower != first, name
        with FakeTensorMode():
            x = QuantizedKV.zeros(SHAPE, torch.float32, **how).permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
            assert strided == shape_of(move(x), x), name


def test_layers_of_fakes_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def move(x: Tensor) -> Tensor:
        x.index_copy_(2, torch.tensor([1]), torch.ones(2, 3, 1, 8))
        return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 6, -1, 8)

    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a move of fakes was carried out")

    with FakeTensorMode():
        first, second, longer = (QuantizedKV.zeros((2, 3, n, 8), torch.float32) for n in (7, 7, 9))
        moved = move(first)
        for target in RULES:
            monkeypatch.setitem(RULES, target, asked)
        again = move(second)
        assert (again.shape, again.dtype) == (moved.shape, moved.dtype) and isinstance(again, QuantizedKV)
        assert storage_of(again.buffers[0]) not in {storage_of(each.buffers[0]) for each in (moved, second)}
        with pytest.raises(AssertionError, match="a move of fakes"):
            move(longer)
    with FakeTensorMode(), pytest.raises(AssertionError, match="a move of fakes"):
        move(QuantizedKV.zeros((2, 3, 7, 8), torch.float32))


def test_other_in_place_operations_quantize_their_result() -> None:
    quantized, values = pair()
    assert quantized.mul_(2) is quantized
    quantized[:, :, 0].add_(1.0)
    values.mul_(2)
    values[:, :, 0].add_(1.0)
    assert isinstance(quantized, QuantizedKV)
    assert relative_distance(quantized, quantize_dequantize(values)) < 1e-6


def test_views_of_no_rows() -> None:
    """As of floats: whatever the layout is, and though the divided channels of each head are there."""
    x = torch.randn(2, 2, 3, 8)
    for cache in (QuantizedKV.quantize(x, equalize=True), QuantizedKV.quantize(x, equalize=True, recent_tokens=2)):
        for none in (cache[:, :, :0], cache[:, :, torch.zeros(3, dtype=torch.bool)]):
            repeated = none[:, :, None].expand(2, 2, 2, 0, 8)
            assert repeated.reshape(2, 4, 0, 8).shape == repeated.view(2, 4, 0, 8).shape == (2, 4, 0, 8)


def test_views_share_storage_and_copies_do_not() -> None:
    quantized, _ = pair()
    view, clone = quantized[:, :, :2], quantized.clone()
    quantized.zero_()
    assert not view.dequantize().any()
    assert clone.dequantize().any()


def test_repeated_rounding_is_stable() -> None:
    """Quantizing what was read back gives the same rows again."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, values = pair(dtype)
        assert relative_distance(quantize_dequantize(values), values) < 2e-3


@pytest.mark.parametrize("weights_only", [True, False])
def test_save_and_load(weights_only: bool) -> None:
    quantized, values = pair(torch.bfloat16)
    file = io.BytesIO()
    torch.save({"keys": [quantized]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)["keys"][0]
    assert isinstance(loaded, QuantizedKV)
    assert torch.equal(loaded.dequantize(), values)


SAVED: dict[str, Callable[[Tensor], Tensor]] = {
    "one token": lambda x: x[:, :, 0],
    "one row": lambda x: x[0, 0, 0],
    "one axis": lambda x: x.reshape(1, 42, 8),
    "transpose": lambda x: x.transpose(1, 2),
    "in front of the channels": lambda x: x.unsqueeze(3),
    "cut": lambda x: x[..., :4],
}


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("name", SAVED)
def test_save_and_copy_a_view(name: str, how: dict[str, Any]) -> None:
    """Where nobody could check its parts when they are loaded, as an ordinary tensor."""
    x = QuantizedKV.quantize(states(), **how)
    view = SAVED[name](x)
    values = view.clone() if isinstance(view, QuantizedKV) else as_float(view) + 0
    file = io.BytesIO()
    torch.save(view, file)
    file.seek(0)
    loaded, copied = torch.load(file), copy.deepcopy(view)
    x.zero_()
    for each in (loaded, copied):
        assert type(each) in (Tensor, QuantizedKV) and torch.equal(as_float(each), as_float(values))


def test_a_cut_view_is_exported_as_its_values() -> None:
    x, values = pair()
    cut = x[..., :4]
    for exported in (torch.from_numpy(cut.numpy()), torch.from_dlpack(cut)):
        assert type(exported) is Tensor and torch.equal(exported, values[..., :4])


def test_the_memory_of_another_tensor_is_refused() -> None:
    x, values = pair()
    other = QuantizedKV.zeros((1, 3, 4, 8), torch.float32)

    def assign(new: Tensor) -> None:
        x.data = new

    taking: list[Callable[[], Any]] = [
        lambda: assign(torch.zeros(SHAPE)),
        lambda: assign(other),
        lambda: x.set_(other),
        lambda: x.set_(torch.zeros(3)),
        lambda: x.set_(torch.zeros(3).untyped_storage(), 0, (3,), (1,)),
        lambda: x.set_(),
        lambda: torch.zeros(3).set_(x),
    ]
    for take in taking:
        with pytest.raises(NotImplementedError, match="copy_"):
            take()
    assert x.shape == SHAPE and torch.equal(x.dequantize(), values)
    assert isinstance(x.data, QuantizedKV) and torch.equal(x.data.dequantize(), values)
    x.data.zero_()
    assert not x.dequantize().any()


@pytest.mark.parametrize("reset", [lambda x: x.zero_(), lambda x: x[:, :, :].zero_(), lambda x: x.detach().zero_()])
@torch.no_grad()
def test_what_is_written_through_a_view_is_settled_anew(reset: Callable[[Tensor], Tensor]) -> None:
    def step(query: Tensor, keys: Tensor, new: Tensor, at: Tensor) -> Tensor:
        keys.index_copy_(2, at, new)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, keys)

    call = compiled(step)
    keys, x, query = (
        QuantizedKV.zeros((1, 1, 32, 8), torch.float32, equalize=True),
        states((1, 1, 21, 8)),
        torch.ones(1, 1, 1, 8),
    )
    x[..., 0] *= 300
    keys.index_copy_(2, torch.arange(20), x[:, :, :20])
    call(query, keys, x[:, :, 20:], torch.tensor([20]))
    assert keys.shift.any()
    reset(keys)
    for at, row in enumerate(states((1, 1, 21, 8), seed=1).split(1, 2)):
        call(query, keys, row, torch.tensor([at]))
    assert not keys.shift.any()


def test_to_dtype() -> None:
    quantized, values = pair()
    half = quantized.to(torch.bfloat16)
    assert isinstance(half, QuantizedKV) and half.scale.dtype == torch.bfloat16
    assert torch.equal(half.dequantize(), quantize_dequantize(values.bfloat16()))
    full = half.float()
    assert isinstance(full, QuantizedKV) and full.dtype == torch.float32
    assert relative_distance(full, half.dequantize()) < 4e-3


def test_print_and_python_values() -> None:
    quantized, values = pair(torch.bfloat16)
    assert repr(quantized) == ("QuantizedKV(shape=(2, 3, 7, 8), dtype=bfloat16, device='cpu', stored=int8 bfloat16)")
    assert f"{quantized}" == repr(quantized)
    assert quantized.tolist() == values.tolist()
    assert quantized.stored_bytes == 2 * 3 * 7 * (8 + 2)


def test_unsupported_dtype() -> None:
    with pytest.raises(TypeError, match="supported dtypes"):
        QuantizedKV.quantize(states(dtype=torch.float64))
    with pytest.raises(TypeError, match="supported dtypes"):
        QuantizedKV.zeros(SHAPE, torch.float64)


STEPS = st.sampled_from(["write", "crop", "reorder", "repeat", "roll", "append", "copy", "zero"])


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=12), st.integers(0, 2**16))
def test_random_programs(steps: list[str], seed: int) -> None:
    """Any sequence of what generation does to a cache, against a float tensor that stores quantized rows."""
    generator = torch.Generator().manual_seed(seed)
    quantized, values = pair()
    for step in steps:
        batch, heads, length, size = values.shape
        new = torch.randn((batch, heads, 1, size), generator=generator)
        rounded = quantize_dequantize(new)
        if step == "append" or length < 2:
            quantized, values = torch.cat([quantized, new], dim=-2), torch.cat([values, rounded], dim=-2)
        elif step == "write":
            at = torch.randint(0, length, (1,), generator=generator)
            quantized.index_copy_(2, at, new)
            values.index_copy_(2, at, rounded)
        elif step == "crop":
            quantized, values = quantized[..., :-1, :], values[..., :-1, :]
        elif step == "reorder":
            order = torch.randint(0, batch, (batch,), generator=generator)
            quantized, values = quantized.index_select(0, order), values.index_select(0, order)
        elif step == "repeat" and batch < 8:
            quantized, values = quantized.repeat_interleave(2, dim=0), values.repeat_interleave(2, dim=0)
        elif step == "roll":
            quantized, values = quantized.roll(-1, dims=-2), values.roll(-1, dims=-2)
        elif step == "copy":
            quantized, values = copy.deepcopy(quantized), values.clone()
        elif step == "zero":
            quantized.zero_()
            values.zero_()
    assert isinstance(quantized, QuantizedKV)
    assert torch.equal(quantized.dequantize(), values)


# A cache whose layers hold it, used by transformers' own code and by an uncompiled model.


def filled(length: int = 9, max_cache_len: int = 16) -> tuple[object, StaticCache, StaticCache]:
    model = tiny_model()
    ours, reference = static_cache(model, 2, max_cache_len), reference_cache(model, max_cache_len)
    ids = tokens(length, batch=2)
    for cache in (ours, reference):
        run(model, cache, ids, (length,))
    return model, ours, reference


def same(ours: StaticCache, reference: StaticCache) -> bool:
    return all(
        torch.equal(getattr(a, name).dequantize(), getattr(b, name))
        for a, b in zip(ours.layers, reference.layers, strict=True)
        for name in ("keys", "values")
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_uncompiled_model_runs_on_it(name: str) -> None:
    model = tiny_model(name, attention="eager")
    ours, reference = static_cache(model, 1, 40), reference_cache(model, 40)
    ids = tokens(30)
    chunks = (9, *(1,) * 12)
    with pytest.warns(UnquantizedCacheWarning, match="in code that is not compiled"):
        logits = run(model, ours, ids, chunks)
    assert relative_distance(logits, run(model, reference, ids, chunks)) < 1e-5
    assert all(isinstance(layer.keys, QuantizedKV) for layer in ours.layers)


def test_cache_operations() -> None:
    _, ours, reference = filled()
    for cache in (ours, reference):
        cache.reorder_cache(torch.tensor([1, 0]))
    assert same(ours, reference)
    twin = copy.deepcopy(ours)
    for layer in ours.layers:
        layer.keys, layer.values = (
            layer.keys.repeat_interleave(2, dim=0),
            layer.values.repeat_interleave(2, dim=0),
        )
    for layer in reference.layers:
        layer.keys, layer.values = (
            layer.keys.repeat_interleave(2, dim=0),
            layer.values.repeat_interleave(2, dim=0),
        )
    assert same(ours, reference)
    ours.reset()
    assert not any(layer.keys.dequantize().any() for layer in ours.layers)
    assert ours.get_seq_length() == 0
    assert twin.get_seq_length() == 9 and twin.layers[0].keys.dequantize().any()


def test_cache_survives_save_and_load() -> None:
    model, ours, _ = filled()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert cache_bytes(loaded) == cache_bytes(ours)
    ids = tokens(1, batch=2)
    assert torch.equal(run(model, loaded, ids, (1,)), run(model, ours, ids, (1,)))


def test_static_cache_from_a_config() -> None:
    model = tiny_model("gemma3_text", dtype=torch.bfloat16)
    for source in (model, model.config):
        cache = static_cache(source, 3, 64, dtype=torch.bfloat16)
        assert isinstance(cache, StaticCache)
        assert [layer.keys.shape for layer in cache.layers] == [(3, 2, 16, 64), (3, 2, 64, 64)]
        assert all(layer.is_initialized and layer.keys.dtype == torch.bfloat16 for layer in cache.layers)
    with pytest.raises(TypeError, match="supported dtypes"):
        static_cache(model, 1, 8, dtype=torch.float64)
