import importlib.util
import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. That is decided where Triton is imported, as by icw_compile.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import icw_compile
from icw_compile import formats
from icw_compile.cache import turned


def _patch_language_once() -> None:
    """Triton's interpreter patches its language anew in each call in a kernel, a third of its time: once is enough."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()
    languages: dict[int, set[str]] = {}

    def patch_once(fn: Any) -> Any:
        seen = languages.get(id(fn.__globals__))
        if seen is None:
            modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
            seen = {module.__name__ for module in modules if module in (interpreter.tl, interpreter.tl.core)}
            languages[id(fn.__globals__)] = seen
        if seen <= patched:
            return None
        is_launch, scope = not patched, patch(fn)
        patched.update(seen)
        if is_launch:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_once


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        _patch_language_once()
    # Not in pyproject.toml, whose filters are resolved, and import the package, before this file is.
    config.addinivalue_line("filterwarnings", "error::icw_compile.UnquantizedCacheWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees what another one compiled."""
    monkeypatch.setattr(turned, "_others", turned._Others())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    icw_compile.reset_report()
    yield


@pytest.fixture(autouse=True)
def _stored_rows_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored in 8 bits is what is read: of the few tokens of a test, all would be kept in the model's dtype.

    Of tests that ask for kept rows, and of those that are marked ``keeps_recent``, it is not so.
    """
    if request.node.get_closest_marker("keeps_recent") is None:
        monkeypatch.setitem(formats.RECENT_TOKENS, 8, 0)
