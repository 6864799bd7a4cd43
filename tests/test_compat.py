"""Each private name behind `icw_compile.compat`: what it does, so that a release that changes it fails here."""

import gc
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.fx.traceback
import transformers
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import icw_compile.compat
from icw_compile.cache.tensor import QuantizedKV
from icw_compile.compat import attention, dynamo, flex, functorch, fx, inductor, watch
from icw_compile.compat import transformers as hf
from icw_compile.compat import triton as compat_triton
from icw_compile.lab.tiny import model_types, tiny_causal_lm

aten = torch.ops.aten


@torch.library.custom_op("icw_test_compat::put", mutates_args={"cache", "others"})
def _put(new: Tensor, cache: Tensor, others: list[Tensor], rows: int = 1) -> None:
    cache[:rows] = new[:rows]


def captured(function, *args, look=lambda graph_module: None, **options):
    """What ``look`` sees of each graph of ``function(*args)`` while Dynamo calls a backend."""
    seen = []

    def backend(graph_module, inputs):
        seen.append(look(graph_module))
        return graph_module.forward

    result = torch.compile(function, backend=backend, fullgraph=True, **options)(*args)
    return seen, result


def only(items):
    (item,) = items
    return item


# Structure


def test_it_is_the_bottom_floor():
    """Each file imports one library's private names, and nothing of ours."""
    for path in Path(icw_compile.compat.__file__).parent.glob("*.py"):
        assert "icw_compile." not in "".join(
            line for line in path.read_text().splitlines(True) if line.lstrip().startswith(("import ", "from "))
        )


# Dynamo


class Layer:
    def __init__(self) -> None:
        self.keys = None
        self.rows = 0


class Holder:
    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)


def fill(holder, x):
    for layer in holder.layers:
        layer.keys = x + 1 if layer.keys is None else torch.cat([layer.keys, x])
        layer.rows += 1
    return x * 2


def outputs_of(graph_module):
    return list(graph_module.graph.output_node().args[0])


def test_fake_mode():
    assert dynamo.fake_mode() is None

    def look(graph_module):
        mode = dynamo.fake_mode()
        with mode:
            assert torch.empty(2).fake_mode is mode
        node = only(graph_module.graph.find_nodes(op="placeholder"))
        return mode is not None and dynamo.example_value(node).fake_mode is not mode

    assert captured(lambda x: x + 1, torch.ones(3), look=look)[0] == [True]


def test_data_of_a_tensor():
    def look(graph_module):
        return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]

    assert captured(lambda x: x.data + 1, torch.ones(3), look=look)[0][0][0] is dynamo.DATA


def test_sources_of_inputs_and_guards():
    holder = Holder(Layer())
    holder.layers[0].keys = torch.ones(2)
    assert dynamo.guarded_sources() == ()

    def look(graph_module):
        return (
            {dynamo.source_name(node) for node in graph_module.graph.find_nodes(op="placeholder")},
            dynamo.guarded_sources(),
        )

    def function(holder, x):
        return holder.layers[0].keys + x if holder.layers[0].rows == 0 else x

    (sources, guarded) = only(captured(function, holder, torch.ones(2), look=look)[0])
    assert sources == {"L['holder'].layers[0].keys", "L['x']"}
    assert {"L['holder'].layers[0].keys", "L['holder'].layers[0].rows"} <= set(guarded)
    assert dynamo.source_name(torch.fx.Graph().placeholder("x")) == ""


def test_a_size_that_varies():
    """The first graph is of any size already; the tensors that one is made of know nothing of it."""
    torch._dynamo.reset()
    seen = []

    def look(graph_module):
        values = map(dynamo.example_value, graph_module.graph.find_nodes(op="placeholder"))
        seen.extend(value.shape for value in values if isinstance(value, Tensor))

    cache = QuantizedKV.quantize(torch.ones(1, 2, 5, 16))
    captured(lambda x: x + 1, cache, look=look)
    assert all(isinstance(size, int) for size in only(seen))
    torch._dynamo.reset()
    dynamo.let_vary(cache, 2)
    captured(lambda x: x + 1, cache, look=look)
    assert [isinstance(size, torch.SymInt) for size in seen[1]] == [False, False, True, False]
    marked = torch.ones(1, 2, 5)
    torch._dynamo.maybe_mark_dynamic(marked, 2)
    names = set(vars(marked))
    assert names and all(vars(cache)[name] == vars(marked)[name] for name in names), "as torch marks a tensor"
    assert not any(name in vars(part) for part in cache.buffers for name in names)


def test_guards_are_stated_once():
    """What the parts of a tensor have as sizes is stated once and not three times, and all that was stated still is."""
    stated = []

    def guards():
        env = dynamo.fake_mode().shape_env
        tracked = env.tracked_fakes
        found = env.produce_guards_verbose(
            [each.fake for each in tracked],
            [each.source for each in tracked],
            input_contexts=[each.symbolic_context for each in tracked],
            langs=("python",),
        )
        return list(found[0].exprs)

    def look(graph_module):
        before, repeated = guards(), dynamo.guard_once()
        stated.append((before, repeated, guards()))
        assert dynamo.guard_once() == 0

    def function(cache, x):
        return cache.dequantize() + x

    torch._dynamo.reset()
    for length in (5, 9, 12):
        cache = QuantizedKV.growing(QuantizedKV.quantize(torch.ones(2, 2, length, 16)).value)
        captured(function, cache, torch.ones(1), look=look)
    before, repeated, after = stated[-1]
    parts = len(cache.buffers)
    assert repeated == 2 * parts
    assert len(set(before)) < len(before) and len(set(after)) == len(after)
    spoken_of = [
        {found for guard in guards for found in re.findall(r"L\['cache'\][\w.]*\(\)\[\d\]", guard)}
        for guards in (before, after)
    ]
    assert spoken_of[0] == spoken_of[1] and "L['cache']._scale.stride()[0]" in spoken_of[1]
    assert dynamo.guard_once() == 0, "nothing is compiled here"


def test_examples():
    real = torch.ones(3)

    def look(graph_module):
        node = only(graph_module.graph.find_nodes(op="placeholder"))
        assert fx.is_fake(dynamo.example_value(node))
        assert not fx.is_fake(dynamo.caller_value(node))
        return dynamo.caller_value(node) is real, dynamo.example_value(node).shape

    assert captured(lambda x: x + 1, real, look=look)[0] == [(True, real.shape)]
    unknown = torch.fx.Graph().placeholder("x")
    assert dynamo.caller_value(unknown) is None
    assert dynamo.example_value(unknown, "default") == "default"


