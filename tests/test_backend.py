"""The ways in, the options, and what bad input gets; with the rewritten graphs run as they are."""

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, compiled, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import icw_compile
from icw_compile import QuantizedKV, UnquantizedCacheWarning
from icw_compile.backend import _rare_collections
from icw_compile.kernels import cpu
from icw_compile.kernels.cpu import KernelUnavailableError
from icw_compile.lab.reference import reference_cache


def test_found_by_name_without_an_import() -> None:
    program = (
        "import sys, torch\n"
        "assert 'icw_int8kv' in torch._dynamo.list_backends()\n"
        "assert 'icw_compile' not in sys.modules\n"
        "f = torch.compile(lambda x: x + 1, backend='icw_int8kv', options={'icw.compiler': 'eager'})\n"
        "assert f(torch.ones(2)).tolist() == [2.0, 2.0]\n"
        "assert 'icw_compile' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


# Two ways in


@pytest.mark.parametrize("padded", [False, True])
def test_generate(padded: bool) -> None:
    model = tiny_model()
    ids = tokens(9, batch=2)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    expected = model.generate(ids, past_key_values=reference_cache(model, 20), **arguments)
    model.compile(backend="icw_int8kv", options=EAGER)
    arguments["cache_implementation"] = "static"
    first = model.generate(ids, **arguments)
    assert len(graphs()) == 2 and not counters["graph_break"]
    second = model.generate(ids, **arguments)
    assert len(graphs()) == 2, "a new cache of the same shape compiles nothing"
    assert torch.equal(first.sequences, expected.sequences)
    assert torch.equal(second.sequences, expected.sequences)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in second.past_key_values.layers)


def test_torch_compile_on_a_module_does_not_reach_generate() -> None:
    """torch's own behaviour, which the README warns of."""
    model = tiny_model()
    torch.compile(model, backend="icw_int8kv", options=EAGER).generate(
        tokens(5), max_new_tokens=3, cache_implementation="static"
    )
    assert not graphs()


def test_replaced_forward() -> None:
    model = tiny_model()
    model.forward = torch.compile(model.forward, backend="icw_int8kv", options=EAGER)
    out = model.generate(tokens(5), max_new_tokens=3, cache_implementation="static", return_dict_in_generate=True)
    assert isinstance(out.past_key_values.layers[0].keys, QuantizedKV)


def test_generate_that_compiles_by_itself_keeps_our_backend() -> None:
    """On accelerators `generate` compiles the decode step with Inductor around the compiled model."""
    model = tiny_model()
    model.compile(backend="icw_int8kv", options=EAGER)
    config = CompileConfig()
    config._compile_all_devices = True
    out = model.generate(
        tokens(5),
        max_new_tokens=3,
        cache_implementation="static",
        compile_config=config,
        return_dict_in_generate=True,
    )
    assert [len(graph.sites) for graph in graphs()] == [4, 4]
    assert isinstance(out.past_key_values.layers[0].keys, QuantizedKV)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_own_loop(guard: Callable[[], Any], dynamic: bool | None) -> None:
    model = tiny_model()
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True, dynamic=dynamic, options=EAGER)
    ids = tokens(12)
    cache, reference = StaticCache(model.config, max_cache_len=16), reference_cache(model, 16)
    with guard():
        logits = [step(piece, past_key_values=cache).logits for piece in ids.split([9, 1, 1, 1], dim=1)]
        expected = [model(piece, past_key_values=reference).logits for piece in ids.split([9, 1, 1, 1], dim=1)]
    assert relative_distance(torch.cat(logits, 1), torch.cat(expected, 1)) <= CLOSE_LOGITS
    assert [len(graph.sites) for graph in graphs()] == [4, 4]


def test_cache_made_beforehand_and_reset() -> None:
    model = tiny_model()
    step = compiled(model)
    cache = icw_compile.static_cache(model, 1, 16)
    ids = tokens(12)
    first = run(step, cache, ids, (9, 1, 1))
    assert len(graphs()) == 2
    stored = [layer.keys for layer in cache.layers]
    cache.reset()
    assert torch.equal(run(step, cache, ids, (9, 1, 1)), first)
    assert len(graphs()) == 2
    assert all(layer.keys is kept for layer, kept in zip(cache.layers, stored, strict=True))
    assert relative_distance(first, run(model, reference_cache(model, 16), ids, (9, 1, 1))) <= CLOSE_LOGITS


def test_compiled_decode_continues_after_eager_cache_operations() -> None:
    model = tiny_model()
    step = compiled(model)
    ids = tokens(10, batch=2)
    cache, reference = StaticCache(model.config, max_cache_len=16), reference_cache(model, 16)
    run(step, cache, ids, (9,))
    run(model, reference, ids, (9,))
    for each in (cache, reference):
        each.reorder_cache(torch.tensor([1, 0]))
    actual, expected = run(step, cache, ids[:, 9:], (1,)), run(model, reference, ids[:, 9:], (1,))
    assert relative_distance(actual, expected) <= CLOSE_LOGITS
    assert len(graphs()) == 2


