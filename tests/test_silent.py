"""What Dynamo leaves out is said: once, with the cause and the remedy; and what is meant to be is not talked about."""

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import EAGER, graphs, tiny_model, tokens
from transformers import (
    AttentionInterface,
    AutoModel,
    BertConfig,
    Cache,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import icw_compile
from icw_compile import QuantizedKV, UnquantizedCacheError, UnquantizedCacheWarning
from icw_compile.compat.watch import reopen_all
from icw_compile.report import next_name

LIMIT = "recompile_limit is 8"


def chatty(*args: Any, **kwargs: Any) -> Any:
    """As in transformers' own example of an attention function; not traceable because of the print."""
    print(end="")
    return sdpa_attention_forward(*args, **kwargs)


AttentionInterface.register("chatty", chatty)


def compile_(module: torch.nn.Module, *, dynamic: bool | None = None, **options: Any) -> Any:
    module.compile(backend="icw_int8kv", dynamic=dynamic, options={**EAGER, **options})
    return module


def kinds(cache: Cache) -> str:
    """``i`` for each int8 layer, ``f`` for each float one, ``x`` for one that is half of each."""
    held = [(type(layer.keys) is QuantizedKV, type(layer.values) is QuantizedKV) for layer in cache.layers]
    return "".join("x" if keys != values else "i" if keys else "f" for keys, values in held)


def generate(model: PreTrainedModel, length: int = 7, **kwargs: Any) -> Cache:
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    cache: Cache = model.generate(tokens(length), **settings).past_key_values
    return cache


class Heard(list[str]):
    """The messages of ours that were heard in a block; all other warnings are ignored."""

    def __enter__(self) -> "Heard":
        self._catch = warnings.catch_warnings(record=True)
        self._all: Any = self._catch.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._catch.__exit__(*exception)
        self += [str(w.message) for w in self._all if "icw_int8kv" in str(w.message)]


@pytest.fixture
def stance() -> Iterator[Callable[[str], None]]:
    """`torch.compiler.set_stance`, until the end of the test."""
    yield lambda name: torch.compiler.set_stance(name)  # type: ignore[arg-type]
    torch.compiler.set_stance("default")


# -- Dynamo gives up


@pytest.mark.parametrize("then_static", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layers_compiled_one_by_one(then_static: bool) -> None:
    model = tiny_model(num_hidden_layers=10, hidden_size=32, head_dim=16)
    for layer in model.model.layers:
        compile_(layer)
    assert kinds(generate(model, max_new_tokens=3)) == "i" * 10
    if then_static:
        assert kinds(generate(model, max_new_tokens=2, cache_implementation="static")) == "i" * 10


@pytest.mark.slow
def test_thirty_two_layers_compiled_one_by_one() -> None:
    model = tiny_model(num_hidden_layers=32, hidden_size=32, head_dim=16)
    for layer in model.model.layers:
        compile_(layer)
    assert kinds(generate(model)) == kinds(generate(model, 9)) == "i" * 32


def test_many_models_of_one_class() -> None:
    for _ in range(10):
        assert kinds(generate(compile_(tiny_model()))) == "ii"


def test_prompts_of_many_lengths() -> None:
    model = compile_(tiny_model(), dynamic=False)
    with Heard() as heard:
        found = [kinds(generate(model, length, max_new_tokens=2)) for length in range(2, 12)]
    assert found[0] == "ii" and found[-1] == "ff"
    assert len(heard) == 1 and LIMIT in heard[0]
    assert "layers 0, 1" in heard[0] and "dynamic=False" in heard[0]


def test_an_int8_cache_and_no_variant_left() -> None:
    model = compile_(tiny_model(), dynamic=False)
    cache = icw_compile.static_cache(model, 1, 64)
    with Heard() as heard, torch.no_grad():
        for length in range(1, 12):
            model(tokens(length), past_key_values=cache)
            cache.reset()
    assert len(heard) == 1 and LIMIT in heard[0] and "dequantized copy" in heard[0]


def test_limit_used_up_by_another_backend() -> None:
    other = tiny_model()
    other.compile(backend="eager", dynamic=False)
    with torch.no_grad():
        for length in range(2, 12):
            other(tokens(length))
    reopen_all()  # as when this package is imported
    model = compile_(tiny_model())
    with Heard() as heard:
        generate(model, max_new_tokens=1)
    assert len(heard) <= 1 and all(LIMIT in message for message in heard)
    with Heard() as heard:  # what others did is not counted any more
        assert kinds(generate(model)) == "ii"
    assert not heard


@pytest.mark.parametrize("name", ["force_eager", "eager_on_recompile"])
def test_stance(name: str, stance: Callable[[str], None]) -> None:
    model = compile_(tiny_model())
    generate(model)
    stance(name)
    with Heard() as heard:
        for _ in range(2):
            assert kinds(generate(model, num_beams=2)) == "ff"
    assert len(heard) == 1 and f'set_stance("{name}")' in heard[0] and "layers 0, 1" in heard[0]
    stance("default")
    assert kinds(generate(model)) == "ii"


def test_uncompiled_steps_on_an_int8_cache() -> None:
    model = tiny_model()
    cache = icw_compile.static_cache(model, 1, 64)
    with Heard() as heard:
        generate(model, past_key_values=cache, max_new_tokens=12)
    assert len(heard) == 1 and "in code that is not compiled" in heard[0] and "LlamaAttention" in heard[0]


# -- a graph break between the write and the read


def test_attention_with_a_print() -> None:
    model = compile_(tiny_model(attention="chatty"))
    with Heard() as heard, torch.no_grad():
        cache = model(tokens(7)).past_key_values
    assert kinds(cache) == "ff"
    assert len(heard) == 1 and "graph break" in heard[0] and "`print`" in heard[0]
    assert "layers 0, 1" in heard[0] and "test_silent.py" in heard[0] and "in chatty" in heard[0]
    with Heard() as heard:
        generate(model)
    assert not heard, "once"


def test_attention_with_a_print_is_an_error_if_strict() -> None:
    model = compile_(tiny_model(attention="chatty"), **{"icw.strict": True})
    for _ in range(2):
        with pytest.raises(UnquantizedCacheError, match="graph break"), torch.no_grad():
            model(tokens(7))


def test_a_layer_that_is_not_compiled() -> None:
    """As accelerate's hooks for offloaded layers do it."""
    model = tiny_model(num_hidden_layers=3)
    layer = model.model.layers[1]
    forward = layer.forward

    @torch.compiler.disable
    def moves_weights_and_runs(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    layer.forward = moves_weights_and_runs
    compile_(model)
    with Heard() as heard:
        assert [kinds(generate(model)) for _ in range(2)] == ["ifi"] * 2
    assert len(heard) == 1 and "in layer 1." in heard[0]
    assert "torch.compiler.disable" in heard[0] and "moves_weights_and_runs" in heard[0] and "hooks" in heard[0]


# -- options


@pytest.mark.parametrize("name", ["first", "last"])
def test_first_and_last_are_of_the_model(name: str) -> None:
    model = tiny_model(num_hidden_layers=3)
    for layer in model.model.layers:
        compile_(layer, **{"icw.skip_layers": name})
    assert kinds(generate(model)) == {"first": "fii", "last": "iif"}[name]


def test_last_where_the_graph_breaks_in_every_layer() -> None:
    model = tiny_model()

    @torch.compiler.disable
    def looks(module: torch.nn.Module, args: Any) -> None:
        pass

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(looks)
    compile_(model, **{"icw.skip_layers": "last"})
    assert kinds(generate(model)) == "if"


@pytest.mark.parametrize(
    ("wanted", "message"), [(7, "no layer 7: its last one is 1"), ("sliding", "no sliding windows")]
)
def test_layers_that_the_model_does_not_have(wanted: Any, message: str) -> None:
    model = compile_(tiny_model(), **{"icw.skip_layers": wanted})
    with Heard() as heard:
        assert kinds(generate(model)) == "ii"
    assert len(heard) == 1 and "icw.skip_layers" in heard[0] and message in heard[0]
    model = compile_(tiny_model(), **{"icw.skip_layers": wanted, "icw.strict": True})
    with pytest.raises(Exception, match=r"icw\.skip_layers"):
        generate(model)


def test_storage_of_unknown_layer() -> None:
    def attend(query: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        keys, values = torch.zeros(1, 2, 16, 32), torch.zeros(1, 2, 16, 32)
        keys[:, :, :4] = new
        values[:, :, :4] = new
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values), keys, values

    function = torch.compile(attend, backend="icw_int8kv", options={**EAGER, "icw.skip_layers": 0})
    with Heard() as heard, torch.no_grad():
        _, keys, _ = function(torch.rand(1, 2, 4, 32), torch.rand(1, 2, 4, 32))
    assert type(keys) is QuantizedKV
    assert len(heard) == 1 and "not known which layer" in heard[0]


# -- the report


def test_report_names_models() -> None:
    generate(compile_(tiny_model()))
    generate(compile_(tiny_model("qwen2")))
    assert list(dict.fromkeys(graph.model for graph in graphs())) == ["LlamaForCausalLM", "Qwen2ForCausalLM"]
    assert "LlamaForCausalLM" in str(icw_compile.report())


def test_no_two_graphs_have_one_name() -> None:
    names: list[str] = []

    def take() -> None:
        names.extend(next_name() for _ in range(200))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == len(names)


# -- what is as it should be (conftest.py makes each warning of ours an error)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_generate_is_quiet(settings: dict[str, Any]) -> None:
    model = compile_(tiny_model())
    for length in (7, 9, 5):
        assert kinds(generate(model, length, **settings)) == "ii"


def test_uncompiled_prompts_are_quiet() -> None:
    stock = tiny_model()
    model = torch.compile(stock, backend="icw_int8kv", options=EAGER)
    cache = icw_compile.static_cache(stock, 1, 64)
    with torch.no_grad():
        for _ in range(4):
            stock(tokens(7), past_key_values=cache)
            for _ in range(3):
                model(tokens(1), past_key_values=cache)
            cache.reset()
        for _ in range(4):  # nothing but prompts
            stock(tokens(24), past_key_values=cache)
            cache.reset()


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_a_cache_that_is_taken_over_is_quiet(make: Any) -> None:
    stock = tiny_model()
    model = torch.compile(stock, backend="icw_int8kv", options=EAGER)
    cache = make(config=stock.config, **({"max_cache_len": 32} if make is StaticCache else {}))
    with torch.no_grad():
        stock(tokens(7), past_key_values=cache)
        model(tokens(1), past_key_values=cache)
    assert kinds(cache) == "ii"


def test_assisted_decoding_is_quiet() -> None:
    model, assistant = (compile_(tiny_model(num_hidden_layers=1)) for _ in range(2))
    generate(model, assistant_model=assistant, max_new_tokens=9)


def test_an_encoder_is_quiet() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = compile_(AutoModel.from_config(BertConfig(vocab_size=64, **sizes)).eval(), dynamic=False)
    with torch.no_grad():
        for length in range(2, 13):  # beyond the limit: Dynamo's business
            encoder(torch.ones(1, length, dtype=torch.long))


def test_an_encoder_with_a_decoder_is_quiet() -> None:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    compile_(T5ForConditionalGeneration(config).eval()).generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=4)


def test_without_a_cache_it_is_quiet(stance: Callable[[str], None]) -> None:
    model = compile_(tiny_model())
    generate(model)
    stance("force_eager")
    with torch.no_grad():
        model(tokens(7), use_cache=False)


def test_layers_asked_float_are_quiet() -> None:
    model = compile_(tiny_model(num_hidden_layers=3), **{"icw.skip_layers": ["first", 1]})
    for _ in range(2):
        assert kinds(generate(model)) == "ffi"


def test_looking_at_a_cache_is_quiet() -> None:
    cache = generate(compile_(tiny_model()))
    keys = cache.layers[0].keys
    for _ in range(4):
        repr(keys), keys.tolist(), keys[:, :, :3].sum(), keys.mean()
        torch.save(keys, file := io.BytesIO())
        file.seek(0)
        torch.load(file)
        cache.reorder_cache(torch.tensor([0]))


def test_an_error_is_the_one_that_is_raised(stance: Callable[[str], None]) -> None:
    model = compile_(tiny_model())
    generate(model)
    stance("force_eager")
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model(past_key_values=DynamicCache())


def test_it_can_be_said_again_after_a_reset() -> None:
    model = compile_(tiny_model(attention="chatty"))
    for _ in range(2):
        icw_compile.reset_report()
        torch._dynamo.reset()
        with pytest.warns(UnquantizedCacheWarning, match="layers 0, 1"), torch.no_grad():
            model(tokens(7))