def stored(graph_module):
    found = dynamo.stored_attributes(Layer)
    outputs = outputs_of(graph_module)
    return [(entry.owner, entry.attribute, outputs.index(entry.node)) for entry in found]


def test_what_is_stored_to_an_object_of_the_caller():
    holder = Holder(Layer(), Layer())
    rows, _ = captured(fill, holder, torch.ones(2), look=stored)
    assert [(owner.source, attribute) for owner, attribute, _ in rows[0]] == [
        ("L['holder'].layers[0]", "keys"),
        ("L['holder'].layers[1]", "keys"),
    ]
    assert [(owner.held_by, owner.index) for owner, *_ in rows[0]] == [("L['holder'].layers", i) for i in range(2)]
    assert [owner.value is layer for (owner, *_), layer in zip(rows[0], holder.layers)] == [True, True]
    assert all(owner.cls is Layer for owner, *_ in rows[0])
    assert len({output for *_, output in rows[0]}) == 2
    assert dynamo.stored_attributes(Layer) == []  # no frame is being traced


def test_what_is_stored_to_an_object_of_the_frame():
    def function(x):
        first, second = Holder(Layer(), Layer()), Holder(Layer())
        fill(first, x)
        fill(second, x * 3)
        return first, second

    rows, (first, second) = captured(function, torch.ones(2), look=stored)
    places = [(owner.source, owner.cls, owner.held_by, owner.index) for owner, *_ in rows[0]]
    assert places == [
        ("", Layer, "new Holder.layers", 0),
        ("", Layer, "new Holder.layers", 1),
        ("", Layer, "new Holder.layers#2", 0),
    ]
    assert torch.equal(first.layers[1].keys, torch.full((2,), 2.0))
    assert torch.equal(second.layers[0].keys, torch.full((2,), 4.0))


def test_what_is_stored_to_an_object_that_is_appended():
    def function(holder, x):
        holder.layers.append(Layer())
        return fill(holder, x)

    holder = Holder(Layer())
    rows, _ = captured(function, holder, torch.ones(2), look=stored)
    assert {(owner.source, owner.held_by, owner.index) for owner, *_ in rows[0]} == {
        ("L['holder'].layers[0]", "L['holder'].layers", 0),
        ("", "L['holder'].layers", 1),
    }
    assert len(holder.layers) == 2


def test_objects_in_no_list():
    def function(layer, x):
        new = Layer()
        new.keys = x + 1
        layer.keys = x * 2
        return new

    rows, _ = captured(function, Layer(), torch.ones(2), look=stored)
    assert {(owner.source, owner.held_by, owner.index) for owner, *_ in rows[0]} == {
        ("", "", None),
        ("L['layer']", "", None),
    }


def test_attribute_of_an_input():
    holder = Holder(Layer())
    holder.layers[0].keys = torch.ones(2)

    def look(graph_module):
        return [dynamo.attribute_of(node) for node in graph_module.graph.find_nodes(op="placeholder")]

    found, plain = sorted(only(captured(fill, holder, torch.ones(2), look=look)[0]), key=lambda x: x is None)
    owner, name = found
    assert (owner.source, owner.cls, owner.held_by, owner.index, name) == (
        "L['holder'].layers[0]",
        Layer,
        "L['holder'].layers",
        0,
        "keys",
    )
    assert owner.value is holder.layers[0]
    assert plain is None
    assert dynamo.attribute_of(torch.fx.Graph().placeholder("x")) is None


@pytest.mark.parametrize("fixed", [False, True])
def test_what_aot_autograd_reads(fixed):
    """A retraced graph compiles as Dynamo's own, and an input whose address is fixed is one to AOTAutograd."""
    seen = {}

    def backend(graph_module, inputs):
        module = retraced(graph_module)
        for old, new in zip(*(m.graph.find_nodes(op="placeholder") for m in (graph_module, module)), strict=True):
            dynamo.hand_over_placeholder(old, new, has_source=dynamo.source_name(old) != "L['y']")
            if fixed and dynamo.source_name(old) == "L['x']":
                dynamo.fix_address(new)
                seen["x"] = module.graph.find_nodes(op="placeholder").index(new)
        dynamo.hand_over_module(graph_module, module)
        constants = len(dict(module.named_buffers()))
        seen["constants"] = constants

        def compiler(aot_module, aot_inputs):
            seen["static"] = TracingContext.get().fw_metadata.static_input_indices
            return aot_module.forward

        fakes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        return aot_autograd(fw_compiler=compiler)(module, fakes)

    def function(x, y):
        return torch.cat([x * y, torch.tensor([1.0, 2.0])])

    x, y = torch.ones(2), torch.full((2,), 3.0)
    with torch.no_grad():
        result = torch.compile(function, backend=backend)(x, y)
    assert torch.equal(result, function(x, y))
    expected = list(range(seen["constants"])) + ([seen["constants"] + seen["x"]] if fixed else [])
    assert seen["static"] == expected