def test_a_stock_backend_computes_the_same_on_it() -> None:
    model = tiny_model()
    ids = tokens(10)
    stock = torch.compile(model, backend="aot_eager")
    cache = icw_compile.static_cache(model, 1, 16)
    logits = run(stock, cache, ids, (8, 1, 1))
    assert relative_distance(logits, run(model, reference_cache(model, 16), ids, (8, 1, 1))) <= CLOSE_LOGITS
    assert isinstance(cache.layers[0].keys, QuantizedKV)


# Options and bad input


def first_call(model: Any, *, length: int = 5, **settings: Any) -> None:
    step = torch.compile(model, backend="icw_int8kv", **settings)
    with torch.no_grad():
        step(tokens(length), past_key_values=StaticCache(model.config, max_cache_len=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"options": {"icw.fast": True}},
            r"Unknown option 'icw.fast'.*icw.compiler, icw.attention, icw.keys, icw.values, icw.bits, icw.key_bits, "
            r"icw.value_bits, icw.eight_bit_layers, icw.skip_layers, icw.sink_tokens, icw.recent_tokens, icw.regions, "
            r"icw.strict, icw.idioms, icw.mode",
        ),
        ({"options": {"icw.strict": 1}}, r"Option 'icw.strict' is 1; it takes one of: True, False"),
        ({"options": {"icw.compiler": "gcc"}}, r"Option 'icw.compiler' is 'gcc'.*'inductor', 'eager'"),
        ({"mode": "fast"}, r"Option 'mode' is 'fast'.*'max-autotune-no-cudagraphs'"),
        ({"options": {"no_such_option": 1}}, "Unexpected optimization option no_such_option"),
    ],
)
def test_wrong_options(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=message):
        first_call(tiny_model(), **settings)


def test_kernel_is_the_default_on_the_cpu() -> None:
    model = tiny_model()
    step = torch.compile(model, backend="icw_int8kv", options={"icw.compiler": "eager"})
    cache = icw_compile.static_cache(model, 1, 32)
    ids = tokens(22)
    logits = run(step, cache, ids, (20, 1, 1))
    assert [graph.sites[0].lowering for graph in graphs()] == ["as it came", "cpu kernel"]
    assert relative_distance(logits, run(model, reference_cache(model, 32), ids, (20, 1, 1))) <= CLOSE_LOGITS


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's lowering takes over, the report says why, and asking for the kernel is an error."""

    def no_compiler() -> None:
        raise KernelUnavailableError("No working C++ compiler.\nMore about it.")

    monkeypatch.setattr(cpu._loader, "load", no_compiler)
    model = tiny_model()
    ids = tokens(3)
    step = torch.compile(model, backend="icw_int8kv", options={"icw.compiler": "eager"})
    logits = run(step, icw_compile.static_cache(model, 1, 8), ids, (1, 1, 1))
    assert graphs()[0].sites[0].lowering == "inductor decode"
    assert graphs()[0].sites[0].declined == "No working C++ compiler."
    assert relative_distance(logits, run(model, reference_cache(model, 8), ids, (1, 1, 1))) <= CLOSE_LOGITS
    with pytest.raises(BackendCompilerFailed, match="KernelUnavailableError: No working C"):
        run(compiled(model, **{"icw.attention": "cpu"}), icw_compile.static_cache(model, 1, 8), ids, (1,))


