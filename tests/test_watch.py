"""The private names behind `icw_compile.compat.watch`: what they do, not only that they are there."""

import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from icw_compile.compat import watch


class Scale(nn.Module):
    """A text is guarded by its value: each one needs a variant of its own."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = str(factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.factor)


CODE = Scale.forward.__code__


def seen(look: Callable[[], Any]) -> tuple[list[Any], Callable[..., Any]]:
    """A backend, and what ``look`` gives at each of its calls."""
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(look())
        return graph.forward

    return found, backend


@pytest.mark.parametrize("wrap", [True, False])
def test_compiled_call(wrap: bool) -> None:
    calls, backend = seen(watch.compiled_call)
    module, x = Scale(2.0), torch.ones(3)
    if wrap:
        torch.compile(module, backend=backend)(x)
    else:
        module.compile(backend=backend)
        module(x)
    (call,) = calls
    assert call.module is module and call.args[0] is x and not call.returned
    assert watch.compiled_call() is None


def test_hooks_of_a_call() -> None:
    ends: list[Any] = []

    def look() -> None:
        call = watch.compiled_call()
        assert call is not None
        call.cleanups.append(lambda: ends.append(watch.compiled_call()))
        call.context.enter_exit_hooks.append(lambda: lambda: ends.append(watch.compiled_call()))

    _, backend = seen(look)
    module = Scale(2.0)
    module.compile(backend=backend)
    results = [module(torch.ones(3)) for _ in range(2)]
    assert [end.returned for end in ends] == [True, True]
    assert all(end.result is result for end, result in zip(ends, results, strict=True))


def test_current_frame() -> None:
    frames, backend = seen(watch.current_frame)
    module = Scale(2.0)
    module.compile(backend=backend)
    module(torch.ones(3))
    (frame,) = frames
    assert frame.code is CODE and frame.local == ("self", module)
    assert [entry.compile_id for entry in watch.entries(CODE)] == [frame.compile_id]
    assert watch.current_frame() is None


def test_graph_break() -> None:
    def f(x: Tensor) -> Tensor:
        y = x + 1
        print(end="")
        return y * 2

    breaks, backend = seen(watch.graph_break)
    torch.compile(f, backend=backend)(torch.ones(3))
    first, last = breaks
    assert "print" in first.reason and "\n" not in first.reason and "test_watch.py" in first.where[-1]
    assert last is None


def test_variants_are_counted_by_module() -> None:
    modules: dict[Any, tuple[str, weakref.ref[nn.Module]]] = {}

    def look() -> None:
        frame = watch.current_frame()
        assert frame is not None and frame.local is not None
        assert watch.count_by_module(frame.code, modules) == 0
        modules[frame.compile_id] = (frame.local[0], weakref.ref(frame.local[1]))

    calls, backend = seen(look)
    several = [Scale(float(i)) for i in range(20)]
    for module in several:
        module.compile(backend=backend)
        module(torch.ones(3))
    assert len(calls) == 20 and watch.frames_seen() == 20
    assert watch.is_below_limit(CODE, modules)


def test_limit() -> None:
    closed: list[CodeType | None] = []
    watch.on_recompile_limit(closed.append)
    calls, backend = seen(lambda: None)
    for i in range(10):
        module = Scale(float(i))
        module.compile(backend=backend)
        module(torch.ones(3))
    assert len(calls) == 8 and closed == [CODE]
    assert any("recompile_limit" in text for text in watch.failures())
    watch.reopen_all()
    contexts, look = seen(watch.compiled_call)
    module.compile(backend=look)
    watch.add_to_limit(_context(module), 8)
    module(torch.ones(3))
    assert len(contexts) == 1


def _context(module: nn.Module) -> Any:
    cells = vars(module)["_compiled_call_impl"].__closure__
    return next(cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "enter_exit_hooks"))


def test_stance() -> None:
    assert watch.stance() == "default"
    with torch.compiler.set_stance("force_eager"):
        assert watch.stance() == "force_eager"
