"""Nodes that capture cannot retrace stay as Dynamo spelled them, and the cache beside them is int8 all the same."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._pytree import tree_map
from transformers import DynamicCache, PreTrainedModel, StaticCache

import icw_compile
from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache, quantize_dequantize

CHUNKS = (9, 1, 1, 2, 1)


class Int8Weight(Tensor):
    """A matrix as int8 rows and a scale each, as packages for quantized weights make them."""

    rows: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor) -> "Int8Weight":
        return Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype, device=rows.device)  # type: ignore

    def __init__(self, rows: Tensor, scale: Tensor) -> None:
        self.rows, self.scale = rows, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["rows", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> "Int8Weight":
        return cls(parts["rows"], parts["scale"])

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return "Int8Weight()"

    def _stable_hash_for_caching(self) -> str:
        return "Int8Weight"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].rows, args[0].scale)
        args, kwargs = tree_map(lambda x: x.rows * x.scale if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)

    @classmethod
    def of(cls, weight: Tensor) -> nn.Parameter:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return nn.Parameter(cls((weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)


def with_int8_weights() -> PreTrainedModel:
    model = tiny_model()
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.weight = Int8Weight.of(module.weight)
    return model


class Branches(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2.0, lambda x: x - 1.0, (self.inner(x),))


class Region(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Heads(nn.Module):
    """Two matrices in a list, as tensors of a stack: a call that takes a list of subclasses and returns two tensors."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.a, self.b = (Int8Weight.of(torch.randn(256, 256) / 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.a, self.b])
        small, large = torch.aminmax(self.a, dim=0)
        first, second = torch.split(torch.cat(tensors=(self.a, self.b)), 256)
        return self.inner(x) + x @ both[1] + x @ first @ second + small * large


def with_mlp(wrapper: Callable[[nn.Module], nn.Module]) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        model = tiny_model()
        for layer in model.model.layers:
            layer.mlp = wrapper(layer.mlp)
        return model

    return make


def with_mask_under_vmap() -> PreTrainedModel:
    model = tiny_model()
    forward = model.forward

    def masked(ids: Tensor, past_key_values: Any) -> Any:
        seen = past_key_values.get_seq_length()
        rows, columns = torch.arange(ids.shape[1]) + seen, torch.arange(seen + ids.shape[1])
        may_read = torch.vmap(torch.vmap(lambda q, k: (q >= k) & (k >= 0), (None, 0)), (0, None))
        return forward(ids, attention_mask=may_read(rows, columns)[None, None], past_key_values=past_key_values)

    model.forward = masked
    return model


MAKERS = {
    "subclass": with_int8_weights,
    "cond": with_mlp(Branches),
    "region": with_mlp(Region),
    "lists": with_mlp(Heads),
    "vmap": with_mask_under_vmap,
}
#: Targets of nodes that must be in the rewritten graph.
KEPT = {"subclass": "linear", "cond": "cond", "region": "invoke_subgraph", "lists": "stack", "vmap": "_add_batch_dim"}


def cache_of(kind: str, model: PreTrainedModel) -> Any:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=24)


def check_model(model: PreTrainedModel, cache: Any, **options: Any) -> None:
    """int8 everywhere, as the reference, in as many graphs as without kept nodes; nothing is complained of."""
    compiled = torch.compile(model, backend="icw_int8kv", fullgraph=True, **{"options": EAGER, **options})
    ids = tokens(sum(CHUNKS), batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", icw_compile.UnquantizedCacheWarning)
        actual = run(compiled, cache, ids, CHUNKS)
    assert relative_distance(actual, run(model, dynamic_reference_cache(model), ids, CHUNKS)) <= CLOSE_LOGITS
    assert all(isinstance(part, QuantizedKV) for layer in cache.layers for part in (layer.keys, layer.values))
    assert all(len(graph.sites) == 4 and not graph.skipped for graph in graphs())
    assert all("dequantized" not in read for graph in graphs() for site in graph.sites for read in site.reads)


@pytest.mark.parametrize("kind", [pytest.param("dynamic", marks=pytest.mark.slow), "static"])
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "vmap"])
def test_kept_beside_the_cache(name: str, kind: str) -> None:
    model = MAKERS[name]()
    check_model(model, cache_of(kind, model))


def test_mask_under_vmap() -> None:
    model = with_mask_under_vmap()
    check_model(model, DynamicCache(config=model.config))


@pytest.mark.parametrize(
    "name", ["cond", *(pytest.param(name, marks=pytest.mark.slow) for name in ("subclass", "vmap"))]
)
def test_symbolic_sizes(name: str) -> None:
    model = MAKERS[name]()
    check_model(model, DynamicCache(config=model.config), dynamic=True)


@pytest.mark.slow  # of the quick ones, those of torchao's weights are compiled
@pytest.mark.parametrize("name", list(MAKERS))
def test_compiled_by_inductor(name: str) -> None:
    model = MAKERS[name]()
    check_model(model, DynamicCache(config=model.config), options={})


@pytest.mark.parametrize("name", ["subclass", "cond"])  # a region and freezing are too much for Dynamo itself
def test_frozen_parameters(name: str) -> None:
    model = MAKERS[name]()
    with inductor_config.patch(freezing=True):
        check_model(model, StaticCache(model.config, max_cache_len=24))