def test_a_kernel_that_does_not_compile_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are compiled while it is built. Where that fails, they are compiled again, as without a compiler."""

    class Building:
        def done(self) -> bool:
            return False

        def result(self) -> Path:
            raise KernelUnavailableError("It does not compile.\nMore about it.")

    monkeypatch.setattr(cpu, "begin_build", Building)
    monkeypatch.setattr(cpu, "build", Building().result)
    monkeypatch.setattr(cpu, "_loader", cpu._Loader())
    model = tiny_model()
    ids = tokens(3)
    logits = run(compiled(model, **{"icw.attention": "auto"}), icw_compile.static_cache(model, 1, 8), ids, (1, 1, 1))
    assert len(graphs()) == 1
    assert graphs()[0].sites[0].lowering == "inductor decode"
    assert graphs()[0].sites[0].declined == "It does not compile."
    assert relative_distance(logits, run(model, reference_cache(model, 8), ids, (1, 1, 1))) <= CLOSE_LOGITS
    monkeypatch.setattr(cpu, "_loader", cpu._Loader())
    with pytest.raises(BackendCompilerFailed, match="KernelUnavailableError: It does not compile"):
        run(compiled(model, **{"icw.attention": "cpu"}), icw_compile.static_cache(model, 1, 8), ids, (1,))


def test_collections_are_as_often_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = gc.get_threshold(), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        during.append(gc.get_threshold())
        raise TypeError("not today")

    monkeypatch.setattr("icw_compile.backend.rewrite", fails)
    with pytest.raises(BackendCompilerFailed, match="not today"):
        first_call(tiny_model(), options=EAGER)
    assert during[0][0] > before[0] and gc.get_threshold() == before


@pytest.mark.parametrize("set_aside", [False, True])
def test_what_a_compilation_makes_is_old(set_aside: bool) -> None:
    """No collection looks through it, and none is due for it; but what a process has set aside stays there."""
    gc.collect()
    gc.disable()
    try:
        if set_aside:
            gc.freeze()
        with _rare_collections():
            made = [object()]
        assert any(each is made for each in gc.get_objects(0)) == set_aside
        assert (gc.get_freeze_count() > 0) == set_aside
    finally:
        gc.unfreeze()
        gc.enable()


def test_unsupported_dtype() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"cache of dtype torch\.float64: the supported dtypes are float32"):
        first_call(tiny_model(dtype=torch.float64), options=EAGER)


def test_training_mode() -> None:
    model = tiny_model(attention_dropout=0.1).train()
    with pytest.warns(UnquantizedCacheWarning, match=r"training mode.*model.layers.0.self_attn.*model\.eval\(\)"):
        first_call(model, options=EAGER)
    assert not graphs()[0].sites and len(graphs()[0].skipped) == 4


@pytest.mark.parametrize("strict", [False, True])
def test_gradients(strict: bool) -> None:
    """As stock, in float, and said; an error if strict."""
    model = tiny_model()
    step = torch.compile(model, backend="icw_int8kv", options={**EAGER, "icw.strict": strict})
    cache, message = (
        StaticCache(model.config, max_cache_len=16),
        r"embed_tokens.weight requires grad.*torch.no_grad\(\)",
    )
    if strict:
        with pytest.raises(BackendCompilerFailed, match=message):
            step(tokens(5), past_key_values=cache)
        return
    with pytest.warns(UnquantizedCacheWarning, match=message):
        loss = step(tokens(5), past_key_values=cache).logits.square().mean()
    assert type(cache.layers[0].keys) is Tensor
    loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_gradients_with_an_int8_cache() -> None:
    model = tiny_model()
    step = torch.compile(model, backend="icw_int8kv", options=EAGER)
    with pytest.raises(BackendCompilerFailed, match=r"requires grad.*int8 key/value cache.*is for inference"):
        step(tokens(5), past_key_values=icw_compile.static_cache(model, 1, 16))


class OwnCache(torch.nn.Module):
    """Attention that keeps its keys and values itself, as nothing in transformers does."""

    def forward(self, query: Tensor, new: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys.index_copy_(2, position, new)
        values.index_copy_(2, position, new)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values)


def own_cache_step(**options: object) -> tuple[Tensor, Tensor]:
    """The result of one step on a float cache that no cache layer holds, compiled and not."""
    arguments = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), torch.tensor([3])
    caches = [torch.randn(1, 2, 8, 16) for _ in range(2)]
    expected = OwnCache()(*arguments, *[cache.clone() for cache in caches])
    step = torch.compile(OwnCache(), backend="icw_int8kv", options={**EAGER, **options})
    with torch.no_grad():
        return step(*arguments, *caches), expected


def test_float_cache_without_an_owner_works_and_is_named_once() -> None:
    with pytest.warns(UnquantizedCacheWarning, match="no cache layer of transformers holds it") as caught:
        actual, expected = own_cache_step()
    assert len([w for w in caught if issubclass(w.category, UnquantizedCacheWarning)]) == 1
    assert relative_distance(actual, expected) < 1e-5
    assert not graphs()[0].sites and len(graphs()[0].skipped) == 2


def test_strict() -> None:
    with pytest.raises(BackendCompilerFailed, match="UnquantizedCacheError"):
        own_cache_step(**{"icw.strict": True})


class Encoder(torch.nn.Module):
    """Attention, and no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_graph_without_a_cache_is_untouched() -> None:
    """It may even train."""
    model = Encoder().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(model, backend="icw_int8kv", options=EAGER)(torch.randn(2, 5, 16)).sum().backward()
    assert model.layer.linear1.weight.grad is not None
    assert not graphs()[0].sites and not graphs()[0].skipped


def test_non_finite_states_read_back_as_non_finite() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("inf")
    cache = StaticCache(model.config, max_cache_len=16)
    logits = run(compiled(model), cache, tokens(6), (5, 1))
    assert not logits.isfinite().any()
    values = cache.layers[1].values.dequantize()
    assert not values[:, 0, :6].isfinite().any()
    assert values[:, 0, 6:].isfinite().all() and cache.layers[0].values.dequantize().isfinite().all()