def retraced(graph_module):
    """The pre-dispatch ATen graph of one that Dynamo made, as capture makes it."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    with dynamo.fake_mode(), torch.fx.traceback.preserve_node_meta(), torch.no_grad():
        fakes = [torch.empty(dynamo.example_value(node).shape) for node in placeholders]
        return fx.trace_pre_dispatch(lambda *args: Interpreter(graph_module).run(*args), fakes)


def test_graph_breaks_are_counted():
    def function(x):
        torch._dynamo.graph_break()
        return x + 1

    dynamo.clear_counters()
    torch.compile(function, backend="eager")(torch.ones(2))
    assert dynamo.graph_breaks() == 1
    dynamo.clear_counters()
    assert dynamo.graph_breaks() == 0


def test_compiling_backend():
    """By the module of its function, wherever Dynamo makes fakes or calls it; one compile has one id."""
    seen = []

    def backend(graph_module, inputs):
        seen.append(watch.compiling_backend())
        return graph_module.forward

    assert watch.compiling_backend() is None
    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    compiled(torch.ones(2))
    compiled(torch.ones(3))
    assert [each.module for each in seen] == [__name__] * 2 and len({each.compile_id for each in seen}) == 2
    assert watch.compiling_backend() is None

    class Listening(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner, context, size, stride):
            seen.append(watch.compiling_backend())
            return Listening(inner["inner"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            plain = [each.inner if isinstance(each, Listening) else each for each in args]
            return function(*plain, **(kwargs or {}))

    for name, module in (("icw_int8kv", "icw_compile.backend"), ("inductor", "torch")):
        seen.clear()
        torch.compile(lambda x: x + 1, backend=name)(Listening(torch.ones(4)))
        assert seen[0].module.startswith(module)


def test_storage_is_one_object():
    """Views have the object of their storage in common, which lives as long as one of them does."""
    x = torch.ones(4)
    known = weakref.WeakKeyDictionary({x.untyped_storage(): 1})
    view = x[2:]
    assert known[view.untyped_storage()] == 1 and x.clone().untyped_storage() not in known
    del x
    gc.collect()
    assert len(known) == 1
    view.share_memory_()
    assert known[view.untyped_storage()] == 1
    del view
    gc.collect()
    assert len(known) == 0


def test_unseen():
    """Plain tensors are computed with, whatever mode is entered."""
    x = torch.ones(3)
    with FakeTensorMode(), fx.Unseen():
        assert not fx.is_fake(x.roll(1)) and not fx.is_fake(torch.empty(0).set_(x.untyped_storage(), 1, (2,), (1,)))


def test_recompile_limit():
    seen = []

    def backend(graph_module, inputs):
        seen.append(graph_module)
        return graph_module.forward

    def function(x, number):
        return x * number

    compiled = torch.compile(function, backend=backend, dynamic=False)
    with dynamo.recompile_limit(3):
        for number in range(2, 8):
            compiled(torch.ones(2), number)
    assert len(seen) == 3
    torch.compiler.reset()
    with dynamo.recompile_limit(2, fail=True):
        compiled(torch.ones(2), 2)
        compiled(torch.ones(2), 3)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled(torch.ones(2), 4)
    assert torch._dynamo.config.recompile_limit != 2


# Traces


def test_trace_before_dispatch():
    def function(x, y):
        x.add_(1)
        return torch.nn.functional.scaled_dot_product_attention(x, y.reshape(x.shape), x)

    module = fx.trace_pre_dispatch(function, [torch.randn(1, 2, 3, 4), torch.randn(1, 2, 12)])
    targets = [node.target for node in module.graph.find_nodes(op="call_function", target=aten.add_.Tensor)]
    assert len(targets) == 1
    called = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert called == [aten.add_.Tensor, aten.reshape.default, aten.scaled_dot_product_attention.default]


def test_a_trace_that_keeps_a_node():
    """What `outside_of_trace` runs is not traced, `track` lets the trace go on from its result."""

    def kept(x):
        return torch.sin(x), torch.cos(x)

    def function(x):
        tracer = fx.current_tracer()
        y = x + 1
        with fx.outside_of_trace():
            results = kept(y)
        proxy = tracer.create_proxy("call_function", kept, (fx.proxy_of(y, tracer),), {})
        fx.track(results, proxy, tracer)
        return results[0] * results[1]

    x = torch.randn(3)
    module = fx.trace_pre_dispatch(function, [x])
    called = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert called[:2] == [aten.add.Tensor, kept] and called[-1] == aten.mul.Tensor
    assert aten.sin.default not in called
    torch.testing.assert_close(module(x), function_outside(x))
    with pytest.raises(RuntimeError, match="nothing is being traced"):
        fx.current_tracer()
    unknown = torch.ones(2)
    with pytest.raises(RuntimeError):
        fx.trace_pre_dispatch(lambda x: fx.proxy_of(unknown, fx.current_tracer()), [x])


def test_a_trace_that_keeps_a_graph():
    """A symbolic size, and a graph that an operator takes, have proxies as well."""
    inner = torch.fx.symbolic_trace(nn.Linear(2, 2))
    found = []

    def function(x):
        tracer = fx.current_tracer()
        found.append(fx.proxy_of(x.shape[0] + 1, tracer))
        with fx.outside_of_trace():
            torch.set_grad_enabled(torch.is_grad_enabled())
        return tracer.create_proxy("call_function", pick, (fx.proxy_of_graph(inner, "inner", tracer),), {})

    def pick(graph):
        return graph

    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.ones(5, 2), static_shapes=False)
    with mode:
        module = fx.trace_pre_dispatch(function, [x])
    assert module.inner is inner
    assert [node.op for node in module.graph.nodes if node.name == "inner"] == ["get_attr"]
    assert torch._C._set_grad_enabled not in [node.target for node in module.graph.nodes]
    assert isinstance(found[0], torch.fx.Proxy)


def test_memory_of_fakes():
    with FakeTensorMode():
        x = torch.ones(4, 4)
        part, other = x[1:], torch.ones(4)
        assert fx.storage_of(x) == fx.storage_of(part) != fx.storage_of(other)
        before = fx.version_of(x)
        part.add_(1)
        assert fx.version_of(x) == before + 1 and fx.version_of(other) == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_layout_of_a_fake(dynamic):
    """Fakes of one layout, in memory of their own or in that of another; a trace sees nothing of it, and no guard."""
    made = []

    def function(x):
        part = x[1:].transpose(0, 1)
        layout = fx.FakeLayout(part)
        with fx.outside_of_trace():  # it sees what is done to sizes
            guards = len(mode.shape_env.guards)
            made.append((layout.is_static, layout.another(), layout.another(x), part, x))
            assert len(mode.shape_env.guards) == guards
        return part

    mode, other = FakeTensorMode(shape_env=ShapeEnv()), FakeTensorMode()
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    with mode:
        fake = mode.from_tensor(x, static_shapes=not dynamic)
        graph = fx.trace_pre_dispatch(function, [fake]).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert [each for each in called if each is not aten.sym_size.int] == [aten.slice.Tensor, aten.transpose.int]
    is_static, own, shared, part, traced = only(made)
    assert is_static != dynamic
    for each in (own, shared):
        assert fx.is_fake(each) and each.fake_mode is mode and each.device == part.device and not each._is_view()
        assert (each.shape, each.stride(), each.dtype) == (part.shape, part.stride(), part.dtype)
        assert not each.is_contiguous() and each.is_contiguous() == part.is_contiguous()
    assert fx.storage_of(own) != fx.storage_of(traced) == fx.storage_of(shared)
    assert shared.storage_offset() == part.storage_offset() and own.storage_offset() == 0
    assert fx.FakeLayout(part, other).another().fake_mode is other


def test_empty_fake():
    """A fake of another size, contiguous or not, whatever mode is on and whatever traces."""

    def function(x):
        made = fx.empty_fake(x, (x.shape[0], 5)), fx.empty_fake(x, (2, 3), (1, 2), dtype=torch.int8)
        for each in made:
            assert fx.is_fake(each) and each.fake_mode is mode and each.device == x.device
        assert made[0].dtype == x.dtype and made[0].is_contiguous() and made[0].shape == (x.shape[0], 5)
        assert made[1].dtype == torch.int8 and made[1].stride() == (1, 2) and made[1].shape == (2, 3)
        return x + 1

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode, enable_python_dispatcher():
        graph = fx.trace_pre_dispatch(function, [mode.from_tensor(torch.ones(3, 4))]).graph
    assert len([node for node in graph.nodes if node.target is aten.add.Tensor]) == 1
    assert not any("empty" in str(node.target) for node in graph.nodes)


def test_noted_for():
    """What is noted for a fake is there for those of its mode, and goes with the mode."""
    with FakeTensorMode() as mode:
        x, y = torch.ones(2), torch.ones(3)
    with FakeTensorMode():
        other = torch.ones(2)
    fx.noted_for(x)["shape"] = y
    assert fx.noted_for(y)["shape"] is y and "shape" not in fx.noted_for(other)
    reference = weakref.ref(mode)
    del x, y, mode
    gc.collect()
    assert reference() is None


def test_node_of():
    """A tensor that is traced has a node; one whose numbers are known, or that is not traced, has none."""
    seen = []

    def function(x):
        y, tracer = x + 1, fx.current_tracer()
        assert fx.is_traced()
        with fx.outside_of_trace():
            unknown = x + 2
            assert not fx.is_traced()
        seen.extend(fx.node_of(each, tracer) for each in (y, unknown, torch.tensor(3)))
        return y

    with FakeTensorMode():
        fx.trace_pre_dispatch(function, [torch.ones(3)])
    assert seen[0].target is aten.add.Tensor and seen[1:] == [None, None] and not fx.is_traced()


def test_last_node():
    graph = torch.fx.Graph()
    assert fx.last_node(graph).op == "root"
    node = graph.placeholder("x")
    assert fx.last_node(graph) is node and fx.last_node(graph).next.op == "root"


def test_without_torch_function():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        x = torch.ones(2)
        seen.clear()
        with fx.without_torch_function():
            assert x.shape == (2,)
        assert not seen
        assert x.shape == (2,) and seen


def test_sizes_that_become_equal():
    """Two sizes that are equal now are one symbol from then on, and a call where they are not is compiled anew."""
    seen = []

    def backend(graph_module, inputs):
        nodes = graph_module.graph.find_nodes(op="placeholder")
        values = [dynamo.example_value(node) for node in nodes]
        a, b = (value.shape[0] for value in values if isinstance(value, torch.Tensor))
        seen.append((fx.become_equal(a, b), fx.statically_known_true(a == b)))
        return graph_module.forward

    def function(x, y):
        return x + 1, y + 1

    compiled = torch.compile(function, backend=backend)
    for sizes in ((5, 5), (6, 6), (7, 7), (8, 9), (9, 8), (9, 9)):
        tensors = [torch.ones(size) for size in sizes]
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        compiled(*tensors)
    assert seen == [(True, True), (False, False)]
    assert fx.become_equal(3, 3) and not fx.become_equal(3, 4)


def test_numbers_by_their_names():
    """A size that became equal to another keeps its own name until it is asked for by the other's."""
    seen = []

    def backend(graph_module, inputs):
        nodes = graph_module.graph.find_nodes(op="placeholder")
        values = [dynamo.example_value(node) for node in nodes]
        a, b = (value.shape[0] for value in values if isinstance(value, torch.Tensor))
        assert fx.bound_symbols([a, b + 1, values[-1]]) == {fx.expression_of(each) for each in (a, b)}
        assert fx.free_symbols([a, b + 1]) == fx.bound_symbols([a, b]) and fx.bound_symbols([b + 1, 3]) == set()
        assert fx.by_its_name(a) is a and fx.by_its_name(b + 1) is not None
        fx.become_equal(a, b)
        for each in (a, b):
            named = fx.by_its_name(each)
            seen.append((each.node._expr == each.node.expr, named.node._expr == named.node.expr, named.node.hint))
        return graph_module.forward

    compiled = torch.compile(lambda x, y: (x + 1, y + 1), backend=backend)
    tensors = [torch.ones(5) for _ in range(2)]
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    compiled(*tensors)
    assert sorted(seen) == [(False, True, 5), (True, True, 5)]