@pytest.mark.parametrize("name", MAKERS)
def test_explained(name: str) -> None:
    model = MAKERS[name]()
    with torch.no_grad():
        explanation = icw_compile.explain(model, tokens(5), past_key_values=DynamicCache(config=model.config))
    (graph,) = explanation.graphs
    assert len(graph.sites) == 4 and not graph.skipped
    for text in (graph.captured, graph.rewritten):
        assert KEPT[name] in text and "scaled_dot_product" in str(explanation)


def test_a_graph_without_a_cache() -> None:
    """Nothing is rewritten, so Dynamo's own graph is compiled."""
    module = Region(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, backend="icw_int8kv", options=EAGER)(x), module(x))


# A kept node that takes the cache itself.


def states(tokens: int = 8, seed: int = 0) -> Tensor:
    """Rows that the cache stores exactly."""
    return quantize_dequantize(torch.randn(2, 2, tokens, 16, generator=torch.Generator().manual_seed(seed)))


def decode(touch: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    """A step of attention over a static cache, with ``touch(keys, other)`` between the write and the read."""

    def step(keys: Tensor, values: Tensor, new: Tensor, other: Tensor, position: Tensor) -> Any:
        keys.index_copy_(2, position, new)
        values.index_copy_(2, position, new)
        found = touch(keys, other)
        return sdpa(new, keys, values), found

    return step


@torch.compiler.nested_compile_region
def read_in_region(keys: Tensor, other: Tensor) -> Tensor:
    return keys.mean(2) * other.sum()


@torch.compiler.nested_compile_region
def write_in_region(keys: Tensor, other: Tensor) -> Tensor:
    keys.mul_(2.0)
    return other + 1


def read_in_branch(keys: Tensor, other: Tensor) -> Tensor:
    return torch.cond(other.sum() > 1e9, lambda k: k * 2, lambda k: k * 3, (keys,))


def multiply_by_subclass(keys: Tensor, other: Tensor) -> Tensor:
    return keys @ other


def write_subclass(keys: Tensor, other: Tensor) -> Tensor:
    return keys.mul_(other[0])


def read_under_vmap(keys: Tensor, other: Tensor) -> Tensor:
    return torch.vmap(lambda k: k.amax(1) * 2)(keys)


def write_under_vmap(keys: Tensor, other: Tensor) -> Tensor:
    torch.vmap(lambda k: k.mul_(2.0))(keys)
    return other + 1


READERS = [read_in_region, read_in_branch, multiply_by_subclass, read_under_vmap]
WRITERS = [write_in_region, write_subclass, write_under_vmap]


def arguments_of_step() -> tuple[Tensor, ...]:
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
    return states(), states(seed=1), states(1, seed=2), Int8Weight.of(weight).detach(), torch.tensor([3])


@contextmanager
def complaints() -> Iterator[list[str]]:
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(each.message) for each in caught if each.category is icw_compile.UnquantizedCacheWarning]


@torch.no_grad()
@pytest.mark.parametrize("touch", [*READERS, *WRITERS], ids=lambda touch: touch.__name__)
def test_a_quantized_cache_is_read_and_written(touch: Callable[..., Any]) -> None:
    """What cannot act on int8 acts on the values, and what it wrote is stored; or it is refused."""
    if touch in (read_in_region, write_in_region, read_in_branch) and torch.__version__ < "2.12":
        pytest.skip("Dynamo hands no tensor subclass to an operator with graphs in torch 2.11")
    keys, values, *rest = arguments_of_step()
    stored = [QuantizedKV.quantize(each) for each in (keys, values)]
    compiled = torch.compile(decode(touch), backend="icw_int8kv", fullgraph=True, options=EAGER)
    expected = decode(touch)(keys, values, *rest)
    with complaints() as said:
        try:
            actual = compiled(*stored, *rest)
        except Exception as error:
            cause = getattr(error, "inner_exception", error)
            assert touch is write_under_vmap and isinstance(cause, NotImplementedError), error
            return
    for ours, plain in zip(actual, expected, strict=True):
        ours = ours.dequantize() if isinstance(ours, QuantizedKV) else ours
        assert relative_distance(ours, plain) <= 1e-2
    assert relative_distance(stored[0].dequantize(), keys) <= 1e-2
    assert len(said) == 1, "slow is said"


class LooksAtKeys(nn.Module):
    """An attention that hands its cached keys to an operator with graphs of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = self.inner(*args, **kwargs)
        cache = kwargs["past_key_values" if "past_key_values" in kwargs else "cache"]  # from transformers 5.24 on
        keys = cache.layers[self.inner.layer_idx].keys
        mean = torch.cond(output.sum() > 0, lambda k: k.mean() * 2, lambda k: k.mean() * 3, (keys,))
        return output + mean, weights


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_float_cache_that_is_held_stays_float(kind: str) -> None:
    """Keys, not values, and the warning says what holds them and where."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn = LooksAtKeys(layer.self_attn)
    compiled = torch.compile(model, backend="icw_int8kv", fullgraph=True, options=EAGER)
    cache, ids = cache_of(kind, model), tokens(sum(CHUNKS), batch=2)
    with complaints() as said:
        actual = run(compiled, cache, ids, CHUNKS)
    assert "`cond`" in said[0] and "layers.0.self_attn" in said[0]
    assert not any(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)
    assert all(isinstance(layer.values, QuantizedKV) for layer in cache.layers)
    assert relative_distance(actual, run(model, cache_of(kind, model), ids, CHUNKS)) <= 2e-2