def test_a_graph_that_is_called():
    inner = torch.fx.symbolic_trace(lambda x, y: (x + y,))
    assert torch.equal(fx.invoke_subgraph()(inner, "a", torch.ones(2), torch.ones(2))[0], torch.full((2,), 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_with_what_its_rows_were_divided_by(is_causal, dtype):
    query, key, value = (torch.randn(2, 3, length, 16).to(dtype) for length in (70, 90, 90))
    output, lse = attention.attention_with_lse(query, key, value, is_causal=is_causal, scale=0.3)
    scores = query.float() @ key.float().transpose(2, 3) * 0.3
    if is_causal:
        scores = scores.masked_fill(torch.ones(70, 90, dtype=torch.bool).triu(1), -torch.inf)
    assert lse.dtype == torch.float32 and output.dtype == dtype
    assert (lse - scores.logsumexp(-1)).norm() <= 1e-5 * lse.norm()
    expected = scores.softmax(-1) @ value.float()
    assert (output - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_a_size_that_is_larger():
    """A graph made for a larger size is for no other; one made for a smaller one is for all."""
    seen = []

    def backend(graph_module, inputs):
        values = [dynamo.example_value(node) for node in graph_module.graph.find_nodes(op="placeholder")]
        seen.append(fx.is_larger_here(values[-1].shape[0], 16))
        return graph_module.forward

    def call(*sizes):
        seen.clear()
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: x + 1, backend=backend)
        for size in sizes:
            tensor = torch.ones(size)
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
            compiled(tensor)
        return seen

    assert call(20, 30, 16, 40) == [True, False]
    assert call(7, 16, 20, 40) == [False]
    assert fx.is_larger_here(17, 16) and not fx.is_larger_here(16, 16)


def test_parts_of_a_subclass():
    tensor = QuantizedKV.quantize(torch.ones(1, 1, 2, 4))
    inner = fx.inner_tensors(tensor)
    assert inner and all(isinstance(each, torch.Tensor) for each in inner.values())
    again = fx.with_inner_tensors(tensor, inner)
    assert type(again) is QuantizedKV and torch.equal(again.dequantize(), tensor.dequantize())


def test_functorch_transforms():
    """Inside of `vmap` the level is known, and what its tensors are made of; its functions by their module."""
    seen = []

    def inside(x):
        seen.append((functorch.inside_transform(), functorch.tensor_of_level(x)))
        return x

    x = torch.ones(2, 3)
    torch.vmap(inside)(x)
    assert not functorch.inside_transform() and functorch.tensor_of_level(x) is None
    ((entered, inner),) = seen
    assert entered and inner is not None and inner.shape == (2, 3)

    def backend(graph_module, inputs):
        called = [node.target for node in graph_module.graph.nodes if node.op.startswith("call")]
        seen.append([functorch.is_transform(target) for target in called])
        return graph_module.forward

    torch.compile(lambda x: torch.vmap(lambda y: y.sin())(x).cos(), backend=backend, fullgraph=True)(x)
    assert seen[-1].count(False) == 2 and seen[-1].count(True) >= 4


def function_outside(x):
    return torch.sin(x + 1) * torch.cos(x + 1)


def test_current_node():
    graph = torch.fx.Graph()
    node = graph.call_function(torch.sin, (graph.placeholder("x"),))
    node.meta["stack_trace"] = "where it came from"
    graph.output(node)

    class OwnWay(Interpreter):
        def run_node(self, node):
            if node.target is not torch.sin:
                return super().run_node(node)
            with fx.current_node(self, node):
                return torch.cos(*self.fetch_args_kwargs_from_env(node)[0])

    with torch.fx.traceback.preserve_node_meta():
        original = GraphModule({}, graph)
        module = fx.trace_pre_dispatch(lambda x: OwnWay(original).run(x), [torch.ones(2)])
    (traced,) = module.graph.find_nodes(op="call_function", target=aten.cos.default)
    assert traced.meta["stack_trace"] == "where it came from"


def test_kinds_of_values():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert fx.is_fake(torch.empty(2))
    assert not fx.is_fake(torch.empty(2))
    assert fx.is_wrapper_subclass(QuantizedKV.quantize(torch.ones(1, 1, 2, 4)))
    assert not fx.is_wrapper_subclass(torch.ones(2))
    assert not fx.is_wrapper_subclass(nn.Parameter(torch.ones(2)))
    assert not fx.is_wrapper_subclass(3)


def test_a_number_that_is_passed_as_a_tensor():
    """With ``dynamic=True`` Dynamo passes a float as a tensor, whose `item()` is a symbol that it knows."""
    seen = []

    def backend(graph_module, inputs):
        for node in graph_module.graph.find_nodes(op="placeholder"):
            example = dynamo.example_value(node)
            if isinstance(example, Tensor) and example.dim() == 0:
                with dynamo.fake_mode():
                    fresh = torch.empty((), dtype=example.dtype)
                    fx.carry_item(example, fresh)
                    seen.append(str(fresh.item()) == str(example.item_memo))
        return graph_module.forward

    def function(x, number):
        return x * number

    compiled = torch.compile(function, backend=backend, dynamic=True)
    assert torch.equal(compiled(torch.ones(2), 2.5), torch.full((2,), 2.5))
    assert torch.equal(compiled(torch.ones(2), 3.5), torch.full((2,), 3.5))
    assert seen and all(seen)
    plain = torch.ones(())
    fx.carry_item(torch.ones(()), plain)
    assert plain.item() == 1


# Graphs


def test_rename():
    graph = torch.fx.Graph()
    first, second = graph.placeholder("a"), graph.placeholder("b")
    node = graph.call_function(torch.add, (first, second))
    graph.output(node)
    fx.rename(first, "query")
    fx.rename(second, "query")
    fx.rename(node, "sum")
    assert (first.name, second.name, node.target) == ("query", "query_1", torch.add)
    module = GraphModule({}, graph)
    assert module(query=torch.ones(1), query_1=torch.ones(1)) == 2


def test_dead_code():
    def build():
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        graph.call_function(aten.sin.default, (x,))
        graph.call_function(aten.rand.default, ([2],))
        graph.call_function(aten.add_.Tensor, (x, 1))
        graph.output(x)
        return graph

    for keep_random, left in ((True, [aten.rand.default, aten.add_.Tensor]), (False, [aten.add_.Tensor])):
        graph = build()
        assert fx.eliminate_dead_code(graph, keep_random=keep_random)
        assert [node.target for node in graph.nodes if node.op == "call_function"] == left
        assert not fx.eliminate_dead_code(graph, keep_random=keep_random)
    assert not fx.eliminate_dead_code(build(), keep_random=False, keep=lambda node: True)


def test_kinds_of_targets():
    assert fx.is_operator(aten.add.Tensor)
    assert not fx.is_operator(aten.add) and not fx.is_operator(torch.add)
    assert fx.is_higher_order(flex.FLEX_ATTENTION)
    assert not fx.is_higher_order(aten.add.Tensor)


def test_symbolic_sizes():
    """Nothing that is asked of a size makes Dynamo guard on it."""
    seen = []

    def look(graph_module):
        node = only(n for n in graph_module.graph.find_nodes(op="placeholder") if fx.is_fake(dynamo.example_value(n)))
        size = dynamo.example_value(node).shape[0]
        assert isinstance(size, torch.SymInt)
        assert fx.statically_known_true(size + 1 > size)
        assert not fx.statically_known_true(size == 5) and not fx.statically_known_true(size != 5)
        assert fx.expression_of(size + 1) == fx.expression_of(1 + size) != fx.expression_of(size)
        hash(fx.expression_of(size))
        seen.append(size)

    def backend(graph_module, inputs):
        look(graph_module)
        return graph_module.forward

    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=True)
    for size in (5, 6, 7):
        compiled(torch.ones(size))
    assert len(seen) == 1
    assert fx.statically_known_true(True) and not fx.statically_known_true(False)


def test_evaluating_with_symbols():
    """Padding by a symbol, as of masks for attention on CUDA, whose operator in C++ takes none."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    mask = mode.from_tensor(torch.zeros(2, 1, 1, 37))
    size = mask.shape[-1]
    with pytest.raises(RuntimeError, match="concrete integers"), mode:
        torch.nn.functional.pad(mask, (0, 16 - size % 16))
    with fx.evaluating(mode):
        padded = torch.nn.functional.pad(mask, (0, 16 - size % 16))
    assert fx.is_fake(padded) and fx.statically_known_true(padded.shape[-1] == size + 16 - size % 16)
    with fx.evaluating(None):
        assert not (torch.ones(2, requires_grad=True) + 1).requires_grad


def test_trees():
    tree = {"a": [1, (2, None)], "b": torch.Size([3])}
    assert fx.tree_map(lambda x: x if x is None else x + 1, tree) == {"a": [2, (3, None)], "b": torch.Size([4])}
    assert fx.tree_leaves(tree) == [1, 2, None, 3]


# Schemas

WRITES_AND_VIEWS = {
    aten.add.Tensor: ([], []),
    aten.index_copy_.default: (["self"], ["self"]),
    aten.copy_.default: (["self"], ["self"]),
    aten.slice.Tensor: ([], ["self"]),
    aten.reshape.default: ([], ["self"]),
    aten.to.dtype: ([], ["self"]),
    aten.split.Tensor: ([], ["self"]),
    aten.unbind.int: ([], ["self"]),
    aten.chunk.default: ([], ["self"]),
    aten.cat.out: (["out"], ["out"]),
    aten.max.dim_max: (["max", "max_values"], ["max", "max_values"]),
    aten._foreach_add_.Scalar: (["self"], []),
    torch.ops.icw_test_compat.put.default: (["cache", "others"], []),
}


@pytest.mark.parametrize("operator", WRITES_AND_VIEWS, ids=str)
def test_schema(operator):
    writes, views = WRITES_AND_VIEWS[operator]
    schema = fx.schema_of(operator)
    assert [a.name for a in schema.arguments if a.is_written] == writes
    assert [a.name for a in schema.arguments if a.is_viewed] == views
    assert (schema.is_mutable, schema.gives_views) == (bool(writes), bool(views))


def test_schema_agrees_with_what_operators_do():
    """A view shares memory with what it says that it views, and a write changes what it says that it writes."""
    x = torch.arange(12.0).view(3, 4)
    calls = {
        aten.slice.Tensor: (x, 0, 1),
        aten.split.Tensor: (x, 2),
        aten.unbind.int: (x,),
        aten.reshape.default: (x, [4, 3]),
        aten.add.Tensor: (x, 1),
        aten.clone.default: (x,),
    }
    for operator, args in calls.items():
        result = operator(*args)
        results = result if isinstance(result, (list, tuple)) else [result]
        shares = all(r.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for r in results)
        assert shares == fx.schema_of(operator).arguments[0].is_viewed == fx.schema_of(operator).gives_views
    assert fx.schema_of(aten.max.dim_max).returns == ("values", "indices")
    assert fx.schema_of(aten.max.dim_max).name == "max"


def test_values_of_a_call():
    x, y = torch.ones(2), torch.ones(2)
    assert fx.values_of(aten.add.Tensor, (x, y), {}) == {"self": x, "other": y, "alpha": 1}
    assert fx.values_of(aten.add.Tensor, (x,), {"other": y, "alpha": 3})["alpha"] == 3
    put = torch.ops.icw_test_compat.put.default
    others = [torch.zeros(2), torch.zeros(2)]
    assert fx.values_of(put, (x, y, others), {})["rows"] == 1
    written = fx.written_values(put, (x,), {"cache": y, "others": others})
    assert [any(w is z for z in (y, *others)) for w in written] == [True] * 3
    assert only(fx.written_values(aten.cat.out, ([x, y],), {"out": others[0]})) is others[0]
    assert fx.written_values(aten.add.Tensor, (x, y), {}) == []
    assert only(fx.viewed_values(aten.split.Tensor, (x, 1), {})) is x
    assert fx.viewed_values(aten.clone.default, (x,), {}) == []


# Inductor


def test_inductor_reads_mode_and_options():
    backend = inductor.inductor("max-autotune-no-cudagraphs", {"triton.cudagraphs": False})
    assert backend.config["max_autotune"] is True and backend.config["triton.cudagraphs"] is False
    with pytest.raises(RuntimeError, match="no_such_option"):
        inductor.inductor(None, {"no_such_option": True})
    with pytest.raises(RuntimeError, match="max_autotune"):
        inductor.inductor(None, {"max_autotune": 3})
    with pytest.raises(RuntimeError, match="no-such-mode"):
        inductor.inductor("no-such-mode", {})


def test_where_regions_are_compiled_once():
    assert inductor.takes_regions({}) == (torch.__version__ >= "2.13")
    assert not inductor.takes_regions({"cpp_wrapper": True}) and not inductor.takes_regions({"cpp-wrapper": True})
    assert not inductor.takes_regions({"freezing": True})
    with torch._inductor.config.patch(freezing=True):
        assert not inductor.takes_regions({})


def test_inductor_rounds_as_eager():
    """Between operations that it fuses; not where the user says otherwise, in either spelling."""

    def call(x, y):
        return ((x * y + x) * y - x) * x

    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    for options, rounds in (({}, True), ({"emulate_precision_casts": False}, False)):
        torch.compiler.reset()
        assert torch.equal(torch.compile(call, options=inductor.rounded_as_eager(options))(x, y), call(x, y)) == rounds
    assert inductor.rounded_as_eager({"emulate-precision-casts": False}) == {"emulate-precision-casts": False}


def test_inductor_counts_cuda_graphs():
    from torch._inductor.cudagraph_trees import CUDAGraphNode

    before = CUDAGraphNode.__init__, CUDAGraphNode.run
    with inductor.counted_cuda_graphs() as counts:
        node = object.__new__(CUDAGraphNode)  # what records, and what replays; neither without a GPU
        for call in (lambda: CUDAGraphNode(), lambda: node.run([]), lambda: node.run([])):
            with pytest.raises((TypeError, AttributeError)):
                call()
    assert (counts.recorded, counts.replayed) == (1, 2)
    assert (CUDAGraphNode.__init__, CUDAGraphNode.run) == before


def test_inductor_compiles():
    module = fx.trace_pre_dispatch(lambda x: (x.sin() + 1,), [torch.randn(4)])
    x = torch.randn(4)
    with torch.no_grad():
        compiled = inductor.inductor(None, {"epilogue_fusion": True})(module, [x])
    torch.testing.assert_close(compiled(x)[0], x.sin() + 1)


@pytest.mark.parametrize(
    "mode,options,expected",
    [
        (None, {}, False),
        ("default", {}, False),
        ("reduce-overhead", {}, True),
        ("max-autotune", {}, True),
        ("max-autotune-no-cudagraphs", {}, False),
        ("reduce-overhead", {"triton.cudagraphs": False}, False),
        (None, {"triton.cudagraphs": True}, True),
    ],
)
def test_cuda_graphs(mode, options, expected):
    before = dict(os.environ)
    assert inductor.uses_cuda_graphs(mode, options) == expected
    is_open = mode in (None, "default") and not options
    assert inductor.leaves_cuda_graphs_open(mode, options) == is_open
    assert dict(os.environ) == before
    config = inductor.inductor(mode, options).config  # what will be compiled with
    assert bool(config.get(inductor.CUDA_GRAPHS, False)) == expected
    with torch._inductor.config.patch({inductor.CUDA_GRAPHS: True}):
        assert inductor.uses_cuda_graphs(mode, options) == (options.get(inductor.CUDA_GRAPHS) is not False)


def test_freezing():
    """With freezing and without gradients, and only then, Dynamo makes parameters attributes of the graph."""
    model = nn.Linear(2, 2)
    for freezing, gradients in ((False, False), (True, False), (True, True)):
        with torch._inductor.config.patch(freezing=freezing), torch.set_grad_enabled(gradients):

            def look(graph_module):
                return bool(graph_module.graph.find_nodes(op="get_attr")), inductor.is_freezing()

            torch.compiler.reset()
            ((is_attribute, said),) = captured(model, torch.ones(1, 2), look=look)[0]
            assert is_attribute == said == (freezing and not gradients)


def test_cache_key_tag(monkeypatch):
    """It is in the key of torch's on-disk caches, beside what the user set."""
    from torch._inductor.codecache import FxGraphCache  # noqa: F401  (there is such a cache)

    config = torch.compiler.config
    with config.patch(cache_key_tag="theirs"):
        with inductor.cache_key_tag("ours 1"):
            assert config.cache_key_tag == "theirs ours 1"
        assert config.cache_key_tag == "theirs"
    assert config.cache_key_tag == ""


def test_cache_key_tag_changes_what_is_found(tmp_path):
    code = (
        "import sys, torch\n"
        "from torch._dynamo.utils import counters\n"
        "from icw_compile.compat import inductor\n"
        "def backend(g, i):\n"
        "    with inductor.cache_key_tag(sys.argv[1]):\n"
        "        return inductor.inductor(None, {})(g, i)\n"
        "with torch.no_grad():\n"
        "    torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(4))\n"
        "print('found', counters['inductor']['fxgraph_cache_hit'] + counters['aot_autograd']['autograd_cache_hit'])\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def found(tag):
        command = [sys.executable, "-c", code, tag]
        output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        return int(output.split()[-1])

    assert [found("one") > 0, found("one") > 0, found("two") > 0] == [False, True, False]


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert inductor.cache_dir() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "b"))
    with pytest.raises(OSError, match="file"):
        inductor.cache_dir()


def test_cpp_compiler(monkeypatch):
    code = (
        "from icw_compile.compat import inductor\n"
        "try: print(inductor.cpp_compiler())\n"
        "except RuntimeError as error: print('none:', error)\n"
    )

    def said(**environment):
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
        )
        return process.stdout.strip()

    assert said(CXX=sys.executable) == sys.executable  # it runs, and is asked for its version only
    assert said(CXX="/nowhere/g++").startswith("none:")


# Flex attention


def test_flex_graphs_are_where_they_are_said_to_be():
    from torch.fx import GraphModule as Module

    query = torch.randn(1, 2, 8, 16)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu")

    def look(graph_module):
        node = only(graph_module.graph.find_nodes(op="call_function", target=flex.FLEX_ATTENTION))
        found = flex.Flex.of(node)
        targets = []
        for which in (found.score_mod, found.mask_mod):
            inner = getattr(graph_module, which.target)
            assert isinstance(inner, Module)
            targets.append([n.target for n in inner.graph.nodes if n.op.startswith("call")])
        return targets, found.log_sum

    def plain(x):
        return flex_attention(x, x, x, score_mod=lambda score, b, h, q, k: score * 3, block_mask=mask)

    def with_sums(x):
        return flex_attention(x, x, x, score_mod=lambda score, b, h, q, k: score * 3, block_mask=mask, return_lse=True)

    for function, log_sum in ((plain, False), (with_sums, True)):
        torch.compiler.reset()
        ((score_mod, mask_mod), wants_sums) = only(captured(function, query, look=look)[0])
        assert len(score_mod) == 1 and "mul" in str(score_mod)
        assert len(mask_mod) == 1 and ("ge" in str(mask_mod) or "ge" in getattr(mask_mod[0], "__name__", ""))
        assert wants_sums == log_sum


# transformers


def test_cache_layers():
    from transformers import DynamicCache, MistralConfig, StaticCache

    config = MistralConfig(num_hidden_layers=1, sliding_window=4)
    full = MistralConfig(num_hidden_layers=1, sliding_window=None)
    for cache, sliding in (
        (DynamicCache(config=config), True),
        (StaticCache(config, max_cache_len=8), True),
        (DynamicCache(config=full), False),
        (StaticCache(full, max_cache_len=8), False),
    ):
        layer = only(cache.layers)
        assert isinstance(layer, hf.CacheLayerMixin)
        assert hf.is_sliding(type(layer)) == sliding
        assert isinstance(layer, hf.StaticLayer if isinstance(cache, StaticCache) else hf.DynamicLayer)
        if sliding and isinstance(cache, StaticCache):
            assert isinstance(layer, hf.StaticSlidingWindowLayer)
        keys, values = layer.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 24))
        assert layer.keys.shape[-1] == keys.shape[-1] == 16 and layer.values.shape[-1] == values.shape[-1] == 24
    assert not hf.is_sliding(Layer)


def test_initialize():
    from transformers import LlamaConfig, StaticCache

    layer = StaticCache(LlamaConfig(num_hidden_layers=1), max_cache_len=8).layers[0]
    hf.initialize(layer, torch.empty(2, 3, 0, 16), torch.empty(2, 3, 0, 24))
    assert layer.keys.shape == (2, 3, 8, 16) and layer.values.shape == (2, 3, 8, 24)
    assert layer.get_seq_length() == 0


def test_unregistered():
    from transformers import cache_utils

    def tables():
        return {name: dict(table) for name, table in vars(cache_utils).items() if name.endswith("_TYPE_MAPPING")}

    before = tables()
    assert before
    registered = type("Registered", (hf.StaticLayer,), {"_layer_type": "icw_test"})
    try:
        assert tables() != before
        with_it = tables()

        class Ours(hf.unregistered(registered)):
            pass

        assert tables() == with_it
        assert issubclass(Ours, hf.StaticLayer) and Ours(8).max_cache_len == 8
    finally:
        for name in before:
            vars(cache_utils)[name].pop("icw_test", None)


def test_is_paged():
    from transformers import DynamicCache
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    assert hf.is_paged(PagedAttentionCache.__new__(PagedAttentionCache)) and not hf.is_paged(DynamicCache())


def test_generative_classes():
    import transformers

    tasks = hf.generative_classes()
    assert len(tasks["text"]) > 100 and tasks["text"]["llama"] == "LlamaForCausalLM"
    assert tasks["image"]["llava"] == "LlavaForConditionalGeneration"
    assert tasks["encoder-decoder"]["bart"] == "BartForConditionalGeneration"
    assert tasks["speech"]["whisper"] == "WhisperForConditionalGeneration"
    assert "gemma3" in tasks["text"] and "gemma3" not in tasks["image"], "once"
    assert issubclass(getattr(transformers, tasks["text"]["qwen2"]), transformers.PreTrainedModel)


def test_attention_implementation():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=8,
    )  # fmt: skip
    for name in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
        assert hf.attention_implementation(model.config) == name


def test_sdpa_attention():
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 5, 16)
    output, _ = hf.sdpa_attention(SimpleNamespace(num_key_value_groups=2, is_causal=True), query, key, key, None)
    expected = nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("forced", ["0", "1"])
def test_heads_that_are_left_grouped(monkeypatch, forced):
    """What is said is what the operation does: grouped heads are seen by torch's operator, or are not."""
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", forced)
    grouped = []
    attend = nn.functional.scaled_dot_product_attention

    def watched(query, key, *args, **kwargs):
        grouped.append(key.shape[1] == 2)
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    query, key = torch.randn(1, 4, 3, 64), torch.randn(1, 2, 5, 64)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    hf.sdpa_attention(SimpleNamespace(num_key_value_groups=2, is_causal=True), query, key, key, mask)
    assert grouped == [hf.leaves_heads_grouped()]
    if forced == "0":
        assert not hf.leaves_heads_grouped()


# Triton


@pytest.mark.parametrize("value", ["0", "1"])
def test_triton_interprets(value):
    pytest.importorskip("triton")
    code = "from icw_compile.compat import triton; print(triton.is_interpreting())"
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={**os.environ, "TRITON_INTERPRET": value},
    )  # fmt: skip
    assert process.stdout.strip() == str(value == "1")
    assert isinstance(compat_triton.is_interpreting(), bool)


def test_heads_of_a_rank():
    model = SimpleNamespace(_tp_size=2, tp_plan={"model.layers.*.self_attn.k_proj": "colwise"})
    assert hf.heads_of_rank(model, 4) == 2 and hf.heads_of_rank(object(), 4) == 4
    with pytest.raises(ValueError, match="evenly"):
        hf.heads_of_rank(model, 3)
    model.tp_plan = {}
    assert hf.heads_of_rank(model, 4) == 4


@pytest.mark.parametrize(
    "plan", [{}, *({f"layers.*.self_attn.{name}": "colwise"} for name in ("k_proj", "qkv_proj", "q_proj"))]
)
def test_heads_of_a_rank_are_those_of_transformers(plan):
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    if not hasattr(tensor_parallel, "get_kv_heads_per_rank"):
        pytest.skip("this transformers has no function for it")
    model = SimpleNamespace(_tp_size=2, tp_plan=plan)
    assert hf.heads_of_rank(model, 4) == tensor_parallel.get_kv_heads_per_rank(plan, 4, 2)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("deepseek_v3", {}),
        ("falcon", {"multi_query": True, "new_decoder_architecture": False}),  # one head
        ("falcon", {"multi_query": False, "new_decoder_architecture": False}),
        ("gemma3_text", {}),
        ("longcat_flash", {}),  # cannot be run without storage
        ("mimo_v2_flash", {}),  # twice the heads in its windows, other channels of values
    ],
)
@pytest.mark.parametrize("given", ["model", "configuration"])
def test_sizes_are_those_that_the_model_stores(model_type, overrides, given):
    if model_type not in model_types():
        pytest.skip(f"no {model_type} in this version of transformers")
    model = tiny_causal_lm(model_type, **overrides)
    cache = transformers.StaticCache(model.config, max_cache_len=4)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    stored = [tuple((each.shape[1], each.shape[3]) for each in (layer.keys, layer.values)) for layer in cache.layers]
    assert hf.layer_sizes(model if given == "model" else model.config) == stored


def test_a_model_without_storage_shows_what_it_caches():
    from transformers import DeepseekV3Config, LlamaConfig, T5Config

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaConfig(**sizes, intermediate_size=64, vocab_size=50)
    model = hf.meta_model(llama)
    assert {each.device.type for each in model.parameters()} == {"meta"} and model.dtype == torch.bfloat16
    assert type(hf.meta_model(model)) is type(model) and hf.splits_heads(model)
    assert llama.dtype is None  # the caller's configuration stays as it was
    assert hf.latent_ranks(llama) == [None, None]
    for layer in hf.example_cache(model).layers:
        assert layer.keys.shape == layer.values.shape == (1, 2, 1, 16) and list(hf.other_states(layer)) == []
    latent = DeepseekV3Config(**{**sizes, "num_key_value_heads": 4}, kv_lora_rank=32)
    assert hf.latent_ranks(latent) == [32, 32]
    assert hf.layer_sizes(latent) == [((1, 32), (1, latent.qk_rope_head_dim))] * 2
    with pytest.raises(ValueError, match="t5 is no model that writes text"):
        hf.meta_model(T5Config())
    model.forward = lambda **kwargs: torch.ones(1).item()
    with pytest.raises(ValueError, match="llama cannot be run without storage"):
        hf.example_cache(model)


def test_states_besides_keys_and_values():
    recurrent = SimpleNamespace(conv_states={0: torch.ones(1, 3)}, recurrent_states={0: torch.ones(1), 1: None})
    assert [(name, state.numel()) for name, state in hf.other_states(recurrent)] == [
        ("conv_states", 3),
        ("recurrent_states", 1),
    ]
    assert [name for name, _ in hf.other_states(SimpleNamespace(indexer_keys=torch.ones(1, 1, 8)))] == ["indexer_keys"]
